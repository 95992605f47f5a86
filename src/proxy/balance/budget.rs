//! How many connections the process may hold, and how the services share that.

use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use super::{BEGAN, limit::ConnectionLimit, waker::Waker};

/// All connections that the process may hold.
#[derive(Debug)]
pub(crate) struct Budget {
    all: ConnectionLimit,
    /// Those of them that no service has for itself.
    common: ConnectionLimit,
    /// A few more, for connections that waited for a worker which is gone.
    spare: ConnectionLimit,
    /// Those that each service has for itself.
    shares: Mutex<Vec<Weak<ConnectionLimit>>>,
    waker: Arc<Waker>,
}

impl Budget {
    /// Of so many connections; `waker` wakes those that were turned away.
    pub(crate) fn new(connections: usize, waker: Arc<Waker>) -> Self {
        // What comes later is counted from here.
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

    /// How many there may be, but for the few that are kept for those that waited for a worker
    /// which is gone.
    pub(crate) fn limit(&self) -> usize {
        self.all.limit()
    }

    pub(crate) fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Half of it is divided among the services, so that none can take all from another; the other
    /// half is for whoever comes first. What a service holds beyond its share when that becomes
    /// smaller, it keeps.
    fn divide(&self, shares: &[Weak<ConnectionLimit>]) {
        let all = self.all.limit();
        let share = match shares.len() {
            0 | 1 => usize::MAX,
            // All of it, where there is not even one for each.
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

/// How many of so many connections are kept for those that waited for a worker which is gone.
///
/// Their clients are counted already where they came through lbd, perhaps as all there may be.
fn spare(connections: usize) -> usize {
    if connections <= 8 { 0 } else { (connections / 16).clamp(1, 64) }
}

/// One service's part in the budget, from its beginning to its end.
#[derive(Debug)]
pub(crate) struct Share {
    /// How many no other service can take from it; all, with `usize::MAX`, where it is the only one.
    limit: Arc<ConnectionLimit>,
    budget: Arc<Budget>,
}

/// What one connection was counted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// One of all, where there is only one service.
    Any,
    /// One that no other service could have taken.
    Share,
    /// One of those that are for whoever comes first.
    Common,
    /// One for a connection that waited for a worker which is gone, when there were no others.
    Spare,
}

impl Share {
    /// A share for one more service; those of the others become smaller.
    pub(crate) fn new(budget: Arc<Budget>) -> Self {
        let limit = Arc::new(ConnectionLimit::new(usize::MAX));
        // Until all are set: another that divides meanwhile knows of other services.
        let mut shares = budget.shares();
        shares.push(Arc::downgrade(&limit));
        budget.divide(&shares);
        drop(shares);
        Self { limit, budget }
    }

    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Counts one more connection; `None` where there may be no more, and every thread is woken when
    /// there may be.
    pub(crate) fn take(&self) -> Option<Part> {
        let part = match self.limit.limit() {
            usize::MAX => Part::Any,
            _ if self.limit.try_enter() => Part::Share,
            _ if self.budget.common.enter() => Part::Common,
            // Marks that one waits for it, which has to be told.
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

    /// The same for a connection that waited for a worker which is gone. Nobody waits for this one.
    pub(crate) fn take_spare(&self) -> Option<Part> {
        self.take().or_else(|| self.budget.spare.try_enter().then_some(Part::Spare))
    }

    /// One connection less. Whether somebody waits who may come in now.
    pub(crate) fn give_back(&self, part: Part) -> bool {
        let is_awaited = self.give_back_part(part);
        let all = match part {
            Part::Spare => self.budget.spare.leave(),
            Part::Any | Part::Share | Part::Common => self.budget.all.leave(),
        };
        is_awaited || all.wake
    }

    /// What it is besides one of all.
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
