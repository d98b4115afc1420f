//! The file server as a guest and its host see it: the program itself, confined as in a pod, behind
//! real rings. Needs root.

mod guest;

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guest::*;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

#[test]
fn what_the_guest_creates_is_on_the_host_with_the_guests_owner() {
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    std::fs::create_dir(share.writable().join("home")).unwrap();
    std::os::unix::fs::chown(share.writable().join("home"), Some(1000), Some(1001)).unwrap();

    let home = guest.lookup(guest.top, "home").unwrap().node;
    (guest.uid, guest.gid) = (1000, 1001);
    let (file, handle) = guest.create(home, "notes", 0o640).unwrap();
    assert_eq!((file.attr.uid, file.attr.gid), (1000, 1001));
    assert_eq!(guest.write(file.node, handle, 0, b"from the guest"), Ok(14));
    assert_eq!(guest.read(file.node, handle, 5, 100).unwrap(), b"the guest");
    guest
        .call(FSYNC, file.node, &longs(&[handle, 0]), 0)
        .unwrap();
    guest
        .call(RELEASE, file.node, &longs(&[handle, 0, 0]), 0)
        .unwrap();

    let host = share.writable().join("home/notes");
    let metadata = host.metadata().unwrap();
    assert_eq!(metadata.ino(), file.attr.ino);
    assert_eq!((metadata.uid(), metadata.gid()), (1000, 1001));
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o640);
    assert_eq!(std::fs::read(&host).unwrap(), b"from the guest");

    std::fs::write(&host, "from the host").unwrap();
    let handle = guest.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(
        guest.read(file.node, handle, 0, 100).unwrap(),
        b"from the host"
    );
}

#[test]
fn links_special_files_attributes_and_renames_are_the_hosts() {
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let path = |name: &str| share.writable().join(name);

    guest
        .call(
            SYMLINK,
            guest.top,
            &names(&["soft", "to/where"]),
            Entry::LENGTH,
        )
        .unwrap();
    assert_eq!(
        std::fs::read_link(path("soft")).unwrap().to_str(),
        Some("to/where")
    );
    let soft = guest.lookup(guest.top, "soft").unwrap().node;
    assert_eq!(guest.call(READLINK, soft, &[], 4096).unwrap(), b"to/where");

    let (file, handle) = guest.create(guest.top, "one", 0o600).unwrap();
    let mut link = longs(&[file.node]);
    link.extend(names(&["two"]));
    let linked = Entry::parse(&guest.call(LINK, guest.top, &link, Entry::LENGTH).unwrap());
    assert_eq!((linked.node, linked.attr.nlink), (file.node, 2));

    for (name, kind) in [
        ("pipe", libc::S_IFIFO),
        ("device", libc::S_IFCHR),
        ("socket", libc::S_IFSOCK),
    ] {
        let mut node = words(&[kind | 0o644, 0x103, 0, 0]);
        node.extend(names(&[name]));
        let entry = Entry::parse(&guest.call(MKNOD, guest.top, &node, Entry::LENGTH).unwrap());
        assert_eq!(
            (entry.attr.mode, entry.attr.rdev),
            (kind | 0o644, 0x103 * u32::from(name == "device"))
        );
    }
    assert!(path("pipe").metadata().unwrap().file_type().is_fifo());
    assert_eq!(path("device").metadata().unwrap().rdev(), 0x103);
    assert!(path("socket").metadata().unwrap().file_type().is_socket());

    let mut set = words(&[5, 0, 0, 0]);
    set.extend(names(&["user.colour"]));
    set.extend(b"green");
    guest.call(SETXATTR, file.node, &set, 0).unwrap();
    let mut get = words(&[100, 0]);
    get.extend(names(&["user.colour"]));
    assert_eq!(
        guest.call(GETXATTR, file.node, &get, 100).unwrap(),
        b"green"
    );

    // Exchange, then hole: RENAME_EXCHANGE; 1 MiB of nothing with a byte behind it; SEEK_DATA.
    std::fs::write(path("other"), "other").unwrap();
    let mut exchange = longs(&[guest.top]);
    exchange.extend(words(&[libc::RENAME_EXCHANGE, 0]));
    exchange.extend(names(&["one", "other"]));
    guest.call(RENAME2, guest.top, &exchange, 0).unwrap();
    assert_eq!(std::fs::read(path("one")).unwrap(), b"other");
    guest.write(file.node, handle, 1 << 20, b"x").unwrap();
    let seek = [longs(&[handle, 0]), words(&[libc::SEEK_DATA as u32, 0])].concat();
    assert_eq!(
        u64_at(&guest.call(LSEEK, file.node, &seek, 8).unwrap(), 0),
        1 << 20
    );
    let allocate = [longs(&[handle, 0, 8192]), words(&[0, 0])].concat();
    guest.call(FALLOCATE, file.node, &allocate, 0).unwrap();
    assert!(path("other").metadata().unwrap().blocks() >= 16);
}

#[test]
fn a_write_takes_setuid_away() {
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let (file, handle) = guest.create(guest.top, "tool", 0o755).unwrap();
    let tool = share.writable().join("tool");
    std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o4755)).unwrap();
    // FUSE_WRITE_KILL_SUIDGID, which the guest's kernel sets for a writer without CAP_FSETID.
    let mut body = longs(&[handle, 0]);
    body.extend(words(&[1, 4, 0, 0, 0, 0]));
    body.push(b'x');
    guest.call(WRITE, file.node, &body, 8).unwrap();
    assert_eq!(
        tool.metadata().unwrap().permissions().mode() & 0o7777,
        0o755
    );
}

#[test]
fn a_large_write_is_in_the_file_as_it_was_sent_however_it_is_cut_into_descriptors() {
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let (file, handle) = guest.create(guest.top, "file", 0o644).unwrap();
    // Both headers are 80 bytes long.
    for (number, cuts) in [
        vec![],
        vec![80],
        vec![40, 40, 65_536, 65_536],
        vec![80, 1, 65_535, 65_537],
        vec![80, 4096, 200_000],
        vec![100, 65_516],
    ]
    .into_iter()
    .enumerate()
    {
        let data: Vec<u8> = (0..300_000).map(|n| (n % 251 + number) as u8).collect();
        guest.cuts = cuts;
        assert_eq!(guest.write(file.node, handle, 5, &data), Ok(300_000));
        let there = std::fs::read(share.writable().join("file")).unwrap();
        assert!(there[5..] == data, "cut into {:?} and the rest", guest.cuts);
    }
}

#[test]
fn a_write_for_which_there_is_room_in_part_is_written_in_part() {
    let share = Share::new();
    let small = share.mount_tmpfs("small");
    let none = None::<&str>;
    mount(none, &small, none, MsFlags::MS_REMOUNT, Some("size=128k")).unwrap();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let root = guest.lookup(ROOT, "small").unwrap();
    let (file, handle) = guest.create(root.node, "file", 0o644).unwrap();
    let data = [b'x'; 300_000];
    assert_eq!(guest.write(file.node, handle, 0, &data), Ok(128 << 10));
    let more = guest.write(file.node, handle, 128 << 10, &data);
    assert_eq!(more, Err(libc::ENOSPC));
    assert_eq!(guest.getattr(file.node).unwrap().size, 128 << 10);
}

#[test]
fn a_mount_made_later_appears_and_is_announced() {
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let early = guest.lookup(ROOT, "rootfs");
    assert_eq!(early.err(), Some(libc::ENOENT));

    let mounted = share.mount_tmpfs("rootfs");
    std::fs::write(mounted.join("inside"), "hello").unwrap();
    let root = guest.lookup(ROOT, "rootfs").unwrap();
    assert_eq!(root.attr.flags & SUBMOUNT, SUBMOUNT);
    let inside = guest.lookup(root.node, "inside").unwrap();
    assert_eq!(inside.attr.size, 5);
    let handle = guest.open(inside.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(inside.node, handle, 0, 10).unwrap(), b"hello");

    umount2(&mounted, MntFlags::MNT_DETACH).unwrap();
    let below = guest.lookup(ROOT, "rootfs").unwrap();
    assert_ne!(below.node, root.node);
    assert_eq!(guest.lookup(below.node, "inside").err(), Some(libc::ENOENT));
}

#[test]
fn what_is_in_a_volume_is_asked_for_each_time() {
    let share = Share::new();
    for directory in ["box/rootfs/mounts", "box/mounts/0"] {
        std::fs::create_dir_all(share.path().join(directory)).unwrap();
    }
    share.mount_tmpfs("box/mounts/0/volume");
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let mut walk = |path: &str| {
        let step = |(node, _), name| {
            let entry = guest.lookup(node, name).unwrap();
            (entry.node, entry.holds)
        };
        path.split('/').fold((ROOT, (0, 0)), step)
    };
    assert_eq!(walk("box/rootfs/mounts").1, (1, 1));
    let (volume, holds) = walk("box/mounts/0/volume");
    assert_eq!(holds, (0, 0));
    let (file, _) = guest.create(volume, "new", 0o600).unwrap();
    assert_eq!(file.holds, (0, 0));
}

#[test]
fn data_of_a_file_hold_until_it_is_changed_but_in_volumes_never() {
    let share = Share::new();
    std::fs::create_dir_all(share.path().join("box/mounts/0")).unwrap();
    let volume = share.mount_tmpfs("box/mounts/0/volume");
    let (own, shared) = (share.writable().join("program"), volume.join("file"));
    for path in [&own, &shared] {
        std::fs::write(path, "as it was").unwrap();
    }
    // Files that have just changed are not trusted.
    std::thread::sleep(std::time::Duration::from_millis(200));
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let program = guest.lookup(guest.top, "program").unwrap().node;
    let file = ["box", "mounts", "0", "volume", "file"]
        .iter()
        .fold(ROOT, |node, name| guest.lookup(node, name).unwrap().node);
    let mut holds = |node| guest.open_and_ask(node, libc::O_RDONLY).unwrap().1;

    assert!(!holds(program) && holds(program) && holds(program));
    assert!(!holds(file) && !holds(file));
    std::fs::write(&own, "otherwise").unwrap();
    assert!(!holds(program));
}

#[test]
fn nothing_outside_the_share_can_be_reached() {
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let up = guest.lookup(ROOT, "..");
    assert!(up.is_err() || up.unwrap().node == ROOT);
    assert!(guest.lookup(ROOT, "a/b").is_err());

    std::os::unix::fs::symlink("/etc/passwd", share.path().join("out")).unwrap();
    let out = guest.lookup(ROOT, "out").unwrap();
    assert_eq!(out.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert!(guest.open(out.node, libc::O_RDONLY).is_err());
}

#[test]
fn names_that_change_while_they_are_looked_at_lead_nowhere_else() {
    let share = Share::new();
    let (top, outside) = (share.writable(), share.path().join(".."));
    std::fs::write(outside.join("file"), "the host's").unwrap();
    std::fs::create_dir(top.join("swapped")).unwrap();
    std::fs::write(top.join("swapped/file"), "the guest's").unwrap();
    // To where it leads on the host, and to where it would from the volume's own place there.
    for (name, target) in [("absolute", outside.as_path()), ("above", "..".as_ref())] {
        std::os::unix::fs::symlink(target, top.join(name)).unwrap();
    }
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);

    let end = Instant::now() + Duration::from_secs(20);
    let over = AtomicBool::new(false);
    let (mut directories, mut links) = (0, 0);
    std::thread::scope(|scope| {
        // As another thread of the guest's would, or another pod that has the volume, and quicker.
        scope.spawn(|| {
            let (swapped, flags) = (top.join("swapped"), RenameFlags::RENAME_EXCHANGE);
            while !over.load(Ordering::Relaxed) && Instant::now() < end {
                for link in ["absolute", "above"].map(|name| top.join(name)) {
                    for _ in 0..2 {
                        renameat2(AT_FDCWD, &swapped, AT_FDCWD, &link, flags).unwrap();
                    }
                }
            }
        });
        while directories < 500 || links < 500 {
            assert!(Instant::now() < end, "{directories} and {links}");
            let Ok(swapped) = guest.lookup(guest.top, "swapped") else {
                continue;
            };
            match guest.lookup(swapped.node, "file") {
                Ok(file) => {
                    directories += 1;
                    let handle = guest.open(file.node, libc::O_RDONLY).unwrap();
                    let read = guest.read(file.node, handle, 0, 100).unwrap();
                    assert_eq!(read, b"the guest's");
                    let release = longs(&[handle, 0, 0]);
                    guest.call(RELEASE, file.node, &release, 0).unwrap();
                }
                Err(libc::ENOTDIR) => links += 1,
                Err(e) => panic!("{}", std::io::Error::from_raw_os_error(e)),
            }
        }
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn the_guest_cannot_change_the_directories_in_which_the_shim_mounts() {
    let share = Share::new();
    std::fs::create_dir_all(share.path().join("box/mounts")).unwrap();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let place = guest.lookup(ROOT, "box").unwrap().node;
    for parent in [ROOT, place] {
        let link = names(&["next", "/etc"]);
        let refused = guest.call(SYMLINK, parent, &link, Entry::LENGTH);
        assert_eq!(refused.err(), Some(libc::EROFS));
        let refused = guest.create(parent, "file", 0o600);
        assert_eq!(refused.err(), Some(libc::EROFS));
    }
    let mut moved = longs(&[ROOT]);
    moved.extend(names(&["mounts", "gone"]));
    assert_eq!(guest.call(RENAME, place, &moved, 0), Err(libc::EROFS));
    let removed = guest.call(RMDIR, place, &names(&["mounts"]), 0);
    assert_eq!(removed, Err(libc::EROFS));
    assert!(share.path().join("box/mounts").is_dir());
    // The shim goes on making them, and what is mounted there is as it is.
    let later = share.mount_tmpfs("box/later");
    let inside = guest.lookup(place, "later").unwrap().node;
    guest.create(inside, "file", 0o600).unwrap();
    assert!(later.join("file").exists());
    umount2(&later, MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn the_process_is_confined() {
    let share = Share::new();
    let server = start(&share.path());
    let guest = Guest::mount(&server);
    let process = format!("/proc/{}", server.child.id());
    // chown, dac_override, fowner, fsetid, setgid, setuid, mknod, setfcap. Not dac_read_search, which opens
    // handles.
    let expected = [0, 1, 3, 4, 6, 7, 27, 31]
        .iter()
        .fold(0_u64, |all, bit| all | 1 << bit);
    for set in ["CapEff", "CapPrm"] {
        assert_eq!(
            u64::from_str_radix(&server.status_field(set), 16),
            Ok(expected),
            "{set}"
        );
    }
    assert_eq!(
        u64::from_str_radix(&server.status_field("CapBnd"), 16),
        Ok(0)
    );
    assert_eq!(server.status_field("NoNewPrivs"), "1");
    assert_eq!(server.status_field("Seccomp"), "2");
    for namespace in ["mnt", "ipc", "uts"] {
        let theirs = std::fs::read_link(format!("{process}/ns/{namespace}")).unwrap();
        assert_ne!(
            theirs,
            std::fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap()
        );
    }
    let mounts = std::fs::read_to_string(format!("{process}/mountinfo")).unwrap();
    // The share, and what was mounted in it before.
    assert_eq!(mounts.lines().count(), 2, "{mounts}");
    guest.disconnect();
}

#[test]
fn it_ends_in_order_when_the_front_end_is_gone() {
    let share = Share::new();
    let mut server = start(&share.path());
    Guest::mount(&server).disconnect();
    let (status, said) = server.end();
    assert!(status.success(), "{status}: {said}");
}

#[test]
fn alone_in_a_pid_namespace_it_serves_and_ends_with_who_started_it() {
    let share = Share::new();
    let mut starter = Command::new("sleep").arg("1000").spawn().unwrap();
    let pidfd = pidfd(starter.id());
    let mut server = start_alone(&share.path(), &pidfd);
    Guest::mount(&server).disconnect();
    let (status, said) = server.end();
    assert!(status.success(), "{status}: {said}");

    let mut server = start_alone(&share.path(), &pidfd);
    assert!(server.child.try_wait().unwrap().is_none());
    starter.kill().unwrap();
    let (status, said) = server.end();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(
        said.contains("the process that started this one ended"),
        "{said}"
    );
    starter.wait().unwrap();
}

#[test]
fn what_it_cannot_serve_it_refuses_in_one_sentence() {
    let plain = tempfile::tempdir().unwrap();
    let missing = plain.path().join("missing");
    for (share, expected) in [
        (plain.path(), "it is not a mount point"),
        (missing.as_path(), "cannot open the share"),
    ] {
        let (status, said) = start(share).end();
        assert_eq!(status.code(), Some(1));
        assert!(
            said.starts_with("sepal-fs: cannot") && said.contains(expected),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn broken_requests_are_given_back_and_the_next_is_served() {
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let outside = 1 << 40;
    let chains: [&[(u64, u32, u16)]; 6] = [
        &[(0x10_0000, 4, 0)],
        &[(0x10_0000, 0, 0), (0x40_0000, 0, 2)],
        &[(outside, 100, 0), (0x40_0000, 100, 2)],
        &[(0x10_0000, 100, 0), (outside, 100, 2)],
        &[(0x10_0000, u32::MAX, 0), (0x40_0000, 100, 2)],
        &[(0x40_0000, 100, 2), (0x10_0000, 100, 0)],
    ];
    for chain in chains {
        guest.submit(chain);
        assert!(guest.getattr(ROOT).is_ok(), "after {chain:x?}");
    }
    // A descriptor that is its own next.
    let mut circle = longs(&[0x10_0000]);
    circle.extend(words(&[40]));
    circle.extend([1, 0, 0, 0]);
    guest.submit_table(&circle);
    // Lengths that lie, names that do not end, an operation that is none.
    for (length, opcode) in [
        (0, LOOKUP),
        (39, LOOKUP),
        (1 << 20, LOOKUP),
        (41, LOOKUP),
        (40, 9999),
    ] {
        let mut request = words(&[length, opcode]);
        request.extend(longs(&[7, ROOT]));
        request.extend(words(&[0, 0, 0, 0]));
        request.push(b'x');
        guest.exchange(&request, 200);
        assert!(
            guest.getattr(ROOT).is_ok(),
            "after length {length} of operation {opcode}"
        );
    }
}

#[test]
fn a_request_in_memory_that_was_not_given_ends_the_server_with_a_sentence() {
    let share = Share::new();
    let mut server = start(&share.path());
    let mut guest = Guest::mount(&server);
    guest.take_half();
    let mut table = longs(&[0x60_0000]);
    table.extend(words(&[40, 0]));
    guest.offer(&table);
    let (status, said) = server.end();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("memory that it was not given"), "{said}");
}

#[test]
fn offsets_that_no_file_has_are_refused_and_the_next_request_is_served() {
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let (file, named) = guest.create(guest.top, "file", 0o644).unwrap();
    let mut body = words(&[libc::O_RDWR as u32, libc::S_IFREG | 0o600, 0, 0]);
    body.extend(names(&["/"]));
    let reply = guest.call(TMPFILE, guest.top, &body, Entry::LENGTH + 16);
    let reply = reply.unwrap();
    let (unnamed, handle) = (Entry::parse(&reply), u64_at(&reply, 128));
    for (node, handle) in [(file.node, named), (unnamed.node, handle)] {
        for offset in [1 << 63, u64::MAX] {
            let (written, read) = (
                guest.write(node, handle, offset, b"x"),
                guest.read(node, handle, offset, 9),
            );
            assert_eq!(written, Err(libc::EINVAL));
            assert_eq!(read, Err(libc::EINVAL));
        }
        assert_eq!(guest.write(node, handle, 0, b"text"), Ok(4));
        assert_eq!(guest.read(node, handle, 0, 9).unwrap(), b"text");
    }
}

#[test]
fn requests_without_room_for_an_answer_are_given_back_and_the_next_is_served() {
    const READDIR: u32 = 28;
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    for opcode in [READ, READDIR, READDIRPLUS] {
        for room in [0, 1, 15] {
            let mut request = words(&[80, opcode]);
            request.extend(longs(&[7, ROOT]));
            request.extend(words(&[0, 0, 1, 0]));
            request.extend([0; 40]);
            assert!(guest.exchange(&request, room).is_empty());
            assert!(guest.getattr(ROOT).is_ok(), "after operation {opcode}");
        }
    }
}

#[test]
fn inodes_cost_a_descriptor_each_until_the_guest_forgets_them() {
    const FILES: usize = 1000;
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let directory = share.mount_tmpfs("many");
    for number in 0..FILES {
        std::fs::File::create(directory.join(number.to_string())).unwrap();
    }
    let parent = guest.lookup(ROOT, "many").unwrap().node;
    let before = server.descriptors();
    let mut nodes = Vec::new();
    for number in 0..FILES {
        nodes.push(guest.lookup(parent, &number.to_string()).unwrap().node);
    }
    assert_eq!(server.descriptors(), before + FILES);
    let last = nodes[FILES - 1];
    let handle = guest.open(last, libc::O_RDONLY).unwrap();
    guest
        .call(RELEASE, last, &longs(&[handle, 0, 0]), 0)
        .unwrap();
    for node in nodes {
        guest.tell(FORGET, node, &longs(&[1]));
    }
    assert_eq!(guest.getattr(last).err(), Some(libc::EBADF));
    assert_eq!(server.descriptors(), before);
}

#[test]
fn directories_are_read_with_their_attributes() {
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let made = words(&[0o755, 0])
        .into_iter()
        .chain(names(&["d"]))
        .collect::<Vec<_>>();
    let directory = Entry::parse(&guest.call(MKDIR, guest.top, &made, Entry::LENGTH).unwrap()).node;
    std::fs::write(share.writable().join("d/file"), "12345").unwrap();
    let handle = u64_at(
        &guest.call(OPENDIR, directory, &words(&[0, 0]), 16).unwrap(),
        0,
    );
    let body = [longs(&[handle, 0]), words(&[4096, 0, 0, 0, 0, 0])].concat();
    let listing = guest.call(READDIRPLUS, directory, &body, 4096).unwrap();
    let (mut found, mut at) = (Vec::new(), 0);
    while at < listing.len() {
        let length = u32_at(&listing, at + 144) as usize;
        let name = String::from_utf8(listing[at + 152..at + 152 + length].to_vec()).unwrap();
        found.push((name, Entry::parse(&listing[at..]).attr.size));
        at += (152 + length).next_multiple_of(8);
    }
    found.retain(|(name, _)| name != "." && name != "..");
    assert_eq!(found, [("file".to_owned(), 5)]);

    // Truncation and times by descriptor: FATTR_SIZE | FATTR_MTIME.
    let file = guest.lookup(directory, "file").unwrap().node;
    let mut change = words(&[1 << 3 | 1 << 5, 0]);
    change.extend(longs(&[0, 2, 0, 0, 1234, 0]));
    change.extend(words(&[0; 10]));
    guest.call(SETATTR, file, &change, 104).unwrap();
    let metadata = share.writable().join("d/file").metadata().unwrap();
    assert_eq!((metadata.len(), metadata.mtime()), (2, 1234));
}

#[test]
fn a_file_without_a_name_gets_one_later() {
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    (guest.uid, guest.gid) = (1000, 1001);
    let mut body = words(&[libc::O_RDWR as u32, libc::S_IFREG | 0o666, 0o027, 0]);
    body.extend(names(&["/"]));
    let reply = guest
        .call(TMPFILE, guest.top, &body, Entry::LENGTH + 16)
        .unwrap();
    let (file, handle) = (Entry::parse(&reply), u64_at(&reply, 128));
    assert_eq!(
        (file.attr.nlink, file.attr.mode),
        (0, libc::S_IFREG | 0o640)
    );
    assert_eq!((file.attr.uid, file.attr.gid), (1000, 1001));
    assert_eq!(std::fs::read_dir(share.writable()).unwrap().count(), 0);

    assert_eq!(guest.write(file.node, handle, 0, b"unseen"), Ok(6));
    assert_eq!(guest.getattr(file.node).unwrap().size, 6);
    let again = guest.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(file.node, again, 2, 100).unwrap(), b"seen");
    assert_eq!(guest.lookup(file.node, "x").err(), Some(libc::ENOTDIR));

    let mut link = longs(&[file.node]);
    link.extend(names(&["published"]));
    let named = Entry::parse(&guest.call(LINK, guest.top, &link, Entry::LENGTH).unwrap());
    assert_eq!((named.attr.ino, named.attr.nlink), (file.attr.ino, 1));
    assert_eq!(
        std::fs::read(share.writable().join("published")).unwrap(),
        b"unseen"
    );
    assert_eq!(guest.write(file.node, handle, 6, b" before"), Ok(7));
    assert_eq!(guest.getattr(named.node).unwrap().size, 13);

    let before = server.descriptors();
    guest
        .call(RELEASE, file.node, &longs(&[handle, 0, 0]), 0)
        .unwrap();
    guest
        .call(RELEASE, file.node, &longs(&[again, 0, 0]), 0)
        .unwrap();
    guest.tell(FORGET, file.node, &longs(&[1]));
    assert_eq!(server.descriptors(), before - 2);
    assert_eq!(guest.getattr(file.node).err(), Some(libc::EBADF));
}

#[test]
fn times_before_1970_are_those_of_a_file_without_a_name_too() {
    let share = Share::new();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    let mut body = words(&[libc::O_RDWR as u32, libc::S_IFREG | 0o666, 0, 0]);
    body.extend(names(&["/"]));
    let made = guest.call(TMPFILE, guest.top, &body, Entry::LENGTH + 16);
    let file = Entry::parse(&made.unwrap()).node;
    // FATTR_MTIME; what seconds a host cannot keep it makes of them what it can.
    for seconds in [-1, -1_000_000, i64::MIN, i64::MAX] {
        let mut change = words(&[1 << 5, 0]);
        change.extend(longs(&[0, 0, 0, 0, seconds as u64, 0]));
        change.extend(words(&[0, 7, 0, 0, 0, 0, 0, 0, 0, 0]));
        guest.call(SETATTR, file, &change, 104).unwrap();
    }
    let mut link = longs(&[file]);
    link.extend(names(&["published"]));
    let mut change = words(&[1 << 5, 0]);
    change.extend(longs(&[0, 0, 0, 0, -5_i64 as u64, 0]));
    change.extend(words(&[0; 10]));
    guest.call(SETATTR, file, &change, 104).unwrap();
    guest.call(LINK, guest.top, &link, Entry::LENGTH).unwrap();
    let metadata = share.writable().join("published").metadata().unwrap();
    assert_eq!(metadata.mtime(), -5);
}

#[test]
fn a_guest_without_submounts_is_refused_in_silence() {
    let share = Share::new();
    let mut server = start(&share.path());
    let mut guest = Guest::connect(&server);
    // All flags but FUSE_SUBMOUNTS and FUSE_INIT_EXT.
    let flags: u32 = 0x7fff_ffff & !(1 << 26) & !(1 << 27) & !(1 << 30);
    let mut init = words(&[7, 38, 0x2_0000, flags, 0]);
    init.extend([0; 44]);
    for _ in 0..100 {
        assert_eq!(guest.call(INIT, 0, &init, 64), Err(libc::EPROTO));
    }
    guest.disconnect();
    let (_, said) = server.end();
    assert!(said.len() < 4096, "{said}");
}

#[test]
fn a_broken_ring_is_left_alone_until_the_guest_rings_again() {
    let share = Share::new();
    let mut server = start(&share.path());
    let mut guest = Guest::mount(&server);
    guest.break_ring();
    std::thread::sleep(Duration::from_millis(300));
    guest.disconnect();
    let (status, said) = server.end();
    assert!(status.success(), "{status}: {said}");
    let complaints = said.matches("broke its queue").count();
    assert!((1..10).contains(&complaints), "{complaints} complaints");
}
