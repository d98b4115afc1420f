//! The system calls that serving files takes. Any other ends the process: nothing in it has a
//! reason to make one, so whoever does is not us any more.
//!
//! No call here makes a socket, starts a program, signals or traces another process, or maps
//! executable memory; paths are open to every file call, but there is only the share.

use anyhow::Context;
use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

/// Exit status of a process that has made another call: that of its signal, as shells have it.
pub const FORBIDDEN: i32 = 128 + libc::SIGSYS;

/// Allowed with any arguments.
const PLAIN: &[c_long] = &[
    // Files by descriptor.
    libc::SYS_close,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_syncfs,
    libc::SYS_write,
    libc::SYS_writev,
    // Files by name below a descriptor. Handles tell of mounts, and are never opened.
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_name_to_handle_at,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    // Becoming the guest's user while a file is created.
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_setgroups,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    // The front end's socket, its eventfds.
    libc::SYS_accept4,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_getsockname,
    libc::SYS_poll,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    // Memory and threads.
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
];

/// prctl(2): naming a thread, naming memory (the C library does), looking at capabilities.
const PRCTL: [i32; 4] = [
    libc::PR_SET_NAME,
    libc::PR_SET_VMA,
    libc::PR_CAPBSET_READ,
    libc::PR_CAP_AMBIENT,
];

/// Installs the filter for this thread and all that it starts.
///
/// # Errors
/// The kernel has no seccomp filters.
pub fn install() -> anyhow::Result<()> {
    sepal_log::forbidden::install("sepal-fs", FORBIDDEN)
        .context("cannot handle forbidden system calls")?;
    // In this order: the second leaves no call to install another.
    let filters = program().and_then(|program| Ok([without_clone3()?, program]));
    for filter in filters.context("cannot build the filter of system calls")? {
        apply_filter(&filter).context("cannot install the filter of system calls")?;
    }
    Ok(())
}

/// Answers ENOSYS to clone3(2): of two filters the stricter counts.
fn without_clone3() -> anyhow::Result<BpfProgram> {
    let filter = SeccompFilter::new(
        [(libc::SYS_clone3, Vec::new())].into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}

fn program() -> anyhow::Result<BpfProgram> {
    let mut rules: Vec<(i64, Vec<SeccompRule>)> =
        PLAIN.iter().map(|&call| (call, Vec::new())).collect();
    let argument = |index, op, value| -> anyhow::Result<SeccompRule> {
        Ok(SeccompRule::new(vec![SeccompCondition::new(
            index,
            Len::Dword,
            op,
            value,
        )?])?)
    };
    let not_executable = Op::MaskedEq(libc::PROT_EXEC as u64);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.push((call, vec![argument(2, not_executable.clone(), 0)?]));
    }
    let prctl = PRCTL
        .iter()
        .map(|&option| argument(0, Op::Eq, option as u64));
    rules.push((libc::SYS_prctl, prctl.collect::<Result<_, _>>()?));
    // A working directory of its own for each request thread.
    let own_directory = argument(0, Op::Eq, libc::CLONE_FS as u64)?;
    rules.push((libc::SYS_unshare, vec![own_directory]));
    // Threads, and no processes. Of clone3(2) the arguments cannot be seen: it is not there, and the C
    // library does without.
    let thread = Op::MaskedEq(libc::CLONE_THREAD as u64);
    let thread = argument(0, thread, libc::CLONE_THREAD as u64)?;
    rules.push((libc::SYS_clone, vec![thread]));
    rules.push((libc::SYS_clone3, Vec::new()));
    // What becomes of a forbidden call stays as it is.
    let other = Op::Ne;
    let other = argument(0, other, libc::SIGSYS as u64)?;
    rules.push((libc::SYS_rt_sigaction, vec![other]));
    // abort(3).
    let own_process = u64::from(std::process::id());
    rules.push((libc::SYS_tgkill, vec![argument(0, Op::Eq, own_process)?]));

    let filter = SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}
