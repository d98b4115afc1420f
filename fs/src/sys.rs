//! The system calls that no crate wraps. The only `unsafe` code of this program.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::socket::{
    AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};

/// Takes over an inherited listening Unix stream socket.
///
/// # Errors
/// The descriptor is not open, or is anything else.
pub fn listener(fd: RawFd) -> io::Result<UnixListener> {
    if fd <= libc::STDERR_FILENO {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let family = getsockname::<SockaddrStorage>(fd)?.family();
    // SAFETY: the kernel has just answered for this descriptor, so it is open; it is ours by the
    // contract of --listen-fd, and nothing else in this process knows its number.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if family != Some(AddressFamily::Unix) || !getsockopt(&socket, sockopt::AcceptConn)? {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(socket.into())
}

/// Takes over an inherited descriptor.
///
/// # Errors
/// It is not open.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= libc::STDERR_FILENO || !is_open(fd) {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: it is open and ours by the contract of the option that names it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether this number is that of an open descriptor.
pub fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD only asks, and fails for a number that is none.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

/// A descriptor that becomes readable when the process that started this one ends
/// (pidfd_open(2)).
///
/// # Errors
/// The parent has ended already, or the kernel is older than 5.3.
pub fn parent() -> io::Result<OwnedFd> {
    // SAFETY: getppid and pidfd_open touch no memory of ours; the result is checked.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getppid(), 0) };
    owned(fd)
}

/// A private, detached copy of the mount tree at `path` (open_tree(2)): a directory with nothing
/// above it.
///
/// # Errors
/// What the kernel says; it must be 5.2 or newer.
pub fn detached_tree(path: &CStr) -> io::Result<File> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: `path` is a terminated string that outlives the call; the result is checked.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    owned(fd).map(File::from)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What statx(2) says about the mount that a directory is on.
pub struct MountOf {
    /// As in /proc/self/mountinfo.
    pub id: u64,
    /// The directory is the root of that mount.
    pub is_root: bool,
}

/// The mount of an open directory.
///
/// # Errors
/// What the kernel says; it must be 5.8 or newer to know mount ids.
pub fn mount_of(directory: &impl AsFd) -> io::Result<MountOf> {
    // SAFETY: statx is plain numbers, for which all zeroes are a value.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open while borrowed, the path is a terminated string, and `found`
    // is writable memory of the type that statx fills.
    let result = unsafe {
        libc::statx(
            directory.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_MNT_ID,
            &mut found,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if found.stx_mask & libc::STATX_MNT_ID == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let root = libc::STATX_ATTR_MOUNT_ROOT as u64;
    Ok(MountOf {
        id: found.stx_mnt_id,
        is_root: found.stx_attributes & root != 0,
    })
}

/// Makes an access to mapped memory that is not there end this process with a sentence: the front end maps
/// addresses by which the guest's memory may grow before there is memory behind them.
///
/// # Errors
/// sigaction(2).
pub fn install_bus_handler() -> io::Result<()> {
    let handler = SigHandler::Handler(on_bus_error);
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler is async-signal-safe (see there).
    unsafe { sigaction(Signal::SIGBUS, &action) }?;
    Ok(())
}

extern "C" fn on_bus_error(_signal: libc::c_int) {
    const TEXT: &[u8] =
        b"sepal-fs: memory that is mapped is not there: the guest had a request use \
        memory that it was not given\n";
    // SAFETY: write(2) and _exit(2) are async-signal-safe; the buffer is a constant.
    unsafe {
        libc::write(libc::STDERR_FILENO, TEXT.as_ptr().cast(), TEXT.len());
        libc::_exit(libc::EXIT_FAILURE);
    }
}
