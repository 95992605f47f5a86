//! Recycling: replacing workers without a request. A worker is due when it exceeds `memory` or
//! `max-age`, when it has been unhealthy for too long, or when it is a stand-in on another port
//! than its slot's. Each is replaced as in a rolling restart, one at a time. Reloads and restarts
//! that somebody asks for take precedence.

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

/// How much earlier than `max-age` a worker may be replaced, as a fraction of `max-age`, so that
/// workers that were started together are not due together.
const SPREAD: f64 = 0.1;

/// When the worker of a slot may be recycled.
#[derive(Debug, Clone, Default)]
pub struct Recycling {
    backoff: Backoff,
    not_before: Option<Instant>,
}

impl Recycling {
    /// Delays the slot's next recycling: longer and longer while replacements fail or soon exceed
    /// the limit themselves; not at all if the last worker was healthy for `reset-after`.
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
    /// The worker's memory at the last measurement, in bytes.
    pub resident: Option<u64>,
    /// When a measurement first found it above the memory limit.
    outgrown: Option<Instant>,
    /// By which fraction of `max-age` it is due earlier.
    early: f64,
}

impl LimitUsage {
    pub(super) fn new(random: &mut fastrand::Rng) -> Self {
        Self { early: SPREAD * random.f64(), ..Self::default() }
    }

    fn over_memory(&self, limits: &Limits) -> Option<LimitExceeded> {
        let (bytes, limit) = (self.resident?, limits.memory?.get());
        (bytes > limit).then_some(LimitExceeded::Memory { bytes, limit })
    }
}

impl Worker {
    /// Records a measurement of the worker's memory.
    pub(super) fn measured(&mut self, bytes: u64, limits: &Limits, now: Instant) {
        let usage = &mut self.usage;
        usage.resident = Some(bytes);
        usage.outgrown = usage.over_memory(limits).and(usage.outgrown.or(Some(now)));
    }

    /// When the worker becomes due for replacement, if nothing changes; in the past if it is due
    /// already.
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

    /// Why the worker is replaced, once it is due.
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
    /// When to call [`Self::begin_recycling`] next, if nothing happens before.
    pub(super) fn recycling_deadline(&self, ports: &Ports) -> Option<Instant> {
        // When a rollout ends, it checks by itself whether a worker is due.
        let may = self.is_open() && self.rollout.is_none();
        let due = |slot| self.recycling_due(slot, ports);
        self.slots.iter().filter(|_| may).filter_map(due).min()
    }

    /// Begins to replace the first worker that is due; returns whether there was one. Not to be
    /// called while a rollout is under way.
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

    /// The worker `id` is being replaced. If it exceeded its memory limit or became unhealthy soon,
    /// its successor may do the same, and the slot's next recycling is delayed.
    pub(super) fn outgrown(&mut self, id: WorkerId, cx: &mut Context<'_>) {
        let worn = self.rollout.as_ref().and_then(Rollout::recycles);
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.holds(id)) else { return };
        let worker = slot.current.as_ref().filter(|worker| worker.id == id);
        match (worn, worker) {
            (
                Some(LimitExceeded::Memory { .. } | LimitExceeded::Unhealthy { .. }),
                Some(worker),
            ) => {
                // Only the time until the limit was exceeded counts as health. If the delay before
                // the replacement counted too, every second delay would be reset.
                let until = worker.usage.outgrown.unwrap_or(cx.now);
                let healthy = match worker.phase {
                    Phase::Unhealthy => worker.longest_health(cx.now),
                    _ => until.saturating_duration_since(worker.since),
                };
                let random = cx.shared.random.f64();
                let (failure, restart) = (DownKind::NotHealthy, &self.config.restart);
                slot.recycling.put_off(healthy, failure, restart, cx.now, random);
            }
            // The stand-in may itself have replaced a worker that exceeded a limit: keep the delay.
            (Some(LimitExceeded::StandIn), Some(_)) => {}
            (Some(LimitExceeded::Age { .. }) | None, _) | (_, None) => {
                slot.recycling = Recycling::default();
            }
        }
    }

    /// The replacement in the slot at `index` failed: the old worker stays until the next attempt.
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

    /// When the worker in `slot` is due to be recycled; `None` if nothing is planned.
    fn recycling_due(&self, slot: &Slot, ports: &Ports) -> Option<Instant> {
        // A slot that must wait for its port is passed over, so that other slots need not wait for
        // it.
        let may = !slot.drained && !slot.leaving && self.beside(slot, ports) != Beside::Later;
        let worker = slot.current.as_ref().filter(|_| may)?;
        let worn = worker.worn_at(&self.config.limits, &self.config.restart)?;
        Some(slot.recycling.not_before.map_or(worn, |at| at.max(worn)))
    }
}
