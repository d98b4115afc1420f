//! From the OCI spec of a container to what libcontainer shall do in the guest.
//!
//! Pure: what has to be known of the guest comes in as [`Facts`]. A spec is written for a host; in
//! the guest some of it is done already (network, runtime hooks), some is meaningless (the host's
//! devices, CPU numbers, security modules), and some would be wrong for reasons of libcontainer's.
//! What is left out is told in [`Plan::left_out`].

use std::ffi::CString;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{
    Capabilities, HooksBuilder, Linux, LinuxCapabilitiesBuilder, LinuxDevice, LinuxDeviceCgroup,
    LinuxDeviceType, LinuxIdMapping, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxResources, Mount, Process, Spec,
};

use crate::error::{Error, Result};

/// A device node: its kind, major and minor number.
pub type DeviceNode = (LinuxDeviceType, i64, i64);

/// What a plan depends on in the guest.
pub struct Facts<'a> {
    /// Whether a file exists in the container's cgroup directory.
    pub cgroup_file: &'a dyn Fn(&str) -> bool,
    /// What a device of the spec is in the guest.
    pub device: &'a dyn Fn(&LinuxDevice) -> Option<DeviceNode>,
}

/// A process and the surroundings it shall have, in the guest's terms.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The spec for libcontainer. Namespaces without a path are made, those with one are joined.
    pub spec: Spec,
    /// The program and its arguments; never empty.
    pub args: Vec<CString>,
    /// The environment in the spec's order.
    pub env: Vec<CString>,
    /// The user that owns the standard streams, in the guest's initial user namespace.
    pub owner: u32,
    /// OOM score adjustment; without one in the spec 0, not the agent's own.
    pub oom_score_adj: i32,
    /// Which devices the container may use.
    pub device_rules: Vec<LinuxDeviceCgroup>,
    /// Whether the process shall live in the PID namespace that the pod's containers share.
    pub shared_pid_namespace: bool,
    /// Whether it shall live in the pod's user namespace.
    pub user_namespace: bool,
    /// What of the spec has no place in the guest.
    pub left_out: Vec<String>,
}

/// Plans a container's init process. `shared` are the OCI types of the namespaces that the
/// container shares with the pod's others; `root` is its root file system in the guest.
///
/// # Errors
/// [`Error::Invalid`] with the one thing that is wrong with the spec.
pub fn container(mut spec: Spec, shared: &[String], root: &Path, facts: &Facts) -> Result<Plan> {
    let mut left_out = Vec::new();
    let mut process = spec
        .process()
        .clone()
        .ok_or_else(|| invalid("the OCI spec has no process"))?;
    if process.capabilities().is_none() {
        // libcontainer would leave all of them.
        process.set_capabilities(Some(no_capabilities()?));
    }
    check_process(&mut process, &mut left_out)?;

    let mut oci_root = spec
        .root()
        .clone()
        .ok_or_else(|| invalid("the OCI spec has no root"))?;
    oci_root.set_path(root.to_path_buf());
    spec.set_root(Some(oci_root));

    let mut linux = spec.linux().clone().unwrap_or_default();
    let names: Vec<LinuxNamespaceType> = namespaces(&mut linux, shared)?;
    let shared_pid_namespace = !names.contains(&LinuxNamespaceType::Pid);
    let user_namespace = names.contains(&LinuxNamespaceType::User);
    if !user_namespace {
        linux.set_uid_mappings(None).set_gid_mappings(None);
    }
    if !names.contains(&LinuxNamespaceType::Uts) {
        // The guest's own host name is the pod's (SetUpPod).
        spec.set_hostname(None).set_domainname(None);
    }
    adapt_linux(&mut linux, &mut left_out, facts);
    check_sysctls(&linux)?;

    // These have run on the host, or will.
    if let Some(hooks) = spec.hooks() {
        let mut kept = HooksBuilder::default();
        if let Some(hooks) = hooks.create_container() {
            kept = kept.create_container(hooks.clone());
        }
        if let Some(hooks) = hooks.start_container() {
            kept = kept.start_container(hooks.clone());
        }
        let kept = kept.build().map_err(|error| invalid(&error.to_string()))?;
        let any = kept.create_container().is_some() || kept.start_container().is_some();
        spec.set_hooks(any.then_some(kept));
    }
    if let Some(mounts) = spec.mounts() {
        let mounts = mounts.iter().map(adapt_mount).collect::<Result<_>>()?;
        spec.set_mounts(Some(mounts));
    }

    // devices.rs does this part.
    let mut device_rules = Vec::new();
    if let Some(resources) = linux.resources() {
        let mut resources = resources.clone();
        device_rules = resources.devices().clone().unwrap_or_default();
        resources.set_devices(None);
        linux.set_resources(Some(resources));
    }
    let owner = guest_uid(&linux, process.user().uid())?;
    spec.set_linux(Some(linux));
    let mut plan = finish(spec, process, owner, shared_pid_namespace, left_out)?;
    plan.device_rules = device_rules;
    plan.user_namespace = user_namespace;
    Ok(plan)
}

/// Plans a further process in a container that was made by `of`. `join` are the namespaces of that
/// container's init process, to be joined by their paths.
///
/// # Errors
/// [`Error::Invalid`] with the one thing that is wrong with the process.
pub fn exec(of: &Plan, mut process: Process, join: Vec<LinuxNamespace>) -> Result<Plan> {
    let mut left_out = Vec::new();
    let init = of
        .spec
        .process()
        .as_ref()
        .ok_or_else(|| invalid("the container has no process"))?;
    if process.capabilities().is_none() {
        process.set_capabilities(init.capabilities().clone());
    }
    if process.oom_score_adj().is_none() {
        process.set_oom_score_adj(init.oom_score_adj());
    }
    check_process(&mut process, &mut left_out)?;

    let mut spec = of.spec.clone();
    let mut linux = spec.linux().clone().unwrap_or_default();
    let owner = guest_uid(&linux, process.user().uid())?;
    // The container stands: what makes one must not be done again. Seccomp and personality stay.
    linux
        .set_namespaces(Some(join))
        .set_resources(None)
        .set_devices(None)
        .set_sysctl(None)
        .set_uid_mappings(None)
        .set_gid_mappings(None)
        .set_time_offsets(None)
        .set_masked_paths(None)
        .set_readonly_paths(None)
        .set_rootfs_propagation(None);
    spec.set_linux(Some(linux)).set_mounts(None).set_hooks(None);
    finish(spec, process, owner, of.shared_pid_namespace, left_out)
}

/// Plans a program of the guest image, outside of any container.
///
/// # Errors
/// [`Error::Invalid`] with the one thing that is wrong with the process.
pub fn guest(spec: Spec, mut process: Process) -> Result<Plan> {
    check_process(&mut process, &mut Vec::new())?;
    finish(spec, process, 0, false, Vec::new())
}

impl Plan {
    /// The same in one more namespace: one that is made, or joined if it has a path.
    #[must_use]
    pub fn joining(mut self, namespace: LinuxNamespace) -> Self {
        let mut linux = self.spec.linux().clone().unwrap_or_default();
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        namespaces.push(namespace);
        linux.set_namespaces(Some(namespaces));
        self.spec.set_linux(Some(linux));
        self
    }
}

fn finish(
    mut spec: Spec,
    process: Process,
    owner: u32,
    shared_pid_namespace: bool,
    left_out: Vec<String>,
) -> Result<Plan> {
    let strings = |what: &str, list: &Option<Vec<String>>| {
        list.iter()
            .flatten()
            .map(|text| {
                CString::new(text.as_bytes())
                    .map_err(|_| invalid(&format!("{what} of the process contains a NUL byte")))
            })
            .collect::<Result<Vec<_>>>()
    };
    let args = strings("an argument", process.args())?;
    if args.first().is_none_or(|program| program.is_empty()) {
        return Err(invalid("the process has no program to run"));
    }
    let env = strings("the environment", process.env())?;
    let oom_score_adj = process.oom_score_adj().unwrap_or(0);
    spec.set_process(Some(process));
    Ok(Plan {
        spec,
        args,
        env,
        owner,
        oom_score_adj,
        device_rules: Vec::new(),
        shared_pid_namespace,
        user_namespace: false,
        left_out,
    })
}

fn invalid(what: &str) -> Error {
    Error::Invalid(what.to_owned())
}

fn no_capabilities() -> Result<oci_spec::runtime::LinuxCapabilities> {
    let none = Capabilities::new;
    LinuxCapabilitiesBuilder::default()
        .bounding(none())
        .effective(none())
        .permitted(none())
        .inheritable(none())
        .ambient(none())
        .build()
        .map_err(|error| invalid(&error.to_string()))
}

fn check_process(process: &mut Process, left_out: &mut Vec<String>) -> Result<()> {
    if process.cwd().as_os_str().is_empty() {
        process.set_cwd(PathBuf::from("/"));
    }
    if !process.cwd().is_absolute() {
        return Err(invalid(&format!(
            "working directory {:?} is not absolute",
            process.cwd()
        )));
    }
    let user = process.user();
    for (what, id) in [("user", user.uid()), ("group", user.gid())]
        .into_iter()
        .chain(
            user.additional_gids()
                .iter()
                .flatten()
                .map(|gid| ("group", *gid)),
        )
    {
        // setuid(2) takes -1 for "leave as it is".
        if id == u32::MAX {
            return Err(invalid(&format!("{id} is not a valid {what} id")));
        }
    }
    if let Some(umask) = user.umask().filter(|umask| *umask > 0o777) {
        return Err(invalid(&format!("{umask:o} is not a valid umask")));
    }
    // libcontainer orders its steps by whether this is given, not by what it says.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    // Labels belong to the host's security module.
    if process.selinux_label().is_some() {
        process.set_selinux_label(None);
        left_out.push("the SELinux label".into());
    }
    // CPU numbers of the host.
    if process.exec_cpu_affinity().is_some() {
        process.set_exec_cpu_affinity(None);
        left_out.push("the CPU affinity".into());
    }
    Ok(())
}

/// Brings the namespaces to what the guest needs, and answers which will be the container's own.
///
/// The pod's network, host name and IPC namespaces are the guest's own, and so a container that
/// shares them (or was meant to have the host's) simply stays in them. A network namespace is never
/// made: the guest's has exactly the pod's interfaces. "The host's" PID namespace is the pod's shared
/// one, in which the agent does not appear. The user namespace is the pod's; it is joined when the process
/// is made, and not among those that are left.
fn namespaces(linux: &mut Linux, shared: &[String]) -> Result<Vec<LinuxNamespaceType>> {
    use LinuxNamespaceType as Ns;
    let mut kept = Vec::new();
    for namespace in linux.namespaces().iter().flatten() {
        let kind = namespace.typ();
        let is_shared = shared.iter().any(|name| name == oci_name(kind));
        match kind {
            Ns::Network => {}
            Ns::Uts | Ns::Ipc | Ns::Pid if is_shared || namespace.path().is_some() => {}
            Ns::User if !is_shared => {
                return Err(invalid(
                    "a container has the users of its pod, and no user namespace of its own",
                ));
            }
            Ns::User if linux.uid_mappings().as_ref().is_none_or(Vec::is_empty) => {
                return Err(invalid("the user namespace has no id mappings"));
            }
            Ns::Mount | Ns::Cgroup => {}
            _ => kept.push(kind),
        }
    }
    kept.extend([Ns::Mount, Ns::Cgroup]);
    let made = kept
        .iter()
        .filter(|kind| **kind != Ns::User)
        .map(|kind| LinuxNamespaceBuilder::default().typ(*kind).build())
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|error| invalid(&error.to_string()))?;
    linux.set_namespaces(Some(made));
    Ok(kept)
}

/// A namespace's type as the OCI spec writes it (config-linux, "Namespaces").
fn oci_name(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mount",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "network",
        LinuxNamespaceType::Time => "time",
    }
}

fn adapt_linux(linux: &mut Linux, left_out: &mut Vec<String>, facts: &Facts) {
    // runc takes recursive forms too, and all of ours are recursive.
    if let Some(propagation) = linux.rootfs_propagation() {
        let known = ["shared", "slave", "private", "unbindable"];
        let plain = propagation.strip_prefix('r').unwrap_or(propagation);
        linux.set_rootfs_propagation(known.contains(&plain).then(|| plain.to_owned()));
    }
    if linux.mount_label().is_some() {
        linux.set_mount_label(None);
        left_out.push("the SELinux mount label".into());
    }
    if linux.intel_rdt().is_some() {
        linux.set_intel_rdt(None);
        left_out.push("the Intel RDT settings".into());
    }
    if linux.memory_policy().is_some() {
        linux.set_memory_policy(None);
        left_out.push("the memory policy".into());
    }
    linux.set_net_devices(None);

    let mut moved = Vec::new();
    if let Some(devices) = linux.devices() {
        let mut kept = Vec::new();
        for device in devices {
            match guest_device(device, facts) {
                Some(guest) => {
                    moved.push((device.clone(), guest.clone()));
                    kept.push(guest);
                }
                None => left_out.push(format!("device {:?}", device.path())),
            }
        }
        linux.set_devices(Some(kept));
    }
    if let Some(resources) = linux.resources() {
        let mut resources = resources.clone();
        adapt_resources(&mut resources, &moved, left_out, facts);
        linux.set_resources(Some(resources));
    }
}

/// The guest's device in the place of the host's: one of the same kind.
fn guest_device(device: &LinuxDevice, facts: &Facts) -> Option<LinuxDevice> {
    let (kind, major, minor) = match device.typ() {
        // A FIFO has no numbers and is simply made.
        LinuxDeviceType::P => return Some(device.clone()),
        _ => (facts.device)(device)?,
    };
    let same =
        kind == device.typ() || (kind == LinuxDeviceType::C && device.typ() == LinuxDeviceType::U);
    same.then(|| {
        let mut guest = device.clone();
        guest.set_typ(kind).set_major(major).set_minor(minor);
        guest
    })
}

/// Brings limits to what the guest's cgroups take. `moved` are devices of the spec with what they
/// are in the guest.
pub fn adapt_resources(
    resources: &mut LinuxResources,
    moved: &[(LinuxDevice, LinuxDevice)],
    left_out: &mut Vec<String>,
    facts: &Facts,
) {
    if let Some(rules) = resources.devices() {
        let mut rules = rules.clone();
        for rule in &mut rules {
            for (host, guest) in moved {
                if rule.typ() == Some(host.typ())
                    && rule.major() == Some(host.major())
                    && rule.minor() == Some(host.minor())
                {
                    rule.set_typ(Some(guest.typ()));
                    rule.set_major(Some(guest.major()));
                    rule.set_minor(Some(guest.minor()));
                    break;
                }
            }
        }
        resources.set_devices(Some(rules));
    }
    if let Some(mut memory) = *resources.memory() {
        // The guest has no swap, so that any limit of it holds.
        memory
            .set_swap(None)
            .set_kernel(None)
            .set_kernel_tcp(None)
            .set_swappiness(None);
        memory.set_disable_oom_killer(None);
        resources.set_memory(Some(memory));
    }
    if let Some(mut cpu) = resources.cpu().clone() {
        cpu.set_realtime_runtime(None).set_realtime_period(None);
        // They are the host's, which keeps the whole pod on them.
        cpu.set_cpus(None).set_mems(None);
        // Zero means "not set" in specs made by Go programs; libcontainer would write it.
        if cpu.period() == Some(0) {
            cpu.set_period(None);
        }
        if cpu.quota() == Some(0) {
            cpu.set_quota(None);
        }
        resources.set_cpu(Some(cpu));
    }
    if let Some(limits) = resources.hugepage_limits() {
        let (kept, dropped): (Vec<_>, Vec<_>) = limits
            .iter()
            .cloned()
            .partition(|limit| (facts.cgroup_file)(&format!("hugetlb.{}.max", limit.page_size())));
        for limit in dropped {
            // Kubernetes sets limits of zero for every size that the node has.
            if limit.limit() != 0 {
                left_out.push(format!("the limit of {} huge pages", limit.page_size()));
            }
        }
        resources.set_hugepage_limits((!kept.is_empty()).then_some(kept));
    }
    if let Some(io) = resources.block_io().clone() {
        // libcgroups' conversion overflows, so the weight goes in as the v2 value it stands for.
        if let Some(weight) = io.weight().filter(|weight| *weight > 0) {
            if (facts.cgroup_file)("io.weight") {
                let weight = 1 + u64::from(weight.clamp(10, 1000) - 10) * 9999 / 990;
                let mut unified = resources.unified().clone().unwrap_or_default();
                unified
                    .entry("io.weight".into())
                    .or_insert_with(|| weight.to_string());
                resources.set_unified(Some(unified));
            } else {
                left_out.push("the I/O weight".into());
            }
        }
        if [
            io.throttle_read_bps_device(),
            io.throttle_write_bps_device(),
            io.throttle_read_iops_device(),
            io.throttle_write_iops_device(),
        ]
        .into_iter()
        .any(|list| list.as_ref().is_some_and(|list| !list.is_empty()))
        {
            left_out.push("the I/O limits of the host's devices".into());
        }
        resources.set_block_io(None);
    }
    resources.set_network(None).set_rdma(None);
    if let Some(unified) = resources.unified() {
        let mut unified = unified.clone();
        unified.retain(|file, _| {
            // A name, not a path: the cgroup's own directory is all there is to it.
            let there = !file.contains('/') && (facts.cgroup_file)(file);
            if !there {
                left_out.push(format!("the cgroup setting {file}"));
            }
            there
        });
        resources.set_unified(Some(unified));
    }
}

fn adapt_mount(mount: &Mount) -> Result<Mount> {
    let target = mount.destination();
    if !target.is_absolute() || target.components().any(|part| part == Component::ParentDir) {
        return Err(invalid(&format!(
            "mount destination {target:?} is not a plain absolute path"
        )));
    }
    let mut mount = mount.clone();
    if let Some(options) = mount.options() {
        // Marks for other programs: relabelling, and how a volume is filled.
        let foreign = ["z", "Z", "copy", "nocopy", "tmpcopyup", "U"];
        let kept = options
            .iter()
            .filter(|option| !foreign.contains(&option.as_str()))
            .cloned();
        let kept: Vec<String> = kept.collect();
        mount.set_options(Some(kept));
    }
    if mount.source().is_none() {
        let name = mount.typ().clone().unwrap_or_else(|| "none".into());
        mount.set_source(Some(name.into()));
    }
    Ok(mount)
}

fn check_sysctls(linux: &Linux) -> Result<()> {
    for name in linux.sysctl().iter().flat_map(|sysctls| sysctls.keys()) {
        if name.is_empty() || name.contains("..") || name.starts_with('/') {
            return Err(invalid(&format!("{name:?} is not a name of a sysctl")));
        }
    }
    Ok(())
}

/// A user of the container as the guest's initial user namespace knows it.
fn guest_uid(linux: &Linux, uid: u32) -> Result<u32> {
    guest_id(linux.uid_mappings().as_deref(), uid)
        .ok_or_else(|| invalid(&format!("user {uid} is not mapped in the user namespace")))
}

fn guest_id(mappings: Option<&[LinuxIdMapping]>, id: u32) -> Option<u32> {
    let Some(mappings) = mappings.filter(|mappings| !mappings.is_empty()) else {
        return Some(id);
    };
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id())?;
        (offset < mapping.size()).then(|| mapping.host_id().checked_add(offset))?
    })
}

/// Who root of a planned container is in the guest's initial user namespace: a user and a group.
#[must_use]
pub fn root_of(spec: &Spec) -> (u32, u32) {
    let linux = spec.linux().as_ref();
    let id = |mappings: Option<&[LinuxIdMapping]>| guest_id(mappings, 0).unwrap_or(0);
    (
        id(linux.and_then(|linux| linux.uid_mappings().as_deref())),
        id(linux.and_then(|linux| linux.gid_mappings().as_deref())),
    )
}

#[cfg(test)]
#[path = "plan_test.rs"]
mod tests;
