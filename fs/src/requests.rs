//! Requests that virtiofsd's server does not know, or would answer in a way that other pods feel.

use std::fs::File;
use std::io::{self, Write};

use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::{Context, FileSystem, ZeroCopyReader};
use virtiofsd::fuse::{
    CreateIn, EntryOut, InHeader, OpenOut, OutHeader, WRITE_CACHE, WRITE_KILL_PRIV,
    WRITE_LOCKOWNER, WriteIn, WriteOut,
};
use virtiofsd::oslib::WritevFlags;
use vm_memory::ByteValued;

use crate::files::Files;

/// The most that is written with one system call, in bytes. The host's page cache holds what was written at
/// once in one piece (large folios), and works on some thirty pieces before it lets others have the CPU:
/// with pieces of 1 MiB, removing a file holds a CPU for milliseconds where the host's kernel is not
/// preemptible, and other pods wait.
const PIECE: usize = 64 * 1024;

/// FUSE_WRITE. Answers the answer's length.
///
/// # Errors
/// The request is too short, or the answer has no room.
pub fn write(
    files: &Files,
    header: InHeader,
    mut request: Reader<'_>,
    reply: Writer<'_>,
) -> io::Result<usize> {
    let asked = request.read_obj::<WriteIn>()?;
    let has = |flag| asked.write_flags & flag != 0;
    let written = files.write(
        Context::from(header),
        header.nodeid,
        asked.fh,
        Pieces(request),
        asked.size,
        asked.offset,
        has(WRITE_LOCKOWNER).then_some(asked.lock_owner),
        has(WRITE_CACHE),
        has(WRITE_KILL_PRIV),
        asked.flags,
    );
    let out = written.map(|size| WriteOut {
        // No more than was asked for, which is a u32.
        size: u32::try_from(size).unwrap_or(u32::MAX),
        padding: 0,
    });
    answer(reply, header.unique, out.as_ref().map(ByteValued::as_slice))
}

/// FUSE_TMPFILE: the request is that of FUSE_CREATE, whose name means nothing here. Answers the answer's
/// length.
///
/// # Errors
/// The request is too short, or the answer has no room.
pub fn create_unnamed(
    files: &Files,
    header: InHeader,
    mut request: Reader<'_>,
    reply: Writer<'_>,
) -> io::Result<usize> {
    let asked = request.read_obj::<CreateIn>()?;
    let created = files
        .create_unnamed(Context::from(header), header.nodeid, &asked)
        .map(|(entry, fh)| {
            let open = OpenOut {
                fh,
                ..OpenOut::default()
            };
            [EntryOut::from(entry).as_slice(), open.as_slice()].concat()
        });
    answer(reply, header.unique, created.as_deref())
}

/// Writes an answer: its header and, without an error, its body. Answers its length.
fn answer(
    mut reply: Writer<'_>,
    unique: u64,
    body: Result<&[u8], &io::Error>,
) -> io::Result<usize> {
    let (error, body) = match body {
        Ok(body) => (0, body),
        Err(error) => (-error.raw_os_error().unwrap_or(libc::EIO), &[][..]),
    };
    let length = size_of::<OutHeader>() + body.len();
    let header = OutHeader {
        len: u32::try_from(length).unwrap_or(u32::MAX),
        error,
        unique,
    };
    reply.write_all(header.as_slice())?;
    reply.write_all(body)?;
    Ok(length)
}

/// The bytes of a request, written [`PIECE`] by piece.
struct Pieces<'a>(Reader<'a>);

impl ZeroCopyReader for Pieces<'_> {
    fn write_to_file_at(
        &mut self,
        file: &File,
        count: usize,
        offset: u64,
        flags: Option<WritevFlags>,
    ) -> io::Result<usize> {
        let count = count.min(self.0.available_bytes());
        let mut written = 0;
        while written < count {
            let size = PIECE.min(count - written);
            let rest = self.0.split_at(size).map_err(io::Error::other)?;
            let mut piece = std::mem::replace(&mut self.0, rest);
            match piece.write_to_file_at(file, size, offset + written as u64, flags) {
                Ok(some) => {
                    written += some;
                    if some < size {
                        break;
                    }
                }
                // As write(2): the error comes with the next one.
                Err(_) if written > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(written)
    }
}
