//! System calls that each kind of thread may make; any other ends the process.
//!
//! Filters are by number, and by argument where one call can do very different things (ioctl, prctl,
//! socket). A call that is not allowed is named on stderr before the process dies with the status of
//! an internal error ([`sepal_log::forbidden`]), so that a missing entry is found at once.

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::ioctls;
use crate::virtio::device::DeviceType;

/// What happens at a system call that is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Action {
    /// The process ends.
    Kill,
    /// The kernel's audit log names it and it is made.
    Log,
    /// There are no filters.
    Off,
}

/// Kinds of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// The main thread once the VM runs.
    Control,
    /// A vCPU.
    Vcpu,
    /// The thread that starts and stops devices, and so may do what any of them may.
    Launcher,
    /// A device's worker.
    Device(DeviceType),
}

static ACTION: OnceLock<Action> = OnceLock::new();

/// Decides for the whole process; without it there are no filters. Only the first call counts.
pub fn choose(action: Action) {
    let _ = ACTION.set(action);
}

/// Every thread: memory, locks, time, its own end, writing to what it has.
const EVERY: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    // The log, when it is full.
    libc::SYS_ftruncate,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// vCPUs: KVM, wiring interrupts and doorbells, and the console's file for the early console.
const VCPU: &[i64] = &[
    libc::SYS_fcntl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
];

/// The control thread: its clients, the files and sockets of hot-plugged devices.
const CONTROL: &[i64] = &[
    libc::SYS_fcntl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_accept4,
    libc::SYS_getsockopt,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_lseek,
    // Configuration space of what is plugged.
    libc::SYS_pwrite64,
    // The container's root as ours.
    libc::SYS_fchdir,
    libc::SYS_chroot,
    libc::SYS_capset,
    // At the end: the sockets that it listened at.
    libc::SYS_unlink,
];

/// What starts a worker.
const LAUNCHER: &[i64] = &[
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_seccomp,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    // Each thread gives up what it does not have, too.
    libc::SYS_capset,
    // A vsock device that is dropped takes its socket with it.
    libc::SYS_unlink,
];

/// Every worker: events, and the descriptors that it was given.
const WORKER: &[i64] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_readv,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_timerfd_settime,
];

/// What a device's worker needs besides.
fn calls_of_device(device: DeviceType) -> &'static [i64] {
    match device {
        DeviceType::Console => &[libc::SYS_pwrite64, libc::SYS_pread64],
        DeviceType::Block => &[
            libc::SYS_preadv,
            libc::SYS_pwritev,
            libc::SYS_preadv2,
            libc::SYS_pwritev2,
            libc::SYS_pread64,
            libc::SYS_pwrite64,
            libc::SYS_fsync,
            libc::SYS_fdatasync,
            libc::SYS_fallocate,
            libc::SYS_fstat,
            libc::SYS_lseek,
        ],
        DeviceType::Vsock => &[
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_accept4,
            libc::SYS_shutdown,
            libc::SYS_recvfrom,
            libc::SYS_sendto,
            libc::SYS_recvmsg,
            libc::SYS_sendmsg,
            libc::SYS_getsockopt,
            libc::SYS_setsockopt,
        ],
        DeviceType::Balloon | DeviceType::Mem => &[libc::SYS_fallocate],
        DeviceType::Fs => &[libc::SYS_recvmsg, libc::SYS_sendmsg],
        DeviceType::Net | DeviceType::Rng | DeviceType::Pmem => &[],
    }
}

/// Every device there is.
const DEVICES: [DeviceType; 9] = [
    DeviceType::Net,
    DeviceType::Block,
    DeviceType::Console,
    DeviceType::Rng,
    DeviceType::Balloon,
    DeviceType::Vsock,
    DeviceType::Mem,
    DeviceType::Fs,
    DeviceType::Pmem,
];

fn calls_of(thread: Thread) -> Vec<i64> {
    let mut calls = EVERY.to_vec();
    match thread {
        Thread::Control => calls.extend(CONTROL),
        Thread::Vcpu => calls.extend(VCPU),
        Thread::Launcher => {
            calls.extend(LAUNCHER.iter().chain(WORKER));
            DEVICES
                .iter()
                .for_each(|device| calls.extend(calls_of_device(*device)));
        }
        Thread::Device(device) => calls.extend(WORKER.iter().chain(calls_of_device(device))),
    }
    calls
}

const fn ioctls_of(thread: Thread) -> &'static [&'static [u64]] {
    match thread {
        Thread::Control => ioctls::CONTROL,
        Thread::Vcpu => ioctls::VCPU,
        Thread::Launcher => ioctls::LAUNCHER,
        Thread::Device(DeviceType::Net) => ioctls::NETWORK,
        Thread::Device(_) => ioctls::WORKER,
    }
}

type Rule = Result<SeccompRule, seccompiler::BackendError>;

/// `value` is the only allowed value of the low 32 bits of argument `index`.
fn only(index: u8, value: u64) -> Rule {
    argument(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

/// `value` is the only allowed value of these bits of the low 32 of argument `index`.
fn bits(index: u8, mask: i32, value: i32) -> Rule {
    let op = SeccompCmpOp::MaskedEq(mask as u64);
    argument(index, SeccompCmpArgLen::Dword, op, value as u64)
}

fn argument(index: u8, length: SeccompCmpArgLen, op: SeccompCmpOp, value: u64) -> Rule {
    SeccompRule::new(vec![SeccompCondition::new(index, length, op, value)?])
}

/// Answers ENOSYS to clone3(2), whose arguments cannot be seen: the C library does without, and of two
/// filters the stricter counts.
fn without_clone3() -> Result<BpfProgram, seccompiler::BackendError> {
    let filter = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        TargetArch::x86_64,
    )?;
    filter.try_into()
}

fn program(thread: Thread, action: Action) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = calls_of(thread)
        .into_iter()
        .map(|call| (call, Vec::new()))
        .collect();
    rules.insert(
        libc::SYS_prctl,
        vec![
            only(0, libc::PR_SET_NAME as u64)?,
            only(0, libc::PR_SET_NO_NEW_PRIVS as u64)?,
            only(0, libc::PR_SET_SECCOMP as u64)?,
            // glibc names its anonymous mappings.
            only(0, libc::PR_SET_VMA as u64)?,
        ],
    );
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![bits(2, libc::PROT_EXEC, 0)?]);
    }
    // A panic or abort of ours must be able to end the process with its own signal.
    let own_process = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![only(0, own_process)?]);
    if thread == Thread::Launcher {
        // Threads, and no processes.
        let thread = bits(0, libc::CLONE_THREAD, libc::CLONE_THREAD)?;
        rules.insert(libc::SYS_clone, vec![thread]);
        rules.insert(libc::SYS_clone3, Vec::new());
        // The size of a thread's stack is asked for; no limit is set.
        let asked = argument(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
        rules.insert(libc::SYS_prlimit64, vec![asked]);
    }
    let requests = ioctls_of(thread).iter().copied().flatten();
    let requests = requests.map(|request| only(1, *request));
    rules.insert(libc::SYS_ioctl, requests.collect::<Result<_, _>>()?);
    if let Some(socket) = rules.get_mut(&libc::SYS_socket) {
        socket.push(only(0, libc::AF_UNIX as u64)?);
    }
    let mismatch = match action {
        Action::Log => SeccompAction::Log,
        Action::Kill | Action::Off => SeccompAction::Trap,
    };
    let filter = SeccompFilter::new(rules, mismatch, SeccompAction::Allow, TargetArch::x86_64)?;
    filter.try_into()
}

/// Confines the calling thread, for good.
///
/// # Errors
/// The kernel has no seccomp filters.
pub fn confine(thread: Thread) -> io::Result<()> {
    let action = ACTION.get().copied().unwrap_or(Action::Off);
    if action == Action::Off {
        return Ok(());
    }
    let mut programs = vec![program(thread, action).map_err(io::Error::other)?];
    if thread == Thread::Launcher && action == Action::Kill {
        // First: those of workers leave no call to install another.
        programs.insert(0, without_clone3().map_err(io::Error::other)?);
    }
    programs
        .iter()
        .try_for_each(|program| seccompiler::apply_filter(program).map_err(io::Error::other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_thread_has_a_filter_that_compiles() {
        let kinds = [Thread::Control, Thread::Vcpu, Thread::Launcher];
        for kind in kinds.into_iter().chain(DEVICES.map(Thread::Device)) {
            assert!(!program(kind, Action::Kill).unwrap().is_empty());
            assert!(!calls_of(kind).contains(&libc::SYS_execve));
            assert!(!calls_of(kind).contains(&libc::SYS_openat));
        }
    }

    /// With a network there were enough buffers for the C library to shrink a heap, for which it
    /// reads a file of /proc.
    #[test]
    fn threads_allocate_and_free_without_a_call_that_is_not_allowed() {
        crate::sys::share_one_heap();
        let all_started = std::sync::Barrier::new(24);
        std::thread::scope(|scope| {
            for _ in 0..24 {
                scope.spawn(|| {
                    let program = program(Thread::Vcpu, Action::Kill).unwrap();
                    seccompiler::apply_filter(&program).unwrap();
                    let held: Vec<_> = (0..400)
                        .map(|round| vec![1_u8; 64 << (round % 12)])
                        .collect();
                    all_started.wait();
                    drop(held);
                });
            }
        });
    }
}
