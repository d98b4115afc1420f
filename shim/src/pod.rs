//! A pod: its VM's life from the shim's start to the last trace's removal, in this file from top to
//! bottom. What containerd asks of containers in between is in [`crate::service`].

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use oci_spec::runtime::{Hooks, Process, Spec};
use sepal_protocol::agent::{self as messages, SetUpPodRequest};
use sepal_protocol::config::Config;
use sepal_protocol::paths::pod;
use sepal_protocol::ports;
use sepal_protocol::ready::AgentReady;
use sepal_protocol::state::{PodState, ProcessRef};
use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::agent::{self, Agent};
use crate::annotations::Role;
use crate::cgroup::Cgroup;
use crate::cleanup;
use crate::container::{Container, lock};
use crate::error::{Error, Result};
use crate::events::Events;
use crate::forward::Forward;
use crate::hooks;
use crate::network;
use crate::rootfs::Share;
use crate::size::Size;
use crate::spec;
use crate::sys::Netns;
use crate::timeline::Timeline;
use crate::vm::Vm;

/// Longest wait for the guest to power off before it is killed.
const POWER_OFF: Duration = Duration::from_secs(5);

/// How often the guest is told the time. Crystals differ by some 20 ppm: 1 ms in 50 s.
const CLOCK_INTERVAL: Duration = Duration::from_secs(60);

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

/// What is there once the guest serves.
pub struct Up {
    /// The processes.
    pub vm: Arc<Vm>,
    /// The guest's agent.
    pub agent: Agent,
    /// The pod's network namespace on the host.
    netns: OwnedFd,
    /// Whether anything has been found in it.
    connected: tokio::sync::Mutex<bool>,
    role: Role,
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
        *connected = true;
        for (number, nic) in nics.into_iter().enumerate() {
            self.vm.add_net(number, nic).await?;
        }
        self.agent.update_network(&network).await?;
        Ok(())
    }

    /// Lets clients on the host reach what listens on the guest's loopback, in pods of an
    /// orchestrator: theirs is who dials it.
    fn open_loopback(&self) -> Option<Forward> {
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
    async fn mind_files(&self) -> std::convert::Infallible {
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
    /// unless KVM offers a paravirtual one, and the VM may have been paused.
    async fn tell_time(&self) -> std::convert::Infallible {
        let mut rounds = tokio::time::interval(CLOCK_INTERVAL);
        rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The first is at once, and the pod has just been told.
        rounds.tick().await;
        loop {
            rounds.tick().await;
            if let Err(e) = self.agent.set_clock(&clock()).await {
                tracing::debug!("the guest was not told the time: {e}");
            }
        }
    }
}

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
    /// Events to containerd.
    pub events: Events,
    /// Where the time went.
    pub timeline: Timeline,
    /// Its containers by their ids.
    pub containers: Mutex<BTreeMap<String, Arc<Container>>>,
    /// What the node's administrator wants.
    pub config: Config,
    cgroup: OnceLock<Cgroup>,
    vm: OnceLock<Arc<Vm>>,
    /// The agent as soon as it answers, while the guest is still being set up.
    agent: watch::Sender<Option<Agent>>,
    up: watch::Sender<Option<Outcome>>,
    record: Mutex<PodState>,
    removing: AtomicBool,
    removed: tokio::sync::Mutex<bool>,
}

impl Pod {
    /// Makes the pod's directory and begins to raise its VM, without waiting for anything.
    ///
    /// # Errors
    /// The directory belongs to a living pod, or cannot be made.
    pub async fn begin(
        identity: Identity,
        state_root: &Path,
        config: Config,
        events: Events,
        timeline: Timeline,
    ) -> Result<Arc<Self>> {
        let name = PodState::pod_id(&identity.namespace, &identity.id);
        let directory = state_root.join(&name);
        if directory.exists() {
            if PodState::load(&directory).is_ok_and(|state| state.shim.alive()) {
                return Err(Error::ContainerExists { id: identity.id });
            }
            cleanup::pod(&directory).await;
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&directory)
            .map_err(Error::io("make the pod's directory", &directory))?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let me = std::process::id();
        let record = PodState {
            namespace: identity.namespace.clone(),
            id: identity.id.clone(),
            bundle: identity.bundle.clone(),
            created_at: now.as_secs(),
            shim: ProcessRef::of(me).unwrap_or(ProcessRef {
                pid: me,
                start_time: 0,
            }),
            vmm: None,
            fs: None,
            vcpus: 0,
            memory: 0,
            cgroups: Vec::new(),
            containers: Vec::new(),
        };
        // Before anything exists that would have to be removed.
        record
            .save(&directory)
            .map_err(Error::io("write the state into", &directory))?;
        let share = match Share::create(&directory) {
            Ok(share) => share,
            Err(e) => {
                cleanup::pod(&directory).await;
                return Err(e.into());
            }
        };
        let pod = Arc::new(Self {
            identity,
            name,
            directory,
            share,
            events,
            timeline,
            containers: Mutex::default(),
            config,
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
    pub fn record(&self, change: impl FnOnce(&mut PodState)) {
        let mut record = lock(&self.record);
        change(&mut record);
        if let Err(e) = record.save(&self.directory) {
            tracing::warn!("cannot write the pod's state: {e}");
        }
    }

    async fn raise(self: Arc<Self>) {
        let outcome = match self.try_raise().await {
            Ok(up) => Ok(up),
            Err(error) => {
                tracing::error!("the pod cannot start: {error}");
                if let Some(vm) = self.vm.get() {
                    vm.kill().await;
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
                never = up.tell_time() => match never {},
                never = up.mind_files() => match never {},
            };
            if !self.removing.load(Ordering::Relaxed) {
                tracing::error!("the virtual machine has ended: {reason}");
            }
        }
    }

    async fn try_raise(&self) -> Result<Arc<Up>> {
        let config = &self.config;
        let bundle = &self.identity.bundle;
        let spec = spec::load(bundle)?;
        let annotations = spec.annotations().clone().unwrap_or_default();
        let role = Role::of(&annotations);
        let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
        let size = Size::plan(&annotations, resources, config, host_cpus())?;
        let wanted_network = spec::network(&spec)?;
        let cgroup = Cgroup::plan(
            spec.linux()
                .as_ref()
                .and_then(|l| l.cgroups_path().as_deref()),
            &self.name,
        )?;
        self.record(|record| {
            record.cgroups.clone_from(&cgroup.directories);
            record.vcpus = size.cpus.boot;
            record.memory = size.memory;
        });
        let joined = match &wanted_network {
            spec::Network::New => None,
            spec::Network::Join(path) => Some(open_netns(path)?),
        };
        let netns = joined
            .as_ref()
            .map_or(Netns::New, |fd| Netns::Join(fd.as_fd()));
        let vm = Arc::new(Vm::spawn(config, &self.name, &self.directory, netns)?);
        let _ = self.vm.set(vm.clone());
        self.timeline.note("vmm-spawned");
        self.record(|record| {
            record.vmm = ProcessRef::of(vm.vmm_pid);
            record.fs = ProcessRef::of(vm.fs_pid);
        });
        let _ = self.cgroup.set(cgroup.clone());
        let oom_score = spec
            .process()
            .as_ref()
            .and_then(Process::oom_score_adj)
            .unwrap_or(0);
        set_oom_score(&[vm.vmm_pid, vm.fs_pid], oom_score);
        let pids = [std::process::id(), vm.vmm_pid, vm.fs_pid];
        let held = tokio::task::spawn_blocking(move || cgroup.hold(&pids));
        let booted = self.boot(vm.clone(), spec, &size, role, joined).await;
        // In any case before the cgroup might be removed again.
        held.await
            .map_err(|e| Error::io("make the cgroup of", &self.directory)(e.into()))??;
        Ok(Arc::new(booted?))
    }

    /// From the processes to a guest that serves.
    async fn boot(
        &self,
        vm: Arc<Vm>,
        mut spec: Spec,
        size: &Size,
        role: Role,
        joined: Option<OwnedFd>,
    ) -> Result<Up> {
        let config = &self.config;
        let ready = UnixListener::bind(agent::host_socket(&self.directory, ports::READY))
            .map_err(Error::io("listen in", &self.directory))?;
        let host_hooks = spec::take_host_hooks(&mut spec);
        let bundle = &self.identity.bundle;
        let state = self.hook_state(&spec, &self.identity.id, bundle, Some(vm.vmm_pid));
        run_creation_hooks(&host_hooks, &state).await?;
        let netns = match joined {
            Some(fd) => fd,
            None => open_netns(Path::new(&format!("/proc/{}/ns/net", vm.vmm_pid)))?,
        };
        let (nics, network) = scan_network(&netns).await?;
        let connected = tokio::sync::Mutex::new(!nics.is_empty());
        self.timeline.note("network");

        let booted = vm.boot(config, &self.name, size, nics).await?;
        self.timeline.note("boot-answered");
        for (stage, us) in booted.stages {
            self.timeline.note_at(&format!("vmm:{stage}"), us);
        }
        let limit = Duration::from_secs(config.agent_timeout_s);
        let announced = tokio::select! {
            announced = agent::ready(&ready, limit) => announced?,
            reason = vm.ended() => return Err(Error::VmGone { reason: reason.to_string() }),
        };
        self.timeline.note("agent-ready");
        self.note_guest(&announced);
        let agent = Agent::connect(&self.directory.join(pod::VSOCK), limit).await?;
        self.agent.send_replace(Some(agent.clone()));
        let request = set_up_request(&self.identity.id, &spec, &role, network);
        agent.set_up_pod(&request).await?;
        self.timeline.note("pod-set-up");
        Ok(Up {
            vm,
            agent,
            netns,
            connected,
            role,
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

    /// What hooks of one of the pod's containers get.
    pub fn hook_state(
        &self,
        spec: &Spec,
        id: &str,
        bundle: &Path,
        pid: Option<u32>,
    ) -> hooks::State {
        hooks::State {
            oci_version: spec.version().clone(),
            id: id.into(),
            status: "creating",
            pid,
            bundle: bundle.into(),
            annotations: spec.annotations().clone().unwrap_or_default(),
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
            Some(Err(error)) => Err(Error::Pod(error)),
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

    /// The pid that stands for all processes of the pod: the VMM's, once it is there.
    pub fn pid(&self) -> u32 {
        self.vm.get().map_or(0, |vm| vm.vmm_pid)
    }

    /// Ends the VM and removes all that the pod has made. Again is no error.
    pub async fn remove(&self) {
        let mut removed = self.removed.lock().await;
        if *removed {
            return;
        }
        self.removing.store(true, Ordering::Relaxed);
        // A VM on its way up is not interrupted half-way: it would be forgotten.
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
            if let Err(e) = &asked
                // A guest that powers off may take its answer with it.
                && up.vm.ended_within(POWER_OFF).await.is_none()
            {
                tracing::warn!("the guest does not power off and is killed: {e}");
            }
            up.vm.kill().await;
        }
        self.timeline.note("vm-ended");
        let (directory, cgroup) = (self.directory.clone(), self.cgroup.get().cloned());
        let work = move || {
            Share::of(&directory).remove_all();
            cgroup.unwrap_or_default().remove();
            cleanup::remove_directory(&directory);
        };
        if let Err(e) = tokio::task::spawn_blocking(work).await {
            tracing::error!("clean-up has panicked: {e}");
        }
        *removed = true;
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

/// [`network::set_up`] on a thread that may block.
async fn scan_network(netns: &OwnedFd) -> Result<(Vec<network::Nic>, messages::Network)> {
    let failed = |source| network::Error::Io {
        what: "look at its namespace",
        source,
    };
    let netns = netns.try_clone().map_err(failed)?;
    let work = move || network::set_up(netns.as_fd());
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|e| failed(e.into()))??)
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

fn host_cpus() -> u8 {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    u8::try_from(cpus).unwrap_or(u8::MAX)
}

/// The host's time.
fn clock() -> messages::Clock {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    messages::Clock {
        realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        ..Default::default()
    }
}

fn set_up_request(
    pod_id: &str,
    spec: &Spec,
    role: &Role,
    network: messages::Network,
) -> SetUpPodRequest {
    let sysctls = spec
        .linux()
        .as_ref()
        .and_then(|l| l.sysctl().clone())
        .unwrap_or_default();
    SetUpPodRequest {
        pod_id: pod_id.into(),
        hostname: spec.hostname().clone().unwrap_or_default(),
        network: network::field(&network),
        clock: protobuf::MessageField::some(clock()),
        // The network namespace is the VM's own; other parameters belong to the container's.
        sysctls: sysctls
            .into_iter()
            .filter(|(name, _)| name.starts_with("net."))
            .collect(),
        shm_size: spec::shm_size(spec, role),
        ..Default::default()
    }
}
