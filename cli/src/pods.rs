//! The pods of this host, as their directories and processes show them.
//!
//! Nothing of the shim's own notes is read: the VMM is who listens on the control socket, the shim
//! is its parent, the file server another child of that.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket, sockopt,
};
use sepal_protocol::control::{self, Request, Response, VmState};
use sepal_protocol::paths::pod;

/// Longest wait for a VMM's answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// One pod's directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pod {
    /// Its id: the directory's name.
    pub id: String,
    /// The directory.
    pub directory: PathBuf,
}

/// All pods below the state directory, by id.
///
/// # Errors
/// The directory cannot be read; it need not exist.
pub fn all(state: &Path) -> anyhow::Result<Vec<Pod>> {
    let entries = match std::fs::read_dir(state) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("cannot read {}", state.display()))?,
    };
    let mut pods = Vec::new();
    for entry in entries {
        let directory = entry
            .with_context(|| format!("cannot read {}", state.display()))?
            .path();
        // What a pod's directory always has; others keep files here as well.
        if directory.join(pod::SHARE).is_dir()
            && let Some(id) = directory.file_name().and_then(|name| name.to_str())
        {
            pods.push(Pod {
                id: id.to_owned(),
                directory: directory.clone(),
            });
        }
    }
    pods.sort();
    Ok(pods)
}

/// The pod of this name, or the only one of which a name begins so. Its names are its id
/// (`namespace+id`), that without the namespace, and those of its containers.
///
/// # Errors
/// There is none, or more than one.
pub fn find(state: &Path, wanted: &str) -> anyhow::Result<Pod> {
    let all = all(state)?;
    let matching = |is_it: &dyn Fn(&str) -> bool| -> Vec<&Pod> {
        all.iter()
            .filter(|pod| pod.names().iter().any(|name| is_it(name)))
            .collect()
    };
    let mut pods = matching(&|name| name == wanted);
    if pods.is_empty() {
        pods = matching(&|name| name.starts_with(wanted));
    }
    match pods.as_slice() {
        [pod] => Ok((*pod).clone()),
        [] => bail!("there is no pod {wanted:?} (sepal list shows them)"),
        several => {
            let ids: Vec<_> = several.iter().map(|pod| pod.id.as_str()).collect();
            bail!("{wanted:?} may be any of the pods {}", ids.join(", "))
        }
    }
}

/// What a live VMM tells.
#[derive(Debug)]
pub struct Vm {
    /// The VMM's process.
    pub pid: i32,
    /// How the VM is.
    pub state: VmState,
}

impl Pod {
    fn names(&self) -> Vec<String> {
        let mut names = self.containers();
        names.extend(self.id.split_once('+').map(|(_, name)| name.to_owned()));
        names.push(self.id.clone());
        names
    }

    /// Asks the pod's VMM; none when the pod has no VM any more, or none yet.
    ///
    /// # Errors
    /// The VMM is there and does not answer, or not what was asked.
    pub fn vm(&self) -> anyhow::Result<Option<Vm>> {
        // A VMM that is stopped accepts nobody, and whoever waits for that waits for ever.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        let path = self.directory.join(pod::CONTROL);
        let address = UnixAddr::new(&path).context("the control socket's path is too long")?;
        match connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &address) {
            Ok(()) => {}
            Err(nix::Error::ENOENT | nix::Error::ECONNREFUSED) => return Ok(None),
            Err(nix::Error::EAGAIN) => bail!("pod {}: the VMM does not answer", self.id),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot connect to {}", path.display()));
            }
        }
        let pid = getsockopt(&socket, sockopt::PeerCredentials)?.pid();
        control::send(&socket, &Request::State, &[])?;
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        if poll(&mut fds, timeout)? == 0 {
            bail!("pod {}: the VMM (pid {pid}) does not answer", self.id);
        }
        match control::receive::<Response>(&socket)? {
            (Response::State(state), _) => Ok(Some(Vm { pid, state })),
            (Response::Error { message }, _) => bail!("pod {}: {message}", self.id),
            _ => bail!("pod {}: the VMM answers another question", self.id),
        }
    }

    /// Ids of the containers whose files the pod shares.
    pub fn containers(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.join(pod::SHARE));
        let mut ids: Vec<String> = entries
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        ids.sort();
        ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(ids: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for id in ids {
            std::fs::create_dir_all(directory.path().join(id).join(pod::SHARE)).unwrap();
        }
        directory
    }

    #[test]
    fn a_vmm_that_accepts_nobody_is_not_waited_for() {
        use nix::sys::socket::{Backlog, bind, listen};
        let state = state(&["n+stuck"]);
        let pod = find(state.path(), "n+stuck").unwrap();
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let open = || socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        let address = UnixAddr::new(&pod.directory.join(pod::CONTROL)).unwrap();
        let listener = open();
        bind(std::os::fd::AsRawFd::as_raw_fd(&listener), &address).unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let mut waiting = Vec::new();
        loop {
            let client = open();
            if connect(std::os::fd::AsRawFd::as_raw_fd(&client), &address).is_err() {
                break;
            }
            waiting.push(client);
        }
        let error = pod.vm().unwrap_err().to_string();
        assert_eq!(error, "pod n+stuck: the VMM does not answer");
    }

    #[test]
    fn a_pod_is_found_without_its_namespace_and_by_its_containers() {
        let state = state(&["default+web", "k8s.io+0a1b2c", "other+web"]);
        std::fs::create_dir_all(state.path().join("k8s.io+0a1b2c/share/77ff")).unwrap();
        let id = |wanted| {
            find(state.path(), wanted)
                .map(|pod| pod.id)
                .map_err(|e| e.to_string())
        };
        assert_eq!(id("default+web").as_deref(), Ok("default+web"));
        assert_eq!(id("other").as_deref(), Ok("other+web"));
        assert_eq!(id("0a1").as_deref(), Ok("k8s.io+0a1b2c"));
        assert_eq!(id("77").as_deref(), Ok("k8s.io+0a1b2c"));
        assert!(
            id("web")
                .unwrap_err()
                .ends_with("any of the pods default+web, other+web")
        );
    }

    #[test]
    fn a_pod_is_found_by_its_id_or_a_unique_beginning() {
        let state = state(&["abc", "abcd", "x1"]);
        let id = |wanted| {
            find(state.path(), wanted)
                .map(|pod| pod.id)
                .map_err(|e| e.to_string())
        };
        assert_eq!(id("abc").as_deref(), Ok("abc"));
        assert_eq!(id("abcd").as_deref(), Ok("abcd"));
        assert_eq!(id("x").as_deref(), Ok("x1"));
        assert!(id("ab").unwrap_err().ends_with("any of the pods abc, abcd"));
        assert!(id("y").unwrap_err().starts_with("there is no pod \"y\""));
    }

    #[test]
    fn other_files_and_a_missing_directory_are_no_pods() {
        let state = state(&["pod"]);
        std::fs::create_dir(state.path().join("cache")).unwrap();
        std::fs::write(state.path().join("file"), "").unwrap();
        let ids: Vec<_> = all(state.path())
            .unwrap()
            .into_iter()
            .map(|pod| pod.id)
            .collect();
        assert_eq!(ids, ["pod"]);
        assert_eq!(all(&state.path().join("missing")).unwrap(), []);
    }

    #[test]
    fn a_pod_without_a_vmm_has_no_vm() {
        let state = state(&["pod"]);
        let pod = find(state.path(), "pod").unwrap();
        assert!(pod.vm().unwrap().is_none());
        std::fs::create_dir(pod.directory.join("share/web")).unwrap();
        assert_eq!(pod.containers(), ["web"]);
    }
}
