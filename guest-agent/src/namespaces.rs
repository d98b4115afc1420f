//! Namespaces of a container: how a plan names them, and how they are held for those who join later.

use std::fs::File;
use std::os::fd::OwnedFd;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType};

use crate::error::{Context, Error, Result};
use crate::plan::Plan;

pub(crate) fn namespace(builder: LinuxNamespaceBuilder) -> Result<LinuxNamespace> {
    builder
        .build()
        .map_err(|error| Error::Invalid(error.to_string()))
}

pub(crate) fn join_by_fd(kind: LinuxNamespaceType, fd: i32) -> Result<LinuxNamespace> {
    namespace(
        LinuxNamespaceBuilder::default()
            .typ(kind)
            .path(format!("/proc/self/fd/{fd}")),
    )
}

/// Opens the namespaces of a container's init that are not the guest's own.
pub(crate) fn pin_namespaces(pid: i32, plan: &Plan) -> Result<Vec<(LinuxNamespaceType, OwnedFd)>> {
    use LinuxNamespaceType as Ns;
    let linux = plan.spec.linux().as_ref();
    let own = linux
        .and_then(|linux| linux.namespaces().as_deref())
        .unwrap_or_default();
    let mut kinds: Vec<Ns> = own.iter().map(LinuxNamespace::typ).collect();
    if !kinds.contains(&Ns::Pid) {
        kinds.push(Ns::Pid);
    }
    if plan.user_namespace {
        kinds.push(Ns::User);
    }
    kinds
        .into_iter()
        .map(|kind| {
            let name = match kind {
                Ns::Mount => "mnt",
                Ns::Network => "net",
                Ns::Pid => "pid",
                Ns::Uts => "uts",
                Ns::Ipc => "ipc",
                Ns::User => "user",
                Ns::Cgroup => "cgroup",
                Ns::Time => "time",
            };
            let file = File::open(format!("/proc/{pid}/ns/{name}"))
                .context(|| "the container's init has died".to_owned())?;
            Ok((kind, file.into()))
        })
        .collect()
}

pub(crate) fn own_pid_namespace(namespaces: &[(LinuxNamespaceType, OwnedFd)]) -> Option<OwnedFd> {
    let (_, fd) = namespaces
        .iter()
        .find(|(kind, _)| *kind == LinuxNamespaceType::Pid)?;
    fd.try_clone().ok()
}
