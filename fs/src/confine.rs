//! Makes the share the whole world of this process.
//!
//! Runs once, on the only thread, before the first byte from the guest is looked at.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use capng::{Action, Set, Type};
use landlock::{
    Access, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError, Scope,
};
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{fchdir, pivot_root};

use crate::sys;

/// What serving files takes, and no more: give files the guest's owners, modes, devices and file
/// capabilities, and become the guest's user while creating.
const CAPABILITIES: [&str; 8] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "MKNOD",
    "SETFCAP",
    "SETGID",
    "SETUID",
];

/// Enters namespaces of our own in which the share is the root directory.
///
/// Mounts that the shim makes below the share afterwards appear here, because our copy of the share
/// is a slave (mount_namespaces(7)) of the shim's; nothing travels the other way.
///
/// The network namespace stays that in which the process was started.
///
/// Answers with a directory of this process's descriptors that has nothing above it: where the share is
/// the root there is no /proc.
///
/// # Errors
/// The share is not a shared mount point, or the kernel refuses a step.
pub fn enter(share: &Path) -> anyhow::Result<File> {
    let shown = share.display();
    let directory = open(
        share,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .with_context(|| format!("cannot open the share {shown}"))?;
    check_shared(&directory).with_context(|| format!("cannot serve {shown}"))?;

    let flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(flags).context("cannot make namespaces (root is needed)")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
        .context("cannot make the mounts private")?;
    let descriptors = sys::detached_tree(c"/proc/self/fd").context("cannot clone /proc/self/fd")?;

    // The directory opened above belongs to the mount namespace that we have left.
    let root = open(
        share,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .with_context(|| format!("cannot open the share {shown}"))?;
    fchdir(&root).context("cannot enter the share")?;
    pivot_root(".", ".").context("cannot make the share the root directory")?;
    // The old root now lies on top of the new one.
    umount2(".", MntFlags::MNT_DETACH).context("cannot leave the old root directory")?;
    fchdir(&root).context("cannot enter the share")?;

    // What lies in the share itself is the shim's: places for mounts, in directories that the shim
    // walks through as the host's root. A guest that could put a link there would lead it anywhere.
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    let strict = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(none, "/", none, flags | strict, none)
        .context("cannot make the share's own directories read-only")?;

    Ok(descriptors)
}

/// Refuses a share into which later mounts would not propagate.
fn check_shared(directory: &impl AsFd) -> anyhow::Result<()> {
    let mount =
        sys::mount_of(directory).context("the kernel does not tell its mount (Linux 5.8)")?;
    ensure!(
        mount.is_root,
        "it is not a mount point (mount --bind it onto itself)"
    );
    let mountinfo = File::open("/proc/self/mountinfo").context("cannot read the mounts")?;
    match propagation(BufReader::new(mountinfo), mount.id)? {
        Some(true) => Ok(()),
        Some(false) => bail!("its mount is not shared (mount --make-shared)"),
        None => bail!("its mount is not in /proc/self/mountinfo"),
    }
}

/// Whether the mount with this id is shared; none where there is no such mount (proc(5),
/// /proc/pid/mountinfo: field 1 is the id, the optional fields follow the sixth up to a hyphen).
fn propagation(mountinfo: impl BufRead, id: u64) -> std::io::Result<Option<bool>> {
    let id = id.to_string();
    // Bytes, because mount points need not be UTF-8.
    for line in mountinfo.split(b'\n') {
        let line = line?;
        let mut fields = line.split(|&b| b == b' ');
        if fields.next() == Some(id.as_bytes()) {
            let mut optional = fields.skip(5).take_while(|&field| field != b"-");
            return Ok(Some(optional.any(|field| field.starts_with(b"shared:"))));
        }
    }
    Ok(None)
}

/// Gives up every capability that serving files does not take, for good, and hides this process's
/// memory from others.
///
/// # Errors
/// The process lacks a needed capability, or may not drop the others.
pub fn drop_privileges() -> anyhow::Result<()> {
    capng::clear(Set::BOTH);
    capng::updatev(
        Action::ADD,
        Type::PERMITTED | Type::EFFECTIVE,
        CAPABILITIES.to_vec(),
    )
    .context("cannot choose capabilities")?;
    capng::apply(Set::BOTH).context("cannot drop capabilities (root is needed)")?;
    prctl::set_no_new_privs().context("cannot set no_new_privs")?;
    give_up_sockets().context("cannot give up the use of sockets")?;
    prctl::set_dumpable(false).context("cannot make the process undumpable")?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("cannot turn core dumps off")?;
    Ok(())
}

/// Has Landlock refuse TCP, and abstract Unix sockets and signals beyond this process, as far as this
/// kernel has it.
///
/// Files are left out. What the guest may do in the share is everything; and a ruleset that knows of any
/// right to files forbids moving them to another directory, which kernels before 5.19 cannot allow.
fn give_up_sockets() -> Result<(), RulesetError> {
    const ABI: landlock::ABI = landlock::ABI::V6;
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessNet::from_all(ABI))?
        .scope(Scope::from_all(ABI))?
        .create()?
        .restrict_self()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &[u8] = b"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
        30 22 0:25 / /a\\040b rw shared:7 master:3 - tmpfs t rw\n\
        31 22 0:26 / /\xff rw master:3 - tmpfs t rw\n\
        32 22 0:27 / /shared:9 rw - tmpfs shared:9 rw\n";

    #[test]
    fn propagation_is_read_from_the_optional_fields_only() {
        for (id, expected) in [
            (22, Some(true)),
            (30, Some(true)),
            (31, Some(false)),
            (32, Some(false)),
            (2, None),
        ] {
            assert_eq!(propagation(MOUNTINFO, id).unwrap(), expected, "mount {id}");
        }
    }

    #[test]
    fn a_directory_that_is_no_mount_point_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let opened = File::open(directory.path()).unwrap();
        let message = check_shared(&opened).unwrap_err().to_string();
        assert!(message.contains("not a mount point"), "{message}");
    }
}
