//! The system calls that neither the standard library nor nix wraps.
//!
//! The agent's only `unsafe` code. Every wrapper checks what it hands to the kernel itself.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::devices::Instruction;

/// Runs `child` in a forked process and answers the process's id to the caller.
///
/// The child starts with no blocked signals and with no descriptor but 0, 1, 2 and those of `keep`.
/// It ends with what `child` returns as its exit status, without running the caller's destructors
/// or exit handlers.
///
/// # Errors
/// Whatever fork(2) fails with, and `EDEADLK` when the caller has more than one thread: a lock that
/// another thread holds would stay locked in the child forever.
pub fn fork(keep: &[RawFd], child: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: `run_child` has checked that the process has a single thread, so that the child finds
    // every lock and the allocator in a consistent state; it never returns into the caller's frames.
    run_child(keep, || unsafe { libc::fork() }, child)
}

/// As [`fork`], and the child is the first process of a PID namespace of its own.
///
/// # Errors
/// As [`fork`], and those of clone(2).
pub fn fork_pid_namespace(keep: &[RawFd], child: impl FnOnce() -> i32) -> io::Result<i32> {
    let flags = libc::c_long::from(libc::CLONE_NEWPID | libc::SIGCHLD);
    let clone = || {
        // SAFETY: without CLONE_VM and a stack of its own this is fork(2), and what is said there
        // holds; what the C library does around its own fork is about locks of other threads.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        i32::try_from(pid).unwrap_or(-1)
    };
    run_child(keep, clone, child)
}

fn run_child(
    keep: &[RawFd],
    fork: impl FnOnce() -> i32,
    child: impl FnOnce() -> i32,
) -> io::Result<i32> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(Errno::EDEADLK.into());
    }
    match fork() {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let mask = nix::sys::signal::sigprocmask(
                SigmaskHow::SIG_SETMASK,
                Some(&SigSet::empty()),
                None,
            );
            let status = match mask.map_err(io::Error::from).and(close_all_but(keep)) {
                Ok(()) => child(),
                Err(_) => 125,
            };
            // SAFETY: _exit(2) ends the process, there is nothing it could invalidate.
            unsafe { libc::_exit(status) }
        }
        pid => Ok(pid),
    }
}

/// Closes every descriptor above 2 that is not in `keep`.
fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep
        .iter()
        .filter_map(|fd| u32::try_from(*fd).ok())
        .collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = first.max(fd + 1);
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: only descriptors are closed; the one caller is a forked child that owns its table and
    // uses no descriptor object of its parent but those it was told to keep.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives up all capabilities of the calling thread.
///
/// # Errors
/// Those of capset(2).
pub fn drop_capabilities() -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`: two words for each of the three sets.
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let sets = [0_u32; 6];
    // SAFETY: header and sets have the layout that version 3 of capset(2) reads, and outlive the
    // call; pid 0 is the calling thread.
    let done = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Gives a signal its default action. Rust's start-up code ignores SIGPIPE, and a program inherits
/// ignored signals through execve(2).
///
/// # Errors
/// Those of sigaction(2).
pub fn reset_signal(signal: Signal) -> nix::Result<()> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action runs no code of ours.
    unsafe { sigaction(signal, &default) }.map(drop)
}

/// Opens `path` with `root` as its root directory: symbolic links and `..` cannot lead out of it,
/// and links of procfs that jump ("magic links") are refused.
///
/// # Errors
/// Those of openat2(2).
pub fn open_in_root(root: BorrowedFd<'_>, path: &Path, flags: i32) -> io::Result<OwnedFd> {
    let resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    open_resolved(root, path, flags, resolve)
}

/// As [`open_in_root`] for a path without any symbolic link in it.
///
/// # Errors
/// Those of openat2(2).
pub fn open_without_links(root: BorrowedFd<'_>, path: &Path, flags: i32) -> io::Result<OwnedFd> {
    let resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_SYMLINKS;
    open_resolved(root, path, flags, resolve)
}

fn open_resolved(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: i32,
    resolve: u64,
) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `open_how` is a plain structure of integers, for which zero is valid.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.resolve = resolve;
    // SAFETY: `path` is NUL-terminated and `how` has the size that is passed; both outlive the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            root.as_raw_fd(),
            path.as_ptr(),
            &raw mut how,
            size_of::<libc::open_how>(),
        )
    };
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EOVERFLOW)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets the size of a terminal in characters, through either of its ends.
///
/// # Errors
/// Those of ioctl(2).
pub fn set_window_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one `winsize`, which outlives the call.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
}

/// Opens the process's side of a pseudo-terminal, given the master's.
///
/// # Errors
/// Those of ioctl(2), `ENOTTY` for what is no master.
pub fn terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes flags by value and makes a new descriptor.
    let fd = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    check(fd)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a terminal on descriptor 0 the controlling one of the calling session leader.
///
/// # Errors
/// Those of ioctl(2).
pub fn take_controlling_terminal() -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer by value.
    check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })
}

/// Brings the loopback interface up.
///
/// # Errors
/// Those of socket(2) and ioctl(2).
pub fn loopback_up() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(
        AddressFamily::Unix,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: `ifreq` is a plain structure, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one `ifreq`, which outlives the call.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw mut request,
        )
    })
}

/// Adds `offset_ns` nanoseconds to CLOCK_REALTIME, atomically with respect to its own ticking.
///
/// # Errors
/// Those of clock_adjtime(2).
pub fn shift_realtime(offset_ns: i64) -> io::Result<()> {
    // SAFETY: `timex` is a plain structure of integers, for which zero is valid.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
    change.time.tv_sec = offset_ns.div_euclid(1_000_000_000);
    // With ADJ_NANO this field holds nanoseconds; it has to be positive.
    change.time.tv_usec = offset_ns.rem_euclid(1_000_000_000);
    // SAFETY: the kernel reads and writes one `timex`, which outlives the call.
    check(unsafe { libc::clock_adjtime(libc::CLOCK_REALTIME, &raw mut change) })
}

/// Nanoseconds since the epoch by a PTP hardware clock, as opened from `/dev/ptp0`.
///
/// # Errors
/// Those of clock_gettime(2).
pub fn ptp_time_ns(ptp: BorrowedFd<'_>) -> io::Result<i64> {
    // FD_TO_CLOCKID of clock_gettime(2), "Dynamic clocks".
    let clock = (!ptp.as_raw_fd() << 3) | 3;
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one `timespec`, which outlives the call.
    check(unsafe { libc::clock_gettime(clock, &raw mut now) })?;
    Ok(now
        .tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec))
}

/// Accepts a connection, close-on-exec and non-blocking.
///
/// # Errors
/// Those of accept(2).
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use nix::sys::socket::{SockFlag, accept4};
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Receives, without waiting, one packet and at most one descriptor with it, made close-on-exec.
///
/// # Errors
/// Those of recvmsg(2).
pub fn receive_fd(socket: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut text = [0; 256];
    let mut parts = [io::IoSliceMut::new(&mut text)];
    let mut control = nix::cmsg_space!([RawFd; 4]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let mut received = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            for fd in fds {
                // SAFETY: the kernel has just put this descriptor into our table; those beyond the
                // first are closed by being dropped.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                received.get_or_insert(fd);
            }
        }
    }
    Ok(received)
}

/// Loads a device program and puts it on a cgroup.
///
/// # Errors
/// Those of bpf(2), `EINVAL` or `EACCES` where the verifier refuses the program.
pub fn attach_device_program(cgroup: &Path, program: &[Instruction]) -> io::Result<()> {
    // Commands and constants of include/uapi/linux/bpf.h.
    const PROG_LOAD: i32 = 5;
    const PROG_ATTACH: i32 = 8;
    const TYPE_CGROUP_DEVICE: u32 = 15;
    const CGROUP_DEVICE: u32 = 6;
    const ALLOW_MULTI: u32 = 2;
    #[repr(C)]
    struct Load {
        prog_type: u32,
        instructions: u32,
        program: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
    }
    #[repr(C)]
    struct Attach {
        target: i32,
        program: i32,
        kind: u32,
        flags: u32,
    }

    let directory = std::fs::File::open(cgroup)?;
    let license = c"Apache-2.0";
    let load = Load {
        prog_type: TYPE_CGROUP_DEVICE,
        instructions: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        program: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads `load`, as many instructions as it says, and the NUL-terminated
    // licence; all of them outlive the call. `Instruction` has the layout of `struct bpf_insn`.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let loaded =
        unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).map_err(|_| Errno::EOVERFLOW)?) };
    let attach = Attach {
        target: directory.as_raw_fd(),
        program: loaded.as_raw_fd(),
        kind: CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    // SAFETY: the kernel reads `attach`, which outlives the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_ATTACH,
            &raw const attach,
            size_of::<Attach>(),
        )
    };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Watches a descriptor of our own by the runtime.
///
/// # Errors
/// When epoll(7) does not take it.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` answers the same open descriptor for as long as it lives.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// A set of signals by their numbers; nix knows no real-time signals.
///
/// # Errors
/// `EINVAL` for what is not a signal.
pub fn signal_set(signals: &[i32]) -> io::Result<SigSet> {
    let mut set = *SigSet::empty().as_ref();
    for signal in signals {
        // SAFETY: sigaddset(3) changes the set it is given, and refuses what is not a signal.
        check(unsafe { libc::sigaddset(&raw mut set, *signal) })?;
    }
    // SAFETY: the set has been made by sigemptyset(3) and sigaddset(3).
    Ok(unsafe { SigSet::from_sigset_t_unchecked(set) })
}

/// Sends a signal by number to one process; nix knows no real-time signals.
///
/// # Errors
/// Those of kill(2), and `EINVAL` for what is not the id of one process.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    if pid <= 0 {
        return Err(Errno::EINVAL.into());
    }
    // SAFETY: kill(2) takes two integers and touches no memory of ours.
    check(unsafe { libc::kill(pid, signal) })
}

/// Collects one ended child: its process id, and its exit status as a shell would give it
/// (128 + signal for a death by signal). `None` when no child has ended.
///
/// nix's wrapper cannot tell of a death by a real-time signal: it collects the child and drops it.
///
/// # Errors
/// Those of waitpid(2), but not `ECHILD`, which is `None`.
pub fn wait_any() -> io::Result<Option<(i32, u32)>> {
    let mut status = 0;
    // SAFETY: the kernel writes one integer, which outlives the call.
    match unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) } {
        0 => Ok(None),
        -1 => match Errno::last() {
            Errno::ECHILD => Ok(None),
            error => Err(error.into()),
        },
        pid if libc::WIFSIGNALED(status) => Ok(Some((pid, 128 + libc::WTERMSIG(status) as u32))),
        pid => Ok(Some((pid, libc::WEXITSTATUS(status) as u32))),
    }
}

/// Lets forked children keep the program's mapped pages.
///
/// The kernel leaves page tables of file mappings out of a fork, since a fault can bring the pages
/// back, unless one page of the mapping is private already (`vma_needs_copy` in mm/memory.c). Where
/// faults are dear (20 to 100 µs in a guest without hardware virtualization, and each process of a
/// container meets some 60 of them) it pays to make one so: the first page of each mapping.
///
/// # Errors
/// Those of mprotect(2), and of reading /proc/self/maps.
pub fn keep_pages_over_fork() -> io::Result<()> {
    let program = std::fs::read_link("/proc/self/exe")?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else {
            continue;
        };
        if !line.ends_with(&*program.to_string_lossy()) || rights.contains('w') {
            continue;
        }
        let mut ends = range.split('-').map(|end| usize::from_str_radix(end, 16));
        let (Some(Ok(start)), Some(Ok(end))) = (ends.next(), ends.next()) else {
            continue;
        };
        let usual = if rights.contains('x') {
            libc::PROT_READ | libc::PROT_EXEC
        } else {
            libc::PROT_READ
        };
        let address = start as *mut libc::c_void;
        // SAFETY: the range is one mapping of this program's own file, by the kernel's word; it
        // keeps the rights it has and gets writing on top while this single thread runs here.
        check(unsafe { libc::mprotect(address, end - start, usual | libc::PROT_WRITE) })?;
        let byte = address.cast::<u8>();
        // SAFETY: the byte is mapped and writable now, and gets the value that it has.
        unsafe { byte.write_volatile(byte.read_volatile()) };
        // SAFETY: as above; the mapping gets its own rights back.
        check(unsafe { libc::mprotect(address, end - start, usual) })?;
    }
    Ok(())
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn links_stay_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/../../etc/passwd", dir.path().join("up")).unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/passwd"), "inside").unwrap();
        let root = OwnedFd::from(std::fs::File::open(dir.path()).unwrap());
        let fd = open_in_root(root.as_fd(), Path::new("/up"), libc::O_RDONLY).unwrap();
        assert_eq!(
            io::read_to_string(std::fs::File::from(fd)).unwrap(),
            "inside"
        );
    }

    #[test]
    fn window_size_needs_a_terminal() {
        let file = tempfile::tempfile().unwrap();
        let error = set_window_size(file.as_fd(), 24, 80).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }
}
