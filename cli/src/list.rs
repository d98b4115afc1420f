//! `sepal list`: a line per pod.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use crate::pods::{self, Pod};

/// The program names of a pod's processes, as the kernel cuts them (proc(5), comm).
const FS: &str = "sepal-fs";

/// One pod in the JSON output. Fields are added, never changed.
#[derive(Debug, Serialize)]
struct Row {
    id: String,
    /// `running`, `paused`, `starting` (no VM yet, or no more), or `unresponsive`.
    state: &'static str,
    vm_pid: Option<i32>,
    shim_pid: Option<i32>,
    fs_pid: Option<i32>,
    vcpus: Option<u8>,
    /// Guest RAM.
    memory_bytes: Option<u64>,
    /// Of it taken back by the balloon.
    balloon_bytes: Option<u64>,
    /// What the pod's processes cost the host, guest RAM in use included, shared pages by share.
    pss_bytes: Option<u64>,
    /// Since the VMM was started.
    uptime_s: Option<u64>,
    containers: Vec<String>,
}

/// Prints the pods.
///
/// # Errors
/// The state directory cannot be read.
pub fn run(state: &Path, json: bool) -> anyhow::Result<ExitCode> {
    let processes = Process::all();
    let rows: Vec<Row> = pods::all(state)?
        .iter()
        .map(|pod| row(pod, &processes))
        .collect();
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, &rows)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", table(&rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(pod: &Pod, processes: &[Process]) -> Row {
    let mut row = Row {
        id: pod.id.clone(),
        state: "starting",
        vm_pid: None,
        shim_pid: None,
        fs_pid: None,
        vcpus: None,
        memory_bytes: None,
        balloon_bytes: None,
        pss_bytes: None,
        uptime_s: None,
        containers: pod.containers(),
    };
    let vm = match pod.vm() {
        Ok(Some(vm)) => vm,
        Ok(None) => return row,
        Err(_) => {
            row.state = "unresponsive";
            return row;
        }
    };
    row.state = if vm.state.running {
        "running"
    } else {
        "paused"
    };
    row.vm_pid = Some(vm.pid);
    row.vcpus = Some(vm.state.cpus);
    row.memory_bytes = Some(vm.state.memory.saturating_add(vm.state.plugged));
    row.balloon_bytes = Some(vm.state.balloon);
    if let Some(vmm) = processes.iter().find(|process| process.pid == vm.pid) {
        let shim = processes.iter().find(|process| process.pid == vmm.parent);
        row.shim_pid = shim.map(|process| process.pid);
        row.fs_pid = processes
            .iter()
            .find(|process| process.parent == vmm.parent && process.name == FS)
            .map(|process| process.pid);
        row.uptime_s = uptime(vmm);
    }
    let pids = [row.vm_pid, row.shim_pid, row.fs_pid];
    row.pss_bytes = pids.into_iter().flatten().map(pss).sum();
    row
}

/// What /proc/pid/stat tells of a process.
#[derive(Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    name: String,
    parent: i32,
    /// Clock ticks since the host's boot.
    started: u64,
}

impl Process {
    fn all() -> Vec<Self> {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        entries
            .filter(|entry| {
                entry
                    .file_name()
                    .as_encoded_bytes()
                    .first()
                    .is_some_and(u8::is_ascii_digit)
            })
            .filter_map(|entry| {
                Self::parse(&std::fs::read_to_string(entry.path().join("stat")).ok()?)
            })
            .collect()
    }

    /// proc(5), /proc/pid/stat: the name is in parentheses and may hold anything; then field 3 is
    /// the state, 4 the parent, 22 the start.
    fn parse(stat: &str) -> Option<Self> {
        let (head, rest) = stat.rsplit_once(") ")?;
        let (pid, name) = head.split_once(" (")?;
        let field = |number: usize| rest.split(' ').nth(number - 3);
        Some(Self {
            pid: pid.parse().ok()?,
            name: name.to_owned(),
            parent: field(4)?.parse().ok()?,
            started: field(22)?.parse().ok()?,
        })
    }
}

fn uptime(process: &Process) -> Option<u64> {
    let since_boot = std::fs::read_to_string("/proc/uptime").ok()?;
    let now: f64 = since_boot.split(' ').next()?.parse().ok()?;
    // USER_HZ is 100 on every architecture that Sepal runs on.
    Some((now as u64).saturating_sub(process.started / 100))
}

/// Proportional set size in bytes; none where we may not look (not root) or it is gone.
fn pss(pid: i32) -> Option<u64> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kilobytes * 1024)
}

fn table(rows: &[Row]) -> String {
    let mut lines = vec![
        [
            "POD",
            "STATE",
            "VM PID",
            "VCPUS",
            "MEMORY",
            "PSS",
            "UPTIME",
            "CONTAINERS",
        ]
        .map(String::from)
        .to_vec(),
    ];
    let dash = || "-".to_owned();
    let number = |value: Option<u64>| value.map_or_else(dash, |value| value.to_string());
    let mebibytes =
        |value: Option<u64>| value.map_or_else(dash, |bytes| format!("{} MiB", bytes >> 20));
    for row in rows {
        lines.push(vec![
            row.id.clone(),
            row.state.to_owned(),
            number(row.vm_pid.and_then(|pid| u64::try_from(pid).ok())),
            number(row.vcpus.map(u64::from)),
            mebibytes(row.memory_bytes),
            mebibytes(row.pss_bytes),
            row.uptime_s.map_or_else(dash, duration),
            row.containers.join(","),
        ]);
    }
    let columns = lines[0].len();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let widths: Vec<usize> = (0..columns)
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// The two largest units: `2d3h`, `3h5m`, `5m7s`, `7s`.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_may_hold_anything() {
        let fields: Vec<String> = (5..=52).map(|n| n.to_string()).collect();
        let stat = format!("17 (a) S (b) R 3 {}\n", fields.join(" "));
        let expected = Process {
            pid: 17,
            name: "a) S (b".into(),
            parent: 3,
            started: 22,
        };
        assert_eq!(Process::parse(&stat), Some(expected));
        assert_eq!(Process::parse("17 (a"), None);
    }

    #[test]
    fn our_own_process_is_among_them() {
        let me = i32::try_from(std::process::id()).unwrap();
        let processes = Process::all();
        let found = processes.iter().find(|process| process.pid == me).unwrap();
        assert_eq!(found.parent, nix::unistd::getppid().as_raw());
        assert!(pss(me).unwrap() > 100 << 10);
        assert!(uptime(found).unwrap() < 3600);
    }

    #[test]
    fn durations_show_their_two_largest_units() {
        for (seconds, expected) in [
            (0, "0s"),
            (427, "7m7s"),
            (11_100, "3h5m"),
            (183_600, "2d3h"),
        ] {
            assert_eq!(duration(seconds), expected);
        }
    }

    #[test]
    fn columns_are_aligned_and_unknowns_are_dashes() {
        let row = Row {
            id: "a-long-pod-id".into(),
            state: "running",
            vm_pid: Some(42),
            shim_pid: None,
            fs_pid: None,
            vcpus: Some(2),
            memory_bytes: Some(512 << 20),
            balloon_bytes: Some(0),
            pss_bytes: None,
            uptime_s: Some(61),
            containers: vec!["a".into(), "b".into()],
        };
        let expected = "\
            POD            STATE    VM PID  VCPUS  MEMORY   PSS  UPTIME  CONTAINERS\n\
            a-long-pod-id  running  42      2      512 MiB  -    1m1s    a,b\n";
        assert_eq!(table(&[row]), expected);
    }
}
