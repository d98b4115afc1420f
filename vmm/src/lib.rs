//! The virtual machine monitor of one pod: what `sepal-vmm` (main.rs) is made of.
//!
//! Read in this order: [`vm`] (the boot story), [`control`] (the thread that takes the shim's requests),
//! [`vcpu`] and [`bus`] (what the guest touches), [`pci`] (the transport), [`virtio`] (the devices).
//! [`memory`], [`kvm`] and `sys` are where the host's kernel is spoken to; [`jail`] and [`seccomp`] take
//! away what a VMM whose guest has broken in could use.

pub mod acpi;
pub mod boot;
#[cfg(feature = "breach")]
pub mod breach;
pub mod bus;
pub mod clock;
pub mod cmdline;
pub mod control;
pub mod exit;
pub mod ioctls;
pub mod jail;
pub mod kvm;
pub mod launcher;
pub mod memory;
pub mod pci;
pub mod platform;
pub mod reserve;
pub mod seccomp;
pub mod serial;
pub mod size;
pub mod sys;
pub mod vcpu;
pub mod virtio;
pub mod vm;
