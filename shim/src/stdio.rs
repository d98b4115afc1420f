//! Standard streams: containerd's FIFOs, files and log programs on one side, vsock connections on
//! the other.
//!
//! Back-pressure is the kernel's: nothing is read that cannot be written. An output FIFO is opened
//! for reading as well, as runc's shim does: a client may go and another may come, and meanwhile the
//! process waits on a full FIFO instead of dying of SIGPIPE. The input FIFO is held open for writing
//! until containerd's CloseIO, so that a client that goes is no end of file.
//!
//! The end of a process is told when its output has reached the client. containerd's clients (`ctr`,
//! nerdctl) close their end of a FIFO as soon as they hear of the end, and what they have not read by
//! then is lost. So [`Streams::finish`] waits for the bytes that the guest says it has handed over,
//! and until the FIFO has been read empty: both as long as something moves.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use sepal_protocol::agent;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::agent::{self as guest, Agent};
use crate::logger::Logger;
use crate::sys;

/// Bytes moved at once. A FIFO holds 64 KiB.
const CHUNK: usize = 32 << 10;
/// Output of an ended process that no reader has taken any of for so long is given up: there is no
/// reader. On a host with ten times the work that it can do a reader was seen to take more than 1 s.
const STUCK: Duration = Duration::from_secs(3);
/// The same for bytes that the guest owes: it has sent them, but may be starved by its neighbours.
const OWED: Duration = Duration::from_secs(10);
/// The same in all, however they move: what a guest owes is in the buffers of one connection.
const OWED_IN_ALL: Duration = Duration::from_secs(30);
/// Between two looks at a FIFO that is being read: no event tells that a pipe is empty. The first
/// and the longest.
const LOOK: [Duration; 2] = [Duration::from_micros(100), Duration::from_millis(10)];
/// The longest where nobody waits for the answer.
const LOOK_LATER: Duration = Duration::from_millis(250);

/// Why a process has no streams.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("standard stream {uri}: {source}")]
    Open { uri: String, source: io::Error },
    #[error("standard stream {uri}: sepal knows FIFOs, files, file:// and binary://")]
    Scheme { uri: String },
    #[error("log program {}: {source}", .program.display())]
    Logger { program: PathBuf, source: io::Error },
    #[error("log program {}: not ready within 10 s", .program.display())]
    LoggerNotReady { program: PathBuf },
    #[error(transparent)]
    Guest(#[from] guest::Error),
}

/// What containerd wants of a process's streams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Path of a FIFO; empty: none.
    pub stdin: String,
    /// Path or URI; empty: none.
    pub stdout: String,
    /// As `stdout`; unused with a terminal.
    pub stderr: String,
    /// The process has a terminal.
    pub terminal: bool,
    /// The terminal's size in rows and columns, where it is known before the process is.
    pub size: Option<(u32, u32)>,
}

/// Where output goes.
enum Sink {
    /// A client's, which must be given the time to read it.
    Fifo(Arc<pipe::Sender>),
    /// A log program's, which is waited for.
    Pipe(pipe::Sender),
    File(tokio::fs::File),
}

/// The host's ends, open.
struct Opened {
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
}

/// The streams of one process.
#[derive(Default)]
pub struct Streams {
    input: Mutex<Input>,
    stdin: Mutex<Option<JoinHandle<()>>>,
    outputs: Mutex<Vec<JoinHandle<()>>>,
    logger: Mutex<Option<Logger>>,
    progress: [Arc<Progress>; 2],
}

/// Standard input, before and after the FIFO is open.
#[derive(Default)]
struct Input {
    /// The FIFO, and the guest's end that waits for it.
    waiting: Option<(String, UnixStream)>,
    /// Without it the end of the last client is the end of the file.
    keep_open: Option<pipe::Sender>,
    closed: bool,
}

/// How far an output has come.
#[derive(Default)]
struct Progress {
    /// Bytes that the guest has sent.
    read: AtomicU64,
    /// Bytes that the host's side has taken.
    written: AtomicU64,
    /// Set while bytes are copied.
    copying: AtomicBool,
    changed: Notify,
    /// Where the bytes go, as long as it is open.
    fifo: Mutex<Weak<pipe::Sender>>,
}

/// What there is still to do for an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rest {
    /// Bytes that the guest is yet to send; all ones while it may send more and has not said how much.
    owed: u64,
    /// Bytes that wait for the host's side.
    unread: u64,
}

impl Rest {
    const NONE: Self = Self { owed: 0, unread: 0 };
}

impl Progress {
    fn wrote(&self, bytes: usize) {
        self.written.fetch_add(bytes as u64, Ordering::Release);
    }

    /// `handed`: bytes that the guest had sent when the process ended, if it said so.
    fn rest(&self, handed: Option<u64>) -> Rest {
        // In the order that bytes take: what moves meanwhile is seen further on.
        let copying = self.copying.load(Ordering::Acquire);
        let read = self.read.load(Ordering::Acquire);
        let written = self.written.load(Ordering::Acquire);
        let fifo = lock(&self.fifo).upgrade();
        let in_fifo = fifo.map_or(0, |fifo| sys::unread(&*fifo).unwrap_or(0));
        Rest {
            owed: match handed {
                _ if !copying => 0,
                Some(handed) => handed.saturating_sub(read),
                None => u64::MAX,
            },
            unread: read.saturating_sub(written) + in_fifo,
        }
    }
}

impl Streams {
    /// Opens the host's ends and the guest's, and begins to copy the output. Answers with what the
    /// agent needs. [`Streams::feed`] follows when the process is there.
    ///
    /// # Errors
    /// A path cannot be opened, or the guest takes no connection.
    pub async fn open(
        wanted: &Wanted,
        agent: &Agent,
        namespace: &str,
        container: &str,
    ) -> Result<(Self, agent::Stdio), Error> {
        let opened = open_host(wanted, namespace, container).await?;
        if !wanted.stdin.is_empty() {
            // It is opened later, when there is a process already that a mistake would have to end.
            std::fs::metadata(&wanted.stdin).map_err(|source| Error::Open {
                uri: wanted.stdin.clone(),
                source,
            })?;
        }
        let (rows, columns) = wanted.size.unwrap_or_default();
        let mut request = agent::Stdio {
            terminal: wanted.terminal,
            rows,
            columns,
            ..Default::default()
        };
        let streams = Self::default();
        *lock(&streams.logger) = opened.logger;
        // All at once: each is a conversation with the guest.
        let stream = |needed: bool| async move {
            match needed {
                true => agent.stdio().await.map(Some),
                false => Ok(None),
            }
        };
        let (stdin, stdout, stderr) = tokio::try_join!(
            stream(!wanted.stdin.is_empty()),
            stream(opened.stdout.is_some()),
            stream(opened.stderr.is_some()),
        )?;
        if let Some((stream, token)) = stdin {
            request.stdin = token;
            lock(&streams.input).waiting = Some((wanted.stdin.clone(), stream));
        }
        for (sink, stream, token, progress) in [
            (
                opened.stdout,
                stdout,
                &mut request.stdout,
                &streams.progress[0],
            ),
            (
                opened.stderr,
                stderr,
                &mut request.stderr,
                &streams.progress[1],
            ),
        ] {
            if let (Some(sink), Some((stream, its_token))) = (sink, stream) {
                *token = its_token;
                streams.copy_to(sink, stream, progress);
            }
        }
        Ok((streams, request))
    }

    /// Opens the input FIFO and begins to copy.
    ///
    /// Not before: a client that finds the FIFO open writes what it has, and then asks for the end of
    /// the input of a process that containerd must know by then. A client that has gone and taken its
    /// FIFO along has said all: the input ends.
    pub fn feed(&self) {
        let mut input = lock(&self.input);
        let Some((path, stream)) = input.waiting.take() else {
            return;
        };
        match open_stdin(&path) {
            Ok((receiver, keep)) => {
                if !input.closed {
                    input.keep_open = Some(keep);
                }
                *lock(&self.stdin) = Some(tokio::spawn(copy_in(receiver, stream)));
            }
            Err(e) => tracing::warn!("nobody will write to {path}: {e}"),
        }
    }

    /// containerd's CloseIO: once the clients have closed the FIFO and it is empty, the process's
    /// standard input ends.
    pub fn close_stdin(&self) {
        let mut input = lock(&self.input);
        input.keep_open = None;
        input.closed = true;
    }

    /// After the process has ended: waits until its output has been read, as long as it moves.
    /// `handed` are the bytes that the guest had sent by then, by output; without them (there is no
    /// guest any more) the streams' ends are waited for.
    pub async fn finish(&self, handed: Option<[u64; 2]>) {
        if let Some(stdin) = lock(&self.stdin).take() {
            stdin.abort();
        }
        *lock(&self.input) = Input {
            closed: true,
            ..Input::default()
        };
        let [stdout, stderr] = &self.progress;
        let [mut pause, longest] = LOOK;
        let (mut before, mut since) = (None, Instant::now());
        let (mut owing, mut looked) = (Duration::ZERO, Instant::now());
        loop {
            let rests = [
                stdout.rest(handed.map(|[stdout, _]| stdout)),
                stderr.rest(handed.map(|[_, stderr]| stderr)),
            ];
            if rests == [Rest::NONE; 2] {
                return;
            }
            if before != Some(rests) {
                (before, since) = (Some(rests), Instant::now());
            }
            let is_guests_turn = rests.iter().all(|rest| rest.unread == 0);
            if is_guests_turn {
                owing += looked.elapsed();
            }
            looked = Instant::now();
            let patience = if is_guests_turn { OWED } else { STUCK };
            if since.elapsed() >= patience || owing >= OWED_IN_ALL {
                tracing::debug!(?rests, "output of an ended process is given up");
                return;
            }
            tokio::select! {
                () = stdout.changed.notified() => {}
                () = stderr.changed.notified() => {}
                () = tokio::time::sleep(pause) => pause = (2 * pause).min(longest),
            }
        }
    }

    fn copy_to(&self, sink: Sink, stream: UnixStream, progress: &Arc<Progress>) {
        let progress = progress.clone();
        if let Sink::Fifo(fifo) = &sink {
            *lock(&progress.fifo) = Arc::downgrade(fifo);
        }
        progress.copying.store(true, Ordering::Relaxed);
        let copy = tokio::spawn(async move {
            copy_out(stream, sink, &progress).await;
        });
        lock(&self.outputs).push(copy);
    }

    /// Ends all copying.
    pub async fn close(&self) {
        for output in lock(&self.outputs).drain(..) {
            output.abort();
        }
        let logger = lock(&self.logger).take();
        if let Some(logger) = logger {
            logger.end().await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What is behind these locks is whole after each statement, also of one that has panicked.
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

async fn open_host(wanted: &Wanted, namespace: &str, container: &str) -> Result<Opened, Error> {
    if !wanted.stdin.is_empty() {
        let failed = |source| Error::Open {
            uri: wanted.stdin.clone(),
            source,
        };
        std::fs::metadata(&wanted.stdin).map_err(failed)?;
    }
    let stderr = if wanted.terminal {
        ""
    } else {
        wanted.stderr.as_str()
    };
    if let Some(rest) = wanted.stdout.strip_prefix("binary://") {
        let (logger, stdout, error) = Logger::spawn(rest, namespace, container).await?;
        let sender = |fd: OwnedFd| {
            pipe::Sender::from_owned_fd(fd)
                .map(Sink::Pipe)
                .map_err(|source| Error::Open {
                    uri: wanted.stdout.clone(),
                    source,
                })
        };
        let stderr = if wanted.terminal {
            None
        } else {
            Some(sender(error)?)
        };
        return Ok(Opened {
            stdout: Some(sender(stdout)?),
            stderr,
            logger: Some(logger),
        });
    }
    Ok(Opened {
        stdout: open_sink(&wanted.stdout)?,
        stderr: open_sink(stderr)?,
        logger: None,
    })
}

/// Both ends of a FIFO, without waiting for a client.
fn open_stdin(path: &str) -> io::Result<(pipe::Receiver, pipe::Sender)> {
    let receiver = pipe::OpenOptions::new().open_receiver(path)?;
    let sender = pipe::OpenOptions::new().open_sender(path)?;
    Ok((receiver, sender))
}

fn open_sink(uri: &str) -> Result<Option<Sink>, Error> {
    let failed = |source| Error::Open {
        uri: uri.into(),
        source,
    };
    let path = match uri.split_once("://") {
        None if uri.is_empty() => return Ok(None),
        None => Path::new(uri),
        Some(("fifo", path)) => Path::new(path),
        Some(("file", path)) => {
            // The path may be followed by what a logging driver means for itself.
            let path = Path::new(path.split('?').next().unwrap_or(path));
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(failed)?;
            }
            let file = std::fs::File::options()
                .create(true)
                .append(true)
                .mode(0o644)
                .open(path);
            return Ok(Some(Sink::File(tokio::fs::File::from_std(
                file.map_err(failed)?,
            ))));
        }
        Some(_) => return Err(Error::Scheme { uri: uri.into() }),
    };
    if std::fs::metadata(path)
        .map_err(failed)?
        .file_type()
        .is_fifo()
    {
        let sender = pipe::OpenOptions::new().read_write(true).open_sender(path);
        return Ok(Some(Sink::Fifo(Arc::new(sender.map_err(failed)?))));
    }
    let file = std::fs::File::options()
        .append(true)
        .open(path)
        .map_err(failed)?;
    Ok(Some(Sink::File(tokio::fs::File::from_std(file))))
}

async fn copy_in(mut from: pipe::Receiver, mut to: UnixStream) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => break,
            // The process no longer reads: what is left in the FIFO is nobody's.
            Ok(length) if to.write_all(&buffer[..length]).await.is_err() => return,
            Ok(_) => {}
            Err(e) => {
                tracing::warn!("standard input: {e}");
                break;
            }
        }
    }
    // Half-close: end of file for the process.
    if to.shutdown().await.is_ok() {
        // The connection stays until the guest has taken all of it and closes its side.
        let _ = to.read(&mut buffer).await;
    }
}

async fn copy_out(from: UnixStream, mut to: Sink, progress: &Progress) {
    copy_to_end(from, &mut to, progress).await;
    progress.copying.store(false, Ordering::Release);
    progress.changed.notify_one();
    if let Sink::Fifo(fifo) = &to {
        // Bytes in a FIFO that nobody has open are gone, and a client may yet come for them.
        let [mut pause, _] = LOOK;
        while sys::unread(&**fifo).is_ok_and(|bytes| bytes > 0) {
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(LOOK_LATER);
        }
    }
    drop(to);
    progress.changed.notify_one();
}

async fn copy_to_end(mut from: UnixStream, to: &mut Sink, progress: &Progress) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = match from.read(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => length,
            Err(e) => {
                tracing::debug!("standard output: {e}");
                break;
            }
        };
        progress.read.fetch_add(length as u64, Ordering::Release);
        let bytes = &buffer[..length];
        let written = match to {
            Sink::Fifo(fifo) => write_pipe(fifo, bytes, progress).await,
            Sink::Pipe(pipe) => write_pipe(pipe, bytes, progress).await,
            Sink::File(file) => write_file(file, bytes, progress).await,
        };
        if let Err(e) = written {
            tracing::warn!("standard output cannot be written: {e}");
            // The process goes on; its output is dropped, as with a closed log.
            drop_rest(from, buffer, progress).await;
            return;
        }
    }
}

async fn drop_rest(mut from: UnixStream, mut buffer: Vec<u8>, progress: &Progress) {
    loop {
        progress
            .written
            .store(progress.read.load(Ordering::Relaxed), Ordering::Relaxed);
        match from.read(&mut buffer).await {
            Ok(length) if length > 0 => progress.read.fetch_add(length as u64, Ordering::Release),
            _ => return,
        };
    }
}

async fn write_pipe(pipe: &pipe::Sender, mut bytes: &[u8], progress: &Progress) -> io::Result<()> {
    while !bytes.is_empty() {
        pipe.writable().await?;
        match pipe.try_write(bytes) {
            Ok(written) => {
                progress.wrote(written);
                bytes = &bytes[written..];
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

async fn write_file(
    file: &mut tokio::fs::File,
    bytes: &[u8],
    progress: &Progress,
) -> io::Result<()> {
    file.write_all(bytes).await?;
    // Taken is not written: that happens on another thread.
    file.flush().await?;
    progress.wrote(bytes.len());
    Ok(())
}

/// A pipe whose write end does not block.
///
/// # Errors
/// No descriptors are left.
pub(crate) fn pipe_for_output() -> io::Result<(OwnedFd, OwnedFd)> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    fcntl(write.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((read, write))
}

#[cfg(test)]
#[path = "stdio_test.rs"]
mod tests;
