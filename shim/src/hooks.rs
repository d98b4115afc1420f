//! Hooks of the OCI spec that run on the host (OCI runtime-spec 1.2, config, POSIX-platform hooks).

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use oci_spec::runtime::{Hook, Spec};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::annotations::Annotations;
use crate::sys;

/// Longest run of a hook that names no time-out.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);
/// How much of a failed hook's output goes into the error, in bytes.
const MAX_OUTPUT: usize = 2048;

/// Why a hook has failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("{stage} hook {}: {source}", .path.display())]
    Run {
        stage: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{stage} hook {} failed ({status}): {output}", .path.display())]
    Failed {
        stage: &'static str,
        path: PathBuf,
        status: std::process::ExitStatus,
        output: String,
    },
    #[error("{stage} hook {} did not end within {} s", .path.display(), .limit.as_secs())]
    Timeout {
        stage: &'static str,
        path: PathBuf,
        limit: Duration,
    },
}

/// The container's state as hooks get it on their standard input (runtime-spec 1.2, state).
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Of the specification.
    pub oci_version: String,
    /// The container's id.
    pub id: String,
    /// `creating`, `running`, `stopped`.
    pub status: &'static str,
    /// A process in the pod's namespaces: the VMM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The bundle's path.
    pub bundle: PathBuf,
    /// The spec's annotations.
    #[serde(skip_serializing_if = "Annotations::is_empty")]
    pub annotations: Annotations,
}

impl State {
    /// That of a container which is being made.
    pub fn creating(spec: &Spec, id: &str, bundle: &Path, pid: Option<u32>) -> Self {
        Self {
            oci_version: spec.version().clone(),
            id: id.into(),
            status: "creating",
            pid,
            bundle: bundle.into(),
            annotations: spec.annotations().clone().unwrap_or_default(),
        }
    }
}

/// Runs hooks one after the other; the first that fails ends it.
///
/// # Errors
/// A hook could not be run, took too long, or ended with another status than 0.
pub async fn run(stage: &'static str, hooks: &[Hook], state: &State) -> Result<(), Error> {
    for hook in hooks {
        run_one(stage, hook, state).await?;
    }
    Ok(())
}

async fn run_one(stage: &'static str, hook: &Hook, state: &State) -> Result<(), Error> {
    let path: &Path = hook.path();
    let failed = |source| Error::Run {
        stage,
        path: path.into(),
        source,
    };
    let mut command = Command::new(path);
    if let Some((name, arguments)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(arguments);
    }
    if let Some(env) = hook.env() {
        command.env_clear();
        command.envs(env.iter().filter_map(|pair| pair.split_once('=')));
    }
    command
        .current_dir(&state.bundle)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    sys::unlimited(command.as_std_mut());
    let input = serde_json::to_vec(state).map_err(|e| failed(e.into()))?;
    let mut child = command.spawn().map_err(failed)?;
    let limit = match hook.timeout() {
        Some(seconds) if seconds > 0 => Duration::from_secs(seconds.unsigned_abs()),
        _ => DEFAULT_TIMEOUT,
    };
    let stdin = child.stdin.take();
    let feed = async move {
        if let Some(mut stdin) = stdin {
            // A hook may end without having read its input.
            let _ = stdin.write_all(&input).await;
        }
    };
    let both = async { tokio::join!(feed, child.wait_with_output()).1 };
    let output = match tokio::time::timeout(limit, both).await {
        Err(_) => {
            return Err(Error::Timeout {
                stage,
                path: path.into(),
                limit,
            });
        }
        Ok(output) => output.map_err(failed)?,
    };
    if output.status.success() {
        return Ok(());
    }
    let mut text = output.stderr;
    text.extend_from_slice(&output.stdout);
    let start = text.len().saturating_sub(MAX_OUTPUT);
    let output_text = String::from_utf8_lossy(&text[start..])
        .trim()
        .replace('\n', "; ");
    Err(Error::Failed {
        stage,
        path: path.into(),
        status: output.status,
        output: output_text,
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::HookBuilder;

    use super::*;

    fn state(bundle: &Path) -> State {
        State {
            oci_version: "1.2.0".into(),
            id: "c1".into(),
            status: "creating",
            pid: Some(7),
            bundle: bundle.into(),
            annotations: [("nerdctl/name".to_string(), "x".to_string())].into(),
        }
    }

    fn shell(script: &str) -> Hook {
        HookBuilder::default()
            .path("/bin/sh")
            .args(["sh", "-c", script].map(String::from))
            .build()
            .unwrap()
    }

    #[tokio::test]
    async fn a_hook_gets_the_state_on_its_input() {
        let dir = tempfile::tempdir().unwrap();
        run("createRuntime", &[shell("cat > got")], &state(dir.path()))
            .await
            .unwrap();
        let got: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("got")).unwrap()).unwrap();
        assert_eq!(got["pid"], 7);
        assert_eq!(got["status"], "creating");
        assert_eq!(got["annotations"]["nerdctl/name"], "x");
    }

    #[tokio::test]
    async fn a_failing_hook_is_told_with_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = [shell("echo no network >&2; exit 3"), shell("touch never")];
        let error = run("createRuntime", &hooks, &state(dir.path()))
            .await
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("createRuntime hook /bin/sh failed"), "{text}");
        assert!(text.ends_with("no network"), "{text}");
        assert!(!dir.path().join("never").exists());
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let mut hook = shell("sleep 100");
        hook.set_timeout(Some(1));
        let error = run("prestart", &[hook], &state(dir.path()))
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
    }
}
