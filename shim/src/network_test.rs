use std::os::fd::AsFd;
use std::process::Command;

use super::*;

/// A network namespace with a veth whose other end is in it as well; gone with its descriptor.
fn namespace(script: &str) -> OwnedFd {
    let mut child = Command::new("unshare")
        .args([
            "--net",
            "sh",
            "-ec",
            &format!("{script}\necho ready >&2; exec sleep 60"),
        ])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    std::io::BufRead::read_line(&mut stderr, &mut line).unwrap();
    assert_eq!(line, "ready\n");
    let netns = std::fs::File::open(format!("/proc/{}/ns/net", child.id())).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    netns.into()
}

#[test]
#[ignore = "needs root, tun, sch_ingress, cls_u32 and act_mirred"]
fn an_interface_is_mirrored_and_its_namespace_cannot_be_taken_twice() {
    let netns = namespace(
        "ip link add eth0 address 02:00:00:00:00:07 mtu 1400 type veth peer name peer
         ip addr add 10.9.0.2/24 dev eth0; ip -6 addr add fd00::2/64 dev eth0 nodad
         ip link set eth0 up; ip link set peer up
         ip route add default via 10.9.0.1; ip -6 route add default via fd00::1
         ip neigh add 10.9.0.1 lladdr 02:00:00:00:00:01 nud permanent dev eth0",
    );
    let (nics, network) = set_up(netns.as_fd()).unwrap();
    let nic = nics.iter().find(|nic| nic.name == "eth0").unwrap();
    assert_eq!((nic.mac, nic.mtu), ([2, 0, 0, 0, 0, 7], 1400));
    let guest = network
        .interfaces
        .iter()
        .find(|i| i.name == "eth0")
        .unwrap();
    assert_eq!((guest.mac.as_slice(), guest.mtu), (&nic.mac[..], 1400));
    let ips: Vec<_> = guest
        .addresses
        .iter()
        .map(|a| (a.ip.len(), a.prefix_len))
        .collect();
    assert_eq!(ips, [(4, 24), (16, 64)]);
    let gateways: Vec<_> = network.routes.iter().map(|r| r.gateway.len()).collect();
    assert_eq!(gateways, [4, 16], "{:?}", network.routes);
    assert_eq!(network.neighbours.len(), 1);
    let again = set_up(netns.as_fd()).unwrap_err();
    assert!(matches!(again, Error::Taken { .. }), "{again}");
}

#[test]
fn an_empty_namespace_is_a_pod_without_network() {
    if !sys::is_root() {
        return;
    }
    let netns = namespace("true");
    let (nics, network) = set_up(netns.as_fd()).unwrap();
    assert!(nics.is_empty() && network.interfaces.is_empty() && network.routes.is_empty());
}

fn link(index: u32, name: &str, kind: LinkLayerType) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.link_layer_type = kind;
    link.attributes = vec![
        LinkAttribute::IfName(name.into()),
        LinkAttribute::Address(vec![2, 0, 0, 0, 0, index as u8]),
        LinkAttribute::Mtu(9000),
    ];
    link
}

#[test]
fn only_ethernet_is_mirrored() {
    let links = [
        link(1, "lo", LinkLayerType::Loopback),
        link(3, "net1", LinkLayerType::Ether),
        link(2, "eth0", LinkLayerType::Ether),
        link(4, "tunl0", LinkLayerType::Tunnel),
    ];
    let mirror = mirror(&links, &[], &[], &[]);
    let names: Vec<_> = mirror
        .links
        .iter()
        .map(|(_, name, ..)| name.as_str())
        .collect();
    assert_eq!(names, ["eth0", "net1"]);
}

#[test]
fn kernel_routes_and_link_local_addresses_are_left_to_the_guest() {
    let links = [link(2, "eth0", LinkLayerType::Ether)];
    let mut own = AddressMessage::default();
    own.header.index = 2;
    own.header.prefix_len = 64;
    let mut local = own.clone();
    own.attributes = vec![AddressAttribute::Address("fd00::2".parse().unwrap())];
    local.attributes = vec![AddressAttribute::Address("fe80::1".parse().unwrap())];
    let gateway = RouteAttribute::Gateway(RouteAddress::Inet("10.0.0.1".parse().unwrap()));
    let mut default = RouteMessage::default();
    default.header.address_family = AddressFamily::Inet;
    default.header.kind = RouteType::Unicast;
    default.header.protocol = RouteProtocol::Static;
    default.header.table = RouteHeader::RT_TABLE_MAIN;
    default.attributes = vec![gateway, RouteAttribute::Oif(2), RouteAttribute::Table(254)];
    let mut kernel = default.clone();
    kernel.header.protocol = RouteProtocol::Kernel;
    let mut foreign = default.clone();
    foreign.attributes = vec![RouteAttribute::Oif(9)];
    let mirror = mirror(&links, &[own, local], &[kernel, default, foreign], &[]);
    assert_eq!(mirror.network.interfaces[0].addresses.len(), 1);
    assert_eq!(mirror.network.routes.len(), 1);
    assert_eq!(mirror.network.routes[0].device, "eth0");
    assert_eq!(mirror.network.routes[0].table, 0);
}

#[test]
fn a_prefix_that_is_not_on_link_is_not_on_link_in_the_guest() {
    let links = [link(2, "eth0", LinkLayerType::Ether)];
    let with = |ip: &str, prefix_len| {
        let mut message = AddressMessage::default();
        message.header.index = 2;
        message.header.prefix_len = prefix_len;
        message.attributes = vec![AddressAttribute::Address(ip.parse().unwrap())];
        message
    };
    let on_link = |to: RouteAddress, prefix_len, index| {
        let mut route = RouteMessage::default();
        route.header.kind = RouteType::Unicast;
        route.header.protocol = RouteProtocol::Kernel;
        route.header.destination_prefix_length = prefix_len;
        route.attributes = vec![RouteAttribute::Destination(to), RouteAttribute::Oif(index)];
        route
    };
    let addresses = [
        with("10.1.131.7", 20),
        with("fd00::2", 64),
        with("10.2.0.7", 16),
        with("fd01::2", 64),
    ];
    let routes = [
        on_link(RouteAddress::Inet("10.1.128.0".parse().unwrap()), 20, 2),
        on_link(RouteAddress::Inet6("fd00::".parse().unwrap()), 64, 2),
        // Of another interface; of another length.
        on_link(RouteAddress::Inet("10.2.0.0".parse().unwrap()), 16, 3),
        on_link(RouteAddress::Inet6("fd01::".parse().unwrap()), 60, 2),
    ];
    let mirror = mirror(&links, &addresses, &routes, &[]);
    let guests = &mirror.network.interfaces[0].addresses;
    let none: Vec<_> = guests.iter().map(|a| a.no_prefix_route).collect();
    assert_eq!(none, [false, false, true, true]);
}
