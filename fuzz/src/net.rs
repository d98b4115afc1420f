//! The network device on a real tap, which lives in a network namespace of this process's own. Without
//! the right to make one the target says so once and does nothing.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use nix::sched::{CloneFlags, unshare};
use sepal_vmm::virtio::net::Net;

use crate::guest::{Guest, Host};
use crate::input::Input;

/// A tap, and a packet socket that is the network behind it.
struct Wire {
    tap: File,
    network: OwnedFd,
}

/// `struct ifreq` (netdevice(7)) with a number or nothing in it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    value: [u8; 24],
}

impl Request {
    fn new(value: &[u8]) -> Self {
        let mut request = Self {
            name: *b"tap0\0\0\0\0\0\0\0\0\0\0\0\0",
            value: [0; 24],
        };
        request.value[..value.len()].copy_from_slice(value);
        request
    }
}

/// TUNSETIFF (linux/if_tun.h).
const SET_INTERFACE: libc::Ioctl = 0x4004_54ca;

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn control(fd: &impl AsRawFd, what: libc::Ioctl, request: &mut Request) -> io::Result<()> {
    // SAFETY: each ioctl below reads or writes one ifreq, which outlives the call.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), what, std::ptr::from_mut(request)) }).map(drop)
}

/// On a thread of its own, which leaves for the namespace; descriptors stay where they were opened.
fn wire() -> io::Result<Wire> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    // No words of the kernel's own on the wire.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let kind = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    control(&tap, SET_INTERFACE, &mut Request::new(&kind.to_ne_bytes()))?;
    let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: makes a descriptor, which is checked and owned once.
    let network = unsafe {
        let fd = checked(libc::socket(libc::AF_PACKET, flags, 0))?;
        OwnedFd::from_raw_fd(fd)
    };
    let up = (libc::IFF_UP as u16).to_ne_bytes();
    control(&network, libc::SIOCSIFFLAGS as _, &mut Request::new(&up))?;
    let mut index = Request::new(&[]);
    control(&network, libc::SIOCGIFINDEX as _, &mut index)?;
    // SAFETY: an all-zero sockaddr_ll is valid, and bind(2) reads one of its size.
    unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        let [a, b, c, d, ..] = index.value;
        address.sll_ifindex = i32::from_ne_bytes([a, b, c, d]);
        let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        checked(libc::bind(
            network.as_raw_fd(),
            (&raw const address).cast(),
            size,
        ))?;
    }
    Ok(Wire { tap, network })
}

fn shared_wire() -> Option<&'static Wire> {
    static WIRE: OnceLock<Option<Wire>> = OnceLock::new();
    let make = || {
        let made = std::thread::spawn(wire).join().ok()?;
        made.inspect_err(|error| eprintln!("net: left out, no tap to be had: {error}"))
            .ok()
    };
    WIRE.get_or_init(make).as_ref()
}

struct Network(&'static OwnedFd);

impl Host for Network {
    fn act(&mut self, input: &mut Input) {
        let frame = match input.byte() {
            0..=99 => input.some(),
            _ => {
                let mut frame = input.take(64);
                frame.resize(usize::from(input.u16()), 0x55);
                frame
            }
        };
        // It takes what is a frame to it.
        let _ = nix::sys::socket::send(
            self.0.as_raw_fd(),
            &frame,
            nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        );
    }
}

/// Frames with any header, both ways; commands.
pub fn net(data: &[u8]) {
    let Some(wire) = shared_wire() else { return };
    let mut input = Input::new(data);
    let mtu = 1500 - u16::from(input.byte());
    let tap = wire.tap.try_clone().expect("descriptors are left");
    let mut device = Net::new([2, 0, 0, 0, 0, 1], mtu, tap, None).expect("it is a tap");
    // What the run before has left; the device has made it non-blocking.
    let mut left = vec![0; 1 << 16];
    while io::Read::read(&mut &wire.tap, &mut left).is_ok() {}
    Guest::drive(input, &mut device, Network(&wire.network));
    while io::Read::read(
        &mut File::from(wire.network.try_clone().expect("left")),
        &mut left,
    )
    .is_ok()
    {}
}
