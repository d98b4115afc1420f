//! Split virtqueues (virtio 1.2, section 2.7) as a device's worker sees them.
//!
//! [`Ring::pop`] follows a chain to its end and checks all of it before the device sees any of it:
//! a chain that loops, links out of the table, nests indirect tables, leaves RAM, holds empty
//! buffers or mixes directions stops the device (NEEDS_RESET), for nothing that the driver says
//! afterwards can be believed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap};

use super::buffer::{MAX_SEGMENTS, Reader, Writer};
use super::device::{ActiveQueue, Interrupt};
use super::error::{DeviceError, RingError};
use super::features::EVENT_IDX;

/// One request of the driver, checked. Give its [`Chain::head`] back by [`Ring::complete`].
pub struct Chain<'m> {
    /// Names the request to the driver.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Reader<'m>,
    /// Where the device may answer.
    pub writable: Writer<'m>,
}

/// A queue in use, and the guest RAM it lives in.
pub struct Ring<'m> {
    index: u16,
    queue: Queue,
    memory: &'m GuestMemoryMmap,
    interrupt: Arc<dyn Interrupt>,
}

impl<'m> Ring<'m> {
    /// Takes over a queue that the driver has set up. `features` are those agreed on.
    pub fn new(
        active: ActiveQueue,
        memory: &'m GuestMemoryMmap,
        interrupt: Arc<dyn Interrupt>,
        features: u64,
    ) -> Self {
        let ActiveQueue {
            index,
            mut queue,
            kick: _,
        } = active;
        queue.set_event_idx(features & EVENT_IDX != 0);
        Self {
            index,
            queue,
            memory,
            interrupt,
        }
    }

    /// Descriptors in the table.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The next request; `None` when the driver has offered no more.
    ///
    /// # Errors
    /// The driver broke the ring or the chain; the device must stop.
    pub fn pop(&mut self) -> Result<Option<Chain<'m>>, DeviceError> {
        let index = self.index;
        self.next_chain().map_err(|source| DeviceError::Ring {
            queue: index,
            source,
        })
    }

    fn next_chain(&mut self) -> Result<Option<Chain<'m>>, RingError> {
        let size = self.queue.size();
        let next = self.queue.iter(self.memory)?.next();
        let Some(descriptors) = next else {
            // The iterator also ends when the ring's entry cannot be read.
            let available = self.queue.avail_idx(self.memory, Ordering::Acquire)?;
            if available.0 != self.queue.next_avail() && !self.available_in_ram() {
                return Err(virtio_queue::Error::InvalidChain.into());
            }
            return Ok(None);
        };
        let head = descriptors.head_index();
        if head >= size {
            return Err(RingError::Head { head, size });
        }
        check(self.memory, descriptors).map(Some)
    }

    fn available_in_ram(&self) -> bool {
        let address = vm_memory::GuestAddress(self.queue.avail_ring());
        let size = 6 + 2 * usize::from(self.queue.size());
        GuestMemoryBackend::check_range(self.memory, address, size)
    }

    /// Puts back the last `count` requests popped: they will be popped again.
    pub fn undo(&mut self, count: u16) {
        self.queue
            .set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Gives a request back to the driver with the number of bytes written into it.
    ///
    /// # Errors
    /// The used ring left RAM.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), DeviceError> {
        let result = self.queue.add_used(self.memory, head, written);
        result.map_err(|e| self.broken(e))
    }

    /// Interrupts the driver if it wants to hear of the requests completed since the last time.
    ///
    /// # Errors
    /// The ring left RAM.
    pub fn notify(&mut self) -> Result<(), DeviceError> {
        let needed = self.queue.needs_notification(self.memory);
        if needed.map_err(|e| self.broken(e))? {
            self.interrupt.used(self.index);
        }
        Ok(())
    }

    /// Asks the driver not to kick for now.
    ///
    /// # Errors
    /// The ring left RAM.
    pub fn disable_kicks(&mut self) -> Result<(), DeviceError> {
        let result = self.queue.disable_notification(self.memory);
        result.map_err(|e| self.broken(e))
    }

    /// Asks the driver to kick for the next request. True: one has come meanwhile, look again.
    ///
    /// # Errors
    /// The ring left RAM.
    pub fn enable_kicks(&mut self) -> Result<bool, DeviceError> {
        let result = self.queue.enable_notification(self.memory);
        result.map_err(|e| self.broken(e))
    }

    /// Serves the requests that wait, at most a ring full of them. `serve` returns the bytes it
    /// wrote. True: there is more, come back after looking at the other events.
    ///
    /// # Errors
    /// A broken ring, or what `serve` says.
    pub fn serve(
        &mut self,
        serve: impl FnMut(Chain<'m>) -> Result<u32, DeviceError>,
    ) -> Result<bool, DeviceError> {
        self.serve_at_most(self.size(), serve)
    }

    /// Like [`Ring::serve`], at most `limit` requests. After true, kicks are still off.
    ///
    /// # Errors
    /// A broken ring, or what `serve` says.
    pub fn serve_at_most(
        &mut self,
        limit: u16,
        mut serve: impl FnMut(Chain<'m>) -> Result<u32, DeviceError>,
    ) -> Result<bool, DeviceError> {
        self.disable_kicks()?;
        let mut served = 0;
        let more = loop {
            while served < limit {
                let Some(chain) = self.pop()? else { break };
                let head = chain.head;
                let written = serve(chain)?;
                self.complete(head, written)?;
                served += 1;
            }
            if served == limit {
                break true;
            }
            if !self.enable_kicks()? {
                break false;
            }
            self.disable_kicks()?;
        };
        if served > 0 {
            self.notify()?;
        }
        Ok(more)
    }

    fn broken(&self, error: virtio_queue::Error) -> DeviceError {
        DeviceError::Ring {
            queue: self.index,
            source: error.into(),
        }
    }
}

fn check<'m>(
    memory: &'m GuestMemoryMmap,
    descriptors: DescriptorChain<&'m GuestMemoryMmap>,
) -> Result<Chain<'m>, RingError> {
    let head = descriptors.head_index();
    let mut readable = Reader::new();
    let mut writable = Writer::new();
    let mut count = 0;
    // DescriptorChain stops without a word at whatever it cannot follow. What it yielded last then
    // still has NEXT set, or it yielded nothing.
    let mut ended = false;
    for descriptor in descriptors {
        count += 1;
        if count > MAX_SEGMENTS {
            return Err(RingError::TooLong {
                head,
                max: MAX_SEGMENTS,
            });
        }
        let (gpa, len) = (descriptor.addr(), descriptor.len());
        if len == 0 {
            return Err(RingError::ZeroLength { head });
        }
        if !descriptor.is_write_only() && !writable.is_empty() {
            return Err(RingError::Order { head });
        }
        for slice in GuestMemoryBackend::get_slices(memory, gpa, len as usize) {
            let slice = slice.map_err(|_| RingError::NotRam {
                gpa: gpa.raw_value(),
                len,
            })?;
            if descriptor.is_write_only() {
                writable.push(&slice);
            } else {
                readable.push(&slice);
            }
        }
        ended = !descriptor.has_next();
    }
    if ended {
        Ok(Chain {
            head,
            readable,
            writable,
        })
    } else {
        Err(RingError::Unterminated { head })
    }
}
