//! Byte streams between the host and the agent: vsock in a VM, a Unix socket in a test.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr,
    VsockAddr, bind, connect, getpeername, getsockopt, listen, shutdown, socket, sockopt,
};
use sepal_protocol::ports;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::sys;

const FLAGS: SockFlag = SockFlag::SOCK_CLOEXEC.union(SockFlag::SOCK_NONBLOCK);
/// Connections that wait for being accepted: 50 execs at once bring 150 streams.
const BACKLOG: i32 = 256;

/// A listening socket that accepts the host and nobody else.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
}

impl Listener {
    /// Listens on a vsock port.
    ///
    /// # Errors
    /// Those of socket(2), bind(2), listen(2).
    pub fn vsock(port: u32) -> io::Result<Self> {
        Self::bind(
            AddressFamily::Vsock,
            &VsockAddr::new(libc::VMADDR_CID_ANY, port),
        )
    }

    /// Listens on a Unix socket.
    ///
    /// # Errors
    /// Those of socket(2), bind(2), listen(2).
    pub fn unix(path: &Path) -> io::Result<Self> {
        Self::bind(AddressFamily::Unix, &UnixAddr::new(path)?)
    }

    fn bind(family: AddressFamily, address: &dyn SockaddrLike) -> io::Result<Self> {
        let fd = socket(family, SockType::Stream, FLAGS, None)?;
        bind(fd.as_raw_fd(), address)?;
        listen(&fd, Backlog::new(BACKLOG)?)?;
        Ok(Self {
            socket: sys::watch(fd, Interest::READABLE)?,
        })
    }

    /// The next connection of the host.
    ///
    /// A process in a container can dial the guest's own vsock ports where the kernel has a
    /// loopback transport: such connections are closed, the agent's service is the host's alone.
    ///
    /// # Errors
    /// Those of accept(2) that concern the listening socket itself.
    pub async fn accept(&self) -> io::Result<Stream> {
        loop {
            let mut guard = self.socket.readable().await?;
            let fd = match guard.try_io(|socket| sys::accept(socket.as_fd())) {
                Err(_would_block) => continue,
                Ok(Ok(fd)) => fd,
                Ok(Err(error)) => match error.raw_os_error() {
                    Some(libc::ECONNABORTED | libc::EINTR) => continue,
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                        continue;
                    }
                    _ => return Err(error),
                },
            };
            if is_host(fd.as_fd()) {
                return Stream::new(fd);
            }
            tracing::warn!("closed a connection to the agent that did not come from the host");
        }
    }
}

fn is_host(fd: BorrowedFd<'_>) -> bool {
    match getpeername::<SockaddrStorage>(fd.as_raw_fd()) {
        Ok(peer) => match peer.as_vsock_addr() {
            Some(peer) => u64::from(peer.cid()) == ports::HOST_CID,
            None => peer.family() == Some(AddressFamily::Unix),
        },
        Err(_) => false,
    }
}

/// A connected stream socket.
#[derive(Debug)]
pub struct Stream {
    fd: AsyncFd<OwnedFd>,
}

impl Stream {
    /// Takes a non-blocking, connected socket.
    ///
    /// # Errors
    /// When the descriptor cannot be watched by epoll(7).
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            fd: sys::watch(fd, Interest::READABLE | Interest::WRITABLE)?,
        })
    }

    /// Dials a port of the host.
    ///
    /// # Errors
    /// Those of socket(2) and connect(2).
    pub async fn dial_host(port: u32) -> io::Result<Self> {
        let fd = socket(AddressFamily::Vsock, SockType::Stream, FLAGS, None)?;
        let cid = u32::try_from(ports::HOST_CID).unwrap_or(libc::VMADDR_CID_HOST);
        match connect(fd.as_raw_fd(), &VsockAddr::new(cid, port)) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let stream = Self::new(fd)?;
        stream.fd.writable().await?.retain_ready();
        match getsockopt(&stream.fd, sockopt::SocketError)? {
            0 => Ok(stream),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// The watched descriptor.
    #[must_use]
    pub fn fd(&self) -> &AsyncFd<OwnedFd> {
        &self.fd
    }

    /// Tells the peer that no more bytes follow; what has been written is still delivered.
    pub fn finish(&self) {
        // The peer may be gone already: then there is nobody to tell.
        let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Write);
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            match guard.try_io(|fd| Ok(nix::unistd::read(fd, unfilled)?)) {
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(context))?;
            match guard.try_io(|fd| Ok(nix::unistd::write(fd, bytes)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}
