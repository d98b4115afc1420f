//! On which of the node's CPUs, and from which of its memory nodes, a pod's containers are to be served.
//!
//! Containers tell it each for itself (`linux.resources.cpu.cpus` and `mems` of the OCI specification),
//! as the kubelet's CPU and memory managers do. Their processes run on the guest's CPUs, which have
//! other numbers: it is the pod, with its vCPUs, that has to be where its containers may be.

use std::collections::{BTreeMap, BTreeSet};

use oci_spec::runtime::LinuxResources;

use crate::error::Error;

/// Longest list of the kernel's: CONFIG_NR_CPUS is 8192 at most on x86.
const MAX: u32 = 8192;

/// CPUs, or memory nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Set(BTreeSet<u32>);

impl Set {
    /// From the kernel's list format, cpuset(7). An empty one is none.
    fn parse(text: &str) -> Option<Result<Self, Error>> {
        let text = text.trim();
        if text.is_empty() {
            return None;
        }
        let number = |text: &str| text.trim().parse::<u32>();
        let mut set = BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            match (number(first), number(last)) {
                (Ok(first), Ok(last)) if first <= last && last < MAX => set.extend(first..=last),
                _ => {
                    return Some(Err(Error::Invalid {
                        what: "CPU set",
                        reason: format!("{text:?} is not a list like 0-3,8"),
                    }));
                }
            }
        }
        Some(Ok(Self(set)))
    }
}

impl std::fmt::Display for Set {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let numbers: Vec<_> = self.0.iter().map(u32::to_string).collect();
        f.write_str(&numbers.join(","))
    }
}

/// Where one container, or a pod, is to be; `None` is anywhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// CPUs.
    pub cpus: Option<Set>,
    /// Memory nodes.
    pub mems: Option<Set>,
}

impl Placement {
    /// That of a container's spec.
    ///
    /// # Errors
    /// A list that is none.
    pub fn of(resources: Option<&LinuxResources>) -> Result<Self, Error> {
        resources.map_or_else(
            || Ok(Self::default()),
            |given| Self::default().changed(given),
        )
    }

    /// The same with what is given anew.
    ///
    /// # Errors
    /// A list that is none.
    pub fn changed(self, given: &LinuxResources) -> Result<Self, Error> {
        let cpu = given.cpu().as_ref();
        let parse = |list: Option<&String>| list.and_then(|text| Set::parse(text)).transpose();
        Ok(Self {
            cpus: parse(cpu.and_then(|cpu| cpu.cpus().as_ref()))?.or(self.cpus),
            mems: parse(cpu.and_then(|cpu| cpu.mems().as_ref()))?.or(self.mems),
        })
    }
}

/// Where the containers of a pod are to be, by their accounts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places(BTreeMap<String, Placement>);

impl Places {
    /// A container is to be there.
    pub fn set(&mut self, account: &str, placement: Placement) {
        self.0.insert(account.into(), placement);
    }

    /// Where a container is to be.
    pub fn get(&self, account: &str) -> Placement {
        self.0.get(account).cloned().unwrap_or_default()
    }

    /// A container is gone.
    pub fn forget(&mut self, account: &str) {
        self.0.remove(account);
    }

    /// Where the pod has to be: where any of its containers may be.
    pub fn pod(&self) -> Placement {
        let union = |of: fn(&Placement) -> Option<&Set>| {
            let sets: Option<Vec<_>> = self.0.values().map(of).collect();
            let all: BTreeSet<_> = sets?.iter().flat_map(|set| set.0.iter().copied()).collect();
            Some(Set(all)).filter(|set| !set.0.is_empty())
        };
        Placement {
            cpus: union(|placement| placement.cpus.as_ref()),
            mems: union(|placement| placement.mems.as_ref()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(cpus: &str) -> Result<Placement, Error> {
        let resources = serde_json::json!({ "cpu": { "cpus": cpus, "mems": "0" } });
        Placement::of(Some(&serde_json::from_value(resources).unwrap()))
    }

    fn shown(places: &Places) -> String {
        places
            .pod()
            .cpus
            .map_or_else(String::new, |set| set.to_string())
    }

    #[test]
    fn a_pod_is_where_any_of_its_containers_may_be() {
        let mut places = Places::default();
        places.set("a", placement("2-3").unwrap());
        assert_eq!(shown(&places), "2,3");
        places.set("b", placement("0,3").unwrap());
        assert_eq!(shown(&places), "0,2,3");
        places.set("c", Placement::default());
        assert_eq!(shown(&places), "");
        places.forget("c");
        places.set("a", placement("7").unwrap());
        assert_eq!(shown(&places), "0,3,7");
        assert_eq!(places.pod().mems.unwrap().to_string(), "0");
    }

    #[test]
    fn an_update_without_a_set_changes_none() {
        let before = placement("1").unwrap();
        let same = before.clone().changed(&LinuxResources::default()).unwrap();
        assert_eq!(same, before);
        assert_eq!(placement("").unwrap().cpus, None);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for text in ["x", "3-1", "0-", "-1", "0,,1", "0-4294967295", "8192"] {
            let message = placement(text).unwrap_err().to_string();
            assert!(message.contains(text), "{message}");
        }
    }
}
