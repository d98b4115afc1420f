//! Volumes that are the guest's memory: emptyDir with `medium: Memory`, or with `medium: HugePages`.
//!
//! What containers of one pod share in such a volume is counted where it is used, in the guest, and no
//! page of it goes through the file server. The host's own tmpfs of the volume stays empty; only its
//! size and who may do what in it are the guest's too.
//!
//! Containers write in a volume as they like, also while others that see a part of it (`subPath`) are
//! made: no link in it is followed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, mkdirat};
use sepal_protocol::agent::{MemoryVolume, VolumeFile};
use sepal_protocol::paths::guest as paths;

use crate::container::check_id;
use crate::error::{Error, Result};
use crate::launch;
use crate::reaper::Reaper;
use crate::sys;
use crate::volumes::{PERMISSIONS, mount_once, proc_path, set_attributes};

/// Makes what a container in `directory` wants of volumes, and answers where it has been mounted. The
/// caller unmounts it, also after an error.
///
/// # Errors
/// With the volume that cannot be made, or the directory in it.
pub async fn provide(
    reaper: &Arc<Reaper>,
    directory: &Path,
    wanted: &[MemoryVolume],
    mounts: &mut Vec<PathBuf>,
) -> Result<()> {
    let all = directory.join(paths::CONTAINER_MEMORY);
    for (number, volume) in wanted.iter().enumerate() {
        check(volume)?;
        let target = all.join(number.to_string());
        mounts.push(target.clone());
        // A file system with what a container has put there can be slow, or hold up for good.
        launch::aside(reaper, "cannot make a volume in memory", || {
            attach(volume, Path::new(paths::MEMORY), &target)
                .map_err(|error| format!("{}: {error}", volume.volume_id))
        })
        .await?;
    }
    Ok(())
}

fn check(volume: &MemoryVolume) -> Result<()> {
    check_id(&volume.volume_id)?;
    let (root, below) = volume.directories.split_first().unzip();
    let is_root = root.is_some_and(|root: &VolumeFile| root.path.is_empty());
    let names = below.into_iter().flatten().all(|file| is_name(&file.path));
    if is_root && names {
        Ok(())
    } else {
        Err(Error::Invalid(format!(
            "volume {} is not described from its root on",
            volume.volume_id
        )))
    }
}

fn is_name(bytes: &[u8]) -> bool {
    let path = Path::new(OsStr::from_bytes(bytes));
    let mut parts = path.components();
    matches!(parts.next(), Some(Component::Normal(name)) if name == path.as_os_str())
}

/// In a helper process.
fn attach(volume: &MemoryVolume, place: &Path, target: &Path) -> io::Result<()> {
    let mut seen = make(volume, &place.join(&volume.volume_id))?;
    for directory in volume.directories.get(1..).unwrap_or_default() {
        seen = descend(seen.as_fd(), directory)?;
    }
    let kind = File::from(seen.try_clone()?).metadata()?;
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    // Some container may have made a file of that name before the host thought of a directory.
    if kind.is_dir() {
        fs::create_dir_all(target)?;
    } else {
        File::create(target)?;
    }
    let (source, none) = (proc_path(seen.as_fd()), None::<&str>);
    mount(Some(&source), target, none, MsFlags::MS_BIND, none)?;
    Ok(())
}

/// The root of a volume, which the first container makes.
fn make(volume: &MemoryVolume, path: &Path) -> io::Result<OwnedFd> {
    let mut options = String::new();
    if let Some(root) = volume.directories.first() {
        let (mode, uid, gid) = (root.mode & PERMISSIONS, root.uid, root.gid);
        options = format!("mode={mode:o},uid={uid},gid={gid}");
    }
    if volume.size > 0 {
        options += &format!(",size={}", volume.size);
    }
    let kind = if volume.huge_page > 0 {
        options += &format!(",pagesize={}", volume.huge_page);
        "hugetlbfs"
    } else {
        "tmpfs"
    };
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    mount_once(path, kind, "memory", MsFlags::empty(), &options)?;
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    Ok(File::options()
        .read(true)
        .custom_flags(flags)
        .open(path)?
        .into())
}

/// What has a directory's name, which is made where nothing has.
fn descend(above: BorrowedFd<'_>, directory: &VolumeFile) -> io::Result<OwnedFd> {
    let name = Path::new(OsStr::from_bytes(&directory.path));
    let made = match mkdirat(above, name, Mode::S_IRWXU) {
        Err(Errno::EEXIST) => false,
        made => made.map(|()| true)?,
    };
    let opened = sys::open_without_links(above, name, libc::O_PATH)?;
    if made {
        set_attributes(opened.as_fd(), directory)?;
    }
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn directory(name: &str, mode: u32) -> VolumeFile {
        VolumeFile {
            path: name.into(),
            mode,
            // Whoever runs the tests may give a file to nobody else.
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            ..Default::default()
        }
    }

    fn volume(names: &[&str]) -> MemoryVolume {
        MemoryVolume {
            volume_id: "0-42".into(),
            directories: names.iter().map(|name| directory(name, 0o755)).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_volume_is_described_from_its_root_on_by_names() {
        check(&volume(&[""])).unwrap();
        check(&volume(&["", "a", "b c"])).unwrap();
        for names in [
            &[][..],
            &["a"],
            &["", ""],
            &["", ".."],
            &["", "a/b"],
            &["", "/"],
            &["", "a/"],
        ] {
            assert!(check(&volume(names)).is_err(), "{names:?}");
        }
        let mut elsewhere = volume(&[""]);
        elsewhere.volume_id = "../0-42".into();
        assert!(check(&elsewhere).is_err());
    }

    #[test]
    fn a_directory_that_is_not_there_is_made_as_the_hosts_and_one_that_is_stays() {
        let dir = tempfile::tempdir().unwrap();
        let root = File::open(dir.path()).unwrap();
        for mode in [0o2770, 0o700] {
            descend(root.as_fd(), &directory("sub", mode)).unwrap();
            let about = fs::metadata(dir.path().join("sub")).unwrap();
            assert_eq!(about.mode() & PERMISSIONS, 0o2770);
        }
        fs::write(dir.path().join("file"), "theirs").unwrap();
        let file = descend(root.as_fd(), &directory("file", 0o755)).unwrap();
        assert!(File::from(file).metadata().unwrap().is_file());
    }

    #[test]
    fn a_link_that_a_container_has_planted_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = File::open(dir.path()).unwrap();
        symlink("/etc", dir.path().join("sub")).unwrap();
        let refused = descend(root.as_fd(), &directory("sub", 0o755)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ELOOP));
    }
}
