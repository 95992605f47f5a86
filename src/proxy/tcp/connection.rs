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

/// What a connection waits for. Connections in [`Self::AwaitingWorker`] are in a [wait
/// list](crate::proxy::balance::WaitList); every other stage has a timeout and a deadline list of
/// its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The PROXY header that the client has to send first.
    AwaitingHeader,
    /// The client's first bytes, for a moment, so that they reach the worker together with the
    /// connection.
    AwaitingFirstBytes,
    /// The answer to lbd's connect to a worker.
    Connecting,
    /// Bytes, from either side.
    Relaying,
    /// A reaction from both sides to the end that lbd has made.
    Ending,
    /// A worker that is healthy and has room.
    AwaitingWorker,
}

impl Stage {
    /// The stages that have a deadline list.
    pub(super) const QUEUED: [Self; 5] = [
        Self::AwaitingHeader,
        Self::AwaitingFirstBytes,
        Self::Connecting,
        Self::Relaying,
        Self::Ending,
    ];
}

/// What is known of the client from someone else, where the peer of the socket is not the client.
#[derive(Debug)]
pub(super) enum Said {
    /// lbd itself: its own connection was queued at a worker that did not take it, and was drained.
    /// The ends of the client's connection, if they are known.
    ByLbd(Option<Ends>),
    /// A proxy in front of lbd, by its PROXY header.
    ByProxy(Ends),
}

/// Dropping it writes the log line and closes both sockets. The close is a reset unless the
/// connection ended well, or both sides were told of the end. So no peer ever takes a truncated
/// stream for a complete one.
#[derive(Debug)]
pub(super) struct Connection {
    // The sockets are dropped before the lease and the permit, so that when those have been given
    // back the descriptors are closed.
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
    /// The worker ended first, and had not sent anything.
    is_mute: bool,
    /// Which sides (client, worker) were sent the end by lbd, having taken all bytes that were for
    /// them.
    told: [bool; 2],
    /// Which of the two sides have ended since.
    noticed: [bool; 2],
    /// The ids of the backends that were tried and did not take the connection.
    pub(super) tried: Vec<u64>,
    /// A worker did not take the connection, so another was tried, or it had to wait.
    pub(super) is_retried: bool,
    /// A worker did not answer the connect in time.
    pub(super) met_full_queue: bool,
    /// When it began to wait for a worker; `None` once it has one.
    pub(super) held_since: Option<Instant>,
    pub(super) service: u32,
    /// Distinguishes it from earlier connections with the same key.
    pub(super) generation: u32,
    /// `None` only between two stages.
    pub(super) stage: Option<Stage>,
    /// Whether its thread will continue it without an edge.
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

    /// Records what the proxy in front has said about the client.
    pub(super) fn is_of(&mut self, ends: Ends) {
        self.peer = Peer::Inet(ends.client);
        self.said = Some(Box::new(Said::ByProxy(ends)));
    }

    /// The outcome if the client leaves before anything was done for it.
    pub(super) fn early_end(&self) -> Outcome {
        match self.said.as_deref() {
            // It has waited in a worker's accept queue.
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

    /// Sends the worker the PROXY header that tells it who its client is, before anything else.
    /// `thread` is the calling thread.
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

    /// The two ends of the client's own connection, if it has addresses and they are known.
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

    /// Moves bytes in both directions. Returns `Pumped::Done` when both have ended.
    pub(super) fn relay(&mut self, thread: usize, buffer: &mut [u8]) -> Result<Pumped, Outcome> {
        let Some((worker, lease)) = &mut self.worker else { return Ok(Pumped::Waits) };
        let before = (self.sent, self.received);
        let (client, sent, received) = (&mut self.client, &mut self.sent, &mut self.received);
        let had_ended = self.down.has_ended();
        let down = self.down.pump(worker, client, self.up.is_done(), buffer, sent);
        if self.down.has_ended() && !had_ended {
            // A client that has ended too, or has sent nothing, does not wait for a response.
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
            // The worker's end was passed on, and its process has exited, so no one can read what
            // the client may still send. A client that does not check an idle connection would keep
            // it open for ever.
            (Ok(Pumped::Done), Ok(Pumped::Waits)) if lease.is_exited() => Ok(Pumped::Done),
            _ => Ok(Pumped::Waits),
        }
    }

    /// The outcome when both sides have ended their streams.
    pub(super) fn own_end(&self) -> Outcome {
        if self.is_mute { Outcome::NoAnswer } else { Outcome::Closed }
    }

    /// Sends a FIN to both sides, behind the bytes that are in transit. A side that has not taken
    /// all of its bytes gets no FIN, which would make a truncated stream look complete: it is
    /// reset.
    pub(super) fn say_end(&mut self) {
        let Some((worker, _)) = &self.worker else { return };
        self.told = [!self.down.has_rest(), !self.up.has_rest()];
        for (side, told) in [&self.client, worker].into_iter().zip(self.told) {
            if told {
                side.end();
            }
        }
    }

    /// Whether both sides have reacted to the end and have ended too.
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
