//! The file server: FUSE requests in the guest's rings, and the files of its share.
//!
//! The server's code really makes, links and removes files. It does so on a thread in a mount namespace of
//! its own, whose root is a small tmpfs without devices: nothing of the host's is in reach. Without the
//! right to make one the target says so once and does nothing.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use fs_backend::{VhostUserBackend, VringMutex, VringT};
use fs_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use sepal_fs::backend::{Backend, Memory};
use sepal_fs::pressure::Pressure;
use sepal_fs::share::file_system;
use sepal_fs::volumes::Volumes;
use vmm_sys_util::epoll::EventSet;

use crate::input::Input;

const RAM: usize = 2 << 20;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUEST: u64 = 0x1_0000;
const REPLY: u64 = 0x8_0000;
const QUEUE: u16 = 64;
/// Most requests of a run.
const MOST: u16 = 64;
/// Descriptors that the server thinks it may have.
const LIMIT: u64 = 1024;
/// FUSE_INIT, and its body: version 7.38, all flags that the server may want.
const INIT: u32 = 26;

// Descriptor flags (virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Requests of any kind, right and wrong.
pub fn fuse(data: &[u8]) {
    static LEFT_OUT: AtomicBool = AtomicBool::new(false);
    if LEFT_OUT.load(Ordering::Relaxed) {
        return;
    }
    let input = Input::new(data);
    match std::thread::spawn(move || run(input)).join() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            LEFT_OUT.store(true, Ordering::Relaxed);
            eprintln!("fuse: left out, no mount namespace to be had: {error}");
        }
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// What the server needs of /proc, its descriptors, and then a root directory in which there is nothing else.
fn enter() -> io::Result<File> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none)?;
    let descriptors = File::open("/proc/self/fd")?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let size = Some("size=16m,nr_inodes=4096,mode=0755");
    mount(Some("fuzz"), "/tmp", Some("tmpfs"), flags, size)?;
    std::env::set_current_dir("/tmp")?;
    nix::unistd::chroot(".")?;
    std::env::set_current_dir("/")?;
    std::fs::create_dir_all("c/mounts/0")?;
    std::fs::write("c/mounts/0/file", [7; 5000])?;
    std::fs::create_dir("c/rootfs")?;
    std::fs::write("c/rootfs/file", "some text")?;
    std::os::unix::fs::symlink("../../../etc/passwd", "c/rootfs/link")?;
    Ok(descriptors)
}

fn run(input: Input) -> io::Result<()> {
    let descriptors = enter()?;
    assert!(!Path::new("/proc").exists(), "this is the host's root");
    let volumes = Volumes::new(c"mounts".into());
    let files = file_system(descriptors, LIMIT, 0, volumes, false).expect("a tmpfs can be served");
    let backend = Backend::new(files, Pressure::new(None, LIMIT), 0);
    let memory = Memory::from_ranges(&[(GuestAddress(0), RAM)]).expect("memory is left");
    let memory = GuestMemoryAtomic::new(memory);
    backend.update_memory(memory.clone())?;
    let vring = VringMutex::new(memory.clone(), QUEUE).expect("a power of two");
    vring.set_queue_size(QUEUE);
    let placed = vring.set_queue_info(DESCRIPTORS, AVAILABLE, USED);
    placed.expect("rings are aligned and lie in RAM");
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    Guest {
        input,
        backend,
        memory,
        vring,
        sent: 0,
    }
    .talk();
    Ok(())
}

struct Guest {
    input: Input,
    backend: Backend,
    memory: GuestMemoryAtomic<Memory>,
    vring: VringMutex<GuestMemoryAtomic<Memory>>,
    sent: u16,
}

impl Guest {
    fn talk(&mut self) {
        if self.input.byte() < 250 {
            let mut body = Vec::new();
            for word in [7_u32, 38, 1 << 17, u32::MAX >> 1] {
                body.extend(word.to_le_bytes());
            }
            body.resize(64, 0);
            self.request(INIT, 0, &body, 4096, 1);
        }
        while !self.input.is_empty() && self.sent < MOST {
            self.step();
        }
    }

    /// One request as the script has it: opcode, inode, room for the answer, how it is laid out, body.
    fn step(&mut self) {
        let opcode = match self.input.byte() {
            byte @ 0..=199 => u32::from(byte % 54),
            _ => self.input.u32(),
        };
        let inode = match self.input.byte() {
            byte @ 0..=239 => u64::from(byte % 16),
            byte @ 240..=247 => 1 << 63 | u64::from(byte % 8),
            _ => self.input.u64(),
        };
        let how = self.input.byte();
        let room = match how & 7 {
            0 => 0,
            1 => 16,
            2 => u32::from(self.input.u16()),
            3 => 1 << 20,
            _ => 4096,
        };
        let body = self.input.some();
        self.request(opcode, inode, &body, room, how >> 3);
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        let memory = self.memory.memory();
        // What the guest writes beyond its RAM is not there.
        let _ = memory.write(bytes, GuestAddress(gpa));
    }

    fn request(&mut self, opcode: u32, inode: u64, body: &[u8], room: u32, how: u8) {
        // struct fuse_in_header (linux/fuse.h).
        let length = match how & 7 {
            0 => self.input.u32(),
            _ => 40 + body.len() as u32,
        };
        let mut bytes = Vec::new();
        bytes.extend(length.to_le_bytes());
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(u64::from(self.sent).to_le_bytes());
        bytes.extend(inode.to_le_bytes());
        let owner = u32::from(how >> 3 & 1) * 1000;
        for word in [owner, owner, 1, 0] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(body);
        self.put(REQUEST, &bytes);
        // The header alone, or together with what follows.
        let all = bytes.len() as u32;
        let first = if how >> 4 & 1 == 1 { 40.min(all) } else { all };
        let mut buffers = vec![(REQUEST, first, 0)];
        if first < all {
            buffers.push((REQUEST + u64::from(first), all - first, 0));
        }
        if room > 0 {
            buffers.push((REPLY, room, WRITE));
        }
        self.offer(&buffers);
        let before = self.vring.queue_used_idx();
        let seen = self
            .backend
            .handle_event(0, EventSet::IN, std::slice::from_ref(&self.vring), 0);
        assert!(seen.is_ok() && before.is_ok());
        let used = self.vring.queue_used_idx().expect("rings lie in RAM");
        assert_eq!(used, self.sent, "each request is given back, once");
    }

    fn offer(&mut self, buffers: &[(u64, u32, u16)]) {
        let slot = |n: usize| ((usize::from(self.sent) * 4 + n) % usize::from(QUEUE)) as u16;
        for (n, (gpa, len, flags)) in buffers.iter().enumerate() {
            let more = if n + 1 < buffers.len() { NEXT } else { 0 };
            let mut bytes = gpa.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend((flags | more).to_le_bytes());
            bytes.extend(slot(n + 1).to_le_bytes());
            self.put(DESCRIPTORS + 16 * u64::from(slot(n)), &bytes);
        }
        let at = AVAILABLE + 4 + 2 * u64::from(self.sent % QUEUE);
        let head = slot(0);
        self.put(at, &head.to_le_bytes());
        self.sent += 1;
        self.put(AVAILABLE + 2, &self.sent.to_le_bytes());
    }
}
