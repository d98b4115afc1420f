//! `sepal check`: is this host able to run pods, and what to do where it is not.
//!
//! Every check looks for itself and answers with findings; none stops the others. Where a host is
//! looked at from outside (`--root`), its files and programs are those below that root, and what
//! only a running system can show is left out.

mod containerd;
mod elf;
mod files;
mod kvm;
mod network;
mod system;
mod tc;

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use sepal_protocol::config::{self, Config};
use serde::Serialize;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Severity {
    /// As it should be.
    Ok,
    /// Pods run, but slower, with less, or not for every client.
    Warn,
    /// Pods do not run.
    Fail,
}

/// What one look has shown. In the JSON output fields are added, never changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    /// What was looked at: `kvm`, `kernel`, `image`, ...
    check: &'static str,
    severity: Severity,
    /// One sentence.
    message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self {
            check,
            severity: Severity::Ok,
            message: message.into(),
            remedy: None,
        }
    }

    fn warn(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        let (severity, remedy) = (Severity::Warn, Some(remedy.into()));
        Self {
            check,
            severity,
            message: message.into(),
            remedy,
        }
    }

    fn fail(check: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        let (severity, remedy) = (Severity::Fail, Some(remedy.into()));
        Self {
            check,
            severity,
            message: message.into(),
            remedy,
        }
    }
}

/// The host that is looked at.
#[derive(Debug)]
struct Host {
    root: PathBuf,
}

impl Host {
    /// Where a file of the host is for us.
    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A small text file, if it is there.
    fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        std::fs::read_to_string(self.path(path)).ok()
    }

    /// Opens a device of the host as its users do.
    fn device(&self, path: &str) -> std::io::Result<File> {
        File::options().read(true).write(true).open(self.path(path))
    }

    /// We run on it, so that things can be tried out.
    fn is_ours(&self) -> bool {
        self.root == Path::new("/")
    }
}

/// A host for tests that has these files, and the directory in which it lives.
#[cfg(test)]
fn host_with(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
    let root = tempfile::tempdir().unwrap();
    let host = Host {
        root: root.path().into(),
    };
    for (path, text) in files {
        let path = host.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    (root, host)
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    /// No finding is a failure.
    ok: bool,
    version: &'static str,
    findings: &'a [Finding],
}

/// Prints the findings; exit status 1 when one of them is a failure.
///
/// # Errors
/// Only what printing says.
pub fn run(root: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let findings = look(&Host { root: root.into() });
    let ok = findings
        .iter()
        .all(|finding| finding.severity < Severity::Fail);
    let mut out = std::io::stdout().lock();
    if json {
        let report = Report {
            ok,
            version: env!("CARGO_PKG_VERSION"),
            findings: &findings,
        };
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", lines(&findings))?;
    }
    Ok(if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn look(host: &Host) -> Vec<Finding> {
    let mut findings = Vec::new();
    let config = configuration(host, &mut findings);
    findings.extend(files::programs(host, &config));
    let (flavour, found) = kvm::look(host, &config);
    findings.push(found);
    findings.extend(files::kernel(host, &config, flavour));
    findings.extend(files::image(host, &config));
    findings.extend(containerd::look(host));
    findings.extend(network::look(host));
    findings.extend(system::look(host, &config));
    findings
}

fn configuration(host: &Host, findings: &mut Vec<Finding>) -> Config {
    let path = if host.is_ours() {
        Config::path()
    } else {
        host.path(sepal_protocol::paths::CONFIG)
    };
    let named = host.is_ours() && std::env::var_os(config::ENV).is_some();
    if !named && !path.exists() {
        findings.push(Finding::ok("config", "no configuration file: all defaults"));
        return Config::default();
    }
    match Config::load(&path) {
        Ok(config) => {
            findings.push(Finding::ok(
                "config",
                format!("{} is valid", path.display()),
            ));
            config
        }
        Err(error) => {
            let remedy = "put it right; deploy/config.toml has every key with its default";
            findings.push(Finding::fail("config", error.to_string(), remedy));
            // The rest is still worth a look.
            Config::default()
        }
    }
}

fn lines(findings: &[Finding]) -> String {
    let width = findings
        .iter()
        .map(|finding| finding.check.len())
        .max()
        .unwrap_or(0);
    let mut text = String::new();
    for Finding {
        check,
        severity,
        message,
        remedy,
    } in findings
    {
        let word = match severity {
            Severity::Ok => "ok  ",
            Severity::Warn => "warn",
            Severity::Fail => "FAIL",
        };
        // Writing to a string does not fail.
        let _ = writeln!(text, "{word}  {check:<width$}  {message}");
        if let Some(remedy) = remedy {
            let _ = writeln!(text, "      {:width$}  -> {remedy}", "");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_aligned_and_remedies_follow() {
        let findings = [
            Finding::ok("kvm", "hardware"),
            Finding::fail("kernel", "there is none", "build one"),
        ];
        let expected = "\
            ok    kvm     hardware\n\
            FAIL  kernel  there is none\n              -> build one\n";
        assert_eq!(lines(&findings), expected);
    }

    #[test]
    fn paths_are_below_the_root() {
        let host = Host {
            root: "/mnt/host".into(),
        };
        assert_eq!(host.path("/dev/kvm"), Path::new("/mnt/host/dev/kvm"));
        assert!(!host.is_ours());
        assert_eq!(
            Host { root: "/".into() }.path("/dev/kvm"),
            Path::new("/dev/kvm")
        );
    }

    #[test]
    fn a_broken_configuration_is_a_finding_and_the_defaults_go_on() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("etc/sepal")).unwrap();
        std::fs::write(root.path().join("etc/sepal/config.toml"), "memroy = 1\n").unwrap();
        let mut findings = Vec::new();
        let config = configuration(
            &Host {
                root: root.path().into(),
            },
            &mut findings,
        );
        assert_eq!(config, Config::default());
        assert_eq!(findings[0].severity, Severity::Fail);
        assert!(findings[0].message.contains("unknown field `memroy`"));
    }
}
