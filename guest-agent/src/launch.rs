//! Making a process: a short-lived helper runs libcontainer, so that the agent never waits for it.
//!
//! libcontainer blocks (on file systems that a slow or hostile server answers, on hooks, on its own
//! children), changes directory and forks. None of that may happen in PID 1, which serves every
//! other container by one thread. So each creation forks a helper. Forking without executing anew is
//! sound here because the agent is single-threaded (sys::fork insists on it) and cheaper by the
//! start-up of a program: with the page-fault cost of a guest without hardware virtualization a
//! fork is 0.4 ms, a re-executed agent 3 to 5 ms.
//!
//! ```text
//! agent ──fork──> helper ──clone──> intermediate ──clone(CLONE_PARENT)──> init
//!   │  <─ 'E' an error that was logged ──┤ (any of the three)               │
//!   │  <─ 'D' why it cannot run ─────────┤ (prepare.rs, payload.rs)         │
//!   │  <─ 'P' pid of init ───────────────┤                                  │
//!   │  ── one byte: "registered" ──────> helper ends                        │
//!   │  ── connects to the start socket ───────────────────────────────────> │
//!   │  <─ 'X' about to execute, then end of file ── or 'D' ─────────────────┤
//! ```
//!
//! Init's parent is the helper until that ends, and it ends only when the agent has registered
//! init's pid: the reaper cannot meet an exit that nobody knows. All packets go over one socket pair
//! that execve(2) closes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use libcgroups::common::CgroupConfig;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::notify_socket::NotifyListener;
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::container_main_process;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::user_ns::UserNamespaceConfig;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use crate::error::{Context, Error, Result};
use crate::log;
use crate::payload::{EXECUTING, Payload, REFUSED};
use crate::plan::Plan;
use crate::prepare;
use crate::reaper::{Exit, Reaper};
use crate::stdio::ProcessEnds;
use crate::sys;

/// How long making or starting a process may take, hooks included.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Largest packet from a helper, in bytes.
const MAX_PACKET: usize = 4096;
/// First byte of the packet with init's pid.
const PID: u8 = b'P';
/// First byte of the packet that ends a failed attempt.
const FAILED: u8 = b'F';

/// What kind of process is made.
#[derive(Debug)]
pub enum Kind {
    /// A container's first process.
    Init {
        /// Leave out pivot_root.
        no_pivot: bool,
    },
    /// A further process of a container.
    Exec {
        /// The container's root directory.
        root: OwnedFd,
    },
    /// A program of the guest image, outside of any container.
    Guest,
}

/// A process to be made.
pub struct Job {
    /// The container's id, for hooks and for libcontainer's messages.
    pub container: String,
    /// What to run, and in which surroundings.
    pub plan: Plan,
    /// Which kind of process.
    pub kind: Kind,
    /// A directory of the container's own in the guest.
    pub directory: PathBuf,
    /// Where init waits for its start; unique, and short enough for sun_path.
    pub start_socket: PathBuf,
    /// Where its cgroup is.
    pub cgroup: CgroupConfig,
    /// Its standard streams.
    pub ends: ProcessEnds,
    /// Namespaces that the plan names by /proc/self/fd paths.
    pub join: Vec<OwnedFd>,
    /// Descriptors of the agent that the plan names in the same way.
    pub keep: Vec<RawFd>,
}

/// A process that waits for its start.
#[derive(Debug)]
pub struct Launched {
    /// In the guest's initial PID namespace.
    pub pid: i32,
    /// Tells how it ends.
    pub exit: oneshot::Receiver<Exit>,
    /// What holds it back.
    pub gate: Gate,
}

/// What a made process waits at before it becomes its program.
#[derive(Debug)]
pub struct Gate {
    report: AsyncFd<OwnedFd>,
    start_socket: Option<PathBuf>,
}

/// Makes a process, up to the point where it waits for its start.
///
/// # Errors
/// One sentence with the cause. Processes of a failed attempt may still be on their way out: the
/// caller kills the cgroup of a container that was not made.
pub async fn launch(job: Job, reaper: &Arc<Reaper>) -> Result<Launched> {
    let io = || "cannot make a helper process".to_owned();
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .context(io)?;
    nix::fcntl::fcntl(&ours, nix::fcntl::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).context(io)?;
    let report = sys::watch(ours, Interest::READABLE).context(io)?;
    let start_socket = match job.kind {
        Kind::Guest => None,
        _ => Some(job.start_socket.clone()),
    };
    let keep = job.descriptors(&theirs);
    let report_fd = theirs.as_raw_fd();
    let is_guest = matches!(job.kind, Kind::Guest);
    // The parent's copy of the job, and with it the process's ends, is dropped by fork's return.
    let helper = sys::fork(&keep, move || helper(&job, report_fd)).context(io)?;
    let helper_exit = reaper.watch(helper);
    drop(theirs);
    tracing::debug!(helper, "forked");

    let mut cause = Cause::default();
    let made = tokio::time::timeout(TIMEOUT, async {
        while let Some((kind, text)) = next_packet(&report).await? {
            if kind == PID {
                let pid = text.parse().map_err(|_| io::ErrorKind::InvalidData)?;
                return Ok(Some(pid));
            }
            if cause.take(kind, text) {
                break;
            }
        }
        io::Result::Ok(None)
    })
    .await;
    match made {
        Ok(Ok(Some(pid))) => {
            let exit = if is_guest {
                helper_exit
            } else {
                reaper.watch(pid)
            };
            // A helper that died meanwhile does not mind; then init is ours already.
            let _ = send(report.as_raw_fd(), b"R", MsgFlags::MSG_NOSIGNAL);
            tracing::debug!(pid, "made");
            Ok(Launched {
                pid,
                exit,
                gate: Gate {
                    report,
                    start_socket,
                },
            })
        }
        Ok(Ok(None)) => Err(Error::Launch(cause.sentence())),
        Ok(Err(source)) => Err(Error::Io {
            what: "lost the helper process".into(),
            source,
        }),
        Err(_) => {
            kill_tree(helper);
            Err(Error::Timeout(format!(
                "the process was not made within {} s{}",
                TIMEOUT.as_secs(),
                cause.aside()
            )))
        }
    }
}

impl Gate {
    /// Lets the process become its program.
    ///
    /// # Errors
    /// Why it could not; the process ends by itself then.
    pub async fn open(self) -> Result<()> {
        let Self {
            report,
            start_socket,
        } = self;
        if let Some(path) = start_socket {
            let io = || "the process does not wait for its start".to_owned();
            let mut socket = UnixStream::connect(&path).await.context(io)?;
            socket.write_all(b"start").await.context(io)?;
            socket.shutdown().await.context(io)?;
            let _ = std::fs::remove_file(&path);
        }
        let mut cause = Cause::default();
        let mut executing = false;
        let outcome = tokio::time::timeout(TIMEOUT, async {
            while let Some((kind, text)) = next_packet(&report).await? {
                executing |= kind == EXECUTING;
                if kind == REFUSED {
                    executing = false;
                }
                cause.take(kind, text);
            }
            io::Result::Ok(())
        })
        .await;
        match outcome {
            Ok(Ok(())) if executing => Ok(()),
            Ok(Ok(())) => Err(Error::Launch(cause.sentence())),
            Ok(Err(source)) => Err(Error::Io {
                what: "lost the process".into(),
                source,
            }),
            Err(_) => Err(Error::Timeout(format!(
                "the process did not start within {} s{}",
                TIMEOUT.as_secs(),
                cause.aside()
            ))),
        }
    }
}

/// Why an attempt failed, by what the helper and its children said.
#[derive(Debug, Default)]
struct Cause {
    refused: Option<String>,
    /// The first error that libcontainer logged: the innermost.
    logged: Option<String>,
    failed: Option<String>,
}

impl Cause {
    /// Notes a packet; true when it is the last.
    fn take(&mut self, kind: u8, text: String) -> bool {
        match kind {
            REFUSED => {
                self.refused.get_or_insert(text);
            }
            log::ERROR_REPORT => {
                self.logged.get_or_insert(text);
            }
            FAILED => {
                self.failed.get_or_insert(text);
            }
            log::LOG_REPORT => tracing::debug!("helper: {text}"),
            _ => {}
        }
        kind == FAILED
    }

    fn sentence(self) -> String {
        self.refused
            .or(self.logged)
            .or(self.failed)
            .unwrap_or_else(|| "the process died while it was being made".into())
    }

    fn aside(self) -> String {
        let known = self.refused.or(self.logged).or(self.failed);
        known.map(|text| format!(" ({text})")).unwrap_or_default()
    }
}

async fn next_packet(report: &AsyncFd<OwnedFd>) -> io::Result<Option<(u8, String)>> {
    let mut packet = [0; MAX_PACKET];
    let length = report
        .async_io(Interest::READABLE, |fd| {
            Ok(recv(fd.as_raw_fd(), &mut packet, MsgFlags::empty())?)
        })
        .await?;
    let packet = packet.get(..length).unwrap_or_default();
    Ok(packet
        .split_first()
        .map(|(kind, text)| (*kind, String::from_utf8_lossy(text).into_owned())))
}

/// Runs `work` in a helper process, because it may block on a file system.
///
/// # Errors
/// What `work` says, or that it took too long.
pub async fn aside(
    reaper: &Arc<Reaper>,
    what: &str,
    work: impl FnOnce() -> std::result::Result<(), String>,
) -> Result<()> {
    let io = || "cannot make a helper process".to_owned();
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .context(io)?;
    nix::fcntl::fcntl(&ours, nix::fcntl::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).context(io)?;
    let report = sys::watch(ours, Interest::READABLE).context(io)?;
    let report_fd = theirs.as_raw_fd();
    let helper = sys::fork(&[report_fd], || match work() {
        Ok(()) => 0,
        Err(text) => {
            let _ = send(report_fd, text.as_bytes(), MsgFlags::MSG_NOSIGNAL);
            1
        }
    })
    .context(io)?;
    let exit = reaper.watch(helper);
    drop(theirs);
    match tokio::time::timeout(TIMEOUT, exit).await {
        Ok(Ok(Exit { status: 0, .. })) => Ok(()),
        Ok(_) => {
            let mut text = [0; MAX_PACKET];
            let length = recv(report.as_raw_fd(), &mut text, MsgFlags::empty()).unwrap_or(0);
            let text = String::from_utf8_lossy(text.get(..length).unwrap_or_default());
            Err(Error::Launch(format!("{what}: {text}")))
        }
        Err(_) => {
            kill_tree(helper);
            Err(Error::Timeout(format!(
                "{what}: not done within {} s",
                TIMEOUT.as_secs()
            )))
        }
    }
}

/// Kills a helper and the children it has: they may hang in a file system, but not against SIGKILL.
fn kill_tree(helper: i32) {
    let children = std::fs::read_to_string(format!("/proc/{helper}/task/{helper}/children"));
    let children = children.unwrap_or_default();
    for pid in children
        .split_ascii_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .chain([helper])
    {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

impl Job {
    /// The descriptors that the helper needs.
    fn descriptors(&self, report: &OwnedFd) -> Vec<RawFd> {
        let ends = &self.ends;
        let mut keep = self.keep.clone();
        keep.push(report.as_raw_fd());
        let stdio = [&ends.stdin, &ends.stdout, &ends.stderr, &ends.console];
        keep.extend(stdio.into_iter().flatten().map(AsRawFd::as_raw_fd));
        keep.extend(self.join.iter().map(AsRawFd::as_raw_fd));
        if let Kind::Exec { root } = &self.kind {
            keep.push(root.as_raw_fd());
        }
        keep
    }
}

/// The helper process. Its descriptors are the ones of [`Job::descriptors`] and 0 to 2.
fn helper(job: &Job, report: RawFd) -> i32 {
    log::report_errors_to(report);
    let tell = |kind: u8, text: &str| {
        let mut packet = vec![kind];
        packet.extend_from_slice(text.as_bytes());
        packet.truncate(MAX_PACKET);
        let _ = send(report, &packet, MsgFlags::MSG_NOSIGNAL);
    };
    let made = match job.kind {
        Kind::Guest => return run_in_guest(job, report, &tell),
        _ => make(job, report),
    };
    match made {
        Ok(pid) => {
            tell(PID, &pid.to_string());
            // Until the agent knows the pid, or is gone.
            let _ = recv(report, &mut [0], MsgFlags::empty());
            0
        }
        Err(Refusal::Cause(text)) => {
            tell(REFUSED, &text);
            tell(FAILED, "");
            1
        }
        Err(Refusal::Library(text)) => {
            tell(FAILED, &text);
            1
        }
    }
}

/// Why the helper failed.
enum Refusal {
    /// A sentence for the user.
    Cause(String),
    /// What libcontainer says in the end; often what it logged before is closer to the cause.
    Library(String),
}

impl From<String> for Refusal {
    fn from(text: String) -> Self {
        Self::Cause(text)
    }
}

fn library(error: impl std::fmt::Display) -> Refusal {
    Refusal::Library(error.to_string())
}

fn make(job: &Job, report: RawFd) -> std::result::Result<i32, Refusal> {
    let plan = &job.plan;
    let process = plan
        .spec
        .process()
        .as_ref()
        .ok_or_else(|| library("no process"))?;
    let root_path = plan
        .spec
        .root()
        .as_ref()
        .ok_or_else(|| library("no root"))?
        .path();
    let mut env = plan.env.clone();
    let mut spec = plan.spec.clone();
    let uid = process.user().uid();
    match &job.kind {
        Kind::Exec { root } => {
            prepare::check_working_directory(process.cwd(), root.as_fd())?;
            prepare::add_home(&mut env, uid, root.as_fd());
        }
        _ => {
            let root = prepare::open_root(root_path)?;
            prepare::check_container(&plan.spec, root.as_fd())?;
            prepare::make_volumes_read_only(&mut spec)?;
            prepare::add_home(&mut env, uid, root.as_fd());
        }
    }
    // Programs that have given up root open /dev/stdout anew, which a pipe of root's would refuse.
    for end in [&job.ends.stdin, &job.ends.stdout, &job.ends.stderr]
        .into_iter()
        .flatten()
    {
        let _ = nix::unistd::fchown(end, Some(plan.owner.into()), None);
    }
    std::fs::write("/proc/self/oom_score_adj", plan.oom_score_adj.to_string())
        .map_err(|error| format!("OOM score adjustment {}: {error}", plan.oom_score_adj))?;

    tracing::debug!("prepared");
    let state = Container::new(
        &job.container,
        ContainerStatus::Creating,
        None,
        &job.directory,
        &job.directory,
    );
    let payload = Payload {
        args: plan.args.clone(),
        env,
        report,
    };
    // libcontainer's own way to report a failed execve of an exec; the payload does that.
    let unused = std::fs::File::open("/dev/null").map_err(library)?;
    let (container_type, user_ns_config, no_pivot) = match &job.kind {
        Kind::Init { no_pivot } => (
            ContainerType::InitContainer,
            UserNamespaceConfig::new(&plan.spec).map_err(library)?,
            *no_pivot,
        ),
        _ => {
            let exec_notify_fd = std::os::fd::IntoRawFd::into_raw_fd(unused);
            (
                ContainerType::TenantContainer { exec_notify_fd },
                None,
                false,
            )
        }
    };
    let raw = |end: &Option<OwnedFd>| end.as_ref().map(AsRawFd::as_raw_fd);
    let args = ContainerArgs {
        container_type,
        syscall: SyscallType::default(),
        spec: Rc::new(spec),
        rootfs: root_path.clone(),
        console_socket: raw(&job.ends.console),
        notify_listener: NotifyListener::new(&job.start_socket).map_err(library)?,
        preserve_fds: 0,
        container: Some(state.map_err(library)?),
        user_ns_config,
        cgroup_config: job.cgroup.clone(),
        detached: true,
        executor: Box::new(payload),
        no_pivot,
        stdin: raw(&job.ends.stdin),
        stdout: raw(&job.ends.stdout),
        stderr: raw(&job.ends.stderr),
        as_sibling: false,
        pid_file: None,
    };
    let pid = container_main_process(&args).map_err(library)?;
    Ok(pid.as_raw())
}

/// Becomes a program of the guest image.
fn run_in_guest(job: &Job, report: RawFd, tell: &dyn Fn(u8, &str)) -> i32 {
    if let Err(error) = attach_to_guest(job) {
        tell(REFUSED, &format!("cannot set up the process: {error}"));
        tell(FAILED, "");
        return 127;
    }
    tell(PID, &std::process::id().to_string());
    let _ = recv(report, &mut [0], MsgFlags::empty());
    let payload = Payload {
        args: job.plan.args.clone(),
        env: job.plan.env.clone(),
        report,
    };
    payload.execute();
    127
}

fn attach_to_guest(job: &Job) -> io::Result<()> {
    nix::unistd::setsid()?;
    std::fs::write("/proc/self/oom_score_adj", "0")?;
    if let Some(socket) = &job.ends.console {
        let terminal = nix::pty::openpty(None, None)?;
        let master = [terminal.master.as_raw_fd()];
        let parts = [io::IoSlice::new(b"pty")];
        let rights = [nix::sys::socket::ControlMessage::ScmRights(&master)];
        nix::sys::socket::sendmsg::<()>(
            socket.as_raw_fd(),
            &parts,
            &rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        nix::unistd::dup2_stdin(&terminal.slave)?;
        nix::unistd::dup2_stdout(&terminal.slave)?;
        nix::unistd::dup2_stderr(&terminal.slave)?;
        sys::take_controlling_terminal()?;
    } else {
        if let Some(stdin) = &job.ends.stdin {
            nix::unistd::dup2_stdin(stdin)?;
        }
        if let Some(stdout) = &job.ends.stdout {
            nix::unistd::dup2_stdout(stdout)?;
        }
        if let Some(stderr) = &job.ends.stderr {
            nix::unistd::dup2_stderr(stderr)?;
        }
    }
    let process = job.plan.spec.process().as_ref();
    let cwd = process.map_or(Path::new("/"), |process| process.cwd().as_path());
    nix::unistd::chdir(cwd)?;
    Ok(())
}
