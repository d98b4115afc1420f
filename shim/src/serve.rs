//! The server: one process per pod, from `start` to containerd's Shutdown.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use containerd_shim::Flags;
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc::asynchronous::Server;
use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use sepal_protocol::config::{Config, LogLevel};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::Notify;

use crate::error::{Error, Result};
use crate::events::Events;
use crate::pod::{Beginning, Identity, Pod};
use crate::podspec::PodSpec;
use crate::sandbox::SandboxService;
use crate::seat::Seat;
use crate::task::TaskService;
use crate::timeline::Timeline;
use crate::{faults, log, spec, start, sys};

/// containerd's socket for events.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// Longest wait for containerd to take the last events.
const LAST_EVENTS: Duration = Duration::from_secs(2);

/// Serves the pod whose bundle is the working directory, until containerd has no more use for it.
///
/// # Errors
/// There is no socket to serve on.
pub async fn serve(flags: &Flags, state_root: &Path) -> anyhow::Result<()> {
    let timeline = Timeline::default();
    let begun = std::env::var(start::STARTED)
        .ok()
        .and_then(|text| text.parse().ok());
    timeline.note_at("shim", begun.unwrap_or_else(sys::monotonic_us));
    let bundle = std::env::current_dir().context("the bundle")?;
    let config = Config::load_default();
    let asked = config
        .as_ref()
        .map_or(LogLevel::Info, |config| config.log_level);
    log::init(
        &bundle,
        if flags.debug {
            asked.max(LogLevel::Debug)
        } else {
            asked
        },
    );
    sys::limit_memory().context("the limit of this process's memory")?;
    timeline.note("serving");
    faults::at("serve");

    let address = std::env::var(TTRPC_ADDRESS).context(TTRPC_ADDRESS)?;
    let events = Events::start(&flags.namespace, address);
    let identity = Identity {
        namespace: flags.namespace.clone(),
        id: flags.id.clone(),
        bundle,
    };
    let is_sandbox = spec::is_sandbox(&identity.bundle);
    let beginning = config.map_err(Error::Config).map(|config| Beginning {
        identity,
        state_root: state_root.into(),
        config,
        events: events.clone(),
        timeline,
    });
    let (seat, exit) = (Arc::new(Seat::default()), Arc::new(Notify::new()));
    let sandbox = if is_sandbox {
        let service = SandboxService::new(&flags.id, beginning, seat.clone(), exit.clone());
        create_sandbox(Arc::new(service))
    } else {
        // The VM starts before anybody asks for it: containerd will.
        let pod = begin_with_container(beginning).await;
        if let Err(e) = &pod {
            tracing::error!("there will be no pod: {e}");
        }
        seat.take(pod);
        HashMap::new()
    };

    let [listener, starter] = sys::take_inherited().context("the listening socket")?;
    tokio::spawn(end_unless_announced(starter, exit.clone()));
    let listener = UnixListener::from(listener);
    let listener = Listener::try_from(listener).context("the listening socket")?;
    let task = Arc::new(TaskService::new(seat.clone(), exit.clone()));
    let mut services = create_task(task.clone());
    // The messages are the same; only the name of the service differs between the versions.
    for (name, service) in create_task(task) {
        services.insert(name.replace(".v3.", ".v2."), service);
    }
    let mut server = Server::new()
        .register_service(services)
        .register_service(sandbox)
        .add_listener(listener);
    faults::at("serve: services");
    server.start().await.context("the services")?;
    tracing::debug!("serving");
    exit.notified().await;
    faults::at("shut-down");

    if let Ok(pod) = seat.pod() {
        pod.remove().await;
    }
    faults::at("shut-down: removed");
    events.drain(LAST_EVENTS).await;
    let _ = std::fs::remove_file(flags.socket.trim_start_matches("unix://"));
    // The answer to Shutdown is on its way; nothing else is.
    let _ = tokio::time::timeout(Duration::from_millis(100), server.shutdown()).await;
    Ok(())
}

/// Ends the shim if the process that started it has gone without having told containerd: nobody will ever
/// come, and nobody knows of anything to clean up.
async fn end_unless_announced(starter: OwnedFd, exit: Arc<Notify>) {
    let announced = async { Receiver::from_owned_fd(starter)?.read_u8().await };
    if let Err(e) = announced.await {
        tracing::error!("containerd was never told of this shim: {e}");
        exit.notify_one();
    }
}

/// Begins the pod whose first container is the bundle's.
async fn begin_with_container(beginning: Result<Beginning>) -> Result<Arc<Pod>> {
    let beginning = beginning?;
    let (name, identity) = (beginning.name(), &beginning.identity);
    let spec = PodSpec::of_container(&identity.id, &name, &identity.bundle, &beginning.config)?;
    Pod::begin(beginning, spec).await
}
