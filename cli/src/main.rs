//! `sepal`: looks at hosts and pods. It owns nothing, changes nothing, and can be left out.

mod check;
mod console;
mod exec;
mod gc;
mod guest;
mod list;
mod pods;
mod sys;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Looks at this host and at the pods that run on it in virtual machines.
#[derive(Debug, Parser)]
#[command(name = "sepal", version)]
struct Args {
    /// Where the pods' state is.
    #[arg(long, global = true, value_name = "DIR", default_value = sepal_protocol::paths::STATE_ROOT)]
    state: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Is this host able to run pods? Exit status 1 if not.
    Check {
        /// One JSON object instead of lines.
        #[arg(long)]
        json: bool,
        /// Look at the files of a host mounted here.
        #[arg(long, value_name = "DIR", default_value = "/")]
        root: PathBuf,
    },
    /// The pods that run.
    List {
        /// A JSON array instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Removes what pods have left whose shims have ended, as after a crash that containerd does not know
    /// of. Exit status 1 if something stays.
    Gc,
    /// The kernel log of a pod's virtual machine.
    Console {
        /// The pod's id, or a beginning of it that no other pod's has.
        pod: String,
        /// Go on until the pod ends.
        #[arg(short, long)]
        follow: bool,
    },
    /// Runs a program of the guest image in a pod's virtual machine, outside of its containers.
    Exec {
        /// The pod's id, or a beginning of it that no other pod's has.
        pod: String,
        /// The program and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match args.command {
        Command::Check { json, root } => check::run(&root, json),
        Command::List { json } => list::run(&args.state, json),
        Command::Gc => gc::run(),
        Command::Console { pod, follow } => console::run(&args.state, &pod, follow),
        Command::Exec { pod, command } => exec::run(&args.state, &pod, &command),
    };
    match result {
        Ok(status) => status,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "sepal: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether our reader has had enough (`sepal list | head -1`).
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
