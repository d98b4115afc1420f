//! Port-forward: what dials localhost in the pod's network namespace on the host reaches the guest's.
//!
//! containerd serves `kubectl port-forward` by connecting to localhost inside the namespace, where a
//! VM's pod has no process that listens. One socket of ours listens there for all ports: a BPF program
//! at the namespace's socket lookup (Documentation/bpf/prog_sk_lookup.rst; Linux 5.9) gives it every
//! TCP connection to a loopback address, and the connection's own address tells the port that was
//! dialled. Nothing is configured in the namespace, and all of it goes with our descriptors. What
//! comes from the network does not come by: tc takes it to the tap before the host's IP sees it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use sepal_protocol::ports::FORWARD_REQUEST_LEN;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::agent::Agent;
use crate::sys;
use crate::sys::bpf::{self, Instruction};

/// Connections of one pod at a time; more wait in the listening socket.
const MAX_CONNECTIONS: usize = 256;
/// Bytes held in each direction of a connection.
const BUFFER: usize = 32 << 10;

/// A pod's loopback, open on the host as long as the value lives.
pub struct Forward {
    task: JoinHandle<()>,
    _link: OwnedFd,
}

impl Forward {
    /// Takes over the loopback of `netns`.
    ///
    /// # Errors
    /// The kernel is older than 5.9, or does not let us.
    pub fn start(netns: BorrowedFd<'_>, agent: Agent) -> io::Result<Self> {
        let listener = sys::in_netns(netns, listen)??;
        let map = bpf::socket_map()?;
        bpf::put_socket(&map, &listener)?;
        let program = bpf::load_socket_lookup(&steering(map.as_raw_fd()))?;
        // The link holds the program, and that the map.
        let link = bpf::attach_socket_lookup(&program, netns)?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        Ok(Self {
            task: tokio::spawn(accept(listener, agent)),
            _link: link,
        })
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A socket for both families, where the host knows IPv6.
fn listen() -> io::Result<std::net::TcpListener> {
    let any: [SocketAddr; 2] = [
        (Ipv6Addr::UNSPECIFIED, 0).into(),
        (Ipv4Addr::UNSPECIFIED, 0).into(),
    ];
    std::net::TcpListener::bind(&any[..])
}

async fn accept(listener: TcpListener, agent: Agent) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Never closed.
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let agent = agent.clone();
                tokio::spawn(async move {
                    serve(stream, &agent).await;
                    drop(place);
                });
            }
            Err(e) => {
                tracing::warn!("port-forward: cannot accept a connection: {e}");
                // Descriptors may be short; trying at once would only burn the processor.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(mut stream: TcpStream, agent: &Agent) {
    let Ok(dialled) = stream.local_addr() else {
        return;
    };
    let copied = match agent.forward(request(dialled)).await {
        Ok(mut guest) => {
            copy_bidirectional_with_sizes(&mut stream, &mut guest, BUFFER, BUFFER).await
        }
        Err(e) => Err(io::Error::other(e)),
    };
    if let Err(e) = copied {
        tracing::debug!(port = dialled.port(), "port-forward: {e}");
        // The client is told that this was no orderly end.
        let _ = stream.set_zero_linger();
    }
}

fn request(dialled: SocketAddr) -> [u8; FORWARD_REQUEST_LEN] {
    let [high, low] = dialled.port().to_be_bytes();
    let family = match dialled.ip().to_canonical() {
        IpAddr::V4(_) => 4,
        IpAddr::V6(_) => 6,
    };
    [family, high, low]
}

// Instruction set of the kernel (Documentation/bpf/standardization/instruction-set.rst), 64-bit class
// unless said otherwise.
const LOAD_WORD: u8 = 0x61;
const STORE_WORD: u8 = 0x62;
const LOAD_MAP: u8 = 0x18;
const MOVE: u8 = 0xb7;
const COPY: u8 = 0xbf;
const ADD: u8 = 0x07;
const AND: u8 = 0x57;
const OR_REGISTER: u8 = 0x4f;
const JUMP: u8 = 0x05;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_IF_NOT_EQUAL: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// The source "register" that makes a constant a map's descriptor.
const MAP_DESCRIPTOR: u8 = 1;

// enum bpf_func_id.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
/// Go on: with the assigned socket, or with the usual lookup. SK_PASS.
const PASS: i32 = 1;

// Offsets in struct bpf_sk_lookup.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];

// Registers: R0 is the answer, R1 comes in as the context, R10 is the end of the stack.
const ANSWER: u8 = 0;
const FIRST: u8 = 1;
const SECOND: u8 = 2;
const THIRD: u8 = 3;
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const STACK: u8 = 10;

/// The program: a TCP connection to 127.0.0.0/8 or ::1 goes to the socket in the map.
fn steering(map: i32) -> Vec<Instruction> {
    // Where jumps lead to.
    const IP6: i16 = 9;
    const STEER: i16 = 18;
    const DONE: i16 = 32;
    let op = |code, to: u8, from: u8, offset, immediate| Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    };
    // From instruction `at` to instruction `to`.
    let jump = |at: i16, code, register, to: i16, value| op(code, register, 0, to - at - 1, value);
    // Addresses are in network order in memory, and loaded as little-endian words.
    let (network_127, last_word_of_loopback) = (127, 1_i32.to_be());
    vec![
        op(COPY, CONTEXT, FIRST, 0, 0),
        op(LOAD_WORD, SECOND, CONTEXT, PROTOCOL, 0),
        jump(2, JUMP_IF_NOT_EQUAL, SECOND, DONE, libc::IPPROTO_TCP),
        op(LOAD_WORD, SECOND, CONTEXT, FAMILY, 0),
        jump(4, JUMP_IF_EQUAL, SECOND, IP6, libc::AF_INET6),
        op(LOAD_WORD, SECOND, CONTEXT, LOCAL_IP4, 0),
        op(AND, SECOND, 0, 0, 0xff),
        jump(7, JUMP_IF_EQUAL, SECOND, STEER, network_127),
        jump(8, JUMP, 0, DONE, 0),
        op(LOAD_WORD, SECOND, CONTEXT, LOCAL_IP6[0], 0),
        op(LOAD_WORD, THIRD, CONTEXT, LOCAL_IP6[1], 0),
        op(OR_REGISTER, SECOND, THIRD, 0, 0),
        op(LOAD_WORD, THIRD, CONTEXT, LOCAL_IP6[2], 0),
        op(OR_REGISTER, SECOND, THIRD, 0, 0),
        jump(14, JUMP_IF_NOT_EQUAL, SECOND, DONE, 0),
        op(LOAD_WORD, THIRD, CONTEXT, LOCAL_IP6[3], 0),
        jump(16, JUMP_IF_EQUAL, THIRD, STEER, last_word_of_loopback),
        jump(17, JUMP, 0, DONE, 0),
        op(STORE_WORD, STACK, 0, -4, 0),
        op(COPY, SECOND, STACK, 0, 0),
        op(ADD, SECOND, 0, 0, -4),
        op(LOAD_MAP, FIRST, MAP_DESCRIPTOR, 0, map),
        op(0, 0, 0, 0, 0),
        op(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        jump(24, JUMP_IF_EQUAL, ANSWER, DONE, 0),
        op(COPY, SOCKET, ANSWER, 0, 0),
        op(COPY, FIRST, CONTEXT, 0, 0),
        op(COPY, SECOND, SOCKET, 0, 0),
        op(MOVE, THIRD, 0, 0, 0),
        op(CALL, 0, 0, 0, SK_ASSIGN),
        op(COPY, FIRST, SOCKET, 0, 0),
        op(CALL, 0, 0, 0, SK_RELEASE),
        op(MOVE, ANSWER, 0, 0, PASS),
        op(EXIT, 0, 0, 0, 0),
    ]
}

#[cfg(test)]
#[path = "forward_test.rs"]
mod tests;
