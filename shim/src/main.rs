//! `containerd-shim-sepal-v2`: containerd runs it with an action, or `start` runs it as the server.

use std::path::Path;
use std::process::ExitCode;

use containerd_shim::Flags;
use sepal_protocol::paths::STATE_ROOT;
use sepal_shim::{RUNTIME, faults, gc, serve, start};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // containerd shows it to its user.
            eprintln!("sepal: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let flags: Flags = containerd_shim::parse(&arguments)?;
    let state_root = Path::new(STATE_ROOT);
    faults::of(&flags.id);
    if flags.version {
        println!("{RUNTIME} {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if flags.info {
        return start::info();
    }
    // One thread: a pod's shim waits most of its life, and its memory counts.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(std::time::Duration::from_millis(500))
        .thread_stack_size(512 << 10)
        // Their stacks count to the limit of its own memory (`sys::limit_memory`).
        .max_blocking_threads(64)
        .build()?;
    let done = match flags.action.as_str() {
        "start" => start::start(&flags),
        "delete" => runtime.block_on(start::delete(&flags, state_root)),
        "gc" => runtime.block_on(gc::run(state_root)),
        "" => runtime.block_on(serve::serve(&flags, state_root)),
        other => anyhow::bail!("unknown action {other:?}: expected start, delete or gc"),
    };
    // What waits for a volume's server that is gone waits for ever.
    runtime.shutdown_background();
    done
}
