//! virtio-balloon (virtio 1.2, section 5.5): memory that the guest gives back to the host.
//!
//! Two ways: the host asks for pages (the balloon is inflated until it holds what [`Control`] says)
//! and the guest tells of pages that it does not use anyway (free page reporting). Either way their
//! memory is the host's at once ([`super::discard`]).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nix::sys::epoll::EpollFlags;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::buffer::Reader;
use super::device::{
    ActivateError, Activation, DeviceType, Interrupt, SHARED_VECTORS, VirtioDevice,
};
use super::discard::{cut, punch};
use super::error::{Complaints, DeviceError};
use super::features;
use super::locked;
use super::ring::{Chain, Ring};
use super::worker::{Handler, Next, Waits, Worker};

/// Unit of the balloon, whatever the guest's page size (5.5.6).
pub use super::discard::PAGE;

/// In the log.
const NAME: &str = "balloon";

// Feature bits (5.5.3). Without DEFLATE_ON_OOM what the balloon holds is the host's: the guest's total
// memory is less by it, and a process that would need it is killed rather than given it back.
const STATS_VQ: u64 = 1 << 1;
const PAGE_REPORTING: u64 = 1 << 5;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS: u16 = 2;
/// The virtio specification numbers the queues through, whether or not their features are agreed
/// on; Linux up to now leaves no gaps. Free page hints, which would be in between, are not offered,
/// so that whatever lies behind the statistics is for reporting.
const QUEUE_SIZES: [u16; 5] = [128, 128, 16, 64, 64];

/// Page numbers in one request; Linux sends 256.
const MOST_PAGES: usize = 4096;
/// Statistics in one request; Linux sends 16.
const MOST_STATS: usize = 64;
/// Token of the event by which new statistics are asked for.
const ASK: u64 = 1 << 32;

/// Where `actual` is in the configuration space.
const ACTUAL: u64 = 4;

/// The balloon's size as the host wants it and as it is; for whoever answers the control socket.
pub struct Control {
    target: AtomicU32,
    actual: AtomicU32,
    returned: AtomicU64,
    stats: Mutex<Vec<(u16, u64)>>,
    ask: EventFd,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Control {
    /// Lets the guest inflate or deflate the balloon until it holds `bytes`, rounded down to pages.
    /// False: no driver is there to do it.
    pub fn set_target(&self, bytes: u64) -> bool {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        self.target.store(pages, Ordering::Relaxed);
        let interrupt = locked(&self.interrupt).clone();
        if let Some(interrupt) = &interrupt {
            interrupt.config_changed();
        }
        interrupt.is_some()
    }

    /// Bytes that the balloon holds, as the driver says.
    pub fn held(&self) -> u64 {
        u64::from(self.actual.load(Ordering::Relaxed)) * PAGE
    }

    /// Bytes given back to the host so far, by either way; the same page counts each time.
    pub fn returned(&self) -> u64 {
        self.returned.load(Ordering::Relaxed)
    }

    /// The guest's statistics as tag and value (5.5.6.4), the last that came. Asks for new ones.
    pub fn stats(&self) -> Vec<(u16, u64)> {
        let _ = self.ask.write(1);
        locked(&self.stats).clone()
    }
}

/// The device.
pub struct Balloon {
    control: Arc<Control>,
    worker: Option<Worker>,
}

impl Balloon {
    /// An empty balloon.
    ///
    /// # Errors
    /// eventfd(2).
    pub fn new() -> std::io::Result<Self> {
        let control = Control {
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            returned: AtomicU64::new(0),
            stats: Mutex::default(),
            ask: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            interrupt: Mutex::new(None),
        };
        Ok(Self {
            control: Arc::new(control),
            worker: None,
        })
    }

    /// To be kept by whoever changes the balloon's size.
    pub fn control(&self) -> Arc<Control> {
        Arc::clone(&self.control)
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn vectors(&self) -> u16 {
        SHARED_VECTORS
    }

    fn features(&self) -> u64 {
        features::RING | STATS_VQ | PAGE_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..4].copy_from_slice(&self.control.target.load(Ordering::Relaxed).to_le_bytes());
        config[4..8].copy_from_slice(&self.control.actual.load(Ordering::Relaxed).to_le_bytes());
        features::read_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            self.control
                .actual
                .store(u32::from_le_bytes(actual), Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            queues,
            interrupt,
            features,
        } = activation;
        let got = queues.len();
        if got < 2 || queues[0].index != INFLATE || queues[1].index != DEFLATE {
            return Err(ActivateError::MissingQueues { got, need: 2 });
        }
        *locked(&self.control.interrupt) = Some(Arc::clone(&interrupt));
        let (theirs, control) = (Arc::clone(&interrupt), Arc::clone(&self.control));
        let body = move |waits: &Waits| {
            waits
                .add_kick(&control.ask, ASK)
                .map_err(DeviceError::host("epoll_ctl"))?;
            let mut rings = Vec::new();
            for queue in queues {
                let purpose = purpose(queue.index, features);
                let added = waits.add_kick(&queue.kick, u64::from(queue.index));
                added.map_err(DeviceError::host("epoll_ctl"))?;
                rings.push((
                    purpose,
                    Ring::new(queue, &memory, Arc::clone(&theirs), features),
                ));
            }
            waits.serve(&mut Pages {
                rings,
                memory: &memory,
                control: &control,
                asked: false,
                held_stats: None,
                complaints: Complaints::default(),
            })
        };
        self.worker = Some(Worker::spawn(
            "virtio-balloon",
            DeviceType::Balloon,
            interrupt,
            body,
        )?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        *locked(&self.control.interrupt) = None;
        // A driver that starts anew has an empty balloon.
        self.control.actual.store(0, Ordering::Relaxed);
        locked(&self.control.stats).clear();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Inflate,
    Deflate,
    Stats,
    Report,
}

fn purpose(index: u16, features: u64) -> Purpose {
    match index {
        INFLATE => Purpose::Inflate,
        DEFLATE => Purpose::Deflate,
        STATS if features & STATS_VQ != 0 => Purpose::Stats,
        _ => Purpose::Report,
    }
}

struct Pages<'m> {
    rings: Vec<(Purpose, Ring<'m>)>,
    memory: &'m GuestMemoryMmap,
    control: &'m Control,
    /// Somebody wants new statistics.
    asked: bool,
    /// The driver's buffer for statistics: to give it back is to ask.
    held_stats: Option<u16>,
    complaints: Complaints,
}

impl Handler for Pages<'_> {
    fn event(&mut self, _: &Waits, token: u64, _: EpollFlags) -> Result<(), DeviceError> {
        self.asked |= token == ASK;
        Ok(())
    }

    fn turn(&mut self, _: &Waits) -> Result<Next, DeviceError> {
        let Self {
            rings,
            memory,
            control,
            asked,
            held_stats,
            complaints,
        } = self;
        let mut more = false;
        for (purpose, ring) in rings {
            more |= match purpose {
                Purpose::Inflate => ring.serve(|mut chain| {
                    let returned = inflate(memory, &mut chain.readable, complaints);
                    control.returned.fetch_add(returned, Ordering::Relaxed);
                    Ok(0)
                })?,
                // What is touched again comes back by itself.
                Purpose::Deflate => ring.serve(|_| Ok(0))?,
                Purpose::Report => ring.serve(|chain| {
                    let returned = report(memory, &chain, complaints);
                    control.returned.fetch_add(returned, Ordering::Relaxed);
                    Ok(0)
                })?,
                Purpose::Stats => {
                    take_stats(ring, control, held_stats)?;
                    if std::mem::take(asked)
                        && let Some(head) = held_stats.take()
                    {
                        ring.complete(head, 0)?;
                        ring.notify()?;
                    }
                    false
                }
            };
        }
        Ok(if more { Next::Again } else { Next::Wait })
    }
}

/// Keeps the last buffer of statistics, gives others back.
fn take_stats(
    ring: &mut Ring<'_>,
    control: &Control,
    held: &mut Option<u16>,
) -> Result<(), DeviceError> {
    for _ in 0..ring.size() {
        let Some(mut chain) = ring.pop()? else { break };
        let mut stats = Vec::new();
        while let (Some([a, b, value @ ..]), true) =
            (chain.readable.read_array::<10>(), stats.len() < MOST_STATS)
        {
            stats.push((u16::from_le_bytes([a, b]), u64::from_le_bytes(value)));
        }
        *locked(&control.stats) = stats;
        if let Some(head) = held.replace(chain.head) {
            ring.complete(head, 0)?;
            ring.notify()?;
        }
    }
    Ok(())
}

/// Takes the pages whose numbers the driver lists. Returns the bytes given back.
fn inflate(memory: &GuestMemoryMmap, list: &mut Reader<'_>, complaints: &mut Complaints) -> u64 {
    let mut returned = 0;
    // Neighbours are cut out together.
    let mut run: Option<(u64, u64)> = None;
    for _ in 0..MOST_PAGES {
        let Some(number) = list.read_array().map(u32::from_le_bytes) else {
            break;
        };
        let gpa = u64::from(number) * PAGE;
        match &mut run {
            Some((_, end)) if *end == gpa => *end += PAGE,
            Some((start, _)) if gpa + PAGE == *start => *start = gpa,
            _ => {
                returned += run.map_or(0, |run| cut(memory, run, NAME, complaints));
                run = Some((gpa, gpa + PAGE));
            }
        }
    }
    if !list.is_empty() {
        complaints.warn(
            NAME,
            &format_args!("{} bytes left of a page list", list.len()),
        );
    }
    returned + run.map_or(0, |run| cut(memory, run, NAME, complaints))
}

/// Takes the ranges that the driver reports. They are buffers of the chain, which has been checked.
fn report(memory: &GuestMemoryMmap, chain: &Chain<'_>, complaints: &mut Complaints) -> u64 {
    let mut returned = 0;
    for (host, length) in chain.writable.ranges() {
        let region = memory.iter().find_map(|region| {
            let offset = (host as u64).checked_sub(region.as_ptr() as u64)?;
            (offset < region.len()).then_some((region, offset))
        });
        let Some((region, offset)) = region else {
            continue;
        };
        // Only whole pages: what shares a page with something else stays.
        let start = offset.next_multiple_of(PAGE);
        let end = (offset + length as u64) / PAGE * PAGE;
        if start < end {
            returned += punch(
                region,
                MemoryRegionAddress(start),
                end - start,
                NAME,
                complaints,
            );
        }
    }
    returned
}
