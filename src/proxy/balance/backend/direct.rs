//! What there is to know of connections that the kernel hands to a worker.

use std::{
    io,
    sync::{
        OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
    },
};

use socket2::Socket;

use crate::net::direct::{PinGuard, PinnedRoute};

/// How a worker is reached on its addresses, of which there is one at least.
#[derive(Debug, Clone)]
pub struct PinnedRoutes {
    /// On the first of them.
    pub first: PinnedRoute,
    /// On the others.
    pub others: Vec<PinnedRoute>,
}

impl PinnedRoutes {
    /// How many connections it was given on all of them, if that is counted.
    fn routed(&self) -> Option<u64> {
        std::iter::once(&self.first).chain(&self.others).map(PinnedRoute::routed).sum()
    }
}

/// The connections that the kernel hands to one worker: counted by the program that steers them, and
/// looked up from time to time.
pub(crate) struct Direct {
    routes: PinnedRoutes,
    /// How many it was given, once it gets no more.
    routed: OnceLock<Option<u64>>,
    /// How often it was retired: a sample from before does not say that it is idle.
    epoch: AtomicU32,
    /// The last sample: its epoch in the upper half, the count in the lower one.
    sample: AtomicU64,
}

/// A sample that could not be taken.
const UNKNOWN: u32 = u32::MAX;

impl Direct {
    pub(crate) fn new(routes: PinnedRoutes) -> Self {
        let (epoch, sample) = (AtomicU32::new(0), AtomicU64::new(0));
        Self { routes, routed: OnceLock::new(), epoch, sample }
    }

    /// How many it has, by the last sample; `None` where that can't be told.
    pub(crate) fn connections(&self) -> Option<usize> {
        let sampled = self.sample.load(SeqCst) as u32;
        (sampled != UNKNOWN).then_some(sampled as usize)
    }

    /// How many it was given ever, if that is counted.
    pub(crate) fn routed(&self) -> Option<u64> {
        self.routed.get().copied().unwrap_or_else(|| self.routes.routed())
    }

    pub(crate) fn epoch(&self) -> u32 {
        self.epoch.load(SeqCst)
    }

    pub(crate) fn sampled(&self, epoch: u32, connections: Option<u32>) {
        let count = connections.map_or(UNKNOWN, |count| count.min(UNKNOWN - 1));
        self.sample.store(u64::from(epoch) << 32 | u64::from(count), SeqCst);
    }

    /// Whether a sample since the last retirement has found none.
    pub(crate) fn is_idle(&self) -> bool {
        self.sample.load(SeqCst) == u64::from(self.epoch()) << 32
    }

    /// Samples from before say nothing any more.
    pub(crate) fn retire(&self) {
        self.epoch.fetch_add(1, SeqCst);
    }

    /// It gets none any more, and has none.
    pub(crate) fn left(&self) {
        // It leaves once.
        _ = self.routed.set(self.routes.routed());
        self.sampled(self.epoch(), Some(0));
    }

    /// A socket to connect to the worker with.
    pub(crate) fn open(&self) -> io::Result<(Socket, PinGuard)> {
        self.routes.first.open()
    }
}
