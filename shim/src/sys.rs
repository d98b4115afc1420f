//! System calls that no safe wrapper covers: processes by pidfd, detached mounts, taps.
//!
//! The shim's only `unsafe` code is here and in [`bpf`].

pub mod bpf;

use std::ffi::CString;
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Where a spawned program finds the first descriptor that it is given.
pub const INHERITED_FD: RawFd = 3;

/// The network namespace a program starts in.
#[derive(Debug, Clone, Copy)]
pub enum Netns<'a> {
    /// The shim's own.
    Same,
    /// A new, empty one.
    New,
    /// An existing one, by a descriptor of it or of a process in it (a pidfd).
    Join(BorrowedFd<'a>),
}

/// A child process, held by a descriptor that stays valid when its pid does not.
#[derive(Debug)]
pub struct Child {
    /// In the shim's PID namespace.
    pub pid: u32,
    /// Readable when the process has ended.
    pub pidfd: OwnedFd,
}

fn check(result: libc::c_long) -> Result<libc::c_long> {
    if result < 0 {
        Err(Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Most memory of its own that a shim may take, in bytes: many times what it needs, and nothing to a node.
/// A guest that finds a way to have it keep what it is sent ends its own pod with that.
const MOST_MEMORY: u64 = 256 << 20;

/// Limits the memory of this process (RLIMIT_DATA: heap and stacks). Programs do not inherit it, if they are
/// started by [`spawn`] or with [`unlimited`].
///
/// # Errors
/// What setrlimit(2) says.
pub fn limit_memory() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_DATA)?;
    Ok(setrlimit(
        Resource::RLIMIT_DATA,
        MOST_MEMORY.min(hard),
        hard,
    )?)
}

/// Starts a program without [`limit_memory`].
pub fn unlimited(command: &mut Command) {
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(|| {
            let (_, hard) = getrlimit(Resource::RLIMIT_DATA)?;
            Ok(setrlimit(Resource::RLIMIT_DATA, hard, hard)?)
        });
    }
}

/// How a program is spawned.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// It finds them as 3, 4, ... in this order, and gets no other, as all of the shim's are
    /// close-on-exec.
    pub inherited: &'a [BorrowedFd<'a>],
    /// Where it starts.
    pub netns: Netns<'a>,
    /// It is alone in a PID namespace of its own: nobody whom it could send a signal to.
    pub alone: bool,
    /// It is killed when the calling thread ends.
    pub dies_with_parent: bool,
    /// Takes its output; none: nothing does.
    pub log: Option<&'a File>,
}

/// Spawns a program.
///
/// # Errors
/// What fork, setns and exec say.
pub fn spawn(mut command: Command, spawn: &Spawn<'_>) -> Result<Child> {
    command.stdin(Stdio::null());
    unlimited(&mut command);
    for set in [Command::stdout, Command::stderr] {
        set(
            &mut command,
            match spawn.log {
                Some(file) => Stdio::from(file.try_clone()?),
                None => Stdio::null(),
            },
        );
    }
    // The standard library reports a failed exec through a pipe of its own. It must not be what
    // dup2 below replaces, so the wanted numbers are kept occupied while the pipe is made, and the
    // sources are moved out of their way.
    let last = INHERITED_FD + spawn.inherited.len() as RawFd - 1;
    let mut occupied = Vec::new();
    loop {
        let file = File::open("/dev/null")?;
        let done = file.as_raw_fd() > last;
        occupied.push(file);
        if done {
            break;
        }
    }
    let mut sources = Vec::new();
    for fd in spawn.inherited {
        let lowest = FcntlArg::F_DUPFD_CLOEXEC(last + 1);
        // SAFETY: the kernel has just made this descriptor for us.
        sources.push(unsafe { OwnedFd::from_raw_fd(fcntl(fd, lowest)?) });
    }
    let raw: Vec<RawFd> = sources.iter().map(AsRawFd::as_raw_fd).collect();
    let netns = match spawn.netns {
        Netns::Same => None,
        Netns::New => Some(None),
        Netns::Join(fd) => Some(Some(fd.as_raw_fd())),
    };
    // As a process in a namespace of its own sees one outside.
    let parent = if spawn.alone { 0 } else { std::process::id() };
    let dies = spawn.dies_with_parent;
    // SAFETY: between fork and exec the closure calls only async-signal-safe functions (dup2,
    // prctl, setns, unshare, getppid) and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            for (number, fd) in raw.iter().enumerate() {
                check(libc::dup2(*fd, INHERITED_FD + number as RawFd).into())?;
            }
            if dies {
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL).into())?;
                // The parent may have ended before the line above.
                if libc::getppid() as u32 != parent {
                    return Err(Error::from_raw_os_error(libc::ESRCH));
                }
            }
            match netns {
                None => {}
                Some(None) => unshare(CloneFlags::CLONE_NEWNET)?,
                // SAFETY: the caller holds the descriptor open across the fork.
                Some(Some(fd)) => setns(BorrowedFd::borrow_raw(fd), CloneFlags::CLONE_NEWNET)?,
            }
            Ok(())
        });
    }
    // A group of its own: a signal to the shim's group is not for it.
    command.process_group(0);
    let child = if spawn.alone {
        spawn_alone(&mut command)?
    } else {
        command.spawn()?
    };
    drop(occupied);
    let pid = child.id();
    Ok(Child {
        pid,
        pidfd: pidfd_open(pid)?,
    })
}

/// Spawns the first process of a new PID namespace.
fn spawn_alone(command: &mut Command) -> Result<std::process::Child> {
    let own = File::open("/proc/thread-self/ns/pid")?;
    // It concerns this thread's children alone, and until the next line but one.
    unshare(CloneFlags::CLONE_NEWPID)?;
    let child = command.spawn();
    setns(&own, CloneFlags::CLONE_NEWPID)?;
    child
}

/// pidfd_open(2), close-on-exec.
///
/// # Errors
/// ESRCH when there is no such process.
pub fn pidfd_open(pid: u32) -> Result<OwnedFd> {
    // SAFETY: no pointers; the returned descriptor is new and ours alone.
    unsafe {
        let fd = check(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// pidfd_send_signal(2).
///
/// # Errors
/// ESRCH when the process has ended.
pub fn pidfd_kill(pidfd: impl AsFd, signal: Signal) -> Result<()> {
    let fd = pidfd.as_fd().as_raw_fd();
    // SAFETY: a null siginfo is what kill(2) would send.
    unsafe {
        check(libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd,
            signal as libc::c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        ))?;
    }
    Ok(())
}

/// Takes the exit status of a child that has ended; none while it still runs.
///
/// # Errors
/// ECHILD when it is not a child or was waited for before.
pub fn reap(pidfd: impl AsFd) -> Result<Option<WaitStatus>> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
    match waitid(Id::PIDFd(pidfd.as_fd()), flags)? {
        WaitStatus::StillAlive => Ok(None),
        status => Ok(Some(status)),
    }
}

/// Runs `work` on a thread of its own inside a network namespace.
///
/// # Errors
/// setns failed, or the thread could not be made or has panicked.
pub fn in_netns<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T> {
    let enter = || setns(netns, CloneFlags::CLONE_NEWNET);
    aside("netns", enter, work)
}

/// Runs `work` on a thread of its own in the mount namespace of a process, whose root directory is
/// then the namespace's.
///
/// # Errors
/// The process has ended, or the thread could not be made or has panicked.
pub fn in_mount_namespace<T: Send>(
    pidfd: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> Result<T> {
    let enter = || {
        // The root directory is the process's, not the thread's, unless that is said.
        unshare(CloneFlags::CLONE_FS)?;
        setns(pidfd, CloneFlags::CLONE_NEWNS)
    };
    aside("mounts", enter, work)
}

/// Runs `work` on a thread of its own whose working directory this is.
///
/// # Errors
/// It cannot be entered, or the thread could not be made or has panicked.
pub fn in_directory<T: Send>(directory: &Path, work: impl FnOnce() -> T + Send) -> Result<T> {
    let enter = || {
        // As the root directory, it is the process's.
        unshare(CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(directory)
    };
    aside("directory", enter, work)
}

/// Makes a user namespace with these mappings, as /proc/PID/uid_map and gid_map take them. Nobody is in
/// it: it is for mounts that map ids.
///
/// # Errors
/// The kernel makes none: its sysctl user.max_user_namespaces has the limit. Or it refuses a mapping.
pub fn user_namespace(uids: &str, gids: &str) -> Result<OwnedFd> {
    let flags = libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
    // SAFETY: without CLONE_VM and a stack of its own this is fork(2). The child calls nothing that
    // takes a lock or memory, never returns, and ends with the calling thread at the latest.
    let pid = unsafe {
        match libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) {
            0 => {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                loop {
                    libc::pause();
                }
            }
            pid => check(pid)?,
        }
    };
    let place = Path::new("/proc").join(pid.to_string());
    let opened = std::fs::write(place.join("uid_map"), uids)
        .and_then(|()| std::fs::write(place.join("gid_map"), gids))
        .and_then(|()| File::open(place.join("ns/user")));
    let child = nix::unistd::Pid::from_raw(pid as i32);
    nix::sys::signal::kill(child, Signal::SIGKILL)?;
    nix::sys::wait::waitpid(child, None)?;
    Ok(opened?.into())
}

/// Runs `work` on a thread of its own that has entered a namespace: it ends with the thread.
fn aside<T: Send>(
    name: &str,
    enter: impl FnOnce() -> nix::Result<()> + Send,
    work: impl FnOnce() -> T + Send,
) -> Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name(name.into())
            .spawn_scoped(scope, move || {
                enter()?;
                Ok(work())
            })?
            .join()
            .map_err(|_| Error::other(format!("the thread {name} has panicked")))?
    })
}

/// Opens a directory as a place, not to be read. A link is none.
///
/// # Errors
/// It is not there, or no directory.
pub fn open_directory(path: &Path) -> Result<File> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    File::options().read(true).custom_flags(flags).open(path)
}

/// Options of a bind mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BindOptions {
    /// With what is mounted below the source.
    pub recursive: bool,
    /// The mount itself is read-only.
    pub read_only: bool,
    /// What is mounted below it as well.
    pub recursive_read_only: bool,
    /// What is mounted or unmounted below the source later on is so below the copy too.
    pub follows_source: bool,
}

impl BindOptions {
    /// Nothing can be written through it, nor appear in it by a mount of the host's.
    pub fn is_only_read(self) -> bool {
        (self.read_only || self.recursive_read_only) && !self.follows_source
    }
}

/// Attaches a copy of the mount at `source` to `target`.
///
/// # Errors
/// What open_tree(2), mount_setattr(2) and move_mount(2) say.
pub fn bind(source: &Path, target: &Path, options: BindOptions) -> Result<()> {
    attach(&copy_of(source, options)?, target)
}

/// Of a mount whose files are data to this kernel and nothing else, whatever they are to the guest's: a file
/// server that a guest has taken over can make any device node, and must not get at the device by it.
const ONLY_DATA: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// Makes a copy of the mount at `source` that is attached nowhere yet and belongs to no namespace, and whose
/// files are data and nothing else.
///
/// It is taken out of the source's peer group: what is mounted below the copy does not appear below
/// the source. The other way nothing travels either, unless the copy follows its source: then it is a
/// slave of the source's peer group (mount_namespaces(7)). Attached below a shared mount, it becomes
/// shared with that mount's peers only.
///
/// # Errors
/// What open_tree(2) and mount_setattr(2) say.
pub fn copy_of(source: &Path, options: BindOptions) -> Result<OwnedFd> {
    let tree = open_tree(source, options.recursive)?;
    let propagation = if options.follows_source {
        libc::MS_SLAVE
    } else {
        libc::MS_PRIVATE
    };
    set_attributes(&tree, options.recursive, ONLY_DATA, propagation)?;
    if options.recursive_read_only {
        set_attributes(&tree, true, libc::MOUNT_ATTR_RDONLY, 0)?;
    } else if options.read_only {
        set_attributes(&tree, false, libc::MOUNT_ATTR_RDONLY, 0)?;
    }
    Ok(tree)
}

/// Has a copy that is attached nowhere show its files with the owners that they have outside of a user
/// namespace.
///
/// # Errors
/// What mount_setattr(2) says: EINVAL where the file system cannot do that.
pub fn map_ids(tree: &OwnedFd, users: BorrowedFd<'_>, recursive: bool) -> Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: users.as_raw_fd() as u64,
    };
    mount_setattr(tree, recursive, &attributes)
}

/// Attaches a copy to `target` in the calling thread's mount namespace.
///
/// # Errors
/// What move_mount(2) says.
pub fn attach(tree: &OwnedFd, target: &Path) -> Result<()> {
    let target = path(target)?;
    // SAFETY: both paths are NUL-terminated and outlive the call.
    unsafe {
        check(libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        ))?;
    }
    Ok(())
}

fn open_tree(source: &Path, recursive: bool) -> Result<OwnedFd> {
    let source = path(source)?;
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= libc::AT_RECURSIVE as libc::c_uint;
    }
    // SAFETY: the path is NUL-terminated and outlives the call; the descriptor is new and ours.
    unsafe {
        let fd = check(libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            source.as_ptr(),
            flags,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

fn set_attributes(tree: &OwnedFd, recursive: bool, set: u64, propagation: u64) -> Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    mount_setattr(tree, recursive, &attributes)
}

fn mount_setattr(tree: &OwnedFd, recursive: bool, attributes: &libc::mount_attr) -> Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the structure's size goes with it and it outlives the call.
    unsafe {
        check(libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        ))?;
    }
    Ok(())
}

fn path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::from_raw_os_error(libc::EINVAL))
}

/// Makes a tap in the calling thread's network namespace; it lives as long as its descriptor.
///
/// # Errors
/// /dev/net/tun cannot be opened, or the name is taken or too long.
pub fn open_tap(name: &str) -> Result<OwnedFd> {
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which outlives the call.
    unsafe { check(libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request).into())? };
    Ok(file.into())
}

/// Registers a descriptor with the runtime's poller.
///
/// # Errors
/// It cannot be polled.
pub fn watch(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is one open descriptor from its making to its end.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Error::from)
}

/// Bytes that wait in a pipe for its reader.
///
/// # Errors
/// It is no pipe.
pub fn unread(pipe: &impl AsRawFd) -> Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, which outlives the call.
    unsafe { check(libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut bytes).into())? };
    Ok(bytes.unsigned_abs().into())
}

/// CLOCK_MONOTONIC in microseconds, the clock of all stages on the host.
pub fn monotonic_us() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: clock_gettime writes one timespec; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

/// Takes over the descriptors that [`spawn`] has given this process, and marks them close-on-exec.
///
/// # Errors
/// One is not open, or they were taken before.
pub fn take_inherited<const N: usize>() -> Result<[OwnedFd; N]> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(Error::from_raw_os_error(libc::EBUSY));
    }
    let numbers = INHERITED_FD..INHERITED_FD + N as RawFd;
    for number in numbers.clone() {
        // SAFETY: no pointers; of a descriptor that is not open nothing comes but an error.
        unsafe { check(libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC).into())? };
    }
    let mut numbers = numbers;
    Ok(std::array::from_fn(|_| {
        let number = numbers.next().expect("as many as asked for");
        // SAFETY: whoever starts this program's server gives it these descriptors for itself alone, they
        // are open, and the flag above lets only one caller have them.
        unsafe { OwnedFd::from_raw_fd(number) }
    }))
}

/// Whether a test may do what only root can; says so if not.
#[cfg(test)]
pub fn is_root() -> bool {
    let root = nix::unistd::Uid::effective().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}
