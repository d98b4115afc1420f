//! What happens on the node while a pod runs: daemons that restart, programs that die, limits and mounts
//! that change.

use sepal_tests::{Cluster, PodProcess, eventually, seconds};

/// A pod that counts the seconds in its log.
const COUNTER: &str = r#"
apiVersion: v1
kind: Pod
metadata: { name: counter }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  volumes: [{ name: kept, emptyDir: {} }]
  containers:
    - name: main
      image: busybox
      command: [sh, -c, 'echo run >>/kept/runs; n=0; while :; do n=$((n + 1)); echo $n; sleep 1; done']
      volumeMounts: [{ name: kept, mountPath: /kept }]
"#;

const CONTAINER: &str = "{.status.containerStatuses[0].containerID}";
const RESTARTS: &str = "{.status.containerStatuses[0].restartCount}";

/// A log that lacks no number.
fn is_gapless(log: &str) -> bool {
    log.lines()
        .enumerate()
        .all(|(n, line)| line == (n + 1).to_string())
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_pod_outlives_a_restart_of_the_kubelet() {
    let cluster = Cluster::alone();
    let namespace = cluster.namespace();
    let pod = namespace.start("counter", COUNTER);
    let container = pod.get(CONTAINER);
    cluster.daemon("stop", "kubelet");
    std::thread::sleep(seconds(3));
    cluster.daemon("start", "kubelet");
    let before = pod.logs_when_ready();
    eventually("it counts on", seconds(30), || {
        let log = pod.logs_when_ready();
        (log.lines().count() > before.lines().count() + 2).then_some(())
    });
    assert!(is_gapless(&pod.logs(&[])), "{}", pod.logs(&[]));
    assert_eq!(pod.get(CONTAINER), container);
    assert_eq!(pod.get(RESTARTS), "0");
    pod.delete(&[]);
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_pod_outlives_a_restart_and_a_death_of_containerd() {
    let cluster = Cluster::alone();
    let namespace = cluster.namespace();
    let pod = namespace.start("counter", COUNTER);
    let container = pod.get(CONTAINER);
    for verb in ["stop", "kill"] {
        cluster.bed().containerd(verb).success();
        std::thread::sleep(seconds(2));
        cluster.bed().containerd("start").success();
        let before = pod.logs_when_ready().lines().count();
        eventually("it counts on", seconds(60), || {
            (pod.logs_when_ready().lines().count() > before + 2).then_some(())
        });
        eventually("exec works", seconds(60), || {
            pod.exec(["true"]).ok().then_some(())
        });
    }
    assert_eq!(pod.get(CONTAINER), container);
    assert_eq!(pod.get(RESTARTS), "0");
    pod.delete(&[]);
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_pod_whose_machine_dies_is_started_anew_with_its_volumes() {
    for what in [PodProcess::Vmm, PodProcess::Fs, PodProcess::Shim] {
        let cluster = Cluster::alone();
        if !cluster.bed().has_vm() {
            return;
        }
        let namespace = cluster.namespace();
        let pod = namespace.start("counter", COUNTER);
        let sandbox = pod.sandbox();
        cluster.bed().kill_9(&sandbox, what);
        eventually("the second run", seconds(90), || {
            let runs = pod.exec(["cat", "/kept/runs"]);
            (runs.ok() && runs.out() == "run\nrun").then_some(())
        });
        pod.wait_ready();
        assert_eq!(pod.get(RESTARTS), "1", "after the death of {what:?}");
        assert_ne!(pod.sandbox(), sandbox);
        pod.delete(&[]);
    }
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn limits_change_while_the_container_runs() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "resized",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: resized }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: busybox
      command: [sleep, "1000"]
      resources:
        requests: { cpu: 200m, memory: 100Mi }
        limits: { cpu: 200m, memory: 100Mi }
"#,
    );
    let container = pod.get(CONTAINER);
    // cgroup v1 on the native bed's node, v2 in a guest.
    let limits = "cat /sys/fs/cgroup/cpu.max 2>/dev/null || echo $(cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us) 100000; \
                  cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null; true";
    assert_eq!(pod.sh(limits), "20000 100000\n104857600");
    let machine = || -> Vec<u64> {
        let said = pod.sh("nproc; free -m | awk '/^Mem:/ { print $2 }'");
        said.lines()
            .map(|line| line.parse().expect("a number"))
            .collect()
    };
    let before = machine();
    // Up, further than the machine has booted with, and down again.
    for (cpu, memory, quota, mebibytes, processors) in [
        ("400m", "120Mi", 40_000, 120, 1),
        ("1500m", "600Mi", 150_000, 600, 2),
        ("200m", "100Mi", 20_000, 100, 1),
    ] {
        let patch = format!(
            r#"{{"spec":{{"containers":[{{"name":"main","resources":{{
                "requests":{{"cpu":"{cpu}","memory":"{memory}"}},
                "limits":{{"cpu":"{cpu}","memory":"{memory}"}}}}}}]}}}}"#
        );
        let patch = [
            "patch",
            "pod",
            "resized",
            "--subresource",
            "resize",
            "--patch",
            &patch,
        ];
        namespace.kubectl(patch).run().success();
        pod.wait_for(
            "{.status.containerStatuses[0].resources.limits.cpu} {.status.containerStatuses[0].resources.limits.memory}",
            &format!("{cpu} {memory}"),
        );
        let expected = format!("{quota} 100000\n{}", mebibytes << 20);
        eventually("the container has them", seconds(60), || {
            (pod.sh(limits) == expected).then_some(())
        });
        if cluster.bed().has_vm() {
            let memory = before[1] + mebibytes - 100;
            let (more, less) = (memory + 20, memory - 20);
            eventually("the machine is as large", seconds(30), || {
                let now = machine();
                (now[0] == processors && (less..more).contains(&now[1])).then_some(())
            });
        }
    }
    assert_eq!(pod.get(CONTAINER), container);
    assert_eq!(pod.get(RESTARTS), "0");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn what_the_node_mounts_later_is_seen_where_it_is_asked_for() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let scratch = cluster.bed().scratch();
    let bed = cluster.bed();
    bed.command(["mkdir", &scratch.file("later")])
        .run()
        .success();
    let manifest = r#"
apiVersion: v1
kind: Pod
metadata: { name: watcher }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: busybox
      command: [sleep, "1000"]
      volumeMounts:
        - { name: host, mountPath: /follows, mountPropagation: HostToContainer }
        - { name: host, mountPath: /stays }
  volumes: [{ name: host, hostPath: { path: SCRATCH } }]
"#
    .replace("SCRATCH", scratch.path());
    let pod = namespace.start("watcher", &manifest);
    let later = scratch.file("later");
    bed.command(["mount", "-t", "tmpfs", "none", &later])
        .run()
        .success();
    bed.write(&scratch.file("later/file"), "mounted");
    assert_eq!(
        pod.sh("cat /follows/later/file; ls /stays/later"),
        "mounted"
    );
    // A guest lets go of what nobody looks at.
    eventually("it can be unmounted", seconds(30), || {
        bed.command(["umount", &later]).run().ok().then_some(())
    });
    eventually("it is gone again", seconds(30), || {
        pod.sh("ls /follows/later").is_empty().then_some(())
    });
}

/// Huge pages that the node has set aside, until it goes out of scope. A kubelet counts them when it
/// starts.
struct HugePages<'cluster>(&'cluster Cluster);

impl<'cluster> HugePages<'cluster> {
    fn set_aside(cluster: &'cluster Cluster, count: u32) -> Self {
        let this = Self(cluster);
        this.set(count);
        let expected = format!("{}Mi", 2 * count);
        let namespace = cluster.namespace();
        eventually("the node has huge pages", seconds(60), || {
            let has = namespace.get("node/node", "{.status.allocatable.hugepages-2Mi}");
            (has == expected).then_some(())
        });
        this
    }

    fn set(&self, count: u32) {
        self.0.daemon("stop", "kubelet");
        self.0.bed().set_huge_pages(count).success();
        self.0.daemon("start", "kubelet");
    }
}

impl Drop for HugePages<'_> {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn huge_pages_are_the_pod_s_up_to_its_limit() {
    let cluster = Cluster::alone();
    // Without this controller containerd leaves the limit out of what it asks for.
    let controller =
        "test -d /sys/fs/cgroup/hugetlb || grep -q hugetlb /sys/fs/cgroup/cgroup.controllers";
    if !cluster.bed().sh(controller).run().ok() {
        return;
    }
    let _pages = HugePages::set_aside(&cluster, 8);
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "huge",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: huge }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: python
      command: [sleep, "1000"]
      resources: { limits: { hugepages-2Mi: 16Mi, memory: 96Mi, cpu: 500m } }
      volumeMounts: [{ name: pages, mountPath: /pages }]
  volumes: [{ name: pages, emptyDir: { medium: HugePages } }]
"#,
    );
    assert_eq!(
        pod.sh("awk '/HugePages_Total/ { print $2 }' /proc/meminfo"),
        "8"
    );
    // MAP_HUGETLB, and a file of the volume's: eight pages are there, and not one more.
    let program = r#"
import mmap, os
def anonymous(pages):
    return mmap.mmap(-1, pages << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
def used():
    lines = dict(line.split(":") for line in open("/proc/meminfo"))
    return int(lines["HugePages_Total"]) - int(lines["HugePages_Free"].split()[0])
memory = anonymous(4)
for page in range(4): memory[page << 21] = 7
file = os.open("/pages/file", os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 4 << 21)
shared = mmap.mmap(file, 4 << 21)
for page in range(4): shared[page << 21] = 7
print(used())
try:
    anonymous(1)
    print("one more")
except OSError as error:
    print(error.strerror)
"#;
    let told = pod.exec(["python3", "-c", program]).success().out();
    assert_eq!(told, "8\nCannot allocate memory");
    assert_eq!(
        pod.sh("stat -fc '%T %S' /pages; ls /pages"),
        "hugetlbfs 2097152\nfile"
    );
    pod.delete(&[]);
}
