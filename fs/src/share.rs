//! The share as a file system: which of virtiofsd's choices apply, and why.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use virtiofsd::passthrough::{
    CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs,
};

use crate::files::Files;
use crate::volumes::Volumes;

/// Descriptors kept back from the guest: sockets, eventfds, memory regions, and one in
/// flight per thread.
const RESERVED_DESCRIPTORS: u64 = 64;
/// And this part of them for files without a name, which are ours.
const UNNAMED_SHARE: u64 = 64;
/// The most that it needs: each is a file that the host's kernel keeps for the guest, and the guest is asked to
/// forget some when three quarters are taken. Hosts may allow a thousand times as many.
const MOST_DESCRIPTORS: u64 = 1 << 20;
/// Below this many descriptors a container could not even start.
const LEAST_DESCRIPTORS: u64 = 512;
/// How long the guest trusts a name or attributes before it asks again; in volumes it asks each time
/// ([`crate::volumes`]). Data is not covered by it: with [`CachePolicy::Auto`] the guest drops cached
/// data at each open, unless it is told that the file is as it was ([`crate::unchanged`]).
const TIMEOUT: Duration = Duration::from_secs(1);

/// Raises the limit of open descriptors to what the kernel allows at most, or, without the
/// capability for that, to the hard limit. Answers the limit.
///
/// Each inode that the guest remembers costs one.
///
/// # Errors
/// The limit is too low for any container.
pub fn raise_descriptor_limit() -> anyhow::Result<u64> {
    let (_, hard) =
        getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the descriptor limit")?;
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(hard);
    let mut limit = most.max(hard).min(MOST_DESCRIPTORS);
    if setrlimit(Resource::RLIMIT_NOFILE, limit, limit).is_err() {
        limit = hard.min(MOST_DESCRIPTORS);
        setrlimit(Resource::RLIMIT_NOFILE, limit, limit)
            .context("cannot raise the descriptor limit")?;
    }
    ensure!(
        limit >= LEAST_DESCRIPTORS,
        "the limit of {limit} open files is too low (ulimit -n, at least {LEAST_DESCRIPTORS})"
    );
    Ok(limit)
}

/// The file system below the root directory of this (confined) process. With `users` whatever the guest's
/// kernel lets its users create is created.
///
/// # Errors
/// The descriptors of this process cannot be opened again.
pub fn file_system(
    descriptors_of_proc: File,
    descriptors: u64,
    threads: u8,
    volumes: Volumes,
    users: bool,
) -> anyhow::Result<Files> {
    let ours = descriptors_of_proc
        .try_clone()
        .context("cannot copy a descriptor")?;
    let reserved = RESERVED_DESCRIPTORS + u64::from(threads) + descriptors / UNNAMED_SHARE;
    let config = Config {
        entry_timeout: TIMEOUT,
        attr_timeout: TIMEOUT,
        cache_policy: CachePolicy::Auto,
        // With write-back the guest would own sizes and times, and a volume's file changed on the
        // host would be overwritten by what the guest remembers.
        writeback: false,
        root_dir: "/".into(),
        // Inodes of different mounts may have equal numbers: the guest makes each mount a file
        // system of its own with its own st_dev.
        announce_submounts: true,
        // With handles an inode that the guest remembers would cost no descriptor. But who may open
        // handles may open every inode of a file system, whatever part of it is in the share: of the
        // host's own, where a hostPath or an emptyDir is a directory of it.
        inode_file_handles: InodeFileHandlesMode::Never,
        proc_sfd_rawfd: Some(descriptors_of_proc),
        // Saves a request per entry for `ls -l` and `find`.
        readdirplus: true,
        xattr: true,
        posix_acl: NegotiationMode::Auto,
        // No security module labels files from inside a guest.
        security_label: NegotiationMode::Never,
        // The server drops setuid, setgid and capabilities of a file on write, truncate and chown
        // in the same request, so that the guest need not look for them before each write.
        killpriv_v2: true,
        // The host's page cache is shared by all pods and is what makes an image's second pod
        // quick; the guest's O_DIRECT bypasses the guest's cache only.
        allow_direct_io: false,
        // Files of other owners in a volume must stay readable for programs that ask for it.
        clean_noatime: true,
        guest_fd_limit: descriptors - reserved,
        ..Config::default()
    };
    let fs = PassthroughFs::new(config).context("cannot serve the share")?;
    let unnamed = descriptors / UNNAMED_SHARE;
    Ok(Files::new(fs, ours, unnamed, TIMEOUT, volumes, users))
}
