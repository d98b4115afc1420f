//! Block devices.

use crate::bed::Bed;

/// A file as a block device of the node's, until it goes out of scope.
#[derive(Debug)]
pub struct LoopDevice<'bed> {
    bed: &'bed Bed,
    path: String,
    file: String,
}

impl<'bed> LoopDevice<'bed> {
    /// Makes `file` with so many MiB, and a device of it.
    #[track_caller]
    pub fn new(bed: &'bed Bed, file: String, mebibytes: u32) -> Self {
        // A module, on some kernels one that nobody has wanted yet.
        let line = format!(
            "modprobe -q loop 2>/dev/null; truncate -s {mebibytes}M {file} && losetup -f --show {file}"
        );
        let path = bed.sh(&line).run().success().out();
        Self { bed, path, file }
    }

    /// The device's own path.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The file's.
    pub fn file(&self) -> &str {
        &self.file
    }
}

impl Drop for LoopDevice<'_> {
    fn drop(&mut self) {
        self.bed.command(["losetup", "-d", &self.path]).run();
    }
}
