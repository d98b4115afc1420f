//! The last step of a container process: becoming the program that the user asked for.
//!
//! libcontainer calls this inside the container, as the container's user, with capabilities dropped
//! and seccomp in force. Its own executor is not used: it loses the environment's order, leaves
//! SIGPIPE ignored, and cannot tell the agent why execve(2) failed.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::{AccessFlags, access, execve};
use oci_spec::runtime::Spec;

use crate::sys;

/// First byte of a packet that says why a process cannot run.
pub const REFUSED: u8 = b'D';
/// A packet of this one byte comes right before execve(2).
pub const EXECUTING: u8 = b'X';
/// Where programs are looked for when the environment has no PATH.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program with its arguments and environment.
#[derive(Debug, Clone)]
pub struct Payload {
    /// The program as given, and its arguments; not empty.
    pub args: Vec<CString>,
    /// The whole environment.
    pub env: Vec<CString>,
    /// Packet socket to the agent; closed by a successful execve(2).
    pub report: RawFd,
}

impl Payload {
    /// Sends one packet to the agent.
    fn tell(&self, kind: u8, text: &str) {
        let mut packet = vec![kind];
        packet.extend_from_slice(text.as_bytes());
        // When the agent has given up on this process there is nobody left to tell.
        let _ = send(self.report, &packet, MsgFlags::MSG_NOSIGNAL);
    }

    /// The file to execute, as runc and every shell look it up.
    fn resolve(&self) -> Result<CString, String> {
        let program = self
            .args
            .first()
            .map(|arg| arg.to_bytes())
            .unwrap_or_default();
        let name = String::from_utf8_lossy(program).into_owned();
        if program.contains(&b'/') {
            let path = PathBuf::from(OsStr::from_bytes(program));
            return runnable(&path).map_err(|errno| format!("exec: {name:?}: {}", text(errno)));
        }
        let path = self
            .env
            .iter()
            .find_map(|entry| entry.to_bytes().strip_prefix(b"PATH="))
            .unwrap_or(DEFAULT_PATH);
        let mut refused = None;
        for directory in path.split(|byte| *byte == b':') {
            let directory = if directory.is_empty() {
                b"."
            } else {
                directory
            };
            match runnable(
                &Path::new(OsStr::from_bytes(directory)).join(OsStr::from_bytes(program)),
            ) {
                Ok(found) => return Ok(found),
                Err(Errno::EACCES) => refused = Some(Errno::EACCES),
                Err(_) => {}
            }
        }
        Err(match refused {
            Some(errno) => format!("exec: {name:?}: {}", text(errno)),
            None => format!("exec: {name:?}: executable file not found in $PATH"),
        })
    }

    /// Replaces the process by the program; comes back only with the reason why it could not.
    pub fn execute(&self) -> String {
        let why = match self.resolve() {
            Ok(file) => {
                self.tell(EXECUTING, "");
                self.become_program(&file)
            }
            Err(why) => why,
        };
        self.tell(REFUSED, &why);
        why
    }

    fn become_program(&self, file: &CStr) -> String {
        if let Err(errno) = sys::reset_signal(Signal::SIGPIPE) {
            return format!("cannot reset SIGPIPE: {}", text(errno));
        }
        let Err(errno) = execve(file, &self.args, &self.env);
        let name = self
            .args
            .first()
            .map(|arg| arg.to_string_lossy())
            .unwrap_or_default();
        format!("exec: {name:?}: {}", text(errno))
    }
}

/// `errno` in the words users know from their shells.
#[must_use]
pub fn text(errno: Errno) -> String {
    errno.desc().to_lowercase()
}

fn runnable(path: &Path) -> Result<CString, Errno> {
    let about = nix::sys::stat::stat(path)?;
    if about.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err(Errno::EISDIR);
    }
    access(path, AccessFlags::X_OK)?;
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)
}

impl Executor for Payload {
    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        Err(ExecutorError::Other(self.execute()))
    }

    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        tracing::debug!("inside the container");
        self.resolve().map(drop).map_err(|why| {
            self.tell(REFUSED, &why);
            ExecutorValidationError::ArgValidationError(why)
        })
    }

    // The environment goes to execve(2) directly; changing the process's own could panic on names
    // that the kernel takes and Rust does not.
    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn payload(program: &str, path: Option<&str>) -> Payload {
        let env = path.map(|path| CString::new(format!("PATH={path}")).unwrap());
        Payload {
            args: vec![CString::new(program).unwrap()],
            env: env.into_iter().collect(),
            report: -1,
        }
    }

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        let dir = tempfile::tempdir().unwrap();
        let tool = dir.path().join("tool");
        std::fs::write(&tool, "").unwrap();
        std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("/nowhere:{}", dir.path().display());
        let found = payload("tool", Some(&path)).resolve().unwrap();
        assert_eq!(found.to_bytes(), tool.as_os_str().as_bytes());
        assert!(payload("sh", None).resolve().is_ok());
    }

    #[test]
    fn what_cannot_run_is_named() {
        let refusal = |program: &str| payload(program, Some("/nowhere")).resolve().unwrap_err();
        assert_eq!(
            refusal("tool"),
            "exec: \"tool\": executable file not found in $PATH"
        );
        assert_eq!(
            refusal("/no/tool"),
            "exec: \"/no/tool\": no such file or directory"
        );
        assert_eq!(refusal("/etc"), "exec: \"/etc\": is a directory");
        assert_eq!(
            refusal("/etc/passwd"),
            "exec: \"/etc/passwd\": permission denied"
        );
    }
}
