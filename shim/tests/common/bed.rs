//! The real shim program over a stand-in, with a containerd that only takes events.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_shim_protos::api::*;
use containerd_shim_protos::events::task::*;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::sandbox_api::*;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, Events, TaskClient, create_events};
use containerd_shim_protos::ttrpc::r#async::{Server, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, context};
use sepal_protocol::cri::PodSandboxConfig;
use sepal_protocol::state::{PodState, ProcessRef};

/// What containerd was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// The topic without "/tasks/".
    pub topic: String,
    pub container: String,
    /// Empty for the container's first process.
    pub exec: String,
    /// Of an end or a deletion.
    pub status: u32,
}

impl Told {
    fn new(topic: &str, event: &[u8]) -> Self {
        macro_rules! read {
            ($kind:ty) => {
                <$kind>::parse_from_bytes(event).unwrap()
            };
        }
        let (container, exec, status) = match topic {
            "create" => (read!(TaskCreate).container_id, String::new(), 0),
            "start" => (read!(TaskStart).container_id, String::new(), 0),
            "exec-added" => {
                let event = read!(TaskExecAdded);
                (event.container_id, event.exec_id, 0)
            }
            "exec-started" => {
                let event = read!(TaskExecStarted);
                (event.container_id, event.exec_id, 0)
            }
            "exit" => {
                let event = read!(TaskExit);
                (event.container_id, event.id, event.exit_status)
            }
            "delete" => {
                let event = read!(TaskDelete);
                (event.container_id, event.id, event.exit_status)
            }
            other => (String::new(), other.to_string(), 0),
        };
        let exec = if exec == container {
            String::new()
        } else {
            exec
        };
        Self {
            topic: topic.to_string(),
            container,
            exec,
            status,
        }
    }
}

#[derive(Default)]
struct Containerd {
    told: Arc<Mutex<Vec<Told>>>,
}

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope();
        let topic = envelope.topic().trim_start_matches("/tasks/");
        let told = Told::new(topic, &envelope.event().value);
        self.told.lock().unwrap().push(told);
        Ok(Empty::new())
    }
}

pub struct Bed {
    pub dir: tempfile::TempDir,
    pub id: String,
    told: Arc<Mutex<Vec<Told>>>,
    _server: Server,
}

pub const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-sepal-v2");

impl Bed {
    pub async fn new(name: &str, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let id = format!("test-{name}-{}", std::process::id());
        let containerd = Containerd::default();
        let told = containerd.told.clone();
        let address = format!("unix://{}/ttrpc", dir.path().display());
        let mut server = Server::new()
            .bind(&address)
            .unwrap()
            .register_service(create_events(Arc::new(containerd)));
        server.start().await.unwrap();
        let bed = Self {
            dir,
            id,
            told,
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
        self.command_for(id, bundle, action).output().unwrap()
    }

    /// The shim's program, as containerd runs it.
    pub fn command_for(&self, id: &str, bundle: &Path, action: &str) -> Command {
        let mut command = Command::new(SHIM);
        command
            .args(["-namespace", "test", "-id", id])
            .args(["-address", "/nonexistent/containerd"])
            .arg("-bundle")
            .arg(bundle)
            .arg(action)
            .current_dir(bundle)
            .env("TTRPC_ADDRESS", self.dir.path().join("ttrpc"))
            .env("SEPAL_CONFIG", self.dir.path().join("config.toml"))
            .stdin(Stdio::null());
        command
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
        self.member_of_name("member", args)
    }

    /// One of several.
    pub fn member_of_name(&self, name: &str, args: &[&str]) -> CreateTaskRequest {
        let id = format!("{}-{name}", self.id);
        let bundle = self.dir.path().join(name);
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
        let told = self.told.lock().unwrap();
        told.iter().map(|told| told.topic.clone()).collect()
    }

    /// What was told of one process, in this order.
    pub fn told_of(&self, container: &str, exec: &str) -> Vec<Told> {
        let told = self.told.lock().unwrap();
        let of = |told: &&Told| told.container == container && told.exec == exec;
        told.iter().filter(of).cloned().collect()
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

/// A test that fails leaves nothing, either.
impl Drop for Bed {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        if let Ok(state) = PodState::load(&self.pod()) {
            let pid = nix::unistd::Pid::from_raw(state.shim.pid as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        self.shim("delete");
    }
}

/// A pod as CRI describes it, in a cgroup of the test's own.
pub fn description(bed: &Bed) -> PodSandboxConfig {
    let mut config = PodSandboxConfig {
        hostname: "web-0".into(),
        ..Default::default()
    };
    config.linux.mut_or_insert_default().cgroup_parent = format!("/sepal-test-{}", bed.id);
    config
}

/// What makes a sandbox of it.
pub fn create_of(bed: &Bed, config: &PodSandboxConfig) -> CreateSandboxRequest {
    CreateSandboxRequest {
        sandbox_id: bed.id.clone(),
        bundle_path: bed.bundle().display().to_string(),
        options: MessageField::some(Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: config.write_to_bytes().unwrap(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Creates and starts the sandbox.
pub async fn start_sandbox(bed: &Bed, sandbox: &SandboxClient) -> StartSandboxResponse {
    let create = create_of(bed, &description(bed));
    sandbox.create_sandbox(within(), &create).await.unwrap();
    let start = StartSandboxRequest {
        sandbox_id: bed.id.clone(),
        ..Default::default()
    };
    sandbox.start_sandbox(within(), &start).await.unwrap()
}

/// Stops the sandbox, which has so many seconds.
pub async fn stop(bed: &Bed, sandbox: &SandboxClient, timeout_secs: u32) {
    let request = StopSandboxRequest {
        sandbox_id: bed.id.clone(),
        timeout_secs,
        ..Default::default()
    };
    sandbox.stop_sandbox(within(), &request).await.unwrap();
}

/// Ends the shim, and sees it go with its socket and the parents of its cgroup.
pub async fn shut_down(bed: &Bed, sandbox: &SandboxClient, shim: ProcessRef) {
    let request = ShutdownSandboxRequest {
        sandbox_id: bed.id.clone(),
        ..Default::default()
    };
    sandbox.shutdown_sandbox(within(), &request).await.unwrap();
    wait_for_end(shim).await;
    let address = bed.address();
    let socket = address.trim_start_matches("unix://");
    assert!(!Path::new(socket).exists(), "{socket} is left");
}

/// The test's own cgroups, which the shim leaves to whoever named them.
pub fn remove_parents(state: &PodState) {
    for parent in state.cgroups.iter().filter_map(|c| c.parent()) {
        let _ = std::fs::remove_dir(parent);
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
