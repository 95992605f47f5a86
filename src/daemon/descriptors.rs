//! How many file descriptors lbd may have, and how they are divided up.

use std::num::{NonZeroU32, NonZeroUsize};

use crate::admin;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Descriptors that are not for clients: for standard streams, log, event loops, signals …
const OWN: u64 = 40;
/// … for each listener of the admin API itself and its connections …
const PER_ADMIN: u64 = 1 + admin::MAX_CONNECTIONS as u64;
/// … and for each worker its guard's channel and handle, its output, its socket and the way to
/// it, its cgroup and its probe.
const PER_WORKER: u64 = 9;

/// The limits on file descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptors {
    /// The soft limit that lbd was started with, which its workers get back.
    pub(super) inherited: u64,
    /// The limit now in force.
    pub(super) limit: u64,
}

impl Descriptors {
    /// Raises the soft limit to the hard one (getrlimit(2), `RLIMIT_NOFILE`). If that is not
    /// allowed, the soft limit stays.
    pub(super) fn raise() -> Self {
        let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
            return Self { inherited: 1024, limit: 1024 };
        };
        let raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
        Self { inherited: soft, limit: if raised { hard } else { soft } }
    }

    /// The soft and the hard limit of a worker: the limit that is configured for it, or else what
    /// lbd was started with.
    pub(super) fn of_worker(self, set: Option<NonZeroU32>) -> (u64, u64) {
        set.map_or((self.inherited, self.limit), |most| (most.get().into(), most.get().into()))
    }

    /// How many connections may be held at once such that descriptors remain for probes, restarts
    /// and reloads: each connection needs two.
    ///
    /// `admin_addresses` is how many addresses the admin API has besides its unix socket.
    pub(super) fn connections(self, workers: usize, admin_addresses: usize) -> NonZeroUsize {
        let of = |each: u64, count| each.saturating_mul(u64::try_from(count).unwrap_or(u64::MAX));
        let admin = of(PER_ADMIN, admin_addresses.saturating_add(1));
        let kept = OWN.saturating_add(admin).saturating_add(of(PER_WORKER, workers));
        let pairs = usize::try_from(self.limit.saturating_sub(kept) / 2).unwrap_or(usize::MAX);
        NonZeroUsize::new(pairs).unwrap_or(NonZeroUsize::MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_are_kept_for_the_workers() {
        let of = |limit| Descriptors { inherited: limit, limit };
        assert_eq!(of(1024).connections(4, 0).get(), 465);
        assert_eq!(of(1024).connections(4, 1).get(), 457);
        assert_eq!(of(128).connections(4, 0).get(), 17);
        assert_eq!(of(20).connections(4, 0).get(), 1, "never none at all");
    }
}
