//! containerd's Sandbox service, by which a pod is the VM alone: no pause image, no pause container,
//! no pause process. RPC in, plain call, answer or gRPC code out; what is done is in [`crate::pod`].
//!
//! containerd (core/runtime/v2, plugins/sandbox) starts the shim with a bundle in which nothing is,
//! calls CreateSandbox with Kubernetes' description of the pod and StartSandbox, makes containers by
//! the Task service on the same socket, and ends with StopSandbox and ShutdownSandbox. A call that
//! failed is followed by ShutdownSandbox.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use tokio::sync::Notify;
use tracing::Instrument;

use crate::container::lock;
use crate::error::{Error, Result};
use crate::pod::{Beginning, Pod};
use crate::podspec::{PodSpec, SandboxRequest};
use crate::seat::Seat;
use crate::spec::Network;
use crate::stats;
use crate::task::{status, to_its_end};

/// States of a sandbox, by the names of Kubernetes' PodSandboxState.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// How long the shim lives on after ShutdownSandbox: its answer must be out before the connection
/// breaks, which containerd takes for a failure.
const ANSWER: Duration = Duration::from_millis(50);

/// The service of this shim's sandbox.
#[derive(Clone)]
pub struct SandboxService {
    id: String,
    begun_at: SystemTime,
    /// Taken by CreateSandbox; an error of the configuration is told to it.
    beginning: Arc<tokio::sync::Mutex<Result<Option<Beginning>, Arc<Error>>>>,
    seat: Arc<Seat>,
    exit: Arc<Notify>,
}

impl SandboxService {
    /// A service for a sandbox that is not there yet; once it is, its pod takes the seat.
    pub fn new(id: &str, beginning: Result<Beginning>, seat: Arc<Seat>, exit: Arc<Notify>) -> Self {
        Self {
            id: id.into(),
            begun_at: SystemTime::now(),
            beginning: Arc::new(tokio::sync::Mutex::new(
                beginning.map(Some).map_err(Arc::new),
            )),
            seat,
            exit,
        }
    }

    fn check(&self, id: &str) -> Result<()> {
        if id == self.id {
            return Ok(());
        }
        Err(Error::NoSandbox { id: id.into() })
    }

    /// The pod of this id.
    fn pod(&self, id: &str) -> Result<&Arc<Pod>> {
        self.check(id)?;
        self.seat.pod()
    }

    async fn do_create(&self, request: CreateSandboxRequest) -> Result<()> {
        self.check(&request.sandbox_id)?;
        let mut place = self.beginning.lock().await;
        let beginning = match &*place {
            Ok(Some(beginning)) => beginning,
            Ok(None) => {
                return Err(Error::SandboxExists {
                    id: request.sandbox_id,
                });
            }
            Err(e) => return Err(Error::Pod(e.clone())),
        };
        let asked = SandboxRequest {
            id: request.sandbox_id,
            bundle: beginning.identity.bundle.clone(),
            options: request.options.into_option(),
            netns: request.netns_path,
            annotations: request.annotations,
        };
        let spec = PodSpec::of_sandbox(&asked, &beginning.name(), &beginning.config)?;
        let Ok(Some(beginning)) = std::mem::replace(&mut *place, Ok(None)) else {
            return Err(Error::NotCreated);
        };
        beginning.timeline.note("sandbox-asked");
        let pod = Pod::begin(beginning, spec).await?;
        self.seat.take(Ok(pod));
        Ok(())
    }

    async fn do_start(&self, id: &str) -> Result<StartSandboxResponse> {
        let pod = self.pod(id)?;
        match pod.up().await {
            Ok(up) => {
                pod.timeline.note("sandbox-started");
                pod.tell_timeline();
                Ok(StartSandboxResponse {
                    pid: up.vm.vmm_pid,
                    created_at: timestamp(pod.created_at),
                    ..Default::default()
                })
            }
            Err(e) => {
                // There will be no second try with this pod.
                pod.remove().await;
                Err(e)
            }
        }
    }

    async fn do_stop(&self, request: &StopSandboxRequest) -> Result<()> {
        let pod = match self.pod(&request.sandbox_id) {
            // It has never begun.
            Err(Error::NotCreated) => return Ok(()),
            pod => pod?,
        };
        let limit = u64::from(request.timeout_secs);
        let limit = (limit > 0).then(|| Duration::from_secs(limit));
        pod.remove_within(limit).await;
        Ok(())
    }

    fn do_status(&self, request: &SandboxStatusRequest) -> Result<SandboxStatusResponse> {
        self.check(&request.sandbox_id)?;
        let mut response = SandboxStatusResponse {
            sandbox_id: self.id.clone(),
            state: NOT_READY.into(),
            created_at: timestamp(self.begun_at),
            ..Default::default()
        };
        let Ok(pod) = self.seat.pod() else {
            return Ok(response);
        };
        response.created_at = timestamp(pod.created_at);
        if pod.is_up() {
            response.state = READY.into();
            response.pid = pod.pid();
        }
        if let Some(exit) = pod.exit() {
            response.exited_at = exit.timestamp();
        }
        if request.verbose {
            response.info = HashMap::from([("info".to_string(), info(pod).to_string())]);
        }
        Ok(response)
    }

    async fn do_metrics(&self, id: &str) -> Result<SandboxMetricsResponse> {
        let pod = self.pod(id)?;
        let metrics = stats::metrics(&pod.stats_of_guest().await?);
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = timestamp(SystemTime::now());
        metric.id = id.into();
        metric.data = MessageField::some(stats::to_any(metrics)?);
        Ok(response)
    }

    async fn do_shutdown(&self, id: &str) -> Result<()> {
        self.check(id)?;
        // Whoever waits to create it finds that it is too late.
        *self.beginning.lock().await = Ok(None);
        if let Ok(pod) = self.seat.pod() {
            pod.remove().await;
            // A container may have been on its way when the VM ended.
            pod.sweep().await;
        }
        let exit = self.exit.clone();
        tokio::spawn(async move {
            tokio::time::sleep(ANSWER).await;
            exit.notify_one();
        });
        Ok(())
    }
}

/// What a look at the pod tells: `crictl inspectp` prints it. Tools that look for the pod's network
/// namespace find it where a pause container's spec would name it.
fn info(pod: &Pod) -> serde_json::Value {
    let state = pod.state();
    let path = match &pod.spec.network {
        Network::Join(path) => Some(path),
        Network::New => None,
    };
    serde_json::json!({
        "pid": pod.pid(),
        "shimPid": state.shim.pid,
        "fileServerPid": state.fs.map(|process| process.pid),
        "vcpus": state.vcpus,
        "memoryBytes": state.memory,
        "directory": pod.directory,
        "cgroups": state.cgroups,
        "containers": lock(&pod.containers).keys().collect::<Vec<_>>(),
        "runtimeType": crate::RUNTIME,
        "runtimeSpec": {"linux": {"namespaces": [{"type": "network", "path": path}]}},
    })
}

fn timestamp(time: SystemTime) -> MessageField<Timestamp> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    let since = since.unwrap_or_default();
    MessageField::some(Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    })
}

/// The processor as image indexes name it (image-spec, "platform").
const fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    }
}

/// Answers a call within a span that names the sandbox.
macro_rules! answer {
    ($call:literal, $id:expr, $work:expr) => {
        async { $work }
            .instrument(tracing::info_span!($call, sandbox = %$id))
            .await
            .map_err(status)
    };
}

/// As `answer!`, for what must not be left half-way: `this` is the service in it.
macro_rules! carry_out {
    ($self:ident, $call:literal, $id:expr, $this:ident => $work:expr) => {{
        let span = tracing::info_span!($call, sandbox = %$id);
        let $this = $self.clone();
        to_its_end(async move { $work }.instrument(span))
            .await
            .map_err(status)
    }};
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        r: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let id = r.sandbox_id.clone();
        carry_out!(self, "create-sandbox", id, this => {
            this.do_create(r).await?;
            Ok(CreateSandboxResponse::new())
        })
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        r: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        carry_out!(self, "start-sandbox", r.sandbox_id, this => {
            this.do_start(&r.sandbox_id).await
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        r: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        answer!("platform", r.sandbox_id, {
            self.check(&r.sandbox_id)?;
            let mut response = PlatformResponse::new();
            let platform = response.platform.mut_or_insert_default();
            platform.os = "linux".into();
            platform.architecture = architecture().into();
            Ok(response)
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        r: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        carry_out!(self, "stop-sandbox", r.sandbox_id, this => {
            this.do_stop(&r).await?;
            Ok(StopSandboxResponse::new())
        })
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        r: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        answer!("wait-sandbox", r.sandbox_id, {
            let exit = self.pod(&r.sandbox_id)?.ended().await;
            Ok(WaitSandboxResponse {
                exit_status: exit.status,
                exited_at: exit.timestamp(),
                ..Default::default()
            })
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        r: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        answer!("sandbox-status", r.sandbox_id, self.do_status(&r))
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, r: PingRequest) -> ttrpc::Result<PingResponse> {
        answer!("ping-sandbox", r.sandbox_id, {
            self.pod(&r.sandbox_id)?.up().await?;
            Ok(PingResponse::new())
        })
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        r: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        carry_out!(self, "shutdown-sandbox", r.sandbox_id, this => {
            this.do_shutdown(&r.sandbox_id).await?;
            Ok(ShutdownSandboxResponse::new())
        })
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        r: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        carry_out!(self, "sandbox-metrics", r.sandbox_id, this => {
            this.do_metrics(&r.sandbox_id).await
        })
    }
}
