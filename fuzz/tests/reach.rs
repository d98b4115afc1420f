//! That scripts reach what they are for: a guest whose chains no device ever takes finds nothing.

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;

use oci_spec::runtime::Spec;
use sepal_fuzz::guest::{Guest, memory_file};
use sepal_fuzz::input::Input;
use sepal_fuzz::pods::spec_text;
use sepal_vmm::virtio::blk::Blk;
use sepal_vmm::virtio::rng::Rng;
use sepal_vmm::virtio::vsock::Vsock;
use sepal_vmm::virtio::vsock::host::port_path;

macro_rules! seed {
    ($name:literal) => {
        include_bytes!(concat!("../corpus/", $name)).as_slice()
    };
}

#[test]
fn a_chain_is_served_and_a_bad_one_stops_the_device() {
    let told = |seed| {
        let line = Guest::drive(Input::new(seed), &mut Rng::default(), ());
        let [used, resets] = [&line.used, &line.resets].map(|n| n.load(Ordering::Relaxed));
        (used > 0, resets > 0)
    };
    assert_eq!(told(seed!("rng/seed-some")), (true, false));
    assert_eq!(told(seed!("rng/seed-table")), (true, false));
    for bad in [
        seed!("rng/seed-loop"),
        seed!("rng/seed-beyond"),
        seed!("rng/seed-top"),
        seed!("rng/seed-empty"),
        seed!("rng/seed-huge"),
        seed!("rng/seed-head"),
        seed!("rng/seed-index"),
        seed!("rng/seed-order"),
    ] {
        assert_eq!(told(bad), (false, true), "{bad:x?}");
    }
}

#[test]
fn a_write_reaches_the_disk() {
    let file = memory_file(64 << 10);
    let mut device = Blk::new(file.try_clone().unwrap(), "a-serial", false).unwrap();
    // Its first byte is whether the disk is read-only.
    let script = &seed!("blk/seed-write")[1..];
    Guest::drive(Input::new(script), &mut device, ());
    let mut sector = [0; 256];
    file.read_exact_at(&mut sector, 512).unwrap();
    assert_eq!(sector, [b'w'; 256]);
}

#[test]
fn a_guest_that_dials_is_connected() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let server = UnixListener::bind(port_path(&path, 1)).unwrap();
    server.set_nonblocking(true).unwrap();
    let mut device = Vsock::new(3, path).unwrap();
    let line = Guest::drive(Input::new(seed!("vsock/seed-dial")), &mut device, ());
    assert!(server.accept().is_ok() && line.used.load(Ordering::Relaxed) > 0);
}

#[test]
fn most_changes_of_a_spec_leave_it_a_spec() {
    // A generator of Park and Miller's, as good as any here.
    let mut state = 1_u64;
    let mut byte = || {
        state = state * 48271 % 0x7fff_ffff;
        (state >> 8) as u8
    };
    let (mut specs, mut texts) = (0, std::collections::BTreeSet::new());
    for _ in 0..200 {
        let mut bytes: Vec<u8> = (0..16).map(|_| byte()).collect();
        bytes[0] = 3;
        let (_, text) = spec_text(&mut Input::new(&bytes));
        specs += usize::from(serde_json::from_slice::<Spec>(&text).is_ok());
        texts.insert(text);
    }
    assert!(
        specs > 100 && texts.len() > 150,
        "{specs} of {}",
        texts.len()
    );
}
