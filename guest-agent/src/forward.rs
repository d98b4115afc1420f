//! Port-forward: connections of the host to the pod's loopback, which is the guest's own.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use sepal_protocol::ports::{self, FORWARD_REQUEST_LEN};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::stream::{Listener, Stream};

/// Connections at a time; the shim has as many.
const MAX_CONNECTIONS: usize = 256;
/// Bytes held in each direction of a connection.
const BUFFER: usize = 32 << 10;
/// How long a connection may take to say where it wants to go, and to get there.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Serves until the listening socket fails.
pub async fn serve() {
    let listener = match Listener::vsock(ports::FORWARD) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(%error, "cannot listen for port-forwards");
            return;
        }
    };
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // The semaphore is never closed.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        match listener.accept().await {
            Ok(stream) => {
                tokio::spawn(async move {
                    if let Err(error) = forward(stream).await {
                        tracing::debug!(%error, "port-forward");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept port-forwards any more");
                return;
            }
        }
    }
}

async fn forward(mut host: Stream) -> io::Result<()> {
    let mut request = [0; FORWARD_REQUEST_LEN];
    tokio::time::timeout(TIMEOUT, host.read_exact(&mut request)).await??;
    let reached = tokio::time::timeout(TIMEOUT, reach(request)).await;
    let mut target = match reached.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(target) => target,
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            let answer = u8::try_from(errno).unwrap_or(u8::MAX);
            return host.write_all(&[answer]).await;
        }
    };
    host.write_all(&[0]).await?;
    copy_bidirectional_with_sizes(&mut host, &mut target, BUFFER, BUFFER).await?;
    Ok(())
}

/// Dials the family that the host dialled, then the other: the host's client would have gone on to
/// that after a refusal, which it cannot see, as somebody listens there in any case.
async fn reach([family, high, low]: [u8; FORWARD_REQUEST_LEN]) -> io::Result<TcpStream> {
    let port = u16::from_be_bytes([high, low]);
    let (four, six) = (
        IpAddr::from(Ipv4Addr::LOCALHOST),
        IpAddr::from(Ipv6Addr::LOCALHOST),
    );
    let (first, second) = if family == 6 {
        (six, four)
    } else {
        (four, six)
    };
    match TcpStream::connect((first, port)).await {
        Ok(stream) => Ok(stream),
        Err(error) => TcpStream::connect((second, port)).await.map_err(|_| error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_server_of_the_other_family_is_reached() {
        for (dialled, listens) in [(4, "[::1]:0"), (6, "127.0.0.1:0"), (4, "127.0.0.1:0")] {
            let Ok(listener) = tokio::net::TcpListener::bind(listens).await else {
                eprintln!("skipped: no {listens} here");
                continue;
            };
            let address = listener.local_addr().unwrap();
            let [high, low] = address.port().to_be_bytes();
            let stream = reach([dialled, high, low]).await.unwrap();
            assert_eq!(stream.peer_addr().unwrap(), address);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_port_without_a_server_refuses() {
        let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let [high, low] = unused.local_addr().unwrap().port().to_be_bytes();
        drop(unused);
        let error = reach([4, high, low]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
