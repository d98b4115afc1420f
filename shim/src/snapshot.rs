//! What a volume in the layout of the kubelet's atomic writer holds at one moment.
//!
//! ConfigMaps, Secrets, projected volumes and the downward API are written so, and by some CSI drivers
//! too (pkg/volume/util/atomic_writer.go): `..data` is a link to a directory whose name begins with two
//! dots, the version that counts; other names in the root are links through `..data`, or directories
//! that other volumes are mounted on. A new version is a new directory, and a rename of `..data`.
//!
//! Whoever can write in a volume is not trusted: no link is followed, no mount is crossed, what is no
//! file, directory or link is left out, and all of it is bounded by what it would take in the guest.

use std::ffi::{CStr, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::stat::{FileStat, SFlag, fstat};
use sepal_protocol::agent::{VolumeFile, VolumeNames, WriteVolumeRequest};

use crate::users::Users;

/// The link to the version that counts.
const DATA: &str = "..data";
/// How often a volume may change under our eyes in a row, and the pause after each time.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(5);
/// What a file takes in the guest beside its pages and its path: inode and name.
const PER_FILE: u64 = 1 << 10;
const PAGE: u64 = 4 << 10;
/// Bytes of one request; the agent's messages hold at most 4 MiB.
const REQUEST: usize = 1 << 20;

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("it has no longer the layout of a ConfigMap, a Secret or their kind")]
    Layout,
    #[error("it is larger than the {most} bytes of the guest's memory that it may take")]
    TooLarge { most: u64 },
    #[error("it changes faster than it can be read")]
    Changing,
    #[error("{0}")]
    Panic(tokio::task::JoinError),
    #[error("cannot read {}: {source}", .path.display())]
    Read { path: PathBuf, source: io::Error },
}

/// See the module.
#[derive(Debug)]
pub struct Snapshot {
    files: Vec<VolumeFile>,
    names: Vec<Vec<u8>>,
}

/// Whether a directory has the layout. Costs one look where it has not.
pub fn has_layout(directory: &Path) -> bool {
    std::fs::read_link(directory.join(DATA)).is_ok_and(|target| is_version(target.as_os_str()))
}

/// Whether a link of this target can be the one to the version that counts.
fn is_version(target: &OsStr) -> bool {
    let mut parts = Path::new(target).components();
    let plain = matches!(parts.next(), Some(Component::Normal(name)) if name == target);
    plain && parts.next().is_none() && is_writers(target.as_bytes())
}

/// Names of the writer's own.
fn is_writers(name: &[u8]) -> bool {
    name.starts_with(b"..")
}

impl Snapshot {
    /// Takes one of the volume whose root this is; it may take so much of the guest's memory, in
    /// bytes. Blocks: for a tenth of a second where the volume is being changed.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn take(root: BorrowedFd<'_>, most: u64) -> Result<Self, Error> {
        for _ in 0..ATTEMPTS {
            let version = version(root)?;
            match read(root, &version, most) {
                // A version goes only after another one counts.
                Ok(taken) if self::version(root)? == version => return Ok(taken),
                Err(error @ Error::TooLarge { .. }) => return Err(error),
                Err(error) if self::version(root)? == version => return Err(error),
                _ => std::thread::sleep(PAUSE),
            }
        }
        Err(Error::Changing)
    }

    /// Gives the files the owners that they have as users of a user namespace.
    pub fn map_owners(&mut self, users: &Users) {
        for file in &mut self.files {
            (file.uid, file.gid) = (users.uid(file.uid), users.gid(file.gid));
        }
    }

    /// As requests to the agent, to be sent one after the other.
    pub fn requests(self, volume_id: &str) -> Vec<WriteVolumeRequest> {
        let mut requests = vec![WriteVolumeRequest::default()];
        let mut room = REQUEST;
        for piece in self.files.into_iter().flat_map(pieces) {
            let weight = piece.path.len() + piece.content.len() + 64;
            if weight > room {
                requests.push(WriteVolumeRequest::default());
                room = REQUEST;
            }
            room = room.saturating_sub(weight);
            if let Some(last) = requests.last_mut() {
                last.files.push(piece);
            }
        }
        if let Some(last) = requests.last_mut() {
            let names = VolumeNames {
                names: self.names,
                ..Default::default()
            };
            last.names = Some(names).into();
        }
        for request in &mut requests {
            request.volume_id = volume_id.into();
        }
        requests
    }
}

/// A file whose content fits into requests.
fn pieces(mut file: VolumeFile) -> Vec<VolumeFile> {
    const MOST: usize = REQUEST / 2;
    if file.content.len() <= MOST {
        return vec![file];
    }
    let content = std::mem::take(&mut file.content);
    let piece = |(number, bytes): (usize, &[u8])| VolumeFile {
        offset: (number * MOST) as u64,
        content: bytes.into(),
        ..file.clone()
    };
    content.chunks(MOST).enumerate().map(piece).collect()
}

/// The version that counts.
fn version(root: BorrowedFd<'_>) -> Result<OsString, Error> {
    match readlinkat(root, DATA) {
        Ok(target) if is_version(&target) => Ok(target),
        Ok(_) | Err(Errno::ENOENT | Errno::EINVAL) => Err(Error::Layout),
        Err(errno) => Err(failed(Path::new(DATA))(errno.into())),
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Read { path, source }
}

/// In the order in which the atomic writer makes it.
fn read(root: BorrowedFd<'_>, version: &OsStr, most: u64) -> Result<Snapshot, Error> {
    let mut reader = Reader {
        root,
        most,
        taken: 0,
        files: Vec::new(),
    };
    let (mut links, mut others) = (Vec::new(), Vec::new());
    let top = reader.open(Path::new("."), OFlag::O_DIRECTORY)?;
    reader.note(Path::new(""), &top)?;
    for (name, is_link) in reader.names_in(Path::new(""), top)? {
        if !is_writers(name.as_bytes()) {
            let kind = if is_link { &mut links } else { &mut others };
            kind.push(PathBuf::from(name));
        }
    }
    reader.tree(version.into())?;
    let at_top = [PathBuf::from(version), DATA.into()];
    let names = at_top.iter().chain(&links).chain(&others);
    let names = names
        .map(|path| path.as_os_str().as_bytes().into())
        .collect();
    for path in [DATA.into()].into_iter().chain(links).chain(others) {
        reader.tree(path)?;
    }
    Ok(Snapshot {
        files: reader.files,
        names,
    })
}

struct Reader<'a> {
    root: BorrowedFd<'a>,
    most: u64,
    /// Of the guest's memory.
    taken: u64,
    files: Vec<VolumeFile>,
}

impl Reader<'_> {
    /// Opens what is at a path from the root; a link itself, with `O_PATH`.
    fn open(&self, path: &Path, flags: OFlag) -> Result<OwnedFd, Error> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
            .resolve(
                ResolveFlag::RESOLVE_BENEATH
                    | ResolveFlag::RESOLVE_NO_SYMLINKS
                    | ResolveFlag::RESOLVE_NO_XDEV,
            );
        openat2(self.root, path, how).map_err(|errno| failed(path)(errno.into()))
    }

    /// Reads a file, or a directory with all that is in it.
    fn tree(&mut self, path: PathBuf) -> Result<(), Error> {
        let mut rest = vec![path];
        while let Some(path) = rest.pop() {
            let handle = self.open(&path, OFlag::O_PATH)?;
            let stat = fstat(&handle).map_err(|errno| failed(&path)(errno.into()))?;
            match kind(&stat) {
                SFlag::S_IFDIR => {
                    let directory = self.open(&path, OFlag::O_DIRECTORY)?;
                    self.note(&path, &directory)?;
                    let names = self.names_in(&path, directory)?;
                    let within = names.into_iter().rev();
                    rest.extend(within.map(|(name, _)| path.join(name)));
                }
                SFlag::S_IFREG => self.regular(&path)?,
                SFlag::S_IFLNK => {
                    self.note(&path, &handle)?;
                    let says = readlinkat(&handle, "");
                    let says = says.map_err(|errno| failed(&path)(errno.into()))?;
                    self.fill(says.into_vec());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The names in a directory, and which of them are links. Each is counted as it is read: there may be
    /// more than memory is for.
    fn names_in(
        &mut self,
        path: &Path,
        directory: OwnedFd,
    ) -> Result<Vec<(OsString, bool)>, Error> {
        let unreadable = |errno: Errno| failed(path)(errno.into());
        let mut names = Vec::new();
        for entry in Dir::from_fd(directory).map_err(unreadable)?.iter() {
            let entry = entry.map_err(unreadable)?;
            let name: &CStr = entry.file_name();
            if name != c"." && name != c".." {
                let length = path.as_os_str().len() + name.count_bytes();
                self.take_memory(PER_FILE + length as u64)?;
                let is_link = entry.file_type() == Some(nix::dir::Type::Symlink);
                names.push((OsString::from_vec(name.to_bytes().to_vec()), is_link));
            }
        }
        names.sort();
        Ok(names)
    }

    fn regular(&mut self, path: &Path) -> Result<(), Error> {
        // What was a file a moment ago may be a FIFO by now.
        let file = self.open(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
        let stat = self.note(path, &file)?;
        if kind(&stat) != SFlag::S_IFREG {
            return Err(failed(path)(Errno::EAGAIN.into()));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        self.take_memory(size.next_multiple_of(PAGE))?;
        let mut content = Vec::new();
        let read = File::from(file).take(size).read_to_end(&mut content);
        read.map_err(failed(path))?;
        self.fill(content);
        Ok(())
    }

    /// Adds a file with its attributes, and without what is in it. Its name has been counted.
    fn note(&mut self, path: &Path, file: impl AsFd) -> Result<FileStat, Error> {
        let stat = fstat(file).map_err(|errno| failed(path)(errno.into()))?;
        let whole = stat.st_mtime.saturating_mul(1_000_000_000);
        self.files.push(VolumeFile {
            path: path.as_os_str().as_bytes().into(),
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime_ns: whole.saturating_add(stat.st_mtime_nsec),
            ..Default::default()
        });
        Ok(stat)
    }

    fn fill(&mut self, content: Vec<u8>) {
        if let Some(file) = self.files.last_mut() {
            file.size = content.len() as u64;
            file.content = content;
        }
    }

    fn take_memory(&mut self, bytes: u64) -> Result<(), Error> {
        self.taken = self.taken.saturating_add(bytes);
        if self.taken > self.most {
            return Err(Error::TooLarge { most: self.most });
        }
        Ok(())
    }
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

#[cfg(test)]
#[path = "snapshot_test.rs"]
mod tests;
