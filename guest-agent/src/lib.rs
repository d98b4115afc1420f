//! The guest agent: PID 1 of a pod's VM, which runs containers on behalf of the shim.
//!
//! [`serve`] is the agent as a service; the program around it (main.rs) brings the guest up first.
//! Everything runs on one thread: the service, the copying of streams, the collecting of children.
//! What could block is done by short-lived helper processes (launch.rs).

pub mod apparmor;
pub mod boot;
pub mod cgroup;
pub mod clock;
pub mod container;
pub mod devices;
pub mod error;
pub mod events;
#[cfg(feature = "faults")]
pub mod faults;
pub mod forward;
pub mod guest;
pub mod launch;
pub mod limits;
pub mod log;
pub mod memory_volumes;
mod mounts;
mod namespaces;
pub mod network;
pub mod nodes;
pub mod payload;
pub mod plan;
pub mod podinit;
pub mod prepare;
pub mod process;
pub mod reaper;
pub mod service;
pub mod stdio;
pub mod stream;
pub mod submounts;
pub mod sys;
pub mod users;
pub mod volumes;

pub use service::{Sockets, serve};
