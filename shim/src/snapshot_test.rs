use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::*;

const MIB: u64 = 1 << 20;
/// The first version.
const FIRST: &str = "..2026_11_22_1";

/// A volume as the kubelet leaves it: a version with some keys, the later ones in directories.
struct Volume(tempfile::TempDir);

impl Volume {
    fn new(keys: &[(&str, &[u8])]) -> Self {
        let volume = Self(tempfile::tempdir().unwrap());
        volume.write(FIRST, keys);
        volume
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, version: &str, keys: &[(&str, &[u8])]) {
        let directory = self.path().join(version);
        for (key, content) in keys {
            let file = directory.join(key);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, content).unwrap();
            let mode = PermissionsExt::from_mode(0o440);
            std::fs::set_permissions(&file, mode).unwrap();
        }
        symlink(version, self.path().join("..data_tmp")).unwrap();
        std::fs::rename(self.path().join("..data_tmp"), self.path().join(DATA)).unwrap();
        for (key, _) in keys {
            let first = key.split('/').next().unwrap();
            let _ = symlink(format!("..data/{first}"), self.path().join(first));
        }
    }

    fn take(&self, most: u64) -> Result<Snapshot, Error> {
        let root = OwnedFd::from(File::open(self.path()).unwrap());
        Snapshot::take(root.as_fd(), most)
    }
}

fn paths(snapshot: &Snapshot) -> Vec<&str> {
    let files = snapshot.files.iter();
    files
        .map(|file| std::str::from_utf8(&file.path).unwrap())
        .collect()
}

fn content<'a>(snapshot: &'a Snapshot, path: &str) -> &'a [u8] {
    let mut files = snapshot.files.iter();
    let found = files.find(|file| file.path == path.as_bytes());
    &found.unwrap().content
}

#[test]
fn files_get_the_owners_that_they_have_in_a_user_namespace() {
    let me = (
        nix::unistd::geteuid().as_raw(),
        nix::unistd::getegid().as_raw(),
    );
    let range = |inside| crate::users::Range {
        inside,
        outside: 700_000,
        size: 1,
    };
    let users = Users::new(&[range(me.0)], &[range(me.1 + 1)]).unwrap();
    let mut taken = Volume::new(&[("key", b"value")]).take(MIB).unwrap();
    taken.map_owners(&users);
    for file in &taken.files {
        assert_eq!(
            (file.uid, file.gid),
            (700_000, 65534),
            "none of its groups is ours"
        );
    }
}

#[test]
fn it_is_told_in_the_order_in_which_it_is_to_be_written() {
    let binary: Vec<u8> = (0..=255).collect();
    let volume = Volume::new(&[("key", b"value"), ("empty", b""), ("deep/er/key", &binary)]);
    // For a volume that is mounted in this one; and a version that does not count yet.
    std::fs::create_dir(volume.path().join("nested")).unwrap();
    std::fs::create_dir(volume.path().join("..2026_11_22_2")).unwrap();
    let taken = volume.take(MIB).unwrap();
    let below = |name: &str| format!("{FIRST}/{name}");
    let expected = [
        "".into(),
        FIRST.into(),
        below("deep"),
        below("deep/er"),
        below("deep/er/key"),
        below("empty"),
        below("key"),
        "..data".into(),
        "deep".into(),
        "empty".into(),
        "key".into(),
        "nested".into(),
    ];
    assert_eq!(paths(&taken), expected);
    assert_eq!(content(&taken, &below("deep/er/key")), binary);
    assert_eq!(content(&taken, "..data"), FIRST.as_bytes());
    assert_eq!(content(&taken, "deep"), b"..data/deep");
    let names = [FIRST, "..data", "deep", "empty", "key", "nested"];
    assert_eq!(taken.names, names.map(|name| name.as_bytes().to_vec()));
    let key = &taken.files[6];
    let about = std::fs::metadata(volume.path().join("key")).unwrap();
    assert_eq!((key.mode & 0o7777, key.size), (0o440, 5));
    assert_eq!((key.uid, key.gid), (about.uid(), about.gid()));
    assert_eq!(key.mtime_ns / 1_000_000_000, about.mtime());
}

#[test]
fn the_layout_is_known_by_its_link() {
    let volume = Volume::new(&[("key", b"value")]);
    assert!(has_layout(volume.path()));
    let other = tempfile::tempdir().unwrap();
    assert!(!has_layout(other.path()));
    for target in ["version", "..", "../outside", "..v/below", "/..v"] {
        let link = other.path().join(DATA);
        symlink(target, &link).unwrap();
        assert!(!has_layout(other.path()), "{target}");
        let root = OwnedFd::from(File::open(other.path()).unwrap());
        let refused = Snapshot::take(root.as_fd(), MIB).unwrap_err();
        assert!(matches!(refused, Error::Layout), "{target}: {refused}");
        std::fs::remove_file(link).unwrap();
    }
}

#[test]
fn links_are_told_and_never_followed() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "secret").unwrap();
    let volume = Volume::new(&[("key", b"value")]);
    let within = volume.path().join(FIRST);
    symlink(outside.path().join("secret"), within.join("link")).unwrap();
    symlink(outside.path(), volume.path().join("out")).unwrap();
    let taken = volume.take(MIB).unwrap();
    assert!(taken.files.iter().all(|file| file.content != b"secret"));
    let link = content(&taken, "out");
    assert_eq!(link, outside.path().as_os_str().as_bytes());

    // The version itself is one.
    symlink(outside.path(), volume.path().join("..fake")).unwrap();
    std::fs::remove_file(volume.path().join(DATA)).unwrap();
    symlink("..fake", volume.path().join(DATA)).unwrap();
    let taken = volume.take(MIB).unwrap();
    assert!(taken.files.iter().all(|file| file.content != b"secret"));
}

#[test]
fn what_is_no_file_is_left_out_and_does_not_block() {
    let volume = Volume::new(&[("key", b"value")]);
    let fifo = volume.path().join(FIRST).join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let taken = volume.take(MIB).unwrap();
    assert!(!paths(&taken).iter().any(|path| path.ends_with("fifo")));
}

#[test]
fn memory_is_what_bounds_it_and_not_the_number_of_files() {
    let names: Vec<String> = (0..3000).map(|n| format!("key-{n}")).collect();
    let keys: Vec<_> = names.iter().map(|n| (n.as_str(), &b"value"[..])).collect();
    let volume = Volume::new(&keys);
    let taken = volume.take(32 * MIB).unwrap();
    assert_eq!(taken.files.len(), 6003);
    let refused = volume.take(8 * MIB).unwrap_err();
    assert!(matches!(refused, Error::TooLarge { .. }), "{refused}");
    let sparse = File::create(volume.path().join(FIRST).join("large")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    let refused = volume.take(32 * MIB).unwrap_err();
    assert!(matches!(refused, Error::TooLarge { .. }), "{refused}");
}

#[test]
fn names_are_counted_also_of_what_is_not_taken() {
    let volume = Volume::new(&[("key", b"value")]);
    let long = "n".repeat(240);
    for number in 0..1000 {
        File::create(volume.path().join(format!("..{long}{number}"))).unwrap();
    }
    let refused = volume.take(MIB).unwrap_err();
    assert!(matches!(refused, Error::TooLarge { .. }), "{refused}");
}

#[test]
fn a_snapshot_is_of_one_version_however_fast_they_come() {
    let write = |volume: &Volume, n: usize| {
        let value = n.to_string();
        let keys = ["a", "b", "c"].map(|key| (key, value.as_bytes()));
        volume.write(&format!("..{n}"), &keys);
        let _ = std::fs::remove_dir_all(volume.path().join(format!("..{}", n - 1)));
    };
    let volume = Volume::new(&[("a", b"0"), ("b", b"0"), ("c", b"0")]);
    write(&volume, 1);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for n in 2..300 {
                write(&volume, n);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        while !writer.is_finished() {
            let taken = match volume.take(MIB) {
                Err(Error::Changing) => continue,
                taken => taken.unwrap(),
            };
            let version = String::from_utf8(content(&taken, "..data").to_vec()).unwrap();
            for key in ["a", "b", "c"] {
                let value = content(&taken, &format!("{version}/{key}"));
                assert_eq!(format!("..{}", String::from_utf8_lossy(value)), version);
            }
        }
    });
}

#[test]
fn requests_hold_no_more_than_the_agent_takes() {
    let large = vec![7; 3 * MIB as usize + 5];
    let names: Vec<String> = (0..500).map(|n| format!("key-{n}")).collect();
    let mut keys: Vec<_> = names.iter().map(|n| (n.as_str(), &large[..5000])).collect();
    keys.push(("large", &large));
    let volume = Volume::new(&keys);
    let requests = volume.take(32 * MIB).unwrap().requests("7");
    assert!(requests.len() > 5, "{}", requests.len());
    for request in &requests {
        use protobuf::Message;
        assert!(request.compute_size() < 3 * MIB / 2);
        assert_eq!(request.volume_id, "7");
    }
    let last = requests.len() - 1;
    for (number, request) in requests.iter().enumerate() {
        assert_eq!(request.names.is_some(), number == last);
    }
    let pieces = requests.iter().flat_map(|request| &request.files);
    let pieces = pieces.filter(|file| file.path.ends_with(b"1/large"));
    let mut whole = Vec::new();
    for piece in pieces {
        assert_eq!(piece.offset, whole.len() as u64);
        assert_eq!(piece.size, large.len() as u64);
        whole.extend_from_slice(&piece.content);
    }
    assert_eq!(whole, large);
}
