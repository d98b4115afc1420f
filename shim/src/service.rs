//! What containerd asks of a pod's containers, in plain types: [`crate::task`] translates.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::protobuf::MessageField;
use oci_spec::runtime::Hooks;
use sepal_protocol::agent::{self as messages, ExecProcessRequest, SignalProcessRequest};

use crate::container::{Container, Exit, KILLED, Phase, Process, lock};
use crate::error::{Error, Result};
use crate::faults;
use crate::hooks;
use crate::pod::Pod;
use crate::stdio::{Streams, Wanted};
use crate::up::Up;

/// How long a VM's death may take to be noticed when the agent's connection has broken.
const DEATH: Duration = Duration::from_secs(3);
/// How often the guest may tell of an event, and containerd is told that a container had no memory: it
/// takes the events of all pods one after the other, and writes each of these to its disk.
const EVENT_PAUSE: Duration = Duration::from_millis(100);
const OOM_PAUSE: Duration = Duration::from_secs(1);
/// How long a process may live on that was sent SIGKILL, in times that a guest may take to boot: 90 s where
/// nothing else is configured, and so longer than a VM may be stopped.
const KILL_PATIENCE: u32 = 3;

impl Pod {
    /// The container of this id.
    ///
    /// # Errors
    /// There is none.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        let found = lock(&self.containers).get(id).cloned();
        found.ok_or_else(|| Error::NoContainer { id: id.into() })
    }

    /// Waits for what the agent answers; when the VM has died, that is the error.
    pub(crate) async fn call<T>(
        &self,
        up: &Up,
        call: impl Future<Output = Result<T, crate::agent::Error>>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            answer = call => match answer {
                Ok(answer) => Ok(answer),
                Err(e) if e.code().is_some() => Err(e.into()),
                // The connection has broken: most likely because the VM has.
                Err(e) => match up.vm.ended_within(DEATH).await {
                    Some(reason) => Err(Error::VmGone { reason: reason.to_string() }),
                    None => {
                        up.doubt.notify_one();
                        Err(e.into())
                    }
                },
            },
            reason = up.vm.ended() => Err(Error::VmGone { reason: reason.to_string() }),
        }
    }

    /// Lives as long as a process does, and tells its end.
    pub(crate) async fn watch(
        self: Arc<Self>,
        up: Arc<Up>,
        container: Arc<Container>,
        process: Arc<Process>,
    ) {
        let id = process.id();
        let (status, handed) = match self.call(&up, up.agent.wait_process(&id)).await {
            Ok(exit) => {
                if exit.oom_killed && !container.oom_told.load(Ordering::Relaxed) {
                    // The event is under way; it must be known before the exit is.
                    container.oom_ahead.fetch_add(1, Ordering::Relaxed);
                    self.publish_oom(&container);
                }
                let handed = [exit.stdout_bytes, exit.stderr_bytes];
                (exit.status.min(255), Some(handed))
            }
            Err(e) => {
                if up.vm.gone().is_none() {
                    tracing::error!(container = %id.container_id, exec = %id.exec_id,
                        "cannot wait for the process, ending the pod: {e}");
                    // A guest that no longer answers for its processes is as good as dead.
                    let why = format!("its agent does not tell how a process ends: {e}");
                    up.vm.kill(&why).await;
                }
                (KILLED, None)
            }
        };
        process.note_reported();
        faults::at("exit");
        if let Some(streams) = process.streams() {
            streams.finish(handed).await;
        }
        faults::at("exit: streams");
        let order = process.order.lock().await;
        self.tell_end(&container, &process, Exit::now(status));
        drop(order);
    }

    /// Notes and publishes the end of a process, which happens once. Answers with how it has ended: as is
    /// said here, or as was said before. Called with its `order` held.
    fn tell_end(&self, container: &Container, process: &Process, exit: Exit) -> Exit {
        if process.advance(Phase::Stopped(exit)) {
            self.events.publish(TaskExit {
                container_id: process.container.clone(),
                id: process.event_id(),
                pid: container.pid,
                exit_status: exit.status,
                exited_at: exit.timestamp(),
                ..Default::default()
            });
            faults::at("exit: told");
        }
        match process.phase() {
            Phase::Stopped(exit) => exit,
            _ => exit,
        }
    }

    /// Publishes what happens in the guest.
    pub(crate) async fn hear_events(self: Arc<Self>, up: Arc<Up>) {
        let empty = messages::Empty::default();
        let mut pace = tokio::time::interval(EVENT_PAUSE);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            pace.tick().await;
            let event = match self.call(&up, up.agent.next_event(&empty)).await {
                Ok(event) => event,
                Err(Error::VmGone { .. }) => return,
                Err(e) => {
                    tracing::warn!("no events from the guest: {e}");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
            };
            let Some(messages::event::Kind::Oom(id)) = event.kind else {
                continue;
            };
            let Ok(container) = self.container(&id) else {
                continue;
            };
            container.oom_told.store(true, Ordering::Relaxed);
            let ahead =
                container
                    .oom_ahead
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |ahead| {
                        ahead.checked_sub(1)
                    });
            if ahead.is_err() {
                self.publish_oom(&container);
            }
        }
    }

    /// Tells of it, unless that was done a moment ago.
    fn publish_oom(&self, container: &Container) {
        {
            let (now, mut last) = (Instant::now(), lock(&container.oom_at));
            if last.is_some_and(|last| now.duration_since(last) < OOM_PAUSE) {
                return;
            }
            *last = Some(now);
        }
        let event = TaskOOM {
            container_id: container.id.clone(),
            ..Default::default()
        };
        self.events.publish(event);
    }

    /// Starts init, or an exec.
    ///
    /// # Errors
    /// It has been started before, or the guest cannot start it.
    pub async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let process = self.container(id)?.process(exec)?;
        let (order, container) = self.undeleted(&process).await?;
        let state = match process.phase() {
            Phase::Created if process.is_condemned() => Some("being deleted"),
            Phase::Created => None,
            phase => Some(phase.name()),
        };
        if let Some(state) = state {
            return Err(Error::WrongState {
                action: "start",
                state,
            });
        }
        faults::at("run");
        let up = self.up().await?;
        let pid = container.pid;
        if exec.is_empty() {
            up.connect_network().await?;
            faults::at("run: network");
            self.call(&up, up.agent.start_process(&process.id()))
                .await?;
            faults::at("run: started");
            process.advance(Phase::Running);
            let container_id = id.to_string();
            self.events.publish(TaskStart {
                container_id,
                pid,
                ..Default::default()
            });
            faults::at("run: told");
            drop(order);
            self.timeline.note("process-started");
            self.tell_timeline();
            let hooks = container.hooks.poststart().as_deref().unwrap_or_default();
            let state = hooks::State {
                status: "running",
                ..container.hook_state.clone()
            };
            if let Err(e) = hooks::run("poststart", hooks, &state).await {
                tracing::warn!("{e}");
            }
            return Ok(pid);
        }
        if container.init.phase() != Phase::Running {
            return Err(Error::WrongState {
                action: "exec in",
                state: container.init.phase().name(),
            });
        }
        let namespace = &self.identity.namespace;
        let wanted = Wanted {
            size: *lock(&process.size),
            ..process.wanted.clone()
        };
        let (streams, stdio) = Streams::open(&wanted, &up.agent, namespace, id).await?;
        faults::at("exec: streams");
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process: process.spec.clone(),
            stdio: MessageField::some(stdio),
            ..Default::default()
        };
        // Before the process: CloseIO may come while it is being started.
        process.set_streams(streams);
        let started = match self.call(&up, up.agent.exec_process(&request)).await {
            Ok(_) => {
                faults::at("exec: made");
                self.call(&up, up.agent.start_process(&process.id())).await
            }
            Err(e) => Err(e),
        };
        faults::at("exec: started");
        if let Err(e) = started {
            process.close_streams().await;
            // It never ran: deleting it must not wait for an end.
            process.advance(Phase::Stopped(Exit::now(KILLED)));
            return Err(e);
        }
        if let Some(streams) = process.streams() {
            streams.feed();
        }
        process.advance(Phase::Running);
        self.events.publish(TaskExecStarted {
            container_id: id.into(),
            exec_id: exec.into(),
            pid,
            ..Default::default()
        });
        drop(order);
        tokio::spawn(self.clone().watch(up, container, process));
        Ok(pid)
    }

    /// Adds an exec, to be started later.
    ///
    /// # Errors
    /// The container does not run, or has an exec of this id.
    pub fn exec(&self, id: &str, exec: &str, wanted: Wanted, spec: Vec<u8>) -> Result<()> {
        let container = self.container(id)?;
        if container.paused.load(Ordering::Relaxed) {
            return Err(Error::WrongState {
                action: "exec in",
                state: "paused",
            });
        }
        match container.init.phase() {
            Phase::Running => {}
            phase => {
                return Err(Error::WrongState {
                    action: "exec in",
                    state: phase.name(),
                });
            }
        }
        container.add_exec(Process::new(id, exec, wanted, spec))?;
        faults::at("exec");
        self.events.publish(TaskExecAdded {
            container_id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        });
        Ok(())
    }

    /// Sends a signal to a process, or to all of the container.
    ///
    /// # Errors
    /// It has ended, or was never started.
    pub async fn kill(
        self: &Arc<Self>,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<()> {
        let container = self.container(id)?;
        let process = container.process(exec)?;
        match process.phase() {
            Phase::Stopped(_) if !all => return Err(Error::Finished),
            Phase::Created if !exec.is_empty() => {
                return Err(Error::WrongState {
                    action: "kill",
                    state: "created",
                });
            }
            _ => {}
        }
        let up = match self.up().await {
            Err(Error::VmGone { .. }) => return Err(Error::Finished),
            other => other?,
        };
        faults::at("kill");
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        if signal == libc::SIGKILL as u32 && process.doom() {
            tokio::spawn(see_killed(up.clone(), process.clone()));
        }
        let sent = self.call(&up, up.agent.signal_process(&request)).await;
        faults::at("kill: sent");
        match sent {
            Ok(_) => Ok(()),
            Err(Error::VmGone { .. }) => Err(Error::Finished),
            Err(Error::Agent(e)) if e.code() == Some(ttrpc::Code::NOT_FOUND) => {
                Err(Error::Finished)
            }
            Err(_) if matches!(process.phase(), Phase::Stopped(_)) => Err(Error::Finished),
            Err(e) => Err(e),
        }
    }

    /// Removes an ended process; with the pod's last init, the pod.
    ///
    /// # Errors
    /// It runs.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<(u32, Exit)> {
        let process = self.container(id)?.process(exec)?;
        faults::at("delete");
        if !exec.is_empty() {
            return self.delete_exec(&process).await;
        }
        // A start that is under way comes to its end first, and so does another deletion.
        let (mut order, container) = self.undeleted(&process).await?;
        let pid = container.pid;
        let exit = match deletable(&process)? {
            Some(exit) => exit,
            None => {
                process.condemn();
                // Whoever watches it tells its end.
                drop(order);
                self.end_unstarted(&process).await;
                (order, _) = self.undeleted(&process).await?;
                // Unless the guest has not ended it.
                self.tell_end(&container, &process, Exit::now(KILLED))
            }
        };
        process.close_streams().await;
        container.leave_host();
        faults::at("delete: left the host");
        let last = !self.spec.bare && lock(&self.containers).len() == 1;
        if last {
            // The guest goes as a whole: it need not take its container apart first.
            self.remove().await;
        } else {
            if let Ok(up) = self.up().await {
                if let Err(e) = self.call(&up, up.agent.delete_process(&process.id())).await {
                    tracing::warn!(container = id, "the guest cannot delete it: {e}");
                }
                self.disks.release(&up.vm, id).await;
            }
            faults::at("delete: in the guest");
            let (share, of) = (self.share.clone(), id.to_string());
            let _ = tokio::task::spawn_blocking(move || share.remove(&of)).await;
            faults::at("delete: share");
            self.note(|record| record.containers.retain(|c| c != id));
            let mut extent = self.extent.lock().await;
            extent.ledger.forget(id);
            extent.places.forget(&container.account);
        }
        run_poststop(&container.hooks, &container.hook_state).await;
        lock(&self.containers).remove(id);
        self.events.publish(TaskDelete {
            container_id: id.into(),
            pid,
            exit_status: exit.status,
            exited_at: exit.timestamp(),
            ..Default::default()
        });
        faults::at("delete: told");
        drop(order);
        Ok((pid, exit))
    }

    async fn delete_exec(&self, process: &Arc<Process>) -> Result<(u32, Exit)> {
        let (_order, container) = self.undeleted(process).await?;
        // Asked for, never started.
        let exit = deletable(process)?.unwrap_or_else(|| Exit::now(0));
        process.close_streams().await;
        if let Ok(up) = self.up().await {
            // It may never have come to the guest.
            let _ = self.call(&up, up.agent.delete_process(&process.id())).await;
        }
        container.remove_exec(&process.exec);
        Ok((container.pid, exit))
    }

    /// Waits until nobody starts, ends or deletes the process.
    ///
    /// # Errors
    /// It has been deleted meanwhile.
    async fn undeleted<'a>(
        &self,
        process: &'a Arc<Process>,
    ) -> Result<(tokio::sync::MutexGuard<'a, ()>, Arc<Container>)> {
        let order = process.order.lock().await;
        let container = self.container(&process.container)?;
        // Another one may have its name by now.
        if Arc::ptr_eq(&container.process(&process.exec)?, process) {
            Ok((order, container))
        } else {
            Err(Error::Finished)
        }
    }

    /// Has the guest end an init that was never started, and waits for that, though not for ever.
    async fn end_unstarted(&self, process: &Process) {
        let Ok(up) = self.up().await else { return };
        let request = SignalProcessRequest {
            container_id: process.container.clone(),
            signal: libc::SIGKILL as u32,
            ..Default::default()
        };
        // It may have ended before; then its end is about to be told.
        if let Err(e) = self.call(&up, up.agent.signal_process(&request)).await {
            tracing::debug!(container = process.container, "ending it: {e}");
        }
        if tokio::time::timeout(DEATH, process.ended()).await.is_err() {
            tracing::warn!(container = process.container, "the guest does not end it");
        }
    }

    /// Freezes or thaws a container.
    ///
    /// # Errors
    /// It does not run, or is in that state already.
    pub async fn set_paused(&self, id: &str, pause: bool) -> Result<()> {
        let init = self.container(id)?.process("")?;
        let action = if pause { "pause" } else { "resume" };
        let (_order, container) = self.undeleted(&init).await?;
        let phase = container.init.phase();
        if phase != Phase::Running {
            return Err(Error::WrongState {
                action,
                state: phase.name(),
            });
        }
        if container.paused.load(Ordering::Relaxed) == pause {
            let state = if pause { "paused" } else { "running" };
            return Err(Error::WrongState { action, state });
        }
        let up = self.up().await?;
        let container_id = id.to_string();
        if pause {
            self.call(&up, up.agent.pause_container(&container.agent_id()))
                .await?;
            container.paused.store(true, Ordering::Relaxed);
            self.events.publish(TaskPaused {
                container_id,
                ..Default::default()
            });
        } else {
            self.call(&up, up.agent.resume_container(&container.agent_id()))
                .await?;
            container.paused.store(false, Ordering::Relaxed);
            self.events.publish(TaskResumed {
                container_id,
                ..Default::default()
            });
        }
        Ok(())
    }

    /// What a container uses.
    ///
    /// # Errors
    /// It is gone.
    pub async fn stats(&self, id: &str) -> Result<messages::Stats> {
        let container = self.container(id)?;
        let up = self.up().await?;
        self.call(&up, up.agent.container_stats(&container.agent_id()))
            .await
    }

    /// What the guest as a whole uses.
    ///
    /// # Errors
    /// It is gone.
    pub async fn stats_of_guest(&self) -> Result<messages::Stats> {
        let up = self.up().await?;
        let whole = messages::ContainerId::default();
        self.call(&up, up.agent.container_stats(&whole)).await
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// It has none, or has ended.
    pub async fn resize(&self, id: &str, exec: &str, rows: u32, columns: u32) -> Result<()> {
        let process = self.container(id)?.process(exec)?;
        match process.phase() {
            Phase::Stopped(_) => {
                return Err(Error::WrongState {
                    action: "resize",
                    state: "stopped",
                });
            }
            // Clients set the size as soon as they can; an exec takes it once it runs.
            Phase::Created if !exec.is_empty() => {
                *lock(&process.size) = Some((rows, columns));
                return Ok(());
            }
            _ => {}
        }
        let up = self.up().await?;
        let request = messages::ResizeTerminalRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            rows,
            columns,
            ..Default::default()
        };
        self.call(&up, up.agent.resize_terminal(&request))
            .await
            .map(|_| ())
    }
}

/// Sees to it that a process which was sent SIGKILL ends. Only the guest can end it: one that does not, or
/// does not say so, is ended as a whole, for otherwise its pod could not be removed.
async fn see_killed(up: Arc<Up>, process: Arc<Process>) {
    let limit = up.agent.patience() * KILL_PATIENCE;
    if tokio::time::timeout(limit, process.reported())
        .await
        .is_err()
    {
        let seconds = limit.as_secs();
        let why = format!("the guest has not ended a killed process within {seconds} s");
        tracing::error!(
            container = process.container,
            exec = process.exec,
            "{why}, ending the pod"
        );
        up.vm.kill(&why).await;
    }
}

/// How a process has ended that may be deleted; none: it was never started.
fn deletable(process: &Process) -> Result<Option<Exit>> {
    match process.phase() {
        Phase::Stopped(exit) => Ok(Some(exit)),
        Phase::Created => Ok(None),
        phase => Err(Error::WrongState {
            action: "delete",
            state: phase.name(),
        }),
    }
}

pub(crate) async fn run_poststop(hooks: &Hooks, state: &hooks::State) {
    let state = hooks::State {
        status: "stopped",
        pid: None,
        ..state.clone()
    };
    let hooks = hooks.poststop().as_deref().unwrap_or_default();
    if let Err(e) = hooks::run("poststop", hooks, &state).await {
        tracing::warn!("{e}");
    }
}
