//! From a pod's first container to its last: order, probes, hooks, ends and their reasons.

use sepal_tests::{Cluster, Namespace, Pod, eventually, seconds};

const TERMINATED: &str = "{.status.containerStatuses[0].state.terminated";

/// A field of how the first container ended.
fn ended(pod: &Pod, field: &str) -> String {
    pod.get(&format!("{TERMINATED}.{field}}}"))
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn init_containers_run_in_order_before_the_others() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let log = namespace.run(
        "ordered",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: ordered }
spec:
  runtimeClassName: sepal
  restartPolicy: OnFailure
  volumes: [{ name: work, emptyDir: {} }]
  initContainers:
    - name: first
      image: busybox
      command: [sh, -c, 'echo first >>/work/log; [ $(wc -l </work/log) -gt 1 ]']
      volumeMounts: [{ name: work, mountPath: /work }]
    - name: second
      image: busybox
      command: [sh, -c, 'echo second >>/work/log']
      volumeMounts: [{ name: work, mountPath: /work }]
  containers:
    - name: main
      image: busybox
      command: [cat, /work/log]
      volumeMounts: [{ name: work, mountPath: /work }]
"#,
    );
    // The first one fails once and is run again.
    assert_eq!(log, "first\nfirst\nsecond");
    let pod = namespace.pod("ordered");
    assert_eq!(
        pod.get("{.status.initContainerStatuses[0].restartCount}"),
        "1"
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_sidecar_is_there_before_and_after_the_main_container() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.run(
        "job",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: job }
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  volumes: [{ name: work, emptyDir: {} }]
  initContainers:
    - name: sidecar
      image: busybox
      restartPolicy: Always
      command: [sh, -c, 'trap "cat /work/last; exit 0" TERM; httpd -p 8080 -h /work; echo up >/work/index.html; while :; do sleep 1 & wait $!; done']
      startupProbe: { httpGet: { path: /index.html, port: 8080 }, periodSeconds: 1, failureThreshold: 60 }
      volumeMounts: [{ name: work, mountPath: /work }]
  containers:
    - name: main
      image: busybox
      command: [sh, -c, 'wget -qO- http://127.0.0.1:8080/ && echo last words >/work/last']
      volumeMounts: [{ name: work, mountPath: /work }]
"#,
    );
    let pod = namespace.pod("job");
    assert_eq!(pod.logs(&["-c", "main"]), "up");
    // It ended after the main container, by being asked to.
    assert_eq!(pod.logs(&["-c", "sidecar"]), "last words");
    assert_eq!(
        pod.get("{.status.initContainerStatuses[0].state.terminated.exitCode}"),
        "0"
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn readiness_follows_its_probe_of_every_kind() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "probed",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: probed }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: http
      image: busybox
      command: [sh, -c, 'mkdir /www; echo ok >/www/health; exec httpd -f -p 8080 -h /www']
      readinessProbe: { httpGet: { path: /health, port: 8080 }, periodSeconds: 1, failureThreshold: 1 }
    - name: tcp
      image: busybox
      command: [sh, -c, 'exec httpd -f -p 8081']
      readinessProbe: { tcpSocket: { port: 8081 }, periodSeconds: 1 }
    - name: exec
      image: busybox
      command: [sh, -c, 'touch /ready; sleep 1000']
      readinessProbe: { exec: { command: [cat, /ready] }, periodSeconds: 1, failureThreshold: 1 }
"#,
    );
    let ready = "{.status.conditions[?(@.type==\"Ready\")].status}";
    for (container, spoil, mend) in [
        ("http", "rm /www/health", "echo ok >/www/health"),
        ("exec", "rm /ready", "touch /ready"),
    ] {
        pod.sh_in(container, spoil);
        pod.wait_for(ready, "False");
        pod.sh_in(container, mend);
        pod.wait_for(ready, "True");
    }
    assert_eq!(
        pod.get("{.status.containerStatuses[*].restartCount}"),
        "0 0 0"
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_container_that_fails_its_liveness_probe_is_restarted() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "sickly",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: sickly }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: busybox
      command: [sh, -c, 'touch /healthy; sleep 1000']
      startupProbe: { exec: { command: [test, -e, /healthy] }, periodSeconds: 1 }
      livenessProbe: { exec: { command: [test, -e, /healthy] }, periodSeconds: 1, failureThreshold: 2 }
"#,
    );
    pod.sh("rm /healthy");
    pod.wait_for("{.status.containerStatuses[0].restartCount}", "1");
    pod.wait_ready();
    assert!(
        pod.events().contains("Liveness probe failed"),
        "{}",
        pod.events()
    );
    assert_eq!(pod.sh("ls /healthy"), "/healthy");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_hundred_failed_liveness_probes_leave_nothing_in_the_pod() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    // A neighbour of the container that dies can see what the pod's VM holds of its former lives.
    let pod = namespace.start(
        "mortal",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: mortal }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  shareProcessNamespace: true
  containers:
    - name: main
      image: busybox
      command: [sleep, "1000"]
      livenessProbe: { exec: { command: ["false"] }, periodSeconds: 1, failureThreshold: 1, terminationGracePeriodSeconds: 1 }
      volumeMounts: [{ name: cache, mountPath: /cache }]
    - name: witness
      image: busybox
      command: [sleep, "100000"]
      securityContext: { privileged: true }
  volumes: [{ name: cache, emptyDir: {} }]
"#,
    );
    let restarts = || {
        let counts = pod.get("{.status.containerStatuses[?(@.name=='main')].restartCount}");
        counts.parse::<u32>().unwrap_or(0)
    };
    let held = || {
        // The container itself may be there or just not.
        let line = "echo $(ls /proc | grep -c '^[0-9]') $(wc -l </proc/1/mountinfo)";
        let told = pod.sh_in("witness", line);
        let counts: Vec<u32> = told
            .split_whitespace()
            .map(|n| n.parse().unwrap())
            .collect();
        (counts[0], counts[1])
    };
    let settled = |count| {
        eventually("it is restarted", seconds(600), || {
            (restarts() >= count).then(held)
        })
    };
    let early = settled(5);
    let late = settled(100);
    let near = |before: u32, after: u32| after <= before + 3;
    assert!(
        near(early.0, late.0) && near(early.1, late.1),
        "processes and mounts: {early:?} after 5 lives, {late:?} after 100"
    );
    assert_eq!(
        pod.get("{.status.containerStatuses[?(@.name=='witness')].restartCount}"),
        "0"
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn hooks_run_after_the_start_and_before_the_stop() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let scratch = cluster.bed().scratch();
    let manifest = r#"
apiVersion: v1
kind: Pod
metadata: { name: hooked }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 20
  containers:
    - name: main
      image: busybox
      command: [sh, -c, 'trap "echo term >>/log/log; exit 0" TERM; while :; do sleep 1 & wait $!; done']
      lifecycle:
        postStart: { exec: { command: [sh, -c, 'echo started >>/log/log'] } }
        preStop: { exec: { command: [sh, -c, 'sleep 1; echo stopping >>/log/log'] } }
      volumeMounts: [{ name: log, mountPath: /log }]
  volumes: [{ name: log, hostPath: { path: SCRATCH } }]
"#
    .replace("SCRATCH", scratch.path());
    let pod = namespace.start("hooked", &manifest);
    let log = scratch.file("log");
    assert_eq!(cluster.bed().read(&log), "started");
    pod.delete(&[]);
    assert_eq!(cluster.bed().read(&log), "started\nstopping\nterm");
}

/// Runs a pod of one container to its end; `more` goes into the container's description.
fn end_of<'n>(namespace: &'n Namespace, name: &str, line: &str, more: &str) -> Pod<'n> {
    namespace.apply(&format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: {name} }}
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  containers:
    - name: main
      image: python
      command: [bash, -c, '{line}']
{more}
"#
    ));
    let pod = namespace.pod(name);
    pod.wait_end();
    pod
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn the_end_of_a_container_has_its_reason_and_message() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let said = end_of(
        &namespace,
        "said",
        "echo -n good bye >/dev/termination-log",
        "",
    );
    assert_eq!(ended(&said, "reason"), "Completed");
    assert_eq!(ended(&said, "message"), "good bye");

    let failed = end_of(
        &namespace,
        "failed",
        "echo the last line; exit 3",
        "      terminationMessagePolicy: FallbackToLogsOnError",
    );
    assert_eq!(ended(&failed, "exitCode"), "3");
    assert_eq!(ended(&failed, "reason"), "Error");
    assert_eq!(ended(&failed, "message").trim(), "the last line");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_container_beyond_its_memory_is_oom_killed() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let limit = "      resources: { limits: { memory: 64Mi } }";
    let pod = end_of(
        &namespace,
        "hungry",
        "exec python3 -c \"x = [bytearray(1 << 20) for n in range(200)]\"",
        limit,
    );
    assert_eq!(ended(&pod, "reason"), "OOMKilled");
    assert_eq!(ended(&pod, "exitCode"), "137");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn memory_can_be_promised_that_is_not_used() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    // As on any node, where the kubelet sees to it (vm.overcommit_memory).
    let limit = "      resources: { limits: { memory: 64Mi } }";
    let line = "exec python3 -c \"import mmap; mmap.mmap(-1, 1 << 30)\"";
    let pod = end_of(&namespace, "hopeful", line, limit);
    assert_eq!(ended(&pod, "reason"), "Completed", "{}", pod.logs(&[]));
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn one_container_s_hunger_is_not_its_neighbour_s() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "pair",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: pair }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: hungry
      image: python
      command: [bash, -c, '[ -e /flag/eaten ] && sleep 1000; touch /flag/eaten; sleep 2; exec python3 -c "x = [bytearray(1 << 20) for n in range(200)]"']
      resources: { limits: { memory: 64Mi } }
      volumeMounts: [{ name: flag, mountPath: /flag }]
    - name: modest
      image: busybox
      command: [sleep, "1000"]
      resources: { limits: { memory: 64Mi } }
  volumes: [{ name: flag, emptyDir: {} }]
"#,
    );
    let hungry = "{.status.containerStatuses[?(@.name==\"hungry\")]";
    pod.wait_for(
        &format!("{hungry}.lastState.terminated.reason}}"),
        "OOMKilled",
    );
    pod.wait_ready();
    let modest = "{.status.containerStatuses[?(@.name==\"modest\")].restartCount}";
    assert_eq!(pod.get(modest), "0");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_failing_container_is_restarted_with_its_former_log_kept() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: { name: loop }
spec:
  runtimeClassName: sepal
  containers:
    - { name: main, image: busybox, command: [sh, -c, 'echo $HOSTNAME; head -c 4 /proc/uptime >/dev/null; cat /seen 2>/dev/null; touch /seen; exit 1'] }
"#,
    );
    let pod = namespace.pod("loop");
    eventually("two restarts", seconds(150), || {
        let count = pod.get("{.status.containerStatuses[0].restartCount}");
        count
            .parse()
            .is_ok_and(|count: u32| count >= 2)
            .then_some(())
    });
    pod.wait_for(
        "{.status.containerStatuses[0].state.waiting.reason}",
        "CrashLoopBackOff",
    );
    assert_eq!(pod.logs(&["--previous"]), "loop");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_pod_that_cannot_start_says_why() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let pod = |name: &str, image: &str, command: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{ name: {name} }}\nspec:\n  runtimeClassName: sepal\n  restartPolicy: Never\n  containers: [{{ name: main, image: {image}, command: [{command}] }}]\n"
        )
    };
    namespace.apply(&pod("no-image", "no-such-image", "sh"));
    namespace.apply(&pod("no-program", "busybox", "/no/such/program"));
    let reason = "{.status.containerStatuses[0].state.waiting.reason}";
    let image = namespace.pod("no-image");
    eventually("the image is missed", seconds(60), || {
        image.get(reason).contains("ImagePull").then_some(())
    });
    let program = namespace.pod("no-program");
    assert_eq!(program.wait_end(), "Failed");
    assert_eq!(ended(&program, "exitCode"), "128");
    assert_eq!(ended(&program, "reason"), "StartError");
    let message = ended(&program, "message");
    assert!(message.contains("/no/such/program"), "{message}");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_pod_has_its_time_and_no_more() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.apply(
        r#"
apiVersion: v1
kind: Pod
metadata: { name: late }
spec:
  runtimeClassName: sepal
  restartPolicy: Never
  activeDeadlineSeconds: 5
  terminationGracePeriodSeconds: 1
  containers:
    - { name: main, image: busybox, command: [sleep, "1000"] }
"#,
    );
    let pod = namespace.pod("late");
    assert_eq!(pod.wait_end(), "Failed");
    assert_eq!(pod.get("{.status.reason}"), "DeadlineExceeded");
}
