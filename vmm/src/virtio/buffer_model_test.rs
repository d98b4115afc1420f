//! Readers and writers against what they stand for: one flat run of bytes, wherever its pieces lie.

use std::fs::File;
use std::io::{self, ErrorKind, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::buffer::{MAX_SEGMENTS, Reader, Writer};
use super::testing::{Noise, cases};

/// RAM is two regions side by side: a descriptor may reach from one into the other.
const RAM: usize = 32 << 10;
/// Bytes of a request's header, as those of vsock.
const HEADER: usize = 44;
/// What a pipe of one page takes at once.
const PIPE: usize = 4096;

/// Where a byte lies, and the number of its piece.
#[derive(Clone, Copy)]
struct Place {
    gpa: usize,
    piece: usize,
}

/// The model: each byte's place, in order.
#[derive(Clone, Default)]
struct Flat(Vec<Place>);

impl Flat {
    fn next_piece(&self) -> usize {
        self.0.last().map_or(0, |place| place.piece + 1)
    }

    fn push(&mut self, gpa: usize, length: usize) {
        let piece = self.next_piece();
        let places = (gpa..gpa + length).map(|gpa| Place { gpa, piece });
        self.0.extend(places);
    }

    fn take(&mut self, count: usize) -> Self {
        let rest = self.0.split_off(count.min(self.0.len()));
        Self(std::mem::replace(&mut self.0, rest))
    }

    fn append(&mut self, other: &Self) {
        let (next, first) = (self.next_piece(), other.0.first().map_or(0, |at| at.piece));
        self.0.extend(other.0.iter().map(|place| Place {
            piece: place.piece - first + next,
            ..*place
        }));
    }

    /// Bytes of the first pieces, as many as one call takes.
    fn in_one_call(&self) -> usize {
        let piece = |place: &Place| place.piece - self.0[0].piece;
        self.0
            .iter()
            .take_while(|place| piece(place) < MAX_SEGMENTS)
            .count()
    }

    fn pieces(&self) -> Vec<&[Place]> {
        self.0.chunk_by(|a, b| a.piece == b.piece).collect()
    }
}

/// The guest's RAM, and what must be in it.
struct Ram {
    memory: GuestMemoryMmap,
    bytes: Vec<u8>,
    noise: Noise,
}

impl Ram {
    fn new() -> Self {
        let half = RAM / 2;
        let regions = [(GuestAddress(0), half), (GuestAddress(half as u64), half)];
        let memory = GuestMemoryMmap::from_ranges(&regions).unwrap();
        let mut noise = Noise(7);
        let bytes = noise.bytes(RAM);
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        Self {
            memory,
            bytes,
            noise,
        }
    }

    fn at(&self, places: &Flat) -> Vec<u8> {
        places.0.iter().map(|place| self.bytes[place.gpa]).collect()
    }

    fn put(&mut self, places: &Flat, bytes: &[u8]) {
        for (place, byte) in places.0.iter().zip(bytes) {
            self.bytes[place.gpa] = *byte;
        }
    }

    fn is_as_it_must(&self) -> bool {
        let mut bytes = vec![0; RAM];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes == self.bytes
    }
}

/// A chain's buffers as `crate::virtio::ring` would push them.
fn push<'m>(
    memory: &'m GuestMemoryMmap,
    chain: &[(usize, usize)],
    mut push: impl FnMut(&vm_memory::VolatileSlice<'m>),
) -> Flat {
    let mut flat = Flat::default();
    for (gpa, length) in chain {
        let mut at = *gpa;
        let start = GuestAddress(*gpa as u64);
        for slice in GuestMemoryBackend::get_slices(memory, start, *length) {
            let slice = slice.unwrap();
            push(&slice);
            flat.push(at, slice.len());
            at += slice.len();
        }
    }
    flat
}

fn pipe() -> (File, File) {
    let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
    fcntl(write.as_fd(), FcntlArg::F_SETPIPE_SZ(PIPE as i32)).unwrap();
    (File::from(read), File::from(write))
}

/// What is there without waiting.
fn drain(mut from: impl io::Read) -> Vec<u8> {
    let mut bytes = vec![0; 4 * RAM];
    match from.read(&mut bytes) {
        Ok(count) => bytes.truncate(count),
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::WouldBlock);
            bytes.clear();
        }
    }
    bytes
}

fn streams() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours, theirs)
}

/// Buffers that may overlap, as a guest may have them. Few, or about as many as one call takes.
fn chain() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let length = prop_oneof![8 => 1..64_usize, 1 => 1..6000_usize];
    let buffer = (0..RAM, length).prop_map(|(gpa, length)| (gpa, length.min(RAM - gpa)));
    let tiny = (0..RAM - 4, 1..4_usize);
    let many = MAX_SEGMENTS - 8..MAX_SEGMENTS + 40;
    prop_oneof![15 => vec(buffer, 0..24), 1 => vec(tiny, many)]
}

fn count() -> impl Strategy<Value = usize> {
    prop_oneof![6 => 0..100_usize, 3 => 0..8000_usize, 1 => Just(usize::MAX)]
}

/// A place in a file; some that files do not have.
fn place() -> impl Strategy<Value = u64> {
    prop_oneof![9 => 0..9000_u64, 1 => (1 << 63)..=u64::MAX]
}

/// What is done to one of the readers.
#[derive(Debug, Clone)]
enum Read {
    Bytes(usize),
    Header,
    Take(usize),
    ToPipe,
    ToFullPipe,
    ToFile(u64),
    ToSocket,
    ToClosedSocket,
}

fn read() -> impl Strategy<Value = Read> {
    prop_oneof![
        4 => count().prop_map(Read::Bytes),
        2 => Just(Read::Header),
        4 => count().prop_map(Read::Take),
        1 => Just(Read::ToPipe),
        1 => Just(Read::ToFullPipe),
        1 => place().prop_map(Read::ToFile),
        1 => Just(Read::ToSocket),
        1 => Just(Read::ToClosedSocket),
    ]
}

/// Does it to both. Returns what was cut off.
fn do_read<'m>(
    step: &Read,
    reader: &mut Reader<'m>,
    flat: &mut Flat,
    ram: &Ram,
) -> Option<(Reader<'m>, Flat)> {
    let in_one_call = flat.in_one_call();
    match *step {
        Read::Bytes(count) => {
            let mut into = vec![0x5a; count.min(2 * RAM)];
            let taken = flat.take(into.len());
            assert_eq!(reader.read(&mut into), taken.0.len());
            let rest = into.split_off(taken.0.len());
            assert!(into == ram.at(&taken), "other bytes are there");
            assert!(rest.iter().all(|byte| *byte == 0x5a));
        }
        Read::Header => {
            let got = reader.read_array::<HEADER>();
            let expected = (flat.0.len() >= HEADER).then(|| ram.at(&flat.take(HEADER)));
            assert_eq!(got.map(|bytes| bytes.to_vec()), expected);
        }
        Read::Take(count) => return Some((reader.take(count), flat.take(count))),
        Read::ToPipe => {
            let (from, to) = pipe();
            let wrote = reader.write_to(to.as_fd()).unwrap();
            assert_eq!(wrote, in_one_call.min(PIPE));
            assert!(drain(from) == ram.at(&flat.take(wrote)));
        }
        Read::ToFullPipe => {
            let (_from, mut to) = pipe();
            to.write_all(&[0; PIPE]).unwrap();
            let refused = reader.write_to(to.as_fd()).map_err(|e| e.kind());
            // To write nothing is always possible.
            assert!(flat.0.is_empty() || refused == Err(ErrorKind::WouldBlock));
        }
        Read::ToFile(at) => {
            let file = tempfile::tempfile().unwrap();
            let wrote = reader.write_to_at(file.as_fd(), at);
            if i64::try_from(at).is_err() {
                assert_eq!(wrote.unwrap_err().kind(), ErrorKind::InvalidInput);
            } else {
                assert_eq!(wrote.unwrap(), in_one_call);
                let mut bytes = vec![0; in_one_call];
                file.read_exact_at(&mut bytes, at).unwrap();
                assert!(bytes == ram.at(&flat.take(in_one_call)));
            }
        }
        Read::ToSocket => {
            let (ours, theirs) = streams();
            // It may take less than there is, but not nothing.
            let sent = reader.send_to(ours.as_fd()).unwrap();
            assert!(sent >= in_one_call.min(PIPE) && sent <= in_one_call);
            assert!(drain(theirs) == ram.at(&flat.take(sent)));
        }
        Read::ToClosedSocket => {
            let (ours, theirs) = streams();
            drop(theirs);
            let refused = reader.send_to(ours.as_fd());
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::BrokenPipe);
        }
    }
    None
}

/// What is done to one of the writers.
#[derive(Debug, Clone)]
enum Write {
    Bytes(usize),
    Skip(usize),
    Take(usize),
    /// Writes to a view of the first bytes.
    Front(usize),
    /// Puts the writer behind another.
    Append(prop::sample::Index),
    FromPipe(usize),
    FromFile(usize, u64),
    FromSocket(usize),
}

fn write() -> impl Strategy<Value = Write> {
    prop_oneof![
        4 => count().prop_map(Write::Bytes),
        2 => count().prop_map(Write::Skip),
        4 => count().prop_map(Write::Take),
        2 => count().prop_map(Write::Front),
        3 => any::<prop::sample::Index>().prop_map(Write::Append),
        1 => (0..=PIPE).prop_map(Write::FromPipe),
        1 => (0..2 * RAM, place()).prop_map(|(length, at)| Write::FromFile(length, at)),
        1 => (0..2 * RAM).prop_map(Write::FromSocket),
    ]
}

type Writers<'m> = Vec<(Writer<'m>, Flat)>;

/// Does it to the writer and the model at `which`.
fn do_write<'m>(step: &Write, writers: &mut Writers<'m>, which: usize, ram: &mut Ram) {
    if let Write::Append(index) = step {
        let (last, last_flat) = writers.remove(which);
        if writers.is_empty() {
            writers.push((last, last_flat));
        } else {
            let (writer, flat) = index.get_mut(writers);
            writer.append(last);
            flat.append(&last_flat);
        }
        return;
    }
    let (writer, flat) = &mut writers[which];
    let in_one_call = flat.in_one_call();
    match *step {
        Write::Bytes(count) => {
            let bytes = ram.noise.bytes(count.min(2 * RAM));
            let taken = flat.take(bytes.len());
            assert_eq!(writer.write(&bytes), taken.0.len());
            ram.put(&taken, &bytes);
        }
        Write::Skip(count) => {
            writer.skip(count);
            flat.take(count);
        }
        Write::Take(count) => {
            let taken = (writer.take(count), flat.take(count));
            writers.push(taken);
        }
        Write::Front(count) => {
            let mut front = writer.front(count);
            let places = flat.clone().take(count);
            assert_eq!(front.len(), places.0.len());
            let bytes = ram.noise.bytes(places.0.len() + 1);
            assert_eq!(front.write(&bytes), places.0.len());
            assert!(front.is_empty());
            ram.put(&places, &bytes);
        }
        Write::FromPipe(length) => {
            let bytes = ram.noise.bytes(length);
            let (from, mut to) = pipe();
            to.write_all(&bytes).unwrap();
            drop(to);
            let got = writer.read_from(from.as_fd()).unwrap();
            assert_eq!(got, length.min(in_one_call));
            ram.put(&flat.take(got), &bytes);
        }
        Write::FromFile(length, at) => {
            let bytes = ram.noise.bytes(length);
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&bytes, 0).unwrap();
            let got = writer.read_from_at(file.as_fd(), at);
            if i64::try_from(at).is_err() {
                assert_eq!(got.unwrap_err().kind(), ErrorKind::InvalidInput);
            } else {
                let there = bytes.get(at as usize..).unwrap_or_default();
                let got = got.unwrap();
                assert_eq!(got, there.len().min(in_one_call));
                ram.put(&flat.take(got), there);
            }
        }
        Write::FromSocket(length) => {
            let bytes = ram.noise.bytes(length);
            let (mut ours, theirs) = streams();
            ours.write_all(&bytes).unwrap();
            match writer.receive_from(theirs.as_fd()) {
                Ok(got) => {
                    assert_eq!(got, length.min(in_one_call));
                    ram.put(&flat.take(got), &bytes);
                }
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::WouldBlock);
                    assert!(length == 0 || in_one_call == 0);
                }
            }
        }
        Write::Append(_) => unreachable!("done above"),
    }
}

/// Which of those there are, and what is done to it.
fn steps<T: std::fmt::Debug>(
    step: impl Strategy<Value = T>,
) -> impl Strategy<Value = Vec<(prop::sample::Index, T)>> {
    vec((any::<prop::sample::Index>(), step), 0..30)
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn a_chain_is_read_as_if_its_bytes_lay_side_by_side(chain in chain(), steps in steps(read())) {
        let ram = Ram::new();
        let mut reader = Reader::new();
        let flat = push(&ram.memory, &chain, |slice| reader.push(slice));
        let mut readers = vec![(reader, flat)];
        for (which, step) in steps {
            let (reader, flat) = which.get_mut(&mut readers);
            let taken = do_read(&step, reader, flat, &ram);
            readers.extend(taken);
            for (reader, flat) in &readers {
                assert_eq!((reader.len(), reader.is_empty()), (flat.0.len(), flat.0.is_empty()));
            }
        }
        for (mut reader, mut flat) in readers {
            do_read(&Read::Bytes(usize::MAX), &mut reader, &mut flat, &ram);
        }
        assert!(ram.is_as_it_must(), "what is only read has changed");
    }

    #[test]
    fn a_chain_is_written_as_if_its_bytes_lay_side_by_side_and_nothing_beside_them(
        chain in chain(),
        steps in steps(write()),
    ) {
        let mut ram = Ram::new();
        let memory = ram.memory.clone();
        let mut writer = Writer::new();
        let flat = push(&memory, &chain, |slice| writer.push(slice));
        let mut writers = vec![(writer, flat)];
        for (which, step) in steps {
            let which = which.index(writers.len());
            do_write(&step, &mut writers, which, &mut ram);
            for (writer, flat) in &writers {
                assert_eq!((writer.len(), writer.is_empty()), (flat.0.len(), flat.0.is_empty()));
                let places = flat.pieces().into_iter().map(|piece| {
                    let gpa = GuestAddress(piece[0].gpa as u64);
                    (memory.get_host_address(gpa).unwrap().addr(), piece.len())
                });
                assert!(writer.ranges().eq(places), "its ranges are others");
            }
        }
        assert!(ram.is_as_it_must(), "other bytes are there");
    }
}
