//! What an attacker tries who has taken a confined program over: system calls, each with a name.
//!
//! The programs that a guest speaks to have a hole for it when they are built with the feature `breach`,
//! which only their tests `breach.rs` ask for. `SEPAL_BREACH` names the attempt, `SEPAL_BREACH_PID`,
//! `SEPAL_BREACH_ADDRESS` and `SEPAL_BREACH_SOCKET` a process, an address in it and a Unix socket of somebody
//! else's. The process says how it went, and ends.
//!
//! Each attempt would succeed for a root that nothing confines, or comes first to the wall that it has
//! ([`Attempt::only`]): a refusal for its own mistakes would prove nothing.

use std::ffi::{CStr, CString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use libc::c_long;

/// The abstract socket of somebody else's.
const ABSTRACT: &str = "sepal-breach";
/// Exit status of a process that has tried.
const TRIED: i32 = 99;

/// What an attacker tries.
pub struct Attempt {
    /// Its name.
    pub name: &'static str,
    /// Whether it must fail without the filter of system calls as well: by what else stands there.
    pub second_wall: bool,
    /// The one refusal that is a wall's, where root itself would be told another; beside ENOSYS, of a kernel
    /// that has no such call.
    pub only: Option<i32>,
    run: fn(&Victim) -> io::Result<i64>,
}

/// Who is attacked.
pub struct Victim {
    /// A process.
    pub pid: c_long,
    /// Where it has memory.
    pub address: c_long,
    /// A Unix socket's path.
    pub socket: CString,
}

/// An attempt that more than the filter of system calls stops.
pub const fn both(name: &'static str, run: fn(&Victim) -> io::Result<i64>) -> Attempt {
    Attempt {
        name,
        second_wall: true,
        only: None,
        run,
    }
}

/// An attempt that the filter of system calls alone has to stop.
pub const fn filter(name: &'static str, run: fn(&Victim) -> io::Result<i64>) -> Attempt {
    Attempt {
        name,
        second_wall: false,
        only: None,
        run,
    }
}

/// As [`both`], of something that is not done on this machine even where it may be: what stops it must say so
/// with EPERM, before it looks at what is asked.
const fn permitted(name: &'static str, run: fn(&Victim) -> io::Result<i64>) -> Attempt {
    Attempt {
        only: Some(libc::EPERM),
        ..both(name, run)
    }
}

impl Attempt {
    /// Whether an outcome ([`outcome`]) is one that shows a wall.
    pub fn is_stopped(&self, outcome: &str) -> bool {
        let by = |errno| outcome.ends_with(&format!("(os error {errno})"));
        match self.only {
            _ if outcome.starts_with("done") => false,
            Some(wall) if outcome.starts_with("refused") => by(wall) || by(libc::ENOSYS),
            _ => true,
        }
    }
}

/// What no program has a reason to do that serves one guest.
pub const HOST: &[Attempt] = &[
    both("open-host-file", |_| open(c"/etc/passwd", libc::O_RDONLY)),
    both("open-device", |_| open(c"/dev/kvm", libc::O_RDWR)),
    both("open-process-memory", |_| {
        open(c"/proc/1/mem", libc::O_RDWR)
    }),
    both("open-above-root", |_| {
        open(c"../../../../etc/passwd", libc::O_RDONLY)
    }),
    both("make-file", |_| {
        open(c"/breach", libc::O_WRONLY | libc::O_CREAT)
    }),
    both("make-device", |_| {
        let kvm = libc::makedev(10, 232) as c_long;
        let mode = (libc::S_IFCHR | 0o600) as c_long;
        let path = c"/breach".as_ptr() as c_long;
        call(libc::SYS_mknodat, [at(), path, mode, kvm, 0, 0])
    }),
    both("open-by-handle", |_| {
        // struct file_handle: its room, its type, and up to MAX_HANDLE_SZ bytes.
        let mut handle = [0_u32; 34];
        handle[0] = 128;
        let mut mount = 0_i32;
        let (root, own) = (c"/".as_ptr() as c_long, &raw mut handle as c_long);
        let number = &raw mut mount as c_long;
        call(libc::SYS_name_to_handle_at, [at(), root, own, number, 0, 0])?;
        let flags = c_long::from(libc::O_PATH);
        let own = handle.as_ptr() as c_long;
        call(libc::SYS_open_by_handle_at, [at(), own, flags, 0, 0, 0])
    }),
    both("link-out-of-root", |_| {
        let (to, from) = (c"/etc/passwd".as_ptr(), c"/breach".as_ptr());
        let (to, from) = (to as c_long, from as c_long);
        call(libc::SYS_symlinkat, [to, at(), from, 0, 0, 0])
    }),
    both("mount", |_| {
        let (kind, root) = (c"proc".as_ptr() as c_long, c"/".as_ptr() as c_long);
        call(libc::SYS_mount, [kind, root, kind, 0, 0, 0])
    }),
    both("unmount", |_| {
        let root = c"/".as_ptr() as c_long;
        call(libc::SYS_umount2, [root, 0, 0, 0, 0, 0])
    }),
    both("change-root", |_| {
        let root = c"/".as_ptr() as c_long;
        call(libc::SYS_chroot, [root, 0, 0, 0, 0, 0])
    }),
    both("enter-namespace", |victim| {
        // By a pidfd of the victim's: all of its namespaces.
        let pidfd = call(libc::SYS_pidfd_open, [victim.pid, 0, 0, 0, 0, 0])?;
        let mounts = c_long::from(libc::CLONE_NEWNS);
        call(libc::SYS_setns, [pidfd, mounts, 0, 0, 0, 0])
    }),
    both("signal", |victim| {
        let kill = c_long::from(libc::SIGKILL);
        call(libc::SYS_kill, [victim.pid, kill, 0, 0, 0, 0])
    }),
    both("trace", |victim| {
        let attach = c_long::from(libc::PTRACE_ATTACH);
        call(libc::SYS_ptrace, [attach, victim.pid, 0, 0, 0, 0])
    }),
    both("read-memory", |victim| {
        let mut byte = 0_u8;
        let local = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        let remote = [victim.address, 1];
        let (to, from) = (&raw const local as c_long, remote.as_ptr() as c_long);
        let arguments = [victim.pid, to, 1, from, 1, 0];
        call(libc::SYS_process_vm_readv, arguments)
    }),
    both("others-socket", |victim| connect(victim.socket.as_bytes())),
    both("others-abstract-socket", |_| {
        connect(format!("\0{ABSTRACT}").as_bytes())
    }),
    both("raw-socket", |_| {
        socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)
    }),
    both("packet-socket", |_| {
        socket(libc::AF_PACKET, libc::SOCK_RAW, 0)
    }),
    filter("inet-socket", |_| {
        socket(libc::AF_INET, libc::SOCK_STREAM, 0)
    }),
    filter("netlink-socket", |_| {
        socket(libc::AF_NETLINK, libc::SOCK_RAW, 0)
    }),
    filter("fork", |_| {
        let child = c_long::from(libc::SIGCHLD);
        call(libc::SYS_clone, [child, 0, 0, 0, 0, 0])
    }),
    both("execute", |_| {
        let shell = c"/bin/sh".as_ptr() as c_long;
        call(libc::SYS_execve, [shell, 0, 0, 0, 0, 0])
    }),
    both("become-root", |_| call(libc::SYS_setuid, [0; 6])),
    both("gain-capabilities", |_| {
        // capset(2), version 3: all of both words, permitted and effective.
        let header = [0x2008_0522_u32, 0];
        let sets = [u32::MAX, u32::MAX, 0, u32::MAX, u32::MAX, 0];
        let (header, sets) = (header.as_ptr() as c_long, sets.as_ptr() as c_long);
        call(libc::SYS_capset, [header, sets, 0, 0, 0, 0])
    }),
    permitted("load-module", |_| {
        let nothing = c"".as_ptr() as c_long;
        call(libc::SYS_init_module, [nothing, 0, nothing, 0, 0, 0])
    }),
    both("load-kernel", |_| call(libc::SYS_kexec_load, [0; 6])),
    both("reboot", |_| {
        let restart = 0x0123_4567;
        let magic = [0xfee1_dead, 672_274_793, restart, 0, 0, 0];
        call(libc::SYS_reboot, magic)
    }),
    both("load-bpf", |_| {
        // BPF_PROG_LOAD of a classifier that returns 0: type and number of instructions, where they and the
        // licence are.
        let program = [0x0000_0000_0000_00b7_u64, 0x0000_0000_0000_0095];
        let licence = c"GPL";
        let mut attributes = [0_u64; 16];
        attributes[0] = 3 | 2 << 32;
        attributes[1] = program.as_ptr() as u64;
        attributes[2] = licence.as_ptr() as u64;
        let attributes = attributes.as_ptr() as c_long;
        call(libc::SYS_bpf, [5, attributes, 128, 0, 0, 0])
    }),
    both("io-ports", |_| call(libc::SYS_iopl, [3, 0, 0, 0, 0, 0])),
    both("set-clock", |_| {
        let mut time = [0_i64; 2];
        let now = time.as_mut_ptr() as c_long;
        let realtime = c_long::from(libc::CLOCK_REALTIME);
        call(libc::SYS_clock_gettime, [realtime, now, 0, 0, 0, 0])?;
        call(libc::SYS_clock_settime, [realtime, now, 0, 0, 0, 0])
    }),
    permitted("swap", |_| {
        let path = c"/breach".as_ptr() as c_long;
        call(libc::SYS_swapon, [path, 0, 0, 0, 0, 0])
    }),
    both("host-name", |_| {
        let name = c"breach".as_ptr() as c_long;
        call(libc::SYS_sethostname, [name, 6, 0, 0, 0, 0])
    }),
    // Of unshare(2) a process of several threads is told EINVAL.
    filter("user-namespace", |_| {
        let users = c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
        call(libc::SYS_clone, [users, 0, 0, 0, 0, 0])
    }),
    filter("user-namespace-by-clone3", |_| {
        clone3(libc::CLONE_NEWUSER as u64)
    }),
    filter("fork-by-clone3", |_| clone3(0)),
    filter("map-executable-memory", |_| {
        let prot = c_long::from(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
        let flags = c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        call(libc::SYS_mmap, [0, 4096, prot, flags, -1, 0])
    }),
    filter("make-memory-executable", |_| {
        let prot = c_long::from(libc::PROT_READ | libc::PROT_WRITE);
        let flags = c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let page = call(libc::SYS_mmap, [0, 4096, prot, flags, -1, 0])?;
        let prot = prot | c_long::from(libc::PROT_EXEC);
        call(libc::SYS_mprotect, [page, 4096, prot, 0, 0, 0])
    }),
    both("allow-core-dumps", |_| {
        let limits = [libc::RLIM_INFINITY; 2];
        let limits = limits.as_ptr() as c_long;
        let core = c_long::from(libc::RLIMIT_CORE as i32);
        call(libc::SYS_prlimit64, [0, core, limits, 0, 0, 0])
    }),
    filter("io-uring", |_| {
        let parameters = [0_u64; 16];
        let parameters = parameters.as_ptr() as c_long;
        call(libc::SYS_io_uring_setup, [1, parameters, 0, 0, 0, 0])
    }),
    filter("keyring", |_| {
        // KEYCTL_JOIN_SESSION_KEYRING.
        call(libc::SYS_keyctl, [1, 0, 0, 0, 0, 0])
    }),
    filter("be-dumpable", |_| {
        let dumpable = c_long::from(libc::PR_SET_DUMPABLE);
        call(libc::SYS_prctl, [dumpable, 1, 0, 0, 0, 0])
    }),
];

/// The attempt that the environment asks for, if it asks for any.
pub fn wanted() -> Option<String> {
    std::env::var("SEPAL_BREACH").ok()
}

/// Tries it, says how it went, and ends the process.
pub fn go(attempts: &[&[Attempt]], name: &str) -> ! {
    let socket = std::env::var("SEPAL_BREACH_SOCKET").unwrap_or_default();
    let victim = Victim {
        pid: number("SEPAL_BREACH_PID"),
        address: number("SEPAL_BREACH_ADDRESS"),
        socket: CString::new(socket).unwrap_or_default(),
    };
    let mut all = attempts.iter().copied().flatten();
    let outcome = match all.find(|attempt| attempt.name == name) {
        Some(attempt) => match (attempt.run)(&victim) {
            Ok(value) => format!("done ({value})"),
            Err(error) => format!("refused: {error}"),
        },
        None => "unknown".into(),
    };
    eprintln!("breach {name}: {outcome}");
    // SAFETY: ends this process and nothing else.
    unsafe { libc::_exit(TRIED) }
}

/// Somebody else on the host, for as long as a test: a process, a Unix socket, and an abstract one.
pub struct Bystander {
    process: Child,
    address: String,
    socket: PathBuf,
    _listeners: [UnixListener; 2],
}

impl Bystander {
    /// With a socket in this directory.
    ///
    /// # Errors
    /// There is another one, or nothing to run.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let socket = directory.join("other");
        let listeners = [
            UnixListener::bind(&socket)?,
            UnixListener::bind_addr(&SocketAddr::from_abstract_name(ABSTRACT)?)?,
        ];
        let process = Command::new("sleep").arg("1000").spawn()?;
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.id()))?;
        let first = maps.split('-').next().unwrap_or_default();
        let address = u64::from_str_radix(first, 16).map_err(io::Error::other)?;
        Ok(Self {
            process,
            address: address.to_string(),
            socket,
            _listeners: listeners,
        })
    }

    /// Has the program that the command runs attack this one.
    pub fn is_attacked_by(&self, command: &mut Command, attempt: &str) {
        command
            .env("SEPAL_BREACH", attempt)
            .env("SEPAL_BREACH_PID", self.process.id().to_string())
            .env("SEPAL_BREACH_ADDRESS", &self.address)
            .env("SEPAL_BREACH_SOCKET", &self.socket);
    }

    /// Whether the process is still there.
    pub fn lives(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// How an attempt went by the attacker's own words; none when it was ended before it could say any.
///
/// # Panics
/// There is no such attempt, or the process went on after it.
pub fn outcome(status: Option<i32>, said: &str) -> Option<String> {
    let line = said.lines().find(|line| line.starts_with("breach "))?;
    assert_eq!(status, Some(TRIED), "{said}");
    let (_, outcome) = line.split_once(": ")?;
    assert_ne!(outcome, "unknown");
    Some(outcome.to_owned())
}

fn number(variable: &str) -> c_long {
    let text = std::env::var(variable).unwrap_or_default();
    text.parse().unwrap_or(1)
}

/// The working directory, for calls that take a directory.
pub const fn at() -> c_long {
    libc::AT_FDCWD as c_long
}

/// A system call.
///
/// # Errors
/// The kernel's.
pub fn call(number: c_long, a: [c_long; 6]) -> io::Result<i64> {
    // SAFETY: none is possible: this stands for code that means harm. Pointers among the arguments are to
    // memory that outlives the call.
    let value = unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]) };
    if value < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}

/// A process by clone3(2), with these flags.
fn clone3(flags: u64) -> io::Result<i64> {
    // struct clone_args: 11 words, of which the fifth is the signal of the end.
    let mut arguments = [0_u64; 11];
    (arguments[0], arguments[4]) = (flags, libc::SIGCHLD as u64);
    let arguments = arguments.as_ptr() as c_long;
    call(libc::SYS_clone3, [arguments, 88, 0, 0, 0, 0])
}

/// Opens a file.
///
/// # Errors
/// The kernel's.
pub fn open(path: &CStr, flags: libc::c_int) -> io::Result<i64> {
    let arguments = [at(), path.as_ptr() as c_long, flags.into(), 0o600, 0, 0];
    call(libc::SYS_openat, arguments)
}

/// Makes a socket.
///
/// # Errors
/// The kernel's.
pub fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<i64> {
    let arguments = [family.into(), kind.into(), protocol.into(), 0, 0, 0];
    call(libc::SYS_socket, arguments)
}

/// To a Unix socket.
fn connect(path: &[u8]) -> io::Result<i64> {
    let socket = socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    let mut address = [0_u8; 110];
    address[0] = libc::AF_UNIX as u8;
    let end = 2 + path.len().min(100);
    address[2..end].copy_from_slice(&path[..end - 2]);
    let pointer = address.as_ptr() as c_long;
    call(libc::SYS_connect, [socket, pointer, end as c_long, 0, 0, 0])
}

/// Asks every descriptor that there may be; the last refusal counts.
///
/// # Errors
/// The kernel's.
pub fn any_descriptor(request: c_long, argument: c_long) -> io::Result<i64> {
    let ask = |fd| call(libc::SYS_ioctl, [fd, request, argument, 0, 0, 0]);
    let mut last = Err(io::ErrorKind::NotFound.into());
    for fd in 3..256 {
        last = ask(fd);
        if last.is_ok() {
            break;
        }
    }
    last
}
