//! AppArmor profiles that specs name (`process.apparmorProfile` of the OCI specification).
//!
//! A profile is the host's: its administrator has loaded it, or containerd has. What it says is for the
//! guest's kernel to enforce, since the processes are there; so the host's policy, as its kernel keeps it,
//! goes to the guest with the container.

use std::io::Read;
use std::path::Path;

use oci_spec::runtime::Spec;

/// Where Linux shows what is loaded, a directory for each profile
/// (security/apparmor/apparmorfs.c).
pub const LOADED: &str = "/sys/kernel/security/apparmor/policy/profiles";
/// Largest policy that a guest is given, in bytes: those of containers have some ten thousand.
const MOST: u64 = 1 << 20;
/// Profile of processes that have none.
const UNCONFINED: &str = "unconfined";

/// Why a container cannot have its profile.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error(
        "AppArmor profile {name:?} is not loaded on the host; load it with apparmor_parser, or leave it out"
    )]
    NotLoaded { name: String },
    #[error(
        "AppArmor profile {name:?}: cannot read its policy from the host's kernel ({source}); \
         it has to be built with CONFIG_SECURITY_APPARMOR_EXPORT_BINARY"
    )]
    Unreadable {
        name: String,
        source: std::io::Error,
    },
    #[error("AppArmor profile {name:?}: its policy has more than {MOST} bytes")]
    TooLarge { name: String },
}

/// The policy in which a container's profile is, in the form that the kernel loads; nothing when the
/// container has no profile. `loaded` is [`LOADED`].
///
/// # Errors
/// The host does not have it.
pub fn policy(spec: &Spec, loaded: &Path) -> Result<Vec<u8>, Error> {
    let process = spec.process().as_ref();
    let profile = process.and_then(|process| process.apparmor_profile().clone());
    match profile.filter(|name| !name.is_empty() && name != UNCONFINED) {
        Some(name) => read(name, loaded),
        None => Ok(Vec::new()),
    }
}

fn read(name: String, loaded: &Path) -> Result<Vec<u8>, Error> {
    // Directories have names like the profiles', with other characters in the place of some.
    let all = std::fs::read_dir(loaded).into_iter().flatten().flatten();
    let mut all = all.map(|entry| entry.path());
    let is_it = |directory: &std::path::PathBuf| {
        std::fs::read_to_string(directory.join("name")).is_ok_and(|found| found.trim() == name)
    };
    let Some(found) = all.find(is_it) else {
        return Err(Error::NotLoaded { name });
    };
    let mut policy = Vec::new();
    let file = std::fs::File::open(found.join("raw_data"));
    match file.and_then(|file| file.take(MOST + 1).read_to_end(&mut policy)) {
        Ok(_) if policy.len() as u64 > MOST => Err(Error::TooLarge { name }),
        Ok(_) => Ok(policy),
        Err(source) => Err(Error::Unreadable { name, source }),
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{ProcessBuilder, SpecBuilder};

    use super::*;

    fn spec(profile: &str) -> Spec {
        let process = ProcessBuilder::default().apparmor_profile(profile);
        let process = process.build().unwrap();
        SpecBuilder::default().process(process).build().unwrap()
    }

    /// As apparmorfs shows one profile.
    fn host() -> tempfile::TempDir {
        let host = tempfile::tempdir().unwrap();
        let one = host.path().join("usr.sbin.one.7");
        std::fs::create_dir(&one).unwrap();
        std::fs::write(one.join("name"), "/usr/sbin/one\n").unwrap();
        std::fs::write(one.join("raw_data"), b"policy").unwrap();
        host
    }

    #[test]
    fn the_policy_is_that_of_the_profile_of_this_name() {
        let host = host();
        let of = |profile| policy(&spec(profile), host.path());
        assert_eq!(of("/usr/sbin/one").unwrap(), b"policy");
        assert!(of("").unwrap().is_empty());
        assert!(of("unconfined").unwrap().is_empty());
    }

    #[test]
    fn a_profile_that_the_host_does_not_have_is_refused() {
        let host = host();
        let missing = policy(&spec("two"), host.path()).unwrap_err();
        assert!(missing.to_string().contains("\"two\" is not loaded"));
        let nowhere = policy(&spec("two"), Path::new("/nonexistent")).unwrap_err();
        assert!(matches!(nowhere, Error::NotLoaded { .. }));
    }

    #[test]
    fn a_policy_that_cannot_be_had_is_refused() {
        let host = host();
        let policy_of_one = host.path().join("usr.sbin.one.7/raw_data");
        let refused = || policy(&spec("/usr/sbin/one"), host.path()).unwrap_err();
        std::fs::write(&policy_of_one, vec![0; MOST as usize + 1]).unwrap();
        assert!(matches!(refused(), Error::TooLarge { .. }));
        std::fs::remove_file(&policy_of_one).unwrap();
        assert!(matches!(refused(), Error::Unreadable { .. }));
    }
}
