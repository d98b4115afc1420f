//! What an attacker finds who has taken over a thread of the VMM (`src/breach.rs`): each attempt, in each
//! kind of thread that reads what a guest writes, with the filters of system calls and, for what
//! more stands there, without.

#[path = "boot/guest.rs"]
#[allow(dead_code, reason = "the tests of booting use the rest")]
mod guest;

use std::io::Read;
use std::process::{Command, Stdio};

use sepal_breach::{Bystander, outcome};
use sepal_protocol::control::{self, Request, Response};
use sepal_vmm::breach::{ATTEMPTS, THREADS};

/// What the control thread keeps two capabilities for until it has made the container's root its own: a root
/// within the empty one that it has. File handles are behind the filter alone for so long.
const OF_CONTROL: &str = "change-root";
const OF_CONTROL_WITHOUT_FILTER: &str = "open-by-handle";

/// What one attempt came to, in a few words.
fn attempt(what: &str, thread: &str, filters: bool, other: &Bystander) -> String {
    // As the shim spawns it: alone among processes, in the pod's network namespace.
    let mut command = Command::new("unshare");
    command
        .args(["--pid", "--net", "--fork", "--kill-child"])
        .arg(env!("CARGO_BIN_EXE_sepal-vmm"))
        .args(["--seccomp", if filters { "kill" } else { "off" }])
        .stderr(Stdio::piped());
    other.is_attacked_by(&mut command, &format!("{thread}:{what}"));
    let mut vmm = guest::Vmm::spawn_by(command);
    // cli; hlt; jmp: it waits.
    let kernel = vmm.file("kernel", &guest::bare(&[0xfa, 0xf4, 0xeb, 0xfd]));
    let boot = Request::Boot(Box::new(vmm.spec(kernel)));
    let control = vmm.control.as_ref().unwrap();
    control::send(control, &boot, &[]).unwrap();
    let _ = control::receive::<Response>(control);
    let mut said = String::new();
    let mut stderr = vmm.child.stderr.take().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    let status = vmm.child.wait().unwrap();
    if let Some(outcome) = outcome(status.code(), &said) {
        return outcome;
    }
    let killed = said.lines().find_map(|line| {
        let rest = line.strip_prefix("sepal-vmm: system call ")?;
        Some(format!("killed at system call {}", rest.split(' ').next()?))
    });
    killed.unwrap_or_else(|| panic!("{status}: {said}"))
}

#[test]
fn nothing_of_the_hosts_can_be_reached_from_a_thread_that_a_guest_has_taken_over() {
    if !guest::kvm() || !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs KVM and root");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut other = Bystander::new(directory.path()).unwrap();

    // SAFETY: with this flag the call only tells the version.
    let landlock = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) } > 0;
    let mut through = Vec::new();
    for (thread, _) in THREADS {
        for tried in ATTEMPTS.into_iter().flatten() {
            let of = |filters| attempt(tried.name, thread, filters, &other);
            let (with, without) = (of(true), of(false));
            println!("{thread:8} {:24} {with:45} {without}", tried.name);
            // The root directory itself is there: only Landlock stands before it.
            let second_wall = tried.second_wall && (landlock || tried.name != "list-root");
            let name = (thread == "control").then_some(tried.name);
            let second_wall = second_wall && name != Some(OF_CONTROL_WITHOUT_FILTER);
            if name == Some(OF_CONTROL) {
                assert!(with.starts_with("done"), "it has no use for it: {with}");
                continue;
            }
            if !tried.is_stopped(&with) || second_wall && !tried.is_stopped(&without) {
                through.push(format!("{thread}: {}: {with}; {without}", tried.name));
            }
        }
    }
    assert!(through.is_empty(), "{through:#?}");
    assert!(other.lives(), "somebody else's process is dead");
}
