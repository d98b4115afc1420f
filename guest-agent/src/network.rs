//! The guest's network as the pod's network namespace on the host has it, by rtnetlink(7).
//!
//! Interfaces are told apart by their MAC address, for the order in which the kernel finds them
//! means nothing. What is given replaces what is there, so that the same call serves the first
//! set-up and every later change.

use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use sepal_protocol::agent::{Interface, Neighbour, Network, Route};

use crate::error::{Context, Error, Result};
use crate::users::Users;

/// How long a hot-plugged interface may take to appear.
const LINK_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest name of an interface: IFNAMSIZ without its NUL byte.
const MAX_NAME: usize = 15;
/// RT_TABLE_MAIN.
const MAIN_TABLE: u32 = 254;

/// Brings interfaces, addresses, routes and neighbours to what is given. In a pod with users of its own
/// the interfaces come to its network namespace first.
///
/// # Errors
/// With the first that is malformed or that the kernel refuses.
pub async fn apply(network: &Network, users: Option<&Users>) -> Result<()> {
    if network == &Network::new() {
        return Ok(());
    }
    let wanted = Wanted::check(network)?;
    let (connection, netlink, _) =
        rtnetlink::new_connection().context(|| "cannot open rtnetlink".into())?;
    let task = tokio::spawn(connection);
    let done = async {
        if let Some(users) = users {
            wanted.fetch(&netlink, users).await?;
        }
        wanted.apply(&netlink).await
    };
    let done = done.await;
    task.abort();
    done
}

/// An address as the kernel takes it.
struct CheckedAddress {
    ip: IpAddr,
    prefix: u8,
    /// RT_SCOPE_*.
    scope: u8,
    flags: AddressFlags,
}

/// A network whose addresses and names have been checked.
struct Wanted<'a> {
    interfaces: Vec<(&'a Interface, Vec<CheckedAddress>)>,
    /// Those that reach their gateway by another route come after it.
    routes: Vec<CheckedRoute<'a>>,
    neighbours: Vec<(&'a Neighbour, IpAddr)>,
}

struct CheckedRoute<'a> {
    route: &'a Route,
    destination: IpAddr,
    prefix_len: u8,
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    scope: u8,
}

impl<'a> Wanted<'a> {
    fn check(network: &'a Network) -> Result<Self> {
        let interfaces = network
            .interfaces
            .iter()
            .map(|interface| {
                check_name(&interface.name)?;
                if interface.mac.len() != 6 {
                    return Err(invalid(format!(
                        "the MAC of {} is malformed",
                        interface.name
                    )));
                }
                let addresses = interface
                    .addresses
                    .iter()
                    .map(|address| {
                        let ip = ip(&address.ip)?;
                        let prefix = prefix(address.prefix_len, ip)?;
                        let mut flags = AddressFlags::empty();
                        // Nobody else has it: CNI has seen to that.
                        flags.set(AddressFlags::Nodad, ip.is_ipv6());
                        flags.set(AddressFlags::Noprefixroute, address.no_prefix_route);
                        Ok(CheckedAddress {
                            ip,
                            prefix,
                            scope: small(address.scope)?,
                            flags,
                        })
                    })
                    .collect::<Result<_>>()?;
                Ok((interface, addresses))
            })
            .collect::<Result<_>>()?;
        let mut routes = network
            .routes
            .iter()
            .map(CheckedRoute::check)
            .collect::<Result<Vec<_>>>()?;
        routes.sort_by_key(|route| (route.gateway.is_some(), !route.route.onlink));
        let neighbours = network
            .neighbours
            .iter()
            .map(|neighbour| Ok((neighbour, ip(&neighbour.ip)?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            interfaces,
            routes,
            neighbours,
        })
    }

    /// Takes interfaces that are not here yet from where they appear.
    async fn fetch(&self, netlink: &Handle, users: &Users) -> Result<()> {
        let present = links(netlink).await?;
        let opened = users.in_first_network(rtnetlink::new_connection);
        let opened = opened.and_then(|opened| opened);
        let (connection, first, _) = opened.context(|| "cannot open rtnetlink".into())?;
        let task = tokio::spawn(connection);
        let fetch = async {
            for (interface, _) in &self.interfaces {
                if present.iter().any(|link| has_mac(link, &interface.mac)) {
                    continue;
                }
                let index = find(&first, &interface.mac).await?.header.index;
                let moved = LinkUnspec::new_with_index(index)
                    .setns_by_fd(users.network().as_raw_fd())
                    .build();
                let what = || format!("cannot move {} to the pod's namespace", interface.name);
                let moved = first.link().set(moved).execute().await;
                moved.map_err(|error| refused(what(), error))?;
            }
            Ok(())
        };
        let done = fetch.await;
        task.abort();
        done
    }

    async fn apply(&self, netlink: &Handle) -> Result<()> {
        for (interface, addresses) in &self.interfaces {
            let link = find(netlink, &interface.mac).await?;
            set_link(netlink, &link, interface).await?;
            set_addresses(netlink, link.header.index, &interface.name, addresses).await?;
        }
        let links = links(netlink).await?;
        let index = |name: &str| {
            links
                .iter()
                .find(|link| name_of(link) == Some(name))
                .map(|link| link.header.index)
        };
        self.set_routes(netlink, &index).await?;
        for (neighbour, address) in &self.neighbours {
            let device = index(&neighbour.device).ok_or_else(|| no_interface(&neighbour.device))?;
            let state = u16::try_from(neighbour.state).unwrap_or(0);
            netlink
                .neighbours()
                .add(device, *address)
                .link_layer_address(&neighbour.mac)
                .state(NeighbourState::from(state))
                .replace()
                .execute()
                .await
                .map_err(|error| refused(format!("cannot add the neighbour {address}"), error))?;
        }
        Ok(())
    }

    async fn set_routes(
        &self,
        netlink: &Handle,
        index: &(dyn Fn(&str) -> Option<u32> + Sync),
    ) -> Result<()> {
        let mut present = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            let mut found = netlink.route().get(filter).execute();
            // A kernel without IPv6 refuses to list its routes.
            while let Ok(Some(route)) = found.try_next().await {
                // What the agent adds is "static"; the kernel looks after its own.
                if route.header.protocol == RouteProtocol::Static
                    && route.header.kind == RouteType::Unicast
                {
                    present.push(route);
                }
            }
        }
        for route in &self.routes {
            let device = match route.route.device.as_str() {
                "" => None,
                name => Some(index(name).ok_or_else(|| no_interface(name))?),
            };
            let message = route.message(device)?;
            present.retain(|old| !same_route(old, &message));
            netlink
                .route()
                .add(message)
                .replace()
                .execute()
                .await
                .map_err(|error| {
                    let to = (route.destination, route.prefix_len);
                    refused(format!("cannot add the route to {}/{}", to.0, to.1), error)
                })?;
        }
        for old in present {
            if let Err(error) = netlink.route().del(old).execute().await {
                tracing::warn!(%error, "cannot remove a route");
            }
        }
        Ok(())
    }
}

impl<'a> CheckedRoute<'a> {
    fn check(route: &'a Route) -> Result<Self> {
        let some = |bytes: &[u8]| {
            if bytes.is_empty() {
                Ok(None)
            } else {
                ip(bytes).map(Some)
            }
        };
        let (gateway, source) = (some(&route.gateway)?, some(&route.source)?);
        let given = some(&route.destination)?;
        let is_ipv6 = route.ipv6
            || [given, gateway, source]
                .into_iter()
                .flatten()
                .any(|address| address.is_ipv6());
        let default: IpAddr = if is_ipv6 {
            [0_u8; 16].into()
        } else {
            [0_u8; 4].into()
        };
        let destination = given.unwrap_or(default);
        let prefix_len = match given {
            Some(address) => prefix(route.prefix_len, address)?,
            None => 0,
        };
        if [Some(destination), gateway, source]
            .into_iter()
            .flatten()
            .any(|address| address.is_ipv6() != is_ipv6)
        {
            return Err(invalid(format!(
                "the route to {destination} mixes IPv4 and IPv6"
            )));
        }
        let scope = small(route.scope)?;
        Ok(Self {
            route,
            destination,
            prefix_len,
            gateway,
            source,
            scope,
        })
    }

    fn message(&self, device: Option<u32>) -> Result<RouteMessage> {
        let mut route = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(self.destination, self.prefix_len)
            .map_err(|error| invalid(format!("a route: {error}")))?
            .scope(self.scope.into())
            .table_id(if self.route.table == 0 {
                MAIN_TABLE
            } else {
                self.route.table
            });
        if let Some(gateway) = self.gateway {
            route = route
                .gateway(gateway)
                .map_err(|error| invalid(format!("a route: {error}")))?;
        }
        if let Some(source) = self.source {
            route = route
                .pref_source(source)
                .map_err(|error| invalid(format!("a route: {error}")))?;
        }
        if let Some(device) = device {
            route = route.output_interface(device);
        }
        if self.route.metric != 0 {
            route = route.priority(self.route.metric);
        }
        if self.route.onlink {
            route = route.onlink();
        }
        let mut message = route.build();
        if self.route.mtu != 0 {
            let mtu = vec![RouteMetric::Mtu(self.route.mtu)];
            message.attributes.push(RouteAttribute::Metrics(mtu));
        }
        Ok(message)
    }
}

/// Whether two routes lead to the same destination with the same priority, which is how the kernel
/// tells routes apart.
fn same_route(a: &RouteMessage, b: &RouteMessage) -> bool {
    let key = |route: &RouteMessage| {
        let mut destination = None;
        let mut metric = None;
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Destination(
                    address @ (RouteAddress::Inet(_) | RouteAddress::Inet6(_)),
                ) => destination = Some(address.clone()),
                RouteAttribute::Priority(value) => metric = Some(*value),
                _ => {}
            }
        }
        // The kernel leaves the destination of a default route out, and gives IPv6 a metric.
        let length = route.header.destination_prefix_length;
        let destination = destination.filter(|_| length > 0);
        let is_ipv6 = route.header.address_family == AddressFamily::Inet6;
        let metric = metric.unwrap_or(if is_ipv6 { 1024 } else { 0 });
        (
            route.header.address_family,
            length,
            route.header.table,
            destination,
            metric,
        )
    };
    key(a) == key(b)
}

async fn links(netlink: &Handle) -> Result<Vec<LinkMessage>> {
    netlink
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(|error| refused("cannot list the interfaces".into(), error))
}

fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
}

fn has_mac(link: &LinkMessage, mac: &[u8]) -> bool {
    let mut attributes = link.attributes.iter();
    attributes.any(|attribute| matches!(attribute, LinkAttribute::Address(own) if own == mac))
}

/// The interface with a MAC address. Waits a little: it may just be plugged in.
async fn find(netlink: &Handle, mac: &[u8]) -> Result<LinkMessage> {
    let mut pause = Duration::from_millis(1);
    let deadline = tokio::time::Instant::now() + LINK_TIMEOUT;
    loop {
        if let Some(link) = links(netlink)
            .await?
            .into_iter()
            .find(|link| has_mac(link, mac))
        {
            return Ok(link);
        }
        if tokio::time::Instant::now() > deadline {
            let mac: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
            let mac = mac.join(":");
            return Err(Error::Timeout(format!(
                "the guest has no interface with MAC {mac}"
            )));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Gives an interface its name and MTU, and brings it up.
async fn set_link(netlink: &Handle, link: &LinkMessage, wanted: &Interface) -> Result<()> {
    let index = link.header.index;
    let change = |message: LinkMessage| async {
        netlink
            .link()
            .change(message)
            .execute()
            .await
            .map_err(|error| refused(format!("cannot set up interface {}", wanted.name), error))
    };
    if name_of(link) != Some(&wanted.name) {
        // Where two interfaces swap names, the one that is in the way steps aside.
        let others = links(netlink).await?;
        if let Some(other) = others
            .iter()
            .find(|other| name_of(other) == Some(&wanted.name))
        {
            let aside = format!("sepal{}", other.header.index);
            let other = LinkUnspec::new_with_index(other.header.index)
                .down()
                .name(aside);
            change(other.build()).await?;
        }
        if link.header.flags.contains(LinkFlags::Up) {
            change(LinkUnspec::new_with_index(index).down().build()).await?;
        }
        let named = LinkUnspec::new_with_index(index).name(wanted.name.clone());
        change(named.build()).await?;
    }
    // The host's addresses are known to be free: no time for finding duplicates.
    let dad = format!("/proc/sys/net/ipv6/conf/{}/accept_dad", wanted.name);
    let _ = std::fs::write(dad, "0");
    let mut up = LinkUnspec::new_with_index(index).up();
    if wanted.mtu != 0 {
        up = up.mtu(wanted.mtu);
    }
    change(up.build()).await
}

/// Adds the addresses that are wanted, then removes what else there is but what the kernel made
/// for itself.
async fn set_addresses(
    netlink: &Handle,
    index: u32,
    name: &str,
    wanted: &[CheckedAddress],
) -> Result<()> {
    for CheckedAddress {
        ip,
        prefix,
        scope,
        flags,
    } in wanted
    {
        let mut add = netlink.address().add(index, *ip, *prefix).replace();
        let message = add.message_mut();
        message.header.scope = (*scope).into();
        // Those that the header has room for are in this attribute, too, and it counts.
        message.attributes.push(AddressAttribute::Flags(*flags));
        add.execute()
            .await
            .map_err(|error| refused(format!("cannot add {ip}/{prefix} to {name}"), error))?;
    }
    let present: Vec<AddressMessage> = netlink
        .address()
        .get()
        .set_link_index_filter(index)
        .execute()
        .try_collect()
        .await
        .map_err(|error| refused(format!("cannot list the addresses of {name}"), error))?;
    for message in present {
        let address = message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                AddressAttribute::Address(address) if address.is_ipv6() => Some(*address),
                _ => None,
            });
        let Some(address) = address else { continue };
        let own = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        let kept = wanted
            .iter()
            .any(|a| a.ip == address && a.prefix == message.header.prefix_len);
        if !own && !kept {
            netlink
                .address()
                .del(message)
                .execute()
                .await
                .map_err(|error| refused(format!("cannot remove {address} from {name}"), error))?;
        }
    }
    Ok(())
}

fn invalid(what: String) -> Error {
    Error::Invalid(what)
}

fn no_interface(name: &str) -> Error {
    Error::Invalid(format!("the guest has no interface {name:?}"))
}

fn refused(what: String, error: rtnetlink::Error) -> Error {
    Error::Network {
        what,
        source: Box::new(error),
    }
}

fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.chars().all(plain)
    {
        return Err(invalid(format!("{name:?} is not a name of an interface")));
    }
    Ok(())
}

fn ip(bytes: &[u8]) -> Result<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    <[u8; 16]>::try_from(bytes)
        .map(IpAddr::from)
        .map_err(|_| invalid(format!("an IP address has {} bytes", bytes.len())))
}

fn prefix(length: u32, address: IpAddr) -> Result<u8> {
    let most = if address.is_ipv6() { 128 } else { 32 };
    u8::try_from(length)
        .ok()
        .filter(|length| *length <= most)
        .ok_or_else(|| invalid(format!("{address}/{length} is not an address")))
}

fn small(scope: u32) -> Result<u8> {
    u8::try_from(scope).map_err(|_| invalid(format!("{scope} is not a scope")))
}

#[cfg(test)]
#[path = "network_test.rs"]
mod tests;
