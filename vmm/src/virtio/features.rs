//! Feature bits that every device here offers (virtio 1.2, section 6).

/// VIRTIO_F_VERSION_1: offered and insisted on by the transport.
#[cfg(test)]
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_INDIRECT_DESC: a chain may live in a table of its own.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX: both sides say from which index on they want to be told.
pub const EVENT_IDX: u64 = 1 << 29;
/// What [`crate::virtio::ring::Ring`] implements for every device.
pub const RING: u64 = INDIRECT_DESC | EVENT_IDX;

/// Reads from a configuration space held as bytes; what lies beyond its end reads as zero.
pub fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Ok(start) = usize::try_from(offset) else {
        return;
    };
    let Some(rest) = config.get(start..) else {
        return;
    };
    let length = rest.len().min(data.len());
    data[..length].copy_from_slice(&rest[..length]);
}

#[cfg(test)]
mod tests {
    use super::read_config;

    #[test]
    fn bytes_beyond_the_configuration_read_as_zero() {
        let config = [1, 2, 3, 4];
        let mut data = [9; 4];
        read_config(&config, 2, &mut data);
        assert_eq!(data, [3, 4, 0, 0]);
        for offset in [4, 5, u64::MAX] {
            data.fill(9);
            read_config(&config, offset, &mut data);
            assert_eq!(data, [0; 4]);
        }
    }
}
