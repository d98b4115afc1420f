//! A pod without a VM: this test binary stands in for the VMM and for the guest's agent, and runs
//! "containers" as plain processes of the host. Everything between containerd's socket and the
//! VMM's is the real shim.

#![allow(dead_code, reason = "each test program uses a part of it")]

pub mod bed;

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use sepal_protocol::agent::*;
use sepal_protocol::agent_ttrpc::{self, create_agent};
use sepal_protocol::control::{self, Booted, Request, Response};
use sepal_protocol::ports;
use sepal_protocol::vm::{ExitCause, KvmFlavour};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Command;
use tokio::sync::watch;
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, TtrpcContext};

type Streams = Arc<Mutex<HashMap<Vec<u8>, UnixStream>>>;

/// The VMM's part, and behind it the guest's. Never returns.
pub fn vmm() -> ! {
    // SAFETY: the shim hands descriptor 3 over to this process; nothing else uses it.
    let socket = unsafe { OwnedFd::from_raw_fd(3) };
    let Ok((Request::Boot(spec), fds)) = control::receive::<Request>(&socket) else {
        std::process::exit(ExitCause::Internal.status().into());
    };
    if spec.cmdline.contains("refuse") {
        let message = "no such kernel, install one".to_string();
        control::send(&socket, &Response::Error { message }, &[]).unwrap();
        std::process::exit(ExitCause::Refused.status().into());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let listener = {
        let _guard = runtime.enter();
        UnixListener::bind(&spec.vsock).unwrap()
    };
    let stages = vec![("kernel".to_string(), 1)];
    let booted = Booted {
        flavour: KvmFlavour::Hardware,
        stages,
    };
    control::send(&socket, &Response::Booted(booted), &[]).unwrap();
    runtime.spawn(guest(
        listener,
        PathBuf::from(format!("{}_{}", spec.vsock.display(), ports::READY)),
    ));
    // The life line: held, and with it the connection to the file server.
    let end = loop {
        match control::receive::<Request>(&socket) {
            Ok((Request::EnterRoot, _)) => control::send(&socket, &Response::Ok, &[]).unwrap(),
            end => break end,
        }
    };
    drop(fds);
    std::process::exit(if end.is_ok() {
        0
    } else {
        ExitCause::Internal.status().into()
    });
}

async fn guest(listener: UnixListener, ready: PathBuf) {
    let streams = Streams::default();
    let (to_agent, connections) = tokio::sync::mpsc::unbounded_channel();
    let agent = Arc::new(FakeAgent {
        streams: streams.clone(),
        processes: Mutex::default(),
    });
    let connections = futures::stream::unfold(connections, |mut c| async {
        c.recv()
            .await
            .map(|stream| (Ok::<UnixStream, std::io::Error>(stream), c))
    });
    let mut server = Server::new()
        .add_listener(Listener::new(connections))
        .register_service(create_agent(agent));
    server.start().await.unwrap();
    let line = r#"{"version":"0","kernel":"fake","stages":[{"name":"init","boottime_us":5}]}"#;
    UnixStream::connect(ready)
        .await
        .unwrap()
        .write_all(line.as_bytes())
        .await
        .unwrap();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (to_agent, streams) = (to_agent.clone(), streams.clone());
        tokio::spawn(async move {
            let mut line = Vec::new();
            while line.last() != Some(&b'\n') {
                line.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(b"OK 1\n").await.unwrap();
            if line == format!("CONNECT {}\n", ports::AGENT).into_bytes() {
                to_agent.send(stream).unwrap();
            } else {
                let mut token = vec![0; ports::STDIO_TOKEN_LEN];
                stream.read_exact(&mut token).await.unwrap();
                streams.lock().unwrap().insert(token, stream);
            }
        });
    }
}

struct FakeAgent {
    streams: Streams,
    processes: Mutex<HashMap<(String, String), Arc<Running>>>,
}

struct Running {
    args: Vec<String>,
    stdio: Stdio3,
    /// Held while it is being started: a signal comes before that or after it.
    starting: tokio::sync::Mutex<()>,
    pid: Mutex<Option<u32>>,
    ended: watch::Sender<Option<u32>>,
}

impl Running {
    /// Whether this guest is to lie about the process, in this manner: a process `lie MANNER`.
    fn lies(&self, manner: &str) -> bool {
        matches!(self.args.as_slice(), [lie, how] if lie == "lie" && how == manner)
    }
}

type Stdio3 = tokio::sync::Mutex<[Option<UnixStream>; 3]>;

impl FakeAgent {
    async fn add(
        &self,
        id: (String, String),
        process: &serde_json::Value,
        stdio: &sepal_protocol::agent::Stdio,
    ) {
        let mut streams = [None, None, None];
        for (slot, token) in streams
            .iter_mut()
            .zip([&stdio.stdin, &stdio.stdout, &stdio.stderr])
        {
            while !token.is_empty() && slot.is_none() {
                *slot = self.streams.lock().unwrap().remove(token);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let args = process["args"].as_array().unwrap();
        let running = Running {
            args: args
                .iter()
                .map(|a| a.as_str().unwrap().to_string())
                .collect(),
            stdio: tokio::sync::Mutex::new(streams),
            starting: tokio::sync::Mutex::default(),
            pid: Mutex::new(None),
            ended: watch::Sender::new(None),
        };
        self.processes.lock().unwrap().insert(id, Arc::new(running));
    }

    fn find(&self, container: &str, exec: &str) -> ttrpc::Result<Arc<Running>> {
        let id = (container.to_string(), exec.to_string());
        let found = self.processes.lock().unwrap().get(&id).cloned();
        found.ok_or_else(|| refused(ttrpc::Code::NOT_FOUND, "no such process"))
    }
}

fn refused(code: ttrpc::Code, why: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, why))
}

async fn run(running: Arc<Running>) -> std::io::Result<u32> {
    use std::os::unix::process::ExitStatusExt;
    let lies = running.args[0] == "lie";
    let sleeper = ["sleep".to_string(), "600".to_string()];
    let args = if lies {
        &sleeper
    } else {
        running.args.as_slice()
    };
    let mut command = Command::new(&args[0]);
    // SAFETY: prctl is async-signal-safe. A guest's processes end with their VM, and so do these.
    unsafe {
        command.pre_exec(|| {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(Into::into)
        });
    }
    let mut child = command
        .args(&args[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let pid = child.id().unwrap();
    *running.pid.lock().unwrap() = Some(pid);
    let [stdin, stdout, stderr] = std::mem::take(&mut *running.stdio.lock().await);
    let mut to = child.stdin.take().unwrap();
    if let Some(mut from) = stdin {
        tokio::spawn(async move { tokio::io::copy(&mut from, &mut to).await });
    }
    let mut copies = Vec::new();
    if let (Some(mut from), Some(mut to)) = (child.stdout.take(), stdout) {
        copies.push(tokio::spawn(async move {
            tokio::io::copy(&mut from, &mut to).await
        }));
    }
    if let (Some(mut from), Some(mut to)) = (child.stderr.take(), stderr) {
        copies.push(tokio::spawn(async move {
            tokio::io::copy(&mut from, &mut to).await
        }));
    }
    tokio::spawn(async move {
        let status = child.wait().await.unwrap();
        for copy in copies {
            let _ = copy.await.unwrap();
        }
        let signal = status.signal().map(|s| 128 + s);
        let code = status.code().or(signal).unwrap_or(255);
        running.ended.send_replace(Some(code as u32));
    });
    Ok(pid)
}

/// Notes for the test, where it wants them.
fn hear(line: String) {
    let Some(path) = std::env::var_os("HEARD") else {
        return;
    };
    let file = std::fs::File::options()
        .append(true)
        .create(true)
        .open(path);
    writeln!(file.unwrap(), "{line}").unwrap();
}

#[async_trait]
impl agent_ttrpc::Agent for FakeAgent {
    async fn set_up_pod(&self, _: &TtrpcContext, r: SetUpPodRequest) -> ttrpc::Result<Empty> {
        assert!(r.clock.realtime_ns > 0);
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        r: CreateContainerRequest,
    ) -> ttrpc::Result<ProcessCreated> {
        let spec: serde_json::Value = serde_json::from_slice(&r.spec).unwrap();
        let mounts = spec["mounts"].as_array().cloned().unwrap_or_default();
        if !mounts.is_empty() {
            let sources = mounts.iter().map(|mount| mount["source"].as_str().unwrap());
            hear(format!("made with {}", Vec::from_iter(sources).join(" ")));
        }
        let id = (r.container_id, String::new());
        self.add(id.clone(), &spec["process"], &r.stdio).await;
        if self.find(&id.0, "")?.lies("slow") {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(ProcessCreated::new())
    }

    async fn write_volume(&self, _: &TtrpcContext, r: WriteVolumeRequest) -> ttrpc::Result<Empty> {
        assert!(r.names.is_some(), "it is small");
        let content = |end: &[u8]| {
            let mut files = r.files.iter();
            let file = files.find(|file| file.path.ends_with(end)).unwrap();
            String::from_utf8(file.content.clone()).unwrap()
        };
        let (version, key) = (content(b"..data"), content(b"/key"));
        hear(format!("{}: {version} = {key}", r.volume_id));
        Ok(Empty::new())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        r: ExecProcessRequest,
    ) -> ttrpc::Result<ProcessCreated> {
        let process = serde_json::from_slice(&r.process).unwrap();
        self.add((r.container_id, r.exec_id), &process, &r.stdio)
            .await;
        Ok(ProcessCreated::new())
    }

    async fn start_process(&self, _: &TtrpcContext, r: ProcessId) -> ttrpc::Result<ProcessCreated> {
        let running = self.find(&r.container_id, &r.exec_id)?;
        let _starting = running.starting.lock().await;
        if running.pid.lock().unwrap().is_some() || running.ended.borrow().is_some() {
            let code = ttrpc::Code::FAILED_PRECONDITION;
            return Err(refused(code, "it has been started, or has ended"));
        }
        match run(running.clone()).await {
            Ok(pid) => Ok(ProcessCreated {
                pid,
                ..Default::default()
            }),
            Err(e) => Err(refused(ttrpc::Code::UNKNOWN, &e.to_string())),
        }
    }

    async fn wait_process(&self, _: &TtrpcContext, r: ProcessId) -> ttrpc::Result<ProcessExit> {
        let running = self.find(&r.container_id, &r.exec_id)?;
        let mut ended = running.ended.subscribe();
        let status = ended.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(ProcessExit {
            status,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        r: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        let running = self.find(&r.container_id, &r.exec_id)?;
        if running.lies("deaf") {
            return Ok(Empty::new());
        }
        if running.lies("wordy") && r.signal != 9 {
            return Err(refused(
                ttrpc::Code::UNKNOWN,
                &"no\x1b[2J\nlevel=error ".repeat(50_000),
            ));
        }
        let _starting = running.starting.lock().await;
        if running.ended.borrow().is_some() {
            return Err(refused(ttrpc::Code::NOT_FOUND, "it has ended"));
        }
        let pid = *running.pid.lock().unwrap();
        match pid {
            Some(pid) => {
                let signal = nix::sys::signal::Signal::try_from(r.signal as i32).unwrap();
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal);
            }
            None => {
                running.ended.send_replace(Some(128 + r.signal));
            }
        }
        Ok(Empty::new())
    }

    async fn delete_process(&self, _: &TtrpcContext, r: ProcessId) -> ttrpc::Result<ProcessExit> {
        self.find(&r.container_id, &r.exec_id)?;
        self.processes
            .lock()
            .unwrap()
            .remove(&(r.container_id, r.exec_id));
        Ok(ProcessExit::new())
    }

    async fn container_stats(&self, _: &TtrpcContext, r: ContainerId) -> ttrpc::Result<Stats> {
        let mut stats = Stats::new();
        stats.memory.mut_or_insert_default().usage = match r.container_id.as_str() {
            "" => 7,
            id => self.find(id, "").map(|_| 5)?,
        };
        Ok(stats)
    }

    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Event> {
        loop {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let processes = self.processes.lock().unwrap();
            let of = |manner| processes.iter().find(|(_, running)| running.lies(manner));
            let said = match (of("loud"), of("foreign")) {
                (Some(((id, _), _)), _) => id.clone(),
                (_, Some(_)) => "somebody-else".into(),
                _ => continue,
            };
            return Ok(Event {
                kind: Some(event::Kind::Oom(said)),
                ..Default::default()
            });
        }
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        for running in self.processes.lock().unwrap().values() {
            if let Some(pid) = *running.pid.lock().unwrap()
                && running.ended.borrow().is_none()
            {
                let pid = nix::unistd::Pid::from_raw(pid as i32);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
        tokio::spawn(async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            std::process::exit(ExitCause::PowerOff.status().into());
        });
        Ok(Empty::new())
    }
}
