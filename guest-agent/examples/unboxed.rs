//! The agent's service without a VM: in namespaces of its own on this machine, over Unix sockets.
//!
//! For the tests in tests/: `unboxed DIRECTORY SHARE` listens on `agent.sock` and `stdio.sock` in
//! DIRECTORY and takes SHARE for the pod's share. It is PID 1 of its PID namespace, so that all of
//! it goes with it. Needs root and a cgroup v2 hierarchy (one without controllers will do).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid};
use sepal_agent::stream::Listener;
use sepal_agent::{Sockets, boot, log, serve};
use sepal_protocol::paths::guest;

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (directory, share) = args
        .next()
        .zip(args.next())
        .context("usage: unboxed DIRECTORY SHARE")?;
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let cgroup = own_cgroup()?;
    unshare(
        CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWCGROUP,
    )?;
    // SAFETY: this process has a single thread.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            agent(&directory, &share)
        }
        ForkResult::Parent { child } => {
            waitpid(child, None)?;
            // Leave the cgroup, so that it can go.
            if let Some(parent) = cgroup.parent() {
                fs::write(parent.join("cgroup.procs"), Pid::this().to_string())?;
            }
            fs::remove_dir(&cgroup).with_context(|| format!("{cgroup:?} is not empty"))
        }
    }
}

/// Enters a new cgroup of the machine's v2 hierarchy, which becomes the root of the agent's.
fn own_cgroup() -> Result<PathBuf> {
    let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(Path::new)
        .find(|root| root.join("cgroup.controllers").exists())
        .context("this machine has no cgroup v2")?;
    let own = root.join(format!("sepal-unboxed-{}", Pid::this()));
    fs::create_dir(&own)?;
    fs::write(own.join("cgroup.procs"), Pid::this().to_string())?;
    Ok(own)
}

fn agent(directory: &Path, share: &Path) -> Result<()> {
    ensure!(std::process::id() == 1, "not PID 1");
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    // Sockets first: /run and /tmp are about to be covered.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    runtime.block_on(async {
        let agent = Listener::unix(&directory.join("agent.sock"))?;
        let stdio = Listener::unix(&directory.join("stdio.sock"))?;
        let share_fd = fs::File::open(share)?;
        mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
        mount(
            Some("cgroup2"),
            "/sys/fs/cgroup",
            Some("cgroup2"),
            MsFlags::empty(),
            none,
        )?;
        for place in [guest::SHARE, guest::CONTAINERS, guest::SHM] {
            fs::create_dir_all(place)?;
        }
        let share = format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&share_fd)
        );
        mount(
            Some(share.as_str()),
            guest::SHARE,
            none,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            none,
        )?;
        prctl::set_dumpable(false)?;
        log::start(tracing::Level::WARN);
        let listening = || {
            let _ = boot::stage("listening");
        };
        serve(Sockets { agent, stdio }, listening).await
    })
}
