//! virtio-vsock (virtio 1.2, section 5.10) onto Unix sockets, without any help of the host's kernel.
//!
//! * [`host`] is what a program on the host sees.
//! * [`connection`] is one stream, its credit, its buffer and its end.
//! * [`table`] has all streams.
//! * [`muxer`] is the worker, between rings and streams.
//! * [`packet`] has the headers.

pub mod connection;
pub mod host;
pub mod muxer;
pub mod packet;
pub mod table;

#[cfg(test)]
mod vsock_hostile_test;
#[cfg(test)]
mod vsock_model_test;
#[cfg(test)]
mod vsock_model_test_stream;
#[cfg(test)]
mod vsock_model_test_wires;
#[cfg(test)]
mod vsock_test;
#[cfg(test)]
mod vsock_test_driver;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use super::device::{ActivateError, Activation, DeviceType, SHARED_VECTORS, VirtioDevice};
use super::error::DeviceError;
use super::features;
use super::ring::Ring;
use super::worker::{Waits, Worker};
use muxer::{Muxer, RECEIVE_KICK, TRANSMIT_KICK};

/// To the guest, from the guest, events (transport reset: only after a snapshot).
///
/// Linux fills the first with buffers of 4 KiB (8 KiB of its memory) at boot: so many hold what one
/// connection may have in flight (VIRTIO_VSOCK_DEFAULT_BUF_SIZE, 256 KiB).
const QUEUE_SIZES: [u16; 3] = [64, 128, 16];

/// The device.
pub struct Vsock {
    guest_cid: u64,
    path: PathBuf,
    /// What it is called by who dials for the guest.
    dialled: PathBuf,
    listener: UnixListener,
    worker: Option<Worker>,
}

impl Vsock {
    /// Listens at `path` for programs that dial the guest. They wait there until the guest's driver
    /// is up.
    ///
    /// # Errors
    /// The socket cannot be made; its place must be free.
    pub fn new(guest_cid: u64, path: PathBuf) -> io::Result<Self> {
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            guest_cid,
            dialled: path.clone(),
            path,
            listener,
            worker: None,
        })
    }

    /// The host's sockets that the guest dials are found beside this path, and not beside that of the
    /// listener: for who has another root directory meanwhile.
    pub fn dial_at(&mut self, path: PathBuf) {
        self.dialled = path;
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn vectors(&self) -> u16 {
        SHARED_VECTORS
    }

    fn features(&self) -> u64 {
        features::RING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        features::read_config(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            queues,
            interrupt,
            features,
        } = activation;
        let got = queues.len();
        let mut queues = queues.into_iter();
        let (receive, transmit) = match (queues.next(), queues.next()) {
            (Some(receive), Some(transmit)) if (receive.index, transmit.index) == (0, 1) => {
                (receive, transmit)
            }
            _ => return Err(ActivateError::MissingQueues { got, need: 2 }),
        };
        let listener = self.listener.try_clone().map_err(ActivateError::Worker)?;
        let (guest_cid, path, theirs) = (self.guest_cid, self.dialled.clone(), interrupt.clone());
        let body = move |waits: &Waits| {
            for (queue, token) in [(&receive, RECEIVE_KICK), (&transmit, TRANSMIT_KICK)] {
                waits
                    .add_kick(&queue.kick, token)
                    .map_err(DeviceError::host("epoll_ctl"))?;
            }
            let receive = Ring::new(receive, &memory, theirs.clone(), features);
            let transmit = Ring::new(transmit, &memory, theirs, features);
            waits.serve(&mut Muxer::new(
                guest_cid, path, listener, receive, transmit,
            ))
        };
        self.worker = Some(Worker::spawn(
            "virtio-vsock",
            DeviceType::Vsock,
            interrupt,
            body,
        )?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.worker = None;
        // Nobody may wait at a door that will not open. Who confined us may have taken the right
        // to remove it, and then removes it himself.
        let _ = std::fs::remove_file(&self.path);
    }
}
