//! What is measured of the workers: memory, and connections that they have without lbd.

use std::sync::Arc;

use super::{Fleet, Sampled};
use crate::{
    control::{Event, WorkerId},
    process::{ConnectionGauge, Counted, MemoryGauge, Watched},
};

impl Fleet {
    /// The process id of its guard, while there is one.
    pub(in crate::daemon) fn guard(&self, id: WorkerId) -> Option<i32> {
        self.members.get(&id).map(|member| member.guard)
    }

    /// Has the connections counted of those that have them without lbd.
    pub(super) fn count_connections(&mut self) {
        let direct = self.members.values().filter(|member| member.way.is_some());
        let workers: Vec<_> = direct
            .map(|member| Counted {
                guard: member.guard,
                urgent: member.retired,
                subject: (Arc::clone(&member.upstream), member.upstream.epoch()),
            })
            .collect();
        if workers.is_empty() && self.connections.is_none() {
            return;
        }
        let start = || {
            ConnectionGauge::start(|(upstream, epoch): &Sampled, count| {
                upstream.sampled(*epoch, count);
            })
        };
        match self.connections.take().map_or_else(start, Ok) {
            Ok(gauge) => {
                gauge.watch(self.publics.addresses(), workers);
                self.connections = Some(gauge);
            }
            Err(error) => tracing::warn!(%error, "cannot count the workers' connections"),
        }
    }

    /// These workers' memory is measured from now on, and told as events; the number is the limit.
    pub(in crate::daemon) fn measure(&mut self, limits: impl Iterator<Item = (WorkerId, u64)>) {
        let member = |(id, limit): (WorkerId, u64)| {
            let guard = self.members.get(&id)?.guard;
            Some(Watched { id: id.0, guard, limit })
        };
        let watched: Vec<Watched> = limits.filter_map(member).collect();
        if watched == self.watched {
            return;
        }
        let events = self.events.clone();
        let start = || {
            MemoryGauge::start(move |id, bytes| {
                // Fails only where the daemon has ended.
                let _ = events.blocking_send(Event::Memory { id: WorkerId(id), bytes });
            })
        };
        match self.gauge.take().map_or_else(start, Ok) {
            Ok(gauge) => {
                gauge.watch(watched.clone());
                self.gauge = Some(gauge);
                self.watched = watched;
            }
            Err(error) => tracing::warn!(%error, "cannot measure the workers' memory"),
        }
    }
}
