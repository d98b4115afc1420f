//! As much of ELF as tells whether a guest kernel is whole and which it is.

use std::path::Path;

/// No guest kernel is larger; more is not read.
const MOST: u64 = 256 << 20;
/// `linux_banner` of every kernel begins so.
const BANNER: &[u8] = b"Linux version ";

/// Why a file is no guest kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Read(#[from] std::io::Error),
    #[error("it is no uncompressed kernel (vmlinux, ELF for x86-64)")]
    NotElf,
    #[error("it is truncated: {found} bytes of at least {expected}")]
    Truncated { expected: u64, found: u64 },
    #[error("it names no kernel version")]
    NoVersion,
}

/// The version of a kernel file, as `uname -r` shows it.
///
/// # Errors
/// It cannot be read, is no kernel, or not a whole one.
pub fn kernel_version(path: &Path) -> Result<String, Error> {
    let length = std::fs::metadata(path)?.len();
    if length > MOST {
        return Err(Error::NotElf);
    }
    let bytes = std::fs::read(path)?;
    let expected = needed(&bytes).ok_or(Error::NotElf)?;
    let found = bytes.len() as u64;
    if found < expected {
        return Err(Error::Truncated { expected, found });
    }
    version(&bytes).ok_or(Error::NoVersion)
}

/// How long the file must be for its loaded segments (ELF-64 object file format: header,
/// program header).
fn needed(bytes: &[u8]) -> Option<u64> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    // Class 64, little-endian; e_machine 62 is x86-64.
    if bytes.get(..6)? != b"\x7fELF\x02\x01" || u16_at(18)? != 62 {
        return None;
    }
    let (table, size, count) = (u64_at(32)?, u64::from(u16_at(54)?), u64::from(u16_at(56)?));
    let mut needed = table.checked_add(size.checked_mul(count)?)?;
    for index in 0..count {
        let Ok(at) = usize::try_from(table + index * size) else {
            return None;
        };
        // p_offset and p_filesz. A header beyond the end is as good as a truncated file.
        let (Some(offset), Some(length)) = (u64_at(at + 8), u64_at(at + 32)) else {
            break;
        };
        needed = needed.max(offset.checked_add(length)?);
    }
    Some(needed)
}

fn version(bytes: &[u8]) -> Option<String> {
    let mut rest = bytes;
    loop {
        let at = rest
            .windows(BANNER.len())
            .position(|window| window == BANNER)?;
        rest = &rest[at + BANNER.len()..];
        let end = rest.iter().take(64).position(|&b| b == b' ')?;
        let word = std::str::from_utf8(&rest[..end]).ok();
        // The kernel also has the format string "Linux version %s".
        if let Some(word) = word.filter(|word| word.starts_with(|c: char| c.is_ascii_digit())) {
            return Some(word.to_owned());
        }
    }
}

/// A whole kernel file for tests: one segment with a banner.
#[cfg(test)]
pub fn sample(version: &str) -> Vec<u8> {
    let mut bytes = vec![0_u8; 64 + 56];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[18] = 62;
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56] = 1;
    let text = format!("Linux version %s \0Linux version {version} (sepal@sepal) #1\0");
    bytes[64 + 8] = 120;
    bytes[64 + 32..64 + 36].copy_from_slice(&u32::try_from(text.len()).unwrap().to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: &[u8]) -> Result<String, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        kernel_version(file.path())
    }

    #[test]
    fn a_whole_kernel_tells_its_version() {
        assert_eq!(of(&sample("6.12.117-sepal")).unwrap(), "6.12.117-sepal");
    }

    #[test]
    fn what_is_wrong_is_told_apart() {
        let whole = sample("6.12.117-sepal");
        let cut = of(&whole[..whole.len() - 1]);
        assert!(matches!(cut, Err(Error::Truncated { .. })), "{cut:?}");
        assert!(matches!(of(&whole[..80]), Err(Error::Truncated { .. })));
        assert!(matches!(of(b"MZ compressed"), Err(Error::NotElf)));
        assert!(matches!(of(b""), Err(Error::NotElf)));
        let mut mute = whole;
        mute.truncate(120);
        mute[64 + 32..64 + 36].fill(0);
        assert!(matches!(of(&mute), Err(Error::NoVersion)));
    }

    #[test]
    fn offsets_that_overflow_are_no_kernel() {
        let mut bytes = sample("6.12");
        bytes[64 + 8..64 + 16].fill(0xff);
        assert!(matches!(of(&bytes), Err(Error::NotElf)));
    }
}
