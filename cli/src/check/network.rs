//! What a pod's network takes: tap devices, tc to redirect between a tap and CNI's interface, and
//! vhost-net where there is one.

use super::tc;
use super::{Finding, Host};

pub fn look(host: &Host) -> Vec<Finding> {
    let mut findings = vec![tun(host), vhost(host)];
    if host.is_ours() {
        findings.push(redirect());
    }
    findings
}

fn tun(host: &Host) -> Finding {
    const CHECK: &str = "tun";
    match host.device("/dev/net/tun") {
        Ok(_) => Finding::ok(CHECK, "/dev/net/tun opens"),
        Err(error) => {
            let remedy = "modprobe tun, and again at each boot (/etc/modules-load.d)";
            Finding::fail(CHECK, format!("cannot open /dev/net/tun: {error}"), remedy)
        }
    }
}

fn vhost(host: &Host) -> Finding {
    const CHECK: &str = "vhost-net";
    match host.device("/dev/vhost-net") {
        Ok(_) => Finding::ok(CHECK, "/dev/vhost-net opens"),
        Err(error) => {
            let message =
                format!("cannot open /dev/vhost-net ({error}): packets pass through the VMM");
            Finding::warn(CHECK, message, "modprobe vhost_net, for more throughput")
        }
    }
}

/// Does in a network namespace of its own what the shim does in a pod's.
fn redirect() -> Finding {
    const CHECK: &str = "tc";
    match tc::try_redirect() {
        Ok(()) => Finding::ok(
            CHECK,
            "tc redirects between interfaces (ingress, u32, mirred)",
        ),
        Err(tc::Error::Namespace(error)) => {
            let message = format!("not tried, as no network namespace can be made: {error}");
            Finding::warn(CHECK, message, "run as root")
        }
        Err(error) => {
            let remedy = "modprobe sch_ingress cls_u32 act_mirred, and again at each boot \
                (/etc/modules-load.d)";
            Finding::fail(CHECK, error.to_string(), remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    #[test]
    fn a_missing_tun_is_a_failure_and_a_missing_vhost_a_warning() {
        let root = tempfile::tempdir().unwrap();
        let host = Host {
            root: root.path().into(),
        };
        let severities: Vec<_> = look(&host).iter().map(|finding| finding.severity).collect();
        assert_eq!(severities, [Severity::Fail, Severity::Warn]);
        std::fs::create_dir_all(root.path().join("dev/net")).unwrap();
        std::fs::write(root.path().join("dev/net/tun"), "").unwrap();
        std::fs::write(root.path().join("dev/vhost-net"), "").unwrap();
        assert!(
            look(&host)
                .iter()
                .all(|finding| finding.severity == Severity::Ok)
        );
    }
}
