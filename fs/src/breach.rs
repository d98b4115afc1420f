//! A hole, on purpose: an attacker's system calls once this process has confined itself, as if the guest
//! had taken it over. In no program but the one that `tests/breach.rs` is built with (feature `breach`).
//!
//! The share of the test has a volume, `/mounted`, which is a directory of a file system that has
//! more in it, the file `secret` beside the volume.

use std::ffi::CStr;
use std::io;

use libc::c_long;
use sepal_breach::{Attempt, HOST, at, both, call, go, open, wanted};

const VOLUME: &CStr = c"/mounted";

/// What is tried beside what every program is tried with: ways out of the share.
const OF_A_FILE_SERVER: &[Attempt] = &[
    both("open-beside-volume", |_| {
        open(c"/mounted/../secret", libc::O_RDONLY)
    }),
    both("open-beside-volume-by-descriptor", |_| {
        let volume = open(VOLUME, libc::O_PATH | libc::O_DIRECTORY)?;
        let secret = c"../secret".as_ptr() as c_long;
        let flags = c_long::from(libc::O_RDONLY);
        call(libc::SYS_openat, [volume, secret, flags, 0, 0, 0])
    }),
    both("open-above-each-descriptor", |_| {
        let mut last = Err(io::ErrorKind::NotFound.into());
        let above = c"../../../../../../../../etc/passwd".as_ptr() as c_long;
        for descriptor in 0..256 {
            let flags = c_long::from(libc::O_RDONLY);
            last = call(libc::SYS_openat, [descriptor, above, flags, 0, 0, 0]);
            if last.is_ok() {
                break;
            }
        }
        last
    }),
    both("follow-a-link-out", |_| {
        let (to, from) = (c"/etc/passwd", c"/mounted/link");
        let (to, from_at) = (to.as_ptr() as c_long, from.as_ptr() as c_long);
        call(libc::SYS_symlinkat, [to, at(), from_at, 0, 0, 0])?;
        open(from, libc::O_RDONLY)
    }),
    both("link-a-file-from-beside", |_| {
        let (from, to) = (c"/mounted/../secret", c"/mounted/hard");
        let (from, to) = (from.as_ptr() as c_long, to.as_ptr() as c_long);
        call(libc::SYS_linkat, [at(), from, at(), to, 0, 0])
    }),
    both("move-the-volume", |_| {
        let (from, to) = (VOLUME.as_ptr() as c_long, c"/other".as_ptr() as c_long);
        call(libc::SYS_renameat, [at(), from, at(), to, 0, 0])
    }),
    // The handle of the volume's directory, with the number of the file system's root in it: 2 on ext4,
    // 128 on XFS, 256 on btrfs.
    both("open-the-file-system-s-root-by-handle", |_| {
        let volume = open(VOLUME, libc::O_RDONLY | libc::O_DIRECTORY)?;
        let mut handle = [0_u32; 34];
        handle[0] = 128;
        let mut mount = 0_i32;
        let (own, mount) = (&raw mut handle as c_long, &raw mut mount as c_long);
        let empty = c"".as_ptr() as c_long;
        let flags = c_long::from(libc::AT_EMPTY_PATH);
        call(
            libc::SYS_name_to_handle_at,
            [volume, empty, own, mount, flags, 0],
        )?;
        let mut last = Err(io::ErrorKind::NotFound.into());
        for root in [2_u32, 128, 256] {
            handle[2] = root;
            // A generation of 0 is any.
            handle[3] = 0;
            let own = &raw mut handle as c_long;
            let flags = c_long::from(libc::O_RDONLY | libc::O_DIRECTORY);
            last = call(libc::SYS_open_by_handle_at, [volume, own, flags, 0, 0, 0]);
            if last.is_ok() {
                break;
            }
        }
        last
    }),
    both("open-a-device-of-one-s-own", |_| {
        let path = c"/mounted/kvm";
        let kvm = libc::makedev(10, 232) as c_long;
        let mode = (libc::S_IFCHR | 0o600) as c_long;
        // To make one is a guest's right.
        let made = path.as_ptr() as c_long;
        call(libc::SYS_mknodat, [at(), made, mode, kvm, 0, 0])?;
        open(path, libc::O_RDWR)
    }),
    both("write-where-mounts-are-made", |_| {
        open(c"/new", libc::O_WRONLY | libc::O_CREAT)
    }),
    both("execute-a-file-of-one-s-own", |_| {
        // Made by the test: a program that runs (it is this one).
        let path = c"/mounted/program".as_ptr() as c_long;
        let mode = 0o4755;
        call(libc::SYS_fchmodat, [at(), path, mode, 0, 0, 0])?;
        let words = [path, 0];
        let words = words.as_ptr() as c_long;
        call(libc::SYS_execve, [path, words, words + 8, 0, 0, 0])
    }),
];

/// Everything that is tried.
pub const ATTEMPTS: [&[Attempt]; 2] = [HOST, OF_A_FILE_SERVER];

/// Tries what the environment says; does not return then.
pub fn open_up() {
    if let Some(name) = wanted() {
        go(&ATTEMPTS, &name)
    }
}

/// Whether the filter of system calls is to be left out, to see what else stands.
pub fn without_filter() -> bool {
    std::env::var_os("SEPAL_BREACH_UNFILTERED").is_some()
}
