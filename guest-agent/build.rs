//! Links the agent at a fixed address.
//!
//! A position-independent program relocates itself at its start: in the agent 110 pages of tables,
//! each of them a page fault before the first line of `main` runs and a page of guest RAM for as
//! long as the pod lives. In a guest whose faults cost 20 µs and more that is 3 ms of every start.
//! The agent parses nothing that a container sends it; what it reads of a container's files it
//! reads in safe Rust, in short-lived children.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // The last of gcc's mutually exclusive link modes counts, and rustc has said -static-pie.
    for arg in ["-no-pie", "-static"] {
        println!("cargo:rustc-link-arg-bin=sepal-agent={arg}");
    }
}
