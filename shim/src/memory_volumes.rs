//! Volumes that are memory: emptyDir with `medium: Memory` or `medium: HugePages`.
//!
//! The kubelet mounts a tmpfs or a hugetlbfs for one, empty, and containers of the pod get it or
//! directories of it (`subPath`). In a VM that must be the guest's own: pages of the host's would be
//! counted where no limit of the pod knows of them, and go through the file server. So the guest makes one
//! of the same size, and only what the kubelet has decided is taken over: names, owners, permissions. The
//! host's stays empty.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use sepal_protocol::agent::{MemoryVolume, VolumeFile};
use sepal_protocol::mountinfo::unescape;

use crate::users::Users;

/// The directory in which the kubelet keeps a pod's emptyDirs (pkg/volume/emptydir).
const EMPTY_DIRS: &str = "kubernetes.io~empty-dir";

/// The volume that a directory of the host is, or is a part of, if it is of this kind; `users` are those
/// that its owners are users of. Costs one look where it is on another file system.
pub fn of(directory: &Path, users: Option<&Users>) -> Option<MemoryVolume> {
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(directory)
        .ok()?;
    let about = fstatfs(&opened).ok()?;
    let block = about.block_size().unsigned_abs();
    let huge_page = match about.filesystem_type() {
        TMPFS_MAGIC => 0,
        HUGETLBFS_MAGIC => block,
        _ => return None,
    };
    // Its path without links, and the mount that it is reached by.
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&opened);
    let path = std::fs::read_link(format!("/proc/self/fd/{descriptor}")).ok()?;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).ok()?;
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    let mountinfo = std::fs::read("/proc/self/mountinfo").ok()?;
    let found = find(&mountinfo, mount.trim(), &path)?;

    let mut place = found.volume;
    let mut directories = vec![described(&place, Path::new(""), users)?];
    for name in &found.below {
        place.push(name);
        directories.push(described(&place, Path::new(name), users)?);
    }
    // statfs(2) has it in blocks; without a limit there are none.
    let size = about.blocks().saturating_mul(block);
    Some(MemoryVolume {
        volume_id: found.device.replace(':', "-"),
        size,
        directories,
        huge_page,
        ..Default::default()
    })
}

fn described(path: &Path, name: &Path, users: Option<&Users>) -> Option<VolumeFile> {
    let about = path
        .symlink_metadata()
        .ok()
        .filter(|about| about.is_dir())?;
    Some(VolumeFile {
        path: name.as_os_str().as_bytes().to_vec(),
        mode: about.mode(),
        uid: users.map_or(about.uid(), |users| users.uid(about.uid())),
        gid: users.map_or(about.gid(), |users| users.gid(about.gid())),
        ..Default::default()
    })
}

#[derive(Debug, PartialEq, Eq)]
struct Found {
    /// MAJOR:MINOR: which tmpfs it is.
    device: String,
    /// Where the kubelet has mounted it.
    volume: PathBuf,
    /// Names from its root to the directory in question.
    below: Vec<PathBuf>,
}

/// Looks for the emptyDir that a path belongs to which is reached by a mount
/// (proc_pid_mountinfo(5): id, parent, MAJOR:MINOR, root, mount point).
fn find(mountinfo: &[u8], mount: &str, path: &Path) -> Option<Found> {
    let fields = |line: &[u8]| {
        let mut fields = line.split(|&byte| byte == b' ').map(<[u8]>::to_vec);
        let (id, _) = (fields.next()?, fields.next()?);
        let device = String::from_utf8(fields.next()?).ok()?;
        let (root, point) = (unescape(&fields.next()?), unescape(&fields.next()?));
        Some((id, device, root, point))
    };
    let lines = || mountinfo.split(|&byte| byte == b'\n').filter_map(fields);
    let (_, device, root, point) = lines().find(|(id, ..)| id == mount.as_bytes())?;
    let (_, _, _, volume) = lines().find(|(_, other, root, point)| {
        let kind = point.parent().and_then(Path::file_name);
        *other == device && root == Path::new("/") && kind.is_some_and(|kind| kind == EMPTY_DIRS)
    })?;
    let inside = root.join(path.strip_prefix(&point).ok()?);
    let below = inside.strip_prefix("/").ok()?.iter().map(PathBuf::from);
    Some(Found {
        device,
        volume,
        below: below.collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: &str = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/cache";
    const PART: &str = "/var/lib/kubelet/pods/1/volume-subpaths/cache/app/0";

    fn mountinfo() -> String {
        format!(
            "30 1 0:30 / / rw - ext4 /dev/vda rw\n\
             31 30 0:41 / /run rw - tmpfs run rw\n\
             32 30 0:42 / {VOLUME} rw,relatime shared:9 - tmpfs tmpfs rw,size=65536k\n\
             33 30 0:42 /a\\040b/c {PART} rw,relatime shared:9 - tmpfs tmpfs rw,size=65536k\n\
             34 30 0:43 / /var/lib/kubelet/pods/1/volumes/kubernetes.io~secret/key rw - tmpfs tmpfs rw\n"
        )
    }

    fn found(mount: &str, path: &str) -> Option<Found> {
        find(mountinfo().as_bytes(), mount, Path::new(path))
    }

    #[test]
    fn a_volume_and_parts_of_it_are_one_file_system() {
        let expected = |below: &[&str]| {
            Some(Found {
                device: "0:42".into(),
                volume: VOLUME.into(),
                below: below.iter().map(PathBuf::from).collect(),
            })
        };
        assert_eq!(found("32", VOLUME), expected(&[]));
        assert_eq!(found("32", &format!("{VOLUME}/x")), expected(&["x"]));
        assert_eq!(found("33", PART), expected(&["a b", "c"]));
    }

    #[test]
    fn other_file_systems_in_memory_are_none() {
        assert_eq!(found("31", "/run/something"), None);
        let secret = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~secret/key";
        assert_eq!(found("34", secret), None);
        assert_eq!(found("99", VOLUME), None);
        assert_eq!(of(Path::new("/proc"), None), None);
        assert_eq!(of(Path::new("/does/not/exist"), None), None);
    }
}
