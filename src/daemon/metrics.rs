//! Collects the metrics, except for what is read from `/proc`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::Daemon;
use crate::{
    admin::{metrics, status},
    proxy::ServiceTally,
    supervisor::{self, ExitCause},
};

impl Daemon<'_> {
    /// The content of `/metrics`. State, pid and restarts are the same as in `/status`.
    pub(super) fn metrics(&mut self) -> metrics::Snapshot {
        self.forget_slots();
        let status = self.status();
        let now = Instant::now();
        let services = self.supervisor.services().zip(&status.services);
        let services: Vec<_> = services
            .map(|(service, shown)| {
                let route = self.frontends.service(&service.config.name);
                let counted = route.map(|route| route.tally()).unwrap_or_default();
                let waiting = route.map_or(0, |route| route.waiting());
                let mut slots = BTreeMap::new();
                // A slot that a reload removed is shown for as long as its worker exists.
                for worker in shown.retiring.iter().chain(&shown.workers) {
                    slots.insert(worker.slot, slot(service, worker, now));
                }
                self::service(shown.name.clone(), waiting, &counted, slots)
            })
            .collect();
        let mut snapshot = metrics::Snapshot {
            reloads: self.reload_history.counts(),
            dropped_log_lines: self.logging.dropped_lines() as u64,
            services,
        };
        for service in &mut snapshot.services {
            let known = self.supervisor.service(&service.name);
            for slot in &mut service.slots {
                let workers = known.into_iter().flat_map(supervisor::Service::workers);
                let workers = workers.filter(|worker| worker.slot == slot.number);
                slot.guards = workers.filter_map(|worker| self.workers.guard(worker.id)).collect();
                let entry = self.workers.slot_stats.read(&service.name, slot.number);
                slot.active = entry.active.map(|active| active as u64);
                slot.total = slot.total.and(Some(entry.tally.total));
                slot.sent = slot.sent.and(Some(entry.tally.sent));
                slot.received = slot.received.and(Some(entry.tally.received));
                slot.connect = entry.tally.connect;
                slot.duration = entry.tally.duration;
                slot.connect_failures = entry.tally.refusals().to_vec();
                slot.failures = entry.tally.failures().to_vec();
                slot.probes_passed = entry.probes.passed;
                slot.probes_failed = entry.probes.failed;
                slot.probe = entry.probes.took;
            }
        }
        snapshot
    }

    /// Forgets the counters of slots that are gone, so that their memory is bounded by the
    /// configuration even if nobody reads the metrics.
    pub(super) fn forget_slots(&mut self) {
        let supervisor = &self.supervisor;
        self.workers.slot_stats.retain(|name, number| {
            supervisor.service(name).is_some_and(|service| {
                service.slots.iter().any(|slot| slot.number == number)
                    || service.retiring.iter().any(|worker| worker.slot == number)
            })
        });
    }
}

fn service(
    name: String,
    waiting: usize,
    counted: &ServiceTally,
    slots: BTreeMap<u32, metrics::Slot>,
) -> metrics::Service {
    metrics::Service {
        name,
        waiting: waiting as u64,
        held: counted.held,
        hold: counted.hold,
        retried: counted.retried,
        rescued: counted.rescued,
        failures: counted.failures().to_vec(),
        slots: slots.into_values().collect(),
    }
}

/// The slot of the worker `shown`, without the counters of its connections and probes.
fn slot(service: &supervisor::Service, shown: &status::Worker, now: Instant) -> metrics::Slot {
    let slot = service.slots.iter().find(|slot| slot.number == shown.slot);
    let backoff = slot.filter(|slot| slot.is_vacant()).map(|slot| slot.start_at - now);
    let exits = slot.map(|slot| slot.exits).unwrap_or_default();
    metrics::Slot {
        number: shown.slot,
        state: Some(shown.state),
        pid: shown.pid,
        guard: shown.guard,
        resident: shown.resident_bytes,
        restarts: shown.restarts,
        failures_in_a_row: slot.map_or(0, |slot| slot.backoff.failures()),
        backoff: backoff.unwrap_or(Duration::ZERO),
        // Only whether they are known; the totals are filled in later.
        total: shown.connections.total,
        sent: shown.bytes.sent,
        received: shown.bytes.received,
        queued: shown.connections.queued,
        exits: ExitCause::ALL.iter().map(|cause| (cause.name(), exits[*cause as usize])).collect(),
        ..metrics::Slot::default()
    }
}
