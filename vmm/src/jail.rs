//! What the process gives up.
//!
//! Before boot: core dumps (they would hold guest memory). Once everything is open: the host's files,
//! its user, every capability, the right to gain any, and the right of others to look inside. What
//! the VMM does afterwards it does as a user that nobody else is, on descriptors it has. Two
//! capabilities are left to the control thread until their only use: to make the container's root
//! directory that of this process, for whoever looks for the container by its pid in /proc would
//! otherwise find an empty one.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result};
use landlock::{
    Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError, Scope,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid};
use sepal_protocol::vm::{ExitCause, JailSpec};

use crate::seccomp::{self, Thread};

/// Descriptors for a pod with thousands of vsock connections; the hard limit may be lower.
const DESCRIPTORS: u64 = 65_536;

/// Threads at most: 64 vCPUs, a worker for each device and vhost's, and some. The user is the pod's own, and
/// so they are counted for it alone.
const THREADS: u64 = 256;

/// Of linux/capability.h.
const CAP_DAC_READ_SEARCH: u32 = 2;
const CAP_SYS_CHROOT: u32 = 18;
/// What [`enter_root`] takes: whose the container's root is, is the image's affair.
const LATER: u32 = 1 << CAP_SYS_CHROOT | 1 << CAP_DAC_READ_SEARCH;

/// Limits that must be set before the VM is built.
///
/// # Errors
/// The kernel refuses.
pub fn before_boot() -> Result<()> {
    prctl::set_dumpable(false).context("cannot forbid core dumps")?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("cannot forbid core dumps")?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read limits")?;
    let wanted = hard.min(DESCRIPTORS);
    if soft < wanted || wanted < hard {
        setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted)
            .context("cannot set the limit of descriptors")?;
    }
    crate::kvm::install_kick_handler().context("cannot handle the kick signal")?;
    sepal_log::forbidden::install("sepal-vmm", ExitCause::Internal.status().into())
        .context("cannot handle forbidden system calls")?;
    crate::memory::install_bus_handler().context("cannot handle bus errors")?;
    Ok(())
}

/// Leaves the host's files, and its user. Called on the main thread when it is still the only one.
///
/// # Errors
/// The kernel refuses: it takes root.
pub fn enter(jail: &JailSpec) -> Result<()> {
    let flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(flags).context("cannot make namespaces (root is needed)")?;
    leave_files(&jail.root)
        .with_context(|| format!("cannot make {} the root directory", jail.root.display()))?;
    leave_user(jail.user).with_context(|| format!("cannot become user {}", jail.user))?;
    setrlimit(Resource::RLIMIT_NPROC, THREADS, THREADS).context("cannot set the limit of threads")
}

fn leave_files(root: &Path) -> nix::Result<()> {
    let none: Option<&str> = None;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    mount(none, "/", none, private, none)?;
    // Only a mount can be a root.
    mount(Some(root), root, none, MsFlags::MS_BIND, none)?;
    chdir(root)?;
    pivot_root(".", ".")?;
    // The old root now lies on top of the new one.
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    let strict = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | strict;
    mount(none, "/", none, flags, none)
}

fn leave_user(id: u32) -> nix::Result<()> {
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    // A change of the user takes all of this away, but for what is asked to stay.
    let dies_with = prctl::get_pdeathsig()?;
    prctl::set_keepcaps(true)?;
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    prctl::set_keepcaps(false)?;
    prctl::set_pdeathsig(dies_with)?;
    prctl::set_dumpable(false)
}

/// Gives up capabilities for good, but for those of [`enter_root`]. Called on the main thread when it is
/// still the only one: both belong to threads and are inherited by those started later.
///
/// # Errors
/// The kernel refuses.
pub fn confine() -> Result<()> {
    prctl::set_no_new_privs().context("cannot give up new privileges")?;
    give_up_files().context("cannot give up the use of files")?;
    keep_capabilities(LATER).context("cannot give up capabilities")
}

/// Has Landlock refuse whatever it knows of, as far as this kernel has it: files and directories by their
/// paths, TCP, and abstract Unix sockets and signals beyond this process. It holds where the root
/// directory becomes the container's, too.
fn give_up_files() -> Result<(), RulesetError> {
    const ABI: landlock::ABI = landlock::ABI::V6;
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI))?
        .handle_access(AccessNet::from_all(ABI))?
        .scope(Scope::from_all(ABI))?
        .create()?
        .restrict_self()?;
    Ok(())
}

/// Confines the calling thread to what its kind needs, for good.
///
/// # Errors
/// The kernel refuses.
pub fn confine_thread(kind: Thread) -> io::Result<()> {
    if kind != Thread::Control {
        keep_capabilities(0)?;
    }
    seccomp::confine(kind)?;
    #[cfg(feature = "breach")]
    crate::breach::open_up(kind);
    Ok(())
}

/// Makes a directory the root of this process, once and for all.
///
/// # Errors
/// The kernel refuses; or it has been done before.
pub fn enter_root(directory: &OwnedFd) -> Result<()> {
    nix::unistd::fchdir(directory).context("cannot enter the container's root")?;
    nix::unistd::chroot(".").context("cannot enter the container's root")?;
    keep_capabilities(0).context("cannot give up capabilities")
}

/// Reduces the calling thread's capability sets to these of the first 32 (capabilities(7)).
///
/// # Errors
/// capset(2).
fn keep_capabilities(kept: u32) -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`: two words per set.
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut sets = [Sets::default(); 2];
    (sets[0].effective, sets[0].permitted) = (kept, kept);
    // SAFETY: header and sets have the layout that version 3 of capset(2) reads, and outlive the
    // call; pid 0 is the calling thread.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
