//! Names of files and directories that two programs must agree on.

/// Where the state of all pods lives on the host: one directory per pod.
pub const STATE_ROOT: &str = "/run/sepal";
/// Where an installation is unless the program that asks belongs to another (deploy/install).
pub const PREFIX: &str = "/opt/sepal";
/// The configuration file, unless `SEPAL_CONFIG` names another.
pub const CONFIG: &str = "/etc/sepal/config.toml";

/// Files in a pod's directory.
pub mod pod {
    /// The directory shared with the guest: one subdirectory per container.
    pub const SHARE: &str = "share";
    /// Lower directories of root file systems while those are mounted.
    pub const LAYERS: &str = "layers";
    /// The VMM's root directory: what it must reach by a path.
    pub const VM: &str = "vm";
    /// Unix socket of the VMM's vsock device; guest-dialled port P is `vm/vsock_P`.
    pub const VSOCK: &str = "vm/vsock";
    /// Listening Unix socket for further clients of the VMM's control protocol.
    pub const CONTROL: &str = "control.sock";
    /// The guest's kernel log.
    pub const CONSOLE: &str = "console.log";
    /// vhost-user socket of the pod's file server.
    pub const FS: &str = "fs.sock";
    /// An empty directory: the root of the VMM in a pod that has no container of its own.
    pub const VOID: &str = "void";
    /// JSON: what clean-up needs after a crash.
    pub const STATE: &str = "state.json";
}

/// Paths inside the guest.
pub mod guest {
    /// virtio-fs tag of the pod's share.
    pub const SHARE_TAG: &str = "sepal";
    /// Where the agent mounts the share.
    pub const SHARE: &str = "/run/sepal/share";
    /// OCI bundles and state of the containers.
    pub const CONTAINERS: &str = "/run/sepal/containers";
    /// Pinned namespaces that the pod's containers share.
    pub const NAMESPACES: &str = "/run/sepal/ns";
    /// Writable place for the pod's /dev/shm.
    pub const SHM: &str = "/run/sepal/shm";
    /// The pod's own files for its containers' /etc, where no client makes them.
    pub const ETC: &str = "/run/sepal/etc";
    /// Copies of volumes that the host changes while programs wait for that; one directory each.
    pub const VOLUMES: &str = "/run/sepal/volumes";
    /// Volumes that are the guest's memory; one directory each.
    pub const MEMORY: &str = "/run/sepal/memory";
    /// Directory of a container's volumes of this kind below its own: `memory/0`, `memory/1`, ...
    pub const CONTAINER_MEMORY: &str = "memory";
    /// An empty directory: the root of a process that needs none.
    pub const VOID: &str = "/run/sepal/void";
    /// Present only in the debug image, where `sepal exec` is allowed.
    pub const DEBUG_MARK: &str = "/etc/sepal-debug";
}

/// Directory of a container's root file system below the share.
pub const ROOTFS: &str = "rootfs";
/// Directory of a container's bind mounts below the share: `mounts/0`, `mounts/1`, ...
pub const MOUNTS: &str = "mounts";
