//! The thread on which devices start and stop.
//!
//! A device is configured by vCPU threads, but a thread inherits the system call filter of the one
//! that starts it: were workers started by vCPUs, vCPUs could do whatever a worker can. So the
//! transport sends the device here, where it is activated or reset, and waits for it to come back.
//! Jobs are done one after the other.

use std::io;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};

use crate::{jail, seccomp};

type Job = Box<dyn FnOnce() + Send>;

/// The way to the thread. It ends when this is dropped.
pub struct Launcher {
    jobs: Mutex<Sender<Job>>,
}

/// The thread has died; only a panic in a device can do that.
#[derive(Debug, thiserror::Error)]
#[error("the thread that starts devices is gone")]
pub struct Gone;

impl Launcher {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host gives none.
    pub fn start() -> io::Result<Self> {
        let (jobs, received) = channel();
        let (ready, confined) = sync_channel(1);
        std::thread::Builder::new()
            .name("devices".into())
            .spawn(move || {
                let done = jail::confine_thread(seccomp::Thread::Launcher);
                let failed = done.is_err();
                #[cfg(feature = "breach")]
                crate::breach::start_workers();
                // Nobody waits only if start() has been killed with its thread.
                let _ = ready.send(done);
                if !failed {
                    serve(&received);
                }
            })?;
        confined.recv().map_err(io::Error::other)??;
        Ok(Self {
            jobs: Mutex::new(jobs),
        })
    }

    /// Runs `job` there and waits for what it returns.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Gone> {
        let (result, returned) = sync_channel(1);
        self.post(move || {
            let _ = result.send(job());
        })?;
        returned.recv().map_err(|_| Gone)
    }

    /// Has `job` run there, before all that is asked for later.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn post(&self, job: impl FnOnce() + Send + 'static) -> Result<(), Gone> {
        let jobs = self.jobs.lock().unwrap_or_else(|e| e.into_inner());
        jobs.send(Box::new(job)).map_err(|_| Gone)
    }
}

fn serve(jobs: &Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        job();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_runs_on_the_other_thread_and_comes_back() {
        let launcher = Launcher::start().unwrap();
        let name = launcher.call(|| std::thread::current().name().map(str::to_owned));
        assert_eq!(name.unwrap().as_deref(), Some("devices"));
    }

    #[test]
    fn what_was_posted_is_done_before_what_is_called_for() {
        let launcher = Launcher::start().unwrap();
        let (done, posted) = channel();
        launcher
            .post(move || {
                std::thread::sleep(std::time::Duration::from_millis(20));
                let _ = done.send(());
            })
            .unwrap();
        assert!(launcher.call(move || posted.try_recv()).unwrap().is_ok());
    }

    #[test]
    fn a_panic_is_told_instead_of_waiting_for_ever() {
        let launcher = Launcher::start().unwrap();
        assert!(launcher.call(|| panic!("on purpose, by a test")).is_err());
        assert!(launcher.call(|| ()).is_err());
    }
}
