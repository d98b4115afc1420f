//! Block devices of the host in a container: `--device`, which is what volumeDevices become.

use sepal_tests::{Bed, Container, LoopDevice, eventually, seconds};

/// `--device` for it, with these permissions.
fn device(disk: &LoopDevice<'_>, access: &str) -> String {
    format!("{}:/dev/xvda:{access}", disk.path())
}

fn start<'bed>(bed: &'bed Bed, device: &str) -> Container<'bed> {
    let options = ["--device", device];
    bed.nerdctl_start(&options, &bed.busybox(), &["sleep", "1000"])
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_block_device_is_written_through_to_the_host() {
    let bed = Bed::get();
    let scratch = bed.scratch();
    let disk = LoopDevice::new(&bed, scratch.file("disk"), 64);
    let container = start(&bed, &device(&disk, "rwm"));
    let size = container.sh("blockdev --getsz /dev/xvda");
    assert_eq!(size.success().out(), "131072", "sectors of 512 bytes");
    container
        .sh("dd if=/bin/busybox of=/dev/xvda bs=64k conv=fsync 2>/dev/null")
        .success();
    let inside = container.sh("sha256sum </bin/busybox").success().out();
    let outside = format!(
        "head -c {} {} | sha256sum",
        container.sh("stat -c %s -L /bin/busybox").success().out(),
        disk.file()
    );
    assert_eq!(bed.sh(&outside).run().success().out(), inside);
    // The device is free as soon as the container is gone.
    container.remove();
    eventually("the device is let go", seconds(20), || {
        let users = format!(
            "! ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q ' {}$'",
            disk.path()
        );
        bed.sh(&users).run().ok().then_some(())
    });
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_read_only_block_device_cannot_be_written() {
    let bed = Bed::get();
    let scratch = bed.scratch();
    let disk = LoopDevice::new(&bed, scratch.file("disk"), 8);
    bed.sh(&format!("echo precious >{}", disk.path()))
        .run()
        .success();
    let container = start(&bed, &device(&disk, "r"));
    assert_eq!(
        container.sh("head -c 8 /dev/xvda").success().out(),
        "precious"
    );
    container.sh("echo x >/dev/xvda").failure();
    if bed.has_vm() {
        let read_only = container
            .sh("grep -l . /sys/block/vd*/ro >/dev/null && cat /sys/block/vd*/ro | sort -u");
        assert_eq!(read_only.success().out(), "1", "the device is, too");
    }
    assert!(bed.read(disk.file()).starts_with("precious"));
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_privileged_container_does_not_get_the_hosts_disks() {
    let bed = Bed::get();
    if !bed.has_vm() {
        // runc's shares the host's kernel and has them.
        return;
    }
    let scratch = bed.scratch();
    let disk = LoopDevice::new(&bed, scratch.file("disk"), 8);
    let container = bed.nerdctl_start(&["--privileged"], &bed.busybox(), &["sleep", "1000"]);
    let name = disk.path().trim_start_matches("/dev/");
    let size = container.sh(&format!(
        "cat /sys/block/{name}/size 2>/dev/null || echo none"
    ));
    let size = size.success().out();
    assert!(size == "none" || size == "0", "{size}");
    container.sh("! ls /sys/block | grep -q '^vd'").success();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn a_device_that_is_gone_is_told_in_a_sentence() {
    let bed = Bed::get();
    if !bed.has_vm() {
        return;
    }
    let scratch = bed.scratch();
    let node = scratch.file("node");
    // A node without a device behind it.
    bed.command(["mknod", &node, "b", "4095", "77"])
        .run()
        .success();
    let option = format!("{node}:/dev/xvda");
    let run = bed.nerdctl_run(&["--device", &option], &bed.busybox(), &["true"]);
    let said = run.run().failure().err();
    assert!(
        said.contains("block device /dev/xvda: the host has no device 4095:77"),
        "{said}"
    );
}
