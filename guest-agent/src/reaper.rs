//! Signals to PID 1: collects the exit of every process in the guest: the agent is PID 1, and orphans become its
//! children.
//!
//! One task, woken by SIGCHLD through a signalfd. An exit is never missed: a process that someone
//! will ask about is registered ([`Reaper::watch`]) before it can become collectable, because it is
//! either the agent's own fresh child (fork and registration happen without giving up the thread)
//! or the child of a helper that stays alive until the agent has registered it (launch.rs).

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::Interest;
use tokio::sync::oneshot;

use crate::sys;

/// The kernel's message to init that the power button was pressed: SIGRTMIN+4, which other init
/// programs take for the same.
const POWER_BUTTON: i32 = 38;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0..=255; 128 + signal for a death by signal.
    pub status: u32,
    /// Nanoseconds since the epoch by the guest's clock.
    pub at_ns: u64,
}

impl Exit {
    /// An exit with `status`, now.
    #[must_use]
    pub fn now(status: u32) -> Self {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            status,
            at_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        }
    }
}

/// Who waits for which process.
#[derive(Debug, Default)]
pub struct Reaper {
    watched: Mutex<HashMap<i32, oneshot::Sender<Exit>>>,
}

impl Reaper {
    /// Registers a process that has not been collected yet.
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (send, receive) = oneshot::channel();
        self.lock().insert(pid, send);
        receive
    }

    /// Collects until the end of the agent. `power_button` is called when the guest is asked to
    /// power off: by the VM's power button, or by a program of the guest.
    ///
    /// # Errors
    /// When signals cannot be received.
    pub async fn run(&self, power_button: impl Fn()) -> io::Result<()> {
        let signals = sys::signal_set(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, POWER_BUTTON])?;
        signals.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&signals, flags)?;
        let woken = sys::watch(signals.as_fd().try_clone_to_owned()?, Interest::READABLE)?;
        loop {
            // Children may have ended before the descriptor was there.
            self.collect();
            let mut ready = woken.readable().await?;
            while let Ok(Some(signal)) = signals.read_signal() {
                if signal.ssi_signo != libc::SIGCHLD as u32 {
                    power_button();
                }
            }
            ready.clear_ready();
        }
    }

    fn collect(&self) {
        loop {
            let (pid, status) = match sys::wait_any() {
                Ok(Some(ended)) => ended,
                Ok(None) => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "cannot collect children");
                    return;
                }
            };
            if let Some(waiter) = self.lock().remove(&pid) {
                // The waiter may have lost interest.
                let _ = waiter.send(Exit::now(status));
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i32, oneshot::Sender<Exit>>> {
        self.watched
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
