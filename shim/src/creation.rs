//! How a container is made: its mounts while the VM boots, then its streams and its process.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::api::Mount;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::protobuf::MessageField;
use oci_spec::runtime::{Hooks, Spec};
use sepal_protocol::agent::{CreateContainerRequest, RootFs, Stdio};
use sepal_protocol::paths;

use crate::annotations::Role;
use crate::apparmor;
use crate::container::{Container, Process, lock};
use crate::disks;
use crate::error::{Error, Result};
use crate::faults;
use crate::hooks;
use crate::limits::{self, Limits};
use crate::memory_volumes;
use crate::pod::{self, Pod};
use crate::resize::Demand;
use crate::rootfs::RootMount;
use crate::service::run_poststop;
use crate::spec::{self, Kept, Plan};
use crate::stand_in::{OnHost, StandIn};
use crate::stdio::{Streams, Wanted};
use crate::sys::{BindOptions, open_directory};
use crate::up::Up;
use crate::users::Users;

/// What a Create call asks for.
pub struct Creation {
    /// The container's id.
    pub id: String,
    /// containerd's directory for it.
    pub bundle: PathBuf,
    /// containerd's mounts of the root file system.
    pub rootfs: Vec<Mount>,
    /// Its streams.
    pub wanted: Wanted,
    /// Leave out pivot_root.
    pub no_pivot: bool,
}

/// An id that nobody else may make a container of, as long as this is there.
struct Name<'a> {
    pod: &'a Pod,
    id: String,
}

impl<'a> Name<'a> {
    fn take(pod: &'a Pod, id: &str) -> Result<Self> {
        let id = id.to_owned();
        // Whoever makes a container puts it among these before it gives its name back.
        let free = lock(&pod.creating).insert(id.clone());
        let name = free.then(|| Self {
            pod,
            id: id.clone(),
        });
        let exists = lock(&pod.containers).contains_key(&id);
        name.filter(|_| !exists)
            .ok_or(Error::ContainerExists { id })
    }
}

impl Drop for Name<'_> {
    fn drop(&mut self) {
        lock(&self.pod.creating).remove(&self.id);
    }
}

impl Pod {
    /// Makes a container; its init does not run yet.
    ///
    /// # Errors
    /// The pod or the container cannot be made. Nothing of it is left then.
    pub async fn create(self: &Arc<Self>, mut asked: Creation) -> Result<u32> {
        let _name = Name::take(self, &asked.id)?;
        if self.is_removing() {
            return Err(Error::Removing);
        }
        faults::at("create");
        let mut spec = spec::load(&asked.bundle)?;
        let role = self.role_of(&asked.id, &spec);
        let devices = disks::wanted(&spec);
        let first = asked.id == self.identity.id;
        let host_hooks = spec::take_host_hooks(&mut spec);
        let hook_state = hooks::State::creating(&spec, &asked.id, &asked.bundle, None);
        asked.wanted.size = spec::console_size(spec.process().as_ref());
        let linux = spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let demand = Demand::of(resources, &role);
        let users = self.spec.users.as_ref();
        let refused = Limits::foreign_huge_pages(resources).map(|size| Error::Invalid {
            what: "huge pages",
            reason: format!("a pod cannot have any of {size}, only of 2MB"),
        });
        // Its node in the guest has another name, and there a device is a mount of what has its name.
        let disk = devices.first().filter(|_| users.is_some());
        let refused = refused.or(disk.map(|d| spec::Error::DiskOfUsers(d.path.clone()).into()));
        let plan = match refused.map_or(demand, Err) {
            Ok(demand) => {
                let (this, id, bundle) = (self.clone(), asked.id.clone(), asked.bundle.clone());
                let work = move || this.plan(spec, &id, &role, &bundle);
                let plan = tokio::task::spawn_blocking(work).await;
                let plan = plan.unwrap_or_else(|e| Err(Error::Unfinished(e)));
                plan.map(|plan| (plan, demand))
            }
            Err(e) => Err(e),
        };
        let created = match plan {
            Ok((mut plan, demand)) => {
                if self.spec.bare {
                    plan.complete(self.spec.files.keys().map(String::as_str));
                }
                let hooks = (&host_hooks, &hook_state);
                self.try_create(&asked, plan, &devices, first, demand, hooks)
                    .await
            }
            Err(e) => Err(e),
        };
        if created.is_err() {
            let (share, id) = (self.share.clone(), asked.id.clone());
            let _ = tokio::task::spawn_blocking(move || share.remove(&id)).await;
            if !first
                && !devices.is_empty()
                && let Ok(up) = self.up().await
            {
                self.disks.release(&up.vm, &asked.id).await;
            }
            self.note(|record| record.containers.retain(|id| *id != asked.id));
            if first {
                // There will be no second try with this pod: containerd begins a new one.
                self.remove().await;
            }
            run_poststop(&host_hooks, &hook_state).await;
        }
        created
    }

    /// What is to be made of a spec. Blocks: it looks at volumes, whose servers may be slow or gone.
    fn plan(&self, spec: Spec, id: &str, role: &Role, bundle: &Path) -> Result<Plan> {
        let kept = |volume: &Path, options: &BindOptions, owners: Option<&Users>| {
            // What the kubelet writes lies on a tmpfs, too: told by one look, and not by all mounts.
            let copy = options.is_only_read();
            let copy = copy.then(|| self.mirrors.take(volume, owners)).flatten();
            let memory = || memory_volumes::of(volume, owners).map(Kept::Memory);
            copy.map(Kept::Copy).or_else(memory)
        };
        let users = self.spec.users.as_ref();
        let mut plan = Plan::new(spec, id, role, bundle, users, &kept)?;
        plan.apparmor_policy = apparmor::policy(&plan.guest, Path::new(apparmor::LOADED))?;
        Ok(plan)
    }

    /// The place in the pod of a container with this spec.
    fn role_of(&self, id: &str, spec: &Spec) -> Role {
        match Role::of(&spec.annotations().clone().unwrap_or_default()) {
            // Whoever puts it into a sandbox need not be Kubernetes.
            Role::Alone if self.spec.bare && id != self.identity.id => Role::Member {
                sandbox: self.identity.id.clone(),
            },
            role => role,
        }
    }

    async fn try_create(
        self: &Arc<Self>,
        asked: &Creation,
        plan: Plan,
        devices: &[disks::Wanted],
        first: bool,
        demand: Demand,
        (host_hooks, hook_state): (&Hooks, &hooks::State),
    ) -> Result<u32> {
        self.record(|record| record.containers.push(asked.id.clone()))?;
        let share = self.share.clone();
        let (id, root, binds) = (asked.id.clone(), plan.root.clone(), plan.binds.clone());
        let mounts: Vec<_> = asked.rootfs.iter().map(root_mount).collect();
        faults::at("create: recorded");
        // The VM boots meanwhile.
        tokio::task::spawn_blocking(move || share.add(&id, &root, &mounts, &binds))
            .await
            .map_err(|e| Error::io("mount in", &self.directory)(e.into()))??;
        self.timeline.note("rootfs-mounted");
        faults::at("create: mounted");
        let account = limits::account(&asked.id, &hook_state.annotations);
        self.admit(&account, demand).await?;
        faults::at("create: admitted");
        // Streams are conversations with the guest, which has time for them while it is set up.
        let agent = self.agent().await?;
        let namespace = &self.identity.namespace;
        let (streams, stdio) = Streams::open(&asked.wanted, &agent, namespace, &asked.id).await?;
        faults::at("create: streams");
        let hooks = (host_hooks, hook_state);
        let made = self.make_in_guest(asked, &plan, devices, first, hooks, stdio);
        let (up, hook_state, on_host) = match made.await {
            Ok(made) => made,
            Err(e) => {
                streams.close().await;
                return Err(e);
            }
        };
        self.timeline.note("container-created");
        faults::at("create: made");
        let init = Process::new(&asked.id, "", asked.wanted.clone(), Vec::new());
        init.set_streams(streams);
        let container = Container::new(
            &asked.id,
            asked.bundle.clone(),
            init.clone(),
            host_hooks.clone(),
            hook_state,
            on_host,
        );
        lock(&self.containers).insert(asked.id.clone(), container.clone());
        if let Some(streams) = init.streams() {
            streams.feed();
        }
        let pid = container.pid;
        self.events.publish(TaskCreate {
            container_id: asked.id.clone(),
            bundle: asked.bundle.display().to_string(),
            rootfs: asked.rootfs.clone(),
            io: MessageField::some(task_io(&asked.wanted)),
            pid,
            ..Default::default()
        });
        tokio::spawn(self.clone().watch(up, container, init));
        faults::at("create: told");
        Ok(pid)
    }

    /// The guest's part, most of it once the guest serves. Answers with what the pod's hooks get from
    /// then on.
    async fn make_in_guest(
        &self,
        asked: &Creation,
        plan: &Plan,
        devices: &[disks::Wanted],
        first: bool,
        (host_hooks, hook_state): (&Hooks, &hooks::State),
        stdio: Stdio,
    ) -> Result<(Arc<Up>, hooks::State, OnHost)> {
        let up = if plan.copies.is_empty() {
            self.up().await?
        } else {
            let agent = self.agent().await?;
            let deliver = async { Ok(self.mirrors.deliver(&plan.copies, &agent).await?) };
            let (up, ()) = tokio::try_join!(self.up(), deliver)?;
            self.timeline.note("volumes-copied");
            up
        };
        if !plan.binds.is_empty() {
            // It serves, so the file server is in the namespace that it serves from.
            let (share, id, binds) = (self.share.clone(), asked.id.clone(), plan.binds.clone());
            let server = up.vm.file_server();
            tokio::task::spawn_blocking(move || share.attach(&id, &binds, server.as_fd()))
                .await
                .map_err(|e| Error::io("mount in", &self.directory)(e.into()))??;
        }
        faults::at("create: attached");
        let pid_namespace_of = match plan.pid_namespace_of {
            None => String::new(),
            Some(pid) => self.member_of_pid(&up, pid)?,
        };
        let on_host = self.stand_for(&up, &asked.id, first).await?;
        faults::at("create: on the host");
        let disks = self.disks.acquire(&up.vm, &asked.id, devices).await?;
        let hook_state = hooks::State {
            pid: Some(on_host.pid()),
            ..hook_state.clone()
        };
        if !first {
            // Those of the first container have run before the VM's network was looked at.
            pod::run_creation_hooks(host_hooks, &hook_state).await?;
        }
        let spec = serde_json::to_vec(&plan.guest).map_err(|e| Error::Invalid {
            what: "OCI spec",
            reason: e.to_string(),
        })?;
        let request = CreateContainerRequest {
            container_id: asked.id.clone(),
            spec,
            stdio: MessageField::some(stdio),
            shared_namespaces: plan.shared_namespaces.clone(),
            pid_namespace_of,
            rootfs: MessageField::some(RootFs {
                share_path: Path::new(&asked.id)
                    .join(paths::ROOTFS)
                    .display()
                    .to_string(),
                ..Default::default()
            }),
            disks,
            memory_volumes: plan.memory.clone(),
            apparmor_policy: plan.apparmor_policy.clone(),
            // pivot_root(2) refuses to move an initramfs.
            no_pivot: asked.no_pivot || self.config.initrd.is_some(),
            ..Default::default()
        };
        self.call(&up, up.agent.create_container(&request)).await?;
        Ok((up, hook_state, on_host))
    }

    /// Gives a container its place among the host's processes: the pod's first has the VMM's.
    async fn stand_for(&self, up: &Up, id: &str, first: bool) -> Result<OnHost> {
        let root = self.share.path().join(id).join(paths::ROOTFS);
        if first {
            up.vm.enter_root(&root).await?;
            return Ok(OnHost::Vmm(up.vm.vmm_pid));
        }
        let failed = Error::io("make a thread that stands for", &root);
        let opened = open_directory(&root).and_then(|root| Ok((root, up.netns.try_clone()?)));
        let start = move || opened.and_then(|(root, netns)| StandIn::start(root.into(), netns));
        let started = tokio::task::spawn_blocking(start).await;
        let started = started.unwrap_or_else(|e| Err(e.into()));
        started.map(OnHost::StandIn).map_err(failed)
    }

    /// Which container of the pod a pid stands for; empty for the pod itself.
    fn member_of_pid(&self, up: &Up, pid: u32) -> Result<String> {
        if pid == up.vm.vmm_pid {
            return Ok(String::new());
        }
        let containers = lock(&self.containers);
        let found = containers.values().find(|container| container.pid == pid);
        let error = || spec::Error::ForeignNamespace {
            kind: "pid".into(),
            path: format!("/proc/{pid}/ns/pid").into(),
        };
        Ok(found.ok_or_else(error)?.id.clone())
    }
}

fn root_mount(mount: &Mount) -> RootMount {
    RootMount {
        kind: mount.type_.clone(),
        source: mount.source.clone(),
        options: mount.options.clone(),
    }
}

fn task_io(wanted: &Wanted) -> TaskIO {
    TaskIO {
        stdin: wanted.stdin.clone(),
        stdout: wanted.stdout.clone(),
        stderr: wanted.stderr.clone(),
        terminal: wanted.terminal,
        ..Default::default()
    }
}
