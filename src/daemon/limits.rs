//! Enforces `[service.NAME.limits]`, as far as the system has a part in it.

use tracing::{info, warn};

use super::Daemon;
use crate::process::{Cgroups, NoCgroups};

impl Daemon<'_> {
    /// Has the memory of workers with a memory limit measured.
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

/// Logs which cgroup lbd can use. Returns why the number of workers' processes can't be limited;
/// `None` if it can.
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
