//! Workers past `memory` or `max-age`: each is replaced as in a rolling restart, one at a time, at
//! nobody's order. What somebody does order goes first.

use std::time::{Duration, Instant};

use super::{
    backoff::Backoff,
    event::{Fact, WorkerId, Worn},
    rollout::{Kind, Rollout},
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
        restart: &Restart,
        now: Instant,
        random: f64,
    ) -> Duration {
        let delay = self.backoff.failed(healthy, restart, random);
        self.not_before = Some(now + delay);
        delay
    }
}

/// What a worker has used up of its limits.
#[derive(Debug, Clone, Default)]
pub struct Wear {
    /// Its memory when it was last measured, in bytes.
    pub resident: Option<u64>,
    /// Since when it has more than it may, as far as was measured.
    outgrown: Option<Instant>,
    /// By which part of `max-age` it is due earlier.
    early: f64,
}

impl Wear {
    /// That of a new worker.
    pub(super) fn new(random: &mut fastrand::Rng) -> Self {
        Self { early: SPREAD * random.f64(), ..Self::default() }
    }

    fn over_memory(&self, limits: &Limits) -> Option<Worn> {
        let (bytes, limit) = (self.resident?, limits.memory?.get());
        (bytes > limit).then_some(Worn::Memory { bytes, limit })
    }
}

impl Worker {
    /// Its memory was measured.
    pub(super) fn measured(&mut self, bytes: u64, limits: &Limits, now: Instant) {
        let wear = &mut self.wear;
        wear.resident = Some(bytes);
        wear.outgrown = wear.over_memory(limits).and(wear.outgrown.or(Some(now)));
    }

    /// Since when it is past one of the `limits`, or when it will be if nothing changes.
    fn worn_at(&self, limits: &Limits) -> Option<Instant> {
        if self.wear.over_memory(limits).is_some() {
            return Some(self.started);
        }
        limits.max_age.map(|age| self.started + age.mul_f64(1.0 - self.wear.early))
    }

    /// Which of the `limits` it is past, once it is past one.
    fn worn(&self, limits: &Limits, now: Instant) -> Option<Worn> {
        let age = now.saturating_duration_since(self.started);
        let by_age = || limits.max_age.map(|limit| Worn::Age { age, limit });
        self.wear.over_memory(limits).or_else(by_age)
    }
}

impl Service {
    /// When [`Self::begin_recycling`] has something to do, if nothing happens before.
    pub(super) fn recycling_deadline(&self) -> Option<Instant> {
        // The end of a rollout looks for itself.
        let may = self.is_open() && self.rollout.is_none();
        self.slots.iter().filter(|_| may).filter_map(|slot| self.recycling_due(slot)).min()
    }

    /// Begins to replace the first worker that is due; whether there was one. Not to be called while
    /// a rollout is under way.
    pub(super) fn begin_recycling(&mut self, cx: &mut Context<'_>) -> bool {
        let due = |slot: &&Slot| self.recycling_due(slot).is_some_and(|at| at <= cx.now);
        let Some(slot) = self.slots.iter().filter(|_| self.is_open()).find(due) else {
            return false;
        };
        let Some(worker) = &slot.current else { return false };
        let Some(worn) = worker.worn(&self.config.limits, cx.now) else { return false };
        let (number, subject) = (slot.number, note_of(worker));
        self.note_of(subject, Fact::Recycling { worn }, cx);
        self.begin_rollout([number].into(), None, None, Kind::Recycle(worn), cx);
        true
    }

    /// The worker `id` makes way. If it was soon past its memory, so may its successor be.
    pub(super) fn outgrown(&mut self, id: WorkerId, cx: &mut Context<'_>) {
        let worn = self.rollout.as_ref().and_then(Rollout::recycles);
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.holds(id)) else { return };
        let worker = slot.current.as_ref().filter(|worker| worker.id == id);
        match (worn, worker) {
            (Some(Worn::Memory { .. }), Some(worker)) => {
                // Not the time for which it was put off: that would forgive every other one.
                let until = worker.wear.outgrown.unwrap_or(cx.now);
                let healthy = until.saturating_duration_since(worker.since);
                let random = cx.shared.random.f64();
                slot.recycling.put_off(healthy, &self.config.restart, cx.now, random);
            }
            (Some(Worn::Age { .. }) | None, _) | (_, None) => slot.recycling = Recycling::default(),
        }
    }

    /// The replacement in the slot at `index` failed: if it was for a limit, the old one stays until
    /// the next attempt.
    pub(super) fn recycling_failed(&mut self, index: usize, reason: &str, cx: &mut Context<'_>) {
        if self.rollout.as_ref().and_then(Rollout::recycles).is_none() {
            return;
        }
        let random = cx.shared.random.f64();
        let slot = &mut self.slots[index];
        let retry_in = slot.recycling.put_off(Duration::ZERO, &self.config.restart, cx.now, random);
        if let Some(subject) = slot.current.as_ref().map(note_of) {
            self.note_of(subject, Fact::NotRecycled { reason: reason.to_owned(), retry_in }, cx);
        }
    }

    /// When the worker in `slot` is to be replaced for a limit, by all that is known.
    fn recycling_due(&self, slot: &Slot) -> Option<Instant> {
        let healthy = |worker: &&Worker| worker.phase == Phase::Healthy && !slot.drained;
        let worker = slot.current.as_ref().filter(healthy)?;
        let worn = worker.worn_at(&self.config.limits)?;
        Some(slot.recycling.not_before.map_or(worn, |at| at.max(worn)))
    }
}
