//! The shim: containerd's runtime v2 service for pods that are virtual machines.
//!
//! Read in this order: [`task`] and [`sandbox`] (RPC in, event out), [`creation`] and [`service`]
//! (what is done for a container), [`pod`] (the VM's life), [`vm`] and [`agent`] (its processes, its
//! guest), [`resize`] (both, when limits change). [`podspec`], [`spec`], [`size`], [`limits`] and
//! [`network::mirror`] are pure; [`rootfs`], [`mirror`], [`network`], [`forward`], [`cgroup`],
//! [`hooks`] and [`stdio`] touch the host; [`cleanup`] undoes what they do, also after a crash.

pub mod agent;
pub mod annotations;
pub mod apparmor;
pub mod cgroup;
pub mod cleanup;
pub mod container;
pub mod creation;
pub mod disks;
pub mod error;
pub mod events;
pub mod faults;
pub mod features;
pub mod forward;
pub mod gc;
pub mod hooks;
pub mod limits;
pub mod log;
pub mod logger;
pub mod memory_volumes;
pub mod mirror;
pub mod network;
pub mod placement;
pub mod pod;
pub mod podspec;
pub mod resize;
pub mod rootfs;
pub mod sandbox;
pub mod seat;
pub mod serve;
pub mod service;
pub mod size;
pub mod snapshot;
pub mod spec;
pub mod stand_in;
pub mod start;
pub mod stats;
pub mod stdio;
pub mod sys;
pub mod task;
pub mod timeline;
pub mod up;
pub mod users;
pub mod vm;

/// How containerd names the runtime.
pub const RUNTIME: &str = "io.containerd.sepal.v2";
