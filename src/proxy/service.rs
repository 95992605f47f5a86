//! A service, as its listeners and connections see it.

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
    counters::{ServiceCounters, ServiceTally},
    limit::ConnectionLimit,
    pool::Pool,
    shortage::{Shortage, Shortages},
    threads::Threads,
};

/// Where the supervisor publishes a service's [`Pool`] and reads what is held.
#[derive(Debug)]
pub struct ServiceHandle {
    name: Arc<str>,
    /// Whether each connection is logged at its end.
    access: Arc<AtomicBool>,
    threads: Arc<Threads>,
    pool: Mutex<Arc<Pool>>,
    /// Counts the pools, so that a data thread looks behind the lock only when there is a new one,
    /// and the times that full workers have room again for those that wait.
    version: AtomicU64,
    /// Connections wait, and are to be told when a worker has room.
    crowded: AtomicBool,
    /// For each thread, when the first came of those that wait there: nanoseconds since the threads
    /// were started, or [`NOBODY`].
    heads: Box<[AtomicU64]>,
    gate: ConnectionLimit,
    /// The places that no other service can take from it.
    share: ConnectionLimit,
    waiting: AtomicUsize,
    emptied: Notify,
    /// Nobody waits for a worker any more.
    placed: Notify,
    shortages: Shortages,
    counters: ServiceCounters,
}

impl ServiceHandle {
    pub(super) fn new(
        name: Arc<str>,
        pool: Pool,
        access: Arc<AtomicBool>,
        threads: Arc<Threads>,
    ) -> Arc<Self> {
        let heads = (0..threads.threads()).map(|_| AtomicU64::new(NOBODY)).collect();
        let service = Arc::new(Self {
            name,
            access,
            threads,
            heads,
            gate: ConnectionLimit::new(limit(&pool)),
            share: ConnectionLimit::new(usize::MAX),
            pool: Mutex::new(Arc::new(pool)),
            version: AtomicU64::new(0),
            crowded: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            emptied: Notify::new(),
            placed: Notify::new(),
            shortages: Shortages::default(),
            counters: ServiceCounters::default(),
        });
        service.threads.enrol(&service);
        service
    }

    /// The service's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Replaces the pool; every connection placed after the return goes by the new one, and those
    /// that wait for a worker look again. The rotation goes on where it was.
    pub fn publish(&self, mut pool: Pool) {
        let limit = limit(&pool);
        let concerns_all = {
            let mut current = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
            let concerns_all = pool.routing() != current.routing() || !pool.has_those_of(&current);
            pool.succeed(&current);
            *current = Arc::new(pool);
            self.version.fetch_add(1, SeqCst);
            concerns_all
        };
        // Those turned away at the gate, timeouts that became shorter, and workers that are to be let go
        // of are every thread's business; else it is that of the threads where somebody waits.
        if self.gate.set_limit(limit) || concerns_all {
            self.threads.wake_all();
        } else {
            let heads = self.heads.iter().enumerate();
            heads
                .filter(|(_, head)| head.load(SeqCst) != NOBODY)
                .for_each(|(thread, _)| self.threads.wake(thread));
        }
    }

    /// Connections held, those that wait for a worker included.
    #[must_use]
    pub fn active(&self) -> usize {
        self.gate.held()
    }

    /// Connections that wait for a worker.
    #[must_use]
    pub fn held(&self) -> usize {
        self.waiting.load(Relaxed)
    }

    /// All that only grows, each number exact by itself.
    #[must_use]
    pub fn tally(&self) -> ServiceTally {
        self.counters.read()
    }

    /// Returns when the service holds no connection; at once if it holds none. May be dropped at
    /// any time. It doesn't stop new ones: [close](super::DataPlane::close) the listeners first.
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

    /// Returns when no connection waits for a worker; at once if none does. May be dropped at any
    /// time.
    pub async fn placed(&self) {
        loop {
            let placed = self.placed.notified();
            tokio::pin!(placed);
            placed.as_mut().enable();
            if self.held() == 0 {
                return;
            }
            placed.await;
        }
    }

    /// A place for a connection that is about to be taken out of a worker's accept queue, where the
    /// process has room for it. That the service is full does not matter: its client is there already.
    pub fn reserve(self: &Arc<Self>) -> Option<ReservedPermit> {
        let held =
            Held::take(self).or_else(|| self.threads.spare().try_enter().then_some(Held::Spare))?;
        self.gate.force();
        Some(ReservedPermit(Permit { service: Arc::clone(self), held }))
    }

    /// How many places are the service's alone; all, with `usize::MAX`, where it is the only one.
    pub(super) fn set_share(&self, share: usize) -> bool {
        self.share.set_limit(share)
    }

    pub(super) fn shortages(&self) -> &Shortages {
        &self.shortages
    }

    /// Clients wait for want of this.
    pub(super) fn is_short_of(&self, what: Shortage) {
        let limit = match what {
            Shortage::Service => Some(self.gate.limit()),
            Shortage::Descriptors => Some(self.threads.budget().limit()),
            Shortage::Workers => {
                let pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
                pool.routing().worker_connections.map(|most| most.get() as usize)
            }
            Shortage::Queues | Shortage::Ports | Shortage::Memory => None,
        };
        self.shortages.begins(what, &self.name, limit);
    }

    pub(super) fn counters(&self) -> &ServiceCounters {
        &self.counters
    }

    pub(super) fn is_logged(&self) -> bool {
        self.access.load(Relaxed)
    }

    pub(super) fn version(&self) -> u64 {
        self.version.load(SeqCst)
    }

    /// The current pool and its version.
    pub(super) fn current(&self) -> (Arc<Pool>, u64) {
        let pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        (Arc::clone(&pool), self.version())
    }

    /// Connections are about to wait for a worker that has room. The first has to look once more after
    /// this: room made before wakes nobody.
    pub(super) fn mark_crowded(&self) {
        self.crowded.store(true, SeqCst);
    }

    /// To be called when a worker has one connection less: the longest waiting looks again.
    pub(super) fn has_room(&self) {
        // The plain load keeps the cache line shared where nobody waits.
        if self.crowded.load(SeqCst) && self.crowded.swap(false, SeqCst) {
            self.pass_on(None);
        }
    }

    /// Says who is the first of those that wait at `thread`, by when it came.
    pub(super) fn set_head(&self, thread: usize, came: Option<Instant>) {
        let head = came.map_or(NOBODY, |came| self.threads.nanoseconds(came));
        self.heads[thread].store(head, SeqCst);
    }

    /// Whether it is the turn of one at `thread` who came then, or near enough; if not, whose it is
    /// has been told.
    pub(super) fn is_turn(&self, thread: usize, came: Instant) -> bool {
        let came = self.threads.nanoseconds(came);
        match self.longest(Some(thread)) {
            Some((other, before)) if before.saturating_add(NEAR) < came => {
                self.version.fetch_add(1, SeqCst);
                self.threads.wake(other);
                false
            }
            _ => true,
        }
    }

    /// Has the longest waiting look again, at whatever thread but this.
    pub(super) fn pass_on(&self, but: Option<usize>) {
        if let Some((thread, _)) = self.longest(but) {
            self.version.fetch_add(1, SeqCst);
            self.threads.wake(thread);
        }
    }

    /// Where the longest waiting is, and when it came.
    fn longest(&self, but: Option<usize>) -> Option<(usize, u64)> {
        let heads = self.heads.iter().map(|head| head.load(SeqCst)).enumerate();
        heads
            .filter(|(thread, head)| *head != NOBODY && Some(*thread) != but)
            .min_by_key(|(_, head)| *head)
    }

    /// One more waits.
    pub(super) fn begins_to_wait(&self) {
        self.waiting.fetch_add(1, SeqCst);
    }

    /// One waits no longer. Whether it was the last of all threads.
    pub(super) fn ends_to_wait(&self) -> bool {
        let is_last = self.waiting.fetch_sub(1, SeqCst) == 1;
        if is_last {
            self.placed.notify_waiters();
        }
        is_last
    }
}

/// In place of when somebody came.
const NOBODY: u64 = u64::MAX;

/// In nanoseconds: whoever came so soon after another, at another thread, need not let it go first.
const NEAR: u64 = Duration::from_millis(1).as_nanos() as u64;

impl Drop for ServiceHandle {
    fn drop(&mut self) {
        // The others' shares grow.
        self.threads.share_out();
    }
}

fn limit(pool: &Pool) -> usize {
    pool.routing().max_connections.map_or(usize::MAX, |max| max.get() as usize)
}

/// Which of the process' places a connection has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    /// One of all, where there is only one service.
    Any,
    /// One that no other service could have taken.
    Share,
    /// One of those that are for whoever comes first.
    Common,
    /// One for a connection that waited for a worker which is gone, when there were no others.
    Spare,
}

impl Held {
    fn take(service: &ServiceHandle) -> Option<Self> {
        let threads = &service.threads;
        let held = match service.share.limit() {
            usize::MAX => Self::Any,
            _ if service.share.try_enter() => Self::Share,
            _ if threads.common().enter() => Self::Common,
            // Marks that one waits for it, which has to be told.
            _ if service.share.enter() => Self::Share,
            _ => return None,
        };
        if !threads.budget().enter() {
            if held.give_back_part(service) {
                threads.wake_all();
            }
            return None;
        }
        Some(held)
    }

    /// What it has besides one of all. Whether somebody waits for it.
    fn give_back_part(self, service: &ServiceHandle) -> bool {
        match self {
            Self::Any | Self::Spare => false,
            Self::Share => service.share.leave().wake,
            Self::Common => service.threads.common().leave().wake,
        }
    }

    /// Whether somebody waits for it.
    fn give_back(self, service: &ServiceHandle) -> bool {
        let part = self.give_back_part(service);
        let all = match self {
            Self::Spare => service.threads.spare().leave(),
            Self::Any | Self::Share | Self::Common => service.threads.budget().leave(),
        };
        part || all.wake
    }
}

/// A connection's place among those held at once, by its service and by the whole process. It is
/// taken before the connection is accepted, so that the limits are never exceeded.
#[derive(Debug)]
pub(super) struct Permit {
    service: Arc<ServiceHandle>,
    held: Held,
}

/// A place for a connection that is to be [adopted](super::DataPlane::adopt).
#[derive(Debug)]
pub struct ReservedPermit(pub(super) Permit);

impl Permit {
    /// # Errors
    /// What there is no more of; the threads are woken when there may be.
    pub(super) fn take(service: &Arc<ServiceHandle>) -> Result<Self, Shortage> {
        if !service.gate.enter() {
            return Err(Shortage::Service);
        }
        let Some(held) = Held::take(service) else {
            if leave(service) {
                service.threads.wake_all();
            }
            return Err(Shortage::Descriptors);
        };
        Ok(Self { service: Arc::clone(service), held })
    }

    pub(super) fn service(&self) -> &ServiceHandle {
        &self.service
    }

    pub(super) fn route(&self) -> &Arc<ServiceHandle> {
        &self.service
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        // A connection gives back its worker first.
        self.service.has_room();
        let wake = self.held.give_back(&self.service);
        if leave(&self.service) || wake {
            self.service.threads.wake_all();
        }
    }
}

/// Whether somebody waits for the place.
fn leave(service: &ServiceHandle) -> bool {
    let left = service.gate.leave();
    if left.empty {
        service.emptied.notify_waiters();
    }
    left.wake
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(threads: &Arc<Threads>, name: &str) -> Arc<ServiceHandle> {
        let pool = Pool::new(Vec::new(), None, Arc::default());
        ServiceHandle::new(name.into(), pool, Arc::default(), Arc::clone(threads))
    }

    /// As many places as it gets.
    fn all(service: &Arc<ServiceHandle>) -> Vec<Permit> {
        std::iter::from_fn(|| Permit::take(service).ok()).collect()
    }

    #[test]
    fn no_service_takes_the_share_of_another() {
        // Eight of them are kept.
        let threads = Threads::new(2, 128).unwrap();
        let first = service(&threads, "first");
        assert_eq!(all(&first).len(), 120, "alone, it has all");
        let second = service(&threads, "second");
        let (of_first, of_second) = (all(&first), all(&second));
        assert_eq!((of_first.len(), of_second.len()), (90, 30));
        assert_eq!(all(&first).len() + all(&second).len(), 0);
        // Whoever waited for a worker that is gone gets a place all the same, but not without end.
        let reserved: Vec<_> = std::iter::from_fn(|| first.reserve()).collect();
        assert_eq!(reserved.len(), 8);
        drop((of_first, of_second, reserved));

        // What one holds when another comes, it keeps, and then no more than the others leave.
        drop(second);
        let of_first = all(&first);
        assert_eq!(of_first.len(), 120);
        let second = service(&threads, "second");
        assert!(Permit::take(&second).is_err());
        drop(of_first);
        assert_eq!(all(&second).len(), 90);
        assert_eq!(threads.budget().held(), 0);
    }

    #[test]
    fn where_there_is_not_a_place_for_each_nothing_is_divided_by_zero() {
        let threads = Threads::new(1, 2).unwrap();
        let services: Vec<_> =
            (0..5).map(|number| service(&threads, &number.to_string())).collect();
        let places: Vec<_> = services.iter().flat_map(all).collect();
        assert_eq!(places.len(), 2);
    }

    #[test]
    fn the_longest_waiting_goes_first_whichever_thread_it_is_at() {
        let threads = Threads::new(3, 128).unwrap();
        let service = service(&threads, "web");
        let came = |millis| Instant::now() + Duration::from_millis(millis);
        let (first, second) = (came(10), came(30));
        assert!(service.is_turn(0, second));
        service.set_head(1, Some(first));
        service.set_head(0, Some(second));
        assert!(service.is_turn(1, first));
        let before = service.version();
        assert!(!service.is_turn(0, second));
        assert!(service.version() > before, "the other one has to look");
        service.set_head(1, None);
        assert!(service.is_turn(0, second));
    }
}
