//! Log programs: `binary:///path?key=value`, as nerdctl uses for its json-file driver.
//!
//! The program gets the process's output as descriptors 3 (stdout) and 4 (stderr), closes 5 when it
//! is ready, and finds CONTAINER_ID and CONTAINER_NAMESPACE in its environment. It ends by itself
//! when its inputs do.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::stdio::{Error, pipe_for_output};
use crate::sys::{self, Netns, Spawn};
use crate::vm;

/// Longest wait for a log program to say that it is ready.
const READY: Duration = Duration::from_secs(10);
/// Longest wait for it to write what it has, once its inputs have ended.
const END: Duration = Duration::from_secs(12);
/// How long a Delete call waits for that; the rest happens behind it.
const PATIENCE: Duration = Duration::from_secs(2);

/// A running log program.
pub struct Logger {
    pidfd: OwnedFd,
}

impl Logger {
    /// Spawns the program of a URI without its `binary://`; answers with the write ends of what it
    /// takes for standard output and error.
    ///
    /// # Errors
    /// It cannot be run, or is not ready in time.
    pub async fn spawn(
        uri: &str,
        namespace: &str,
        container: &str,
    ) -> Result<(Self, OwnedFd, OwnedFd), Error> {
        let (path, arguments) = parse(uri);
        let failed = |source| Error::Logger {
            program: path.clone(),
            source,
        };
        let (out_read, out) = pipe_for_output().map_err(failed)?;
        let (err_read, err) = pipe_for_output().map_err(failed)?;
        let flags = nix::fcntl::OFlag::O_CLOEXEC;
        let (ready, ready_write) = nix::unistd::pipe2(flags).map_err(|e| failed(e.into()))?;
        nix::fcntl::fcntl(
            &ready,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )
        .map_err(|e| failed(e.into()))?;
        let mut command = Command::new(&path);
        command
            .args(arguments)
            .env("CONTAINER_ID", container)
            .env("CONTAINER_NAMESPACE", namespace);
        let inherited = [out_read.as_fd(), err_read.as_fd(), ready_write.as_fd()];
        let spawn = Spawn {
            inherited: &inherited,
            netns: Netns::Same,
            // It writes down what is left after the shim's death.
            alone: false,
            dies_with_parent: false,
            log: None,
        };
        let child = sys::spawn(command, &spawn).map_err(failed)?;
        drop((out_read, err_read, ready_write));
        let logger = Self { pidfd: child.pidfd };
        let mut ready = pipe::Receiver::from_owned_fd(ready).map_err(failed)?;
        let mut byte = [0];
        match tokio::time::timeout(READY, ready.read(&mut byte)).await {
            Ok(Ok(_)) => Ok((logger, out, err)),
            Ok(Err(source)) => Err(failed(source)),
            Err(_) => {
                let _ = sys::pidfd_kill(&logger.pidfd, Signal::SIGKILL);
                vm::wait(&logger.pidfd).await;
                Err(Error::LoggerNotReady { program: path })
            }
        }
    }

    /// Waits a little for the program's end; one that hangs is killed behind the caller's back.
    pub async fn end(self) {
        let wait = tokio::spawn(async move {
            if tokio::time::timeout(END, vm::wait(&self.pidfd))
                .await
                .is_ok()
            {
                return;
            }
            for signal in [Signal::SIGTERM, Signal::SIGKILL] {
                let _ = sys::pidfd_kill(&self.pidfd, signal);
                if tokio::time::timeout(PATIENCE, vm::wait(&self.pidfd))
                    .await
                    .is_ok()
                {
                    return;
                }
            }
        });
        let _: Result<_, io::Error> = tokio::time::timeout(PATIENCE, wait)
            .await
            .map_err(io::Error::from)
            .map(|_| ());
    }
}

/// The program and its arguments: each key of the query, and its value where it has one.
fn parse(uri: &str) -> (PathBuf, Vec<String>) {
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(decode(key));
        arguments.push(decode(value));
    }
    arguments.retain(|argument| !argument.is_empty());
    (PathBuf::from(decode_path(path)), arguments)
}

fn decode(text: &str) -> String {
    decode_path(&text.replace('+', " "))
}

/// Percent-encoding, RFC 3986, 2.1.
fn decode_path(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..2).and_then(|d| std::str::from_utf8(d).ok());
        match digits.and_then(|d| u8::from_str_radix(d, 16).ok()) {
            Some(value) if byte == b'%' => {
                bytes.push(value);
                rest = &after[2..];
            }
            _ => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_is_a_program_with_arguments() {
        let (path, arguments) = parse("/usr/bin/a%20b?_LOG=%2Fvar%2Flib&flag&x=1+2");
        assert_eq!(path, PathBuf::from("/usr/bin/a b"));
        assert_eq!(arguments, ["_LOG", "/var/lib", "flag", "x", "1 2"]);
    }
}
