//! Every program of a pod, and containerd, killed while a container runs: containerd tells the truth
//! within five seconds, and nothing stays behind.

use std::time::Instant;

use sepal_tests::{Bed, Container, Kind, PodProcess, eventually, seconds};

fn idle(bed: &Bed) -> Container<'_> {
    bed.ctr_start(&["--cni"], &bed.busybox(), &["sleep", "100000"])
}

/// containerd no longer says that the container runs.
fn truth_within_five_seconds(bed: &Bed, container: &Container) {
    let begun = Instant::now();
    eventually("containerd tells that it is gone", seconds(15), || {
        container
            .status()
            .is_none_or(|status| status != "RUNNING")
            .then_some(())
    });
    if bed.kind() == Kind::Native {
        assert!(
            begun.elapsed() < seconds(5),
            "told after {:?}",
            begun.elapsed()
        );
    }
}

/// Removal by the ordinary verbs, and a look around.
fn removed_completely(bed: &Bed, container: &Container) {
    if container.status().is_some() {
        container.task("rm", &[]);
    }
    bed.command(["ctr", "container", "rm", container.id()])
        .run()
        .success();
    bed.assert_nothing_left();
}

/// A killed shim of the control leaves its socket, which ours must not: put away what it left.
fn sockets_of_the_control(bed: &Bed) {
    if !bed.has_vm() {
        let stale = "pgrep -f [c]ontainerd-shim-runc-v2 >/dev/null || rm -f /run/containerd/s/*";
        bed.sh(stale).run().success();
    }
}

fn killing(what: PodProcess) {
    let bed = Bed::alone();
    if !bed.has_vm() && what != PodProcess::Shim {
        return;
    }
    let container = idle(&bed);
    let mut exec = container.exec_command(&[], ["sleep", "1000"]).spawn();
    eventually("the exec runs", seconds(20), || {
        (container.sh("pgrep -x sleep | wc -l").out() == "2").then_some(())
    });
    container.kill_9(&bed, what);
    truth_within_five_seconds(&bed, &container);
    // Nobody waits for ever for an exec that is no more.
    let status = exec.wait().expect("the client of the exec ends");
    assert!(!status.success());
    if let Some(status) = container.status() {
        assert_eq!(status, "STOPPED");
        assert_eq!(container.wait(), 137);
    }
    sockets_of_the_control(&bed);
    removed_completely(&bed, &container);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_client_killed_while_its_task_is_deleted_leaves_no_shim() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        // runc's shim stays when containerd's call is cancelled between Delete and Shutdown.
        return;
    }
    // A deletion takes about 0.1 s: some of these hit the moment when the shim has done its part and
    // containerd has not.
    for delay in (0..10).map(|round| bed.scaled(0.02, 0.5) * f64::from(round)) {
        let container = bed.ctr_start(&[], &bed.busybox(), &["true"]);
        eventually(
            "the task stops",
            bed.scaled(seconds(20), seconds(120)),
            || (container.status()? == "STOPPED").then_some(()),
        );
        let line = format!(
            "ctr task rm {} >/dev/null 2>&1 & sleep {delay}; kill -9 $!; wait $! 2>/dev/null; true",
            container.id()
        );
        bed.sh(&line).run().success();
    }
    bed.assert_nothing_left();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_vmm_is_killed() {
    killing(PodProcess::Vmm);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_file_server_is_killed() {
    killing(PodProcess::Fs);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_shim_is_killed() {
    killing(PodProcess::Shim);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_vm_does_not_outlive_its_shim_when_nobody_cleans_up() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    let container = idle(&bed);
    let of_pod = [PodProcess::Vmm, PodProcess::Fs];
    let pids = of_pod.map(|process| container.pid_of(&bed, process));
    // Who would otherwise have the shim's program remove what is left.
    bed.containerd("kill").success();
    container.kill_9(&bed, PodProcess::Shim);
    let begun = Instant::now();
    for pid in pids {
        // A zombie is one that nobody has collected, and no process.
        let gone = format!("! grep -q '^State:[[:space:]]*[^ZX]' /proc/{pid}/status 2>/dev/null");
        eventually("it ends with its shim", seconds(20), || {
            bed.sh(&gone).run().ok().then_some(())
        });
    }
    let took = begun.elapsed();
    assert!(took < bed.scaled(seconds(5), seconds(20)), "{took:?}");
    bed.containerd("start").success();
    truth_within_five_seconds(&bed, &container);
    removed_completely(&bed, &container);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn containerd_is_killed_and_the_container_lives_on() {
    let bed = Bed::alone();
    let scratch = bed.scratch();
    let mount = format!("type=bind,src={},dst=/out,options=rbind:rw", scratch.path());
    let line =
        "n=0; while :; do n=$((n+1)); echo $n >/out/new; mv /out/new /out/n; sleep 0.1; done";
    let container = bed.ctr_start(&["--mount", &mount], &bed.busybox(), &["sh", "-c", line]);
    let count = || {
        bed.sh(&format!("cat {}", scratch.file("n")))
            .run()
            .out()
            .parse::<u64>()
            .ok()
    };
    eventually("it counts", seconds(20), count);

    bed.containerd("kill").success();
    let then = count();
    eventually("it counts without containerd", seconds(20), || {
        count().filter(|now| Some(*now) > then)
    });
    bed.containerd("start").success();
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    assert_eq!(
        container.sh("echo still here").success().out(),
        "still here"
    );
    container.task("kill", &["-s", "KILL"]).success();
    assert_eq!(container.wait(), 137);
    removed_completely(&bed, &container);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn an_end_that_containerd_slept_through_is_told_afterwards() {
    let bed = Bed::alone();
    let container = bed.ctr_start(&[], &bed.busybox(), &["sh", "-c", "sleep 3; exit 42"]);
    bed.containerd("kill").success();
    std::thread::sleep(seconds(5));
    bed.containerd("start").success();
    eventually("the end is told", seconds(20), || {
        container
            .status()
            .is_none_or(|status| status == "STOPPED")
            .then_some(())
    });
    // A restarted containerd clears away what ended in the meantime; where it did not yet, it knows.
    if container.status().is_some() {
        assert_eq!(container.wait(), 42);
    }
    removed_completely(&bed, &container);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn containerd_and_the_vmm_are_both_killed() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    let container = idle(&bed);
    let pid = container.pid_of(&bed, PodProcess::Vmm).to_string();
    bed.containerd("kill").success();
    bed.command(["kill", "-9", &pid]).run().success();
    bed.containerd("start").success();
    truth_within_five_seconds(&bed, &container);
    removed_completely(&bed, &container);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn containerd_and_the_shim_are_both_killed() {
    let bed = Bed::alone();
    let container = idle(&bed);
    let pid = container.pid_of(&bed, PodProcess::Shim).to_string();
    bed.containerd("kill").success();
    bed.command(["kill", "-9", &pid]).run().success();
    bed.containerd("start").success();
    truth_within_five_seconds(&bed, &container);
    sockets_of_the_control(&bed);
    removed_completely(&bed, &container);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn gc_removes_what_a_dead_shim_has_left_and_leaves_the_living() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    let (dead, alive) = (idle(&bed), idle(&bed));
    let pid = dead.pid_of(&bed, PodProcess::Shim).to_string();
    bed.containerd("kill").success();
    bed.command(["kill", "-9", &pid]).run().success();
    let gc = || bed.command(["sepal", "gc"]).run().success().out();
    let removed = gc();
    assert!(removed.contains(dead.id()), "{removed}");
    assert_eq!(removed.lines().count(), 1, "{removed}");
    let left = bed
        .sh("ls /run/sepal; cat /proc/mounts; ps axww")
        .run()
        .out();
    assert!(
        !left.contains(dead.id()) && left.contains(alive.id()),
        "{left}"
    );
    assert_eq!(gc(), "");
    bed.containerd("start").success();
    assert_eq!(alive.sh("echo still here").success().out(), "still here");
    truth_within_five_seconds(&bed, &dead);
    alive.remove();
    removed_completely(&bed, &dead);
}
