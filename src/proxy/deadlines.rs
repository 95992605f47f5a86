//! Deadlines without timers.
//!
//! Connections that wait for the same thing wait equally long, so that a list in the order in which
//! they began to wait is in the order of their deadlines too. The list runs through the connections
//! themselves: 24 bytes each, and joining, leaving and looking at the first take constant time.

use std::time::Instant;

use slab::Slab;

use super::connection::Connection;

const NIL: u32 = u32::MAX;

/// A connection's place in its queue.
#[derive(Debug)]
pub(super) struct Links {
    /// Since when it waits.
    pub(super) since: Instant,
    before: u32,
    after: u32,
}

impl Links {
    pub(super) fn new(since: Instant) -> Self {
        Self { since, before: NIL, after: NIL }
    }
}

/// The connections that wait for one thing, longest first.
#[derive(Debug)]
pub(super) struct DeadlineList {
    first: u32,
    last: u32,
}

impl DeadlineList {
    pub(super) fn new() -> Self {
        Self { first: NIL, last: NIL }
    }

    pub(super) fn first(&self) -> Option<usize> {
        (self.first != NIL).then_some(self.first as usize)
    }

    /// All of them, in order.
    pub(super) fn iter(&self, all: &Slab<Connection>) -> impl Iterator<Item = usize> {
        let after = |key: &usize| {
            let Links { after, .. } = all[*key].links;
            (after != NIL).then_some(after as usize)
        };
        std::iter::successors(self.first(), after)
    }

    /// Puts a connection last that begins to wait now.
    pub(super) fn push(&mut self, all: &mut Slab<Connection>, key: usize, now: Instant) {
        let before = std::mem::replace(&mut self.last, key as u32);
        match before {
            NIL => self.first = key as u32,
            _ => all[before as usize].links.after = key as u32,
        }
        all[key].links = Links { since: now, before, after: NIL };
    }

    pub(super) fn remove(&mut self, all: &mut Slab<Connection>, key: usize) {
        let Links { before, after, .. } = all[key].links;
        match before {
            NIL => self.first = after,
            _ => all[before as usize].links.after = after,
        }
        match after {
            NIL => self.last = before,
            _ => all[after as usize].links.before = before,
        }
    }
}
