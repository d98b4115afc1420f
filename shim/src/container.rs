//! Containers and their processes: the state machine of each, and what containerd may ask of it when.
//!
//! ```text
//! Created ──start──> Running ──exit──> Stopped ──delete──> (forgotten)
//!    └────────────────exit────────────────^
//! ```
//! [`crate::pod`] drives it. Whatever changes a state publishes the event that belongs to it while
//! it holds the process's `order` lock, so that start comes before exit and neither comes twice.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use oci_spec::runtime::Hooks;
use sepal_protocol::agent;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::hooks;
use crate::limits;
use crate::stand_in::OnHost;
use crate::stdio::{Streams, Wanted};

/// What a killed process exits with: 128 + SIGKILL.
pub const KILLED: u32 = 137;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0..=255.
    pub status: u32,
    /// Nanoseconds since the Unix epoch, by the host's clock.
    pub at_ns: u64,
}

impl Exit {
    /// It ended just now.
    pub fn now(status: u32) -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            status,
            at_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// For an answer or an event.
    pub fn timestamp(&self) -> MessageField<Timestamp> {
        MessageField::some(Timestamp {
            seconds: i64::try_from(self.at_ns / 1_000_000_000).unwrap_or(i64::MAX),
            nanos: (self.at_ns % 1_000_000_000) as i32,
            ..Default::default()
        })
    }
}

/// How far a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Made, or for an exec only asked for.
    Created,
    /// Runs, or is paused with its container.
    Running,
    /// Has ended.
    Stopped(Exit),
}

impl Phase {
    /// For error messages.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// A container's init, or an exec.
pub struct Process {
    /// Its container's id.
    pub container: String,
    /// Empty for init.
    pub exec: String,
    /// Its streams as containerd named them.
    pub wanted: Wanted,
    /// An exec's OCI process as JSON.
    pub spec: Vec<u8>,
    /// Held while a state changes and its event is published, and while it is started or deleted.
    pub order: tokio::sync::Mutex<()>,
    /// Set before an exec runs: the size of its terminal in rows and columns.
    pub size: Mutex<Option<(u32, u32)>>,
    phase: watch::Sender<Phase>,
    streams: Mutex<Option<Arc<Streams>>>,
    stdin_closed: AtomicBool,
    condemned: AtomicBool,
    doomed: AtomicBool,
    /// Whether the guest has said that it has ended, or there is no guest any more.
    reported: watch::Sender<bool>,
}

impl Process {
    /// A process that does not run yet.
    pub fn new(container: &str, exec: &str, wanted: Wanted, spec: Vec<u8>) -> Arc<Self> {
        let size = Mutex::new(wanted.size);
        Arc::new(Self {
            size,
            container: container.into(),
            exec: exec.into(),
            wanted,
            spec,
            order: tokio::sync::Mutex::new(()),
            phase: watch::Sender::new(Phase::Created),
            streams: Mutex::new(None),
            stdin_closed: AtomicBool::new(false),
            condemned: AtomicBool::new(false),
            doomed: AtomicBool::new(false),
            reported: watch::Sender::new(false),
        })
    }

    /// How the agent knows it.
    pub fn id(&self) -> agent::ProcessId {
        agent::ProcessId {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            ..Default::default()
        }
    }

    /// How containerd's events name it: an exec by its own id, init by the container's.
    pub fn event_id(&self) -> String {
        if self.exec.is_empty() {
            self.container.clone()
        } else {
            self.exec.clone()
        }
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Sets the phase; false when it had ended before, and nothing is changed.
    pub fn advance(&self, to: Phase) -> bool {
        self.phase.send_if_modified(|phase| {
            let alive = !matches!(phase, Phase::Stopped(_));
            if alive {
                *phase = to;
            }
            alive
        })
    }

    /// Has it not be started any more, as it is being deleted. Called and asked with `order` held.
    pub fn condemn(&self) {
        self.condemned.store(true, Ordering::Relaxed);
    }

    /// See [`Self::condemn`].
    pub fn is_condemned(&self) -> bool {
        self.condemned.load(Ordering::Relaxed)
    }

    /// Notes that it was told to end at once; answers whether that is new.
    pub fn doom(&self) -> bool {
        !self.doomed.swap(true, Ordering::Relaxed)
    }

    /// Notes that nothing more is to be heard of it from the guest. Its output may still be on its way.
    pub fn note_reported(&self) {
        self.reported.send_replace(true);
    }

    /// Waits for [`Self::note_reported`].
    pub async fn reported(&self) {
        // The sender lives in self.
        let _ = self
            .reported
            .subscribe()
            .wait_for(|reported| *reported)
            .await;
    }

    /// Waits until it has ended.
    pub async fn ended(&self) -> Exit {
        let mut phase = self.phase.subscribe();
        loop {
            if let Phase::Stopped(exit) = *phase.borrow_and_update() {
                return exit;
            }
            // The sender lives in self.
            if phase.changed().await.is_err() {
                return Exit::now(KILLED);
            }
        }
    }

    /// Its streams, once they are open.
    pub fn streams(&self) -> Option<Arc<Streams>> {
        lock(&self.streams).clone()
    }

    /// Sets the streams.
    pub fn set_streams(&self, streams: Streams) {
        let mut place = lock(&self.streams);
        if self.stdin_closed.load(Ordering::Relaxed) {
            streams.close_stdin();
        }
        *place = Some(Arc::new(streams));
    }

    /// containerd's CloseIO, which may come before the streams are there.
    pub fn close_stdin(&self) {
        let streams = lock(&self.streams);
        self.stdin_closed.store(true, Ordering::Relaxed);
        if let Some(streams) = &*streams {
            streams.close_stdin();
        }
    }

    /// Lets go of the streams. What the process wrote was given its time before its end was told.
    pub async fn close_streams(&self) {
        let streams = lock(&self.streams).take();
        if let Some(streams) = streams {
            streams.close().await;
        }
    }
}

/// A container.
pub struct Container {
    /// containerd's id of it.
    pub id: String,
    /// containerd's directory for it.
    pub bundle: PathBuf,
    /// Who it is in the pod's accounts ([`crate::limits`]).
    pub account: String,
    /// Its first process.
    pub init: Arc<Process>,
    /// The host's process or thread that stands for it.
    pub pid: u32,
    /// Frozen.
    pub paused: AtomicBool,
    /// OOM events that were published before the guest told of them.
    pub oom_ahead: AtomicU32,
    /// OOM events that the guest has told of.
    pub oom_told: AtomicBool,
    /// When containerd was last told of one.
    pub oom_at: Mutex<Option<Instant>>,
    /// Hooks that run on the host.
    pub hooks: Hooks,
    /// What they get.
    pub hook_state: hooks::State,
    on_host: Mutex<Option<OnHost>>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

impl Container {
    /// A container whose init does not run yet.
    pub fn new(
        id: &str,
        bundle: PathBuf,
        init: Arc<Process>,
        hooks: Hooks,
        hook_state: hooks::State,
        on_host: OnHost,
    ) -> Arc<Self> {
        Arc::new(Self {
            id: id.into(),
            bundle,
            account: limits::account(id, &hook_state.annotations),
            init,
            pid: on_host.pid(),
            on_host: Mutex::new(Some(on_host)),
            paused: AtomicBool::new(false),
            oom_ahead: AtomicU32::new(0),
            oom_told: AtomicBool::new(false),
            oom_at: Mutex::default(),
            hooks,
            hook_state,
            execs: Mutex::new(HashMap::new()),
        })
    }

    /// Init, or the exec of this id.
    ///
    /// # Errors
    /// There is no such exec.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>> {
        if exec.is_empty() {
            return Ok(self.init.clone());
        }
        lock(&self.execs)
            .get(exec)
            .cloned()
            .ok_or_else(|| Error::NoExec {
                container: self.id.clone(),
                exec: exec.into(),
            })
    }

    /// Adds an exec.
    ///
    /// # Errors
    /// There is one of this id.
    pub fn add_exec(&self, process: Arc<Process>) -> Result<()> {
        let mut execs = lock(&self.execs);
        if execs.contains_key(&process.exec) {
            return Err(Error::ExecExists {
                container: self.id.clone(),
                exec: process.exec.clone(),
            });
        }
        execs.insert(process.exec.clone(), process);
        Ok(())
    }

    /// Forgets an exec.
    pub fn remove_exec(&self, exec: &str) {
        lock(&self.execs).remove(exec);
    }

    /// Ends what stands for it on the host: its mounts can go then.
    pub fn leave_host(&self) {
        lock(&self.on_host).take();
    }

    /// How the agent knows it.
    pub fn agent_id(&self) -> agent::ContainerId {
        agent::ContainerId {
            container_id: self.id.clone(),
            ..Default::default()
        }
    }
}

/// Locks what is whole after each statement, also of a thread that has panicked.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_ends_once() {
        let process = Process::new("c1", "", Wanted::default(), Vec::new());
        let waiter = tokio::spawn({
            let process = process.clone();
            async move { process.ended().await }
        });
        tokio::task::yield_now().await;
        let exit = Exit {
            status: 3,
            at_ns: 1_500_000_000,
        };
        assert!(process.advance(Phase::Running));
        assert!(process.advance(Phase::Stopped(exit)));
        assert!(
            !process.advance(Phase::Stopped(Exit::now(KILLED))),
            "the first exit stands"
        );
        assert!(!process.advance(Phase::Running));
        assert_eq!(waiter.await.unwrap(), exit);
        let stamp = exit.timestamp();
        assert_eq!((stamp.seconds, stamp.nanos), (1, 500_000_000));
    }

    #[test]
    fn execs_are_found_by_id_and_not_doubled() {
        let init = Process::new("c1", "", Wanted::default(), Vec::new());
        let state = hooks::State {
            oci_version: String::new(),
            id: "c1".into(),
            status: "creating",
            pid: None,
            bundle: PathBuf::new(),
            annotations: Default::default(),
        };
        let hooks = Hooks::default();
        let container = Container::new("c1", PathBuf::new(), init, hooks, state, OnHost::Vmm(7));
        let exec = Process::new("c1", "e1", Wanted::default(), Vec::new());
        container.add_exec(exec.clone()).unwrap();
        assert!(matches!(
            container.add_exec(exec),
            Err(Error::ExecExists { .. })
        ));
        assert_eq!(container.process("e1").unwrap().event_id(), "e1");
        assert_eq!(container.process("").unwrap().event_id(), "c1");
        container.remove_exec("e1");
        assert!(matches!(container.process("e1"), Err(Error::NoExec { .. })));
    }
}
