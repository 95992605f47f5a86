//! The limit on connections of the whole process, and how the services share it.

use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use super::{BEGAN, limit::ConnectionLimit, waker::Waker};

/// The limit on connections of the process.
#[derive(Debug)]
pub(crate) struct Budget {
    all: ConnectionLimit,
    /// The part that all services share.
    common: ConnectionLimit,
    /// A few more permits, for connections drained from the queue of a worker that has exited.
    spare: ConnectionLimit,
    /// The part reserved for each service.
    shares: Mutex<Vec<Weak<ConnectionLimit>>>,
    waker: Arc<Waker>,
}

impl Budget {
    /// A budget of `connections`. `waker` wakes the threads that were turned away.
    pub(crate) fn new(connections: usize, waker: Arc<Waker>) -> Self {
        // Starts the clock of `super::nanoseconds`.
        LazyLock::force(&BEGAN);
        let spare = spare(connections);
        Self {
            all: ConnectionLimit::new(connections - spare),
            common: ConnectionLimit::new(usize::MAX),
            spare: ConnectionLimit::new(spare),
            shares: Mutex::default(),
            waker,
        }
    }

    /// How many connections are held.
    pub(crate) fn held(&self) -> usize {
        self.all.held() + self.spare.held()
    }

    /// The limit without the spare permits, which are kept for connections drained from the queue
    /// of a worker that has exited.
    pub(crate) fn limit(&self) -> usize {
        self.all.limit()
    }

    pub(crate) fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Half of the limit is divided among the services, so that none can take everything from
    /// another. The other half is first come, first served. If a service holds more than its share
    /// when that shrinks, it keeps them.
    fn divide(&self, shares: &[Weak<ConnectionLimit>]) {
        let all = self.all.limit();
        let share = match shares.len() {
            0 | 1 => usize::MAX,
            // At least one for each service, even if the sum of the shares then exceeds the limit.
            count => (all / 2 / count).max(1).min(all),
        };
        let divided = if share == usize::MAX { 0 } else { share.saturating_mul(shares.len()) };
        let mut wake = self.common.set_limit(all.saturating_sub(divided));
        for limit in shares.iter().filter_map(Weak::upgrade) {
            wake |= limit.set_limit(share);
        }
        if wake {
            self.waker.wake_all();
        }
    }

    fn shares(&self) -> MutexGuard<'_, Vec<Weak<ConnectionLimit>>> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many of `connections` permits are spare: kept for connections drained from the queue of a
/// worker that has exited.
///
/// A drained connection that lbd itself made to the worker belongs to a client connection which
/// already holds a permit. All normal permits may be held by such clients.
fn spare(connections: usize) -> usize {
    if connections <= 8 { 0 } else { (connections / 16).clamp(1, 64) }
}

/// One service's share of the budget, for as long as the service exists.
#[derive(Debug)]
pub(crate) struct Share {
    /// The permits reserved for this service; `usize::MAX` if it is the only service and may use
    /// all.
    limit: Arc<ConnectionLimit>,
    budget: Arc<Budget>,
}

/// The part of the budget that a connection counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Only `all`, while there is a single service.
    Any,
    /// The share reserved for its service.
    Share,
    /// The part that all services share.
    Common,
    /// A spare permit for a connection drained from the queue of a worker that has exited, when
    /// there was no other.
    Spare,
}

impl Share {
    /// Adds a share for one more service; the shares of the others shrink.
    pub(crate) fn new(budget: Arc<Budget>) -> Self {
        let limit = Arc::new(ConnectionLimit::new(usize::MAX));
        // Held until all are set: a concurrent `divide` would work with another list of services.
        let mut shares = budget.shares();
        shares.push(Arc::downgrade(&limit));
        budget.divide(&shares);
        drop(shares);
        Self { limit, budget }
    }

    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Counts one more connection. Returns `None` if the limit is reached; every thread is woken
    /// when there may be room.
    pub(crate) fn take(&self) -> Option<Part> {
        let part = match self.limit.limit() {
            usize::MAX => Part::Any,
            _ if self.limit.try_enter() => Part::Share,
            _ if self.budget.common.enter() => Part::Common,
            // `enter`, unlike `try_enter`, also marks that a client waits and has to be woken.
            _ if self.limit.enter() => Part::Share,
            _ => return None,
        };
        if !self.budget.all.enter() {
            if self.give_back_part(part) {
                self.budget.waker.wake_all();
            }
            return None;
        }
        Some(part)
    }

    /// The same for a connection that is drained from the queue of a worker that has exited. The
    /// caller does not wait for a spare permit.
    pub(crate) fn take_spare(&self) -> Option<Part> {
        self.take().or_else(|| self.budget.spare.try_enter().then_some(Part::Spare))
    }

    /// Counts one connection less. Returns whether clients wait that may come in now.
    pub(crate) fn give_back(&self, part: Part) -> bool {
        let is_awaited = self.give_back_part(part);
        let all = match part {
            Part::Spare => self.budget.spare.leave(),
            Part::Any | Part::Share | Part::Common => self.budget.all.leave(),
        };
        is_awaited || all.wake
    }

    /// Gives back the part that is not counted in `all`.
    fn give_back_part(&self, part: Part) -> bool {
        match part {
            Part::Any | Part::Spare => false,
            Part::Share => self.limit.leave().wake,
            Part::Common => self.budget.common.leave().wake,
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let own = Arc::as_ptr(&self.limit);
        let mut shares = self.budget.shares();
        shares.retain(|share| share.as_ptr() != own);
        self.budget.divide(&shares);
    }
}
