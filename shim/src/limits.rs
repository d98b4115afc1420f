//! Limits of a pod's containers, and what they come to for the pod.
//!
//! Kubernetes tells what a pod may use in all when the pod is made, and later only what one container
//! may: the [`Ledger`] keeps the sum.

use std::collections::BTreeMap;

use oci_spec::runtime::{LinuxHugepageLimit, LinuxResources};

use crate::annotations::{self, Annotations, CriResources};

/// Period of a CPU quota where the spec has none: the kernel's default, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;
/// A whole CPU.
pub const CPU: u64 = 1_000_000;
/// What the OCI specification calls the huge pages that are offered.
const HUGE_PAGE: &str = "2MB";

/// What one container may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    memory: Option<u64>,
    /// Microseconds of CPU time in each period.
    quota: Option<u64>,
    /// Microseconds.
    period: Option<u64>,
    /// Bytes of huge pages of 2 MiB, which are no part of the memory.
    huge: u64,
}

/// What a pod may use in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes.
    pub memory: Option<u64>,
    /// Millionths of a CPU.
    pub cpu: Option<u64>,
}

impl Limits {
    /// Those of a container's spec.
    pub fn of(resources: Option<&LinuxResources>) -> Self {
        resources.map_or_else(Self::default, |given| Self::default().changed(given))
    }

    /// The same with what is given anew. Zero is what was; less than zero is no limit.
    pub fn changed(&self, given: &LinuxResources) -> Self {
        let memory = given.memory().and_then(|memory| memory.limit());
        let cpu = given.cpu().as_ref();
        let period = cpu.and_then(|cpu| cpu.period()).filter(|p| *p > 0);
        let huge = given.hugepage_limits().iter().flatten();
        let huge = huge.filter(|limit| limit.page_size() == HUGE_PAGE);
        Self {
            memory: anew(self.memory, memory),
            quota: anew(self.quota, cpu.and_then(|cpu| cpu.quota())),
            period: period.or(self.period),
            huge: huge
                .map(|limit| limit.limit().unsigned_abs())
                .next_back()
                .unwrap_or(self.huge),
        }
    }

    /// The size of the huge pages that are wanted and not offered, if any are.
    pub fn foreign_huge_pages(resources: Option<&LinuxResources>) -> Option<&str> {
        let limits = resources?.hugepage_limits().as_deref()?;
        // Kubernetes sets limits of zero for every size that the node has.
        let foreign =
            |limit: &&LinuxHugepageLimit| limit.limit() > 0 && limit.page_size() != HUGE_PAGE;
        limits
            .iter()
            .find(foreign)
            .map(|limit| limit.page_size().as_str())
    }

    fn cpu(&self) -> Option<u64> {
        self.quota.map(|quota| {
            let period = self.period.unwrap_or(DEFAULT_PERIOD);
            quota.saturating_mul(CPU) / period
        })
    }

    /// What a pod may use of which this is the only container, and unless it has been told otherwise.
    pub fn of_pod(self, cri: CriResources) -> Totals {
        let positive = |value: i64| u64::try_from(value).ok();
        let pod = Self {
            memory: cri.memory.and_then(positive).or(self.memory),
            quota: cri.quota.and_then(positive).or(self.quota),
            period: cri.period.or(self.period),
            huge: self.huge,
        };
        Totals {
            memory: pod.memory,
            cpu: pod.cpu(),
        }
    }
}

fn anew(before: Option<u64>, given: Option<i64>) -> Option<u64> {
    match given {
        None | Some(0) => before,
        // Negative: no limit.
        Some(value) => u64::try_from(value).ok(),
    }
}

/// Who a container is in its pod's accounts: by its name in the pod where it has one, so that its next
/// life is the same.
pub fn account(id: &str, annotations: &Annotations) -> String {
    annotations::name(annotations).map_or_else(|| id.to_string(), |name| format!("name {name}"))
}

/// What a pod's containers may use, each and in all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    /// The pod is one container.
    alone: bool,
    /// As somebody has told it; what changes is added.
    told: Totals,
    members: BTreeMap<String, Limits>,
}

impl Ledger {
    /// That of a pod which may use `told` in all, and which may be one container `alone`.
    pub fn new(told: Totals, alone: bool) -> Self {
        Self {
            alone,
            told,
            members: BTreeMap::new(),
        }
    }

    /// A container has these limits. Of one that is new, `told` knows already.
    pub fn set(&mut self, account: &str, limits: Limits) {
        let Some(before) = self.members.get(account).copied() else {
            self.members.insert(account.into(), limits);
            return;
        };
        // A limit that is lifted leaves its share to the pod: without one nothing is known of what
        // the container wants.
        let after = Limits {
            memory: limits.memory.or(before.memory),
            quota: limits.quota.or(before.quota),
            period: limits.period.or(before.period),
            huge: limits.huge,
        };
        let alone = self.alone;
        let shift = |told: Option<u64>, before: Option<u64>, after: Option<u64>| match told {
            None if alone => after,
            None => None,
            Some(sum) => Some(
                sum.saturating_add(after.unwrap_or(0))
                    .saturating_sub(before.unwrap_or(0)),
            ),
        };
        self.told.memory = shift(self.told.memory, before.memory, after.memory);
        self.told.cpu = shift(self.told.cpu, before.cpu(), after.cpu());
        self.members.insert(account.into(), after);
    }

    /// The limits of a container as they are.
    pub fn get(&self, account: &str) -> Limits {
        self.members.get(account).copied().unwrap_or_default()
    }

    /// A container is gone. Its share stays: it belongs to the pod, and the container's next life.
    pub fn forget(&mut self, id: &str) {
        self.members.remove(id);
    }

    /// What the pod may use in all: as told, otherwise what its containers' limits come to.
    pub fn totals(&self) -> Totals {
        let sum = |of: fn(&Limits) -> Option<u64>| {
            self.members
                .values()
                .filter_map(of)
                .reduce(u64::saturating_add)
        };
        Totals {
            memory: self.told.memory.or_else(|| sum(|limits| limits.memory)),
            cpu: self.told.cpu.or_else(|| sum(Limits::cpu)),
        }
    }

    /// Bytes of huge pages that its containers may use.
    pub fn huge(&self) -> u64 {
        let huge = self.members.values().map(|limits| limits.huge);
        huge.fold(0, u64::saturating_add)
    }

    /// What of the totals is only known in part, so that the pod must not become smaller for it.
    pub fn in_part(&self) -> (bool, bool) {
        let unknown = |told: Option<u64>| told.is_none() && !self.alone;
        (unknown(self.told.memory), unknown(self.told.cpu))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(memory: i64, quota: i64) -> LinuxResources {
        serde_json::from_value(serde_json::json!({
            "memory": { "limit": memory },
            "cpu": { "quota": quota, "period": 100_000 },
        }))
        .unwrap()
    }

    fn limits(memory: i64, quota: i64) -> Limits {
        Limits::of(Some(&resources(memory, quota)))
    }

    fn totals(memory: u64, cpu: u64) -> Totals {
        Totals {
            memory: Some(memory),
            cpu: Some(cpu),
        }
    }

    #[test]
    fn what_is_not_given_stays_and_less_than_zero_is_no_limit() {
        let before = limits(100, 50_000);
        assert_eq!(before.changed(&resources(0, 0)), before);
        assert_eq!(before.changed(&LinuxResources::default()), before);
        let memory: LinuxResources =
            serde_json::from_value(serde_json::json!({"memory": {"limit": 200}})).unwrap();
        assert_eq!(before.changed(&memory), limits(200, 50_000));
        let period: LinuxResources =
            serde_json::from_value(serde_json::json!({"cpu": {"period": 25_000}})).unwrap();
        assert_eq!(before.changed(&period).cpu(), Some(2 * CPU));
        let lifted = before.changed(&resources(-1, -1));
        assert_eq!((lifted.memory, lifted.cpu()), (None, None));
    }

    #[test]
    fn huge_pages_are_summed_up_beside_the_memory() {
        let resources = |huge: i64, size: &str| -> LinuxResources {
            let limits = serde_json::json!([
                { "pageSize": size, "limit": huge },
                { "pageSize": "64KB", "limit": 0 },
            ]);
            serde_json::from_value(serde_json::json!({ "hugepageLimits": limits })).unwrap()
        };
        let mut ledger = Ledger::new(totals(300, CPU), false);
        ledger.set("a", Limits::of(Some(&resources(4 << 20, "2MB"))));
        ledger.set("b", Limits::of(Some(&resources(2 << 20, "2MB"))));
        assert_eq!(
            (ledger.huge(), ledger.totals()),
            (6 << 20, totals(300, CPU))
        );
        ledger.set("a", ledger.get("a").changed(&LinuxResources::default()));
        assert_eq!(ledger.huge(), 6 << 20);

        let foreign = |huge, size: &str| {
            Limits::foreign_huge_pages(Some(&resources(huge, size))).map(str::to_owned)
        };
        assert_eq!(foreign(1 << 30, "1GB").as_deref(), Some("1GB"));
        assert_eq!(foreign(2 << 20, "2MB"), None);
        assert_eq!(foreign(0, "1GB"), None);
    }

    #[test]
    fn a_pods_sum_follows_each_of_its_containers() {
        let mut ledger = Ledger::new(totals(300, 2 * CPU), false);
        ledger.set("a", limits(100, 50_000));
        ledger.set("b", limits(200, 150_000));
        assert_eq!(ledger.totals(), totals(300, 2 * CPU));
        ledger.set("a", limits(150, 100_000));
        assert_eq!(ledger.totals(), totals(350, 2 * CPU + CPU / 2));
        ledger.set("b", limits(20, 50_000));
        assert_eq!(ledger.totals(), totals(170, CPU + CPU / 2));
        assert_eq!(ledger.in_part(), (false, false));
    }

    #[test]
    fn a_containers_next_life_is_not_counted_twice_and_may_have_other_limits() {
        let name = |id: &str| {
            account(
                id,
                &[(annotations::NAMES[0].to_string(), "web".to_string())].into(),
            )
        };
        let mut ledger = Ledger::new(totals(300, CPU), false);
        ledger.set(&name("1"), limits(300, 100_000));
        ledger.set(&name("1"), limits(400, 100_000));
        ledger.forget("1");
        ledger.set(&name("2"), limits(400, 100_000));
        assert_eq!(ledger.totals(), totals(400, CPU));
        ledger.set(&name("3"), limits(500, 200_000));
        assert_eq!(ledger.totals(), totals(500, 2 * CPU));
    }

    #[test]
    fn a_limit_that_is_lifted_takes_nothing_from_the_pod() {
        let mut ledger = Ledger::new(totals(300, CPU), true);
        ledger.set("a", limits(300, 100_000));
        ledger.set("a", limits(-1, -1));
        assert_eq!(ledger.totals(), totals(300, CPU));
        ledger.set("a", limits(350, 200_000));
        assert_eq!(ledger.totals(), totals(350, 2 * CPU));
    }

    #[test]
    fn a_container_alone_is_its_pod() {
        let mut ledger = Ledger::new(Totals::default(), true);
        ledger.set("a", Limits::default());
        assert_eq!(ledger.totals(), Totals::default());
        ledger.set("a", limits(100, 50_000));
        assert_eq!(ledger.totals(), totals(100, CPU / 2));
        assert_eq!(ledger.in_part(), (false, false));
    }

    #[test]
    fn of_a_pod_that_nobody_has_summed_up_only_a_part_is_known() {
        let mut ledger = Ledger::new(Totals::default(), false);
        ledger.set("sandbox", Limits::default());
        assert_eq!(ledger.totals(), Totals::default());
        ledger.set("a", limits(100, 50_000));
        ledger.set("b", limits(50, 50_000));
        assert_eq!(ledger.totals(), totals(150, CPU));
        assert_eq!(ledger.in_part(), (true, true));
        ledger.forget("b");
        assert_eq!(ledger.totals(), totals(100, CPU / 2));
    }
}
