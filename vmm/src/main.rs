//! `sepal-vmm`: the virtual machine monitor of one pod.
//!
//! The shim spawns it with a control socket and sends what to boot; see `sepal_protocol::control`.
//! The exit status is an `ExitCause`.

use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use sepal_protocol::control::{Booted, Request, Response, receive, send};
use sepal_protocol::vm::{ExitCause, KernelSpec, KvmFlavour, VmSpec};
use tracing::level_filters::LevelFilter;

use sepal_vmm::clock::Stages;
use sepal_vmm::exit::Exit;
use sepal_vmm::vm::{Descriptors, Prepared};
use sepal_vmm::{control, jail, kvm, seccomp, sys, vm};

/// The virtual machine monitor of a Sepal pod
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Args {
    /// Take requests from this inherited SOCK_SEQPACKET socket; the first says what to boot
    #[arg(long, value_name = "N", group = "mode")]
    control_fd: Option<RawFd>,
    /// Boot the VM that this JSON file describes; descriptors in it are those inherited
    #[arg(long, value_name = "FILE", group = "mode")]
    spec: Option<PathBuf>,
    /// Print what KVM this host has, as JSON
    #[arg(long, group = "mode")]
    probe: bool,
    /// A kernel for KVM in hardware, to be loaded while waiting for the first request
    #[arg(long, value_name = "FILE", requires = "control_fd")]
    preload: Option<PathBuf>,
    /// The same for a KVM that runs guests deprivileged
    #[arg(long, value_name = "FILE", requires = "control_fd")]
    preload_deprivileged: Option<PathBuf>,
    /// The pod's id, for those who read ps(1)
    #[arg(long, value_name = "ID")]
    pod: Option<String>,
    /// How much to log on stderr: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", env = "SEPAL_LOG", default_value = "warn")]
    log: LevelFilter,
    /// What happens at a system call that is not allowed
    #[arg(long, value_name = "ACTION", default_value = "kill")]
    seccomp: seccomp::Action,
}

fn main() -> ExitCode {
    let mut stages = Stages::default();
    stages.reached("vmm");
    sys::share_one_heap();
    let args = Args::parse();
    sepal_log::keep_panic();
    tracing_subscriber::fmt()
        .with_writer(sepal_log::stderr)
        .with_max_level(args.log)
        .with_target(false)
        .with_ansi(false)
        .init();
    seccomp::choose(args.seccomp);

    let end = match (args.control_fd, &args.spec) {
        (Some(fd), _) => {
            let hardware = args.preload;
            let deprivileged = args.preload_deprivileged;
            by_control_socket(
                fd,
                &KernelSpec {
                    hardware,
                    deprivileged,
                },
                stages,
            )
        }
        (None, Some(path)) => by_hand(path, stages),
        (None, None) => return probe(),
    };
    ExitCode::from(end.status())
}

/// Runs the VM that the shim asks for.
fn by_control_socket(fd: RawFd, kernels: &KernelSpec, mut stages: Stages) -> ExitCause {
    let Some(socket) = sys::inherited_fd(fd) else {
        return refuse(None, &anyhow!("--control-fd: descriptor {fd} is not open"));
    };
    let mut prepared = Prepared::new();
    stages.reached("kvm");
    if let Ok(prepared) = &mut prepared {
        prepared.preload(kernels);
    }
    stages.reached("waiting");
    let (spec, fds) = match receive::<Request>(&socket) {
        Ok((Request::Boot(spec), fds)) => (spec, fds),
        Ok(_) => return refuse(Some(&socket), &anyhow!("the first request must be to boot")),
        // The shim has changed its mind.
        Err(sepal_protocol::control::Error::Closed) => return ExitCause::PowerOff,
        Err(error) => return refuse(Some(&socket), &anyhow!("{error}")),
    };
    stages.reached("spec");
    run(
        prepared,
        &spec,
        &mut Descriptors::new(fds),
        Some(socket),
        stages,
    )
}

/// Runs the VM of a file, for those who develop Sepal.
fn by_hand(path: &std::path::Path, mut stages: Stages) -> ExitCause {
    let read = || -> Result<(VmSpec, Descriptors)> {
        // First of all: afterwards there are descriptors that nobody has passed to us.
        let inherited = Descriptors::inherited()?;
        let text = std::fs::read(path)?;
        Ok((serde_json::from_slice(&text)?, inherited))
    };
    let read = read().with_context(|| format!("cannot use {}", path.display()));
    let (spec, mut fds) = match read {
        Ok(read) => read,
        Err(error) => return refuse(None, &error),
    };
    let prepared = Prepared::new();
    stages.reached("kvm");
    run(prepared, &spec, &mut fds, None, stages)
}

fn run(
    prepared: Result<Prepared, kvm::Error>,
    spec: &VmSpec,
    fds: &mut Descriptors,
    socket: Option<OwnedFd>,
    mut stages: Stages,
) -> ExitCause {
    let boot = || -> Result<_> {
        let prepared = prepared?;
        let flavour = prepared.flavour;
        jail::before_boot()?;
        let listener = spec.control.as_deref().map(|path| {
            let failed = || format!("cannot listen at {}", path.display());
            control::listen_at(path).with_context(failed)
        });
        let listener = listener.transpose()?;
        let exit = Arc::new(Exit::new()?);
        let vm = vm::boot(prepared, spec, fds, &exit, &mut stages)?;
        jail::confine_thread(seccomp::Thread::Control)?;
        // Not before: all threads share their memory.
        vm.vcpus.resume();
        stages.reached("running");
        Ok((vm, exit, listener, flavour))
    };
    let (vm, exit, listener, flavour) = match boot() {
        Ok(running) => running,
        Err(error) => return refuse(socket.as_ref(), &error),
    };
    stages.log();
    if let Some(socket) = &socket {
        let booted = Booted {
            flavour,
            stages: stages.into_inner(),
        };
        if send(socket, &Response::Booted(booted), &[]).is_err() {
            exit.end(ExitCause::PowerOff, "the control socket was closed");
        }
    }
    let end = control::Control::new(vm, exit, socket, listener).run();
    for path in [Some(&spec.vsock), spec.control.as_ref()]
        .into_iter()
        .flatten()
    {
        // The shim removes the pod's directory anyway.
        let _ = std::fs::remove_file(path);
    }
    match end.cause {
        ExitCause::PowerOff => tracing::info!("{}", end.message),
        _ => sepal_log::say(format_args!("sepal-vmm: {}", end.message)),
    }
    end.cause
}

/// Tells why there is no VM, to the shim and to whoever reads stderr.
fn refuse(socket: Option<&OwnedFd>, error: &anyhow::Error) -> ExitCause {
    let message = format!("{error:#}");
    sepal_log::say(format_args!("sepal-vmm: {message}"));
    if let Some(socket) = socket {
        // If the shim has gone there is nobody to tell.
        let _ = send(socket, &Response::Error { message }, &[]);
    }
    ExitCause::Refused
}

/// Prints what `sepal check` wants to know.
fn probe() -> ExitCode {
    let found = || -> Result<serde_json::Value, kvm::Error> {
        let host = kvm::Host::open()?;
        let vcpu = host.create_machine()?.create_vcpu(0)?;
        let flavour = vcpu.flavour();
        let msrs: serde_json::Map<_, _> = match flavour {
            KvmFlavour::Hardware => serde_json::Map::new(),
            KvmFlavour::Deprivileged => vcpu
                .deprivileged_msrs()
                .into_iter()
                .map(|(msr, value)| (format!("{msr:#x}"), value.into()))
                .collect(),
        };
        Ok(serde_json::json!({
            "flavour": flavour,
            "api_version": host.version(),
            "max_vcpus": host.max_vcpus(),
            "msrs": msrs,
        }))
    };
    match found() {
        Ok(found) => {
            println!("{found}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            sepal_log::say(format_args!("sepal-vmm: {error}"));
            ExitCode::from(ExitCause::Refused.status())
        }
    }
}
