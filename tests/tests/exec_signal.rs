//! Further processes in a container, signals, pause and resume.

use sepal_tests::{Bed, Container, Terminal, eventually, seconds};

/// A container that only waits.
fn idle(bed: &Bed) -> Container<'_> {
    bed.ctr_start(&[], &bed.busybox(), &["sleep", "100000"])
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn exec_has_its_own_output_and_exit_status() {
    let bed = Bed::get();
    let container = idle(&bed);
    let said = container.sh("echo out; echo err >&2; exit 23").exits(23);
    assert_eq!(said.out(), "out");
    assert!(said.err().starts_with("err"), "{}", said.err());
    container.exec(["/no/such/program"]).failure();
    container.sh("exit 0").success();
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn exec_sees_the_container_from_inside() {
    let bed = Bed::get();
    let container = idle(&bed);
    container.sh("echo kept >/home/file").success();
    assert_eq!(
        container.exec(["cat", "/home/file"]).success().out(),
        "kept"
    );
    assert_eq!(
        container.exec(["cat", "/proc/1/comm"]).success().out(),
        "sleep"
    );
    let namespaces = "for n in mnt pid net uts ipc cgroup; do \
                      [ \"$(readlink /proc/1/ns/$n)\" = \"$(readlink /proc/self/ns/$n)\" ] || echo $n; done";
    assert_eq!(container.sh(namespaces).success().out(), "");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn exec_with_user_directory_and_environment() {
    let bed = Bed::get();
    let container = bed.nerdctl_start(&["-e", "INHERITED=yes"], &bed.busybox(), &["sleep", "1000"]);
    let options = ["--user", "1000:33", "--workdir", "/usr", "--env", "OWN=too"];
    let argv = ["sh", "-c", "echo $(id -u):$(id -g) $(pwd) $INHERITED $OWN"];
    let said = container.exec_command(&options, argv).run().success().out();
    assert_eq!(said, "1000:33 /usr yes too");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn exec_on_a_terminal() {
    let bed = Bed::get();
    let container = idle(&bed);
    let command = bed
        .terminal_command([
            "ctr",
            "task",
            "exec",
            "--tty",
            "--exec-id",
            "term",
            container.id(),
        ])
        .arg("sh");
    let mut terminal = Terminal::start(command, 100, 30);
    // The client tells the size once the process runs: ask until it has arrived.
    terminal.line(
        "until [ \"$(stty size)\" = '30 100' ]; do sleep 0.1; done; echo first: $(stty size)",
    );
    terminal.expect("first: 30 100");
    terminal.resize(60, 20);
    terminal
        .line("until [ \"$(stty size)\" = '20 60' ]; do sleep 0.1; done; echo now: $(stty size)");
    terminal.expect("now: 20 60");
    terminal.line("exit 9");
    assert_eq!(terminal.wait(), 9);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn fifty_execs_at_once() {
    let bed = Bed::get();
    let container = idle(&bed);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..bed.scaled(50, 8))
            .map(|number| {
                let line = format!("echo {number}; sleep 0.5; exit {}", number % 7);
                let run = container.exec_command(&[], ["sh".into(), "-c".into(), line]);
                (
                    number,
                    scope.spawn(move || run.patience(seconds(120)).run()),
                )
            })
            .collect();
        for (number, run) in runs {
            let said = run.join().expect("a thread").exits(number % 7);
            assert_eq!(said.out(), number.to_string());
        }
    });
    // The sleep and this very ps; nothing is left of the fifty.
    eventually("the execs' processes are gone", seconds(10), || {
        let count = container.sh("ls -d /proc/[0-9]* | wc -l").success().out();
        (count.parse::<u32>().expect("a number") <= 4).then_some(())
    });
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn each_common_signal_arrives() {
    let bed = Bed::get();
    // A shell that waits with `wait` runs its trap at once.
    let line = "for s in HUP INT QUIT USR1 USR2 TERM CONT WINCH; do trap \"echo got $s\" $s; done; \
                echo ready; while :; do sleep 1000 & wait; done";
    let container = bed.nerdctl_start(&[], &bed.busybox(), &["sh", "-c", line]);
    let logged = |text: &str| {
        eventually(text, seconds(20), || {
            container
                .logs()
                .out()
                .lines()
                .any(|line| line == text)
                .then_some(())
        });
    };
    logged("ready");
    for signal in [
        "HUP", "INT", "QUIT", "USR1", "USR2", "TERM", "CONT", "WINCH",
    ] {
        container.task("kill", &["-s", signal]).success();
        logged(&format!("got {signal}"));
    }
    container.task("kill", &["-s", "KILL"]).success();
    assert_eq!(container.wait(), 137);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn signals_that_end_a_process() {
    let bed = Bed::get();
    for (signal, code) in [("TERM", 143), ("INT", 130), ("HUP", 129), ("ABRT", 134)] {
        let container = idle(&bed);
        let mut exec = container
            .exec_command(&[], ["sh", "-c", "echo up; exec sleep 1000"])
            .spawn();
        eventually("the process sleeps", seconds(20), || {
            let said = container.sh("pgrep -x sleep | wc -l").success().out();
            (said == "2").then_some(())
        });
        let line = format!("kill -{signal} $(pgrep -x sleep | grep -vx 1)");
        container.sh(&line).success();
        assert_eq!(
            exec.wait().and_then(|status| status.code()),
            Some(code),
            "SIG{signal}"
        );
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_signal_to_an_exec_spares_the_rest() {
    let bed = Bed::get();
    let container = idle(&bed);
    let mut exec = bed
        .command([
            "ctr",
            "task",
            "exec",
            "--exec-id",
            "victim",
            container.id(),
            "sleep",
            "1000",
        ])
        .spawn();
    eventually("the exec can be killed", seconds(20), || {
        container
            .task("kill", &["--exec-id", "victim", "-s", "KILL"])
            .ok()
            .then_some(())
    });
    assert_eq!(exec.wait().and_then(|status| status.code()), Some(137));
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn kill_all_reaches_every_process() {
    let bed = Bed::get();
    let line = "sleep 1001 & sleep 1002 & setsid sleep 1003 & sleep 1004";
    let container = bed.ctr_start(&[], &bed.busybox(), &["sh", "-c", line]);
    eventually("all four sleep", seconds(20), || {
        (container.sh("pgrep -x sleep | wc -l").success().out() == "4").then_some(())
    });
    container.task("kill", &["--all", "-s", "KILL"]).success();
    assert_eq!(container.wait(), 137);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn when_the_first_process_ends_all_end() {
    let bed = Bed::get();
    let container = idle(&bed);
    let mut exec = container.exec_command(&[], ["sleep", "1000"]).spawn();
    eventually("the exec runs", seconds(20), || {
        (container.sh("pgrep -x sleep | wc -l").success().out() == "2").then_some(())
    });
    container.task("kill", &["-s", "KILL"]).success();
    assert_eq!(exec.wait().and_then(|status| status.code()), Some(137));
    assert_eq!(container.wait(), 137);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn orphans_are_reaped_by_the_first_process() {
    let bed = Bed::get();
    let container = bed.ctr_start(
        &[],
        &bed.busybox(),
        &["sh", "-c", "while :; do sleep 0.1; done"],
    );
    container.sh("sh -c 'sleep 0.3 &'").success();
    eventually("no zombie is left", seconds(10), || {
        let said = container.sh("grep -l 'State:.*Z' /proc/[0-9]*/status 2>/dev/null | wc -l");
        (said.success().out() == "0").then_some(())
    });
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_paused_counter_stands_still() {
    let bed = Bed::get();
    let scratch = bed.scratch();
    let mount = format!("type=bind,src={},dst=/out,options=rbind:rw", scratch.path());
    let line =
        "n=0; while :; do n=$((n+1)); echo $n >/out/new; mv /out/new /out/n; sleep 0.05; done";
    let container = bed.ctr_start(&["--mount", &mount], &bed.busybox(), &["sh", "-c", line]);
    let count = || {
        bed.sh(&format!("cat {}", scratch.file("n")))
            .run()
            .out()
            .parse::<u64>()
            .ok()
    };

    let early = eventually("it counts", seconds(20), || {
        count().filter(|count| *count > 3)
    });
    eventually("it goes on", seconds(20), || {
        count().filter(|count| *count > early)
    });

    container.task("pause", &[]).success();
    assert_eq!(container.status().as_deref(), Some("PAUSED"));
    let stood = count();
    std::thread::sleep(seconds(2));
    assert_eq!(count(), stood);

    container.task("resume", &[]).success();
    assert_eq!(container.status().as_deref(), Some("RUNNING"));
    eventually("it goes on again", seconds(20), || {
        count().filter(|count| Some(*count) > stood)
    });
    // The guest's clock has caught up with the host's.
    let time = |said: String| said.parse::<i64>().expect("a time");
    let outside = || time(bed.command(["date", "+%s"]).run().success().out());
    let before = outside();
    let inside = time(container.exec(["date", "+%s"]).success().out());
    let after = outside();
    assert!(
        before - 2 <= inside && inside <= after + 2,
        "{before} to {after} outside, {inside} inside"
    );
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn containerd_lists_the_processes() {
    let bed = Bed::get();
    let container = idle(&bed);
    // With a runtime of virtual machines these are the pod's processes on the host: the numbers
    // inside the guest would name strangers to whoever looks them up here.
    let listed = container.task("ps", &[]).success().out();
    let pids: Vec<&str> = listed
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(!pids.is_empty(), "no process in {listed:?}");
    for pid in pids {
        bed.command(["test", "-d", &format!("/proc/{pid}")])
            .run()
            .success();
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_pid_containerd_is_told_lives_on_the_host() {
    let bed = Bed::get();
    let container = idle(&bed);
    let list = bed.command(["ctr", "task", "list"]).run().success().out();
    let pid = list
        .lines()
        .find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(container.id())).then(|| words.next().unwrap_or_default())
        })
        .expect("it is listed");
    bed.command(["test", "-e", &format!("/proc/{pid}/ns/net")])
        .run()
        .success();
}
