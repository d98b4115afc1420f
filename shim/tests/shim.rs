//! The real shim program, driven as containerd drives it, over a pod whose VM is a stand-in.
//!
//! These tests need root (mounts, network namespaces, cgroups) and are ignored without asking.

mod common;

use std::io::Read;
use std::time::{Duration, Instant};

use common::bed::{Bed, code, delete_of, is_root, start_of, wait_of, within};
use containerd_shim_protos::api::*;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc;
use sepal_protocol::state::{PodState, ProcessRef};

/// Becomes the stand-in when the shim has started this binary; a test of nothing otherwise.
#[test]
fn stand_in_for_the_vmm() {
    if std::env::var_os("SEPAL_STAND_IN").is_some() {
        common::vmm();
    }
}

/// The shim ends within so many seconds. Unasked it does so 5 s after the deletion.
async fn leaves(shim: &ProcessRef, seconds: u64) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while shim.alive() {
        assert!(Instant::now() < deadline, "the shim is left");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_runs_from_create_to_shutdown_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("run", &["sh", "-c", "echo out; echo err >&2; cat; exit 42"]).await;
    let task = bed.start().await;
    let mut create = bed.create_request();
    create.stdin = bed.fifo("in");
    create.stdout = bed.fifo("out");
    create.stderr = bed.fifo("err");
    let reader = |path: String| {
        tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            std::fs::File::open(path)
                .unwrap()
                .read_to_string(&mut text)
                .unwrap();
            text
        })
    };
    let (out, err) = (reader(create.stdout.clone()), reader(create.stderr.clone()));
    let stdin = create.stdin.clone();
    let pid = task.create(within(), &create).await.unwrap().pid;
    let state = PodState::load(&bed.pod()).unwrap();
    assert_eq!(
        state.vmm.unwrap().pid,
        pid,
        "the pid is the VMM's, alive on the host"
    );
    assert!(std::fs::metadata(format!("/proc/{pid}")).is_ok());
    let again = code(task.create(within(), &create).await.unwrap_err());
    assert_eq!(again.0, ttrpc::Code::ALREADY_EXISTS);
    task.start(within(), &start_of(&bed.id)).await.unwrap();
    tokio::task::spawn_blocking(move || std::fs::write(stdin, "typed\n"))
        .await
        .unwrap()
        .unwrap();
    let close = CloseIORequest {
        id: bed.id.clone(),
        stdin: true,
        ..Default::default()
    };
    task.close_io(within(), &close).await.unwrap();
    assert_eq!(
        task.wait(within(), &wait_of(&bed.id))
            .await
            .unwrap()
            .exit_status,
        42
    );
    assert_eq!(out.await.unwrap(), "out\ntyped\n");
    assert_eq!(err.await.unwrap(), "err\n");
    let kill = KillRequest {
        id: bed.id.clone(),
        signal: 9,
        ..Default::default()
    };
    let late = code(task.kill(within(), &kill).await.unwrap_err());
    assert_eq!(
        late,
        (
            ttrpc::Code::NOT_FOUND,
            "sepal: process already finished".into()
        )
    );
    assert_eq!(
        task.delete(within(), &delete_of(&bed.id))
            .await
            .unwrap()
            .exit_status,
        42
    );
    bed.assert_nothing_left(&state);
    task.shutdown(within(), &ShutdownRequest::new())
        .await
        .unwrap();
    bed.wait_for_topic("delete").await;
    assert_eq!(bed.topics(), ["create", "start", "exit", "delete"]);
    leaves(&state.shim, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_whose_pod_is_deleted_leaves_also_when_nobody_calls_shutdown() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("forgotten", &["true"]).await;
    let task = bed.start().await;
    task.create(within(), &bed.create_request()).await.unwrap();
    task.start(within(), &start_of(&bed.id)).await.unwrap();
    let state = PodState::load(&bed.pod()).unwrap();
    task.wait(within(), &wait_of(&bed.id)).await.unwrap();
    task.delete(within(), &delete_of(&bed.id)).await.unwrap();
    leaves(&state.shim, 30).await;
    bed.assert_nothing_left(&state);
}

#[tokio::test(flavor = "multi_thread")]
async fn execs_have_their_own_life_and_codes() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("exec", &["sleep", "600"]).await;
    let task = bed.start().await;
    task.create(within(), &bed.create_request()).await.unwrap();
    let spec = br#"{"args":["sh","-c","exit 7"],"cwd":"/","user":{"uid":0,"gid":0}}"#.to_vec();
    let any = Any {
        type_url: "x".into(),
        value: spec,
        ..Default::default()
    };
    let exec = ExecProcessRequest {
        id: bed.id.clone(),
        exec_id: "e1".into(),
        spec: Some(any).into(),
        ..Default::default()
    };
    let early = code(task.exec(within(), &exec).await.unwrap_err());
    assert_eq!(early.0, ttrpc::Code::FAILED_PRECONDITION, "{}", early.1);
    task.start(within(), &start_of(&bed.id)).await.unwrap();
    task.exec(within(), &exec).await.unwrap();
    let double = code(task.exec(within(), &exec).await.unwrap_err());
    assert_eq!(double.0, ttrpc::Code::ALREADY_EXISTS);
    let start = StartRequest {
        exec_id: "e1".into(),
        ..start_of(&bed.id)
    };
    task.start(within(), &start).await.unwrap();
    let wait = WaitRequest {
        exec_id: "e1".into(),
        ..wait_of(&bed.id)
    };
    assert_eq!(task.wait(within(), &wait).await.unwrap().exit_status, 7);
    let delete = DeleteRequest {
        exec_id: "e1".into(),
        ..delete_of(&bed.id)
    };
    assert_eq!(task.delete(within(), &delete).await.unwrap().exit_status, 7);
    let gone = code(task.wait(within(), &wait).await.unwrap_err());
    assert_eq!(gone.0, ttrpc::Code::NOT_FOUND);
    let running = code(
        task.delete(within(), &delete_of(&bed.id))
            .await
            .unwrap_err(),
    );
    assert_eq!(running.0, ttrpc::Code::FAILED_PRECONDITION);
    let none = code(
        task.checkpoint(within(), &CheckpointTaskRequest::new())
            .await
            .unwrap_err(),
    );
    assert_eq!(none.0, ttrpc::Code::UNIMPLEMENTED);

    let state = PodState::load(&bed.pod()).unwrap();
    let kill = KillRequest {
        id: bed.id.clone(),
        signal: 15,
        ..Default::default()
    };
    task.kill(within(), &kill).await.unwrap();
    assert_eq!(
        task.wait(within(), &wait_of(&bed.id))
            .await
            .unwrap()
            .exit_status,
        143
    );
    task.delete(within(), &delete_of(&bed.id)).await.unwrap();
    bed.assert_nothing_left(&state);
    task.shutdown(within(), &ShutdownRequest::new())
        .await
        .unwrap();
    bed.wait_for_topic("delete").await;
    let expected = [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "exit",
        "delete",
    ];
    assert_eq!(bed.topics(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_the_vmm_or_the_file_server_is_told_once_and_soon() {
    if !is_root() {
        return;
    }
    for victim in ["vmm", "fs"] {
        let bed = Bed::new(victim, &["sleep", "600"]).await;
        let task = bed.start().await;
        task.create(within(), &bed.create_request()).await.unwrap();
        task.start(within(), &start_of(&bed.id)).await.unwrap();
        let state = PodState::load(&bed.pod()).unwrap();
        let process = if victim == "vmm" { state.vmm } else { state.fs };
        let pid = nix::unistd::Pid::from_raw(process.unwrap().pid as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        let killed = Instant::now();
        assert_eq!(
            task.wait(within(), &wait_of(&bed.id))
                .await
                .unwrap()
                .exit_status,
            137
        );
        assert!(killed.elapsed() < Duration::from_secs(5));
        task.delete(within(), &delete_of(&bed.id)).await.unwrap();
        bed.assert_nothing_left(&state);
        task.shutdown(within(), &ShutdownRequest::new())
            .await
            .unwrap();
        bed.wait_for_topic("delete").await;
        assert_eq!(bed.topics(), ["create", "start", "exit", "delete"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_has_a_limit_of_memory_and_what_it_starts_has_not() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("memory", &["sleep", "600"]).await;
    let task = bed.start().await;
    task.create(within(), &bed.create_request()).await.unwrap();
    let state = PodState::load(&bed.pod()).unwrap();
    let limit = |process: ProcessRef| {
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", process.pid)).unwrap();
        let line = limits
            .lines()
            .find(|line| line.starts_with("Max data size"));
        let soft = line.unwrap().split_whitespace().nth(3).unwrap();
        soft.to_owned()
    };
    assert_eq!(limit(state.shim), (256 << 20).to_string());
    for process in [state.vmm, state.fs] {
        assert_eq!(limit(process.unwrap()), "unlimited");
    }
    task.delete(within(), &delete_of(&bed.id)).await.unwrap();
    leaves(&state.shim, 30).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn delete_cleans_up_after_a_killed_shim() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("crash", &["sleep", "600"]).await;
    let volume = tempfile::tempdir().unwrap();
    std::fs::write(volume.path().join("precious"), "x").unwrap();
    let mounts = serde_json::json!([
        {"destination": "/v", "type": "bind", "source": volume.path(), "options": ["rbind"]}
    ]);
    bed.spec(&["sleep", "600"], mounts);
    let task = bed.start().await;
    task.create(within(), &bed.create_request()).await.unwrap();
    task.start(within(), &start_of(&bed.id)).await.unwrap();
    let state = PodState::load(&bed.pod()).unwrap();
    let pid = nix::unistd::Pid::from_raw(state.shim.pid as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    for _ in 0..2 {
        let output = bed.shim("delete");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let answer = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!(answer.exit_status, 137);
        assert!(answer.exited_at.seconds > 0);
    }
    bed.assert_nothing_left(&state);
    assert!(
        volume.path().join("precious").exists(),
        "volumes keep their files"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_of_which_containerd_was_not_told_ends_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("untold", &["sleep", "600"]).await;
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut start = bed.command_for(&bed.id, &bed.bundle(), "start");
    assert!(!start.stdout(writer).status().unwrap().success());
    let address = bed.address();
    let socket = std::path::Path::new(address.trim_start_matches("unix://"));
    let deadline = Instant::now() + Duration::from_secs(10);
    // The socket goes last.
    while socket.exists() || bed.pod().exists() {
        assert!(Instant::now() < deadline, "{}", bed.pod().display());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&bed.id), "a mount is left");
    let mut find = std::process::Command::new("pgrep");
    let left = find.args(["-af", &bed.id]).output().unwrap().stdout;
    let left = String::from_utf8_lossy(&left);
    // The shim itself is about to end.
    let left: Vec<_> = left
        .lines()
        .filter(|line| !line.contains("-socket"))
        .collect();
    assert!(left.is_empty(), "{left:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_start_says_why_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let missing = serde_json::json!([
        {"destination": "/v", "type": "bind", "source": "/nonexistent", "options": ["rbind"]}
    ]);
    let none = serde_json::json!([]);
    for (name, config, mounts, text) in [
        (
            "refuse",
            "kernel_args = \"refuse\"",
            &none,
            "no such kernel, install one",
        ),
        ("key", "memroy = 1", &none, "unknown field `memroy`"),
        (
            "mount",
            "",
            &missing,
            "mount source /nonexistent for /v does not exist",
        ),
    ] {
        let bed = Bed::new(name, &["true"]).await;
        bed.configure(config);
        bed.spec(&["true"], mounts.clone());
        let task = bed.start().await;
        let (_, message) = code(
            task.create(within(), &bed.create_request())
                .await
                .unwrap_err(),
        );
        assert!(
            message.contains(text) && !message.contains('\n'),
            "{message}"
        );
        assert!(!bed.pod().exists(), "{name}");
        let connect = ConnectRequest {
            id: bed.id.clone(),
            ..Default::default()
        };
        let shim = task.connect(within(), &connect).await.unwrap().shim_pid;
        let shim = ProcessRef::of(shim).unwrap();
        task.shutdown(within(), &ShutdownRequest::new())
            .await
            .unwrap();
        leaves(&shim, 4).await;
    }
}
