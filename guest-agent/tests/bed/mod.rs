//! Where the agent runs for a test, and a client to it.
//!
//! Two beds: this machine's own kernel, with the service in namespaces (examples/unboxed.rs), or a VM
//! with the real thing: `SEPAL_TEST_BED=vm`, where `SEPAL_TEST_VMM`, `SEPAL_TEST_FS`,
//! `SEPAL_TEST_KERNEL` and `SEPAL_TEST_INITRD` or `SEPAL_TEST_IMAGE` name its parts.

#![allow(dead_code)]

mod vm;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio as ProcessStdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use sepal_protocol::agent::{
    CreateContainerRequest, Empty, ExecProcessRequest, ProcessExit, ProcessId, RootFs, Stdio,
};
use sepal_protocol::agent_ttrpc::AgentClient;
use sepal_protocol::ports;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::{Context, with_timeout};

/// Longest any call of a test may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// An agent to talk to.
pub struct Bed {
    pub agent: AgentClient,
    directory: tempfile::TempDir,
    machine: Machine,
}

enum Machine {
    Namespaces(Child),
    Vm(vm::Vm),
}

static TOKEN: AtomicU64 = AtomicU64::new(1);

/// A process's streams, as the shim holds them.
pub struct Streams {
    pub stdin: Option<UnixStream>,
    pub stdout: UnixStream,
    pub stderr: Option<UnixStream>,
    pub names: Stdio,
}

impl Bed {
    pub async fn new() -> Self {
        // A PID 1 has them all; who runs the tests may ignore these (nohup, a shell's background),
        // and a shell in a container cannot trap what it finds ignored.
        for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
            sepal_agent::sys::reset_signal(signal).unwrap();
        }
        let directory = tempfile::Builder::new()
            .prefix("sepal-agent")
            .tempdir_in("/var/tmp")
            .unwrap();
        let share = directory.path().join("share");
        fs::create_dir(&share).unwrap();
        let machine = if is_vm() {
            Machine::Vm(vm::Vm::boot(directory.path()).await)
        } else {
            Machine::Namespaces(unboxed(directory.path(), &share).await)
        };
        let socket = dial(&machine, directory.path(), ports::AGENT).await;
        let agent = AgentClient::new(ttrpc::r#async::Client::new(Socket::new(socket)));
        Self {
            agent,
            directory,
            machine,
        }
    }

    /// The same, for tests that set what a machine has one of: its clock, its name, its parameters.
    ///
    /// # Panics
    /// Without a VM: that would be this machine's.
    pub async fn in_a_vm() -> Self {
        assert!(
            is_vm(),
            "needs SEPAL_TEST_BED=vm (see guest-agent/tests/bed)"
        );
        Self::new().await
    }

    /// The pod's share, as the host has it.
    pub fn share(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    /// What the guest said of its boot; nothing without a VM.
    pub fn ready(&self) -> Option<&sepal_protocol::ready::AgentReady> {
        match &self.machine {
            Machine::Namespaces(_) => None,
            Machine::Vm(vm) => Some(&vm.ready),
        }
    }

    /// Waits until the VM has ended and answers the VMM's exit status.
    pub async fn wait_vm(&mut self) -> i32 {
        match &mut self.machine {
            Machine::Namespaces(_) => panic!("there is no VM"),
            Machine::Vm(vm) => vm.wait().await,
        }
    }

    /// CPU time that the VM has used so far: what a step costs whatever else the machine does.
    pub fn cpu_time(&self) -> Duration {
        match &self.machine {
            Machine::Namespaces(_) => panic!("there is no VM"),
            Machine::Vm(vm) => vm.cpu_time(),
        }
    }

    pub fn console(&self) -> String {
        fs::read_to_string(self.directory.path().join("console.log")).unwrap_or_default()
    }

    /// Opens a stream and says its token.
    pub async fn stream(&self) -> (UnixStream, Vec<u8>) {
        let mut stream = dial(&self.machine, self.directory.path(), ports::STDIO).await;
        let mut token = vec![0; ports::STDIO_TOKEN_LEN];
        token[..8].copy_from_slice(&TOKEN.fetch_add(1, Ordering::Relaxed).to_le_bytes());
        stream.write_all(&token).await.unwrap();
        (stream, token)
    }

    pub async fn streams(&self, terminal: bool) -> Streams {
        let (stdin, stdin_token) = self.stream().await;
        let (stdout, stdout_token) = self.stream().await;
        let mut names = Stdio {
            stdin: stdin_token,
            stdout: stdout_token,
            terminal,
            ..Default::default()
        };
        let mut stderr = None;
        if !terminal {
            let (stream, token) = self.stream().await;
            names.stderr = token;
            stderr = Some(stream);
        }
        Streams {
            stdin: Some(stdin),
            stdout,
            stderr,
            names,
        }
    }

    /// Puts a root file system of busybox into the share.
    pub fn rootfs(&self, id: &str) -> PathBuf {
        let root = self.share().join(id).join("rootfs");
        for directory in ["bin", "etc", "tmp", "proc", "sys", "dev", "root", "work"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
        let applets = Command::new("/bin/busybox")
            .arg("--list")
            .output()
            .unwrap()
            .stdout;
        for applet in String::from_utf8(applets)
            .unwrap()
            .lines()
            .filter(|name| *name != "busybox")
        {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nweb:x:1000:1000::/work:\n",
        )
        .unwrap();
        root
    }

    /// Creates a container with the root file system of [`Bed::rootfs`].
    pub async fn create(
        &self,
        id: &str,
        spec: &Value,
        streams: &Streams,
        shared: &[&str],
    ) -> ttrpc::Result<u32> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: serde_json::to_vec(spec).unwrap(),
            stdio: Some(streams.names.clone()).into(),
            shared_namespaces: shared.iter().map(|name| (*name).to_owned()).collect(),
            rootfs: Some(RootFs {
                share_path: format!("{id}/rootfs"),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        Ok(self.agent.create_container(timeout(), &request).await?.pid)
    }

    pub async fn start(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        Ok(self
            .agent
            .start_process(timeout(), &process_id(id, exec))
            .await?
            .pid)
    }

    pub async fn wait(&self, id: &str, exec: &str) -> ProcessExit {
        self.agent
            .wait_process(timeout(), &process_id(id, exec))
            .await
            .unwrap()
    }

    pub async fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<ProcessExit> {
        self.agent
            .delete_process(timeout(), &process_id(id, exec))
            .await
    }

    /// Adds a process to a container and starts it.
    pub async fn exec(
        &self,
        id: &str,
        exec: &str,
        process: &Value,
        streams: &Streams,
    ) -> ttrpc::Result<u32> {
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process: serde_json::to_vec(process).unwrap(),
            stdio: Some(streams.names.clone()).into(),
            ..Default::default()
        };
        self.agent.exec_process(timeout(), &request).await?;
        self.start(id, exec).await
    }

    /// Makes a container, starts it and leaves it running.
    pub async fn run(&self, id: &str, spec: &Value) -> Streams {
        self.rootfs(id);
        let streams = self.streams(false).await;
        self.create(id, spec, &streams, &["network"]).await.unwrap();
        self.start(id, "").await.unwrap();
        streams
    }

    /// Runs a container to its end and answers its status, output and errors.
    pub async fn output(&self, id: &str, spec: &Value) -> (u32, String, String) {
        let streams = self.run(id, spec).await;
        self.finish(id, "", streams).await
    }

    /// Runs an exec to its end.
    pub async fn exec_output(
        &self,
        id: &str,
        exec: &str,
        process: &Value,
    ) -> (u32, String, String) {
        let streams = self.streams(false).await;
        self.exec(id, exec, process, &streams).await.unwrap();
        self.finish(id, exec, streams).await
    }

    async fn finish(&self, id: &str, exec: &str, mut streams: Streams) -> (u32, String, String) {
        drop(streams.stdin.take());
        let mut stderr = streams.stderr.take().unwrap();
        let (out, err, exit) = tokio::join!(
            read_all(&mut streams.stdout),
            read_all(&mut stderr),
            self.wait(id, exec)
        );
        self.delete(id, exec).await.unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (exit.status, text(out), text(err))
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        match &mut self.machine {
            Machine::Namespaces(child) => {
                // All in its PID namespace goes with PID 1, the child's only child.
                let path = format!("/proc/{0}/task/{0}/children", child.id());
                let init = fs::read_to_string(path).unwrap_or_default();
                for pid in init
                    .split_ascii_whitespace()
                    .filter_map(|pid| pid.parse().ok())
                {
                    let _ = sepal_agent::sys::kill(pid, libc::SIGKILL);
                }
                let left = child.wait().is_ok_and(|status| status.success());
                if !std::thread::panicking() {
                    assert!(left, "the agent has left something behind");
                }
            }
            Machine::Vm(vm) => {
                if std::thread::panicking() {
                    let path = self.directory.path().join("console.log");
                    eprintln!("console:\n{}", fs::read_to_string(path).unwrap_or_default());
                }
                vm.end();
            }
        }
    }
}

pub fn timeout() -> Context {
    with_timeout(i64::try_from(TIMEOUT.as_nanos()).unwrap())
}

pub fn process_id(container: &str, exec: &str) -> ProcessId {
    ProcessId {
        container_id: container.into(),
        exec_id: exec.into(),
        ..Default::default()
    }
}

pub fn empty() -> Empty {
    Empty::new()
}

/// The text that a call failed with.
pub fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> String {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.message().to_owned(),
        other => panic!("not a refusal: {other}"),
    }
}

pub async fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    tokio::time::timeout(TIMEOUT, stream.read_to_end(&mut bytes))
        .await
        .expect("the stream does not end")
        .unwrap();
    bytes
}

/// An OCI process with busybox's tools.
pub fn process(args: &[&str]) -> Value {
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/bin", "GREETING=hello"],
        "cwd": "/",
        "capabilities": capabilities(&["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"])
    })
}

pub fn capabilities(names: &[&str]) -> Value {
    json!({"bounding": names, "effective": names, "permitted": names})
}

/// The spec of a container, as containerd writes one.
pub fn spec(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": process(args),
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]}
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                           {"type": "network"}],
            "resources": {"devices": [{"allow": !is_vm(), "access": "rwm"}]},
            "maskedPaths": ["/proc/kcore", "/proc/timer_list"],
            "readonlyPaths": ["/proc/sys"]
        }
    })
}

/// Whether the agent runs in a VM. Only there may it load programs into the kernel, and only there
/// are all cgroup controllers.
pub fn is_vm() -> bool {
    std::env::var("SEPAL_TEST_BED").as_deref() == Ok("vm")
}

async fn unboxed(directory: &Path, share: &Path) -> Child {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples/unboxed");
    let mut child = Command::new(&program)
        .args([directory, share])
        .stdin(ProcessStdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{program:?}: {error}"));
    for _ in 0..500 {
        if directory.join("stdio.sock").exists()
            && UnixStream::connect(directory.join("agent.sock"))
                .await
                .is_ok()
        {
            return child;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let ended = child.kill().and_then(|()| child.wait());
    panic!("the agent does not answer; ended by the test: {ended:?}");
}

async fn dial(machine: &Machine, directory: &Path, port: u32) -> UnixStream {
    match machine {
        Machine::Namespaces(_) => {
            let name = if port == ports::AGENT {
                "agent.sock"
            } else {
                "stdio.sock"
            };
            UnixStream::connect(directory.join(name)).await.unwrap()
        }
        Machine::Vm(_) => vm::dial(directory, port).await,
    }
}
