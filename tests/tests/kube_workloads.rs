//! What makes pods: jobs, sets; and what the cluster knows of them.

use sepal_tests::{Cluster, eventually, seconds};

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_job_runs_to_its_completions() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.apply(
        r#"
apiVersion: batch/v1
kind: Job
metadata: { name: squares }
spec:
  completions: 4
  parallelism: 2
  completionMode: Indexed
  template:
    spec:
      runtimeClassName: sepal
      restartPolicy: Never
      containers:
        - { name: main, image: busybox, command: [sh, -c, 'echo $((JOB_COMPLETION_INDEX * JOB_COMPLETION_INDEX))'] }
"#,
    );
    namespace
        .kubectl([
            "wait",
            "--for=condition=Complete",
            "job/squares",
            "--timeout=120s",
        ])
        .run()
        .success();
    let logs = namespace
        .kubectl(["logs", "-l", "job-name=squares", "--tail=-1"])
        .run()
        .success()
        .out();
    let mut squares: Vec<_> = logs.lines().collect();
    squares.sort_unstable();
    assert_eq!(squares, ["0", "1", "4", "9"]);
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_job_that_fails_is_tried_again_and_given_up() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.apply(
        r#"
apiVersion: batch/v1
kind: Job
metadata: { name: vain }
spec:
  backoffLimit: 1
  template:
    spec:
      runtimeClassName: sepal
      restartPolicy: Never
      containers: [{ name: main, image: busybox, command: [sh, -c, 'exit 9'] }]
"#,
    );
    namespace
        .kubectl([
            "wait",
            "--for=condition=Failed",
            "job/vain",
            "--timeout=120s",
        ])
        .run()
        .success();
    assert_eq!(namespace.get("job/vain", "{.status.failed}"), "2");
    let codes = "{.items[*].status.containerStatuses[0].state.terminated.exitCode}";
    assert_eq!(namespace.get("pods", codes), "9 9");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_cron_job_runs_by_the_clock() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.apply(
        r#"
apiVersion: batch/v1
kind: CronJob
metadata: { name: minutely }
spec:
  schedule: "* * * * *"
  jobTemplate:
    spec:
      template:
        spec:
          runtimeClassName: sepal
          restartPolicy: Never
          containers: [{ name: main, image: busybox, command: [date, "+%s"] }]
"#,
    );
    let log = eventually("a minute begins", seconds(120), || {
        let pods = namespace.get(
            "pods",
            "{.items[?(@.status.phase==\"Succeeded\")].metadata.name}",
        );
        let pod = pods.split_whitespace().next()?.to_owned();
        Some(namespace.pod(&pod).logs(&[]))
    });
    let told: i64 = log.parse().expect("seconds");
    let now: i64 = cluster
        .bed()
        .sh("date +%s")
        .run()
        .success()
        .out()
        .parse()
        .expect("seconds");
    assert!(
        (0..60).contains(&(now - told)),
        "the guest's clock said {told} at {now} at the latest"
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_stateful_set_keeps_its_members_names() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.apply(
        r#"
apiVersion: v1
kind: Service
metadata: { name: db }
spec: { clusterIP: None, selector: { app: db }, ports: [{ port: 6379 }] }
---
apiVersion: apps/v1
kind: StatefulSet
metadata: { name: db }
spec:
  serviceName: db
  replicas: 2
  selector: { matchLabels: { app: db } }
  template:
    metadata: { labels: { app: db } }
    spec:
      runtimeClassName: sepal
      containers:
        - name: redis
          image: redis
          readinessProbe: { exec: { command: [redis-cli, ping] }, periodSeconds: 1, timeoutSeconds: 5 }
"#,
    );
    namespace.roll_out("statefulset/db", 180);
    let first = namespace.pod("db-0");
    let second = namespace.pod("db-1");
    assert_eq!(first.sh("redis-cli -h db-1.db set greeting hello"), "OK");
    assert_eq!(second.sh("redis-cli get greeting"), "hello");
    second.replace();
    second.wait_ready();
    eventually("its name leads to it", seconds(60), || {
        (first.exec(["redis-cli", "-h", "db-1.db", "dbsize"]).out() == "0").then_some(())
    });
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_daemon_set_has_a_pod_on_the_node() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.apply(
        r#"
apiVersion: apps/v1
kind: DaemonSet
metadata: { name: agent }
spec:
  selector: { matchLabels: { app: agent } }
  template:
    metadata: { labels: { app: agent } }
    spec:
      runtimeClassName: sepal
      terminationGracePeriodSeconds: 1
      containers: [{ name: main, image: busybox, command: [sleep, "1000"] }]
"#,
    );
    namespace.roll_out("daemonset/agent", 120);
    assert_eq!(
        namespace.get("daemonset/agent", "{.status.numberReady}"),
        "1"
    );
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn the_overhead_of_the_runtime_class_is_the_pod_s() {
    let cluster = Cluster::get();
    if cluster.runtime_class() != "sepal" {
        println!("left out: about the overhead, and runc has none");
        return;
    }
    let namespace = cluster.namespace();
    let pod = namespace.start(
        "weighed",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: weighed }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: busybox
      command: [sleep, "1000"]
      resources: { requests: { memory: 100Mi, cpu: 100m }, limits: { memory: 100Mi, cpu: 100m } }
"#,
    );
    assert_eq!(
        pod.get("{.spec.overhead.memory} {.spec.overhead.cpu}"),
        "96Mi 25m"
    );
    assert_eq!(
        pod.get("{.spec.nodeSelector}"),
        r#"{"sepal.io/ready":"true"}"#
    );
    assert_eq!(pod.get("{.status.qosClass}"), "Guaranteed");
    // What the kubelet gave the pod's cgroup on the node.
    let uid = pod.get("{.metadata.uid}");
    let limit = cluster
        .bed()
        .sh(&format!(
            "cat /sys/fs/cgroup/memory/kubepods/pod{uid}/memory.limit_in_bytes /sys/fs/cgroup/kubepods/pod{uid}/memory.max 2>/dev/null"
        ))
        .run()
        .out();
    assert_eq!(limit, (196 << 20).to_string());
    let node = cluster
        .kubectl(["describe", "node", "node"])
        .run()
        .success()
        .out();
    let row = node
        .lines()
        .find(|line| line.contains("weighed"))
        .unwrap_or_else(|| panic!("the pod is not in {node}"));
    assert!(row.contains("196Mi") && row.contains("125m"), "{row}");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn the_kubelet_knows_what_a_pod_uses() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    namespace.start(
        "busy",
        r#"
apiVersion: v1
kind: Pod
metadata: { name: busy }
spec:
  runtimeClassName: sepal
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: busybox
      command: [sh, -c, 'while :; do :; done']
      resources: { limits: { cpu: 300m, memory: 64Mi } }
"#,
    );
    // Nanocores and bytes, by container, as metrics-server has them.
    let (cpu, memory) = eventually("figures that are not zero", seconds(120), || {
        let summary = cluster
            .kubectl(["get", "--raw", "/api/v1/nodes/node/proxy/stats/summary"])
            .run()
            .success();
        let summary: serde_json::Value = serde_json::from_slice(summary.bytes()).ok()?;
        let pod = summary["pods"].as_array()?.iter().find(|pod| {
            pod["podRef"]["name"] == "busy" && pod["podRef"]["namespace"] == namespace.name()
        })?;
        let container = pod["containers"].get(0)?;
        let cpu = container["cpu"]["usageNanoCores"].as_u64()?;
        let memory = container["memory"]["workingSetBytes"].as_u64()?;
        (cpu > 0 && memory > 0).then_some((cpu, memory))
    });
    assert!((100_000_000..500_000_000).contains(&cpu), "{cpu} nanocores");
    assert!(memory < 64 << 20, "{memory} bytes");
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn a_database_keeps_its_rows_when_its_pod_is_deleted() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace();
    let scratch = cluster.bed().scratch();
    let make = ["mkdir", "-m", "0777", &scratch.file("disk")];
    cluster.bed().command(make).run().success();
    let _volume = namespace.offer(&scratch.file("disk"), "Filesystem");
    let manifest = r#"
apiVersion: apps/v1
kind: StatefulSet
metadata: { name: postgres }
spec:
  serviceName: postgres
  selector: { matchLabels: { app: postgres } }
  template:
    metadata: { labels: { app: postgres } }
    spec:
      runtimeClassName: sepal
      terminationGracePeriodSeconds: 30
      containers:
        - name: main
          image: postgres
          env: [{ name: PGDATA, value: /data/pg }, { name: PGHOST, value: /tmp }]
          command: [sh, -c, '[ -e $PGDATA/PG_VERSION ] || initdb -A trust || exit 1; exec postgres -k /tmp']
          resources: { limits: { memory: 512Mi } }
          readinessProbe: { exec: { command: [pg_isready, -q] }, periodSeconds: 1, timeoutSeconds: 5 }
          volumeMounts: [{ name: data, mountPath: /data }]
  volumeClaimTemplates:
    - metadata: { name: data }
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: NAME
        resources: { requests: { storage: 1Gi } }
"#;
    namespace.apply(&manifest.replace("NAME", namespace.name()));
    namespace.roll_out("statefulset/postgres", 240);
    let pod = namespace.pod("postgres-0");
    pod.sh("pgbench -q -i -s 1 postgres && pgbench -n -t 200 postgres");
    let count = "psql -At -c 'select count(*) from pgbench_history' postgres";
    assert_eq!(pod.sh(count), "200");
    pod.replace();
    namespace.roll_out("statefulset/postgres", 240);
    assert_eq!(pod.sh(count), "200");
    namespace
        .kubectl(["delete", "statefulset/postgres", "--wait"])
        .run()
        .success();
}

#[test]
#[ignore = "needs a cluster: tests/kube/run"]
fn fifty_pods_come_and_go_at_once() {
    let cluster = Cluster::alone();
    let namespace = cluster.namespace();
    namespace.apply(
        r#"
apiVersion: apps/v1
kind: Deployment
metadata: { name: many }
spec:
  replicas: 1
  selector: { matchLabels: { app: many } }
  template:
    metadata: { labels: { app: many } }
    spec:
      runtimeClassName: sepal
      terminationGracePeriodSeconds: 1
      containers:
        - { name: main, image: busybox, command: [sh, -c, 'trap "exit 0" TERM; sleep 1000 & wait'] }
"#,
    );
    let scale = |count: u32| {
        let begun = std::time::Instant::now();
        let replicas = format!("--replicas={count}");
        namespace
            .kubectl(["scale", "deployment/many", &replicas])
            .run()
            .success();
        eventually(&format!("there are {count}"), seconds(500), || {
            let pods = [
                "get",
                "pods",
                "-o",
                "jsonpath={range .items[*]}{.status.phase} {end}",
            ];
            let pods = namespace.kubectl(pods).run().out();
            let pods: Vec<_> = pods.split_whitespace().collect();
            let all = pods.len() == count as usize && pods.iter().all(|phase| *phase == "Running");
            all.then_some(())
        });
        println!("{count} after {:?}", begun.elapsed());
    };
    // As an autoscaler would.
    for count in [1, 20, 0, 50, 0] {
        scale(count);
    }
}
