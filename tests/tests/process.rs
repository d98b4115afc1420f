//! What a process finds when it starts, and how its end is told.

use sepal_tests::{Bed, Container};

/// A field of `/proc/self/status`.
fn status_field<'text>(status: &'text str, field: &str) -> &'text str {
    status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("no {field} in {status}"))
        .trim()
}

fn effective_capabilities(container: &Container) -> u64 {
    let status = container.exec(["cat", "/proc/self/status"]).success().out();
    u64::from_str_radix(status_field(&status, "CapEff"), 16).expect("a mask")
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn exit_codes_come_through() {
    let bed = Bed::get();
    for code in [0, 1, 42, 255] {
        bed.busybox_run(["sh", "-c", &format!("exit {code}")])
            .exits(code);
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_root_file_system_may_be_any_directory() {
    let bed = Bed::get();
    let scratch = bed.scratch();
    let (root, image) = (scratch.file("root"), scratch.file("image"));
    let copy = format!(
        "mkdir {root} {image} && ctr image mount {} {image} && cp -a {image}/. {root} && ctr image unmount --rm {image}",
        bed.busybox()
    );
    bed.sh(&copy).run().success();
    let line = ["sh", "-c", "echo written >/file"];
    bed.ctr_run(&["--rootfs"], &root, line).run().success();
    assert_eq!(bed.read(&format!("{root}/file")), "written");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn death_by_a_signal_is_128_and_its_number() {
    let bed = Bed::get();
    // The first process of a pid namespace is deaf to signals it sends to itself, so the one that
    // dies is its child and the shell tells.
    for (signal, code) in [("KILL", 137), ("TERM", 143), ("SEGV", 139)] {
        let line = format!("sh -c 'kill -{signal} $$'; exit $?");
        bed.busybox_run(["sh", "-c", &line]).exits(code);
    }
    let sleeper = bed.ctr_start(&[], &bed.busybox(), &["sleep", "1000"]);
    sleeper.task("kill", &["-s", "KILL"]).success();
    assert_eq!(sleeper.wait(), 137);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn environment_and_directory() {
    let bed = Bed::get();
    let options = [
        "--env",
        "FRUIT=quince jam",
        "--env",
        "EMPTY=",
        "--cwd",
        "/usr/bin",
    ];
    let line = "echo \"$FRUIT|$EMPTY|${EMPTY-unset}|$(pwd)\"; env | grep -c ^PATH=";
    let said = bed
        .ctr_run(&options, &bed.busybox(), ["sh", "-c", line])
        .run()
        .success()
        .out();
    assert_eq!(said, "quince jam|||/usr/bin\n1");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn arguments_arrive_as_they_are() {
    let bed = Bed::get();
    let odd = [
        "",
        " ",
        "a b",
        "$HOME",
        "*",
        "quote'\"",
        "tab\there",
        "grüße",
        "--flag=x",
    ];
    let mut argv = vec!["printf", "<%s>"];
    argv.extend(odd);
    let expected: String = odd.iter().map(|word| format!("<{word}>")).collect();
    assert_eq!(bed.busybox_run(argv).success().out(), expected);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn user_by_number_and_by_name() {
    let bed = Bed::get();
    let who = |user: &str| {
        let argv = ["sh", "-c", "echo $(id -u):$(id -g)"];
        bed.ctr_run(&["--user", user], &bed.busybox(), argv)
            .run()
            .success()
            .out()
    };
    assert_eq!(who("0"), "0:0");
    assert_eq!(who("1234:5678"), "1234:5678");
    assert_eq!(who("tester"), "1000:1000");
    assert_eq!(who("tester:www-data"), "1000:33");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn additional_groups_and_umask() {
    let bed = Bed::get();
    let options = [
        "--user",
        "1000:1000",
        "--group-add",
        "4242",
        "--group-add",
        "daemon",
    ];
    let line = "id -G | tr ' ' '\\n' | sort -n | paste -sd' '; umask";
    let container = bed.nerdctl_run(&options, &bed.busybox(), &["sh", "-c", line]);
    let said = container.run().success().out();
    let (groups, umask) = said.split_once('\n').expect("two lines");
    for group in ["1", "1000", "4242"] {
        assert!(
            groups.split(' ').any(|word| word == group),
            "{group} is not in {groups}"
        );
    }
    assert_eq!(umask, "0022");

    let options = ["--umask", "0077"];
    let line = "umask; touch /tmp/f; stat -c %a /tmp/f";
    let said = bed
        .nerdctl_run(&options, &bed.busybox(), &["sh", "-c", line])
        .run()
        .success()
        .out();
    assert_eq!(said, "0077\n600");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn hostname() {
    let bed = Bed::get();
    let argv = ["sh", "-c", "hostname; uname -n"];
    let said = bed
        .ctr_run(&["--hostname", "orchid"], &bed.busybox(), argv)
        .run()
        .success()
        .out();
    assert_eq!(said, "orchid\norchid");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn capabilities_are_the_ones_given() {
    const NET_RAW: u64 = 1 << 13;
    const SYS_ADMIN: u64 = 1 << 21;
    const CHOWN: u64 = 1;
    let bed = Bed::get();
    let start = |options: &[&str]| bed.ctr_start(options, &bed.busybox(), &["sleep", "1000"]);

    let ordinary = effective_capabilities(&start(&[]));
    assert_eq!(ordinary & (CHOWN | NET_RAW | SYS_ADMIN), CHOWN | NET_RAW);
    let fewer = effective_capabilities(&start(&["--cap-drop", "CAP_NET_RAW"]));
    assert_eq!(fewer, ordinary & !NET_RAW);
    let more = effective_capabilities(&start(&["--cap-add", "CAP_SYS_ADMIN"]));
    assert_eq!(more, ordinary | SYS_ADMIN);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_missing_capability_is_missed() {
    let bed = Bed::get();
    let argv = ["sh", "-c", "touch /tmp/f && chown 1000 /tmp/f"];
    bed.ctr_run(&[], &bed.busybox(), argv).run().success();
    bed.ctr_run(&["--cap-drop", "CAP_CHOWN"], &bed.busybox(), argv)
        .run()
        .failure();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn an_ordinary_user_has_no_capability_and_gains_none() {
    let bed = Bed::get();
    let argv = ["cat", "/proc/self/status"];
    let status = bed
        .ctr_run(&["--user", "1000"], &bed.busybox(), argv)
        .run()
        .success()
        .out();
    assert_eq!(status_field(&status, "CapEff"), "0000000000000000");
    assert_eq!(status_field(&status, "NoNewPrivs"), "1");
    let options = ["--user", "1000", "--allow-new-privs"];
    let status = bed
        .ctr_run(&options, &bed.busybox(), argv)
        .run()
        .success()
        .out();
    assert_eq!(status_field(&status, "NoNewPrivs"), "0");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn read_only_root() {
    let bed = Bed::get();
    let line = "touch /home/file 2>&1; echo $?; touch /dev/shm/file && echo shm is writable";
    let argv = ["sh", "-c", line];
    let said = bed
        .ctr_run(&["--read-only"], &bed.busybox(), argv)
        .run()
        .success()
        .out();
    assert!(said.contains("Read-only file system\n1\n"), "{said}");
    assert!(said.ends_with("shm is writable"), "{said}");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn resource_limits() {
    let bed = Bed::get();
    let options = [
        "--ulimit",
        "nofile=1234:2345",
        "--ulimit",
        "core=0:0",
        "--ulimit",
        "stack=4194304",
    ];
    let line = "ulimit -Sn; ulimit -Hn; ulimit -c; ulimit -s";
    let said = bed
        .nerdctl_run(&options, &bed.busybox(), &["sh", "-c", line])
        .run()
        .success()
        .out();
    assert_eq!(said, "1234\n2345\n0\n4096");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn sysctls() {
    let bed = Bed::get();
    let options = [
        "--sysctl",
        "kernel.msgmax=4711",
        "--sysctl",
        "net.ipv4.ip_unprivileged_port_start=81",
    ];
    let line = "cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let said = bed
        .nerdctl_run(&options, &bed.busybox(), &["sh", "-c", line])
        .run()
        .success()
        .out();
    assert_eq!(said, "4711\n81");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_kernel_is_the_guests() {
    let bed = Bed::get();
    if !bed.has_vm() {
        return;
    }
    let host = bed.command(["uname", "-rv"]).run().success().out();
    let guest = bed.busybox_run(["uname", "-rv"]).success().out();
    assert_ne!(host, guest);
    assert!(guest.starts_with("6.12."), "{guest}");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn it_is_alone_in_its_namespaces() {
    let bed = Bed::get();
    let said = bed
        .busybox_run(["sh", "-c", "echo $$; ps -o pid= | wc -l"])
        .success()
        .out();
    let (pid, count) = said.split_once('\n').expect("two lines");
    assert_eq!(pid, "1");
    // The shell, ps and wc, and the subshell of the pipe where the shell makes one.
    assert!(
        count.trim().parse::<u32>().expect("a number") <= 4,
        "{count} processes"
    );
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn devices_and_kernel_files() {
    let bed = Bed::get();
    let line = "head -c 4 /dev/zero | od -An -tx1; echo x >/dev/null; head -c 8 /dev/urandom | wc -c; \
                echo x >/dev/full 2>/dev/null || echo full; test -c /dev/tty && echo tty; \
                readlink /dev/fd; \
                stat -f -c %T /dev/shm; \
                cat /proc/kcore 2>/dev/null | head -c 1 | wc -c; \
                echo 1 2>/dev/null >/proc/sysrq-trigger || echo sysrq refused";
    let said = bed.busybox_run(["sh", "-c", line]).success().out();
    let lines: Vec<_> = said.lines().map(str::trim).collect();
    assert_eq!(
        lines,
        [
            "00 00 00 00",
            "8",
            "full",
            "tty",
            "/proc/self/fd",
            "tmpfs",
            "0",
            "sysrq refused"
        ]
    );
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn shared_memory_has_the_size_asked_for() {
    let bed = Bed::get();
    let argv = [
        "sh",
        "-c",
        "df -m /dev/shm | tail -n 1 | tr -s ' ' | cut -d' ' -f2",
    ];
    assert_eq!(bed.busybox_run(argv).success().out(), "64");
    let said = bed
        .nerdctl_run(&["--shm-size", "17m"], &bed.busybox(), &argv)
        .run()
        .success()
        .out();
    assert_eq!(said, "17");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn seccomp_filters_where_asked() {
    let bed = Bed::get();
    let argv = ["cat", "/proc/self/status"];
    let status = bed
        .ctr_run(&["--seccomp"], &bed.busybox(), argv)
        .run()
        .success()
        .out();
    assert_eq!(status_field(&status, "Seccomp"), "2");
    let status = bed.busybox_run(argv).success().out();
    assert_eq!(status_field(&status, "Seccomp"), "0");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_privileged_container_has_every_capability() {
    let bed = Bed::get();
    // ctr's --privileged-without-host-devices leaves the host's device nodes out.
    let options = ["--privileged", "--privileged-without-host-devices"];
    let container = bed.ctr_start(&options, &bed.busybox(), &["sleep", "1000"]);
    const NET_ADMIN: u64 = 1 << 12;
    const SYS_ADMIN: u64 = 1 << 21;
    let both = NET_ADMIN | SYS_ADMIN;
    assert_eq!(effective_capabilities(&container) & both, both);
    let line = "mkdir /tmp/m && mount -t tmpfs tmpfs /tmp/m && touch /tmp/m/f && umount /tmp/m";
    container.sh(line).success();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_clock_is_the_hosts() {
    let bed = Bed::get();
    let now = || -> i64 {
        bed.command(["date", "+%s"])
            .run()
            .success()
            .out()
            .parse()
            .expect("a time")
    };
    let before = now();
    let inside: i64 = bed
        .busybox_run(["date", "+%s"])
        .success()
        .out()
        .parse()
        .expect("a time");
    let after = now();
    assert!(
        before - 1 <= inside && inside <= after + 1,
        "{before} <= {inside} <= {after}"
    );
}
