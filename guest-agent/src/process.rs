//! One process that the shim knows by name: a container's init, an exec, or a debugging shell.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sepal_protocol::agent::ProcessExit;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::launch::{Gate, Launched};
use crate::plan::Plan;
use crate::reaper::Exit;
use crate::stdio::{AgentEnds, Copying, ProcessEnds};

/// How a process ended, with what its container knows of it.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// Status and time.
    pub exit: Exit,
    /// The kernel killed it for want of memory.
    pub oom_killed: bool,
}

/// A process from its request to its deletion.
///
/// ```text
/// Asked ──(exec only: made at its start)──> Made ──start──> Running ──> Ended
///   └────────────────────────── delete ──────┴── killed ─────────────────┘
/// ```
#[derive(Debug)]
pub struct Process {
    state: Mutex<State>,
    ended: watch::Sender<Option<Ended>>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    pid: i32,
    copying: Option<Arc<Copying>>,
    size: Option<(u16, u16)>,
}

#[derive(Debug)]
enum Phase {
    Asked(Box<Asked>),
    Made(Gate),
    /// Between two phases: a call is at work on it.
    Busy,
    Running,
}

/// An exec that waits for its start.
#[derive(Debug)]
pub struct Asked {
    /// What it shall be.
    pub plan: Plan,
    /// Its streams.
    pub ends: ProcessEnds,
    /// The agent's ends of them.
    pub agent_ends: AgentEnds,
}

impl Process {
    /// An exec as it was asked for.
    #[must_use]
    pub fn asked(asked: Asked) -> Arc<Self> {
        Arc::new(Self::new(Phase::Asked(Box::new(asked)), 0, None))
    }

    /// A process that has been made. `oom_killed` tells, after its end, whether the kernel killed
    /// it for want of memory.
    pub fn made(
        launched: Launched,
        copying: Copying,
        on_exit: impl FnOnce(Exit) -> bool + Send + 'static,
    ) -> Arc<Self> {
        let process = Arc::new(Self::new(Phase::Busy, 0, None));
        let gate = process.attach(launched, copying, on_exit);
        process.lock().phase = Phase::Made(gate);
        process
    }

    fn new(phase: Phase, pid: i32, copying: Option<Arc<Copying>>) -> Self {
        let state = State {
            phase,
            pid,
            copying,
            size: None,
        };
        Self {
            state: Mutex::new(state),
            ended: watch::Sender::new(None),
        }
    }

    /// Gives the process its pid and streams, and sees to it that its end is noted.
    fn attach(
        self: &Arc<Self>,
        launched: Launched,
        copying: Copying,
        on_exit: impl FnOnce(Exit) -> bool + Send + 'static,
    ) -> Gate {
        let copying = Arc::new(copying);
        let size = {
            let mut state = self.lock();
            state.pid = launched.pid;
            state.copying = Some(Arc::clone(&copying));
            state.size
        };
        if let Some((rows, columns)) = size {
            // Resized before it was made; a process without a terminal has no size.
            let _ = copying.resize(rows, columns);
        }
        let process = Arc::clone(self);
        tokio::spawn(async move {
            // The reaper lives as long as the agent.
            let exit = launched.exit.await.unwrap_or_else(|_| Exit::now(255));
            let oom_killed = on_exit(exit);
            copying.process_exited();
            process.ended.send_replace(Some(Ended { exit, oom_killed }));
        });
        launched.gate
    }

    /// Takes an exec for being made; [`Process::start_made`] or [`Process::fail`] follows.
    ///
    /// # Errors
    /// When it was started before.
    pub fn take_asked(&self) -> Result<Option<Asked>> {
        let mut state = self.lock();
        match std::mem::replace(&mut state.phase, Phase::Busy) {
            Phase::Asked(asked) => Ok(Some(*asked)),
            Phase::Made(gate) => {
                state.phase = Phase::Made(gate);
                Ok(None)
            }
            other => {
                state.phase = other;
                Err(Error::State("the process has been started already".into()))
            }
        }
    }

    /// Notes that an exec could not be made.
    pub fn fail(&self) {
        self.ended.send_replace(Some(Ended {
            exit: Exit::now(127),
            oom_killed: false,
        }));
    }

    /// Gives an exec that was taken its life.
    pub fn set_made(
        self: &Arc<Self>,
        launched: Launched,
        copying: Copying,
        on_exit: impl FnOnce(Exit) -> bool + Send + 'static,
    ) {
        let gate = self.attach(launched, copying, on_exit);
        self.lock().phase = Phase::Made(gate);
    }

    /// Starts a made process and answers its pid.
    ///
    /// # Errors
    /// When it is not just made, or why its program cannot run.
    pub async fn start_made(&self) -> Result<i32> {
        let (gate, pid) = {
            let mut state = self.lock();
            match std::mem::replace(&mut state.phase, Phase::Busy) {
                Phase::Made(gate) => (gate, state.pid),
                other => {
                    state.phase = other;
                    return Err(Error::State("the process has been started already".into()));
                }
            }
        };
        let started = gate.open().await;
        self.lock().phase = Phase::Running;
        started.map(|()| pid)
    }

    /// Its pid in the guest's initial namespace; 0 before it is made.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.lock().pid
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        *self.ended.borrow()
    }

    /// Whether it was only asked for.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        matches!(self.lock().phase, Phase::Asked(_))
    }

    /// Whether it has been started and not ended.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(self.lock().phase, Phase::Running | Phase::Busy) && self.ended().is_none()
    }

    /// Waits for its end.
    pub async fn wait_end(&self) -> Ended {
        let mut ended = self.ended.subscribe();
        let seen = ended.wait_for(Option::is_some).await;
        seen.ok().and_then(|ended| *ended).unwrap_or(Ended {
            exit: Exit {
                status: 255,
                at_ns: 0,
            },
            oom_killed: false,
        })
    }

    /// Waits for its end and until its output has been handed over.
    pub async fn wait(&self) -> ProcessExit {
        let ended = self.wait_end().await;
        let copying = self.lock().copying.clone();
        let [stdout_bytes, stderr_bytes] = match copying {
            Some(copying) => copying.wait_drained().await,
            None => [0; 2],
        };
        ProcessExit {
            stdout_bytes,
            stderr_bytes,
            ..self.report(ended)
        }
    }

    /// An end in the protocol's terms.
    #[must_use]
    pub fn report(&self, ended: Ended) -> ProcessExit {
        ProcessExit {
            status: ended.exit.status,
            exited_at_ns: ended.exit.at_ns,
            pid: u32::try_from(self.pid()).unwrap_or(0),
            oom_killed: ended.oom_killed,
            ..Default::default()
        }
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has not been made yet or has ended, or the kernel does not know the signal.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let pid = self.pid();
        if self.ended().is_some() {
            return Err(Error::Finished);
        }
        if pid <= 0 {
            return Err(Error::State("the process has not been started".into()));
        }
        // Only the reaper frees a pid, and the end is noted right after: for a signal to meet another
        // process the kernel would have to go through all pids in between.
        send_signal(pid, signal)
    }

    /// Sets the size of its terminal, now or when it gets one.
    ///
    /// # Errors
    /// When it lives without a terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let copying = {
            let mut state = self.lock();
            state.size = Some((rows, columns));
            state.copying.clone()
        };
        copying.map_or(Ok(()), |copying| copying.resize(rows, columns))
    }

    /// Ends its standard input.
    pub fn close_stdin(&self) {
        let copying = self.lock().copying.clone();
        if let Some(copying) = copying {
            copying.close_stdin();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a signal by its number, real-time ones included.
///
/// # Errors
/// Those of kill(2); a process that is gone already is none.
pub fn send_signal(pid: i32, signal: i32) -> Result<()> {
    match crate::sys::kill(pid, signal) {
        Ok(()) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            Err(Error::Invalid(format!("{signal} is not a signal")))
        }
        Err(source) => Err(Error::Io {
            what: format!("cannot signal process {pid}"),
            source,
        }),
    }
}
