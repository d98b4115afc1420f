//! The network of a namespace that somebody else has made, as CNI plugins make them: several
//! interfaces, both families, large frames, firewalls.

use std::sync::atomic::{AtomicU32, Ordering};

use sepal_tests::{Bed, Container, Scratch, eventually, seconds};

/// Two namespaces below `$1`, each with two interfaces of large frames on bridges of their own, `$0` by
/// name. (Not by `ip netns`, which leaves a mount behind.)
const WIRE: &str = r#"
    set -e
    for net in 1 2; do
        ip link add $0$net type bridge
        ip link set $0$net mtu 9000 up
    done
    for pod in 1 2; do
        touch $1/$pod
        unshare --net=$1/$pod true
        inside="nsenter --net=$1/$pod ip"
        for net in 1 2; do
            ip link add $0$net$pod type veth peer name net$net netns $1/$pod
            ip link set $0$net$pod mtu 9000 master $0$net up
            $inside link set net$net mtu 9000 up
            $inside address add 10.77.$net.$pod/24 dev net$net
            $inside address add fd77:$net::$pod/64 dev net$net nodad
        done
        $inside link set lo up
        $inside route add 192.0.2.0/24 via 10.77.2.$((3 - pod))
    done"#;
const UNWIRE: &str = "for n in 1 2; do umount $1/$n; ip link del $0$n; done";

/// Answers what comes on a port, over TCP and UDP and in both families.
const ECHO: &str = r#"
import socket, threading
def serve_tcp(listener):
    while True:
        conn, _ = listener.accept()
        threading.Thread(target=echo, args=(conn,)).start()
def echo(conn):
    while data := conn.recv(1 << 16):
        conn.sendall(data)
    conn.close()
def serve_udp(sock):
    while True:
        data, peer = sock.recvfrom(1 << 16)
        sock.sendto(data, peer)
threads = []
for family, any in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
    for kind, serve in ((socket.SOCK_STREAM, serve_tcp), (socket.SOCK_DGRAM, serve_udp)):
        s = socket.socket(family, kind)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        s.bind((any, 7)); kind == socket.SOCK_STREAM and s.listen(5)
        threads.append(threading.Thread(target=serve, args=(s,))); threads[-1].start()
open("/tmp/ready", "w").close()
"#;
/// Asks a peer: megabytes over TCP, a datagram as large as a frame.
const ASK: &str = r#"
import hashlib, os, socket, sys, threading
host, much = sys.argv[1], os.urandom(8 << 20)
conn = socket.create_connection((host, 7), 30)
def send():
    conn.sendall(much); conn.shutdown(socket.SHUT_WR)
threading.Thread(target=send).start()
back = b""
while data := conn.recv(1 << 20): back += data
assert hashlib.sha256(back).digest() == hashlib.sha256(much).digest(), len(back)
family = socket.AF_INET6 if ":" in host else socket.AF_INET
sock = socket.socket(family, socket.SOCK_DGRAM); sock.settimeout(30)
sock.sendto(much[:8900], (host, 7))
assert sock.recv(1 << 16) == much[:8900]
print("answered")
"#;

/// See [`WIRE`].
struct Wires<'bed> {
    bed: &'bed Bed,
    name: String,
    scratch: Scratch<'bed>,
}

impl<'bed> Wires<'bed> {
    fn new(bed: &'bed Bed) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // A name of an interface has 15 letters at most, and two more are added.
        let name = format!("st{}{number}", std::process::id() % 100_000);
        let scratch = bed.scratch();
        let wires = Self { bed, name, scratch };
        let wire = ["sh", "-c", WIRE, &wires.name, wires.scratch.path()];
        bed.command(wire).run().success();
        wires
    }

    /// A container in one of the namespaces.
    fn start(&self, pod: u32, argv: &[&str]) -> Container<'bed> {
        let namespace = format!("network:{}", self.scratch.file(&pod.to_string()));
        let options = ["--with-ns", &namespace];
        self.bed
            .ctr_start(&options, &self.bed.image("python"), argv)
    }

    /// A server that listens in the first, and a client in the second.
    fn start_both(&self, serve: &str) -> (Container<'bed>, Container<'bed>) {
        let server = self.start(1, &["python3", "-c", serve]);
        let client = self.start(2, &["sleep", "1000"]);
        eventually("the server listens", seconds(60), || {
            server.exec(["test", "-e", "/tmp/ready"]).ok().then_some(())
        });
        (server, client)
    }
}

impl Drop for Wires<'_> {
    fn drop(&mut self) {
        let unwire = ["sh", "-c", UNWIRE, &self.name, self.scratch.path()];
        self.bed.command(unwire).run();
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn several_interfaces_of_both_families_carry_large_frames() {
    let bed = Bed::get();
    let wires = Wires::new(&bed);
    let (_server, client) = wires.start_both(ECHO);
    for net in ["net1", "net2"] {
        let mtu = format!("/sys/class/net/{net}/mtu");
        assert_eq!(client.exec(["cat", &mtu]).success().out(), "9000");
    }
    let routes = client.exec(["cat", "/proc/net/route"]).success().out();
    // 192.0.2.0 in the kernel's notation, by the other pod.
    assert!(routes.contains("net2\t000200C0\t01024D0A"), "{routes}");
    for host in ["10.77.1.1", "10.77.2.1", "fd77:1::1", "fd77:2::1"] {
        let asked = client.exec_command(&[], ["python3", "-c", ASK, host]);
        let asked = asked.patience(seconds(120)).run().success();
        assert_eq!(asked.out(), "answered", "{host}");
    }
    let fragments = "awk '/^Ip:/ { line = $0 } END { split(line, f); print f[20] }' /proc/net/snmp";
    assert_eq!(client.sh(fragments).success().out(), "0");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_firewall_at_the_hosts_end_of_the_wire_holds() {
    let bed = Bed::get();
    let wires = Wires::new(&bed);
    let (_server, client) = wires.start_both(ECHO);
    let dial = "import socket, sys; socket.create_connection((sys.argv[1], 7), 3)";
    let dial = |host: &'static str| client.exec(["python3", "-c", dial, host]);
    dial("10.77.1.1").success();
    // As a network policy does: by the interface of the pod, on the host.
    let name = &wires.name;
    let table = format!(
        "table bridge {name} {{
             chain forward {{
                 type filter hook forward priority 0;
                 iifname \"{name}12\" ip daddr 10.77.1.1 tcp dport 7 drop
             }}
         }}"
    );
    bed.command(["nft", &table]).run().success();
    dial("10.77.1.1").failure();
    dial("10.77.2.1").success();
    bed.command(["nft", "delete", "table", "bridge", &wires.name])
        .run()
        .success();
    dial("10.77.1.1").success();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn sctp_goes_from_guest_to_guest() {
    let bed = Bed::get();
    // The control has the host's kernel, which may not know it.
    if !bed.has_vm() {
        return;
    }
    let wires = Wires::new(&bed);
    let serve = r#"
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
s.bind(("::", 7)); s.listen(5)
open("/tmp/ready", "w").close()
while True:
    conn, _ = s.accept()
    while data := conn.recv(1 << 16):
        conn.sendall(data)
    conn.close()
"#;
    let (_server, client) = wires.start_both(serve);
    let ask = r#"
import os, socket, sys
host, much = sys.argv[1], os.urandom(1 << 20)
family = socket.AF_INET6 if ":" in host else socket.AF_INET
conn = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
conn.settimeout(60)
conn.connect((host, 7))
for start in range(0, len(much), 4096):
    message = much[start:start + 4096]
    conn.sendall(message)
    back = b""
    while len(back) < len(message): back += conn.recv(1 << 16)
    assert back == message
print("answered")
"#;
    for host in ["10.77.1.1", "fd77:2::1"] {
        let asked = client.exec_command(&[], ["python3", "-c", ask, host]);
        let asked = asked.patience(seconds(120)).run().success();
        assert_eq!(asked.out(), "answered", "{host}");
    }
}
