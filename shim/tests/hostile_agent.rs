//! The real shim program and a guest that lies, floods or stalls: its own pod is the worse for it, and
//! nobody else.
//!
//! These tests need root (mounts, network namespaces, cgroups) and are ignored without asking. What a guest
//! says that is no message at all is fuzzed (`fuzz/src/agent.rs`).

mod common;

use std::time::{Duration, Instant};

use common::bed::{Bed, code, delete_of, is_root, start_of, wait_of, within};
use containerd_shim_protos::api::*;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc::context;
use sepal_protocol::state::PodState;

/// Becomes the stand-in when the shim has started this binary; a test of nothing otherwise.
#[test]
fn stand_in_for_the_vmm() {
    if std::env::var_os("SEPAL_STAND_IN").is_some() {
        common::vmm();
    }
}

fn kill_of(bed: &Bed, signal: u32) -> KillRequest {
    KillRequest {
        id: bed.id.clone(),
        signal,
        ..Default::default()
    }
}

/// A container whose guest lies about it in this manner, running.
async fn lying(name: &str, manner: &str) -> (Bed, TaskClient, PodState) {
    let bed = Bed::new(name, &["lie", manner]).await;
    bed.configure("agent_timeout_s = 1");
    let task = bed.start().await;
    task.create(within(), &bed.create_request()).await.unwrap();
    task.start(within(), &start_of(&bed.id)).await.unwrap();
    let state = PodState::load(&bed.pod()).unwrap();
    (bed, task, state)
}

/// Ends the container, with this status, and sees everything go.
async fn end(bed: Bed, task: TaskClient, state: PodState) {
    let exit = task.wait(within(), &wait_of(&bed.id)).await.unwrap();
    assert_eq!(exit.exit_status, 137);
    task.delete(within(), &delete_of(&bed.id)).await.unwrap();
    bed.assert_nothing_left(&state);
    bed.wait_for_topic("delete").await;
    let exits = bed.topics().iter().filter(|topic| *topic == "exit").count();
    assert_eq!(exits, 1);
    let shutdown = ShutdownRequest::new();
    task.shutdown(within(), &shutdown).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_does_not_end_a_killed_process_is_ended() {
    if !is_root() {
        return;
    }
    let (bed, task, state) = lying("deaf", "deaf").await;
    task.kill(within(), &kill_of(&bed, 15)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(state.vmm.unwrap().alive(), "SIGTERM may be ignored");
    let begun = Instant::now();
    task.kill(within(), &kill_of(&bed, 9)).await.unwrap();
    end(bed, task, state).await;
    let took = begun.elapsed();
    assert!(took >= Duration::from_secs(3), "it had its time: {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_tells_of_events_without_end_is_heard_now_and_then() {
    if !is_root() {
        return;
    }
    let (bed, task, state) = lying("loud", "loud").await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let told = bed.topics().iter().filter(|topic| *topic == "oom").count();
    assert!((1..=4).contains(&told), "{told} in 2.5 s");
    task.kill(within(), &kill_of(&bed, 9)).await.unwrap();
    end(bed, task, state).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_cannot_tell_of_others_containers() {
    if !is_root() {
        return;
    }
    let (bed, task, state) = lying("foreign", "foreign").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(bed.topics(), ["create", "start"]);
    task.kill(within(), &kill_of(&bed, 9)).await.unwrap();
    end(bed, task, state).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_words_of_a_guest_are_few_and_on_one_line() {
    if !is_root() {
        return;
    }
    let (bed, task, state) = lying("wordy", "wordy").await;
    let refused = task.kill(within(), &kill_of(&bed, 15)).await;
    let (_, words) = code(refused.unwrap_err());
    assert!(words.contains("level=error"), "{words}");
    assert!(words.chars().count() < 2200, "{}", words.len());
    assert!(!words.contains(char::is_control), "{words:?}");
    task.kill(within(), &kill_of(&bed, 9)).await.unwrap();
    end(bed, task, state).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_whose_client_has_gone_comes_to_its_end() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("gone", &["lie", "slow"]).await;
    let task = bed.start().await;
    // containerd gives up, and so does ttrpc on the shim's side.
    let hasty = context::with_timeout(200_000_000);
    task.create(hasty, &bed.create_request()).await.unwrap_err();
    drop(task);
    bed.wait_for_topic("create").await;
    let task = TaskClient::new(Client::connect(&bed.address()).await.unwrap());
    let state = PodState::load(&bed.pod()).unwrap();
    task.start(within(), &start_of(&bed.id)).await.unwrap();
    task.kill(within(), &kill_of(&bed, 9)).await.unwrap();
    end(bed, task, state).await;
}
