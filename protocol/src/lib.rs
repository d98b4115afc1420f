//! What the parts of Sepal say to each other.
//!
//! * [`agent`]: the shim's calls to the guest agent (`proto/agent.proto`), over ttrpc on vsock.
//! * [`cri`]: what is read of Kubernetes' description of a pod (`proto/cri.proto`).
//! * [`vm`]: the specification of a VM, from the shim to the VMM.
//! * [`control`]: the messages on the VMM's control socket.
//! * [`config`]: the configuration file of the shim and of `sepal`.
//! * [`image`]: how a guest image tells what it is.
//! * [`ports`], [`paths`]: numbers and names both sides must agree on.
//! * [`ready`]: the one line by which the agent says that it serves.
//! * [`state`]: what a pod leaves on the host for clean-up.
//!
//! Nothing here acts: the three programs depend on this crate and never on each other.

pub mod config;
pub mod control;
pub mod image;
pub mod mountinfo;
pub mod paths;
pub mod ports;
pub mod ready;
pub mod state;
pub mod vm;
pub mod words;

mod generated {
    #![allow(missing_docs, clippy::all, rustdoc::all)]
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

/// Messages of `proto/agent.proto`.
pub use generated::agent;
/// Client and service trait of `proto/agent.proto`.
pub use generated::agent_ttrpc;
/// Messages of `proto/cri.proto`.
pub use generated::cri;
