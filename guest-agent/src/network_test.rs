use sepal_protocol::agent::Address;

use super::*;

fn route(destination: &[u8], prefix_len: u32, gateway: &[u8]) -> Route {
    Route {
        destination: destination.to_vec(),
        prefix_len,
        gateway: gateway.to_vec(),
        ..Default::default()
    }
}

#[test]
fn routes_to_gateways_come_after_what_reaches_them() {
    let mut onlink = route(&[], 0, &[10, 0, 0, 1]);
    onlink.onlink = true;
    let network = Network {
        routes: vec![
            route(&[], 0, &[10, 0, 0, 1]),
            onlink,
            route(&[10, 0, 0, 0], 24, &[]),
        ],
        ..Default::default()
    };
    let wanted = Wanted::check(&network).unwrap();
    let order: Vec<_> = wanted
        .routes
        .iter()
        .map(|route| (route.gateway.is_some(), route.route.onlink))
        .collect();
    assert_eq!(order, [(false, false), (true, true), (true, false)]);
}

#[test]
fn a_default_route_knows_its_family() {
    let four = CheckedRoute::check(&Route::default()).map(|route| route.destination.is_ipv6());
    assert!(!four.unwrap());
    let flagged = Route {
        ipv6: true,
        ..Default::default()
    };
    assert!(CheckedRoute::check(&flagged).unwrap().destination.is_ipv6());
    let by_gateway = route(&[], 0, &[0xfd; 16]);
    assert!(
        CheckedRoute::check(&by_gateway)
            .unwrap()
            .destination
            .is_ipv6()
    );
}

#[test]
fn malformed_networks_are_refused() {
    let interface = |name: &str, mac: &[u8], ip: &[u8], prefix_len: u32| Network {
        interfaces: vec![Interface {
            name: name.into(),
            mac: mac.to_vec(),
            addresses: vec![Address {
                ip: ip.to_vec(),
                prefix_len,
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    assert!(Wanted::check(&interface("eth0", &[2; 6], &[10, 0, 0, 2], 24)).is_ok());
    for bad in [
        interface("../eth0", &[2; 6], &[10, 0, 0, 2], 24),
        interface("a-name-of-17-char", &[2; 6], &[10, 0, 0, 2], 24),
        interface("eth0", &[2; 5], &[10, 0, 0, 2], 24),
        interface("eth0", &[2; 6], &[10, 0, 0], 24),
        interface("eth0", &[2; 6], &[10, 0, 0, 2], 33),
    ] {
        assert!(Wanted::check(&bad).is_err());
    }
    let mixed = route(&[10, 0, 0, 0], 8, &[0xfd; 16]);
    assert!(CheckedRoute::check(&mixed).is_err());
}

#[test]
fn a_route_is_known_by_destination_and_metric() {
    let message = |route: &Route| {
        CheckedRoute::check(route)
            .unwrap()
            .message(Some(2))
            .unwrap()
    };
    let first = route(&[10, 0, 0, 0], 24, &[10, 9, 0, 1]);
    let other_gateway = route(&[10, 0, 0, 0], 24, &[10, 9, 0, 2]);
    assert!(same_route(&message(&first), &message(&other_gateway)));
    let mut other_metric = first.clone();
    other_metric.metric = 5;
    assert!(!same_route(&message(&first), &message(&other_metric)));
    assert!(!same_route(
        &message(&first),
        &message(&route(&[], 0, &[10, 9, 0, 1]))
    ));
}
