//! What is there once a pod's guest serves, and what is done for it from then on.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sepal_protocol::agent as messages;
use tokio::sync::Notify;

use crate::agent::Agent;
use crate::annotations::Role;
use crate::error::Result;
use crate::forward::Forward;
use crate::network;
use crate::vm::Vm;

/// How often the guest is told the time. Crystals differ by some 20 ppm: 1 ms in 50 s.
const CLOCK_INTERVAL: Duration = Duration::from_secs(60);
/// How long the agent may leave everything unanswered, unless it may take longer even to boot. A VM that
/// is stopped for a minute lives on.
const SILENCE: Duration = Duration::from_secs(90);

/// What is there once the guest serves.
pub struct Up {
    /// The processes.
    pub vm: Arc<Vm>,
    /// The guest's agent.
    pub agent: Agent,
    /// The pod's network namespace on the host.
    pub(crate) netns: OwnedFd,
    /// Whether anything has been found in it.
    pub(crate) connected: tokio::sync::Mutex<bool>,
    /// Whether the pod is an orchestrator's.
    pub(crate) role: Role,
    /// A call has not been answered: the agent may be no more.
    pub(crate) doubt: Notify,
}

impl Up {
    /// Looks once more for a network that was not there when the VM booted: some clients (`ctr run
    /// --cni`) bring it between the creation of a task and its start.
    ///
    /// # Errors
    /// As of [`network::set_up`]; or the VM does not take an interface.
    pub async fn connect_network(&self) -> Result<()> {
        let mut connected = self.connected.lock().await;
        if *connected {
            return Ok(());
        }
        let (nics, network) = scan_network(&self.netns).await?;
        if nics.is_empty() {
            return Ok(());
        }
        for (number, nic) in nics.into_iter().enumerate() {
            self.vm.add_net(number, nic).await?;
        }
        self.agent.update_network(&network).await?;
        // A start that is tried again after one that failed must not run without it.
        *connected = true;
        Ok(())
    }

    /// Lets clients on the host reach what listens on the guest's loopback, in pods of an
    /// orchestrator: theirs is who dials it.
    pub(crate) fn open_loopback(&self) -> Option<Forward> {
        if self.role != Role::Sandbox {
            return None;
        }
        let forward = Forward::start(self.netns.as_fd(), self.agent.clone());
        forward
            .inspect_err(|e| {
                tracing::warn!("port-forward will not reach the pod (Linux 5.9 or later?): {e}");
            })
            .ok()
    }

    /// Has the guest let go of files when the file server's descriptors run out.
    pub(crate) async fn mind_files(&self) -> std::convert::Infallible {
        loop {
            if let Err(e) = self.vm.files_run_out().await {
                tracing::warn!("the file server's event cannot be waited for: {e}");
                return std::future::pending().await;
            }
            let asked = self.agent.forget_files(&messages::Empty::default()).await;
            if let Err(e) = asked {
                tracing::warn!("the guest does not let go of files: {e}");
            }
            // Its kernel needs a while for many; and nobody may keep us busy with this.
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Tells the guest the time now and then: its clock and the host's are different crystals to it,
    /// unless KVM offers a paravirtual one, and the VM may have been paused. Returns when the agent has
    /// fallen silent, and tells for how long it was listened for.
    pub(crate) async fn keep_in_touch(&self) -> Duration {
        let longest = SILENCE.max(self.agent.patience());
        let mut rounds = tokio::time::interval(CLOCK_INTERVAL);
        rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first is at once, and the pod has just been told.
        rounds.tick().await;
        loop {
            tokio::select! {
                _ = rounds.tick() => {}
                () = self.doubt.notified() => {}
            }
            let asked = Instant::now();
            while let Err(e) = self.agent.set_clock(&clock()).await {
                tracing::debug!("the guest was not told the time: {e}");
                if e.code().is_some() {
                    break;
                }
                if asked.elapsed() >= longest {
                    return longest;
                }
                // Where the connection has broken the answer is at once.
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// [`network::set_up`] on a thread that may block.
pub(crate) async fn scan_network(
    netns: &OwnedFd,
) -> Result<(Vec<network::Nic>, messages::Network)> {
    let failed = |source| network::Error::Io {
        what: "look at its namespace",
        source,
    };
    let netns = netns.try_clone().map_err(failed)?;
    let work = move || network::set_up(netns.as_fd());
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|e| failed(e.into()))??)
}

/// The host's time.
pub(crate) fn clock() -> messages::Clock {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    messages::Clock {
        realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        ..Default::default()
    }
}
