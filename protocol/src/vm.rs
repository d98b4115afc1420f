//! The specification of a VM: what the shim asks the VMM to boot.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One VM. Paths are the host's, as the VMM sees them before it confines itself.
///
/// Where a field is an [`FdIndex`], the descriptor travels beside the message that carries the
/// specification (see [`crate::control`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The pod's id, for logs and process titles.
    pub pod_id: String,
    /// CPUs and how many there may ever be.
    pub cpus: CpuSpec,
    /// Guest RAM.
    pub memory: MemorySpec,
    /// Guest kernels, one per flavour of KVM.
    pub kernels: KernelSpec,
    /// Added behind the VMM's own kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Read-only guest image, mounted as root from virtio-pmem.
    #[serde(default)]
    pub image: Option<PathBuf>,
    /// An initramfs instead of, or beside, the image.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Unix socket path of the vsock device; in a jail's root directory where there is one.
    pub vsock: PathBuf,
    /// What the VMM makes of itself before the guest runs; none: it stays where and who it is.
    #[serde(default)]
    pub jail: Option<JailSpec>,
    /// Listening control socket for further clients; none: only the inherited one.
    #[serde(default)]
    pub control: Option<PathBuf>,
    /// File that the guest's kernel log is written to.
    #[serde(default)]
    pub console: Option<PathBuf>,
    /// 8250 on ttyS0 from the kernel's first line on: slow, for debugging the kernel.
    #[serde(default)]
    pub early_console: bool,
    /// vhost-user file servers.
    #[serde(default)]
    pub fs: Vec<FsSpec>,
    /// Network interfaces.
    #[serde(default)]
    pub net: Vec<NetSpec>,
    /// Block devices.
    #[serde(default)]
    pub blk: Vec<BlkSpec>,
    /// Free page reporting and ballooning.
    #[serde(default = "yes")]
    pub balloon: bool,
}

fn yes() -> bool {
    true
}

/// Index into the descriptors received with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u32);

/// Where the VMM locks itself in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailSpec {
    /// Becomes the root directory of a mount namespace of its own, read-only.
    pub root: PathBuf,
    /// User and group that it becomes. Nobody else should have this id.
    pub user: u32,
}

/// Virtual CPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuSpec {
    /// CPUs at boot, 1..=64.
    pub boot: u8,
    /// CPUs that may be brought online while the pod runs; at least `boot`.
    pub max: u8,
}

/// Guest RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySpec {
    /// Bytes, a multiple of 2 MiB.
    pub size: u64,
    /// Bytes that it may grow to while the pod runs; absent, or less than `size`: it does not.
    #[serde(default)]
    pub max: u64,
    /// Back it by huge pages of the host.
    #[serde(default)]
    pub hugepages: bool,
    /// Bytes of the host's huge pages of 2 MiB that may be added for programs which ask for such; absent:
    /// none.
    #[serde(default)]
    pub max_huge: u64,
    /// Let the host merge equal pages. Off unless asked: it opens side channels between pods.
    #[serde(default)]
    pub mergeable: bool,
}

/// Uncompressed ELF kernels. The VMM takes the one that fits the KVM it finds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelSpec {
    /// For KVM on VT-x or AMD-V.
    #[serde(default)]
    pub hardware: Option<PathBuf>,
    /// For KVM that runs guests deprivileged.
    #[serde(default)]
    pub deprivileged: Option<PathBuf>,
}

/// A virtio-fs device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsSpec {
    /// Mount tag, 1..=36 bytes.
    pub tag: String,
    /// Connected vhost-user socket of the back end.
    pub socket: FdIndex,
}

/// A virtio-net device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Id for hot-plug.
    pub id: String,
    /// An open tap (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR).
    pub tap: FdIndex,
    /// An open /dev/vhost-net; none: packets pass through the VMM.
    #[serde(default)]
    pub vhost: Option<FdIndex>,
    /// The guest's address.
    pub mac: [u8; 6],
    /// In bytes, 68..=65535.
    pub mtu: u16,
}

/// A virtio-blk device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkSpec {
    /// Id for hot-plug.
    pub id: String,
    /// virtio-blk serial, at most 20 bytes: how the guest finds the device.
    pub serial: String,
    /// An open file or block device.
    pub file: FdIndex,
    /// No write reaches the file.
    #[serde(default)]
    pub read_only: bool,
}

/// Why a VMM ended, as its exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitCause {
    /// The guest powered off, or a client asked the VMM to quit.
    PowerOff,
    /// The guest asked for a reboot. A pod's VM is never rebooted.
    Reboot,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest did what no CPU survives (triple fault), or KVM refused to run it.
    GuestCrash,
    /// The VMM failed.
    Internal,
    /// The specification, a file or the host is not fit; nothing was booted.
    Refused,
}

impl ExitCause {
    /// The VMM's exit status. 0 for an orderly end; others keep clear of 1, 2, 101 and 126..=165,
    /// which the shell, Rust and signals use.
    pub const fn status(self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Reboot => 10,
            Self::GuestPanic => 11,
            Self::GuestCrash => 12,
            Self::Internal => 13,
            Self::Refused => 14,
        }
    }

    /// The reverse of [`ExitCause::status`].
    pub const fn from_status(status: i32) -> Option<Self> {
        Some(match status {
            0 => Self::PowerOff,
            10 => Self::Reboot,
            11 => Self::GuestPanic,
            12 => Self::GuestCrash,
            13 => Self::Internal,
            14 => Self::Refused,
            _ => return None,
        })
    }
}

/// Which KVM a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvmFlavour {
    /// VT-x or AMD-V.
    Hardware,
    /// Guests run deprivileged and need the patched kernel (docs/kernel.md).
    Deprivileged,
}
