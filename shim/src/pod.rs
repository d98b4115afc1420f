//! A pod: its VM's life from the shim's start to the last trace's removal, in this file from top to
//! bottom. What containerd asks of containers in between is in [`crate::service`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs::DirBuilder;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use oci_spec::runtime::Hooks;
use sepal_protocol::agent::{self as messages, SetUpPodRequest};
use sepal_protocol::config::Config;
use sepal_protocol::paths::pod;
use sepal_protocol::ports;
use sepal_protocol::ready::AgentReady;
use sepal_protocol::state::{PodState, ProcessRef};
use tokio::net::UnixListener;
use tokio::sync::{Notify, watch};

use crate::agent::{self, Agent};
use crate::cgroup::Cgroup;
use crate::cleanup::{self, Turn};
use crate::container::{Container, Exit, KILLED, lock};
use crate::disks::Disks;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::faults;
use crate::hooks;
use crate::mirror::Mirrors;
use crate::network;
use crate::podspec::PodSpec;
use crate::resize::Extent;
use crate::rootfs::Share;
use crate::spec;
use crate::sys::Netns;
use crate::timeline::Timeline;
use crate::up::{self, Up};
use crate::users::Users;
use crate::vm::{self, Vm};

/// Longest wait for the guest to power off before it is killed.
const POWER_OFF: Duration = Duration::from_secs(5);

/// Who the pod is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's or the single container's id.
    pub id: String,
    /// containerd's directory for it.
    pub bundle: PathBuf,
}

/// What it takes to begin a pod, but for what the pod shall be.
pub struct Beginning {
    /// Who the pod will be.
    pub identity: Identity,
    /// Where pods' directories are.
    pub state_root: PathBuf,
    /// What the node's administrator wants.
    pub config: Config,
    /// Events to containerd.
    pub events: Events,
    /// Where the time goes.
    pub timeline: Timeline,
}

impl Beginning {
    /// Name of the pod's directory.
    pub fn name(&self) -> String {
        PodState::pod_id(&self.identity.namespace, &self.identity.id)
    }
}

/// The pod's network namespace, and the interfaces in it on the host's side and the guest's.
type Found = (OwnedFd, Vec<network::Nic>, messages::Network);

type Outcome = std::result::Result<Arc<Up>, Arc<Error>>;

/// The one pod of this process.
pub struct Pod {
    /// Who it is.
    pub identity: Identity,
    /// Name of its directory.
    pub name: String,
    /// Its directory below /run/sepal.
    pub directory: PathBuf,
    /// What the guest sees of the host.
    pub share: Share,
    /// Block devices of the host that the guest has.
    pub disks: Disks,
    /// What the guest has copies of.
    pub mirrors: Mirrors,
    /// Events to containerd.
    pub events: Events,
    /// Where the time went.
    pub timeline: Timeline,
    /// Its containers by their ids.
    pub containers: Mutex<BTreeMap<String, Arc<Container>>>,
    /// The ids of those that are being made.
    pub creating: Mutex<BTreeSet<String>>,
    /// What the node's administrator wants.
    pub config: Config,
    /// What the pod shall be.
    pub spec: PodSpec,
    /// When it was begun.
    pub created_at: SystemTime,
    /// How the VM has ended, once it has.
    ended: watch::Sender<Option<Exit>>,
    /// The guest did not end by itself.
    killed: AtomicBool,
    cgroup: OnceLock<Cgroup>,
    vm: OnceLock<Arc<Vm>>,
    /// The agent as soon as it answers, while the guest is still being set up.
    agent: watch::Sender<Option<Agent>>,
    up: watch::Sender<Option<Outcome>>,
    record: Mutex<PodState>,
    /// How large the VM is at present, and why. Held while that changes.
    pub(crate) extent: tokio::sync::Mutex<Extent>,
    removing: AtomicBool,
    removed: tokio::sync::Mutex<bool>,
}

impl Pod {
    /// Makes the pod's directory and begins to raise its VM, without waiting for anything.
    ///
    /// # Errors
    /// The directory belongs to a living pod, or cannot be made.
    pub async fn begin(beginning: Beginning, spec: PodSpec) -> Result<Arc<Self>> {
        let name = beginning.name();
        let Beginning {
            identity,
            state_root,
            config,
            events,
            timeline,
        } = beginning;
        let directory = state_root.join(&name);
        if let Some(turn) = Turn::take(&directory).await {
            let state = PodState::load(&directory).ok();
            if state.as_ref().is_some_and(|state| state.shim.alive()) {
                return Err(Error::ContainerExists { id: identity.id });
            }
            if let Some(what) = turn.remove(state).await.pop() {
                return Err(Error::Leftover { what });
            }
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(directory.join(pod::VM))
            .map_err(Error::io("make the pod's directory", &directory))?;
        let created_at = SystemTime::now();
        let since_epoch = created_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let me = std::process::id();
        let record = PodState {
            namespace: identity.namespace.clone(),
            id: identity.id.clone(),
            bundle: identity.bundle.clone(),
            created_at: since_epoch.as_secs(),
            shim: ProcessRef::of(me).unwrap_or(ProcessRef {
                pid: me,
                start_time: 0,
            }),
            vmm: None,
            fs: None,
            vcpus: spec.size.cpus.boot,
            memory: spec.size.memory,
            cgroups: spec.cgroup.directories.clone(),
            containers: Vec::new(),
        };
        faults::at("pod: directory");
        // Before anything exists that would have to be removed.
        record
            .save(&directory)
            .map_err(Error::io("write the state into", &directory))?;
        faults::at("pod: recorded");
        let share = match Share::create(&directory) {
            Ok(share) => share,
            Err(e) => {
                cleanup::pod(&directory).await;
                return Err(e.into());
            }
        };
        faults::at("pod: share");
        let extent = tokio::sync::Mutex::new(Extent::of(&spec));
        let pod = Arc::new(Self {
            extent,
            identity,
            name,
            directory,
            share,
            disks: Disks::default(),
            mirrors: Mirrors::new(spec.size.memory),
            events,
            timeline,
            containers: Mutex::default(),
            creating: Mutex::default(),
            config,
            spec,
            created_at,
            ended: watch::Sender::new(None),
            killed: AtomicBool::new(false),
            cgroup: OnceLock::new(),
            vm: OnceLock::new(),
            agent: watch::Sender::new(None),
            up: watch::Sender::new(None),
            record: Mutex::new(record),
            removing: AtomicBool::new(false),
            removed: tokio::sync::Mutex::new(false),
        });
        tokio::spawn(pod.clone().raise());
        Ok(pod)
    }

    /// Changes what clean-up will find.
    ///
    /// # Errors
    /// It cannot be written: what is about to be made would be found by nobody.
    pub fn record(&self, change: impl FnOnce(&mut PodState)) -> Result<()> {
        let mut record = lock(&self.record);
        change(&mut record);
        if self.is_removing() {
            return Ok(());
        }
        record
            .save(&self.directory)
            .map_err(Error::io("write the state into", &self.directory))
    }

    /// Likewise, of what has been removed or is only told.
    pub fn note(&self, change: impl FnOnce(&mut PodState)) {
        if let Err(e) = self.record(change) {
            tracing::warn!("{e}");
        }
    }

    async fn raise(self: Arc<Self>) {
        let outcome = match self.try_raise().await {
            Ok(up) => Ok(up),
            Err(error) => {
                tracing::error!("the pod cannot start: {error}");
                if let Some(vm) = self.vm.get() {
                    vm.kill("the pod cannot start").await;
                }
                Err(Arc::new(error))
            }
        };
        let up = outcome.as_ref().ok().cloned();
        self.up.send_replace(Some(outcome));
        if let Some(up) = up {
            tokio::spawn(self.clone().hear_events(up.clone()));
            let _loopback = up.open_loopback();
            let reason = tokio::select! {
                reason = up.vm.ended() => reason,
                silent = up.keep_in_touch() => {
                    // Nobody can stop what runs there any more but by this.
                    let why = format!("the guest's agent has not answered for {} s", silent.as_secs());
                    up.vm.kill(&why).await;
                    up.vm.ended().await
                }
                never = up.mind_files() => match never {},
                never = self.mirrors.follow(&up.agent) => match never {},
            };
            if !self.is_removing() {
                tracing::error!("the virtual machine has ended: {reason}");
            }
            // Lets go of what belongs to the VM, the network namespace above all: its owner may
            // remove it from now on.
            self.mirrors.clear();
            let reason = reason.to_string();
            let gone = Err(Arc::new(Error::VmGone { reason }));
            self.up.send_replace(Some(gone));
        }
        let asked_to = self.is_removing() && !self.killed.load(Ordering::Relaxed);
        let status = if asked_to { 0 } else { KILLED };
        self.ended.send_replace(Some(Exit::now(status)));
    }

    async fn try_raise(&self) -> Result<Arc<Up>> {
        let (config, spec) = (&self.config, &self.spec);
        let joined = match &spec.network {
            spec::Network::New => None,
            spec::Network::Join(path) => Some(open_netns(path)?),
        };
        let netns = joined
            .as_ref()
            .map_or(Netns::New, |fd| Netns::Join(fd.as_fd()));
        let vm = Arc::new(Vm::spawn(
            config,
            &self.name,
            &self.directory,
            netns,
            spec.users.is_some(),
        )?);
        faults::at("pod: spawned");
        let _ = self.vm.set(vm.clone());
        self.timeline.note("vmm-spawned");
        self.record(|record| {
            record.vmm = ProcessRef::of(vm.vmm_pid);
            record.fs = ProcessRef::of(vm.fs_pid);
        })?;
        faults::at("pod: processes recorded");
        let cgroup = spec.cgroup.clone();
        let _ = self.cgroup.set(cgroup.clone());
        set_oom_score(&[vm.vmm_pid, vm.fs_pid], spec.oom_score);
        let pids = [std::process::id(), vm.vmm_pid, vm.fs_pid];
        let held = tokio::task::spawn_blocking(move || {
            faults::at("pod: cgroup");
            cgroup.hold(&pids)
        });
        let found = self.look_at_network(&vm, joined).await;
        // In any case before the cgroup might be removed again, and before there is memory to be counted.
        held.await
            .map_err(|e| Error::io("make the cgroup of", &self.directory)(e.into()))??;
        self.limit_huge_pages(0)?;
        Ok(Arc::new(self.boot(vm, found?).await?))
    }

    /// Makes a socket that the guest's calls of a port come to.
    fn listen_for_guest(&self, port: u32) -> Result<UnixListener> {
        let path = agent::host_socket(&self.directory, port);
        let listener =
            UnixListener::bind(&path).map_err(Error::io("listen in", &self.directory))?;
        // Who connects must be its owner.
        let user = Some(vm::user());
        chown(&path, user, user).map_err(Error::io("give to the VMM", &path))?;
        Ok(listener)
    }

    /// Runs the hooks that make the pod's network, and looks at what is there.
    async fn look_at_network(&self, vm: &Vm, joined: Option<OwnedFd>) -> Result<Found> {
        let spec = &self.spec;
        faults::at("boot");
        let state = hooks::State {
            pid: Some(vm.vmm_pid),
            ..spec.hook_state.clone()
        };
        run_creation_hooks(&spec.hooks, &state).await?;
        let netns = match joined {
            Some(fd) => fd,
            None => open_netns(Path::new(&format!("/proc/{}/ns/net", vm.vmm_pid)))?,
        };
        let (nics, network) = up::scan_network(&netns).await?;
        self.timeline.note("network");
        faults::at("boot: network");
        Ok((netns, nics, network))
    }

    /// From the processes to a guest that serves.
    async fn boot(&self, vm: Arc<Vm>, (netns, nics, network): Found) -> Result<Up> {
        let (config, spec) = (&self.config, &self.spec);
        let connected = tokio::sync::Mutex::new(!nics.is_empty());
        let ready = self.listen_for_guest(ports::READY)?;
        let booted = vm.boot(config, &self.name, &spec.size, nics).await?;
        self.timeline.note("boot-answered");
        faults::at("boot: answered");
        for (stage, us) in booted.stages {
            self.timeline.note_at(&format!("vmm:{stage}"), us);
        }
        let limit = Duration::from_secs(config.agent_timeout_s);
        let announced = tokio::select! {
            announced = agent::ready(&ready, limit) => announced?,
            reason = vm.ended() => return Err(Error::VmGone { reason: reason.to_string() }),
        };
        self.timeline.note("agent-ready");
        faults::at("boot: agent ready");
        self.note_guest(&announced);
        let agent = Agent::connect(&self.directory.join(pod::VSOCK), limit).await?;
        self.agent.send_replace(Some(agent.clone()));
        faults::at("boot: agent connected");
        let request = set_up_request(&self.identity.id, spec, network);
        agent.set_up_pod(&request).await?;
        self.timeline.note("pod-set-up");
        faults::at("boot: set up");
        if spec.bare {
            // There will be no container's files in the place of the host's.
            let root = self.directory.join(pod::VOID);
            std::fs::create_dir(&root).map_err(Error::io("make", &root))?;
            vm.enter_root(&root).await?;
        }
        Ok(Up {
            vm,
            agent,
            netns,
            connected,
            role: spec.role.clone(),
            doubt: Notify::new(),
        })
    }

    fn note_guest(&self, announced: &AgentReady) {
        for stage in &announced.stages {
            let name: String = stage
                .name
                .chars()
                .filter(|c| c.is_ascii_graphic())
                .collect();
            self.timeline
                .note_at(&format!("guest:{name}"), stage.boottime_us);
        }
    }

    /// Waits until the guest serves.
    ///
    /// # Errors
    /// Why it does not, or no longer.
    pub async fn up(&self) -> Result<Arc<Up>> {
        let mut up = self.up.subscribe();
        let outcome = match up.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            Err(_) => None,
        };
        match outcome {
            Some(Ok(up)) => match up.vm.gone() {
                Some(reason) => Err(Error::VmGone {
                    reason: reason.to_string(),
                }),
                None => Ok(up),
            },
            Some(Err(error)) => match &*error {
                Error::VmGone { reason } => Err(Error::VmGone {
                    reason: reason.clone(),
                }),
                _ => Err(Error::Pod(error)),
            },
            None => Err(Error::Removing),
        }
    }

    /// Waits until the agent answers, which it does a little before the guest serves: enough for
    /// connections.
    ///
    /// # Errors
    /// As of [`Pod::up`].
    pub async fn agent(&self) -> Result<Agent> {
        let mut connected = self.agent.subscribe();
        tokio::select! {
            agent = connected.wait_for(Option::is_some) => match agent {
                Ok(agent) => agent.clone().ok_or(Error::Removing),
                Err(_) => Err(Error::Removing),
            },
            // Comes first only when the agent never does.
            up = self.up() => up.map(|up| up.agent.clone()),
        }
    }

    /// Whether the guest serves now.
    pub fn is_up(&self) -> bool {
        let up = self.up.borrow();
        !self.is_removing() && matches!(&*up, Some(Ok(up)) if up.vm.gone().is_none())
    }

    /// What clean-up would find.
    pub fn state(&self) -> PodState {
        lock(&self.record).clone()
    }

    /// The pid that stands for all processes of the pod: the VMM's, once it is there.
    pub fn pid(&self) -> u32 {
        self.vm.get().map_or(0, |vm| vm.vmm_pid)
    }

    /// Whether the pod is going, or gone.
    pub fn is_removing(&self) -> bool {
        self.removing.load(Ordering::Relaxed)
    }

    /// How the VM has ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.ended.borrow()
    }

    /// Waits until the VM has ended.
    pub async fn ended(&self) -> Exit {
        let mut ended = self.ended.subscribe();
        let exit = ended.wait_for(Option::is_some).await.map(|exit| *exit);
        // The sender lives in self.
        exit.ok().flatten().unwrap_or_else(|| Exit::now(KILLED))
    }

    /// Ends the VM and removes all that the pod has made. Again is no error.
    pub async fn remove(&self) {
        // A VM on its way up is not interrupted half-way: it would be forgotten.
        self.remove_within(None).await;
    }

    /// As [`Pod::remove`], and a guest that is not ready to end, or has not ended, after the limit is
    /// killed.
    pub async fn remove_within(&self, limit: Option<Duration>) {
        // Whoever comes second waits, and finds nothing to do.
        let mut removed = self.removed.lock().await;
        if *removed {
            return;
        }
        self.removing.store(true, Ordering::Relaxed);
        faults::at("remove");
        match limit {
            None => self.power_off().await,
            Some(limit) => {
                if tokio::time::timeout(limit, self.power_off()).await.is_err() {
                    tracing::warn!("the guest has not ended within {} s", limit.as_secs());
                    self.killed.store(true, Ordering::Relaxed);
                    self.kill_vm().await;
                }
            }
        }
        self.timeline.note("vm-ended");
        faults::at("remove: ended");
        lock(&self.containers).values().for_each(|c| c.leave_host());
        self.sweep().await;
        *removed = true;
    }

    /// Its cgroup on the host, once it has one.
    pub(crate) fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.get()
    }

    /// Removes what the pod has made, once its VM is gone.
    pub async fn sweep(&self) {
        let (directory, cgroup) = (self.directory.clone(), self.cgroup.get().cloned());
        let work = move || {
            Share::of(&directory).remove_all();
            faults::at("sweep: share");
            let cgroups = cgroup.unwrap_or_default().remove();
            faults::at("sweep: cgroup");
            let stays = match cgroups.first() {
                // It is in the state, which `gc` finds.
                Some(cgroup) => Some(format!("{} stays", cgroup.display())),
                None => cleanup::remove_directory(&directory),
            };
            if let Some(what) = stays {
                tracing::error!("not all of the pod could be removed: {what}");
            }
            faults::at("sweep: directory");
        };
        if let Err(e) = tokio::task::spawn_blocking(work).await {
            tracing::error!("clean-up has panicked: {e}");
        }
    }

    /// Ends the VM at once, also one that is on its way up.
    async fn kill_vm(&self) {
        const AGAIN: Duration = Duration::from_millis(50);
        let mut up = self.up.subscribe();
        loop {
            if let Some(vm) = self.vm.get() {
                vm.kill("the pod is removed").await;
            }
            // What raises the VM sees that it is gone, unless it had not spawned it yet.
            let raised = tokio::time::timeout(AGAIN, up.wait_for(Option::is_some)).await;
            if raised.is_ok() && self.vm.get().is_none_or(|vm| vm.gone().is_some()) {
                return;
            }
        }
    }

    /// Has the guest end once it is up, and sees to it that it does.
    async fn power_off(&self) {
        let up = self
            .up
            .subscribe()
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|o| o.clone());
        if let Some(Ok(up)) = up
            && up.vm.gone().is_none()
        {
            // It answers when its processes have ended and all is written back: what its kernel
            // does after that to power off is of no use to anyone.
            let asked = up.agent.shutdown(&messages::Empty::default()).await;
            faults::at("remove: powered off");
            if let Err(e) = &asked
                // A guest that powers off may take its answer with it.
                && up.vm.ended_within(POWER_OFF).await.is_none()
            {
                tracing::warn!("the guest does not power off and is killed: {e}");
                self.killed.store(true, Ordering::Relaxed);
            }
            up.vm.kill("the pod is removed").await;
        }
    }

    /// Once the first process of the pod runs: tells where the time went.
    pub fn tell_timeline(&self) {
        tracing::debug!("start in ms: {}", self.timeline.line());
        if let Err(e) = self.timeline.save(&self.directory) {
            tracing::warn!("cannot write the timeline: {e}");
        }
    }
}

/// Runs what has to run before a container's process exists.
///
/// # Errors
/// A hook has failed.
pub async fn run_creation_hooks(hooks: &Hooks, state: &hooks::State) -> Result<()> {
    #[allow(deprecated, reason = "prestart hooks are old, not gone")]
    let prestart = hooks.prestart().as_deref().unwrap_or_default();
    hooks::run("prestart", prestart, state).await?;
    hooks::run(
        "createRuntime",
        hooks.create_runtime().as_deref().unwrap_or_default(),
        state,
    )
    .await?;
    Ok(())
}

fn open_netns(path: &Path) -> Result<OwnedFd> {
    let file = std::fs::File::open(path).map_err(|source| network::Error::Namespace {
        path: path.into(),
        source,
    })?;
    Ok(file.into())
}

/// The pod's processes are as dear to the host as its container is to the orchestrator, and not as
/// containerd, whose score they would inherit.
fn set_oom_score(pids: &[u32], score: i32) {
    for pid in pids {
        if let Err(e) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
            tracing::debug!(pid, score, "cannot set the OOM score: {e}");
        }
    }
}

fn set_up_request(pod_id: &str, spec: &PodSpec, network: messages::Network) -> SetUpPodRequest {
    SetUpPodRequest {
        pod_id: pod_id.into(),
        hostname: spec.hostname.clone(),
        network: network::field(&network),
        clock: protobuf::MessageField::some(up::clock()),
        sysctls: spec.sysctls.clone(),
        shm_size: spec.shm_size,
        holds_pid_namespace: spec.bare,
        etc_files: spec.files.clone(),
        users: spec.users.as_ref().map(Users::message).unwrap_or_default(),
        ..Default::default()
    }
}
