//! The virtual machine monitor of Sepal: one process, one KVM microVM, one pod.

pub mod virtio;
