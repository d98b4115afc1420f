//! Every process of a pod hurt at every point of the pod's life: containerd tells the truth afterwards, and
//! nothing stays behind.
//!
//! The points are those that the shim passes when nothing is hurt (`shim/src/faults.rs`); `tests/faults/run`
//! builds the programs that have them. A pod of two containers lives once undisturbed, and what it has
//! passed becomes the list of cases. In each case a pod like it is held at one point, one of its processes
//! is hurt, and the pod lives on as far as it can.
//!
//! `SEPAL_FAULTS` chooses cases by words that their names must contain.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use sepal_tests::{Bed, Outcome, seconds};

/// Where the shim looks, and the agent's port: see `shim/src/faults.rs` and `guest-agent/src/faults.rs`.
const ROOT: &str = "/run/sepal-faults";
const AGENT_PORT: u32 = 1099;
/// How long a client's call may take.
const PATIENCE: Duration = seconds(30);
/// What is said of a call that took longer.
const UNANSWERED: &str = "the client was not answered";
/// How long a stopped process stays so.
const STOPPED: Duration = seconds(60);
/// After what time a shim gives a silent agent up at the latest: `shim/src/up.rs`, with the bed's
/// `agent_timeout_s`.
const SILENCE: Duration = seconds(150);
/// How long containerd may take until what it says is true.
const TRUTH: Duration = seconds(10);
/// How long what is left may take to go.
const GONE: Duration = seconds(15);
/// How long a shortage lasts.
const SHORTAGE: Duration = seconds(3);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    /// The shim's process that is at the point: the server, or what containerd runs to start or clean up.
    Shim,
    Vmm,
    FileServer,
    Agent,
    /// The second container's first process.
    Init,
    Containerd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Injury {
    /// Ended at once.
    Kill,
    /// Stopped for [`STOPPED`]; of the agent, silent for ever.
    Stop,
    /// No more file descriptors than it has, for some time.
    Descriptors,
    /// No more memory than it has.
    Memory,
    /// The file system of the pod's directory is full, for some time.
    Space,
}

/// One of a shim's processes by its container, and the point it has come to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    of_member: bool,
    /// Its name, and how many times that process had passed it before.
    name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Case {
    point: Point,
    victim: Victim,
    injury: Injury,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = if self.point.of_member {
            "member"
        } else {
            "pod"
        };
        let Self { victim, injury, .. } = self;
        write!(f, "{of}/{} {victim:?} {injury:?}", self.point.name)
    }
}

impl Case {
    /// Whether it hurts other cases' pods, too.
    fn is_alone(&self) -> bool {
        self.victim == Victim::Containerd || self.injury == Injury::Space
    }
}

/// A sandbox and a container in it, by ctr, from the first call to the last.
struct Life<'bed> {
    bed: &'bed Bed,
    pod: String,
    member: String,
    patience: Duration,
}

/// What became of a life: `Err` tells at which call it ended.
type Lived = Result<(), String>;

impl<'bed> Life<'bed> {
    fn new(bed: &'bed Bed, patience: Duration) -> Self {
        let name = bed.unique("fault");
        let (pod, member) = (format!("{name}-pod"), format!("{name}-member"));
        let line = format!("mkdir -p {ROOT}/{pod} {ROOT}/{member} {ROOT}/{pod}/flags");
        bed.sh(&line).run().success();
        Self {
            bed,
            pod,
            member,
            patience,
        }
    }

    fn id(&self, point: &Point) -> &str {
        if point.of_member {
            &self.member
        } else {
            &self.pod
        }
    }

    fn call(&self, what: &str, argv: &[&str]) -> Result<String, String> {
        let outcome = self.bed.command(argv).patience(self.patience).run();
        if outcome.took() >= self.patience {
            return Err(format!("{what}: {UNANSWERED}\n{}", outcome.report()));
        }
        if outcome.ok() {
            Ok(outcome.out())
        } else {
            let error = outcome.err();
            let last = error.lines().last().unwrap_or_default();
            Err(format!("{what}: {last}"))
        }
    }

    fn run(&self, id: &str, kind: &str, options: &[&str], argv: &[&str]) -> Lived {
        let kind = format!("io.kubernetes.cri.container-type={kind}");
        let image = self.bed.busybox();
        let mut line = vec!["ctr", "run", "--detach", "--runtime", self.bed.runtime()];
        line.extend(["--annotation", &kind]);
        line.extend(options);
        line.extend([image.as_str(), id]);
        line.extend(argv);
        self.call("run", &line).map(drop)
    }

    /// From its creation to its removal.
    fn live(&self) -> Lived {
        let (pod, member) = (self.pod.as_str(), self.member.as_str());
        self.run(pod, "sandbox", &[], &["sleep", "100000"])?;
        let sandbox = format!("io.kubernetes.cri.sandbox-id={pod}");
        let flags = format!("type=bind,src={ROOT}/{pod}/flags,dst=/flags,options=rbind:ro");
        let options = ["--annotation", &sandbox, "--mount", &flags];
        let wait = "while [ ! -e /flags/die ]; do sleep 0.05; done; exit 7";
        self.run(member, "container", &options, &["sh", "-c", wait])?;
        let exec = [
            "ctr",
            "task",
            "exec",
            "--exec-id",
            "e",
            member,
            "echo",
            "hello",
        ];
        let said = self.call("exec", &exec)?;
        if said != "hello" {
            return Err(format!("exec: it said {said:?}"));
        }
        for id in [member, pod] {
            self.call("kill", &["ctr", "task", "kill", "-s", "KILL", id])?;
            let end = Instant::now() + self.patience;
            while self.status(id)?.as_deref() == Some("RUNNING") {
                if Instant::now() > end {
                    return Err("kill: it runs on".into());
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            self.call("delete", &["ctr", "task", "rm", id])?;
            self.call("remove", &["ctr", "container", "rm", id])?;
        }
        Ok(())
    }

    /// What containerd says of a task.
    fn status(&self, id: &str) -> Result<Option<String>, String> {
        let list = self.call("list", &["ctr", "task", "ls"])?;
        let line = list.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(id)).then(|| words.next_back().unwrap_or_default().to_owned())
        });
        Ok(line)
    }

    /// The pid of a program of the pod; none when there is none.
    fn pid(&self, program: &str) -> Option<String> {
        let line = format!("pgrep -o -f '{program} .*{}'", self.pod);
        let pid = self.bed.sh(&line).run().out();
        Some(pid).filter(|pid| !pid.is_empty())
    }

    /// containerd's word against what is there.
    fn tells_the_truth(&self) -> Result<(), String> {
        let end = Instant::now() + TRUTH;
        loop {
            let lie = self.lie()?;
            let Some(lie) = lie else { return Ok(()) };
            if Instant::now() > end {
                return Err(lie);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn lie(&self) -> Result<Option<String>, String> {
        for id in [&self.pod, &self.member] {
            if self.status(id)?.as_deref() != Some("RUNNING") {
                continue;
            }
            if self.pid("sepal-vmm").is_none() {
                return Ok(Some(format!("{id} is said to run, and has no VM")));
            }
            let exec = self.bed.unique("e");
            let exec = ["ctr", "task", "exec", "--exec-id", &exec, id, "true"];
            if let Err(e) = self.call("exec", &exec) {
                // It may have ended just now.
                if self.status(id)?.as_deref() == Some("RUNNING") {
                    return Ok(Some(format!("{id} is said to run, and does not: {e}")));
                }
            }
        }
        Ok(None)
    }

    /// What ran when a call of the life failed runs on.
    fn goes_on(&self, lived: &Lived) -> Result<(), String> {
        let Err(error) = lived else { return Ok(()) };
        // By then both run, and nobody has been told to end.
        if !error.starts_with("exec: ") {
            return Ok(());
        }
        for id in [&self.pod, &self.member] {
            let status = self.status(id)?;
            if status.as_deref() != Some("RUNNING") {
                return Err(format!("{id} is lost, {status:?}: {error}"));
            }
        }
        Ok(())
    }

    /// Removes what there still is, as a user would.
    fn removed(&self) -> Result<(), String> {
        let end = Instant::now() + TRUTH + self.patience;
        let mut said = String::new();
        loop {
            let mut left = Vec::new();
            for id in [&self.member, &self.pod] {
                if self.status(id)?.is_some()
                    && let Err(e) = self.call("delete", &["ctr", "task", "rm", "--force", id])
                {
                    said = e;
                }
                let containers = self.call("list", &["ctr", "container", "ls", "-q"])?;
                if containers.lines().any(|line| line == id)
                    && let Err(e) = self.call("remove", &["ctr", "container", "rm", id])
                {
                    said = e;
                    left.push(id);
                }
            }
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(format!("{left:?} cannot be removed: {said}"));
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Looks for anything that has the pod's name in it.
    fn nothing_left(&self) -> Result<(), String> {
        let name = self.pod.trim_end_matches("-pod");
        let line = format!(
            "rm -rf {ROOT}/{name}-*; \
             for p in /proc/[0-9]*; do \
               tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -F -- '{name}-' | grep -vF 'for p in'; \
             done; \
             grep -F -- '{name}-' /proc/self/mountinfo; \
             find /run/sepal /run/containerd/io.containerd.runtime.v2.task /sys/fs/cgroup \
               -maxdepth 6 -name '*{name}-*' 2>/dev/null; true"
        );
        let end = Instant::now() + GONE;
        loop {
            let found = self.bed.sh(&line).run().out();
            if found.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(format!("left behind:\n{found}"));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Names of the points that a process of the shim's has passed.
    fn passed(&self, of_member: bool) -> Vec<Point> {
        let id = if of_member { &self.member } else { &self.pod };
        let list = self.bed.sh(&format!("cat {ROOT}/{id}/passed 2>/dev/null"));
        let list = list.run().out();
        let point = |name: &str| Point {
            of_member,
            name: name.into(),
        };
        list.lines().map(point).collect()
    }
}

/// How a case ended well.
enum Ending {
    /// The victim was not there at that point.
    NobodyToHurt,
    /// With these words for how far the life came.
    Truly(String),
}

impl Case {
    fn patience(&self) -> Duration {
        match self.injury {
            // An agent that is silent is listened for as long as a guest may take to boot in this bed.
            Injury::Stop if self.victim == Victim::Agent => STOPPED + SILENCE,
            Injury::Stop => STOPPED + PATIENCE,
            _ => PATIENCE,
        }
    }

    fn run(&self, bed: &Bed) -> Result<Ending, String> {
        let life = Life::new(bed, self.patience());
        let directory = format!("{ROOT}/{}", life.id(&self.point));
        bed.write(&format!("{directory}/hold"), self.point.name.as_str());
        let (hurt, lived) = std::thread::scope(|scope| {
            let lives = scope.spawn(|| life.live());
            let hurt = self.hurt(&life, &directory, || lives.is_finished());
            let lived = lives.join().expect("a life that ends");
            (hurt, lived)
        });
        let hurt = hurt?;
        if let Err(e) = &lived
            && e.contains(UNANSWERED)
        {
            return Err(e.clone());
        }
        life.tells_the_truth()?;
        if hurt && self.spares_the_pod() {
            life.goes_on(&lived)?;
        }
        life.removed()?;
        life.nothing_left()?;
        if !hurt {
            lived?;
            return Ok(Ending::NobodyToHurt);
        }
        Ok(Ending::Truly(lived.err().unwrap_or("to its end".into())))
    }

    /// Whether what runs must run on: containerd is nobody's life, and a process that is stopped for a minute
    /// takes up where it was.
    fn spares_the_pod(&self) -> bool {
        let stopped = self.injury == Injury::Stop && self.victim != Victim::Agent;
        self.victim == Victim::Containerd || stopped
    }

    /// Waits for the point and hurts the victim there. Answers whether there was one.
    fn hurt(
        &self,
        life: &Life<'_>,
        directory: &str,
        is_over: impl Fn() -> bool,
    ) -> Result<bool, String> {
        let bed = life.bed;
        let held = format!("{directory}/held");
        let look = format!("cat {held} 2>/dev/null");
        let end = Instant::now() + PATIENCE;
        let holder = loop {
            let holder = bed.sh(&look).run().out();
            if !holder.is_empty() {
                break holder;
            }
            if is_over() || Instant::now() > end {
                return Err("the point was not reached".into());
            }
        };
        let release = || {
            bed.command(["rm", &held]).run();
        };
        let pid = match self.victim {
            Victim::Shim => Some(holder),
            Victim::Vmm => life.pid("sepal-vmm"),
            Victim::FileServer => life.pid("sepal-fs"),
            Victim::Agent | Victim::Init | Victim::Containerd => Some(String::new()),
        };
        let Some(pid) = pid else {
            release();
            return Ok(false);
        };
        let sh = |line: String| bed.sh(&line).run();
        match (self.victim, self.injury) {
            (Victim::Containerd, Injury::Stop) => {
                sh("kill -STOP $(cat /run/containerd.pid)".into());
                release();
                std::thread::sleep(STOPPED);
                sh("kill -CONT $(cat /run/containerd.pid)".into());
            }
            (Victim::Containerd, _) => {
                bed.containerd("kill").success();
                release();
                bed.containerd("start").success();
            }
            (Victim::Init, _) => {
                sh(format!("touch {ROOT}/{}/flags/die", life.pod));
                // It looks twenty times a second.
                std::thread::sleep(Duration::from_millis(200));
                release();
            }
            (Victim::Agent, injury) => {
                let told = tell_agent(life, if injury == Injury::Kill { 'k' } else { 's' });
                release();
                return Ok(told.ok());
            }
            (_, Injury::Kill) => {
                let killed = sh(format!("kill -9 {pid}")).ok();
                release();
                return Ok(killed);
            }
            (_, Injury::Stop) => {
                let stopped = sh(format!("kill -STOP {pid}")).ok();
                release();
                if !stopped {
                    return Ok(false);
                }
                std::thread::sleep(STOPPED);
                sh(format!("kill -CONT {pid}"));
            }
            (_, Injury::Descriptors) => {
                // The limit is of numbers: the lowest that is free is the first that cannot be had.
                let none = sh(format!(
                    "n=0; while [ -e /proc/{pid}/fd/$n ]; do n=$((n + 1)); done; \
                     prlimit --pid {pid} --nofile=$n:"
                ));
                release();
                if !none.ok() {
                    return Ok(false);
                }
                std::thread::sleep(SHORTAGE);
                // It may have ended of it.
                sh(format!("prlimit --pid {pid} --nofile=1024:"));
            }
            (_, Injury::Memory) => {
                let size = format!("$(awk '/^VmSize/ {{ print $2 }}' /proc/{pid}/status)");
                let none = sh(format!("prlimit --pid {pid} --as=$(({size} * 1024)):"));
                release();
                return Ok(none.ok());
            }
            (_, Injury::Space) => {
                let size = "$(($(df -k --output=used /run | tail -n 1) + 16))k";
                let full = "cat /dev/zero >/run/full 2>/dev/null; ! echo x >>/run/full";
                sh(format!("mount -o remount,size={size} /run && {full}")).success();
                release();
                std::thread::sleep(SHORTAGE);
                sh("rm /run/full && mount -o remount,size=50% /run".into()).success();
            }
        }
        Ok(true)
    }
}

fn tell_agent(life: &Life<'_>, what: char) -> Outcome {
    let find = format!("find /run/sepal -path '*{}*/vm/vsock'", life.pod);
    let line = format!(
        "set -e; socket=$({find}); [ -n \"$socket\" ]; \
         (printf 'CONNECT {AGENT_PORT}\\n'; sleep 0.2; printf {what}; sleep 0.2) | \
         socat - UNIX-CONNECT:$socket | grep -q ^OK"
    );
    life.bed.sh(&line).run()
}

/// All that shall be tried, from what an undisturbed life has passed.
fn cases(pod: &[Point], member: &[Point]) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |point: &Point, victim, injury| {
        cases.push(Case {
            point: point.clone(),
            victim,
            injury,
        });
    };
    let from = |name: &str| pod.iter().position(|point| point.name == name);
    for point in pod.iter().chain(member) {
        add(point, Victim::Shim, Injury::Kill);
        add(point, Victim::Containerd, Injury::Kill);
    }
    for (first, victim) in [
        ("vm: vmm 0", Victim::Vmm),
        ("pod: spawned 0", Victim::FileServer),
        ("boot: agent connected 0", Victim::Agent),
        ("run 1", Victim::Init),
    ] {
        let first = from(first).unwrap_or_else(|| panic!("no point {first}"));
        for point in &pod[first..] {
            add(point, victim, Injury::Kill);
        }
    }
    let mut some = |victim: &[Victim], injury, names: &[&str]| {
        for name in names {
            let index = from(name).unwrap_or_else(|| panic!("no point {name}"));
            for victim in victim {
                add(&pod[index], *victim, injury);
            }
        }
    };
    let host = [Victim::Shim, Victim::Vmm, Victim::FileServer];
    let stops = [
        "boot: network 0",
        "boot: answered 0",
        "create: mounted 1",
        "run: started 1",
        "exec: made 0",
        "kill: sent 0",
        "delete 0",
        "remove 0",
    ];
    some(&host, Injury::Stop, &stops);
    some(&[Victim::Containerd], Injury::Stop, &["create 1", "exit 0"]);
    let silent = ["create 1", "run 1", "exec 0", "kill 0", "remove 0"];
    some(&[Victim::Agent], Injury::Stop, &silent);
    let calls = ["pod: recorded 0", "vm 0", "create 1", "exec 0", "delete 0"];
    some(&[Victim::Shim], Injury::Descriptors, &calls);
    let programs = [Victim::Vmm, Victim::FileServer];
    some(
        &programs,
        Injury::Descriptors,
        &["pod: spawned 0", "run: told 1"],
    );
    some(
        &programs,
        Injury::Memory,
        &["pod: spawned 0", "run: told 1"],
    );
    let files = [
        "pod: directory 0",
        "create 0",
        "create 1",
        "exec 0",
        "delete 0",
    ];
    some(&[Victim::Shim], Injury::Space, &files);
    cases.sort();
    cases.dedup();
    cases
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// How the cases ended.
#[derive(Default)]
struct Tally {
    /// By victim and injury: how many.
    good: BTreeMap<(Victim, Injury), usize>,
    nobody: usize,
    bad: Vec<String>,
}

fn try_all(bed: &Bed, cases: &[Case], lanes: usize, tally: &Mutex<Tally>) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let begun = Instant::now();
                    let ended = case.run(bed);
                    let took = begun.elapsed().as_secs_f32();
                    let mut tally = lock(tally);
                    match ended {
                        Ok(Ending::NobodyToHurt) => tally.nobody += 1,
                        Ok(Ending::Truly(how)) => {
                            println!("ok {case} ({took:.1} s): {how}");
                            *tally.good.entry((case.victim, case.injury)).or_default() += 1;
                        }
                        Err(e) => {
                            println!("BAD {case} ({took:.1} s): {e}");
                            tally.bad.push(format!("{case}: {e}"));
                        }
                    }
                }
            });
        }
    });
}

#[test]
#[ignore = "needs a bed with programs that have fault points: tests/faults/run"]
fn every_process_may_be_hurt_at_every_point() {
    let bed = Bed::alone();
    let undisturbed = Life::new(&bed, PATIENCE);
    undisturbed.live().expect("a life that nothing disturbs");
    let (pod, member) = (undisturbed.passed(false), undisturbed.passed(true));
    undisturbed.nothing_left().expect("nothing left");
    assert!(pod.len() >= 30, "only {} points: {pod:?}", pod.len());
    println!(
        "{} points of the pod, {} of its member",
        pod.len(),
        member.len()
    );

    let words = std::env::var("SEPAL_FAULTS").unwrap_or_default();
    let chosen = |case: &Case| {
        let name = case.to_string();
        words.split(',').all(|word| name.contains(word))
    };
    let (alone, together): (Vec<_>, Vec<_>) = cases(&pod, &member)
        .into_iter()
        .filter(chosen)
        .partition(Case::is_alone);
    let count = alone.len() + together.len();
    println!("{count} cases");
    assert!(
        count >= if words.is_empty() { 200 } else { 1 },
        "of {words:?}"
    );
    let tally = Mutex::new(Tally::default());
    try_all(&bed, &together, bed.scaled(4, 1), &tally);
    try_all(&bed, &alone, 1, &tally);

    let tally = lock(&tally);
    for ((victim, injury), count) in &tally.good {
        println!("{victim:?} {injury:?}: {count} ended truly");
    }
    println!("{} had nobody to hurt", tally.nobody);
    bed.assert_nothing_left();
    assert!(tally.bad.is_empty(), "{}", tally.bad.join("\n"));
}
