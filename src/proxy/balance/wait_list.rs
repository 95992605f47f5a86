//! The wait list: the connections of one service that wait for a worker on one thread.
//!
//! Whatever a connection waits for (a healthy worker, room on a worker, or a resource of lbd
//! itself), it waits in this one list, in order of arrival. Only the first connection looks for a
//! worker, and its result stands for all behind it. So an event costs the same, however many
//! connections wait.

use std::{collections::BTreeSet, time::Instant};

/// The waiting connections, and when the first of them looks again.
#[derive(Debug, Default)]
pub(crate) struct WaitList {
    /// The arrival time and key of each connection.
    members: BTreeSet<(Instant, usize)>,
    /// When the first connection looks again: an accept queue that gets room notifies no one.
    pub(crate) look_again: Option<Instant>,
    /// Set when every worker that the supervisor considers healthy refused a connection: the time
    /// until which the supervisor may notice that. Then the connections that joined long enough
    /// before are given up.
    pub(crate) doubt: Option<Instant>,
    /// The connection that has left the list for an attempt in progress. If the attempt fails it is
    /// first again; until then no other connection looks.
    pub(crate) looking: Option<usize>,
}

impl WaitList {
    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The arrival time and key of the first connection.
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

    /// When the list itself needs attention, whichever connections are in it.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.look_again.into_iter().chain(self.doubt).min()
    }
}
