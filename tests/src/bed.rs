//! The bed: the machine, real or emulated, that containerd and the tests' commands run on.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use crate::{Command, Outcome};

/// The control: containerd's own runtime.
const RUNC: &str = "io.containerd.runc.v2";

/// Which bed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Namespaces of this machine (`tests/native/bed`).
    Native,
    /// Debian under an emulated machine with hardware virtualization (`tests/node/node`).
    Node,
}

fn kind() -> Kind {
    match std::env::var("SEPAL_BED").as_deref() {
        Err(_) | Ok("native") => Kind::Native,
        Ok("node") => Kind::Node,
        Ok(other) => panic!("SEPAL_BED={other}: want native or node"),
    }
}

/// A time limit of the native bed, made to fit the bed in use: emulation is slow.
pub(crate) fn stretched(patience: Duration) -> Duration {
    match kind() {
        Kind::Native => patience,
        Kind::Node => patience * 20,
    }
}

/// Others may use the bed at the same time, unless somebody has it alone.
static USERS: RwLock<()> = RwLock::new(());

#[derive(Debug)]
enum Hold {
    Shared(#[allow(dead_code)] RwLockReadGuard<'static, ()>),
    Alone(#[allow(dead_code)] RwLockWriteGuard<'static, ()>),
}

/// A bed that is up. Holding it keeps tests that want it alone from starting.
#[derive(Debug)]
pub struct Bed {
    kind: Kind,
    runtime: String,
    hold: Hold,
    /// What an earlier test left, which is not held against this one.
    before: String,
}

impl Bed {
    /// The bed in use, together with the other tests of this program.
    ///
    /// # Panics
    /// When it is not up: a test that was asked for is never passed over in silence.
    pub fn get() -> Self {
        // A failed test poisons the lock; the next one's bed is none the worse.
        Self::held(Hold::Shared(
            USERS.read().unwrap_or_else(|poison| poison.into_inner()),
        ))
    }

    /// The bed for this test alone: it looks for leaks, or breaks things.
    ///
    /// # Panics
    /// As [`Bed::get`].
    pub fn alone() -> Self {
        let mut bed = Self::held(Hold::Alone(
            USERS.write().unwrap_or_else(|poison| poison.into_inner()),
        ));
        bed.before = bed.control(["leaks"]).run().out();
        bed
    }

    fn held(hold: Hold) -> Self {
        static UP: OnceLock<Result<(), String>> = OnceLock::new();
        let runtime =
            std::env::var("SEPAL_TEST_RUNTIME").unwrap_or_else(|_| "io.containerd.sepal.v2".into());
        let bed = Self {
            kind: kind(),
            runtime,
            hold,
            before: String::new(),
        };
        let up = UP.get_or_init(|| {
            let answer = bed.sh("ctr version").run();
            if answer.ok() {
                Ok(())
            } else {
                Err(answer.report())
            }
        });
        if let Err(report) = up {
            panic!(
                "the {:?} bed is not up (tests/run brings one up):\n{report}",
                bed.kind
            );
        }
        bed
    }

    /// Which bed this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// containerd's name of the runtime under test.
    pub fn runtime(&self) -> &str {
        &self.runtime
    }

    /// Whether the runtime under test has a VM to look at. Says so when it has none, for the reader
    /// of a control run to know what was left out.
    pub fn has_vm(&self) -> bool {
        let vm = self.runtime != RUNC;
        if !vm {
            println!("left out: about the VM, and {RUNC} has none");
        }
        vm
    }

    /// How much of something: what the native bed takes, or what an emulated machine can do in the
    /// same spirit.
    pub fn scaled<T>(&self, native: T, node: T) -> T {
        match self.kind {
            Kind::Native => native,
            Kind::Node => node,
        }
    }

    /// Whether the bed is a machine of its own, which can be rebooted. Says so when it is not.
    pub fn can_reboot(&self) -> bool {
        let machine = self.kind == Kind::Node;
        if !machine {
            println!(
                "left out: about a node's reboot, and the native bed is no machine of its own"
            );
        }
        machine
    }

    /// Whether shares of a processor can be measured, and more than one be had. Says so when they
    /// cannot: the node's are emulated, and its clock goes on while they have to wait.
    pub fn has_real_processors(&self) -> bool {
        let real = self.kind == Kind::Native;
        if !real {
            println!("left out: about processors, and the node's are emulated");
        }
        real
    }

    /// A command in the bed.
    pub fn command<A: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = A>) -> Command {
        self.enter(false).args(argv)
    }

    /// A command in the bed that will be given a terminal.
    pub fn terminal_command<A: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = A>) -> Command {
        self.enter(true).args(argv)
    }

    /// A line of shell in the bed.
    pub fn sh(&self, line: &str) -> Command {
        self.command(["sh", "-c", line])
    }

    /// The bed's own program, which has the same verbs for both kinds.
    fn control<A: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = A>) -> Command {
        let program = match self.kind {
            Kind::Native => "native/bed",
            Kind::Node => "node/node",
        };
        Command::new([Path::new(env!("CARGO_MANIFEST_DIR")).join(program)]).args(argv)
    }

    fn enter(&self, terminal: bool) -> Command {
        match self.kind {
            // Here a command has the caller's own terminal.
            Kind::Native => self.control(["exec", "--"]),
            Kind::Node if terminal => self.control(["exec", "-t", "--"]),
            Kind::Node => self.control(["exec", "--"]),
        }
    }

    /// The reference of a test image, imported when the bed does not have it yet.
    pub fn image(&self, name: &str) -> String {
        static IMPORTED: Mutex<Option<HashMap<String, String>>> = Mutex::new(None);
        let mut imported = IMPORTED.lock().unwrap_or_else(|poison| poison.into_inner());
        imported
            .get_or_insert_default()
            .entry(name.to_owned())
            .or_insert_with(|| {
                // It may have to be built first.
                self.control(["image", name])
                    .patience(Duration::from_secs(500))
                    .run()
                    .success()
                    .out()
            })
            .clone()
    }

    /// The smallest image: busybox.
    pub fn busybox(&self) -> String {
        self.image("busybox")
    }

    /// A name no other test has.
    pub fn unique(&self, prefix: &str) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        format!(
            "{prefix}-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        )
    }

    /// An empty directory in the bed, removed with the returned guard.
    pub fn scratch(&self) -> Scratch<'_> {
        let path = format!("/var/tmp/{}", self.unique("sepal-test"));
        self.command(["mkdir", "-p", &path]).run().success();
        Scratch { bed: self, path }
    }

    /// Writes a file in the bed.
    pub fn write(&self, path: &str, contents: impl Into<Vec<u8>>) {
        self.command(["sh", "-c", "cat >\"$1\"", "write", path])
            .stdin(contents)
            .run()
            .success();
    }

    /// Reads a text file of the bed.
    pub fn read(&self, path: &str) -> String {
        self.command(["cat", path]).run().success().out()
    }

    /// Has the node set so many huge pages of 2 MiB aside.
    pub fn set_huge_pages(&self, count: u32) -> Outcome {
        let line = format!("echo {count} >/proc/sys/vm/nr_hugepages");
        self.sh(&line).run()
    }

    /// Its containerd: `stop`, `kill`, `start` or `restart`.
    pub fn containerd(&self, verb: &str) -> Outcome {
        self.control(["containerd", verb]).run()
    }

    /// Asserts that nothing was left behind, given some seconds to go.
    ///
    /// # Panics
    /// With the list of what is there, unless this test has the bed alone: others' pods are no leaks.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        assert!(
            matches!(self.hold, Hold::Alone(_)),
            "only Bed::alone can look for leaks"
        );
        let patience = stretched(Duration::from_secs(10)).as_secs().to_string();
        let outcome = self
            .control(["leaks", &patience])
            .patience(Duration::from_secs(60))
            .run();
        let found = outcome.out();
        let new: Vec<_> = found
            .lines()
            .filter(|item| !self.before.lines().any(|old| old == *item))
            .collect();
        assert!(new.is_empty(), "left behind:\n{}", new.join("\n"));
        assert!(
            outcome.ok() || !found.is_empty(),
            "no list:\n{}",
            outcome.report()
        );
    }
}

/// A directory in the bed that goes with this guard.
#[derive(Debug)]
pub struct Scratch<'bed> {
    bed: &'bed Bed,
    path: String,
}

impl Scratch<'_> {
    /// Its full path in the bed.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The path of a file in it.
    pub fn file(&self, name: &str) -> String {
        format!("{}/{name}", self.path)
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        self.bed.command(["rm", "-rf", &self.path]).run();
    }
}
