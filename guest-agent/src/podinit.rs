//! The first process of the pod's shared PID namespace, where no container lives as long as the pod.
//!
//! With a pause container that is the pause program: the namespace is there before the first container
//! and after the last, and orphans of all containers find a parent. Without one the agent forks this
//! process. It has nothing that a container which sees it could want: no files, an empty root, no
//! capabilities; and signals from within the namespace do not reach it (pid_namespaces(7)).

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::waitpid;
use sepal_protocol::paths::guest;
use tokio::sync::oneshot;

use crate::error::{Context, Result};
use crate::process::Process;
use crate::reaper::{Exit, Reaper};
use crate::sys;
use crate::users::Users;

/// The pod's shared PID namespace. It lives as long as its first process.
#[derive(Debug)]
pub enum SharedPid {
    /// The init of the container that made it.
    Container {
        /// The namespace.
        namespace: OwnedFd,
        /// Its first process.
        init: Arc<Process>,
    },
    /// A process of the agent's.
    Pod(PodInit),
}

impl SharedPid {
    /// The namespace, as long as it can be joined.
    pub fn live(&mut self) -> Option<&OwnedFd> {
        match self {
            Self::Container { namespace, init } => init.ended().is_none().then_some(namespace),
            Self::Pod(init) => init.lives().then_some(&init.namespace),
        }
    }
}

/// The process, and the namespace that it holds.
#[derive(Debug)]
pub struct PodInit {
    /// The namespace.
    pub namespace: OwnedFd,
    exit: oneshot::Receiver<Exit>,
}

impl PodInit {
    /// Makes the namespace, which belongs to the pod's users where it has some.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn start(reaper: &Arc<Reaper>, users: Option<&Users>) -> Result<Self> {
        let what = || "cannot make the pod's PID namespace".to_owned();
        fs::create_dir_all(guest::VOID).context(what)?;
        let pid = match users {
            None => sys::fork_pid_namespace(&[], live),
            Some(users) => users.fork_pid_namespace(reaper, live),
        };
        let pid = pid.context(what)?;
        let exit = reaper.watch(pid);
        let namespace = File::open(format!("/proc/{pid}/ns/pid")).context(what)?;
        Ok(Self {
            namespace: namespace.into(),
            exit,
        })
    }

    /// Whether the namespace can still be joined.
    pub fn lives(&mut self) -> bool {
        matches!(
            self.exit.try_recv(),
            Err(oneshot::error::TryRecvError::Empty)
        )
    }
}

/// What the process does: it collects the ended until the pod ends.
fn live() -> i32 {
    // Blocked from here on, so that none is lost between looking and waiting.
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    if let Err(error) = children.thread_block() {
        return error as i32;
    }
    if let Err(error) = retire() {
        tracing::warn!(%error, "the pod's first process keeps what it does not need");
    }
    loop {
        // Whatever else it says, something was collected; of a death by a real-time signal nix tells
        // as an error.
        if waitpid(None, None) == Err(Errno::ECHILD) {
            // Nothing to collect: sleeps until there may be.
            let _ = children.wait();
        }
    }
}

/// Gives up all that this process does not need.
fn retire() -> std::io::Result<()> {
    nix::sys::prctl::set_name(c"sepal-pod")?;
    // Nobody without the right to trace anything may look at it, capabilities(7).
    nix::sys::prctl::set_dumpable(false)?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    drop(null);
    nix::unistd::chdir(guest::VOID)?;
    nix::unistd::chroot(".")?;
    sys::drop_capabilities()
}
