//! A service, as its listeners and connections see it.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{
        AtomicBool, AtomicU64, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
};

use tokio::sync::Notify;

use super::{
    crew::Crew,
    gate::Gate,
    pool::Pool,
    tally::{ServiceCounters, ServiceTally},
};

/// Where control publishes a service's [`Pool`] and reads what is held.
#[derive(Debug)]
pub struct ServiceRoute {
    name: Arc<str>,
    /// Whether each connection is logged at its end.
    access: Arc<AtomicBool>,
    crew: Arc<Crew>,
    pool: Mutex<Arc<Pool>>,
    /// Counts the pools, so that a data thread looks behind the lock only when there is a new one,
    /// and the times that full workers have room again for those that wait.
    version: AtomicU64,
    /// Connections wait since all workers were full.
    crowded: AtomicBool,
    gate: Gate,
    waiting: AtomicUsize,
    emptied: Notify,
    counters: ServiceCounters,
}

impl ServiceRoute {
    pub(super) fn new(
        name: Arc<str>,
        pool: Pool,
        access: Arc<AtomicBool>,
        crew: Arc<Crew>,
    ) -> Arc<Self> {
        Arc::new(Self {
            name,
            access,
            crew,
            gate: Gate::new(limit(&pool)),
            pool: Mutex::new(Arc::new(pool)),
            version: AtomicU64::new(0),
            crowded: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            emptied: Notify::new(),
            counters: ServiceCounters::default(),
        })
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
        {
            let mut current = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
            pool.succeed(&current);
            *current = Arc::new(pool);
            self.version.fetch_add(1, SeqCst);
        }
        self.gate.set_limit(limit);
        // For those that are held, those turned away at the gate, and timeouts that became shorter.
        self.crew.wake_all();
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

    /// A connection is about to wait for a worker that has room. It has to look once more after
    /// this: room made before wakes nobody.
    pub(super) fn mark_crowded(&self) {
        self.crowded.store(true, SeqCst);
    }

    /// To be called when a worker has one connection less: those that wait look again.
    pub(super) fn has_room(&self) {
        // The plain load keeps the cache line shared where nobody waits.
        if self.crowded.load(SeqCst) && self.crowded.swap(false, SeqCst) {
            self.version.fetch_add(1, SeqCst);
            self.crew.wake_all();
        }
    }

    pub(super) fn count_waiting(&self, starts: bool) {
        if starts {
            self.waiting.fetch_add(1, Relaxed);
        } else {
            self.waiting.fetch_sub(1, Relaxed);
        }
    }
}

fn limit(pool: &Pool) -> usize {
    pool.routing().max_connections.map_or(usize::MAX, |max| max.get() as usize)
}

/// A connection's place among those held at once, by its service and by the whole process. It is
/// taken before the connection is accepted, so that the limits are never exceeded.
#[derive(Debug)]
pub(super) struct Place(Arc<ServiceRoute>);

impl Place {
    /// `None` where there is no room; the threads are woken when there may be.
    pub(super) fn take(service: &Arc<ServiceRoute>) -> Option<Self> {
        if !service.gate.enter() {
            return None;
        }
        if !service.crew.budget().enter() {
            if leave(service) {
                service.crew.wake_all();
            }
            return None;
        }
        Some(Self(Arc::clone(service)))
    }

    /// Beyond the limits, for a connection that is there already.
    pub(super) fn force(service: &Arc<ServiceRoute>) -> Self {
        service.gate.force();
        service.crew.budget().force();
        Self(Arc::clone(service))
    }

    pub(super) fn service(&self) -> &ServiceRoute {
        &self.0
    }

    pub(super) fn route(&self) -> &Arc<ServiceRoute> {
        &self.0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // A connection gives back its worker first.
        self.0.has_room();
        let wake = self.0.crew.budget().leave().wake;
        if leave(&self.0) || wake {
            self.0.crew.wake_all();
        }
    }
}

/// Whether somebody waits for the place.
fn leave(service: &ServiceRoute) -> bool {
    let left = service.gate.leave();
    if left.empty {
        service.emptied.notify_waiters();
    }
    left.wake
}
