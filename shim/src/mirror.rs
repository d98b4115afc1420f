//! Volumes of which the guest has a copy, because programs wait for their changes.
//!
//! The guest's kernel raises events of inotify(7) for what is done in the guest, and FUSE has no way
//! to tell it of more. So the shim watches volumes that are changed in the manner of the kubelet's
//! atomic writer ([`crate::snapshot`]), sends each new version, and the agent repeats the change on a
//! copy in the guest's memory (its `volumes.rs`). A container gets the copy in the place of the volume,
//! which it could only read anyway.
//!
//! A pod without such a volume has no inotify instance. A copy lives as long as the pod's VM, as a
//! pod's volumes do: containers that come later find it. What is watched and read is a mount of the
//! shim's own that is attached nowhere: it stays the directory that it was, whatever the path comes to
//! mean, and keeps nobody from unmounting the volume.

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use nix::sys::stat::fstat;
use sepal_protocol::paths::guest::VOLUMES;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::agent::{self, Agent};
use crate::container::lock;
use crate::snapshot::{self, Snapshot};
use crate::sys::{self, BindOptions};
use crate::users::Users;

/// Most of the guest's memory that one copy may take: this part of it, and no more than so many bytes.
const PART: u64 = 8;
const MOST: u64 = 32 << 20;
/// How long a volume is left alone after a change: one update is many.
const SETTLE: Duration = Duration::from_millis(50);
/// When a copy that could not be brought up to date is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// Why the guest has no copy of a volume, or an old one.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's text is its documentation")]
pub enum Error {
    #[error("volume {}: {cause}", .volume.display())]
    Snapshot {
        volume: PathBuf,
        cause: snapshot::Error,
    },
    #[error("volume {}: cannot watch it: {source}", .volume.display())]
    Watch {
        volume: PathBuf,
        source: std::io::Error,
    },
    #[error("volume {}: {source}", .volume.display())]
    Agent {
        volume: PathBuf,
        source: agent::Error,
    },
}

/// A volume with a copy in the guest.
#[derive(Debug)]
pub struct Mirror {
    /// On the host, as the first container's spec has it.
    volume: PathBuf,
    /// Name of the copy.
    id: String,
    root: OwnedFd,
    /// Device and inode of the root.
    identity: (u64, u64),
    /// Whom the files belong to, where that is not as on the host.
    users: Option<Users>,
    watched: WatchDescriptor,
    most: u64,
    /// The guest's copy is older, or not there yet.
    changed: AtomicBool,
    /// One version at a time.
    turn: tokio::sync::Mutex<()>,
}

impl Mirror {
    /// Where the guest has the copy.
    pub fn in_guest(&self) -> PathBuf {
        Path::new(VOLUMES).join(&self.id)
    }

    /// Brings the guest's copy to what the volume is now, if it is not known to be so.
    async fn update(self: &Arc<Self>, agent: &Agent) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        // What changes from here on is another change.
        if !self.changed.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let sent = self.send(agent).await;
        self.changed.fetch_or(sent.is_err(), Ordering::Relaxed);
        sent
    }

    async fn send(self: &Arc<Self>, agent: &Agent) -> Result<(), Error> {
        let this = self.clone();
        let taken = tokio::task::spawn_blocking(move || this.snapshot()).await;
        let taken = taken.unwrap_or_else(|e| Err(self.unreadable(snapshot::Error::Panic(e))))?;
        for request in taken.requests(&self.id) {
            let written = agent.write_volume(&request).await;
            written.map_err(|source| Error::Agent {
                volume: self.volume.clone(),
                source,
            })?;
        }
        Ok(())
    }

    fn snapshot(&self) -> Result<Snapshot, Error> {
        let taken = Snapshot::take(self.root.as_fd(), self.most);
        let mut taken = taken.map_err(|cause| self.unreadable(cause))?;
        if let Some(users) = &self.users {
            taken.map_owners(users);
        }
        Ok(taken)
    }

    fn unreadable(&self, cause: snapshot::Error) -> Error {
        let volume = self.volume.clone();
        Error::Snapshot { volume, cause }
    }
}

#[derive(Default)]
struct State {
    watch: Option<Arc<Watch>>,
    mirrors: Vec<Arc<Mirror>>,
}

/// The pod's.
pub struct Mirrors {
    /// Most that a copy may take of the guest's memory, in bytes.
    most: u64,
    state: Mutex<State>,
    /// Held while a volume is read for the first time, which may take long.
    taking: Mutex<()>,
    /// Once there is something to watch.
    watching: watch::Sender<Option<Arc<Watch>>>,
}

impl Mirrors {
    /// None yet, for a guest with so many bytes of memory.
    pub fn new(memory: u64) -> Self {
        Self {
            most: (memory / PART).min(MOST),
            state: Mutex::default(),
            taking: Mutex::default(),
            watching: watch::Sender::new(None),
        }
    }

    /// Takes a directory that a container may only read into care, if it is changed as a whole; `users`
    /// are those that its owners are users of. A volume that is not taken is shared as any other: its
    /// changes show, and raise no event. Blocks while the volume is read.
    pub fn take(&self, volume: &Path, users: Option<&Users>) -> Option<Arc<Mirror>> {
        if !snapshot::has_layout(volume) {
            return None;
        }
        let taken = self.try_take(volume, users);
        let told = |e: &Error| {
            tracing::warn!("programs in the guest will not be told of changes: {e}");
        };
        taken.inspect_err(told).ok()
    }

    fn try_take(&self, volume: &Path, users: Option<&Users>) -> Result<Arc<Mirror>, Error> {
        let failed = |source| Error::Watch {
            volume: volume.into(),
            source,
        };
        let root = sys::copy_of(volume, BindOptions::default()).map_err(failed)?;
        let stat = fstat(&root).map_err(|errno| failed(errno.into()))?;
        let identity = (stat.st_dev, stat.st_ino);
        let _turn = lock(&self.taking);
        let (known, watch, count) = {
            let state = lock(&self.state);
            let same = |m: &&Arc<Mirror>| m.identity == identity && m.users.as_ref() == users;
            let known = state.mirrors.iter().find(same).cloned();
            (known, state.watch.clone(), state.mirrors.len())
        };
        if let Some(mirror) = known {
            return Ok(mirror);
        }
        let watch = match watch {
            Some(watch) => watch,
            None => Arc::new(Watch::new().map_err(failed)?),
        };
        // Before it is read: no change is missed.
        let watched = watch.add(&root).map_err(failed)?;
        let mirror = Mirror {
            volume: volume.into(),
            id: (count + 1).to_string(),
            root,
            identity,
            users: users.cloned(),
            watched,
            most: self.most,
            changed: AtomicBool::new(true),
            turn: tokio::sync::Mutex::new(()),
        };
        if let Err(e) = mirror.snapshot() {
            watch.remove(watched);
            return Err(e);
        }
        let mirror = Arc::new(mirror);
        let mut state = lock(&self.state);
        state.mirrors.push(mirror.clone());
        if state.watch.is_none() {
            state.watch = Some(watch.clone());
            self.watching.send_replace(Some(watch));
        }
        Ok(mirror)
    }

    /// Lets go of all volumes: the VM has ended.
    pub fn clear(&self) {
        *lock(&self.state) = State::default();
        self.watching.send_replace(None);
    }

    /// Sees to it that the guest has these volumes as they are now.
    ///
    /// # Errors
    /// A volume cannot be read, or the guest has no room for it.
    pub async fn deliver(&self, mirrors: &[Arc<Mirror>], agent: &Agent) -> Result<(), Error> {
        let watch = lock(&self.state).watch.clone();
        if let Some(watch) = watch {
            self.note(&watch.happened());
        }
        for mirror in mirrors {
            mirror.update(agent).await?;
        }
        Ok(())
    }

    /// Keeps the guest's copies up to date.
    pub async fn follow(&self, agent: &Agent) -> Infallible {
        let mut watching = self.watching.subscribe();
        let watch = match watching.wait_for(Option::is_some).await {
            Ok(watch) => watch.clone(),
            Err(_) => None,
        };
        let Some(watch) = watch else {
            return std::future::pending().await;
        };
        loop {
            let late = !self.changed().is_empty();
            tokio::select! {
                ready = watch.woken.readable() => match ready {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(e) => {
                        tracing::error!("the pod's volumes are no longer watched: {e}");
                        return std::future::pending().await;
                    }
                },
                () = tokio::time::sleep(AGAIN), if late => {}
            }
            tokio::time::sleep(SETTLE).await;
            self.note(&watch.happened());
            for mirror in self.changed() {
                if let Err(e) = mirror.update(agent).await {
                    tracing::warn!("the guest's copy is not up to date: {e}");
                }
            }
        }
    }

    fn changed(&self) -> Vec<Arc<Mirror>> {
        let state = lock(&self.state);
        let changed = |mirror: &&Arc<Mirror>| mirror.changed.load(Ordering::Relaxed);
        state.mirrors.iter().filter(changed).cloned().collect()
    }

    fn note(&self, happened: &Happened) {
        for mirror in &lock(&self.state).mirrors {
            let touched = happened.lost || happened.at.contains(&mirror.watched);
            mirror.changed.fetch_or(touched, Ordering::Relaxed);
        }
    }
}

/// An inotify instance.
struct Watch {
    inotify: Inotify,
    woken: AsyncFd<OwnedFd>,
}

/// What has happened since the last look.
#[derive(Default)]
struct Happened {
    at: Vec<WatchDescriptor>,
    /// The kernel could not keep all of it.
    lost: bool,
}

impl Watch {
    fn new() -> std::io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let fd = inotify.as_fd().try_clone_to_owned()?;
        Ok(Self {
            woken: sys::watch(fd, Interest::READABLE)?,
            inotify,
        })
    }

    /// Watches a directory for what the atomic writer does in it.
    fn add(&self, directory: &OwnedFd) -> std::io::Result<WatchDescriptor> {
        let changes = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_ATTRIB;
        let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let flags = changes | AddWatchFlags::IN_ONLYDIR;
        Ok(self.inotify.add_watch(path.as_str(), flags)?)
    }

    fn remove(&self, watched: WatchDescriptor) {
        let _ = self.inotify.rm_watch(watched);
    }

    fn happened(&self) -> Happened {
        let mut happened = Happened::default();
        loop {
            match self.inotify.read_events() {
                Ok(events) => {
                    for event in events {
                        happened.lost |= event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
                        if !happened.at.contains(&event.wd) {
                            happened.at.push(event.wd);
                        }
                    }
                }
                Err(Errno::EINTR) => {}
                Err(_) => return happened,
            }
        }
    }
}
