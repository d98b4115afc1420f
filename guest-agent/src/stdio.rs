//! Standard streams: vsock on the host's side, pipes or a terminal on the process's.
//!
//! The host opens one connection per stream and begins it with a random token; the request that
//! makes a process names the tokens ([`Rendezvous`] brings the two together, in either order). Bytes
//! then move by one task per stream, no faster than the slower side takes them.
//!
//! Nothing is lost at exit, and no exit waits for a stranger: after the process has ended, an output
//! counts as drained once its pipe has been seen empty, for all that the process itself had written
//! is handed over by then. The stream itself lives on until the pipe reaches its end, so that a
//! background child that holds it can go on writing.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use sepal_protocol::agent;
use sepal_protocol::ports::STDIO_TOKEN_LEN;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::sync::{oneshot, watch};

use crate::error::{Context, Error, Result};
use crate::stream::{Listener, Stream};
use crate::sys;

/// Streams that have said their token and wait for their process. 50 execs bring 150.
const MAX_WAITING: usize = 512;
/// How long a connection may take to say its token.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a stream waits for its process, or a process for its streams.
const PAIR_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes moved by one pair of system calls: what a pipe holds.
const CHUNK: usize = 64 * 1024;
/// How long the answer about an exit waits for a reader that takes nothing at all.
const STALL: Duration = Duration::from_secs(2);

type Token = [u8; STDIO_TOKEN_LEN];

/// Where streams wait for their processes and processes for their streams.
#[derive(Debug, Default)]
pub struct Rendezvous {
    waiting: Mutex<HashMap<Token, Waiting>>,
}

#[derive(Debug)]
enum Waiting {
    Stream(Stream),
    Process(oneshot::Sender<Stream>),
}

impl Rendezvous {
    /// Accepts streams until the listener fails.
    ///
    /// # Errors
    /// Those of the listener.
    pub async fn run(self: Arc<Self>, listener: Listener) -> io::Result<()> {
        loop {
            let mut stream = listener.accept().await?;
            let meeting = Arc::clone(&self);
            tokio::spawn(async move {
                let mut token = Token::default();
                match tokio::time::timeout(TOKEN_TIMEOUT, stream.read_exact(&mut token)).await {
                    Ok(Ok(_)) => meeting.arrive(token, stream).await,
                    Ok(Err(error)) => tracing::debug!(%error, "a stream ended before its token"),
                    Err(_) => tracing::warn!("a stream did not say its token in time"),
                }
            });
        }
    }

    async fn arrive(&self, token: Token, stream: Stream) {
        {
            let mut waiting = self.lock();
            match waiting.remove(&token) {
                Some(Waiting::Process(process)) => {
                    // The request may have timed out: the stream closes then.
                    let _ = process.send(stream);
                    return;
                }
                Some(Waiting::Stream(_)) => {
                    tracing::warn!("two streams with one token, both are closed");
                    return;
                }
                None if waiting.len() >= MAX_WAITING => {
                    tracing::warn!("too many streams wait for their process");
                    return;
                }
                None => {
                    waiting.insert(token, Waiting::Stream(stream));
                }
            }
        }
        tokio::time::sleep(PAIR_TIMEOUT).await;
        if self.lock().remove(&token).is_some() {
            tracing::warn!("nobody asked for a stream");
        }
    }

    /// The stream of a token; `None` for an empty token.
    async fn take(&self, token: &[u8]) -> Result<Option<Stream>> {
        if token.is_empty() {
            return Ok(None);
        }
        let token = Token::try_from(token).map_err(|_| {
            Error::Invalid(format!(
                "a stdio token has {} bytes, not {STDIO_TOKEN_LEN}",
                token.len()
            ))
        })?;
        let arrival = {
            let mut waiting = self.lock();
            match waiting.remove(&token) {
                Some(Waiting::Stream(stream)) => return Ok(Some(stream)),
                Some(Waiting::Process(_)) => {
                    return Err(Error::Invalid("a stdio token is used twice".into()));
                }
                None => {
                    let (send, receive) = oneshot::channel();
                    waiting.insert(token, Waiting::Process(send));
                    receive
                }
            }
        };
        match tokio::time::timeout(PAIR_TIMEOUT, arrival).await {
            Ok(Ok(stream)) => Ok(Some(stream)),
            _ => {
                self.lock().remove(&token);
                Err(Error::Timeout(
                    "a stdio stream of the process did not arrive".into(),
                ))
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Token, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host's ends of a process's streams.
#[derive(Debug, Default)]
pub struct Streams {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// Rows and columns that the terminal begins with.
    pub size: Option<(u16, u16)>,
}

impl Streams {
    /// Waits for the streams that a request names.
    ///
    /// # Errors
    /// A malformed token, or a stream that does not come within 30 s.
    pub async fn take(meeting: &Rendezvous, stdio: &agent::Stdio) -> Result<Self> {
        let (stdin, stdout, stderr) = tokio::try_join!(
            meeting.take(&stdio.stdin),
            meeting.take(&stdio.stdout),
            meeting.take(&stdio.stderr)
        )?;
        let size = window(stdio.rows, stdio.columns);
        Ok(Self {
            stdin,
            stdout,
            stderr,
            terminal: stdio.terminal,
            size,
        })
    }

    /// Makes what the process gets in their place.
    ///
    /// # Errors
    /// Those of pipe2(2) and socketpair(2).
    pub fn connect(self) -> Result<(ProcessEnds, AgentEnds)> {
        let mut process = ProcessEnds::default();
        let mut agent = AgentEnds {
            size: self.size,
            ..Default::default()
        };
        let io = || "cannot make the process's standard streams".to_owned();
        if self.terminal {
            use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
            let (theirs, ours) = socketpair(
                AddressFamily::Unix,
                SockType::SeqPacket,
                None,
                SockFlag::SOCK_CLOEXEC,
            )
            .context(io)?;
            process.console = Some(theirs);
            agent.console = Some(Console {
                socket: ours,
                stdin: self.stdin,
                stdout: self.stdout,
            });
            return Ok((process, agent));
        }
        if let Some(stream) = self.stdin {
            let (read, write) = pipe2(OFlag::O_CLOEXEC).context(io)?;
            process.stdin = Some(read);
            agent.stdin = Some((stream, watched(write, Interest::WRITABLE).context(io)?));
        }
        for (stream, end, output) in [
            (self.stdout, &mut process.stdout, STDOUT),
            (self.stderr, &mut process.stderr, STDERR),
        ] {
            if let Some(stream) = stream {
                let (read, write) = pipe2(OFlag::O_CLOEXEC).context(io)?;
                *end = Some(write);
                let pipe = watched(read, Interest::READABLE).context(io)?;
                agent.outputs.push((output, pipe, stream));
            }
        }
        Ok((process, agent))
    }
}

/// Rows and columns as a terminal takes them; `None` to leave them.
#[must_use]
pub fn window(rows: u32, columns: u32) -> Option<(u16, u16)> {
    let fit = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    (rows > 0 && columns > 0).then(|| (fit(rows), fit(columns)))
}

/// What the process is started with. Where nothing is given it gets /dev/null.
#[derive(Debug, Default)]
pub struct ProcessEnds {
    /// Its standard input.
    pub stdin: Option<OwnedFd>,
    /// Its standard output.
    pub stdout: Option<OwnedFd>,
    /// Its standard error.
    pub stderr: Option<OwnedFd>,
    /// Socket to which the master side of its terminal is sent.
    pub console: Option<OwnedFd>,
}

/// The agent's ends, before the process exists.
#[derive(Debug, Default)]
pub struct AgentEnds {
    stdin: Option<(Stream, AsyncFd<OwnedFd>)>,
    outputs: Vec<(usize, AsyncFd<OwnedFd>, Stream)>,
    console: Option<Console>,
    size: Option<(u16, u16)>,
}

#[derive(Debug)]
struct Console {
    socket: OwnedFd,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
}

impl AgentEnds {
    /// Starts moving bytes. The process exists by now and has sent its terminal. `owner` is the user
    /// that the terminal shall belong to.
    ///
    /// # Errors
    /// When there is no terminal where there should be one.
    pub fn start(self, owner: u32) -> Result<Copying> {
        let handed = Arc::new(Handed::default());
        let (close_stdin, closing) = watch::channel(false);
        let (exited, exit) = watch::channel(false);
        let mut drained = Vec::new();
        let mut terminal = None;
        let mut stdin = self.stdin.map(|(stream, pipe)| (stream, Arc::new(pipe)));
        let mut outputs: Vec<_> = self
            .outputs
            .into_iter()
            .map(|(output, pipe, stream)| (output, Arc::new(pipe), Some(stream)))
            .collect();
        if let Some(console) = self.console {
            let io = || "cannot set up the process's terminal".to_owned();
            let master = sys::receive_fd(console.socket.as_fd()).context(io)?;
            let master = master.ok_or_else(|| Error::Launch("the terminal is missing".into()))?;
            let peer = sys::terminal_peer(master.as_fd()).context(io)?;
            // Programs that have given up root open /dev/stdout, /dev/tty and /dev/pts/0 anew.
            nix::unistd::fchown(&peer, Some(owner.into()), None).context(io)?;
            if let Some((rows, columns)) = self.size {
                sys::set_window_size(master.as_fd(), rows, columns).context(io)?;
            }
            let master = watched(master, Interest::READABLE | Interest::WRITABLE).context(io)?;
            let master = Arc::new(master);
            stdin = console.stdin.map(|stream| (stream, Arc::clone(&master)));
            outputs.push((STDOUT, Arc::clone(&master), console.stdout));
            terminal = Some(master);
        }
        if let Some((stream, sink)) = stdin {
            let exit = exit.clone();
            tokio::spawn(copy_input(stream, sink, closing, exit));
        }
        for (output, source, stream) in outputs {
            let (done, seen) = oneshot::channel();
            drained.push(seen);
            tokio::spawn(copy_output(
                source,
                stream,
                exit.clone(),
                done,
                (Arc::clone(&handed), output),
            ));
        }
        Ok(Copying {
            close_stdin,
            exited,
            drained: tokio::sync::Mutex::new(drained),
            handed,
            terminal,
        })
    }
}

/// Place in [`Handed`].
const STDOUT: usize = 0;
/// Place in [`Handed`].
const STDERR: usize = 1;

/// Bytes handed over to the host so far, by output.
#[derive(Debug, Default)]
struct Handed([AtomicU64; 2]);

impl Handed {
    fn add(&self, output: usize, count: usize) {
        self.0[output].fetch_add(count as u64, Ordering::Relaxed);
    }

    fn counts(&self) -> [u64; 2] {
        [STDOUT, STDERR].map(|output| self.0[output].load(Ordering::Relaxed))
    }
}

/// The streams of a process that lives or has lived.
#[derive(Debug)]
pub struct Copying {
    close_stdin: watch::Sender<bool>,
    exited: watch::Sender<bool>,
    drained: tokio::sync::Mutex<Vec<oneshot::Receiver<()>>>,
    handed: Arc<Handed>,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
}

impl Copying {
    /// Ends the process's standard input after what has arrived by now.
    pub fn close_stdin(&self) {
        self.close_stdin.send_replace(true);
    }

    /// Sets the terminal's size.
    ///
    /// # Errors
    /// When the process has no terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let Some(terminal) = &self.terminal else {
            return Err(Error::State("the process has no terminal".into()));
        };
        sys::set_window_size(terminal.get_ref().as_fd(), rows, columns)
            .context(|| "cannot resize the terminal".to_owned())
    }

    /// Says that the process has ended.
    pub fn process_exited(&self) {
        self.exited.send_replace(true);
    }

    /// Waits until all that the process has written is handed over; gives up when a reader has
    /// taken nothing for two seconds. (What it has not taken stays for it.) Answers with the bytes
    /// handed over since the process began, standard output's or the terminal's first.
    pub async fn wait_drained(&self) -> [u64; 2] {
        let mut drained = self.drained.lock().await;
        while let Some(next) = drained.last_mut() {
            let before = self.handed.counts();
            match tokio::time::timeout(STALL, next).await {
                Ok(_) => {
                    drained.pop();
                }
                Err(_) if self.handed.counts() == before => {
                    tracing::warn!("a reader does not take the output of an ended process");
                    break;
                }
                Err(_) => {}
            }
        }
        self.handed.counts()
    }
}

fn watched(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = OFlag::from_bits_retain(nix::fcntl::fcntl(&fd, nix::fcntl::F_GETFL)?);
    nix::fcntl::fcntl(&fd, nix::fcntl::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    sys::watch(fd, interest)
}

thread_local! {
    // One buffer for all streams: it is in use only between two system calls that do not wait.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into_boxed_slice());
}

/// What one attempt to move bytes came to.
enum Moved {
    /// All that was read was written.
    All(usize),
    /// The sink took so many bytes and no more: this is the rest.
    Rest(usize, Vec<u8>),
    /// The source has nothing now.
    Empty,
    /// The source has ended.
    End,
}

/// Reads once and writes once, without waiting.
fn move_bytes(source: &OwnedFd, sink: Option<&OwnedFd>) -> io::Result<Moved> {
    BUFFER.with_borrow_mut(|buffer| {
        let count = loop {
            match nix::unistd::read(source, buffer) {
                Ok(0) => return Ok(Moved::End),
                Ok(count) => break count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(Moved::Empty),
                // A terminal whose last holder has closed it; a peer that is gone.
                Err(Errno::EIO | Errno::ECONNRESET | Errno::ENOTCONN) => return Ok(Moved::End),
                Err(error) => return Err(error.into()),
            }
        };
        let Some(sink) = sink else {
            return Ok(Moved::All(count));
        };
        let bytes = &buffer[..count];
        match nix::unistd::write(sink, bytes) {
            Ok(written) if written == count => Ok(Moved::All(count)),
            Ok(written) => Ok(Moved::Rest(written, bytes[written..].to_vec())),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(Moved::Rest(0, bytes.to_vec())),
            Err(error) => Err(error.into()),
        }
    })
}

/// Waits until the source has something, and moves it.
async fn next_bytes(source: &AsyncFd<OwnedFd>, sink: Option<&OwnedFd>) -> io::Result<Moved> {
    loop {
        let mut ready = source.readable().await?;
        let moved = ready.try_io(|source| match move_bytes(source.get_ref(), sink)? {
            Moved::Empty => Err(io::ErrorKind::WouldBlock.into()),
            moved => Ok(moved),
        });
        if let Ok(moved) = moved {
            return moved;
        }
    }
}

async fn copy_output(
    source: Arc<AsyncFd<OwnedFd>>,
    mut stream: Option<Stream>,
    mut exit: watch::Receiver<bool>,
    drained: oneshot::Sender<()>,
    (handed, output): (Arc<Handed>, usize),
) {
    let mut drained = Some(drained);
    let mut exited = *exit.borrow_and_update();
    loop {
        let sink = stream.as_ref().map(|stream| stream.fd().get_ref());
        let moved = if exited && drained.is_some() {
            move_bytes(source.get_ref(), sink)
        } else {
            tokio::select! {
                moved = next_bytes(&source, sink) => moved,
                changed = exit.changed(), if !exited => {
                    exited = true;
                    if changed.is_err() { drained = None }
                    continue;
                }
            }
        };
        match moved {
            Ok(Moved::All(count)) => {
                handed.add(output, count);
                // Others shall have their turn in between.
                tokio::task::yield_now().await;
            }
            Ok(Moved::Rest(written, rest)) => {
                handed.add(output, written);
                let Some(stream) = &mut stream else { break };
                if write_rest(stream, &rest, &handed, output).await.is_err() {
                    break;
                }
            }
            // Only asked without waiting when the process has ended: all it wrote has been moved.
            Ok(Moved::Empty) => {
                if let Some(drained) = drained.take() {
                    let _ = drained.send(());
                }
            }
            // On an error the reader is gone: closing the pipe tells the process by SIGPIPE.
            Ok(Moved::End) | Err(_) => break,
        }
    }
    if let Some(stream) = &stream {
        stream.finish();
    }
    // Dropping `drained` counts as sending.
}

async fn write_rest(
    stream: &mut Stream,
    mut rest: &[u8],
    handed: &Handed,
    output: usize,
) -> io::Result<()> {
    while !rest.is_empty() {
        let written = stream.write(rest).await?;
        handed.add(output, written);
        rest = &rest[written..];
    }
    Ok(())
}

async fn copy_input(
    stream: Stream,
    sink: Arc<AsyncFd<OwnedFd>>,
    mut closing: watch::Receiver<bool>,
    mut exit: watch::Receiver<bool>,
) {
    let mut close = *closing.borrow_and_update();
    loop {
        let moved = if close {
            move_bytes(stream.fd().get_ref(), Some(sink.get_ref()))
        } else {
            tokio::select! {
                moved = next_bytes(stream.fd(), Some(sink.get_ref())) => moved,
                _ = exit.changed() => return,
                _ = closing.changed() => {
                    close = true;
                    continue;
                }
            }
        };
        match moved {
            Ok(Moved::All(_)) => tokio::task::yield_now().await,
            Ok(Moved::Rest(_, rest)) => tokio::select! {
                written = feed(&sink, &rest) => if written.is_err() { return },
                _ = exit.changed() => return,
            },
            // Half-closed by the host, or closed by request, or the process reads no more. The pipe
            // closes with the last use of `sink`, and the stream with it: the host's writes fail.
            Ok(Moved::Empty | Moved::End) | Err(_) => return,
        }
    }
}

async fn feed(sink: &AsyncFd<OwnedFd>, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        let mut ready = sink.writable().await?;
        match ready.try_io(|sink| Ok(nix::unistd::write(sink.get_ref(), rest)?)) {
            Ok(Ok(written)) => rest = &rest[written..],
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(())
}
