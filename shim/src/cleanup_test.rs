use std::process::{Child, Command, Stdio};

use super::*;

/// A process that was started as a pod's VMM is. It ends with the test, at the latest.
fn started_with(arguments: &[&str]) -> Child {
    started_as("sepal-vmm", arguments)
}

fn started_as(name: &str, arguments: &[&str]) -> Child {
    let programs = tempfile::tempdir().unwrap();
    let shell = programs.path().join(name);
    // A copy that has just been written may still be open for writing in a child of another test.
    std::os::unix::fs::symlink("/bin/sh", &shell).unwrap();
    // What follows a script's text is its own.
    let mut command = Command::new(shell);
    command.args(["-c", "read _; :", "sh"]).args(arguments);
    let child = command.stdin(Stdio::piped()).spawn().unwrap();
    // The kernel has its words a moment later.
    let line = format!("/proc/{}/cmdline", child.id());
    while std::fs::read(&line).unwrap().is_empty() {
        std::thread::yield_now();
    }
    child
}

#[test]
fn a_process_is_of_a_pod_by_what_it_was_started_with() {
    let directory = Path::new("/run/sepal/n+a");
    let share = Share::of(directory);
    let share = share.path().to_str().unwrap();
    for (arguments, is_ours) in [
        (&["--control-fd", "3", "--pod", "n+a"][..], true),
        (&["--listen-fd", "3", "--share", share], true),
        (&["--pod", "n+ab"], false),
        (&["--share", "/run/sepal/n+ab/share"], false),
        (&["n+a"], false),
        (&["--pod"], false),
    ] {
        let mut child = started_with(arguments);
        assert_eq!(is_of(child.id(), directory), is_ours, "{arguments:?}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn another_program_is_not_of_a_pod_whatever_it_was_started_with() {
    let mut child = started_as("sh", &["--pod", "n+a"]);
    assert!(!is_of(child.id(), Path::new("/run/sepal/n+a")));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn what_is_no_directory_is_nobodys_turn() {
    let root = tempfile::tempdir().unwrap();
    let (link, fifo) = (root.path().join("link"), root.path().join("fifo"));
    std::os::unix::fs::symlink(root.path(), &link).unwrap();
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(Turn::take(&link).await.is_none());
    assert!(Turn::take(&fifo).await.is_none());
}

#[tokio::test]
async fn of_two_pods_in_one_cgroup_one_is_ended() {
    if !sys::is_root() {
        return;
    }
    let path = format!("/sepal/unit-test-two-{}", std::process::id());
    let cgroup = Cgroup::plan(Some(Path::new(&path)), "p").unwrap();
    let mut ours = started_with(&["--pod", "n+a"]);
    let mut other = started_with(&["--pod", "n+b"]);
    // Whoever waits for a child closes its input.
    let input = ours.stdin.take();
    cgroup.hold(&[ours.id(), other.id()]).unwrap();
    // Whoever has started them collects them.
    let ended = std::thread::spawn(move || ours.wait().unwrap());
    for path in &cgroup.directories {
        assert_eq!(empty(path, Path::new("/run/sepal/n+a")).await, [""; 0]);
    }
    assert_eq!(ended.join().unwrap().code(), None, "it was killed");
    drop(input);
    assert!(other.try_wait().unwrap().is_none(), "another pod's is dead");
    assert_eq!(cgroup.remove(), [""; 0].map(PathBuf::from), "it is in use");
    other.kill().unwrap();
    other.wait().unwrap();
    cgroup.remove();
    assert!(cgroup.directories.iter().all(|path| !path.exists()));
}

#[tokio::test]
async fn one_turn_comes_after_the_other_and_not_in_a_new_directory() {
    let root = tempfile::tempdir().unwrap();
    let pod = root.path().join("n+a");
    assert!(Turn::take(&pod).await.is_none());
    std::fs::create_dir(&pod).unwrap();
    let first = Turn::take(&pod).await.unwrap();
    let soon = Duration::from_millis(50);
    assert!(tokio::time::timeout(soon, Turn::take(&pod)).await.is_err());
    let waiting = tokio::spawn({
        let pod = pod.clone();
        async move { Turn::take(&pod).await.map(|turn| is_at(&turn._lock, &pod)) }
    });
    tokio::time::sleep(soon).await;
    assert_eq!(first.remove(None).await, [""; 0]);
    // Nobody's any more, or that of the directory which is there by then.
    std::fs::create_dir(&pod).unwrap();
    assert_ne!(waiting.await.unwrap(), Some(false));
}
