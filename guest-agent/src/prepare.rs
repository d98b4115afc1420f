//! What is checked and made ready on a container's file system before libcontainer takes over.
//!
//! Runs in the helper process (launch.rs), as root, outside of the container: every path below a
//! root file system is looked up with that as its root, so that the container's symbolic links
//! lead nowhere else.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{setfsgid, setfsuid};
use oci_spec::runtime::{Mount, Spec};

use crate::payload::text;
use crate::plan::root_of;
use crate::sys;

/// Largest /etc/passwd that is read, in bytes.
const MAX_PASSWD: u64 = 1 << 20;

/// Opens a directory to look things up in.
///
/// # Errors
/// A sentence.
pub fn open_root(path: &Path) -> Result<OwnedFd, String> {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|error| format!("root file system {path:?}: {}", reason(&error)))
}

/// Checks what a new container needs, and makes its working directory.
///
/// # Errors
/// A sentence that names what is missing.
pub fn check_container(spec: &Spec, root: BorrowedFd<'_>) -> Result<(), String> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    for mount in mounts.iter().filter(|mount| is_bind(mount)) {
        let source = mount.source().as_deref().unwrap_or(Path::new(""));
        std::fs::metadata(source).map_err(|error| {
            let target = mount.destination();
            format!("mount source {source:?} for {target:?}: {}", reason(&error))
        })?;
    }
    let sysctls = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.sysctl().as_ref());
    for name in sysctls.into_iter().flat_map(|sysctls| sysctls.keys()) {
        if !Path::new("/proc/sys").join(name.replace('.', "/")).exists() {
            return Err(format!(
                "sysctl {name} does not exist in the guest's kernel"
            ));
        }
    }
    if let Some(process) = spec.process() {
        make_working_directory(process.cwd(), mounts, root, root_of(spec))?;
    }
    Ok(())
}

/// Makes volumes read-only where only the mount of the volume itself shall be: `ro`, not `rro`.
///
/// What the host has mounted in a volume, or mounts there later, is a mount of its own in the guest
/// too, which the kernel makes when somebody gets there, and with the flags of the mount it lies in.
/// A read-only mount would make it read-only; a read-only file system does not, and looks the same in
/// /proc/mounts. (The host refuses writes by the flags of its own mounts in any case.)
///
/// # Errors
/// A sentence.
pub fn make_volumes_read_only(spec: &mut Spec) -> Result<(), String> {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let options = mount.options().clone().unwrap_or_default();
        let has = |name: &str| options.iter().any(|option| option == name);
        let source = mount.source().clone().unwrap_or_default();
        if !is_bind(mount) || !has("ro") || has("rro") || !is_own_virtiofs(&source) {
            continue;
        }
        remount_read_only(&source)
            .map_err(|errno| format!("mount source {source:?}: {}", text(errno)))?;
        let kept = options.into_iter().filter(|option| option != "ro");
        mount.set_options(Some(kept.collect()));
    }
    Ok(())
}

/// Whether a directory is the root of a file system that the file server announced for it alone: no
/// other one may become read-only with it.
fn is_own_virtiofs(directory: &Path) -> bool {
    // Opened as a directory it is mounted, if it was not yet.
    let (Ok(opened), Ok(above)) = (open_root(directory), open_root(&directory.join(".."))) else {
        return false;
    };
    let device = |fd: &OwnedFd| nix::sys::stat::fstat(fd).map(|stat| stat.st_dev);
    let fuse = nix::sys::statfs::fstatfs(&opened)
        .is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::FUSE_SUPER_MAGIC);
    fuse && device(&opened) != device(&above)
}

fn remount_read_only(path: &Path) -> nix::Result<()> {
    use nix::mount::{MsFlags, mount};
    let none = None::<&str>;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NODEV;
    // This makes both the file system and the mount read-only, and the second call the mount not.
    mount(none, path, none, flags | MsFlags::MS_RDONLY, none)?;
    mount(none, path, none, flags | MsFlags::MS_BIND, none)
}

/// Checks that a further process's working directory is there.
///
/// # Errors
/// A sentence.
pub fn check_working_directory(cwd: &Path, root: BorrowedFd<'_>) -> Result<(), String> {
    match sys::open_in_root(root, cwd, libc::O_PATH | libc::O_DIRECTORY) {
        // Links of procfs are refused here and followed by the process itself.
        Err(error) if error.raw_os_error() != Some(libc::ELOOP) => {
            Err(format!("working directory {cwd:?}: {}", reason(&error)))
        }
        _ => Ok(()),
    }
}

/// Like runc, makes a working directory that the image lacks. Where it lies in a volume it is made
/// there; where it lies in a file system that is yet to be mounted nothing can be made.
fn make_working_directory(
    cwd: &Path,
    mounts: &[Mount],
    root: BorrowedFd<'_>,
    owner: (u32, u32),
) -> Result<(), String> {
    let cover = mounts
        .iter()
        .filter(|mount| cwd.starts_with(mount.destination()))
        .max_by_key(|mount| mount.destination().components().count());
    let made = match cover {
        None => make_directories(root, cwd, owner),
        Some(mount) if is_bind(mount) => {
            let source = mount.source().as_deref().unwrap_or(Path::new("/"));
            let below = cwd
                .strip_prefix(mount.destination())
                .unwrap_or(Path::new(""));
            if below.as_os_str().is_empty() {
                return Ok(());
            }
            make_directories(open_root(source)?.as_fd(), below, owner)
        }
        Some(_) => return Ok(()),
    };
    match made {
        // A read-only file system: whether the directory is there shows when it is entered.
        Err(error) if error.raw_os_error() == Some(libc::EROFS) => Ok(()),
        Err(error) => Err(format!("working directory {cwd:?}: {}", reason(&error))),
        Ok(()) => Ok(()),
    }
}

fn make_directories(root: BorrowedFd<'_>, path: &Path, owner: (u32, u32)) -> io::Result<()> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let mut so_far = PathBuf::from("/");
    let mut parent = sys::open_in_root(root, &so_far, flags)?;
    for part in path.components() {
        match part {
            Component::Normal(name) => {
                so_far.push(name);
                parent = match sys::open_in_root(root, &so_far, flags) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        match make_directory(&parent, name, owner) {
                            Ok(()) | Err(Errno::EEXIST) => {}
                            Err(error) => return Err(error.into()),
                        }
                        sys::open_in_root(root, &so_far, flags)?
                    }
                    opened => opened?,
                };
            }
            Component::ParentDir => {
                so_far.push("..");
                parent = sys::open_in_root(root, &so_far, flags)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Makes a directory as its owner does: where files are shown with other owners than they have, the
/// guest's root cannot have any. Only a helper process may do this.
fn make_directory(parent: impl AsFd, name: &OsStr, (uid, gid): (u32, u32)) -> nix::Result<()> {
    let group = setfsgid(gid.into());
    let user = setfsuid(uid.into());
    let made = mkdirat(parent, name, Mode::from_bits_truncate(0o755));
    setfsuid(user);
    setfsgid(group);
    made
}

/// Adds HOME to an environment that has none, from the container's own /etc/passwd.
///
/// libcontainer would ask the C library, which loads name service modules: in a container's file
/// system those are the container's to choose.
pub fn add_home(env: &mut Vec<CString>, uid: u32, root: BorrowedFd<'_>) {
    if env
        .iter()
        .any(|entry| entry.to_bytes().starts_with(b"HOME=") && entry.to_bytes().len() > 5)
    {
        return;
    }
    let home = passwd(root)
        .and_then(|text| home_of(&text, uid))
        .unwrap_or_else(|| "/".into());
    if let Ok(entry) = CString::new(format!("HOME={home}")) {
        env.retain(|entry| !entry.to_bytes().starts_with(b"HOME="));
        env.push(entry);
    }
}

fn passwd(root: BorrowedFd<'_>) -> Option<String> {
    // Not blocked by a FIFO in the file's place.
    let flags = libc::O_RDONLY | libc::O_NONBLOCK;
    let file = File::from(sys::open_in_root(root, Path::new("/etc/passwd"), flags).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(MAX_PASSWD).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The home directory of a user by passwd(5).
fn home_of(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let matches = fields.next()?.parse() == Ok(uid);
        let home = fields.nth(2)?;
        (matches && !home.is_empty()).then(|| home.to_owned())
    })
}

fn is_bind(mount: &Mount) -> bool {
    let options = mount.options().as_deref().unwrap_or_default();
    mount.typ().as_deref() == Some("bind")
        || options
            .iter()
            .any(|option| option == "bind" || option == "rbind")
}

fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => text(Errno::from_raw(errno)),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Whoever runs the tests.
    fn here() -> (u32, u32) {
        (
            nix::unistd::geteuid().as_raw(),
            nix::unistd::getegid().as_raw(),
        )
    }

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_missing_mount_source_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = open_root(dir.path()).unwrap();
        let spec = spec(
            r#"{"ociVersion": "1.2.0", "mounts": [
                {"destination": "/data", "type": "bind", "source": "/no/volume"}]}"#,
        );
        let error = check_container(&spec, root.as_fd()).unwrap_err();
        assert_eq!(
            error,
            r#"mount source "/no/volume" for "/data": no such file or directory"#
        );
    }

    #[test]
    fn working_directories_are_made_inside_the_root_whatever_links_say() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("real")).unwrap();
        symlink("/real", dir.path().join("inside")).unwrap();
        symlink(outside.path(), dir.path().join("escape")).unwrap();
        let root = open_root(dir.path()).unwrap();
        make_working_directory(Path::new("/inside/a/b"), &[], root.as_fd(), here()).unwrap();
        assert!(dir.path().join("real/a/b").is_dir());
        let escaped = make_working_directory(Path::new("/escape/a"), &[], root.as_fd(), here());
        assert!(escaped.is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_working_directory_in_a_volume_is_made_there() {
        let dir = tempfile::tempdir().unwrap();
        let volume = tempfile::tempdir().unwrap();
        let root = open_root(dir.path()).unwrap();
        let spec = spec(&format!(
            r#"{{"ociVersion": "1.2.0", "mounts": [{{"destination": "/data", "type": "bind",
                "source": {:?}}}]}}"#,
            volume.path()
        ));
        let mounts = spec.mounts().clone().unwrap();
        make_working_directory(Path::new("/data/x"), &mounts, root.as_fd(), here()).unwrap();
        assert!(volume.path().join("x").is_dir() && !dir.path().join("data").exists());
    }

    #[test]
    fn a_file_is_no_working_directory() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let root = open_root(dir.path()).unwrap();
        let error =
            make_working_directory(Path::new("/file/x"), &[], root.as_fd(), here()).unwrap_err();
        assert_eq!(error, r#"working directory "/file/x": not a directory"#);
        let error = check_working_directory(Path::new("/none"), root.as_fd()).unwrap_err();
        assert_eq!(
            error,
            r#"working directory "/none": no such file or directory"#
        );
    }

    #[test]
    fn home_comes_from_the_containers_passwd() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let text = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/sh\n";
        std::fs::write(dir.path().join("etc/passwd"), text).unwrap();
        let root = open_root(dir.path()).unwrap();
        let home = |uid| {
            let mut env = vec![CString::new("HOME=").unwrap()];
            add_home(&mut env, uid, root.as_fd());
            env[0].to_str().unwrap().to_owned()
        };
        assert_eq!(home(33), "HOME=/var/www");
        assert_eq!(home(4711), "HOME=/");
    }
}
