//! A pod as its user deals with it: logs, exec, attach, cp, port-forward, debug, delete.

use std::io::Read;

use sepal_tests::{Cluster, Namespace, Running, Terminal, seconds};

/// A pod whose container stays until it is told to go.
const STAYING: &str = r#"
apiVersion: v1
kind: Pod
metadata: { name: web }
spec:
  runtimeClassName: sepal
  containers:
    - name: main
      image: busybox
      command: [sh, -c, 'trap "exit 0" TERM; echo started; while :; do sleep 1 & wait $!; done']
"#;

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_pod_runs_and_its_log_is_there_afterwards() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let log = namespace.run(
        "hello",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: hello }
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  containers:
    - { name: main, image: busybox, command: [sh, -c, 'echo out; echo err >&2; uname -r'] }
"#,
    );
    // Each stream has its order; between the two there is none.
    let (errors, mut lines): (Vec<_>, Vec<_>) = log.lines().partition(|line| *line == "err");
    assert_eq!(errors, ["err"], "{log}");
    let kernel = lines.pop().expect("the kernel's line");
    assert_eq!(lines, ["out"], "{log}");
    let host = cluster.bed().sh("uname -r").run().success().out();
    let own_kernel = cluster.runtime_class() == "sepal";
    assert_eq!(
        kernel != host,
        own_kernel,
        "kernel {kernel}, the node's {host}"
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn exec_tells_output_input_and_exit_status() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start("web", STAYING);
    assert_eq!(pod.sh("echo one; echo two >&2"), "one");
    pod.exec(["sh", "-c", "exit 42"]).exits(42);
    let told = pod
        .exec_command(&["-i"], ["sh", "-c", "cat; echo end"])
        .stdin("a line\n")
        .run()
        .success();
    assert_eq!(told.out(), "a line\nend");
    // More than any buffer on the way.
    let much = pod
        .exec(["sh", "-c", "seq 200000 | md5sum"])
        .success()
        .out();
    let all = pod.exec(["seq", "200000"]).success();
    assert_eq!(all.out().lines().count(), 200_000);
    let fed = pod
        .exec_command(&["-i"], ["md5sum"])
        .stdin(all.bytes())
        .run()
        .success();
    assert_eq!(fed.out(), much);
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn exec_with_a_terminal_has_its_size_and_keys() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.start("web", STAYING);
    let shell = namespace.terminal_kubectl(["exec", "-it", "web", "--", "sh"]);
    let mut terminal = Terminal::start(shell, 101, 31);
    terminal.expect("#");
    terminal.line("tty; stty size");
    terminal.expect("/dev/pts/");
    terminal.expect("31 101");
    terminal.resize(77, 22);
    // The size travels beside the keys. The quotes keep the echo of this line apart.
    terminal.line("until [ \"$(stty size)\" = '22 77' ]; do sleep 0.1; done; echo it is the' new size'; exit 7");
    terminal.expect("it is the new size");
    assert_eq!(terminal.wait(), 7);
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn attach_reaches_a_container_s_own_streams() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "talk",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: talk }
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  containers:
    - name: main
      image: busybox
      stdin: true
      stdinOnce: true
      command: [sh, -c, 'while read -r line; do echo "heard $line"; done; echo over']
"#,
    );
    let attached = namespace
        .kubectl(["attach", "-i", "talk"])
        .stdin("one\ntwo\n")
        .run()
        .success();
    assert!(
        attached.out().contains("heard two"),
        "{}",
        attached.report()
    );
    // stdinOnce: the end of the client's input is the end of the container's.
    assert_eq!(pod.wait_end(), "Succeeded");
    assert_eq!(pod.logs(&[]), "heard one\nheard two\nover");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn attach_with_a_terminal() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.start(
        "shell",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: shell }
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  containers:
    - { name: main, image: busybox, command: [sh], stdin: true, tty: true }
"#,
    );
    let attach = namespace.terminal_kubectl(["attach", "-it", "shell"]);
    let mut terminal = Terminal::start(attach, 90, 30);
    terminal.line("echo in $((20 + 3)); tty");
    terminal.expect("in 23");
    terminal.expect("/dev/");
    terminal.line("exit 5");
    namespace.pod("shell").wait_for(
        "{.status.containerStatuses[0].state.terminated.exitCode}",
        "5",
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn logs_follow_to_the_end_and_can_be_cut() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: { name: counter }
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  containers:
    - name: main
      image: busybox
      command: [sh, -c, 'for n in $(seq 20); do echo line $n; sleep 0.2; done']
"#,
    );
    let pod = namespace.pod("counter");
    pod.wait_ready();
    let followed = namespace
        .kubectl(["logs", "-f", "counter"])
        .run()
        .success()
        .out();
    let wanted: Vec<_> = (1..=20).map(|n| format!("line {n}")).collect();
    assert_eq!(followed, wanted.join("\n"));
    assert_eq!(pod.logs(&["--tail=2"]), "line 19\nline 20");
    assert!(
        pod.logs(&["--timestamps", "--tail=1"])
            .ends_with("Z line 20")
    );
    assert_eq!(pod.logs(&["--limit-bytes=6"]), "line 1");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn cp_goes_both_ways() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start("web", STAYING);
    let scratch = cluster.bed().scratch();
    cluster
        .bed()
        .sh(&format!(
            "cd {0}; mkdir -p tree/sub; head -c 3000000 /dev/urandom >tree/big; echo small >tree/sub/file; ln -s big tree/link",
            scratch.path()
        ))
        .run()
        .success();
    namespace
        .kubectl(["cp", &scratch.file("tree"), "web:/tmp/tree"])
        .run()
        .success();
    assert_eq!(
        pod.sh("cat /tmp/tree/sub/file; readlink /tmp/tree/link"),
        "small\nbig"
    );
    namespace
        .kubectl(["cp", "web:/tmp/tree/big", &scratch.file("back")])
        .run()
        .success();
    cluster
        .bed()
        .command(["cmp", &scratch.file("tree/big"), &scratch.file("back")])
        .run()
        .success();
}

/// `kubectl port-forward` to a pod's port, and the port of this side.
fn forward(namespace: &Namespace, pod: &str, port: u16) -> (Running, u16) {
    let target = [&format!("pod/{pod}"), &format!(":{port}")];
    let mut forward = namespace.kubectl(["port-forward"]).args(target).spawn();
    let mut said = String::new();
    let mut output = forward.stdout();
    while !said.contains('\n') {
        let mut byte = [0];
        let got = output.read(&mut byte).expect("a pipe");
        assert_eq!(got, 1, "it ended: {said}");
        said.push(byte[0] as char);
    }
    // Forwarding from 127.0.0.1:33333 -> 80
    let rest = said.split(':').nth(1);
    let number = rest.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    let number = number.unwrap_or_else(|| panic!("no port in {said:?}"));
    // It says more with each connection, and must not wait for somebody to read it.
    std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
    (forward, number)
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn port_forward_carries_much_at_once() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "files",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: files }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: python
      workingDir: /files
      command: [python3, -m, http.server, --bind, 127.0.0.1, "8000"]
      volumeMounts: [{ name: files, mountPath: /files }]
      startupProbe: { exec: { command: [python3, -c, 'import socket; socket.create_connection(("127.0.0.1", 8000))'] }, periodSeconds: 1 }
  volumes: [{ name: files, emptyDir: {} }]
"#,
    );
    pod.sh("head -c 100000000 /dev/urandom >large; head -c 100000 large >small");
    let sums = pod.sh("sha256sum <large; sha256sum <small");
    let (large, small) = sums.split_once('\n').expect("two lines");
    let (_forward, port) = forward(&namespace, "files", 8000);
    let fetch =
        |name: &str| format!("curl -sS --max-time 300 http://127.0.0.1:{port}/{name} | sha256sum");
    let got = cluster.bed().sh(&fetch("large")).patience(seconds(300));
    assert_eq!(got.run().success().out(), large);
    let fifty = format!(
        "for n in $(seq 50); do {{ {}; }} & done; wait",
        fetch("small")
    );
    let got = cluster
        .bed()
        .sh(&fifty)
        .patience(seconds(300))
        .run()
        .success()
        .out();
    assert_eq!(got.lines().count(), 50);
    assert!(got.lines().all(|sum| sum == small), "{got}");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn port_forward_reaches_a_server_on_localhost() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.start(
        "nginx",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: nginx }
spec:
  runtimeClassName: sepal
  containers:
    - name: main
      image: nginx
      readinessProbe: { httpGet: { port: 80 }, periodSeconds: 1 }
"#,
    );
    let (_forward, port) = forward(&namespace, "nginx", 80);
    let page = format!("http://127.0.0.1:{port}/");
    for _ in 0..20 {
        let got = cluster
            .bed()
            .command(["curl", "-sS", "--max-time", "10", &page])
            .run()
            .success();
        assert_eq!(got.out(), "hello from sepal");
    }
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn an_ephemeral_container_sees_the_pod_s_processes() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start("web", STAYING);
    namespace
        .kubectl([
            "debug",
            "web",
            "--image=busybox",
            "--container=debugger",
            "--target=main",
            "--profile=general",
            "--",
            "sh",
            "-c",
            "ps -o pid,args; echo root of 1: $(ls /proc/1/root); exit 3",
        ])
        .run()
        .success();
    pod.wait_for(
        "{.status.ephemeralContainerStatuses[0].state.terminated.exitCode}",
        "3",
    );
    let seen = pod.logs(&["-c", "debugger"]);
    assert!(seen.contains("trap"), "the pod's process is not in {seen}");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn deleting_a_pod_asks_it_to_go_and_then_makes_it() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start("web", STAYING);
    let took = pod.delete(&[]).took();
    // The container listens to SIGTERM; the default grace period is 30 s.
    assert!(took < seconds(20), "{took:?}");

    let deaf = namespace.start(
        "deaf",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: deaf }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 3
  containers:
    - { name: main, image: busybox, command: [sh, -c, 'trap "" TERM; sleep 1000'] }
"#,
    );
    let took = deaf.delete(&[]).took();
    assert!(took >= seconds(3) && took < seconds(25), "{took:?}");
}
