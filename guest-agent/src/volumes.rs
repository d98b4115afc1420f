//! Copies of the host's volumes in the guest's memory, for programs that wait for changes.
//!
//! What the host does in a volume raises no event of inotify(7) in the guest: its kernel has not done
//! it. So volumes that live by such changes (ConfigMaps, Secrets and their kind) are copied, and each
//! change is repeated on the copy in the steps of the kubelet's atomic writer
//! (pkg/volume/util/atomic_writer.go): a directory with the new version, the link `..data` by a
//! rename, links of names that have come, names that have gone, the old version. The events are then
//! the guest kernel's own.
//!
//! All requests come from the shim. What lies in a copy may have been changed by a container with the
//! rights to mount anew: nothing here follows a link.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, readlinkat, renameat};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{FileStat, Mode, SFlag, UtimensatFlags, fstat, fstatat, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat};
use sepal_protocol::agent::{VolumeFile, WriteVolumeRequest};
use sepal_protocol::paths::guest as paths;

use crate::container::check_id;
use crate::error::Result;
use crate::launch;
use crate::reaper::Reaper;
use crate::sys;

/// The link that names the version that counts.
const DATA: &str = "..data";
/// A link before it takes another's place.
const NEW_LINK: &str = "..data_tmp";
/// The bits of st_mode that chmod(2) sets.
pub(crate) const PERMISSIONS: u32 = 0o7777;

/// The pod's copies.
#[derive(Debug, Default)]
pub struct Volumes {
    /// One request at a time.
    turn: tokio::sync::Mutex<()>,
}

impl Volumes {
    /// Does one request. In a helper process: what a container has done to a copy must not hold up
    /// the agent.
    ///
    /// # Errors
    /// With the file that cannot be written: the guest's memory is full. The version that counted
    /// counts on.
    pub async fn write(&self, reaper: &Arc<Reaper>, request: &WriteVolumeRequest) -> Result<()> {
        check_id(&request.volume_id)?;
        let _turn = self.turn.lock().await;
        let what = "cannot write the guest's copy of a volume";
        launch::aside(reaper, what, || {
            let all = Path::new(paths::VOLUMES);
            // Programs of a ConfigMap are run.
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            mount_once(all, "tmpfs", "volumes", flags, "mode=755")
                .map_err(|error| format!("{all:?}: {error}"))?;
            write(&all.join(&request.volume_id), request)
        })
        .await
    }
}

/// Mounts a tmpfs, or another file system that is memory, on a directory of its own, unless that is there
/// already.
pub(crate) fn mount_once(
    path: &Path,
    kind: &str,
    name: &str,
    flags: MsFlags,
    options: &str,
) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made?,
    }
    let mounted = mount(Some(name), path, Some(kind), flags, Some(options));
    if mounted.is_err() {
        let _ = fs::remove_dir(path);
    }
    Ok(mounted?)
}

fn write(path: &Path, request: &WriteVolumeRequest) -> std::result::Result<(), String> {
    let tell = |what: &OsStr| {
        let what = what.to_owned();
        move |error: io::Error| format!("{what:?}: {error}")
    };
    let copy = Copy::open(path).map_err(tell(path.as_os_str()))?;
    for file in &request.files {
        let put = copy.put(file).map_err(tell(OsStr::from_bytes(&file.path)));
        if put.is_err() {
            copy.drop_unfinished();
            return put;
        }
    }
    if let Some(names) = request.names.as_ref() {
        let names = names.names.iter().map(|name| OsStr::from_bytes(name));
        copy.retain(&names.collect())
            .map_err(tell(path.as_os_str()))?;
    }
    Ok(())
}

/// The copy of one volume.
struct Copy {
    path: PathBuf,
    root: OwnedFd,
}

impl Copy {
    fn open(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        Ok(Self {
            path: path.to_path_buf(),
            root: File::open(path)?.into(),
        })
    }

    /// Makes a file what it shall be, and touches nothing that it is already.
    fn put(&self, file: &VolumeFile) -> io::Result<()> {
        let place = self.place(&file.path)?;
        match kind(file.mode) {
            SFlag::S_IFDIR => place.put_directory(file),
            SFlag::S_IFREG => place.put_regular(file),
            SFlag::S_IFLNK => place.put_link(file),
            _ => Err(Errno::EINVAL.into()),
        }
    }

    fn place<'a>(&'a self, path: &'a [u8]) -> io::Result<Place> {
        let path = Path::new(OsStr::from_bytes(path));
        if path
            .components()
            .any(|part| !matches!(part, Component::Normal(_)))
        {
            return Err(Errno::EINVAL.into());
        }
        let above = match path.parent() {
            Some(above) if !above.as_os_str().is_empty() => above,
            _ => Path::new("."),
        };
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        Ok(Place {
            above: sys::open_without_links(self.root.as_fd(), above, flags)?,
            name: path.file_name().unwrap_or(OsStr::new(".")).to_owned(),
        })
    }

    /// Removes what is not among these names of the root: what users see first, as the kubelet does.
    fn retain(&self, names: &HashSet<&OsStr>) -> io::Result<()> {
        let mut gone = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if !names.contains(entry.file_name().as_os_str()) {
                gone.push((entry.file_type()?.is_dir(), entry.path()));
            }
        }
        gone.sort();
        gone.iter().try_for_each(|(_, path)| remove(path))
    }

    /// Removes versions that do not count: a full memory is not to stay so.
    fn drop_unfinished(&self) {
        let counts = readlinkat(&self.root, DATA).unwrap_or_default();
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let is_version = name.as_bytes().starts_with(b"..") && name != DATA;
            if is_version && name != counts {
                let _ = remove(&entry.path());
            }
        }
    }
}

/// Removes a file, or a directory with all that is in it. Its parent is the agent's own.
fn remove(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
}

/// Where a file is, or will be.
struct Place {
    above: OwnedFd,
    name: OsString,
}

impl Place {
    fn put_directory(&self, file: &VolumeFile) -> io::Result<()> {
        if !self.holds(SFlag::S_IFDIR)? {
            mkdirat(&self.above, self.name.as_os_str(), Mode::S_IRWXU)?;
        }
        self.set_attributes(file)
    }

    fn put_regular(&self, file: &VolumeFile) -> io::Result<()> {
        let there = self.holds(SFlag::S_IFREG)?;
        if !there || !is_whole(&self.stat()?, file) {
            // Somebody's lease is not waited for.
            let mut flags = libc::O_WRONLY | libc::O_CREAT | libc::O_NONBLOCK;
            if file.offset == 0 {
                flags |= libc::O_TRUNC;
            }
            // For nobody's eyes yet, as open(2) is given no mode.
            let opened = sys::open_without_links(self.above.as_fd(), Path::new(&self.name), flags)?;
            File::from(opened).write_all_at(&file.content, file.offset)?;
        }
        self.set_attributes(file)?;
        let set = TimeSpec::new(
            file.mtime_ns.div_euclid(1_000_000_000),
            file.mtime_ns.rem_euclid(1_000_000_000),
        );
        if mtime_ns(&self.stat()?) != file.mtime_ns {
            let (now, path) = (TimeSpec::UTIME_OMIT, self.handle()?);
            let path = proc_path(path.as_fd());
            utimensat(AT_FDCWD, &path, &now, &set, UtimensatFlags::FollowSymlink)?;
        }
        Ok(())
    }

    fn put_link(&self, file: &VolumeFile) -> io::Result<()> {
        let (name, says) = (self.name.as_os_str(), OsStr::from_bytes(&file.content));
        if !self.holds(SFlag::S_IFLNK)? {
            symlinkat(says, &self.above, name)?;
        } else if readlinkat(&self.above, name)? != says {
            let _ = unlinkat(&self.above, NEW_LINK, UnlinkatFlags::NoRemoveDir);
            symlinkat(says, &self.above, NEW_LINK)?;
            own(self.above.as_fd(), NEW_LINK, file)?;
            renameat(&self.above, NEW_LINK, &self.above, name)?;
        }
        let stat = self.stat()?;
        if (stat.st_uid, stat.st_gid) != (file.uid, file.gid) {
            own(self.above.as_fd(), name, file)?;
        }
        Ok(())
    }

    /// Whether something of this kind is there; what is of another goes.
    fn holds(&self, wanted: SFlag) -> io::Result<bool> {
        match self.stat() {
            Ok(stat) if kind(stat.st_mode) == wanted => Ok(true),
            Ok(_) => {
                remove(&Path::new(&proc_path(self.above.as_fd())).join(&self.name))?;
                Ok(false)
            }
            Err(Errno::ENOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn stat(&self) -> nix::Result<FileStat> {
        let no_link = AtFlags::AT_SYMLINK_NOFOLLOW;
        fstatat(&self.above, self.name.as_os_str(), no_link)
    }

    fn set_attributes(&self, file: &VolumeFile) -> io::Result<()> {
        set_attributes(self.handle()?.as_fd(), file)
    }

    /// The file itself, not opened: nobody who watches it is told.
    fn handle(&self) -> io::Result<OwnedFd> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        sys::open_without_links(self.above.as_fd(), Path::new(&self.name), flags)
    }
}

/// Owner and permissions of a file that need not be open, where they differ: each change is an event.
pub(crate) fn set_attributes(handle: BorrowedFd<'_>, file: &VolumeFile) -> io::Result<()> {
    let stat = fstat(handle)?;
    if (stat.st_uid, stat.st_gid) != (file.uid, file.gid) {
        own(handle, "", file)?;
    }
    // After the owner, which takes set-user-ID away.
    if fstat(handle)?.st_mode & PERMISSIONS != file.mode & PERMISSIONS {
        let mode = fs::Permissions::from_mode(file.mode & PERMISSIONS);
        fs::set_permissions(proc_path(handle), mode)?;
    }
    Ok(())
}

/// Sets the owner of a name in a directory, or without a name of the descriptor's file.
fn own<P: ?Sized + nix::NixPath>(
    fd: BorrowedFd<'_>,
    name: &P,
    file: &VolumeFile,
) -> io::Result<()> {
    let flags = AtFlags::AT_SYMLINK_NOFOLLOW | AtFlags::AT_EMPTY_PATH;
    let (uid, gid) = (Uid::from_raw(file.uid), Gid::from_raw(file.gid));
    Ok(fchownat(fd, name, Some(uid), Some(gid), flags)?)
}

/// What a descriptor of this process is called.
pub(crate) fn proc_path(fd: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

fn kind(mode: u32) -> SFlag {
    SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits())
}

fn mtime_ns(stat: &FileStat) -> i64 {
    stat.st_mtime
        .saturating_mul(1_000_000_000)
        .saturating_add(stat.st_mtime_nsec)
}

/// Whether all of a file has been written, now or in an earlier request.
fn is_whole(stat: &FileStat, file: &VolumeFile) -> bool {
    u64::try_from(stat.st_size) == Ok(file.size) && mtime_ns(stat) == file.mtime_ns
}

#[cfg(test)]
#[path = "volumes_test.rs"]
mod tests;
