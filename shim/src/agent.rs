//! The guest's agent, from the host's side. The guest is hostile: every answer is bounded in size
//! (ttrpc: 4 MiB) and in time, and nothing in it is trusted.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sepal_protocol::agent::{
    Clock, ContainerId, CreateContainerRequest, Empty, Event, ExecProcessRequest,
    GuestInfoResponse, HugePages, Network, ProcessCreated, ProcessExit, ProcessId,
    ResizeGuestRequest, ResizeTerminalRequest, SetUpPodRequest, SignalProcessRequest, Stats,
    UpdateContainerRequest, WriteVolumeRequest,
};
use sepal_protocol::agent_ttrpc::AgentClient;
use sepal_protocol::ready::{AgentReady, MAX_LINE};
use sepal_protocol::{paths, ports, words};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{self, Context};

/// Longest wait for a call that only looks or sets something.
const SHORT: Duration = Duration::from_secs(10);
/// Longest wait for a call that makes or removes something, as disks may be slow; more where the
/// administrator gives a guest more to boot, as hosts may be slow.
const LONG: Duration = Duration::from_secs(60);
/// Longest wait for a connection into the guest.
const CONNECT: Duration = Duration::from_secs(10);

/// Why the agent did not do something.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("the guest's agent was not ready within {seconds} s")]
    NotReady { seconds: u64 },
    #[error("the guest's agent: {what}: {source}")]
    Connect {
        what: &'static str,
        source: std::io::Error,
    },
    #[error("the guest's agent announced itself with what is no announcement: {0}")]
    Announcement(serde_json::Error),
    #[error("the guest refused the connection to port {port}")]
    Refused { port: u32 },
    /// What the agent answers is told, on one line: it names the cause.
    #[error("{}", message(.source))]
    Call {
        call: &'static str,
        source: ttrpc::Error,
    },
}

fn message(source: &ttrpc::Error) -> String {
    match source {
        ttrpc::Error::RpcStatus(status) => words::one_line(status.message()),
        other => format!("the guest's agent: {}", words::one_line(&other.to_string())),
    }
}

impl Error {
    /// The agent's own code, if it has answered.
    pub fn code(&self) -> Option<ttrpc::Code> {
        match self {
            Self::Call {
                source: ttrpc::Error::RpcStatus(status),
                ..
            } => Some(status.code()),
            _ => None,
        }
    }
}

/// Waits for the agent's first words.
///
/// # Errors
/// They do not come in time, or are none.
pub async fn ready(listener: &UnixListener, limit: Duration) -> Result<AgentReady, Error> {
    let failed = |what| move |source| Error::Connect { what, source };
    let hear = async {
        let (stream, _) = listener.accept().await.map_err(failed("no announcement"))?;
        let mut line = Vec::new();
        let most = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
        // Up to the line's end: waiting for the connection's would cost the guest a round trip.
        tokio::io::BufReader::new(stream.take(most))
            .read_until(b'\n', &mut line)
            .await
            .map_err(failed("cannot read the announcement"))?;
        serde_json::from_slice(&line).map_err(Error::Announcement)
    };
    tokio::time::timeout(limit, hear)
        .await
        .map_err(|_| Error::NotReady {
            seconds: limit.as_secs(),
        })?
}

/// Where guest-dialled `port` arrives.
pub fn host_socket(pod: &Path, port: u32) -> PathBuf {
    pod.join(format!("{}_{port}", paths::pod::VSOCK))
}

/// Connects to a port in the guest through the VMM's socket.
///
/// # Errors
/// The VMM is gone, or nothing listens there.
pub async fn dial(vsock: &Path, port: u32) -> Result<UnixStream, Error> {
    let failed = |source| Error::Connect {
        what: "cannot connect",
        source,
    };
    let connect = async {
        let mut stream = UnixStream::connect(vsock).await.map_err(failed)?;
        stream
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .await
            .map_err(failed)?;
        // Byte by byte: what follows the line belongs to whoever uses the connection.
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            let byte = stream.read_u8().await.map_err(|source| {
                // The VMM closes a connection that the guest has refused.
                if source.kind() == std::io::ErrorKind::UnexpectedEof {
                    Error::Refused { port }
                } else {
                    failed(source)
                }
            })?;
            answer.push(byte);
            if answer.len() > 32 {
                return Err(Error::Refused { port });
            }
        }
        if answer.starts_with(b"OK ") {
            Ok(stream)
        } else {
            Err(Error::Refused { port })
        }
    };
    tokio::time::timeout(CONNECT, connect)
        .await
        .map_err(|_| failed(std::io::ErrorKind::TimedOut.into()))?
}

/// The agent of one pod.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    vsock: PathBuf,
    /// How long a guest may take to boot here.
    patience: Duration,
}

/// How long a call may take.
#[derive(Clone, Copy)]
enum Limit {
    Short,
    Long,
    None,
}

impl Limit {
    fn context(self, patience: Duration) -> Context {
        let limit = match self {
            Self::Short => SHORT,
            Self::Long => LONG.max(patience),
            Self::None => return Context::default(),
        };
        context::with_timeout(i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX))
    }
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($request:ty) -> $answer:ty, $limit:expr;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Errors
            /// What the agent answers, or that it does not.
            pub async fn $name(&self, request: &$request) -> Result<$answer, Error> {
                self.client
                    .$name($limit.context(self.patience), request)
                    .await
                    .map_err(|source| Error::Call { call: stringify!($name), source })
            }
        )*
    };
}

impl Agent {
    /// Connects to the agent's service, in a guest that had `patience` to boot.
    ///
    /// # Errors
    /// As [`dial`].
    pub async fn connect(vsock: &Path, patience: Duration) -> Result<Self, Error> {
        let stream = dial(vsock, ports::AGENT).await?;
        let client = AgentClient::new(Client::new(Socket::new(stream)));
        Ok(Self {
            client,
            vsock: vsock.into(),
            patience,
        })
    }

    /// How long the guest may take to boot.
    pub const fn patience(&self) -> Duration {
        self.patience
    }

    /// Opens a stream for a process's standard input or output; answers with its token.
    ///
    /// # Errors
    /// As [`dial`].
    pub async fn stdio(&self) -> Result<(UnixStream, Vec<u8>), Error> {
        let failed = |source| Error::Connect {
            what: "cannot open a stream",
            source,
        };
        let mut token = [0_u8; ports::STDIO_TOKEN_LEN];
        std::fs::File::open("/dev/urandom")
            .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut token))
            .map_err(failed)?;
        let mut stream = dial(&self.vsock, ports::STDIO).await?;
        stream.write_all(&token).await.map_err(failed)?;
        Ok((stream, token.to_vec()))
    }

    /// Opens a connection to a port of the guest's loopback, as [`ports::FORWARD`] says.
    ///
    /// # Errors
    /// As [`dial`]; [`Error::Refused`] when nothing listens on the port.
    pub async fn forward(
        &self,
        request: [u8; ports::FORWARD_REQUEST_LEN],
    ) -> Result<UnixStream, Error> {
        let failed = |source| Error::Connect {
            what: "cannot reach its loopback",
            source,
        };
        let mut stream = dial(&self.vsock, ports::FORWARD).await?;
        let ask = async {
            stream.write_all(&request).await?;
            stream.read_u8().await
        };
        let answer = tokio::time::timeout(CONNECT, ask).await;
        match answer.map_err(|_| failed(std::io::ErrorKind::TimedOut.into()))? {
            Ok(0) => Ok(stream),
            Ok(_) => {
                let [_, high, low] = request;
                let port = u16::from_be_bytes([high, low]).into();
                Err(Error::Refused { port })
            }
            Err(e) => Err(failed(e)),
        }
    }

    calls! {
        /// Network, names and clock of the pod.
        set_up_pod(SetUpPodRequest) -> Empty, Limit::Long;
        /// Brings the guest's network to what is given.
        update_network(Network) -> Empty, Limit::Long;
        /// Tells the host's time.
        set_clock(Clock) -> Empty, Limit::Short;
        /// Lets go of files that nobody uses.
        forget_files(Empty) -> Empty, Limit::Short;
        /// Writes a part of the guest's copy of a volume.
        write_volume(WriteVolumeRequest) -> Empty, Limit::Long;
        /// Makes a container; its process does not run yet.
        create_container(CreateContainerRequest) -> ProcessCreated, Limit::Long;
        /// Makes a further process of a container.
        exec_process(ExecProcessRequest) -> ProcessCreated, Limit::Long;
        /// Lets a process run.
        start_process(ProcessId) -> ProcessCreated, Limit::Long;
        /// Answers when the process has ended, however long that takes.
        wait_process(ProcessId) -> ProcessExit, Limit::None;
        /// Sends a signal.
        signal_process(SignalProcessRequest) -> Empty, Limit::Short;
        /// Sets a terminal's size.
        resize_terminal(ResizeTerminalRequest) -> Empty, Limit::Short;
        /// Removes an ended process.
        delete_process(ProcessId) -> ProcessExit, Limit::Long;
        /// Freezes a container.
        pause_container(ContainerId) -> Empty, Limit::Short;
        /// Thaws a container.
        resume_container(ContainerId) -> Empty, Limit::Short;
        /// Sets a container's limits.
        update_container(UpdateContainerRequest) -> Empty, Limit::Long;
        /// Brings CPUs online or offline; answers with what the guest has then.
        resize_guest(ResizeGuestRequest) -> GuestInfoResponse, Limit::Long;
        keep_huge_pages(HugePages) -> HugePages, Limit::Long;
        /// What the guest has.
        guest_info(Empty) -> GuestInfoResponse, Limit::Short;
        /// What a container uses.
        container_stats(ContainerId) -> Stats, Limit::Short;
        /// Answers with the next event, however long that takes.
        next_event(Empty) -> Event, Limit::None;
        /// Writes back what is dirty and powers off.
        shutdown(Empty) -> Empty, Limit::Short;
    }
}

#[cfg(test)]
#[path = "agent_test.rs"]
mod tests;
