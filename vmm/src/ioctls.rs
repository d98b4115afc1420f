//! Requests of ioctl(2) that each kind of thread may make: a descriptor of KVM, a tap or vhost-net can do
//! far more than its owner ever wants.

use std::mem::size_of;

use kvm_bindings::{
    kvm_cpuid2, kvm_ioeventfd, kvm_irq_routing, kvm_irqfd, kvm_lapic_state, kvm_msrs, kvm_regs,
    kvm_sregs, kvm_userspace_memory_region,
};
use nix::{request_code_none, request_code_read, request_code_readwrite, request_code_write};
use vhost::vhost_kern::vhost_binding::{
    vhost_memory, vhost_vring_addr, vhost_vring_file, vhost_vring_state,
};

/// KVMIO of linux/kvm.h.
const KVM: u8 = 0xae;
/// VHOST_VIRTIO of linux/vhost.h.
const VHOST: u8 = 0xaf;

/// A socket that does not wait, as the standard library sets it.
const SOCKET: &[u64] = &[libc::FIONBIO];

/// Interrupts and doorbells of devices.
const WIRES: &[u64] = &[
    // KVM_IRQFD
    request_code_write!(KVM, 0x76, size_of::<kvm_irqfd>()),
    // KVM_IOEVENTFD
    request_code_write!(KVM, 0x79, size_of::<kvm_ioeventfd>()),
    // KVM_SET_GSI_ROUTING
    request_code_write!(KVM, 0x6a, size_of::<kvm_irq_routing>()),
];

/// Memory of the guest's. A vCPU takes configuration space back from the guest's memory when the guest
/// turns to what has to be computed ([`crate::pci::mirror`]); it can give nothing but this process's own.
const MEMORY: &[u64] = &[
    // KVM_SET_USER_MEMORY_REGION
    request_code_write!(KVM, 0x46, size_of::<kvm_userspace_memory_region>()),
];

/// Running a vCPU, and telling how it has crashed.
const RUN: &[u64] = &[
    // KVM_RUN
    request_code_none!(KVM, 0x80),
    // KVM_GET_REGS
    request_code_read!(KVM, 0x81, size_of::<kvm_regs>()),
    // KVM_GET_SREGS
    request_code_read!(KVM, 0x83, size_of::<kvm_sregs>()),
];

/// Making vCPUs.
const GROW: &[u64] = &[
    // KVM_CREATE_VCPU
    request_code_none!(KVM, 0x41),
    // KVM_GET_VCPU_MMAP_SIZE
    request_code_none!(KVM, 0x04),
    // KVM_SET_REGS
    request_code_write!(KVM, 0x82, size_of::<kvm_regs>()),
    // KVM_GET_SREGS, KVM_SET_SREGS
    request_code_read!(KVM, 0x83, size_of::<kvm_sregs>()),
    request_code_write!(KVM, 0x84, size_of::<kvm_sregs>()),
    // KVM_GET_MSRS, KVM_SET_MSRS
    request_code_readwrite!(KVM, 0x88, size_of::<kvm_msrs>()),
    request_code_write!(KVM, 0x89, size_of::<kvm_msrs>()),
    // KVM_GET_LAPIC, KVM_SET_LAPIC
    request_code_read!(KVM, 0x8e, size_of::<kvm_lapic_state>()),
    request_code_write!(KVM, 0x8f, size_of::<kvm_lapic_state>()),
    // KVM_SET_CPUID2
    request_code_write!(KVM, 0x90, size_of::<kvm_cpuid2>()),
];

/// A tap, and the kernel's worker that serves it. None that names a tap or hands it to another.
const NET: &[u64] = &[
    // TUNSETOFFLOAD, TUNSETVNETHDRSZ
    request_code_write!(b'T', 208, 4),
    request_code_write!(b'T', 216, 4),
    // VHOST_GET_FEATURES, VHOST_SET_FEATURES
    request_code_read!(VHOST, 0x00, 8),
    request_code_write!(VHOST, 0x00, 8),
    // VHOST_SET_OWNER
    request_code_none!(VHOST, 0x01),
    // VHOST_SET_MEM_TABLE
    request_code_write!(VHOST, 0x03, size_of::<vhost_memory>()),
    // VHOST_SET_VRING_NUM, _ADDR, _BASE, _KICK, _CALL
    request_code_write!(VHOST, 0x10, size_of::<vhost_vring_state>()),
    request_code_write!(VHOST, 0x11, size_of::<vhost_vring_addr>()),
    request_code_write!(VHOST, 0x12, size_of::<vhost_vring_state>()),
    request_code_write!(VHOST, 0x20, size_of::<vhost_vring_file>()),
    request_code_write!(VHOST, 0x21, size_of::<vhost_vring_file>()),
    // VHOST_NET_SET_BACKEND
    request_code_write!(VHOST, 0x30, size_of::<vhost_vring_file>()),
];

/// Of a vCPU.
pub const VCPU: &[&[u64]] = &[RUN, WIRES, MEMORY];
/// Of the control thread, which plugs devices, memory and vCPUs.
pub const CONTROL: &[&[u64]] = &[GROW, WIRES, MEMORY, NET, SOCKET];
/// Of the thread that starts and stops devices, and vCPUs that come later: they have its filter, too.
pub const LAUNCHER: &[&[u64]] = &[RUN, WIRES, MEMORY, NET, SOCKET];
/// Of a network device's worker.
pub const NETWORK: &[&[u64]] = &[NET];
/// Of every other worker.
pub const WORKER: &[&[u64]] = &[SOCKET];

#[cfg(test)]
mod tests {
    use super::*;

    /// The hostile guest found that its VMM was ended for it.
    #[test]
    fn a_guest_that_turns_to_the_configuration_access_capability_may_have_its_memory_changed() {
        for list in [VCPU, LAUNCHER] {
            assert!(list.concat().contains(&0x4020_ae46));
        }
    }

    /// By linux/kvm.h, vhost.h and if_tun.h on x86-64.
    #[test]
    fn requests_are_the_kernels() {
        for (known, list) in [
            (0xae80, RUN),
            (0x4020_ae76, WIRES),
            (0x4040_ae79, WIRES),
            (0x4008_ae6a, WIRES),
            (0x4020_ae46, MEMORY),
            (0x4008_ae90, GROW),
            (0x4004_54d0, NET),
            (0x4008_af03, NET),
            (0x4028_af11, NET),
            (0x4008_af30, NET),
        ] {
            assert!(list.contains(&known), "{known:#x}");
        }
    }
}
