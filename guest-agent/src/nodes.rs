//! Where the devices that a spec names are in the guest.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use sepal_protocol::agent::Disk;

use crate::error::{Context, Error, Result};
use crate::guest;
use crate::plan::DeviceNode;

/// The devices that a container can be given.
#[derive(Debug, Default)]
pub struct Nodes {
    /// Block devices by their numbers on the host.
    disks: Vec<((i64, i64), DeviceNode)>,
}

impl Nodes {
    /// Waits for disks that the host has plugged in.
    ///
    /// # Errors
    /// One does not appear.
    pub async fn of(plugged: &[Disk]) -> Result<Self> {
        let mut disks = Vec::new();
        for disk in plugged {
            let path = guest::block_device(&disk.serial).await?;
            let about = fs::symlink_metadata(&path).context(|| format!("no node {path:?}"))?;
            let node =
                node(&about).ok_or_else(|| Error::Invalid(format!("{path:?} is not a device")))?;
            disks.push(((disk.major.into(), disk.minor.into()), node));
        }
        Ok(Self { disks })
    }

    /// What a device of the spec is in the guest: a disk by its number, any other by its name.
    #[must_use]
    pub fn find(&self, device: &LinuxDevice) -> Option<DeviceNode> {
        if device.typ() == LinuxDeviceType::B {
            let number = (device.major(), device.minor());
            let disk = self.disks.iter().find(|(on_host, _)| *on_host == number);
            return disk.map(|(_, node)| *node);
        }
        by_name(device.path())
    }
}

/// Names come from a spec: only the guest's own device file system counts, without links.
fn by_name(path: &Path) -> Option<DeviceNode> {
    let plain = path
        .components()
        .all(|part| !matches!(part, Component::ParentDir));
    if !plain || !path.starts_with("/dev") {
        return None;
    }
    node(&fs::symlink_metadata(path).ok()?)
}

fn node(about: &fs::Metadata) -> Option<DeviceNode> {
    let kind = if about.file_type().is_block_device() {
        LinuxDeviceType::B
    } else if about.file_type().is_char_device() {
        LinuxDeviceType::C
    } else {
        return None;
    };
    let (major, minor) = (libc::major(about.rdev()), libc::minor(about.rdev()));
    Some((kind, major.into(), minor.into()))
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxDeviceBuilder;

    use super::*;

    #[test]
    fn devices_are_looked_up_in_dev_alone() {
        let null = Some((LinuxDeviceType::C, 1, 3));
        assert_eq!(by_name(Path::new("/dev/null")), null);
        assert_eq!(by_name(Path::new("/dev/../etc/passwd")), None);
        assert_eq!(by_name(Path::new("/etc/passwd")), None);
    }

    #[test]
    fn a_disk_is_found_by_its_number_and_never_by_its_name() {
        let nodes = Nodes {
            disks: vec![((7, 5), (LinuxDeviceType::B, 254, 16))],
        };
        let device = |major: i64| {
            LinuxDeviceBuilder::default()
                .path("/dev/null")
                .typ(LinuxDeviceType::B)
                .major(major)
                .minor(5)
                .build()
                .unwrap()
        };
        let found = nodes.find(&device(7));
        assert_eq!(found, Some((LinuxDeviceType::B, 254, 16)));
        assert_eq!(nodes.find(&device(8)), None);
    }
}
