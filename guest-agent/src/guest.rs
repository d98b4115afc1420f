//! What the guest as a machine has: CPUs, memory, block devices, network counters.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use sepal_protocol::agent::{GuestInfoResponse, InterfaceStats};

use crate::error::{Context, Error, Result};

const CPUS: &str = "/sys/devices/system/cpu";
/// How many huge pages of 2 MiB the kernel keeps for programs that ask for such.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
/// How long a hot-plugged disk may take to appear.
const DISK_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of the serial number that a virtio-blk device reports (virtio 1.2, 5.2.6).
const SERIAL_LEN: usize = 20;

/// What the guest has and uses.
#[must_use]
pub fn info() -> GuestInfoResponse {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    GuestInfoResponse {
        memory_total: meminfo(&memory, "MemTotal:"),
        memory_available: meminfo(&memory, "MemAvailable:"),
        cpus_online: count_of("online"),
        cpus_present: cpus_present(),
        kernel: kernel(),
        agent_version: env!("CARGO_PKG_VERSION").into(),
        ..Default::default()
    }
}

/// `uname -r`.
#[must_use]
pub fn kernel() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// CPUs that are plugged in, online or not; at least 1.
#[must_use]
pub fn cpus_present() -> u32 {
    count_of("present").max(1)
}

/// Brings CPUs online, or offline from the highest number, until `wanted` are online.
///
/// # Errors
/// When the guest has fewer, or a CPU refuses.
pub fn set_cpus(wanted: u32) -> Result<()> {
    let present = numbers(&fs::read_to_string(format!("{CPUS}/present")).unwrap_or_default());
    let all = u32::try_from(present.len()).unwrap_or(u32::MAX);
    if wanted == 0 || wanted > all {
        return Err(Error::Invalid(format!(
            "the guest has {all} CPUs, not {wanted}"
        )));
    }
    for (place, cpu) in (0..).zip(present) {
        let path = format!("{CPUS}/cpu{cpu}/online");
        let state = if place < wanted { "1" } else { "0" };
        // The first CPU has no such file: it cannot go offline.
        let Ok(before) = fs::read_to_string(&path) else {
            continue;
        };
        if before.trim() != state {
            fs::write(&path, state).context(|| format!("cannot switch CPU {cpu}"))?;
        }
    }
    Ok(())
}

/// Has the kernel keep so many huge pages. What it cannot put together it leaves out.
///
/// # Errors
/// When it keeps none at all, whatever it has.
pub fn keep_huge_pages(count: u64) -> Result<()> {
    fs::write(HUGE_PAGES, count.to_string()).context(|| "cannot keep huge pages".into())
}

/// How many it keeps.
#[must_use]
pub fn huge_pages() -> u64 {
    let count = fs::read_to_string(HUGE_PAGES).unwrap_or_default();
    count.trim().parse().unwrap_or(0)
}

fn count_of(file: &str) -> u32 {
    let list = fs::read_to_string(format!("{CPUS}/{file}")).unwrap_or_default();
    u32::try_from(numbers(&list).len()).unwrap_or(u32::MAX)
}

/// The numbers of a list such as "0-2,5".
fn numbers(list: &str) -> Vec<u32> {
    list.trim()
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range: std::ops::RangeInclusive<u32> = first.parse().ok()?..=last.parse().ok()?;
            Some(range)
        })
        .flatten()
        .collect()
}

/// A value of /proc/meminfo, in bytes.
fn meminfo(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(key))
        .and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_mul(1024)
}

/// Counters of the pod's interfaces.
#[must_use]
pub fn interface_stats() -> Vec<InterfaceStats> {
    parse_net_dev(&fs::read_to_string("/proc/net/dev").unwrap_or_default())
}

/// /proc/net/dev: two head lines, then a name, eight columns received and eight sent.
fn parse_net_dev(text: &str) -> Vec<InterfaceStats> {
    text.lines()
        .filter_map(|line| {
            let (name, columns) = line.split_once(':')?;
            let columns: Vec<u64> = columns
                .split_ascii_whitespace()
                .filter_map(|word| word.parse().ok())
                .collect();
            let at = |index: usize| columns.get(index).copied().unwrap_or(0);
            let name = name.trim();
            (name != "lo" && columns.len() >= 16).then(|| InterfaceStats {
                name: name.to_owned(),
                rx_bytes: at(0),
                rx_packets: at(1),
                rx_errors: at(2),
                rx_dropped: at(3),
                tx_bytes: at(8),
                tx_packets: at(9),
                tx_errors: at(10),
                tx_dropped: at(11),
                ..Default::default()
            })
        })
        .collect()
}

/// The device node of the disk with a serial number. Waits a little: it may just be plugged in.
///
/// # Errors
/// When it does not appear within five seconds.
pub async fn block_device(serial: &str) -> Result<PathBuf> {
    let wanted = serial.get(..SERIAL_LEN).unwrap_or(serial);
    let mut pause = Duration::from_millis(1);
    let deadline = tokio::time::Instant::now() + DISK_TIMEOUT;
    loop {
        let disks = fs::read_dir("/sys/block").context(|| "cannot list the disks".into())?;
        for disk in disks.flatten() {
            let found = fs::read_to_string(disk.path().join("serial")).unwrap_or_default();
            if found.trim_end_matches(['\n', '\0']) == wanted {
                return Ok(Path::new("/dev").join(disk.file_name()));
            }
        }
        if tokio::time::Instant::now() > deadline {
            return Err(Error::Timeout(format!(
                "the guest has no disk with serial {serial:?}"
            )));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Mounts a disk. Flags of mount(8) are told from options of the file system by their names.
///
/// # Errors
/// A sentence.
pub fn mount_device(
    device: &Path,
    target: &Path,
    fs_type: &str,
    options: &[String],
) -> std::result::Result<(), String> {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "rw" | "defaults" | "loop" => {}
            other => data.push(other),
        }
    }
    let data = data.join(",");
    mount(
        Some(device),
        target,
        Some(fs_type),
        flags,
        Some(data.as_str()),
    )
    .map_err(|errno| format!("{fs_type} on {device:?}: {}", crate::payload::text(errno)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_expanded() {
        assert_eq!(numbers("0-2,5\n"), [0, 1, 2, 5]);
        assert!(numbers("\n").is_empty());
    }

    #[test]
    fn memory_is_in_bytes() {
        let text = "MemTotal:         245760 kB\nMemFree:  1 kB\nMemAvailable:     1024 kB\n";
        assert_eq!(meminfo(text, "MemTotal:"), 245_760 * 1024);
        assert_eq!(meminfo(text, "MemAvailable:"), 1 << 20);
        assert_eq!(meminfo("", "MemTotal:"), 0);
    }

    #[test]
    fn loopback_is_not_counted() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes\n    \
            lo:  1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  \
            eth0: 100 2 3 4 0 0 0 0 500 6 7 8 0 0 0 0\n";
        let stats = parse_net_dev(text);
        assert_eq!(stats.len(), 1);
        let eth0 = &stats[0];
        assert_eq!((eth0.rx_bytes, eth0.rx_dropped), (100, 4));
        assert_eq!((eth0.tx_bytes, eth0.tx_errors), (500, 7));
    }
}
