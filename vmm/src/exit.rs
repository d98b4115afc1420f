//! Why the VM ends: any thread may say so, the first word counts, the control loop acts on it.

use std::io;
use std::sync::Mutex;

use sepal_protocol::vm::ExitCause;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The end of a VM, as told to the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Decides the exit status.
    pub cause: ExitCause,
    /// One sentence.
    pub message: String,
}

#[derive(Default)]
struct Verdict {
    end: Option<End>,
    panicked: bool,
}

/// Where threads report the end.
pub struct Exit {
    verdict: Mutex<Verdict>,
    event: EventFd,
}

impl Exit {
    /// # Errors
    /// No descriptor left.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        Ok(Self {
            verdict: Mutex::default(),
            event,
        })
    }

    /// Reports the end. Later reports change nothing.
    pub fn end(&self, cause: ExitCause, message: impl Into<String>) {
        let mut verdict = self.verdict.lock().unwrap_or_else(|e| e.into_inner());
        if verdict.end.is_none() {
            // A panicked guest goes on to reboot or to power off; what matters is the panic.
            let cause = match cause {
                ExitCause::Reboot | ExitCause::PowerOff | ExitCause::GuestCrash
                    if verdict.panicked =>
                {
                    ExitCause::GuestPanic
                }
                other => other,
            };
            verdict.end = Some(End {
                cause,
                message: message.into(),
            });
        }
        self.wake();
    }

    /// The guest's kernel has announced its panic and will now flush its console and reboot.
    pub fn panicked(&self) {
        self.verdict
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .panicked = true;
        self.wake();
    }

    /// What was reported.
    pub fn get(&self) -> Option<End> {
        self.verdict
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .end
            .clone()
    }

    /// Whether the guest's kernel has announced a panic.
    pub fn has_panicked(&self) -> bool {
        self.verdict
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .panicked
    }

    /// Readable when something was reported.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    fn wake(&self) {
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot wake the control loop");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_report_counts() {
        let exit = Exit::new().unwrap();
        exit.end(ExitCause::Reboot, "first");
        exit.end(ExitCause::Internal, "second");
        let end = End {
            cause: ExitCause::Reboot,
            message: "first".into(),
        };
        assert_eq!(exit.get(), Some(end));
        assert_eq!(exit.event().read().unwrap(), 2);
    }

    #[test]
    fn a_reboot_after_a_panic_is_a_panic() {
        let exit = Exit::new().unwrap();
        exit.panicked();
        assert_eq!(exit.get(), None);
        exit.end(ExitCause::Reboot, "reset register");
        assert_eq!(exit.get().unwrap().cause, ExitCause::GuestPanic);
    }

    #[test]
    fn a_failure_of_the_vmm_after_a_panic_stays_one() {
        let exit = Exit::new().unwrap();
        exit.panicked();
        exit.end(ExitCause::Internal, "disk full");
        assert_eq!(exit.get().unwrap().cause, ExitCause::Internal);
    }
}
