//! One front end, from its connection to its end.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use log::info;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::GuestMemoryAtomic;

use crate::backend::{Backend, Memory};
use crate::files::Files;
use crate::pressure::Pressure;

/// Threads unless told otherwise.
pub const DEFAULT_THREADS: u8 = 4;
/// How long the VMM may take to connect. The shim connects the two at once.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(60);

/// Serves the first front end that connects until it disconnects.
///
/// Until then this process ends with its starter; afterwards with the VMM, which itself ends with
/// the shim. (PR_SET_PDEATHSIG would not do: it is tied to the thread that started us, and a
/// runtime's threads come and go.)
///
/// # Errors
/// Nobody connected, or the front end broke the protocol. A front end that goes away, in whatever
/// way, is the ordinary end.
pub fn serve(
    files: Files,
    pressure: Pressure,
    listener: UnixListener,
    starter: OwnedFd,
    threads: usize,
) -> anyhow::Result<()> {
    let backend = Arc::new(Backend::new(files, pressure, threads));
    let memory = GuestMemoryAtomic::new(Memory::new());
    let mut daemon = VhostUserDaemon::new("vhost-user".into(), backend, memory)
        .map_err(shown)
        .context("cannot start the queue thread")?;

    await_front_end(&listener, &starter)?;
    drop(starter);
    let mut listener = Listener::from(listener);
    daemon
        .start(&mut listener)
        .map_err(shown)
        .context("cannot accept the front end")?;
    info!("front end connected");
    match daemon.wait() {
        Ok(())
        | Err(DaemonError::HandleRequest(
            VhostUserError::Disconnected
            | VhostUserError::PartialMessage
            | VhostUserError::SocketBroken(_),
        )) => {
            info!("front end gone");
            Ok(())
        }
        Err(error) => Err(shown(error)).context("the front end broke the protocol"),
    }
}

fn await_front_end(listener: &UnixListener, starter: &OwnedFd) -> anyhow::Result<()> {
    let mut fds = [
        PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        PollFd::new(starter.as_fd(), PollFlags::POLLIN),
    ];
    let timeout = PollTimeout::try_from(ACCEPT_TIMEOUT).unwrap_or(PollTimeout::MAX);
    loop {
        match poll(&mut fds, timeout) {
            Err(nix::Error::EINTR) => continue,
            Err(error) => return Err(error).context("cannot wait for the front end"),
            Ok(0) => bail!(
                "no front end connected within {} s",
                ACCEPT_TIMEOUT.as_secs()
            ),
            Ok(_) if fds[0].any() == Some(true) => return Ok(()),
            Ok(_) => bail!("the process that started this one ended before a front end connected"),
        }
    }
}

/// The crate's error is printable but not an error.
fn shown(error: DaemonError) -> anyhow::Error {
    anyhow::anyhow!("{error}")
}
