//! The pod's user namespace, and the namespaces that belong to it.
//!
//! What root of a user namespace may do with a network, a host name or shared memory it may do in
//! namespaces that belong to its own, and only with such ones can it mount sysfs and mqueue. So in a pod
//! with users of its own the guest's first network, UTS and IPC namespaces are left: others are made that
//! belong to the pod's user namespace, the agent enters them and takes the pod's interfaces along, and all
//! that it starts is there from the beginning, as in any other pod. The agent itself stays root of the
//! guest; containers join the user namespace when they are made.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Uid, setresgid, setresuid};
use sepal_protocol::agent::{IdRange, UserNamespace};

use crate::error::{Context, Error, Result};
use crate::reaper::{Exit, Reaper};
use crate::sys;

/// How long a helper may take for a step.
const PATIENCE: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub struct Users {
    namespace: OwnedFd,
    /// Where new interfaces appear.
    first_network: OwnedFd,
    network: OwnedFd,
    /// Who root of the namespace is outside of it: a user and a group.
    pub root: (u32, u32),
}

impl Users {
    /// Makes the namespaces and enters those that are not of users.
    ///
    /// # Errors
    /// The mapping has no root, or what the kernel says.
    pub fn enter(reaper: &Reaper, wanted: &UserNamespace) -> Result<Self> {
        let what = || "cannot make the pod's user namespace".to_owned();
        let no_root = || Error::Invalid("the pod's user namespace has no root".into());
        let root = root_of(&wanted.uids).zip(root_of(&wanted.gids));
        let root = root.ok_or_else(no_root)?;
        let first_network = File::open("/proc/self/ns/net").context(what)?.into();
        let mut helper = Helper::start(reaper, make).context(what)?;
        let mut enter = || {
            helper.hear()?;
            fs::write(helper.proc.join("uid_map"), lines(&wanted.uids))?;
            fs::write(helper.proc.join("gid_map"), lines(&wanted.gids))?;
            helper.say()?;
            helper.hear()?;
            let open = |name: &str| File::open(helper.proc.join("ns").join(name));
            setns(open("ipc")?, CloneFlags::CLONE_NEWIPC)?;
            setns(open("uts")?, CloneFlags::CLONE_NEWUTS)?;
            let (namespace, network) = (open("user")?, open("net")?);
            setns(&network, CloneFlags::CLONE_NEWNET)?;
            sys::loopback_up()?;
            io::Result::Ok((namespace.into(), network.into()))
        };
        let (namespace, network) = enter().context(what)?;
        Ok(Self {
            namespace,
            first_network,
            network,
            root,
        })
    }

    /// The user namespace.
    #[must_use]
    pub fn namespace(&self) -> &OwnedFd {
        &self.namespace
    }

    /// The pod's network namespace.
    #[must_use]
    pub fn network(&self) -> BorrowedFd<'_> {
        self.network.as_fd()
    }

    /// Does something that must not wait in the network namespace in which interfaces appear.
    ///
    /// # Errors
    /// Those of setns(2).
    pub fn in_first_network<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        setns(&self.first_network, CloneFlags::CLONE_NEWNET)?;
        let done = work();
        setns(&self.network, CloneFlags::CLONE_NEWNET)?;
        Ok(done)
    }

    /// As [`sys::fork_pid_namespace`], for a namespace that belongs to these users. The process is a
    /// helper's child before it is the agent's.
    ///
    /// # Errors
    /// As [`sys::fork`], and those of setns(2) and unshare(2).
    pub fn fork_pid_namespace(&self, reaper: &Reaper, child: fn() -> i32) -> io::Result<i32> {
        let users = self.namespace.try_clone()?;
        let keep = [users.as_raw_fd()];
        let fork = move |mut line: UnixStream| {
            setns(&users, CloneFlags::CLONE_NEWUSER)?;
            unshare(CloneFlags::CLONE_NEWPID)?;
            let pid = sys::fork(&[], child)?;
            line.write_all(&pid.to_ne_bytes())
        };
        let mut helper = Helper::with(reaper, &keep, fork)?;
        let mut pid = [0; size_of::<i32>()];
        helper.line.read_exact(&mut pid)?;
        Ok(i32::from_ne_bytes(pid))
    }
}

/// In a helper process: makes namespaces and holds them until the other end of the line is closed.
fn make(mut line: UnixStream) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER)?;
    line.write_all(b".")?;
    // Who owns what in the others is decided when they are made: by then there are users, and this is
    // their root.
    line.read_exact(&mut [0])?;
    setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0))?;
    setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0))?;
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
    line.write_all(b".")?;
    line.read_to_end(&mut Vec::new()).map(drop)
}

/// A process that does something step by step with the agent. A step takes microseconds: it is waited for
/// without giving up the thread.
struct Helper {
    line: UnixStream,
    proc: PathBuf,
    /// Keeps the reaper's interest.
    _exit: tokio::sync::oneshot::Receiver<Exit>,
}

impl Helper {
    fn start(reaper: &Reaper, work: impl FnOnce(UnixStream) -> io::Result<()>) -> io::Result<Self> {
        Self::with(reaper, &[], work)
    }

    /// With these descriptors.
    fn with(
        reaper: &Reaper,
        keep: &[i32],
        work: impl FnOnce(UnixStream) -> io::Result<()>,
    ) -> io::Result<Self> {
        let (line, theirs) = UnixStream::pair()?;
        line.set_read_timeout(Some(PATIENCE))?;
        let keep = [keep, &[theirs.as_raw_fd()]].concat();
        let work = move || work(theirs).map_or_else(|e| e.raw_os_error().unwrap_or(1), |()| 0);
        let pid = sys::fork(&keep, work)?;
        Ok(Self {
            line,
            proc: Path::new("/proc").join(pid.to_string()),
            _exit: reaper.watch(pid),
        })
    }

    fn say(&mut self) -> io::Result<()> {
        self.line.write_all(b".")
    }

    fn hear(&mut self) -> io::Result<()> {
        self.line.read_exact(&mut [0])
    }
}

fn root_of(ranges: &[IdRange]) -> Option<u32> {
    let root = ranges.iter().find(|range| range.inside == 0)?;
    Some(root.outside)
}

/// As /proc/PID/uid_map takes them.
fn lines(ranges: &[IdRange]) -> String {
    let line = |r: &IdRange| format!("{} {} {}\n", r.inside, r.outside, r.size);
    ranges.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_lines_and_the_first_of_them_need_not_be_roots() {
        let range = |inside, outside| IdRange {
            inside,
            outside,
            size: 10,
            ..Default::default()
        };
        let ranges = [range(10, 70_000), range(0, 65_536)];
        assert_eq!(lines(&ranges), "10 70000 10\n0 65536 10\n");
        assert_eq!(root_of(&ranges), Some(65_536));
        assert_eq!(root_of(&ranges[..1]), None);
    }
}
