//! The guest's wall clock follows the host's.
//!
//! The shim sends the host's time when the pod is set up and now and then afterwards, by messages
//! that take their time. The kernel's paravirtual PTP clock (ptp_kvm), where the host offers one, is
//! better, and then corrections by message are only for what it cannot know: a jump.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::{Context, Error, Result};
use crate::sys;

/// Differences that are left alone at the start: about what the way of a message takes.
const TOLERANCE: Duration = Duration::from_millis(2);
/// And later: a message may be late on a busy machine, and a clock that goes to and fro is worse than
/// one that is off.
const LATER_TOLERANCE: Duration = Duration::from_millis(10);
/// And while the PTP clock is followed.
const FOLLOWING_TOLERANCE: Duration = Duration::from_secs(1);
/// The same for the PTP clock, which is read in microseconds.
const PTP_TOLERANCE: Duration = Duration::from_micros(200);
/// A host's crystal is off by some 20 ppm: 1 ms in 50 s.
const PTP_INTERVAL: Duration = Duration::from_secs(50);

/// Whether the PTP clock is followed.
static FOLLOWING: AtomicBool = AtomicBool::new(false);

/// Sets CLOCK_REALTIME to `realtime_ns` nanoseconds since the epoch, unless it is there already.
///
/// # Errors
/// Those of clock_adjtime(2).
pub fn set(realtime_ns: u64) -> Result<()> {
    approach_told(realtime_ns, TOLERANCE)
}

/// As [`set`], for a clock that has been set before.
///
/// # Errors
/// Those of clock_adjtime(2).
pub fn correct(realtime_ns: u64) -> Result<()> {
    let tolerance = if FOLLOWING.load(Ordering::Relaxed) {
        FOLLOWING_TOLERANCE
    } else {
        LATER_TOLERANCE
    };
    approach_told(realtime_ns, tolerance)
}

fn approach_told(realtime_ns: u64, tolerance: Duration) -> Result<()> {
    let target = i64::try_from(realtime_ns)
        .map_err(|_| Error::Invalid(format!("{realtime_ns} ns is not a time")))?;
    approach(target, tolerance)
}

fn approach(target_ns: i64, tolerance: Duration) -> Result<()> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let now = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
    let offset = target_ns.saturating_sub(now);
    if Duration::from_nanos(offset.unsigned_abs()) <= tolerance {
        return Ok(());
    }
    sys::shift_realtime(offset).context(|| "cannot set the clock".into())
}

/// Keeps the clock true until the end of the agent, where there is a clock to compare with.
pub async fn follow_host() {
    // The device tells by its name that it is the hypervisor's and not a network card's.
    let name = std::fs::read_to_string("/sys/class/ptp/ptp0/clock_name").unwrap_or_default();
    if !name.contains("KVM") {
        return;
    }
    let ptp = match File::open("/dev/ptp0") {
        Ok(ptp) => ptp,
        Err(error) => {
            tracing::warn!(%error, "cannot open the host's clock");
            return;
        }
    };
    loop {
        let time = sys::ptp_time_ns(ptp.as_fd()).context(|| "cannot read the host's clock".into());
        if let Err(error) = time.and_then(|time| approach(time, PTP_TOLERANCE)) {
            tracing::warn!(%error, "the clock does not follow the host's any more");
            FOLLOWING.store(false, Ordering::Relaxed);
            return;
        }
        FOLLOWING.store(true, Ordering::Relaxed);
        tokio::time::sleep(PTP_INTERVAL).await;
    }
}
