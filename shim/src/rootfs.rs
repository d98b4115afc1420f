//! The pod's share: what of the host the guest sees through virtio-fs.
//!
//! `<pod>/share` is a mount of its own with shared propagation, so that what is mounted below it
//! while the pod runs appears to the file server, which lives in a mount namespace of its own.
//! Per container: `rootfs`, as containerd's mounts say, and one entry below `mounts` for each bind.
//!
//! Nothing here ever removes a tree: what is below a mount point belongs to somebody else. Mount
//! points are unmounted and then removed one by one, and a mount that is still there keeps its
//! place.

use std::fs::{DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use sepal_protocol::paths;

use crate::spec::Bind;
use crate::sys::{self, BindOptions};

/// Why a root file system or a volume is not there.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("cannot {what} {}: {source}", .path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("root file system: cannot mount {kind} from {from}: {reason}")]
    Rootfs {
        kind: String,
        from: String,
        reason: String,
    },
    #[error("root file system: containerd gave no mounts and the bundle has no rootfs directory")]
    None,
    #[error("volume {}: cannot mount it into the pod: {source}", .source_path.display())]
    Volume {
        source_path: PathBuf,
        source: std::io::Error,
    },
}

/// One of containerd's mounts (containerd.types.Mount).
#[derive(Debug, Clone)]
pub struct RootMount {
    /// File system type, `bind`, `overlay`.
    pub kind: String,
    /// Device or directory.
    pub source: String,
    /// As mount(8) has them.
    pub options: Vec<String>,
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { what, path, source }
}

fn make_directory(path: &Path) -> Result<(), Error> {
    let made = DirBuilder::new().recursive(true).mode(0o711).create(path);
    made.map_err(io("make the directory", path))
}

/// The share of one pod.
#[derive(Debug, Clone)]
pub struct Share {
    root: PathBuf,
}

impl Share {
    /// Makes the share below the pod's directory.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(pod: &Path) -> Result<Self, Error> {
        let share = Self::of(pod);
        make_directory(&share.root)?;
        let options = BindOptions::default();
        sys::bind(&share.root, &share.root, options).map_err(io("mount", &share.root))?;
        let shared = MsFlags::MS_SHARED;
        mount(
            None::<&str>,
            &share.root,
            None::<&str>,
            shared,
            None::<&str>,
        )
        .map_err(|e| io("share", &share.root)(e.into()))?;
        Ok(share)
    }

    /// The share that a pod's directory has or had.
    pub fn of(pod: &Path) -> Self {
        Self {
            root: pod.join(paths::pod::SHARE),
        }
    }

    /// Where it is on the host.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Mounts a container's root file system and its binds. Leaves nothing behind when it fails.
    ///
    /// # Errors
    /// What containerd gave cannot be mounted.
    pub fn add(
        &self,
        container: &str,
        bundle: &Path,
        mounts: &[RootMount],
        binds: &[Bind],
    ) -> Result<(), Error> {
        let added = self.try_add(container, bundle, mounts, binds);
        if added.is_err() {
            self.remove(container);
        }
        added
    }

    fn try_add(
        &self,
        container: &str,
        bundle: &Path,
        mounts: &[RootMount],
        binds: &[Bind],
    ) -> Result<(), Error> {
        let directory = self.root.join(container);
        let rootfs = directory.join(paths::ROOTFS);
        make_directory(&rootfs)?;
        if mounts.is_empty() {
            let own = bundle.join("rootfs");
            if !own.is_dir() {
                return Err(Error::None);
            }
            let options = BindOptions {
                recursive: true,
                ..BindOptions::default()
            };
            sys::bind(&own, &rootfs, options).map_err(io("mount", &own))?;
        }
        for entry in mounts {
            mount_root(entry, &rootfs)?;
        }
        for (number, bind) in binds.iter().enumerate() {
            let target = directory.join(paths::MOUNTS).join(number.to_string());
            if bind.directory {
                make_directory(&target)?;
            } else {
                make_directory(&directory.join(paths::MOUNTS))?;
                File::create(&target).map_err(io("make", &target))?;
            }
            sys::bind(&bind.source, &target, bind.options).map_err(|source| Error::Volume {
                source_path: bind.source.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Unmounts a container's part of the share and removes its mount points.
    pub fn remove(&self, container: &str) {
        let directory = self.root.join(container);
        unmount_below(&directory);
        let mounts = directory.join(paths::MOUNTS);
        for entry in std::fs::read_dir(&mounts).into_iter().flatten().flatten() {
            remove_mount_point(&entry.path());
        }
        for path in [mounts, directory.join(paths::ROOTFS), directory] {
            remove_mount_point(&path);
        }
    }

    /// Removes all that is left of the share.
    pub fn remove_all(&self) {
        for entry in std::fs::read_dir(&self.root)
            .into_iter()
            .flatten()
            .flatten()
        {
            if let Some(name) = entry.file_name().to_str() {
                self.remove(name);
            }
        }
        unmount_below(&self.root);
        remove_mount_point(&self.root);
    }
}

/// Removes an empty directory or an empty file. A mount point that is in use stays (EBUSY), and so
/// does whatever is not empty.
fn remove_mount_point(path: &Path) {
    let Ok(metadata) = path.symlink_metadata() else {
        return;
    };
    let removed = if metadata.is_dir() {
        std::fs::remove_dir(path)
    } else if metadata.is_file() && metadata.len() == 0 {
        std::fs::remove_file(path)
    } else {
        Err(ErrorKind::DirectoryNotEmpty.into())
    };
    if let Err(e) = removed
        && e.kind() != ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), "cannot remove the mount point: {e}");
    }
}

/// Unmounts all that is mounted at or below a path, last mounted first.
pub fn unmount_below(path: &Path) {
    // A mount over a mount hides it: repeated until nothing is left, with a limit.
    for _ in 0..8 {
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mount_points_below(&mountinfo, path);
        if points.is_empty() {
            return;
        }
        for point in points.iter().rev() {
            let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
            if let Err(e) = umount2(point, flags)
                && e != nix::Error::EINVAL
            {
                tracing::warn!(path = %point.display(), "cannot unmount: {e}");
            }
        }
    }
}

/// Mount points at or below a path in a mountinfo, in the order they were mounted.
fn mount_points_below(mountinfo: &str, path: &Path) -> Vec<PathBuf> {
    let point = |line: &str| line.split(' ').nth(4).map(unescape);
    mountinfo
        .lines()
        .filter_map(point)
        .filter(|p| p.starts_with(path))
        .collect()
}

/// Space, tab, newline and backslash are octal in mountinfo, proc_pid_mountinfo(5).
fn unescape(field: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        match octal.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(value) if byte == b'\\' => {
                bytes.push(value);
                rest = &after[3..];
            }
            _ => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

fn mount_root(entry: &RootMount, target: &Path) -> Result<(), Error> {
    let failed = |reason: String| Error::Rootfs {
        kind: entry.kind.clone(),
        from: entry.source.clone(),
        reason,
    };
    let bind = |o: &String| o == "bind" || o == "rbind";
    if entry.kind == "bind" || entry.options.iter().any(bind) {
        let has = |name: &str| entry.options.iter().any(|o| o == name);
        let options = BindOptions {
            recursive: has("rbind"),
            read_only: has("ro"),
            recursive_read_only: has("rro"),
        };
        return sys::bind(Path::new(&entry.source), target, options)
            .map_err(|e| failed(e.to_string()));
    }
    let (flags, data) = split_options(&entry.options);
    let source = (!entry.source.is_empty()).then_some(entry.source.as_str());
    // mount(2) takes one page of data. Longer lower directories are made relative on a thread that
    // has a working directory of its own; the library does that, in the calling thread.
    if data.len() < 3500 && !entry.options.iter().any(|o| o == "loop") {
        let data = (!data.is_empty()).then_some(data.as_str());
        return mount(source, target, Some(entry.kind.as_str()), flags, data)
            .map_err(|e| failed(std::io::Error::from(e).to_string()));
    }
    std::thread::scope(|scope| {
        let work = || {
            let kind = Some(entry.kind.as_str());
            containerd_shim::mount::mount_rootfs(kind, source, &entry.options, target)
        };
        let result = scope.spawn(work).join();
        match result {
            Ok(done) => done.map_err(|e| failed(e.to_string())),
            Err(_) => Err(failed("the mounting thread has panicked".into())),
        }
    })
}

/// mount(8) options that are flags of mount(2), and the rest as the file system's data.
fn split_options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" => flags -= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "suid" => flags -= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "dev" => flags -= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "exec" => flags -= MsFlags::MS_NOEXEC,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "defaults" | "async" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_data() {
        let options = ["ro", "lowerdir=/a:/b", "nodev", "volatile", "defaults"].map(String::from);
        let (flags, data) = split_options(&options);
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
        assert_eq!(data, "lowerdir=/a:/b,volatile");
    }

    #[test]
    fn mount_points_are_found_with_spaces_and_not_beside() {
        let mountinfo = "1 0 0:1 / /run/sepal/p/share rw - tmpfs t rw\n\
                         2 1 0:2 / /run/sepal/p/share/a\\040b rw - tmpfs t rw\n\
                         3 1 0:3 / /run/sepal/p/share2 rw - tmpfs t rw\n";
        let found = mount_points_below(mountinfo, Path::new("/run/sepal/p/share"));
        let expected = ["/run/sepal/p/share", "/run/sepal/p/share/a b"].map(PathBuf::from);
        assert_eq!(found, expected);
    }

    #[test]
    fn a_container_comes_and_goes_and_volumes_keep_their_files() {
        if !sys::is_root() {
            return;
        }
        let pod = tempfile::tempdir().unwrap();
        let volume = tempfile::tempdir().unwrap();
        std::fs::write(volume.path().join("precious"), "x").unwrap();
        let file = volume.path().join("precious");
        let share = Share::create(pod.path()).unwrap();
        let read_only = BindOptions {
            read_only: true,
            ..BindOptions::default()
        };
        let binds = [
            Bind {
                source: volume.path().into(),
                options: read_only,
                directory: true,
            },
            Bind {
                source: file.clone(),
                options: BindOptions::default(),
                directory: false,
            },
        ];
        let root = RootMount {
            kind: "bind".into(),
            source: volume.path().display().to_string(),
            options: vec!["rbind".into(), "rw".into()],
        };
        share
            .add("c1", Path::new("/nonexistent"), &[root], &binds)
            .unwrap();
        let in_share = share.path().join("c1/mounts/0");
        assert!(in_share.join("precious").exists());
        assert!(
            std::fs::write(in_share.join("new"), "").is_err(),
            "read-only"
        );
        assert_eq!(
            std::fs::read_to_string(share.path().join("c1/mounts/1")).unwrap(),
            "x"
        );
        assert!(share.path().join("c1/rootfs/precious").exists());

        let absent = Bind {
            source: "/nonexistent".into(),
            ..binds[0].clone()
        };
        let failed = share.add("c2", volume.path(), &[], &[absent]).unwrap_err();
        assert!(matches!(failed, Error::None), "{failed}");
        assert!(!share.path().join("c2").exists());

        share.remove_all();
        assert!(!share.path().exists());
        assert_eq!(std::fs::read_to_string(file).unwrap(), "x");
    }
}
