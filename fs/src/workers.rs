//! Threads for requests that take long. They come when they are needed and go when they are not:
//! most pods never have one.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use log::warn;
use nix::sched::{CloneFlags, unshare};

/// Jobs that may wait. A guest that keeps to the rules has no more requests under way than a queue has room
/// for; what one has beyond that is done where it is handed over, and so in its own time.
const WAITING: usize = 1024;
/// How long a thread waits for another request before it ends.
const IDLE: Duration = Duration::from_secs(5);

type Job = Box<dyn FnOnce() + Send>;

/// See the module.
pub struct Workers {
    shared: Arc<Shared>,
    most: usize,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl Workers {
    /// At most so many threads; with none, jobs run where they are handed over.
    pub fn new(most: usize) -> Self {
        Self {
            shared: Arc::default(),
            most,
        }
    }

    /// Runs a job on a thread that is idle, or a new one; when all are busy, as soon as one is not.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        if self.most == 0 {
            return job();
        }
        let mut state = self.shared.lock();
        if state.jobs.len() >= WAITING {
            drop(state);
            return job();
        }
        state.jobs.push_back(Box::new(job));
        if state.idle >= state.jobs.len() || state.threads == self.most {
            drop(state);
            self.shared.more.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let shared = self.shared.clone();
        let name = "request".to_owned();
        if let Err(error) = std::thread::Builder::new()
            .name(name)
            .spawn(move || shared.work())
        {
            warn!("cannot start a request thread: {error}");
            let mut state = self.shared.lock();
            state.threads -= 1;
            // The job stays with the other threads, if there are any.
            if state.threads == 0
                && let Some(job) = state.jobs.pop_back()
            {
                drop(state);
                job();
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn work(&self) {
        // virtiofsd changes the working directory and the umask for the time of some requests:
        // they must be this thread's alone.
        if let Err(error) = unshare(CloneFlags::CLONE_FS) {
            warn!("cannot give a request thread its own working directory: {error}");
            std::process::abort();
        }
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.lock();
                continue;
            }
            state.idle += 1;
            let (woken, timeout) = self
                .more
                .wait_timeout(state, IDLE)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            state = woken;
            state.idle -= 1;
            if timeout.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_run_beside_each_other_up_to_the_limit() {
        let workers = Workers::new(2);
        let (started, starts) = mpsc::channel();
        let (_hold, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let mut releases = Vec::new();
        for number in 0..3 {
            let (release, released) = mpsc::channel::<()>();
            releases.push(release);
            let (started, held) = (started.clone(), held.clone());
            workers.run(move || {
                drop(held);
                started.send(number).unwrap();
                let _ = released.recv();
            });
        }
        let first = starts.recv_timeout(IDLE).unwrap();
        let second = starts.recv_timeout(IDLE).unwrap();
        assert_ne!(first, second);
        assert!(
            starts.recv_timeout(Duration::from_millis(50)).is_err(),
            "a third runs already"
        );
        drop(releases.swap_remove(first));
        assert_eq!(starts.recv_timeout(IDLE).unwrap(), 2);
    }

    #[test]
    fn jobs_that_would_be_too_many_to_wait_are_done_at_once() {
        let workers = Workers::new(1);
        let (release, released) = mpsc::channel::<()>();
        let (started, starts) = mpsc::channel();
        workers.run(move || {
            started.send(()).unwrap();
            let _ = released.recv();
        });
        starts.recv_timeout(IDLE).unwrap();
        for _ in 0..WAITING {
            workers.run(|| {});
        }
        let (done, is_done) = mpsc::channel();
        workers.run(move || done.send(std::thread::current().id()).unwrap());
        assert_eq!(is_done.try_recv(), Ok(std::thread::current().id()));
        drop(release);
    }

    #[test]
    fn without_threads_a_job_has_run_when_it_is_handed_over() {
        let workers = Workers::new(0);
        let (done, is_done) = mpsc::channel();
        workers.run(move || done.send(std::thread::current().id()).unwrap());
        assert_eq!(is_done.try_recv(), Ok(std::thread::current().id()));
    }
}
