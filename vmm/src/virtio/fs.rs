//! virtio-fs (virtio 1.2, section 5.11), served by another process over vhost-user.
//!
//! The queues never pass through here: the back end has guest RAM mapped (from the memfd), is
//! kicked by the queues' ioeventfds and raises their interrupts by the transport's own descriptors.
//! This end negotiates, hands over, takes back at a reset, and watches: when the back end goes, the
//! driver is told (NEEDS_RESET) and the VM lives on. There is no second back end to connect to.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::epoll::EpollFlags;
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::call::call_descriptor;
use super::device::{ActivateError, Activation, ActiveQueue, DeviceType, Interrupt, VirtioDevice};
use super::error::DeviceError;
use super::features;
use super::worker::{Handler, Next, Waits, Worker};

/// Bytes for the tag in the configuration space.
pub const TAG_LEN: usize = 36;
/// A back end that does not answer within this time is given up; a vCPU waits for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Size of each queue: Linux cuts requests to what fits, and a request of 1 MiB, its largest, needs
/// 256 buffers for the pages and a few for headers.
const QUEUE_SIZE: u16 = 512;
/// Queues before the request queues: the one for urgent requests.
const FIRST_REQUEST_QUEUE: usize = 1;

const SOCKET: u64 = 1 << 32;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag has no place in the configuration space.
    #[error("virtio-fs tag {0:?} is not 1 to 36 bytes long")]
    Tag(String),
    /// The socket cannot be used.
    #[error("socket of the virtio-fs back end")]
    Socket(#[from] io::Error),
    /// The back end refused, or is no vhost-user back end.
    #[error("virtio-fs back end")]
    Vhost(#[from] vhost::Error),
    /// The back end lacks what the device cannot do without.
    #[error("virtio-fs back end has no {0}")]
    Lacks(&'static str),
}

/// The device.
pub struct Fs {
    config: [u8; TAG_LEN + 4],
    queue_sizes: Vec<u16>,
    features: u64,
    back_end: Frontend,
    socket: UnixStream,
    /// Queues that the back end serves.
    active: Vec<usize>,
    worker: Option<Worker>,
}

impl Fs {
    /// Negotiates with the back end at the other end of `socket`. `tag` is how the guest finds the
    /// file system; it gets `request_queues` beside the urgent one.
    ///
    /// # Errors
    /// See [`FsError`].
    pub fn new(tag: &str, socket: UnixStream, request_queues: u16) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_LEN || tag.contains('\0') {
            return Err(FsError::Tag(tag.into()));
        }
        let mut config = [0; TAG_LEN + 4];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG_LEN..].copy_from_slice(&u32::from(request_queues).to_le_bytes());
        let queues = FIRST_REQUEST_QUEUE + usize::from(request_queues);

        socket.set_nonblocking(false)?;
        let watched = socket.try_clone()?;
        let deadline = Deadline::start(&watched, PATIENCE)?;
        let mut back_end = Frontend::from_stream(socket, queues as u64);
        back_end.set_owner()?;
        let features = back_end.get_features()?;
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(FsError::Lacks("protocol features"));
        }
        let offered = back_end.get_protocol_features()?;
        let wanted = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ;
        if !offered.contains(wanted) {
            return Err(FsError::Lacks("acknowledgements or queue count"));
        }
        back_end.set_protocol_features(wanted)?;
        // From here on each message is answered, so that an error is not lost.
        back_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        if back_end.get_queue_num()? < queues as u64 {
            return Err(FsError::Lacks("as many queues"));
        }
        drop(deadline);
        Ok(Self {
            config,
            queue_sizes: vec![QUEUE_SIZE; queues],
            features: features & features::RING,
            back_end,
            socket: watched,
            active: Vec::new(),
            worker: None,
        })
    }

    fn hand_over(&mut self, activation: &Activation) -> Result<Vec<(u16, EventFd)>, ActivateError> {
        let Activation {
            memory,
            queues,
            interrupt,
            features,
        } = activation;
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.back_end.set_features(features | protocol)?;
        let regions: Result<Vec<_>, _> = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect();
        self.back_end.set_mem_table(&regions?)?;
        let mut calls = Vec::new();
        for active in queues {
            let (call, ours) = call_descriptor(&**interrupt, active.index)?;
            self.hand_over_queue(memory, active, &call)?;
            if ours {
                calls.push((active.index, call));
            }
        }
        Ok(calls)
    }

    fn hand_over_queue(
        &mut self,
        memory: &GuestMemoryMmap,
        active: &ActiveQueue,
        call: &EventFd,
    ) -> Result<(), vhost::Error> {
        let (queue, index) = (&active.queue, usize::from(active.index));
        // Ring addresses are told as ours; the back end finds them by the memory table.
        let host = |gpa| {
            let address = memory.get_host_address(GuestAddress(gpa));
            address
                .map(|a| a as u64)
                .map_err(|_| vhost::Error::InvalidQueue)
        };
        self.back_end.set_vring_num(index, queue.size())?;
        self.back_end.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: queue.max_size(),
                queue_size: queue.size(),
                flags: 0,
                desc_table_addr: host(queue.desc_table())?,
                used_ring_addr: host(queue.used_ring())?,
                avail_ring_addr: host(queue.avail_ring())?,
                log_addr: None,
            },
        )?;
        self.back_end.set_vring_base(index, queue.next_avail())?;
        self.back_end.set_vring_call(index, call)?;
        self.back_end.set_vring_kick(index, &active.kick)?;
        self.active.push(index);
        self.back_end.set_vring_enable(index, true)
    }

    /// Stops each queue that the back end has. An answer means that it has let go of it.
    fn take_back(&mut self) -> Result<(), vhost::Error> {
        for index in std::mem::take(&mut self.active) {
            self.back_end.get_vring_base(index)?;
            self.back_end.set_vring_enable(index, false)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        features::read_config(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let got = activation.queues.len();
        if got <= FIRST_REQUEST_QUEUE {
            let need = FIRST_REQUEST_QUEUE + 1;
            return Err(ActivateError::MissingQueues { got, need });
        }
        let deadline = Deadline::start(&self.socket, PATIENCE).map_err(ActivateError::Worker)?;
        let calls = self.hand_over(&activation)?;
        drop(deadline);
        let socket = self.socket.try_clone().map_err(ActivateError::Worker)?;
        let interrupt = activation.interrupt;
        let theirs = interrupt.clone();
        let body = move |waits: &Waits| {
            let gone = EpollFlags::EPOLLRDHUP;
            waits
                .add(&socket, gone, SOCKET)
                .map_err(DeviceError::host("epoll_ctl"))?;
            for (index, call) in &calls {
                let added = waits.add_kick(call, u64::from(*index));
                added.map_err(DeviceError::host("epoll_ctl"))?;
            }
            waits.serve(&mut Watch {
                interrupt: &*theirs,
            })
        };
        self.worker = Some(Worker::spawn("virtio-fs", DeviceType::Fs, interrupt, body)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        let Ok(_deadline) = Deadline::start(&self.socket, PATIENCE) else {
            return;
        };
        if let Err(error) = self.take_back() {
            // It is gone and with it its hold on guest memory, or it will be: it gets no second
            // chance.
            tracing::warn!("virtio-fs back end did not stop its queues: {error}");
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

struct Watch<'a> {
    interrupt: &'a dyn Interrupt,
}

impl Handler for Watch<'_> {
    fn event(&mut self, _: &Waits, token: u64, _: EpollFlags) -> Result<(), DeviceError> {
        if token == SOCKET {
            return Err(DeviceError::BackEndGone);
        }
        // A queue whose interrupt had no descriptor when the back end was given one.
        self.interrupt.used(token as u16);
        Ok(())
    }

    fn turn(&mut self, _: &Waits) -> Result<Next, DeviceError> {
        Ok(Next::Wait)
    }
}

/// Hangs up on a back end that does not answer in time. The vhost crate waits for ever, and tries
/// again even when a receive timeout on the socket expires.
struct Deadline {
    finished: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Deadline {
    fn start(socket: &UnixStream, patience: Duration) -> io::Result<Self> {
        let socket = socket.try_clone()?;
        let (finished, expired) = channel();
        let thread = std::thread::Builder::new()
            .name("fs-deadline".into())
            .spawn(move || {
                if expired.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                    tracing::error!("virtio-fs back end does not answer");
                    let _ = socket.shutdown(std::net::Shutdown::Both);
                }
            })?;
        Ok(Self {
            finished: Some(finished),
            thread: Some(thread),
        })
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        self.finished = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_back_end_that_does_not_answer_is_hung_up_on() {
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let deadline = Deadline::start(&ours, Duration::from_millis(50)).unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        drop(deadline);

        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        drop(Deadline::start(&ours, Duration::from_millis(50)).unwrap());
        std::thread::sleep(Duration::from_millis(100));
        io::Write::write_all(&mut theirs, b"!").unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 1);
    }
}
