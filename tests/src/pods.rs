//! The host processes of a pod, found from the outside as an administrator would.

use crate::{Bed, Client, Container, Outcome};

/// A program of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodProcess {
    /// containerd's shim.
    Shim,
    /// The VMM.
    Vmm,
    /// The file server.
    Fs,
}

struct Process {
    pid: u32,
    parent: u32,
    /// Command line, or the name in brackets when there is none (a zombie).
    command: String,
}

fn processes(bed: &Bed) -> Vec<Process> {
    let list = bed
        .command(["ps", "-ww", "-eo", "pid=,ppid=,args="])
        .run()
        .success()
        .out();
    list.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let pid = words.next()?.parse().ok()?;
            let parent = words.next()?.parse().ok()?;
            Some(Process {
                pid,
                parent,
                command: words.collect::<Vec<_>>().join(" "),
            })
        })
        .collect()
}

impl PodProcess {
    fn program(self) -> &'static str {
        match self {
            Self::Shim => "containerd-shim-",
            Self::Vmm => "sepal-vmm",
            Self::Fs => "sepal-fs",
        }
    }
}

/// A pod such as CRI describes one, made by ctr: a sandbox, and members by its id.
pub struct CtrPod<'bed> {
    bed: &'bed Bed,
    sandbox: Container<'bed>,
}

impl<'bed> CtrPod<'bed> {
    /// Its first container, which only sleeps.
    pub fn sandbox(&self) -> &Container<'bed> {
        &self.sandbox
    }

    /// A further container that runs by itself; `options` are `ctr run`'s.
    ///
    /// # Panics
    /// When it does not start.
    #[track_caller]
    pub fn member(&self, options: &[&str], image: &str, argv: &[&str]) -> Container<'bed> {
        let (member, outcome) = self.try_member(options, image, argv);
        outcome.success();
        member
    }

    /// The same, which may fail.
    pub fn try_member(
        &self,
        options: &[&str],
        image: &str,
        argv: &[&str],
    ) -> (Container<'bed>, Outcome) {
        let member = self.bed.named(Client::Ctr, "member");
        let sandbox = format!("io.kubernetes.cri.sandbox-id={}", self.sandbox.id());
        let annotations = ["--annotation", &sandbox];
        let options = [&annotations, options].concat();
        let outcome = run(self.bed, "container", &member, &options, image, argv);
        (member, outcome)
    }
}

fn run(
    bed: &Bed,
    kind: &str,
    container: &Container<'_>,
    options: &[&str],
    image: &str,
    argv: &[&str],
) -> Outcome {
    let kind = format!("io.kubernetes.cri.container-type={kind}");
    bed.command(["ctr", "run", "--detach", "--runtime", bed.runtime()])
        .args(["--annotation", &kind])
        .args(options)
        .args([image, container.id()])
        .args(argv)
        .run()
}

impl Bed {
    /// A pod without members.
    ///
    /// # Panics
    /// When it does not start.
    #[track_caller]
    pub fn ctr_pod(&self, options: &[&str]) -> CtrPod<'_> {
        let sandbox = self.named(Client::Ctr, "pod");
        let (image, argv) = (self.busybox(), ["sleep", "1000"]);
        run(self, "sandbox", &sandbox, options, &image, &argv).success();
        CtrPod { bed: self, sandbox }
    }

    /// The pid, in the bed, of a program of a pod; `id` is the pod's, which is its first container's.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn pid_of(&self, id: &str, what: PodProcess) -> u32 {
        let all = processes(self);
        let shim = all
            .iter()
            .find(|process| {
                process.command.contains(PodProcess::Shim.program())
                    && process.command.contains(&format!("-id {id} "))
            })
            .unwrap_or_else(|| panic!("no shim of container {id}"));
        if what == PodProcess::Shim {
            return shim.pid;
        }
        // Not always a child: what confines a program may stand in between.
        let of_the_shim = |process: &Process| {
            let mut pid = process.parent;
            while pid > 1 && pid != shim.pid {
                pid = all
                    .iter()
                    .find(|other| other.pid == pid)
                    .map_or(0, |other| other.parent);
            }
            pid == shim.pid
        };
        all.iter()
            .find(|process| {
                let program = process
                    .command
                    .split_whitespace()
                    .next()
                    .unwrap_or_default();
                program.ends_with(what.program()) && of_the_shim(process)
            })
            .unwrap_or_else(|| panic!("no {} of container {id}", what.program()))
            .pid
    }

    /// Kills a program of a pod as `kill -9` does.
    #[track_caller]
    pub fn kill_9(&self, id: &str, what: PodProcess) -> Outcome {
        let pid = self.pid_of(id, what).to_string();
        self.command(["kill", "-9", &pid]).run().success()
    }
}

impl Container<'_> {
    /// The pid, in the bed, of a program of this container's pod.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn pid_of(&self, bed: &Bed, what: PodProcess) -> u32 {
        bed.pid_of(&self.full_id(), what)
    }

    /// Kills a program of this container's pod as `kill -9` does.
    #[track_caller]
    pub fn kill_9(&self, bed: &Bed, what: PodProcess) -> Outcome {
        bed.kill_9(&self.full_id(), what)
    }
}
