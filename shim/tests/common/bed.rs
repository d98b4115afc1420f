//! The real shim program over a stand-in, with a containerd that only takes events.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_shim_protos::api::*;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, Events, TaskClient, create_events};
use containerd_shim_protos::ttrpc::r#async::{Server, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, context};
use sepal_protocol::state::{PodState, ProcessRef};

#[derive(Default)]
struct Containerd {
    topics: Arc<Mutex<Vec<String>>>,
}

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let event = request
            .envelope()
            .topic()
            .trim_start_matches("/tasks/")
            .to_string();
        self.topics.lock().unwrap().push(event);
        Ok(Empty::new())
    }
}

pub struct Bed {
    pub dir: tempfile::TempDir,
    pub id: String,
    topics: Arc<Mutex<Vec<String>>>,
    _server: Server,
}

pub const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-sepal-v2");

impl Bed {
    pub async fn new(name: &str, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let id = format!("test-{name}-{}", std::process::id());
        let containerd = Containerd::default();
        let topics = containerd.topics.clone();
        let address = format!("unix://{}/ttrpc", dir.path().display());
        let mut server = Server::new()
            .bind(&address)
            .unwrap()
            .register_service(create_events(Arc::new(containerd)));
        server.start().await.unwrap();
        let bed = Self {
            dir,
            id,
            topics,
            _server: server,
        };
        bed.write_script(
            "vmm",
            "exec \"$SELF\" --exact stand_in_for_the_vmm --nocapture",
        );
        // Lives until its VMM has gone, as the real one.
        bed.write_script("fs", "exec sleep 600");
        bed.configure("");
        let rootfs = bed.bundle().join("rootfs");
        std::fs::create_dir_all(rootfs).unwrap();
        bed.spec(args, serde_json::json!([]));
        bed
    }

    pub fn bundle(&self) -> PathBuf {
        self.dir.path().join("bundle")
    }

    pub fn write_script(&self, name: &str, line: &str) {
        let me = std::env::current_exe().unwrap();
        let text = format!(
            "#!/bin/sh\nexport SEPAL_STAND_IN=1 SELF={} HEARD={}\n{line}\n",
            me.display(),
            self.dir.path().join("heard").display()
        );
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(path, mode).unwrap();
    }

    pub fn configure(&self, more: &str) {
        let dir = self.dir.path().display();
        let text = format!("vmm = \"{dir}/vmm\"\nfs = \"{dir}/fs\"\nlog_level = \"debug\"\n{more}");
        std::fs::write(self.dir.path().join("config.toml"), text).unwrap();
    }

    pub fn spec(&self, args: &[&str], mounts: serde_json::Value) {
        let spec = serde_json::json!({
            "ociVersion": "1.2.0",
            "process": {"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/"},
            "root": {"path": "rootfs"},
            "mounts": mounts,
            "linux": {
                "cgroupsPath": format!("/sepal/{}", self.id),
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "network"}]
            }
        });
        std::fs::write(self.bundle().join("config.json"), spec.to_string()).unwrap();
    }

    pub fn shim(&self, action: &str) -> std::process::Output {
        self.shim_for(&self.id, &self.bundle(), action)
    }

    fn shim_for(&self, id: &str, bundle: &Path, action: &str) -> std::process::Output {
        Command::new(SHIM)
            .args(["-namespace", "test", "-id", id])
            .args(["-address", "/nonexistent/containerd"])
            .arg("-bundle")
            .arg(bundle)
            .arg(action)
            .current_dir(bundle)
            .env("TTRPC_ADDRESS", self.dir.path().join("ttrpc"))
            .env("SEPAL_CONFIG", self.dir.path().join("config.toml"))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    pub async fn start(&self) -> TaskClient {
        let output = self.shim("start");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let address = String::from_utf8(output.stdout).unwrap();
        TaskClient::new(Client::connect(&address).await.unwrap())
    }

    /// Starts the shim of a sandbox, whose bundle is empty.
    pub async fn start_sandbox(&self) -> (SandboxClient, TaskClient) {
        std::fs::remove_file(self.bundle().join("config.json")).unwrap();
        let output = self.shim("start");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let address = String::from_utf8(output.stdout).unwrap();
        (
            SandboxClient::new(Client::connect(&address).await.unwrap()),
            TaskClient::new(Client::connect(&address).await.unwrap()),
        )
    }

    /// Where the shim serves.
    pub fn address(&self) -> String {
        std::fs::read_to_string(self.bundle().join("address")).unwrap()
    }

    /// What the shim's program answers to the start of a container of the sandbox.
    pub fn start_member(&self, member: &CreateTaskRequest) -> String {
        let output = self.shim_for(&member.id, Path::new(&member.bundle), "start");
        String::from_utf8(output.stdout).unwrap()
    }

    /// A container of the sandbox: its id and what creates it.
    pub fn member(&self, args: &[&str]) -> CreateTaskRequest {
        let id = format!("{}-member", self.id);
        let bundle = self.dir.path().join("member");
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        // As CRI names the pod's namespaces: by the pid of what runs, while it does.
        let vmm = PodState::load(&self.pod()).ok().and_then(|state| state.vmm);
        let pid = vmm.map_or(0, |vmm| vmm.pid);
        let namespace = |kind: &str| format!("/proc/{pid}/ns/{kind}");
        let spec = serde_json::json!({
            "ociVersion": "1.2.0",
            "process": {"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/"},
            "root": {"path": "rootfs"},
            "annotations": {
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": self.id,
            },
            "linux": {"namespaces": [
                {"type": "pid", "path": namespace("pid")},
                {"type": "ipc", "path": namespace("ipc")},
                {"type": "network", "path": namespace("net")},
            ]}
        });
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        CreateTaskRequest {
            id,
            bundle: bundle.display().to_string(),
            ..Default::default()
        }
    }

    pub fn fifo(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.display().to_string()
    }

    pub fn create_request(&self) -> CreateTaskRequest {
        CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle().display().to_string(),
            ..Default::default()
        }
    }

    pub fn pod(&self) -> PathBuf {
        Path::new("/run/sepal").join(PodState::pod_id("test", &self.id))
    }

    /// All that the pod could have left.
    pub fn assert_nothing_left(&self, state: &PodState) {
        assert!(
            !self.pod().exists(),
            "{:?}",
            std::fs::read_dir(self.pod()).map(Vec::from_iter)
        );
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&self.id), "a mount is left");
        for process in [state.vmm, state.fs].into_iter().flatten() {
            assert!(!process.alive(), "{process:?} is left");
        }
        for cgroup in &state.cgroups {
            assert!(!cgroup.exists(), "{} is left", cgroup.display());
        }
    }

    /// What the stand-in for the agent was told of volumes and mounts.
    pub fn heard(&self) -> Vec<String> {
        let heard = std::fs::read_to_string(self.dir.path().join("heard"));
        heard
            .unwrap_or_default()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    pub fn topics(&self) -> Vec<String> {
        self.topics.lock().unwrap().clone()
    }

    pub async fn wait_for_topic(&self, topic: &str) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.topics().iter().any(|t| t == topic) {
            assert!(
                Instant::now() < deadline,
                "no {topic} in {:?}",
                self.topics()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Waits until a process has gone.
pub async fn wait_for_end(process: ProcessRef) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while process.alive() {
        assert!(Instant::now() < deadline, "{process:?} is left");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn kill(process: Option<ProcessRef>) {
    let pid = nix::unistd::Pid::from_raw(process.unwrap().pid as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

pub fn within() -> context::Context {
    context::with_timeout(30_000_000_000)
}

pub fn code(error: ttrpc::Error) -> (ttrpc::Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_string()),
        other => panic!("{other}"),
    }
}

pub fn start_of(id: &str) -> StartRequest {
    StartRequest {
        id: id.into(),
        ..Default::default()
    }
}

pub fn wait_of(id: &str) -> WaitRequest {
    WaitRequest {
        id: id.into(),
        ..Default::default()
    }
}

pub fn delete_of(id: &str) -> DeleteRequest {
    DeleteRequest {
        id: id.into(),
        ..Default::default()
    }
}

/// Whether this is root; says so if not.
pub fn is_root() -> bool {
    let root = nix::unistd::Uid::effective().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}
