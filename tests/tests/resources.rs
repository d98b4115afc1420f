//! Limits that hold, and figures that are true.

use sepal_tests::{Bed, Client, Container, eventually, seconds};
use serde_json::Value;

/// Figures of a task as containerd tells them, from cgroup v1 or v2.
struct Metrics(Value);

impl Metrics {
    fn of(bed: &Bed, container: &Container) -> Self {
        let id = container.full_id();
        let said = bed
            .command(["ctr", "task", "metrics", "--format", "json", &id])
            .run()
            .success();
        Self(serde_json::from_str(&said.out()).expect("JSON"))
    }

    fn first(&self, pointers: &[&str]) -> f64 {
        pointers
            .iter()
            .find_map(|pointer| {
                let value = self.0.pointer(pointer)?;
                // 64-bit numbers of protobuf are strings in JSON.
                value.as_f64().or_else(|| value.as_str()?.parse().ok())
            })
            .unwrap_or_else(|| panic!("none of {pointers:?} in {}", self.0))
    }

    fn cpu_seconds(&self) -> f64 {
        if self.0.pointer("/cpu/usage/total").is_some() {
            self.first(&["/cpu/usage/total"]) / 1e9
        } else {
            self.first(&["/cpu/usage_usec"]) / 1e6
        }
    }

    fn memory_mib(&self) -> f64 {
        self.first(&["/memory/usage/usage", "/memory/usage"]) / f64::from(1 << 20)
    }

    fn pids(&self) -> f64 {
        self.first(&["/pids/current"])
    }
}

fn within(percent: f64, measured: f64, expected: f64) -> bool {
    (measured - expected).abs() <= expected * percent / 100.0
}

/// The three numbers `user system wall` in seconds that busybox's `time -p` writes for a busy loop
/// that runs for that many seconds of wall time.
fn busy_loop(container: &Container, wall: u32) -> (f64, f64) {
    let line = format!(
        "time -f '%U %S %e' timeout -s KILL {wall} sh -c 'while :; do :; done' 2>&1 | tail -n 1"
    );
    let said = container.sh(&line).success().out();
    let figures: Vec<f64> = said
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    let [user, system, wall] = figures[..] else {
        panic!("time said {said:?}")
    };
    (user + system, wall)
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn cpu_figures_match_what_was_used() {
    let bed = Bed::alone();
    let container = bed.ctr_start(&[], &bed.busybox(), &["sleep", "1000"]);
    let told_and_used = |wall| {
        let before = Metrics::of(&bed, &container).cpu_seconds();
        let (used, _) = busy_loop(&container, wall);
        (Metrics::of(&bed, &container).cpu_seconds() - before, used)
    };
    // What starts and ends a loop costs as well, and as much with either.
    let (short_told, short_used) = told_and_used(1);
    let (long_told, long_used) = told_and_used(6);
    let (told, used) = (long_told - short_told, long_used - short_used);
    assert!(used > 0.5, "the loop got {used} s of CPU only");
    assert!(within(10.0, told, used), "used {used} s, told {told} s");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn memory_and_pids_figures_match_what_is_used() {
    let bed = Bed::get();
    let container = bed.ctr_start(&[], &bed.busybox(), &["sleep", "1000"]);
    let before = Metrics::of(&bed, &container);
    // Shared memory counts as the cgroup's, page for page.
    container
        .sh("head -c 50331648 /dev/zero >/dev/shm/blob")
        .success();
    let mut sleepers = container
        .exec_command(&[], ["sh", "-c", "sleep 900 & sleep 900 & wait"])
        .spawn();
    eventually("the sleepers are there", seconds(20), || {
        (container.sh("pgrep -x sleep | wc -l").success().out() == "3").then_some(())
    });
    let after = Metrics::of(&bed, &container);
    let grown = after.memory_mib() - before.memory_mib();
    assert!(within(10.0, grown, 48.0), "48 MiB used, {grown} MiB told");
    assert_eq!(after.pids() - before.pids(), 3.0, "a shell and two sleeps");
    sleepers.end();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn more_memory_than_allowed_is_an_oom_kill() {
    let bed = Bed::get();
    let mut events = bed
        .command(["ctr", "events"])
        .patience(seconds(120))
        .spawn();
    let stream = events.stdout();
    let lines = std::thread::spawn(move || std::io::read_to_string(stream));

    let options = ["--memory-limit", "67108864"];
    let container = bed.ctr_start(&options, &bed.busybox(), &["sleep", "1000"]);
    // tail keeps what it reads until a line ends, which here never happens.
    let greedy = container
        .exec(["sh", "-c", "tail /dev/zero; echo ended with $?"])
        .success();
    assert_eq!(greedy.out().lines().last(), Some("ended with 137"));
    assert_eq!(
        container.status().as_deref(),
        Some("RUNNING"),
        "only the greedy one is killed"
    );

    let alone = bed.named(Client::Ctr, "greedy");
    let command = [
        "ctr",
        "run",
        "--runtime",
        bed.runtime(),
        "--memory-limit",
        "67108864",
    ];
    let run = bed
        .command(command)
        .args([&bed.busybox(), alone.id()])
        .args(["tail", "/dev/zero"]);
    run.run().exits(137);

    std::thread::sleep(seconds(1));
    events.end();
    let lines = lines.join().expect("a reader").expect("text");
    for id in [container.id(), alone.id()] {
        let told = lines
            .lines()
            .any(|line| line.contains("/tasks/oom") && line.contains(id));
        assert!(told, "no OOM event of {id} in\n{lines}");
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_pod_outlives_a_container_killed_for_its_memory() {
    let bed = Bed::get();
    let (sandbox, member) = (
        bed.named(Client::Ctr, "pod"),
        bed.named(Client::Ctr, "member"),
    );
    let run = |container: &Container, options: &[&str], argv: &[&str]| {
        bed.command(["ctr", "run", "--runtime", bed.runtime(), "--detach"])
            .args(options)
            .args([&bed.busybox(), container.id()])
            .args(argv)
            .run()
            .success();
    };
    let kind = |kind: &str| format!("io.kubernetes.cri.container-type={kind}");
    run(
        &sandbox,
        &["--annotation", &kind("sandbox")],
        &["sleep", "1000"],
    );
    let of = format!("io.kubernetes.cri.sandbox-id={}", sandbox.id());
    let options = [
        "--annotation",
        &kind("container"),
        "--annotation",
        &of,
        "--memory-limit",
        "67108864",
    ];
    run(&member, &options, &["tail", "/dev/zero"]);
    assert_eq!(member.wait(), 137);
    assert_eq!(sandbox.status().as_deref(), Some("RUNNING"));
    assert_eq!(sandbox.sh("echo alive").success().out(), "alive");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_number_of_processes_is_limited() {
    let bed = Bed::get();
    // A first process that reaps, for the dead count until somebody has waited for them, and that
    // needs no further process itself.
    let reaps = ["sh", "-c", "sleep 100000 & wait"];
    let container = bed.nerdctl_start(&["--pids-limit", "20"], &bed.busybox(), &reaps);
    let said = container
        .sh("for n in $(seq 40); do sleep 4 >/dev/null 2>&1 & done; wait")
        .failure();
    assert!(
        format!("{}{}", said.out(), said.err()).contains("fork"),
        "{}",
        said.report()
    );
    eventually("it can be entered again", seconds(20), || {
        container.sh("true").ok().then_some(())
    });
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_busy_loop_gets_its_share_of_cpu() {
    let bed = Bed::alone();
    if !bed.has_real_processors() {
        return;
    }
    for share in [0.5, 0.25] {
        let options = ["--cpus", &share.to_string()];
        let container = bed.nerdctl_start(&options, &bed.busybox(), &["sleep", "1000"]);
        // A busy machine can give less than the share: one fair try of three will do, while a
        // limit that is not kept fails in each.
        let tries: Vec<f64> = (0..3)
            .map(|_| {
                let (used, wall) = busy_loop(&container, 6);
                used / wall
            })
            .take_while(|got| !within(10.0, *got, share))
            .collect();
        assert!(tries.len() < 3, "of a share of {share} it got {tries:?}");
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_share_can_be_changed_while_it_runs() {
    let bed = Bed::alone();
    if !bed.has_real_processors() {
        return;
    }
    let options = ["--cpus", "0.2", "--memory", "100m"];
    let container = bed.nerdctl_start(&options, &bed.busybox(), &["sleep", "1000"]);
    let (used, wall) = busy_loop(&container, 4);
    assert!(used / wall < 0.25, "{used} s of {wall} s");
    let update = [
        "nerdctl",
        "update",
        // `--cpus` of nerdctl 2.1 changes nothing.
        "--cpu-period",
        "100000",
        "--cpu-quota",
        "60000",
        "--memory",
        "150m",
        container.id(),
    ];
    bed.command(update).run().success();
    let (used, wall) = busy_loop(&container, 4);
    assert!((0.3..0.7).contains(&(used / wall)), "{used} s of {wall} s");
    // 120 MiB were too much before and are not now.
    container
        .sh("dd if=/dev/zero of=/tmp/x bs=1M count=1 2>/dev/null; rm /tmp/x")
        .success();
    let hog = "head -c 125829120 /dev/zero | tail -c 115343360 | wc -c";
    assert_eq!(container.sh(hog).success().out(), "115343360");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_memory_limit_is_seen_as_the_size_of_the_machine_or_larger() {
    let bed = Bed::get();
    if !bed.has_vm() {
        return;
    }
    let line = "awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo";
    let total = |options: &[&str]| -> u32 {
        let run = bed
            .ctr_run(options, &bed.busybox(), ["sh", "-c", line])
            .run()
            .success();
        run.out().parse().expect("a number")
    };
    let ordinary = total(&[]);
    assert!(
        (200..600).contains(&ordinary),
        "a VM of {ordinary} MiB by default"
    );
    let large = total(&["--memory-limit", "1073741824"]);
    assert!(
        (1000..1400).contains(&large),
        "a VM of {large} MiB for a limit of 1 GiB"
    );
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn cpus_asked_for_are_there() {
    let bed = Bed::get();
    if !bed.has_vm() || !bed.has_real_processors() {
        return;
    }
    assert_eq!(bed.busybox_run(["nproc"]).success().out(), "1");
    let two = bed
        .nerdctl_run(&["--cpus", "2"], &bed.busybox(), &["nproc"])
        .run()
        .success();
    assert_eq!(two.out(), "2");
}

/// The host's CPUs, all and the last.
fn cpus_of_the_host(bed: &Bed) -> (String, String) {
    let all = "grep -h ^Cpus_allowed_list /proc/self/status | cut -f2";
    let all = bed.sh(all).run().success().out();
    let last = all.rsplit([',', '-']).next().expect("a CPU").to_owned();
    (all, last)
}

/// Where on the host the threads of a container's task may run; of a VM its vCPUs are among them.
fn placed(bed: &Bed, container: &Container) -> Vec<String> {
    let pid = container.task_pid();
    let line = format!("cat /proc/{pid}/task/*/status | grep ^Cpus_allowed_list: | cut -f2");
    let lists = bed.sh(&line).run().success().out();
    let mut lists: Vec<_> = lists.lines().map(String::from).collect();
    lists.dedup();
    lists
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_container_is_kept_on_its_cpus_of_the_host() {
    let bed = Bed::get();
    let (all, last) = cpus_of_the_host(&bed);
    let options = ["--cpuset-cpus", &last];
    let container = bed.nerdctl_start(&options, &bed.busybox(), &["sleep", "1000"]);
    let allowed = || placed(&bed, &container);
    assert_eq!(allowed(), [last.as_str()]);
    let update = ["nerdctl", "update", "--cpuset-cpus", &all, container.id()];
    bed.command(update).run().success();
    assert_eq!(allowed(), [all.as_str()]);
    let none = ["nerdctl", "update", "--cpuset-cpus", "4000", container.id()];
    bed.command(none).run().failure();
    assert_eq!(allowed(), [all.as_str()]);
    container.exec(["true"]).success();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn refused_limits_leave_a_pod_on_its_cpus() {
    let bed = Bed::get();
    let (all, last) = cpus_of_the_host(&bed);
    if !bed.has_vm() || last == all {
        return;
    }
    let options = ["--memory", "200m", "--tmpfs", "/blob"];
    let container = bed.nerdctl_start(&options, &bed.busybox(), &["sleep", "1000"]);
    container
        .sh("head -c 100000000 /dev/zero >/blob/x")
        .success();
    let before = placed(&bed, &container);
    // The guest refuses less memory than is in use.
    let update = ["nerdctl", "update", "--memory", "50m"];
    let update = bed
        .command(update)
        .args(["--cpuset-cpus", &last, container.id()])
        .run()
        .failure();
    let text = update.report();
    assert!(text.contains("more than the new memory limit"), "{text}");
    assert_eq!(placed(&bed, &container), before);
}
