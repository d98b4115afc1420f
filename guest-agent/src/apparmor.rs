//! AppArmor's policy: the host's, for this guest's kernel to enforce.

use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::error::{Context, Error, Result};

/// Where Linux takes policy (security/apparmor/apparmorfs.c).
const PLACE: &str = "/sys/kernel/security";
const REPLACE: &str = "/sys/kernel/security/apparmor/.replace";

/// Loads a binary policy, or puts it in the place of what was loaded under the same names.
///
/// # Errors
/// The kernel knows no AppArmor, or refuses the policy.
pub fn load(policy: &[u8]) -> Result<()> {
    if !Path::new(REPLACE).exists() {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        // Nobody has wanted it before. Containers have mounts of their own and do not see it.
        mount(
            Some("securityfs"),
            PLACE,
            Some("securityfs"),
            flags,
            None::<&str>,
        )
        .map_err(std::io::Error::from)
        .context(|| format!("cannot mount {PLACE}"))?;
    }
    // One write: the kernel takes each for a policy of its own.
    std::fs::write(REPLACE, policy).map_err(|error| {
        Error::Invalid(format!(
            "the guest's kernel does not take the host's AppArmor policy: {error}"
        ))
    })
}
