//! Which inodes belong to volumes.
//!
//! The share is `<container>/<name>/…`. Below one of these names lie the container's volumes, which
//! the host and other pods change as well: what the guest knows about them holds for no longer than
//! the answer. All else only this guest changes.
//!
//! Inodes on the way to a volume and in one are remembered as long as the guest remembers them, by
//! the same count of lookups that FUSE keeps (linux/fuse.h, FUSE_FORGET).

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The share's root (FUSE_ROOT_ID).
const ROOT: u64 = 1;

/// How far an inode is from a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// A container's directory.
    Container,
    /// The directory in which its volumes are.
    Volumes,
    /// A volume's root, or anything below it.
    Volume,
}

/// See the module.
pub struct Volumes {
    name: CString,
    known: Mutex<HashMap<u64, (Place, u64)>>,
}

impl Volumes {
    /// Volumes lie in the directories of this name.
    pub fn new(name: CString) -> Self {
        Self {
            name,
            known: Mutex::default(),
        }
    }

    /// The guest has been told of `child`, once more or for the first time. Answers whether it
    /// belongs to a volume.
    pub fn told(&self, parent: u64, name: &CStr, child: u64) -> bool {
        let mut known = self.lock();
        let place = match known.get(&parent) {
            None if parent == ROOT => Place::Container,
            Some((Place::Container, _)) if name == self.name.as_c_str() => Place::Volumes,
            Some((Place::Volumes | Place::Volume, _)) => Place::Volume,
            _ => return false,
        };
        let (there, count) = known.entry(child).or_insert((place, 0));
        *count = count.saturating_add(1);
        *there == Place::Volume
    }

    /// The guest forgets `count` of its lookups.
    pub fn forget(&self, inode: u64, count: u64) {
        let mut known = self.lock();
        if let Some((_, left)) = known.get_mut(&inode) {
            *left = left.saturating_sub(count);
            if *left == 0 {
                known.remove(&inode);
            }
        }
    }

    /// Whether it belongs to a volume.
    pub fn contain(&self, inode: u64) -> bool {
        matches!(self.lock().get(&inode), Some((Place::Volume, _)))
    }

    /// The guest has started anew.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (Place, u64)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_a_volume_is_known_until_it_is_forgotten() {
        let volumes = Volumes::new(c"mounts".into());
        assert!(!volumes.told(ROOT, c"box", 2));
        assert!(!volumes.told(2, c"rootfs", 3));
        assert!(!volumes.told(3, c"mounts", 4));
        assert!(!volumes.told(4, c"0", 5));
        assert!(!volumes.told(2, c"mounts", 6));
        assert!(volumes.told(6, c"0", 7));
        assert!(volumes.told(7, c"file", 8));
        assert!(volumes.told(7, c"again", 8));
        assert!(volumes.contain(7) && volumes.contain(8) && !volumes.contain(3));
        volumes.forget(8, 1);
        assert!(volumes.contain(8));
        volumes.forget(8, u64::MAX);
        volumes.forget(8, 1);
        assert!(!volumes.contain(8));
    }
}
