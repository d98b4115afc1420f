//! containerd: does it answer, will it find the shim, does it know the runtime by name.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use toml::Value;

use super::files::version_of;
use super::{Finding, Host};

const CHECK: &str = "containerd";
const SHIM: &str = "containerd-shim-sepal-v2";
/// What `ctr run --runtime`, `nerdctl run --runtime` and a runtime class's handler lead to.
const RUNTIME: &str = "io.containerd.sepal.v2";
const SOCKET: &str = "/run/containerd/containerd.sock";
const CONFIG: &str = "/etc/containerd/config.toml";
/// Where a containerd that does not run would look, as systemd and most shells have it.
const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The CRI plugin's name in configurations of version 2 (containerd 1.x) and 3 (2.x).
const CRI: [(i64, &str); 2] = [
    (2, "io.containerd.grpc.v1.cri"),
    (3, "io.containerd.cri.v1.runtime"),
];

pub fn look(host: &Host) -> Vec<Finding> {
    let running = if host.is_ours() {
        Running::find()
    } else {
        None
    };
    let mut findings = Vec::new();
    if host.is_ours() {
        findings.push(reachable(running.as_ref()));
    }
    findings.push(shim(
        host,
        running.as_ref().map_or(USUAL_PATH, |running| &running.path),
    ));
    let config = running
        .and_then(|running| running.config)
        .unwrap_or_else(|| CONFIG.into());
    findings.push(configured(host, &config));
    findings
}

/// The containerd that runs.
#[derive(Debug)]
struct Running {
    path: String,
    config: Option<PathBuf>,
    socket: PathBuf,
    version: Option<String>,
}

impl Running {
    /// The first one; the one at the usual socket where there are several (a test's private one).
    fn find() -> Option<Self> {
        let mut all: Vec<Self> = std::fs::read_dir("/proc")
            .ok()?
            .flatten()
            .filter(|entry| {
                let name = std::fs::read_to_string(entry.path().join("comm"));
                name.is_ok_and(|name| name == "containerd\n")
            })
            .filter_map(|entry| Self::of(&entry.path()))
            .collect();
        all.sort_by_key(|running| running.socket != Path::new(SOCKET));
        if all.is_empty() {
            None
        } else {
            Some(all.swap_remove(0))
        }
    }

    fn of(process: &Path) -> Option<Self> {
        // One with a file system of its own (in a container, a test) is not this host's.
        let mounts = |process: &Path| std::fs::read_link(process.join("ns/mnt")).ok();
        if mounts(process)? != mounts(Path::new("/proc/self"))? {
            return None;
        }
        let words = |file| -> Option<Vec<String>> {
            let bytes = std::fs::read(process.join(file)).ok()?;
            Some(
                bytes
                    .split(|&b| b == 0)
                    .map(|w| String::from_utf8_lossy(w).into_owned())
                    .collect(),
            )
        };
        let (arguments, environment) = (words("cmdline")?, words("environ")?);
        let path = environment
            .iter()
            .find_map(|variable| variable.strip_prefix("PATH="));
        let config = option(&arguments, &["--config", "-c"]).map(PathBuf::from);
        let socket = option(&arguments, &["--address", "-a"])
            .map(PathBuf::from)
            .or_else(|| {
                let text =
                    std::fs::read_to_string(config.as_deref().unwrap_or(Path::new(CONFIG))).ok()?;
                let value: Value = toml::from_str(&text).ok()?;
                Some(value.get("grpc")?.get("address")?.as_str()?.into())
            });
        Some(Self {
            path: path.unwrap_or(USUAL_PATH).to_owned(),
            config,
            socket: socket.unwrap_or_else(|| SOCKET.into()),
            version: containerd_version(&process.join("exe")),
        })
    }
}

/// The value of an option, given as `--name value` or `--name=value`.
fn option<'a>(arguments: &'a [String], names: &[&str]) -> Option<&'a str> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        for name in names {
            match argument.strip_prefix(name) {
                Some("") => return arguments.next().map(String::as_str),
                Some(rest) if rest.starts_with('=') => return Some(&rest[1..]),
                _ => {}
            }
        }
    }
    None
}

/// `containerd github.com/containerd/containerd/v2 v2.1.9 <commit>`, or Debian's
/// `containerd github.com/containerd/containerd 1.7.24~ds1 <commit>`.
fn containerd_version(program: &Path) -> Option<String> {
    let output = std::process::Command::new(program)
        .arg("--version")
        .output()
        .ok()?;
    parse_version(&String::from_utf8(output.stdout).ok()?)
}

fn parse_version(line: &str) -> Option<String> {
    let word = line.split_whitespace().nth(2)?;
    Some(word.trim_start_matches('v').to_owned())
}

fn reachable(running: Option<&Running>) -> Finding {
    let socket = running.map_or(Path::new(SOCKET), |running| &running.socket);
    if let Err(error) = UnixStream::connect(socket) {
        let message = format!(
            "containerd does not answer at {}: {error}",
            socket.display()
        );
        return Finding::fail(CHECK, message, "install and start containerd 1.7 or 2.x");
    }
    let version = running.and_then(|running| running.version.as_deref());
    match version.map(|version| (version, major_minor(version))) {
        Some((version, Some(number))) if number < (1, 7) => {
            let message = format!("containerd {version} is older than 1.7");
            Finding::fail(CHECK, message, "install containerd 1.7 or 2.x")
        }
        Some((version, _)) => Finding::ok(
            CHECK,
            format!("containerd {version} answers at {}", socket.display()),
        ),
        None => Finding::ok(CHECK, format!("containerd answers at {}", socket.display())),
    }
}

fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn shim(host: &Host, path: &str) -> Finding {
    const CHECK: &str = "shim";
    let found = path
        .split(':')
        .filter(|directory| !directory.is_empty())
        .find_map(|directory| {
            let file = host.path(directory).join(SHIM);
            let metadata = file.metadata().ok()?;
            (metadata.is_file() && metadata.permissions().mode() & 0o111 != 0).then_some(file)
        });
    let Some(file) = found else {
        let message = format!("{SHIM} is not on containerd's PATH ({path})");
        return Finding::fail(CHECK, message, "run deploy/install");
    };
    let ours = env!("CARGO_PKG_VERSION");
    match version_of(&file, "-v") {
        Some(version) if version == ours => {
            Finding::ok(CHECK, format!("{} {ours}", file.display()))
        }
        version => {
            let version = version.as_deref().unwrap_or("unknown");
            let message = format!(
                "{} is of version {version}, this program of {ours}",
                file.display()
            );
            Finding::fail(CHECK, message, "run deploy/install")
        }
    }
}

fn configured(host: &Host, path: &Path) -> Finding {
    const CHECK: &str = "runtime";
    let unknown = |message: String| {
        let remedy = "copy deploy/containerd/sepal-1.7.toml or sepal-2.x.toml below /etc/containerd \
            and import it; ctr and nerdctl work without it";
        Finding::warn(CHECK, message, remedy)
    };
    let Some(text) = host.text(path) else {
        return unknown(format!(
            "{} is not there: Kubernetes cannot name Sepal",
            path.display()
        ));
    };
    let config: Value = match toml::from_str(&text) {
        Ok(config) => config,
        Err(error) => return unknown(format!("{}: {}", path.display(), error.message())),
    };
    let mut files = vec![(path.to_owned(), config.clone())];
    files.extend(imports(host, path, &config));
    for (file, config) in &files {
        let Some(name) = runtime_of(config) else {
            continue;
        };
        return match plugin_mismatch(config) {
            None => Finding::ok(
                CHECK,
                format!("{} names the runtime {name:?}", file.display()),
            ),
            Some((version, plugin)) => unknown(format!(
                "{} names the runtime for {plugin}, which a configuration of version {version} does not have",
                file.display()
            )),
        };
    }
    unknown(format!(
        "{} does not name the runtime {RUNTIME}",
        path.display()
    ))
}

/// The files that a configuration imports: paths, the last component of which may hold `*`.
fn imports(host: &Host, path: &Path, config: &Value) -> Vec<(PathBuf, Value)> {
    let patterns = config.get("imports").and_then(Value::as_array);
    let mut files = Vec::new();
    for pattern in patterns.into_iter().flatten().filter_map(Value::as_str) {
        let pattern = path.parent().unwrap_or(Path::new("/")).join(pattern);
        let (Some(directory), Some(name)) = (
            pattern.parent(),
            pattern.file_name().and_then(|name| name.to_str()),
        ) else {
            continue;
        };
        let entries = std::fs::read_dir(host.path(directory))
            .into_iter()
            .flatten()
            .flatten();
        for entry in entries {
            let file = entry.file_name();
            if matches(name, &file.to_string_lossy())
                && let Ok(text) = std::fs::read_to_string(entry.path())
                && let Ok(value) = toml::from_str(&text)
            {
                files.push((directory.join(file), value));
            }
        }
    }
    files.sort_by(|a, b| a.0.cmp(&b.0));
    files
}

/// A file name against a pattern with at most one `*`.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, end)) => {
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        }
    }
}

/// The name under which any CRI plugin's configuration has our runtime.
fn runtime_of(config: &Value) -> Option<String> {
    let plugins = config.get("plugins")?.as_table()?;
    plugins.values().find_map(|plugin| {
        let runtimes = plugin.get("containerd")?.get("runtimes")?.as_table()?;
        let ours =
            |value: &Value| value.get("runtime_type").and_then(Value::as_str) == Some(RUNTIME);
        runtimes
            .iter()
            .find(|(_, value)| ours(value))
            .map(|(name, _)| name.clone())
    })
}

/// The plugin that a file configures although its version knows it by another name.
fn plugin_mismatch(config: &Value) -> Option<(i64, &'static str)> {
    let version = config.get("version").and_then(Value::as_integer)?;
    let plugins = config.get("plugins")?.as_table()?;
    CRI.iter()
        .find(|(of, plugin)| *of != version && plugins.contains_key(*plugin))
        .map(|(_, plugin)| (version, *plugin))
}

#[cfg(test)]
mod tests {
    use super::super::{Severity, host_with as host};
    use super::*;

    const V3: &str = "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.sepal]\n\
        runtime_type = 'io.containerd.sepal.v2'\n";

    #[test]
    fn the_runtime_is_found_in_the_file_and_in_what_it_imports() {
        let (_root, direct) = host(&[(CONFIG, V3)]);
        assert_eq!(
            configured(&direct, Path::new(CONFIG)).severity,
            Severity::Ok
        );
        let main = "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n";
        let (_root, imported) = host(&[(CONFIG, main), ("/etc/containerd/conf.d/sepal.toml", V3)]);
        let finding = configured(&imported, Path::new(CONFIG));
        assert!(
            finding
                .message
                .contains("conf.d/sepal.toml names the runtime \"sepal\"")
        );
    }

    #[test]
    fn a_runtime_that_is_not_named_or_for_the_other_containerd_is_a_warning() {
        let other = V3.replace("version = 3", "version = 2");
        for (text, words) in [
            ("version = 3\n", "does not name the runtime"),
            (
                other.as_str(),
                "which a configuration of version 2 does not have",
            ),
            ("version = [", "config.toml: "),
        ] {
            let (_root, host) = host(&[(CONFIG, text)]);
            let finding = configured(&host, Path::new(CONFIG));
            assert_eq!(finding.severity, Severity::Warn);
            assert!(finding.message.contains(words), "{}", finding.message);
        }
        let (_root, none) = host(&[]);
        assert!(
            configured(&none, Path::new(CONFIG))
                .message
                .contains("is not there")
        );
    }

    #[test]
    fn the_shim_is_looked_for_on_containerds_path() {
        let script = format!(
            "#!/bin/sh\necho '{SHIM}:'; echo '  Version:' {}\n",
            env!("CARGO_PKG_VERSION")
        );
        let (_root, host) = host(&[("/usr/local/bin/containerd-shim-sepal-v2", &script)]);
        assert_eq!(
            shim(&host, USUAL_PATH).severity,
            Severity::Fail,
            "not executable"
        );
        let file = host.path("/usr/local/bin").join(SHIM);
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o755)).unwrap();
        let found = shim(&host, USUAL_PATH);
        assert_eq!(found.severity, Severity::Ok, "{}", found.message);
        assert_eq!(shim(&host, "/bin:/usr/bin").severity, Severity::Fail);
    }

    #[test]
    fn options_are_read_in_both_forms() {
        let of = |line: &str| -> Vec<String> { line.split(' ').map(String::from).collect() };
        assert_eq!(
            option(&of("containerd -c /a"), &["--config", "-c"]),
            Some("/a")
        );
        assert_eq!(
            option(&of("containerd --config=/b -l info"), &["--config", "-c"]),
            Some("/b")
        );
        assert_eq!(
            option(&of("containerd --configx /c"), &["--config", "-c"]),
            None
        );
    }

    #[test]
    fn versions_of_all_builds_are_understood() {
        let debian =
            parse_version("containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6");
        assert_eq!(major_minor(&debian.unwrap()), Some((1, 7)));
        let upstream =
            parse_version("containerd github.com/containerd/containerd/v2 v2.1.9 abcdef\n");
        assert_eq!(major_minor(&upstream.unwrap()), Some((2, 1)));
    }
}
