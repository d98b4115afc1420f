//! Sepal's own files: programs, guest kernel, guest image; there, whole, and of one version.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use sepal_protocol::config::Config;
use sepal_protocol::image::Image;
use sepal_protocol::vm::KvmFlavour;

use super::elf;
use super::{Finding, Host};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const INSTALL: &str = "run deploy/install, or name another file in the configuration";
/// What kernel-config/ appends to the version of each flavour.
const SUFFIXES: [(&str, KvmFlavour); 2] = [
    ("-sepal-deprivileged", KvmFlavour::Deprivileged),
    ("-sepal", KvmFlavour::Hardware),
];

/// The VMM and the file server.
pub fn programs(host: &Host, config: &Config) -> Vec<Finding> {
    [&config.vmm, &config.fs]
        .map(|path| program(host, path))
        .into()
}

fn program(host: &Host, path: &Path) -> Finding {
    const CHECK: &str = "program";
    let (shown, path) = (path.display(), host.path(path));
    match path.metadata() {
        Err(error) => return Finding::fail(CHECK, format!("{shown}: {error}"), INSTALL),
        Ok(metadata) if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 => {
            return Finding::fail(CHECK, format!("{shown} is not an executable file"), INSTALL);
        }
        Ok(_) => {}
    }
    match version_of(&path, "--version") {
        Some(version) if version == VERSION => Finding::ok(CHECK, format!("{shown} {version}")),
        Some(version) => {
            let message = format!("{shown} is of version {version}, this program of {VERSION}");
            Finding::fail(CHECK, message, "install programs of one version")
        }
        None => Finding::fail(CHECK, format!("{shown} does not tell its version"), INSTALL),
    }
}

/// The last word of what a program of ours says of its version.
pub fn version_of(program: &Path, option: &str) -> Option<String> {
    let output = Command::new(program).arg(option).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let word = text
        .split_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    output.status.success().then_some(word?.to_owned())
}

/// The guest kernel for the flavour of KVM found; both kernels where none was.
pub fn kernel(host: &Host, config: &Config, flavour: Option<KvmFlavour>) -> Vec<Finding> {
    let of = |wanted| match wanted {
        KvmFlavour::Hardware => (&config.kernel, wanted),
        KvmFlavour::Deprivileged => (&config.kernel_deprivileged, wanted),
    };
    match flavour {
        Some(flavour) => vec![kernel_of(host, of(flavour))],
        // A host without working KVM needs one of them later.
        None => [KvmFlavour::Hardware, KvmFlavour::Deprivileged]
            .map(of)
            .into_iter()
            .filter(|(path, _)| host.path(path).exists())
            .map(|kernel| kernel_of(host, kernel))
            .collect(),
    }
}

fn kernel_of(host: &Host, (path, wanted): (&std::path::PathBuf, KvmFlavour)) -> Finding {
    const CHECK: &str = "kernel";
    let shown = path.display();
    let version = match elf::kernel_version(&host.path(path)) {
        Ok(version) => version,
        Err(error) => {
            let remedy = "run kernel-config/build and deploy/install, or name another file in the \
                configuration";
            return Finding::fail(CHECK, format!("{shown}: {error}"), remedy);
        }
    };
    let flavour = SUFFIXES
        .iter()
        .find(|(suffix, _)| version.ends_with(suffix));
    match flavour {
        Some((_, flavour)) if *flavour == wanted => {
            Finding::ok(CHECK, format!("{shown} is Linux {version}"))
        }
        Some(_) => {
            let message = format!("{shown} is Linux {version}, made for the other flavour of KVM");
            Finding::fail(
                CHECK,
                message,
                "exchange kernel and kernel_deprivileged in the configuration",
            )
        }
        None => {
            let message = format!("{shown} is Linux {version}, not one of Sepal's own kernels");
            Finding::warn(
                CHECK,
                message,
                "be sure that it has what kernel-config/common.config asks for",
            )
        }
    }
}

/// The guest image, or both where the debug image is in use.
pub fn image(host: &Host, config: &Config) -> Vec<Finding> {
    let mut findings = vec![image_of(host, config.guest_image())];
    if let Some(initrd) = &config.initrd {
        let path = host.path(initrd);
        findings.push(match std::fs::File::open(&path) {
            Ok(_) => Finding::ok("image", format!("{} is there", initrd.display())),
            Err(error) => Finding::fail("image", format!("{}: {error}", initrd.display()), INSTALL),
        });
    }
    if config.debug {
        let message = "the debug image is in use: root of this host can enter guests";
        findings.push(Finding::warn(
            "image",
            message,
            "set debug = false when you are done",
        ));
    }
    findings
}

fn image_of(host: &Host, path: &Path) -> Finding {
    const CHECK: &str = "image";
    let shown = path.display();
    match Image::read(&host.path(path)) {
        Ok(image) if image.version == VERSION => {
            let Image {
                version,
                variant,
                size,
            } = image;
            Finding::ok(
                CHECK,
                format!("{shown} is {version} {variant}, {} MiB", size >> 20),
            )
        }
        Ok(image) => {
            let message = format!(
                "{shown} is of version {}, this program of {VERSION}",
                image.version
            );
            Finding::fail(CHECK, message, "run rootfs/build and deploy/install")
        }
        Err(error) => {
            let remedy = "run rootfs/build and deploy/install, or name another file in the \
                configuration";
            Finding::fail(CHECK, format!("{shown}: {error}"), remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    fn host() -> (tempfile::TempDir, Host, Config) {
        let root = tempfile::tempdir().unwrap();
        let host = Host {
            root: root.path().into(),
        };
        std::fs::create_dir_all(host.path("/opt/sepal/share")).unwrap();
        std::fs::create_dir_all(host.path("/opt/sepal/bin")).unwrap();
        (root, host, Config::default())
    }

    #[test]
    fn a_kernel_must_be_of_the_flavour_found() {
        let (_root, host, config) = host();
        let put = |version: &str| {
            std::fs::write(host.path(&config.kernel), elf::sample(version)).unwrap();
            kernel(&host, &config, Some(KvmFlavour::Hardware)).remove(0)
        };
        assert_eq!(put("6.12.117-sepal").severity, Severity::Ok);
        assert_eq!(put("6.12.117-sepal-deprivileged").severity, Severity::Fail);
        assert_eq!(put("6.1.0-13-cloud-amd64").severity, Severity::Warn);
        let other = kernel(&host, &config, Some(KvmFlavour::Deprivileged)).remove(0);
        assert_eq!(other.severity, Severity::Fail);
        assert!(
            other.message.contains("vmlinux-deprivileged: No such file"),
            "{}",
            other.message
        );
        assert_eq!(kernel(&host, &config, None).len(), 1);
    }

    #[test]
    fn an_image_must_be_whole_and_of_our_version() {
        let (_root, host, config) = host();
        let put = |version: &str, length: usize| {
            let mut bytes = vec![0; (4 << 20) - 4096];
            let trailer =
                format!("sepal guest image 1\nversion={version}\nvariant=release\nsize=4194304\n");
            bytes.extend(trailer.as_bytes());
            bytes.resize(4 << 20, 0);
            bytes.truncate(length);
            std::fs::write(host.path(&config.image), bytes).unwrap();
            image(&host, &config).remove(0)
        };
        assert_eq!(put(VERSION, 4 << 20).severity, Severity::Ok);
        assert!(
            put("0.0.0", 4 << 20)
                .message
                .contains("is of version 0.0.0")
        );
        assert!(put(VERSION, 3 << 20).message.contains("truncated"));
    }

    #[test]
    fn programs_must_run_and_be_of_our_version() {
        let (_root, host, config) = host();
        let put = |mode: u32, says: &str| {
            let path = host.path(&config.fs);
            std::fs::write(&path, format!("#!/bin/sh\necho {says}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            program(&host, &config.fs)
        };
        assert_eq!(
            put(0o755, &format!("sepal-fs {VERSION}")).severity,
            Severity::Ok
        );
        assert!(
            put(0o755, "sepal-fs 0.0.0")
                .message
                .contains("is of version 0.0.0")
        );
        assert!(put(0o644, "").message.contains("not an executable file"));
        assert!(program(&host, &config.vmm).message.contains("No such file"));
    }

    #[test]
    fn the_debug_image_in_use_is_a_warning() {
        let (_root, host, config) = host();
        let config = Config {
            debug: true,
            ..config
        };
        let findings = image(&host, &config);
        assert!(findings[0].message.contains("guest-debug.erofs"));
        assert_eq!(findings[1].severity, Severity::Warn);
    }
}
