//! Limits that change while a container runs, and the machine that follows them.

use sepal_tests::{Bed, Client, Container, Outcome, PodProcess, eventually, seconds};

const MIB: u64 = 1 << 20;
/// Memory is used by what lies in there.
const SHM: &str = "--shm-size=2g";

fn update(bed: &Bed, container: &Container, options: &[&str]) -> Outcome {
    bed.command(["nerdctl", "update"])
        .args(options)
        .arg(container.id())
        .run()
}

/// `free`: all memory, in MiB.
fn total(container: &Container) -> u64 {
    let line = "free -m | awk '/^Mem:/ {print $2}'";
    let said = container.sh(line).success().out();
    said.parse().expect("a number")
}

fn memory_max(container: &Container) -> u64 {
    let said = container.exec(["cat", "/sys/fs/cgroup/memory.max"]);
    said.success().out().parse().expect("a number")
}

/// What tells one life of a container from another: the start of its first process.
fn life(container: &Container) -> String {
    let line = "awk '{print $22}' /proc/1/stat";
    container.sh(line).success().out()
}

/// Uses this much memory.
fn fill(container: &Container, mebibytes: u64) {
    let line = format!("dd if=/dev/zero of=/dev/shm/blob bs=1M count={mebibytes} 2>/dev/null");
    container.sh(&line).success();
    let size = container.sh("wc -c </dev/shm/blob").success().out();
    assert_eq!(size, (mebibytes * MIB).to_string());
}

/// Uses it no more.
fn empty(container: &Container) {
    container.exec(["rm", "/dev/shm/blob"]).success();
}

/// MiB of the host that a machine's memory takes: the pages of the files behind it.
fn of_the_host(bed: &Bed, container: &Container) -> u64 {
    let vmm = container.pid_of(bed, PodProcess::Vmm);
    let line = format!(
        "for fd in /proc/{vmm}/fd/*; do
           case $(readlink $fd) in
             /memfd:sepal-r*) stat -L -c '%i %b' $fd ;;
           esac
         done | sort -u | awk '{{sum += $2}} END {{print int(sum / 2048)}}'"
    );
    let said = bed.sh(&line).run().success().out();
    said.parse().expect("a number")
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn memory_grows_beyond_what_the_machine_has_booted_with_and_comes_back() {
    let bed = Bed::alone();
    let command = ["sleep", "1000"];
    let container = bed.nerdctl_start(&[SHM, "--memory", "256m"], &bed.busybox(), &command);
    let (before, born) = (total(&container), life(&container));

    update(&bed, &container, &["--memory", "1g"]).success();
    assert_eq!(memory_max(&container), 1024 * MIB);
    if bed.has_vm() {
        let grown = total(&container);
        assert!(
            (760..780).contains(&(grown - before)),
            "from {before} to {grown} MiB"
        );
    }
    fill(&container, 700);
    let taken = of_the_host(&bed, &container);
    empty(&container);

    update(&bed, &container, &["--memory", "256m"]).success();
    assert_eq!(memory_max(&container), 256 * MIB);
    if bed.has_vm() {
        let shrunk = total(&container);
        assert!(
            shrunk <= before + 2,
            "{before} MiB before, {shrunk} MiB after"
        );
        assert!(taken >= 700, "{taken} MiB of the host for 700 in the guest");
        let left = of_the_host(&bed, &container);
        assert!(left < 330, "{left} MiB of the host are left of {taken}");
    }
    // And the same once more.
    update(&bed, &container, &["--memory", "768m"]).success();
    fill(&container, 500);
    assert_eq!(life(&container), born, "it has been restarted");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn memory_shrinks_below_what_the_machine_has_booted_with_and_comes_back() {
    let bed = Bed::alone();
    let command = ["sleep", "1000"];
    let container = bed.nerdctl_start(&[SHM, "--memory", "1g"], &bed.busybox(), &command);
    let (before, born) = (total(&container), life(&container));
    fill(&container, 700);
    empty(&container);

    update(&bed, &container, &["--memory", "192m"]).success();
    assert_eq!(memory_max(&container), 192 * MIB);
    if bed.has_vm() {
        let shrunk = total(&container);
        assert!(
            (830..840).contains(&(before - shrunk)),
            "from {before} to {shrunk} MiB"
        );
        let left = of_the_host(&bed, &container);
        assert!(left <= 256, "{left} MiB of the host are left");
    }
    fill(&container, 100);
    empty(&container);

    update(&bed, &container, &["--memory", "2g"]).success();
    if bed.has_vm() {
        let grown = total(&container);
        assert!(
            (1020..1030).contains(&(grown - before)),
            "from {before} to {grown} MiB"
        );
    }
    fill(&container, 1500);
    assert_eq!(life(&container), born, "it has been restarted");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn cpus_come_and_go() {
    let bed = Bed::get();
    if !bed.has_vm() || !bed.has_real_processors() {
        return;
    }
    let options = ["--cpus", "0.5", "--memory", "256m"];
    let container = bed.nerdctl_start(&options, &bed.busybox(), &["sleep", "1000"]);
    let born = life(&container);
    let await_cpus = |count: &str| {
        eventually("the CPUs are there", seconds(5), || {
            (container.exec(["nproc"]).success().out() == count).then_some(())
        });
    };
    await_cpus("1");
    for _ in 0..3 {
        let two = ["--cpu-period", "100000", "--cpu-quota", "200000"];
        update(&bed, &container, &two).success();
        await_cpus("2");
        let max = container.exec(["cat", "/sys/fs/cgroup/cpu.max"]);
        assert_eq!(max.success().out(), "200000 100000");
        // Both work.
        let busy =
            "for n in 1 2; do (i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done) & done; wait";
        container.sh(busy).success();
        let one = ["--cpu-period", "100000", "--cpu-quota", "50000"];
        update(&bed, &container, &one).success();
        await_cpus("1");
    }
    assert_eq!(life(&container), born, "it has been restarted");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_limit_below_what_is_used_is_refused_and_kills_nobody() {
    let bed = Bed::get();
    if !bed.has_vm() {
        return;
    }
    let options = [SHM, "--memory", "400m"];
    let container = bed.nerdctl_start(&options, &bed.busybox(), &["sleep", "1000"]);
    let (before, born) = (total(&container), life(&container));
    fill(&container, 200);

    let refused = update(&bed, &container, &["--memory", "100m"]).failure();
    let text = refused.report();
    assert!(text.contains("more than the new memory limit"), "{text}");
    assert_eq!(memory_max(&container), 400 * MIB);
    assert_eq!(total(&container), before);
    let size = container.sh("wc -c </dev/shm/blob").success().out();
    assert_eq!(size, (200 * MIB).to_string());

    empty(&container);
    update(&bed, &container, &["--memory", "100m"]).success();
    assert_eq!(memory_max(&container), 100 * MIB);
    assert_eq!(life(&container), born, "it has been restarted");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn more_than_the_machine_may_have_is_refused_and_changes_nothing() {
    let bed = Bed::get();
    if !bed.has_vm() {
        return;
    }
    let container = bed.named(Client::Ctr, "bounded");
    let run = ["ctr", "run", "--detach", "--runtime", bed.runtime()];
    bed.command(run)
        .args(["--annotation", "io.sepal.max_memory=512"])
        .args(["--annotation", "io.sepal.max_vcpus=1"])
        .args(["--memory-limit", &(128 * MIB).to_string()])
        .args([&bed.busybox(), container.id()])
        .args(["sleep", "1000"])
        .run()
        .success();
    let before = total(&container);
    let memory = update(&bed, &container, &["--memory", "2g"]).failure();
    let text = memory.report();
    assert!(text.contains("io.sepal.max_memory"), "{text}");
    let cpus = ["--cpu-period", "100000", "--cpu-quota", "200000"];
    if bed.has_real_processors() {
        let cpus = update(&bed, &container, &cpus).failure();
        let text = cpus.report();
        assert!(text.contains("io.sepal.max_vcpus"), "{text}");
    }
    assert_eq!(total(&container), before);
    update(&bed, &container, &["--memory", "400m"]).success();
    assert!(total(&container) > before + 200);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_machine_of_a_pod_is_the_sum_of_its_containers() {
    let bed = Bed::get();
    if !bed.has_vm() {
        return;
    }
    let sum = format!("io.kubernetes.cri.sandbox-memory={}", 200 * MIB);
    let pod = bed.ctr_pod(&["--annotation", &sum]);
    let run = |name: &str, limit: u64| {
        let name = format!("io.kubernetes.cri.container-name={name}");
        let limit = (limit * MIB).to_string();
        let options = ["--annotation", &name, "--memory-limit", &limit];
        pod.member(&options, &bed.busybox(), &["sleep", "1000"])
    };
    let (member, other) = (run("a", 100), run("b", 100));
    let before = total(pod.sandbox());
    let grown = |by: i64| {
        let by = before.checked_add_signed(by).expect("a size");
        let now = total(pod.sandbox());
        assert!(now.abs_diff(by) <= 4, "{now} MiB instead of {by}");
    };
    update(&bed, &member, &["--memory", "300m"]).success();
    grown(200);
    update(&bed, &other, &["--memory", "200m"]).success();
    grown(300);
    update(&bed, &member, &["--memory", "100m"]).success();
    grown(100);
    // Its next life is no further container, and may have other limits.
    member.remove();
    let _again = run("a", 150);
    grown(150);
}
