//! Linux boots, runs on all its CPUs, pauses, and ends in each of its ways.

use std::os::fd::AsRawFd;
use std::time::Duration;

use super::guest::{Vmm, init, initramfs, reboot};
use sepal_protocol::control::{Request, Response};
use sepal_protocol::vm::{BlkSpec, CpuSpec, ExitCause, FdIndex};

const POWER_OFF: u32 = 0x4321_fedc;
const RESTART: u32 = 0x0123_4567;

/// Boots Linux with a PID 1 that says "hello" and goes on with `then`; `None` without a kernel.
fn boot(then: &[u8], change: impl FnOnce(&mut sepal_protocol::vm::VmSpec)) -> Option<Vmm> {
    let kernel = super::guest::linux()?;
    let vmm = Vmm::spawn();
    let mut spec = vmm.spec(kernel);
    spec.initrd = Some(vmm.file("initramfs", &initramfs(&init("hello\n", then))));
    change(&mut spec);
    vmm.boot(spec);
    Some(vmm)
}

#[test]
fn linux_says_hello_and_powers_off() {
    let Some(mut vmm) = boot(&reboot(POWER_OFF), |_| {}) else {
        return;
    };
    assert_eq!(vmm.wait(), ExitCause::PowerOff);
    assert!(vmm.console().contains("hello"), "{}", vmm.console());
}

#[test]
fn a_reboot_ends_the_vm() {
    let Some(mut vmm) = boot(&reboot(RESTART), |_| {}) else {
        return;
    };
    assert_eq!(vmm.wait(), ExitCause::Reboot);
}

#[test]
fn a_panic_is_told_with_its_last_words() {
    let Some(mut vmm) = boot(&super::guest::exit(), |_| {}) else {
        return;
    };
    assert_eq!(vmm.wait(), ExitCause::GuestPanic);
    assert!(
        vmm.console().contains("Attempted to kill init"),
        "{}",
        vmm.console()
    );
}

#[test]
fn all_cpus_come_up() {
    let change = |spec: &mut sepal_protocol::vm::VmSpec| {
        spec.cpus = CpuSpec { boot: 2, max: 3 };
        // The kernel tells of its CPUs long before hvc0 is there.
        spec.early_console = true;
        spec.cmdline += " loglevel=7";
    };
    let Some(mut vmm) = boot(&reboot(POWER_OFF), change) else {
        return;
    };
    assert_eq!(vmm.wait(), ExitCause::PowerOff);
    assert!(
        vmm.console().contains("Brought up 1 node, 2 CPUs"),
        "{}",
        vmm.console()
    );
}

#[test]
fn a_paused_guest_stands_still() {
    let Some(mut vmm) = boot(&super::guest::sleep(), |_| {}) else {
        return;
    };
    vmm.expect("hello\r\nhello");
    assert_eq!(vmm.ask(&Request::Pause), Response::Ok);
    // What was on its way to the file when the vCPUs stopped has arrived after this.
    std::thread::sleep(Duration::from_millis(300));
    let before = vmm.console().len();
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(vmm.console().len(), before);
    assert_eq!(vmm.ask(&Request::Resume), Response::Ok);
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while vmm.console().len() < before + 20 {
        assert!(std::time::Instant::now() < end, "it does not go on");
        std::thread::sleep(Duration::from_millis(10));
    }
    let Response::State(state) = vmm.ask(&Request::State) else {
        panic!("no state")
    };
    assert!(state.console_tail.iter().any(|line| line.contains("hello")));
    assert_eq!(vmm.ask(&Request::Quit), Response::Ok);
    assert_eq!(vmm.wait(), ExitCause::PowerOff);
}

#[test]
fn the_early_console_speaks_from_the_first_line_on() {
    let early = |spec: &mut sepal_protocol::vm::VmSpec| {
        spec.early_console = true;
        spec.cmdline += " loglevel=7";
    };
    let Some(mut vmm) = boot(&reboot(POWER_OFF), early) else {
        return;
    };
    assert_eq!(vmm.wait(), ExitCause::PowerOff);
    assert!(vmm.console().contains("Linux version"), "{}", vmm.console());
}

#[test]
fn a_block_device_comes_and_goes_while_linux_runs() {
    let change = |spec: &mut sepal_protocol::vm::VmSpec| spec.cmdline += " loglevel=7";
    let Some(mut vmm) = boot(&super::guest::sleep(), change) else {
        return;
    };
    vmm.expect("hello");
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(8 << 20).unwrap();
    let spec = BlkSpec {
        id: "disk".into(),
        serial: "sepal-test".into(),
        file: FdIndex(0),
        read_only: false,
    };
    let request = Request::AddBlk(spec);
    assert_eq!(vmm.ask_with(&request, &[disk.as_raw_fd()]), Response::Ok);
    vmm.expect("[vda] 16384 512-byte logical blocks");
    let again = vmm.ask_with(&request, &[disk.as_raw_fd()]);
    assert!(matches!(again, Response::Error { .. }), "{again:?}");

    let remove = Request::RemoveDevice { id: "disk".into() };
    assert_eq!(vmm.ask(&remove), Response::Ok);
    let Response::State(state) = vmm.ask(&Request::State) else {
        panic!("no state")
    };
    assert!(state.devices.is_empty(), "{:?}", state.devices);
    // The slot and the id are free again.
    assert_eq!(vmm.ask_with(&request, &[disk.as_raw_fd()]), Response::Ok);
    assert_eq!(vmm.ask(&Request::Quit), Response::Ok);
    assert_eq!(vmm.wait(), ExitCause::PowerOff);
}

#[test]
fn the_power_button_reaches_pid_1() {
    /// CONFIG_ACPI_TINY_POWER_BUTTON_SIGNAL of our kernels.
    const POWER_BUTTON: u8 = 38;
    let then = [
        super::guest::wait_for_signal(POWER_BUTTON),
        reboot(POWER_OFF),
    ]
    .concat();
    let Some(mut vmm) = boot(&then, |_| {}) else {
        return;
    };
    vmm.expect("hello");
    // Before PID 1 has blocked the signal it would be lost.
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(vmm.ask(&Request::PowerButton), Response::Ok);
    assert_eq!(vmm.wait(), ExitCause::PowerOff);
}
