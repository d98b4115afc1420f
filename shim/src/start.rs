//! The actions for which containerd runs the program and waits: `start`, `delete`, `-info`.

use std::io::{PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult};
use containerd_shim::{Flags, socket_address};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use sepal_protocol::config::Config;
use sepal_protocol::state::PodState;

use crate::annotations::Role;
use crate::container::{Exit, KILLED};
use crate::rootfs::Share;
use crate::sys::{self, Netns, Spawn};
use crate::{cleanup, faults, features, hooks, spec};

/// Most that is read of what containerd writes to the shim, in bytes.
const MAX_INPUT: u64 = 10 << 20;
/// The version of the Task service that is announced. Both are served, and every containerd since
/// 1.6 knows this one. With version 3 containerd connects a sandbox's containers to its shim without
/// running this program for each; but it also closes a container's connection at once when that is
/// deleted, and a signal that crosses the deletion fails the pod's end ("ttrpc: closed").
const TASK_VERSION: i32 = 2;

/// What the server is told once containerd has been told where it serves.
const ANNOUNCED: &[u8] = b".";
/// Environment variable in which the time of the start travels to the server.
pub const STARTED: &str = "SEPAL_STARTED_US";

fn input() -> anyhow::Result<Vec<u8>> {
    let mut input = Vec::new();
    std::io::stdin()
        .lock()
        .take(MAX_INPUT)
        .read_to_end(&mut input)
        .context("standard input")?;
    Ok(input)
}

/// Answers `start`: prints where the pod's shim serves, after starting it if there is none yet.
///
/// # Errors
/// The socket cannot be made, or the sandbox's shim is not there.
pub fn start(flags: &Flags) -> anyhow::Result<()> {
    faults::at("start");
    let input = input()?;
    // containerd 2.3 and later send a message that repeats the id; earlier ones other things.
    let modern = BootstrapParams::parse_from_bytes(&input)
        .ok()
        .filter(|p| p.instance_id == flags.id && p.namespace == flags.namespace);
    let address = match &modern {
        Some(params) => params.containerd_grpc_address.clone(),
        None => flags.address.clone(),
    };
    let bundle = std::env::current_dir().context("the bundle")?;
    let role = if spec::is_sandbox(&bundle) {
        Role::Sandbox
    } else {
        Role::of(
            &spec::load(&bundle)?
                .annotations()
                .clone()
                .unwrap_or_default(),
        )
    };
    let (group, member) = match role {
        Role::Member { sandbox } => (sandbox, true),
        Role::Alone | Role::Sandbox => (flags.id.clone(), false),
    };
    let directory = modern
        .as_ref()
        .and_then(|p| p.socket_dir.clone())
        .filter(|d| !d.is_empty());
    let mut socket = socket_address(&address, &flags.namespace, &group);
    if let (Some(directory), Some(name)) = (directory, socket.rsplit('/').next()) {
        socket = format!("unix://{}/{name}", directory.trim_end_matches('/'));
    }
    let path = PathBuf::from(socket.trim_start_matches("unix://"));
    let server = if member {
        UnixStream::connect(&path)
            .with_context(|| format!("the shim of sandbox {group} does not answer"))?;
        None
    } else {
        let ttrpc = modern.as_ref().map(|p| p.containerd_ttrpc_address.clone());
        Some(serve_in_background(flags, &path, ttrpc)?)
    };
    // containerd 1.7 looks for it when it restarts.
    std::fs::write(bundle.join("address"), &socket).context("the bundle's address file")?;
    let answer = match modern {
        None => socket.into_bytes(),
        Some(_) => BootstrapResult {
            version: TASK_VERSION,
            address: socket,
            protocol: "ttrpc".into(),
            ..Default::default()
        }
        .write_to_bytes()?,
    };
    let mut output = std::io::stdout().lock();
    let told = output.write_all(&answer).and_then(|()| output.flush());
    told.context("standard output")?;
    if let Some(mut server) = server {
        server.write_all(ANNOUNCED).context("the shim's server")?;
    }
    Ok(())
}

/// Listens first, so that containerd may connect before the server has come to accepting. The server
/// wants to be told [`ANNOUNCED`] when containerd knows of it, and ends if that cannot come any more.
fn serve_in_background(
    flags: &Flags,
    path: &Path,
    ttrpc: Option<String>,
) -> anyhow::Result<PipeWriter> {
    let listener = listen(path)?;
    faults::at("start: listening");
    let program = std::env::current_exe().context("the shim's own program")?;
    let mut command = Command::new(program);
    command.args([
        "-namespace",
        &flags.namespace,
        "-id",
        &flags.id,
        "-address",
        &flags.address,
    ]);
    command.arg("-socket").arg(path);
    if flags.debug {
        command.arg("-debug");
    }
    if let Some(ttrpc) = ttrpc {
        command.env("TTRPC_ADDRESS", ttrpc);
    }
    if std::env::var_os(STARTED).is_none() {
        command.env(STARTED, sys::monotonic_us().to_string());
    }
    let (theirs, ours) = std::io::pipe().context("a pipe to the shim's server")?;
    let inherited = [listener.as_fd(), theirs.as_fd()];
    let spawn = Spawn {
        inherited: &inherited,
        netns: Netns::Same,
        alone: false,
        dies_with_parent: false,
        log: None,
    };
    sys::spawn(command, &spawn).context("cannot start the shim's server")?;
    faults::at("start: spawned");
    Ok(ours)
}

fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let context = || format!("cannot listen on {}", path.display());
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).with_context(context)?;
    }
    match UnixListener::bind(path) {
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                bail!("a shim serves this container already on {}", path.display());
            }
            // Its shim was killed.
            std::fs::remove_file(path).with_context(context)?;
            UnixListener::bind(path).with_context(context)
        }
        other => other.with_context(context),
    }
}

/// Answers `delete`: removes what a dead shim has left of a container and tells its end.
///
/// # Errors
/// Only that the answer cannot be printed.
pub async fn delete(flags: &Flags, state_root: &Path) -> anyhow::Result<()> {
    faults::at("clean-up");
    let directory = state_root.join(PodState::pod_id(&flags.namespace, &flags.id));
    let bundle = match flags.bundle.as_str() {
        "" => std::env::current_dir().context("the bundle")?,
        bundle => PathBuf::from(bundle),
    };
    if directory.exists() {
        cleanup::pod(&directory).await;
        remove_socket(&bundle);
    } else {
        forget_member(flags, state_root).await;
    }
    faults::at("clean-up: done");
    run_poststop(flags, &bundle).await;
    let exit = Exit::now(KILLED);
    let answer = DeleteResponse {
        exit_status: exit.status,
        exited_at: exit.timestamp(),
        ..Default::default()
    };
    std::io::stdout()
        .write_all(&answer.write_to_bytes()?)
        .context("standard output")?;
    Ok(())
}

/// A container in somebody else's pod: its part of the share goes, unless a living shim owns it.
async fn forget_member(flags: &Flags, state_root: &Path) {
    for entry in std::fs::read_dir(state_root)
        .into_iter()
        .flatten()
        .flatten()
    {
        let directory = entry.path();
        let Ok(state) = PodState::load(&directory) else {
            continue;
        };
        let here = state.namespace == flags.namespace && state.containers.contains(&flags.id);
        if here && !state.shim.alive() {
            let (share, id) = (Share::of(&directory), flags.id.clone());
            let _ = tokio::task::spawn_blocking(move || share.remove(&id)).await;
        }
    }
}

/// Removes a dead server's socket: a path below a directory of sockets, written by `start`.
pub fn remove_socket(bundle: &Path) {
    let Ok(address) = std::fs::read_to_string(bundle.join("address")) else {
        return;
    };
    if let Some(path) = address.strip_prefix("unix://")
        && UnixStream::connect(path).is_err()
    {
        let _ = std::fs::remove_file(path);
    }
}

async fn run_poststop(flags: &Flags, bundle: &Path) {
    let Ok(mut spec) = spec::load(bundle) else {
        return;
    };
    let state = hooks::State {
        oci_version: spec.version().clone(),
        id: flags.id.clone(),
        status: "stopped",
        pid: None,
        bundle: bundle.into(),
        annotations: spec.annotations().clone().unwrap_or_default(),
    };
    let hooks = spec::take_host_hooks(&mut spec);
    let poststop = hooks.poststop().as_deref().unwrap_or_default();
    if let Err(e) = hooks::run("poststop", poststop, &state).await {
        eprintln!("{e}");
    }
}

/// Answers `-info`: what the runtime is.
///
/// # Errors
/// Only that the answer cannot be printed.
pub fn info() -> anyhow::Result<()> {
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").into(),
        ..Default::default()
    };
    let mut info = RuntimeInfo {
        name: crate::RUNTIME.into(),
        version: Some(version).into(),
        features: Some(features::any()).into(),
        ..Default::default()
    };
    if let Ok(config) = Config::load_default() {
        let note = |text: &Path| text.display().to_string();
        info.annotations
            .insert("io.sepal.vmm".into(), note(&config.vmm));
        info.annotations
            .insert("io.sepal.image".into(), note(config.guest_image()));
    }
    std::io::stdout()
        .write_all(&info.write_to_bytes()?)
        .context("standard output")?;
    Ok(())
}
