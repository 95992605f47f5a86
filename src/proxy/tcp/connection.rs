//! One client's connection, from its acceptance to its line in the access log.

use std::time::Instant;

use tracing::{debug, info};

use super::relay::{Fault, Flow, Pumped, Side};
use crate::{
    config::ProxyProtocol,
    net::{
        Peer,
        proxy_protocol::{Ends, Header},
    },
    proxy::{
        balance::{Lease, Outcome, Permit, ServiceHandle},
        thread::deadlines::{Linked, Links},
    },
};

/// What a connection waits for. But for [`Self::AwaitingWorker`], which is a [list](crate::proxy::balance::WaitList), each has its
/// own deadline, and so its own queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The PROXY header that it has to begin with.
    AwaitingHeader,
    /// The client's first bytes, for a moment, so that they reach the worker with the connection.
    AwaitingFirstBytes,
    /// A worker's answer to the connect.
    Connecting,
    /// Bytes, from either side.
    Relaying,
    /// Both sides to take note of the end that lbd has made.
    Ending,
    /// A worker that is healthy and has room.
    AwaitingWorker,
}

impl Stage {
    /// Those that have a queue.
    pub(super) const QUEUED: [Self; 5] = [
        Self::AwaitingHeader,
        Self::AwaitingFirstBytes,
        Self::Connecting,
        Self::Relaying,
        Self::Ending,
    ];
}

/// What somebody else has said of the client: whoever made the connection is not the client.
#[derive(Debug)]
pub(super) enum Said {
    /// lbd itself, whose own connection waited for a worker that didn't take it: these ends, or
    /// nothing.
    ByLbd(Option<Ends>),
    /// A proxy in front.
    ByProxy(Ends),
}

/// Dropped, it is logged, and both sockets are closed: by a reset, unless it ended well, or both sides
/// have been told of the end. So nobody ever takes what was cut off for what was complete.
#[derive(Debug)]
pub(super) struct Connection {
    // The sockets come before the lease and the permit, so that whoever sees those given back knows
    // that the descriptors are closed.
    pub(super) client: Side,
    pub(super) worker: Option<(Side, Lease)>,
    up: Flow,
    down: Flow,
    sent: u64,
    received: u64,
    peer: Peer,
    pub(super) said: Option<Box<Said>>,
    begun: Instant,
    pub(super) end: Outcome,
    /// The worker was the first to end, when it had not said anything yet.
    is_mute: bool,
    /// Which sides have been told that it ends here, and took all that was for them: the client and
    /// the worker.
    told: [bool; 2],
    /// Which of them have ended since.
    noticed: [bool; 2],
    /// The ids of the backends that did not take it.
    pub(super) tried: Vec<u64>,
    /// A worker did not take it, so that another was tried or waited for.
    pub(super) is_retried: bool,
    /// A worker did not answer the connect in time.
    pub(super) met_full_queue: bool,
    /// Since when it has waited for a worker; `None` once it has one.
    pub(super) held_since: Option<Instant>,
    pub(super) service: u32,
    /// Tells it from the connections that had its key before.
    pub(super) generation: u32,
    /// `None` only while it is between two stages.
    pub(super) stage: Option<Stage>,
    /// Whether its thread goes on with it without an edge.
    pub(super) is_runnable: bool,
    pub(super) links: Links,
    permit: Permit,
}

impl Connection {
    pub(super) fn new(
        client: Side,
        peer: Peer,
        service: u32,
        generation: u32,
        permit: Permit,
        now: Instant,
    ) -> Self {
        Self {
            client,
            worker: None,
            up: Flow::default(),
            down: Flow::default(),
            sent: 0,
            received: 0,
            peer,
            said: None,
            begun: now,
            end: Outcome::Stopped,
            is_mute: false,
            told: [false; 2],
            noticed: [false; 2],
            tried: Vec::new(),
            is_retried: false,
            met_full_queue: false,
            held_since: None,
            service,
            generation,
            stage: None,
            is_runnable: false,
            links: Links::new(now),
            permit,
        }
    }

    pub(super) fn peer(&self) -> Peer {
        self.peer
    }

    /// Takes note of what the proxy in front has said.
    pub(super) fn is_of(&mut self, ends: Ends) {
        self.peer = Peer::Inet(ends.client);
        self.said = Some(Box::new(Said::ByProxy(ends)));
    }

    /// How it ended, the client having left before anything was done for it.
    pub(super) fn early_end(&self) -> Outcome {
        match self.said.as_deref() {
            // It has waited at a worker.
            Some(Said::ByLbd(_)) => Outcome::ClientGone,
            Some(Said::ByProxy(_)) | None => Outcome::NothingSaid,
        }
    }

    pub(super) fn begun(&self) -> Instant {
        self.begun
    }

    pub(super) fn service(&self) -> &ServiceHandle {
        self.permit.service()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.sent + self.received
    }

    /// Tells the worker whose connection it is, before anything else. `thread` is the one that does.
    pub(super) fn introduce(
        &mut self,
        version: ProxyProtocol,
        thread: usize,
        buffer: &mut [u8],
    ) -> Result<(), Outcome> {
        let header = Header::new(version, self.ends());
        let Some((worker, lease)) = &mut self.worker else { return Ok(()) };
        let before = (self.sent, self.received);
        let (client, received) = (&mut self.client, &mut self.received);
        let led = self.up.lead(header.as_bytes(), client, worker, buffer, received);
        if led == Err(Fault::Writing) {
            self.down.pump_last_words(worker, client, buffer, &mut self.sent);
        }
        lease.count_bytes(thread, self.sent - before.0, self.received - before.1);
        led.map_err(|fault| match fault {
            Fault::Reading => Outcome::ClientReset,
            Fault::Writing => Outcome::WorkerReset,
        })
    }

    /// The ends of the client's own connection, where it has addresses and they are known.
    fn ends(&self) -> Option<Ends> {
        match (self.said.as_deref(), self.peer) {
            (Some(Said::ByLbd(ends)), _) => *ends,
            (Some(Said::ByProxy(ends)), _) => Some(*ends),
            (None, Peer::Unix) => None,
            (None, Peer::Inet(client)) => {
                let server = self.client.socket.local_addr().ok()?.as_socket()?;
                Some(Ends { client, server })
            }
        }
    }

    /// Moves bytes both ways. `Pumped::Done` when both directions have ended.
    pub(super) fn relay(&mut self, thread: usize, buffer: &mut [u8]) -> Result<Pumped, Outcome> {
        let Some((worker, lease)) = &mut self.worker else { return Ok(Pumped::Waits) };
        let before = (self.sent, self.received);
        let (client, sent, received) = (&mut self.client, &mut self.sent, &mut self.received);
        let had_ended = self.down.has_ended();
        let down = self.down.pump(worker, client, self.up.is_done(), buffer, sent);
        if self.down.has_ended() && !had_ended {
            // A client that has ended too, or sent nothing, waits for no answer.
            self.is_mute = *sent == 0
                && *received > 0
                && !self.down.has_rest()
                && !self.up.has_ended()
                && !client.is_closed();
        }
        let up = self.up.pump(client, worker, self.down.is_done(), buffer, received);
        if up == Err(Fault::Writing) {
            self.down.pump_last_words(worker, client, buffer, sent);
        }
        lease.count_bytes(thread, self.sent - before.0, self.received - before.1);
        if before.0 == 0 && self.sent > 0 {
            lease.count_answered(thread);
        }
        match (down, up) {
            (Err(Fault::Reading), _) | (_, Err(Fault::Writing)) => Err(Outcome::WorkerReset),
            (Err(Fault::Writing), _) | (_, Err(Fault::Reading)) => Err(Outcome::ClientReset),
            (Ok(Pumped::Done), Ok(Pumped::Done)) => Ok(Pumped::Done),
            (Ok(Pumped::Yields), _) | (_, Ok(Pumped::Yields)) => Ok(Pumped::Yields),
            // The worker's end was passed on, and nobody is left to read what the client may say: a
            // client that does not look at an idle connection would keep it for ever.
            (Ok(Pumped::Done), Ok(Pumped::Waits)) if lease.is_exited() => Ok(Pumped::Done),
            _ => Ok(Pumped::Waits),
        }
    }

    /// How it ended, both sides having ended their streams.
    pub(super) fn own_end(&self) -> Outcome {
        if self.is_mute { Outcome::NoAnswer } else { Outcome::Closed }
    }

    /// Makes an end of it on both sides, behind what is on its way to them. What one of them has not
    /// taken it will not take any more: an end behind it would be none, and it is cut off.
    pub(super) fn say_end(&mut self) {
        let Some((worker, _)) = &self.worker else { return };
        self.told = [!self.down.has_rest(), !self.up.has_rest()];
        for (side, told) in [&self.client, worker].into_iter().zip(self.told) {
            if told {
                side.end();
            }
        }
    }

    /// Whether both sides have noticed, and have ended as well.
    pub(super) fn has_noticed(&mut self, buffer: &mut [u8]) -> bool {
        let client = self.client.drain(buffer);
        let worker = self.worker.as_mut().is_none_or(|(worker, _)| worker.drain(buffer));
        self.noticed = [self.noticed[0] || client, self.noticed[1] || worker];
        self.noticed == [true; 2]
    }

    fn log(&self) {
        let service = self.permit.service();
        if !service.is_logged() {
            return;
        }
        let lease = self.worker.as_ref().map(|(_, lease)| lease);
        if self.end == Outcome::NothingSaid {
            let service = service.name();
            debug!(target: "access", service, client = %self.peer, end = %self.end, "connection");
            return;
        }
        info!(
            target: "access",
            service = service.name(),
            slot = lease.map(|lease| lease.slot()),
            port = lease.and_then(|lease| lease.port()),
            client = %self.peer,
            worker = lease.map_or("-", |lease| lease.label()),
            sent = self.sent,
            received = self.received,
            duration = self.begun.elapsed().as_micros() as f64 / 1e6,
            end = %self.end,
            "connection"
        );
    }
}

impl Linked for Connection {
    fn links(&self) -> &Links {
        &self.links
    }

    fn links_mut(&mut self) -> &mut Links {
        &mut self.links
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.end.is_orderly() {
            let [client, worker] = self.told;
            if !client {
                self.client.reset_on_close();
            }
            if let Some((side, _)) = self.worker.as_ref().filter(|_| !worker) {
                side.reset_on_close();
            }
        }
        self.log();
    }
}
