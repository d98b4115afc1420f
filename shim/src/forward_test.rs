use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;

use nix::sched::{CloneFlags, unshare};

use super::*;

/// A new network namespace whose loopback is up.
fn netns() -> OwnedFd {
    std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let up = std::process::Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        assert!(up.unwrap().success());
        std::fs::File::open("/proc/thread-self/ns/net")
            .unwrap()
            .into()
    })
    .join()
    .unwrap()
}

/// The guest's side of the VMM's socket: answers every request with `status`, then echoes once.
fn guest(socket: std::path::PathBuf, status: u8) -> std::sync::mpsc::Receiver<[u8; 3]> {
    let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
    let (told, requests) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut line = [0; "CONNECT 1027\n".len()];
            // The agent's service is dialled first.
            stream.read_exact(&mut line).unwrap();
            let port = std::str::from_utf8(&line[8..12]).unwrap().to_owned();
            stream.write_all(format!("OK {port}\n").as_bytes()).unwrap();
            let told = told.clone();
            std::thread::spawn(move || {
                let mut request = [0; 3];
                if port != "1027" || stream.read_exact(&mut request).is_err() {
                    return std::thread::sleep(std::time::Duration::from_secs(60));
                }
                let _ = told.send(request);
                stream.write_all(&[status]).unwrap();
                let mut bytes = Vec::new();
                // To the end of what the client sends: half-close arrives.
                if status == 0 && stream.read_to_end(&mut bytes).is_ok() {
                    let _ = stream.write_all(&bytes);
                }
            });
        }
    });
    requests
}

async fn start(
    status: u8,
) -> (
    OwnedFd,
    Forward,
    std::sync::mpsc::Receiver<[u8; 3]>,
    tempfile::TempDir,
) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("vsock.sock");
    let requests = guest(socket.clone(), status);
    let agent = Agent::connect(&socket, std::time::Duration::from_secs(5));
    let netns = netns();
    let forward = Forward::start(netns.as_fd(), agent.await.unwrap()).unwrap();
    (netns, forward, requests, folder)
}

/// Sends through the namespace's loopback and reads to the end.
async fn talk(netns: &OwnedFd, address: &'static str, text: &'static [u8]) -> io::Result<Vec<u8>> {
    let netns = netns.try_clone().unwrap();
    let work = move || {
        let dial = || -> io::Result<Vec<u8>> {
            let mut stream = TcpStream::connect(address)?;
            stream.write_all(text)?;
            // Where it has been broken by now, reading tells how.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer)
        };
        sys::in_netns(netns.as_fd(), dial)?
    };
    tokio::task::spawn_blocking(work).await.unwrap()
}

#[tokio::test]
async fn every_loopback_port_of_both_families_leads_to_the_guest() {
    if !sys::is_root() {
        return;
    }
    let (netns, _forward, requests, _folder) = start(0).await;
    for (address, request) in [
        ("127.0.0.1:80", [4, 0, 80]),
        ("[::1]:65535", [6, 255, 255]),
        ("127.1.2.3:8080", [4, 31, 144]),
    ] {
        assert_eq!(talk(&netns, address, b"hello").await.unwrap(), b"hello");
        assert_eq!(requests.recv().unwrap(), request, "{address}");
    }
}

#[tokio::test]
async fn a_port_that_nobody_serves_breaks_the_connection() {
    if !sys::is_root() {
        return;
    }
    let refused = u8::try_from(libc::ECONNREFUSED).unwrap();
    let (netns, _forward, requests, _folder) = start(refused).await;
    let broken = talk(&netns, "127.0.0.1:80", b"").await.unwrap_err();
    assert_eq!(broken.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(requests.recv().unwrap(), [4, 0, 80]);
}

#[tokio::test]
async fn the_namespace_is_as_before_when_the_pod_has_gone() {
    if !sys::is_root() {
        return;
    }
    let (netns, forward, _requests, _folder) = start(0).await;
    drop(forward);
    // The task drops its socket when it is polled next, and breaks what has come to it by then.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    loop {
        let refused = talk(&netns, "127.0.0.1:80", b"").await.unwrap_err();
        match refused.kind() {
            io::ErrorKind::ConnectionReset if std::time::Instant::now() < deadline => {
                tokio::task::yield_now().await;
            }
            kind => {
                assert_eq!(kind, io::ErrorKind::ConnectionRefused);
                break;
            }
        }
    }
}
