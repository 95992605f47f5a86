//! The connections of one service that wait for a worker, at one thread.
//!
//! Whatever they wait for (a worker to be healthy, or to have room, or something that lbd itself is
//! short of), they wait in one list, in the order in which they came. Only the first looks for a
//! worker, and what it finds is the answer for all: so an event costs the same, however many wait.

use std::{collections::BTreeSet, time::Instant};

/// Who waits, and when the first of them looks again.
#[derive(Debug, Default)]
pub(crate) struct WaitList {
    /// When each came, and its key.
    members: BTreeSet<(Instant, usize)>,
    /// When the first has another look: room in an accept queue comes without anybody telling.
    pub(crate) look_again: Option<Instant>,
    /// Until when the supervisor has time to notice that none of the workers it calls healthy takes a
    /// connection; then those are given up who joined long enough before.
    pub(crate) doubt: Option<Instant>,
    /// The one who has left the list for a look that is not over: it is the first again if that
    /// fails, and until then nobody else looks.
    pub(crate) looking: Option<usize>,
}

impl WaitList {
    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// When the first came, and its key.
    pub(crate) fn first(&self) -> Option<(Instant, usize)> {
        self.members.first().copied()
    }

    pub(crate) fn join(&mut self, came: Instant, key: usize) {
        self.members.insert((came, key));
    }

    pub(crate) fn leave(&mut self, came: Instant, key: usize) {
        self.members.remove(&(came, key));
        if self.members.is_empty() {
            (self.look_again, self.doubt) = (None, None);
        }
    }

    /// When it has to be looked at, whoever is in it.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.look_again.into_iter().chain(self.doubt).min()
    }
}
