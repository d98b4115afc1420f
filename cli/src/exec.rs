//! `sepal exec`: a program of the guest image, outside of all containers, for looking at a guest
//! from inside. The agent refuses it unless the image is the debug variant.

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use oci_spec::runtime::ProcessBuilder;
use sepal_protocol::agent::{ExecProcessRequest, ProcessId, ResizeTerminalRequest, Stdio};
use sepal_protocol::agent_ttrpc::AgentClient;
use sepal_protocol::paths::pod;
use sepal_protocol::words::one_line;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::context::{self, Context};

use crate::guest::Guest;
use crate::pods;
use crate::sys;

/// For calls that answer at once, in nanoseconds.
const SHORT: i64 = 10_000_000_000;
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs the command with our standard streams, or on a terminal where we have one; the exit status
/// is the command's.
///
/// # Errors
/// No such pod, no debug image, no such program.
pub fn run(state: &Path, wanted: &str, command: &[String]) -> anyhow::Result<ExitCode> {
    let pod = pods::find(state, wanted)?;
    let guest = Guest::new(pod.directory.join(pod::VSOCK));
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let status = runtime
        .block_on(exec(&guest, command, terminal))
        .with_context(|| format!("pod {}", pod.id));
    // A thread may still wait for a key: there is no way to call it off.
    runtime.shutdown_background();
    Ok(ExitCode::from(status?))
}

async fn exec(guest: &Guest, command: &[String], terminal: bool) -> anyhow::Result<u8> {
    let agent = guest.agent().await?;
    let (stdin, stdin_token) = guest.stream().await?;
    let (stdout, stdout_token) = guest.stream().await?;
    let mut stdio = Stdio {
        stdin: stdin_token,
        stdout: stdout_token,
        terminal,
        ..Stdio::default()
    };
    let mut stderr = None;
    if terminal {
        (stdio.rows, stdio.columns) = sys::window_size(&std::io::stdout()).unwrap_or_default();
    } else {
        let (stream, token) = guest.stream().await?;
        stdio.stderr = token;
        stderr = Some(stream);
    }
    let process = ProcessId {
        exec_id: name(),
        ..ProcessId::default()
    };
    let request = ExecProcessRequest {
        exec_id: process.exec_id.clone(),
        process: description(command, terminal)?,
        stdio: protobuf::MessageField::some(stdio),
        ..ExecProcessRequest::default()
    };
    agent.debug_exec(short(), &request).await.map_err(told)?;
    agent.start_process(short(), &process).await.map_err(told)?;
    let raw = terminal.then(RawTerminal::enter).transpose()?;

    // What we read is sent on in the background: the program may end without reading it all.
    let (_, to_stdin) = stdin.into_split();
    tokio::spawn(pump(tokio::io::stdin(), to_stdin));
    if terminal {
        tokio::spawn(follow_size(agent.clone(), process.clone()));
    }
    let out = pump(stdout, tokio::io::stdout());
    let err = async {
        match stderr {
            Some(stderr) => pump(stderr, tokio::io::stderr()).await,
            None => Ok(()),
        }
    };
    let forever = Context::default();
    let (out, err, exit) = tokio::join!(out, err, agent.wait_process(forever, &process));
    drop(raw);
    let exit = exit.map_err(told)?;
    // It has ended either way; what could not be removed goes with the guest.
    let _ = agent.delete_process(short(), &process).await;
    out.and(err)
        .context("cannot pass on what the program says")?;
    Ok(u8::try_from(exit.status).unwrap_or(u8::MAX))
}

fn short() -> Context {
    context::with_timeout(SHORT)
}

/// Unlike that of any other `sepal exec` into the same guest.
fn name() -> String {
    let now = std::time::SystemTime::UNIX_EPOCH
        .elapsed()
        .unwrap_or_default();
    format!("debug-{}-{}", std::process::id(), now.as_nanos())
}

fn description(command: &[String], terminal: bool) -> anyhow::Result<Vec<u8>> {
    let mut env = vec![PATH.to_owned(), "HOME=/root".to_owned()];
    if terminal && let Ok(term) = std::env::var("TERM") {
        env.push(format!("TERM={term}"));
    }
    let process = ProcessBuilder::default()
        .args(command.to_vec())
        .env(env)
        .cwd("/")
        .terminal(terminal)
        .build()
        .context("cannot describe the command")?;
    Ok(serde_json::to_vec(&process)?)
}

/// What the agent answers, on one line.
fn told(error: ttrpc::Error) -> anyhow::Error {
    match error {
        ttrpc::Error::RpcStatus(status) => anyhow::anyhow!("{}", one_line(status.message())),
        other => anyhow::anyhow!("the agent: {}", one_line(&other.to_string())),
    }
}

/// Passes bytes on as they come, and the end.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 32 * 1024];
    loop {
        match from.read(&mut buffer).await? {
            0 => return to.shutdown().await,
            length => {
                to.write_all(&buffer[..length]).await?;
                to.flush().await?;
            }
        }
    }
}

/// Tells the guest the size of our terminal whenever it changes.
async fn follow_size(agent: AgentClient, process: ProcessId) {
    let Ok(mut changes) = signal(SignalKind::window_change()) else {
        return;
    };
    while changes.recv().await.is_some() {
        let Some((rows, columns)) = sys::window_size(&std::io::stdout()) else {
            return;
        };
        let request = ResizeTerminalRequest {
            exec_id: process.exec_id.clone(),
            rows,
            columns,
            ..ResizeTerminalRequest::default()
        };
        // A size that does not arrive is put right by the next one.
        let _ = agent.resize_terminal(short(), &request).await;
    }
}

/// Our terminal without echo, line editing and signal keys: those are the guest's. Put back when
/// dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> anyhow::Result<Self> {
        let stdin = std::io::stdin();
        let before = tcgetattr(stdin.as_fd()).context("cannot ask the terminal")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        if let Err(error) = tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw) {
            bail!("cannot set the terminal: {error}");
        }
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin().as_fd(), SetArg::TCSADRAIN, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_gets_an_oci_process() {
        let bytes = description(&["ls".into(), "-l".into()], false).unwrap();
        let process: oci_spec::runtime::Process = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(
            process.args().as_deref(),
            Some(["ls".to_owned(), "-l".to_owned()].as_slice())
        );
        assert_eq!(process.cwd().to_str(), Some("/"));
        assert_eq!(process.user().uid(), 0);
        assert!(
            process
                .env()
                .iter()
                .flatten()
                .any(|variable| variable == PATH)
        );
    }

    #[test]
    fn names_differ() {
        assert_ne!(name(), name());
    }

    #[tokio::test]
    async fn a_pump_passes_bytes_and_the_end() {
        let (near, mut far) = tokio::io::duplex(16);
        let source: &[u8] = &[7; 100_000];
        let pumped = tokio::spawn(pump(source, near));
        let mut arrived = Vec::new();
        far.read_to_end(&mut arrived).await.unwrap();
        pumped.await.unwrap().unwrap();
        assert_eq!(arrived, source);
    }
}
