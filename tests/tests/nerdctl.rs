//! What people type: nerdctl's everyday verbs.

use sepal_tests::{Bed, Client, Outcome, Scratch, Terminal, eventually, seconds};

#[test]
#[ignore = "needs a bed: tests/run"]
fn volumes_show_changes_both_ways() {
    let bed = Bed::get();
    let scratch = bed.scratch();
    bed.write(&scratch.file("from-host"), "host\n");
    let volume = format!("{}:/data", scratch.path());
    let container = bed.nerdctl_start(&["-v", &volume], &bed.busybox(), &["sleep", "1000"]);

    assert_eq!(
        container.exec(["cat", "/data/from-host"]).success().out(),
        "host"
    );
    container.sh("echo guest >/data/from-guest").success();
    assert_eq!(bed.read(&scratch.file("from-guest")), "guest");

    bed.write(&scratch.file("from-host"), "changed\n");
    assert_eq!(
        container.exec(["cat", "/data/from-host"]).success().out(),
        "changed"
    );
    bed.write(&scratch.file("later"), "new\n");
    assert_eq!(
        container.exec(["cat", "/data/later"]).success().out(),
        "new"
    );
    container
        .sh("rm /data/later; mv /data/from-guest /data/renamed")
        .success();
    bed.command(["test", "-e", &scratch.file("later")])
        .run()
        .failure();
    assert_eq!(bed.read(&scratch.file("renamed")), "guest");
    // Ownership and mode are the same on both sides.
    container
        .sh("touch /data/owned && chown 1234:567 /data/owned && chmod 640 /data/owned")
        .success();
    let said = bed
        .command(["stat", "-c", "%u:%g %a", &scratch.file("owned")])
        .run()
        .success();
    assert_eq!(said.out(), "1234:567 640");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_read_only_volume_refuses_writes() {
    let bed = Bed::get();
    let scratch = bed.scratch();
    bed.write(&scratch.file("file"), "kept\n");
    let volume = format!("{}:/data:ro", scratch.path());
    let line = "cat /data/file; echo broken >/data/file; touch /data/other";
    let run = bed
        .nerdctl_run(&["-v", &volume], &bed.busybox(), &["sh", "-c", line])
        .run()
        .failure();
    assert_eq!(run.out(), "kept");
    assert_eq!(
        run.err().matches("Read-only file system").count(),
        2,
        "{}",
        run.err()
    );
    assert_eq!(bed.read(&scratch.file("file")), "kept");
}

/// A folder of the bed whose mounts the bed's own namespace shares; unmounted after the test.
struct Shared<'bed> {
    bed: &'bed Bed,
    scratch: Scratch<'bed>,
}

impl<'bed> Shared<'bed> {
    fn of(bed: &'bed Bed) -> Self {
        let scratch = bed.scratch();
        let path = scratch.path();
        let line = format!("mount --bind {path} {path} && mount --make-rshared {path}");
        bed.sh(&line).run().success();
        Self { bed, scratch }
    }

    fn file(&self, name: &str) -> String {
        self.scratch.file(name)
    }

    /// Mounts an empty file system below it.
    fn mount(&self, name: &str) {
        let path = self.file(name);
        let line = format!("mkdir -p {path} && mount -t tmpfs tmpfs {path}");
        self.bed.sh(&line).run().success();
    }

    fn umount(&self, name: &str) -> Outcome {
        self.bed.command(["umount", &self.file(name)]).run()
    }
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        let path = self.scratch.path();
        self.bed.sh(&format!("umount -R -l {path}")).run();
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_volume_that_follows_the_host_shows_its_late_mounts() {
    let bed = Bed::get();
    let shared = Shared::of(&bed);
    let volume = format!("{}:/data:rslave", shared.scratch.path());
    let container = bed.nerdctl_start(&["-v", &volume], &bed.busybox(), &["sleep", "1000"]);
    container.sh("ls /data/late").failure();

    shared.mount("late");
    bed.write(&shared.file("late/file"), "mounted\n");
    let seen = container.sh("cat /data/late/file; touch /data/late/mine");
    assert_eq!(seen.success().out(), "mounted");
    let kind = "stat -c %d /data/late; stat -c %d /data";
    let kind = container.sh(kind).success().out();
    let (late, data) = kind.split_once('\n').unwrap();
    assert_ne!(late, data, "a file system of its own");
    // Nobody is in there: the host may have it back soon.
    eventually("the host unmounts it", seconds(30), || {
        shared.umount("late").ok().then_some(())
    });
    assert_eq!(container.sh("ls /data/late").success().out(), "");

    // Taken away from under a container that is in there, it is gone for the next who looks.
    shared.mount("late");
    container
        .sh("(cd /data/late && exec sleep 1000) >/dev/null 2>&1 &")
        .success();
    container.sh("touch /data/late/file").success();
    let late = shared.file("late");
    bed.command(["umount", "-l", &late]).run().success();
    assert_eq!(container.sh("ls /data/late").success().out(), "");
    container.sh("touch /data/late/below").success();
    bed.command(["test", "-e", &shared.file("late/below")])
        .run()
        .success();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_read_only_volume_is_so_alone_or_with_all_that_is_mounted_in_it() {
    let bed = Bed::get();
    let shared = Shared::of(&bed);
    shared.mount("inner");
    let run = |option: &str, line: &str| {
        let volume = format!("{}:/data:{option}", shared.scratch.path());
        bed.nerdctl_run(&["-v", &volume], &bed.busybox(), &["sh", "-c", line])
            .run()
    };
    let line = "grep -q ' /data [^ ]* ro,' /proc/mounts && ! touch /data/file && \
                touch /data/inner/file";
    run("ro", line).success();
    let outcome = run("rro", line).failure();
    let refusals = outcome.err().matches("Read-only file system").count();
    assert_eq!(refusals, 2, "{}", outcome.report());
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_single_file_as_a_volume() {
    let bed = Bed::get();
    let scratch = bed.scratch();
    bed.write(&scratch.file("conf"), "one\n");
    let writable = format!("{}:/etc/my.conf", scratch.file("conf"));
    let fixed = format!("{}:/etc/fixed.conf:ro", scratch.file("conf"));
    let options = ["-v", &writable, "-v", &fixed];
    let line = "cat /etc/my.conf /etc/fixed.conf; echo two >/etc/my.conf; cat /etc/fixed.conf; \
                echo three 2>/dev/null >/etc/fixed.conf || echo refused";
    let run = bed
        .nerdctl_run(&options, &bed.busybox(), &["sh", "-c", line])
        .run()
        .success();
    assert_eq!(run.out(), "one\none\ntwo\nrefused");
    assert_eq!(bed.read(&scratch.file("conf")), "two");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_named_volume_outlives_its_containers() {
    let bed = Bed::get();
    let name = bed.unique("vol");
    let volume = format!("{name}:/data");
    let run = |line: &str| {
        bed.nerdctl_run(&["-v", &volume], &bed.busybox(), &["sh", "-c", line])
            .run()
            .success()
            .out()
    };
    run("echo kept >/data/file");
    assert_eq!(run("cat /data/file"), "kept");
    bed.command(["nerdctl", "volume", "rm", &name])
        .run()
        .success();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn tmpfs_has_its_size_and_options() {
    let bed = Bed::get();
    let options = ["--tmpfs", "/scratch:size=9m,mode=1777,noexec"];
    let line = "stat -f -c %T /scratch; stat -c %a /scratch; df -m /scratch | tail -n 1 | tr -s ' ' | cut -d' ' -f2; \
                cp /bin/busybox /scratch/ls; /scratch/ls 2>/dev/null || echo may not run; \
                head -c 20000000 /dev/zero 2>/dev/null >/scratch/big || echo full";
    let run = bed
        .nerdctl_run(&options, &bed.busybox(), &["sh", "-c", line])
        .run()
        .success();
    assert_eq!(run.out(), "tmpfs\n1777\n9\nmay not run\nfull");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_published_port_answers_the_host() {
    let bed = Bed::get();
    let nginx = bed.image("nginx");
    let web = bed.nerdctl_start(&["-p", "18080:80"], &nginx, &[]);
    let fetched = |url: &str| {
        eventually(url, seconds(30), || {
            let curl = bed.command(["curl", "-sS", "--max-time", "5", url]).run();
            curl.ok().then(|| curl.out())
        })
    };
    assert_eq!(fetched("http://127.0.0.1:18080/"), "hello from sepal");
    assert_eq!(
        fetched(&format!("http://{}/", web.address())),
        "hello from sepal"
    );
    // And outwards: the container reaches the bed's side of the bridge.
    web.sh("getent hosts $(hostname)").success();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_container_has_the_networks_addresses_and_routes() {
    let bed = Bed::get();
    let options = ["--network", "bridge"];
    let container = bed.nerdctl_start(&options, &bed.busybox(), &["sleep", "1000"]);
    let address = container.address();
    let line =
        "ip -4 -o addr show eth0; ip route; cat /sys/class/net/eth0/mtu; cat /etc/resolv.conf";
    let said = container.sh(line).success().out();
    assert!(said.contains(&format!("inet {address}/24")), "{said}");
    assert!(said.contains("default via "), "{said}");
    assert!(said.contains("1500"), "{said}");
    assert!(said.contains("nameserver "), "{said}");
    // nerdctl lists what is up in the network namespace: with a VM there is a tap beside eth0.
    let macs = container.inspect("{{range .NetworkSettings.Networks}}{{.MacAddress}} {{end}}");
    let line = "cat /sys/class/net/eth0/address";
    let mac = container.sh(line).success().out();
    assert!(
        macs.split(' ').any(|listed| listed == mac),
        "{mac} is not in {macs}"
    );
    // Loopback is up with and without a network.
    container.sh("ping -c 1 -W 2 127.0.0.1").success();
    bed.busybox_run(["ping", "-c", "1", "-W", "2", "127.0.0.1"])
        .success();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn interactive_on_a_terminal() {
    let bed = Bed::get();
    let container = bed.named(Client::Nerdctl, "it");
    let command = bed
        .terminal_command([
            "nerdctl",
            "run",
            "--rm",
            "-i",
            "-t",
            "--runtime",
            bed.runtime(),
        ])
        .args([
            "--network",
            "none",
            "--name",
            container.id(),
            &bed.busybox(),
            "sh",
        ]);
    let mut terminal = Terminal::start(command, 80, 25);
    terminal.line("echo $((6 * 7)) is the answer");
    terminal.expect("42 is the answer");
    terminal.line("exit 5");
    assert_eq!(terminal.wait(), 5);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn input_through_a_pipe() {
    let bed = Bed::get();
    let run = bed
        .nerdctl_run(&["-i"], &bed.busybox(), &["sha256sum"])
        .stdin("abc")
        .run()
        .success();
    assert!(run.out().starts_with("ba7816bf8f01cfea"), "{}", run.out());
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn restart_policy_brings_it_back() {
    let bed = Bed::get();
    let scratch = bed.scratch();
    let volume = format!("{}:/data", scratch.path());
    let options = ["--restart", "always", "-v", &volume];
    let line = "echo start >>/data/starts; sleep 1; exit 3";
    // containerd looks every ten seconds, and may just then start what nerdctl is about to start
    // itself: its "already exists" says that, and the container runs all the same.
    let container = bed.named(Client::Nerdctl, "restart");
    let run = [
        "nerdctl",
        "run",
        "--detach",
        "--runtime",
        bed.runtime(),
        "--name",
        container.id(),
    ];
    let run = bed.command(run).args(["--network", "none"]).args(options);
    let said = run.args([&bed.busybox(), "sh", "-c", line]).run();
    assert!(
        said.ok() || said.err().contains("already exists"),
        "{}",
        said.report()
    );
    eventually("it was started again", seconds(40), || {
        // The file comes with the first start's first command.
        let starts = bed.command(["cat", &scratch.file("starts")]).run();
        (starts.out().lines().count() >= 2).then_some(())
    });
    bed.command(["nerdctl", "stop", container.id()])
        .run()
        .success();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn memory_and_cpus_are_inspected_and_kept() {
    let bed = Bed::get();
    let options = ["--memory", "64m", "--cpus", "0.5"];
    let container = bed.nerdctl_start(&options, &bed.busybox(), &["sleep", "1000"]);
    assert_eq!(
        container.inspect("{{.State.Status}} {{.State.Running}}"),
        "running true"
    );
    let oom = container.sh("tail /dev/zero; echo $?").success();
    assert_eq!(oom.out().lines().last(), Some("137"));
    let limit = "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
    assert_eq!(container.sh(limit).success().out(), "67108864");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn logs_are_followed_to_the_end() {
    let bed = Bed::get();
    let line = "for n in 1 2 3 4 5; do echo line $n; echo aside $n >&2; sleep 0.4; done";
    let container = bed.nerdctl_start(&[], &bed.busybox(), &["sh", "-c", line]);
    let said = bed
        .command(["nerdctl", "logs", "-f", container.id()])
        .run()
        .success();
    assert_eq!(said.out(), "line 1\nline 2\nline 3\nline 4\nline 5");
    assert_eq!(said.err(), "aside 1\naside 2\naside 3\naside 4\naside 5");
    assert_eq!(container.wait(), 0);
    assert_eq!(container.logs().success().out().lines().count(), 5);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn cp_works_or_says_why_not() {
    let bed = Bed::get();
    let scratch = bed.scratch();
    bed.write(&scratch.file("in"), "carried\n");
    let container = bed.nerdctl_start(&[], &bed.busybox(), &["sleep", "1000"]);
    let inside = |path: &str| format!("{}:{path}", container.id());
    let cp = |from: &str, to: &str| bed.command(["nerdctl", "cp", from, to]).run();

    let into = cp(&scratch.file("in"), &inside("/home/in"));
    if into.ok() {
        assert_eq!(
            container.exec(["cat", "/home/in"]).success().out(),
            "carried"
        );
        container
            .sh("mkdir /home/dir && echo back >/home/dir/file")
            .success();
        cp(&inside("/home/dir"), scratch.path()).success();
        assert_eq!(bed.read(&scratch.file("dir/file")), "back");
    } else {
        // A refusal is one sentence, and the container is none the worse.
        assert!(
            !into.err().is_empty() && !into.err().contains("panic"),
            "{}",
            into.report()
        );
        container.sh("true").success();
        container.exec(["test", "-e", "/home/in"]).failure();
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn stop_asks_first_and_kills_then() {
    let bed = Bed::get();
    let line = "trap 'echo asked; exit 11' TERM; echo ready; while :; do sleep 1000 & wait; done";
    let polite = bed.nerdctl_start(&[], &bed.busybox(), &["sh", "-c", line]);
    eventually("it is ready", seconds(20), || {
        polite.logs().out().contains("ready").then_some(())
    });
    bed.command(["nerdctl", "stop", polite.id()])
        .run()
        .success();
    assert_eq!(
        polite.inspect("{{.State.Status}} {{.State.ExitCode}}"),
        "exited 11"
    );
    assert!(polite.logs().out().contains("asked"));

    // The first process of a container is deaf to TERM unless it asks for it.
    let deaf = bed.nerdctl_start(&[], &bed.busybox(), &["sleep", "1000"]);
    bed.command(["nerdctl", "stop", "-t", "1", deaf.id()])
        .run()
        .success();
    assert_eq!(
        deaf.inspect("{{.State.Status}} {{.State.ExitCode}}"),
        "exited 137"
    );
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn start_again_after_stop() {
    let bed = Bed::get();
    let line = "echo start >>/home/starts; exec sleep 1000";
    let container = bed.nerdctl_start(&[], &bed.busybox(), &["sh", "-c", line]);
    bed.command(["nerdctl", "stop", "-t", "0", container.id()])
        .run()
        .success();
    bed.command(["nerdctl", "start", container.id()])
        .run()
        .success();
    eventually("it ran twice, on the same files", seconds(20), || {
        (container.sh("wc -l </home/starts").out() == "2").then_some(())
    });
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn inspect_tells_what_was_asked_for() {
    let bed = Bed::get();
    let options = [
        "-e",
        "COLOUR=blue",
        "--hostname",
        "lily",
        "--label",
        "who=me",
    ];
    let container = bed.nerdctl_start(&options, &bed.busybox(), &["sleep", "1000"]);
    assert_eq!(container.inspect("{{.Config.Hostname}}"), "lily");
    assert_eq!(container.inspect("{{index .Config.Labels \"who\"}}"), "me");
    let pid = container.inspect("{{.State.Pid}}");
    bed.command(["test", "-d", &format!("/proc/{pid}")])
        .run()
        .success();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn stats_show_a_row_with_figures() {
    let bed = Bed::get();
    let container = bed.nerdctl_start(&["--memory", "100m"], &bed.busybox(), &["sleep", "1000"]);
    container
        .sh("head -c 20971520 /dev/zero >/dev/shm/blob")
        .success();
    // Not --no-stream: nerdctl shows that row a second after its first reading, and without the
    // second one, which takes longer where all is emulated, it is full of zeros.
    let line = format!(
        "nerdctl stats --format '{{{{.Name}}}} {{{{.MemUsage}}}} {{{{.PIDs}}}}' {} | grep -m 1 MiB",
        container.id()
    );
    let said = bed.command(["sh", "-c", &line]).run().success().out();
    // nerdctl shortens the name.
    let row = said.lines().next().expect("a row").to_owned();
    let mib: f64 = row
        .split_whitespace()
        .nth(1)
        .and_then(|usage| usage.strip_suffix("MiB"))
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("no MiB in {row}"));
    assert!((20.0..60.0).contains(&mib), "{row}");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn commit_keeps_what_was_written() {
    let bed = Bed::get();
    let container = bed.nerdctl_start(&[], &bed.busybox(), &["sleep", "1000"]);
    container
        .sh("echo precious >/home/file; rm /etc/group; sync")
        .success();
    let image = format!("localhost/sepal/{}:committed", bed.unique("commit"));
    let commit = ["nerdctl", "commit", container.id(), &image];
    bed.command(commit).patience(seconds(120)).run().success();
    let line = "cat /home/file; test -e /etc/group || echo gone";
    let said = bed
        .nerdctl_run(&[], &image, &["sh", "-c", line])
        .run()
        .success()
        .out();
    bed.command(["nerdctl", "rmi", "-f", &image])
        .run()
        .success();
    assert_eq!(said, "precious\ngone");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn compose_of_two_services_that_talk() {
    let bed = Bed::get();
    let scratch = bed.scratch();
    let (runtime, nginx, busybox) = (bed.runtime(), bed.image("nginx"), bed.busybox());
    let client = "for n in $$(seq 50); do wget -q -T 5 -O - http://web/ && break; sleep 0.5; done; sleep 1000";
    let file = format!(
        "services:\n  web:\n    image: {nginx}\n    runtime: {runtime}\n  \
         client:\n    image: {busybox}\n    runtime: {runtime}\n    depends_on: [web]\n    \
         command: [sh, -c, '{client}']\n"
    );
    bed.write(&scratch.file("compose.yaml"), file);
    let compose = |verb: &[&str]| {
        bed.command(["nerdctl", "compose", "-f", &scratch.file("compose.yaml")])
            .args(verb)
            .patience(seconds(90))
            .run()
    };
    compose(&["up", "-d"]).success();
    eventually("the client has fetched the page", seconds(40), || {
        let logs = compose(&["logs", "--no-color", "client"]);
        logs.out().contains("hello from sepal").then_some(())
    });
    compose(&["kill"]).success();
    compose(&["down"]).success();
}
