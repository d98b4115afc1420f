//! One command with a time limit: what goes in, what comes out, how it ended.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// What feeds a command's standard input.
type Feeder = Box<dyn FnOnce(ChildStdin) + Send>;

/// A command to run.
pub struct Command {
    argv: Vec<OsString>,
    stdin: Option<Feeder>,
    patience: Duration,
    rescue: Option<Box<Command>>,
}

impl Command {
    /// A program and its first arguments.
    pub fn new<A: AsRef<OsStr>>(argv: impl IntoIterator<Item = A>) -> Self {
        let argv = argv
            .into_iter()
            .map(|word| word.as_ref().to_owned())
            .collect();
        Self {
            argv,
            stdin: None,
            patience: Duration::from_secs(120),
            rescue: None,
        }
    }

    /// More arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, more: impl IntoIterator<Item = A>) -> Self {
        self.argv
            .extend(more.into_iter().map(|word| word.as_ref().to_owned()));
        self
    }

    /// One more argument.
    #[must_use]
    pub fn arg(self, word: impl AsRef<OsStr>) -> Self {
        self.args([word])
    }

    /// What it reads; without this, nothing (`/dev/null`).
    #[must_use]
    pub fn stdin(self, bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        // The reader may leave early, which is its right.
        self.feed(move |mut stdin| drop(stdin.write_all(&bytes)))
    }

    /// Feeds it from a thread of its own; end of file comes when `feeder` returns.
    #[must_use]
    pub fn feed(mut self, feeder: impl FnOnce(ChildStdin) + Send + 'static) -> Self {
        self.stdin = Some(Box::new(feeder));
        self
    }

    /// How long it may take in the native bed (120 seconds unless said otherwise).
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// What clears up behind it when it had to be ended.
    #[must_use]
    pub fn rescue(mut self, rescue: Command) -> Self {
        self.rescue = Some(Box::new(rescue));
        self
    }

    /// The words of the command line.
    pub(crate) fn into_argv(self) -> Vec<OsString> {
        self.argv
    }

    fn line(&self) -> String {
        let words: Vec<_> = self
            .argv
            .iter()
            .map(|word| word.to_string_lossy())
            .collect();
        words.join(" ")
    }

    /// Starts it with its output on pipes.
    pub fn spawn(self) -> Running {
        let line = self.line();
        let mut command = std::process::Command::new(&self.argv[0]);
        command
            .args(&self.argv[1..])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // A group of its own, to be ended as a whole when time is up.
        command.process_group(0);
        command.stdin(if self.stdin.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        });
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{line}: {error}"));
        if let (Some(feeder), Some(stdin)) = (self.stdin, child.stdin.take()) {
            std::thread::spawn(move || feeder(stdin));
        }
        let group = Pid::from_child(&child);
        Running {
            line,
            child,
            group,
            begun: Instant::now(),
            patience: self.patience,
            rescue: self.rescue,
            over: false,
        }
    }

    /// Runs it to its end and keeps all it wrote.
    pub fn run(self) -> Outcome {
        let mut running = self.spawn();
        let stdout = collect(running.stdout());
        let stderr = collect(running.stderr());
        let status = running.wait();
        let took = running.begun.elapsed();
        let line = running.line.clone();
        let join = |reader: JoinHandle<Vec<u8>>| reader.join().unwrap_or_default();
        Outcome {
            line,
            status,
            stdout: join(stdout),
            stderr: join(stderr),
            took,
        }
    }
}

fn collect(mut stream: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is still the best account there is.
        drop(stream.read_to_end(&mut bytes));
        bytes
    })
}

/// A command that runs. Dropping it ends it.
pub struct Running {
    line: String,
    child: Child,
    group: Pid,
    begun: Instant,
    patience: Duration,
    rescue: Option<Box<Command>>,
    over: bool,
}

impl Running {
    /// Takes its standard output.
    ///
    /// # Panics
    /// The second time.
    pub fn stdout(&mut self) -> ChildStdout {
        self.child.stdout.take().expect("stdout is taken once")
    }

    /// Takes its standard error.
    ///
    /// # Panics
    /// The second time.
    pub fn stderr(&mut self) -> ChildStderr {
        self.child.stderr.take().expect("stderr is taken once")
    }

    /// How it ended; `None` when it had to be ended because time was up.
    pub fn wait(&mut self) -> Option<ExitStatus> {
        let deadline = self.begun + crate::bed::stretched(self.patience);
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => {
                    self.over = true;
                    return Some(status);
                }
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(4))
                }
                Ok(None) => {
                    self.end();
                    return None;
                }
                Err(error) => panic!("{}: {error}", self.line),
            }
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends it and all it started.
    pub fn end(&mut self) {
        if !self.over {
            self.over = true;
            // It may be over already.
            let _ = kill_process_group(self.group, Signal::KILL);
            drop(self.child.wait());
            if let Some(rescue) = self.rescue.take() {
                rescue.run();
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// How a command ended and what it wrote.
#[derive(Debug, Clone)]
pub struct Outcome {
    line: String,
    status: Option<ExitStatus>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    took: Duration,
}

impl Outcome {
    /// Its exit status, 128 + N when it died by signal N.
    ///
    /// # Panics
    /// When it took too long and had to be ended.
    #[track_caller]
    pub fn code(&self) -> i32 {
        let Some(status) = self.status else {
            panic!("took longer than it may and was ended\n{}", self.report());
        };
        status
            .code()
            .or_else(|| status.signal().map(|signal| 128 + signal))
            .unwrap_or(-1)
    }

    /// Whether it ended by itself with exit status 0.
    pub fn ok(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// Itself, having ended well.
    ///
    /// # Panics
    /// With all that is known, when it did not.
    #[track_caller]
    pub fn success(self) -> Self {
        assert!(self.code() == 0, "failed\n{}", self.report());
        self
    }

    /// Itself, having failed as it should.
    ///
    /// # Panics
    /// When it went well.
    #[track_caller]
    pub fn failure(self) -> Self {
        assert!(self.code() != 0, "should have failed\n{}", self.report());
        self
    }

    /// Itself, having exited with `code`.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert!(
            self.code() == code,
            "should have exited {code}\n{}",
            self.report()
        );
        self
    }

    /// Standard output as text, without the white space around it.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Standard error as text, without the white space around it.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }

    /// Standard output as it came.
    pub fn bytes(&self) -> &[u8] {
        &self.stdout
    }

    /// From start to end.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Everything, for the reader of a failed test.
    pub fn report(&self) -> String {
        let tail = |bytes: &[u8]| {
            let from = bytes.len().saturating_sub(4000);
            String::from_utf8_lossy(&bytes[from..]).into_owned()
        };
        format!(
            "command: {}\nended: {:?} after {:?}\nstdout: {}\nstderr: {}",
            self.line,
            self.status,
            self.took,
            tail(&self.stdout),
            tail(&self.stderr)
        )
    }
}
