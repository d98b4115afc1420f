//! What an attacker finds who has taken over the file server (`src/breach.rs`): each attempt with the
//! filter of system calls and, for what more stands there, without.

mod guest;

use std::io::Read;

use guest::{Share, attacked};
use nix::mount::{MsFlags, mount};
use sepal_breach::{Bystander, outcome};
use sepal_fs::breach::ATTEMPTS;
use sepal_fs::filter::FORBIDDEN;

/// What only the filter stands before: the server is the share's root as it is the host's.
const ONE_WALL: &str = "become-root";

#[test]
fn nothing_but_the_share_can_be_reached_from_a_file_server_that_a_guest_has_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let mut other = Bystander::new(directory.path()).unwrap();

    let mut through = Vec::new();
    for tried in ATTEMPTS.into_iter().flatten() {
        let of = |filter| attempt(tried.name, filter, &other);
        let (with, without) = (of(true), of(false));
        println!("{:40} {with:45} {without}", tried.name);
        if tried.name == "open-beside-volume" {
            // A filter that stops everything would show nothing here.
            assert!(with.starts_with("refused"), "{with}");
        }
        let second_wall = tried.second_wall && tried.name != ONE_WALL;
        if !tried.is_stopped(&with) || second_wall && !tried.is_stopped(&without) {
            through.push(format!("{}: {with}; {without}", tried.name));
        }
    }
    assert!(through.is_empty(), "{through:#?}");
    assert!(other.lives(), "somebody else's process is dead");
}

/// What one attempt came to, in a few words.
fn attempt(what: &str, filter: bool, other: &Bystander) -> String {
    let share = Share::new();
    std::fs::write(share.path().join("../secret"), "secret").unwrap();
    // It would say how it is used, and not that it was refused.
    let program = share.writable().join("program");
    std::fs::copy(env!("CARGO_BIN_EXE_sepal-fs"), program).unwrap();
    // As the shim mounts what it is given.
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
    let strict = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let none = None::<&str>;
    mount(none, &share.writable(), none, flags | strict, none).unwrap();

    let starter = guest::pidfd(std::process::id());
    let mut server = attacked(&share.path(), &starter, |command| {
        other.is_attacked_by(command, what);
        if !filter {
            command.env("SEPAL_BREACH_UNFILTERED", "yes");
        }
    });
    let mut said = String::new();
    let mut stderr = server.child.stderr.take().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    let status = server.child.wait().unwrap();
    if let Some(outcome) = outcome(status.code(), &said) {
        return outcome;
    }
    let call = said
        .lines()
        .find_map(|line| line.strip_prefix("sepal-fs: system call "));
    let call = call.unwrap_or_else(|| panic!("{what}: {status}: {said}"));
    assert_eq!(status.code(), Some(FORBIDDEN), "{what}: {said}");
    assert!(filter, "{what}: {said}");
    let name = call.split(' ').next().unwrap_or_default();
    format!("killed at system call {name}")
}
