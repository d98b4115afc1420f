//! Volumes that are changed as a whole, with the real shim over a pod whose VM is a stand-in.
//!
//! These tests need root (mounts, network namespaces, cgroups) and are ignored without asking.

mod common;

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use common::bed::{Bed, delete_of, is_root, start_of, wait_of, within};
use containerd_shim_protos::api::*;
use sepal_protocol::state::PodState;
use serde_json::json;

/// Becomes the stand-in when the shim has started this binary; a test of nothing otherwise.
#[test]
fn stand_in_for_the_vmm() {
    if std::env::var_os("SEPAL_STAND_IN").is_some() {
        common::vmm();
    }
}

/// A version with one key, in the place of the one before.
fn write(volume: &Path, version: &str) {
    std::fs::create_dir_all(volume.join(version)).unwrap();
    std::fs::write(volume.join(version).join("key"), version).unwrap();
    let before = std::fs::read_link(volume.join("..data"));
    symlink(version, volume.join("..data_tmp")).unwrap();
    std::fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    let _ = symlink("..data/key", volume.join("key"));
    if let Ok(before) = before {
        std::fs::remove_dir_all(volume.join(before)).unwrap();
    }
}

fn bind(source: &Path, target: &str, access: &str) -> serde_json::Value {
    json!({"destination": target, "type": "bind", "source": source, "options": ["rbind", access]})
}

/// Whether the pod's shim has an inotify instance.
fn watches(bed: &Bed) -> bool {
    let shim = PodState::load(&bed.pod()).unwrap().shim.pid;
    let fds = std::fs::read_dir(format!("/proc/{shim}/fd")).unwrap();
    let mut targets = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    targets.any(|target| target.as_os_str() == "anon_inode:inotify")
}

async fn end(bed: &Bed, task: &containerd_shim_protos::shim_async::TaskClient) {
    let state = PodState::load(&bed.pod()).unwrap();
    let kill = KillRequest {
        id: bed.id.clone(),
        signal: 9,
        ..Default::default()
    };
    task.kill(within(), &kill).await.unwrap();
    task.wait(within(), &wait_of(&bed.id)).await.unwrap();
    task.delete(within(), &delete_of(&bed.id)).await.unwrap();
    bed.assert_nothing_left(&state);
    task.shutdown(within(), &ShutdownRequest::new())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_sent_before_the_container_is_made_and_after_each_change() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("mirror", &[]).await;
    let volume = bed.dir.path().join("volume");
    write(&volume, "..1");
    let twice = [
        bind(&volume, "/etc/config", "ro"),
        bind(&volume, "/etc/again", "rro"),
    ];
    bed.spec(&["sleep", "600"], json!(twice));
    let task = bed.start().await;
    task.create(within(), &bed.create_request()).await.unwrap();
    let made = "made with /run/sepal/volumes/1 /run/sepal/volumes/1";
    assert_eq!(bed.heard(), ["1: ..1 = ..1", made]);
    task.start(within(), &start_of(&bed.id)).await.unwrap();
    assert!(watches(&bed));

    write(&volume, "..2");
    let deadline = Instant::now() + Duration::from_secs(5);
    while bed.heard().last().unwrap() != "1: ..2 = ..2" {
        assert!(Instant::now() < deadline, "{:?}", bed.heard());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // What is mounted there is the shim's own business: the host unmounts and removes what it wants.
    std::fs::remove_dir_all(&volume).unwrap();
    end(&bed, &task).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_that_are_written_or_are_of_another_kind_are_shared_as_ever() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("share", &[]).await;
    let (volume, other) = (bed.dir.path().join("volume"), bed.dir.path().join("other"));
    write(&volume, "..1");
    std::fs::create_dir(&other).unwrap();
    let binds = [
        bind(&volume, "/etc/config", "rw"),
        bind(&other, "/etc/other", "ro"),
        bind(&volume.join("key"), "/etc/key", "ro"),
    ];
    bed.spec(&["sleep", "600"], json!(binds));
    let task = bed.start().await;
    task.create(within(), &bed.create_request()).await.unwrap();
    let share = |n| format!("/run/sepal/share/{}/mounts/{n}", bed.id);
    let made = format!("made with {} {} {}", share(0), share(1), share(2));
    assert_eq!(bed.heard(), [made]);
    assert!(!watches(&bed));
    task.start(within(), &start_of(&bed.id)).await.unwrap();
    end(&bed, &task).await;
}
