//! What needs a machine of one's own: cgroup limits, devices, clock, power. In a VM only
//! (tests/bed), so ignored unless asked for: `cargo test -p sepal-agent -- --ignored`.

mod bed;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bed::{Bed, empty, process, refusal, spec, timeout};
use sepal_protocol::agent::{
    Address, Clock, ContainerId, Event, ExecProcessRequest, Interface, Network, ResizeGuestRequest,
    SetUpPodRequest, SignalProcessRequest, Stats, UpdateContainerRequest, event,
};
use serde_json::{Value, json};

fn limited(script: &str, resources: Value) -> Value {
    let mut spec = spec(&["sh", "-c", script]);
    for (name, value) in resources.as_object().unwrap() {
        spec["linux"]["resources"][name] = value.clone();
    }
    spec
}

async fn stats(bed: &Bed, id: &str) -> Stats {
    let id = ContainerId {
        container_id: id.into(),
        ..Default::default()
    };
    bed.agent.container_stats(timeout(), &id).await.unwrap()
}

async fn end(bed: &Bed, id: &str) {
    let kill = SignalProcessRequest {
        container_id: id.into(),
        signal: 9,
        all: true,
        ..Default::default()
    };
    bed.agent.signal_process(timeout(), &kill).await.unwrap();
    bed.wait(id, "").await;
    bed.delete(id, "").await.unwrap();
}

#[tokio::test]
#[ignore = "needs a VM"]
async fn the_stages_of_a_boot_are_told() {
    let bed = Bed::in_a_vm().await;
    let stages = &bed.ready().unwrap().stages;
    let names: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
    assert_eq!(names, ["init", "mounts", "share", "listening"]);
    let took = stages[3].boottime_us - stages[0].boottime_us;
    println!("{stages:?}: {took} us from init to listening");
    // Wall time and the CPU time of the VM, for the next saving to be seen.
    for n in 0..10 {
        let id = format!("c{n}");
        bed.rootfs(&id);
        let streams = bed.streams(false).await;
        let start = (Instant::now(), bed.cpu_time());
        let passed = || (start.0.elapsed(), bed.cpu_time() - start.1);
        bed.create(&id, &spec(&["true"]), &streams, &[])
            .await
            .unwrap();
        let created = passed();
        bed.start(&id, "").await.unwrap();
        let started = passed();
        bed.wait(&id, "").await;
        let ended = passed();
        bed.delete(&id, "").await.unwrap();
        println!(
            "created {created:?} started {started:?} ended {ended:?} deleted {:?}",
            passed()
        );
    }
    bed.run("box", &spec(&["sleep", "1000"])).await;
    for n in 0..10 {
        let start = (Instant::now(), bed.cpu_time());
        bed.exec_output("box", &format!("e{n}"), &process(&["true"]))
            .await;
        println!("exec {:?}", (start.0.elapsed(), bed.cpu_time() - start.1));
    }
    println!("{}", bed.console());
    end(&bed, "box").await;
}

#[tokio::test]
#[ignore = "needs a VM"]
async fn a_memory_limit_kills_the_container_and_not_the_pod() {
    let bed = Bed::in_a_vm().await;
    let hog = "dd if=/dev/zero of=/dev/null bs=64M count=1 2>/dev/null";
    let limit = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    bed.run("hog", &limited(&format!("exec {hog}"), limit))
        .await;
    let exit = bed.wait("hog", "").await;
    assert_eq!((exit.status, exit.oom_killed), (137, true));
    let Event {
        kind: Some(event::Kind::Oom(id)),
        ..
    } = bed.agent.next_event(timeout(), &empty()).await.unwrap()
    else {
        panic!("another event")
    };
    assert_eq!(id, "hog");
    assert_eq!(stats(&bed, "hog").await.memory.events["oom_kill"], 1);
    bed.delete("hog", "").await.unwrap();
    let (status, ..) = bed.output("after", &spec(&["true"])).await;
    assert_eq!(status, 0);
}

#[tokio::test]
#[ignore = "needs a VM"]
async fn limits_hold_and_can_be_changed() {
    let bed = Bed::in_a_vm().await;
    let limits = json!({"pids": {"limit": 10}, "cpu": {"quota": 20000, "period": 100_000, "cpus": "0"},
                        "memory": {"limit": 64 << 20}});
    bed.run("box", &limited("while :; do :; done", limits))
        .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (before, start) = (stats(&bed, "box").await, Instant::now());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (after, took) = (stats(&bed, "box").await, start.elapsed());
    let used = after.cpu.usage_usec - before.cpu.usage_usec;
    let share = used as f64 / took.as_micros() as f64;
    assert!((0.18..0.22).contains(&share), "{share} of a CPU");
    assert!(after.cpu.nr_throttled > before.cpu.nr_throttled);
    assert_eq!((after.memory.limit, after.pids.limit), (64 << 20, 10));
    assert!(after.pids.current >= 1 && after.memory.usage > 0);

    let update = UpdateContainerRequest {
        container_id: "box".into(),
        resources: serde_json::to_vec(
            &json!({"memory": {"limit": 128 << 20}, "pids": {"limit": 20},
                                              "cpu": {"quota": 50000, "period": 100_000}}),
        )
        .unwrap(),
        ..Default::default()
    };
    bed.agent
        .update_container(timeout(), &update)
        .await
        .unwrap();
    let updated = stats(&bed, "box").await;
    assert_eq!((updated.memory.limit, updated.pids.limit), (128 << 20, 20));
    let forks = "n=0; while [ $n -lt 30 ]; do sleep 5 & n=$((n+1)); done; echo $n";
    let (_, out, err) = bed
        .exec_output("box", "forks", &process(&["sh", "-c", forks]))
        .await;
    assert!(err.contains("fork") && !out.contains("30"), "{out} {err}");
    end(&bed, "box").await;
}

#[tokio::test]
#[ignore = "needs a VM"]
async fn only_allowed_devices_open() {
    let bed = Bed::in_a_vm().await;
    let mut denied = spec(&[
        "sh",
        "-c",
        "mknod /dev/kmsg c 1 11 && head -c1 /dev/zero | wc -c; dd if=/dev/kmsg bs=1 count=1",
    ]);
    denied["process"]["capabilities"] = bed::capabilities(&["CAP_MKNOD"]);
    let (_, out, err) = bed.output("denied", &denied).await;
    assert_eq!(out, "1\n");
    assert!(err.contains("Operation not permitted"), "{err}");
    denied["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    denied["process"]["capabilities"] = bed::capabilities(&["CAP_MKNOD", "CAP_SYSLOG"]);
    let (_, _, err) = bed.output("allowed", &denied).await;
    assert!(!err.contains("Operation not permitted"), "{err}");
}

#[tokio::test]
#[ignore = "needs a VM"]
async fn the_pod_is_set_up() {
    let bed = Bed::in_a_vm().await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let later = now + Duration::from_secs(1_000_000);
    let set_up = SetUpPodRequest {
        pod_id: "p".into(),
        hostname: "the-pod".into(),
        clock: Some(Clock {
            realtime_ns: later.as_nanos() as u64,
            ..Default::default()
        })
        .into(),
        sysctls: [("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into(),
        shm_size: 8 << 20,
        ..Default::default()
    };
    bed.agent.set_up_pod(timeout(), &set_up).await.unwrap();
    let mut look = spec(&[
        "sh",
        "-c",
        "hostname; cat /proc/sys/net/ipv4/ip_forward; df -k /dev/shm | tail -1 | awk '{print $2}'; \
         date +%s; cat /sys/class/net/lo/flags",
    ]);
    let mounts = look["mounts"].as_array_mut().unwrap();
    mounts.pop();
    mounts.push(
        json!({"destination": "/dev/shm", "type": "bind", "source": "/run/sepal/shm",
                       "options": ["rbind", "rw"]}),
    );
    mounts.push(
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
                       "options": ["nosuid", "noexec", "nodev", "ro"]}),
    );
    bed.rootfs("look");
    let mut streams = bed.streams(false).await;
    bed.create("look", &look, &streams, &["uts", "ipc", "network"])
        .await
        .unwrap();
    bed.start("look", "").await.unwrap();
    let out = String::from_utf8(bed::read_all(&mut streams.stdout).await).unwrap();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..3], ["the-pod", "1", "8192"]);
    let told: u64 = lines[3].parse().unwrap();
    assert!((0..30).contains(&(told - later.as_secs())), "{told}");
    // IFF_UP | IFF_LOOPBACK
    assert_eq!(lines[4], "0x9");
    bed.wait("look", "").await;
    bed.delete("look", "").await.unwrap();

    let info = bed.agent.guest_info(timeout(), &empty()).await.unwrap();
    assert_eq!((info.cpus_online, info.cpus_present), (1, 1));
    assert!(info.memory_total > info.memory_available && info.memory_available > 100 << 20);
    println!(
        "guest memory {} used",
        (info.memory_total - info.memory_available) >> 10
    );
    let more = ResizeGuestRequest {
        cpus: 2,
        ..Default::default()
    };
    let refused = bed.agent.resize_guest(timeout(), &more).await;
    assert_eq!(refusal(refused), "the guest has 1 CPUs, not 2");
    let network = Network {
        interfaces: vec![Interface {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            addresses: vec![Address {
                ip: vec![10, 1, 2, 3],
                prefix_len: 24,
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    let refused = bed.agent.update_network(timeout(), &network).await;
    assert_eq!(
        refusal(refused),
        "the guest has no interface with MAC 02:00:00:00:00:01"
    );
}

#[tokio::test]
#[ignore = "needs a VM"]
async fn programs_of_the_guest_run_in_the_debug_image_alone() {
    let bed = Bed::in_a_vm().await;
    let request = ExecProcessRequest {
        exec_id: "shell".into(),
        process: serde_json::to_vec(&process(&["sh", "-c", "echo $$"])).unwrap(),
        ..Default::default()
    };
    let refused = bed.agent.debug_exec(timeout(), &request).await;
    assert_eq!(
        refusal(refused),
        "the guest image is not the debug variant, which has programs of its own"
    );
}

#[tokio::test]
#[ignore = "needs a VM"]
async fn it_powers_off_in_order() {
    let mut bed = Bed::in_a_vm().await;
    bed.run("box", &spec(&["sleep", "1000"])).await;
    bed.agent.shutdown(timeout(), &empty()).await.unwrap();
    assert_eq!(bed.wait_vm().await, 0);
}
