//! The agent's calls (protocol/proto/agent.proto), each handed to the thing it is about.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_trait::async_trait;
use nix::mount::{MsFlags, mount};
use oci_spec::runtime::{Process as OciProcess, Spec};
use sepal_protocol::agent::{
    Clock, ContainerId, CreateContainerRequest, Empty, Event, ExecProcessRequest,
    GuestInfoResponse, HugePages, Network, ProcessCreated, ProcessExit, ProcessId, ProcessList,
    ResizeGuestRequest, ResizeTerminalRequest, SetUpPodRequest, SignalProcessRequest, Stats,
    UpdateContainerRequest, WriteVolumeRequest,
};
use sepal_protocol::agent_ttrpc::{Agent, create_agent};
use sepal_protocol::paths::guest as paths;
use tokio::sync::Notify;
use ttrpc::r#async::transport::Listener as TtrpcListener;
use ttrpc::r#async::{Server, TtrpcContext};

use crate::container::{Container, Surroundings, check_id};
use crate::error::{Context, Error, Result};
use crate::events::Events;
use crate::launch::{self, Job, Kind};
use crate::process::Process;
use crate::reaper::Reaper;
use crate::stdio::{Rendezvous, Streams, window};
use crate::stream::Listener;
use crate::users::Users;
use crate::volumes::Volumes;
use crate::{cgroup, clock, guest, limits, mounts, network, plan};

type Answer<T> = ttrpc::Result<T>;

/// Where the shim finds the agent.
#[derive(Debug)]
pub struct Sockets {
    /// Of the ttrpc service.
    pub agent: Listener,
    /// Of the processes' streams.
    pub stdio: Listener,
}

/// Serves until the shim asks for the end; all containers have ended by then. `listening` is called
/// once a client would be answered.
///
/// # Errors
/// When the sockets, SIGCHLD or inotify fail: the agent cannot do its work then.
pub async fn serve(sockets: Sockets, listening: impl FnOnce()) -> anyhow::Result<()> {
    let reaper = Arc::new(Reaper::default());
    let streams = Arc::new(Rendezvous::default());
    let events = Arc::new(Events::new()?);
    let service = Arc::new(Service {
        with: Surroundings {
            reaper: Arc::clone(&reaper),
            streams: Arc::clone(&streams),
            events: Arc::clone(&events),
            users: OnceLock::new(),
            shared_pid: tokio::sync::Mutex::new(None),
            holds_pid_namespace: AtomicBool::new(false),
        },
        containers: Mutex::default(),
        debug: Mutex::default(),
        volumes: Volumes::default(),
        end: Notify::new(),
    });
    let listener = sockets.agent;
    let connections = async_stream(listener);
    let mut server = Server::new()
        .add_listener(TtrpcListener::new(connections))
        .register_service(create_agent(
            Arc::clone(&service) as Arc<dyn Agent + Send + Sync>
        ));
    server.start().await?;
    listening();
    let power_button = || {
        let service = Arc::clone(&service);
        tokio::spawn(async move {
            service.shut_down().await;
            service.end.notify_one();
        });
    };
    tokio::select! {
        end = reaper.run(power_button) => end?,
        end = streams.run(sockets.stdio) => end?,
        end = events.run() => end?,
        () = service.end.notified() => {}
    }
    // Let the answer to Shutdown out.
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    Ok(())
}

fn async_stream(
    listener: Listener,
) -> impl futures_util::Stream<Item = std::io::Result<crate::stream::Stream>> + Send {
    futures_util::stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await;
        Some((accepted, listener))
    })
}

struct Service {
    with: Surroundings,
    /// `None` while one is being made.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    /// Programs of the guest image itself, for debugging.
    debug: Mutex<HashMap<String, Arc<Process>>>,
    volumes: Volumes,
    end: Notify,
}

impl Service {
    fn container(&self, id: &str) -> Result<Arc<Container>> {
        match self.lock().get(id) {
            Some(Some(container)) => Ok(Arc::clone(container)),
            Some(None) => Err(Error::State(format!("container {id} is being created"))),
            None => Err(Error::NoContainer(id.to_owned())),
        }
    }

    /// The process that a request names; those of the guest itself have no container.
    fn process(&self, container: &str, exec: &str) -> Result<Arc<Process>> {
        if container.is_empty() {
            return self
                .lock_debug()
                .get(exec)
                .cloned()
                .ok_or_else(|| Error::NoProcess {
                    container: container.to_owned(),
                    exec: exec.to_owned(),
                });
        }
        self.container(container)?.process(exec)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_debug(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.debug.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn set_up(&self, request: SetUpPodRequest) -> Result<()> {
        if let Some(clock) = request.clock.as_ref() {
            clock::set(clock.realtime_ns)?;
        }
        if let Some(wanted) = request.users.as_ref() {
            let users = Users::enter(&self.with.reaper, wanted)?;
            let twice = |_| Error::State("the pod has its users already".into());
            self.with.users.set(users).map_err(twice)?;
        }
        let users = self.with.users.get();
        if !request.hostname.is_empty() {
            nix::unistd::sethostname(&request.hostname)
                .context(|| format!("cannot set the host name {:?}", request.hostname))?;
        }
        network::apply(&request.network.unwrap_or_default(), users).await?;
        for (name, value) in &request.sysctls {
            set_sysctl(name, value)?;
        }
        let root = users.map_or((0, 0), |users| users.root);
        if request.shm_size > 0 {
            make_shm(request.shm_size, root)?;
        }
        if !request.etc_files.is_empty() {
            write_etc(&request.etc_files, root)?;
        }
        let holds = request.holds_pid_namespace;
        self.with
            .holds_pid_namespace
            .store(holds, Ordering::Relaxed);
        tracing::info!(pod = request.pod_id, "the pod is set up");
        Ok(())
    }

    async fn create(&self, request: CreateContainerRequest) -> Result<u32> {
        let id = request.container_id.clone();
        check_id(&id)?;
        let pid_namespace = match request.pid_namespace_of.as_str() {
            "" => None,
            other => Some(self.container(other)?.pid_namespace()?),
        };
        if let std::collections::hash_map::Entry::Vacant(place) = self.lock().entry(id.clone()) {
            place.insert(None);
        } else {
            return Err(Error::Exists(format!("container {id}")));
        }
        let made = Container::create(&self.with, request, pid_namespace).await;
        let mut containers = self.lock();
        match made {
            Ok(container) => {
                let pid = container.process("").map(|init| init.pid())?;
                containers.insert(id, Some(container));
                Ok(u32::try_from(pid).unwrap_or(0))
            }
            Err(error) => {
                containers.remove(&id);
                tracing::warn!(container = id, %error, "cannot create a container");
                Err(error)
            }
        }
    }

    async fn start(&self, request: ProcessId) -> Result<u32> {
        let pid = if request.container_id.is_empty() {
            self.process("", &request.exec_id)?.start_made().await?
        } else {
            let container = self.container(&request.container_id)?;
            container.start(&self.with, &request.exec_id).await?
        };
        Ok(u32::try_from(pid).unwrap_or(0))
    }

    async fn delete(&self, request: ProcessId) -> Result<ProcessExit> {
        let (id, exec) = (request.container_id, request.exec_id);
        if id.is_empty() {
            let process = self.process(&id, &exec)?;
            let running = || Error::State(format!("process {exec} is running"));
            let ended = process.ended().ok_or_else(running)?;
            self.lock_debug().remove(&exec);
            return Ok(process.report(ended));
        }
        let container = self.container(&id)?;
        if !exec.is_empty() {
            return container.delete_exec(&exec);
        }
        let exit = container.delete(&self.with).await?;
        self.lock().remove(&id);
        let directory = mounts::share_path(&id)?;
        tokio::spawn(mounts::forget(self.with.reaper.clone(), directory));
        Ok(exit)
    }

    async fn debug_exec(&self, request: ExecProcessRequest) -> Result<()> {
        if !Path::new(paths::DEBUG_MARK).exists() {
            return Err(Error::Unsupported(
                "the guest image is not the debug variant, which has programs of its own".into(),
            ));
        }
        check_id(&request.exec_id)?;
        if self.lock_debug().contains_key(&request.exec_id) {
            return Err(Error::Exists(format!("process {}", request.exec_id)));
        }
        let process: OciProcess = serde_json::from_slice(&request.process)
            .map_err(|error| Error::Invalid(format!("the process cannot be read: {error}")))?;
        let mut spec = Spec::default();
        spec.set_process(Some(process.clone())).set_linux(None);
        let plan = plan::guest(spec, process)?;
        let stdio = request.stdio.unwrap_or_default();
        let streams = Streams::take(&self.with.streams, &stdio).await?;
        let (ends, agent_ends) = streams.connect()?;
        let job = Job {
            container: String::new(),
            plan,
            kind: Kind::Guest,
            directory: "/".into(),
            start_socket: "/".into(),
            cgroup: cgroup::none(),
            ends,
            join: Vec::new(),
            keep: Vec::new(),
        };
        let launched = launch::launch(job, &self.with.reaper).await?;
        let process = Process::made(launched, agent_ends.start(0)?, |_| false);
        self.lock_debug().insert(request.exec_id, process);
        Ok(())
    }

    /// Drops names and inodes from the kernel's caches (Linux, Documentation/admin-guide/sysctl/vm.rst,
    /// drop_caches): with FORGET the file server closes what it holds open for them.
    async fn forget_files(&self) -> Result<()> {
        launch::aside(&self.with.reaper, "cannot drop the caches", || {
            fs::write("/proc/sys/vm/drop_caches", "2").map_err(|error| error.to_string())
        })
        .await
    }

    async fn shut_down(&self) {
        let containers: Vec<_> = self.lock().values().flatten().cloned().collect();
        for container in &containers {
            container.cgroup().kill();
        }
        let ended = futures_util::future::join_all(containers.iter().map(|one| one.kill()));
        if tokio::time::timeout(std::time::Duration::from_secs(5), ended)
            .await
            .is_err()
        {
            tracing::warn!("not all containers have ended");
        }
        let written = launch::aside(&self.with.reaper, "cannot write back", || {
            nix::unistd::sync();
            Ok(())
        });
        if let Err(error) = written.await {
            tracing::warn!(%error, "not everything has been written back");
        }
    }
}

fn set_sysctl(name: &str, value: &str) -> Result<()> {
    if name.is_empty() || name.contains("..") || name.starts_with('/') {
        return Err(Error::Invalid(format!(
            "{name:?} is not a name of a sysctl"
        )));
    }
    // A dot in an interface's name is written as a slash, as sysctl(8) does.
    let path: String = name
        .chars()
        .map(|c| match c {
            '.' => '/',
            '/' => '.',
            c => c,
        })
        .collect();
    fs::write(Path::new("/proc/sys").join(path), value)
        .context(|| format!("cannot set the sysctl {name} to {value:?}"))
}

/// Writes the pod's files for its containers' /etc, which are those of its root: a user and a group.
fn write_etc(files: &HashMap<String, String>, (uid, gid): (u32, u32)) -> Result<()> {
    fs::create_dir_all(paths::ETC).context(|| format!("cannot make {}", paths::ETC))?;
    for (name, text) in files {
        check_id(name)?;
        let path = Path::new(paths::ETC).join(name);
        let what = || format!("cannot write the pod's /etc/{name}");
        fs::write(&path, text).context(what)?;
        std::os::unix::fs::chown(&path, Some(uid), Some(gid)).context(what)?;
        // Users of the containers read it, whatever the agent's mask is.
        let mode = fs::Permissions::from_mode(0o644);
        fs::set_permissions(&path, mode).context(what)?;
    }
    Ok(())
}

/// Mounts the /dev/shm that the pod's containers share, or gives it another size.
fn make_shm(size: u64, (uid, gid): (u32, u32)) -> Result<()> {
    let what = || "cannot make the pod's /dev/shm".to_owned();
    fs::create_dir_all(paths::SHM).context(what)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = format!("mode=1777,size={size},uid={uid},gid={gid}");
    mount(
        Some("shm"),
        paths::SHM,
        Some("tmpfs"),
        flags,
        Some(options.as_str()),
    )
    .context(what)
}

fn created(pid: u32) -> ProcessCreated {
    ProcessCreated {
        pid,
        ..Default::default()
    }
}

#[async_trait]
impl Agent for Service {
    async fn set_up_pod(&self, _: &TtrpcContext, request: SetUpPodRequest) -> Answer<Empty> {
        self.set_up(request).await?;
        Ok(Empty::new())
    }

    async fn update_network(&self, _: &TtrpcContext, request: Network) -> Answer<Empty> {
        network::apply(&request, self.with.users.get()).await?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Answer<ProcessCreated> {
        Ok(created(self.create(request).await?))
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> Answer<ProcessCreated> {
        let container = self.container(&request.container_id)?;
        let stdio = request.stdio.unwrap_or_default();
        container
            .ask_exec(&self.with, &request.exec_id, &request.process, &stdio)
            .await?;
        Ok(created(0))
    }

    async fn start_process(&self, _: &TtrpcContext, request: ProcessId) -> Answer<ProcessCreated> {
        Ok(created(self.start(request).await?))
    }

    async fn wait_process(&self, _: &TtrpcContext, request: ProcessId) -> Answer<ProcessExit> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        Ok(process.wait().await)
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: SignalProcessRequest,
    ) -> Answer<Empty> {
        if request.container_id.is_empty() {
            let signal = i32::try_from(request.signal).unwrap_or(0);
            self.process("", &request.exec_id)?.signal(signal)?;
        } else {
            let container = self.container(&request.container_id)?;
            container.signal(&request.exec_id, request.signal, request.all)?;
        }
        Ok(Empty::new())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> Answer<Empty> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        if let Some((rows, columns)) = window(request.rows, request.columns) {
            process.resize(rows, columns)?;
        }
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessId) -> Answer<Empty> {
        self.process(&request.container_id, &request.exec_id)?
            .close_stdin();
        Ok(Empty::new())
    }

    async fn delete_process(&self, _: &TtrpcContext, request: ProcessId) -> Answer<ProcessExit> {
        Ok(self.delete(request).await?)
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerId) -> Answer<Empty> {
        self.container(&request.container_id)?.pause(true).await?;
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerId) -> Answer<Empty> {
        self.container(&request.container_id)?.pause(false).await?;
        Ok(Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> Answer<Empty> {
        let id = &request.container_id;
        let container = self.container(id)?;
        let reaper = &self.with.reaper;
        limits::update(id, container.cgroup(), reaper, &request.resources).await?;
        Ok(Empty::new())
    }

    async fn container_stats(&self, _: &TtrpcContext, request: ContainerId) -> Answer<Stats> {
        let mut stats = match request.container_id.as_str() {
            "" => cgroup::of_guest(Path::new(cgroup::ROOT), &guest::info()),
            id => self.container(id)?.cgroup().stats(),
        };
        stats.network = guest::interface_stats();
        Ok(stats)
    }

    async fn list_processes(&self, _: &TtrpcContext, request: ContainerId) -> Answer<ProcessList> {
        let processes = self.container(&request.container_id)?.processes()?;
        Ok(ProcessList {
            processes,
            ..Default::default()
        })
    }

    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> Answer<Event> {
        Ok(self.with.events.next().await?)
    }

    async fn set_clock(&self, _: &TtrpcContext, request: Clock) -> Answer<Empty> {
        clock::correct(request.realtime_ns)?;
        Ok(Empty::new())
    }

    async fn forget_files(&self, _: &TtrpcContext, _: Empty) -> Answer<Empty> {
        Self::forget_files(self).await?;
        Ok(Empty::new())
    }

    async fn write_volume(&self, _: &TtrpcContext, request: WriteVolumeRequest) -> Answer<Empty> {
        self.volumes.write(&self.with.reaper, &request).await?;
        Ok(Empty::new())
    }

    async fn guest_info(&self, _: &TtrpcContext, _: Empty) -> Answer<GuestInfoResponse> {
        Ok(guest::info())
    }

    async fn resize_guest(
        &self,
        _: &TtrpcContext,
        request: ResizeGuestRequest,
    ) -> Answer<GuestInfoResponse> {
        // A CPU takes a while to come, and one that does not come ten seconds.
        launch::aside(&self.with.reaper, "cannot change the CPUs", || {
            guest::set_cpus(request.cpus).map_err(|error| error.to_string())
        })
        .await?;
        Ok(guest::info())
    }

    async fn keep_huge_pages(&self, _: &TtrpcContext, request: HugePages) -> Answer<HugePages> {
        // The kernel moves other pages out of the way.
        let failed = "cannot keep huge pages";
        launch::aside(&self.with.reaper, failed, || {
            guest::keep_huge_pages(request.count).map_err(|error| error.to_string())
        })
        .await?;
        Ok(HugePages {
            count: guest::huge_pages(),
            ..Default::default()
        })
    }

    async fn debug_exec(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> Answer<ProcessCreated> {
        Service::debug_exec(self, request).await?;
        Ok(created(0))
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Answer<Empty> {
        self.shut_down().await;
        self.end.notify_one();
        Ok(Empty::new())
    }
}
