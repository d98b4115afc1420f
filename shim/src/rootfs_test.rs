use std::os::fd::AsFd;

use super::*;

#[test]
fn options_are_flags_or_data() {
    let options = ["ro", "lowerdir=/a:/b", "nodev", "volatile", "defaults"].map(String::from);
    let (flags, data) = split_options(&options);
    assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
    assert_eq!(data, "lowerdir=/a:/b,volatile");
}

#[test]
fn mount_points_are_found_with_spaces_and_not_beside() {
    let mountinfo = "1 0 0:1 / /run/sepal/p/share rw - tmpfs t rw\n\
                     2 1 0:2 / /run/sepal/p/share/a\\040b rw - tmpfs t rw\n\
                     3 1 0:3 / /run/sepal/p/share2 rw - tmpfs t rw\n";
    let found = mount_points_below(mountinfo, Path::new("/run/sepal/p/share"));
    let expected = ["/run/sepal/p/share", "/run/sepal/p/share/a b"].map(PathBuf::from);
    assert_eq!(found, expected);
}

#[test]
fn a_container_comes_and_goes_and_volumes_keep_their_files() {
    if !sys::is_root() {
        return;
    }
    let pod = tempfile::tempdir().unwrap();
    let volume = tempfile::tempdir().unwrap();
    std::fs::write(volume.path().join("precious"), "x").unwrap();
    let file = volume.path().join("precious");
    let share = Share::create(pod.path()).unwrap();
    let read_only = BindOptions {
        read_only: true,
        ..BindOptions::default()
    };
    let binds = [
        Bind {
            source: volume.path().into(),
            options: read_only,
            directory: true,
            owners: None,
        },
        Bind {
            source: file.clone(),
            options: BindOptions::default(),
            directory: false,
            owners: None,
        },
    ];
    let root = RootMount {
        kind: "bind".into(),
        source: volume.path().display().to_string(),
        options: vec!["rbind".into(), "rw".into()],
    };
    share
        .add("c1", Path::new("/nonexistent"), &[root], &binds)
        .unwrap();
    let here = sys::pidfd_open(std::process::id()).unwrap();
    share.attach("c1", &binds, here.as_fd()).unwrap();
    let in_share = share.path().join("c1/mounts/0");
    assert!(in_share.join("precious").exists());
    assert!(
        std::fs::write(in_share.join("new"), "").is_err(),
        "read-only"
    );
    assert_eq!(
        std::fs::read_to_string(share.path().join("c1/mounts/1")).unwrap(),
        "x"
    );
    assert!(share.path().join("c1/rootfs/precious").exists());

    let absent = Bind {
        source: "/nonexistent".into(),
        ..binds[0].clone()
    };
    let failed = share
        .add("c2", Path::new("/nonexistent"), &[], &[absent])
        .unwrap_err();
    assert!(matches!(failed, Error::None(_)), "{failed}");
    assert!(!share.path().join("c2").exists());

    share.remove_all();
    assert!(!share.path().exists());
    assert_eq!(std::fs::read_to_string(file).unwrap(), "x");
}

/// An overlay of these directories, and of `up` and `work`, below one.
fn layers(files: &Path, lower: &[&str]) -> RootMount {
    let place = |name: &&str| files.join(name).display().to_string();
    let lower: Vec<_> = lower.iter().map(place).collect();
    RootMount {
        kind: OVERLAY.into(),
        source: OVERLAY.into(),
        options: vec![
            format!("workdir={}", place(&"work")),
            format!("upperdir={}", place(&"up")),
            format!("lowerdir={}", lower.join(":")),
        ],
    }
}

/// A pod's share with the container `c1`.
fn shared(pod: &Path, root: RootMount, binds: &[Bind]) -> Share {
    let share = Share::create(pod).unwrap();
    let none = Path::new("/nonexistent");
    share.add("c1", none, &[root], binds).unwrap();
    let here = sys::pidfd_open(std::process::id()).unwrap();
    share.attach("c1", binds, here.as_fd()).unwrap();
    share
}

#[test]
fn a_root_of_layers_and_a_volume_show_other_owners_and_take_them() {
    if !sys::is_root() {
        return;
    }
    // Not on a tmpfs that the machine may have at /tmp: overlayfs wants attributes of the upper one.
    let files = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = |name: &str| files.path().join(name);
    for name in ["one", "two", "up", "work", "volume"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    std::fs::write(path("one/file"), "").unwrap();
    std::fs::write(path("two/other"), "").unwrap();
    std::os::unix::fs::chown(path("two/other"), Some(1), Some(2)).unwrap();
    std::os::unix::fs::chown(path("up"), Some(700_000), Some(700_000)).unwrap();
    let map = "0:700000:65536";
    let option = |name: &str, value: &str| format!("{name}={value}");
    let mut root = layers(files.path(), &["two", "one"]);
    root.options
        .extend([option("uidmap", map), option("gidmap", map)]);
    let users = Users::of_options(&root.options).unwrap().unwrap();
    let binds = [Bind {
        source: path("volume"),
        options: BindOptions::default(),
        directory: true,
        owners: Some(IdMap {
            users,
            recursive: false,
        }),
    }];
    let pod = tempfile::tempdir().unwrap();
    let share = shared(pod.path(), root, &binds);
    let owner = |path: &Path| {
        let metadata = path.metadata().unwrap();
        (metadata.uid(), metadata.gid())
    };
    let rootfs = share.path().join("c1/rootfs");
    assert_eq!(owner(&rootfs.join("file")), (700_000, 700_000));
    assert_eq!(owner(&rootfs.join("other")), (700_001, 700_002));
    let volume = share.path().join("c1/mounts/0");
    assert_eq!(owner(&volume), (700_000, 700_000));
    // Root of the host is nobody there.
    assert!(std::fs::write(volume.join("file"), "").is_err());
    std::os::unix::fs::chown(&volume, Some(700_001), None).unwrap();
    assert_eq!(owner(&path("volume")), (1, 0));
    assert_eq!(owner(&path("two/other")), (1, 2), "as it was");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("/layers"), "{mounts}");
    share.remove_all();
    assert!(path("one/file").exists());
}

#[test]
fn a_device_node_in_the_share_is_no_device_on_the_host() {
    if !sys::is_root() {
        return;
    }
    let files = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = |name: &str| files.path().join(name);
    for name in ["lower", "up", "work", "volume"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    for directory in ["up", "volume"] {
        let made = std::process::Command::new("mknod")
            .arg(path(directory).join("null"))
            .args(["c", "1", "3"])
            .status();
        assert!(made.unwrap().success());
    }
    let binds = [Bind {
        source: path("volume"),
        options: BindOptions::default(),
        directory: true,
        owners: None,
    }];
    let pod = tempfile::tempdir().unwrap();
    let share = shared(pod.path(), layers(files.path(), &["lower"]), &binds);
    for node in ["c1/rootfs/null", "c1/mounts/0/null"] {
        let opened = File::open(share.path().join(node));
        let error = opened.expect_err(node);
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{node}: {error}");
    }
    share.remove_all();
}

/// A shared mount of the test's own, gone with it.
struct Shared(tempfile::TempDir);

impl Shared {
    fn new() -> Self {
        let shared = Self(tempfile::tempdir().unwrap());
        let path = shared.0.path();
        sys::bind(path, path, BindOptions::default()).unwrap();
        let none = None::<&str>;
        mount(none, path, none, MsFlags::MS_SHARED, none).unwrap();
        shared
    }

    fn mount(path: &Path) {
        let (name, none) = (Some("tmpfs"), None::<&str>);
        mount(name, path, name, MsFlags::empty(), none).unwrap();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        unmount_below(self.0.path());
    }
}

/// A process in a mount namespace of its own whose root directory is the share, as the file
/// server's.
struct Server(std::process::Child);

impl Server {
    fn of(share: &Share) -> Self {
        let share = share.path().display();
        // The old root stays below a directory; the shell waits for the end of its input.
        let script = format!("cd {share} && mkdir .old && pivot_root . .old && read end");
        let child = std::process::Command::new("unshare")
            .args(["--mount", "--propagation", "slave", "sh", "-c", &script])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut server = Self(child);
        while !server.path("/.old/proc").exists() {
            assert!(server.0.try_wait().unwrap().is_none(), "it has failed");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        server
    }

    /// What it has there.
    fn path(&self, path: &str) -> PathBuf {
        format!("/proc/{}/root{path}", self.0.id()).into()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_device_node_in_a_root_file_system_is_no_device_to_the_file_server() {
    if !sys::is_root() {
        return;
    }
    let pod = tempfile::tempdir().unwrap();
    let files = Shared::new();
    let files = files.0.path();
    for name in ["up", "work", "lower"] {
        std::fs::create_dir(files.join(name)).unwrap();
    }
    let share = Share::create(pod.path()).unwrap();
    // It is there before the mount, as it is for all containers of a pod but the first.
    let server = Server::of(&share);
    let bind = RootMount {
        kind: "bind".into(),
        source: files.join("lower").display().to_string(),
        options: vec!["rbind".into(), "rw".into()],
    };
    for (name, root) in [("c1", layers(files, &["lower"])), ("c2", bind)] {
        share
            .add(name, Path::new("/nonexistent"), &[root], &[])
            .unwrap();
        let node = server.path(&format!("/{name}/rootfs/zero"));
        let (mode, device) = (nix::sys::stat::Mode::S_IRUSR, nix::sys::stat::makedev(1, 5));
        nix::sys::stat::mknod(&node, nix::sys::stat::SFlag::S_IFCHR, mode, device).unwrap();
        let opened = File::open(&node).map_err(|e| e.kind());
        assert_eq!(opened.err(), Some(std::io::ErrorKind::PermissionDenied));
        std::fs::remove_file(&node).unwrap();
        let program = server.path(&format!("/{name}/rootfs/program"));
        std::fs::copy("/bin/true", &program).unwrap();
        let run = std::process::Command::new(&program).status();
        assert_eq!(
            run.map_err(|e| e.kind()).err(),
            Some(std::io::ErrorKind::PermissionDenied)
        );
        std::fs::remove_file(&program).unwrap();
        share.remove(name);
    }
    drop(server);
    std::fs::remove_dir(share.path().join(".old")).unwrap();
    share.remove_all();
}

#[test]
fn the_host_may_mount_and_remove_in_volumes_that_follow_it_and_in_others() {
    if !sys::is_root() {
        return;
    }
    let pod = tempfile::tempdir().unwrap();
    let source = Shared::new();
    let source = source.0.path();
    for name in ["early", "late", "kept"] {
        std::fs::create_dir(source.join(name)).unwrap();
    }
    Shared::mount(&source.join("early"));
    std::fs::create_dir(source.join("early/late")).unwrap();
    let share = Share::create(pod.path()).unwrap();
    let server = Server::of(&share);
    let bind = |follows_source| Bind {
        source: source.into(),
        options: BindOptions {
            recursive: true,
            follows_source,
            ..BindOptions::default()
        },
        directory: true,
        owners: None,
    };
    let (own, binds) = (tempfile::tempdir().unwrap(), [bind(true), bind(false)]);
    std::fs::create_dir(own.path().join("rootfs")).unwrap();
    share
        .add("c1", &own.path().join("rootfs"), &[], &binds)
        .unwrap();
    let pidfd = sys::pidfd_open(server.0.id()).unwrap();
    share.attach("c1", &binds, pidfd.as_fd()).unwrap();

    let (slave, private) = (server.path("/c1/mounts/0"), server.path("/c1/mounts/1"));
    assert!(private.join("early/late").exists(), "what was there before");
    for late in ["late", "early/late"] {
        Shared::mount(&source.join(late));
        std::fs::write(source.join(late).join("file"), "").unwrap();
        assert!(slave.join(late).join("file").exists(), "{late}");
        assert!(!private.join(late).join("file").exists(), "{late}");
    }
    umount2(&source.join("late"), MntFlags::empty()).unwrap();
    assert!(!slave.join("late/file").exists(), "unmounted");

    unmount_below(&source.join("early"));
    std::fs::remove_dir(source.join("early")).unwrap();
    assert!(!slave.join("early").exists());

    share.remove("c1");
    assert!(!share.path().join("c1").exists());
    let mounts = format!("/proc/{}/mountinfo", server.0.id());
    let mounts = std::fs::read_to_string(mounts).unwrap();
    assert!(!mounts.contains(" /c1"), "{mounts}");
    drop(server);
    std::fs::remove_dir(share.path().join(".old")).unwrap();
    share.remove_all();
    assert!(!share.path().exists());
    assert!(source.join("kept").exists(), "the host's stays");
}
