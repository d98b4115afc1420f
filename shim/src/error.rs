//! What goes wrong in a shim. [`crate::task`] alone decides which gRPC code each variant becomes.

use std::path::PathBuf;

use crate::{
    agent, apparmor, cgroup, disks, hooks, mirror, network, resize, rootfs, size, spec, stdio, vm,
};

/// The result of everything that a Task call does.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request of containerd was not done.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("container {id} does not exist in this pod")]
    NoContainer { id: String },
    #[error("process {exec} of container {container} does not exist")]
    NoExec { container: String, exec: String },
    #[error("sandbox {id} is not this shim's")]
    NoSandbox { id: String },
    #[error("sandbox {id} exists already")]
    SandboxExists { id: String },
    #[error("the sandbox has not been created")]
    NotCreated,
    #[error("container {id} exists already")]
    ContainerExists { id: String },
    #[error("process {exec} exists already in container {container}")]
    ExecExists { container: String, exec: String },
    #[error("process already finished")]
    Finished,
    #[error("cannot {action} a process that is {state}")]
    WrongState {
        action: &'static str,
        state: &'static str,
    },
    #[error("what a former pod of this name has left cannot be removed: {what}")]
    Leftover { what: String },
    #[error("the pod is being removed")]
    Removing,
    #[error("{what} is not supported by sepal")]
    Unsupported { what: &'static str },
    #[error("{what}: {reason}")]
    Invalid { what: &'static str, reason: String },
    #[error("the pod's virtual machine has ended: {reason}")]
    VmGone { reason: String },
    #[error("the call has not come to its end: {0}")]
    Unfinished(tokio::task::JoinError),
    #[error(transparent)]
    Config(#[from] sepal_protocol::config::Error),
    #[error(transparent)]
    Size(#[from] size::Error),
    #[error(transparent)]
    Resize(#[from] resize::Error),
    #[error(transparent)]
    Spec(#[from] spec::Error),
    #[error(transparent)]
    AppArmor(#[from] apparmor::Error),
    #[error(transparent)]
    Rootfs(#[from] rootfs::Error),
    #[error(transparent)]
    Disk(#[from] disks::Error),
    #[error(transparent)]
    Mirror(#[from] mirror::Error),
    #[error(transparent)]
    Network(#[from] network::Error),
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Vm(#[from] vm::Error),
    #[error(transparent)]
    Agent(#[from] agent::Error),
    #[error(transparent)]
    Stdio(#[from] stdio::Error),
    #[error("{what} {}: {source}", .path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    /// The pod's start failed once; each later request is told the same.
    #[error("{0}")]
    Pod(std::sync::Arc<Error>),
}

impl Error {
    /// For `map_err`: what was being done with which file.
    pub fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
