//! The real shim program as containerd's sandbox controller drives it: a pod without a pause
//! container, over a VM that is a stand-in.
//!
//! These tests need root (mounts, network namespaces, cgroups) and are ignored without asking.

mod common;

use std::time::Duration;

use common::bed::{
    Bed, code, create_of, delete_of, description, is_root, kill, remove_parents, shut_down,
    start_of, start_sandbox, stop, wait_of, within,
};
use containerd_shim_protos::api::*;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::sandbox_api::*;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::ttrpc::Code;
use sepal_protocol::cri::{NamespaceMode, PodSandboxConfig};
use sepal_protocol::state::{PodState, ProcessRef};

/// Becomes the stand-in when the shim has started this binary; a test of nothing otherwise.
#[test]
fn stand_in_for_the_vmm() {
    if std::env::var_os("SEPAL_STAND_IN").is_some() {
        common::vmm();
    }
}

async fn status(bed: &Bed, sandbox: &SandboxClient) -> SandboxStatusResponse {
    let request = SandboxStatusRequest {
        sandbox_id: bed.id.clone(),
        verbose: true,
        ..Default::default()
    };
    sandbox.sandbox_status(within(), &request).await.unwrap()
}

fn wait_sandbox_of(bed: &Bed) -> WaitSandboxRequest {
    WaitSandboxRequest {
        sandbox_id: bed.id.clone(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_lives_from_create_to_shutdown_whatever_its_containers_do() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("sandbox", &[]).await;
    let (sandbox, task) = bed.start_sandbox().await;
    let member = bed.member(&["sh", "-c", "exit 3"]);
    let early = code(task.create(within(), &member).await.unwrap_err());
    assert_eq!(early.0, Code::FAILED_PRECONDITION, "{}", early.1);
    assert_eq!(status(&bed, &sandbox).await.state, "SANDBOX_NOTREADY");
    let mut other = create_of(&bed, &description(&bed));
    other.sandbox_id = "other".into();
    let other = code(sandbox.create_sandbox(within(), &other).await.unwrap_err());
    assert_eq!(other.0, Code::NOT_FOUND);

    let started = start_sandbox(&bed, &sandbox).await;
    let state = PodState::load(&bed.pod()).unwrap();
    assert_eq!(state.vmm.unwrap().pid, started.pid);
    assert!(started.created_at.seconds > 0);
    let again = create_of(&bed, &description(&bed));
    let again = code(sandbox.create_sandbox(within(), &again).await.unwrap_err());
    assert_eq!(again.0, Code::ALREADY_EXISTS);
    let told = status(&bed, &sandbox).await;
    assert_eq!(
        (told.state.as_str(), told.pid),
        ("SANDBOX_READY", started.pid)
    );
    assert_eq!(told.created_at, started.created_at);
    let info: serde_json::Value = serde_json::from_str(&told.info["info"]).unwrap();
    assert_eq!(info["pid"], started.pid);
    let platform = PlatformRequest {
        sandbox_id: bed.id.clone(),
        ..Default::default()
    };
    let platform = sandbox.platform(within(), &platform).await.unwrap();
    assert_eq!(platform.platform.os, "linux");
    let ping = PingRequest {
        sandbox_id: bed.id.clone(),
        ..Default::default()
    };
    sandbox.ping_sandbox(within(), &ping).await.unwrap();
    let metrics = SandboxMetricsRequest {
        sandbox_id: bed.id.clone(),
        ..Default::default()
    };
    let metrics = sandbox.sandbox_metrics(within(), &metrics).await.unwrap();
    assert_eq!(metrics.metrics.id, bed.id);
    let whole = Metrics::parse_from_bytes(&metrics.metrics.data.value).unwrap();
    assert_eq!(whole.memory.usage, 7);

    let member = bed.member(&["sh", "-c", "exit 3"]);
    assert_eq!(bed.start_member(&member), bed.address());
    task.create(within(), &member).await.unwrap();
    task.start(within(), &start_of(&member.id)).await.unwrap();
    let exit = task.wait(within(), &wait_of(&member.id)).await.unwrap();
    assert_eq!(exit.exit_status, 3);
    task.delete(within(), &delete_of(&member.id)).await.unwrap();
    let shutdown = ShutdownRequest::new();
    task.shutdown(within(), &shutdown).await.unwrap();
    assert_eq!(status(&bed, &sandbox).await.state, "SANDBOX_READY");

    let wait = tokio::spawn({
        let (sandbox, request) = (sandbox.clone(), wait_sandbox_of(&bed));
        async move { sandbox.wait_sandbox(within(), &request).await.unwrap() }
    });
    stop(&bed, &sandbox, 0).await;
    assert_eq!(wait.await.unwrap().exit_status, 0);
    bed.assert_nothing_left(&state);
    stop(&bed, &sandbox, 1).await;
    let told = status(&bed, &sandbox).await;
    assert_eq!((told.state.as_str(), told.pid), ("SANDBOX_NOTREADY", 0));
    assert!(told.exited_at.seconds > 0);
    let late = code(sandbox.ping_sandbox(within(), &ping).await.unwrap_err());
    assert_eq!(late.0, Code::UNAVAILABLE);
    let late = code(task.create(within(), &member).await.unwrap_err());
    assert_eq!(late.0, Code::FAILED_PRECONDITION, "{}", late.1);
    bed.assert_nothing_left(&state);
    shut_down(&bed, &sandbox, state.shim).await;
    remove_parents(&state);
    assert_eq!(bed.topics(), ["create", "start", "exit", "delete"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_dies_is_told_and_so_are_its_containers() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("sandbox-dies", &[]).await;
    let (sandbox, task) = bed.start_sandbox().await;
    start_sandbox(&bed, &sandbox).await;
    let member = bed.member(&["sleep", "600"]);
    task.create(within(), &member).await.unwrap();
    task.start(within(), &start_of(&member.id)).await.unwrap();
    let state = PodState::load(&bed.pod()).unwrap();
    kill(state.vmm);
    let wait = wait_sandbox_of(&bed);
    let exit = sandbox.wait_sandbox(within(), &wait).await.unwrap();
    assert_eq!(exit.exit_status, 137);
    let exit = task.wait(within(), &wait_of(&member.id)).await.unwrap();
    assert_eq!(exit.exit_status, 137);
    assert_eq!(status(&bed, &sandbox).await.state, "SANDBOX_NOTREADY");
    stop(&bed, &sandbox, 0).await;
    bed.assert_nothing_left(&state);
    // containerd deletes containers when it pleases, also now.
    task.delete(within(), &delete_of(&member.id)).await.unwrap();
    bed.assert_nothing_left(&state);
    shut_down(&bed, &sandbox, state.shim).await;
    remove_parents(&state);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_takes_containers_along_and_keeps_its_limit() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("sandbox-stop", &[]).await;
    let (sandbox, task) = bed.start_sandbox().await;
    start_sandbox(&bed, &sandbox).await;
    let member = bed.member(&["sleep", "600"]);
    task.create(within(), &member).await.unwrap();
    task.start(within(), &start_of(&member.id)).await.unwrap();
    let state = PodState::load(&bed.pod()).unwrap();
    // A VMM that stands still: the guest cannot answer.
    let vmm = nix::unistd::Pid::from_raw(state.vmm.unwrap().pid as i32);
    nix::sys::signal::kill(vmm, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let begun = std::time::Instant::now();
    stop(&bed, &sandbox, 1).await;
    assert!(begun.elapsed() < Duration::from_secs(5));
    let wait = wait_sandbox_of(&bed);
    let exit = sandbox.wait_sandbox(within(), &wait).await.unwrap();
    assert_eq!(exit.exit_status, 137);
    let exit = task.wait(within(), &wait_of(&member.id)).await.unwrap();
    assert_eq!(exit.exit_status, 137);
    bed.assert_nothing_left(&state);
    shut_down(&bed, &sandbox, state.shim).await;
    remove_parents(&state);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_cannot_be_says_why_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let node = |config: &mut PodSandboxConfig| {
        let linux = config.linux.mut_or_insert_default();
        let security = linux.security_context.mut_or_insert_default();
        let namespaces = security.namespace_options.mut_or_insert_default();
        namespaces.network = NamespaceMode::NODE.into();
    };
    let annotation = |config: &mut PodSandboxConfig| {
        let unknown = ("io.sepal.kernel".to_string(), "/x".to_string());
        config.annotations.extend([unknown]);
    };
    type Change<'a> = &'a dyn Fn(&mut PodSandboxConfig);
    let cases: [(&str, &str, Change<'_>, Code, &str); 4] = [
        (
            "net",
            "",
            &node,
            Code::UNIMPLEMENTED,
            "the host's network cannot be shared",
        ),
        (
            "note",
            "",
            &annotation,
            Code::INVALID_ARGUMENT,
            "io.sepal.kernel is not known",
        ),
        (
            "key",
            "memroy = 1",
            &|_| {},
            Code::UNKNOWN,
            "unknown field `memroy`",
        ),
        (
            "boot",
            "kernel_args = \"refuse\"",
            &|_| {},
            Code::UNKNOWN,
            "no such kernel, install one",
        ),
    ];
    for (name, configuration, change, expected, text) in cases {
        let bed = Bed::new(name, &[]).await;
        bed.configure(configuration);
        let (sandbox, task) = bed.start_sandbox().await;
        let mut config = description(&bed);
        change(&mut config);
        let created = sandbox
            .create_sandbox(within(), &create_of(&bed, &config))
            .await;
        let refused = match created {
            Err(e) => e,
            Ok(_) => {
                let start = StartSandboxRequest {
                    sandbox_id: bed.id.clone(),
                    ..Default::default()
                };
                sandbox.start_sandbox(within(), &start).await.unwrap_err()
            }
        };
        let (code, message) = code(refused);
        assert!(
            message.contains(text) && !message.contains('\n'),
            "{message}"
        );
        assert_eq!(code, expected, "{message}");
        assert!(!bed.pod().exists(), "{name}");
        let connect = ConnectRequest {
            id: bed.id.clone(),
            ..Default::default()
        };
        let shim = task.connect(within(), &connect).await.unwrap().shim_pid;
        shut_down(&bed, &sandbox, ProcessRef::of(shim).unwrap()).await;
        for parent in cgroup_parents(&bed) {
            let _ = std::fs::remove_dir(parent);
        }
    }
}

/// Directories that the pod's cgroup may have made for its description's parent.
fn cgroup_parents(bed: &Bed) -> Vec<std::path::PathBuf> {
    let name = format!("sepal-test-{}", bed.id);
    let hierarchies = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten();
    let below = hierarchies.flatten().map(|entry| entry.path());
    below
        .chain(["/sys/fs/cgroup".into()])
        .map(|hierarchy| hierarchy.join(&name))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn delete_cleans_up_after_a_killed_shim() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("sandbox-crash", &[]).await;
    let (sandbox, task) = bed.start_sandbox().await;
    start_sandbox(&bed, &sandbox).await;
    let member = bed.member(&["sleep", "600"]);
    task.create(within(), &member).await.unwrap();
    let state = PodState::load(&bed.pod()).unwrap();
    kill(Some(state.shim));
    for _ in 0..2 {
        let output = bed.shim("delete");
        let answer = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!(answer.exit_status, 137);
    }
    bed.assert_nothing_left(&state);
    remove_parents(&state);
}
