//! The program on this machine's KVM, driven over its control socket as the shim drives it.
//!
//! Without KVM, or for Linux without a built kernel, a test says so and passes.

mod guest;
mod linux;
mod machine;
mod resize;
