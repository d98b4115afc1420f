//! What a pod shall be: from the OCI spec of its first container, or, where containerd's sandbox API
//! makes the pod, from Kubernetes' description of it.
//!
//! Reads files, makes nothing. [`crate::pod`] does what is said here.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::{Hooks, Spec};
use protobuf::EnumOrUnknown;
use sepal_protocol::config::Config;
use sepal_protocol::cri::{DNSConfig, NamespaceMode, PodSandboxConfig};

use crate::annotations::{Annotations, CriResources, Role};
use crate::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::hooks;
use crate::limits::{Limits, Totals};
use crate::size::{Host, Size};
use crate::spec::{self, Network};
use crate::users::Users;

/// OOM score of a pod's processes where no container's spec tells one: what containerd gives a pause
/// container (kubernetes#47938).
const SANDBOX_OOM_SCORE: i32 = -998;
/// How containerd names its scopes where systemd has the cgroups.
const SCOPE_PREFIX: &str = "cri-containerd";
/// Type of the description; what may stand before it in a type's URL is a host's name.
const POD_SANDBOX_CONFIG: &str = "runtime.v1.PodSandboxConfig";
/// Longest host name, sethostname(2).
const MAX_HOSTNAME: usize = 64;
/// Longest file for the containers' /etc, in bytes: all of them go to the guest in one message of at
/// most 4 MiB.
const MAX_ETC_FILE: usize = 1 << 20;

/// What a pod shall be.
#[derive(Debug)]
pub struct PodSpec {
    /// Whether it is one container, or a place for several.
    pub role: Role,
    /// The pod is the VM itself: none of its containers lives as long as it does.
    pub bare: bool,
    /// Its host name; empty: the guest's own.
    pub hostname: String,
    /// How large its VM is when it boots.
    pub size: Size,
    /// What its containers may use in all, as far as it is known then.
    pub totals: Totals,
    /// What the pod itself says, `io.sepal.*` among it.
    pub annotations: Annotations,
    /// Where its network comes from.
    pub network: Network,
    /// Its users, where it has a user namespace.
    pub users: Option<Users>,
    /// Its cgroup on the host.
    pub cgroup: Cgroup,
    /// OOM score adjustment of its processes on the host.
    pub oom_score: i32,
    /// Kernel parameters to be set in the guest before any container is there.
    pub sysctls: HashMap<String, String>,
    /// Size of the /dev/shm that its containers share, in bytes; 0: they share none.
    pub shm_size: u64,
    /// Hooks that run on the host before the network is looked at.
    pub hooks: Hooks,
    /// What they get, without the pid.
    pub hook_state: hooks::State,
    /// Files that its containers find in /etc, by name, unless they bring their own.
    pub files: HashMap<String, String>,
}

/// What containerd says of a sandbox.
#[derive(Debug, Default)]
pub struct SandboxRequest {
    /// containerd's id of it.
    pub id: String,
    /// containerd's directory for it.
    pub bundle: PathBuf,
    /// Kubernetes' description, where Kubernetes it is.
    pub options: Option<Any>,
    /// The network namespace that CNI has set up; empty: none.
    pub netns: String,
    /// Beyond those of the description.
    pub annotations: Annotations,
}

impl PodSpec {
    /// A pod that begins with the container of a bundle. `pod` is the name of its directory.
    ///
    /// # Errors
    /// The bundle's spec cannot be read, or asks for what a VM cannot be.
    pub fn of_container(id: &str, pod: &str, bundle: &Path, config: &Config) -> Result<Self> {
        let mut spec = spec::load(bundle)?;
        let oom_score = spec::process(&spec)?.oom_score_adj();
        let annotations = spec.annotations().clone().unwrap_or_default();
        let role = Role::of(&annotations);
        let linux = spec.linux().as_ref();
        let resources = linux.and_then(|l| l.resources().as_ref());
        let totals = Limits::of(resources).of_pod(CriResources::of(&annotations));
        let size = Size::plan(&annotations, totals, config, Host::here())?;
        let network = spec::network(&spec)?;
        let users = spec::users(&spec)?;
        let cgroups_path = linux.and_then(|l| l.cgroups_path().as_deref());
        // The network namespace is the VM's own; other parameters belong to the container's.
        let mut sysctls = sysctls_of(&spec);
        sysctls.retain(|name, _| name.starts_with("net."));
        Ok(Self {
            size,
            totals,
            annotations,
            network,
            users,
            cgroup: Cgroup::plan(cgroups_path, pod)?,
            bare: false,
            hostname: spec.hostname().clone().unwrap_or_default(),
            oom_score: oom_score.unwrap_or(0),
            sysctls,
            shm_size: spec::shm_size(&spec, &role),
            hook_state: hooks::State::creating(&spec, id, bundle, None),
            hooks: spec::take_host_hooks(&mut spec),
            files: HashMap::new(),
            role,
        })
    }

    /// A pod without a container of its own. `pod` is the name of its directory.
    ///
    /// # Errors
    /// The description cannot be read, or asks for what a VM cannot be.
    pub fn of_sandbox(asked: &SandboxRequest, pod: &str, config: &Config) -> Result<Self> {
        let wanted = describe(asked)?;
        let linux = wanted.linux.get_or_default();
        let users = users(&wanted)?;
        let mut annotations = wanted.annotations.clone();
        annotations.extend(asked.annotations.clone());
        let resources = linux.resources.get_or_default();
        let limits = CriResources {
            memory: Some(resources.memory_limit_in_bytes).filter(|v| *v > 0),
            quota: Some(resources.cpu_quota).filter(|v| *v > 0),
            period: u64::try_from(resources.cpu_period).ok().filter(|v| *v > 0),
        };
        let totals = Limits::default().of_pod(limits);
        let size = Size::plan(&annotations, totals, config, Host::here())?;
        let cgroups_path = cgroups_path(&linux.cgroup_parent, &asked.id);
        let network = match asked.netns.as_str() {
            "" => Network::New,
            path => Network::Join(path.into()),
        };
        let hostname = match wanted.hostname.as_str() {
            "" => host_name(),
            name => name.into(),
        };
        if hostname.len() > MAX_HOSTNAME || hostname.contains(['\n', '\0']) {
            return Err(Error::Invalid {
                what: "host name",
                reason: format!("{hostname:?} is not one"),
            });
        }
        Ok(Self {
            role: Role::Sandbox,
            bare: true,
            files: etc_files(&hostname, wanted.dns_config.as_ref())?,
            hostname,
            size,
            totals,
            annotations: annotations.clone(),
            network,
            users,
            cgroup: Cgroup::plan(cgroups_path.as_deref(), pod)?,
            oom_score: SANDBOX_OOM_SCORE,
            sysctls: with_defaults(&linux.sysctls),
            shm_size: spec::DEFAULT_SHM,
            hooks: Hooks::default(),
            hook_state: hooks::State {
                oci_version: String::new(),
                id: asked.id.clone(),
                status: "creating",
                pid: None,
                bundle: asked.bundle.clone(),
                annotations,
            },
        })
    }
}

/// Who the pod's users are; refuses namespaces of the host's that a VM cannot have, as [`spec`] does for
/// pods with a container.
fn users(wanted: &PodSandboxConfig) -> Result<Option<Users>> {
    let linux = wanted.linux.get_or_default();
    let security = linux.security_context.get_or_default();
    let namespaces = security.namespace_options.get_or_default();
    let node = EnumOrUnknown::new(NamespaceMode::NODE);
    if namespaces.network == node {
        return Err(spec::Error::HostNetwork.into());
    }
    if namespaces.pid == node {
        return Err(spec::Error::HOST_PID.into());
    }
    if namespaces.ipc == node {
        return Err(spec::Error::HOST_IPC.into());
    }
    let Some(users) = namespaces.userns_options.as_ref() else {
        return Ok(None);
    };
    match users.mode.enum_value() {
        Ok(NamespaceMode::NODE) => Ok(None),
        Ok(NamespaceMode::POD) => {
            let made = Users::new(&users.uids, &users.gids).and_then(Users::with_root);
            Ok(Some(made.map_err(spec::Error::from)?))
        }
        _ => Err(Error::Invalid {
            what: "user namespace",
            reason: "it is the pod's or the node's, and nothing else".into(),
        }),
    }
}

/// Kubernetes' description of the pod. Other clients (`ctr sandboxes run`) give none and may have put
/// an OCI spec into the bundle: what of it concerns a pod counts.
fn describe(asked: &SandboxRequest) -> Result<PodSandboxConfig> {
    let invalid = |reason| Error::Invalid {
        what: "sandbox options",
        reason,
    };
    match &asked.options {
        Some(any) if any.type_url.rsplit('/').next() == Some(POD_SANDBOX_CONFIG) => {
            PodSandboxConfig::parse_from_bytes(&any.value).map_err(|e| invalid(e.to_string()))
        }
        Some(any) if !any.type_url.is_empty() => Err(invalid(format!(
            "{} is not known: sepal reads {POD_SANDBOX_CONFIG}",
            any.type_url
        ))),
        _ if asked.bundle.join("config.json").exists() => {
            Ok(described_by(&spec::load(&asked.bundle)?))
        }
        _ => Ok(PodSandboxConfig::new()),
    }
}

fn described_by(spec: &Spec) -> PodSandboxConfig {
    let mut wanted = PodSandboxConfig::new();
    wanted.hostname = spec.hostname().clone().unwrap_or_default();
    wanted.annotations = spec.annotations().clone().unwrap_or_default();
    let pod = wanted.linux.mut_or_insert_default();
    pod.sysctls = sysctls_of(spec);
    let given = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    let limits = pod.resources.mut_or_insert_default();
    if let Some(memory) = given.and_then(|r| r.memory().as_ref()) {
        limits.memory_limit_in_bytes = memory.limit().unwrap_or(0);
    }
    if let Some(cpu) = given.and_then(|r| r.cpu().as_ref()) {
        limits.cpu_quota = cpu.quota().unwrap_or(0);
        limits.cpu_period = i64::try_from(cpu.period().unwrap_or(0)).unwrap_or(0);
    }
    wanted
}

fn sysctls_of(spec: &Spec) -> HashMap<String, String> {
    let linux = spec.linux().as_ref();
    linux.and_then(|l| l.sysctl().clone()).unwrap_or_default()
}

/// What containerd sets for pods with a pause container unless it is told otherwise
/// (`enable_unprivileged_ports`, `enable_unprivileged_icmp`); it does not tell a shim.
fn with_defaults(given: &HashMap<String, String>) -> HashMap<String, String> {
    const DEFAULTS: [(&str, &str); 2] = [
        ("net.ipv4.ip_unprivileged_port_start", "0"),
        ("net.ipv4.ping_group_range", "0 2147483647"),
    ];
    let mut sysctls = given.clone();
    for (name, value) in DEFAULTS {
        sysctls.entry(name.into()).or_insert_with(|| value.into());
    }
    sysctls
}

/// Where containerd puts a pause container's cgroup: the same place, so that what reads pods' cgroups
/// finds the pod whoever has made it.
fn cgroups_path(parent: &str, id: &str) -> Option<PathBuf> {
    let base = parent.rsplit('/').find(|part| !part.is_empty())?;
    Some(if base.ends_with(".slice") {
        format!("{base}:{SCOPE_PREFIX}:{id}").into()
    } else {
        Path::new(parent).join(id)
    })
}

/// What containerd itself writes for a pod with a pause container.
fn etc_files(hostname: &str, dns: Option<&DNSConfig>) -> Result<HashMap<String, String>> {
    let of_host = |path| {
        let bytes = std::fs::read(path).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let resolv_conf = dns.map_or_else(|| of_host("/etc/resolv.conf"), resolv_conf);
    let files: HashMap<String, String> = [
        ("hostname", format!("{hostname}\n")),
        ("hosts", of_host("/etc/hosts")),
        ("resolv.conf", resolv_conf),
    ]
    .map(|(name, text)| (name.to_string(), text))
    .into();
    match files.iter().find(|(_, text)| text.len() > MAX_ETC_FILE) {
        Some((name, text)) => Err(Error::Invalid {
            what: "the pod's files",
            reason: format!(
                "/etc/{name} would have {} bytes, at most {MAX_ETC_FILE} are possible",
                text.len()
            ),
        }),
        None => Ok(files),
    }
}

fn resolv_conf(dns: &DNSConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim_end().to_string()
}

#[cfg(test)]
#[path = "podspec_test.rs"]
mod tests;
