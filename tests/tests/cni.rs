//! Networks that CNI's plugins make, called as a runtime calls them: a pair of ptp with a limit of
//! bandwidth, and a macvlan beside it, as Multus adds one.

use std::time::Instant;

use sepal_tests::{Bed, Container, Scratch, seconds};

/// Calls a plugin: its command, the namespace's number, the interface, and the plugin's name; the
/// network comes by standard input. To be followed by what is to be called.
const CNI: &str = r#"
    set -e
    cni() {
        CNI_COMMAND=$1 CNI_CONTAINERID=$name-$2 CNI_NETNS=$dir/$2 CNI_IFNAME=$3 CNI_PATH=/opt/cni/bin \
            /opt/cni/bin/$4
    }
    # What a plugin further down the chain is told: the network, with the result so far.
    after() { jq -c --slurpfile before "$1" '. + { prevResult: $before[0] }'; }
    name=$0 dir=$1
    ptp='{ "cniVersion": "1.0.0", "name": "'$name'", "type": "ptp", "mtu": 1400, "ipam": {
        "type": "host-local", "dataDir": "'$dir'/leases",
        "ranges": [[{ "subnet": "10.76.0.0/24" }], [{ "subnet": "fd76::/64" }]],
        "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] } }'
    limit='{ "cniVersion": "1.0.0", "name": "'$name'", "type": "bandwidth",
        "ingressRate": 80000000, "ingressBurst": 1000000, "egressRate": 40000000, "egressBurst": 1000000 }'
    second() {
        echo '{ "cniVersion": "1.0.0", "name": "'$name'-2", "type": "macvlan", "master": "'$name'", "ipam": {
            "type": "static", "addresses": [{ "address": "10.75.0.'$1'/24" }, { "address": "fd75::'$1'/64" }] } }'
    }
"#;
const ADD: &str = r#"
    ip link add "$name" type bridge
    ip link set "$name" up
    for pod in 1 2; do
        touch "$dir/$pod"
        unshare --net="$dir/$pod" true
        nsenter --net="$dir/$pod" ip link set lo up
        echo "$ptp" | cni ADD $pod eth0 ptp >"$dir/result-$pod"
        echo "$limit" | after "$dir/result-$pod" | cni ADD $pod eth0 bandwidth >"$dir/limited-$pod"
        second $pod | cni ADD $pod net1 macvlan >"$dir/second-$pod"
    done
"#;
const DEL: &str = r#"
    for pod in 1 2; do
        second $pod | cni DEL $pod net1 macvlan
        echo "$limit" | after "$dir/result-$pod" | cni DEL $pod eth0 bandwidth
        echo "$ptp" | cni DEL $pod eth0 ptp
        umount "$dir/$pod"
    done
    ip link del "$name"
"#;

/// Two namespaces with their networks.
struct Networks<'bed> {
    bed: &'bed Bed,
    name: String,
    scratch: Scratch<'bed>,
}

impl<'bed> Networks<'bed> {
    fn new(bed: &'bed Bed) -> Self {
        let networks = Self {
            bed,
            // An interface's name has fifteen letters at most.
            name: format!("sc{}", std::process::id() % 1_000_000),
            scratch: bed.scratch(),
        };
        networks.run(ADD);
        networks
    }

    fn run(&self, what: &str) {
        let script = format!("{CNI}{what}");
        let argv = ["sh", "-c", &script, &self.name, self.scratch.path()];
        self.bed.command(argv).run().success();
    }

    /// The address that ptp has given, with neither family's prefix.
    fn address(&self, pod: u32, family: usize) -> String {
        let result = self.bed.read(&self.scratch.file(&format!("result-{pod}")));
        let result: serde_json::Value = serde_json::from_str(&result).unwrap();
        let address = result["ips"][family]["address"].as_str().unwrap();
        address.split('/').next().unwrap().to_owned()
    }

    fn start(&self, pod: u32) -> Container<'bed> {
        let namespace = format!("network:{}", self.scratch.file(&pod.to_string()));
        let serve = "for port in 7 8; do nc -ll -p $port -e cat & done; wait";
        let argv = ["sh", "-c", serve];
        self.bed
            .ctr_start(&["--with-ns", &namespace], &self.bed.busybox(), &argv)
    }
}

impl Drop for Networks<'_> {
    fn drop(&mut self) {
        self.run(DEL);
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn interfaces_of_ptp_and_macvlan_and_a_limit_of_bandwidth() {
    let bed = Bed::get();
    let networks = Networks::new(&bed);
    let _server = networks.start(1);
    let client = networks.start(2);

    for (interface, mtu) in [("eth0", "1400"), ("net1", "1500")] {
        let file = format!("/sys/class/net/{interface}/mtu");
        assert_eq!(
            client.exec(["cat", &file]).success().out(),
            mtu,
            "{interface}"
        );
    }
    let macvlan = ["10.75.0.1".to_owned(), "fd75::1".to_owned()];
    let ptp = [0, 1].map(|family| networks.address(1, family));
    for host in macvlan.iter().chain(&ptp) {
        let ask = format!("echo asked | nc -w 30 {host} 7");
        assert_eq!(client.sh(&ask).success().out(), "asked", "{host}");
    }
    // The gateway is the host's end of the pair.
    let default = client.sh("ip route | grep ^default").success().out();
    assert!(default.contains("dev eth0"), "{default}");

    // 10 MB at 40 Mbit/s take two seconds, at least; without a limit they are a matter of moments.
    let much = |host: &str| {
        let send = format!("head -c 10000000 /dev/zero | nc -w 60 {host} 8 | wc -c");
        let begun = Instant::now();
        let sent = client.exec_command(&[], ["sh", "-c", &send]);
        let sent = sent.patience(seconds(120)).run().success().out();
        assert_eq!(sent, "10000000", "{host}");
        begun.elapsed()
    };
    assert!(much(&ptp[0]) > seconds(2).min(bed.scaled(seconds(2), seconds(1))));
    much(&macvlan[0]);
}
