//! Names, addresses and Services.

use sepal_tests::{Cluster, eventually, seconds};

/// Three nginx behind a Service, and a pod that asks them.
const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: { name: web }
spec:
  replicas: 3
  selector: { matchLabels: { app: web } }
  template:
    metadata: { labels: { app: web } }
    spec:
      runtimeClassName: sepal
      containers:
        - name: nginx
          image: nginx:1
          ports: [{ name: http, containerPort: 80 }]
          readinessProbe: { httpGet: { path: /, port: http }, periodSeconds: 1 }
          lifecycle: { preStop: { exec: { command: [sleep, "2"] } } }
---
apiVersion: v1
kind: Service
metadata: { name: web }
spec:
  selector: { app: web }
  ports: [{ port: 80, targetPort: http }]
---
apiVersion: v1
kind: Pod
metadata: { name: client }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers: [{ name: main, image: busybox, command: [sleep, "10000"] }]
"#;

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_service_is_found_by_its_name_and_spreads_over_its_pods() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let client = namespace.start("client", WEB);
    namespace.roll_out("deployment/web", 180);
    assert_eq!(client.sh("wget -qO- http://web/"), "hello from sepal");
    let full = format!(
        "wget -qO- http://web.{}.svc.cluster.local./",
        namespace.name()
    );
    assert_eq!(client.sh(&full), "hello from sepal");
    let pods = namespace.get(
        "pods",
        "{.items[?(@.metadata.labels.app==\"web\")].metadata.name}",
    );
    for pod in pods.split_whitespace() {
        // kube-proxy learns of a pod somewhat later than whoever waits for it.
        eventually("each pod is asked", seconds(30), || {
            client.sh("for n in $(seq 30); do wget -qO- http://web/ >/dev/null || exit 1; done");
            let asked = namespace.pod(pod).logs(&[]).contains("Wget");
            asked.then_some(())
        });
    }
    // A pod reaches itself by its Service too (hairpin).
    namespace
        .kubectl(["scale", "deployment/web", "--replicas=1"])
        .run()
        .success();
    namespace.roll_out("deployment/web", 180);
    let left = eventually("one pod is left", seconds(60), || {
        let pods = namespace.get(
            "pods",
            "{.items[?(@.metadata.labels.app==\"web\")].metadata.name}",
        );
        (pods.split_whitespace().count() == 1).then_some(pods)
    });
    let address = namespace.get("service/web", "{.spec.clusterIP}");
    let ask = format!(
        "exec 3<>/dev/tcp/{address}/80; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; tail -n 1 <&3"
    );
    let answer = namespace
        .pod(&left)
        .exec(["bash", "-c", &ask])
        .success()
        .out();
    assert_eq!(answer, "hello from sepal");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_rolling_update_loses_no_request() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let client = namespace.start("client", WEB);
    namespace.roll_out("deployment/web", 180);
    // Asks until it is told to stop, and counts.
    let line = "while [ ! -e /stop ]; do wget -T 5 -qO- http://web/ >>/answers || echo lost >>/answers; sleep 0.05; done";
    let mut asking = client
        .exec_command(&[], ["sh", "-c", line])
        .patience(seconds(300))
        .spawn();
    namespace
        .kubectl(["set", "image", "deployment/web", "nginx=nginx:2"])
        .run()
        .success();
    namespace.roll_out("deployment/web", 180);
    // Those that go are still asked until kube-proxy has heard of it.
    eventually("the new release answers", seconds(30), || {
        (client.sh("wget -qO- http://web/") == "hello from release 2").then_some(())
    });
    namespace
        .kubectl(["scale", "deployment/web", "--replicas=1"])
        .run()
        .success();
    namespace.roll_out("deployment/web", 180);
    client.sh("touch /stop");
    asking.wait();
    let answers = client.sh("sort /answers | uniq -c");
    assert!(!answers.contains("lost"), "{answers}");
    assert!(
        answers.contains("sepal") && answers.contains("release 2"),
        "{answers}"
    );
    assert_eq!(answers.lines().count(), 2, "{answers}");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_release_that_does_not_start_is_taken_back() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let client = namespace.start("client", WEB);
    namespace.roll_out("deployment/web", 180);
    namespace
        .kubectl(["set", "image", "deployment/web", "nginx=nginx:broken"])
        .run()
        .success();
    eventually("the new pod fails", seconds(60), || {
        let pods = namespace.kubectl(["get", "pods"]).run().success().out();
        (pods.contains("CrashLoopBackOff") || pods.contains("Error")).then_some(())
    });
    assert_eq!(client.sh("wget -qO- http://web/"), "hello from sepal");
    namespace
        .kubectl(["rollout", "undo", "deployment/web"])
        .run()
        .success();
    namespace.roll_out("deployment/web", 180);
    assert_eq!(client.sh("wget -qO- http://web/"), "hello from sepal");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn host_name_subdomain_aliases_and_name_servers() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "named",
        r#"
apiVersion: v1
kind: Service
metadata: { name: sub }
spec: { clusterIP: None, selector: { app: named }, ports: [{ port: 80 }] }
---
apiVersion: v1
kind: Pod
metadata: { name: named, labels: { app: named } }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  hostname: alpha
  subdomain: sub
  hostAliases: [{ ip: 10.1.2.3, hostnames: [old.example, older.example] }]
  containers: [{ name: main, image: busybox, command: [sleep, "1000"] }]
---
apiVersion: v1
kind: Pod
metadata: { name: resolver }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  dnsPolicy: None
  dnsConfig:
    nameservers: [192.0.2.1, 192.0.2.2]
    searches: [one.example, two.example]
    options: [{ name: ndots, value: "2" }, { name: edns0 }]
  containers: [{ name: main, image: busybox, command: [sleep, "1000"] }]
"#,
    );
    let domain = format!("sub.{}.svc.cluster.local", namespace.name());
    assert_eq!(pod.sh("hostname; cat /etc/hostname"), "alpha\nalpha");
    assert_eq!(pod.sh("hostname -f"), format!("alpha.{domain}"));
    assert_eq!(
        pod.sh("grep 10.1.2.3 /etc/hosts | tr '\\t' ' '"),
        "10.1.2.3 old.example older.example"
    );
    let address = pod.get("{.status.podIP}");
    let found = pod.sh(&format!("nslookup alpha.{domain}. 10.96.0.10"));
    assert!(found.contains(&address), "{found}");
    let cluster_dns = pod.sh("cat /etc/resolv.conf");
    assert!(
        cluster_dns.contains("nameserver 10.96.0.10"),
        "{cluster_dns}"
    );

    let resolver = namespace.pod("resolver");
    resolver.wait_ready();
    // The kubelet writes the options in any order.
    let lines = resolver.sh("sed 's/ndots:2 edns0/edns0 ndots:2/' /etc/resolv.conf | sort");
    assert_eq!(
        lines.lines().collect::<Vec<_>>(),
        [
            "nameserver 192.0.2.1",
            "nameserver 192.0.2.2",
            "options edns0 ndots:2",
            "search one.example two.example"
        ]
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_host_port_and_a_node_port_lead_to_the_pod() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.start(
        "ported",
        r#"
apiVersion: v1
kind: Service
metadata: { name: ported }
spec: { type: NodePort, selector: { app: ported }, ports: [{ port: 80 }] }
---
apiVersion: v1
kind: Pod
metadata: { name: ported, labels: { app: ported } }
spec:
  runtimeClassName: sepal
  containers:
    - name: main
      image: nginx
      ports: [{ containerPort: 80, hostPort: 18080 }]
      readinessProbe: { httpGet: { port: 80 }, periodSeconds: 1 }
"#,
    );
    let node_port = namespace.get("service/ported", "{.spec.ports[0].nodePort}");
    for port in ["18080", &node_port] {
        let page = format!("http://10.87.0.1:{port}/");
        eventually("the port answers", seconds(20), || {
            let answer = cluster
                .bed()
                .command(["curl", "-sS", "--max-time", "5", &page])
                .run();
            (answer.out() == "hello from sepal").then_some(())
        });
    }
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_service_of_both_families_and_one_of_ipv6_alone() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let client = namespace.start(
        "client",
        r#"
apiVersion: v1
kind: Service
metadata: { name: both }
spec:
  ipFamilyPolicy: RequireDualStack
  ipFamilies: [IPv4, IPv6]
  selector: { app: web }
  ports: [{ port: 80 }]
---
apiVersion: v1
kind: Service
metadata: { name: six }
spec:
  ipFamilies: [IPv6]
  selector: { app: web }
  ports: [{ port: 8080, targetPort: 80 }]
---
apiVersion: v1
kind: Pod
metadata: { name: web, labels: { app: web } }
spec:
  runtimeClassName: sepal
  containers:
    - name: nginx
      image: python
      command: [python3, -c]
      args:
        - |
          import http.server, socket
          class Server(http.server.ThreadingHTTPServer):
              address_family = socket.AF_INET6
          class Handler(http.server.BaseHTTPRequestHandler):
              def do_GET(self):
                  self.send_response(200); self.end_headers(); self.wfile.write(b"here")
          Server(("::", 80), Handler).serve_forever()
      readinessProbe: { httpGet: { port: 80 }, periodSeconds: 1 }
---
apiVersion: v1
kind: Pod
metadata: { name: client }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers: [{ name: main, image: busybox, command: [sleep, "10000"] }]
"#,
    );
    let web = namespace.pod("web");
    web.wait_ready();
    let addresses = web.get("{.status.podIPs[*].ip}");
    let mut hosts: Vec<String> = addresses.split(' ').map(bracketed).collect();
    assert_eq!(hosts.len(), 2, "{addresses}");
    let services = namespace.get("service/both", "{.spec.clusterIPs[*]}");
    hosts.extend(services.split(' ').map(bracketed));
    hosts.push(bracketed(&namespace.get("service/six", "{.spec.clusterIP}")) + ":8080");
    hosts.push("six:8080".to_owned());
    assert_eq!(hosts.len(), 6, "{services}");
    for host in &hosts {
        eventually("kube-proxy knows the Service", seconds(30), || {
            let page = format!("http://{host}/");
            let answer = client.exec(["wget", "-T", "5", "-qO-", &page]);
            (answer.out() == "here").then_some(())
        });
    }
}

/// An address as it stands in a URL.
fn bracketed(address: &str) -> String {
    if address.contains(':') {
        format!("[{address}]")
    } else {
        address.to_owned()
    }
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn bandwidth_is_limited_by_annotations() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "slow",
        r#"
apiVersion: v1
kind: Pod
metadata:
  name: slow
  annotations: { kubernetes.io/ingress-bandwidth: 200M }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: python
      command: [python3, -c]
      args:
        - |
          import socket
          listener = socket.create_server(("0.0.0.0", 9))
          while True:
              conn, _ = listener.accept()
              got, room = 0, bytearray(1 << 20)
              while more := conn.recv_into(room): got += more
              conn.sendall(str(got).encode())
              conn.close()
---
apiVersion: v1
kind: Pod
metadata: { name: peer }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers: [{ name: main, image: python, command: [sleep, "10000"] }]
"#,
    );
    let peer = namespace.pod("peer");
    peer.wait_ready();
    // containerd lets 512 MiB through at once; what is more takes two seconds for 50 MB.
    let send = r#"
import socket, sys, time
conn = socket.create_connection((sys.argv[1], 9), 30)
conn.settimeout(None)
begun, room = time.monotonic(), bytes(1 << 20)
for _ in range(600): conn.sendall(room)
conn.shutdown(socket.SHUT_WR)
assert conn.recv(100) == str(600 << 20).encode()
print(time.monotonic() - begun)
"#;
    let sent = peer
        .exec_command(&[], ["python3", "-c", send, &pod.get("{.status.podIP}")])
        .patience(seconds(120))
        .run()
        .success()
        .out();
    let took: f64 = sent.parse().expect("the seconds it took");
    assert!(took > 2.0, "{took} s");
}
