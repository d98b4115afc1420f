//! New limits for a container that runs.

use std::sync::Arc;

use oci_spec::runtime::LinuxResources;

use crate::cgroup::Cgroup;
use crate::error::{Error, Result};
use crate::launch;
use crate::plan::{self, Facts};
use crate::reaper::Reaper;

/// Sets limits of the container `id` anew: OCI `LinuxResources` as JSON.
///
/// # Errors
/// With the limit that is refused. One of memory that is below what the container uses and cannot do
/// without is: the kernel would kill for it.
pub async fn update(
    id: &str,
    cgroup: &Cgroup,
    reaper: &Arc<Reaper>,
    resources: &[u8],
) -> Result<()> {
    let resources = read(id, cgroup, resources)?;
    let limit = resources.memory().and_then(|memory| memory.limit());
    if let Some(limit) = limit.and_then(|limit| u64::try_from(limit).ok())
        && limit > 0
    {
        make_room(id, cgroup, reaper, limit).await?;
    }
    cgroup.update(id, &resources)
}

/// What of the resources the guest can set.
fn read(id: &str, cgroup: &Cgroup, resources: &[u8]) -> Result<LinuxResources> {
    let mut resources: LinuxResources = serde_json::from_slice(resources)
        .map_err(|error| Error::Invalid(format!("the resources cannot be read: {error}")))?;
    let facts = Facts {
        cgroup_file: &|name| cgroup.path().join(name).exists(),
        device: &|_| None,
    };
    let mut left_out = Vec::new();
    plan::adapt_resources(&mut resources, &[], &mut left_out, &facts);
    resources.set_devices(None);
    if !left_out.is_empty() {
        tracing::info!(container = id, ?left_out, "not in the guest");
    }
    Ok(resources)
}

/// Brings what the container uses below a limit that it is to have.
async fn make_room(id: &str, cgroup: &Cgroup, reaper: &Arc<Reaper>, limit: u64) -> Result<()> {
    if cgroup.above(limit) > 0 {
        launch::aside(reaper, "cannot reclaim memory", || {
            cgroup.reclaim(limit);
            Ok(())
        })
        .await?;
    }
    match cgroup.above(limit) {
        0 => Ok(()),
        above => Err(Error::State(format!(
            "container {id} uses {above} bytes more than the new memory limit of {limit} bytes"
        ))),
    }
}
