//! The control loop: the main thread once the VM runs.
//!
//! It waits for requests of the shim (the inherited socket) and of further clients, and for the
//! guest's end. Each client's requests are answered in their order; one that unplugs a device is
//! answered when the guest has let go of it, and that client waits so long. When the inherited
//! socket closes the VM ends: no VM outlives its shim.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket,
};
use sepal_protocol::control::{self, Request, Response, VmState};
use sepal_protocol::vm::{ExitCause, FdIndex};

use crate::exit::{End, Exit};
use crate::sys::event_fd;
use crate::vm::{Descriptors, Vm};

/// How long the guest may take to let go of a device.
const EJECT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a panicked guest may take to flush its console and reboot.
const PANIC_PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of console lines in an answer, well below the longest message.
const TAIL_BYTES: usize = 32 * 1024;
/// Clients beside the shim; a further one waits until another has gone.
const MAX_CLIENTS: usize = 16;

struct Client {
    socket: OwnedFd,
    /// The device whose removal it waits for, and until when.
    waits_for: Option<(String, Instant)>,
}

/// The control loop.
pub struct Control {
    vm: Vm,
    exit: Arc<Exit>,
    /// The first is the inherited one, if there is one.
    clients: Vec<Client>,
    has_owner: bool,
    listener: Option<OwnedFd>,
    panic_deadline: Option<Instant>,
}

/// What became readable.
enum Ready {
    Exit,
    Ejected,
    Listener,
    Client(usize),
}

impl Control {
    /// `owner` is the inherited socket; without one the VM runs until the guest ends.
    pub fn new(vm: Vm, exit: Arc<Exit>, owner: Option<OwnedFd>, listener: Option<OwnedFd>) -> Self {
        let has_owner = owner.is_some();
        let clients = owner
            .into_iter()
            .map(|socket| Client {
                socket,
                waits_for: None,
            })
            .collect();
        Self {
            vm,
            exit,
            clients,
            has_owner,
            listener,
            panic_deadline: None,
        }
    }

    /// Serves until the end of the VM, and says what it was.
    pub fn run(mut self) -> End {
        let end = loop {
            if let Some(end) = self.exit.get() {
                break end;
            }
            match self.wait() {
                Ok(ready) => ready.into_iter().rev().for_each(|ready| self.serve(ready)),
                Err(error) => {
                    let message = format!("waiting for requests failed: {error}");
                    self.exit.end(ExitCause::Internal, message);
                }
            }
            self.look_at_deadlines();
        };
        // The guest's last words are still on their way through the console's queue.
        self.vm.stop();
        if end.cause != ExitCause::PowerOff {
            for line in self.vm.log.tail().iter().rev().take(20).rev() {
                sepal_log::say(format_args!("guest: {line}"));
            }
        }
        // The process ends now, and the host's kernel takes everything apart at once; unwiring each
        // doorbell and interrupt would have KVM wait for each.
        std::mem::forget(self.vm);
        end
    }

    fn wait(&self) -> io::Result<Vec<Ready>> {
        let mut what = vec![Ready::Exit, Ready::Ejected];
        let mut fds = vec![
            readable(event_fd(self.exit.event())),
            readable(event_fd(&self.vm.ejected)),
        ];
        if let Some(listener) = self
            .listener
            .as_ref()
            .filter(|_| self.clients.len() <= MAX_CLIENTS)
        {
            what.push(Ready::Listener);
            fds.push(readable(listener.as_fd()));
        }
        for (index, client) in self.clients.iter().enumerate() {
            // A client that waits is not read: but its going is noticed.
            let flags = match client.waits_for {
                Some(_) => PollFlags::empty(),
                None => PollFlags::POLLIN,
            };
            what.push(Ready::Client(index));
            fds.push(PollFd::new(client.socket.as_fd(), flags));
        }
        match poll(&mut fds, self.timeout()) {
            Err(nix::Error::EINTR) => return Ok(Vec::new()),
            other => other?,
        };
        let happened = fds.iter().map(|fd| fd.any().unwrap_or(true));
        Ok(what
            .into_iter()
            .zip(happened)
            .filter_map(|(what, yes)| yes.then_some(what))
            .collect())
    }

    fn timeout(&self) -> PollTimeout {
        let waits = self
            .clients
            .iter()
            .filter_map(|c| c.waits_for.as_ref().map(|(_, at)| *at));
        let Some(next) = waits.chain(self.panic_deadline).min() else {
            return PollTimeout::NONE;
        };
        let left = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    fn serve(&mut self, ready: Ready) {
        match ready {
            Ready::Exit => {
                // Only wakes us; what it is about is asked of `exit` itself.
                let _ = self.exit.event().read();
            }
            Ready::Ejected => {
                let _ = self.vm.ejected.read();
                for id in self.vm.bus.pci.take_ejected() {
                    tracing::info!(id, "device removed");
                    self.answer_waiting(|waited, _| (waited == id).then_some(Response::Ok));
                }
            }
            Ready::Listener => self.accept(),
            Ready::Client(index) => self.serve_client(index),
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        match accept4(listener.as_raw_fd(), flags) {
            Ok(fd) => {
                // SAFETY: accept4 has just made this descriptor and nobody else knows of it.
                let socket = unsafe { OwnedFd::from_raw_fd(fd) };
                self.clients.push(Client {
                    socket,
                    waits_for: None,
                });
            }
            Err(error) => tracing::warn!(%error, "a client could not connect"),
        }
    }

    fn serve_client(&mut self, index: usize) {
        let owner = self.has_owner && index == 0;
        let Some(client) = self.clients.get(index) else {
            return;
        };
        let (response, gone) = if client.waits_for.is_some() {
            (None, true)
        } else {
            match control::receive::<Request>(&client.socket) {
                Ok((request, fds)) => (self.answer(index, request, fds), false),
                Err(control::Error::Malformed(error)) => {
                    let message = format!("not a request of this version's protocol: {error}");
                    (Some(Response::Error { message }), false)
                }
                Err(control::Error::Closed) => (None, true),
                Err(error) => {
                    tracing::warn!("control client dropped: {error}");
                    (None, true)
                }
            }
        };
        let sent = match (&response, self.clients.get(index)) {
            (Some(response), Some(client)) => control::send(&client.socket, response, &[]).is_ok(),
            _ => true,
        };
        if gone || !sent {
            if owner {
                self.exit
                    .end(ExitCause::PowerOff, "the control socket was closed");
            } else {
                self.clients.remove(index);
            }
        }
    }

    /// The answer, unless it comes later.
    fn answer(&mut self, client: usize, request: Request, fds: Vec<OwnedFd>) -> Option<Response> {
        let mut fds = Descriptors::new(fds);
        let done = match request {
            Request::Boot(_) => Err(anyhow::anyhow!("the VM has been booted already")),
            Request::State => return Some(Response::State(self.state())),
            Request::Pause => {
                self.vm.vcpus.pause();
                Ok(())
            }
            Request::Resume => {
                self.vm.vcpus.resume();
                Ok(())
            }
            Request::AddNet(spec) => self.vm.add_net(&spec, &mut fds),
            Request::AddBlk(spec) => self.vm.add_blk(&spec, &mut fds),
            Request::RemoveDevice { id } => {
                match self.vm.bus.pci.request_eject(&id, &self.vm.bus.platform) {
                    Ok(()) => {
                        let until = Instant::now() + EJECT_PATIENCE;
                        self.clients[client].waits_for = Some((id, until));
                        return None;
                    }
                    Err(error) => Err(error.into()),
                }
            }
            Request::Balloon { size } => self.vm.size.set_balloon(size),
            Request::PlugMemory { size } => self.vm.plug_memory(size, false),
            Request::PlugHugePages { size } => self.vm.plug_memory(size, true),
            Request::AddCpus { count } => self.vm.add_cpus(count),
            Request::EnterRoot => fds
                .take(FdIndex(0), "the root directory")
                .and_then(|directory| crate::jail::enter_root(&directory)),
            Request::PowerButton => {
                self.vm.bus.platform.press_power_button();
                Ok(())
            }
            Request::Quit => {
                self.exit
                    .end(ExitCause::PowerOff, "a client asked for the end");
                Ok(())
            }
        };
        Some(match done {
            Ok(()) => Response::Ok,
            Err(error) => Response::Error {
                message: format!("{error:#}"),
            },
        })
    }

    fn state(&self) -> VmState {
        VmState {
            running: !self.vm.vcpus.paused(),
            // At most 64.
            cpus: self.vm.vcpus.count() as u8,
            memory: self.vm.size.memory,
            plugged: self.vm.size.added.plugged(),
            pluggable: self.vm.size.added.pluggable(),
            huge_plugged: self.vm.size.huge.plugged(),
            huge_pluggable: self.vm.size.huge.pluggable(),
            balloon: self.vm.size.balloon(),
            devices: self.vm.bus.pci.ids(),
            console_tail: last_lines(self.vm.log.tail()),
        }
    }

    /// Answers those waiting clients for which `response` has one.
    fn answer_waiting(&mut self, response: impl Fn(&str, Instant) -> Option<Response>) {
        for client in &mut self.clients {
            let Some((id, until)) = &client.waits_for else {
                continue;
            };
            if let Some(response) = response(id, *until) {
                client.waits_for = None;
                if let Err(error) = control::send(&client.socket, &response, &[]) {
                    tracing::warn!("a client did not take its answer: {error}");
                }
            }
        }
    }

    fn look_at_deadlines(&mut self) {
        let now = Instant::now();
        self.answer_waiting(|id, until| {
            (until <= now).then(|| Response::Error {
                message: format!("the guest did not let go of the device {id:?} in time"),
            })
        });
        if self.exit.has_panicked() {
            let deadline = *self.panic_deadline.get_or_insert(now + PANIC_PATIENCE);
            if deadline <= now {
                self.exit
                    .end(ExitCause::GuestPanic, "the guest's kernel panicked");
            }
        }
    }
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// Listens for further clients at `path`, for its owner only. A socket left there is replaced.
///
/// # Errors
/// The path is not usable.
pub fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listen(&listener, Backlog::new(8)?)?;
    Ok(listener)
}

/// The last lines, as many as fit into an answer.
fn last_lines(mut lines: Vec<String>) -> Vec<String> {
    let mut left = TAIL_BYTES;
    let fits = lines.iter().rev().take_while(|line| {
        // As JSON has it: a guest may write nothing but what has to be escaped.
        let length = serde_json::to_string(line).map_or(left, |text| text.len() + 1);
        let fits = length < left;
        left = left.saturating_sub(length);
        fits
    });
    let first = lines.len() - fits.count();
    lines.split_off(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_fit_into_an_answer_whatever_the_guest_has_written() {
        let few = vec!["one".to_string(), "two".to_string()];
        assert_eq!(last_lines(few.clone()), few);
        for character in ["a", "\"", "\\", "\u{1}", "ä"] {
            let lines = last_lines(vec![character.repeat(1023); 64]);
            assert!(!lines.is_empty());
            let length = serde_json::to_string(&lines).unwrap().len();
            assert!(length <= TAIL_BYTES + 2, "{length} of {character:?}");
        }
    }
}
