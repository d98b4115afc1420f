//! virtio-blk (virtio 1.2, section 5.2) on a file or block device of the host.
//!
//! Requests are served one after the other by the worker, straight between the file and guest RAM.
//! A request that reaches beyond the device or makes no sense fails alone, with its status.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::epoll::EpollFlags;

use super::buffer::{Reader, Writer};
use super::device::{ActivateError, Activation, DeviceType, Interrupt, VirtioDevice};
use super::error::{Complaints, DeviceError};
use super::features;
use super::ring::{Chain, Ring};
use super::worker::{Handler, Next, Waits, Worker};

/// Bytes of a sector, the unit of all addresses, whatever the device's block size.
pub const SECTOR: u64 = 512;
/// Longest serial, in bytes (VIRTIO_BLK_ID_BYTES).
pub const SERIAL_LEN: usize = 20;
/// Most bytes in one request: far more than a driver sends, and little enough to be done soon.
const MOST_PER_REQUEST: usize = 64 << 20;
/// Buffers of data in one request, beside header and status.
const MOST_SEGMENTS: u32 = 254;
/// Ranges in one discard request, and sectors in one of them.
const MOST_RANGES: u32 = 16;
const MOST_RANGE_SECTORS: u32 = 1 << 21;
/// Requests before the worker looks at its events again.
const BATCH: u16 = 16;
const QUEUE_SIZES: [u16; 1] = [256];

// Feature bits (5.2.3).
const SEG_MAX: u64 = 1 << 2;
const RO: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

// Kinds of request (5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const SYNC: u32 = 4;
const GET_ID: u32 = 8;
const FORGET: u32 = 11;
const ZERO: u32 = 13;

const UNMAP: u32 = 1;

/// How a request ended, as the driver reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    Failed = 1,
    Unsupported = 2,
}

/// The size of a device, and how the driver learns that it has changed.
pub struct Size {
    file: File,
    sectors: AtomicU64,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Size {
    /// Looks at the file and tells the driver if its size is another.
    ///
    /// # Errors
    /// lseek(2).
    pub fn refresh(&self) -> io::Result<u64> {
        let bytes = (&self.file).seek(SeekFrom::End(0))?;
        let sectors = bytes / SECTOR;
        if self.sectors.swap(sectors, Ordering::Relaxed) != sectors {
            let interrupt = self.interrupt.lock();
            let interrupt = interrupt
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .clone();
            if let Some(interrupt) = interrupt {
                interrupt.config_changed();
            }
        }
        Ok(sectors * SECTOR)
    }

    fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }

    fn set_interrupt(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        *self
            .interrupt
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = interrupt;
    }
}

/// The device.
pub struct Blk {
    size: Arc<Size>,
    serial: [u8; SERIAL_LEN],
    read_only: bool,
    worker: Option<Worker>,
}

impl Blk {
    /// A device on an open file or block device. Of `serial` the first [`SERIAL_LEN`] bytes count.
    ///
    /// # Errors
    /// The file has no size.
    pub fn new(file: File, serial: &str, read_only: bool) -> io::Result<Self> {
        let size = Size {
            file,
            sectors: AtomicU64::new(0),
            interrupt: Mutex::new(None),
        };
        size.refresh()?;
        let mut id = [0; SERIAL_LEN];
        let length = serial.len().min(SERIAL_LEN);
        id[..length].copy_from_slice(&serial.as_bytes()[..length]);
        Ok(Self {
            size: Arc::new(size),
            serial: id,
            read_only,
            worker: None,
        })
    }

    /// To be kept by whoever changes the file's size.
    pub fn size(&self) -> Arc<Size> {
        Arc::clone(&self.size)
    }

    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, value: u32| {
            config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        put(12, MOST_SEGMENTS);
        put(36, MOST_RANGE_SECTORS);
        put(40, MOST_RANGES);
        put(44, 1);
        put(48, MOST_RANGE_SECTORS);
        put(52, MOST_RANGES);
        // Zeroing may leave holes.
        put(56, 1);
        config[..8].copy_from_slice(&self.size.sectors().to_le_bytes());
        config
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let access = if self.read_only {
            RO
        } else {
            DISCARD | WRITE_ZEROES
        };
        features::RING | SEG_MAX | FLUSH | access
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        features::read_config(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            mut queues,
            interrupt,
            features,
        } = activation;
        let Some(requests) = queues.pop() else {
            return Err(ActivateError::MissingQueues { got: 0, need: 1 });
        };
        self.size.set_interrupt(Some(Arc::clone(&interrupt)));
        let theirs = Arc::clone(&interrupt);
        let disk = Disk {
            size: Arc::clone(&self.size),
            serial: self.serial,
            read_only: self.read_only,
            complaints: Complaints::default(),
        };
        let body = move |waits: &Waits| {
            waits
                .add_kick(&requests.kick, 0)
                .map_err(DeviceError::host("epoll_ctl"))?;
            let requests = Ring::new(requests, &memory, theirs, features);
            waits.serve(&mut Requests { requests, disk })
        };
        self.worker = Some(Worker::spawn(
            "virtio-blk",
            DeviceType::Block,
            interrupt,
            body,
        )?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.size.set_interrupt(None);
    }
}

struct Requests<'m> {
    requests: Ring<'m>,
    disk: Disk,
}

impl Handler for Requests<'_> {
    fn event(&mut self, _: &Waits, _: u64, _: EpollFlags) -> Result<(), DeviceError> {
        Ok(())
    }

    fn turn(&mut self, _: &Waits) -> Result<Next, DeviceError> {
        let disk = &mut self.disk;
        let more = self
            .requests
            .serve_at_most(BATCH, |chain| Ok(disk.request(chain)))?;
        Ok(if more { Next::Again } else { Next::Wait })
    }
}

struct Disk {
    size: Arc<Size>,
    serial: [u8; SERIAL_LEN],
    read_only: bool,
    complaints: Complaints,
}

impl Disk {
    /// Serves one request; returns the bytes written into it.
    fn request(&mut self, mut chain: Chain<'_>) -> u32 {
        let Some(space) = chain.writable.len().checked_sub(1) else {
            self.complaints
                .warn("blk", &"request without a place for its status");
            return 0;
        };
        let mut data = chain.writable.take(space);
        let status = match chain.readable.read_array::<16>() {
            Some(header) => {
                let (kind, sector) = header.split_at(8);
                let kind = u32::from_le_bytes([kind[0], kind[1], kind[2], kind[3]]);
                let mut number = [0; 8];
                number.copy_from_slice(sector);
                self.serve(
                    kind,
                    u64::from_le_bytes(number),
                    &mut chain.readable,
                    &mut data,
                )
            }
            None => {
                self.complaints
                    .warn("blk", &"request without a whole header");
                Status::Failed
            }
        };
        chain.writable.write(&[status as u8]);
        // Only what was written counts; the status lies behind all the space for data.
        if status == Status::Ok {
            (space - data.len()) as u32 + 1
        } else {
            1
        }
    }

    fn serve(
        &mut self,
        kind: u32,
        sector: u64,
        readable: &mut Reader<'_>,
        data: &mut Writer<'_>,
    ) -> Status {
        if self.read_only && matches!(kind, OUT | FORGET | ZERO) {
            self.complaints.warn("blk", &"write to a read-only device");
            return Status::Failed;
        }
        match kind {
            IN => self.read(sector, data),
            OUT => self.write(sector, readable),
            SYNC => self.done("flushing", self.size.file.sync_data()),
            GET_ID => {
                data.write(&self.serial);
                Status::Ok
            }
            FORGET | ZERO => self.forget(kind, readable),
            _ => Status::Unsupported,
        }
    }

    /// First byte of a transfer that lies within the device.
    fn start(&mut self, sector: u64, length: usize) -> Option<u64> {
        let sectors = length as u64 / SECTOR;
        let end = sector
            .checked_add(sectors)
            .filter(|end| *end <= self.size.sectors());
        if !(length as u64).is_multiple_of(SECTOR) || length > MOST_PER_REQUEST || end.is_none() {
            self.complaints
                .warn("blk", &format_args!("{length} bytes at sector {sector}"));
            return None;
        }
        Some(sector * SECTOR)
    }

    fn read(&mut self, sector: u64, data: &mut Writer<'_>) -> Status {
        let Some(mut at) = self.start(sector, data.len()) else {
            return Status::Failed;
        };
        while !data.is_empty() {
            match data.read_from_at(self.size.file.as_fd(), at) {
                // The file became shorter than the device.
                Ok(0) => return self.done("reading", Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => at += count as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return self.done("reading", Err(e)),
            }
        }
        Status::Ok
    }

    fn write(&mut self, sector: u64, data: &mut Reader<'_>) -> Status {
        let Some(mut at) = self.start(sector, data.len()) else {
            return Status::Failed;
        };
        while !data.is_empty() {
            match data.write_to_at(self.size.file.as_fd(), at) {
                Ok(0) => return self.done("writing", Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => at += count as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return self.done("writing", Err(e)),
            }
        }
        Status::Ok
    }

    /// Discards or zeroes ranges of sectors (5.2.6.2).
    fn forget(&mut self, kind: u32, ranges: &mut Reader<'_>) -> Status {
        let count = ranges.len() / 16;
        if !ranges.len().is_multiple_of(16) || count == 0 || count > MOST_RANGES as usize {
            self.complaints
                .warn("blk", &format_args!("ranges in {} bytes", ranges.len()));
            return Status::Failed;
        }
        while let Some(range) = ranges.read_array::<16>() {
            let mut sector = [0; 8];
            sector.copy_from_slice(&range[..8]);
            let sectors = u32::from_le_bytes([range[8], range[9], range[10], range[11]]);
            let flags = u32::from_le_bytes([range[12], range[13], range[14], range[15]]);
            let mode = match (kind, flags) {
                (FORGET, 0) | (ZERO, UNMAP) => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
                (ZERO, 0) => FallocateFlags::FALLOC_FL_ZERO_RANGE,
                _ => return Status::Unsupported,
            };
            let status = self.forget_range(u64::from_le_bytes(sector), sectors, mode);
            if status != Status::Ok {
                return status;
            }
        }
        Status::Ok
    }

    fn forget_range(&mut self, sector: u64, sectors: u32, mode: FallocateFlags) -> Status {
        let end = sector
            .checked_add(sectors.into())
            .filter(|end| *end <= self.size.sectors());
        if sectors > MOST_RANGE_SECTORS || end.is_none() {
            self.complaints
                .warn("blk", &format_args!("{sectors} sectors at sector {sector}"));
            return Status::Failed;
        }
        if sectors == 0 {
            return Status::Ok;
        }
        // Both fit: they lie within a file.
        let (at, length) = (
            (sector * SECTOR) as i64,
            (u64::from(sectors) * SECTOR) as i64,
        );
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        loop {
            return match fallocate(&self.size.file, mode, at, length) {
                Err(nix::Error::EINTR) => continue,
                // The driver then writes zeroes itself.
                Err(nix::Error::EOPNOTSUPP) => Status::Unsupported,
                other => self.done("discarding", other.map_err(io::Error::from)),
            };
        }
    }

    fn done(&mut self, what: &'static str, result: io::Result<()>) -> Status {
        match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.complaints
                    .warn("blk", &format_args!("{what}: {error}"));
                Status::Failed
            }
        }
    }
}
