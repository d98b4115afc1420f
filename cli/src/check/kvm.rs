//! KVM: is it there, may we, and of which flavour is it.

use std::io::ErrorKind;
use std::process::Command;

use sepal_protocol::config::Config;
use sepal_protocol::vm::KvmFlavour;
use serde::Deserialize;

use super::{Finding, Host};

const CHECK: &str = "kvm";

/// What of `sepal-vmm --probe` matters here.
#[derive(Debug, Deserialize)]
struct Probe {
    flavour: KvmFlavour,
}

/// The flavour, where the VMM could tell.
pub fn look(host: &Host, config: &Config) -> (Option<KvmFlavour>, Finding) {
    if !host.path("/dev/kvm").exists() {
        let remedy = "load kvm_intel or kvm_amd; if that is refused, turn virtualization on in the \
            firmware, or nested virtualization in the hypervisor below";
        return (None, Finding::fail(CHECK, "there is no /dev/kvm", remedy));
    }
    if let Err(error) = host.device("/dev/kvm") {
        let remedy = match error.kind() {
            ErrorKind::PermissionDenied => "run as root, which containerd does",
            _ => "unload and load kvm_intel or kvm_amd",
        };
        return (
            None,
            Finding::fail(CHECK, format!("cannot open /dev/kvm: {error}"), remedy),
        );
    }
    let vmm = host.path(&config.vmm);
    let output = match Command::new(&vmm).arg("--probe").output() {
        Ok(output) => output,
        Err(error) => {
            let message = format!(
                "/dev/kvm opens; its flavour is unknown, as {} does not run: {error}",
                vmm.display()
            );
            return (
                None,
                Finding::warn(CHECK, message, "install Sepal's programs"),
            );
        }
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().last().unwrap_or("it does not say why");
        let message = format!("/dev/kvm opens, but no virtual machine can be made: {said}");
        let remedy =
            "see whether another hypervisor holds the processor, and dmesg for kvm's reason";
        return (None, Finding::fail(CHECK, message, remedy));
    }
    match serde_json::from_slice::<Probe>(&output.stdout) {
        Ok(Probe { flavour }) => {
            let message = match flavour {
                KvmFlavour::Hardware => "/dev/kvm works, on VT-x or AMD-V",
                KvmFlavour::Deprivileged => {
                    "/dev/kvm works; it runs guests deprivileged, with a kernel made for that"
                }
            };
            (Some(flavour), Finding::ok(CHECK, message))
        }
        Err(error) => {
            let message = format!("{} --probe answers what is none: {error}", vmm.display());
            (
                None,
                Finding::fail(CHECK, message, "install programs of one version"),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::Severity;
    use super::*;

    fn host(probe: Option<&str>) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().unwrap();
        let vmm = root.path().join("opt/sepal/bin/sepal-vmm");
        std::fs::create_dir_all(vmm.parent().unwrap()).unwrap();
        std::fs::create_dir(root.path().join("dev")).unwrap();
        std::fs::write(root.path().join("dev/kvm"), "").unwrap();
        if let Some(script) = probe {
            std::fs::write(&vmm, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&vmm, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let host = Host {
            root: root.path().into(),
        };
        (root, host)
    }

    #[test]
    fn the_vmm_tells_the_flavour() {
        let (_root, host) = host(Some(
            r#"echo '{"flavour":"deprivileged","api_version":12}'"#,
        ));
        let (flavour, finding) = look(&host, &Config::default());
        assert_eq!(
            (flavour, finding.severity),
            (Some(KvmFlavour::Deprivileged), Severity::Ok)
        );
    }

    #[test]
    fn what_is_wrong_is_told_apart() {
        for (probe, severity, words) in [
            (Some("echo no vcpu >&2; exit 14"), Severity::Fail, "no vcpu"),
            (Some("echo hello"), Severity::Fail, "answers what is none"),
            (None, Severity::Warn, "does not run"),
        ] {
            let (_root, host) = host(probe);
            let (flavour, finding) = look(&host, &Config::default());
            assert_eq!((flavour, finding.severity), (None, severity));
            assert!(finding.message.contains(words), "{}", finding.message);
        }
        let (root, host) = host(None);
        std::fs::remove_file(root.path().join("dev/kvm")).unwrap();
        assert_eq!(
            look(&host, &Config::default()).1.message,
            "there is no /dev/kvm"
        );
    }
}
