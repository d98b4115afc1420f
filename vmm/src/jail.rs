//! What the process gives up.
//!
//! Before boot: core dumps (they would hold guest memory). Once everything is open: every
//! capability, the right to gain any, and the right of others to look inside. What the VMM does
//! afterwards it does as its user, on descriptors it has.

use std::io;

use anyhow::{Context, Result};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Descriptors for a pod with thousands of vsock connections; the hard limit may be lower.
const DESCRIPTORS: u64 = 65_536;

/// Limits that must be set before the VM is built.
///
/// # Errors
/// The kernel refuses.
pub fn before_boot() -> Result<()> {
    prctl::set_dumpable(false).context("cannot forbid core dumps")?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("cannot forbid core dumps")?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read limits")?;
    let wanted = hard.min(DESCRIPTORS);
    if soft < wanted {
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard)
            .context("cannot raise the limit of descriptors")?;
    }
    crate::kvm::install_kick_handler().context("cannot handle the kick signal")?;
    crate::seccomp::install_handler().context("cannot handle forbidden system calls")?;
    Ok(())
}

/// Gives up capabilities for good. Called on the main thread when it is still the only one: both
/// belong to threads and are inherited by those started later.
///
/// # Errors
/// The kernel refuses.
pub fn confine() -> Result<()> {
    prctl::set_no_new_privs().context("cannot give up new privileges")?;
    drop_capabilities().context("cannot give up capabilities")
}

/// Empties the calling thread's capability sets (capabilities(7)).
///
/// # Errors
/// capset(2).
fn drop_capabilities() -> io::Result<()> {
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
    let sets = [Sets::default(); 2];
    // SAFETY: header and sets have the layout that version 3 of capset(2) reads, and outlive the
    // call; pid 0 is the calling thread.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
