//! A container of the runtime under test that is gone when the test is over.

use std::ffi::OsStr;

use crate::{Bed, Command, Outcome};

/// Who made a container, and so who runs commands in it and removes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// containerd's own client.
    Ctr,
    /// The Docker-like one.
    Nerdctl,
}

/// A container that may run; removed on drop, whatever became of it.
#[derive(Debug)]
pub struct Container<'bed> {
    bed: &'bed Bed,
    client: Client,
    id: String,
}

impl Bed {
    /// Runs a busybox command in a fresh container by `ctr run --rm` and waits for it.
    pub fn busybox_run<A: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = A>) -> Outcome {
        self.ctr_run(&[], &self.busybox(), argv).run()
    }

    /// `ctr run --rm OPTIONS IMAGE ID ARGV`, to be run.
    pub fn ctr_run<A: AsRef<OsStr>>(
        &self,
        options: &[&str],
        image: &str,
        argv: impl IntoIterator<Item = A>,
    ) -> Command {
        let id = self.unique("run");
        self.command(["ctr", "run", "--rm", "--runtime", self.runtime()])
            .args(options)
            .args([image, &id])
            .args(argv)
            .rescue(self.removal(Client::Ctr, &id))
    }

    /// A container by `ctr run --detach`.
    #[track_caller]
    pub fn ctr_start(&self, options: &[&str], image: &str, argv: &[&str]) -> Container<'_> {
        let container = self.named(Client::Ctr, "ctr");
        self.command(["ctr", "run", "--detach", "--runtime", self.runtime()])
            .args(options)
            .args([image, container.id()])
            .args(argv)
            .run()
            .success();
        container
    }

    /// `nerdctl run --rm OPTIONS IMAGE ARGV` with this runtime, to be run. Without a network
    /// unless the options name one: most tests need none and start the sooner.
    pub fn nerdctl_run(&self, options: &[&str], image: &str, argv: &[&str]) -> Command {
        let name = self.unique("run");
        self.command([
            "nerdctl",
            "run",
            "--rm",
            "--runtime",
            self.runtime(),
            "--name",
            &name,
        ])
        .rescue(self.removal(Client::Nerdctl, &name))
        .args(quiet_network(options))
        .args(options)
        .arg(image)
        .args(argv)
    }

    /// A container by `nerdctl run --detach`.
    #[track_caller]
    pub fn nerdctl_start(&self, options: &[&str], image: &str, argv: &[&str]) -> Container<'_> {
        let container = self.named(Client::Nerdctl, "nerd");
        self.command(["nerdctl", "run", "--detach", "--runtime", self.runtime()])
            .args(["--name", container.id()])
            .args(quiet_network(options))
            .args(options)
            .arg(image)
            .args(argv)
            .run()
            .success();
        container
    }

    fn removal(&self, client: Client, id: &str) -> Command {
        let line = match client {
            Client::Nerdctl => "nerdctl rm -f \"$1\"",
            Client::Ctr => {
                "ctr task kill --all -s KILL \"$1\"; \
                 for n in 1 2 3 4 5 6 7 8 9 10; do \
                   ctr task rm -f \"$1\" && break; ctr task ls | grep -q \"^$1 \" || break; sleep 0.3; \
                 done; \
                 ctr container rm \"$1\""
            }
        };
        self.command(["sh", "-c", line, "remove", id])
    }

    /// A guard over a container that is made otherwise, under the id it is given here.
    pub fn named(&self, client: Client, prefix: &str) -> Container<'_> {
        Container {
            bed: self,
            client,
            id: self.unique(prefix),
        }
    }

    /// A guard over a container of this very id.
    pub fn adopt(&self, client: Client, id: &str) -> Container<'_> {
        Container {
            bed: self,
            client,
            id: id.to_owned(),
        }
    }
}

fn quiet_network(options: &[&str]) -> &'static [&'static str] {
    let asks = ["--net", "--network", "-p", "--publish"];
    let networked = options.iter().any(|option| {
        asks.iter()
            .any(|ask| option.split('=').next() == Some(*ask))
    });
    if networked {
        &[]
    } else {
        &["--network", "none"]
    }
}

impl Container<'_> {
    /// Its id, which for nerdctl is its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its full id as containerd has it.
    pub fn full_id(&self) -> String {
        match self.client {
            Client::Ctr => self.id.clone(),
            Client::Nerdctl => self.inspect("{{.ID}}"),
        }
    }

    /// Runs a command in it.
    pub fn exec<A: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = A>) -> Outcome {
        self.exec_command(&[], argv).run()
    }

    /// A command in it, to be run.
    pub fn exec_command<A: AsRef<OsStr>>(
        &self,
        options: &[&str],
        argv: impl IntoIterator<Item = A>,
    ) -> Command {
        match self.client {
            Client::Ctr => self
                .bed
                .command(["ctr", "task", "exec", "--exec-id", &self.bed.unique("exec")])
                .args(options)
                .arg(&self.id)
                .args(argv),
            Client::Nerdctl => self
                .bed
                .command(["nerdctl", "exec"])
                .args(options)
                .arg(&self.id)
                .args(argv),
        }
    }

    /// A line of shell in it.
    pub fn sh(&self, line: &str) -> Outcome {
        self.exec(["sh", "-c", line])
    }

    /// `ctr task VERB OPTIONS ID`.
    pub fn task(&self, verb: &str, options: &[&str]) -> Outcome {
        let id = self.full_id();
        self.bed
            .command(["ctr", "task", verb])
            .args(options)
            .arg(id)
            .run()
    }

    /// The words of its line in containerd's list of tasks: its id, a pid, a status.
    fn listed(&self) -> Option<Vec<String>> {
        let id = self.full_id();
        let list = self.bed.command(["ctr", "task", "list"]).run().success();
        let list = list.out();
        let mut tasks = list.lines().map(|line| line.split_whitespace());
        let task = tasks.find(|words| words.clone().next() == Some(&id));
        task.map(|words| words.map(String::from).collect())
    }

    /// containerd's word for what its task does (`RUNNING`, `STOPPED`, …); `None` without a task.
    pub fn status(&self) -> Option<String> {
        self.listed()?.pop()
    }

    /// The pid on the host that containerd knows its task by.
    ///
    /// # Panics
    /// When it has no task.
    #[track_caller]
    pub fn task_pid(&self) -> u32 {
        let task = self
            .listed()
            .unwrap_or_else(|| panic!("no task of {}", self.id));
        let pid = task.get(1).and_then(|pid| pid.parse().ok());
        pid.unwrap_or_else(|| panic!("no pid in {task:?}"))
    }

    /// A field of `nerdctl inspect`.
    #[track_caller]
    pub fn inspect(&self, format: &str) -> String {
        let command = ["nerdctl", "inspect", "--format", format, &self.id];
        self.bed.command(command).run().success().out()
    }

    /// Its IPv4 address on nerdctl's network.
    #[track_caller]
    pub fn address(&self) -> String {
        self.inspect("{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
    }

    /// All it wrote so far (nerdctl).
    pub fn logs(&self) -> Outcome {
        self.bed.command(["nerdctl", "logs", &self.id]).run()
    }

    /// Waits for the end of a container that was started detached, and tells its exit status.
    #[track_caller]
    pub fn wait(&self) -> i32 {
        match self.client {
            Client::Nerdctl => {
                let said = self
                    .bed
                    .command(["nerdctl", "wait", &self.id])
                    .run()
                    .success()
                    .out();
                said.parse()
                    .unwrap_or_else(|_| panic!("nerdctl wait said {said:?}"))
            }
            Client::Ctr => {
                crate::eventually("the task stops", crate::seconds(30), || {
                    (self.status().as_deref() == Some("STOPPED")).then_some(())
                });
                // `ctr task rm` exits 0 and tells a status other than 0 on stderr.
                let told = self.task("rm", &[]);
                exit_status_in(&told.err()).unwrap_or_else(|| told.code())
            }
        }
    }

    /// Removes it by force.
    pub fn remove(&self) {
        self.bed.removal(self.client, &self.id).run();
    }
}

/// The number in `… exit with non-zero exit code 137`.
fn exit_status_in(text: &str) -> Option<i32> {
    let (_, tail) = text.split_once("exit code ")?;
    tail.chars()
        .take_while(char::is_ascii_digit)
        .collect::<String>()
        .parse()
        .ok()
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let state = self
                .bed
                .sh("ctr task ls; ctr container ls; ps -ef | tail -n 40")
                .run();
            eprintln!("the bed when the test failed:\n{}", state.out());
        }
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctr_tells_the_exit_status_in_words() {
        let said = r#"level=warning msg="task s1 exit with non-zero exit code 137""#;
        assert_eq!(exit_status_in(said), Some(137));
        assert_eq!(exit_status_in(""), None);
    }

    #[test]
    fn a_network_asked_for_is_not_overruled() {
        assert!(quiet_network(&["--network=bridge"]).is_empty());
        assert!(quiet_network(&["-p", "80:80"]).is_empty());
        assert!(!quiet_network(&["--name", "x"]).is_empty());
    }
}
