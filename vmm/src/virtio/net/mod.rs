//! virtio-net (virtio 1.2, section 5.1) on a tap.
//!
//! Frames pass through the worker ([`frames`]) or, where the host has it, through the kernel's
//! vhost-net ([`vhost`]); the control queue ([`control`]) is always served here. One pair of queues,
//! for a tap given by one descriptor has one.

pub mod control;
pub mod frames;
pub mod tap;
pub mod vhost;

#[cfg(test)]
mod net_test;

use std::fs::File;
use std::io;
use std::sync::Arc;

use nix::sys::epoll::EpollFlags;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::call::call_descriptor;
use super::device::{ActivateError, Activation, ActiveQueue, DeviceType, Interrupt, VirtioDevice};
use super::error::DeviceError;
use super::features;
use super::ring::Ring;
use super::worker::{Handler, Next, Waits, Worker};
use control::Control;
use frames::{Receiver, Transmitter};
use tap::Tap;
use vhost::{Running, VhostNet};

// Feature bits (virtio 1.2, 5.1.3).
const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;

/// Those that the worker implements, and vhost-net with it but for [`BY_VHOST`].
const OFFERED: u64 = features::RING
    | CSUM
    | GUEST_CSUM
    | CTRL_GUEST_OFFLOADS
    | MTU
    | MAC
    | GUEST_TSO4
    | GUEST_TSO6
    | GUEST_ECN
    | HOST_TSO4
    | HOST_TSO6
    | HOST_ECN
    | MRG_RXBUF
    | STATUS
    | CTRL_VQ;
/// Those that vhost-net must know itself: they say how rings and buffers are used.
const BY_VHOST: u64 = features::RING | MRG_RXBUF;

const LINK_UP: u16 = 1;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const CONTROL: u16 = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

const TAP: u64 = 1 << 32;
/// Tokens of queues whose interrupt is raised here for vhost-net.
const CALLS: u64 = 1 << 33;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The descriptor is no tap, or no such tap as is needed.
    #[error("tap (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)")]
    Tap(#[source] io::Error),
    /// The descriptor is no /dev/vhost-net.
    #[error("vhost-net")]
    Vhost(#[from] ::vhost::Error),
}

/// The device.
pub struct Net {
    config: [u8; 12],
    mtu: u16,
    tap: Tap,
    vhost: Option<VhostNet>,
    running: Option<Running>,
    worker: Option<Worker>,
}

impl Net {
    /// A device with this address on an open tap. With `vhost`, an open /dev/vhost-net, the kernel
    /// moves the frames.
    ///
    /// # Errors
    /// See [`NetError`].
    pub fn new(mac: [u8; 6], mtu: u16, tap: File, vhost: Option<File>) -> Result<Self, NetError> {
        let tap = Tap::new(tap).map_err(NetError::Tap)?;
        let vhost = vhost.map(VhostNet::new).transpose()?;
        let mut config = [0; 12];
        config[..6].copy_from_slice(&mac);
        config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&1_u16.to_le_bytes());
        config[10..].copy_from_slice(&mtu.to_le_bytes());
        Ok(Self {
            config,
            mtu,
            tap,
            vhost,
            running: None,
            worker: None,
        })
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let vhost = self.vhost.as_ref().map_or(u64::MAX, VhostNet::features);
        OFFERED & (vhost | !BY_VHOST)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        features::read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            queues,
            interrupt,
            features,
        } = activation;
        let (got, mut queues) = (queues.len(), queues.into_iter());
        let (Some(receive), Some(transmit)) = (
            queues.next().filter(|queue| queue.index == RECEIVE),
            queues.next().filter(|queue| queue.index == TRANSMIT),
        ) else {
            return Err(ActivateError::MissingQueues { got, need: 2 });
        };
        let control = queues.next().filter(|queue| queue.index == CONTROL);
        self.tap
            .set_offloads(features)
            .map_err(ActivateError::Worker)?;
        let tap = self.tap.try_clone().map_err(ActivateError::Worker)?;
        let mut frames = None;
        let mut calls = Vec::new();
        if let Some(vhost) = &mut self.vhost {
            let mut running = vhost.start(Arc::clone(&memory), features)?;
            for queue in [receive, transmit] {
                let (call, ours) = call_descriptor(&*interrupt, queue.index)?;
                running.add_queue(&queue, &call, &self.tap)?;
                if ours {
                    calls.push((queue.index, call));
                }
            }
            self.running = Some(running);
        } else {
            frames = Some((receive, transmit));
        }
        let start = Start {
            memory,
            frames,
            control,
            calls,
            features,
            mtu: self.mtu,
            tap,
            interrupt,
        };
        let interrupt = Arc::clone(&start.interrupt);
        let body = move |waits: &Waits| start.serve(waits);
        self.worker = Some(Worker::spawn(
            "virtio-net",
            DeviceType::Net,
            interrupt,
            body,
        )?);
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
        self.worker = None;
    }
}

/// What the worker is born with.
struct Start {
    memory: Arc<GuestMemoryMmap>,
    frames: Option<(ActiveQueue, ActiveQueue)>,
    control: Option<ActiveQueue>,
    calls: Vec<(u16, EventFd)>,
    features: u64,
    mtu: u16,
    tap: Tap,
    interrupt: Arc<dyn Interrupt>,
}

impl Start {
    fn serve(self, waits: &Waits) -> Result<(), DeviceError> {
        let Self {
            memory,
            frames,
            control,
            calls,
            features,
            mtu,
            tap,
            interrupt,
        } = self;
        let ring = |queue: ActiveQueue| -> Result<Ring<'_>, DeviceError> {
            let added = waits.add_kick(&queue.kick, u64::from(queue.index));
            added.map_err(DeviceError::host("epoll_ctl"))?;
            Ok(Ring::new(queue, &memory, Arc::clone(&interrupt), features))
        };
        let frames = match frames {
            Some((receive, transmit)) => {
                let edges = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
                waits
                    .add(&tap, edges, TAP)
                    .map_err(DeviceError::host("epoll_ctl"))?;
                let receiver = Receiver::new(ring(receive)?, features, mtu);
                Some((receiver, Transmitter::new(ring(transmit)?)))
            }
            None => None,
        };
        let control = control
            .map(ring)
            .transpose()?
            .map(|ring| Control::new(ring, features));
        for (index, call) in &calls {
            let added = waits.add_kick(call, CALLS + u64::from(*index));
            added.map_err(DeviceError::host("epoll_ctl"))?;
        }
        waits.serve(&mut Queues {
            frames,
            control,
            tap,
            interrupt: &*interrupt,
        })
    }
}

struct Queues<'m> {
    frames: Option<(Receiver<'m>, Transmitter<'m>)>,
    control: Option<Control<'m>>,
    tap: Tap,
    interrupt: &'m dyn Interrupt,
}

impl Handler for Queues<'_> {
    fn event(&mut self, _: &Waits, token: u64, flags: EpollFlags) -> Result<(), DeviceError> {
        match (token, &mut self.frames) {
            (TAP, Some((receiver, transmitter))) => {
                receiver.readable |= flags.contains(EpollFlags::EPOLLIN);
                transmitter.full &= !flags.contains(EpollFlags::EPOLLOUT);
            }
            (CALLS.., _) => self.interrupt.used((token - CALLS) as u16),
            _ => {}
        }
        Ok(())
    }

    fn turn(&mut self, _: &Waits) -> Result<Next, DeviceError> {
        let mut more = false;
        if let Some((receiver, transmitter)) = &mut self.frames {
            more |= transmitter.turn(&self.tap)?;
            more |= receiver.turn(&self.tap)?;
        }
        if let Some(control) = &mut self.control {
            more |= control.serve(&self.tap)?;
        }
        Ok(if more { Next::Again } else { Next::Wait })
    }
}
