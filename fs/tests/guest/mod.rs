//! A guest for the file server: a vhost-user front end with real memory and real rings, and as much
//! of FUSE (linux/fuse.h, protocol 7.38) as the tests speak.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const RMDIR: u32 = 11;
pub const RENAME: u32 = 12;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const SETXATTR: u32 = 21;
pub const GETXATTR: u32 = 22;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const CREATE: u32 = 35;
pub const FALLOCATE: u32 = 43;
pub const READDIRPLUS: u32 = 44;
pub const RENAME2: u32 = 45;
pub const LSEEK: u32 = 46;
pub const TMPFILE: u32 = 51;

/// The inode that a mount begins with.
pub const ROOT: u64 = 1;
const MOUNTED: &str = "mounted";
/// FUSE_ATTR_SUBMOUNT.
pub const SUBMOUNT: u32 = 1;

const MEMORY: u64 = 8 << 20;
/// Where the front end claims to have mapped guest address 0.
const USER: u64 = 0x7000_0000_0000;
const QUEUE: u16 = 64;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Rings of the queue of high priority.
const OTHER: u64 = 0x8000;
const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x40_0000;
const PATIENCE: Duration = Duration::from_secs(10);

/// A directory that is a shared mount point of its own, as the shim makes it.
pub struct Share {
    directory: tempfile::TempDir,
}

impl Share {
    pub fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests mount and need root"
        );
        let share = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        let (path, none) = (share.path(), None::<&str>);
        std::fs::create_dir(&path).unwrap();
        mount(Some(&path), &path, none, MsFlags::MS_BIND, none).unwrap();
        mount(none, &path, none, MsFlags::MS_SHARED, none).unwrap();
        let store = share.directory.path().join("store");
        for directory in [&store, &share.writable()] {
            std::fs::create_dir(directory).unwrap();
        }
        let writable = share.writable();
        mount(Some(&store), &writable, none, MsFlags::MS_BIND, none).unwrap();
        share
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    /// What is mounted in it from the beginning, as a container's root file system is.
    pub fn writable(&self) -> PathBuf {
        self.path().join(MOUNTED)
    }

    /// Mounts a tmpfs on a new directory of the share.
    pub fn mount_tmpfs(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::create_dir(&path).unwrap();
        mount(
            Some("sepal-test"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        path
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = umount2(&self.path(), MntFlags::MNT_DETACH);
    }
}

/// A descriptor of a process.
pub fn pidfd(process: u32) -> OwnedFd {
    // SAFETY: no pointers; the descriptor is new, and ours.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, process, 0);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as RawFd)
    }
}

/// A running `sepal-fs` that nobody has connected to.
pub struct Server {
    pub child: Child,
    pub socket: PathBuf,
    _directory: tempfile::TempDir,
}

pub fn start(share: &Path) -> Server {
    spawn(share, None, |_| ())
}

/// As the first process of a PID namespace, with a pidfd of its starter's as descriptor 4.
pub fn start_alone(share: &Path, starter: &OwnedFd) -> Server {
    spawn(share, Some(starter), |_| ())
}

/// As [`start_alone`], told what an attacker in it shall try.
pub fn attacked(share: &Path, starter: &OwnedFd, tell: impl FnOnce(&mut Command)) -> Server {
    spawn(share, Some(starter), tell)
}

fn spawn(share: &Path, starter: Option<&OwnedFd>, tell: impl FnOnce(&mut Command)) -> Server {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("fs.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let program = env!("CARGO_BIN_EXE_sepal-fs");
    let mut command = match starter {
        None => Command::new(program),
        Some(_) => {
            let mut command = Command::new("unshare");
            command.args([
                "--pid",
                "--net",
                "--fork",
                "--kill-child",
                program,
                "--starter-fd",
                "4",
            ]);
            command
        }
    };
    command
        .args(["--listen-fd", "3", "--log-level", "info", "--share"])
        .arg(share);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    tell(&mut command);
    // Out of each other's way.
    let high = |fd: BorrowedFd<'_>| fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(10)).unwrap();
    let mut passed = vec![(high(listener.as_fd()), 3)];
    passed.extend(starter.map(|fd| (high(fd.as_fd()), 4)));
    let copies: Vec<_> = passed.iter().map(|(fd, _)| *fd).collect();
    // SAFETY: dup2 is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(move || {
            for (from, to) in &passed {
                if libc::dup2(*from, *to) != *to {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let child = command.spawn().unwrap();
    for fd in copies {
        nix::unistd::close(fd).unwrap();
    }
    Server {
        child,
        socket,
        _directory: directory,
    }
}

impl Server {
    /// Waits for its end and reads what it said.
    pub fn end(&mut self) -> (ExitStatus, String) {
        let begin = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(begin.elapsed() < PATIENCE, "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = self.child.wait().unwrap();
        let mut said = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        std::io::Read::read_to_string(&mut stderr, &mut said).unwrap();
        (status, said)
    }

    pub fn status_field(&self, field: &str) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|l| l.starts_with(&format!("{field}:")))
            .unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    }

    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest whose device is set up and whose file system is mounted (FUSE_INIT).
pub struct Guest {
    memory: File,
    frontend: Option<Frontend>,
    kick: EventFd,
    call: EventFd,
    /// The same, for poll.
    called: OwnedFd,
    next: u16,
    unique: u64,
    /// Who makes the requests.
    pub uid: u32,
    pub gid: u32,
    /// The node of what is mounted in the share from the beginning.
    pub top: u64,
    /// The lengths of a request's first descriptors; the rest is one more.
    pub cuts: Vec<u32>,
}

impl Guest {
    pub fn mount(server: &Server) -> Self {
        let mut guest = Self::connect(server);
        // FUSE 7.38; flags: what Linux 6.12 offers. INIT_EXT with CREATE_SUPP_GROUP in flags2.
        let flags: u32 = 0x7fff_ffff & !(1 << 26);
        let mut init = words(&[7, 38, 0x2_0000, flags, 1 << 2]);
        init.extend([0; 44]);
        let reply = guest.call(INIT, 0, &init, 64).expect("FUSE_INIT");
        assert_eq!(u32_at(&reply, 0), 7);
        guest.top = guest.lookup(ROOT, MOUNTED).unwrap().node;
        guest
    }

    pub fn connect(server: &Server) -> Self {
        let memory = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(MEMORY).unwrap();
        let begin = Instant::now();
        let stream = loop {
            match UnixStream::connect(&server.socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(begin.elapsed() < PATIENCE, "connect: {error}"),
            }
        };
        let mut frontend = Frontend::from_stream(stream, 2);
        frontend.set_owner().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = frontend.get_features().unwrap();
        assert_ne!(features & protocol, 0);
        // VERSION_1 and, as a driver may, no EVENT_IDX: each request is one notification.
        frontend.set_features(1 << 32 | protocol).unwrap();
        let offered = frontend.get_protocol_features().unwrap();
        assert!(offered.contains(VhostUserProtocolFeatures::MQ));
        frontend
            .set_protocol_features(
                VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK,
            )
            .unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), 2);
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: memory.as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).unwrap();
        let event = || EventFd::new(0).unwrap();
        let (kick, call, unused) = (event(), event(), event());
        for (queue, base, kick) in [(0, OTHER, &unused), (1, 0, &kick)] {
            frontend.set_vring_num(queue, QUEUE).unwrap();
            let rings = VringConfigData {
                queue_max_size: QUEUE,
                queue_size: QUEUE,
                flags: 0,
                desc_table_addr: USER + base + DESC,
                used_ring_addr: USER + base + USED,
                avail_ring_addr: USER + base + AVAIL,
                log_addr: None,
            };
            frontend.set_vring_addr(queue, &rings).unwrap();
            frontend.set_vring_base(queue, 0).unwrap();
            frontend.set_vring_call(queue, &call).unwrap();
            frontend.set_vring_kick(queue, kick).unwrap();
            frontend.set_vring_enable(queue, true).unwrap();
        }
        // SAFETY: the descriptor was made by the clone, which gives it up.
        let called = unsafe { OwnedFd::from_raw_fd(call.try_clone().unwrap().into_raw_fd()) };
        let frontend = Some(frontend);
        Self {
            memory,
            frontend,
            kick,
            call,
            called,
            next: 0,
            unique: 0,
            uid: 0,
            gid: 0,
            top: ROOT,
            cuts: Vec::new(),
        }
    }

    /// Takes back all memory from the second half of it on, which stays mapped.
    pub fn take_half(&self) {
        self.memory.set_len(MEMORY / 2).unwrap();
    }

    /// Unplugs the device.
    pub fn disconnect(mut self) {
        self.frontend = None;
    }

    /// A request and its reply without the header, or the error number.
    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) -> Result<Vec<u8>, i32> {
        self.unique += 2;
        let mut request = words(&[40 + body.len() as u32, opcode]);
        request.extend(self.unique.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend(words(&[self.uid, self.gid, 1, 0]));
        request.extend(body);
        let reply = self.exchange(&request, 16 + room);
        assert_eq!(
            u32_at(&reply, 0) as usize,
            reply.len(),
            "length of the reply"
        );
        assert_eq!(u64_at(&reply, 8), self.unique, "whose reply it is");
        match u32_at(&reply, 4) as i32 {
            0 => Ok(reply[16..].to_vec()),
            error => Err(-error),
        }
    }

    /// Like [`Guest::call`] for a request that has no reply.
    pub fn tell(&mut self, opcode: u32, node: u64, body: &[u8]) {
        let mut request = words(&[40 + body.len() as u32, opcode, 0, 0]);
        request.extend(node.to_le_bytes());
        request.extend(words(&[0, 0, 1, 0]));
        request.extend(body);
        assert!(self.exchange(&request, 0).is_empty());
    }

    /// Sends bytes as they are and answers the bytes that came back.
    pub fn exchange(&mut self, request: &[u8], room: u32) -> Vec<u8> {
        self.memory.write_all_at(request, REQUEST).unwrap();
        let (mut chain, mut at, end) = (Vec::new(), REQUEST, REQUEST + request.len() as u64);
        for &length in &self.cuts {
            chain.push((at, length, 0));
            at += u64::from(length);
        }
        chain.push((at, (end - at) as u32, 0));
        if room > 0 {
            chain.push((REPLY, room, 2));
        }
        let written = self.submit(&chain);
        let mut reply = vec![0; written as usize];
        self.memory.read_exact_at(&mut reply, REPLY).unwrap();
        reply
    }

    /// Makes a chain of (address, length, flags) available and awaits its return; each descriptor
    /// is chained to the next. Answers the length in the used ring.
    pub fn submit(&mut self, chain: &[(u64, u32, u16)]) -> u32 {
        let mut table = Vec::new();
        for (index, &(address, length, flags)) in chain.iter().enumerate() {
            let last = index + 1 == chain.len();
            table.extend(address.to_le_bytes());
            table.extend(length.to_le_bytes());
            table.extend((flags | u16::from(!last)).to_le_bytes());
            table.extend(if last { 0_u16 } else { index as u16 + 1 }.to_le_bytes());
        }
        self.submit_table(&table)
    }

    /// Makes a chain available, whose descriptor table this is, without awaiting its return. Answers its
    /// place in the used ring.
    pub fn offer(&mut self, table: &[u8]) -> u64 {
        self.memory.write_all_at(table, DESC).unwrap();
        let slot = u64::from(self.next % QUEUE);
        self.memory
            .write_all_at(&[0, 0], AVAIL + 4 + 2 * slot)
            .unwrap();
        self.next = self.next.wrapping_add(1);
        self.memory
            .write_all_at(&self.next.to_le_bytes(), AVAIL + 2)
            .unwrap();
        self.kick.write(1).unwrap();
        slot
    }

    /// Says that more is available than the queue has room for.
    pub fn break_ring(&mut self) {
        let beyond = self.next.wrapping_add(QUEUE + 1);
        self.memory
            .write_all_at(&beyond.to_le_bytes(), AVAIL + 2)
            .unwrap();
        self.kick.write(1).unwrap();
    }

    /// The same with a descriptor table as it is; the chain begins at descriptor 0.
    pub fn submit_table(&mut self, table: &[u8]) -> u32 {
        let slot = self.offer(table);
        let begin = Instant::now();
        loop {
            let mut index = [0; 2];
            self.memory.read_exact_at(&mut index, USED + 2).unwrap();
            if u16::from_le_bytes(index) == self.next {
                break;
            }
            assert!(begin.elapsed() < PATIENCE, "the server does not answer");
            let mut fds = [PollFd::new(self.called.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(100_u8)).unwrap() > 0 {
                self.call.read().unwrap();
            }
        }
        let mut used = [0; 8];
        self.memory
            .read_exact_at(&mut used, USED + 4 + 8 * slot)
            .unwrap();
        assert_eq!(u32_at(&used, 0), 0, "the head of the chain");
        u32_at(&used, 4)
    }
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

/// Terminated strings one after the other.
pub fn names(names: &[&str]) -> Vec<u8> {
    names
        .iter()
        .flat_map(|name| name.bytes().chain([0]))
        .collect()
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// `struct fuse_attr`.
#[derive(Debug, Clone, Copy)]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub flags: u32,
}

impl Attr {
    pub fn parse(bytes: &[u8]) -> Self {
        let word = |index: usize| u32_at(bytes, 60 + 4 * index);
        Self {
            ino: u64_at(bytes, 0),
            size: u64_at(bytes, 8),
            mode: word(0),
            nlink: word(1),
            uid: word(2),
            gid: word(3),
            rdev: word(4),
            flags: word(6),
        }
    }
}

/// `struct fuse_entry_out`.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub node: u64,
    /// How long the name and the attributes hold, in whole seconds.
    pub holds: (u64, u64),
    pub attr: Attr,
}

impl Entry {
    pub const LENGTH: u32 = 128;

    pub fn parse(bytes: &[u8]) -> Self {
        Self {
            node: u64_at(bytes, 0),
            holds: (u64_at(bytes, 16), u64_at(bytes, 24)),
            attr: Attr::parse(&bytes[40..]),
        }
    }
}

/// The requests in the tests' words.
impl Guest {
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        self.call(LOOKUP, parent, &names(&[name]), Entry::LENGTH)
            .map(|r| Entry::parse(&r))
    }

    /// Creates and opens for reading and writing; answers the file's handle as well.
    pub fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(Entry, u64), i32> {
        let mut body = words(&[libc::O_RDWR as u32, libc::S_IFREG | mode, 0, 0]);
        body.extend(names(&[name]));
        let reply = self.call(CREATE, parent, &body, Entry::LENGTH + 16)?;
        Ok((Entry::parse(&reply), u64_at(&reply, 128)))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.open_and_ask(node, flags).map(|(handle, _)| handle)
    }

    /// Opens; answers also whether what the guest has of the data still holds (FOPEN_KEEP_CACHE).
    pub fn open_and_ask(&mut self, node: u64, flags: i32) -> Result<(u64, bool), i32> {
        self.call(OPEN, node, &words(&[flags as u32, 0]), 16)
            .map(|r| (u64_at(&r, 0), u32_at(&r, 8) & 2 != 0))
    }

    pub fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[data.len() as u32, 0, 0, 0, 0, 0]));
        body.extend(data);
        self.call(WRITE, node, &body, 8).map(|r| u32_at(&r, 0))
    }

    pub fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[size, 0, 0, 0, 0, 0]));
        self.call(READ, node, &body, size)
    }

    pub fn getattr(&mut self, node: u64) -> Result<Attr, i32> {
        self.call(GETATTR, node, &longs(&[0, 0]), 104)
            .map(|r| Attr::parse(&r[16..]))
    }
}
