//! The users of a pod that has a user namespace (`hostUsers: false`).
//!
//! Outside of the namespace the guest knows its users by the numbers that the host gives them: the
//! pod's range is the same in both kernels. So the file server hands numbers through, and what shows
//! files of the host with other owners does so on the host, by mounts that map ids
//! (mount_setattr(2), MOUNT_ATTR_IDMAP): volumes, and the lower directories of root file systems.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use oci_spec::runtime::LinuxIdMapping;
use protobuf::MessageField;
use sepal_protocol::agent::{IdRange, UserNamespace};
use sepal_protocol::cri;

use crate::sys;

/// Most ranges of a mapping that the kernel takes (user_namespaces(7)).
const MOST_RANGES: usize = 340;
/// Who owns what nobody of the namespace owns: the kernel's overflow id.
const NOBODY: u32 = 65534;

/// What is wrong with a mapping of ids.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("user namespace: there is no mapping of its {kind}s")]
    None { kind: &'static str },
    #[error("user namespace: its {kind}s are mapped in {count} ranges: {MOST_RANGES} are possible")]
    TooMany { kind: &'static str, count: usize },
    #[error("user namespace: the range {range} of its {kind}s is empty")]
    Empty { kind: &'static str, range: Range },
    #[error("user namespace: the range {range} of its {kind}s goes beyond the last id")]
    TooLong { kind: &'static str, range: Range },
    #[error("user namespace: the ranges {range} and {other} of its {kind}s overlap")]
    Overlap {
        kind: &'static str,
        range: Range,
        other: Range,
    },
    #[error("user namespace: {kind} 0 is not mapped: a container is made by its root")]
    NoRoot { kind: &'static str },
    #[error("user namespace: {text:?} is no mapping of ids: ranges are INSIDE:OUTSIDE:SIZE")]
    Malformed { text: String },
}

/// Ids that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first one in the namespace.
    pub inside: u32,
    /// The first one outside.
    pub outside: u32,
    /// How many there are.
    pub size: u32,
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:{}", self.inside, self.outside, self.size)
    }
}

impl From<&Self> for Range {
    fn from(given: &Self) -> Self {
        *given
    }
}

impl From<&LinuxIdMapping> for Range {
    fn from(given: &LinuxIdMapping) -> Self {
        Self {
            inside: given.container_id(),
            outside: given.host_id(),
            size: given.size(),
        }
    }
}

impl From<&cri::IDMapping> for Range {
    fn from(given: &cri::IDMapping) -> Self {
        Self {
            inside: given.container_id,
            outside: given.host_id,
            size: given.length,
        }
    }
}

/// Which ids of a user namespace are which outside of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Users {
    uids: Vec<Range>,
    gids: Vec<Range>,
}

impl Users {
    /// Of ranges as OCI's specs and CRI have them.
    ///
    /// # Errors
    /// The kernel would not take them.
    pub fn new<'a, R: 'a>(uids: &'a [R], gids: &'a [R]) -> Result<Self, Error>
    where
        Range: From<&'a R>,
    {
        Ok(Self {
            uids: checked("uid", uids.iter().map(Range::from).collect())?,
            gids: checked("gid", gids.iter().map(Range::from).collect())?,
        })
    }

    /// Of the options `uidmap=` and `gidmap=`, by which containerd says how a root file system is to be
    /// mounted; none where they are not both there.
    ///
    /// # Errors
    /// They are no mappings.
    pub fn of_options(options: &[String]) -> Result<Option<Self>, Error> {
        let find = |name| options.iter().find_map(|option| option.strip_prefix(name));
        let (Some(uids), Some(gids)) = (find(UID_OPTION), find(GID_OPTION)) else {
            return Ok(None);
        };
        Ok(Some(Self {
            uids: checked("uid", parse(uids)?)?,
            gids: checked("gid", parse(gids)?)?,
        }))
    }

    /// Refuses a namespace in which nobody could make a container.
    ///
    /// # Errors
    /// It has no root.
    pub fn with_root(self) -> Result<Self, Error> {
        for (kind, ranges) in [("uid", &self.uids), ("gid", &self.gids)] {
            if outside(ranges, 0).is_none() {
                return Err(Error::NoRoot { kind });
            }
        }
        Ok(self)
    }

    /// Who a user of the namespace is outside.
    pub fn uid(&self, inside: u32) -> u32 {
        outside(&self.uids, inside).unwrap_or(NOBODY)
    }

    /// Which group of the namespace is which outside.
    pub fn gid(&self, inside: u32) -> u32 {
        outside(&self.gids, inside).unwrap_or(NOBODY)
    }

    /// For the agent.
    pub fn message(&self) -> MessageField<UserNamespace> {
        let ranges = |ranges: &[Range]| {
            let range = |range: &Range| IdRange {
                inside: range.inside,
                outside: range.outside,
                size: range.size,
                ..Default::default()
            };
            ranges.iter().map(range).collect()
        };
        MessageField::some(UserNamespace {
            uids: ranges(&self.uids),
            gids: ranges(&self.gids),
            ..Default::default()
        })
    }

    fn namespace(&self) -> io::Result<OwnedFd> {
        let text = |ranges: &[Range]| {
            let line = |r: &Range| format!("{} {} {}\n", r.inside, r.outside, r.size);
            ranges.iter().map(line).collect::<String>()
        };
        sys::user_namespace(&text(&self.uids), &text(&self.gids))
    }
}

const UID_OPTION: &str = "uidmap=";
const GID_OPTION: &str = "gidmap=";

/// Whether a mount's option is for [`Users::of_options`].
pub fn is_option(option: &str) -> bool {
    option.starts_with(UID_OPTION) || option.starts_with(GID_OPTION)
}

/// How a mount shows the owners of its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap {
    /// Who owns what, as the files have it, and as the mount shows it.
    pub users: Users,
    /// Also what is mounted below it.
    pub recursive: bool,
}

/// The last user namespace that was made for mounts: those of a container have the same users.
#[derive(Debug, Default)]
pub struct Namespaces(Option<(Users, OwnedFd)>);

impl Namespaces {
    /// A namespace with these users, to map ids by.
    ///
    /// # Errors
    /// The kernel makes none.
    pub fn of(&mut self, users: &Users) -> io::Result<BorrowedFd<'_>> {
        if self.0.as_ref().is_none_or(|(last, _)| last != users) {
            self.0 = Some((users.clone(), users.namespace()?));
        }
        let made = self.0.as_ref().map(|(_, namespace)| namespace.as_fd());
        made.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn parse(text: &str) -> Result<Vec<Range>, Error> {
    let range = |part: &str| {
        let mut numbers = part.split(':').map(|number| number.parse().ok());
        let range = Range {
            inside: numbers.next()??,
            outside: numbers.next()??,
            size: numbers.next()??,
        };
        numbers.next().is_none().then_some(range)
    };
    let ranges = text.split(',').map(range).collect::<Option<_>>();
    ranges.ok_or_else(|| Error::Malformed { text: text.into() })
}

fn checked(kind: &'static str, ranges: Vec<Range>) -> Result<Vec<Range>, Error> {
    let count = ranges.len();
    match count {
        0 => return Err(Error::None { kind }),
        1..=MOST_RANGES => {}
        _ => return Err(Error::TooMany { kind, count }),
    }
    for (number, &range) in ranges.iter().enumerate() {
        if range.size == 0 {
            return Err(Error::Empty { kind, range });
        }
        // The highest number is no id: chown(2) takes it for "leave as it is".
        if range.inside.max(range.outside) > u32::MAX - range.size {
            return Err(Error::TooLong { kind, range });
        }
        let meet = |a: u32, b: u32, other: &Range| a < b + other.size && b < a + range.size;
        let overlaps = |other: &&Range| {
            meet(range.inside, other.inside, other) || meet(range.outside, other.outside, other)
        };
        // Those before have been checked.
        if let Some(&other) = ranges.iter().take(number).find(overlaps) {
            return Err(Error::Overlap { kind, range, other });
        }
    }
    Ok(ranges)
}

fn outside(ranges: &[Range], inside: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = inside.checked_sub(range.inside)?;
        (offset < range.size).then(|| range.outside + offset)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(map: &str) -> Result<Users, Error> {
        let options = [format!("uidmap={map}"), format!("gidmap={map}")];
        Users::of_options(&options).map(Option::unwrap)
    }

    #[test]
    fn ids_are_mapped_by_their_range_and_others_are_nobodys() {
        let users = users("0:100000:1000,2000:200000:1").unwrap();
        assert_eq!((users.uid(0), users.gid(999)), (100_000, 100_999));
        assert_eq!((users.uid(2000), users.uid(1000)), (200_000, NOBODY));
        assert_eq!(users.message().uids[1].outside, 200_000);
    }

    #[test]
    fn what_the_kernel_would_refuse_is_refused_with_its_range() {
        for (map, text) in [
            ("0:1000:0", "the range 0:1000:0 of its uids is empty"),
            ("0:4294901760:65536", "goes beyond the last id"),
            ("4294967295:0:1", "goes beyond the last id"),
            (
                "0:1000:10,9:5000:10",
                "9:5000:10 and 0:1000:10 of its uids overlap",
            ),
            ("0:1000:10,10:1009:10", "overlap"),
            ("0:1000", "no mapping of ids"),
            ("0:1000:1:1", "no mapping of ids"),
            ("", "no mapping of ids"),
        ] {
            let message = users(map).unwrap_err().to_string();
            assert!(message.contains(text), "{map}: {message}");
        }
        assert!(users("0:4294901759:65536").is_ok());
        let many: Vec<_> = (0..341).map(|n| format!("{n}:{n}:1")).collect();
        let message = users(&many.join(",")).unwrap_err().to_string();
        assert!(message.contains("341 ranges"), "{message}");
        let none = Users::new::<LinuxIdMapping>(&[], &[]).unwrap_err();
        assert!(matches!(none, Error::None { kind: "uid" }), "{none}");
    }

    #[test]
    fn a_pod_has_a_root() {
        assert!(users("0:1000:1").unwrap().with_root().is_ok());
        let message = users("1:1000:1").unwrap().with_root().unwrap_err();
        assert!(message.to_string().contains("uid 0 is not mapped"));
    }

    #[test]
    fn a_root_file_system_is_mapped_when_both_options_say_so() {
        let one = ["uidmap=0:1000:1".to_owned(), "lowerdir=/a".to_owned()];
        assert_eq!(Users::of_options(&one).unwrap(), None);
        assert!(is_option(&one[0]) && !is_option(&one[1]));
    }
}
