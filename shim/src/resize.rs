//! The pod's VM follows its containers' limits while it runs.
//!
//! What becomes more does so in the VM first and then in the container's cgroup; what becomes less, in
//! the cgroup first. Memory beyond what the VM has booted with is virtio-mem's, what is less is in the
//! balloon; both are the guest's doing, and the shim looks at how far it comes. CPUs are made by the VMM
//! and switched on and off by the agent.

use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;
use sepal_protocol::agent as messages;
use sepal_protocol::control::{Request, VmState};

use crate::annotations::Role;
use crate::error::{Error as Failure, Result};
use crate::limits::{Ledger, Limits};
use crate::placement::{Placement, Places};
use crate::pod::Pod;
use crate::podspec::PodSpec;
use crate::size::{Host, Size};
use crate::up::Up;

const MIB: u64 = 1 << 20;
const HUGE_PAGE: u64 = 2 * MIB;
/// How long the guest may take to plug or unplug anything, or to put it into the balloon: as long as
/// something moves it is waited for, up to [`MOST`].
const PATIENCE: Duration = Duration::from_secs(4);
const MOST: Duration = Duration::from_secs(60);
/// After this time without an effect Linux tries again only if it is told to.
const NUDGE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(20);

/// Why the VM is not as large as it should be.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error(
        "{what}: {wanted} are wanted and this pod's VM can have at most {most} while it runs; a pod \
         that is made anew can have more, see io.sepal.{key} and {key} in the configuration"
    )]
    NoRoom {
        what: &'static str,
        key: &'static str,
        wanted: u64,
        most: u64,
    },
    #[error("{what}: the guest does not take more: it has {got} of {wanted}; nothing was changed")]
    NotGiven {
        what: &'static str,
        wanted: u64,
        got: u64,
    },
    #[error(
        "{what}: the limits are set, but the guest does not let go of more: it has {got} and should \
         have {wanted}; free memory in the pod and set the limits again"
    )]
    NotTaken {
        what: &'static str,
        wanted: u64,
        got: u64,
    },
    #[error(
        "huge pages: {wanted} MiB are wanted in this pod and the node has not as many left; set more \
         aside on it (vm.nr_hugepages) before the pod is made"
    )]
    NoHugePages { wanted: u64 },
}

const MEMORY: &str = "memory in MiB";
const CPUS: &str = "CPUs";

/// What a container asks of its pod.
#[derive(Debug, Clone, Default)]
pub struct Demand {
    /// How much it may use.
    pub limits: Limits,
    /// Where it is to be; of a pause container, which takes no time, nothing.
    pub placement: Option<Placement>,
}

impl Demand {
    /// That of a container's spec.
    ///
    /// # Errors
    /// A list of CPUs or memory nodes that is none.
    pub fn of(resources: Option<&LinuxResources>, role: &Role) -> Result<Self> {
        let placement = Placement::of(resources)?;
        let anywhere = placement == Placement::default();
        Ok(Self {
            limits: Limits::of(resources),
            placement: Some(placement).filter(|_| *role != Role::Sandbox || !anywhere),
        })
    }
}

/// How large a VM is while it runs, what for, and where.
#[derive(Debug)]
pub struct Extent {
    /// Who may use how much of it.
    pub ledger: Ledger,
    /// Who is to be where.
    pub places: Places,
    target: Target,
}

/// What a VM should have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Target {
    cpus: u8,
    /// Bytes.
    memory: u64,
}

impl Target {
    const fn of(size: &Size) -> Self {
        Self {
            cpus: size.cpus.boot,
            memory: size.memory,
        }
    }

    fn largest(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.max(other.cpus),
            memory: self.memory.max(other.memory),
        }
    }
}

impl Extent {
    /// That of a pod as it boots.
    pub fn of(spec: &PodSpec) -> Self {
        Self {
            ledger: Ledger::new(spec.totals, spec.role == Role::Alone),
            places: Places::default(),
            target: Target::of(&spec.size),
        }
    }
}

impl Pod {
    /// Sets a container's limits, and makes the VM as large as the pod may be by them.
    ///
    /// # Errors
    /// The guest refuses them, or the VM cannot become as large: nothing is changed then. Or it cannot
    /// become as small, and the limits are set all the same.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<()> {
        let container = self.container(id)?;
        let up = self.up().await?;
        let given: LinuxResources =
            serde_json::from_slice(&resources).map_err(|e| Failure::Invalid {
                what: "resources",
                reason: e.to_string(),
            })?;
        let mut extent = self.extent.lock().await;
        let mut ledger = extent.ledger.clone();
        ledger.set(
            &container.account,
            ledger.get(&container.account).changed(&given),
        );
        let mut places = extent.places.clone();
        let placement = places.get(&container.account).changed(&given)?;
        places.set(&container.account, placement);
        let (before, target) = (extent.target, self.target(&ledger)?);
        self.check(&up, before, target).await?;
        let former = extent.places.clone();
        self.place(&mut extent, places).await?;
        let given = async {
            self.grow(&up, before, target).await?;
            let request = messages::UpdateContainerRequest {
                container_id: id.into(),
                resources,
                ..Default::default()
            };
            let set = self.call(&up, up.agent.update_container(&request)).await;
            if set.is_err() {
                // Whatever of it cannot be taken back is told when limits are next set.
                let _ = self.shrink(&up, target, before).await;
            }
            set
        };
        if let Err(e) = given.await {
            if let Err(stays) = self.place(&mut extent, former).await {
                tracing::warn!("the pod stays where a refused request wanted it: {stays}");
            }
            return Err(e);
        }
        extent.ledger = ledger;
        let shrunk = self.shrink(&up, before, target).await;
        extent.target = match &shrunk {
            Ok(()) => target,
            // Limits that are set again are to try again.
            Err(_) => before.largest(target),
        };
        self.note(|record| {
            record.vcpus = target.cpus;
            record.memory = target.memory;
        });
        shrunk
    }

    /// Counts a container that is being made, puts the pod where it is to be, and gives the VM the huge
    /// pages that it wants. One that comes again with other limits, as after a restart by Kubernetes,
    /// changes the VM.
    ///
    /// # Errors
    /// There are not as many huge pages, or not these CPUs.
    pub(crate) async fn admit(&self, account: &str, demand: Demand) -> Result<()> {
        let mut extent = self.extent.lock().await;
        if let Some(placement) = demand.placement {
            let mut places = extent.places.clone();
            places.set(account, placement);
            self.place(&mut extent, places).await?;
        }
        let before = extent.ledger.clone();
        extent.ledger.set(account, demand.limits);
        let huge = extent.ledger.huge();
        if huge > before.huge() {
            let up = self.up().await?;
            let kept = async {
                self.limit_huge_pages(huge)?;
                keep_huge_pages(&up, huge).await
            };
            if let Err(e) = kept.await {
                let _ = self.limit_huge_pages(before.huge());
                extent.ledger = before;
                return Err(e);
            }
        }
        if extent.ledger.totals() == before.totals() {
            return Ok(());
        }
        let done = async {
            let up = self.up().await?;
            let (before, target) = (extent.target, self.target(&extent.ledger)?);
            self.check(&up, before, target).await?;
            self.grow(&up, before, target).await?;
            extent.target = before.largest(target);
            self.shrink(&up, before, target).await?;
            extent.target = target;
            Ok(())
        };
        let done: Result<()> = done.await;
        if let Err(e) = done {
            tracing::warn!("the pod's size does not follow a new container's limits: {e}");
        }
        Ok(())
    }

    /// Lets the pod have so many bytes of the host's huge pages beside what its memory is made of.
    pub(crate) fn limit_huge_pages(&self, bytes: u64) -> Result<()> {
        let memory = match self.config.hugepages {
            true => self.spec.size.max_memory,
            false => 0,
        };
        let bytes = memory.saturating_add(bytes);
        if let Some(cgroup) = self.cgroup() {
            cgroup.limit_huge_pages(bytes.next_multiple_of(HUGE_PAGE))?;
        }
        Ok(())
    }

    /// Puts the pod where its containers are to be by these accounts.
    async fn place(&self, extent: &mut Extent, places: Places) -> Result<()> {
        let placement = places.pod();
        if placement != extent.places.pod() {
            // Its cgroup is there once it is up.
            self.up().await?;
            if let Some(cgroup) = self.cgroup() {
                cgroup.place(&placement)?;
            }
        }
        extent.places = places;
        Ok(())
    }

    /// What the VM should have by these accounts.
    fn target(&self, ledger: &Ledger) -> Result<Target> {
        let spec = &self.spec;
        let size = Size::plan(
            &spec.annotations,
            ledger.totals(),
            &self.config,
            Host::here(),
        )?;
        let (mut target, boot) = (Target::of(&size), Target::of(&spec.size));
        let (memory_in_part, cpus_in_part) = ledger.in_part();
        // Without a balloon what the VM has booted with is the least.
        if memory_in_part || !self.config.balloon {
            target.memory = target.memory.max(boot.memory);
        }
        if cpus_in_part {
            target.cpus = target.cpus.max(boot.cpus);
        }
        Ok(target)
    }

    /// Whether the VM can become as large as it should.
    async fn check(&self, up: &Up, before: Target, target: Target) -> Result<()> {
        let most = self.spec.size.cpus.max;
        if target.cpus > before.cpus.max(most) {
            return Err(no_room(CPUS, "max_vcpus", target.cpus.into(), most.into()));
        }
        let state = up.vm.state().await?;
        if target.memory > state.has_memory() {
            let most = state.memory.saturating_add(state.pluggable);
            let most = most.min(self.spec.size.max_memory);
            if target.memory > most {
                let (wanted, most) = (target.memory / MIB, most / MIB);
                return Err(no_room(MEMORY, "max_memory", wanted, most));
            }
        }
        Ok(())
    }

    /// Gives the VM what it shall have more than before. If it does not take all of it, it has what it
    /// had.
    async fn grow(&self, up: &Up, before: Target, target: Target) -> Result<()> {
        let grown = async {
            grow_memory(up, target.memory).await?;
            if target.cpus > before.cpus {
                let count = target.cpus;
                up.vm.ask(&Request::AddCpus { count }).await?;
                set_cpus(up, count).await?;
            }
            Ok(())
        };
        let grown = grown.await;
        if grown.is_err() {
            let _ = self.shrink(up, target, before).await;
        }
        grown
    }

    /// Takes from the VM what it shall have less than before.
    async fn shrink(&self, up: &Up, before: Target, target: Target) -> Result<()> {
        let cpus = if target.cpus < before.cpus {
            set_cpus(up, target.cpus).await
        } else {
            Ok(())
        };
        shrink_memory(up, target.memory).await?;
        cpus
    }
}

fn no_room(what: &'static str, key: &'static str, wanted: u64, most: u64) -> Failure {
    let error = Error::NoRoom {
        what,
        key,
        wanted,
        most,
    };
    error.into()
}

async fn set_cpus(up: &Up, count: u8) -> Result<()> {
    let request = messages::ResizeGuestRequest {
        cpus: count.into(),
        ..Default::default()
    };
    let online = up.agent.resize_guest(&request).await?.cpus_online;
    if online == u32::from(count) {
        return Ok(());
    }
    let error = Error::NotGiven {
        what: CPUS,
        wanted: count.into(),
        got: online.into(),
    };
    Err(error.into())
}

/// Looks at the VM until it is as it should be, or until nothing has moved for some time; answers with
/// how it is.
async fn settle(up: &Up, patience: Duration, done: impl Fn(&VmState) -> bool) -> Result<VmState> {
    let begin = Instant::now();
    let (mut moved, mut last) = (begin, None);
    loop {
        let state = up.vm.state().await?;
        let now = Some((state.plugged, state.huge_plugged, state.balloon));
        if now != last {
            (moved, last) = (Instant::now(), now);
        }
        if done(&state) || moved.elapsed() > patience || begin.elapsed() > MOST {
            return Ok(state);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Lets the guest have `target` bytes of memory, if it has less.
async fn grow_memory(up: &Up, target: u64) -> Result<()> {
    let state = up.vm.state().await?;
    let more = target.saturating_sub(state.has_memory());
    if more == 0 {
        return Ok(());
    }
    let seen = up.agent.guest_info(&messages::Empty::new()).await?;
    // What the guest did not let go of earlier it may use again.
    let plugged = target.saturating_sub(state.memory).max(state.plugged);
    let balloon = state.memory.saturating_add(plugged).saturating_sub(target);
    if balloon < state.balloon {
        up.vm.ask(&Request::Balloon { size: balloon }).await?;
    }
    if plugged > state.plugged {
        up.vm.ask(&Request::PlugMemory { size: plugged }).await?;
    }
    let given = settle(up, PATIENCE, |state| {
        state.plugged >= plugged && state.balloon <= balloon
    });
    let given = given.await?;
    let wanted = seen.memory_total.saturating_add(more);
    let end = Instant::now() + PATIENCE;
    // It is plugged before it is there for programs.
    let mut total = 0;
    while given.has_memory() >= target {
        let info = up.agent.guest_info(&messages::Empty::new()).await?;
        total = info.memory_total;
        if total.saturating_add(MIB) >= wanted {
            return Ok(());
        }
        if Instant::now() > end {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    let got = given
        .has_memory()
        .saturating_sub(wanted.saturating_sub(total.max(seen.memory_total)));
    let error = Error::NotGiven {
        what: MEMORY,
        wanted: target / MIB,
        got: got.min(target) / MIB,
    };
    Err(error.into())
}

/// Lets the guest have so many bytes of the host's huge pages, and keep as many of its own for programs.
async fn keep_huge_pages(up: &Up, bytes: u64) -> Result<()> {
    let short = Error::NoHugePages {
        wanted: bytes / MIB,
    };
    let before = up.vm.state().await?;
    if bytes > before.huge_pluggable {
        return Err(short.into());
    }
    let size = bytes.next_multiple_of(HUGE_PAGE);
    up.vm.ask(&Request::PlugHugePages { size }).await?;
    let state = settle(up, PATIENCE, |state| state.huge_plugged >= size).await?;
    let pages = |bytes: u64| messages::HugePages {
        count: bytes / HUGE_PAGE,
        ..Default::default()
    };
    let wanted = pages(size);
    let end = Instant::now() + PATIENCE;
    // What is plugged comes to the guest's free memory a little later.
    while state.huge_plugged >= size && Instant::now() < end {
        let kept = up.agent.keep_huge_pages(&wanted).await?.count;
        if kept >= wanted.count {
            return Ok(());
        }
        tokio::time::sleep(LOOK).await;
    }
    // As it was.
    let size = before.huge_plugged;
    up.agent.keep_huge_pages(&pages(size)).await?;
    up.vm.ask(&Request::PlugHugePages { size }).await?;
    Err(short.into())
}

/// Takes memory from the guest until it has no more than `target` bytes: what was plugged, and into the balloon what
/// it does not unplug or has booted with.
async fn shrink_memory(up: &Up, target: u64) -> Result<()> {
    let mut state = up.vm.state().await?;
    if state.has_memory() <= target {
        return Ok(());
    }
    let plugged = target.saturating_sub(state.memory);
    let end = Instant::now() + MOST;
    while state.plugged > plugged && Instant::now() < end {
        let before = state.plugged;
        up.vm.ask(&Request::PlugMemory { size: plugged }).await?;
        state = settle(up, NUDGE, |state| state.plugged <= plugged).await?;
        if state.plugged == before {
            break;
        }
    }
    if state.plugged > plugged {
        // It is what the balloon takes in its stead.
        let size = state.plugged;
        up.vm.ask(&Request::PlugMemory { size }).await?;
    }
    let balloon = |state: &VmState| {
        let has = state.memory.saturating_add(state.plugged);
        has.saturating_sub(target)
    };
    let size = balloon(&state);
    if size > state.balloon {
        up.vm.ask(&Request::Balloon { size }).await?;
        state = settle(up, PATIENCE, |state| state.balloon >= balloon(state)).await?;
    }
    if state.has_memory() <= target {
        return Ok(());
    }
    // To go on would keep the guest short of memory for as long as it needs it.
    let size = state.balloon;
    up.vm.ask(&Request::Balloon { size }).await?;
    let error = Error::NotTaken {
        what: MEMORY,
        wanted: target / MIB,
        got: state.has_memory() / MIB,
    };
    Err(error.into())
}
