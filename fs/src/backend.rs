//! The vhost-user back end: takes FUSE requests from the guest's queues and answers them.
//!
//! One thread (of vhost-user-backend) waits for the guest's notifications and answers what is
//! quick, one request after the other, without handing it over: a hand-over costs as much as a
//! lookup. Requests that may wait for a disk, and all but one of those that arrive together, go to
//! the [`Workers`].
//!
//! The guest is hostile. A chain that is no request is given back unanswered and the queue goes on;
//! only this guest has the loss.

use std::io::{self, Read};
use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use log::{debug, warn};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::fuse::{InHeader, OutHeader};
use virtiofsd::server::Server;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::files::Files;
use crate::pressure::Pressure;
use crate::requests;
use crate::workers::Workers;

/// Guest RAM as the front end shares it.
pub type Memory = GuestMemoryMmap<BitmapMmapRegion>;
type Vring = VringMutex<GuestMemoryAtomic<Memory>>;
type Chain = DescriptorChain<GuestMemoryLoadGuard<Memory>>;

/// Largest queue a front end may set up (virtio 1.2, 2.7).
const QUEUE_SIZE: usize = 1024;
/// The queue of high priority and one for requests (virtio 1.2, 5.11.2).
const QUEUES: usize = 2;

/// Requests that wait for a disk by their nature (`enum fuse_opcode` of linux/fuse.h): fsync,
/// fsyncdir, fallocate, copy_file_range, syncfs.
const SLOW: [u32; 5] = [20, 30, 43, 47, 50];
/// Making a file without a name, which virtiofsd's server does not know.
const TMPFILE: u32 = 51;
/// Reads and writes: their length tells how long they take.
const READ: u32 = 15;
const WRITE: u32 = 16;
/// Requests for which virtiofsd's server sets the answer's header apart before it looks whether there is
/// room for one, and panics without: read, readdir, readdirplus.
const NEED_ROOM: [u32; 3] = [READ, 28, 44];
/// From this many bytes on copying takes longer than handing over.
const LARGE: u32 = 64 * 1024;

/// How long the next request is waited for awake. A program that works on many files sends it as soon
/// as it has the answer; waking up and being notified takes longer than that.
const SPIN: Duration = Duration::from_micros(50);

/// See the module.
pub struct Backend {
    service: Arc<Service>,
    workers: Workers,
    queues: RwLock<Queues>,
}

/// What answers requests.
struct Service {
    server: Server<Files>,
    files: Files,
    pressure: Pressure,
}

#[derive(Default)]
struct Queues {
    memory: Option<GuestMemoryAtomic<Memory>>,
    /// VIRTIO_RING_F_EVENT_IDX: each side says when it wants to be told (virtio 1.2, 2.7.7).
    event_idx: bool,
}

impl Backend {
    /// A back end for this file system with at most so many worker threads.
    pub fn new(files: Files, pressure: Pressure, threads: usize) -> Self {
        Self {
            service: Arc::new(Service {
                server: Server::new(files.clone()),
                files,
                pressure,
            }),
            workers: Workers::new(threads),
            queues: RwLock::default(),
        }
    }

    /// Answers all requests in a queue. Answers whether there were any; none: the guest has broken the queue,
    /// and there is nothing to be done before it says so again.
    fn drain(
        &self,
        vring: &Vring,
        memory: &GuestMemoryAtomic<Memory>,
        event_idx: bool,
    ) -> Option<bool> {
        let chains: Vec<Chain> = {
            let mut state = vring.get_mut();
            match state.get_queue_mut().iter(memory.memory()) {
                Ok(chains) => chains.collect(),
                Err(error) => {
                    warn!("the guest broke its queue: {error}");
                    return None;
                }
            }
        };
        let any = !chains.is_empty();
        let mut mine: Option<Chain> = None;
        for chain in chains {
            let other = if is_slow(memory, &chain) {
                Some(chain)
            } else {
                mine.replace(chain)
            };
            if let Some(chain) = other {
                let (service, vring) = (self.service.clone(), vring.clone());
                let memory = memory.clone();
                self.workers
                    .run(move || answer(&service, &vring, &memory, chain, event_idx));
            }
        }
        if let Some(chain) = mine {
            answer(&self.service, vring, memory, chain, event_idx);
        }
        Some(any)
    }
}

/// Watches a queue for a while; answers whether a request has come.
fn more_within(time: Duration, vring: &Vring, memory: &GuestMemoryAtomic<Memory>) -> bool {
    let memory = memory.memory();
    let end = Instant::now() + time;
    loop {
        let state = vring.get_ref();
        let queue = state.get_queue();
        match queue.avail_idx(&*memory, Ordering::Acquire) {
            Ok(index) if index.0 != queue.next_avail() => return true,
            // A ring out of reach is reported where it is read.
            Err(_) => return false,
            Ok(_) if Instant::now() >= end => return false,
            Ok(_) => {}
        }
        drop(state);
        std::hint::spin_loop();
    }
}

/// Whether a request may take long, judged by its header. What is no request is quick to refuse.
fn is_slow(memory: &GuestMemoryAtomic<Memory>, chain: &Chain) -> bool {
    let memory = memory.memory();
    let Ok(mut reader) = Reader::new(&memory, chain.clone()) else {
        return false;
    };
    let mut header = [0_u8; 8];
    if reader.read_exact(&mut header).is_err() {
        return false;
    }
    let word = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    match word(4) {
        WRITE => word(0) >= LARGE,
        READ => Writer::new(&memory, chain.clone())
            .is_ok_and(|writer| writer.available_bytes() >= LARGE as usize),
        opcode => SLOW.contains(&opcode),
    }
}

/// Answers one request and gives its chain back.
fn answer(
    service: &Service,
    vring: &Vring,
    memory: &GuestMemoryAtomic<Memory>,
    chain: Chain,
    event_idx: bool,
) {
    let head = chain.head_index();
    let written = match service.execute(&memory.memory(), chain) {
        Ok(written) => u32::try_from(written).unwrap_or(u32::MAX),
        Err(reason) => {
            warn!("the guest sent what is no request: {reason}");
            0
        }
    };
    let mut state = vring.get_mut();
    if let Err(error) = state.add_used(head, written) {
        warn!("the guest's used ring is out of reach: {error}");
        return;
    }
    // Without a clear answer the guest is told once too often.
    if (!event_idx || state.needs_notification().unwrap_or(true))
        && let Err(error) = state.signal_used_queue()
    {
        warn!("cannot notify the guest: {error}");
    }
}

impl Service {
    /// Answers how many bytes were written into the chain.
    fn execute(&self, memory: &Memory, chain: Chain) -> Result<usize, String> {
        self.pressure.request();
        let reader = Reader::new(memory, chain.clone()).map_err(|e| e.to_string())?;
        let writer = Writer::new(memory, chain).map_err(|e| e.to_string())?;
        let mut ahead = reader.clone();
        if let Ok(header) = ahead.read_obj::<InHeader>() {
            let text = |error: io::Error| error.to_string();
            match header.opcode {
                TMPFILE => {
                    return requests::create_unnamed(&self.files, header, ahead, writer)
                        .map_err(text);
                }
                WRITE => {
                    return requests::write(&self.files, header, ahead, writer).map_err(text);
                }
                _ => {}
            }
            let room = writer.available_bytes();
            if NEED_ROOM.contains(&header.opcode) && room < size_of::<OutHeader>() {
                return Err(format!("{room} bytes are no room for an answer"));
            }
        }
        // No window of directly mapped file pages: no requests to the front end.
        self.server
            .handle_message(reader, writer, None::<&mut ()>)
            .map_err(|e| e.to_string())
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, enabled: bool) {
        self.change(|queues| queues.event_idx = enabled);
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        self.change(|queues| queues.memory = Some(memory));
        Ok(())
    }

    fn handle_event(
        &self,
        queue: u16,
        events: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        let Some(vring) = vrings.get(usize::from(queue)) else {
            return Err(io::Error::other(format!(
                "an event for queue {queue}, which is not"
            )));
        };
        if !events.contains(EventSet::IN) {
            return Err(io::Error::other(format!(
                "queue {queue}: unexpected event {events:?}"
            )));
        }
        let (memory, event_idx) = {
            let queues = self
                .queues
                .read()
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            (queues.memory.clone(), queues.event_idx)
        };
        let Some(memory) = memory else {
            debug!("queue {queue}: notified before there is memory");
            return Ok(());
        };
        if !event_idx {
            self.drain(vring, &memory, false);
            return Ok(());
        }
        // Between the last look and asking to be told, the guest may have added one more.
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            loop {
                match self.drain(vring, &memory, true) {
                    None => return Ok(()),
                    Some(any) if any && more_within(SPIN, vring, &memory) => {}
                    Some(_) => break,
                }
            }
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }
}

impl Backend {
    fn change(&self, change: impl FnOnce(&mut Queues)) {
        change(
            &mut self
                .queues
                .write()
                .unwrap_or_else(|poisoned| poisoned.into_inner()),
        );
    }
}
