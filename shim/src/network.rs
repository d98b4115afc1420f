//! The pod's network: what is in its namespace on the host is mirrored into the guest.
//!
//! Each Ethernet interface of the namespace gets a tap beside it, and tc redirects what arrives at
//! one to the other. The interface keeps its addresses on the host, where they receive nothing; the
//! guest has the same MAC, MTU, addresses, routes and permanent neighbours. The filter is `u32`,
//! which every kernel with tc has. [`mirror`] is pure; [`set_up`] does the work on a thread inside
//! the namespace and decides at once: an empty namespace is a pod without a network.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use futures::{StreamExt, TryStreamExt};
use protobuf::MessageField;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, route::RouteHeader};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use sepal_protocol::agent;

use crate::sys;

/// Most interfaces of one pod: each is a PCI device of the VM.
const MAX_INTERFACES: usize = 16;
/// ETH_P_ALL of linux/if_ether.h, in network byte order as tc wants it.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();
/// Handle of the ingress qdisc, tc(8): ffff:.
const INGRESS: u32 = 0xffff_0000;

/// Why a pod has no network.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("network namespace {}: {source}", .path.display())]
    Namespace {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the pod's network: cannot {what}: {source}")]
    Netlink {
        what: &'static str,
        source: rtnetlink::Error,
    },
    #[error("the pod's network: cannot {what}: {source}")]
    Io {
        what: &'static str,
        source: std::io::Error,
    },
    #[error(
        "interface {name}: traffic is redirected already; one network namespace serves one pod \
         and cannot be shared between virtual machines"
    )]
    Taken { name: String },
    #[error(
        "the pod has {count} network interfaces: at most {} are supported",
        MAX_INTERFACES
    )]
    TooMany { count: usize },
}

/// One interface of the pod, ready for the VM.
#[derive(Debug)]
pub struct Nic {
    /// Name in the namespace and in the guest.
    pub name: String,
    /// The guest's address.
    pub mac: [u8; 6],
    /// In bytes.
    pub mtu: u16,
    /// The tap's descriptor, and with it the tap.
    pub tap: OwnedFd,
}

/// What the namespace has.
#[derive(Debug, Default)]
pub struct Mirror {
    /// Index on the host, name, address and MTU, in the order of the indices.
    pub links: Vec<(u32, String, [u8; 6], u16)>,
    /// For the guest.
    pub network: agent::Network,
}

/// Scans the namespace, makes the taps and redirects the traffic.
///
/// # Errors
/// The kernel lacks something, or the namespace belongs to another VM already.
pub fn set_up(netns: BorrowedFd<'_>) -> Result<(Vec<Nic>, agent::Network), Error> {
    let io = |what| move |source| Error::Io { what, source };
    sys::in_netns(netns, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(io("start a runtime for netlink"))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(io("open netlink"))?;
            tokio::spawn(connection);
            let mirror = scan(&handle).await?;
            if mirror.links.len() > MAX_INTERFACES {
                return Err(Error::TooMany {
                    count: mirror.links.len(),
                });
            }
            let mut nics = Vec::new();
            for (number, (index, name, mac, mtu)) in mirror.links.into_iter().enumerate() {
                let tap = attach_tap(&handle, number, index, &name, mtu).await?;
                nics.push(Nic {
                    name,
                    mac,
                    mtu,
                    tap,
                });
            }
            Ok((nics, mirror.network))
        })
    })
    .map_err(io("enter the network namespace"))?
}

fn netlink(what: &'static str) -> impl FnOnce(rtnetlink::Error) -> Error {
    move |source| Error::Netlink { what, source }
}

async fn scan(handle: &Handle) -> Result<Mirror, Error> {
    let links: Vec<_> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(netlink("list interfaces"))?;
    // Most often there is only the loopback: nothing more to ask.
    if !links.iter().any(|l| ethernet(l).is_some()) {
        return Ok(Mirror::default());
    }
    let addresses: Vec<_> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(netlink("list addresses"))?;
    let mut routes = Vec::new();
    for query in [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ] {
        let mut stream = std::pin::pin!(handle.route().get(query).execute());
        while let Some(route) = stream.next().await {
            routes.push(route.map_err(netlink("list routes"))?);
        }
    }
    let neighbours: Vec<_> = handle
        .neighbours()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(netlink("list neighbours"))?;
    Ok(mirror(&links, &addresses, &routes, &neighbours))
}

async fn attach_tap(
    handle: &Handle,
    number: usize,
    index: u32,
    name: &str,
    mtu: u16,
) -> Result<OwnedFd, Error> {
    let tap_name = format!("sepal{number}");
    let tap = sys::open_tap(&tap_name).map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => Error::Taken { name: name.into() },
        _ => Error::Io {
            what: "make a tap (is the kernel's module tun loaded?)",
            source,
        },
    })?;
    let tap_index = nix::net::if_::if_nametoindex(tap_name.as_str()).map_err(|e| Error::Io {
        what: "find the tap",
        source: e.into(),
    })?;
    let up = LinkUnspec::new_with_index(tap_index)
        .mtu(mtu.into())
        .up()
        .build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(netlink("bring the tap up"))?;
    for (from, to) in [(index, tap_index), (tap_index, index)] {
        let from = i32::try_from(from).unwrap_or(i32::MAX);
        let added = handle.qdisc().add(from).ingress().execute().await;
        if let Err(rtnetlink::Error::NetlinkError(e)) = &added
            && e.raw_code() == -libc::EEXIST
        {
            return Err(Error::Taken { name: name.into() });
        }
        added.map_err(netlink(
            "add an ingress qdisc (is the kernel's module sch_ingress loaded?)",
        ))?;
        handle
            .traffic_filter(from)
            .add()
            .parent(INGRESS)
            .protocol(ALL_PROTOCOLS)
            .redirect(to)
            .map_err(netlink("describe the redirection"))?
            .execute()
            .await
            .map_err(netlink(
                "redirect traffic (are the kernel's modules cls_u32 and act_mirred loaded?)",
            ))?;
    }
    Ok(tap)
}

/// Name, address and MTU of an interface that a guest can have.
fn ethernet(link: &LinkMessage) -> Option<(String, [u8; 6], u16)> {
    if link.header.link_layer_type != LinkLayerType::Ether
        || link.header.flags.contains(LinkFlags::Loopback)
    {
        return None;
    }
    let (mut name, mut mac, mut mtu) = (None, None, 1500);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Address(value) => mac = <[u8; 6]>::try_from(value.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = u16::try_from(*value).unwrap_or(u16::MAX),
            _ => {}
        }
    }
    Some((name?, mac?, mtu))
}

/// What the guest gets of what the namespace has. Pure.
///
/// The kernel of the guest makes the same routes for its addresses, and the same link-local address
/// of the same MAC, as the host's has: those are left out. Where somebody has taken such a route away,
/// as ptp does, the guest's is not made.
pub fn mirror(
    links: &[LinkMessage],
    addresses: &[AddressMessage],
    routes: &[RouteMessage],
    neighbours: &[NeighbourMessage],
) -> Mirror {
    let mut mirror = Mirror::default();
    for link in links {
        let Some((name, mac, mtu)) = ethernet(link) else {
            continue;
        };
        let index = link.header.index;
        let of_this = addresses.iter().filter(|a| a.header.index == index);
        mirror.network.interfaces.push(agent::Interface {
            name: name.clone(),
            mac: mac.to_vec(),
            mtu: mtu.into(),
            addresses: of_this.filter_map(|a| address(a, routes)).collect(),
            ..Default::default()
        });
        mirror.links.push((index, name, mac, mtu));
    }
    mirror.links.sort();
    let name_of = |index: u32| {
        mirror
            .links
            .iter()
            .find(|(i, ..)| *i == index)
            .map(|(_, name, ..)| name.clone())
    };
    mirror.network.routes = routes.iter().filter_map(|r| route(r, &name_of)).collect();
    // A route on link must be there before one that goes through a gateway behind it.
    mirror.network.routes.sort_by_key(|r| !r.gateway.is_empty());
    mirror.network.neighbours = neighbours
        .iter()
        .filter_map(|n| neighbour(n, &name_of))
        .collect();
    mirror
}

fn address(message: &AddressMessage, routes: &[RouteMessage]) -> Option<agent::Address> {
    let (mut local, mut remote) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => remote = Some(*ip),
            _ => {}
        }
    }
    // IFA_LOCAL where it is there, rtnetlink(7): on a point-to-point link the other is the peer's.
    let ip = local.or(remote)?;
    if let std::net::IpAddr::V6(v6) = ip
        && v6.is_unicast_link_local()
    {
        return None;
    }
    let scope: u8 = message.header.scope.into();
    let prefix_len = message.header.prefix_len;
    let network = network(remote.unwrap_or(ip), prefix_len);
    let leads_there = |route: &RouteMessage| {
        route.header.protocol == RouteProtocol::Kernel
            && route.header.kind == RouteType::Unicast
            && route.header.destination_prefix_length == prefix_len
            && has(route, |a| *a == RouteAttribute::Oif(message.header.index))
            && has(route, |a| {
                matches!(a, RouteAttribute::Destination(to)
                    if route_octets(to).as_ref() == Some(&network))
            })
    };
    Some(agent::Address {
        ip: octets(ip),
        prefix_len: prefix_len.into(),
        scope: scope.into(),
        no_prefix_route: !routes.iter().any(leads_there),
        ..Default::default()
    })
}

fn has(route: &RouteMessage, what: impl Fn(&RouteAttribute) -> bool) -> bool {
    route.attributes.iter().any(what)
}

/// An address without its host part.
fn network(ip: std::net::IpAddr, prefix_len: u8) -> Vec<u8> {
    let mut bytes = octets(ip);
    for (index, byte) in bytes.iter_mut().enumerate() {
        let bits = usize::from(prefix_len).saturating_sub(8 * index).min(8);
        *byte &= !(0xff_u16 >> bits) as u8;
    }
    bytes
}

fn octets(ip: std::net::IpAddr) -> Vec<u8> {
    match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn route(message: &RouteMessage, name_of: &dyn Fn(u32) -> Option<String>) -> Option<agent::Route> {
    let header = &message.header;
    let by_kernel = matches!(
        header.protocol,
        RouteProtocol::Kernel | RouteProtocol::IcmpRedirect
    );
    if header.kind != RouteType::Unicast || by_kernel || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let scope: u8 = header.scope.into();
    let mut route = agent::Route {
        prefix_len: header.destination_prefix_length.into(),
        scope: scope.into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
        table: header.table.into(),
        ipv6: header.address_family == AddressFamily::Inet6,
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(ip) => route.destination = route_octets(ip)?,
            RouteAttribute::Gateway(ip) => route.gateway = route_octets(ip)?,
            RouteAttribute::PrefSource(ip) => route.source = route_octets(ip)?,
            RouteAttribute::Oif(index) => route.device = name_of(*index)?,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        route.mtu = *mtu;
                    }
                }
            }
            _ => {}
        }
    }
    if route.table == u32::from(RouteHeader::RT_TABLE_MAIN) {
        route.table = 0;
    }
    Some(route)
}

fn route_octets(address: &RouteAddress) -> Option<Vec<u8>> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.octets().to_vec()),
        RouteAddress::Inet6(ip) => Some(ip.octets().to_vec()),
        _ => None,
    }
}

fn neighbour(
    message: &NeighbourMessage,
    name_of: &dyn Fn(u32) -> Option<String>,
) -> Option<agent::Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbour = agent::Neighbour {
        device: name_of(message.header.ifindex)?,
        state: u16::from(message.header.state).into(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                neighbour.ip = ip.octets().to_vec();
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                neighbour.ip = ip.octets().to_vec();
            }
            NeighbourAttribute::LinkLayerAddress(mac) => neighbour.mac = mac.clone(),
            _ => {}
        }
    }
    (!neighbour.ip.is_empty() && neighbour.mac.len() == 6).then_some(neighbour)
}

/// For a request: none where the pod has no network.
pub fn field(network: &agent::Network) -> MessageField<agent::Network> {
    MessageField::some(network.clone())
}

#[cfg(test)]
#[path = "network_test.rs"]
mod tests;
