//! The control queue (virtio 1.2, section 5.1.6.5): which offloads the tap may use.

use super::tap::Tap;
use super::{GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6};
use crate::virtio::error::{Complaints, DeviceError};
use crate::virtio::ring::Ring;

const OK: u8 = 0;
const ERROR: u8 = 1;
/// VIRTIO_NET_CTRL_GUEST_OFFLOADS and its VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET.
const GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;

/// Serves the queue.
pub struct Control<'m> {
    ring: Ring<'m>,
    /// Offloads that were agreed on: no others can be turned on.
    agreed: u64,
    complaints: Complaints,
}

impl<'m> Control<'m> {
    /// For a driver that accepted these features.
    pub fn new(ring: Ring<'m>, features: u64) -> Self {
        let agreed = features & (GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN);
        Self {
            ring,
            agreed,
            complaints: Complaints::default(),
        }
    }

    /// Serves what waits. True: there is more.
    ///
    /// # Errors
    /// A broken ring.
    pub fn serve(&mut self, tap: &Tap) -> Result<bool, DeviceError> {
        let Self {
            ring,
            agreed,
            complaints,
        } = self;
        ring.serve(|mut chain| {
            let command = chain.readable.read_array::<2>();
            let answer = match (command, chain.readable.read_array().map(u64::from_le_bytes)) {
                (Some([GUEST_OFFLOADS, GUEST_OFFLOADS_SET]), Some(wanted))
                    if wanted & !*agreed == 0 && tap.set_offloads(wanted).is_ok() =>
                {
                    OK
                }
                _ => {
                    complaints.warn("net", &format_args!("control command {command:?}"));
                    ERROR
                }
            };
            Ok(chain.writable.write(&[answer]) as u32)
        })
    }
}
