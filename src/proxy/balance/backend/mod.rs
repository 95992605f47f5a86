//! A backend: one worker incarnation, as the data threads see it.

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

/// One incarnation of a worker: its endpoint and its traffic counters.
///
/// The supervisor, which retires it, and the data threads, which lease it, share it.
///
/// With `route = "direct"` most connections reach the worker without passing through lbd. Those are
/// counted by the kernel, and by regular [samples](Self::sampled). Connections that lbd itself
/// passes to such a worker (because it had to hold them, or drained them from a queue) are counted
/// as for any other worker.
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
    /// Until when its accept queue is assumed to be full, in [`milliseconds`]; 0 if it is not.
    congested: AtomicU64,
    drained: Arc<Notify>,
    active: AtomicUsize,
    counters: WorkerCounters,
    direct: Option<Direct>,
}

/// How long a worker whose accept queue was full is avoided while others are available. Clients
/// other than lbd's may have filled the queue, so lbd may never be told that it has room.
const CONGESTED: Duration = Duration::from_secs(1);

fn milliseconds() -> u64 {
    nanoseconds(Instant::now()) / 1_000_000
}

/// The traffic counters of a [`Backend`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Open connections, including those being established; `None` if that is not known.
    pub active: Option<usize>,
    /// Connections that the worker was ever given; `None` if nothing counts them.
    pub total: Option<u64>,
    /// Connects that were refused, failed or timed out.
    pub failed: u64,
    /// Bytes sent to clients; `None` if they don't pass through lbd.
    pub sent: Option<u64>,
    /// Bytes sent to the worker; `None` as for `sent`.
    pub received: Option<u64>,
}

impl Backend {
    /// A worker that listens at `endpoint`, and that gets a PROXY header if `proxy_protocol` says
    /// so. `id` is its incarnation, unique for the life of the daemon; `label` names it in the
    /// access log (`web/9002`). `drained` is notified whenever the last connection of a *retired*
    /// backend ends; one `Notify` may serve all backends.
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

    /// A worker to which the kernel hands connections, on the address of each of the `routes`. lbd
    /// itself connects to it by the first route.
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

    /// The incarnation, unique for the life of the daemon.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The worker's slot in the service: 0, 1, …
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// The port that it listens on; `None` on unix.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// The PROXY protocol version that the worker expects, if any.
    #[must_use]
    pub fn proxy_protocol(&self) -> Option<ProxyProtocol> {
        self.proxy_protocol
    }

    /// The worker's name in the access log.
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

    /// Open connections, including those that do not pass through lbd; `None` if that is not known.
    #[must_use]
    pub fn connections(&self) -> Option<usize> {
        let active = self.active();
        // A sample includes the connections that lbd relays.
        let all = |direct: &Direct| direct.connections().map(|sampled| sampled.max(active));
        self.direct.as_ref().map_or(Some(active), all)
    }

    /// Connections that the worker was given, including those that did not pass through lbd.
    fn given(&self) -> Option<u64> {
        let taken = self.counters.taken();
        let routed = self.direct.as_ref().map_or(Some(0), Direct::routed);
        Some(routed? + taken)
    }

    /// Whether the kernel hands connections to the worker (`route = "direct"`).
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// The current epoch: a sample that begins now belongs to it. Each retirement begins a new
    /// epoch.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.direct.as_ref().map_or(0, Direct::epoch)
    }

    /// Records a sample of the number of open connections, taken in `epoch`; `None` if the number
    /// could not be found out.
    pub fn sampled(&self, epoch: u32, connections: Option<u32>) {
        let Some(direct) = &self.direct else { return };
        direct.sampled(epoch, connections);
        if self.retired.load(SeqCst) && self.is_idle() {
            self.drained.notify_one();
        }
    }

    /// Says that the worker gets no further connections; its socket may belong to another worker
    /// from now on.
    pub fn left(&self) {
        if let Some(direct) = &self.direct {
            direct.left();
        }
    }

    /// Whether the worker is known to have no connection.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.active() == 0 && self.direct.as_ref().is_none_or(Direct::is_idle)
    }

    /// A snapshot of the counters that only grow. Each number is exact by itself.
    #[must_use]
    pub fn tally(&self) -> WorkerTally {
        let mut tally = self.counters.read();
        // Those that the kernel handed to it; where nobody counts these, there is no total.
        let routed = self.direct.as_ref().map_or(Some(0), Direct::routed);
        tally.total = routed.map_or(0, |routed| routed + tally.total);
        tally
    }

    /// Connections that lbd relays to the worker now, including those being established.
    #[must_use]
    pub fn active(&self) -> usize {
        self.active.load(SeqCst)
    }

    /// Retires the backend: it takes no further connection from lbd. Returns whether it has none.
    /// Once a retired backend has no connection it gets none, whichever snapshot a data thread
    /// still uses. A direct backend must have no turns any more; that it has no connections is
    /// known only after the next sample.
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

    /// Says whether connections to the worker's port reach another worker, which expects another
    /// PROXY header.
    ///
    /// To be called before that happens: a data thread that has just connected checks this before
    /// it sends anything, and assigns its client anew.
    pub fn displace(&self, displaced: bool) {
        self.displaced.store(displaced, SeqCst);
    }

    pub(crate) fn is_displaced(&self) -> bool {
        self.displaced.load(SeqCst)
    }

    /// Whether the worker's process has exited, so that no one reads what clients still send.
    pub(crate) fn is_exited(&self) -> bool {
        self.exited.load(SeqCst)
    }

    pub(crate) fn exits(&self) {
        self.exited.store(true, SeqCst);
    }

    /// Whether a connect recently found the accept queue full, and nothing since shows that it has
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

    /// Takes a lease for one connection, of which there are never more than `most`.
    pub(crate) fn acquire(self: &Arc<Self>, most: Option<NonZeroU32>) -> Result<Lease, LeaseError> {
        // This counts first and checks the mark second; `retire` marks first and checks the count
        // second. All four operations are sequentially consistent, so either the mark is seen here
        // or the count is seen there.
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

    /// A non-blocking socket to connect to [`Self::endpoint`], and the guard that has to be kept
    /// until it is connected.
    pub(crate) fn socket(&self) -> io::Result<(Socket, Option<Box<PinGuard>>)> {
        match &self.direct {
            Some(direct) => direct.open().map(|(socket, pass)| (socket, Some(Box::new(pass)))),
            None => Ok((self.endpoint.unconnected()?, None)),
        }
    }

    /// Where the worker is reached.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Whether the kernel may assign the worker's port to an outgoing connection.
    pub(crate) fn is_ephemeral(&self) -> bool {
        self.is_ephemeral
    }

    /// Whether the worker is on this machine: reached by the loopback interface or by a unix
    /// socket.
    pub(crate) fn is_local(&self) -> bool {
        self.is_local
    }

    /// How a connection reaches the worker.
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

    /// How many connections the worker has begun to answer, that is, has sent a first byte to.
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
        f.debug_struct("Backend").field("id", &self.id).field("label", &self.label).finish()
    }
}

/// Why a backend grants no lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeaseError {
    /// The backend has as many connections as it may have.
    Full,
    Retired,
}

/// One connection's claim on a [`Backend`], given back when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    backend: Arc<Backend>,
    /// Routes the connection to this worker until it is established.
    pub(crate) pin: Option<Box<PinGuard>>,
    /// The worker has accepted the connection. So when the connection ends, there is likely to be
    /// room in the worker's accept queue.
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
