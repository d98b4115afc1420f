//! A command on a terminal: what a person at a keyboard would see and do.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::Command;

/// A command that runs with a pseudo-terminal as its controlling one.
#[derive(Debug)]
pub struct Terminal {
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
    child: Child,
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl Terminal {
    /// Starts `command` on a terminal of that many columns and rows.
    ///
    /// # Panics
    /// When the system has no pseudo-terminal or the command cannot be started.
    pub fn start(command: Command, columns: u16, rows: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .expect("a pseudo-terminal");
        grantpt(&master).expect("grantpt");
        unlockpt(&master).expect("unlockpt");
        tcsetwinsize(&master, size(columns, rows)).expect("the terminal's size");
        let name = ptsname(&master, Vec::new()).expect("the terminal's name");
        let slave = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().expect("an ASCII name"))
            .expect("the terminal's other end");

        // setsid(1) makes it the controlling terminal, without which no resize is told.
        let handle = || Stdio::from(OwnedFd::from(slave.try_clone().expect("a descriptor")));
        let child = std::process::Command::new("setsid")
            .args(["--ctty", "--"])
            .args(command.into_argv())
            .stdin(handle())
            .stdout(handle())
            .stderr(handle())
            .spawn()
            .expect("setsid");
        drop(slave);

        let keyboard = File::from(master);
        let mut reader = keyboard.try_clone().expect("a descriptor");
        let (send, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO tells that the last user of the other end is gone.
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if send.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            keyboard,
            screen,
            seen: String::new(),
            child,
        }
    }

    /// Types a line.
    ///
    /// # Panics
    /// When nobody is there to read it.
    pub fn line(&mut self, text: &str) {
        self.keys(format!("{text}\n").as_bytes());
    }

    /// Presses keys.
    ///
    /// # Panics
    /// When nobody is there to read them.
    pub fn keys(&mut self, keys: &[u8]) {
        self.keyboard
            .write_all(keys)
            .expect("keys reach the terminal");
    }

    /// Changes the window's size.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        tcsetwinsize(&self.keyboard, size(columns, rows)).expect("the terminal's size");
    }

    /// Waits until `text` is on the screen and forgets everything up to it.
    ///
    /// # Panics
    /// When it does not come; with what was there instead.
    #[track_caller]
    pub fn expect(&mut self, text: &str) {
        let deadline = Instant::now() + crate::bed::stretched(Duration::from_secs(30));
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout) => {
                    panic!(
                        "waited for {text:?} on the terminal; there was {:?}",
                        self.seen
                    )
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!(
                        "the command ended before {text:?} came; there was {:?}",
                        self.seen
                    )
                }
            }
        }
    }

    /// Waits for the command's end and tells its exit status.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        crate::eventually(
            "the command on the terminal ends",
            Duration::from_secs(30),
            || {
                let status = self.child.try_wait().expect("a child");
                status.map(|status| status.code().unwrap_or(-1))
            },
        )
    }

    /// Ends the command the hard way, as when its window is torn away.
    pub fn end(&mut self) {
        // It may have ended by itself.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        drop(self.child.wait());
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.end();
    }
}
