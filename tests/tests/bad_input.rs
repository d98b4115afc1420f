//! What cannot work is refused in one clear sentence, and leaves nothing.

use sepal_tests::{Bed, Command, Outcome, seconds};

const CONFIG: &str = "/etc/sepal/config.toml";

/// Something of the bed that is changed for a test and put back after it.
struct Changed<'bed> {
    bed: &'bed Bed,
    undo: String,
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        self.bed.sh(&self.undo).run();
    }
}

/// Another configuration, for a while.
fn configured<'bed>(bed: &'bed Bed, toml: &str) -> Changed<'bed> {
    let keep = format!("mkdir -p /etc/sepal; [ ! -e {CONFIG} ] || cp {CONFIG} {CONFIG}.kept");
    bed.sh(&keep).run().success();
    let undo = format!("rm -f {CONFIG}; [ ! -e {CONFIG}.kept ] || mv {CONFIG}.kept {CONFIG}");
    let changed = Changed { bed, undo };
    bed.write(CONFIG, toml);
    changed
}

/// A file moved out of the way, for a while.
fn without<'bed>(bed: &'bed Bed, path: &str) -> Changed<'bed> {
    bed.sh(&format!("mv {path} {path}.away")).run().success();
    Changed {
        bed,
        undo: format!("mv {path}.away {path}"),
    }
}

/// It fails in time, with one sentence of a person's length that names what matters.
#[track_caller]
fn refused(command: Command, names: &[&str]) -> Outcome {
    let outcome = command.patience(seconds(60)).run().failure();
    let sentence = outcome.err();
    let report = outcome.report();
    assert!(outcome.took() < seconds(45) * 10, "took its time\n{report}");
    assert!(!sentence.is_empty(), "not a word\n{report}");
    for noise in ["panicked", "goroutine", "RUST_BACKTRACE", "stack backtrace"] {
        assert!(
            !sentence.contains(noise),
            "{noise} is for developers\n{report}"
        );
    }
    assert!(
        sentence.lines().count() <= 2,
        "one sentence, please\n{report}"
    );
    assert!(
        sentence.len() < 700,
        "a sentence of {} bytes\n{report}",
        sentence.len()
    );
    let lower = sentence.to_lowercase();
    for name in names {
        assert!(
            lower.contains(&name.to_lowercase()),
            "{name} is not named\n{report}"
        );
    }
    outcome
}

fn ordinary(bed: &Bed) -> Command {
    bed.ctr_run(&[], &bed.busybox(), ["true"])
}

/// All is well again, and nothing is left.
#[track_caller]
fn recovered(bed: &Bed) {
    ordinary(bed).run().success();
    bed.assert_nothing_left();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn no_kvm_device() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    {
        let _away = without(&bed, "/dev/kvm");
        refused(ordinary(&bed), &["/dev/kvm"]);
    }
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_kvm_device_that_is_none() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    {
        let _away = without(&bed, "/dev/kvm");
        bed.sh("cp -a /dev/null /dev/kvm").run().success();
        let _fake = Changed {
            bed: &bed,
            undo: "rm -f /dev/kvm".into(),
        };
        refused(ordinary(&bed), &["kvm"]);
    }
    recovered(&bed);
}

/// The kernel files of both flavours, so that the one this machine wants is surely among them.
fn kernels(path: &str) -> String {
    format!("kernel = \"{path}\"\nkernel_deprivileged = \"{path}\"\n")
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_missing_kernel_or_image() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    {
        let _config = configured(&bed, &kernels("/no/such/vmlinux"));
        refused(ordinary(&bed), &["/no/such/vmlinux"]);
    }
    {
        let _config = configured(&bed, "image = \"/no/such/guest.erofs\"\n");
        refused(ordinary(&bed), &["/no/such/guest.erofs"]);
    }
    for program in ["vmm", "fs"] {
        let _config = configured(&bed, &format!("{program} = \"/no/such/program\"\n"));
        refused(ordinary(&bed), &["/no/such/program"]);
    }
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_truncated_kernel_or_image() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    let scratch = bed.scratch();
    let cut = |from: &str, name: &str, bytes: u32| {
        let to = scratch.file(name);
        bed.sh(&format!("head -c {bytes} {from} >{to}"))
            .run()
            .success();
        to
    };
    let share = "/opt/sepal/share";
    let present = format!(
        "test -e {share}/vmlinux-deprivileged && echo vmlinux-deprivileged || echo vmlinux"
    );
    let kernel = format!("{share}/{}", bed.sh(&present).run().success().out());
    for bytes in [0, 40, 5000, 3_000_000] {
        let file = cut(&kernel, "vmlinux.cut", bytes);
        let _config = configured(&bed, &kernels(&file));
        refused(ordinary(&bed), &["vmlinux.cut"]);
    }
    for bytes in [0, 512, 1_000_000] {
        let file = cut(&format!("{share}/guest.erofs"), "guest.cut", bytes);
        let _config = configured(&bed, &format!("image = \"{file}\"\n"));
        refused(ordinary(&bed), &["guest.cut"]);
    }
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_kernel_of_the_other_flavour() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    let both = "cd /opt/sepal/share && test -e vmlinux && test -e vmlinux-deprivileged";
    if !bed.sh(both).run().ok() {
        println!("left out: this bed has the kernel of one flavour only");
        return;
    }
    {
        let swapped = "kernel = \"/opt/sepal/share/vmlinux-deprivileged\"\n\
                       kernel_deprivileged = \"/opt/sepal/share/vmlinux\"\n";
        let _config = configured(&bed, swapped);
        refused(ordinary(&bed), &["kernel"]);
    }
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_configuration_that_is_wrong() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    for (toml, names) in [
        ("memroy = 512\n", vec![CONFIG, "memroy"]),
        ("memory = \"much\"\n", vec![CONFIG, "memory"]),
        ("vcpus = 0\n", vec![CONFIG, "vcpus"]),
        ("memory = [\n", vec![CONFIG]),
    ] {
        let _config = configured(&bed, toml);
        refused(ordinary(&bed), &names);
    }
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_missing_program() {
    let bed = Bed::alone();
    refused(
        bed.ctr_run(&[], &bed.busybox(), ["/no/such/program"]),
        &["/no/such/program"],
    );
    refused(
        bed.ctr_run(&[], &bed.busybox(), ["no-such-word"]),
        &["no-such-word"],
    );
    refused(
        bed.ctr_run(&[], &bed.busybox(), ["/etc/passwd"]),
        &["/etc/passwd"],
    );
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_user_that_is_not_there() {
    let bed = Bed::alone();
    refused(
        bed.ctr_run(&["--user", "nosuchuser"], &bed.busybox(), ["true"]),
        &[],
    );
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_mount_whose_source_is_not_there() {
    let bed = Bed::alone();
    let mount = "type=bind,src=/no/such/source,dst=/data,options=rbind:rw";
    let run = bed.ctr_run(&["--mount", mount], &bed.busybox(), ["true"]);
    refused(run, &["/no/such/source"]);
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_socket_as_a_volume() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    let socket = "/run/containerd/containerd.sock";
    let mount = format!("type=bind,src={socket},dst=/data.sock,options=rbind:rw");
    let run = bed.ctr_run(&["--mount", &mount], &bed.busybox(), ["true"]);
    refused(run, &[socket, "socket"]);
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn what_only_the_hosts_kernel_could_share() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    for (option, name) in [("--pid=host", "PID"), ("--ipc=host", "IPC")] {
        let run = bed.nerdctl_run(&[option], &bed.busybox(), &["true"]);
        refused(run, &[name, "virtual machine"]);
    }
    let scratch = bed.scratch();
    let mount = format!(
        "type=bind,src={},dst=/data,options=rbind:rshared",
        scratch.path()
    );
    let run = bed.ctr_run(&["--mount", &mount], &bed.busybox(), ["true"]);
    refused(run, &["/data", "rslave"]);
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_directory_to_start_in_that_is_a_file() {
    let bed = Bed::alone();
    refused(
        bed.ctr_run(&["--cwd", "/etc/passwd"], &bed.busybox(), ["true"]),
        &["/etc/passwd"],
    );
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn an_oci_spec_without_a_process() {
    let bed = Bed::alone();
    let scratch = bed.scratch();
    bed.command(["mkdir", &scratch.file("rootfs")])
        .run()
        .success();
    let spec = serde_json::json!({
        "ociVersion": "1.1.0",
        "root": { "path": scratch.file("rootfs") },
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }] },
    });
    bed.write(&scratch.file("config.json"), spec.to_string());
    // Not by `ctr task start`: it looks into the process itself, and falls.
    let container = bed.named(sepal_tests::Client::Ctr, "nospec");
    let run = ["ctr", "run", "--rm", "--runtime", bed.runtime(), "--config"];
    let run = bed
        .command(run)
        .args([&scratch.file("config.json"), container.id()]);
    refused(run, &["process"]);
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn less_memory_than_anything_needs() {
    let bed = Bed::alone();
    let run = bed.ctr_run(&["--memory-limit", "65536"], &bed.busybox(), ["true"]);
    refused(run, &["memory"]);
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_full_disk_under_the_pods_own_files() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    {
        let fill = "mkdir -p /run/sepal && mount -t tmpfs -o size=4k tmpfs /run/sepal && \
                    head -c 4096 /dev/zero >/run/sepal/filler";
        bed.sh(fill).run().success();
        let _full = Changed {
            bed: &bed,
            undo: "umount /run/sepal".into(),
        };
        refused(ordinary(&bed), &["No space left on device"]);
    }
    recovered(&bed);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_full_disk_under_a_volume() {
    let bed = Bed::alone();
    let scratch = bed.scratch();
    bed.command([
        "mount",
        "-t",
        "tmpfs",
        "-o",
        "size=1m",
        "tmpfs",
        scratch.path(),
    ])
    .run()
    .success();
    let full = Changed {
        bed: &bed,
        undo: format!("umount {}", scratch.path()),
    };
    let mount = format!(
        "type=bind,src={},dst=/data,options=rbind:rw",
        scratch.path()
    );
    let line = "dd if=/dev/zero of=/data/file bs=64k count=64; echo $?; stat -c %s /data/file; \
                rm /data/file; echo again >/data/file && cat /data/file";
    let run = bed
        .ctr_run(&["--mount", &mount], &bed.busybox(), ["sh", "-c", line])
        .run()
        .success();
    assert!(
        run.err().contains("No space left on device"),
        "{}",
        run.report()
    );
    assert_eq!(run.out(), "1\n1048576\nagain");
    drop(full);
    recovered(&bed);
}
