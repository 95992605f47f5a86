//! One worker incarnation, as the data threads see it.

mod direct;

use std::{
    fmt, io,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::{Duration, Instant},
};

use socket2::{Domain, Socket};
use tokio::sync::Notify;

use direct::Direct;
pub use direct::PinnedRoutes;

use super::{
    counters::{WorkerCounters, WorkerTally},
    nanoseconds,
    outcome::{ConnectError, Outcome},
};
use crate::{
    config::ProxyProtocol,
    net::{Endpoint, Reach, direct::PinGuard, is_ephemeral},
};

/// One incarnation of a worker: where it listens, and what passed through it.
///
/// Shared by the supervisor, which retires it, and the data threads, which lease it.
///
/// One with `route = "direct"` has most of its connections without lbd: those are counted by the
/// kernel, and by whoever [samples](Self::sampled) them. What lbd itself hands to it (connections it
/// had to hold, or to rescue) is counted as anywhere.
pub struct Backend {
    id: u64,
    slot: u32,
    port: Option<u16>,
    proxy_protocol: Option<ProxyProtocol>,
    label: Arc<str>,
    endpoint: Endpoint,
    is_ephemeral: bool,
    is_local: bool,
    retired: AtomicBool,
    exited: AtomicBool,
    displaced: AtomicBool,
    /// Until when its accept queue is taken for full, in [`milliseconds`]; 0 where it is
    /// not.
    congested: AtomicU64,
    drained: Arc<Notify>,
    active: AtomicUsize,
    counters: WorkerCounters,
    direct: Option<Direct>,
}

/// How long a worker whose accept queue was full is left alone as long as others are not: who filled it
/// may be others than lbd, so that nothing may tell when it has room.
const CONGESTED: Duration = Duration::from_secs(1);

fn milliseconds() -> u64 {
    nanoseconds(Instant::now()) / 1_000_000
}

/// What passed through a [`Backend`] so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Connections now on the worker, the ones being made included; `None` where that can't be told.
    pub active: Option<usize>,
    /// Connections the worker was given, ever; `None` where nobody counts them.
    pub total: Option<u64>,
    /// Connects that were refused, failed or timed out.
    pub failed: u64,
    /// Bytes handed to clients; `None` where they don't pass through lbd.
    pub sent: Option<u64>,
    /// Bytes handed to the worker; likewise.
    pub received: Option<u64>,
}

impl Backend {
    /// A worker that listens at `endpoint`, and is told who its client is where it is to be. `id` is
    /// its incarnation, unique for the life of the daemon; `label` names it in the access log
    /// (`web/9002`). `drained` is notified whenever the last connection of a *retired* backend
    /// ends; one `Notify` may serve them all.
    #[must_use]
    pub fn new(
        id: u64,
        slot: u32,
        label: Arc<str>,
        endpoint: Endpoint,
        proxy_protocol: Option<ProxyProtocol>,
        drained: Arc<Notify>,
    ) -> Arc<Self> {
        Arc::new(Self::at(id, slot, label, endpoint, proxy_protocol, drained, None))
    }

    /// A worker that the kernel hands connections to, by any of the `routes`, and that lbd reaches by the
    /// first.
    #[must_use]
    pub fn direct(
        id: u64,
        slot: u32,
        label: Arc<str>,
        routes: PinnedRoutes,
        drained: Arc<Notify>,
    ) -> Arc<Self> {
        let endpoint = routes.first.address().into();
        let direct = Some(Direct::new(routes));
        Arc::new(Self::at(id, slot, label, endpoint, None, drained, direct))
    }

    fn at(
        id: u64,
        slot: u32,
        label: Arc<str>,
        endpoint: Endpoint,
        proxy_protocol: Option<ProxyProtocol>,
        drained: Arc<Notify>,
        direct: Option<Direct>,
    ) -> Self {
        let inet = endpoint.inet();
        Self {
            id,
            slot,
            port: inet.map(|address| address.port()),
            proxy_protocol,
            label,
            endpoint,
            is_ephemeral: inet.is_some_and(|address| is_ephemeral(address.port())),
            is_local: inet.is_none_or(|address| address.ip().to_canonical().is_loopback()),
            retired: AtomicBool::new(false),
            exited: AtomicBool::new(false),
            displaced: AtomicBool::new(false),
            congested: AtomicU64::new(0),
            drained,
            active: AtomicUsize::new(0),
            counters: WorkerCounters::default(),
            direct,
        }
    }

    /// The incarnation.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its slot in the service: 0, 1, …
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// The port it listens on; `None` on unix.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// How it is told who its client is.
    #[must_use]
    pub fn proxy_protocol(&self) -> Option<ProxyProtocol> {
        self.proxy_protocol
    }

    /// What the access log calls it.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// A snapshot of the counters, each exact by itself.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let through = |count: u64| self.direct.is_none().then_some(count);
        Traffic {
            active: self.connections(),
            total: self.given(),
            failed: self.counters.refused(),
            sent: through(self.counters.sent()),
            received: through(self.counters.received()),
        }
    }

    /// Connections on the worker, those that it has without lbd included; `None` where that can't be
    /// told.
    #[must_use]
    pub fn connections(&self) -> Option<usize> {
        let active = self.active();
        // One that lbd relays is among those that were sampled.
        let all = |direct: &Direct| direct.connections().map(|sampled| sampled.max(active));
        self.direct.as_ref().map_or(Some(active), all)
    }

    /// Connections that the worker was given, those that lbd did not see included.
    fn given(&self) -> Option<u64> {
        let taken = self.counters.taken();
        let routed = self.direct.as_ref().map_or(Some(0), Direct::routed);
        Some(routed? + taken)
    }

    /// Whether the kernel hands it connections.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Which of the times between two retirements a sample that is begun now is of.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.direct.as_ref().map_or(0, Direct::epoch)
    }

    /// How many connections it has, as was looked up in this epoch; `None` where that can't be told.
    pub fn sampled(&self, epoch: u32, connections: Option<u32>) {
        let Some(direct) = &self.direct else { return };
        direct.sampled(epoch, connections);
        if self.retired.load(SeqCst) && self.is_idle() {
            self.drained.notify_one();
        }
    }

    /// It gets no connection any more, and its socket may be another one's from now on.
    pub fn left(&self) {
        if let Some(direct) = &self.direct {
            direct.left();
        }
    }

    /// Whether it is known to hold no connection.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.active() == 0 && self.direct.as_ref().is_none_or(Direct::is_idle)
    }

    /// All that only grows, each number exact by itself.
    #[must_use]
    pub fn tally(&self) -> WorkerTally {
        let mut tally = self.counters.read();
        tally.total = self.given().unwrap_or_default();
        tally
    }

    /// Connections that lbd relays to the worker now, the ones being made included.
    #[must_use]
    pub fn active(&self) -> usize {
        self.active.load(SeqCst)
    }

    /// Takes no further connection from lbd, and tells whether it has none. Once a retired backend
    /// has none, it gets none, whatever snapshot a data thread still looks at. That one which is
    /// direct has none is known after the next sample; it must have no turns any more.
    pub fn retire(&self) -> bool {
        self.retired.store(true, SeqCst);
        if let Some(direct) = &self.direct {
            direct.retire();
        }
        self.is_idle()
    }

    /// Undoes [`retire`](Self::retire).
    pub fn reinstate(&self) {
        self.retired.store(false, SeqCst);
    }

    /// Says whether connections to its port reach another worker, which expects another header.
    ///
    /// To be said before they do: whoever has connected looks before it sends anything, and assigns
    /// its client anew.
    pub fn displace(&self, displaced: bool) {
        self.displaced.store(displaced, SeqCst);
    }

    pub(crate) fn is_displaced(&self) -> bool {
        self.displaced.load(SeqCst)
    }

    /// Whether its process is gone, so that nobody reads any more what clients send to it.
    pub(crate) fn is_exited(&self) -> bool {
        self.exited.load(SeqCst)
    }

    pub(crate) fn exits(&self) {
        self.exited.store(true, SeqCst);
    }

    /// Whether a connect found its accept queue full a moment ago, and nothing since says that it has
    /// room.
    pub(crate) fn is_congested(&self) -> bool {
        match self.congested.load(Relaxed) {
            0 => false,
            until => milliseconds() < until,
        }
    }

    pub(crate) fn set_congested(&self, congested: bool) {
        let until = if congested { milliseconds() + CONGESTED.as_millis() as u64 } else { 0 };
        // The plain load keeps the cache line shared where nothing changes.
        if self.congested.load(Relaxed) != until {
            self.congested.store(until, Relaxed);
        }
    }

    /// A connection's claim, of which there are never more than `most`.
    pub(crate) fn acquire(self: &Arc<Self>, most: Option<NonZeroU32>) -> Result<Lease, LeaseError> {
        // Count first, look second; `retire` marks first, counts second. In the one order of all
        // four, either the mark is seen here or the count is seen there.
        match most {
            None => _ = self.active.fetch_add(1, SeqCst),
            Some(most) => {
                let room = |active| (active < most.get() as usize).then_some(active + 1);
                self.active.fetch_update(SeqCst, SeqCst, room).map_err(|_| LeaseError::Full)?;
            }
        }
        let lease = Lease { backend: Arc::clone(self), pin: None, has_taken: false };
        if self.retired.load(SeqCst) { Err(LeaseError::Retired) } else { Ok(lease) }
    }

    /// A non-blocking socket to connect to [`Self::endpoint`] with, and what has to be there until it
    /// is connected.
    pub(crate) fn socket(&self) -> io::Result<(Socket, Option<Box<PinGuard>>)> {
        match &self.direct {
            Some(direct) => direct.open().map(|(socket, pass)| (socket, Some(Box::new(pass)))),
            None => Ok((self.endpoint.unconnected()?, None)),
        }
    }

    /// Where it is reached.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Whether the system may give its port to an outgoing connection.
    pub(crate) fn is_ephemeral(&self) -> bool {
        self.is_ephemeral
    }

    /// Whether it is reached without a network: by the loopback interface, or on unix.
    pub(crate) fn is_local(&self) -> bool {
        self.is_local
    }

    /// Where it is, for a connection to it.
    pub(crate) fn reach(&self) -> Reach {
        match self.domain() {
            Domain::UNIX => Reach::Unix,
            _ if self.is_local => Reach::Loopback,
            _ => Reach::Network,
        }
    }

    pub(crate) fn domain(&self) -> Domain {
        self.endpoint.address().domain()
    }

    pub(crate) fn count_taken(&self, thread: usize, connect: Duration) {
        self.counters.count_connect(thread, connect);
    }

    pub(crate) fn count_refusal(&self, refusal: ConnectError) {
        self.counters.count_refusal(refusal);
    }

    pub(crate) fn count_end(&self, thread: usize, end: Outcome, lasted: Duration) {
        self.counters.count_end(thread, end, lasted);
    }

    /// How many connections it has begun to answer: sent a first byte.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.counters.answered()
    }

    pub(crate) fn count_answered(&self, thread: usize) {
        self.counters.count_answered(thread);
    }

    pub(crate) fn count_bytes(&self, thread: usize, sent: u64, received: u64) {
        self.counters.count_bytes(thread, sent, received);
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream").field("id", &self.id).field("label", &self.label).finish()
    }
}

/// Why a worker is not to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeaseError {
    /// It has as many connections as it may.
    Full,
    Retired,
}

/// One connection's claim on a [`Backend`], given back when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    backend: Arc<Backend>,
    /// While it is being connected.
    pub(crate) pin: Option<Box<PinGuard>>,
    /// The worker has taken the connection, so that with its end there is likely to be room in the
    /// worker's queue.
    pub(crate) has_taken: bool,
}

impl std::ops::Deref for Lease {
    type Target = Backend;

    fn deref(&self) -> &Backend {
        &self.backend
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let backend = &self.backend;
        if self.has_taken {
            backend.set_congested(false);
        }
        if backend.active.fetch_sub(1, SeqCst) == 1 && backend.retired.load(SeqCst) {
            backend.drained.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Barrier, thread};

    use super::*;

    fn backend(drained: &Arc<Notify>) -> Arc<Backend> {
        let address = SocketAddr::from(([127, 0, 0, 1], 9002));
        Backend::new(7, 0, "web/9002".into(), address.into(), None, Arc::clone(drained))
    }

    #[test]
    fn a_retired_upstream_is_not_leased_until_reinstated() {
        let backend = backend(&Arc::default());
        let lease = backend.acquire(None).unwrap();
        assert!(!backend.retire());
        assert_eq!(backend.acquire(None).unwrap_err(), LeaseError::Retired);
        assert_eq!(backend.active(), 1);
        backend.reinstate();
        let second = backend.acquire(None).unwrap();
        drop((lease, second));
        assert_eq!(backend.active(), 0);
    }

    #[test]
    fn no_more_leases_than_there_may_be() {
        let backend = backend(&Arc::default());
        let most = NonZeroU32::new(3);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        let lease = backend.acquire(most);
                        assert!(backend.active() <= 3);
                        drop(lease);
                    }
                });
            }
        });
        let _two = (backend.acquire(most), backend.acquire(most));
        let third = backend.acquire(most);
        assert_eq!(backend.acquire(most).unwrap_err(), LeaseError::Full);
        drop(third);
        assert!(backend.acquire(most).is_ok());
    }

    #[tokio::test]
    async fn the_last_lease_of_a_retired_upstream_notifies() {
        let drained = Arc::new(Notify::new());
        let backend = backend(&drained);
        let lease = backend.acquire(None).unwrap();
        backend.retire();
        drop(lease);
        drained.notified().await;
    }

    #[test]
    fn a_retired_upstream_seen_empty_stays_empty() {
        for _ in 0..2_000 {
            let backend = backend(&Arc::default());
            let start = Barrier::new(2);
            thread::scope(|scope| {
                let leased = scope.spawn(|| {
                    start.wait();
                    backend.acquire(None)
                });
                start.wait();
                let seen = backend.retire();
                let leased = leased.join().unwrap();
                assert!(!seen || leased.is_err(), "leased after it was seen retired and empty");
            });
        }
    }
}
