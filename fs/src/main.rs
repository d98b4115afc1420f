//! `sepal-fs`: the file server of one pod, see the library.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

use sepal_fs::pressure::Pressure;
use sepal_fs::volumes::Volumes;
use sepal_fs::{confine, filter, logger, serve, share, sys};

/// Serves a directory to a virtual machine over vhost-user.
#[derive(Debug, Parser)]
#[command(name = "sepal-fs", version)]
struct Args {
    /// Descriptor of a listening Unix stream socket; one front end is accepted on it.
    #[arg(long, value_name = "N")]
    listen_fd: RawFd,
    /// The directory to serve: a mount point of its own with shared propagation, so that what is
    /// mounted below it later appears.
    #[arg(long, value_name = "DIR")]
    share: PathBuf,
    /// The directories `DIR/*/NAME` hold volumes, which others change as well.
    #[arg(long, value_name = "NAME", default_value = "mounts")]
    volumes: OsString,
    /// The guest has a user namespace, whose root is not ours and may write where others own: who may
    /// create what is left to its kernel, which asks in the name of whoever it has let.
    #[arg(long)]
    users: bool,
    /// Descriptor of an eventfd to signal when descriptors run out and the guest should forget files.
    #[arg(long, value_name = "N")]
    pressure_fd: Option<RawFd>,
    /// Descriptor of a pidfd: until a front end is there, this process ends with that one. Without it,
    /// with its parent, which a process in a PID namespace of its own does not see.
    #[arg(long, value_name = "N")]
    starter_fd: Option<RawFd>,
    /// error, warn, info, debug or trace.
    #[arg(long, default_value = "warn")]
    log_level: log::LevelFilter,
    /// Most threads for requests that take long, beside the one that watches the queues.
    #[arg(long, default_value_t = serve::DEFAULT_THREADS, value_parser = clap::value_parser!(u8).range(0..=64))]
    threads: u8,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            sepal_log::say(format_args!("sepal-fs: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    logger::install(args.log_level);
    let listener = sys::listener(args.listen_fd)
        .with_context(|| format!("descriptor {} is not a listening socket", args.listen_fd))?;
    let event = args.pressure_fd.map(sys::inherited).transpose();
    let event = event.context("--pressure-fd")?.map(File::from);
    let starter = args.starter_fd.map_or_else(sys::parent, sys::inherited);
    let starter = starter.context("cannot watch the process that started this one")?;
    sys::install_bus_handler().context("cannot handle bus errors")?;
    let descriptors = share::raise_descriptor_limit()?;

    let descriptors_of_proc = confine::enter(&args.share)?;
    let volumes = CString::new(args.volumes.as_bytes()).context("--volumes")?;
    let volumes = Volumes::new(volumes);
    let fs = share::file_system(
        descriptors_of_proc,
        descriptors,
        args.threads,
        volumes,
        args.users,
    )?;
    confine::drop_privileges()?;
    #[cfg(feature = "breach")]
    if sepal_fs::breach::without_filter() {
        sepal_fs::breach::open_up();
    }
    filter::install()?;
    #[cfg(feature = "breach")]
    sepal_fs::breach::open_up();

    let pressure = Pressure::new(event, descriptors);
    serve::serve(fs, pressure, listener, starter, args.threads.into())
}
