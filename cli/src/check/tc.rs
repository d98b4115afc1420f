//! Tries what the shim does between a tap and a pod's interface, on the loopback interface of a
//! network namespace that exists for this alone: an ingress queueing discipline, and a u32 filter
//! that matches all and redirects (rtnetlink(7), tc(8)).

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// Why there is no redirection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Namespace(nix::Error),
    #[error("rtnetlink: {0}")]
    Socket(nix::Error),
    #[error("the kernel has no ingress queueing discipline: {0}")]
    Ingress(nix::Error),
    #[error("the kernel has no u32 filter with mirred action: {0}")]
    Filter(nix::Error),
}

/// The loopback interface is the first of every namespace.
const LOOPBACK: u32 = 1;
// linux/pkt_sched.h, linux/pkt_cls.h, linux/tc_act/tc_mirred.h.
const TC_H_INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TC_U32_TERMINAL: u8 = 1;
const TC_ACT_STOLEN: u32 = 4;
const TCA_EGRESS_REDIR: u32 = 1;
const ETH_P_ALL: u16 = 0x0003;

/// # Errors
/// What is missing.
pub fn try_redirect() -> Result<(), Error> {
    // A thread may have a namespace of its own, which ends with it.
    let tried = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(Error::Namespace)?;
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )
        .map_err(Error::Socket)?;
        request(&socket, libc::RTM_NEWQDISC, &ingress()).map_err(Error::Ingress)?;
        request(&socket, libc::RTM_NEWTFILTER, &filter()).map_err(Error::Filter)
    });
    tried
        .join()
        .unwrap_or(Err(Error::Namespace(nix::Error::EAGAIN)))
}

/// Sends one request to make something and awaits the kernel's answer.
fn request(socket: &OwnedFd, kind: u16, body: &[u8]) -> Result<(), nix::Error> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let length = u32::try_from(16 + body.len()).map_err(|_| nix::Error::EMSGSIZE)?;
    let mut message = Vec::new();
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(
        u16::try_from(flags)
            .map_err(|_| nix::Error::EINVAL)?
            .to_ne_bytes(),
    );
    message.extend([0; 8]);
    message.extend(body);
    sendto(
        socket.as_raw_fd(),
        &message,
        &NetlinkAddr::new(0, 0),
        MsgFlags::empty(),
    )?;
    let mut answer = [0; 4096];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // struct nlmsghdr, then the error of struct nlmsgerr: 0 or a negative error number.
    let word = answer
        .get(16..20)
        .filter(|_| length >= 20)
        .ok_or(nix::Error::EBADMSG)?;
    match word.try_into().map(i32::from_ne_bytes) {
        Ok(0) => Ok(()),
        Ok(error) => Err(nix::Error::from_raw(-error)),
        Err(_) => Err(nix::Error::EBADMSG),
    }
}

/// struct tcmsg.
fn tcmsg(handle: u32, parent: u32, info: u32) -> Vec<u8> {
    [0, LOOPBACK, handle, parent, info]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect()
}

/// struct rtattr with its padding. What we make is far below 64 KiB.
fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = (4 + payload.len()) as u16;
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn ingress() -> Vec<u8> {
    [
        tcmsg(INGRESS_HANDLE, TC_H_INGRESS, 0),
        attribute(TCA_KIND, b"ingress\0"),
    ]
    .concat()
}

fn filter() -> Vec<u8> {
    // struct tc_u32_sel with one struct tc_u32_key of all zeroes, which matches everything.
    let mut selector = vec![TC_U32_TERMINAL, 0, 1, 0];
    selector.resize(16 + 16, 0);
    // struct tc_mirred: index, capab, action, refcnt, bindcnt; eaction, ifindex.
    let mirred: Vec<u8> = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, LOOPBACK]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    let action = [
        attribute(TCA_ACT_KIND, b"mirred\0"),
        attribute(TCA_ACT_OPTIONS, &attribute(TCA_MIRRED_PARMS, &mirred)),
    ]
    .concat();
    let options = [
        attribute(TCA_U32_SEL, &selector),
        attribute(TCA_U32_ACT, &attribute(1, &action)),
    ]
    .concat();
    let info = 1 << 16 | u32::from(ETH_P_ALL.to_be());
    [
        tcmsg(0, INGRESS_HANDLE, info),
        attribute(TCA_KIND, b"u32\0"),
        attribute(TCA_OPTIONS, &options),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_their_length_is_not() {
        assert_eq!(attribute(1, b"u32\0"), [8, 0, 1, 0, b'u', b'3', b'2', 0]);
        assert_eq!(attribute(1, b"mirred\0").len(), 12);
        assert_eq!(attribute(1, b"mirred\0")[0], 11);
    }

    /// Root on a kernel for containers has it all; others must at least be told apart.
    #[test]
    fn a_refusal_says_what_is_missing() {
        match try_redirect() {
            Ok(()) => assert!(nix::unistd::geteuid().is_root()),
            Err(Error::Namespace(error)) => assert_eq!(error, nix::Error::EPERM),
            Err(error) => assert!(
                error.to_string().starts_with("the kernel has no"),
                "{error}"
            ),
        }
    }
}
