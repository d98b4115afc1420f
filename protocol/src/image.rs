//! The trailer of a guest image: the last [`TRAILER`] bytes of the file, behind the file system.
//!
//! `rootfs/build` writes it. It tells a guest image from another file, a whole one from a truncated
//! one, and which version of Sepal's agent is inside, without mounting anything. Text, one
//! `key=value` per line below the line [`MAGIC`], padded with zeroes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of the trailer.
pub const TRAILER: usize = 4096;
/// Its first line.
pub const MAGIC: &str = "sepal guest image 1";
/// The length of an image is a multiple of this: virtio-pmem maps memory in such sections.
pub const ALIGNMENT: u64 = 2 << 20;

/// What a trailer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Version of Sepal whose agent is inside.
    pub version: String,
    /// `release` or `debug`.
    pub variant: String,
    /// Length of the file in bytes.
    pub size: u64,
}

/// Why a file is no guest image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be read.
    #[error("{0}")]
    Read(#[from] std::io::Error),
    /// It does not end in a trailer.
    #[error("it is truncated or no guest image")]
    NoTrailer,
    /// The trailer is of a file of another length.
    #[error("it is {found} bytes long and should be {expected}")]
    Length {
        /// What the trailer says.
        expected: u64,
        /// What is there.
        found: u64,
    },
}

impl Image {
    /// Reads the trailer of the file at `path`.
    ///
    /// # Errors
    /// The file cannot be read, is no guest image, or not a whole one.
    pub fn read(path: &Path) -> Result<Self, Error> {
        Self::of(&File::open(path)?)
    }

    /// Reads the trailer of an open file.
    ///
    /// # Errors
    /// As of [`Image::read`].
    pub fn of(file: &File) -> Result<Self, Error> {
        let found = file.metadata()?.len();
        let Some(at) = found.checked_sub(TRAILER as u64) else {
            return Err(Error::NoTrailer);
        };
        let mut trailer = vec![0; TRAILER];
        file.read_exact_at(&mut trailer, at)?;
        let image = Self::parse(&trailer).ok_or(Error::NoTrailer)?;
        if image.size != found || found % ALIGNMENT != 0 {
            return Err(Error::Length {
                expected: image.size,
                found,
            });
        }
        Ok(image)
    }

    fn parse(trailer: &[u8]) -> Option<Self> {
        let end = trailer.iter().position(|&b| b == 0)?;
        let mut lines = std::str::from_utf8(&trailer[..end]).ok()?.lines();
        if lines.next() != Some(MAGIC) {
            return None;
        }
        let (mut version, mut variant, mut size) = (None, None, None);
        for line in lines {
            match line.split_once('=')? {
                ("version", value) => version = Some(value.to_owned()),
                ("variant", value) => variant = Some(value.to_owned()),
                ("size", value) => size = value.parse().ok(),
                // Room for what a later build may add.
                _ => {}
            }
        }
        Some(Self {
            version: version?,
            variant: variant?,
            size: size?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(length: u64, trailer: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(length).unwrap();
        file.as_file()
            .write_all_at(trailer.as_bytes(), length - TRAILER as u64)
            .unwrap();
        file.flush().unwrap();
        file
    }

    const TEXT: &str = "sepal guest image 1\nversion=0.3.1\nvariant=debug\nsize=4194304\nnew=x\n";

    #[test]
    fn a_whole_image_tells_its_version() {
        let image = Image::read(file(4 << 20, TEXT).path()).unwrap();
        let expected = Image {
            version: "0.3.1".into(),
            variant: "debug".into(),
            size: 4 << 20,
        };
        assert_eq!(image, expected);
    }

    #[test]
    fn other_lengths_and_other_files_are_refused() {
        let longer = Image::read(file(6 << 20, TEXT).path());
        assert!(matches!(
            longer,
            Err(Error::Length {
                expected: 4194304,
                found: 6291456
            })
        ));
        let truncated = file(4 << 20, TEXT);
        truncated.as_file().set_len(2 << 20).unwrap();
        assert!(matches!(
            Image::read(truncated.path()),
            Err(Error::NoTrailer)
        ));
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(Image::read(empty.path()), Err(Error::NoTrailer)));
        let missing = Image::read(Path::new("/nonexistent/guest.erofs"));
        assert!(matches!(missing, Err(Error::Read(_))));
    }
}
