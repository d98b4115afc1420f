//! PID 1 of a pod's guest, as a list of steps.

use anyhow::Context as _;
use sepal_agent::stream::{Listener, Stream};
use sepal_agent::{Sockets, boot, clock, forward, guest, log, serve};
use sepal_protocol::ports;
use sepal_protocol::ready::{AgentReady, Stage};
use tokio::io::AsyncWriteExt;

fn main() -> anyhow::Result<()> {
    let mut stages = vec![boot::stage("init")];
    anyhow::ensure!(
        std::process::id() == 1,
        "sepal-agent is the init process of a guest"
    );
    boot::prepare()?;
    let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    log::start(log::level_of_command_line(&command_line));
    stages.push(boot::stage("mounts"));
    if let Err(error) = boot::mount_share() {
        // A VM without a file server can still answer questions; a container says what it lacks.
        tracing::warn!(%error, "cannot mount the pod's share");
    }
    stages.push(boot::stage("share"));

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context("cannot make the runtime")?;
    runtime.block_on(run(stages))?;
    boot::power_off()
}

async fn run(mut stages: Vec<Stage>) -> anyhow::Result<()> {
    let agent = Listener::vsock(ports::AGENT).context("cannot listen for the shim")?;
    let stdio = Listener::vsock(ports::STDIO).context("cannot listen for streams")?;
    let listening = move || {
        stages.push(boot::stage("listening"));
        tokio::spawn(async {
            if let Err(error) = announce(stages).await {
                tracing::error!(%error, "cannot tell the host that the agent is ready");
            }
            boot::tell_cost();
            boot::finish();
            tokio::spawn(forward::serve());
            #[cfg(feature = "faults")]
            tokio::spawn(sepal_agent::faults::obey());
            clock::follow_host().await;
        });
    };
    serve(Sockets { agent, stdio }, listening).await
}

/// Tells the host that the service answers.
async fn announce(stages: Vec<Stage>) -> anyhow::Result<()> {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let ready = AgentReady {
        version,
        kernel: guest::kernel(),
        stages,
    };
    let mut line = serde_json::to_vec(&ready)?;
    line.push(b'\n');
    let mut host = Stream::dial_host(ports::READY).await?;
    host.write_all(&line).await?;
    host.shutdown().await?;
    Ok(())
}
