//! A pod's VM from the host's side: the VMM and the file server as processes.
//!
//! [`Vm::spawn`] starts both at once; [`Vm::boot`] sends the specification when the pod's network
//! is known; [`Vm::ended`] tells of the death of either. The VMM dies when the control socket
//! closes, so that it never outlives the shim; both are killed with the thread that spawned them.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::WaitStatus;
use sepal_protocol::config::Config;
use sepal_protocol::control::{self, Booted, Request, Response, VmState};
use sepal_protocol::paths::{MOUNTS, guest, pod};
use sepal_protocol::vm::{
    BlkSpec, ExitCause, FdIndex, FsSpec, JailSpec, KernelSpec, MemorySpec, NetSpec, VmSpec,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, watch};

use crate::faults;
use crate::network::Nic;
use crate::size::Size;
use crate::sys::{self, Child, Netns, Spawn};

/// Files with what the programs say, in the pod's directory.
const VMM_LOG: &str = "vmm.log";
const FS_LOG: &str = "fs.log";
/// Longest wait for the VMM to answer, [`Request::Boot`] included.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long after the file server's end the VMM's may be its cause.
const CAUSE: Duration = Duration::from_millis(300);
/// How much of a log goes into an error, in lines and in bytes.
const TAIL_LINES: usize = 4;
const TAIL_BYTES: u64 = 16 << 10;
/// A VMM's user id is this and its shim's process id, which is below 2^22. Nothing else is here by
/// systemd's account of user ids (UIDS-GIDS: from 1879048192 to 2147483647), nor are the ranges that the
/// kubelet gives to pods with user namespaces.
const USERS: u32 = 2_000_000_000;
/// How Linux begins the line that names the cause of a panic.
const PANIC: &str = "Kernel panic - not syncing";

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("cannot start {}: {source}", .program.display())]
    Spawn {
        program: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot {what}: {source}")]
    Io {
        what: &'static str,
        source: std::io::Error,
    },
    #[error("virtual machine: {0}")]
    Control(control::Error),
    #[error("virtual machine: {message}")]
    Refused { message: String },
    #[error("virtual machine: no answer within {} s", CONTROL_TIMEOUT.as_secs())]
    Timeout,
    #[error("virtual machine: an answer to another question")]
    Confused,
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Io { what, source }
}

/// The processes of a pod's VM.
#[derive(Debug)]
pub struct Vm {
    /// Host pid of the VMM: what containerd is told as the pid of the pod's processes.
    pub vmm_pid: u32,
    /// Host pid of the file server.
    pub fs_pid: u32,
    vmm: Arc<OwnedFd>,
    fs: Arc<OwnedFd>,
    control: Mutex<Control>,
    /// The file server signals here that its descriptors run out.
    pressure: AsyncFd<OwnedFd>,
    directory: PathBuf,
    /// Why the shim ends it, if it does.
    killed: Arc<OnceLock<String>>,
    ended: watch::Receiver<Option<Arc<str>>>,
}

/// The socket to the VMM, which answers one request after the other.
#[derive(Debug)]
struct Control {
    socket: AsyncFd<OwnedFd>,
    /// Requests whose answers are still to come, though nobody waits for them any more.
    unanswered: usize,
}

impl Control {
    /// Sends a request and waits for its answer. May be dropped at any moment.
    async fn exchange(&mut self, request: &Request, fds: &[OwnedFd]) -> Result<Response, Error> {
        let would_block =
            |e: &control::Error| matches!(e, control::Error::Socket(nix::Error::EAGAIN));
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        loop {
            match control::send(self.socket.get_ref(), request, &raw) {
                Err(e) if would_block(&e) => {}
                other => break other.map_err(Error::Control)?,
            }
            let ready = self.socket.ready(Interest::WRITABLE).await;
            ready.map_err(io("wait"))?.clear_ready();
        }
        self.unanswered += 1;
        loop {
            let mut guard = self.socket.readable().await.map_err(io("wait"))?;
            match control::receive::<Response>(self.socket.get_ref()) {
                Err(e) if would_block(&e) => guard.clear_ready(),
                Err(e) => return Err(Error::Control(e)),
                Ok((response, _)) => {
                    self.unanswered -= 1;
                    match response {
                        // To one that was asked before.
                        _ if self.unanswered > 0 => {}
                        Response::Error { message } => return Err(Error::Refused { message }),
                        response => return Ok(response),
                    }
                }
            }
        }
    }
}

impl Vm {
    /// Spawns the VMM and the file server in the pod's network namespace. The file server is told whether
    /// the pod has users of its own.
    ///
    /// # Errors
    /// A program is missing or cannot be run.
    pub fn spawn(
        config: &Config,
        pod_id: &str,
        directory: &Path,
        netns: Netns<'_>,
        users: bool,
    ) -> Result<Self, Error> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(|e| io("make the control socket")(e.into()))?;
        nix::fcntl::fcntl(
            &ours,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )
        .map_err(|e| io("make the control socket")(e.into()))?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let pressure = EventFd::from_flags(flags).map_err(|e| io("make an eventfd")(e.into()))?;
        let fs_socket = UnixListener::bind(directory.join(pod::FS))
            .map_err(io("listen for the file server"))?;

        let mut command = Command::new(&config.vmm);
        command.args([
            "--control-fd",
            "3",
            "--pod",
            pod_id,
            "--log",
            config.log_level.as_str(),
        ]);
        // It copies the kernel while the network is looked at.
        command.arg("--preload").arg(&config.kernel);
        command.arg("--preload-deprivileged");
        command.arg(&config.kernel_deprivileged);
        let inherited = [theirs.as_fd()];
        faults::at("vm");
        let vmm = start(command, &directory.join(VMM_LOG), &inherited, netns)?;
        faults::at("vm: vmm");
        let mut command = Command::new(&config.fs);
        command.args([
            "--listen-fd",
            "3",
            "--pressure-fd",
            "4",
            "--starter-fd",
            "5",
            "--volumes",
            MOUNTS,
            "--log-level",
            config.log_level.as_str(),
            "--share",
        ]);
        command.arg(directory.join(pod::SHARE));
        command.args(users.then_some("--users"));
        let me = sys::pidfd_open(std::process::id()).map_err(io("open our own process"))?;
        let inherited = [fs_socket.as_fd(), pressure.as_fd(), me.as_fd()];
        // It has no use for any network; an empty namespace of its own would cost more than all its walls.
        let netns = Netns::Join(vmm.pidfd.as_fd());
        let fs = start(command, &directory.join(FS_LOG), &inherited, netns);
        let fs = match fs {
            Ok(fs) => fs,
            Err(e) => {
                // Ends by itself as its socket closes; only the zombie must be collected.
                drop(ours);
                let _ = sys::pidfd_kill(&vmm.pidfd, Signal::SIGKILL);
                tokio::spawn(async move { wait(&vmm.pidfd).await });
                return Err(e);
            }
        };
        let control = sys::watch(ours, Interest::READABLE | Interest::WRITABLE)
            .map_err(io("watch the control socket"))?;
        let pressure = sys::watch(pressure.into(), Interest::READABLE)
            .map_err(io("watch the file server's event"))?;
        let (vmm_fd, fs_fd) = (Arc::new(vmm.pidfd), Arc::new(fs.pidfd));
        let (tell, ended) = watch::channel(None);
        let killed = Arc::default();
        tokio::spawn(supervise(
            vmm_fd.clone(),
            fs_fd.clone(),
            directory.into(),
            Arc::clone(&killed),
            tell,
        ));
        Ok(Self {
            vmm_pid: vmm.pid,
            fs_pid: fs.pid,
            vmm: vmm_fd,
            fs: fs_fd,
            control: Mutex::new(Control {
                socket: control,
                unanswered: 0,
            }),
            pressure,
            directory: directory.into(),
            killed,
            ended,
        })
    }

    /// Builds the VM and starts it.
    ///
    /// # Errors
    /// The VMM refuses, with its reason; or it has died.
    pub async fn boot(
        &self,
        config: &Config,
        pod_id: &str,
        size: &Size,
        nics: Vec<Nic>,
    ) -> Result<Booted, Error> {
        let fs = UnixStream::connect(self.directory.join(pod::FS))
            .map_err(io("connect to the file server"))?;
        let mut fds: Vec<OwnedFd> = vec![fs.into()];
        let mut net = Vec::new();
        let mut index = |fd| push(&mut fds, fd);
        for (number, nic) in nics.into_iter().enumerate() {
            net.push(net_spec(number, nic, &mut index));
        }
        let path = |path: &Path| Some(path.to_path_buf());
        let image = config
            .initrd
            .is_none()
            .then(|| config.guest_image().to_path_buf());
        let spec = VmSpec {
            pod_id: pod_id.into(),
            cpus: size.cpus.clone(),
            memory: MemorySpec {
                size: size.memory,
                max: size.max_memory,
                hugepages: config.hugepages,
                max_huge: size.max_huge,
                mergeable: config.ksm,
            },
            kernels: KernelSpec {
                hardware: path(&config.kernel),
                deprivileged: path(&config.kernel_deprivileged),
            },
            cmdline: config.kernel_args.clone(),
            image,
            initrd: config.initrd.clone(),
            vsock: self.directory.join(pod::VSOCK),
            jail: Some(JailSpec {
                root: self.directory.join(pod::VM),
                user: user(),
            }),
            control: Some(self.directory.join(pod::CONTROL)),
            console: Some(self.directory.join(pod::CONSOLE)),
            early_console: config.early_console,
            fs: vec![FsSpec {
                tag: guest::SHARE_TAG.into(),
                socket: FdIndex(0),
            }],
            net,
            blk: Vec::new(),
            balloon: config.balloon,
        };
        match self.request(&Request::Boot(Box::new(spec)), &fds).await? {
            Response::Booted(booted) => Ok(booted),
            _ => Err(Error::Confused),
        }
    }

    /// Hot-plugs a network interface; `number` counts those of the pod.
    ///
    /// # Errors
    /// The VMM refuses or has died.
    pub async fn add_net(&self, number: usize, nic: Nic) -> Result<(), Error> {
        let mut fds = Vec::new();
        let spec = net_spec(number, nic, &mut |fd| push(&mut fds, fd));
        self.ask_with(&Request::AddNet(spec), &fds).await
    }

    /// Hot-plugs a block device, which the guest finds by its serial of at most 20 bytes.
    ///
    /// # Errors
    /// The VMM refuses or has died.
    pub async fn add_disk(
        &self,
        serial: &str,
        read_only: bool,
        file: OwnedFd,
    ) -> Result<(), Error> {
        let spec = BlkSpec {
            id: serial.into(),
            serial: serial.into(),
            file: FdIndex(0),
            read_only,
        };
        self.ask_with(&Request::AddBlk(spec), &[file]).await
    }

    /// Unplugs a block device, which takes until the guest has let go of it.
    ///
    /// # Errors
    /// There is none with this serial, the guest does not let go of it, or the VMM has died.
    pub async fn remove_disk(&self, serial: &str) -> Result<(), Error> {
        let id = serial.into();
        self.ask(&Request::RemoveDevice { id }).await
    }

    /// Makes a container's root file system that of the VMM's process. Clients look for a container's
    /// files by its pid (`nerdctl cp`), and must not find the host's there.
    ///
    /// # Errors
    /// The directory is not there, or the VMM refuses.
    pub async fn enter_root(&self, rootfs: &Path) -> Result<(), Error> {
        let directory = sys::open_directory(rootfs).map_err(io("open the container's root"))?;
        self.ask_with(&Request::EnterRoot, &[directory.into()])
            .await
    }

    /// The file server.
    pub fn file_server(&self) -> Arc<OwnedFd> {
        self.fs.clone()
    }

    /// Asks the VMM for something that is answered by `Ok`.
    ///
    /// # Errors
    /// The VMM refuses or has died.
    pub async fn ask(&self, request: &Request) -> Result<(), Error> {
        self.ask_with(request, &[]).await
    }

    /// As [`Vm::ask`], with descriptors that the request names.
    async fn ask_with(&self, request: &Request, fds: &[OwnedFd]) -> Result<(), Error> {
        match self.request(request, fds).await? {
            Response::Ok => Ok(()),
            _ => Err(Error::Confused),
        }
    }

    /// How the VM is.
    ///
    /// # Errors
    /// The VMM has died.
    pub async fn state(&self) -> Result<VmState, Error> {
        match self.request(&Request::State, &[]).await? {
            Response::State(state) => Ok(state),
            _ => Err(Error::Confused),
        }
    }

    async fn request(&self, request: &Request, fds: &[OwnedFd]) -> Result<Response, Error> {
        let mut control = self.control.lock().await;
        let exchange = control.exchange(request, fds);
        match tokio::time::timeout(CONTROL_TIMEOUT, exchange).await {
            Ok(Err(Error::Control(e @ (control::Error::Closed | control::Error::Socket(_))))) => {
                // The VMM has ended, or is about to: its own words tell more than the socket's.
                match self.ended_within(Duration::from_secs(2)).await {
                    Some(reason) => Err(Error::Refused {
                        message: reason.to_string(),
                    }),
                    None => Err(Error::Control(e)),
                }
            }
            Ok(result) => result,
            Err(_) => Err(Error::Timeout),
        }
    }

    /// Waits until the file server says that its descriptors run out.
    ///
    /// # Errors
    /// The descriptor cannot be waited for.
    pub async fn files_run_out(&self) -> std::io::Result<()> {
        let mut count = [0; 8];
        loop {
            let mut guard = self.pressure.readable().await?;
            match nix::unistd::read(self.pressure.get_ref(), &mut count) {
                Ok(_) => return Ok(()),
                Err(nix::Error::EAGAIN) => guard.clear_ready(),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Waits until the VM has ended and tells why.
    pub async fn ended(&self) -> Arc<str> {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_else(|| "unknown".into()),
            // The supervisor never ends without having told.
            Err(_) => "the supervising task has ended".into(),
        }
    }

    /// As [`Vm::ended`], with a limit.
    pub async fn ended_within(&self, limit: Duration) -> Option<Arc<str>> {
        tokio::time::timeout(limit, self.ended()).await.ok()
    }

    /// Why the VM has ended, if it has.
    pub fn gone(&self) -> Option<Arc<str>> {
        self.ended.borrow().clone()
    }

    /// Ends both processes at once and waits until they are gone. The reason tells the shim's kill from
    /// that of a host which is out of memory.
    pub async fn kill(&self, why: &str) {
        // The first reason is the one that it dies of.
        let _ = self.killed.set(why.into());
        for pidfd in [&self.vmm, &self.fs] {
            // ESRCH: it has ended already.
            let _ = sys::pidfd_kill(pidfd, Signal::SIGKILL);
        }
        self.ended().await;
    }
}

/// The user that this shim's VMM becomes.
pub fn user() -> u32 {
    USERS + std::process::id()
}

/// Adds a descriptor to those that go with a request.
fn push(fds: &mut Vec<OwnedFd>, fd: OwnedFd) -> FdIndex {
    fds.push(fd);
    FdIndex(u32::try_from(fds.len() - 1).unwrap_or(u32::MAX))
}

fn net_spec(number: usize, nic: Nic, index: &mut dyn FnMut(OwnedFd) -> FdIndex) -> NetSpec {
    let tap = index(nic.tap);
    let mut vhost = File::options();
    let vhost = vhost.read(true).write(true).open("/dev/vhost-net").ok();
    NetSpec {
        id: format!("net{number}"),
        tap,
        vhost: vhost.map(|file| index(file.into())),
        mac: nic.mac,
        mtu: nic.mtu,
    }
}

fn start(
    mut command: Command,
    log: &Path,
    inherited: &[std::os::fd::BorrowedFd<'_>],
    netns: Netns<'_>,
) -> Result<Child, Error> {
    let program = PathBuf::from(command.get_program());
    let log = File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(log)
        .map_err(io("open a log in the pod's directory"))?;
    command.env_clear().current_dir("/");
    let spawn = Spawn {
        inherited,
        netns,
        alone: true,
        dies_with_parent: true,
        log: Some(&log),
    };
    sys::spawn(command, &spawn).map_err(|source| Error::Spawn { program, source })
}

/// Waits for both processes: when one ends, the other is of no use.
async fn supervise(
    vmm: Arc<OwnedFd>,
    fs: Arc<OwnedFd>,
    directory: PathBuf,
    killed: Arc<OnceLock<String>>,
    tell: watch::Sender<Option<Arc<str>>>,
) {
    let (mut vmm_status, fs_status) = tokio::select! {
        biased;
        status = wait(&vmm) => (Some(status), None),
        status = wait(&fs) => (None, Some(status)),
    };
    if vmm_status.is_none() {
        // The file server ends when its VMM does, and may be seen first: the VMM's end is the cause.
        vmm_status = tokio::time::timeout(CAUSE, wait(&vmm)).await.ok();
    }
    let reason = match (&vmm_status, &fs_status) {
        (Some(status), _) => {
            if matches!(
                cause(status),
                Some(ExitCause::GuestPanic | ExitCause::GuestCrash)
            ) {
                // The directory goes with the pod, and the kernel's last words say what happened.
                for line in lines(&directory.join(pod::CONSOLE)) {
                    tracing::error!("guest: {line}");
                }
            }
            let text = vmm_reason(status, killed.get().map(String::as_str));
            with_tails(text, &directory, &[VMM_LOG, pod::CONSOLE])
        }
        (_, Some(status)) => {
            let text = format!("the pod's file server has ended ({})", describe(status));
            with_tails(text, &directory, &[FS_LOG])
        }
        (None, None) => String::new(),
    };
    for (status, pidfd) in [(vmm_status, &vmm), (fs_status, &fs)] {
        if status.is_none() {
            let _ = sys::pidfd_kill(pidfd, Signal::SIGKILL);
            wait(pidfd).await;
        }
    }
    tell.send_replace(Some(reason.into()));
}

/// Waits for a child and collects it.
pub async fn wait(pidfd: &OwnedFd) -> Option<WaitStatus> {
    let Ok(copy) = pidfd.try_clone() else {
        return None;
    };
    let watched = sys::watch(copy, Interest::READABLE).ok()?;
    loop {
        match sys::reap(pidfd) {
            Ok(Some(status)) => return Some(status),
            Ok(None) => {}
            Err(_) => return None,
        }
        let mut guard = watched.readable().await.ok()?;
        guard.clear_ready();
    }
}

fn describe(status: &Option<WaitStatus>) -> String {
    match status {
        Some(WaitStatus::Exited(_, code)) => format!("exit status {code}"),
        Some(WaitStatus::Signaled(_, signal, _)) => format!("killed by {signal}"),
        _ => "unknown status".into(),
    }
}

fn cause(status: &Option<WaitStatus>) -> Option<ExitCause> {
    match status {
        Some(WaitStatus::Exited(_, code)) => ExitCause::from_status(*code),
        _ => None,
    }
}

/// `killed` is why the shim has ended it, if it has.
fn vmm_reason(status: &Option<WaitStatus>, killed: Option<&str>) -> String {
    if let (Some(WaitStatus::Signaled(_, Signal::SIGKILL, _)), Some(why)) = (status, killed) {
        return format!("its shim has ended it: {why}");
    }
    match cause(status) {
        Some(ExitCause::PowerOff) => "the guest has powered off".into(),
        Some(ExitCause::Reboot) => "the guest asked for a reboot, which a pod does not do".into(),
        Some(ExitCause::GuestPanic) => "the guest's kernel has panicked".into(),
        Some(ExitCause::GuestCrash) => "the guest has crashed its CPU".into(),
        Some(ExitCause::Internal) => "the VMM has failed".into(),
        Some(ExitCause::Refused) => "the VMM refused to start".into(),
        None => format!("the VMM has ended ({})", describe(status)),
    }
}

fn with_tails(mut text: String, directory: &Path, files: &[&str]) -> String {
    for file in files {
        let tail = tail(&directory.join(file));
        if !tail.is_empty() {
            text = format!("{text}; {file}: {}", tail.join(" | "));
        }
    }
    text
}

/// The end of a log, printable: a guest writes what it likes to its console.
fn lines(path: &Path) -> Vec<String> {
    let Ok(mut file) = File::open(path) else {
        return Vec::new();
    };
    let length = file.metadata().map(|m| m.len()).unwrap_or(0);
    let _ = file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)));
    let mut bytes = Vec::new();
    let _ = file.take(TAIL_BYTES).read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    text.lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>())
        .map(|line| line.trim().to_string())
        // The VMM repeats the guest's last words, which are in the console's own log.
        .filter(|line| !line.is_empty() && !line.starts_with("guest: "))
        .collect()
}

/// The last lines of a log that tell something. After a panic of the guest's kernel that is the line
/// which names the cause.
pub fn tail(path: &Path) -> Vec<String> {
    let lines = lines(path);
    if let Some(panic) = lines.iter().rfind(|line| line.contains(PANIC)) {
        return vec![panic.clone()];
    }
    lines[lines.len().saturating_sub(TAIL_LINES)..].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_short_and_printable() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut text = "old\n".repeat(2000);
        text.push_str("one\n\x1b[31mtwo\r\n\nthree\n");
        std::fs::write(file.path(), text).unwrap();
        assert_eq!(tail(file.path()), ["old", "one", "[31mtwo", "three"]);
        assert!(tail(Path::new("/nonexistent")).is_empty());
        std::fs::write(
            file.path(),
            format!("a\n[1.0] {PANIC}: no init\nb\nc\nd\ne\n"),
        )
        .unwrap();
        assert_eq!(tail(file.path()), [format!("[1.0] {PANIC}: no init")]);
    }

    #[tokio::test]
    async fn an_answer_that_comes_too_late_is_not_taken_for_the_next_one() {
        let flags = SockFlag::SOCK_NONBLOCK;
        let (ours, vmm) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let mut control = Control {
            socket: sys::watch(ours, Interest::READABLE | Interest::WRITABLE).unwrap(),
            unanswered: 0,
        };
        let impatient = control.exchange(&Request::State, &[]);
        let late = tokio::time::timeout(Duration::from_millis(10), impatient).await;
        assert!(late.is_err());
        for message in ["to the first", "to the second"] {
            let message = message.into();
            control::send(&vmm, &Response::Error { message }, &[]).unwrap();
        }
        match control.exchange(&Request::State, &[]).await {
            Err(Error::Refused { message }) => assert_eq!(message, "to the second"),
            other => panic!("{other:?}"),
        }
        control::send(&vmm, &Response::Ok, &[]).unwrap();
        let third = control.exchange(&Request::State, &[]).await;
        assert!(matches!(third, Ok(Response::Ok)), "{third:?}");
    }

    #[test]
    fn each_end_has_its_sentence() {
        let exited = |code| Some(WaitStatus::Exited(nix::unistd::Pid::from_raw(1), code));
        assert!(vmm_reason(&exited(11), Some("removed")).contains("panicked"));
        assert!(vmm_reason(&exited(1), None).contains("exit status 1"));
        assert!(vmm_reason(&None, None).contains("unknown"));
        let pid = nix::unistd::Pid::from_raw(1);
        let killed = Some(WaitStatus::Signaled(pid, Signal::SIGKILL, false));
        assert!(vmm_reason(&killed, None).contains("killed by SIGKILL"));
        let by_us = vmm_reason(&killed, Some("removed"));
        assert_eq!(by_us, "its shim has ended it: removed");
    }
}
