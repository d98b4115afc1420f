//! What the shim is told without having asked: kills for want of memory.
//!
//! The kernel marks `memory.events` of a cgroup as modified (cgroup-v2.rst, "Memory Interface
//! Files"); one inotify instance watches those of all containers.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use sepal_protocol::agent::{Event, event};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use crate::cgroup::Cgroup;
use crate::error::{Context, Error, Result};
use crate::sys;

/// Events that wait for the shim. Each container has at most one waiting kind of event that matters,
/// and later ones of a full queue are dropped with a warning.
const MAX_WAITING: usize = 256;

/// Counts a container's OOM kills.
#[derive(Debug)]
pub struct OomWatch {
    container: String,
    cgroup: Arc<Cgroup>,
    seen: Mutex<u64>,
    events: mpsc::Sender<Event>,
}

impl OomWatch {
    /// Reads the count anew and tells the shim when it has grown. True when the kernel has ever
    /// killed a process of the container for want of memory.
    pub fn check(&self) -> bool {
        let count = self.cgroup.oom_kills();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if count > *seen {
            *seen = count;
            let kind = event::Kind::Oom(self.container.clone());
            let event = Event {
                kind: Some(kind),
                ..Default::default()
            };
            if self.events.try_send(event).is_err() {
                tracing::warn!(container = self.container, "an OOM event has been dropped");
            }
        }
        count > 0
    }
}

/// All events of the pod.
#[derive(Debug)]
pub struct Events {
    inotify: Inotify,
    woken: AsyncFd<OwnedFd>,
    watched: Mutex<HashMap<WatchDescriptor, Weak<OomWatch>>>,
    send: mpsc::Sender<Event>,
    receive: tokio::sync::Mutex<mpsc::Receiver<Event>>,
}

impl Events {
    /// Begins with nothing watched.
    ///
    /// # Errors
    /// Those of inotify_init1(2).
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let (send, receive) = mpsc::channel(MAX_WAITING);
        Ok(Self {
            woken: sys::watch(inotify.as_fd().try_clone_to_owned()?, Interest::READABLE)?,
            inotify,
            watched: Mutex::default(),
            send,
            receive: tokio::sync::Mutex::new(receive),
        })
    }

    /// Watches a container's cgroup until the answer is dropped.
    ///
    /// # Errors
    /// Those of inotify_add_watch(2). A kernel without the memory controller has nothing to watch.
    pub fn watch(&self, container: &str, cgroup: &Arc<Cgroup>) -> Result<Arc<OomWatch>> {
        let watch = Arc::new(OomWatch {
            container: container.to_owned(),
            cgroup: Arc::clone(cgroup),
            seen: Mutex::new(0),
            events: self.send.clone(),
        });
        let path = cgroup.path().join("memory.events");
        if path.exists() {
            let descriptor = self
                .inotify
                .add_watch(&path, AddWatchFlags::IN_MODIFY)
                .context(|| format!("cannot watch {path:?}"))?;
            self.lock().insert(descriptor, Arc::downgrade(&watch));
        }
        Ok(watch)
    }

    /// Serves the watches until the end of the agent.
    ///
    /// # Errors
    /// When inotify fails.
    pub async fn run(&self) -> io::Result<()> {
        loop {
            let mut ready = self.woken.readable().await?;
            let read = ready.try_io(|_| Ok(self.inotify.read_events()?));
            let Ok(happened) = read else { continue };
            for event in happened? {
                let watch = self.lock().get(&event.wd).cloned();
                // The kernel drops the watch with the file.
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    self.lock().remove(&event.wd);
                } else if let Some(watch) = watch.and_then(|watch| watch.upgrade()) {
                    watch.check();
                }
            }
        }
    }

    /// The next event.
    ///
    /// # Errors
    /// When another call waits already.
    pub async fn next(&self) -> Result<Event> {
        let mut receive = self
            .receive
            .try_lock()
            .map_err(|_| Error::State("another call waits for events already".into()))?;
        // The channel stays open: its sender lives in here.
        receive.recv().await.ok_or(Error::Finished)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, Weak<OomWatch>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
