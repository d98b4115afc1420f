//! Files without a name (O_TMPFILE of open(2)), which virtiofsd does not make.
//!
//! Each is an open file of ours under a number from the upper half of the inode numbers, where
//! virtiofsd, which counts from 1, never comes. It lives until the guest forgets it. When the guest
//! gives it a name (linkat(2)), the name leads to the same file of the host under an ordinary
//! number, and what is open stays open.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, futimens, umask};
use nix::sys::time::TimeSpec;
use nix::unistd::linkat;
use virtiofsd::filesystem::SetattrValid;
use virtiofsd::fuse::{Attr, CreateIn, SetattrIn};
use virtiofsd::soft_idmap::Id;

/// The bit that tells our numbers, of inodes and of handles, from virtiofsd's.
const OURS: u64 = 1 << 63;
/// What of the guest's flags the host's file is opened with; the rest is the guest's own business.
const FLAGS: i32 = libc::O_ACCMODE | libc::O_APPEND | libc::O_SYNC | libc::O_DSYNC;

/// Whether this number is that of a file, or handle, in here.
pub fn is_ours(number: u64) -> bool {
    number & OURS != 0
}

/// An open file without a name, or one more handle for it.
#[derive(Clone)]
pub struct Unnamed {
    /// The file.
    pub file: Arc<File>,
    /// The directory it was made in: it stands for the file system.
    pub directory: u64,
}

/// All of them.
pub struct UnnamedFiles {
    /// The directory of this process's descriptors.
    proc: File,
    /// Most files and handles at a time: they are not among the descriptors that virtiofsd counts.
    most: usize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    files: HashMap<u64, Unnamed>,
    last: u64,
}

impl UnnamedFiles {
    /// None yet, and never more than `most`; `proc` is /proc/self/fd.
    pub fn new(proc: File, most: usize) -> Self {
        Self {
            proc,
            most,
            table: Mutex::default(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A file or handle by its number.
    ///
    /// # Errors
    /// EBADF: there is none.
    pub fn get(&self, number: u64) -> io::Result<Unnamed> {
        let found = self.table().files.get(&number).cloned();
        found.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// Lets go of a file or handle.
    pub fn remove(&self, number: u64) {
        self.table().files.remove(&number);
    }

    /// Lets go of all.
    pub fn clear(&self) {
        self.table().files.clear();
    }

    fn add(&self, unnamed: Unnamed) -> io::Result<u64> {
        let mut table = self.table();
        if table.files.len() >= self.most {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        table.last += 1;
        let number = OURS | table.last;
        table.files.insert(number, unnamed);
        Ok(number)
    }

    /// Makes a file in a directory; answers the number of its inode and that of its first handle.
    ///
    /// # Errors
    /// What the host's file system says; EOPNOTSUPP where it has no such files.
    pub fn create(
        &self,
        directory: u64,
        opened: &OwnedFd,
        request: &CreateIn,
        owner: (u32, u32),
    ) -> io::Result<(u64, u64)> {
        let bits = |mode: u32| Mode::from_bits_truncate(mode & 0o7777);
        let flags = (request.flags as i32 & FLAGS) | libc::O_TMPFILE | libc::O_CLOEXEC;
        // The guest leaves the umask to us, because a default ACL of the directory overrides it.
        let before = umask(bits(request.umask));
        let made = openat(
            opened,
            c".",
            OFlag::from_bits_retain(flags),
            bits(request.mode),
        );
        umask(before);
        // Where owners are mapped we are nobody; a program then takes a file with a name.
        let file = File::from(made.map_err(|error| match error {
            Errno::EOVERFLOW => Errno::EOPNOTSUPP,
            other => other,
        })?);
        let metadata = file.metadata()?;
        let mode = metadata.permissions().mode() & 0o7777;
        // In a set-group-id directory the group is the directory's, which the host has seen to.
        let inherited = File::from(opened.try_clone()?).metadata()?.mode() & libc::S_ISGID != 0;
        fchown(&file, Some(owner.0), (!inherited).then_some(owner.1))?;
        if mode & 0o6000 != 0 {
            // A change of owner takes these away.
            file.set_permissions(Permissions::from_mode(mode))?;
        }
        let unnamed = Unnamed {
            file: Arc::new(file),
            directory,
        };
        let inode = self.add(unnamed.clone())?;
        let handle = self.add(unnamed).inspect_err(|_| self.remove(inode))?;
        Ok((inode, handle))
    }

    /// One more handle.
    ///
    /// # Errors
    /// As for [`UnnamedFiles::get`], and what open(2) says.
    pub fn open(&self, inode: u64, flags: u32) -> io::Result<u64> {
        let Unnamed { file, directory } = self.get(inode)?;
        let flags = (flags as i32 & (FLAGS | libc::O_TRUNC)) | libc::O_CLOEXEC;
        let name = self.name(&file)?;
        let opened = openat(
            &self.proc,
            name.as_c_str(),
            OFlag::from_bits_retain(flags),
            Mode::empty(),
        )?;
        self.add(Unnamed {
            file: Arc::new(opened.into()),
            directory,
        })
    }

    /// Gives a file a name.
    ///
    /// # Errors
    /// As for [`UnnamedFiles::get`], and what linkat(2) says.
    pub fn link(&self, inode: u64, directory: &OwnedFd, name: &CStr) -> io::Result<()> {
        if name.to_bytes().contains(&b'/') {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let unnamed = self.get(inode)?;
        let from = self.name(&unnamed.file)?;
        linkat(
            &self.proc,
            from.as_c_str(),
            directory,
            name,
            AtFlags::AT_SYMLINK_FOLLOW,
        )?;
        Ok(())
    }

    /// The file's entry in /proc/self/fd.
    fn name(&self, file: &File) -> io::Result<CString> {
        Ok(CString::new(file.as_fd().as_raw_fd().to_string())?)
    }
}

/// The attributes of a file as FUSE has them.
///
/// # Errors
/// What fstat(2) says.
pub fn attributes(file: &File) -> io::Result<Attr> {
    let host = file.metadata()?;
    Ok(Attr {
        ino: host.ino(),
        size: host.size(),
        blocks: host.blocks(),
        atime: host.atime() as u64,
        mtime: host.mtime() as u64,
        ctime: host.ctime() as u64,
        atimensec: host.atime_nsec() as u32,
        mtimensec: host.mtime_nsec() as u32,
        ctimensec: host.ctime_nsec() as u32,
        mode: host.mode(),
        nlink: host.nlink() as u32,
        uid: host.uid().into(),
        gid: host.gid().into(),
        rdev: host.rdev() as u32,
        blksize: host.blksize() as u32,
        flags: 0,
    })
}

/// Sets what `valid` says.
///
/// # Errors
/// What the host says.
pub fn change(file: &File, new: &SetattrIn, valid: SetattrValid) -> io::Result<()> {
    let set = |flag| valid.contains(flag);
    let owner = |id: u32, flag| set(flag).then_some(id);
    let mode = file.metadata()?.mode() & 0o7777;
    let (uid, gid) = (new.uid.into_inner(), new.gid.into_inner());
    if set(SetattrValid::UID) || set(SetattrValid::GID) {
        fchown(
            file,
            owner(uid, SetattrValid::UID),
            owner(gid, SetattrValid::GID),
        )?;
    }
    if set(SetattrValid::SIZE) {
        file.set_len(new.size)?;
        if set(SetattrValid::KILL_SUIDGID) {
            file.set_permissions(Permissions::from_mode(mode & !0o6000))?;
        }
    }
    if set(SetattrValid::MODE) {
        file.set_permissions(Permissions::from_mode(new.mode & 0o7777))?;
    }
    // Seconds may be less than none, and are as the guest says: the host's kernel knows what it can keep.
    let time = |given, now, seconds: u64, nanos: u32| match (set(given), set(now)) {
        (false, _) => TimeSpec::UTIME_OMIT,
        (true, true) => TimeSpec::UTIME_NOW,
        (true, false) => TimeSpec::new(seconds.cast_signed(), (nanos % 1_000_000_000).into()),
    };
    let (atime, mtime) = (SetattrValid::ATIME, SetattrValid::MTIME);
    if set(atime) || set(mtime) {
        let atime = time(atime, SetattrValid::ATIME_NOW, new.atime, new.atimensec);
        let mtime = time(mtime, SetattrValid::MTIME_NOW, new.mtime, new.mtimensec);
        futimens(file, &atime, &mtime)?;
    }
    Ok(())
}
