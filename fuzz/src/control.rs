//! Messages on the VMM's control socket, either way, and the specification of a VM in them.
//!
//! The shim writes the requests; the answers come from a VMM that a guest may have taken over.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
};
use sepal_protocol::control::{MAX_FDS, Request, Response, receive, send};
use sepal_protocol::vm::{FdIndex, KvmFlavour, VmSpec};
use sepal_vmm::cmdline;
use sepal_vmm::memory::Layout;
use sepal_vmm::vm::Descriptors;

use crate::input::Input;

/// One packet, with descriptors beside it, as a request and as an answer.
pub fn control(data: &[u8]) {
    let mut input = Input::new(data);
    let (count, packet) = (input.below(MAX_FDS + 4), input.rest());
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    let (ours, theirs) = pair.expect("descriptors are left");
    let null = File::open("/dev/null").expect("there is one");
    let fds = vec![null.as_raw_fd(); count];
    let rights = [ControlMessage::ScmRights(&fds)];
    let beside: &[ControlMessage] = if fds.is_empty() { &[] } else { &rights };
    let say = || {
        let bytes = [IoSlice::new(&packet)];
        sendmsg::<()>(theirs.as_raw_fd(), &bytes, beside, MsgFlags::empty(), None)
    };
    if say().is_err() {
        return;
    }
    if let Ok((request, fds)) = receive::<Request>(&ours) {
        let again = serde_json::to_vec(&request).expect("a request can be written");
        assert!(serde_json::from_slice::<Request>(&again).is_ok_and(|same| same == request));
        assert_eq!(fds.len(), count);
        let mut fds = Descriptors::new(fds);
        match &request {
            Request::Boot(spec) => boot(spec, &mut fds),
            Request::AddNet(net) => drop(fds.take(net.tap, "tap")),
            Request::AddBlk(blk) => drop(fds.take(blk.file, "disk")),
            _ => {}
        }
        // What is longer than a message may be is refused when it is sent.
        let _ = send(&theirs, &request, &[]);
    }
    if say().is_ok()
        && let Ok((Response::State(state), _)) = receive::<Response>(&ours)
    {
        let _ = state.has_memory();
    }
}

/// What the VMM makes of a specification before it asks KVM for anything.
fn boot(spec: &VmSpec, fds: &mut Descriptors) {
    for flavour in [KvmFlavour::Hardware, KvmFlavour::Deprivileged] {
        let line = cmdline::build(spec, flavour);
        assert!(line.ends_with(&spec.cmdline));
    }
    if let Ok(layout) = Layout::new(spec.memory.size) {
        let bytes: u64 = layout.ram().map(|(_, size)| size).sum();
        assert_eq!(bytes, spec.memory.size);
        assert!(layout.reserve_start() > layout.mmio64_start());
    }
    for fs in &spec.fs {
        let taken = fds.take(fs.socket, "socket").is_ok();
        assert!(!taken || fds.take(fs.socket, "socket").is_err());
    }
    let _ = fds.take(FdIndex(u32::MAX), "nothing");
}
