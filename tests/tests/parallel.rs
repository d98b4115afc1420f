//! Many at once, and nothing left when they are gone.

use sepal_tests::{Bed, Client, Container, seconds};

#[test]
#[ignore = "needs a bed: tests/run"]
fn twenty_in_parallel_leave_nothing() {
    let bed = Bed::alone();
    let busybox = bed.busybox();
    let containers: Vec<Container> = (0..bed.scaled(20, 4))
        .map(|_| bed.named(Client::Ctr, "many"))
        .collect();
    let on_each = |work: &(dyn Fn(usize, &Container) + Sync)| {
        std::thread::scope(|scope| {
            for (number, container) in containers.iter().enumerate() {
                scope.spawn(move || work(number, container));
            }
        });
    };
    on_each(&|_, container| {
        bed.command([
            "ctr",
            "run",
            "--detach",
            "--cni",
            "--runtime",
            bed.runtime(),
        ])
        .args([&busybox, container.id(), "sleep", "1000"])
        .patience(seconds(180))
        .run()
        .success();
    });
    on_each(&|number, container| {
        let said = container
            .sh(&format!("echo {number} >/home/me; cat /home/me; sleep 0.5"))
            .success();
        assert_eq!(said.out(), number.to_string());
        let line = "ip -4 -o addr show eth0; sleep 0.5";
        let address = container.sh(line).success().out();
        assert!(address.contains("inet 10.88."), "{address}");
    });
    on_each(&|_, container| {
        container.task("kill", &["-s", "KILL"]).success();
        assert_eq!(container.wait(), 137);
        bed.command(["ctr", "container", "rm", container.id()])
            .run()
            .success();
    });
    bed.assert_nothing_left();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn short_runs_in_parallel_leave_nothing() {
    let bed = Bed::alone();
    let busybox = bed.busybox();
    std::thread::scope(|scope| {
        for worker in 0..bed.scaled(6, 2) {
            let (bed, busybox) = (&bed, &busybox);
            scope.spawn(move || {
                for round in 0..bed.scaled(4, 2) {
                    // The pause gives a busy client the time to open its end of the pipes, without
                    // which it loses what they carried: containerd's client does not wait for it.
                    let line = format!("echo {worker}.{round}; sleep 0.3; exit {worker}");
                    let run = bed.ctr_run(&[], busybox, ["sh", "-c", &line]);
                    let said = run.patience(seconds(120)).run().exits(worker);
                    assert_eq!(said.out(), format!("{worker}.{round}"));
                }
            });
        }
    });
    bed.assert_nothing_left();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn nerdctl_with_network_and_volume_leaves_nothing() {
    let bed = Bed::alone();
    let scratch = bed.scratch();
    let volume = format!("{}:/data", scratch.path());
    let options = [
        "-p", "18081:80", "-v", &volume, "--tmpfs", "/tmp", "--memory", "100m",
    ];
    let container = bed.nerdctl_start(&options, &bed.busybox(), &["sleep", "1000"]);
    container
        .sh("echo x >/data/f; echo y >/tmp/f; ip addr show eth0")
        .success();
    bed.command(["nerdctl", "rm", "-f", container.id()])
        .run()
        .success();
    bed.assert_nothing_left();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_pod_of_three_containers_leaves_nothing() {
    let bed = Bed::alone();
    let busybox = bed.busybox();
    let sandbox = bed.named(Client::Ctr, "pod");
    let kind = |kind: &str| format!("io.kubernetes.cri.container-type={kind}");
    let of = format!("io.kubernetes.cri.sandbox-id={}", sandbox.id());
    let start = |container: &Container, annotations: &[&str]| {
        let mut command = bed.command(["ctr", "run", "--detach", "--runtime", bed.runtime()]);
        for annotation in annotations {
            command = command.args(["--annotation", annotation]);
        }
        command
            .args([&busybox, container.id(), "sleep", "1000"])
            .run()
            .success();
    };
    start(&sandbox, &[&kind("sandbox")]);
    let members = [
        bed.named(Client::Ctr, "member"),
        bed.named(Client::Ctr, "member"),
    ];
    for member in &members {
        start(member, &[&kind("container"), &of]);
        assert_eq!(member.sh("echo here").success().out(), "here");
    }
    if bed.has_vm() {
        // One VM for all three: the same kernel since the same moment.
        let boot = "cat /proc/sys/kernel/random/boot_id";
        let ids: Vec<_> = members
            .iter()
            .map(|member| member.sh(boot).success().out())
            .collect();
        assert_eq!(ids[0], sandbox.sh(boot).success().out());
        assert_eq!(ids[0], ids[1]);
    }
    for container in members.iter().chain([&sandbox]) {
        container.task("kill", &["-s", "KILL"]).success();
        assert_eq!(container.wait(), 137);
        bed.command(["ctr", "container", "rm", container.id()])
            .run()
            .success();
    }
    bed.assert_nothing_left();
}
