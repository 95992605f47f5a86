//! The state of one service that its listeners and connections share.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{
        AtomicBool, AtomicU64, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{
    budget::{Budget, Share},
    counters::{ServiceCounters, ServiceTally},
    limit::ConnectionLimit,
    nanoseconds,
    pool::Pool,
    shortage::{Shortage, Shortages},
    waker::Waker,
};

/// The handle of a service: the supervisor publishes a [`Pool`] here, and reads how many
/// connections are held.
#[derive(Debug)]
pub struct ServiceHandle {
    name: Arc<str>,
    /// Whether each connection is logged at its end.
    access: Arc<AtomicBool>,
    pool: Mutex<Arc<Pool>>,
    /// The number of pools published so far, so that a data thread takes the lock only when there
    /// is a new pool.
    version: AtomicU64,
    /// How often the longest-waiting connection was told to look for a worker again.
    calls: AtomicU64,
    /// Set while connections wait and must be told when a worker has room.
    crowded: AtomicBool,
    /// For each thread, the arrival time of the first connection on its wait list, in nanoseconds
    /// since the threads were started; or [`NOBODY`].
    heads: Box<[AtomicU64]>,
    limit: ConnectionLimit,
    share: Share,
    waiting: AtomicUsize,
    emptied: Notify,
    /// Notified when no connection waits for a worker any more.
    placed: Notify,
    shortages: Shortages,
    counters: ServiceCounters,
}

impl ServiceHandle {
    pub(crate) fn new(
        name: Arc<str>,
        pool: Pool,
        access: Arc<AtomicBool>,
        budget: Arc<Budget>,
    ) -> Arc<Self> {
        let heads = (0..budget.waker().threads()).map(|_| AtomicU64::new(NOBODY)).collect();
        Arc::new(Self {
            name,
            access,
            heads,
            limit: ConnectionLimit::new(limit(&pool)),
            share: Share::new(budget),
            pool: Mutex::new(Arc::new(pool)),
            version: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            crowded: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            emptied: Notify::new(),
            placed: Notify::new(),
            shortages: Shortages::default(),
            counters: ServiceCounters::default(),
        })
    }

    /// The service's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Replaces the pool. Every connection assigned after the return uses the new one, and waiting
    /// connections look for a worker again. The rotation continues where it was.
    pub fn publish(&self, mut pool: Pool) {
        let limit = limit(&pool);
        let concerns_all = {
            let mut current = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
            // Where there is no worker, a thread that is about to make a connection wait has not said
            // so yet, and nothing but the next pool would have it look again.
            let concerns_all = pool.backends().is_empty()
                || pool.routing() != current.routing()
                || !pool.has_those_of(&current);
            pool.succeed(&current);
            *current = Arc::new(pool);
            self.version.fetch_add(1, SeqCst);
            concerns_all
        };
        // All threads have to be woken if the limit has room for clients that were turned away, if
        // timeouts became shorter, or if the threads have to let go of workers that the new pool no
        // longer has. Otherwise only the threads with waiting connections.
        if self.limit.set_limit(limit) || concerns_all {
            self.waker().wake_all();
        } else {
            let heads = self.heads.iter().enumerate();
            heads
                .filter(|(_, head)| head.load(SeqCst) != NOBODY)
                .for_each(|(thread, _)| self.waker().wake(thread));
        }
    }

    /// The number of connections held, including those that wait for a worker.
    #[must_use]
    pub fn active(&self) -> usize {
        self.limit.held()
    }

    /// The number of connections that wait for a worker.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    /// A snapshot of the counters, which only grow. Each number is exact by itself.
    #[must_use]
    pub fn tally(&self) -> ServiceTally {
        self.counters.read()
    }

    /// Completes when the service holds no connection. May be dropped at any time. It doesn't stop
    /// new connections: [close](crate::proxy::DataPlane::close) the listeners first.
    pub async fn emptied(&self) {
        loop {
            let emptied = self.emptied.notified();
            tokio::pin!(emptied);
            emptied.as_mut().enable();
            if self.active() == 0 {
                return;
            }
            emptied.await;
        }
    }

    /// Completes when no connection waits for a worker. May be dropped at any time.
    pub async fn placed(&self) {
        loop {
            let placed = self.placed.notified();
            tokio::pin!(placed);
            placed.as_mut().enable();
            if self.waiting() == 0 {
                return;
            }
            placed.await;
        }
    }

    pub(super) fn limit(&self) -> &ConnectionLimit {
        &self.limit
    }

    pub(super) fn share(&self) -> &Share {
        &self.share
    }

    pub(super) fn waker(&self) -> &Waker {
        self.share.budget().waker()
    }

    /// Counts one connection less. Returns whether some client was turned away and may come in now.
    pub(super) fn leave(&self) -> bool {
        let left = self.limit.leave();
        if left.empty {
            self.emptied.notify_waiters();
        }
        left.wake
    }

    pub(crate) fn shortages(&self) -> &Shortages {
        &self.shortages
    }

    /// Reports that clients wait because of this shortage.
    pub(crate) fn is_short_of(&self, what: Shortage) {
        let limit = match what {
            Shortage::Service => Some(self.limit.limit()),
            Shortage::Descriptors => Some(self.share.budget().limit()),
            Shortage::Workers => {
                let pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
                pool.routing().worker_connections.map(|most| most.get() as usize)
            }
            Shortage::Queues | Shortage::Ports | Shortage::Memory => None,
        };
        self.shortages.begins(what, &self.name, limit);
    }

    pub(crate) fn counters(&self) -> &ServiceCounters {
        &self.counters
    }

    pub(crate) fn is_logged(&self) -> bool {
        self.access.load(Relaxed)
    }

    pub(crate) fn version(&self) -> u64 {
        self.version.load(SeqCst)
    }

    /// How often the longest-waiting connection was told to look again.
    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(SeqCst)
    }

    /// The current pool and its version.
    pub(crate) fn current(&self) -> (Arc<Pool>, u64) {
        let pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        (Arc::clone(&pool), self.version())
    }

    /// Says that connections are about to wait for a worker with room. The first of them has to
    /// look once more after this call: room that was made before it wakes no thread.
    pub(crate) fn mark_crowded(&self) {
        self.crowded.store(true, SeqCst);
    }

    /// To be called when a worker has one connection less: the longest-waiting connection looks
    /// again.
    pub(crate) fn has_room(&self) {
        // The plain load keeps the cache line shared while no connection waits.
        if self.crowded.load(SeqCst) && self.crowded.swap(false, SeqCst) {
            self.pass_on(None);
        }
    }

    /// Publishes the arrival time of the first waiting connection of `thread`.
    pub(crate) fn set_head(&self, thread: usize, came: Option<Instant>) {
        let head = came.map_or(NOBODY, nanoseconds);
        self.heads[thread].store(head, SeqCst);
    }

    /// Whether a connection of `thread` that arrived at `came` may go first: no other thread has
    /// one that is older by more than [`NEAR`]. If another does, that thread is woken.
    pub(crate) fn is_turn(&self, thread: usize, came: Instant) -> bool {
        let came = nanoseconds(came);
        match self.longest(Some(thread)) {
            Some((other, before)) if before.saturating_add(NEAR) < came => {
                self.calls.fetch_add(1, SeqCst);
                self.waker().wake(other);
                false
            }
            _ => true,
        }
    }

    /// Makes the longest-waiting connection look for a worker again, on any thread except `but`.
    pub(crate) fn pass_on(&self, but: Option<usize>) {
        if let Some((thread, _)) = self.longest(but) {
            self.calls.fetch_add(1, SeqCst);
            self.waker().wake(thread);
        }
    }

    /// The thread with the longest-waiting connection, and its arrival time.
    fn longest(&self, but: Option<usize>) -> Option<(usize, u64)> {
        let heads = self.heads.iter().map(|head| head.load(SeqCst)).enumerate();
        heads
            .filter(|(thread, head)| *head != NOBODY && Some(*thread) != but)
            .min_by_key(|(_, head)| *head)
    }

    /// Counts one more waiting connection.
    pub(crate) fn begins_to_wait(&self) {
        self.waiting.fetch_add(1, SeqCst);
    }

    /// Counts one waiting connection less. Returns whether it was the last one of all threads.
    pub(crate) fn ends_to_wait(&self) -> bool {
        let is_last = self.waiting.fetch_sub(1, SeqCst) == 1;
        if is_last {
            self.placed.notify_waiters();
        }
        is_last
    }
}

/// Stands for an arrival time where no connection waits.
const NOBODY: u64 = u64::MAX;

/// In nanoseconds: connections on different threads that arrived within this time need not keep
/// their order.
const NEAR: u64 = Duration::from_millis(1).as_nanos() as u64;

fn limit(pool: &Pool) -> usize {
    pool.routing().max_connections.map_or(usize::MAX, |max| max.get() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_waiting_goes_first_whichever_thread_it_is_at() {
        let budget = Arc::new(Budget::new(128, Arc::new(Waker::new(3).unwrap())));
        let pool = Pool::new(Vec::new(), None, Arc::default());
        let service = ServiceHandle::new("web".into(), pool, Arc::default(), budget);
        let came = |millis| Instant::now() + Duration::from_millis(millis);
        let (first, second) = (came(10), came(30));
        assert!(service.is_turn(0, second));
        service.set_head(1, Some(first));
        service.set_head(0, Some(second));
        assert!(service.is_turn(1, first));
        let before = service.calls();
        assert!(!service.is_turn(0, second));
        assert!(service.calls() > before, "the other one has to look");
        service.set_head(1, None);
        assert!(service.is_turn(0, second));
    }
}
