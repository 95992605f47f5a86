//! Load balancing: backends, the pool and its algorithms, limits and permits, wait lists, and
//! counters.
//!
//! This module knows no engine: it neither reads nor writes sockets, and knows nothing of epoll or
//! of a thread's loop. An engine takes a [`Permit`] and a [`Lease`] for a connection, puts the
//! connection on a [`WaitList`] if no backend is available, and reports the result as an
//! [`Outcome`].

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

/// Converts `at` to nanoseconds since `BEGAN`, which is set when it is first used.
fn nanoseconds(at: Instant) -> u64 {
    let since = at.saturating_duration_since(*BEGAN).as_nanos();
    u64::try_from(since).unwrap_or(u64::MAX - 1)
}
