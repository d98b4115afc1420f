//! Making a bare kernel into a place where containers can live.
//!
//! [`prepare`] is what the service needs before it can answer; [`finish`] does the rest while the
//! shim is already busy with the answer. Each system call here costs the pod's start: 2 µs on a
//! guest without hardware virtualization, a mount 30 to 60.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};
use sepal_protocol::paths::guest;
use sepal_protocol::ready::Stage;

use crate::{cgroup, sys};

/// include/uapi/linux/magic.h; libc does not have it.
const RAMFS_MAGIC: i64 = 0x8584_58f6;
/// Descriptors that a process may have: what Docker and containerd's units give.
const OPEN_FILES: u64 = 1 << 20;

struct Mount {
    what: &'static str,
    place: &'static str,
    kind: &'static str,
    flags: MsFlags,
    options: &'static str,
}

const PLAIN: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

const fn place(kind: &'static str, place: &'static str, options: &'static str) -> Mount {
    Mount {
        what: kind,
        place,
        kind,
        flags: PLAIN,
        options,
    }
}

/// Without these there is no service. The root file system is read-only: what is written goes to
/// /run, which is small, because containers have their own places.
const FIRST: &[Mount] = &[
    place("proc", "/proc", ""),
    place("sysfs", "/sys", ""),
    Mount {
        what: "devtmpfs",
        place: "/dev",
        kind: "devtmpfs",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "mode=755",
    },
    // Block root file systems are mounted below /run: devices and programs must work there.
    Mount {
        what: "run",
        place: "/run",
        kind: "tmpfs",
        flags: MsFlags::MS_NOSUID,
        options: "mode=755",
    },
    // Without favordynmods each process that enters a cgroup waits for an RCU grace period.
    place("cgroup2", "/sys/fs/cgroup", "nsdelegate,favordynmods"),
];

/// These are for what runs later.
const LATER: &[Mount] = &[
    Mount {
        what: "devpts",
        place: "/dev/pts",
        kind: "devpts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "ptmxmode=0666,mode=620,gid=5",
    },
    place("tmpfs", "/dev/shm", "mode=1777"),
    place("mqueue", "/dev/mqueue", ""),
    place("tmpfs", "/tmp", "mode=1777"),
];

/// Notes a stage of the boot.
#[must_use]
pub fn stage(name: &str) -> Stage {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME);
    let boottime_us = now.map_or(0, |now| u64::try_from(now.num_microseconds()).unwrap_or(0));
    Stage {
        name: name.to_owned(),
        boottime_us,
    }
}

/// Mounts what the service needs and protects the agent.
///
/// # Errors
/// With the mount that failed: without it the guest is of no use.
pub fn prepare() -> io::Result<()> {
    leave_initramfs()?;
    for one in FIRST {
        make(one).map_err(|error| {
            io::Error::other(format!(
                "cannot mount {} at {}: {error}",
                one.kind, one.place
            ))
        })?;
    }
    // A container's process that enters one of the agent's namespaces can neither trace it nor read
    // its memory.
    nix::sys::prctl::set_dumpable(false)?;
    // The last to go when the guest runs out of memory; what it starts sets its own.
    fs::write("/proc/self/oom_score_adj", "-1000")?;
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)?;
    Ok(())
}

/// Gives the guest a root that pivot_root(2) can change, where it has been booted from an initramfs:
/// that is the kernel's first mount, and nothing can take its place.
fn leave_initramfs() -> io::Result<()> {
    let kind = nix::sys::statfs::statfs("/")?.filesystem_type();
    if kind != nix::sys::statfs::TMPFS_MAGIC && kind.0 != RAMFS_MAGIC {
        return Ok(());
    }
    let (root, none) = ("/.root", None::<&str>);
    fs::create_dir_all(root)?;
    mount(Some("/"), root, none, MsFlags::MS_BIND, none)?;
    nix::unistd::chdir(root)?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")?;
    Ok(())
}

/// Mounts the pod's share.
///
/// # Errors
/// When the VM has no file server, or it does not answer.
pub fn mount_share() -> io::Result<()> {
    fs::create_dir_all(guest::SHARE)?;
    let flags = MsFlags::MS_NODEV;
    mount(
        Some(guest::SHARE_TAG),
        guest::SHARE,
        Some("virtiofs"),
        flags,
        None::<&str>,
    )?;
    Ok(())
}

/// A step of [`finish`]: what it is for, and what it does.
type Step = (&'static str, fn() -> io::Result<()>);

/// Logs what the boot has cost up to here: page faults are the larger part of it where they are dear.
pub fn tell_cost() {
    use nix::sys::resource::{UsageWho, getrusage};
    if !tracing::enabled!(tracing::Level::DEBUG) {
        return;
    }
    if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
        let (minor, major) = (usage.minor_page_faults(), usage.major_page_faults());
        tracing::debug!(minor, major, "page faults");
    }
}

/// Does what is not needed for the first answer. What fails here is told in the log: a container
/// that needs it fails on its own.
pub fn finish() {
    let steps: [Step; 7] = [
        ("pages for forks", sys::keep_pages_over_fork),
        ("the loopback interface", sys::loopback_up),
        ("cgroup controllers", || {
            cgroup::delegate(Path::new(cgroup::ROOT)).map_err(io::Error::other)
        }),
        ("directories", || {
            [guest::CONTAINERS, guest::NAMESPACES]
                .iter()
                .try_for_each(fs::create_dir_all)
        }),
        ("device links", device_links),
        ("huge pages", huge_pages),
        ("limits", limits),
    ];
    for (what, step) in steps {
        if let Err(error) = step() {
            tracing::warn!(%error, "cannot set up {what}");
        }
    }
    for one in LATER {
        if let Err(error) = make(one) {
            tracing::warn!(%error, "cannot mount {}", one.place);
        }
    }
}

fn make(one: &Mount) -> io::Result<()> {
    let options = (!one.options.is_empty()).then_some(one.options);
    let attempt = || {
        mount(
            Some(one.what),
            one.place,
            Some(one.kind),
            one.flags,
            options,
        )
    };
    match attempt() {
        // The image holds the mount points of the read-only root; those in /dev are made here.
        Err(Errno::ENOENT) => {
            fs::create_dir_all(one.place)?;
            attempt()?;
        }
        // The kernel may have mounted /dev itself.
        Err(Errno::EBUSY) if one.kind == "devtmpfs" => {}
        done => done?,
    }
    Ok(())
}

fn device_links() -> io::Result<()> {
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("fd/0", "/dev/stdin"),
        ("fd/1", "/dev/stdout"),
        ("fd/2", "/dev/stderr"),
    ] {
        match symlink(target, link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
    }
    Ok(())
}

/// Mounts hugetlbfs where the guest has huge pages set aside.
fn huge_pages() -> io::Result<()> {
    let pages = fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap_or_default();
    if matches!(pages.trim(), "" | "0") {
        return Ok(());
    }
    make(&place("hugetlbfs", "/dev/hugepages", ""))
}

/// What containers inherit where their spec says nothing, as on a host under systemd.
fn limits() -> io::Result<()> {
    // The kernel derives this from the memory: a few hundred in a small guest.
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY)?;
    for (name, value) in [
        // As the kubelet has it on its nodes: what counts is a container's limit, which the OOM killer
        // enforces, and not how much of a small guest's memory a program sets aside.
        ("vm/overcommit_memory", "1"),
        // Databases ask for this on every host; inside a container it cannot be set.
        ("vm/max_map_count", "1048576"),
        ("fs/inotify/max_user_instances", "1024"),
        ("kernel/keys/maxkeys", "20000"),
        ("kernel/keys/maxbytes", "2000000"),
    ] {
        if let Err(error) = fs::write(Path::new("/proc/sys").join(name), value)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, sysctl = name, "cannot set a kernel parameter");
        }
    }
    Ok(())
}

/// Powers the VM off. All that is dirty has been written by then.
pub fn power_off() -> ! {
    nix::unistd::sync();
    let Err(error) = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
    tracing::error!(%error, "cannot power off");
    // The kernel panics when PID 1 ends, and the VMM takes notice of that as well.
    std::process::exit(1)
}
