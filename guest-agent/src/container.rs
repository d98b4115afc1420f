//! A container in the guest: how it is made, what runs in it, how it goes.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use oci_spec::runtime::{LinuxNamespaceBuilder, LinuxNamespaceType, Spec};
use sepal_protocol::agent::{CreateContainerRequest, ProcessInfo};
use sepal_protocol::paths;

use crate::apparmor;
use crate::cgroup::{self, Cgroup};
use crate::devices;
use crate::error::{Context, Error, Result};
use crate::events::{Events, OomWatch};
use crate::launch::{self, Job, Kind, Launched};
use crate::memory_volumes;
use crate::mounts::{mount_block, mounts_of, remove_directory, share_path, unmount};
use crate::namespaces::{join_by_fd, namespace, own_pid_namespace, pin_namespaces};
use crate::nodes::Nodes;
use crate::plan::{self, Facts, Plan};
use crate::podinit::{PodInit, SharedPid};
use crate::process::{Asked, Process, send_signal};
use crate::reaper::Reaper;
use crate::stdio::{Rendezvous, Streams};
use crate::submounts;
use crate::users::Users;

/// Longest id of a container or an exec, in bytes: it becomes a directory's name.
const MAX_ID: usize = 200;
/// Where made processes wait for their start: one socket each, with a name that always fits.
const START_SOCKETS: &str = "/run/sepal/start";

static NEXT_SOCKET: AtomicU64 = AtomicU64::new(0);

/// What containers need of the agent.
#[derive(Debug)]
pub struct Surroundings {
    /// Collects ended processes.
    pub reaper: Arc<Reaper>,
    /// Pairs stdio streams.
    pub streams: Arc<Rendezvous>,
    /// The pod's events.
    pub events: Arc<Events>,
    /// The pod's users, where they are not the guest's.
    pub users: OnceLock<Users>,
    /// The PID namespace that containers share, once one of them wants it.
    pub shared_pid: tokio::sync::Mutex<Option<SharedPid>>,
    /// No container lives as long as the pod: the shared PID namespace gets a process of its own.
    pub holds_pid_namespace: AtomicBool,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    plan: Plan,
    directory: PathBuf,
    cgroup: Arc<Cgroup>,
    oom: Arc<OomWatch>,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    /// Of init, pinned: an exec joins these and none that a recycled pid has.
    namespaces: Vec<(LinuxNamespaceType, OwnedFd)>,
    root: OwnedFd,
    /// Directories of the share that belong to the container, and what was mounted for it.
    mounts: Vec<PathBuf>,
    paused: AtomicBool,
}

/// Refuses ids that could not be file names.
///
/// # Errors
/// [`Error::Invalid`].
pub fn check_id(id: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+');
    if id.is_empty() || id.len() > MAX_ID || id.starts_with('.') || !id.chars().all(plain) {
        return Err(Error::Invalid(format!("{id:?} is not a valid id")));
    }
    Ok(())
}

impl Container {
    /// Makes a container; its init process waits for its start.
    ///
    /// # Errors
    /// The cause in one sentence. Nothing of the container is left then.
    pub async fn create(
        with: &Surroundings,
        request: CreateContainerRequest,
        pid_namespace: Option<OwnedFd>,
    ) -> Result<Arc<Self>> {
        let id = request.container_id.clone();
        let spec: Spec = serde_json::from_slice(&request.spec)
            .map_err(|error| Error::Invalid(format!("the OCI spec cannot be read: {error}")))?;
        let rootfs = request.rootfs.unwrap_or_default();
        let directory = Path::new(paths::guest::CONTAINERS).join(&id);
        let root = match rootfs.block_serial.as_str() {
            "" => share_path(&rootfs.share_path)?,
            _ => directory.join(paths::ROOTFS),
        };
        let streams = Streams::take(&with.streams, &request.stdio.unwrap_or_default()).await?;
        fs::create_dir_all(START_SOCKETS).context(|| format!("cannot make {START_SOCKETS}"))?;
        fs::create_dir_all(&directory).context(|| format!("cannot make {directory:?}"))?;
        let mut remains = Remains {
            directory: directory.clone(),
            cgroup: None,
            mounts: Vec::new(),
        };
        let made = async {
            let cgroup = Arc::new(Cgroup::create(Path::new(cgroup::ROOT), &id)?);
            remains.cgroup = Some(Arc::clone(&cgroup));
            if !rootfs.block_serial.is_empty() {
                mount_block(with, &rootfs, &root).await?;
            }
            remains.mounts = mounts_of(&spec, &root, &id);
            let (volumes, mounts) = (&request.memory_volumes, &mut remains.mounts);
            memory_volumes::provide(&with.reaper, &directory, volumes, mounts).await?;
            let nodes = Nodes::of(&request.disks).await?;
            let plan = {
                let facts = Facts {
                    cgroup_file: &|name| cgroup.path().join(name).exists(),
                    device: &|device| nodes.find(device),
                };
                plan::container(spec, &request.shared_namespaces, &root, &facts)?
            };
            if !plan.left_out.is_empty() {
                tracing::info!(container = id, left_out = ?plan.left_out, "not in the guest");
            }
            if !request.apparmor_policy.is_empty() {
                apparmor::load(&request.apparmor_policy)?;
            }
            devices::restrict(cgroup.path(), &plan.device_rules)?;
            let oom = with.events.watch(&id, &cgroup)?;
            let (launched, join) = launch_init(
                with,
                &id,
                &plan,
                &cgroup,
                streams,
                pid_namespace,
                request.no_pivot,
            )
            .await?;
            Ok((plan, cgroup, oom, launched, join))
        }
        .await;
        let (plan, cgroup, oom, (launched, agent_ends), pinned) = match made {
            Ok(made) => made,
            Err(error) => {
                remains.remove(with).await;
                return Err(error);
            }
        };
        let pid = launched.pid;
        let finished = (|| {
            let copying = agent_ends.start(plan.owner)?;
            let namespaces = pin_namespaces(pid, &plan)?;
            let root = File::options()
                .read(true)
                .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
                .open(format!("/proc/{pid}/root"))
                .context(|| "the container's init has died".to_owned())?;
            Ok((copying, namespaces, OwnedFd::from(root)))
        })();
        let (copying, namespaces, root) = match finished {
            Ok(finished) => finished,
            Err(error) => {
                remains.remove(with).await;
                return Err(error);
            }
        };
        let (on_exit_cgroup, on_exit_oom) = (Arc::clone(&cgroup), Arc::clone(&oom));
        let init = Process::made(launched, copying, move |exit| {
            // In a shared PID namespace the container's other processes outlive its init.
            on_exit_cgroup.kill();
            on_exit_oom.check() && exit.status == 128 + libc::SIGKILL as u32
        });
        if let Some(mut shared) = pinned {
            *shared = own_pid_namespace(&namespaces).map(|namespace| SharedPid::Container {
                namespace,
                init: Arc::clone(&init),
            });
        }
        let following = submounts::following_volumes(&plan.spec);
        if !following.is_empty() {
            let (init, reaper) = (Arc::clone(&init), Arc::clone(&with.reaper));
            tokio::spawn(submounts::expire(following, init, reaper));
        }
        Ok(Arc::new(Self {
            id,
            plan,
            directory,
            cgroup,
            oom,
            init,
            execs: Mutex::default(),
            namespaces,
            root,
            mounts: remains.mounts,
            paused: AtomicBool::new(false),
        }))
    }

    /// Its init process for an empty id, otherwise that exec.
    ///
    /// # Errors
    /// When there is none of the name.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>> {
        if exec.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.lock()
            .get(exec)
            .cloned()
            .ok_or_else(|| Error::NoProcess {
                container: self.id.clone(),
                exec: exec.to_owned(),
            })
    }

    /// Notes an exec. It is made when it is started.
    ///
    /// # Errors
    /// What is wrong with the request, or that the container has ended.
    pub async fn ask_exec(
        &self,
        with: &Surroundings,
        exec: &str,
        process: &[u8],
        stdio: &sepal_protocol::agent::Stdio,
    ) -> Result<()> {
        check_id(exec)?;
        let process = serde_json::from_slice(process)
            .map_err(|error| Error::Invalid(format!("the process cannot be read: {error}")))?;
        let join = self
            .namespaces
            .iter()
            .map(|(kind, fd)| join_by_fd(*kind, fd.as_raw_fd()))
            .collect::<Result<_>>()?;
        let plan = plan::exec(&self.plan, process, join)?;
        if self.init.ended().is_some() {
            return Err(Error::State(format!(
                "container {} is not running",
                self.id
            )));
        }
        if self.lock().contains_key(exec) {
            return Err(Error::Exists(format!("process {exec}")));
        }
        let streams = Streams::take(&with.streams, stdio).await?;
        let (ends, agent_ends) = streams.connect()?;
        let asked = Process::asked(Asked {
            plan,
            ends,
            agent_ends,
        });
        match self.lock().entry(exec.to_owned()) {
            std::collections::hash_map::Entry::Occupied(_) => {
                Err(Error::Exists(format!("process {exec}")))
            }
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(asked);
                Ok(())
            }
        }
    }

    /// Starts init or an exec and answers its pid.
    ///
    /// # Errors
    /// Why its program cannot run.
    pub async fn start(&self, with: &Surroundings, exec: &str) -> Result<i32> {
        let process = self.process(exec)?;
        if let Some(asked) = process.take_asked()?
            && let Err(error) = self.make_exec(with, &process, asked).await
        {
            process.fail();
            return Err(error);
        }
        process.start_made().await
    }

    async fn make_exec(
        &self,
        with: &Surroundings,
        process: &Arc<Process>,
        asked: Asked,
    ) -> Result<()> {
        if self.init.ended().is_some() {
            return Err(Error::State(format!(
                "container {} is not running",
                self.id
            )));
        }
        if self.paused.load(Ordering::Relaxed) {
            return Err(Error::State(format!("container {} is paused", self.id)));
        }
        let clone = |fd: &OwnedFd| {
            fd.try_clone()
                .context(|| "cannot join the container".into())
        };
        // The plan names the originals' numbers; a forked child has them too.
        let owner = asked.plan.owner;
        let job = Job {
            container: self.id.clone(),
            plan: asked.plan,
            kind: Kind::Exec {
                root: clone(&self.root)?,
            },
            directory: self.directory.clone(),
            start_socket: start_socket(),
            cgroup: self.cgroup.config(&self.id),
            ends: asked.ends,
            join: Vec::new(),
            keep: self
                .namespaces
                .iter()
                .map(|(_, fd)| fd.as_raw_fd())
                .collect(),
        };
        let launched = launch::launch(job, &with.reaper).await?;
        let pid = launched.pid;
        match asked.agent_ends.start(owner) {
            Ok(copying) => {
                let oom = Arc::clone(&self.oom);
                process.set_made(launched, copying, move |exit| {
                    exit.status == 128 + libc::SIGKILL as u32 && oom.check()
                });
                Ok(())
            }
            Err(error) => {
                let _ = send_signal(pid, libc::SIGKILL);
                Err(error)
            }
        }
    }

    /// Signals one process, or all of the container.
    ///
    /// # Errors
    /// When the process is not there or has ended.
    pub fn signal(&self, exec: &str, signal: u32, all: bool) -> Result<()> {
        let number = i32::try_from(signal)
            .ok()
            .filter(|signal| (1..=64).contains(signal));
        let number = number.ok_or_else(|| Error::Invalid(format!("{signal} is not a signal")))?;
        if !all {
            return self.process(exec)?.signal(number);
        }
        if number == libc::SIGKILL {
            self.cgroup.kill();
            return Ok(());
        }
        self.cgroup
            .processes()?
            .into_iter()
            .try_for_each(|pid| send_signal(pid, number))
    }

    /// Stops or continues all its processes.
    ///
    /// # Errors
    /// When it has ended, or does not come to a stop.
    pub async fn pause(&self, pause: bool) -> Result<()> {
        if self.init.ended().is_some() {
            return Err(Error::State(format!(
                "container {} is not running",
                self.id
            )));
        }
        self.cgroup.freeze(pause).await?;
        self.paused.store(pause, Ordering::Relaxed);
        Ok(())
    }

    /// The PID namespace of its processes.
    ///
    /// # Errors
    /// The agent has no descriptor left.
    pub fn pid_namespace(&self) -> Result<OwnedFd> {
        own_pid_namespace(&self.namespaces)
            .ok_or_else(|| Error::State(format!("container {} cannot be joined", self.id)))
    }

    /// Its cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Its processes by guest pid, with the names of execs.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn processes(&self) -> Result<Vec<ProcessInfo>> {
        let leaders: HashMap<i32, String> = self
            .lock()
            .iter()
            .filter(|(_, process)| process.ended().is_none())
            .map(|(exec, process)| (process.pid(), exec.clone()))
            .collect();
        let pids = self.cgroup.processes()?;
        Ok(pids
            .into_iter()
            .map(|pid| ProcessInfo {
                pid: u32::try_from(pid).unwrap_or(0),
                exec_id: leaders.get(&pid).cloned().unwrap_or_default(),
                ..Default::default()
            })
            .collect())
    }

    /// Forgets an exec that has ended or was never started.
    ///
    /// # Errors
    /// When it lives.
    pub fn delete_exec(&self, exec: &str) -> Result<sepal_protocol::agent::ProcessExit> {
        let process = self.process(exec)?;
        if process.is_asked() {
            process.fail();
        }
        let ended = process.ended().ok_or_else(|| {
            Error::State(format!(
                "process {exec} of container {} is running",
                self.id
            ))
        })?;
        self.lock().remove(exec);
        Ok(process.report(ended))
    }

    /// Removes what is left of the container. Init has ended, or was never started and is killed.
    ///
    /// # Errors
    /// When init runs, or the cgroup does not empty.
    pub async fn delete(&self, with: &Surroundings) -> Result<sepal_protocol::agent::ProcessExit> {
        if self.init.ended().is_none() {
            if self.init.is_running() {
                return Err(Error::State(format!("container {} is running", self.id)));
            }
            self.cgroup.kill();
            self.init.wait_end().await;
        }
        let ended = self.init.wait_end().await;
        self.cgroup.remove().await?;
        unmount(with, &self.mounts).await;
        remove_directory(&self.directory, &self.mounts);
        Ok(self.init.report(ended))
    }

    /// Kills all of it and waits for the end.
    pub async fn kill(&self) {
        self.cgroup.kill();
        self.init.wait_end().await;
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a failed creation leaves behind until it is removed.
struct Remains {
    directory: PathBuf,
    cgroup: Option<Arc<Cgroup>>,
    mounts: Vec<PathBuf>,
}

impl Remains {
    async fn remove(&self, with: &Surroundings) {
        if let Some(cgroup) = &self.cgroup
            && let Err(error) = cgroup.remove().await
        {
            tracing::warn!(%error, "a failed container leaves something behind");
        }
        unmount(with, &self.mounts).await;
        remove_directory(&self.directory, &self.mounts);
    }
}

type SharedPidGuard<'a> = tokio::sync::MutexGuard<'a, Option<SharedPid>>;
type LaunchedInit = (Launched, crate::stdio::AgentEnds);

/// Launches init. Where it is to make the pod's shared PID namespace, the guard comes back for the
/// new namespace to be noted.
async fn launch_init<'a>(
    with: &'a Surroundings,
    id: &str,
    plan: &Plan,
    cgroup: &Cgroup,
    streams: Streams,
    pid_namespace: Option<OwnedFd>,
    no_pivot: bool,
) -> Result<(LaunchedInit, Option<SharedPidGuard<'a>>)> {
    let (ends, agent_ends) = streams.connect()?;
    let mut plan = plan.clone();
    let mut join = Vec::new();
    if plan.user_namespace {
        let missing = || Error::State("the pod has no user namespace".into());
        let users = with.users.get().ok_or_else(missing)?.namespace();
        let users = users.try_clone().context(|| "cannot join the pod".into())?;
        plan = plan.joining(join_by_fd(LinuxNamespaceType::User, users.as_raw_fd())?);
        join.push(users);
    }
    let mut shared = None;
    if let Some(theirs) = pid_namespace.filter(|_| plan.shared_pid_namespace) {
        plan = plan.joining(join_by_fd(LinuxNamespaceType::Pid, theirs.as_raw_fd())?);
        join.push(theirs);
    } else if plan.shared_pid_namespace {
        let mut guard = with.shared_pid.lock().await;
        if with.holds_pid_namespace.load(Ordering::Relaxed)
            && guard.as_mut().and_then(SharedPid::live).is_none()
        {
            *guard = Some(SharedPid::Pod(PodInit::start(
                &with.reaper,
                with.users.get(),
            )?));
        }
        let namespace = match guard.as_mut().and_then(SharedPid::live) {
            Some(live) => {
                let fd = live.try_clone().context(|| "cannot join the pod".into())?;
                let namespace = join_by_fd(LinuxNamespaceType::Pid, fd.as_raw_fd())?;
                join.push(fd);
                namespace
            }
            None => {
                shared = Some(guard);
                namespace(LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Pid))?
            }
        };
        plan = plan.joining(namespace);
    }
    let job = Job {
        container: id.to_owned(),
        plan,
        kind: Kind::Init { no_pivot },
        directory: Path::new(paths::guest::CONTAINERS).join(id),
        start_socket: start_socket(),
        cgroup: cgroup.config(id),
        ends,
        join,
        keep: Vec::new(),
    };
    let launched = launch::launch(job, &with.reaper).await?;
    Ok(((launched, agent_ends), shared))
}

fn start_socket() -> PathBuf {
    let number = NEXT_SOCKET.fetch_add(1, Ordering::Relaxed);
    Path::new(START_SOCKETS).join(number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_file_names() {
        assert!(check_id("redis-1_a.b").is_ok());
        for id in [
            "",
            ".",
            "..",
            ".hidden",
            "a/b",
            "a b",
            "ä",
            &"x".repeat(201),
        ] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
