//! Volumes that a guest has itself: ConfigMaps, Secrets and their kind, which the kubelet changes under
//! a running container, and emptyDirs in memory.
//!
//! No kubelet here: a shell does in a folder what its atomic writer does, or mounts what it mounts.

use std::time::Instant;

use sepal_tests::{Bed, Container, Scratch, eventually, seconds, watch};

/// Writes a version, `$2`, with `$4` keys that hold `$3`, as pkg/volume/util/atomic_writer.go does.
const WRITE: &str = r#"
    set -e
    cd "$1"
    old=$(readlink ..data || true)
    mkdir "$2"
    for n in $(seq "$4"); do printf '%s-%s\n' "$3" "$n" >"$2/key-$n"; done
    chmod 640 "$2"/*
    ln -s "$2" ..data_tmp
    mv -T ..data_tmp ..data
    for n in $(seq "$4"); do [ -L "key-$n" ] || ln -s "..data/key-$n" "key-$n"; done
    for key in *; do [ -e "$key" ] || rm "$key"; done
    [ -z "$old" ] || rm -r "$old""#;

/// A folder that a kubelet might have made.
struct ConfigMap<'bed> {
    bed: &'bed Bed,
    scratch: Scratch<'bed>,
}

impl<'bed> ConfigMap<'bed> {
    fn new(bed: &'bed Bed, value: &str, keys: u32) -> Self {
        let scratch = bed.scratch();
        let map = Self { bed, scratch };
        map.write("..v1", value, keys);
        map
    }

    fn write(&self, version: &str, value: &str, keys: u32) {
        let (path, keys) = (self.scratch.path(), keys.to_string());
        let argv = ["sh", "-c", WRITE, "write", path, version, value, &keys];
        self.bed.command(argv).run().success();
    }

    /// As an option of ctr's, at /etc/config.
    fn mount(&self) -> String {
        let path = self.scratch.path();
        format!("type=bind,src={path},dst=/etc/config,options=rbind:ro")
    }

    fn start(&self, image: &str, argv: &[&str]) -> Container<'bed> {
        let options = ["--mount", &self.mount()];
        self.bed.ctr_start(&options, &self.bed.image(image), argv)
    }

    /// A container that waits for its changes.
    fn start_watch(&self, path: &'static str, events: &'static str) -> Container<'bed> {
        let container = self.start("python", &watch(path, events));
        told(&container, "waits");
        container
    }
}

/// Whoever watches a directory: names come, go, and are taken over.
const NAMES: &str = "380";
/// Whoever watches a file: it goes.
const ITSELF: &str = "404";

/// What has been noted, once the last is there.
#[track_caller]
fn told(container: &Container, last: &str) -> Vec<String> {
    // The kubelet itself takes up to a minute until it changes anything.
    eventually(&format!("it is told: {last}"), seconds(60), || {
        let notes = container.exec(["cat", "/tmp/told"]).out();
        let notes: Vec<_> = notes.lines().map(|line| line.trim().to_owned()).collect();
        notes.iter().any(|note| note == last).then_some(notes)
    })
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn who_waits_in_a_config_map_of_200_keys_is_told_of_its_change() {
    let bed = Bed::get();
    let map = ConfigMap::new(&bed, "old", 200);
    let container = map.start_watch("/etc/config", NAMES);
    let read = "cat /etc/config/key-7; ls /etc/config | wc -l";
    assert_eq!(container.sh(read).success().out(), "old-7\n200");

    map.write("..v2", "new", 201);
    let changed = Instant::now();
    let notes = told(&container, "delete ..v1");
    println!("told after {:?}", changed.elapsed());
    let expected = [
        "waits",
        "create ..v2",
        "create ..data_tmp",
        "moved-to ..data",
        "create key-201",
        "delete ..v1",
    ];
    assert_eq!(notes, expected);
    let read = "cat /etc/config/key-7 /etc/config/key-201; ls /etc/config | wc -l";
    assert_eq!(container.sh(read).success().out(), "new-7\nnew-201\n201");

    map.write("..v3", "newer", 199);
    let notes = told(&container, "delete ..v2");
    for gone in ["key-200", "key-201"] {
        assert!(notes.contains(&format!("delete {gone}")), "{notes:?}");
    }
    assert_eq!(
        container.sh("ls /etc/config | wc -l").success().out(),
        "199"
    );
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn who_watches_one_key_is_told_that_the_file_goes() {
    let bed = Bed::get();
    let map = ConfigMap::new(&bed, "old", 3);
    let container = map.start_watch("/etc/config/key-2", ITSELF);
    map.write("..v2", "new", 3);
    let notes = told(&container, "delete-self");
    assert_eq!(notes[1], "attrib", "one link less");
    assert_eq!(
        container.sh("cat /etc/config/key-2").success().out(),
        "new-2"
    );
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn files_are_as_they_are_on_the_host() {
    let bed = Bed::get();
    let map = ConfigMap::new(&bed, "old", 2);
    let path = map.scratch.path();
    let line = format!(
        "cd {path}/..data && head -c 100000 /dev/urandom >key-1 && chown 1234:567 key-1 && \
         printf '#!/bin/sh\\necho runs\\n' >key-2 && chmod 755 key-2 && mkdir ../nested"
    );
    bed.sh(&line).run().success();
    let about =
        "cd $1 && sha256sum key-1 && stat -L -c '%u:%g %a %Y %s' key-1 key-2 && readlink key-1";
    let host = bed.command(["sh", "-c", about, "about", path]).run();
    let container = map.start("busybox", &["sleep", "1000"]);
    let guest = container.exec(["sh", "-c", about, "about", "/etc/config"]);
    assert_eq!(guest.success().out(), host.success().out());
    assert_eq!(
        container.exec(["/etc/config/key-2"]).success().out(),
        "runs"
    );
    container.sh("test -d /etc/config/nested").success();
    let refused = container.sh("touch /etc/config/mine").failure();
    assert!(
        refused.err().contains("Read-only file system"),
        "{}",
        refused.err()
    );
    container.sh("echo mine >/etc/config/key-2").failure();
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn all_containers_of_a_pod_see_a_change_and_so_does_one_that_comes_later() {
    let bed = Bed::get();
    let map = ConfigMap::new(&bed, "first", 5);
    let pod = bed.ctr_pod(&[]);
    let mount = map.mount();
    let member = |argv: &[&str]| pod.member(&["--mount", &mount], &bed.image("python"), argv);
    let waits = watch("/etc/config", NAMES);
    let both = [member(&waits), member(&waits)];
    for container in &both {
        told(container, "waits");
    }
    map.write("..v2", "second", 5);
    for container in &both {
        told(container, "delete ..v1");
        assert_eq!(
            container.sh("cat /etc/config/key-5").success().out(),
            "second-5"
        );
    }
    let [first, second] = both;
    drop(first);
    map.write("..v3", "third", 5);
    told(&second, "delete ..v2");
    drop(second);

    // Nobody has it now. Who comes next finds what it is then, and hears of the next change.
    map.write("..v4", "fourth", 5);
    let later = member(&waits);
    assert_eq!(
        later.sh("cat /etc/config/key-5").success().out(),
        "fourth-5"
    );
    told(&later, "waits");
    map.write("..v5", "fifth", 5);
    told(&later, "delete ..v4");
    assert_eq!(later.sh("cat /etc/config/key-5").success().out(), "fifth-5");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn the_last_of_many_quick_changes_is_what_stays() {
    let bed = Bed::get();
    let map = ConfigMap::new(&bed, "0", 20);
    let container = map.start("busybox", &["sleep", "1000"]);
    for n in 2..40 {
        map.write(&format!("..v{n}"), &n.to_string(), 20);
    }
    eventually("the last one shows", seconds(10), || {
        let all = container.sh("cat /etc/config/key-* | grep -c '^39-'");
        (all.out() == "20").then_some(())
    });
    // The kubelet's own are hidden by their dots, and all others are gone.
    let names = container.sh("ls -A /etc/config | grep '^[.][.]'").success();
    assert_eq!(names.out(), "..data\n..v39");
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn thousands_of_keys_are_no_reason_to_be_left_out() {
    let bed = Bed::get();
    let keys = bed.scaled(3000, 1000);
    let map = ConfigMap::new(&bed, "old", keys);
    let container = map.start_watch("/etc/config", NAMES);
    map.write("..v2", "new", keys);
    let changed = Instant::now();
    told(&container, "delete ..v1");
    println!("told after {:?}", changed.elapsed());
    let count = "cat /etc/config/key-* | grep -c '^new-'";
    assert_eq!(container.sh(count).success().out(), keys.to_string());
}

/// An emptyDir with `medium: Memory` as the kubelet leaves it on the host.
struct MemoryDir<'bed> {
    bed: &'bed Bed,
    scratch: Scratch<'bed>,
}

impl<'bed> MemoryDir<'bed> {
    fn new(bed: &'bed Bed) -> Self {
        let dir = Self {
            bed,
            scratch: bed.scratch(),
        };
        let make = "set -e; mkdir -p $0; mount -t tmpfs -o size=16m,mode=2777,gid=1234 tmpfs $0
                    mkdir $0/part; chmod 2770 $0/part; mkdir $1; mount --bind $0/part $1";
        let argv = ["sh", "-c", make, &dir.path(), &dir.part()];
        bed.command(argv).run().success();
        dir
    }

    fn path(&self) -> String {
        self.scratch.file("volumes/kubernetes.io~empty-dir/cache")
    }

    /// What a `subPath` is.
    fn part(&self) -> String {
        self.scratch.file("part")
    }
}

impl Drop for MemoryDir<'_> {
    fn drop(&mut self) {
        let argv = ["umount", "-l", &self.part(), &self.path()];
        self.bed.command(argv).run();
    }
}

#[test]
#[ignore = "needs a bed: tests/run"]
fn an_empty_dir_in_memory_is_one_of_the_guests_for_all_of_its_pod() {
    let bed = Bed::get();
    let dir = MemoryDir::new(&bed);
    let pod = bed.ctr_pod(&[]);
    let start = |source: &str, access: &str| {
        let mount = format!("type=bind,src={source},dst=/cache,options=rbind:{access}");
        pod.try_member(&["--mount", &mount], &bed.busybox(), &["sleep", "1000"])
    };
    let (whole, started) = start(&dir.path(), "rw");
    started.success();
    assert_eq!(
        whole.sh("stat -fc %T /cache; stat -c '%a %g' /cache; df -m /cache | awk 'NR == 2 { print $2 }'")
            .success()
            .out(),
        "tmpfs\n2777 1234\n16"
    );
    let too_much = whole.sh("dd if=/dev/zero of=/cache/much bs=1M count=20; rm /cache/much");
    assert!(
        too_much.err().contains("No space left"),
        "{}",
        too_much.report()
    );

    let (part, started) = start(&dir.part(), "rw");
    started.success();
    assert_eq!(
        part.sh("stat -c '%a %g' /cache").success().out(),
        "2770 1234"
    );
    part.sh("echo hello >/cache/greeting").success();
    assert_eq!(
        whole.exec(["cat", "/cache/part/greeting"]).success().out(),
        "hello"
    );
    let (reader, started) = start(&dir.path(), "ro");
    started.success();
    assert_eq!(
        reader.exec(["cat", "/cache/part/greeting"]).success().out(),
        "hello"
    );
    reader.sh("echo more >/cache/part/greeting").failure();
    part.remove();
    assert_eq!(
        whole.exec(["cat", "/cache/part/greeting"]).success().out(),
        "hello"
    );
    if bed.has_vm() {
        let on_the_host = bed.command(["find", &dir.path(), "-type", "f"]).run();
        assert_eq!(
            on_the_host.success().out(),
            "",
            "the guest's memory is its own"
        );

        // Whoever can write in it cannot lead those astray who come later.
        whole
            .sh("mv /cache/part /cache/gone; ln -s / /cache/part")
            .success();
        let (_refused, outcome) = start(&dir.part(), "rw");
        let text = outcome.failure().report();
        assert!(text.contains("cannot make a volume in memory"), "{text}");
    }
}
