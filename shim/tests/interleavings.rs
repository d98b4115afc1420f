//! Every order in which a process's start, its end, a signal and its deletion can come, one after the
//! other and at once, against a model of what a task is.
//!
//! The model is that of [`sepal_shim::container`]'s states, told by answers alone. Calls that are made at
//! once may be answered as in any one order of them (linearizability), and what containerd is told
//! afterwards must be what has happened. The shim is real, the VM a stand-in, and one pod has them all.
//!
//! `SEPAL_INTERLEAVINGS=4` tries all sequences of up to four calls (default: three, and of four those
//! without a repetition).

mod common;

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::bed::{
    Bed, Told, code, delete_of, is_root, remove_parents, shut_down, start_of, start_sandbox, stop,
    within,
};
use containerd_shim_protos::api::*;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::TaskClient;
use containerd_shim_protos::ttrpc::{self, Code};
use sepal_protocol::state::PodState;

/// What the program exits with when it is told to finish.
const FINISHED: u32 = 7;
/// What it ends with when it is killed.
const KILLED: u32 = 137;
/// How many processes are tried at a time.
const LANES: usize = 4;
/// How long the shim may take until what it says has come to rest.
const REST: Duration = Duration::from_secs(20);

/// Becomes the stand-in when the shim has started this binary; a test of nothing otherwise.
#[test]
fn stand_in_for_the_vmm() {
    if std::env::var_os("SEPAL_STAND_IN").is_some() {
        common::vmm();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Init,
    Exec,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Start,
    Kill,
    /// The program's own end, soon after it runs.
    Finish,
    Delete,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Answer {
    Done,
    Deleted(u32),
    /// FAILED_PRECONDITION.
    Refused,
    /// NOT_FOUND.
    Missing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    Created,
    Running,
    /// Has ended, or is about to, and the shim does not know yet.
    Ending(u32),
    /// Was ended before it ran, and the shim does not know yet.
    Aborted,
    Stopped(u32),
    Gone,
}

/// A process as it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct State {
    phase: Phase,
    /// The program will finish, or would.
    told_to_finish: bool,
    /// How it ended, when containerd is to be told.
    end: Option<u32>,
}

impl State {
    const NEW: Self = Self {
        phase: Phase::Created,
        told_to_finish: false,
        end: None,
    };

    fn to(self, phase: Phase) -> Self {
        let end = match phase {
            Phase::Ending(status) | Phase::Stopped(status) => Some(status),
            Phase::Aborted => Some(KILLED),
            _ => self.end,
        };
        Self { phase, end, ..self }
    }

    /// When the shim has learned all there is.
    fn at_rest(self) -> Self {
        match self.phase {
            Phase::Ending(status) => self.to(Phase::Stopped(status)),
            Phase::Aborted => self.to(Phase::Stopped(KILLED)),
            _ => self,
        }
    }

    /// What a call may be answered, and what becomes of the process.
    fn after(self, kind: Kind, call: Call) -> Vec<(Self, Answer)> {
        use Answer::{Deleted, Done, Missing, Refused};
        let same = |answer| vec![(self, answer)];
        match (call, self.phase) {
            (Call::Finish, Phase::Running) => {
                let told = Self {
                    told_to_finish: true,
                    ..self
                };
                vec![(told.to(Phase::Ending(FINISHED)), Done)]
            }
            (Call::Finish, _) => {
                let told = Self {
                    told_to_finish: true,
                    ..self
                };
                vec![(told, Done)]
            }
            (_, Phase::Gone) => same(Missing),
            (Call::Start, Phase::Created) if self.told_to_finish => {
                vec![(self.to(Phase::Ending(FINISHED)), Done)]
            }
            (Call::Start, Phase::Created) => vec![(self.to(Phase::Running), Done)],
            (Call::Start, _) => same(Refused),
            (Call::Kill, Phase::Created) if kind == Kind::Exec => same(Refused),
            (Call::Kill, Phase::Created) => vec![(self.to(Phase::Aborted), Done)],
            (Call::Kill, Phase::Running) => vec![(self.to(Phase::Ending(KILLED)), Done)],
            // Whichever comes first; and a zombie takes signals.
            (Call::Kill, Phase::Ending(FINISHED)) => vec![
                (self, Done),
                (self, Missing),
                (self.to(Phase::Ending(KILLED)), Done),
            ],
            (Call::Kill, Phase::Ending(_) | Phase::Aborted) => {
                vec![(self, Done), (self, Missing)]
            }
            (Call::Kill, Phase::Stopped(_)) => same(Missing),
            (Call::Delete, Phase::Created) => match kind {
                Kind::Init => vec![(self.to(Phase::Aborted).to(Phase::Gone), Deleted(KILLED))],
                // It never was.
                Kind::Exec => vec![(self.to(Phase::Gone), Deleted(0))],
            },
            (Call::Delete, Phase::Aborted) => {
                vec![(self.to(Phase::Gone), Deleted(KILLED))]
            }
            (Call::Delete, Phase::Running | Phase::Ending(_)) => same(Refused),
            (Call::Delete, Phase::Stopped(status)) => {
                vec![(self.to(Phase::Gone), Deleted(status))]
            }
        }
    }

    /// As [`Self::after`], where the shim may have learned of an end just before, or a deletion that is
    /// under way have ended what never ran.
    fn soon_after(self, kind: Kind, call: Call, is_deleted: bool) -> HashSet<(Self, Answer)> {
        let mut all = HashSet::from_iter(self.after(kind, call));
        all.extend(self.at_rest().after(kind, call));
        if is_deleted && kind == Kind::Init && self.phase == Phase::Created {
            all.extend(self.to(Phase::Aborted).soon_after(kind, call, false));
        }
        all
    }

    /// What the shim says of it, at rest.
    fn shown(self) -> Option<(Status, u32)> {
        match self.at_rest().phase {
            Phase::Created => Some((Status::CREATED, 0)),
            Phase::Running => Some((Status::RUNNING, 0)),
            Phase::Stopped(status) => Some((Status::STOPPED, status)),
            _ => None,
        }
    }
}

/// What may be after calls that were made at once and answered so: as after any one order of them.
fn explained(states: &HashSet<State>, kind: Kind, calls: &[(Call, Answer)]) -> HashSet<State> {
    if calls.is_empty() {
        return states.clone();
    }
    let mut all = HashSet::new();
    for (index, (call, answer)) in calls.iter().enumerate() {
        let mut others = calls.to_vec();
        others.remove(index);
        let is_deleted = calls.iter().any(|(call, _)| *call == Call::Delete);
        let after = |state: &State| state.soon_after(kind, *call, is_deleted);
        let next = states.iter().flat_map(after);
        let next = next.filter(|(_, given)| given == answer);
        let next = next.map(|(state, _)| state).collect();
        all.extend(explained(&next, kind, &others));
    }
    all
}

/// Groups of calls, one group after the other, those of a group at once.
type Script = Vec<Vec<Call>>;

/// All scripts of a number of calls.
fn scripts(length: usize, repeated: bool) -> Vec<Script> {
    const ALL: [Call; 4] = [Call::Start, Call::Kill, Call::Finish, Call::Delete];
    let mut sequences = vec![Vec::new()];
    for _ in 0..length {
        let longer = |sequence: &Vec<Call>| {
            let fresh = |call: &&Call| repeated || !sequence.contains(call);
            let with = |call: &Call| [sequence.as_slice(), &[*call]].concat();
            ALL.iter().filter(fresh).map(with).collect::<Vec<_>>()
        };
        sequences = sequences.iter().flat_map(longer).collect();
    }
    let mut scripts = Vec::new();
    for sequence in sequences {
        // A bit for each call but the first: whether it waits for those before it.
        for waits in 0..1_u32 << (length - 1) {
            let mut script: Script = vec![vec![sequence[0]]];
            for (index, call) in sequence.iter().enumerate().skip(1) {
                if waits & 1 << (index - 1) == 0 {
                    script.last_mut().unwrap().push(*call);
                } else {
                    script.push(vec![*call]);
                }
            }
            scripts.push(script);
        }
    }
    scripts
}

/// One process and who drives it.
struct Subject<'a> {
    bed: &'a Bed,
    task: &'a TaskClient,
    kind: Kind,
    container: String,
    exec: String,
    /// The program waits for a line from it, and we hold it open.
    finish: PathBuf,
    held: File,
}

impl<'a> Subject<'a> {
    async fn new(bed: &'a Bed, task: &'a TaskClient, kind: Kind, name: &str, host: &str) -> Self {
        let finish = PathBuf::from(bed.fifo(&format!("{name}-finish")));
        let held = File::options().read(true).write(true).open(&finish);
        let line = format!("read -r line <{}; exit {FINISHED}", finish.display());
        let args = ["sh", "-c", line.as_str()];
        let (container, exec) = match kind {
            Kind::Init => {
                let member = bed.member_of_name(name, &args);
                task.create(within(), &member).await.unwrap();
                (member.id, String::new())
            }
            Kind::Exec => {
                let process =
                    serde_json::json!({"args": args, "cwd": "/", "user": {"uid": 0, "gid": 0}});
                let spec = Any {
                    value: process.to_string().into_bytes(),
                    ..Default::default()
                };
                let request = ExecProcessRequest {
                    id: host.into(),
                    exec_id: name.into(),
                    spec: MessageField::some(spec),
                    ..Default::default()
                };
                task.exec(within(), &request).await.unwrap();
                (host.into(), name.into())
            }
        };
        Self {
            bed,
            task,
            kind,
            container,
            exec,
            finish,
            held: held.unwrap(),
        }
    }

    async fn make(&self, call: Call) -> Answer {
        let (id, exec_id) = (self.container.clone(), self.exec.clone());
        let refused = |error: ttrpc::Error| match code(error) {
            (Code::FAILED_PRECONDITION, _) => Answer::Refused,
            (Code::NOT_FOUND, _) => Answer::Missing,
            other => panic!("{call:?} of {id}: {other:?}"),
        };
        match call {
            Call::Finish => {
                (&self.held).write_all(b"\n").unwrap();
                Answer::Done
            }
            Call::Start => {
                let request = StartRequest {
                    exec_id,
                    ..start_of(&id)
                };
                let answer = self.task.start(within(), &request).await;
                answer.map_or_else(refused, |_| Answer::Done)
            }
            Call::Kill => {
                let request = KillRequest {
                    id: id.clone(),
                    exec_id,
                    signal: 9,
                    ..Default::default()
                };
                let answer = self.task.kill(within(), &request).await;
                answer.map_or_else(refused, |_| Answer::Done)
            }
            Call::Delete => {
                let request = DeleteRequest {
                    exec_id,
                    ..delete_of(&id)
                };
                let answer = self.task.delete(within(), &request).await;
                answer.map_or_else(refused, |answer| Answer::Deleted(answer.exit_status))
            }
        }
    }

    async fn shown(&self) -> Option<(Status, u32)> {
        let request = StateRequest {
            id: self.container.clone(),
            exec_id: self.exec.clone(),
            ..Default::default()
        };
        match self.task.state(within(), &request).await {
            Ok(state) => Some((state.status(), state.exit_status)),
            Err(error) => {
                let (code, message) = code(error);
                assert_eq!(code, Code::NOT_FOUND, "{message}");
                None
            }
        }
    }

    /// Follows a script. Answers with what is wrong.
    async fn follow(&self, script: &Script) -> Result<(), String> {
        let (mut states, mut history) = (HashSet::from([State::NEW]), Vec::new());
        let mut groups = script.clone();
        // However far it came: what is left is ended and removed.
        groups.extend([Call::Kill, Call::Delete, Call::Delete].map(|call| vec![call]));
        for group in groups {
            let answers = futures::future::join_all(group.iter().map(|call| self.make(*call)));
            let answers = answers.await;
            let made: Vec<_> = group.into_iter().zip(answers).collect();
            let possible = explained(&states, self.kind, &made);
            history.push(made);
            if possible.is_empty() {
                return Err(format!(
                    "{history:?}: no order explains it, from {states:?}"
                ));
            }
            let deadline = Instant::now() + REST;
            states = loop {
                let shown = self.shown().await;
                let fit = possible.iter().filter(|state| state.shown() == shown);
                let fit: HashSet<_> = fit.map(|state| state.at_rest()).collect();
                if !fit.is_empty() {
                    break fit;
                }
                if Instant::now() > deadline {
                    return Err(format!(
                        "{history:?}: it is said to be {shown:?}, not one of {possible:?}"
                    ));
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            };
        }
        std::fs::remove_file(&self.finish).unwrap();
        self.told(&states, &history.concat())
            .await
            .map_err(|e| format!("{history:?}: {e}"))
    }

    /// What containerd was told in the end.
    async fn told(&self, states: &HashSet<State>, calls: &[(Call, Answer)]) -> Result<(), String> {
        let started = calls.contains(&(Call::Start, Answer::Done));
        let deadline = Instant::now() + REST;
        loop {
            let told = self.bed.told_of(&self.container, &self.exec);
            let fits = |state: &State| {
                let expected = self.expected(started, state.end);
                let told = told
                    .iter()
                    .map(|Told { topic, status, .. }| (topic.as_str(), *status));
                told.eq(expected)
            };
            if states.iter().any(fits) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!(
                    "containerd was told {told:?}, which is none of {states:?}"
                ));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn expected(&self, started: bool, end: Option<u32>) -> Vec<(&'static str, u32)> {
        let (made, begun) = match self.kind {
            Kind::Init => ("create", "start"),
            Kind::Exec => ("exec-added", "exec-started"),
        };
        let mut all = vec![(made, 0)];
        all.extend(started.then_some((begun, 0)));
        all.extend(end.map(|status| ("exit", status)));
        if self.kind == Kind::Init {
            all.extend(end.map(|status| ("delete", status)));
        }
        all
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_order_calls_come_in_a_process_has_one_life_and_containerd_is_told_it() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("interleavings", &[]).await;
    let (sandbox, task) = bed.start_sandbox().await;
    start_sandbox(&bed, &sandbox).await;
    let state = PodState::load(&bed.pod()).unwrap();
    let host = bed.member_of_name("host", &["sleep", "600"]);
    task.create(within(), &host).await.unwrap();
    task.start(within(), &start_of(&host.id)).await.unwrap();

    let mut all: Vec<_> = (1..=3).flat_map(|length| scripts(length, true)).collect();
    all.extend(scripts(
        4,
        std::env::var("SEPAL_INTERLEAVINGS").as_deref() == Ok("4"),
    ));
    let subjects = all
        .iter()
        .flat_map(|script| [(Kind::Init, script), (Kind::Exec, script)]);
    let subjects: Vec<_> = subjects.enumerate().collect();
    let count = subjects.len();
    let lane = |lane: usize| {
        let (bed, task, host, subjects) = (&bed, &task, &host.id, &subjects);
        async move {
            let mut wrong = Vec::new();
            for (number, (kind, script)) in subjects.iter().skip(lane).step_by(LANES) {
                let subject = Subject::new(bed, task, *kind, &format!("m{number}"), host).await;
                if let Err(e) = subject.follow(script).await {
                    wrong.push(format!("{kind:?} {script:?}: {e}"));
                }
            }
            wrong
        }
    };
    let wrong = futures::future::join_all((0..LANES).map(lane))
        .await
        .concat();
    assert!(
        wrong.is_empty(),
        "{} of {count}:\n{}",
        wrong.len(),
        wrong.join("\n\n")
    );
    println!("{count} scripts");
    shut_down(&bed, &sandbox, state.shim).await;
    remove_parents(&state);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_creations_of_one_container_one_succeeds_and_the_other_does_no_harm() {
    if !is_root() {
        return;
    }
    let bed = Bed::new("twice", &[]).await;
    let (sandbox, task) = bed.start_sandbox().await;
    start_sandbox(&bed, &sandbox).await;
    let state = PodState::load(&bed.pod()).unwrap();
    for number in 0..20 {
        let member = bed.member_of_name(&format!("m{number}"), &["sleep", "600"]);
        let (first, second) = tokio::join!(
            task.create(within(), &member),
            task.create(within(), &member)
        );
        let refused = match (first, second) {
            (Ok(_), Err(refused)) | (Err(refused), Ok(_)) => code(refused),
            (first, second) => panic!("{first:?}, {second:?}"),
        };
        assert_eq!(refused.0, Code::ALREADY_EXISTS, "{}", refused.1);
        let root = bed.pod().join("share").join(&member.id).join("rootfs");
        assert!(
            root.is_dir(),
            "the other creation has taken {} away",
            root.display()
        );
        task.start(within(), &start_of(&member.id)).await.unwrap();
        let again = code(task.create(within(), &member).await.unwrap_err());
        assert_eq!(again.0, Code::ALREADY_EXISTS, "{}", again.1);
    }
    stop(&bed, &sandbox, 0).await;
    bed.assert_nothing_left(&state);
    shut_down(&bed, &sandbox, state.shim).await;
    remove_parents(&state);
}
