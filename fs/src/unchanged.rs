//! Which files are as they were when the guest opened them last, so that it may keep what it has cached
//! of their data (FOPEN_KEEP_CACHE in linux/fuse.h).
//!
//! Without that word the guest's kernel drops all it has of a file at each open(2), and a compiler that
//! runs a hundred times is read a hundred times. A file has changed when its size or one of its times
//! has. The host's clock for these advances in ticks: a file that has just changed may change again and
//! look the same, so what is younger than some ticks is not remembered.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use virtiofsd::fuse::Attr;

/// A tick is 10 ms at most (CONFIG_HZ=100).
const SETTLED: Duration = Duration::from_millis(100);
/// So many files at most: half a megabyte. With more open ones in turn, all are forgotten.
const MOST: usize = 8192;

/// What changes with a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    size: u64,
    /// Since 1970.
    modified: Duration,
    changed: Duration,
}

/// See the module.
#[derive(Default)]
pub struct Unchanged {
    seen: Mutex<HashMap<u64, Stamp>>,
}

impl Unchanged {
    /// Notes that a file is being opened which has these attributes. Answers whether its data are those
    /// of the last time.
    pub fn opened(&self, inode: u64, attr: &Attr, now: SystemTime) -> bool {
        let stamp = Stamp {
            size: attr.size,
            modified: Duration::new(attr.mtime, attr.mtimensec),
            changed: Duration::new(attr.ctime, attr.ctimensec),
        };
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut seen = self.lock();
        if seen.get(&inode) == Some(&stamp) {
            return true;
        }
        if stamp.changed.saturating_add(SETTLED) > now {
            seen.remove(&inode);
            return false;
        }
        if seen.len() >= MOST {
            seen.clear();
        }
        seen.insert(inode, stamp);
        false
    }

    /// The guest has nothing of it any more.
    pub fn forget(&self, inode: u64) {
        self.lock().remove(&inode);
    }

    /// The guest has started anew.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Stamp>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr(size: u64, changed: u64) -> Attr {
        Attr {
            size,
            ctime: changed,
            ..Attr::default()
        }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_file_is_unchanged_from_its_second_opening_on_until_it_changes() {
        let files = Unchanged::default();
        assert!(!files.opened(7, &attr(1, 50), at(100)));
        assert!(files.opened(7, &attr(1, 50), at(101)));
        assert!(!files.opened(8, &attr(1, 50), at(101)));
        for changed in [attr(2, 50), attr(2, 60)] {
            assert!(!files.opened(7, &changed, at(102)));
            assert!(files.opened(7, &changed, at(103)));
        }
        files.forget(7);
        assert!(!files.opened(7, &attr(2, 60), at(104)));
    }

    #[test]
    fn a_file_that_has_just_changed_or_changes_in_time_to_come_is_not_trusted() {
        let files = Unchanged::default();
        for now in [100, 100, 99] {
            assert!(!files.opened(7, &attr(1, 100), at(now)));
        }
        assert!(!files.opened(7, &attr(1, 100), at(101)));
        assert!(files.opened(7, &attr(1, 100), at(101)));
    }

    #[test]
    fn there_is_an_end_to_what_is_remembered() {
        let files = Unchanged::default();
        for inode in 0..=MOST as u64 {
            assert!(!files.opened(inode, &attr(1, 1), at(100)));
        }
        assert_eq!(files.lock().len(), 1);
    }
}
