//! The file server of one pod: what `sepal-fs` (main.rs) is made of.
//!
//! The shim starts one per pod, hands it a listening Unix socket and the pod's share, and passes the
//! connected end to the VMM, whose virtio-fs device is the vhost-user front end. The program serves
//! that one front end and ends with it. File operations are those of the `virtiofsd` crate, but for
//! files without a name ([`files`], [`unnamed`]); what else is ours is how the process is confined
//! ([`confine`], [`filter`]), configured ([`share`]) and tied to its pod ([`serve`]); how requests
//! come in and answers go out ([`backend`], [`workers`]).
//!
//! What it may be asked by a hostile guest: anything that FUSE can say. What it can reach then: the
//! share, and nothing else; no other file, no network, no other process.

pub mod backend;
#[cfg(feature = "breach")]
pub mod breach;
pub mod confine;
pub mod files;
pub mod filter;
pub mod logger;
pub mod pressure;
pub mod requests;
pub mod serve;
pub mod share;
pub mod sys;
pub mod unchanged;
pub mod unnamed;
pub mod volumes;
pub mod workers;
