//! Workers that are replaced at nobody's order: past `memory` or `max-age`, unhealthy for too long, or
//! on another port than their slot's. Each is replaced as in a rolling restart, one at a time. What
//! somebody does order goes first.

use std::time::{Duration, Instant};

use super::{
    backoff::Backoff,
    event::{Down, DownKind, Fact, LimitExceeded, ProbeOutcome, WorkerId},
    ports::Ports,
    rollout::{Beside, Kind, Rollout},
    service::{Context, Service},
    slot::{Slot, note_of},
    worker::{Phase, Worker},
};
use crate::config::{Limits, Restart};

/// How much earlier than `max-age` a worker may be due, as a part of it.
const SPREAD: f64 = 0.1;

/// When the worker of a slot may be replaced for its memory or age.
#[derive(Debug, Clone, Default)]
pub struct Recycling {
    backoff: Backoff,
    not_before: Option<Instant>,
}

impl Recycling {
    /// Puts off the next one: longer and longer while replacements fail or are soon past the limit
    /// themselves, not at all where the last worker had `reset-after` of health.
    fn put_off(
        &mut self,
        healthy: Duration,
        failure: DownKind,
        restart: &Restart,
        now: Instant,
        random: f64,
    ) -> Duration {
        let delay = self.backoff.failed(healthy, failure, restart, random);
        self.not_before = Some(now + delay);
        delay
    }
}

/// What a worker has used up of its limits.
#[derive(Debug, Clone, Default)]
pub struct LimitUsage {
    /// Its memory when it was last measured, in bytes.
    pub resident: Option<u64>,
    /// Since when it has more than it may, as far as was measured.
    outgrown: Option<Instant>,
    /// By which part of `max-age` it is due earlier.
    early: f64,
}

impl LimitUsage {
    /// That of a new worker.
    pub(super) fn new(random: &mut fastrand::Rng) -> Self {
        Self { early: SPREAD * random.f64(), ..Self::default() }
    }

    fn over_memory(&self, limits: &Limits) -> Option<LimitExceeded> {
        let (bytes, limit) = (self.resident?, limits.memory?.get());
        (bytes > limit).then_some(LimitExceeded::Memory { bytes, limit })
    }
}

impl Worker {
    /// Its memory was measured.
    pub(super) fn measured(&mut self, bytes: u64, limits: &Limits, now: Instant) {
        let usage = &mut self.usage;
        usage.resident = Some(bytes);
        usage.outgrown = usage.over_memory(limits).and(usage.outgrown.or(Some(now)));
    }

    /// Since when it is to be replaced, or when it will be if nothing changes.
    fn worn_at(&self, limits: &Limits, restart: &Restart) -> Option<Instant> {
        match self.phase {
            Phase::Healthy if self.stands_in || self.usage.over_memory(limits).is_some() => {
                Some(self.started)
            }
            Phase::Healthy => {
                limits.max_age.map(|age| self.started + age.mul_f64(1.0 - self.usage.early))
            }
            Phase::Unhealthy => Some(self.since + restart.unhealthy_after),
            Phase::Launching
            | Phase::Starting
            | Phase::Draining { .. }
            | Phase::Stopping { .. }
            | Phase::Ended => None,
        }
    }

    /// Why it is to be replaced, once it is.
    fn worn(&self, limits: &Limits, now: Instant) -> Option<LimitExceeded> {
        if self.phase == Phase::Unhealthy {
            return Some(LimitExceeded::Unhealthy {
                time: now.saturating_duration_since(self.since),
            });
        }
        if self.stands_in {
            return Some(LimitExceeded::StandIn);
        }
        let age = now.saturating_duration_since(self.started);
        let by_age = || limits.max_age.map(|limit| LimitExceeded::Age { age, limit });
        self.usage.over_memory(limits).or_else(by_age)
    }
}

impl Service {
    /// When [`Self::begin_recycling`] has something to do, if nothing happens before.
    pub(super) fn recycling_deadline(&self, ports: &Ports) -> Option<Instant> {
        // The end of a rollout looks for itself.
        let may = self.is_open() && self.rollout.is_none();
        let due = |slot| self.recycling_due(slot, ports);
        self.slots.iter().filter(|_| may).filter_map(due).min()
    }

    /// Begins to replace the first worker that is due; whether there was one. Not to be called while
    /// a rollout is under way.
    pub(super) fn begin_recycling(&mut self, ports: &Ports, cx: &mut Context<'_>) -> bool {
        let due = |slot: &&Slot| self.recycling_due(slot, ports).is_some_and(|at| at <= cx.now);
        let Some(slot) = self.slots.iter().filter(|_| self.is_open()).find(due) else {
            return false;
        };
        let Some(worker) = &slot.current else { return false };
        let Some(worn) = worker.worn(&self.config.limits, cx.now) else { return false };
        let (number, subject) = (slot.number, note_of(worker));
        let fact = match worn {
            LimitExceeded::Memory { .. } | LimitExceeded::Age { .. } | LimitExceeded::StandIn => {
                Fact::Recycling { worn }
            }
            LimitExceeded::Unhealthy { .. } => {
                let shown = humantime::format_duration(self.config.restart.unhealthy_after);
                let error = worker.last_probe.as_ref().and_then(ProbeOutcome::error);
                let error = error.map_or_else(String::new, |error| format!(": {error}"));
                Fact::Down {
                    how: Down::NotHealthy(format!("unhealthy for {shown}{error}")),
                    restart_in: None,
                    failures: slot.backoff.failures(),
                    was_healthy: true,
                }
            }
        };
        self.note_of(subject, fact, cx);
        self.begin_rollout([number].into(), None, None, Kind::Recycle(worn), cx);
        true
    }

    /// The worker `id` makes way. If it was soon past its memory or unhealthy, so may its successor be.
    pub(super) fn outgrown(&mut self, id: WorkerId, cx: &mut Context<'_>) {
        let worn = self.rollout.as_ref().and_then(Rollout::recycles);
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.holds(id)) else { return };
        let worker = slot.current.as_ref().filter(|worker| worker.id == id);
        match (worn, worker) {
            (
                Some(LimitExceeded::Memory { .. } | LimitExceeded::Unhealthy { .. }),
                Some(worker),
            ) => {
                // Not the time for which it was put off: that would forgive every other one.
                let until = worker.usage.outgrown.unwrap_or(cx.now);
                let healthy = match worker.phase {
                    Phase::Unhealthy => worker.longest_health(cx.now),
                    _ => until.saturating_duration_since(worker.since),
                };
                let random = cx.shared.random.f64();
                let (failure, restart) = (DownKind::NotHealthy, &self.config.restart);
                slot.recycling.put_off(healthy, failure, restart, cx.now, random);
            }
            // It came in the stead of such a one, perhaps.
            (Some(LimitExceeded::StandIn), Some(_)) => {}
            (Some(LimitExceeded::Age { .. }) | None, _) | (_, None) => {
                slot.recycling = Recycling::default();
            }
        }
    }

    /// The replacement in the slot at `index` failed: the old one stays until the next attempt.
    pub(super) fn recycling_failed(
        &mut self,
        index: usize,
        reason: &str,
        failure: DownKind,
        cx: &mut Context<'_>,
    ) {
        let (restart, random) = (&self.config.restart, cx.shared.random.f64());
        let slot = &mut self.slots[index];
        let retry_in = slot.recycling.put_off(Duration::ZERO, failure, restart, cx.now, random);
        if let Some(subject) = slot.current.as_ref().map(note_of) {
            self.note_of(subject, Fact::NotRecycled { reason: reason.to_owned(), retry_in }, cx);
        }
    }

    /// When the worker in `slot` is to be replaced at nobody's order, by all that is known.
    fn recycling_due(&self, slot: &Slot, ports: &Ports) -> Option<Instant> {
        // Others need not wait for one that itself has to wait.
        let may = !slot.drained && !slot.leaving && self.beside(slot, ports) != Beside::Later;
        let worker = slot.current.as_ref().filter(|_| may)?;
        let worn = worker.worn_at(&self.config.limits, &self.config.restart)?;
        Some(slot.recycling.not_before.map_or(worn, |at| at.max(worn)))
    }
}
