//! The pod's share: what of the host the guest sees through virtio-fs.
//!
//! `<pod>/share` is a mount of its own with shared propagation, so that what is mounted below it
//! while the pod runs appears to the file server, which lives in a mount namespace of its own.
//! Per container: `rootfs`, as containerd's mounts say, and one entry below `mounts` for each volume.
//!
//! Volumes are mounted in the file server's namespace only. In the host's, a copy of what is mounted
//! in a volume would hold its mount points: the host could unmount there, and not remove the directory
//! (EBUSY). They go with their mount point's name, or with the server.
//!
//! A pod with a user namespace has files with other owners than the host. Volumes are then mounts that
//! map ids, and so are the lower directories of its root file systems, which containerd leaves to us to
//! make so (`uidmap=`, `gidmap=`); what the pod writes has the host's numbers of its users.
//!
//! Nothing here ever removes a tree: what is below a mount point belongs to somebody else. Mount
//! points are unmounted and then removed one by one, and a mount that is still there keeps its
//! place.

use std::fs::{DirBuilder, File};
use std::io::ErrorKind;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use sepal_protocol::mountinfo::unescape;
use sepal_protocol::paths;

use crate::spec::Bind;
use crate::sys::{self, BindOptions};
use crate::users::{self, IdMap, Namespaces, Users};

const OVERLAY: &str = "overlay";
const LOWER: &str = "lowerdir=";

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
    #[error(
        "{}: it cannot be shown with the owners that a user namespace asks for (hostUsers: false): \
         {source} (its file system does not map ids, or user.max_user_namespaces is reached)",
        .path.display()
    )]
    Owners {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("root file system: {0}")]
    Users(#[from] users::Error),
    #[error("root file system: containerd gave no mounts and {} is no directory", .0.display())]
    None(PathBuf),
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

    /// Where lower directories are mounted for a moment: not in the share, which the guest sees.
    fn layers(&self) -> PathBuf {
        self.root.with_file_name(paths::pod::LAYERS)
    }

    /// Mounts a container's root file system, `root` where no mounts are given for it, and makes the mount
    /// points of its volumes. Leaves nothing behind when it fails.
    ///
    /// # Errors
    /// What containerd gave cannot be mounted.
    pub fn add(
        &self,
        container: &str,
        root: &Path,
        mounts: &[RootMount],
        binds: &[Bind],
    ) -> Result<(), Error> {
        let added = self.try_add(container, root, mounts, binds);
        if added.is_err() {
            self.remove(container);
        }
        added
    }

    fn try_add(
        &self,
        container: &str,
        root: &Path,
        mounts: &[RootMount],
        binds: &[Bind],
    ) -> Result<(), Error> {
        let directory = self.root.join(container);
        let rootfs = directory.join(paths::ROOTFS);
        make_directory(&rootfs)?;
        if mounts.is_empty() {
            if !root.is_dir() {
                return Err(Error::None(root.into()));
            }
            let options = BindOptions {
                recursive: true,
                ..BindOptions::default()
            };
            sys::bind(root, &rootfs, options).map_err(io("mount", root))?;
        }
        if !mounts.is_empty() {
            let copy = self.stage(container, mounts)?;
            sys::attach(&copy, &rootfs).map_err(io("mount", &rootfs))?;
        }
        for (number, bind) in binds.iter().enumerate() {
            let target = directory.join(paths::MOUNTS).join(number.to_string());
            if bind.directory {
                make_directory(&target)?;
            } else {
                make_directory(&directory.join(paths::MOUNTS))?;
                File::create(&target).map_err(io("make", &target))?;
            }
        }
        Ok(())
    }

    /// Mounts a container's root file system where the file server does not see it, and makes a copy of it whose
    /// files are data and nothing else. A mount in the share is in the server's namespace at once, by another
    /// mount: flags that were set afterwards would not come there.
    fn stage(&self, container: &str, mounts: &[RootMount]) -> Result<OwnedFd, Error> {
        let stage = self.layers().join(format!("{container}+root"));
        make_directory(&stage)?;
        let mounted = mounts
            .iter()
            .try_for_each(|entry| mount_root(entry, &stage, &self.layers().join(container)));
        let whole = BindOptions {
            recursive: true,
            ..BindOptions::default()
        };
        let copy = mounted.and_then(|()| sys::copy_of(&stage, whole).map_err(io("mount", &stage)));
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        while umount2(&stage, flags).is_ok() {}
        remove_mount_point(&stage);
        copy
    }

    /// Mounts a container's volumes for the file server, which must have come to serving.
    ///
    /// # Errors
    /// A volume cannot be mounted, or the server has ended.
    pub fn attach(
        &self,
        container: &str,
        binds: &[Bind],
        server: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let failed = |bind: &Bind, source| Error::Volume {
            source_path: bind.source.clone(),
            source,
        };
        let (mut copies, mut namespaces) = (Vec::new(), Namespaces::default());
        for bind in binds {
            let copy = sys::copy_of(&bind.source, bind.options).map_err(|e| failed(bind, e))?;
            if let Some(owners) = &bind.owners {
                show_owners(&copy, owners, &mut namespaces).map_err(owners_of(&bind.source))?;
            }
            copies.push((bind, copy));
        }
        let share = inode(&self.root).map_err(io("look at", &self.root))?;
        let work = || {
            // Its root directory is the share; where it shares our namespace the share is where we
            // see it.
            let root = if inode(Path::new("/")).is_ok_and(|root| root == share) {
                Path::new("/")
            } else {
                &self.root
            };
            let mounts = root.join(container).join(paths::MOUNTS);
            for (number, (bind, copy)) in copies.iter().enumerate() {
                let target = mounts.join(number.to_string());
                sys::attach(copy, &target).map_err(|e| failed(bind, e))?;
            }
            Ok(())
        };
        sys::in_mount_namespace(server, work).map_err(io("mount volumes in", &self.root))?
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
        // Only a shim that was killed has left any.
        unmount_below(&self.layers());
        unmount_below(&self.root);
        remove_mount_point(&self.root);
    }
}

/// The device and the inode: which file it is.
fn inode(path: &Path) -> std::io::Result<(u64, u64)> {
    std::fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
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
    let point = |line: &str| {
        line.split(' ')
            .nth(4)
            .map(|field| unescape(field.as_bytes()))
    };
    mountinfo
        .lines()
        .filter_map(point)
        .filter(|p| p.starts_with(path))
        .collect()
}

fn owners_of(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Owners { path, source }
}

fn show_owners(copy: &OwnedFd, owners: &IdMap, namespaces: &mut Namespaces) -> std::io::Result<()> {
    let users = namespaces.of(&owners.users)?;
    sys::map_ids(copy, users, owners.recursive)
}

/// As containerd's own mount package does it. `layers` is a directory of this container's alone, which
/// is made and removed again.
fn mount_root(entry: &RootMount, target: &Path, layers: &Path) -> Result<(), Error> {
    let Some(users) = Users::of_options(&entry.options)? else {
        return mount_plain(entry, target);
    };
    let mut entry = entry.clone();
    entry.options.retain(|option| !users::is_option(option));
    if entry.kind == OVERLAY {
        return mount_layers(&entry, target, users, layers);
    }
    mount_plain(&entry, target)?;
    // A mount that is attached cannot be changed so: a copy of it takes its place.
    let owners = IdMap {
        users,
        recursive: false,
    };
    let copy = sys::copy_of(target, BindOptions::default()).map_err(io("mount", target))?;
    show_owners(&copy, &owners, &mut Namespaces::default()).map_err(owners_of(target))?;
    umount2(target, MntFlags::MNT_DETACH).map_err(|e| io("unmount", target)(e.into()))?;
    sys::attach(&copy, target).map_err(io("mount", target))
}

/// Mounts an overlay whose lower directories show the owners that these users have outside. What is
/// written goes to the upper directory as it is.
fn mount_layers(
    entry: &RootMount,
    target: &Path,
    users: Users,
    layers: &Path,
) -> Result<(), Error> {
    let is_lower = |option: &String| option.starts_with(LOWER);
    let (lower, mut options): (Vec<_>, Vec<_>) = entry.options.iter().cloned().partition(is_lower);
    let directories = lower.iter().filter_map(|option| option.strip_prefix(LOWER));
    let directories: Vec<_> = directories.flat_map(|all| all.split(':')).collect();

    // overlayfs makes copies of its own of these mounts. One file system holds them until then, so that
    // they go with one call.
    make_directory(layers)?;
    let none = None::<&str>;
    let made = mount(
        Some("layers"),
        layers,
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    );
    made.map_err(|e| io("mount", layers)(e.into()))?;
    let mounted = (|| {
        let private = MsFlags::MS_PRIVATE;
        mount(none, layers, none, private, none).map_err(|e| io("mount", layers)(e.into()))?;
        let (mut names, mut namespaces) = (Vec::new(), Namespaces::default());
        let owners = IdMap {
            users,
            recursive: false,
        };
        for (number, directory) in directories.into_iter().enumerate() {
            let directory = Path::new(directory);
            let read_only = BindOptions {
                read_only: true,
                ..BindOptions::default()
            };
            let copy = sys::copy_of(directory, read_only).map_err(io("mount", directory))?;
            show_owners(&copy, &owners, &mut namespaces).map_err(owners_of(directory))?;
            let name = number.to_string();
            let place = layers.join(&name);
            make_directory(&place)?;
            sys::attach(&copy, &place).map_err(io("mount", &place))?;
            names.push(name);
        }
        // Short names: mount(2) takes one page of options.
        options.push(format!("{LOWER}{}", names.join(":")));
        let (flags, data) = split_options(&options);
        let work = || {
            mount(
                Some(OVERLAY),
                target,
                Some(OVERLAY),
                flags,
                Some(data.as_str()),
            )
        };
        let mounted = sys::in_directory(layers, work).map_err(io("enter", layers))?;
        mounted.map_err(|e| rootfs_failed(entry, std::io::Error::from(e).to_string()))
    })();
    if let Err(e) = umount2(layers, MntFlags::MNT_DETACH) {
        tracing::warn!(path = %layers.display(), "cannot unmount: {e}");
    }
    remove_mount_point(layers);
    mounted
}

fn rootfs_failed(entry: &RootMount, reason: String) -> Error {
    Error::Rootfs {
        kind: entry.kind.clone(),
        from: entry.source.clone(),
        reason,
    }
}

fn mount_plain(entry: &RootMount, target: &Path) -> Result<(), Error> {
    let failed = |reason: String| rootfs_failed(entry, reason);
    let bind = |o: &String| o == "bind" || o == "rbind";
    if entry.kind == "bind" || entry.options.iter().any(bind) {
        let has = |name: &str| entry.options.iter().any(|o| o == name);
        let options = BindOptions {
            recursive: has("rbind"),
            read_only: has("ro"),
            recursive_read_only: has("rro"),
            follows_source: false,
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
#[path = "rootfs_test.rs"]
mod tests;
