//! Containers and execs through the agent's calls, in either bed (tests/bed). Needs root.

mod bed;

use std::time::{Duration, Instant};

use bed::{Bed, capabilities, process, process_id, read_all, refusal, spec, timeout};
use sepal_protocol::agent::{
    ContainerId, ResizeTerminalRequest, SetUpPodRequest, SignalProcessRequest,
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn container_id(id: &str) -> ContainerId {
    ContainerId {
        container_id: id.into(),
        ..Default::default()
    }
}

fn signal(id: &str, exec: &str, signal: i32, all: bool) -> SignalProcessRequest {
    SignalProcessRequest {
        container_id: id.into(),
        exec_id: exec.into(),
        signal: signal.try_into().unwrap(),
        all,
        ..Default::default()
    }
}

#[tokio::test]
async fn output_and_exit_statuses() {
    let bed = Bed::new().await;
    let (status, out, err) = bed.output("echo", &spec(&["echo", "hello", "world"])).await;
    assert_eq!(
        (status, out.as_str(), err.as_str()),
        (0, "hello world\n", "")
    );
    for (id, script, expected) in [
        ("one", "exit 1", 1),
        ("answer", "exit 42", 42),
        ("most", "exit 255", 255),
    ] {
        let (status, _, err) = bed.output(id, &spec(&["sh", "-c", script])).await;
        assert_eq!((status, err.as_str()), (expected, ""), "{script}");
    }
    // Not by PID 1, which its own signals do not kill. Real-time signals have a status as well.
    bed.run("box", &spec(&["sleep", "1000"])).await;
    for signal in [9, 15, 40] {
        let script = format!("kill -{signal} $$");
        let (status, ..) = bed
            .exec_output("box", "x", &process(&["sh", "-c", &script]))
            .await;
        assert_eq!(status, 128 + signal);
    }
    bed.agent
        .signal_process(timeout(), &signal("box", "", 9, true))
        .await
        .unwrap();
    assert_eq!(bed.wait("box", "").await.status, 137);
    bed.delete("box", "").await.unwrap();
}

#[tokio::test]
async fn the_process_is_as_the_spec_says() {
    let bed = Bed::new().await;
    let mut spec = spec(&[
        "sh",
        "-c",
        "id -u; id -g; id -G; pwd; hostname; umask; echo $GREETING $HOME; ulimit -n; \
         grep -E 'CapBnd|CapEff|NoNewPrivs' /proc/self/status; cat /proc/self/oom_score_adj; \
         cat /proc/1/comm; echo x 2>/dev/null >/file; echo $?; echo >/dev/stderr; \
         echo $((0x$(awk '/SigIgn/ {print $2}' /proc/self/status) & 0x1000))",
    ]);
    spec["process"]["user"] =
        json!({"uid": 1000, "gid": 1000, "umask": 0o027, "additionalGids": [27, 44]});
    spec["process"]["cwd"] = json!("/work/deep/er");
    spec["process"]["noNewPrivileges"] = json!(true);
    spec["process"]["oomScoreAdj"] = json!(300);
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456}]);
    spec["process"]["capabilities"] = capabilities(&["CAP_KILL"]);
    spec["root"]["readonly"] = json!(true);
    let (status, out, err) = bed.output("as-told", &spec).await;
    assert_eq!((status, err.as_str()), (0, "\n"));
    let lines: Vec<&str> = out.lines().collect();
    let expected = [
        "1000",
        "1000",
        "1000 27 44",
        "/work/deep/er",
        "box",
        "0027",
        "hello /work",
        "123",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000020",
        "NoNewPrivs:\t1",
        "300",
        "sh",
        "1",
        // SIGPIPE is not ignored.
        "0",
    ];
    assert_eq!(lines, expected);
}

#[tokio::test]
async fn bytes_pass_through_unharmed_and_at_once() {
    let bed = Bed::new().await;
    const SIZE: usize = 32 << 20;
    let script = "dd if=/dev/zero bs=65536 count=128 >&2 2>/dev/null & cat; wait";
    let mut streams = bed.run("cat", &spec(&["sh", "-c", script])).await;
    let data: Vec<u8> = (0..SIZE).map(|n| (n * 31 + n / 4096) as u8).collect();
    let sent = data.clone();
    let mut stdin = streams.stdin.take().unwrap();
    let writer = tokio::spawn(async move {
        stdin.write_all(&sent).await.unwrap();
        stdin.shutdown().await.unwrap();
        stdin
    });
    let mut stderr = streams.stderr.take().unwrap();
    let (out, err) = tokio::join!(read_all(&mut streams.stdout), read_all(&mut stderr));
    writer.await.unwrap();
    assert!(
        out == data,
        "{} of {SIZE} bytes, or changed ones",
        out.len()
    );
    assert_eq!(err.len(), 8 << 20);
    assert_eq!(bed.wait("cat", "").await.status, 0);
    bed.delete("cat", "").await.unwrap();
}

#[tokio::test]
async fn a_reader_that_leaves_early_stops_the_writer() {
    let bed = Bed::new().await;
    bed.run("box", &spec(&["sleep", "1000"])).await;
    let mut streams = bed.streams(false).await;
    bed.exec("box", "yes", &process(&["yes"]), &streams)
        .await
        .unwrap();
    let mut some = [0; 100];
    streams.stdout.read_exact(&mut some).await.unwrap();
    drop(streams);
    assert_eq!(bed.wait("box", "yes").await.status, 128 + 13);
    end(&bed, "box").await;
}

#[tokio::test]
async fn an_exit_does_not_wait_for_a_child_that_holds_the_output() {
    let bed = Bed::new().await;
    bed.run("box", &spec(&["sleep", "1000"])).await;
    let mut streams = bed.streams(false).await;
    let script = "sleep 3 & dd if=/dev/zero bs=1000 count=60 2>/dev/null";
    let start = Instant::now();
    bed.exec("box", "x", &process(&["sh", "-c", script]), &streams)
        .await
        .unwrap();
    assert_eq!(bed.wait("box", "x").await.status, 0);
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    // What was written is there, though the stream has not ended.
    let mut data = vec![0; 60_000];
    streams.stdout.read_exact(&mut data).await.unwrap();
    end(&bed, "box").await;
}

#[tokio::test]
async fn terminals_have_a_size_that_follows() {
    let bed = Bed::new().await;
    bed.rootfs("tty");
    let mut streams = bed.streams(true).await;
    streams.names.rows = 24;
    streams.names.columns = 80;
    let mut spec = spec(&[
        "sh",
        "-c",
        "tty; stty size; read line; stty size; echo got $line",
    ]);
    spec["process"]["terminal"] = json!(true);
    bed.create("tty", &spec, &streams, &[]).await.unwrap();
    bed.start("tty", "").await.unwrap();
    let mut seen = String::new();
    let mut buffer = [0; 256];
    while !seen.contains("24 80") {
        let count = streams.stdout.read(&mut buffer).await.unwrap();
        assert_ne!(count, 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    let size = ResizeTerminalRequest {
        container_id: "tty".into(),
        rows: 50,
        columns: 132,
        ..Default::default()
    };
    bed.agent.resize_terminal(timeout(), &size).await.unwrap();
    streams
        .stdin
        .as_mut()
        .unwrap()
        .write_all(b"word\n")
        .await
        .unwrap();
    seen.push_str(&String::from_utf8_lossy(
        &read_all(&mut streams.stdout).await,
    ));
    assert!(
        seen.contains("/dev/pts/0") && seen.contains("50 132"),
        "{seen}"
    );
    assert!(seen.contains("got word"), "{seen}");
    assert_eq!(bed.wait("tty", "").await.status, 0);
    bed.delete("tty", "").await.unwrap();
}

#[tokio::test]
async fn fifty_execs_at_once() {
    let bed = Bed::new().await;
    bed.run("box", &spec(&["sleep", "1000"])).await;
    let bed_ref = &bed;
    let all = (0..50).map(|n| async move {
        let id = format!("e{n}");
        let script = format!("echo out {n}; exit {n}");
        bed_ref
            .exec_output("box", &id, &process(&["sh", "-c", &script]))
            .await
    });
    for (n, (status, out, _)) in (0..).zip(futures_util::future::join_all(all).await) {
        assert_eq!((status, out), (n, format!("out {n}\n")));
    }
    end(&bed, "box").await;
}

#[tokio::test]
async fn what_cannot_be_made_is_named_and_leaves_nothing() {
    let bed = Bed::new().await;
    bed.rootfs("bad");
    let mut missing_program = spec(&["no-such-program"]);
    missing_program["process"]["env"] = json!(["PATH=/bin"]);
    let mut missing_mount = spec(&["true"]);
    missing_mount["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/data", "type": "bind", "source": "/run/sepal/share/bad/mounts/7",
        "options": ["rbind"]
    }));
    let mut bad_cwd = spec(&["true"]);
    bad_cwd["process"]["cwd"] = json!("/etc/passwd/x");
    let mut bad_user = spec(&["true"]);
    bad_user["process"]["user"]["uid"] = json!(u32::MAX);
    let mut no_process = spec(&["true"]);
    no_process.as_object_mut().unwrap().remove("process");
    let mut bad_sysctl = spec(&["true"]);
    bad_sysctl["linux"]["sysctl"] = json!({"net.no.such": "1"});
    for (spec, expected) in [
        (
            missing_program,
            r#"exec: "no-such-program": executable file not found in $PATH"#,
        ),
        (
            missing_mount,
            r#"mount source "/run/sepal/share/bad/mounts/7" for "/data": no such file or directory"#,
        ),
        (
            bad_cwd,
            r#"working directory "/etc/passwd/x": not a directory"#,
        ),
        (bad_user, "4294967295 is not a valid user id"),
        (no_process, "the OCI spec has no process"),
        (
            bad_sysctl,
            "sysctl net.no.such does not exist in the guest's kernel",
        ),
    ] {
        let streams = bed.streams(false).await;
        assert_eq!(
            refusal(bed.create("bad", &spec, &streams, &[]).await),
            expected
        );
    }
    // The same name can be used at once: nothing of it is there.
    let (status, out, _) = bed.output("bad2", &spec(&["echo", "fine"])).await;
    assert_eq!((status, out.as_str()), (0, "fine\n"));
    bed.run("box", &spec(&["sleep", "1000"])).await;
    let streams = bed.streams(false).await;
    let refused = bed
        .exec("box", "x", &process(&["/nothing"]), &streams)
        .await;
    assert_eq!(
        refusal(refused),
        r#"exec: "/nothing": no such file or directory"#
    );
    bed.delete("box", "x").await.unwrap();
    let mut process = process(&["true"]);
    process["cwd"] = json!("/nowhere");
    let streams = bed.streams(false).await;
    let refused = bed.exec("box", "x", &process, &streams).await;
    assert_eq!(
        refusal(refused),
        r#"working directory "/nowhere": no such file or directory"#
    );
    let gone = bed
        .agent
        .wait_process(timeout(), &process_id("none", ""))
        .await;
    assert_eq!(refusal(gone), "container none does not exist");
    end(&bed, "box").await;
}

#[tokio::test]
async fn pausing_makes_it_stand_still() {
    let bed = Bed::new().await;
    let script = "while :; do echo >>/tmp/count; usleep 1000; done";
    bed.run("count", &spec(&["sh", "-c", script])).await;
    let file = bed.share().join("count/rootfs/tmp/count");
    let count = || std::fs::metadata(&file).map_or(0, |about| about.len());
    while count() < 5 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bed.agent
        .pause_container(timeout(), &container_id("count"))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let before = count();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(count(), before);
    let streams = bed.streams(false).await;
    let refused = bed.exec("count", "x", &process(&["true"]), &streams).await;
    assert_eq!(refusal(refused), "container count is paused");
    bed.agent
        .resume_container(timeout(), &container_id("count"))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(count() > before);
    let listed = bed
        .agent
        .list_processes(timeout(), &container_id("count"))
        .await
        .unwrap();
    assert!(!listed.processes.is_empty());
    end(&bed, "count").await;
}

#[tokio::test]
async fn signals_reach_one_or_all() {
    let bed = Bed::new().await;
    let script =
        "trap 'echo hup' HUP; trap 'exit 3' USR1; echo ready; while :; do usleep 10000; done";
    let mut streams = bed.run("sig", &spec(&["sh", "-c", script])).await;
    let mut line = [0; 6];
    streams.stdout.read_exact(&mut line).await.unwrap();
    bed.agent
        .signal_process(timeout(), &signal("sig", "", 1, false))
        .await
        .unwrap();
    streams.stdout.read_exact(&mut line[..4]).await.unwrap();
    assert_eq!(&line[..4], b"hup\n");
    bed.agent
        .signal_process(timeout(), &signal("sig", "", 10, true))
        .await
        .unwrap();
    assert_eq!(bed.wait("sig", "").await.status, 3);
    let late = bed
        .agent
        .signal_process(timeout(), &signal("sig", "", 15, false))
        .await;
    assert_eq!(refusal(late), "process already finished");
    let odd = bed
        .agent
        .signal_process(timeout(), &signal("sig", "", 65, false))
        .await;
    assert_eq!(refusal(odd), "65 is not a signal");
    bed.delete("sig", "").await.unwrap();
}

#[tokio::test]
async fn the_pods_containers_share_a_pid_namespace_without_the_agent() {
    let bed = Bed::new().await;
    for id in ["first", "second"] {
        bed.rootfs(id);
        let streams = bed.streams(false).await;
        bed.create(id, &spec(&["sleep", "1000"]), &streams, &["pid", "ipc"])
            .await
            .unwrap();
        bed.start(id, "").await.unwrap();
    }
    let look = process(&[
        "sh",
        "-c",
        "cat /proc/1/comm; pidof sleep | wc -w; ls /proc/1/root/run",
    ]);
    let (_, out, _) = bed.exec_output("second", "look", &look).await;
    assert_eq!(out, "sleep\n2\n");
    // With the one that made the namespace all in it end.
    end(&bed, "first").await;
    assert_eq!(bed.wait("second", "").await.status, 137);
    bed.delete("second", "").await.unwrap();
    // And the next one makes a new one.
    bed.rootfs("third");
    let streams = bed.streams(false).await;
    bed.create("third", &spec(&["true"]), &streams, &["pid"])
        .await
        .unwrap();
    bed.start("third", "").await.unwrap();
    assert_eq!(bed.wait("third", "").await.status, 0);
    bed.delete("third", "").await.unwrap();
}

#[tokio::test]
async fn a_pid_namespace_that_the_pod_holds_outlives_its_containers() {
    let bed = Bed::new().await;
    let set_up = SetUpPodRequest {
        holds_pid_namespace: true,
        etc_files: [("hosts".to_owned(), "10.1.2.3 db\n".to_owned())].into(),
        ..Default::default()
    };
    bed.agent.set_up_pod(timeout(), &set_up).await.unwrap();
    let mut namespaces = Vec::new();
    for id in ["first", "second"] {
        bed.rootfs(id);
        let streams = bed.streams(false).await;
        let mut sleeping = spec(&["sh", "-c", "(sleep 0.1 &); exec sleep 1000"]);
        sleeping["mounts"].as_array_mut().unwrap().push(json!({
            "destination": "/etc/hosts", "type": "bind", "source": "/run/sepal/etc/hosts",
            "options": ["rbind", "rprivate", "ro"]
        }));
        bed.create(id, &sleeping, &streams, &["pid", "ipc"])
            .await
            .unwrap();
        bed.start(id, "").await.unwrap();
        let look = process(&[
            "sh",
            "-c",
            "sleep 0.3; cat /etc/hosts /proc/1/comm; ls /proc/1/root/ 2>&1; \
             grep -c '^State:.*Z' /proc/[0-9]*/status | grep -c ':1'; readlink /proc/self/ns/pid",
        ]);
        let (_, out, _) = bed.exec_output(id, "look", &look).await;
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines[..2], ["10.1.2.3 db", "sepal-pod"], "{out}");
        assert!(lines[2].ends_with("Permission denied"), "{out}");
        assert_eq!(lines[3], "0", "orphans are collected: {out}");
        namespaces.push(lines[4].to_owned());
        end(&bed, id).await;
    }
    assert_eq!(namespaces[0], namespaces[1]);
}

#[tokio::test]
async fn seccomp_holds_for_init_and_for_execs() {
    let bed = Bed::new().await;
    let mut spec = spec(&["sh", "-c", "mkdir /tmp/a; sleep 1000"]);
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
    });
    bed.run("box", &spec).await;
    let (status, _, err) = bed
        .exec_output("box", "x", &process(&["mkdir", "/tmp/b"]))
        .await;
    assert_eq!(status, 1);
    assert!(err.contains("Operation not permitted"), "{err}");
    assert!(!bed.share().join("box/rootfs/tmp/a").exists());
    end(&bed, "box").await;
}

#[tokio::test]
async fn mounts_are_made_as_told() {
    let bed = Bed::new().await;
    bed.rootfs("box");
    for name in ["0", "1"] {
        std::fs::create_dir_all(bed.share().join("box/mounts").join(name)).unwrap();
    }
    std::fs::write(bed.share().join("box/mounts/0/file"), "from the host").unwrap();
    let mut spec = spec(&[
        "sh",
        "-c",
        "cat /data/file; echo; touch /ro/x; touch /data/from-inside && df -k /scratch | tail -1 | \
         awk '{print $2}'; grep -c ' /masked ' /proc/mounts; echo 1 >/proc/sys/kernel/panic",
    ]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    let source = |n: u32| format!("/run/sepal/share/box/mounts/{n}");
    mounts.push(
        json!({"destination": "/data", "type": "bind", "source": source(0),
                       "options": ["rbind", "rw"]}),
    );
    mounts.push(
        json!({"destination": "/ro", "type": "bind", "source": source(1),
                       "options": ["rbind", "ro"]}),
    );
    mounts.push(
        json!({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
                       "options": ["nosuid", "size=1m"]}),
    );
    let streams = bed.streams(false).await;
    bed.create("box", &spec, &streams, &[]).await.unwrap();
    bed.start("box", "").await.unwrap();
    let mut streams = streams;
    let out = String::from_utf8(read_all(&mut streams.stdout).await).unwrap();
    let err = String::from_utf8(read_all(streams.stderr.as_mut().unwrap()).await).unwrap();
    assert_eq!(out, "from the host\n1024\n0\n", "{err}");
    assert_eq!(err.matches("Read-only file system").count(), 2, "{err}");
    assert!(bed.share().join("box/mounts/0/from-inside").exists());
    assert_eq!(bed.wait("box", "").await.status, 1);
    bed.delete("box", "").await.unwrap();
}

#[tokio::test]
async fn a_container_that_never_started_can_be_deleted() {
    let bed = Bed::new().await;
    bed.rootfs("box");
    let streams = bed.streams(false).await;
    bed.create("box", &spec(&["true"]), &streams, &[])
        .await
        .unwrap();
    assert_eq!(bed.delete("box", "").await.unwrap().status, 137);
    bed.run("again", &spec(&["sleep", "1000"])).await;
    assert_eq!(
        refusal(bed.delete("again", "").await),
        "container again is running"
    );
    end(&bed, "again").await;
}

async fn end(bed: &Bed, id: &str) {
    bed.agent
        .signal_process(timeout(), &signal(id, "", 9, true))
        .await
        .unwrap();
    assert_eq!(bed.wait(id, "").await.status, 137);
    bed.delete(id, "").await.unwrap();
}
