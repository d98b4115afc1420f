//! A machine that changes its size while it runs.

use std::time::{Duration, Instant};

use super::guest::{Vmm, bare, init, initramfs, kvm, linux, sleep};
use sepal_protocol::control::{Request, Response, VmState};
use sepal_protocol::vm::{CpuSpec, ExitCause, VmSpec};

const MIB: u64 = 1 << 20;

fn state(vmm: &Vmm) -> VmState {
    match vmm.ask(&Request::State) {
        Response::State(state) => state,
        other => panic!("{other:?}"),
    }
}

/// Boots a guest that does nothing, on a CPU without Linux.
fn bare_vmm(change: impl FnOnce(&mut VmSpec)) -> Vmm {
    let vmm = Vmm::spawn();
    let mut spec = vmm.spec(vmm.file("kernel", &bare(&[])));
    change(&mut spec);
    vmm.boot(spec);
    vmm
}

fn await_state(vmm: &Vmm, what: &str, done: impl Fn(&VmState) -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let state = state(vmm);
        if done(&state) {
            return;
        }
        assert!(Instant::now() < end, "{what}: {state:?}\n{}", vmm.console());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn linux_plugs_memory_and_lets_go_of_it() {
    let Some(kernel) = linux() else { return };
    let mut vmm = Vmm::spawn();
    let mut spec = vmm.spec(kernel);
    spec.initrd = Some(vmm.file("initramfs", &initramfs(&init("hello\n", &sleep()))));
    spec.memory.max = 1280 * MIB;
    vmm.boot(spec);
    vmm.expect("hello");
    assert_eq!(state(&vmm).pluggable, 1024 * MIB);
    // Its kernel may have put something of its own into a few blocks.
    const KEPT: u64 = 32 * MIB;
    for size in [320, 1024, 64, 0, 130].map(|size| size * MIB) {
        assert_eq!(vmm.ask(&Request::PlugMemory { size }), Response::Ok);
        let done = |state: &VmState| (size..=size + KEPT).contains(&state.plugged);
        await_state(&vmm, "plugged", done);
    }
    // The balloon takes of all memory, and gives it back.
    for size in [200, 0].map(|size| size * MIB) {
        assert_eq!(vmm.ask(&Request::Balloon { size }), Response::Ok);
        await_state(&vmm, "in the balloon", |state| state.balloon == size);
    }
    assert!(state(&vmm).devices.is_empty(), "it cannot be unplugged");
    assert_eq!(vmm.ask(&Request::Quit), Response::Ok);
    assert_eq!(vmm.wait(), ExitCause::PowerOff);
}

#[test]
fn memory_that_cannot_be_added_is_refused_in_a_sentence() {
    if !kvm() {
        return;
    }
    let vmm = bare_vmm(|spec| spec.memory.max = 512 * MIB);
    for size in [256 * MIB + (2 << 20), MIB, u64::MAX] {
        let Response::Error { message } = vmm.ask(&Request::PlugMemory { size }) else {
            panic!("{size} bytes were added")
        };
        assert!(message.contains("up to 256 MiB"), "{message}");
    }
    // Nobody is there to plug it: it is only asked for, and asked again.
    let size = 128 * MIB;
    assert_eq!(vmm.ask(&Request::PlugMemory { size }), Response::Ok);
    let again = vmm.ask(&Request::PlugMemory { size });
    assert!(matches!(again, Response::Error { .. }), "{again:?}");
    assert_eq!(state(&vmm).plugged, 0);

    let vmm = bare_vmm(|_| {});
    assert_eq!(state(&vmm).pluggable, 0);
    assert_eq!(vmm.ask(&Request::PlugMemory { size: 0 }), Response::Ok);
    let more = vmm.ask(&Request::PlugMemory { size });
    assert!(matches!(more, Response::Error { .. }), "{more:?}");
}

#[test]
fn cpus_are_made_when_they_are_asked_for() {
    if !kvm() {
        return;
    }
    let mut vmm = bare_vmm(|spec| spec.cpus = CpuSpec { boot: 1, max: 3 });
    assert_eq!(state(&vmm).cpus, 1);
    assert_eq!(vmm.ask(&Request::AddCpus { count: 2 }), Response::Ok);
    assert_eq!(vmm.ask(&Request::AddCpus { count: 1 }), Response::Ok);
    assert_eq!(state(&vmm).cpus, 2);
    assert_eq!(vmm.ask(&Request::Pause), Response::Ok);
    assert_eq!(vmm.ask(&Request::AddCpus { count: 3 }), Response::Ok);
    assert!(!state(&vmm).running);
    assert_eq!(vmm.ask(&Request::Resume), Response::Ok);
    let Response::Error { message } = vmm.ask(&Request::AddCpus { count: 4 }) else {
        panic!("a fourth CPU")
    };
    assert!(message.contains("at most 3"), "{message}");
    assert_eq!(state(&vmm).cpus, 3);
    assert_eq!(vmm.ask(&Request::Quit), Response::Ok);
    assert_eq!(vmm.wait(), ExitCause::PowerOff);
}
