//! The host's block devices in the guest: volumeDevices of Kubernetes, `--device` of clients.
//!
//! A spec names a device by its numbers on the host. Each becomes a virtio-blk device of the pod's VM,
//! plugged in when the first container wants it and pulled when the last one is gone; the agent finds
//! it by its serial and puts the guest's numbers in the place of the host's. Whether it can be
//! written is decided here, by how it is opened: the guest has no say in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use sepal_protocol::agent;
use tokio::sync::Mutex;

use crate::vm::{self, Vm};

/// Why a container cannot have a device.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("block device {}: the host has no device {major}:{minor}", .path.display())]
    Absent {
        path: PathBuf,
        major: u32,
        minor: u32,
    },
    #[error("block device {}: cannot open {} of the host: {source}", .path.display(), .node.display())]
    Open {
        path: PathBuf,
        node: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "block device {} is read-only for another container of this pod: let both have the same \
         access to it",
        .path.display()
    )]
    ReadOnly { path: PathBuf },
    #[error("block device {}: {source}", .path.display())]
    Vm { path: PathBuf, source: vm::Error },
}

/// A block device that a container shall have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// In the container, for messages.
    pub path: PathBuf,
    /// On the host.
    pub number: Number,
    /// No rule lets the container write to it.
    pub read_only: bool,
}

/// Major and minor number of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Number {
    major: u32,
    minor: u32,
}

impl Number {
    fn of(device: &LinuxDevice) -> Option<Self> {
        Some(Self {
            major: device.major().try_into().ok()?,
            minor: device.minor().try_into().ok()?,
        })
    }

    /// Of an open block device, or of its node.
    fn of_file(about: &std::fs::Metadata) -> Option<Self> {
        about.file_type().is_block_device().then(|| Self {
            major: libc::major(about.rdev()),
            minor: libc::minor(about.rdev()),
        })
    }

    /// A virtio-blk serial of at most 20 bytes; the kernel's numbers have 12 and 20 bits.
    fn serial(self) -> String {
        format!("disk-{}:{}", self.major, self.minor)
    }
}

/// The block devices of a container's spec.
///
/// A privileged container's spec lists every device of the host under its own name. Those are not
/// meant: they are the host's, and privileged means the guest here.
pub fn wanted(spec: &Spec) -> Vec<Wanted> {
    let Some(linux) = spec.linux() else {
        return Vec::new();
    };
    let privileged = rules(linux).iter().any(allows_all);
    let block = |device: &&LinuxDevice| device.typ() == LinuxDeviceType::B;
    let devices = linux.devices().iter().flatten().filter(block);
    devices
        .filter_map(|device| {
            let number = Number::of(device)?;
            let listed = privileged && number_of(device.path()) == Some(number);
            (!listed).then(|| Wanted {
                path: device.path().clone(),
                number,
                read_only: !may_write(linux, device),
            })
        })
        .collect()
}

fn rules(linux: &Linux) -> &[LinuxDeviceCgroup] {
    let resources = linux.resources().as_ref();
    resources
        .and_then(|resources| resources.devices().as_deref())
        .unwrap_or_default()
}

fn allows_all(rule: &LinuxDeviceCgroup) -> bool {
    let any_kind = matches!(rule.typ(), None | Some(LinuxDeviceType::A));
    rule.allow() && any_kind && rule.major().is_none() && rule.minor().is_none()
}

/// The last rule that speaks of the device decides, as in the kernel.
fn may_write(linux: &Linux, device: &LinuxDevice) -> bool {
    let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
    let speaks = |rule: &&LinuxDeviceCgroup| {
        matches!(
            rule.typ(),
            None | Some(LinuxDeviceType::A | LinuxDeviceType::B)
        ) && (any(rule.major()) || rule.major() == Some(device.major()))
            && (any(rule.minor()) || rule.minor() == Some(device.minor()))
            && rule.access().as_ref().is_none_or(|a| a.contains('w'))
    };
    let last = rules(linux).iter().rev().find(speaks);
    last.is_some_and(LinuxDeviceCgroup::allow)
}

/// The number of a block device's node on the host.
fn number_of(node: &Path) -> Option<Number> {
    Number::of_file(&std::fs::metadata(node).ok()?)
}

/// Opens a device of the host by the name that its kernel has for it (sysfs, `dev/block`): a spec
/// tells its number only.
fn open(wanted: &Wanted) -> Result<OwnedFd, Error> {
    let Number { major, minor } = wanted.number;
    let absent = || Error::Absent {
        path: wanted.path.clone(),
        major,
        minor,
    };
    let about = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"));
    let about = about.map_err(|_| absent())?;
    let name = about.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let node = Path::new("/dev").join(name.ok_or_else(absent)?);
    let mut options = File::options();
    let file = options.read(true).write(!wanted.read_only).open(&node);
    let file = file.map_err(|source| Error::Open {
        path: wanted.path.clone(),
        node: node.clone(),
        source,
    })?;
    // A name is reused when a device goes and another comes.
    match file.metadata() {
        Ok(about) if Number::of_file(&about) == Some(wanted.number) => Ok(file.into()),
        _ => Err(absent()),
    }
}

/// The devices that are plugged into a pod's VM.
#[derive(Debug, Default)]
pub struct Disks {
    plugged: Mutex<BTreeMap<Number, Plugged>>,
}

#[derive(Debug)]
struct Plugged {
    read_only: bool,
    /// Containers that have it.
    users: BTreeSet<String>,
}

impl Disks {
    /// Sees to it that the VM has what a container wants, and answers with what the agent has to know.
    /// [`Disks::release`] takes it back, also after an error.
    ///
    /// # Errors
    /// A device is not there, is in use with less access, or the VM has no place for it.
    pub async fn acquire(
        &self,
        vm: &Vm,
        container: &str,
        wanted: &[Wanted],
    ) -> Result<Vec<agent::Disk>, Error> {
        let mut plugged = self.plugged.lock().await;
        let mut disks = Vec::new();
        for device in wanted {
            let number = device.number;
            match plugged.get_mut(&number) {
                Some(present) if present.read_only && !device.read_only => {
                    let path = device.path.clone();
                    return Err(Error::ReadOnly { path });
                }
                Some(present) => {
                    present.users.insert(container.into());
                }
                None => {
                    let file = open(device)?;
                    vm.add_disk(&number.serial(), device.read_only, file)
                        .await
                        .map_err(|source| Error::Vm {
                            path: device.path.clone(),
                            source,
                        })?;
                    let present = Plugged {
                        read_only: device.read_only,
                        users: BTreeSet::from([container.to_string()]),
                    };
                    plugged.insert(number, present);
                }
            }
            disks.push(agent::Disk {
                major: number.major,
                minor: number.minor,
                serial: number.serial(),
                ..Default::default()
            });
        }
        Ok(disks)
    }

    /// Pulls the devices that nobody has when this container is gone.
    pub async fn release(&self, vm: &Vm, container: &str) {
        let mut plugged = self.plugged.lock().await;
        let mut unused = Vec::new();
        for (number, present) in plugged.iter_mut() {
            present.users.remove(container);
            if present.users.is_empty() {
                unused.push(*number);
            }
        }
        for number in unused {
            match vm.remove_disk(&number.serial()).await {
                Ok(()) => {
                    plugged.remove(&number);
                }
                // It stays known, and is tried again when the next container goes.
                Err(e) => tracing::warn!(disk = number.serial(), "cannot be pulled: {e}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(devices: &str, rules: &str) -> Spec {
        let text = format!(
            r#"{{"ociVersion": "1.2.0", "linux": {{"devices": {devices},
                "resources": {{"devices": {rules}}}}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    const DEVICES: &str = r#"[
        {"path": "/dev/xvda", "type": "b", "major": 7, "minor": 5},
        {"path": "/dev/xvdb", "type": "b", "major": 259, "minor": 1048575},
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]"#;

    #[test]
    fn block_devices_are_wanted_with_the_access_that_the_rules_give() {
        let spec = spec(
            DEVICES,
            r#"[{"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": 5, "access": "rwm"},
                {"allow": true, "type": "b", "major": 259, "minor": 1048575, "access": "r"}]"#,
        );
        let found = wanted(&spec);
        let told: Vec<_> = found
            .iter()
            .map(|w| (w.path.to_str().unwrap(), w.number.serial(), w.read_only))
            .collect();
        assert_eq!(
            told,
            [
                ("/dev/xvda", "disk-7:5".to_string(), false),
                ("/dev/xvdb", "disk-259:1048575".to_string(), true),
            ]
        );
        assert!(told.iter().all(|(_, serial, _)| serial.len() <= 20));
    }

    #[test]
    fn the_last_rule_that_speaks_of_writing_decides() {
        for (rules, read_only) in [
            (r#"[{"allow": true, "access": "rwm"}]"#, false),
            ("[]", true),
            (
                r#"[{"allow": true, "type": "b", "major": 7, "access": "rw"},
                    {"allow": false, "type": "b", "major": 7, "minor": 5, "access": "w"}]"#,
                true,
            ),
            (
                r#"[{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "access": "rwm"}]"#,
                true,
            ),
        ] {
            let found = wanted(&spec(DEVICES, rules));
            assert_eq!(found[0].read_only, read_only, "{rules}");
        }
    }

    #[test]
    fn a_privileged_containers_list_of_the_hosts_devices_is_not_a_wish() {
        let Some((node, number)) = std::fs::read_dir("/dev")
            .unwrap()
            .flatten()
            .find_map(|entry| Some((entry.path(), number_of(&entry.path())?)))
        else {
            return;
        };
        let device = |path: &Path| {
            format!(
                r#"[{{"path": {path:?}, "type": "b", "major": {}, "minor": {}}}]"#,
                number.major, number.minor
            )
        };
        let all = r#"[{"allow": true, "access": "rwm"}]"#;
        assert_eq!(wanted(&spec(&device(&node), all)), []);
        let elsewhere = wanted(&spec(&device(Path::new("/dev/xvda")), all));
        assert_eq!(elsewhere.len(), 1, "a volume of a privileged container");
        let asked_for = wanted(&spec(&device(&node), "[]"));
        assert_eq!(asked_for.len(), 1, "--device of an ordinary container");
    }

    #[test]
    fn a_device_that_the_host_does_not_have_is_named() {
        let wanted = Wanted {
            path: "/dev/xvda".into(),
            number: Number {
                major: 4095,
                minor: 1,
            },
            read_only: true,
        };
        assert_eq!(
            open(&wanted).unwrap_err().to_string(),
            "block device /dev/xvda: the host has no device 4095:1"
        );
    }
}
