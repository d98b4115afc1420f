//! vsock addresses of a pod's VM.
//!
//! The VMM maps vsock to Unix sockets: the host connects to a listening port in the guest through
//! `<pod>/vm/vsock` by writing `CONNECT <port>\n` and reading `OK <port>\n`; what the guest dials
//! on the host, port P, is connected to `<pod>/vm/vsock_P`.

/// The guest's context id. One VM per VMM and no shared table: all guests have the same.
pub const GUEST_CID: u64 = 3;
/// VMADDR_CID_HOST of vsock(7).
pub const HOST_CID: u64 = 2;

/// The agent's ttrpc service, in the guest.
pub const AGENT: u32 = 1024;
/// Where the agent announces itself ([`crate::ready::AgentReady`]), on the host.
pub const READY: u32 = 1025;
/// Standard streams of processes, in the guest. A connection begins with [`STDIO_TOKEN_LEN`] bytes.
pub const STDIO: u32 = 1026;

/// Connections to the guest's loopback, in the guest. A connection begins with [`FORWARD_REQUEST_LEN`]
/// bytes: the family that was dialled (4 or 6) and the port, most significant byte first. The agent
/// answers with one byte, 0 or the errno of connect(2), and copies from there on.
pub const FORWARD: u32 = 1027;

/// Bytes that begin a connection to [`FORWARD`].
pub const FORWARD_REQUEST_LEN: usize = 3;

/// Bytes of the random token that begins a stdio stream and pairs it with a process.
pub const STDIO_TOKEN_LEN: usize = 16;
