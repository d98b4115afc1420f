//! The configuration file: one strict TOML file, read by the shim for each pod and by `sepal`.
//!
//! Every key has a default; an absent file is the same as an empty one, unless it was named by
//! `SEPAL_CONFIG`. An unknown key is an error, so that a misspelt one is not silently without effect.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::paths;

/// Environment variable that names another configuration file.
pub const ENV: &str = "SEPAL_CONFIG";
/// Most vCPUs of a pod ([`crate::vm::CpuSpec`]).
pub const MAX_VCPUS: u8 = 64;
/// Least RAM of a VM, in MiB: below it the guest's kernel and agent leave no room for a container.
pub const MIN_MEMORY: u64 = 64;
/// Most RAM of a VM, in MiB: 512 GiB, what the guest's address map has room for.
pub const MAX_MEMORY: u64 = 512 << 10;
/// Two files of an installation, below its directory.
const VMM: &str = "bin/sepal-vmm";
const KERNEL: &str = "share/vmlinux";
/// Longest configuration file that is read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// The configuration, see `deploy/config.toml` for the commented file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The VMM's program.
    pub vmm: PathBuf,
    /// The file server's program.
    pub fs: PathBuf,
    /// Guest kernel for KVM on VT-x or AMD-V.
    pub kernel: PathBuf,
    /// Guest kernel for KVM that runs guests deprivileged.
    pub kernel_deprivileged: PathBuf,
    /// Guest image.
    pub image: PathBuf,
    /// Guest image with a shell, used when `debug` is set.
    pub debug_image: PathBuf,
    /// An initramfs instead of the image; for experiments.
    pub initrd: Option<PathBuf>,
    /// Boot `debug_image`, which lets `sepal exec` into the guest.
    pub debug: bool,
    /// Added to the guest kernel's command line.
    pub kernel_args: String,
    /// The guest kernel's early messages on an emulated serial port: slow, for debugging the kernel.
    pub early_console: bool,
    /// vCPUs of a pod without a CPU limit.
    pub vcpus: u8,
    /// Most vCPUs a pod may get, by its limits or by resizing.
    pub max_vcpus: u8,
    /// RAM of a pod without a memory limit, in MiB.
    pub memory: u64,
    /// Most RAM that a pod may grow to while it runs, in MiB; 0: what the host has.
    pub max_memory: u64,
    /// RAM added to a pod's memory limit for the guest's kernel and agent, in MiB.
    pub memory_overhead: u64,
    /// Back guest RAM by huge pages reserved on the host.
    pub hugepages: bool,
    /// Let the host merge equal pages of different pods (KSM). Opens side channels between pods.
    pub ksm: bool,
    /// Give free guest pages back to the host.
    pub balloon: bool,
    /// How much the shim, the VMM and the file server log.
    pub log_level: LogLevel,
    /// Longest wait for a booting guest's agent, in seconds.
    pub agent_timeout_s: u64,
}

/// A level of tracing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// A requested action failed.
    Error,
    /// Odd and harmless as well.
    Warn,
    /// Rare changes of state as well.
    Info,
    /// Requests and the stages of a start as well.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// As in the file and on command lines.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        let program = std::env::current_exe().unwrap_or_default();
        let prefix = installation_of(&program).unwrap_or(Path::new(paths::PREFIX));
        Self {
            vmm: prefix.join(VMM),
            fs: prefix.join("bin/sepal-fs"),
            kernel: prefix.join(KERNEL),
            kernel_deprivileged: prefix.join("share/vmlinux-deprivileged"),
            image: prefix.join("share/guest.erofs"),
            debug_image: prefix.join("share/guest-debug.erofs"),
            initrd: None,
            debug: false,
            kernel_args: String::new(),
            early_console: false,
            vcpus: 1,
            max_vcpus: 8,
            memory: 256,
            max_memory: 0,
            memory_overhead: 64,
            hugepages: false,
            ksm: false,
            balloon: true,
            log_level: LogLevel::Info,
            agent_timeout_s: 30,
        }
    }
}

/// The directory of the installation that a program belongs to, by its real path. Several versions lie
/// side by side, and a pod must not begin with the shim of one and the VMM of the next because an
/// upgrade came between.
fn installation_of(program: &Path) -> Option<&Path> {
    let bin = program.parent()?;
    let prefix = bin.parent()?;
    let whole = bin.ends_with("bin") && [VMM, KERNEL].iter().all(|f| prefix.join(f).exists());
    whole.then_some(prefix)
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("configuration {}: cannot read it: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Not TOML, a key that does not exist or a value of another type.
    #[error("configuration {}: {message}", .path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, column, and what is wrong, on one line.
        message: String,
    },
    /// A value that no pod can have.
    #[error("configuration {}: {key}: {reason}", .path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The offending key.
        key: &'static str,
        /// What it should be.
        reason: String,
    },
}

impl Config {
    /// The file that applies: `SEPAL_CONFIG` or /etc/sepal/config.toml.
    pub fn path() -> PathBuf {
        std::env::var_os(ENV).map_or_else(|| paths::CONFIG.into(), PathBuf::from)
    }

    /// Reads the file that applies; the defaults where there is none at the usual place.
    ///
    /// # Errors
    /// As [`Config::load`]. A file named by `SEPAL_CONFIG` must exist.
    pub fn load_default() -> Result<Self, Error> {
        let named = std::env::var_os(ENV).is_some();
        match Self::load(&Self::path()) {
            Err(Error::Read { source, .. }) if !named && source.kind() == ErrorKind::NotFound => {
                Ok(Self::default())
            }
            other => other,
        }
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// The file is not there, not TOML, has an unknown key or a value no pod can have.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read {
            path: path.into(),
            source,
        };
        let metadata = std::fs::metadata(path).map_err(read)?;
        if !metadata.is_file() || metadata.len() > MAX_FILE {
            let reason = std::io::Error::other("not a regular file of at most 1 MiB");
            return Err(read(reason));
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        Self::parse(&text, path)
    }

    /// Checks the text of a file; `path` is for the error messages.
    ///
    /// # Errors
    /// [`Error::Syntax`] and [`Error::Value`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        let config: Self = toml::from_str(text).map_err(|e| {
            let mut message = e.message().trim().replace('\n', "; ");
            if let Some(span) = e.span() {
                let before = text.get(..span.start).unwrap_or(text);
                let number = before.matches('\n').count();
                let line = text.lines().nth(number).unwrap_or_default().trim();
                message = format!("line {} ({line}): {message}", number + 1);
            }
            Error::Syntax {
                path: path.into(),
                message,
            }
        })?;
        config.check(path)?;
        Ok(config)
    }

    /// The guest image that applies.
    pub fn guest_image(&self) -> &Path {
        if self.debug {
            &self.debug_image
        } else {
            &self.image
        }
    }

    fn check(&self, path: &Path) -> Result<(), Error> {
        let wrong = |key, reason: String| {
            Err(Error::Value {
                path: path.into(),
                key,
                reason,
            })
        };
        for (key, value) in [
            ("vmm", Some(&self.vmm)),
            ("fs", Some(&self.fs)),
            ("kernel", Some(&self.kernel)),
            ("kernel_deprivileged", Some(&self.kernel_deprivileged)),
            ("image", Some(&self.image)),
            ("debug_image", Some(&self.debug_image)),
            ("initrd", self.initrd.as_ref()),
        ] {
            if let Some(value) = value
                && !value.is_absolute()
            {
                return wrong(key, format!("{} is not an absolute path", value.display()));
            }
        }
        if !(1..=MAX_VCPUS).contains(&self.max_vcpus) {
            return wrong("max_vcpus", format!("must be 1 to {MAX_VCPUS}"));
        }
        if !(1..=self.max_vcpus).contains(&self.vcpus) {
            return wrong(
                "vcpus",
                format!("must be 1 to max_vcpus ({})", self.max_vcpus),
            );
        }
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&self.memory) || !self.memory.is_multiple_of(2) {
            return wrong(
                "memory",
                format!("must be an even number of MiB, {MIN_MEMORY} to {MAX_MEMORY}"),
            );
        }
        if self.memory_overhead > MAX_MEMORY || !self.memory_overhead.is_multiple_of(2) {
            return wrong(
                "memory_overhead",
                format!("must be an even number of MiB, at most {MAX_MEMORY}"),
            );
        }
        if self.agent_timeout_s == 0 {
            return wrong("agent_timeout_s", "must be at least 1 second".into());
        }
        if self.kernel_args.len() > 1024 || self.kernel_args.contains(['\n', '\0']) {
            return wrong(
                "kernel_args",
                "must be one line of at most 1024 bytes".into(),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Error> {
        Config::parse(text, Path::new("c.toml"))
    }

    #[test]
    fn a_program_uses_the_files_of_its_own_version() {
        let prefix = tempfile::tempdir().unwrap();
        let version = prefix.path().join("versions/1.2.3");
        let program = version.join("bin/containerd-shim-sepal-v2");
        assert_eq!(installation_of(&program), None, "not installed there");
        for file in [VMM, KERNEL] {
            std::fs::create_dir_all(version.join(file).parent().unwrap()).unwrap();
            std::fs::write(version.join(file), "").unwrap();
        }
        assert_eq!(installation_of(&program), Some(&*version));
        assert_eq!(installation_of(Path::new("/usr/bin/sepal")), None);
        assert_eq!(installation_of(Path::new("")), None);
    }

    #[test]
    fn an_empty_file_gives_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    /// The commented file that is installed has every key, with its default.
    #[test]
    fn the_installed_file_shows_the_defaults() {
        let file = include_str!("../../deploy/config.toml");
        let is_key = |line: &&str| {
            line.split_once(" = ")
                .is_some_and(|(key, _)| !key.contains(' '))
        };
        let keys = file
            .lines()
            .filter_map(|line| line.strip_prefix("# "))
            .filter(is_key);
        let (text, shown): (String, Vec<_>) = keys
            .filter(|line| !line.starts_with("initrd = "))
            .map(|line| {
                (
                    format!("{line}\n"),
                    line.split(' ').next().unwrap_or_default(),
                )
            })
            .unzip();
        assert_eq!(parse(&text).unwrap(), Config::default());
        let all = serde_json::to_value(Config::default()).unwrap();
        for key in all
            .as_object()
            .unwrap()
            .keys()
            .filter(|key| *key != "initrd")
        {
            assert!(
                shown.contains(&key.as_str()),
                "deploy/config.toml does not show {key}"
            );
        }
    }

    #[test]
    fn a_value_replaces_its_default_and_no_other() {
        let config = parse("memory = 512\ndebug = true\nlog_level = \"debug\"\n").unwrap();
        let expected = Config {
            memory: 512,
            debug: true,
            log_level: LogLevel::Debug,
            ..Config::default()
        };
        assert_eq!(config, expected);
        assert_eq!(config.guest_image(), expected.debug_image);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let message = parse("debug = false\nmemroy = 512\n")
            .unwrap_err()
            .to_string();
        assert!(
            message
                .starts_with("configuration c.toml: line 2 (memroy = 512): unknown field `memroy`")
        );
        assert!(!message.contains('\n'));
    }

    #[test]
    fn impossible_values_are_refused_by_name() {
        for (text, key) in [
            ("memory = 12", "memory:"),
            ("memory = 257", "memory:"),
            ("memory = 524290", "memory:"),
            ("memory = 9223372036854775806", "memory:"),
            ("memory_overhead = 9223372036854775806", "memory_overhead:"),
            ("vcpus = 0", "vcpus:"),
            ("vcpus = 9", "vcpus:"),
            ("max_vcpus = 65", "max_vcpus:"),
            ("agent_timeout_s = 0", "agent_timeout_s:"),
            ("kernel = \"vmlinux\"", "kernel:"),
            ("kernel_args = \"a\\nb\"", "kernel_args:"),
            (
                "log_level = \"loud\"",
                "line 1 (log_level = \"loud\"): unknown variant",
            ),
            (
                "memory = \"big\"",
                "line 1 (memory = \"big\"): invalid type",
            ),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(
                message.starts_with(&format!("configuration c.toml: {key}")),
                "{message}"
            );
        }
    }

    #[test]
    fn a_missing_file_is_an_error_of_its_own() {
        let error = Config::load(Path::new("/nonexistent/sepal.toml")).unwrap_err();
        assert!(matches!(error, Error::Read { .. }));
    }
}
