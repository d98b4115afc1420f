//! The host itself: cgroups, memory, limits, kernel.

use sepal_protocol::config::Config;

use super::{Finding, Host};

/// Controllers that hold a pod's processes to the pod's limits.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Inodes that a busy container remembers; each may cost the file server a descriptor.
const DESCRIPTORS: u64 = 100_000;
/// The oldest kernel with all that is used on the host (statx's mount ids).
const KERNEL: (u32, u32) = (5, 8);

pub fn look(host: &Host, config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(release) = host.text("/proc/sys/kernel/osrelease") {
        findings.push(kernel(release.trim()));
    }
    findings.push(cgroups(host));
    findings.extend(memory(host, config));
    findings.extend(descriptors(host));
    findings
}

fn kernel(release: &str) -> Finding {
    const CHECK: &str = "host";
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= KERNEL => {
            Finding::ok(CHECK, format!("Linux {release}"))
        }
        _ => {
            let (major, minor) = KERNEL;
            let message = format!("Linux {release} is older than {major}.{minor}");
            Finding::fail(
                CHECK,
                message,
                format!("install Linux {major}.{minor} or newer"),
            )
        }
    }
}

fn cgroups(host: &Host) -> Finding {
    const CHECK: &str = "cgroup";
    let (version, have): (_, Vec<String>) = match host.text("/sys/fs/cgroup/cgroup.controllers") {
        Some(controllers) => (
            "v2",
            controllers.split_whitespace().map(String::from).collect(),
        ),
        None => {
            // proc(5), /proc/cgroups: name, hierarchy, cgroups, enabled; mounted where not 0.
            let text = host.text("/proc/cgroups").unwrap_or_default();
            let enabled = text
                .lines()
                .filter(|line| !line.starts_with('#'))
                .filter_map(|line| {
                    let fields: Vec<&str> = line.split_whitespace().collect();
                    (fields.len() == 4 && fields[1] != "0" && fields[3] == "1")
                        .then(|| fields[0].to_owned())
                });
            ("v1", enabled.collect())
        }
    };
    let missing: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|wanted| !have.iter().any(|name| name == wanted))
        .collect();
    if missing.is_empty() {
        return Finding::ok(
            CHECK,
            format!("cgroup {version} with {}", CONTROLLERS.join(", ")),
        );
    }
    let message = format!("cgroup {version} lacks {}", missing.join(", "));
    Finding::warn(
        CHECK,
        message,
        "mount cgroup v2 at /sys/fs/cgroup; limits on the host are not kept",
    )
}

fn memory(host: &Host, config: &Config) -> Vec<Finding> {
    const CHECK: &str = "memory";
    let Some(text) = host.text("/proc/meminfo") else {
        return Vec::new();
    };
    let value = |name: &str| -> Option<u64> {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let mut findings = Vec::new();
    if let Some(kilobytes) = value("MemAvailable") {
        let (available, pod) = (kilobytes / 1024, config.memory + config.memory_overhead);
        let pods = available / pod.max(1);
        let message = format!(
            "{available} MiB are available; a pod may take up to {pod} MiB, without limits of its own"
        );
        findings.push(if pods == 0 {
            Finding::warn(
                CHECK,
                message,
                "free memory, or lower memory in the configuration",
            )
        } else {
            Finding::ok(CHECK, message)
        });
    }
    if config.hugepages {
        let (free, size) = (
            value("HugePages_Free").unwrap_or(0),
            value("Hugepagesize").unwrap_or(0),
        );
        let megabytes = free * size / 1024;
        let message = format!("{megabytes} MiB of huge pages are free, of which pods shall live");
        findings.push(if megabytes < config.memory {
            let remedy = "raise vm.nr_hugepages, or set hugepages = false in the configuration";
            Finding::fail("hugepages", message, remedy)
        } else {
            Finding::ok("hugepages", message)
        });
    }
    findings
}

fn descriptors(host: &Host) -> Option<Finding> {
    const CHECK: &str = "files";
    // The shim and the file server inherit containerd's limit; ours is the best guess at it.
    let limits = host.text("/proc/self/limits").filter(|_| host.is_ours())?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    let hard = line.split_whitespace().nth(1)?;
    let limit = hard.parse().unwrap_or(u64::MAX);
    // With CAP_SYS_RESOURCE (bit 24) the file server raises it by itself.
    let status = host.text("/proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    let may_raise = u64::from_str_radix(effective.trim(), 16).ok()? & (1 << 24) != 0;
    Some(if limit >= DESCRIPTORS || may_raise {
        Finding::ok(CHECK, "the file server may open as many files as it needs")
    } else {
        let message = format!(
            "a process may open {limit} files and cannot raise that: containers with more files in \
             use than that see ENFILE"
        );
        Finding::warn(
            CHECK,
            message,
            "run containerd with LimitNOFILE=infinity or CAP_SYS_RESOURCE",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Severity, host_with as host};
    use super::*;

    #[test]
    fn both_versions_of_cgroups_are_known() {
        let v1 = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t2\t9\t1\nmemory\t3\t9\t1\n";
        let (_root, v1_host) = host(&[("/proc/cgroups", v1)]);
        let finding = cgroups(&v1_host);
        assert_eq!(finding.severity, Severity::Warn);
        assert_eq!(finding.message, "cgroup v1 lacks pids");
        let (_root, v2_host) = host(&[(
            "/sys/fs/cgroup/cgroup.controllers",
            "cpuset cpu memory pids\n",
        )]);
        assert_eq!(cgroups(&v2_host).severity, Severity::Ok);
    }

    #[test]
    fn memory_must_suffice_for_one_pod() {
        let little = "MemTotal: 400000 kB\nMemAvailable:     200000 kB\n";
        let (_root, little) = host(&[("/proc/meminfo", little)]);
        let config = Config::default();
        assert_eq!(memory(&little, &config)[0].severity, Severity::Warn);
        let huge = "MemAvailable: 9000000 kB\nHugePages_Free: 256\nHugepagesize: 2048 kB\n";
        let (_root, huge) = host(&[("/proc/meminfo", huge)]);
        let config = Config {
            hugepages: true,
            ..config
        };
        let severities: Vec<_> = memory(&huge, &config).iter().map(|f| f.severity).collect();
        assert_eq!(severities, [Severity::Ok, Severity::Ok]);
    }

    #[test]
    fn old_kernels_are_refused() {
        assert_eq!(kernel("5.4.0-42-generic").severity, Severity::Fail);
        for release in ["5.8.0", "6.12.117+deb13-amd64", "10.0.1"] {
            assert_eq!(kernel(release).severity, Severity::Ok, "{release}");
        }
    }
}
