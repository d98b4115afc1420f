//! The host's end of a network device: an open tap (linux/if_tun.h).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Bytes of the header before each frame: `virtio_net_hdr_v1`, with the number of buffers
/// (virtio 1.2, 5.1.6).
pub const HEADER_LEN: usize = 12;

/// VIRTIO_NET_F_GUEST_* and the TUN_F_* that lets the tap use them.
const OFFLOADS: [(u64, libc::c_uint); 4] = [
    (super::GUEST_CSUM, 0x01),
    (super::GUEST_TSO4, 0x02),
    (super::GUEST_TSO6, 0x04),
    (super::GUEST_ECN, 0x08),
];

mod ioctl {
    nix::ioctl_write_int_bad!(set_offload, nix::request_code_write!(b'T', 208, 4));
    nix::ioctl_write_ptr_bad!(
        set_header_size,
        nix::request_code_write!(b'T', 216, 4),
        libc::c_int
    );
}

/// An open tap.
pub struct Tap {
    file: File,
}

impl Tap {
    /// Takes over an open tap (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR), sets its header's length, turns
    /// its offloads off and makes it non-blocking.
    ///
    /// # Errors
    /// It is no such tap.
    pub fn new(file: File) -> io::Result<Self> {
        let flags = OFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let length = HEADER_LEN as libc::c_int;
        // SAFETY: the ioctl reads one int, which outlives the call.
        unsafe { ioctl::set_header_size(file.as_raw_fd(), &raw const length) }?;
        let tap = Self { file };
        tap.set_offloads(0)?;
        Ok(tap)
    }

    /// Allows the tap what the guest's driver takes: frames whose checksum is still to be computed
    /// and frames that are still to be cut.
    ///
    /// # Errors
    /// The host's kernel knows one of them not.
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let chosen = OFFLOADS
            .iter()
            .filter(|(feature, _)| features & feature != 0);
        let flags = chosen.fold(0, |flags, (_, flag)| flags | flag);
        // Segmentation without checksums makes no sense to the kernel (EINVAL).
        let flags = if flags & 0x01 == 0 { 0 } else { flags };
        // SAFETY: the argument is a number.
        unsafe { ioctl::set_offload(self.file.as_raw_fd(), flags as libc::c_int) }?;
        Ok(())
    }

    /// For vhost-net.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Another descriptor of the same tap.
    ///
    /// # Errors
    /// dup(2).
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
        })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
