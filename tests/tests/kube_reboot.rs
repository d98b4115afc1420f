//! The node's reboot, and its loss of power: what comes back, and what must not be left.

use sepal_tests::{Cluster, Namespace, eventually, seconds};

/// A Deployment with its Service, a bare pod, one with a volume, and one that is not to be run twice.
const PODS: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: { name: web }
spec:
  progressDeadlineSeconds: 7200
  selector: { matchLabels: { app: web } }
  template:
    metadata: { labels: { app: web } }
    spec:
      runtimeClassName: sepal
      terminationGracePeriodSeconds: 1
      containers:
        - name: main
          image: busybox
          command: [sh, -c, 'mkdir /www; echo hello >/www/index.html; exec httpd -f -p 80 -h /www']
---
apiVersion: v1
kind: Service
metadata: { name: web }
spec:
  selector: { app: web }
  ports: [{ port: 80 }]
---
apiVersion: v1
kind: Pod
metadata: { name: bare }
spec:
  runtimeClassName: sepal
  restartPolicy: Always
  terminationGracePeriodSeconds: 1
  containers:
    - { name: main, image: busybox, command: [sh, -c, 'cat /proc/sys/kernel/random/boot_id; sleep 100000'] }
---
apiVersion: v1
kind: Pod
metadata: { name: keeper }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  volumes: [{ name: kept, emptyDir: {} }]
  containers:
    - name: main
      image: busybox
      command: [sleep, "100000"]
      volumeMounts: [{ name: kept, mountPath: /kept }]
---
apiVersion: v1
kind: Pod
metadata: { name: once }
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
    - { name: main, image: busybox, command: [sleep, "100000"] }
"#;

const RESTARTS: &str = "{.status.containerStatuses[0].restartCount}";

/// Waits until another pod reaches the Service by its name.
fn wait_for_page(namespace: &Namespace) {
    eventually("the Service answers", seconds(120), || {
        let page = namespace.pod("bare").exec(["wget", "-qO-", "http://web/"]);
        (page.ok() && page.out() == "hello").then_some(())
    });
}

/// Runs pods, restarts the node and looks at what has become of them.
fn pods_come_back_after(verb: &str) {
    let cluster = Cluster::alone();
    if !cluster.bed().can_reboot() {
        return;
    }
    let namespace = cluster.namespace();
    namespace.apply(PODS);
    namespace.roll_out("deployment/web", 120);
    let [bare, keeper, once] = ["bare", "keeper", "once"].map(|name| namespace.pod(name));
    for pod in [&bare, &keeper, &once] {
        pod.wait_ready();
    }
    wait_for_page(&namespace);
    // On the node's disk when the pod says so.
    keeper.sh("echo precious | dd of=/kept/file conv=fsync");
    let boot = bare.logs(&[]);
    // containerd does not see to it that the images it has unpacked are on the disk
    // (`image_pull_with_sync_fs`): without power half a minute later their files are empty, on any runtime.
    cluster.bed().command(["sync"]).run().success();

    cluster.restart_node(verb);
    for pod in [&bare, &keeper] {
        pod.wait_for(RESTARTS, "1");
        pod.wait_ready();
    }
    namespace.roll_out("deployment/web", 120);
    wait_for_page(&namespace);
    assert_eq!(once.wait_end(), "Failed");
    assert_eq!(once.get(RESTARTS), "0");
    assert_eq!(keeper.sh("cat /kept/file"), "precious");
    assert_ne!(bare.logs(&[]), boot);
    if verb == "reboot" {
        // After a loss of power the kubelet is free to remove the former container at once.
        assert_eq!(bare.logs(&["--previous"]), boot);
    }

    // Addresses of the former life are free again: each is a file beside two of the network's own.
    let node = cluster.bed();
    eventually("as many addresses as pods", seconds(60), || {
        let addresses = node.sh("ls /var/lib/cni/networks/sepal | grep -c '^10[.]'");
        let pods = node.command(["crictl", "pods", "-q", "--state", "ready"]);
        let pods = pods.run().success().out().lines().count();
        (addresses.run().out() == pods.to_string()).then_some(())
    });
    for object in [
        ["deployment", "web"],
        ["pod", "bare"],
        ["pod", "keeper"],
        ["pod", "once"],
    ] {
        namespace.kubectl(["delete"]).args(object).run().success();
    }
    // The kubelet keeps a pod's last container for its log; with the pod it goes.
    let dns = [
        "-n",
        "kube-system",
        "rollout",
        "restart",
        "deployment/coredns",
    ];
    cluster.kubectl(dns).run().success();
    // Empty folders of tasks that a reboot has ended, of any runtime, are cleared at its next start but one.
    node.containerd("restart").success();
    cluster.assert_nothing_left();
}

#[test]
#[ignore = "needs a cluster in the node bed: tests/kube/run node"]
fn pods_come_back_after_the_node_s_reboot_and_nothing_is_left_of_the_former_ones() {
    pods_come_back_after("reboot");
}

#[test]
#[ignore = "needs a cluster in the node bed: tests/kube/run node"]
fn pods_come_back_after_a_loss_of_power_and_nothing_is_left_of_the_former_ones() {
    pods_come_back_after("power-cut");
}
