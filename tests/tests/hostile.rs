//! A guest that does its worst to each of its devices (`src/bin/hostile-guest/`): its VMM lives or ends
//! in an orderly way, the host's memory does not grow, a neighbour's pod is served, and nothing is left.
//!
//! `SEPAL_HOSTILE_SECONDS` is how long each device is attacked (default: 5).

use sepal_tests::{Bed, Client, Container, LoopDevice, PodProcess, seconds};

/// What the memory of a VMM may become, in KiB: its guest's and, beside it, what it works with.
const MOST: u64 = (512 + 64) << 10;

/// Device number of virtio-mem.
const MEM: u16 = 24;

fn attack(name: &str, device: u16, options: &[&str]) {
    let bed = Bed::alone();
    if bed.has_vm() {
        attack_in(&bed, name, device, options);
    }
}

fn attack_in(bed: &Bed, name: &str, device: u16, options: &[&str]) {
    let duration: u64 =
        std::env::var("SEPAL_HOSTILE_SECONDS").map_or(5, |text| text.parse().expect("seconds"));
    let scratch = bed.scratch();
    let program = scratch.file("hostile-guest");
    let bytes = std::fs::read(env!("CARGO_BIN_EXE_hostile-guest")).expect("the program");
    bed.write(&program, bytes);
    bed.command(["chmod", "+x", &program]).run().success();
    let neighbour = bed.ctr_start(&[], &bed.busybox(), &["sleep", "100000"]);

    let mount = format!(
        "type=bind,src={},dst=/attack,options=rbind:ro",
        scratch.path()
    );
    // Standard output goes by vsock, which may be what is attacked.
    let told = scratch.file("told");
    bed.command(["mkdir", &told]).run().success();
    let told_mount = format!("type=bind,src={told},dst=/told,options=rbind:rw");
    let memory = (128_u64 << 20).to_string();
    // What a privileged container has of it, which gets no disk of the host's.
    let power = ["CAP_SYS_ADMIN", "CAP_SYS_RAWIO", "CAP_IPC_LOCK"];
    let power = power.map(|capability| ["--cap-add", capability]).concat();
    let always = [
        "--mount",
        &mount,
        "--mount",
        &told_mount,
        "--memory-limit",
        &memory,
    ];
    let more = ["--annotation", "io.sepal.max_memory=512"];
    let options = [&power[..], &always, &more, options].concat();
    let container = bed.ctr_start(&options, &bed.busybox(), &["sleep", "100000"]);
    let vmm = container.pid_of(bed, PodProcess::Vmm);
    if device == MEM {
        // It is there as soon as memory has been plugged.
        let update = ["nerdctl", "update", "--memory", "300m", container.id()];
        bed.command(update).run().success();
    }
    let (kind, time, seed) = (
        device.to_string(),
        duration.to_string(),
        std::process::id().to_string(),
    );
    println!("{name}: seed {seed}");
    let before = bed.containerd("log").out().len();
    // The guest may take itself down with this.
    let attacker = format!(
        "mount -o remount,rw /sys && exec /attack/hostile-guest {kind} {time} {seed} /told/done"
    );
    let attacker = ["sh", "-c", &attacker];
    let limit = bed.scaled(seconds(duration + 30), seconds(duration / 20 + 60));
    let said = container.exec_command(&[], attacker).patience(limit).run();
    println!("{name}: {}", said.report());
    let done = bed.sh(&format!("cat {told}/done 2>/dev/null; true")).run();
    let done = format!("{}\n{}", done.out(), said.out());
    assert!(
        done.contains(": attacked"),
        "{name} was not attacked: {done}; {}",
        said.report()
    );
    let counts = done
        .lines()
        .rfind(|line| line.ends_with(" completions"))
        .unwrap_or("nothing was done");
    println!("{name}: {counts}");
    assert!(
        !counts.contains(" 0 completions") && counts.contains(" actions"),
        "{name}: the device has not answered: {counts}"
    );

    let answer = neighbour.sh("echo well");
    assert_eq!(answer.success().out(), "well");
    let status = bed
        .sh(&format!("awk '/^VmHWM/ {{ print $2 }}' /proc/{vmm}/status"))
        .run();
    if let Ok(most) = status.out().parse::<u64>() {
        println!("{name}: the VMM lives and has had {most} KiB at most");
        assert!(most < MOST, "{name}: the VMM has had {most} KiB");
    }
    // They are in the host's memory; the guest's kernel has a MiB.
    let large = "find /run/sepal -name console.log -size +1024k -o -name '[vf]*.log' -size +300k";
    let large = bed.sh(large).run();
    assert_eq!(large.success().out(), "", "{name}: logs that have grown");
    // Those that a process has survived are in its own log alone.
    let panics = format!(
        "cat /run/sepal/*+{}/[vf]*.log 2>/dev/null | grep -F 'panicked at'; true",
        container.id()
    );
    assert_eq!(bed.sh(&panics).run().out(), "", "{name}");
    let log = bed.containerd("log").out();
    let new = log.get(before..).unwrap_or(&log);
    let ended = new
        .lines()
        .find(|line| line.contains("the virtual machine has ended"));
    if let Some(ended) = ended {
        println!("{name}: {ended}");
        let is_orderly = orderly(name)
            .iter()
            .any(|words| words.iter().all(|word| ended.contains(word)));
        assert!(is_orderly, "{name}: {ended}");
    }
    assert!(!new.contains("panicked at"), "{name}: {new}");
    end(bed, container);
    end(bed, neighbour);
    drop(scratch);
    bed.assert_nothing_left();
}

/// How the virtual machine may end when this device is attacked: words that are all in what its shim says.
fn orderly(name: &str) -> Vec<Vec<&'static str>> {
    let lines = include_str!("../hostile/orderly").lines();
    let of = |line: &'static str| {
        let (device, words) = line.split_once(": ")?;
        let counts = [name, "any"].contains(&device);
        counts.then(|| words.split(" ... ").collect())
    };
    lines.filter_map(of).collect()
}

/// However it is by now.
fn end(bed: &Bed, container: Container<'_>) {
    let id = container.id().to_owned();
    drop(container);
    assert!(
        bed.adopt(Client::Ctr, &id).status().is_none(),
        "{id} is still there"
    );
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_network_interface() {
    attack("net", 1, &["--cni"]);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_disk() {
    let bed = Bed::alone();
    if !bed.has_vm() {
        return;
    }
    let scratch = bed.scratch();
    let disk = LoopDevice::new(&bed, scratch.file("disk"), 8);
    attack_in(&bed, "blk", 2, &["--device", disk.path()]);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_console() {
    attack("console", 3, &[]);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_entropy_source() {
    attack("rng", 4, &[]);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_balloon() {
    attack("balloon", 5, &[]);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_sockets() {
    attack("vsock", 19, &[]);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_plugged_memory() {
    attack("mem", MEM, &[]);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_file_server() {
    attack("fs", 26, &[]);
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_guests_image() {
    attack("pmem", 27, &[]);
}
