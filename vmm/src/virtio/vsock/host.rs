//! The host's side: Unix sockets that stand for vsock ports.
//!
//! Who wants a port of the guest connects to the device's socket and writes `CONNECT <port>\n`; the
//! answer is `OK <port>\n` once the guest has accepted, or the end of the connection. Who wants to
//! be dialled by the guest on port P listens on the device's path with `_P` appended.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, socket,
};

/// A client must have said what it wants after this time.
pub const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Longest first line: `CONNECT 4294967295\n`.
const LINE_LIMIT: usize = 19;

/// Where the guest's port P is dialled to.
pub fn port_path(device: &Path, port: u32) -> PathBuf {
    let mut path = OsString::from(device);
    path.push(format!("_{port}"));
    PathBuf::from(path)
}

/// Connects to the listener of a host port, without waiting.
///
/// # Errors
/// No listener, or one whose backlog is full.
pub fn dial(device: &Path, port: u32) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(&port_path(device, port))?)?;
    Ok(UnixStream::from(fd))
}

/// A client that has not said yet which port it wants.
pub struct Client {
    /// Its connection.
    pub stream: UnixStream,
    /// When it is given up.
    pub deadline: Instant,
}

/// How far a client has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Handshake {
    /// Nothing or half a line so far.
    Waiting,
    /// It wants this port of the guest.
    Wants(u32),
    /// It says something else, or has gone.
    Refused,
}

impl Client {
    /// Reads the first line if it is there, and not one byte more: what follows it belongs to the
    /// guest.
    pub fn handshake(&self) -> Handshake {
        let mut line = [0; LINE_LIMIT];
        let fd = self.stream.as_raw_fd();
        let flags = MsgFlags::MSG_DONTWAIT;
        let seen = loop {
            match recv(fd, &mut line, flags | MsgFlags::MSG_PEEK) {
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return Handshake::Waiting,
                Ok(0) | Err(_) => return Handshake::Refused,
                Ok(count) => break count,
            }
        };
        let Some(end) = line[..seen].iter().position(|b| *b == b'\n') else {
            let full = seen == LINE_LIMIT;
            return if full {
                Handshake::Refused
            } else {
                Handshake::Waiting
            };
        };
        // They were there a moment ago and nobody else reads them.
        let taken = recv(fd, &mut line[..=end], flags);
        match (taken, parse(&line[..end])) {
            (Ok(count), Some(port)) if count == end + 1 => Handshake::Wants(port),
            _ => Handshake::Refused,
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn client() -> (UnixStream, Client) {
        let (theirs, stream) = UnixStream::pair().unwrap();
        (
            theirs,
            Client {
                stream,
                deadline: Instant::now(),
            },
        )
    }

    #[test]
    fn the_line_is_taken_and_nothing_behind_it() {
        let (mut theirs, mut client) = client();
        assert_eq!(client.handshake(), Handshake::Waiting);
        theirs.write_all(b"CONN").unwrap();
        assert_eq!(client.handshake(), Handshake::Waiting);
        theirs.write_all(b"ECT 1024\nearly").unwrap();
        assert_eq!(client.handshake(), Handshake::Wants(1024));
        let mut rest = [0; 5];
        client.stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"early");
    }

    #[test]
    fn other_lines_are_refused() {
        let lines: [&[u8]; 9] = [
            b"\n",
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 1 2\n",
            b"connect 1\n",
            b"GET / HTTP/1.1 and so on",
        ];
        for line in lines {
            let (mut theirs, client) = client();
            theirs.write_all(line).unwrap();
            assert_eq!(client.handshake(), Handshake::Refused, "{line:?}");
        }
        let (theirs, client) = client();
        drop(theirs);
        assert_eq!(client.handshake(), Handshake::Refused);
    }

    #[test]
    fn the_largest_port_is_a_port() {
        let (mut theirs, client) = client();
        theirs.write_all(b"CONNECT 4294967295\n").unwrap();
        assert_eq!(client.handshake(), Handshake::Wants(u32::MAX));
    }

    #[test]
    fn a_port_without_a_listener_cannot_be_dialled() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("vsock.sock");
        assert_eq!(
            dial(&device, 7).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        let listener = std::os::unix::net::UnixListener::bind(port_path(&device, 7)).unwrap();
        let mut ours = dial(&device, 7).unwrap();
        ours.write_all(b"x").unwrap();
        let mut byte = [0];
        listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }
}
