//! What is mounted in the guest for a container, and how it goes.

use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::Spec;
use sepal_protocol::agent::RootFs;
use sepal_protocol::paths;

use crate::container::Surroundings;
use crate::error::{Context, Error, Result};
use crate::guest;
use crate::launch;
use crate::reaper::Reaper;

/// A path below the share, given by the shim.
pub(crate) fn share_path(below: &str) -> Result<PathBuf> {
    let path = Path::new(below);
    let plain = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if below.is_empty() || !plain {
        return Err(Error::Invalid(format!(
            "{below:?} is not a path below the share"
        )));
    }
    Ok(Path::new(paths::guest::SHARE).join(path))
}

/// Lets go of a directory that the host is about to take out of the share.
///
/// The kernel keeps a name and what was below it until it asks for it again, and the file server a
/// descriptor for each inode, and with that the host the container's root file system.
pub(crate) async fn forget(reaper: Arc<Reaper>, directory: PathBuf) {
    // The file server lets names be trusted for a second.
    for seconds in [2, 8, 32] {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        let look = launch::aside(&reaper, "cannot look at the share", || {
            match directory.symlink_metadata() {
                Ok(_) => Err("it is there still".into()),
                Err(_) => Ok(()),
            }
        });
        if look.await.is_ok() {
            return;
        }
    }
}

/// The container's mounts that the guest has made or that appear in the share: the root and the
/// sources of its bind mounts.
pub(crate) fn mounts_of(spec: &Spec, root: &Path, id: &str) -> Vec<PathBuf> {
    let own = Path::new(paths::guest::SHARE).join(id);
    let sources = spec
        .mounts()
        .iter()
        .flatten()
        .filter_map(|mount| mount.source().clone());
    let mut mounts: Vec<PathBuf> = sources.filter(|source| source.starts_with(&own)).collect();
    mounts.push(root.to_path_buf());
    mounts
}

/// Lets go of mounts, so that the host can release what is behind them.
pub(crate) async fn unmount(with: &Surroundings, mounts: &[PathBuf]) {
    let done = launch::aside(&with.reaper, "cannot unmount", || {
        use nix::mount::{MntFlags, umount2};
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        for path in mounts {
            // Not every one of them is a mount of its own.
            let _ = umount2(path, flags);
        }
        Ok(())
    });
    if let Err(error) = done.await {
        tracing::warn!(%error, "a container's mounts are not all gone");
    }
}

/// Removes a container's directory, after its mounts: what is still mounted in it is not ours to remove.
pub(crate) fn remove_directory(directory: &Path, mounts: &[PathBuf]) {
    for point in mounts.iter().filter(|point| point.starts_with(directory)) {
        let Ok(about) = fs::symlink_metadata(point) else {
            continue;
        };
        let removed = if about.is_dir() {
            fs::remove_dir(point)
        } else {
            fs::remove_file(point)
        };
        if let Err(error) = removed {
            tracing::warn!(?point, %error, "a container's directory stays");
            return;
        }
    }
    let _ = fs::remove_dir_all(directory);
}

/// Mounts a root file system that comes as a block device.
pub(crate) async fn mount_block(with: &Surroundings, rootfs: &RootFs, target: &Path) -> Result<()> {
    let device = guest::block_device(&rootfs.block_serial).await?;
    fs::create_dir_all(target).context(|| format!("cannot make {target:?}"))?;
    let (fs_type, options) = (rootfs.fs_type.clone(), rootfs.options.clone());
    launch::aside(&with.reaper, "cannot mount the root file system", || {
        guest::mount_device(&device, target, &fs_type, &options)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_still_mounted_in_a_containers_directory_is_not_removed_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("c1");
        let volume = own.join("memory/0");
        fs::create_dir_all(&volume).unwrap();
        // A file in it is what a mount that is still there looks like.
        fs::write(volume.join("file"), "precious").unwrap();
        let mounts = [PathBuf::from("/run/sepal/share/c1/rootfs"), volume.clone()];
        remove_directory(&own, &mounts);
        assert_eq!(fs::read(volume.join("file")).unwrap(), b"precious");
        fs::remove_file(volume.join("file")).unwrap();
        remove_directory(&own, &mounts);
        assert!(!own.exists());
    }

    #[test]
    fn roots_stay_in_the_share() {
        assert_eq!(
            share_path("c1/rootfs").unwrap(),
            Path::new("/run/sepal/share/c1/rootfs")
        );
        for path in ["", "/etc", "../etc", "a/../../etc"] {
            assert!(share_path(path).is_err(), "{path}");
        }
    }
}
