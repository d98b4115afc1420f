//! All connections of the device, found by ports or by epoll token, and who is next to speak.

use std::collections::{HashMap, VecDeque};

use super::connection::{Connection, Ports};
use super::packet::Header;

/// Connections at a time, those included that only drain. Each holds one descriptor and at most
/// [`super::connection::BUFFER`] bytes.
pub const MAX_CONNECTIONS: usize = 2048;
/// RST packets for what is no connection that may wait for room in the ring. While it is full no
/// packet of the guest is taken.
pub const MAX_RESETS: usize = 64;
/// First port for streams that the host dials: above what a program in the guest would listen on.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// The connections.
pub struct Table {
    connections: HashMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    /// Tokens of connections that have something for the guest, each once, longest waiting first.
    round: VecDeque<u64>,
    resets: VecDeque<Header>,
    next_token: u64,
    next_port: u32,
}

impl Table {
    /// An empty table that gives tokens from `first_token` on.
    pub fn new(first_token: u64) -> Self {
        Self {
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            round: VecDeque::new(),
            resets: VecDeque::new(),
            next_token: first_token,
            next_port: FIRST_HOST_PORT,
        }
    }

    /// Whether no more connections fit.
    pub fn is_full(&self) -> bool {
        self.connections.len() >= MAX_CONNECTIONS
    }

    /// A token that was never given before.
    pub fn new_token(&mut self) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        token
    }

    /// Ports for a stream to `guest` that no other has.
    pub fn new_ports(&mut self, guest: u32) -> Ports {
        loop {
            let ports = Ports {
                host: self.next_port,
                guest,
            };
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            // There are 2^30 times as many ports as connections.
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }

    /// Adds a connection under a token of [`Table::new_token`].
    pub fn insert(&mut self, token: u64, connection: Connection) {
        self.by_ports.insert(connection.ports, token);
        self.connections.insert(token, connection);
    }

    /// The connection between two ports.
    pub fn find(&self, ports: Ports) -> Option<u64> {
        self.by_ports.get(&ports).copied()
    }

    /// The connection with this token.
    pub fn get(&mut self, token: u64) -> Option<&mut Connection> {
        self.connections.get_mut(&token)
    }

    /// To be called after anything that happened to a connection: lets it speak, frees its ports,
    /// forgets it.
    pub fn settle(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if connection.is_detached() || connection.is_closed() {
            let ports = connection.ports;
            if self.by_ports.get(&ports) == Some(&token) {
                self.by_ports.remove(&ports);
            }
        }
        if connection.is_closed() {
            if connection.queued {
                self.round.retain(|waiting| *waiting != token);
            }
            self.connections.remove(&token);
        } else if connection.has_packet() && !connection.queued {
            connection.queued = true;
            self.round.push_back(token);
        }
    }

    /// The next connection that may speak. The caller settles it afterwards.
    pub fn next_speaker(&mut self) -> Option<u64> {
        while let Some(token) = self.round.pop_front() {
            // It may have been closed since.
            let Some(connection) = self.connections.get_mut(&token) else {
                continue;
            };
            connection.queued = false;
            if connection.has_packet() {
                return Some(token);
            }
        }
        None
    }

    /// Puts a RST for no connection behind those that wait already.
    pub fn push_reset(&mut self, header: Header) {
        debug_assert!(self.resets.len() < MAX_RESETS);
        self.resets.push_back(header);
    }

    /// The RST that waits longest.
    pub fn pop_reset(&mut self) -> Option<Header> {
        self.resets.pop_front()
    }

    /// RSTs that still may be pushed.
    pub fn room_for_resets(&self) -> usize {
        MAX_RESETS.saturating_sub(self.resets.len())
    }

    /// Whether anyone may have a packet for the guest.
    pub fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.round.is_empty()
    }
}
