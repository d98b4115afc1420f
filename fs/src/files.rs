//! The file system that is served: virtiofsd's, and files without a name beside it ([`crate::unnamed`]).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use rustix::fs::{XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr};
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, CreateIn, SetattrIn};
use virtiofsd::oslib::ReadvFlags;
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::soft_idmap::Id;

use crate::unchanged::Unchanged;
use crate::unnamed::{UnnamedFiles, attributes, change, is_ours};
use crate::volumes::Volumes;

type Ino = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;

/// Whether a file can have bytes there (off_t). virtiofsd takes it for granted and panics.
fn check_offset(offset: u64) -> io::Result<()> {
    match i64::try_from(offset) {
        Ok(_) => Ok(()),
        Err(_) => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// See the module. A copy is the same file system.
#[derive(Clone)]
pub struct Files(Arc<Both>);

struct Both {
    fs: PassthroughFs,
    unnamed: UnnamedFiles,
    volumes: Volumes,
    unchanged: Unchanged,
    timeout: Duration,
    /// Files are created in the name of a user of the guest's, and where that user may not do so here.
    users: bool,
}

impl Both {
    /// The guest has started anew.
    fn clear(&self) {
        self.unnamed.clear();
        self.volumes.clear();
        self.unchanged.clear();
    }

    /// The guest forgets `count` lookups of one of virtiofsd's inodes.
    fn forget(&self, inode: Ino, count: u64) {
        self.volumes.forget(inode, count);
        self.unchanged.forget(inode);
    }
}

impl Files {
    /// `proc` is /proc/self/fd; at most so many files without a name; how long attributes hold, if
    /// not in a volume; and whether whoever the guest's kernel lets create a file may.
    pub fn new(
        fs: PassthroughFs,
        proc: File,
        most_unnamed: u64,
        timeout: Duration,
        volumes: Volumes,
        users: bool,
    ) -> Self {
        let most = usize::try_from(most_unnamed).unwrap_or(usize::MAX);
        Self(Arc::new(Both {
            fs,
            unnamed: UnnamedFiles::new(proc, most),
            volumes,
            unchanged: Unchanged::default(),
            timeout,
            users,
        }))
    }

    /// Makes a file without a name in a directory (FUSE_TMPFILE), opened.
    ///
    /// # Errors
    /// As open(2).
    pub fn create_unnamed(
        &self,
        ctx: Context,
        directory: Ino,
        request: &CreateIn,
    ) -> io::Result<(Entry, Handle)> {
        let Both {
            unnamed, timeout, ..
        } = &*self.0;
        let opened = self.directory(ctx, directory)?;
        let owner = (ctx.uid.into_inner(), ctx.gid.into_inner());
        let (inode, handle) = unnamed.create(directory, &opened, request, owner)?;
        let entry = Entry {
            inode,
            generation: 0,
            attr: attributes(&unnamed.get(inode)?.file)?,
            attr_timeout: *timeout,
            entry_timeout: *timeout,
        };
        Ok((entry, handle))
    }

    /// Notes that the guest is told of an entry, and tells it how long that holds.
    fn tell(&self, parent: Ino, name: &CStr, mut entry: Entry) -> Entry {
        if self.0.volumes.told(parent, name, entry.inode) {
            (entry.attr_timeout, entry.entry_timeout) = (Duration::ZERO, Duration::ZERO);
        }
        entry
    }

    /// How long attributes of virtiofsd's inode hold.
    fn hold(&self, inode: Ino, (attr, timeout): (Attr, Duration)) -> (Attr, Duration) {
        if self.0.volumes.contain(inode) {
            (attr, Duration::ZERO)
        } else {
            (attr, timeout)
        }
    }

    /// Whether the guest may keep what it has of a file's data that it has opened. Not in a volume: what
    /// is written there through a mapping on the host changes no time of the file at once.
    fn keeps_data(&self, ctx: Context, inode: Ino, handle: Option<Handle>) -> bool {
        let Both {
            fs,
            volumes,
            unchanged,
            ..
        } = &*self.0;
        !volumes.contain(inode)
            && fs
                .getattr(ctx, inode, handle)
                .is_ok_and(|(attr, _)| unchanged.opened(inode, &attr, SystemTime::now()))
    }

    /// A directory of virtiofsd's as a descriptor. It keeps those to itself, but reads from a file
    /// that it names to whoever asks to read; so we ask, and read nothing.
    fn directory(&self, ctx: Context, inode: Ino) -> io::Result<OwnedFd> {
        struct Borrow(Option<OwnedFd>);
        impl ZeroCopyWriter for Borrow {
            fn read_from_file_at(
                &mut self,
                file: &File,
                _count: usize,
                _offset: u64,
                _flags: Option<ReadvFlags>,
            ) -> io::Result<usize> {
                self.0 = Some(file.try_clone()?.into());
                Ok(0)
            }
        }
        let fs = &self.0.fs;
        let (Some(handle), _) = fs.opendir(ctx, inode, 0)? else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        let mut borrow = Borrow(None);
        let read = fs.read(ctx, inode, handle, &mut borrow, 0, 0, None, 0);
        fs.releasedir(ctx, inode, 0, handle)?;
        read?;
        borrow
            .0
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }
}

/// What only virtiofsd's files can be asked.
macro_rules! named_only {
    ($inode:expr) => {
        if is_ours($inode) {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
    };
}

impl FileSystem for Files {
    type Inode = Ino;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn init(&self, mut capable: FsOptions) -> io::Result<FsOptions> {
        if !capable.contains(FsOptions::SUBMOUNTS) {
            // Each volume is one. virtiofsd would go on, and say so each time past the log that has an end.
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        self.0.clear();
        if self.0.users {
            // virtiofsd creates files with a user's rights where the guest tells all of its groups, and
            // else with its own.
            capable.remove(FsOptions::CREATE_SUPP_GROUP);
        }
        self.0.fs.init(capable)
    }

    fn destroy(&self) {
        self.0.clear();
        self.0.fs.destroy();
    }

    fn lookup(&self, ctx: Context, parent: Ino, name: &CStr) -> io::Result<Entry> {
        named_only!(parent);
        let entry = self.0.fs.lookup(ctx, parent, name)?;
        Ok(self.tell(parent, name, entry))
    }

    fn forget(&self, ctx: Context, inode: Ino, count: u64) {
        if is_ours(inode) {
            // It is told to the guest once, when it is made.
            self.0.unnamed.remove(inode);
        } else {
            self.0.forget(inode, count);
            self.0.fs.forget(ctx, inode, count);
        }
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Ino, u64)>) {
        let (ours, theirs): (Vec<_>, Vec<_>) =
            requests.into_iter().partition(|(inode, _)| is_ours(*inode));
        for (inode, _) in ours {
            self.0.unnamed.remove(inode);
        }
        for (inode, count) in &theirs {
            self.0.forget(*inode, *count);
        }
        self.0.fs.batch_forget(ctx, theirs);
    }

    fn getattr(
        &self,
        ctx: Context,
        inode: Ino,
        handle: Option<Handle>,
    ) -> io::Result<(Attr, Duration)> {
        if !is_ours(inode) {
            let attributes = self.0.fs.getattr(ctx, inode, handle)?;
            return Ok(self.hold(inode, attributes));
        }
        Ok((
            attributes(&self.0.unnamed.get(inode)?.file)?,
            self.0.timeout,
        ))
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Ino,
        attr: SetattrIn,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        if !is_ours(inode) {
            let attributes = self.0.fs.setattr(ctx, inode, attr, handle, valid)?;
            return Ok(self.hold(inode, attributes));
        }
        let file = self.0.unnamed.get(inode)?.file;
        change(&file, &attr, valid)?;
        Ok((attributes(&file)?, self.0.timeout))
    }

    fn readlink(&self, ctx: Context, inode: Ino) -> io::Result<Vec<u8>> {
        named_only!(inode);
        self.0.fs.readlink(ctx, inode)
    }

    fn symlink(
        &self,
        ctx: Context,
        target: &CStr,
        parent: Ino,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        named_only!(parent);
        let fs = &self.0.fs;
        let entry = fs.symlink(ctx, target, parent, name, extensions)?;
        Ok(self.tell(parent, name, entry))
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: Ino,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        named_only!(parent);
        let fs = &self.0.fs;
        let entry = fs.mknod(ctx, parent, name, mode, rdev, umask, extensions)?;
        Ok(self.tell(parent, name, entry))
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: Ino,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        named_only!(parent);
        let fs = &self.0.fs;
        let entry = fs.mkdir(ctx, parent, name, mode, umask, extensions)?;
        Ok(self.tell(parent, name, entry))
    }

    fn unlink(&self, ctx: Context, parent: Ino, name: &CStr) -> io::Result<()> {
        named_only!(parent);
        self.0.fs.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: Context, parent: Ino, name: &CStr) -> io::Result<()> {
        named_only!(parent);
        self.0.fs.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: Context,
        old_parent: Ino,
        old_name: &CStr,
        new_parent: Ino,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        named_only!(old_parent | new_parent);
        self.0
            .fs
            .rename(ctx, old_parent, old_name, new_parent, new_name, flags)
    }

    fn link(&self, ctx: Context, inode: Ino, parent: Ino, name: &CStr) -> io::Result<Entry> {
        named_only!(parent);
        let fs = &self.0.fs;
        let entry = if is_ours(inode) {
            let directory = self.directory(ctx, parent)?;
            self.0.unnamed.link(inode, &directory, name)?;
            fs.lookup(ctx, parent, name)?
        } else {
            fs.link(ctx, inode, parent, name)?
        };
        Ok(self.tell(parent, name, entry))
    }

    fn open(
        &self,
        ctx: Context,
        inode: Ino,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        if !is_ours(inode) {
            let (handle, mut options) = self.0.fs.open(ctx, inode, kill_priv, flags)?;
            if self.keeps_data(ctx, inode, handle) {
                options |= OpenOptions::KEEP_CACHE;
            }
            return Ok((handle, options));
        }
        Ok((
            Some(self.0.unnamed.open(inode, flags)?),
            OpenOptions::empty(),
        ))
    }

    fn create(
        &self,
        ctx: Context,
        parent: Ino,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        named_only!(parent);
        let fs = &self.0.fs;
        let (entry, handle, options) =
            fs.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)?;
        Ok((self.tell(parent, name, entry), handle, options))
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: Ino,
        handle: Handle,
        mut w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        check_offset(offset)?;
        if !is_ours(handle) {
            return self
                .0
                .fs
                .read(ctx, inode, handle, w, size, offset, lock_owner, flags);
        }
        w.read_from_file_at(
            &self.0.unnamed.get(handle)?.file,
            size as usize,
            offset,
            None,
        )
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: Ino,
        handle: Handle,
        mut r: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        check_offset(offset)?;
        let fs = &self.0.fs;
        if !is_ours(handle) {
            return fs.write(
                ctx, inode, handle, r, size, offset, lock_owner, delayed, kill_priv, flags,
            );
        }
        r.write_to_file_at(
            &self.0.unnamed.get(handle)?.file,
            size as usize,
            offset,
            None,
        )
    }

    fn flush(&self, ctx: Context, inode: Ino, handle: Handle, lock_owner: u64) -> io::Result<()> {
        if !is_ours(handle) {
            return self.0.fs.flush(ctx, inode, handle, lock_owner);
        }
        self.0.unnamed.get(handle).map(drop)
    }

    fn fsync(&self, ctx: Context, inode: Ino, data: bool, handle: Handle) -> io::Result<()> {
        if !is_ours(handle) {
            return self.0.fs.fsync(ctx, inode, data, handle);
        }
        let file = self.0.unnamed.get(handle)?.file;
        if data {
            file.sync_data()
        } else {
            file.sync_all()
        }
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: Ino,
        handle: Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        if !is_ours(handle) {
            return self
                .0
                .fs
                .fallocate(ctx, inode, handle, mode, offset, length);
        }
        let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
        let (offset, length) = (
            i64::try_from(offset).map_err(invalid)?,
            i64::try_from(length).map_err(invalid)?,
        );
        let mode = FallocateFlags::from_bits_truncate(mode as i32);
        Ok(fallocate(
            &*self.0.unnamed.get(handle)?.file,
            mode,
            offset,
            length,
        )?)
    }

    fn release(
        &self,
        ctx: Context,
        inode: Ino,
        flags: u32,
        handle: Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        if !is_ours(handle) {
            return self
                .0
                .fs
                .release(ctx, inode, flags, handle, flush, flock_release, lock_owner);
        }
        self.0.unnamed.remove(handle);
        Ok(())
    }

    fn statfs(&self, ctx: Context, inode: Ino) -> io::Result<libc::statvfs64> {
        self.0.fs.statfs(ctx, self.in_its_place(inode)?)
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: Ino,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra: SetxattrFlags,
    ) -> io::Result<()> {
        if !is_ours(inode) {
            return self.0.fs.setxattr(ctx, inode, name, value, flags, extra);
        }
        let flags = XattrFlags::from_bits_truncate(flags);
        Ok(fsetxattr(
            &*self.0.unnamed.get(inode)?.file,
            name,
            value,
            flags,
        )?)
    }

    fn getxattr(
        &self,
        ctx: Context,
        inode: Ino,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        if !is_ours(inode) {
            return self.0.fs.getxattr(ctx, inode, name, size);
        }
        let mut value = vec![0; size as usize];
        let length = fgetxattr(&*self.0.unnamed.get(inode)?.file, name, &mut value[..])?;
        if size == 0 {
            return Ok(GetxattrReply::Count(
                u32::try_from(length).unwrap_or(u32::MAX),
            ));
        }
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, ctx: Context, inode: Ino, size: u32) -> io::Result<ListxattrReply> {
        if !is_ours(inode) {
            return self.0.fs.listxattr(ctx, inode, size);
        }
        let mut names = vec![0; size as usize];
        let length = flistxattr(&*self.0.unnamed.get(inode)?.file, &mut names[..])?;
        if size == 0 {
            return Ok(ListxattrReply::Count(
                u32::try_from(length).unwrap_or(u32::MAX),
            ));
        }
        names.truncate(length);
        Ok(ListxattrReply::Names(names))
    }

    fn removexattr(&self, ctx: Context, inode: Ino, name: &CStr) -> io::Result<()> {
        if !is_ours(inode) {
            return self.0.fs.removexattr(ctx, inode, name);
        }
        Ok(fremovexattr(&*self.0.unnamed.get(inode)?.file, name)?)
    }

    fn opendir(
        &self,
        ctx: Context,
        inode: Ino,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        named_only!(inode);
        self.0.fs.opendir(ctx, inode, flags)
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: Ino,
        handle: Handle,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        self.0.fs.readdir(ctx, inode, handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, inode: Ino, data: bool, handle: Handle) -> io::Result<()> {
        self.0.fs.fsyncdir(ctx, inode, data, handle)
    }

    fn releasedir(&self, ctx: Context, inode: Ino, flags: u32, handle: Handle) -> io::Result<()> {
        self.0.fs.releasedir(ctx, inode, flags, handle)
    }

    fn access(&self, ctx: Context, inode: Ino, mask: u32) -> io::Result<()> {
        if is_ours(inode) {
            // The guest's kernel judges by mode and owner (default_permissions).
            return self.0.unnamed.get(inode).map(drop);
        }
        self.0.fs.access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        ctx: Context,
        inode: Ino,
        handle: Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        if !is_ours(handle) {
            return self.0.fs.lseek(ctx, inode, handle, offset, whence);
        }
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let whence = match whence as i32 {
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            // The others are the guest's own.
            _ => return Err(invalid()),
        };
        let offset = i64::try_from(offset).map_err(|_| invalid())?;
        let found = lseek(&*self.0.unnamed.get(handle)?.file, offset, whence)?;
        u64::try_from(found).map_err(|_| invalid())
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: Ino,
        handle_in: Handle,
        offset_in: u64,
        inode_out: Ino,
        handle_out: Handle,
        offset_out: u64,
        length: u64,
        flags: u64,
    ) -> io::Result<usize> {
        if is_ours(handle_in | handle_out) {
            // The guest's kernel then copies by reading and writing.
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        self.0.fs.copyfilerange(
            ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, length, flags,
        )
    }

    fn syncfs(&self, ctx: Context, inode: Ino) -> io::Result<()> {
        self.0.fs.syncfs(ctx, self.in_its_place(inode)?)
    }
}

impl Files {
    /// An inode of virtiofsd's on the same file system.
    fn in_its_place(&self, inode: Ino) -> io::Result<Ino> {
        if is_ours(inode) {
            Ok(self.0.unnamed.get(inode)?.directory)
        } else {
            Ok(inode)
        }
    }
}

/// Pods are not migrated yet: nothing is written down.
impl SerializableFileSystem for Files {}
