//! A VM with the agent as PID 1, by sepal-vmm and sepal-fs.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use sepal_protocol::control::{Request, Response, receive, send};
use sepal_protocol::ports;
use sepal_protocol::ready::AgentReady;
use sepal_protocol::vm::{CpuSpec, FdIndex, FsSpec, KernelSpec, MemorySpec, VmSpec};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

pub struct Vm {
    vmm: Child,
    fs: Child,
    share: std::path::PathBuf,
    _control: OwnedFd,
    pub ready: AgentReady,
}

fn part(name: &str) -> std::path::PathBuf {
    let path = std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set"));
    fs::canonicalize(path).unwrap_or_else(|error| panic!("{name}: {error}"))
}

impl Vm {
    pub async fn boot(directory: &Path) -> Self {
        let share = directory.join("share");
        let none = None::<&str>;
        mount(Some(&share), &share, none, MsFlags::MS_BIND, none).unwrap();
        mount(none, &share, none, MsFlags::MS_SHARED, none).unwrap();
        let fs_path = directory.join("fs.sock");
        let fs_listener = std::os::unix::net::UnixListener::bind(&fs_path).unwrap();
        let mut file_server = Command::new(part("SEPAL_TEST_FS"));
        file_server
            .args(["--listen-fd", "3", "--share"])
            .arg(&share);
        let file_server = with_fd(&mut file_server, fs_listener.into());
        let fs_socket = std::os::unix::net::UnixStream::connect(&fs_path).unwrap();

        let ready = UnixListener::bind(directory.join(format!("vsock.sock_{}", ports::READY)));
        let ready = ready.unwrap();
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let mut vmm = Command::new(part("SEPAL_TEST_VMM"));
        vmm.args(["--control-fd", "3"]);
        if let Ok(args) = std::env::var("SEPAL_TEST_VMM_ARGS") {
            vmm.args(args.split_whitespace());
        }
        let vmm = with_fd(&mut vmm, theirs);
        let initrd = std::env::var_os("SEPAL_TEST_INITRD").map(|_| part("SEPAL_TEST_INITRD"));
        let spec = VmSpec {
            pod_id: "agent-test".into(),
            cpus: CpuSpec { boot: 1, max: 1 },
            memory: MemorySpec {
                size: 384 << 20,
                max: 0,
                hugepages: false,
                max_huge: 0,
                mergeable: false,
            },
            kernels: KernelSpec {
                hardware: Some(part("SEPAL_TEST_KERNEL")),
                deprivileged: Some(part("SEPAL_TEST_KERNEL")),
            },
            cmdline: std::env::var("SEPAL_TEST_CMDLINE").unwrap_or_default(),
            image: initrd.is_none().then(|| part("SEPAL_TEST_IMAGE")),
            initrd,
            vsock: directory.join("vsock.sock"),
            control: None,
            console: Some(directory.join("console.log")),
            jail: None,
            early_console: false,
            fs: vec![FsSpec {
                tag: "sepal".into(),
                socket: FdIndex(0),
            }],
            net: Vec::new(),
            blk: Vec::new(),
            balloon: true,
        };
        send(
            &ours,
            &Request::Boot(Box::new(spec)),
            &[fs_socket.as_raw_fd()],
        )
        .unwrap();
        let (answer, _) = receive::<Response>(&ours).unwrap();
        assert!(matches!(answer, Response::Booted(_)), "{answer:?}");
        let line = tokio::time::timeout(Duration::from_secs(20), async {
            let (stream, _) = ready.accept().await.unwrap();
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line).await.unwrap();
            line
        });
        let Ok(line) = line.await else {
            let console = fs::read_to_string(directory.join("console.log"));
            panic!("the agent does not report: {}", console.unwrap_or_default());
        };
        let ready = serde_json::from_str(&line).unwrap();
        Self {
            vmm,
            fs: file_server,
            share,
            _control: ours,
            ready,
        }
    }

    pub async fn wait(&mut self) -> i32 {
        for _ in 0..1000 {
            if let Some(status) = self.vmm.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the VM does not end");
    }

    /// Of all threads of the VMM, to the nanosecond (proc_pid_schedstat).
    pub fn cpu_time(&self) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.vmm.id())).unwrap();
        let spent = tasks.flatten().map(|task| {
            let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            let first = text.split_ascii_whitespace().next();
            first.and_then(|spent| spent.parse().ok()).unwrap_or(0)
        });
        Duration::from_nanos(spent.sum())
    }

    pub fn end(&mut self) {
        for child in [&mut self.vmm, &mut self.fs] {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = umount2(&self.share, MntFlags::MNT_DETACH);
    }
}

/// Starts a program with `fd` as its descriptor 3.
fn with_fd(command: &mut Command, fd: OwnedFd) -> Child {
    let raw = fd.as_raw_fd();
    // SAFETY: between fork and exec only dup2(2) or fcntl(2) runs, both async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            let done = if raw == 3 {
                libc::fcntl(3, libc::F_SETFD, 0)
            } else {
                libc::dup2(raw, 3)
            };
            if done < 0 {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
    command.stdin(Stdio::null()).spawn().unwrap()
}

/// Dials a port of the guest through the VMM.
pub async fn dial(directory: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(directory.join("vsock.sock"))
        .await
        .unwrap();
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await
        .unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") {
        answer.push(
            stream
                .read_u8()
                .await
                .expect("the guest does not take the connection"),
        );
    }
    assert!(answer.starts_with(b"OK "), "{answer:?}");
    stream
}
