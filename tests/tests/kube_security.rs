//! `securityContext` and what else decides what a container may do.

use sepal_tests::Cluster;

/// A pod with these lines in its `spec` and in its container's description, which runs a line of shell.
fn pod(spec: &str, container: &str, line: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: tested }}
spec:
  runtimeClassName: sepal
  restartPolicy: Never
{spec}
  containers:
    - name: main
      image: busybox
      command:
        - sh
        - -c
        - {line:?}
{container}
"#
    )
}

/// What such a pod writes.
#[track_caller]
fn said(spec: &str, container: &str, line: &str) -> String {
    let cluster = Cluster::get();
    cluster
        .namespace()
        .run("tested", &pod(spec, container, line))
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn user_groups_and_the_volume_s_group() {
    let log = said(
        r#"
  securityContext: { runAsUser: 1234, runAsGroup: 2345, fsGroup: 3456, supplementalGroups: [4567, 5678] }
  volumes: [{ name: data, emptyDir: {} }, { name: memory, emptyDir: { medium: Memory } }]"#,
        "      volumeMounts: [{ name: data, mountPath: /data }, { name: memory, mountPath: /memory }]",
        "id -u; id -g; id -G; for d in /data /memory; do touch $d/file; stat -c '%u %g' $d/file; stat -c '%g %a' $d; done",
    );
    let lines: Vec<_> = log.lines().collect();
    assert_eq!(lines[..3], ["1234", "2345", "2345 3456 4567 5678"]);
    // What the kubelet mounts has the mode of a fresh tmpfs: sticky.
    assert_eq!(lines[3..5], ["1234 3456", "3456 2777"]);
    assert_eq!(lines[5..7], ["1234 3456", "3456 3777"]);
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_secret_for_a_user_who_is_not_root() {
    let log = said(
        r#"
  securityContext: { runAsUser: 1234, runAsNonRoot: true, fsGroup: 3456 }
  volumes: [{ name: token, projected: { defaultMode: 0400, sources: [{ serviceAccountToken: { path: token } }] } }]"#,
        "      volumeMounts: [{ name: token, mountPath: /token }]",
        "head -c 2 /token/token; stat -Lc ' %g %a' /token/token",
    );
    // fsGroup adds the group's right to read.
    assert_eq!(log, "ey 3456 640");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn an_image_of_root_s_is_refused_where_root_is_not_wanted() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.apply(&pod("  securityContext: { runAsNonRoot: true }", "", "id"));
    namespace.pod("tested").wait_for(
        "{.status.containerStatuses[0].state.waiting.reason}",
        "CreateContainerConfigError",
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn capabilities_are_added_and_dropped() {
    let line = "grep -E '^Cap(Eff|Bnd)' /proc/self/status | cut -f2; chown 1 /tmp 2>/dev/null || echo refused";
    let default = said("", "", line);
    assert_eq!(default, "00000000a80425fb\n00000000a80425fb");
    let none = said(
        "",
        "      securityContext: { capabilities: { drop: [ALL] } }",
        line,
    );
    assert!(
        none == "0000000000000000\n0000000000000000\nrefused",
        "{none}"
    );
    let one = said(
        "",
        "      securityContext: { capabilities: { drop: [ALL], add: [NET_ADMIN, CHOWN] } }",
        "grep CapEff /proc/self/status | cut -f2; chown 1 /tmp && ip link add dummy0 type dummy; ip link set lo mtu 1400 && cat /sys/class/net/lo/mtu",
    );
    assert!(one.starts_with("0000000000001001"), "{one}");
    assert!(one.ends_with("1400"), "{one}");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_privileged_container_may_mount_and_an_ordinary_one_may_not() {
    let line = "mkdir /m; mount -t tmpfs none /m && echo mounted; [ -w /proc/sys/kernel/domainname ] && echo writable; [ -e /dev/kmsg ] && echo devices; exit 0";
    let privileged = said("", "      securityContext: { privileged: true }", line);
    assert_eq!(privileged, "mounted\nwritable\ndevices");
    let ordinary = said("", "", line);
    assert!(
        !ordinary.contains("mounted") && !ordinary.contains("devices"),
        "{ordinary}"
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_read_only_root_has_writable_volumes() {
    let log = said(
        "  volumes: [{ name: tmp, emptyDir: {} }]",
        "      securityContext: { readOnlyRootFilesystem: true }\n      volumeMounts: [{ name: tmp, mountPath: /tmp }]",
        "touch /tmp/file && echo volume; touch /file || echo root; touch /etc/hosts.new || echo etc; echo done >/dev/termination-log && echo message",
    );
    let told: Vec<_> = log
        .lines()
        .filter(|line| !line.contains("touch:"))
        .collect();
    assert_eq!(told, ["volume", "root", "etc", "message"], "{log}");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn seccomp_and_no_new_privileges() {
    let line = "grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status | cut -f2 | paste -sd' '; unshare -r true 2>/dev/null && echo unshared; exit 0";
    let log = said(
        "  securityContext: { seccompProfile: { type: RuntimeDefault } }",
        "      securityContext: { allowPrivilegeEscalation: false }",
        line,
    );
    assert_eq!(log, "1 2");
    let unconfined = said(
        "  securityContext: { seccompProfile: { type: Unconfined } }",
        "",
        line,
    );
    assert!(unconfined.starts_with("0 0"), "{unconfined}");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn sysctls_of_the_pod() {
    let log = said(
        r#"
  securityContext:
    sysctls:
      - { name: net.ipv4.ip_local_port_range, value: "40000 50000" }
      - { name: kernel.shm_rmid_forced, value: "1" }
      - { name: net.core.somaxconn, value: "777" }"#,
        "",
        "cd /proc/sys; cat net/ipv4/ip_local_port_range kernel/shm_rmid_forced net/core/somaxconn; cat net/ipv4/ip_unprivileged_port_start",
    );
    assert_eq!(log, "40000\t50000\n1\n777\n0");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn proc_is_masked_and_can_be_left_so() {
    let log = said(
        "",
        "",
        "wc -c </proc/keys; wc -c </proc/timer_list; ls /sys/firmware | wc -l; touch /proc/sys/vm/swappiness || echo read-only",
    );
    let lines: Vec<_> = log
        .lines()
        .filter(|line| !line.contains("touch:"))
        .collect();
    assert_eq!(lines, ["0", "0", "0", "read-only"], "{log}");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn processes_are_shared_when_the_pod_says_so() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let manifest = |shared: bool| {
        format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{ name: pair-{shared} }}
spec:
  runtimeClassName: sepal
  shareProcessNamespace: {shared}
  terminationGracePeriodSeconds: 1
  containers:
    - {{ name: one, image: busybox, command: [sh, -c, 'echo here >/mark; exec sleep 1111'] }}
    - {{ name: two, image: busybox, command: [sleep, "2222"] }}
"#
        )
    };
    let apart = namespace.start("pair-false", &manifest(false));
    assert_eq!(
        apart.sh_in("two", "cat /proc/1/cmdline | tr '\\0' ' '"),
        "sleep 2222"
    );
    assert_eq!(apart.sh_in("two", "pgrep -f 'sleep 111[1]' | wc -l"), "0");

    let shared = namespace.start("pair-true", &manifest(true));
    assert_ne!(
        shared.sh_in("two", "cat /proc/1/cmdline | tr '\\0' ' '"),
        "sleep 2222"
    );
    assert_eq!(
        shared.sh_in("two", "cat /proc/$(pgrep -f 'sleep 111[1]')/root/mark"),
        "here"
    );
    shared.sh_in("two", "kill $(pgrep -f 'sleep 111[1]')");
    shared.wait_for(
        "{.status.containerStatuses[?(@.name==\"one\")].restartCount}",
        "1",
    );
}

/// The range of a pod's users by its uid_map: inside, outside, how many.
fn range(uid_map: &str) -> [u32; 3] {
    let numbers: Vec<u32> = uid_map
        .split_ascii_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    numbers.try_into().unwrap()
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_pod_has_users_of_its_own() {
    let cluster = Cluster::get();
    if !cluster.handler_supports("userNamespaces") {
        println!("left out: containerd has not asked this handler (tests/kube/run --ask-features)");
        return;
    }
    let namespace = cluster.namespace();
    namespace.apply(
        r#"
apiVersion: v1
kind: ConfigMap
metadata: { name: settings }
data: { key: value }
---
apiVersion: v1
kind: Secret
metadata: { name: secret }
stringData: { key: value }
"#,
    );
    let manifest = |name: &str, shared: bool| {
        format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{ name: {name} }}
spec:
  runtimeClassName: sepal
  hostUsers: false
  shareProcessNamespace: {shared}
  terminationGracePeriodSeconds: 1
  securityContext: {{ fsGroup: 3456 }}
  volumes:
    - {{ name: data, emptyDir: {{}} }}
    - {{ name: memory, emptyDir: {{ medium: Memory }} }}
    - {{ name: settings, configMap: {{ name: settings }} }}
    - {{ name: secret, secret: {{ secretName: secret, defaultMode: 0400 }} }}
  containers:
    - name: main
      image: busybox
      command: [sh, -c, 'echo from $(id -u); exec sleep 1000']
      volumeMounts: &mounts
        - {{ name: data, mountPath: /data }}
        - {{ name: memory, mountPath: /memory }}
        - {{ name: settings, mountPath: /settings }}
        - {{ name: secret, mountPath: /secret }}
    - name: other
      image: busybox
      command: [sleep, "2222"]
      workingDir: /made/for/it
      securityContext: {{ runAsUser: 1234 }}
      volumeMounts: *mounts
"#
        )
    };
    let pod = namespace.start("one", &manifest("one", false));
    assert_eq!(pod.logs(&["-c", "main"]).trim(), "from 0");
    let one = range(&pod.sh("cat /proc/self/uid_map"));
    assert_eq!((one[0], one[2]), (0, 65536));
    assert_ne!(one[1], 0, "root is somebody else outside");
    assert_eq!(one, range(&pod.sh("cat /proc/self/gid_map")));
    assert_eq!(one, range(&pod.sh_in("other", "cat /proc/self/uid_map")));
    // What comes with the image, and what Kubernetes brings.
    let owners = |line: &str| pod.sh(&format!("stat -c '%u %g' {line} | sort -u"));
    assert_eq!(
        owners("/ /bin/busybox /proc/1 /etc/hosts /etc/hostname /etc/resolv.conf"),
        "0 0"
    );
    assert_eq!(
        owners("-L /settings/key /secret/key /data /memory"),
        "0 3456"
    );
    assert_eq!(pod.sh("cat /settings/key /secret/key"), "valuevalue");
    // What is written: seen by another user of the pod, who can have it.
    pod.sh("for d in /data /memory /tmp; do echo x >$d/file; chown 1234:5678 $d/file; chmod 600 $d/file; done; mkdir -m 700 /data/theirs; chown 1234 /data/theirs; echo x >/data/theirs/roots");
    assert_eq!(owners("/data/file /memory/file /tmp/file"), "1234 5678");
    assert_eq!(
        owners("/data/theirs/roots"),
        "0 0",
        "root may write where others own"
    );
    let other = "id -u; id -G; cat /data/file /memory/file; pwd; touch /data/mine /memory/mine; stat -c '%u %g' /data/mine /memory/mine; touch /none 2>/dev/null || echo refused";
    assert_eq!(
        pod.sh_in("other", other),
        "1234\n0 3456\nx\nx\n/made/for/it\n1234 3456\n1234 3456\nrefused"
    );
    // The network is the pod's, whose root may change it as its capabilities say.
    assert_eq!(
        pod.sh("ping -c 1 127.0.0.1 >/dev/null && echo answered"),
        "answered"
    );
    assert_eq!(pod.sh("ls /sys/class/net | tr '\\n' ' '"), "eth0 lo");
    assert_eq!(
        pod.sh("echo 1 2>/dev/null >/proc/sys/vm/swappiness || echo refused"),
        "refused"
    );
    assert!(pod.sh("mount | grep -c mqueue") != "0");

    let pod = namespace.start("two", &manifest("two", true));
    let two = range(&pod.sh("cat /proc/self/uid_map"));
    assert!(one[1].abs_diff(two[1]) >= 65536, "{one:?} {two:?}");
    assert_eq!(
        pod.sh("cat /proc/$(pgrep -f 'sleep 222[2]')/status | grep ^Uid | cut -f2"),
        "1234"
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn what_only_the_node_s_kernel_could_give_is_refused_in_a_sentence() {
    let cluster = Cluster::get();
    if cluster.runtime_class() != "sepal" {
        println!("left out: runc shares the node's kernel");
        return;
    }
    for (what, said) in [
        ("hostNetwork: true", "network"),
        ("hostPID: true", "PID"),
        ("hostIPC: true", "IPC"),
    ] {
        let namespace = cluster.namespace();
        namespace.apply(&pod(&format!("  {what}"), "", "true"));
        let pod = namespace.pod("tested");
        let mut told = String::new();
        sepal_tests::eventually("an event tells", sepal_tests::seconds(60), || {
            told = pod.events();
            told.contains("FailedCreatePodSandBox").then_some(())
        });
        assert!(
            told.to_lowercase().contains(&said.to_lowercase()),
            "{what}: {told}"
        );
    }
}
