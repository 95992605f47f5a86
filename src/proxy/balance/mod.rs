//! Who gets which connection: backends, the pool of them and its algorithms, limits and permits, those
//! that wait, and what is counted.
//!
//! No engine is in here: nothing of sockets that are read or written, of epoll or of a thread's loop.
//! Whoever moves bytes asks for a [`Permit`] and a [`Lease`], waits in a [`WaitList`] where there is
//! none, and says how it went by an [`Outcome`].

mod backend;
mod budget;
mod counters;
mod limit;
mod outcome;
mod permit;
mod pool;
mod service;
mod shortage;
mod wait_list;
mod waker;

use std::{sync::LazyLock, time::Instant};

pub(crate) use backend::Lease;
pub use backend::{Backend, PinnedRoutes, Traffic};
pub(crate) use budget::Budget;
pub use counters::{Reasons, ServiceTally, WorkerTally};
pub(crate) use outcome::{ConnectError, Outcome};
pub(crate) use permit::Permit;
pub use permit::ReservedPermit;
pub use pool::Pool;
pub(crate) use pool::{Choice, NoBackend};
pub use service::ServiceHandle;
pub(crate) use shortage::Shortage;
pub(crate) use wait_list::WaitList;
pub(crate) use waker::Waker;

static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// When `at` was, as one number: nanoseconds since the first time that anybody asked.
fn nanoseconds(at: Instant) -> u64 {
    let since = at.saturating_duration_since(*BEGAN).as_nanos();
    u64::try_from(since).unwrap_or(u64::MAX - 1)
}
