//! The machine without Linux: kernels of a few instructions on real KVM, and the operator's errors.

use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::guest::{USER, Vmm, bare, out};
use sepal_protocol::control::{Request, Response};
use sepal_protocol::vm::{ExitCause, VmSpec};

/// Boots a kernel of these instructions and says how it ended.
fn end_of(code: &[u8]) -> ExitCause {
    let mut vmm = Vmm::spawn();
    let kernel = vmm.file("kernel", &bare(code));
    vmm.boot(vmm.spec(kernel));
    vmm.wait()
}

#[test]
fn each_end_of_a_guest_has_its_status() {
    if !super::guest::kvm() {
        return;
    }
    assert_eq!(end_of(&out(0x600, 0x34)), ExitCause::PowerOff);
    assert_eq!(end_of(&out(0x602, 0x5a)), ExitCause::Reboot);
    let panic_and_reboot = [out(0x505, 1), out(0x602, 0x5a)].concat();
    assert_eq!(end_of(&panic_and_reboot), ExitCause::GuestPanic);
    // A kernel that panics and hangs does not keep its pod.
    assert_eq!(end_of(&out(0x505, 1)), ExitCause::GuestPanic);
    // An invalid instruction without any handler.
    assert_eq!(end_of(&[0x0f, 0x0b]), ExitCause::GuestCrash);
}

#[test]
fn the_vmm_ends_with_its_shim() {
    if !super::guest::kvm() {
        return;
    }
    let mut vmm = Vmm::spawn();
    let kernel = vmm.file("kernel", &bare(&[]));
    vmm.boot(vmm.spec(kernel));
    vmm.control = None;
    assert_eq!(vmm.wait(), ExitCause::PowerOff);
    // And before it has been told what to boot.
    let mut vmm = Vmm::spawn();
    vmm.control = None;
    assert_eq!(vmm.wait(), ExitCause::PowerOff);
}

#[test]
fn requests_are_answered_in_order_by_a_busy_machine() {
    if !super::guest::kvm() {
        return;
    }
    let mut vmm = Vmm::spawn();
    let kernel = vmm.file("kernel", &bare(&[]));
    vmm.boot(vmm.spec(kernel));
    for _ in 0..50 {
        assert_eq!(vmm.ask(&Request::Pause), Response::Ok);
        let Response::State(state) = vmm.ask(&Request::State) else {
            panic!("no state")
        };
        assert!(!state.running);
        assert_eq!(vmm.ask(&Request::Resume), Response::Ok);
    }
    let Response::State(state) = vmm.ask(&Request::State) else {
        panic!("no state")
    };
    assert!(state.running && state.memory == 256 << 20 && state.cpus == 1);
    let remove = Request::RemoveDevice {
        id: "nothing".into(),
    };
    let Response::Error { message } = vmm.ask(&remove) else {
        panic!("no error")
    };
    assert!(message.contains("nothing"), "{message}");

    // A second client, by the listening socket.
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    let client = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let path = vmm.dir.path().join("control.sock");
    connect(client.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    nix::unistd::write(&client, br#"{"unknown":1}"#).unwrap();
    let answer = sepal_protocol::control::receive::<Response>(&client)
        .unwrap()
        .0;
    assert!(matches!(answer, Response::Error { .. }));
    sepal_protocol::control::send(&client, &Request::Quit, &[]).unwrap();
    let answer = sepal_protocol::control::receive::<Response>(&client)
        .unwrap()
        .0;
    assert_eq!(answer, Response::Ok);
    assert_eq!(vmm.wait(), ExitCause::PowerOff);
}

/// The status of a thread that has confined itself: its filter is the last that it takes.
fn confined(task: &Path) -> String {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let status = std::fs::read_to_string(task.join("status")).unwrap();
        if status.contains("Seccomp:\t2") {
            return status;
        }
        assert!(Instant::now() < end, "{status}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn its_pid_leads_to_the_containers_files_and_its_privileges_are_gone() {
    if !super::guest::kvm() || std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() != 0) {
        eprintln!("skipped: needs KVM and root");
        return;
    }
    let vmm = Vmm::spawn();
    let kernel = vmm.file("kernel", &bare(&[]));
    vmm.boot(vmm.spec(kernel));
    let process = PathBuf::from(format!("/proc/{}", vmm.child.id()));
    let names = |directory| -> Vec<_> {
        let entries = std::fs::read_dir(process.join(directory)).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    };
    // What the guest may dial is all that there is.
    assert_eq!(names("root"), ["vsock"]);
    let mounts = std::fs::read_to_string(process.join("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains(" / ro,nosuid,nodev,noexec"), "{mounts}");
    for namespace in ["mnt", "ipc", "uts"] {
        let of = |process: &str| std::fs::read_link(format!("{process}/ns/{namespace}")).unwrap();
        assert_ne!(of(&process.to_string_lossy()), of("/proc/self"));
    }
    let rootfs = vmm.dir.path().join("rootfs");
    std::fs::create_dir(&rootfs).unwrap();
    let directory = std::fs::File::open(&rootfs).unwrap();
    let enter = || vmm.ask_with(&Request::EnterRoot, &[directory.as_raw_fd()]);
    // An image may close its root directory to others.
    std::fs::set_permissions(&rootfs, std::fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(enter(), Response::Ok);
    assert_eq!(std::fs::read_link(process.join("root")).unwrap(), rootfs);
    for task in std::fs::read_dir(process.join("task")).unwrap() {
        let status = confined(&task.unwrap().path());
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            assert!(
                status.contains(&format!("{set}:\t0000000000000000")),
                "{status}"
            );
        }
        for ids in ["Uid", "Gid"] {
            let user = format!("{ids}:\t{USER}\t{USER}\t{USER}\t{USER}\n");
            assert!(status.contains(&user), "{status}");
        }
        assert!(status.contains("Groups:\t \n"), "{status}");
    }
    assert!(matches!(enter(), Response::Error { .. }));
    let nothing = vmm.ask(&Request::EnterRoot);
    assert!(matches!(nothing, Response::Error { .. }));
}

/// Sends a specification that cannot be booted; returns what the operator is told.
fn refusal(change: impl FnOnce(&Vmm, &mut VmSpec)) -> String {
    let mut vmm = Vmm::spawn();
    let kernel = vmm.file("kernel", &bare(&out(0x600, 0x34)));
    let mut spec = vmm.spec(kernel);
    change(&vmm, &mut spec);
    let response = vmm.ask(&Request::Boot(Box::new(spec)));
    let Response::Error { message } = response else {
        panic!("{response:?}")
    };
    assert_eq!(vmm.wait(), ExitCause::Refused);
    assert!(!message.contains('\n') && !message.is_empty());
    message
}

#[test]
fn what_cannot_be_booted_is_named_with_its_remedy() {
    if !super::guest::kvm() {
        return;
    }
    let kernels = |spec: &mut VmSpec, path: Option<PathBuf>| {
        (spec.kernels.hardware, spec.kernels.deprivileged) = (path.clone(), path);
    };
    let message = refusal(|_, spec| kernels(spec, Some("/nonexistent/vmlinux".into())));
    assert!(
        message.contains("/nonexistent/vmlinux") && message.contains("install"),
        "{message}"
    );
    let message = refusal(|_, spec| kernels(spec, None));
    assert!(message.contains("configur"), "{message}");
    let message = refusal(|vmm, spec| {
        let whole = bare(&[0x90; 4096]);
        kernels(spec, Some(vmm.file("cut", &whole[..whole.len() - 1])));
    });
    assert!(message.contains("truncated"), "{message}");
    let message = refusal(|vmm, spec| kernels(spec, Some(vmm.file("text", b"not a kernel"))));
    assert!(message.contains("not an ELF file"), "{message}");
    let message = refusal(|_, spec| spec.memory.size = 16 << 20);
    assert!(message.contains("multiple of 2 MiB"), "{message}");
    let message = refusal(|_, spec| spec.cpus.boot = 0);
    assert!(message.contains("CPUs"), "{message}");
    let message = refusal(|_, spec| spec.image = Some("/nonexistent/guest.erofs".into()));
    assert!(message.contains("/nonexistent/guest.erofs"), "{message}");
    let message = refusal(|vmm, spec| spec.image = Some(vmm.file("empty", b"")));
    assert!(message.contains("empty"), "{message}");
    let message = refusal(|_, spec| spec.vsock = "/nonexistent/vsock.sock".into());
    assert!(message.contains("/nonexistent/vsock.sock"), "{message}");
    let message = refusal(|_, spec| {
        let socket = sepal_protocol::vm::FdIndex(3);
        spec.fs.push(sepal_protocol::vm::FsSpec {
            tag: "sepal".into(),
            socket,
        });
    });
    assert!(message.contains("descriptor 3"), "{message}");
}

#[test]
fn a_kernel_loaded_in_advance_is_used_only_if_it_is_the_one_asked_for() {
    if !super::guest::kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let powers_off = dir.path().join("powers-off");
    std::fs::write(&powers_off, bare(&out(0x600, 0x34))).unwrap();
    let reboots = dir.path().join("reboots");
    std::fs::write(&reboots, bare(&out(0x602, 0x5a))).unwrap();
    for (asked, end) in [
        (&powers_off, ExitCause::PowerOff),
        (&reboots, ExitCause::Reboot),
    ] {
        let flags = ["--preload", "--preload-deprivileged"].map(std::ffi::OsStr::new);
        let path = powers_off.as_os_str();
        let mut vmm = Vmm::spawn_with(&[flags[0], path, flags[1], path]);
        vmm.boot(vmm.spec(asked.clone()));
        assert_eq!(vmm.wait(), end);
    }
}
