//! A thread that stands for a container among the host's processes.
//!
//! containerd is told a pid for each container, and clients tell containers by it: `/proc/PID/root` is
//! where they look for files, `/proc/PID/ns/net` for the network, and `/proc/PID/ns/pid` is how CRI names
//! the container whose processes another one is to see. The VMM's process does for a pod's first
//! container. For each further one this is a sleeping thread of the shim, whose root directory is the
//! container's and whose network namespace is the pod's: 20 KiB of the kernel, and nobody to attack,
//! as nothing runs in it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chroot, fchdir, gettid};

/// It calls a few functions and sleeps.
const STACK: usize = 32 << 10;

/// What a container is among the host's processes.
#[derive(Debug)]
pub enum OnHost {
    /// The VMM of its pod, by its pid.
    Vmm(u32),
    /// A thread of its own.
    StandIn(StandIn),
}

impl OnHost {
    /// By which /proc knows it.
    pub const fn pid(&self) -> u32 {
        match self {
            Self::Vmm(pid) | Self::StandIn(StandIn { pid, .. }) => *pid,
        }
    }
}

/// See the module. Its thread ends when this is dropped.
#[derive(Debug)]
pub struct StandIn {
    pid: u32,
    /// Nothing is sent: the thread waits for this to go.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl StandIn {
    /// Starts one with a directory as its root, in a network namespace.
    ///
    /// # Errors
    /// The host gives no thread, or the kernel refuses what it asks for.
    pub fn start(root: OwnedFd, netns: OwnedFd) -> io::Result<Self> {
        let (end, ended) = channel();
        let (tell, told) = sync_channel(1);
        let body = move || {
            let entered = enter(&root, &netns);
            drop((root, netns));
            let failed = entered.is_err();
            let _ = tell.send(entered);
            if !failed {
                // Whoever could send is gone: that is the end.
                let _ = ended.recv();
            }
        };
        let thread = std::thread::Builder::new()
            .name("container".into())
            .stack_size(STACK)
            .spawn(body)?;
        let pid = told.recv().map_err(io::Error::other)??;
        Ok(Self {
            pid,
            end: Some(end),
            thread: Some(thread),
        })
    }
}

/// Makes the calling thread what it is to be; answers its id.
fn enter(root: &OwnedFd, netns: &OwnedFd) -> io::Result<u32> {
    // The root directory is the process's, not the thread's, unless that is said.
    unshare(CloneFlags::CLONE_FS)?;
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    fchdir(root)?;
    chroot(".")?;
    Ok(gettid().as_raw().unsigned_abs())
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.end.take();
        if let Some(thread) = self.thread.take() {
            // Its root must be free when the container's mounts go.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn it_is_found_by_its_pid_with_a_root_of_its_own_until_it_is_dropped() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("mark"), "here").unwrap();
        let netns = File::open("/proc/self/ns/net").unwrap();
        let start = |path| {
            StandIn::start(
                File::open(path).unwrap().into(),
                netns.try_clone().unwrap().into(),
            )
        };
        let stand_in = start(root.path().to_path_buf()).unwrap();
        let proc = PathBuf::from(format!("/proc/{}", stand_in.pid));
        assert_eq!(fs::read(proc.join("root/mark")).unwrap(), b"here");
        assert_ne!(stand_in.pid, std::process::id());
        assert!(fs::metadata("/etc").is_ok(), "the others keep their root");
        drop(stand_in);
        assert!(!proc.exists());
        assert!(start("/dev/null".into()).is_err());
    }
}
