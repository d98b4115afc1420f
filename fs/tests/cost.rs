//! What requests cost the host: processor time of the server per request, which other load on the
//! machine changes little, and the time a guest waits for each. Not a test: it asserts nothing.
//!
//!     cargo test --release -p sepal-fs --test cost -- --ignored --nocapture

mod guest;

use std::path::Path;
use std::time::{Duration, Instant};

use guest::*;

const ROUNDS: u32 = 8_000;

/// User and system time of a process so far.
fn processor_time(pid: u32) -> Duration {
    let mut nanoseconds = 0;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let text = std::fs::read_to_string(thread.unwrap().path().join("schedstat")).unwrap();
        nanoseconds += text.split(' ').next().unwrap().parse::<u64>().unwrap();
    }
    Duration::from_nanos(nanoseconds)
}

fn measure(what: &str, server: &Server, rounds: u32, mut request: impl FnMut(u32)) {
    let pid = server.child.id();
    let (before, mut waits) = (processor_time(pid), Vec::new());
    for round in 0..rounds {
        let begin = Instant::now();
        request(round);
        waits.push(begin.elapsed());
    }
    let spent = (processor_time(pid) - before) / rounds;
    waits.sort();
    println!(
        "{what:32} {:8.1?} processor  {:8.1?} median wait",
        spent,
        waits[waits.len() / 2]
    );
}

fn all(title: &str, directory: &Path, share: &Share) {
    println!("-- {title}");
    for number in 0..ROUNDS {
        std::fs::write(directory.join(format!("old{number}")), "0123456789").unwrap();
    }
    let begin = Instant::now();
    let server = start(&share.path());
    let mut guest = Guest::mount(&server);
    println!("{:32} {:8.1?}", "start to mounted", begin.elapsed());
    let name = directory.file_name().unwrap().to_str().unwrap();
    let parent = guest.lookup(guest.top, name).unwrap().node;
    let mut nodes = Vec::new();
    measure("lookup", &server, ROUNDS, |n| {
        nodes.push(guest.lookup(parent, &format!("old{n}")).unwrap().node);
    });
    measure("lookup again", &server, ROUNDS, |n| {
        guest.lookup(parent, &format!("old{n}")).unwrap();
    });
    measure("getattr", &server, ROUNDS, |n| {
        guest.getattr(nodes[n as usize]).unwrap();
    });
    measure("open, read 4 KiB, release", &server, ROUNDS, |n| {
        let node = nodes[n as usize];
        let handle = guest.open(node, libc::O_RDONLY).unwrap();
        guest.read(node, handle, 0, 4096).unwrap();
        guest
            .call(RELEASE, node, &longs(&[handle, 0, 0]), 0)
            .unwrap();
    });
    measure("create, write, release", &server, ROUNDS, |n| {
        let (entry, handle) = guest.create(parent, &format!("new{n}"), 0o644).unwrap();
        guest.write(entry.node, handle, 0, b"0123456789").unwrap();
        guest
            .call(RELEASE, entry.node, &longs(&[handle, 0, 0]), 0)
            .unwrap();
    });
    let (big, handle) = guest.create(parent, "big", 0o644).unwrap();
    let block = vec![7; 1 << 20];
    measure("write 1 MiB", &server, 200, |n| {
        guest
            .write(big.node, handle, u64::from(n) << 20, &block)
            .unwrap();
    });
    measure("read 1 MiB", &server, 200, |n| {
        guest
            .read(big.node, handle, u64::from(n) << 20, 1 << 20)
            .unwrap();
    });
    println!("{:32} {}", "descriptors", server.descriptors());
    let rollup =
        std::fs::read_to_string(format!("/proc/{}/smaps_rollup", server.child.id())).unwrap();
    for line in rollup.lines().filter(|line| line.starts_with("Pss")) {
        println!("{line}");
    }
}

#[test]
#[ignore = "measures, and takes a while"]
fn requests() {
    for (title, options) in [
        ("tmpfs", None),
        ("overlay", Some("")),
        ("overlay, nfs_export", Some(",index=on,nfs_export=on")),
    ] {
        let share = Share::new();
        let tmpfs = share.mount_tmpfs("tmpfs");
        let directory = match options {
            None => tmpfs,
            Some(options) => {
                for name in ["lower", "upper", "work"] {
                    std::fs::create_dir(tmpfs.join(name)).unwrap();
                }
                let (at, base) = (share.path().join("overlay"), tmpfs.display());
                std::fs::create_dir(&at).unwrap();
                let options = format!(
                    "lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work{options}"
                );
                let none = nix::mount::MsFlags::empty();
                nix::mount::mount(
                    Some("o"),
                    &at,
                    Some("overlay"),
                    none,
                    Some(options.as_str()),
                )
                .unwrap();
                at
            }
        };
        all(title, &directory, &share);
    }
}
