//! The kernel command line (Linux, Documentation/admin-guide/kernel-parameters.rst).

use sepal_protocol::vm::{KvmFlavour, VmSpec};

/// For every guest: what spares the kernel probing for hardware that this machine does not have.
const ALWAYS: &[&str] = &[
    // Errors and warnings only: each line costs the guest a wait for its console.
    "loglevel=5",
    // A panic ends the VM at once, by the reset register.
    "panic=-1",
    "reboot=acpi",
    // KVM's clock is the host's: no calibration, no watchdog over it, no test of the timer pin.
    "tsc=reliable",
    "no_timer_check",
    // Configuration space is memory: no port probing before it is found.
    "pci=noearly",
    // Buffers for devices that cannot reach all memory; ours can.
    "swiotlb=noforce",
    "random.trust_cpu=on",
    // Grace periods of several ticks each, after init has started as well: mounts, namespaces and
    // cgroups wait for them.
    "rcupdate.rcu_expedited=1",
    // By default the kernel clears 2 MiB to give back all but 200 KiB of them.
    "percpu_alloc=page",
    // Memory that is added is such that it can be taken away again, up to three times what is not.
    "memory_hotplug.online_policy=auto-movable",
    // Interfaces that nobody has asked for; both kinds can be made.
    "dummy.numdummies=0",
    "ifb.numifbs=0",
];

/// The guest image: an EROFS file system in persistent memory, read in place.
const IMAGE: &str = "root=/dev/pmem0 rootfstype=erofs ro rootflags=dax=always init=/sbin/init";

/// Builds the command line for `spec`; what the operator adds comes last and so wins.
pub fn build(spec: &VmSpec, flavour: KvmFlavour) -> String {
    let mut words: Vec<&str> = Vec::new();
    if spec.early_console {
        // From the first line on, over the 8250; hvc0 follows when its driver is there.
        words.extend([
            "earlyprintk=ttyS0,115200",
            "console=ttyS0,115200",
            "8250.nr_uarts=1",
        ]);
    } else {
        words.push("8250.nr_uarts=0");
    }
    words.push("console=hvc0");
    words.extend(ALWAYS);
    if flavour == KvmFlavour::Deprivileged {
        // Kernel and user space are kept apart by page tables alone there.
        words.push("pti=on");
    }
    let online = format!("maxcpus={}", spec.cpus.boot);
    if spec.cpus.boot < spec.cpus.max {
        words.push(&online);
    }
    if spec.image.is_some() {
        words.push(IMAGE);
    }
    if !spec.cmdline.is_empty() {
        words.push(&spec.cmdline);
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use sepal_protocol::vm::{CpuSpec, KernelSpec, MemorySpec};

    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            pod_id: "pod".into(),
            cpus: CpuSpec { boot: 1, max: 1 },
            memory: MemorySpec {
                size: 256 << 20,
                max: 0,
                hugepages: false,
                max_huge: 0,
                mergeable: false,
            },
            kernels: KernelSpec {
                hardware: None,
                deprivileged: None,
            },
            cmdline: String::new(),
            image: None,
            initrd: None,
            vsock: "/run/vsock".into(),
            control: None,
            console: None,
            jail: None,
            early_console: false,
            fs: vec![],
            net: vec![],
            blk: vec![],
            balloon: false,
        }
    }

    #[test]
    fn each_flavour_and_option_gets_its_words() {
        let plain = build(&spec(), KvmFlavour::Hardware);
        assert!(plain.contains("console=hvc0") && plain.contains("8250.nr_uarts=0"));
        for word in ["pti", "root=", "ttyS0", "maxcpus"] {
            assert!(!plain.contains(word), "{word} in {plain}");
        }
        let spec = VmSpec {
            image: Some("/image".into()),
            jail: None,
            early_console: true,
            cmdline: "loglevel=7".into(),
            cpus: CpuSpec { boot: 1, max: 4 },
            ..spec()
        };
        let all = build(&spec, KvmFlavour::Deprivileged);
        for word in [
            "pti=on",
            "root=/dev/pmem0",
            "earlyprintk=ttyS0",
            "maxcpus=1",
        ] {
            assert!(all.contains(word), "{word} not in {all}");
        }
        assert!(all.ends_with(" loglevel=7"));
        assert!(all.len() < crate::boot::COMMAND_LINE_MAX);
    }
}
