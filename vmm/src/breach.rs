//! A hole, on purpose: an attacker's system calls in a thread that has confined itself, as if the guest
//! had taken it over. In no program but the one that `tests/breach.rs` is built with (feature `breach`).
//!
//! `SEPAL_BREACH=THREAD:ATTEMPT` chooses.

use libc::c_long;
use sepal_breach::{Attempt, HOST, any_descriptor, both, filter, go, open, wanted};

use crate::seccomp::Thread;
use crate::virtio::device::DeviceType;

/// Threads that read what a guest has written, by their names; and the one that has the most rights, whose
/// memory they share.
pub const THREADS: [(&str, Thread); 6] = [
    ("control", Thread::Control),
    ("vcpu", Thread::Vcpu),
    ("launcher", Thread::Launcher),
    ("console", Thread::Device(DeviceType::Console)),
    ("vsock", Thread::Device(DeviceType::Vsock)),
    ("balloon", Thread::Device(DeviceType::Balloon)),
];

/// What is tried beside what every program is tried with.
const OF_A_VMM: &[Attempt] = &[
    both("list-root", |_| {
        open(c"/", libc::O_RDONLY | libc::O_DIRECTORY)
    }),
    filter("new-machine", |_| {
        // KVM_CREATE_VM.
        any_descriptor(0xae01, 0)
    }),
    filter("take-a-tap", |_| {
        // TUNSETIFF: struct ifreq is 40 bytes.
        let request = [0_u64; 5];
        any_descriptor(0x4004_54ca, request.as_ptr() as c_long)
    }),
];

/// Everything that is tried.
pub const ATTEMPTS: [&[Attempt]; 2] = [HOST, OF_A_VMM];

/// Starts workers of devices, as their drivers would have done, and taken over at once. An attack is over when
/// this returns: once vCPUs run, a request to the descriptor of one waits until it leaves the guest.
pub fn start_workers() {
    for (name, thread) in THREADS {
        // The others confine themselves elsewhere.
        if matches!(thread, Thread::Device(_)) {
            let work = move || crate::jail::confine_thread(thread);
            let started = std::thread::Builder::new().name(name.into()).spawn(work);
            let _ = started.map(|worker| worker.join());
        }
    }
}

/// Tries what the environment says, if it is for this thread; does not return then.
pub fn open_up(thread: Thread) {
    let Some(wanted) = wanted() else {
        return;
    };
    let Some((who, what)) = wanted.split_once(':') else {
        return;
    };
    if THREADS.contains(&(who, thread)) {
        go(&ATTEMPTS, what)
    }
}
