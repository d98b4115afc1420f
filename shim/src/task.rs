//! containerd's Task service: RPC in, plain call, answer or gRPC code out.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use containerd_shim_protos::ttrpc::{self, Code};
use tokio::sync::Notify;
use tracing::Instrument;

use crate::container::{Phase, lock};
use crate::creation::Creation;
use crate::error::{Error, Result};
use crate::pod::Pod;
use crate::seat::Seat;
use crate::stats;
use crate::stdio::Wanted;
use crate::{agent, resize, spec, vm};

/// After the pod's last container is deleted, how long containerd may take to call Shutdown.
///
/// Its own limit for that call is 3 s. But a client that goes away while containerd deletes its task
/// takes the whole call with it: the container is gone, Shutdown never comes, and whoever asks later
/// is told that there is no such task. A shim that leaves is one that containerd cleans up after.
const SHUTDOWN: Duration = Duration::from_secs(5);

/// The service of this shim's pod.
#[derive(Clone)]
pub struct TaskService {
    seat: Arc<Seat>,
    exit: Arc<Notify>,
}

/// The gRPC code that containerd's and its clients' logic expects of each error.
fn code(error: &Error) -> Code {
    match error {
        Error::NoSandbox { .. }
        | Error::NoContainer { .. }
        | Error::NoExec { .. }
        | Error::Finished => Code::NOT_FOUND,
        Error::SandboxExists { .. } | Error::ContainerExists { .. } | Error::ExecExists { .. } => {
            Code::ALREADY_EXISTS
        }
        Error::NotCreated | Error::WrongState { .. } | Error::Removing => Code::FAILED_PRECONDITION,
        Error::Unsupported { .. } => Code::UNIMPLEMENTED,
        Error::Invalid { .. } | Error::Size(_) => Code::INVALID_ARGUMENT,
        Error::Spec(
            spec::Error::HostNetwork
            | spec::Error::HostNamespace { .. }
            | spec::Error::DiskOfUsers(_)
            | spec::Error::SharedVolume { .. }
            | spec::Error::ForeignNamespace { .. },
        ) => Code::UNIMPLEMENTED,
        Error::Spec(_) | Error::AppArmor(_) => Code::INVALID_ARGUMENT,
        Error::Resize(resize::Error::NoRoom { .. }) => Code::FAILED_PRECONDITION,
        Error::Resize(_) => Code::RESOURCE_EXHAUSTED,
        Error::VmGone { .. } => Code::UNAVAILABLE,
        Error::Vm(vm::Error::Timeout) | Error::Agent(agent::Error::NotReady { .. }) => {
            Code::DEADLINE_EXCEEDED
        }
        Error::Agent(e) => e.code().unwrap_or(Code::UNKNOWN),
        Error::Pod(inner) => code(inner),
        Error::Unfinished(_)
        | Error::Leftover { .. }
        | Error::Config(_)
        | Error::Rootfs(_)
        | Error::Disk(_)
        | Error::Mirror(_)
        | Error::Network(_)
        | Error::Hook(_)
        | Error::Cgroup(_)
        | Error::Vm(_)
        | Error::Stdio(_)
        | Error::Io { .. } => Code::UNKNOWN,
    }
}

/// The answer to a call that has failed.
pub fn status(error: Error) -> ttrpc::Error {
    tracing::debug!("refused: {error}");
    ttrpc::Error::RpcStatus(ttrpc::get_status(code(&error), format!("sepal: {error}")))
}

impl TaskService {
    /// A service for the pod that has the seat.
    pub fn new(seat: Arc<Seat>, exit: Arc<Notify>) -> Self {
        Self { seat, exit }
    }

    fn pod(&self) -> Result<&Arc<Pod>> {
        self.seat.pod()
    }

    async fn do_create(&self, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(Error::Unsupported {
                what: "restoring a checkpoint",
            });
        }
        check_id(&request.id)?;
        let options = options(&request)?;
        let asked = Creation {
            id: request.id,
            bundle: PathBuf::from(request.bundle),
            rootfs: request.rootfs,
            wanted: Wanted {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                size: None,
            },
            no_pivot: options.no_pivot_root,
        };
        let pid = self.pod()?.create(asked).await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    fn do_state(&self, request: &StateRequest) -> Result<StateResponse> {
        let pod = self.pod()?;
        let container = pod.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let mut response = StateResponse {
            id: request.id.clone(),
            bundle: container.bundle.display().to_string(),
            pid: container.pid,
            stdin: process.wanted.stdin.clone(),
            stdout: process.wanted.stdout.clone(),
            stderr: process.wanted.stderr.clone(),
            terminal: process.wanted.terminal,
            exec_id: request.exec_id.clone(),
            ..Default::default()
        };
        let status = match process.phase() {
            Phase::Created => Status::CREATED,
            Phase::Running if container.paused.load(Ordering::Relaxed) => Status::PAUSED,
            Phase::Running => Status::RUNNING,
            Phase::Stopped(exit) => {
                response.exit_status = exit.status;
                response.exited_at = exit.timestamp();
                Status::STOPPED
            }
        };
        response.set_status(status);
        Ok(response)
    }

    /// Whether this shim has served its purpose: with other containers of the pod still there a call
    /// was for one that is gone, and a pod without a container of its own ends by ShutdownSandbox.
    fn is_over(&self) -> bool {
        match self.pod() {
            Ok(pod) => !pod.spec.bare && lock(&pod.containers).is_empty(),
            Err(Error::NotCreated) => false,
            Err(_) => true,
        }
    }

    async fn do_delete(&self, request: &DeleteRequest) -> Result<DeleteResponse> {
        let (pid, exit) = self.pod()?.delete(&request.id, &request.exec_id).await?;
        if self.is_over() {
            let this = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(SHUTDOWN).await;
                if this.is_over() {
                    tracing::warn!("containerd has deleted the pod and forgotten its shim");
                    this.exit.notify_one();
                }
            });
        }
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: exit.timestamp(),
            ..Default::default()
        })
    }

    async fn do_stats(&self, id: &str) -> Result<StatsResponse> {
        let metrics = stats::metrics(&self.pod()?.stats(id).await?);
        Ok(StatsResponse {
            stats: MessageField::some(stats::to_any(metrics)?),
            ..Default::default()
        })
    }
}

/// Ids become names of directories: containerd checks them, and so do we.
fn check_id(id: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if id.is_empty() || id.len() > 128 || !id.chars().all(plain) || id.starts_with('.') {
        return Err(Error::Invalid {
            what: "container id",
            reason: format!("{id:?} is not one"),
        });
    }
    Ok(())
}

/// runc's options, where containerd sends them; what concerns runc alone has no meaning here.
fn options(request: &CreateTaskRequest) -> Result<Options> {
    match request.options.as_ref() {
        Some(any) if any.type_url.ends_with("containerd.runc.v1.Options") => {
            Options::parse_from_bytes(&any.value).map_err(|e| Error::Invalid {
                what: "runtime options",
                reason: e.to_string(),
            })
        }
        _ => Ok(Options::default()),
    }
}

/// Answers a call within a span that names the container.
macro_rules! answer {
    ($call:literal, $id:expr, $work:expr) => {
        async { $work }
            .instrument(tracing::info_span!($call, container = %$id))
            .await
            .map_err(status)
    };
}

/// As `answer!`, for what must not be left half-way: `this` is the service in it.
macro_rules! carry_out {
    ($self:ident, $call:literal, $id:expr, $this:ident => $work:expr) => {{
        let span = tracing::info_span!($call, container = %$id);
        let $this = $self.clone();
        to_its_end(async move { $work }.instrument(span))
            .await
            .map_err(status)
    }};
}

/// Does the work of a call also when nobody waits for it any more. ttrpc drops a call in the middle when its
/// time is over or the client's connection closes (containerd is restarted); what had been made by then
/// would be known to nobody, and a message to the guest's agent that is cut off ends that connection.
pub async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(work).await {
        Ok(answer) => answer,
        Err(e) => Err(Error::Unfinished(e)),
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let id = request.id.clone();
        carry_out!(self, "create", id, this => this.do_create(request).await)
    }

    async fn start(&self, _: &TtrpcContext, r: StartRequest) -> ttrpc::Result<StartResponse> {
        carry_out!(self, "start", r.id, this => {
            let pid = this.pod()?.start(&r.id, &r.exec_id).await?;
            Ok(StartResponse {
                pid,
                ..Default::default()
            })
        })
    }

    async fn state(&self, _: &TtrpcContext, r: StateRequest) -> ttrpc::Result<StateResponse> {
        answer!("state", r.id, self.do_state(&r))
    }

    async fn delete(&self, _: &TtrpcContext, r: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        carry_out!(self, "delete", r.id, this => this.do_delete(&r).await)
    }

    async fn pids(&self, _: &TtrpcContext, r: PidsRequest) -> ttrpc::Result<PidsResponse> {
        answer!("pids", r.id, {
            // Host pids are wanted, and the host knows one of each container.
            let info = ProcessInfo {
                pid: self.pod()?.container(&r.id)?.pid,
                ..Default::default()
            };
            Ok(PidsResponse {
                processes: vec![info],
                ..Default::default()
            })
        })
    }

    async fn pause(&self, _: &TtrpcContext, r: PauseRequest) -> ttrpc::Result<Empty> {
        carry_out!(self, "pause", r.id, this => {
            this.pod()?.set_paused(&r.id, true).await?;
            Ok(Empty::new())
        })
    }

    async fn resume(&self, _: &TtrpcContext, r: ResumeRequest) -> ttrpc::Result<Empty> {
        carry_out!(self, "resume", r.id, this => {
            this.pod()?.set_paused(&r.id, false).await?;
            Ok(Empty::new())
        })
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(status(Error::Unsupported { what: "checkpoint" }))
    }

    async fn kill(&self, _: &TtrpcContext, r: KillRequest) -> ttrpc::Result<Empty> {
        carry_out!(self, "kill", r.id, this => {
            this.pod()?.kill(&r.id, &r.exec_id, r.signal, r.all).await?;
            Ok(Empty::new())
        })
    }

    async fn exec(&self, _: &TtrpcContext, r: ExecProcessRequest) -> ttrpc::Result<Empty> {
        answer!("exec", r.id, {
            check_id(&r.exec_id)?;
            let spec = r
                .spec
                .into_option()
                .map(|any| any.value)
                .unwrap_or_default();
            let wanted = Wanted {
                stdin: r.stdin,
                stdout: r.stdout,
                stderr: r.stderr,
                terminal: r.terminal,
                size: spec::console_size(serde_json::from_slice(&spec).ok().as_ref()),
            };
            self.pod()?.exec(&r.id, &r.exec_id, wanted, spec)?;
            Ok(Empty::new())
        })
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: ResizePtyRequest) -> ttrpc::Result<Empty> {
        carry_out!(self, "resize", r.id, this => {
            this.pod()?
                .resize(&r.id, &r.exec_id, r.height, r.width)
                .await?;
            Ok(Empty::new())
        })
    }

    async fn close_io(&self, _: &TtrpcContext, r: CloseIORequest) -> ttrpc::Result<Empty> {
        answer!("close-io", r.id, {
            let process = self.pod()?.container(&r.id)?.process(&r.exec_id)?;
            if r.stdin {
                process.close_stdin();
            }
            Ok(Empty::new())
        })
    }

    async fn update(&self, _: &TtrpcContext, r: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        carry_out!(self, "update", r.id, this => {
            let resources = r
                .resources
                .into_option()
                .map(|any| any.value)
                .unwrap_or_default();
            this.pod()?.update(&r.id, resources).await?;
            Ok(Empty::new())
        })
    }

    async fn wait(&self, _: &TtrpcContext, r: WaitRequest) -> ttrpc::Result<WaitResponse> {
        answer!("wait", r.id, {
            let process = self.pod()?.container(&r.id)?.process(&r.exec_id)?;
            let exit = process.ended().await;
            Ok(WaitResponse {
                exit_status: exit.status,
                exited_at: exit.timestamp(),
                ..Default::default()
            })
        })
    }

    async fn stats(&self, _: &TtrpcContext, r: StatsRequest) -> ttrpc::Result<StatsResponse> {
        carry_out!(self, "stats", r.id, this => this.do_stats(&r.id).await)
    }

    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.pod().map_or(0, |pod| pod.pid()),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        if self.is_over() {
            self.exit.notify_one();
        }
        Ok(Empty::new())
    }
}
