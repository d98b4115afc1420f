//! `sepal check` as its user meets it: exit status, lines and JSON, on a made-up host.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A host on which nothing is wrong, below a temporary directory.
struct Host(tempfile::TempDir);

impl Host {
    fn able() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        host.script(
            "/opt/sepal/bin/sepal-vmm",
            &format!(
                "case $1 in --probe) echo '{{\"flavour\":\"hardware\"}}';; *) echo sepal-vmm {VERSION};; esac"
            ),
        );
        host.script(
            "/opt/sepal/bin/sepal-fs",
            &format!("echo sepal-fs {VERSION}"),
        );
        host.script(
            "/usr/local/bin/containerd-shim-sepal-v2",
            &format!("echo Version: {VERSION}"),
        );
        host.file("/opt/sepal/share/vmlinux", &kernel());
        host.file("/opt/sepal/share/guest.erofs", &image());
        for device in ["/dev/kvm", "/dev/net/tun", "/dev/vhost-net"] {
            host.file(device, b"");
        }
        host.file(
            "/sys/fs/cgroup/cgroup.controllers",
            b"cpuset cpu io memory pids\n",
        );
        host.file("/proc/meminfo", b"MemAvailable: 8000000 kB\n");
        host.file("/proc/sys/kernel/osrelease", b"6.12.1-test\n");
        let runtime = "version = 3\n\
            [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.sepal]\n\
            runtime_type = 'io.containerd.sepal.v2'\n";
        host.file("/etc/containerd/config.toml", runtime.as_bytes());
        host
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(&path[1..])
    }

    fn file(&self, path: &str, bytes: &[u8]) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    fn script(&self, path: &str, body: &str) {
        self.file(path, format!("#!/bin/sh\n{body}\n").as_bytes());
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(self.path(path), mode).unwrap();
    }

    fn check(&self, options: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sepal"));
        command
            .arg("check")
            .arg("--root")
            .arg(self.0.path())
            .args(options)
            .output()
            .unwrap()
    }

    fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.check(&["--json"]).stdout).unwrap()
    }
}

/// An ELF file with no segments and a kernel's banner.
fn kernel() -> Vec<u8> {
    let mut bytes = vec![0_u8; 64];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[18] = 62;
    bytes.extend(b"Linux version 6.12.117-sepal (sepal@sepal)\0");
    bytes
}

fn image() -> Vec<u8> {
    let mut bytes = vec![0; (2 << 20) - 4096];
    let trailer =
        format!("sepal guest image 1\nversion={VERSION}\nvariant=release\nsize=2097152\n");
    bytes.extend(trailer.as_bytes());
    bytes.resize(2 << 20, 0);
    bytes
}

#[test]
fn an_able_host_passes() {
    let host = Host::able();
    let report = host.json();
    assert_eq!(report["ok"], true, "{report:#}");
    assert!(host.check(&[]).status.success());
    let bad: Vec<_> = report["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["severity"] != "ok")
        .collect();
    assert!(bad.is_empty(), "{bad:#?}");
}

#[test]
fn each_thing_that_is_missing_fails_with_its_remedy() {
    for (file, check) in [
        ("/dev/kvm", "kvm"),
        ("/opt/sepal/bin/sepal-fs", "program"),
        ("/opt/sepal/share/vmlinux", "kernel"),
        ("/opt/sepal/share/guest.erofs", "image"),
        ("/usr/local/bin/containerd-shim-sepal-v2", "shim"),
        ("/dev/net/tun", "tun"),
    ] {
        let host = Host::able();
        std::fs::remove_file(host.path(file)).unwrap();
        let output = host.check(&["--json"]);
        assert_eq!(output.status.code(), Some(1), "without {file}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let findings = report["findings"].as_array().unwrap();
        let found = findings
            .iter()
            .find(|finding| finding["severity"] == "fail")
            .unwrap();
        assert_eq!(found["check"], check);
        assert!(!found["remedy"].as_str().unwrap().is_empty());
        let lines = String::from_utf8(host.check(&[]).stdout).unwrap();
        assert!(
            lines
                .lines()
                .any(|line| line.starts_with(&format!("FAIL  {check}"))),
            "{lines}"
        );
    }
}

#[test]
fn a_truncated_image_and_a_foreign_kernel_are_seen() {
    let host = Host::able();
    host.file("/opt/sepal/share/guest.erofs", &image()[..1 << 20]);
    host.file("/opt/sepal/share/vmlinux", b"#!/bin/sh\n");
    let lines = String::from_utf8(host.check(&[]).stdout).unwrap();
    assert!(
        lines.contains("guest.erofs: it is truncated or no guest image"),
        "{lines}"
    );
    assert!(
        lines.contains("vmlinux: it is no uncompressed kernel"),
        "{lines}"
    );
}

#[test]
fn pods_are_asked_for_by_name_and_refused_in_one_sentence() {
    let state = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sepal"));
        command
            .arg("--state")
            .arg(state.path())
            .args(arguments)
            .output()
            .unwrap()
    };
    let list = run(&["list", "--json"]);
    assert_eq!(String::from_utf8(list.stdout).unwrap().trim(), "[]");
    for arguments in [["console", "web"].as_slice(), &["exec", "web", "--", "ls"]] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            said,
            "sepal: there is no pod \"web\" (sepal list shows them)\n"
        );
    }
    std::fs::create_dir_all(state.path().join("web-1/share")).unwrap();
    std::fs::write(state.path().join("web-1/console.log"), "[0.1] Linux\n").unwrap();
    assert_eq!(run(&["console", "web"]).stdout, b"[0.1] Linux\n");
    let said = String::from_utf8(run(&["exec", "web", "--", "ls"]).stderr).unwrap();
    assert!(
        said.starts_with("sepal: pod web-1: cannot reach the agent"),
        "{said}"
    );
    assert!(Path::new(state.path()).join("web-1").exists());
}
