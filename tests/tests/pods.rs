//! Pods of several containers, as CRI describes them and ctr makes them.

use std::time::Instant;

use sepal_tests::{Bed, Container, Outcome, PodProcess, seconds};

/// Option of ctr's: the PID namespace of a process of the host.
fn processes_of(pid: u32) -> String {
    format!("pid:/proc/{pid}/ns/pid")
}

fn processes(container: &Container) -> String {
    container.exec(["ps", "-o", "args"]).success().out()
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn each_container_has_a_pid_on_the_host_by_which_its_files_are_found() {
    let bed = Bed::get();
    let pod = bed.ctr_pod(&[]);
    let start = |mark: &str| {
        let line = format!("echo {mark} >/mark; exec sleep 1000");
        pod.member(&[], &bed.busybox(), &["sh", "-c", &line])
    };
    let members = [start("one"), start("two")];
    let mut pids = vec![pod.sandbox().task_pid()];
    for (member, mark) in members.iter().zip(["one", "two"]) {
        let pid = member.task_pid();
        let mark_of = |pid: u32| {
            bed.command(["cat", &format!("/proc/{pid}/root/mark")])
                .run()
        };
        assert_eq!(mark_of(pid).success().out(), mark);
        mark_of(pod.sandbox().task_pid()).failure();
        assert!(!pids.contains(&pid), "{pid} is one of {pids:?}");
        pids.push(pid);
    }
    if bed.has_vm() {
        // All of them are the one machine's network.
        let net = |pid: &u32| {
            bed.command(["readlink", &format!("/proc/{pid}/ns/net")])
                .run()
        };
        let networks: Vec<_> = pids.iter().map(|pid| net(pid).success().out()).collect();
        assert!(
            networks.iter().all(|net| *net == networks[0]),
            "{networks:?}"
        );
    }
    let [one, two] = members;
    let gone = one.task_pid();
    one.remove();
    bed.sh(&format!("test ! -e /proc/{gone}")).run().success();
    assert_eq!(two.exec(["cat", "/mark"]).success().out(), "two");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn containers_that_are_gone_cost_the_file_server_nothing() {
    let bed = Bed::get();
    if !bed.has_vm() {
        return;
    }
    let pod = bed.ctr_pod(&[]);
    let server = pod.sandbox().pid_of(&bed, PodProcess::Fs);
    let descriptors = || {
        let list = bed.command(["ls", &format!("/proc/{server}/fd")]).run();
        list.success().out().lines().count()
    };
    let member = || pod.member(&[], &bed.busybox(), &["sleep", "1000"]).remove();
    // What is opened once for all.
    member();
    std::thread::sleep(seconds(4));
    let before = descriptors();
    for _ in 0..5 {
        member();
    }
    // The guest looks again after two seconds, and then after eight.
    let end = Instant::now() + bed.scaled(seconds(20), seconds(120));
    while descriptors() > before + 2 {
        assert!(
            Instant::now() < end,
            "{} are open, {before} were",
            descriptors()
        );
        std::thread::sleep(seconds(1));
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_container_may_share_the_processes_of_one_other_or_of_none() {
    let bed = Bed::get();
    let pod = bed.ctr_pod(&[]);
    let start = |options: &[&str], seconds: &str| -> (Container, Outcome) {
        pod.try_member(options, &bed.busybox(), &["sleep", seconds])
    };
    let (target, started) = start(&[], "1111");
    started.success();
    let (debugger, started) = start(&["--with-ns", &processes_of(target.task_pid())], "2222");
    started.success();
    let seen = processes(&debugger);
    assert!(
        seen.contains("sleep 1111") && seen.contains("sleep 2222"),
        "{seen}"
    );
    assert_eq!(processes(&target), seen);
    assert!(!processes(pod.sandbox()).contains("sleep 1111"));
    // Its processes are killed with the one whose namespace it is, and nothing of the pod else.
    target.task("kill", &["--signal", "KILL"]).success();
    assert_eq!(debugger.wait(), 137);
    pod.sandbox().exec(["true"]).success();

    let (member, started) = start(
        &["--with-ns", &processes_of(pod.sandbox().task_pid())],
        "3333",
    );
    started.success();
    assert_eq!(processes(&member), processes(pod.sandbox()));

    if bed.has_vm() {
        let (_stranger, refused) = start(&["--with-ns", &processes_of(std::process::id())], "4444");
        let text = refused.failure().report();
        assert!(text.contains("belongs to another pod"), "{text}");
    }
}
