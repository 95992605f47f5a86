//! What the machine does for `[service.NAME.limits]`.

use tracing::{info, warn};

use super::Daemon;
use crate::process::{Cgroups, NoCgroups};

impl Daemon<'_> {
    /// Has the memory measured of the workers that may have only so much.
    pub(super) fn measure(&mut self) {
        let services = self.supervisor.services();
        let limits = services.filter_map(|s| Some((s, s.config.limits.memory?.get())));
        let workers = limits.flat_map(|(service, limit)| {
            let current = service.slots.iter().filter_map(|slot| slot.current.as_ref());
            current.map(move |worker| (worker.id, limit))
        });
        self.workers.measure(workers);
    }
}

/// Says in the log which cgroup there is, and returns why workers' processes can't be limited, where
/// they can't.
pub(super) fn no_process_limits(cgroups: &Result<Cgroups, NoCgroups>) -> Option<String> {
    match cgroups {
        Ok(cgroups) => {
            let why = cgroups.can_limit_processes().err();
            let path = cgroups.path().display();
            info!(%path, process_limits = why.is_none(), "a cgroup for each worker");
            why.map(str::to_owned)
        }
        Err(error) => {
            if let NoCgroups::Denied(..) = error {
                warn!(%error, "workers have no cgroups");
            }
            Some(error.to_string())
        }
    }
}
