//! The VMM's control protocol.
//!
//! A SOCK_SEQPACKET Unix socket; each packet is one JSON message, a [`Request`] or, for each of
//! them in order, a [`Response`]. Descriptors travel beside the request that names them by
//! [`FdIndex`](crate::vm::FdIndex) (SCM_RIGHTS, unix(7)). The first message on the inherited socket
//! is [`Request::Boot`]; the VMM ends when that socket closes, so that no VM outlives its shim.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::vm::{BlkSpec, KvmFlavour, NetSpec, VmSpec};

/// Longest message, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most descriptors beside one message.
pub const MAX_FDS: usize = 32;
/// Most descriptors that the kernel lets come with a message (net/scm.h): with room for all of them none can
/// be installed that nobody learns of.
const SCM_MAX_FD: usize = 253;

/// What a client asks of the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Build the VM and start it. Only once, and only on the inherited socket.
    Boot(Box<VmSpec>),
    /// How the VM is.
    State,
    /// Stop all vCPUs.
    Pause,
    /// Let them go on.
    Resume,
    /// Hot-plug a network interface.
    AddNet(NetSpec),
    /// Hot-plug a block device.
    AddBlk(BlkSpec),
    /// Unplug the device with this id; answered when the guest has let go of it.
    RemoveDevice {
        /// `id` of its specification.
        id: String,
    },
    /// Inflate or deflate the balloon until it holds this many bytes.
    Balloon {
        /// Bytes taken from the guest, a multiple of 4096.
        size: u64,
    },
    /// Let the guest plug or unplug memory beyond its RAM until it has this much of it.
    PlugMemory {
        /// Bytes, a multiple of 2 MiB.
        size: u64,
    },
    /// The same with memory that is huge pages of the host.
    PlugHugePages {
        /// Bytes, a multiple of 2 MiB.
        size: u64,
    },
    /// Make vCPUs until there are this many, for the guest to bring online. None is taken away: one
    /// that the guest has brought offline costs nothing.
    AddCpus {
        /// At most [`CpuSpec::max`](crate::vm::CpuSpec).
        count: u8,
    },
    /// Take the directory that comes with this as the VMM's own root, so that /proc/PID/root leads
    /// to the container's files and not to the host's. Once; the guest can dial no port of the host
    /// afterwards.
    EnterRoot,
    /// Press the power button: the guest's agent powers off in order.
    PowerButton,
    /// End now.
    Quit,
}

/// The VMM's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Response {
    /// Done.
    Ok,
    /// The answer to [`Request::Boot`]: vCPUs run.
    Booted(Booted),
    /// The answer to [`Request::State`].
    State(VmState),
    /// Not done, and why: one sentence.
    Error {
        /// Cause and remedy.
        message: String,
    },
}

/// What came of a boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Booted {
    /// The KVM found.
    pub flavour: KvmFlavour,
    /// Stages in order, as CLOCK_MONOTONIC of the host in microseconds.
    pub stages: Vec<(String, u64)>,
}

/// The state of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// False while paused.
    pub running: bool,
    /// vCPUs that there are; the guest may have some of them offline.
    pub cpus: u8,
    /// Guest RAM at boot, in bytes.
    pub memory: u64,
    /// Bytes that the guest has plugged beyond it.
    pub plugged: u64,
    /// Most bytes that it may have plugged.
    pub pluggable: u64,
    /// Bytes that it has plugged of huge pages, which are in none of the others.
    pub huge_plugged: u64,
    /// Most bytes that it may have plugged of these.
    pub huge_pluggable: u64,
    /// Bytes that the balloon holds.
    pub balloon: u64,
    /// Ids of hot-pluggable devices.
    pub devices: Vec<String>,
    /// The last lines of the guest's kernel log.
    pub console_tail: Vec<String>,
}

impl VmState {
    /// Bytes of memory that the guest has at present.
    pub const fn has_memory(&self) -> u64 {
        self.memory
            .saturating_add(self.plugged)
            .saturating_sub(self.balloon)
    }
}

/// Why a message could not be sent or taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("control socket: {0}")]
    Socket(#[from] nix::Error),
    /// The other side is gone.
    #[error("control socket: closed by the other side")]
    Closed,
    /// Not a message of this protocol.
    #[error("control message: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Longer than [`MAX_MESSAGE`], or with more than [`MAX_FDS`] descriptors.
    #[error("control message: too large")]
    TooLarge,
}

/// Sends one message with its descriptors.
///
/// # Errors
/// [`Error::TooLarge`] for a message beyond the limits, otherwise what the socket says.
pub fn send<T: Serialize>(socket: &impl AsRawFd, message: &T, fds: &[RawFd]) -> Result<(), Error> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(Error::TooLarge);
    }
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage] = if fds.is_empty() { &[] } else { &rights };
    let iov = [IoSlice::new(&bytes)];
    loop {
        let sent = sendmsg::<()>(
            socket.as_raw_fd(),
            &iov,
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Err(nix::Error::EINTR) => continue,
            Err(e) => return Err(e.into()),
            Ok(_) => return Ok(()),
        }
    }
}

/// Receives one message with its descriptors; they are close-on-exec.
///
/// # Errors
/// [`Error::Closed`] at end of file; [`Error::TooLarge`] and [`Error::Malformed`] for what this
/// protocol does not say. Descriptors that came with a bad message are closed.
pub fn receive<T: DeserializeOwned>(socket: &impl AsRawFd) -> Result<(T, Vec<OwnedFd>), Error> {
    let mut buffer = vec![0_u8; MAX_MESSAGE];
    let mut space = nix::cmsg_space!([RawFd; SCM_MAX_FD]);
    let mut iov = [IoSliceMut::new(&mut buffer)];
    let received = loop {
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags) {
            Err(nix::Error::EINTR) => continue,
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just installed these descriptors for us and nobody else
            // knows of them.
            fds.extend(
                raw.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    if received.flags.contains(MsgFlags::MSG_TRUNC) || fds.len() > MAX_FDS {
        return Err(Error::TooLarge);
    }
    let length = received.bytes;
    if length == 0 && fds.is_empty() {
        return Err(Error::Closed);
    }
    Ok((serde_json::from_slice(&buffer[..length])?, fds))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap()
    }

    #[test]
    fn more_descriptors_than_there_may_be_are_closed() {
        let (a, b) = pair();
        let (theirs, ours) = nix::unistd::pipe().unwrap();
        let many = vec![ours.as_raw_fd(); MAX_FDS + 8];
        let rights = [ControlMessage::ScmRights(&many)];
        let iov = [IoSlice::new(b"null")];
        sendmsg::<()>(a.as_raw_fd(), &iov, &rights, MsgFlags::empty(), None).unwrap();
        let refused = receive::<()>(&b).unwrap_err();
        assert!(matches!(refused, Error::TooLarge), "{refused}");
        // No copy of the end for writing is left: this is the end of the file.
        drop(ours);
        let mut end = std::fs::File::from(theirs);
        assert_eq!(end.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_message_arrives_with_its_descriptor() {
        let (a, b) = pair();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"through the socket").unwrap();
        send(
            &a,
            &Request::RemoveDevice { id: "net0".into() },
            &[file.as_raw_fd()],
        )
        .unwrap();

        let (request, mut fds) = receive::<Request>(&b).unwrap();
        assert_eq!(request, Request::RemoveDevice { id: "net0".into() });
        let mut same = std::fs::File::from(fds.remove(0));
        std::io::Seek::rewind(&mut same).unwrap();
        let mut text = String::new();
        same.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through the socket");
    }

    #[test]
    fn a_closed_socket_and_an_unknown_message_are_told_apart() {
        let (a, b) = pair();
        nix::unistd::write(&a, br#"{"launch-missiles":{}}"#).unwrap();
        assert!(matches!(receive::<Request>(&b), Err(Error::Malformed(_))));
        drop(a);
        assert!(matches!(receive::<Request>(&b), Err(Error::Closed)));
    }

    #[test]
    fn exit_causes_survive_their_status() {
        use crate::vm::ExitCause::*;
        for cause in [PowerOff, Reboot, GuestPanic, GuestCrash, Internal, Refused] {
            assert_eq!(
                crate::vm::ExitCause::from_status(cause.status().into()),
                Some(cause)
            );
        }
        assert_eq!(crate::vm::ExitCause::from_status(1), None);
    }
}
