//! Deadlines without timers.
//!
//! Connections that wait for the same thing have the same timeout, so a list in the order in which
//! they began to wait is also in the order of their deadlines. The list is linked through the
//! connections themselves: 24 bytes each. Joining, leaving and looking at the first take constant
//! time.

use std::time::Instant;

use slab::Slab;

const NIL: u32 = u32::MAX;

/// A connection's neighbours in the list that it is in.
#[derive(Debug)]
pub(in crate::proxy) struct Links {
    /// When it began to wait.
    pub(in crate::proxy) since: Instant,
    before: u32,
    after: u32,
}

impl Links {
    pub(in crate::proxy) fn new(since: Instant) -> Self {
        Self { since, before: NIL, after: NIL }
    }
}

/// A member of a list, which contains its own links.
pub(in crate::proxy) trait Linked {
    fn links(&self) -> &Links;
    fn links_mut(&mut self) -> &mut Links;
}

/// A list of connections that wait for one thing, longest waiting first.
#[derive(Debug)]
pub(in crate::proxy) struct DeadlineList {
    first: u32,
    last: u32,
}

impl Default for DeadlineList {
    fn default() -> Self {
        Self { first: NIL, last: NIL }
    }
}

impl DeadlineList {
    pub(in crate::proxy) fn first(&self) -> Option<usize> {
        (self.first != NIL).then_some(self.first as usize)
    }

    /// The keys of all connections, in order.
    pub(in crate::proxy) fn iter(&self, all: &Slab<impl Linked>) -> impl Iterator<Item = usize> {
        let after = |key: &usize| {
            let Links { after, .. } = *all[*key].links();
            (after != NIL).then_some(after as usize)
        };
        std::iter::successors(self.first(), after)
    }

    /// Appends a connection that begins to wait now.
    pub(in crate::proxy) fn push(&mut self, all: &mut Slab<impl Linked>, key: usize, now: Instant) {
        let before = std::mem::replace(&mut self.last, key as u32);
        match before {
            NIL => self.first = key as u32,
            _ => all[before as usize].links_mut().after = key as u32,
        }
        *all[key].links_mut() = Links { since: now, before, after: NIL };
    }

    pub(in crate::proxy) fn remove(&mut self, all: &mut Slab<impl Linked>, key: usize) {
        let Links { before, after, .. } = *all[key].links();
        match before {
            NIL => self.first = after,
            _ => all[before as usize].links_mut().after = after,
        }
        match after {
            NIL => self.last = before,
            _ => all[after as usize].links_mut().before = before,
        }
    }
}
