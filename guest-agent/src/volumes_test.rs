use std::os::unix::fs::{MetadataExt, symlink};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use sepal_protocol::agent::VolumeNames;

use super::*;

const DIRECTORY: u32 = libc::S_IFDIR | 0o755;
const REGULAR: u32 = libc::S_IFREG | 0o640;
const LINK: u32 = libc::S_IFLNK | 0o777;

fn file(path: &str, mode: u32, content: &[u8]) -> VolumeFile {
    VolumeFile {
        path: path.into(),
        mode,
        uid: Uid::effective().as_raw(),
        gid: Gid::effective().as_raw(),
        mtime_ns: 1_700_000_000_123_456_789,
        size: content.len() as u64,
        content: content.into(),
        ..Default::default()
    }
}

/// A version as the shim tells it: keys and what they hold.
fn version(name: &str, keys: &[(&str, &[u8])]) -> WriteVolumeRequest {
    let mut files = vec![file("", DIRECTORY, b""), file(name, DIRECTORY, b"")];
    let mut names = vec![name.into(), DATA.into()];
    for (key, content) in keys {
        files.push(file(&format!("{name}/{key}"), REGULAR, content));
    }
    files.push(file(DATA, LINK, name.as_bytes()));
    for (key, _) in keys {
        files.push(file(key, LINK, format!("{DATA}/{key}").as_bytes()));
        names.push(key.as_bytes().into());
    }
    WriteVolumeRequest {
        files,
        names: Some(VolumeNames {
            names,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap();
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<_> = entries
        .map(|entry| name(entry).into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_version_takes_the_place_of_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("1");
    write(&copy, &version("..1", &[("kept", b"old"), ("gone", b"x")])).unwrap();
    assert_eq!(names(&copy), ["..1", "..data", "gone", "kept"]);
    assert_eq!(fs::read(copy.join("kept")).unwrap(), b"old");
    let about = fs::metadata(copy.join("kept")).unwrap();
    assert_eq!(
        (about.mode() & 0o7777, about.mtime()),
        (0o640, 1_700_000_000)
    );

    let binary: Vec<u8> = (0..=255).collect();
    let keys = [("kept", &b"new!"[..]), ("come", &binary), ("empty", b"")];
    write(&copy, &version("..2", &keys)).unwrap();
    assert_eq!(names(&copy), ["..2", "..data", "come", "empty", "kept"]);
    assert_eq!(fs::read_link(copy.join(DATA)).unwrap(), Path::new("..2"));
    assert_eq!(fs::read(copy.join("kept")).unwrap(), b"new!");
    assert_eq!(fs::read(copy.join("come")).unwrap(), binary);
    assert_eq!(fs::read(copy.join("empty")).unwrap(), b"");
}

/// What inotify tells of a directory and of a file in it, as kinds and names.
fn told(inotify: &Inotify) -> Vec<(AddWatchFlags, String)> {
    let mut all = Vec::new();
    while let Ok(events) = inotify.read_events() {
        all.extend(events.into_iter().map(|event| {
            let name = event.name.unwrap_or_default();
            (event.mask, name.into_string().unwrap())
        }));
    }
    all
}

#[test]
fn whoever_waits_is_told_what_the_kubelet_would_have_done() {
    type Flags = AddWatchFlags;
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("1");
    let first = version("..1", &[("gone", b"x"), ("key", b"old")]);
    write(&copy, &first).unwrap();
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    let changes = Flags::IN_CREATE | Flags::IN_MOVE | Flags::IN_DELETE;
    inotify.add_watch(&copy, changes).unwrap();
    let of_file = Flags::IN_ALL_EVENTS;
    inotify.add_watch(&copy.join("key"), of_file).unwrap();

    write(&copy, &first).unwrap();
    assert!(told(&inotify).is_empty(), "nothing has changed");

    write(&copy, &version("..2", &[("come", b"y"), ("key", b"new")])).unwrap();
    let expected = [
        (Flags::IN_CREATE | Flags::IN_ISDIR, "..2"),
        (Flags::IN_CREATE, "..data_tmp"),
        (Flags::IN_MOVED_FROM, "..data_tmp"),
        (Flags::IN_MOVED_TO, "..data"),
        (Flags::IN_CREATE, "come"),
        (Flags::IN_DELETE, "gone"),
        (Flags::IN_ATTRIB, ""),
        (Flags::IN_DELETE_SELF, ""),
        (Flags::IN_IGNORED, ""),
        (Flags::IN_DELETE | Flags::IN_ISDIR, "..1"),
    ];
    let expected = expected.map(|(mask, name)| (mask, name.to_owned()));
    assert_eq!(told(&inotify), expected);
}

#[test]
fn a_change_of_permissions_alone_is_told_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("1");
    let mut request = version("..1", &[("key", b"x")]);
    write(&copy, &request).unwrap();
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    let all = AddWatchFlags::IN_ALL_EVENTS;
    inotify.add_watch(&copy.join("key"), all).unwrap();
    request.files[2].mode = libc::S_IFREG | 0o440;
    write(&copy, &request).unwrap();
    let expected = (AddWatchFlags::IN_ATTRIB, String::new());
    assert_eq!(told(&inotify), [expected]);
    let mode = fs::metadata(copy.join("key")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o440);
}

#[test]
fn a_file_may_come_in_pieces_and_a_version_in_several_requests() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("1");
    let mut all = version("..1", &[("key", b"first, second")]);
    // The root, the version's directory and the file; the links after the file's second piece.
    let links = all.files.split_off(3);
    let names = all.names.take();
    all.files[2].content.truncate(7);
    write(&copy, &all).unwrap();
    assert!(!copy.join("key").exists());
    let mut piece = file("..1/key", REGULAR, b"second");
    (piece.offset, piece.size) = (7, 13);
    let mut rest = WriteVolumeRequest {
        files: vec![piece],
        ..Default::default()
    };
    rest.files.extend(links);
    rest.names = names.into();
    write(&copy, &rest).unwrap();
    assert_eq!(fs::read(copy.join("key")).unwrap(), b"first, second");
}

#[test]
fn links_that_a_container_has_planted_lead_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let (copy, outside) = (dir.path().join("1"), dir.path().join("outside"));
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("key"), "precious").unwrap();
    let first = version("..1", &[("key", b"x")]);
    write(&copy, &first).unwrap();

    // In the place of a version's directory, of a file in it, and of the next version.
    fs::rename(copy.join("..1"), copy.join("..0")).unwrap();
    symlink(&outside, copy.join("..1")).unwrap();
    write(&copy, &first).unwrap();
    assert!(copy.join("..1").symlink_metadata().unwrap().is_dir());
    fs::remove_file(copy.join("..1/key")).unwrap();
    symlink(outside.join("key"), copy.join("..1/key")).unwrap();
    write(&copy, &first).unwrap();
    assert_eq!(fs::read(copy.join("key")).unwrap(), b"x");
    symlink(&outside, copy.join("..2")).unwrap();
    write(&copy, &version("..2", &[("key", b"y")])).unwrap();
    symlink(&outside, copy.join("surplus")).unwrap();
    write(&copy, &version("..2", &[("key", b"y")])).unwrap();

    assert_eq!(fs::read(copy.join("key")).unwrap(), b"y");
    assert_eq!(names(&copy), ["..2", "..data", "key"]);
    assert_eq!(fs::read(outside.join("key")).unwrap(), b"precious");
    assert_eq!(names(&outside), ["key"]);
}

#[test]
fn a_version_that_cannot_be_written_leaves_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("1");
    write(&copy, &version("..1", &[("key", b"old")])).unwrap();
    for path in ["..2/../../outside", "/outside", "..2/absent/key"] {
        let mut next = version("..2", &[("key", b"new")]);
        next.files[2].path = path.into();
        let refused = write(&copy, &next).unwrap_err();
        assert!(refused.contains(path), "{refused}");
        assert_eq!(names(&copy), ["..1", "..data", "key"]);
        assert_eq!(fs::read(copy.join("key")).unwrap(), b"old");
    }
    assert_eq!(names(dir.path()), ["1"]);
}
