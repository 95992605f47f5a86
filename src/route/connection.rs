//! One client's connection, from its acceptance to its line in the access log.

use std::{fmt, time::Instant};

use tracing::info;

use super::{
    listener::Peer,
    queue::Links,
    relay::{Fault, Flow, Pumped, Side},
    service::{Place, ServiceRoute},
    upstream::Lease,
};
use crate::{
    config::ProxyProtocol,
    proxy_protocol::{Ends, Header},
};

/// What a connection waits for. Each has its own deadline, and so its own queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The client's first bytes, for a moment, so that they reach the worker with the connection.
    Fresh,
    /// A worker's answer to the connect.
    Connecting,
    /// A worker to become healthy.
    Held,
    /// A worker to have room for one more.
    Crowded,
    /// Control to notice that none of the workers it calls healthy takes a connection.
    Doubtful,
    /// Bytes, from either side.
    Relaying,
}

impl Stage {
    pub(super) const ALL: [Self; 6] =
        [Self::Fresh, Self::Connecting, Self::Held, Self::Crowded, Self::Doubtful, Self::Relaying];

    /// Whether it has no worker, nor one that is being tried.
    pub(super) fn is_waiting(self) -> bool {
        matches!(self, Self::Held | Self::Crowded | Self::Doubtful)
    }
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Both sides ended their streams.
    Closed,
    ClientReset,
    WorkerReset,
    /// The client left before it had a worker.
    ClientGone,
    Idle,
    /// No worker became healthy, or had room, in time.
    HoldTimeout,
    /// There was none, and none was to come.
    NoWorker,
    /// lbd stopped.
    Stopped,
    /// A fault in lbd.
    Failed,
}

impl End {
    /// Those of a connection that a worker has taken, but [`Self::Closed`].
    pub(super) const OF_TAKEN: [Self; 5] =
        [Self::ClientReset, Self::WorkerReset, Self::Idle, Self::Stopped, Self::Failed];
    /// Those of one that none has taken.
    pub(super) const OF_OTHERS: [Self; 5] =
        [Self::ClientGone, Self::HoldTimeout, Self::NoWorker, Self::Stopped, Self::Failed];

    /// What the access log and the metrics call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::ClientReset => "client-reset",
            Self::WorkerReset => "worker-reset",
            Self::ClientGone => "client-gone",
            Self::Idle => "idle",
            Self::HoldTimeout => "hold-timeout",
            Self::NoWorker => "no-worker",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A connection waited for a worker that didn't take it, so that its client is lbd itself, which has
/// told so much of its own client: these ends, or nothing.
#[derive(Debug)]
pub(super) struct Adopted(pub(super) Option<Ends>);

/// Dropped, it is logged, and both sockets are closed: by a reset, unless it ended well. So nobody
/// ever takes what was cut off for what was complete.
#[derive(Debug)]
pub(super) struct Connection {
    // The sockets come before the lease and the place, so that whoever sees those given back knows
    // that the descriptors are closed.
    pub(super) client: Side,
    pub(super) worker: Option<(Side, Lease)>,
    up: Flow,
    down: Flow,
    sent: u64,
    received: u64,
    peer: Peer,
    pub(super) adopted: Option<Box<Adopted>>,
    begun: Instant,
    pub(super) end: End,
    /// The ids of the upstreams that did not take it.
    pub(super) tried: Vec<u64>,
    /// A worker did not take it, so that another was tried or waited for.
    pub(super) is_retried: bool,
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
    place: Place,
}

impl Connection {
    pub(super) fn new(
        client: Side,
        peer: Peer,
        service: u32,
        generation: u32,
        place: Place,
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
            adopted: None,
            begun: now,
            end: End::Stopped,
            tried: Vec::new(),
            is_retried: false,
            held_since: None,
            service,
            generation,
            stage: None,
            is_runnable: false,
            links: Links::new(now),
            place,
        }
    }

    pub(super) fn peer(&self) -> Peer {
        self.peer
    }

    pub(super) fn begun(&self) -> Instant {
        self.begun
    }

    pub(super) fn service(&self) -> &ServiceRoute {
        self.place.service()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.sent + self.received
    }

    /// Tells the worker whose connection it is, before anything else.
    pub(super) fn introduce(
        &mut self,
        version: ProxyProtocol,
        buffer: &mut [u8],
    ) -> Result<(), End> {
        let header = Header::new(version, self.ends());
        let Some((worker, lease)) = &mut self.worker else { return Ok(()) };
        let before = (self.sent, self.received);
        let (client, received) = (&mut self.client, &mut self.received);
        let led = self.up.lead(header.as_bytes(), client, worker, buffer, received);
        if led == Err(Fault::Writing) {
            self.down.pump_last_words(worker, client, buffer, &mut self.sent);
        }
        lease.count_bytes(self.sent - before.0, self.received - before.1);
        led.map_err(|fault| match fault {
            Fault::Reading => End::ClientReset,
            Fault::Writing => End::WorkerReset,
        })
    }

    /// The ends of the client's own connection, where it has addresses and they are known.
    fn ends(&self) -> Option<Ends> {
        match (&self.adopted, self.peer) {
            (Some(adopted), _) => adopted.0,
            (None, Peer::Unix) => None,
            (None, Peer::Inet(client)) => {
                let server = self.client.socket.local_addr().ok()?.as_socket()?;
                Some(Ends { client, server })
            }
        }
    }

    /// Moves bytes both ways. `Pumped::Done` when both directions have ended.
    pub(super) fn relay(&mut self, buffer: &mut [u8]) -> Result<Pumped, End> {
        let Some((worker, lease)) = &mut self.worker else { return Ok(Pumped::Waits) };
        let before = (self.sent, self.received);
        let (client, sent, received) = (&mut self.client, &mut self.sent, &mut self.received);
        let down = self.down.pump(worker, client, self.up.is_done(), buffer, sent);
        let up = self.up.pump(client, worker, self.down.is_done(), buffer, received);
        if up == Err(Fault::Writing) {
            self.down.pump_last_words(worker, client, buffer, sent);
        }
        lease.count_bytes(self.sent - before.0, self.received - before.1);
        if before.0 == 0 && self.sent > 0 {
            lease.count_answered();
        }
        match (down, up) {
            (Err(Fault::Reading), _) | (_, Err(Fault::Writing)) => Err(End::WorkerReset),
            (Err(Fault::Writing), _) | (_, Err(Fault::Reading)) => Err(End::ClientReset),
            (Ok(Pumped::Done), Ok(Pumped::Done)) => Ok(Pumped::Done),
            (Ok(Pumped::Yields), _) | (_, Ok(Pumped::Yields)) => Ok(Pumped::Yields),
            // The worker's end was passed on, and nobody is left to read what the client may say: a
            // client that does not look at an idle connection would keep it for ever.
            (Ok(Pumped::Done), Ok(Pumped::Waits)) if lease.is_departed() => Ok(Pumped::Done),
            _ => Ok(Pumped::Waits),
        }
    }

    fn log(&self) {
        let service = self.place.service();
        if !service.is_logged() {
            return;
        }
        let lease = self.worker.as_ref().map(|(_, lease)| lease);
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

impl Drop for Connection {
    fn drop(&mut self) {
        if self.end != End::Closed {
            self.client.reset_on_close();
            if let Some((worker, _)) = &self.worker {
                worker.reset_on_close();
            }
        }
        self.log();
    }
}
