//! The connections that the kernel hands to a worker: routes, counts and samples.

use std::{
    io,
    sync::{
        OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
    },
};

use socket2::Socket;

use crate::net::direct::{PinGuard, PinnedRoute};

/// The routes to a worker on its public addresses, of which there is at least one.
#[derive(Debug, Clone)]
pub struct PinnedRoutes {
    /// The route on the first address.
    pub first: PinnedRoute,
    /// The routes on the other addresses.
    pub others: Vec<PinnedRoute>,
}

impl PinnedRoutes {
    /// How many connections the worker was given on all addresses, if that is counted.
    fn routed(&self) -> Option<u64> {
        std::iter::once(&self.first).chain(&self.others).map(PinnedRoute::routed).sum()
    }
}

/// The connections that the kernel hands to one worker. The program that steers them counts them as
/// they come; how many are open is sampled from time to time.
pub(crate) struct Direct {
    routes: PinnedRoutes,
    /// The final number of connections, set once the worker gets no more.
    routed: OnceLock<Option<u64>>,
    /// How often the worker was retired. A sample from an earlier epoch does not prove that it is
    /// idle.
    epoch: AtomicU32,
    /// The last sample: its epoch in the upper half, the count in the lower half.
    sample: AtomicU64,
}

/// The count of a sample that could not be taken.
const UNKNOWN: u32 = u32::MAX;

impl Direct {
    pub(crate) fn new(routes: PinnedRoutes) -> Self {
        let (epoch, sample) = (AtomicU32::new(0), AtomicU64::new(0));
        Self { routes, routed: OnceLock::new(), epoch, sample }
    }

    /// How many connections are open, by the last sample; `None` if that is not known.
    pub(crate) fn connections(&self) -> Option<usize> {
        let sampled = self.sample.load(SeqCst) as u32;
        (sampled != UNKNOWN).then_some(sampled as usize)
    }

    /// How many connections the worker was ever given, if that is counted.
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

    /// Whether a sample since the last retirement found no connection.
    pub(crate) fn is_idle(&self) -> bool {
        self.sample.load(SeqCst) == u64::from(self.epoch()) << 32
    }

    /// Begins a new epoch: earlier samples no longer count.
    pub(crate) fn retire(&self) {
        self.epoch.fetch_add(1, SeqCst);
    }

    /// The worker gets no more connections, and has none.
    pub(crate) fn left(&self) {
        // A worker leaves only once, so the cell is empty.
        _ = self.routed.set(self.routes.routed());
        self.sampled(self.epoch(), Some(0));
    }

    /// A socket to connect to the worker, and the guard that routes the connection to it.
    pub(crate) fn open(&self) -> io::Result<(Socket, PinGuard)> {
        self.routes.first.open()
    }
}
