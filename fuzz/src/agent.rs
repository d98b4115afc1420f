//! What a guest's agent answers, on the shim's side: a guest that is broken into answers anything.

use std::path::Path;
use std::time::Duration;

use protobuf::Message;
use sepal_protocol::agent::{
    ContainerId, Empty, Event, GuestInfoResponse, ProcessCreated, ProcessExit, ProcessId, Stats,
};
use sepal_shim::agent::{Agent, ready};
use sepal_shim::stats;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::input::Input;

/// No run comes near it: the guest's side always hangs up.
const PATIENCE: Duration = Duration::from_secs(20);

/// Answers, frames and first words.
pub fn agent(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.below(4);
    if how < 2 {
        messages(&input.rest());
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let directory = tempfile::tempdir().expect("there is a place for sockets");
    let path = directory.path().join("v");
    runtime.expect("descriptors are left").block_on(async move {
        let listener = UnixListener::bind(&path).expect("nobody else is there");
        if how == 2 {
            announcement(&listener, &path, input.rest()).await;
        } else {
            calls(listener, &path, input).await;
        }
    });
}

/// The messages alone, and what becomes of them.
fn messages(bytes: &[u8]) {
    if let Ok(used) = Stats::parse_from_bytes(bytes) {
        let any = stats::to_any(stats::metrics(&used));
        assert!(any.is_ok_and(|any| !any.type_url.is_empty()));
    }
    let _ = Event::parse_from_bytes(bytes);
    let _ = GuestInfoResponse::parse_from_bytes(bytes);
    let _ = ProcessCreated::parse_from_bytes(bytes);
    let _ = ProcessExit::parse_from_bytes(bytes);
}

async fn announcement(listener: &UnixListener, path: &Path, words: Vec<u8>) {
    let mut stream = UnixStream::connect(path).await.expect("somebody listens");
    // The shim stops reading at its limit.
    let say = async move {
        let _ = stream.write_all(&words).await;
    };
    let (heard, ()) = tokio::join!(ready(listener, PATIENCE), say);
    let _ = heard.map(|ready| ready.stages.len());
}

/// A whole connection: the VMM's answer, then frames of ttrpc.
async fn calls(listener: UnixListener, path: &Path, mut input: Input) {
    let guest = async move {
        let Ok((mut stream, _)) = listener.accept().await else {
            return;
        };
        let mut line = [0; 13];
        let _ = stream.read_exact(&mut line).await;
        if input.byte() >= 240 {
            // Another answer than the VMM's, and nothing more.
            let _ = stream.write_all(&input.some()).await;
            return;
        }
        let _ = stream.write_all(b"OK 1\n").await;
        // The calls first: an answer before its call is nobody's.
        let _ = stream.read(&mut [0; 4096]).await;
        for _ in 0..16 {
            if input.is_empty() {
                break;
            }
            let frame = frame(&mut input);
            if stream.write_all(&frame).await.is_err() {
                break;
            }
        }
    };
    let shim = async {
        let agent = Agent::connect(path, PATIENCE).await.ok()?;
        let (nothing, container, process) = (Empty::new(), ContainerId::new(), ProcessId::new());
        let (used, info, event, exit) = tokio::join!(
            agent.container_stats(&container),
            agent.guest_info(&nothing),
            agent.next_event(&nothing),
            agent.wait_process(&process),
        );
        for error in [info.err(), event.err(), exit.err()].into_iter().flatten() {
            let _ = (error.code(), error.to_string());
        }
        used.ok().map(|used| stats::metrics(&used))
    };
    let ((), _) = tokio::join!(guest, shim);
}

/// A frame: mostly an answer to one of the first calls (its payload in a `ttrpc.Response`).
fn frame(input: &mut Input) -> Vec<u8> {
    let how = input.byte();
    let payload = match how & 3 {
        0 => {
            // Field 2 of ttrpc.Response, the answer's own bytes.
            let answer = input.some();
            let mut response = vec![0x12];
            let mut length = answer.len();
            while length >= 0x80 {
                response.push(length as u8 | 0x80);
                length >>= 7;
            }
            response.push(length as u8);
            response.extend(answer);
            response
        }
        _ => input.some(),
    };
    if how & 3 == 3 {
        return payload;
    }
    let length = match how >> 2 & 7 {
        0 => input.u32(),
        _ => payload.len() as u32,
    };
    let (stream, kind) = match how >> 5 {
        0 => (input.u32(), input.byte()),
        n => (u32::from(n) * 2 - 1, 2),
    };
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(stream.to_be_bytes());
    frame.extend([kind, 0]);
    frame.extend(payload);
    frame
}
