//! Lets go of what the host has mounted below a volume, once no process of the container is there.
//!
//! A volume that follows its source (`rslave`) shows mounts that the host makes later. The guest's
//! kernel makes a mount of its own for each, the first time that somebody gets there, and never ends
//! it: by that the file server keeps a file of the host's mount open, and the host could not unmount
//! it (EBUSY). So idle ones are unmounted here (umount2(2), MNT_EXPIRE); they come back by
//! themselves. The names below a volume are forgotten at once (their time is zero), and with them
//! goes the server's last file.
//!
//! Runs as one task per container that has such a volume.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::Spec;
use sepal_protocol::mountinfo::unescape;

use crate::launch;
use crate::process::Process;
use crate::reaper::Reaper;
use crate::sys;

/// A mount goes when it was idle at two looks, one after the other.
const INTERVAL: Duration = Duration::from_secs(5);

/// Where a container's volumes are that follow their sources.
pub fn following_volumes(spec: &Spec) -> Vec<PathBuf> {
    spec.mounts()
        .iter()
        .flatten()
        .filter(|mount| {
            let mut options = mount.options().iter().flatten();
            options.any(|option| option == "slave" || option == "rslave")
        })
        .map(|mount| mount.destination().clone())
        .collect()
}

/// Unmounts what is idle below a container's volumes until its init has ended.
pub async fn expire(volumes: Vec<PathBuf>, init: Arc<Process>, reaper: Arc<Reaper>) {
    loop {
        tokio::select! {
            _ = init.wait_end() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        let proc = PathBuf::from(format!("/proc/{}", init.pid()));
        let mountinfo = std::fs::read(proc.join("mountinfo"));
        let points = submounts(&mountinfo.unwrap_or_default(), &volumes);
        if points.is_empty() {
            continue;
        }
        let work = || unmount_idle(&proc, &points).map_err(|error| error.to_string());
        if let Err(error) = launch::aside(&reaper, "cannot let go of mounts", work).await {
            tracing::warn!(%error, "the host may be unable to unmount what lies in a volume");
        }
    }
}

/// In a helper process: it enters the container's mount namespace.
fn unmount_idle(proc: &Path, points: &[PathBuf]) -> io::Result<()> {
    let namespace = File::open(proc.join("ns/mnt"))?;
    let mut root = File::options();
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let root = root
        .read(true)
        .custom_flags(flags)
        .open(proc.join("root"))?;
    setns(namespace, CloneFlags::CLONE_NEWNS)?;
    // The last mounted first: a mount with another one in it is not idle.
    for point in points.iter().rev() {
        let _ = mark_idle_or_unmount(root.as_fd(), point);
    }
    Ok(())
}

/// The path is the container's to change: no link is followed, so that nothing but a mount of this
/// name in a real directory of this path can be meant.
fn mark_idle_or_unmount(root: BorrowedFd<'_>, point: &Path) -> io::Result<()> {
    let (Some(above), Some(name)) = (point.parent(), point.file_name()) else {
        return Ok(());
    };
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let above = sys::open_without_links(root, above, flags)?;
    nix::unistd::fchdir(above.as_fd())?;
    umount2(name, MntFlags::MNT_EXPIRE | MntFlags::UMOUNT_NOFOLLOW)?;
    Ok(())
}

/// The file server's mounts strictly below the volumes, in the order they were mounted
/// (proc_pid_mountinfo(5): the fifth field is the mount point, the type follows a hyphen).
fn submounts(mountinfo: &[u8], volumes: &[PathBuf]) -> Vec<PathBuf> {
    let point = |line: &[u8]| {
        let mut fields = line.split(|&byte| byte == b' ');
        let point = unescape(fields.nth(4)?);
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        let below = |volume: &PathBuf| point.starts_with(volume) && point != *volume;
        (kind == b"virtiofs" && volumes.iter().any(below)).then_some(point)
    };
    mountinfo.split(|&b| b == b'\n').filter_map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_file_servers_mounts_below_the_volumes_are_let_go_of() {
        let mountinfo = b"1 0 0:1 / / rw - virtiofs sepal rw\n\
            2 1 0:2 / /vol rw,nodev - virtiofs sepal ro\n\
            3 2 0:3 / /vol/a\\040b rw,nodev shared:3 - virtiofs sepal rw\n\
            4 3 0:4 / /vol/a\\040b/own rw - tmpfs tmpfs rw\n\
            5 1 0:5 / /volume/x rw - virtiofs sepal rw\n\
            6 3 0:6 / /vol/a\\040b/in rw - virtiofs sepal rw\n";
        let found = submounts(mountinfo, &["/vol".into()]);
        assert_eq!(found, ["/vol/a b", "/vol/a b/in"].map(PathBuf::from));
    }

    #[test]
    fn volumes_follow_by_their_option() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion": "1.2.0", "mounts": [
                {"destination": "/a", "type": "bind", "source": "/s", "options": ["rbind", "rslave"]},
                {"destination": "/b", "type": "bind", "source": "/s", "options": ["rbind", "rprivate"]},
                {"destination": "/proc", "type": "proc"}]}"#,
        )
        .unwrap();
        assert_eq!(following_volumes(&spec), [PathBuf::from("/a")]);
    }
}
