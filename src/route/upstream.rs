//! One worker incarnation, as the data threads see it.

use std::{
    fmt,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::Duration,
};

use socket2::Domain;
use tokio::sync::Notify;

use super::{
    connection::End,
    listener::is_ephemeral,
    tally::{Refusal, WorkerCounters, WorkerTally},
};
use crate::{config::ProxyProtocol, sockets::Endpoint};

/// One incarnation of a worker: where it listens, and what passed through it.
///
/// Shared by control, which retires it, and the data threads, which lease it.
pub struct Upstream {
    id: u64,
    slot: u32,
    port: Option<u16>,
    proxy_protocol: Option<ProxyProtocol>,
    label: Arc<str>,
    endpoint: Endpoint,
    is_ephemeral: bool,
    is_local: bool,
    retired: AtomicBool,
    departed: AtomicBool,
    displaced: AtomicBool,
    drained: Arc<Notify>,
    active: AtomicUsize,
    total: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    counters: WorkerCounters,
}

/// What passed through an [`Upstream`] so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Connections now on the worker, the ones being made included.
    pub active: usize,
    /// Connections the worker took, ever.
    pub total: u64,
    /// Connects that were refused, failed or timed out.
    pub failed: u64,
    /// Bytes handed to clients.
    pub sent: u64,
    /// Bytes handed to the worker.
    pub received: u64,
}

impl Upstream {
    /// A worker that listens at `endpoint`, and is told who its client is where it is to be. `id` is
    /// its incarnation, unique for the life of the daemon; `label` names it in the access log
    /// (`web/9002`). `drained` is notified whenever the last connection of a *retired* upstream
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
        let inet = endpoint.inet();
        Arc::new(Self {
            id,
            slot,
            port: inet.map(|address| address.port()),
            proxy_protocol,
            label,
            endpoint,
            is_ephemeral: inet.is_some_and(|address| is_ephemeral(address.port())),
            is_local: inet.is_none_or(|address| address.ip().to_canonical().is_loopback()),
            retired: AtomicBool::new(false),
            departed: AtomicBool::new(false),
            displaced: AtomicBool::new(false),
            drained,
            active: AtomicUsize::new(0),
            total: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            counters: WorkerCounters::default(),
        })
    }

    /// The incarnation.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The place in the service: 0, 1, …
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
        Traffic {
            active: self.active(),
            total: self.total.load(Relaxed),
            failed: self.counters.refused(),
            sent: self.sent.load(Relaxed),
            received: self.received.load(Relaxed),
        }
    }

    /// All that only grows, each number exact by itself.
    #[must_use]
    pub fn tally(&self) -> WorkerTally {
        let mut tally = self.counters.read();
        tally.total = self.total.load(Relaxed);
        tally.sent = self.sent.load(Relaxed);
        tally.received = self.received.load(Relaxed);
        tally
    }

    /// Connections now on the worker, the ones being made included.
    #[must_use]
    pub fn active(&self) -> usize {
        self.active.load(SeqCst)
    }

    /// Takes no further connection, and tells how many it still has. Once a retired upstream has
    /// none, it gets none, whatever snapshot a data thread still looks at.
    pub fn retire(&self) -> usize {
        self.retired.store(true, SeqCst);
        self.active()
    }

    /// Undoes [`retire`](Self::retire).
    pub fn reinstate(&self) {
        self.retired.store(false, SeqCst);
    }

    /// Says whether connections to its port reach another worker, which expects another header.
    ///
    /// To be said before they do: whoever has connected looks before it sends anything, and places
    /// its client anew.
    pub fn displace(&self, displaced: bool) {
        self.displaced.store(displaced, SeqCst);
    }

    pub(super) fn is_displaced(&self) -> bool {
        self.displaced.load(SeqCst)
    }

    /// Whether its process is gone, so that nobody reads any more what clients send to it.
    pub(super) fn is_departed(&self) -> bool {
        self.departed.load(Relaxed)
    }

    pub(super) fn depart(&self) {
        self.departed.store(true, Relaxed);
    }

    /// A connection's claim, of which there are never more than `most`.
    pub(super) fn acquire(self: &Arc<Self>, most: Option<NonZeroU32>) -> Result<Lease, Denied> {
        // Count first, look second; `retire` marks first, counts second. In the one order of all
        // four, either the mark is seen here or the count is seen there.
        match most {
            None => _ = self.active.fetch_add(1, SeqCst),
            Some(most) => {
                let room = |active| (active < most.get() as usize).then_some(active + 1);
                self.active.fetch_update(SeqCst, SeqCst, room).map_err(|_| Denied::Full)?;
            }
        }
        let lease = Lease(Arc::clone(self));
        if self.retired.load(SeqCst) { Err(Denied::Retired) } else { Ok(lease) }
    }

    /// Where it is reached.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Whether the system may give its port to an outgoing connection.
    pub(super) fn is_ephemeral(&self) -> bool {
        self.is_ephemeral
    }

    /// Whether it is reached without a network: by the loopback interface, or on unix.
    pub(super) fn is_local(&self) -> bool {
        self.is_local
    }

    pub(super) fn domain(&self) -> Domain {
        self.endpoint.address().domain()
    }

    pub(super) fn count_taken(&self, thread: usize, connect: Duration) {
        self.total.fetch_add(1, Relaxed);
        self.counters.count_connect(thread, connect);
    }

    pub(super) fn count_refusal(&self, refusal: Refusal) {
        self.counters.count_refusal(refusal);
    }

    pub(super) fn count_end(&self, thread: usize, end: End, lasted: Duration) {
        self.counters.count_end(thread, end, lasted);
    }

    pub(super) fn count_bytes(&self, sent: u64, received: u64) {
        if sent > 0 {
            self.sent.fetch_add(sent, Relaxed);
        }
        if received > 0 {
            self.received.fetch_add(received, Relaxed);
        }
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream").field("id", &self.id).field("label", &self.label).finish()
    }
}

/// Why a worker is not to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Denied {
    /// It has as many connections as it may.
    Full,
    Retired,
}

/// One connection's place on an [`Upstream`], given back when dropped.
#[derive(Debug)]
pub(super) struct Lease(Arc<Upstream>);

impl std::ops::Deref for Lease {
    type Target = Upstream;

    fn deref(&self) -> &Upstream {
        &self.0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.0.active.fetch_sub(1, SeqCst) == 1 && self.0.retired.load(SeqCst) {
            self.0.drained.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Barrier, thread};

    use super::*;

    fn upstream(drained: &Arc<Notify>) -> Arc<Upstream> {
        let address = SocketAddr::from(([127, 0, 0, 1], 9002));
        Upstream::new(7, 0, "web/9002".into(), address.into(), None, Arc::clone(drained))
    }

    #[test]
    fn a_retired_upstream_is_not_leased_until_reinstated() {
        let upstream = upstream(&Arc::default());
        let lease = upstream.acquire(None).unwrap();
        assert_eq!(upstream.retire(), 1);
        assert_eq!(upstream.acquire(None).unwrap_err(), Denied::Retired);
        assert_eq!(upstream.active(), 1);
        upstream.reinstate();
        let second = upstream.acquire(None).unwrap();
        drop((lease, second));
        assert_eq!(upstream.active(), 0);
    }

    #[test]
    fn no_more_leases_than_there_may_be() {
        let upstream = upstream(&Arc::default());
        let most = NonZeroU32::new(3);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        let lease = upstream.acquire(most);
                        assert!(upstream.active() <= 3);
                        drop(lease);
                    }
                });
            }
        });
        let _two = (upstream.acquire(most), upstream.acquire(most));
        let third = upstream.acquire(most);
        assert_eq!(upstream.acquire(most).unwrap_err(), Denied::Full);
        drop(third);
        assert!(upstream.acquire(most).is_ok());
    }

    #[tokio::test]
    async fn the_last_lease_of_a_retired_upstream_notifies() {
        let drained = Arc::new(Notify::new());
        let upstream = upstream(&drained);
        let lease = upstream.acquire(None).unwrap();
        upstream.retire();
        drop(lease);
        drained.notified().await;
    }

    #[test]
    fn a_retired_upstream_seen_empty_stays_empty() {
        for _ in 0..2_000 {
            let upstream = upstream(&Arc::default());
            let start = Barrier::new(2);
            thread::scope(|scope| {
                let leased = scope.spawn(|| {
                    start.wait();
                    upstream.acquire(None)
                });
                start.wait();
                let seen = upstream.retire();
                let leased = leased.join().unwrap();
                assert!(seen == 1 || leased.is_err(), "leased after it was seen retired and empty");
            });
        }
    }
}
