//! The OCI spec: what of it is the host's, and what the guest gets.
//!
//! Pure: nothing is mounted or made here. [`crate::rootfs`] does what [`Plan::binds`] says. The
//! agent's side of this is its `plan.rs`, which fits the rest to the guest.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::{
    Hooks, LinuxIdMapping, LinuxNamespace, LinuxNamespaceType, Mount, Process, RootBuilder, Spec,
};
use sepal_protocol::agent::MemoryVolume;
use sepal_protocol::paths;

use crate::annotations::Role;
use crate::mirror::Mirror;
use crate::sys::BindOptions;
use crate::users::{self, IdMap, Users};

/// Longest config.json that is read, in bytes; the agent's messages hold at most 4 MiB.
const MAX_SPEC: u64 = 3 << 20;
/// Size of /dev/shm where nothing says another, in bytes: what runc's default spec says.
pub const DEFAULT_SHM: u64 = 64 << 20;

const SHM: &str = "/dev/shm";
/// containerd's plug-in that makes pods by the sandbox API: so it names the directory of its bundles.
const SANDBOX_CONTROLLER: &str = "io.containerd.sandbox.controller.v1.shim";

/// Why a spec cannot be run in a guest.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("OCI spec {}: cannot read it: {source}", .path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("OCI spec {}: {source}", .path.display())]
    Parse {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("the OCI spec has no process")]
    NoProcess,
    #[error("the OCI spec has no Linux section")]
    NoLinux,
    #[error(
        "the host's network cannot be shared with a virtual machine: leave out --net-host, \
         --network=host or hostNetwork"
    )]
    HostNetwork,
    #[error(
        "the host's {kind} namespace cannot be shared with a virtual machine: leave out {option}"
    )]
    HostNamespace {
        kind: &'static str,
        option: &'static str,
    },
    #[error(transparent)]
    Users(#[from] users::Error),
    #[error("the container is to have other users than its pod: a pod has one user namespace")]
    OtherUsers,
    #[error(
        "block device {} cannot be given to a pod with a user namespace (hostUsers: false)",
        .0.display()
    )]
    DiskOfUsers(PathBuf),
    #[error(
        "volume {} is to show other owners (idmap), and neither it nor the container says which",
        .0.display()
    )]
    NoIdMap(PathBuf),
    #[error(
        "volume {} is to be {option} (mountPropagation: Bidirectional): what a virtual machine \
         mounts cannot appear on the host; use rslave (HostToContainer)",
        .destination.display()
    )]
    SharedVolume {
        destination: PathBuf,
        option: String,
    },
    #[error(
        "volume {} cannot be both rro and {option}: what the host mounts in it later would be \
         writable",
        .destination.display()
    )]
    FollowsReadOnly {
        destination: PathBuf,
        option: String,
    },
    #[error(
        "the {kind} namespace {} belongs to another pod: every pod has its own kernel",
        .path.display()
    )]
    ForeignNamespace { kind: String, path: PathBuf },
    #[error("mount source {} for {} does not exist on the host", .source_path.display(), .destination.display())]
    NoSource {
        source_path: PathBuf,
        destination: PathBuf,
    },
    #[error("mount source {} for {}: {error}", .source_path.display(), .destination.display())]
    Source {
        source_path: PathBuf,
        destination: PathBuf,
        error: std::io::Error,
    },
    #[error(
        "mount source {} for {} is a {kind}: a guest cannot reach the host through it; \
         mount a file or a directory",
        .source_path.display(), .destination.display()
    )]
    SpecialFile {
        source_path: PathBuf,
        destination: PathBuf,
        kind: &'static str,
    },
    #[error("bind mount for {} has no source", .destination.display())]
    SourceMissing { destination: PathBuf },
}

impl Error {
    /// The host's shared memory and semaphores are wanted.
    pub const HOST_IPC: Self = Self::HostNamespace {
        kind: "IPC",
        option: "--ipc=host or hostIPC",
    };
    /// The host's processes are wanted.
    pub const HOST_PID: Self = Self::HostNamespace {
        kind: "PID",
        option: "--pid=host or hostPID",
    };
}

/// The network namespace of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// One that somebody else made.
    Join(PathBuf),
    /// A new one, for hooks to fill.
    New,
}

/// A bind mount to make below the container's directory in the share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// How.
    pub options: BindOptions,
    /// A directory, else a file.
    pub directory: bool,
    /// Who owns what in it, where that is not as on the host.
    pub owners: Option<IdMap>,
}

/// A volume that the guest has itself.
#[derive(Debug)]
pub enum Kept {
    /// A copy of the host's.
    Copy(Arc<Mirror>),
    /// A file system in the guest's memory.
    Memory(MemoryVolume),
}

/// Answers whether the guest has a volume itself: from where it is on the host, how a container gets it, and
/// whose users its owners are.
pub type Keeping<'a> = dyn Fn(&Path, &BindOptions, Option<&Users>) -> Option<Kept> + 'a;

/// What becomes of a container's spec.
#[derive(Debug)]
pub struct Plan {
    /// For the agent.
    pub guest: Spec,
    /// The root file system on the host, where no mounts are given for it.
    pub root: PathBuf,
    /// In the order of their names below `mounts/`.
    pub binds: Vec<Bind>,
    /// Volumes that the guest has copies of.
    pub copies: Vec<Arc<Mirror>>,
    /// Volumes that are the guest's memory.
    pub memory: Vec<MemoryVolume>,
    /// For the agent: AppArmor policy that has the container's profile.
    pub apparmor_policy: Vec<u8>,
    /// For the agent: OCI names of the namespaces that the pod's containers share.
    pub shared_namespaces: Vec<String>,
    /// Whose processes a pod's container shares, if it shares any: the pid on the host by which CRI
    /// names the pod or another container of it.
    pub pid_namespace_of: Option<u32>,
}

/// Reads a bundle's config.json.
///
/// # Errors
/// It cannot be read, or is not an OCI spec.
pub fn load(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join("config.json");
    let read = |source| Error::Read {
        path: path.clone(),
        source,
    };
    if std::fs::metadata(&path).map_err(read)?.len() > MAX_SPEC {
        return Err(read(std::io::Error::other("longer than 3 MiB")));
    }
    let bytes = std::fs::read(&path).map_err(read)?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Parse { path, source })
}

/// Takes the hooks that the host runs out of a spec; those that apply in a container stay.
pub fn take_host_hooks(spec: &mut Spec) -> Hooks {
    let mut host = Hooks::default();
    let Some(hooks) = spec.hooks_mut() else {
        return host;
    };
    #[allow(deprecated, reason = "prestart hooks are old, not gone")]
    {
        host.set_prestart(hooks.prestart().clone());
        hooks.set_prestart(None);
    }
    host.set_create_runtime(hooks.create_runtime().clone());
    hooks.set_create_runtime(None);
    host.set_poststart(hooks.poststart().clone());
    hooks.set_poststart(None);
    host.set_poststop(hooks.poststop().clone());
    hooks.set_poststop(None);
    host
}

/// Which network namespace the pod's VM lives in.
///
/// # Errors
/// The spec asks for the host's network.
pub fn network(spec: &Spec) -> Result<Network, Error> {
    let namespaces = namespaces(spec)?;
    let found = namespaces
        .iter()
        .find(|n| n.typ() == LinuxNamespaceType::Network);
    match found.map(LinuxNamespace::path) {
        None => Err(Error::HostNetwork),
        Some(None) => Ok(Network::New),
        Some(Some(path)) if path.as_os_str().is_empty() => Ok(Network::New),
        Some(Some(path)) => Ok(Network::Join(path.clone())),
    }
}

/// Who the users of a pod or a container are, where they are not the guest's own.
///
/// # Errors
/// The spec has a user namespace without a mapping that the kernel takes.
pub fn users(spec: &Spec) -> Result<Option<Users>, Error> {
    let is_user = |n: &LinuxNamespace| n.typ() == LinuxNamespaceType::User;
    if !namespaces(spec)?.iter().any(is_user) {
        return Ok(None);
    }
    let linux = spec.linux().as_ref().ok_or(Error::NoLinux)?;
    let users = mapping(linux.uid_mappings(), linux.gid_mappings())?;
    Ok(Some(users.with_root()?))
}

type Ranges = Option<Vec<LinuxIdMapping>>;

fn mapping(uids: &Ranges, gids: &Ranges) -> Result<Users, users::Error> {
    let ranges = |given: &Ranges| given.clone().unwrap_or_default();
    Users::new(&ranges(uids), &ranges(gids))
}

fn namespaces(spec: &Spec) -> Result<&[LinuxNamespace], Error> {
    let linux = spec.linux().as_ref().ok_or(Error::NoLinux)?;
    Ok(linux.namespaces().as_deref().unwrap_or_default())
}

/// Whether a bundle is a sandbox's: containerd's sandbox controller makes it, without the spec of any
/// container in it.
pub fn is_sandbox(bundle: &Path) -> bool {
    bundle.iter().any(|part| part == SANDBOX_CONTROLLER) || !bundle.join("config.json").exists()
}

/// What a container runs.
///
/// # Errors
/// A spec without it.
pub fn process(spec: &Spec) -> Result<&Process, Error> {
    spec.process().as_ref().ok_or(Error::NoProcess)
}

impl Plan {
    /// Rewrites a container's spec for the guest. `pod` are the users of the pod, where they are not the
    /// guest's own. `kept` is asked for directories.
    ///
    /// # Errors
    /// The spec asks for what a guest cannot have, or for a mount source that is not there.
    pub fn new(
        mut spec: Spec,
        container: &str,
        role: &Role,
        bundle: &Path,
        pod: Option<&Users>,
        kept: &Keeping<'_>,
    ) -> Result<Self, Error> {
        process(&spec)?;
        if users(&spec)?.as_ref() != pod {
            return Err(Error::OtherUsers);
        }
        let in_guest = Path::new(paths::guest::SHARE).join(container);
        let given = spec.root().as_ref();
        // Relative to the bundle (runtime-spec, config.md, "Root").
        let root = bundle.join(given.map_or(Path::new(paths::ROOTFS), |given| given.path()));
        let read_only = given.and_then(|given| given.readonly()).unwrap_or(false);
        let in_share = RootBuilder::default()
            .path(in_guest.join(paths::ROOTFS))
            .readonly(read_only)
            .build()
            .ok();
        spec.set_root(in_share);
        take_host_hooks(&mut spec);
        let pid_namespace_of = pid_namespace_of(&spec, role);
        let shared_namespaces = share_namespaces(&mut spec, role)?;
        let (mut binds, mut copies, mut memory) = (Vec::new(), Vec::new(), Vec::new());
        for mount in spec.mounts_mut().iter_mut().flatten() {
            if !is_bind(mount) {
                continue;
            }
            let destination = mount.destination().clone();
            let Some(source) = mount.source().clone() else {
                return Err(Error::SourceMissing { destination });
            };
            if is_shm(mount, role) {
                mount.set_source(Some(paths::guest::SHM.into()));
                continue;
            }
            let source = bundle.join(source);
            let directory = check_source(&source, &destination)?;
            let options = bind_options(mount)?;
            let owners = take_owners(mount, pod)?;
            let shown = owners.as_ref().map(|owners| &owners.users);
            let kept = |source| kept(source, &options, shown);
            match directory.then(|| kept(&source)).flatten() {
                Some(Kept::Copy(copy)) => {
                    mount.set_source(Some(copy.in_guest()));
                    copies.push(copy);
                    continue;
                }
                Some(Kept::Memory(volume)) => {
                    let own = Path::new(paths::guest::CONTAINERS).join(container);
                    let all = own.join(paths::guest::CONTAINER_MEMORY);
                    mount.set_source(Some(all.join(memory.len().to_string())));
                    memory.push(volume);
                    continue;
                }
                None => {}
            }
            let target = in_guest.join(paths::MOUNTS).join(binds.len().to_string());
            mount.set_source(Some(target));
            binds.push(Bind {
                source,
                options,
                directory,
                owners,
            });
        }
        Ok(Self {
            guest: spec,
            root,
            binds,
            copies,
            memory,
            apparmor_policy: Vec::new(),
            shared_namespaces,
            pid_namespace_of,
        })
    }

    /// Gives a container of a pod without a pause container what containerd gives it otherwise: the
    /// pod's files in /etc, of these names, and the pod's /dev/shm. What the spec has is kept.
    pub fn complete<'a>(&mut self, files: impl Iterator<Item = &'a str>) {
        let spec = &mut self.guest;
        let read_only = spec.root().as_ref().and_then(|r| r.readonly()) == Some(true);
        let access = if read_only { "ro" } else { "rw" };
        let shares_ipc = self.shared_namespaces.iter().any(|name| name == "ipc");
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in &mut mounts {
            // The default of containerd's specs.
            if mount.destination() == Path::new(SHM) && !is_bind(mount) && shares_ipc {
                let options = ["rbind", "nosuid", "noexec", "nodev"];
                mount.set_typ(Some("bind".into()));
                mount.set_source(Some(paths::guest::SHM.into()));
                mount.set_options(Some(options.map(String::from).into()));
            }
        }
        for name in files {
            let destination = Path::new("/etc").join(name);
            if mounts.iter().any(|m| *m.destination() == destination) {
                continue;
            }
            let options = ["rbind", "rprivate", access];
            let mut mount = Mount::default();
            mount.set_destination(destination);
            mount.set_typ(Some("bind".into()));
            mount.set_source(Some(Path::new(paths::guest::ETC).join(name)));
            mount.set_options(Some(options.map(String::from).into()));
            mounts.push(mount);
        }
        spec.set_mounts(Some(mounts));
    }
}

fn is_bind(mount: &Mount) -> bool {
    let option = |o: &String| o == "bind" || o == "rbind";
    mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(option)
}

/// CRI gives all containers of a pod one tmpfs of the host as /dev/shm, `sandboxes/ID/shm` in
/// containerd's state. In a guest it must be the guest's own memory: pages shared through a file
/// server are not coherent. A volume that somebody wants there is a volume like any other.
fn is_shm(mount: &Mount, role: &Role) -> bool {
    let mut parts = mount.source().iter().flat_map(|source| source.iter()).rev();
    *role != Role::Alone
        && mount.destination() == Path::new(SHM)
        && parts.next().is_some_and(|name| name == "shm")
        && parts.nth(1).is_some_and(|name| name == "sandboxes")
}

/// The size of a process's terminal in rows and columns, where its spec tells one.
pub fn console_size(process: Option<&Process>) -> Option<(u32, u32)> {
    let size = process?.console_size()?;
    Some((
        u32::try_from(size.height()).ok()?,
        u32::try_from(size.width()).ok()?,
    ))
}

/// Size of the /dev/shm that the pod's containers share, in bytes; 0: they share none.
pub fn shm_size(spec: &Spec, role: &Role) -> u64 {
    let shared = |m: &&Mount| is_bind(m) && is_shm(m, role);
    match spec.mounts().iter().flatten().find(shared) {
        Some(mount) => mount
            .source()
            .as_deref()
            .and_then(size_of_file_system)
            .unwrap_or(DEFAULT_SHM),
        None if *role == Role::Alone => 0,
        None => DEFAULT_SHM,
    }
}

fn size_of_file_system(path: &Path) -> Option<u64> {
    let stat = nix::sys::statvfs::statvfs(path).ok()?;
    Some(stat.blocks() * stat.fragment_size()).filter(|size| *size > 0)
}

/// Whether the source is a directory, after checking that a guest can use it.
fn check_source(source: &Path, destination: &Path) -> Result<bool, Error> {
    let (source_path, destination) = (source.to_path_buf(), destination.to_path_buf());
    let kind = match std::fs::metadata(source) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::NoSource {
                source_path,
                destination,
            });
        }
        Err(error) => {
            return Err(Error::Source {
                source_path,
                destination,
                error,
            });
        }
    };
    let special = if kind.is_socket() {
        "socket"
    } else if kind.is_fifo() {
        "FIFO"
    } else if kind.is_block_device() || kind.is_char_device() {
        "device"
    } else {
        return Ok(kind.is_dir());
    };
    Err(Error::SpecialFile {
        source_path,
        destination,
        kind: special,
    })
}

fn bind_options(mount: &Mount) -> Result<BindOptions, Error> {
    let mut options = BindOptions {
        recursive: true,
        ..BindOptions::default()
    };
    let mut propagation = None;
    for option in mount.options().iter().flatten() {
        match option.as_str() {
            "bind" => options.recursive = false,
            "rbind" => options.recursive = true,
            "ro" => options.read_only = true,
            "rw" => options.read_only = false,
            "rro" => options.recursive_read_only = true,
            "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" => {
                propagation = Some(option.as_str());
            }
            _ => {}
        }
    }
    let destination = mount.destination();
    match propagation {
        Some(option @ ("shared" | "rshared")) => Err(Error::SharedVolume {
            destination: destination.clone(),
            option: option.into(),
        }),
        Some(option @ ("slave" | "rslave")) if options.recursive_read_only => {
            Err(Error::FollowsReadOnly {
                destination: destination.clone(),
                option: option.into(),
            })
        }
        other => {
            options.follows_source = matches!(other, Some("slave" | "rslave"));
            Ok(options)
        }
    }
}

/// Takes out of a volume how it shows the owners of its files: by mappings of its own, or as the
/// container's users.
fn take_owners(mount: &mut Mount, pod: Option<&Users>) -> Result<Option<IdMap>, Error> {
    let mut options = mount.options().clone().unwrap_or_default();
    let mut asked = None;
    options.retain(|option| {
        let other = !matches!(option.as_str(), "idmap" | "ridmap");
        asked = if other {
            asked
        } else {
            Some(option == "ridmap")
        };
        other
    });
    let (uids, gids) = (mount.uid_mappings().clone(), mount.gid_mappings().clone());
    let some = |ranges: &Ranges| ranges.as_ref().is_some_and(|ranges| !ranges.is_empty());
    let users = match asked {
        _ if some(&uids) || some(&gids) => mapping(&uids, &gids)?,
        None => return Ok(None),
        Some(_) => {
            let missing = || Error::NoIdMap(mount.destination().clone());
            pod.cloned().ok_or_else(missing)?
        }
    };
    mount.set_options(Some(options));
    mount.set_uid_mappings(None).set_gid_mappings(None);
    let recursive = asked == Some(true);
    Ok(Some(IdMap { users, recursive }))
}

/// The process whose PID namespace a pod's further container is to join, by the path that CRI gives.
fn pid_namespace_of(spec: &Spec, role: &Role) -> Option<u32> {
    let member = matches!(role, Role::Member { .. });
    let mut namespaces = namespaces(spec).ok()?.iter().filter(|_| member);
    let pid = namespaces.find(|n| n.typ() == LinuxNamespaceType::Pid)?;
    let path = pid.path().as_ref()?.strip_prefix("/proc").ok()?;
    path.to_str()?.strip_suffix("/ns/pid")?.parse().ok()
}

/// Takes the host's paths out of the namespaces; answers which ones the pod's containers share.
fn share_namespaces(spec: &mut Spec, role: &Role) -> Result<Vec<String>, Error> {
    use LinuxNamespaceType::{Ipc, Network, Pid, User, Uts};
    refuse_host_namespaces(namespaces(spec)?)?;
    let mut shared = Vec::new();
    let linux = spec.linux_mut().as_mut().ok_or(Error::NoLinux)?;
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        let kind = namespace.typ();
        let path = namespace
            .path()
            .clone()
            .filter(|p| !p.as_os_str().is_empty());
        namespace.set_path(None);
        let is_shared = match role {
            // The VM itself is the network namespace, whoever made the host's side of it.
            _ if kind == Network => true,
            // The guest has one of its own with the same users.
            _ if kind == User => true,
            Role::Alone => {
                if let Some(path) = path {
                    return Err(Error::ForeignNamespace {
                        kind: oci_name(kind),
                        path,
                    });
                }
                false
            }
            // Those that CRI's other containers may join.
            Role::Sandbox => matches!(kind, Ipc | Uts | Pid),
            Role::Member { .. } => path.is_some(),
        };
        if is_shared {
            shared.push(oci_name(kind));
        }
    }
    Ok(shared)
}

/// What a spec does not name it has from the host ("config-linux", Namespaces). A pod's containers
/// name their pod's namespaces, and those of shareProcessNamespace or of a target container: nothing
/// of theirs is absent.
fn refuse_host_namespaces(namespaces: &[LinuxNamespace]) -> Result<(), Error> {
    use LinuxNamespaceType::{Ipc, Pid};
    for (kind, error) in [(Ipc, Error::HOST_IPC), (Pid, Error::HOST_PID)] {
        if namespaces.iter().all(|n| n.typ() != kind) {
            return Err(error);
        }
    }
    Ok(())
}

/// As the specification writes it; the type's Display is the kernel's name.
fn oci_name(kind: LinuxNamespaceType) -> String {
    match serde_json::to_value(kind) {
        Ok(serde_json::Value::String(name)) => name,
        _ => kind.to_string(),
    }
}

#[cfg(test)]
#[path = "spec_test.rs"]
mod tests;
