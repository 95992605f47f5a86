//! Reconciliation: matches a service's slots to its new configuration.

use std::{collections::BTreeSet, mem, sync::Arc};

use super::{
    event::{Fact, RetireReason},
    rollout::Kind,
    service::{Context, Service},
    slot::{Slot, note_of},
    worker::{Phase, Worker},
};
use crate::config::{self, Order, Slots};

impl Service {
    /// Keeps the slots that stay, adds the new ones, and retires the workers of those that are
    /// removed: at once, or, if a reload replaces them by other slots, when the new slots are
    /// proven.
    pub(super) fn reconcile(
        &mut self,
        previous: &config::Service,
        kind: Kind,
        cx: &mut Context<'_>,
    ) {
        let numbered = numbered(&self.config, &self.slots, &self.retiring);
        let stay = self.stay_until_proven(&numbered, previous, kind);
        let mut old = mem::take(&mut self.slots);
        let drained: BTreeSet<_> =
            old.iter().filter(|slot| slot.drained).map(|slot| slot.number).collect();
        for (number, port) in numbered {
            let kept = old.iter().position(|slot| slot.number == number && slot.fixed_port == port);
            let slot = if let Some(position) = kept {
                Slot { leaving: false, ..old.remove(position) }
            } else {
                let spec = Arc::clone(&self.config.worker);
                let mut slot = Slot::new(number, port, spec, cx.now);
                slot.drained = drained.contains(&number);
                slot.unproven = stay;
                slot.current = self.resumable(&slot, cx);
                if let Some(worker) = &slot.current {
                    slot.generation = worker.generation;
                    slot.unproven = false;
                    // The worker was drained before its slot was removed, and stays so.
                    slot.drained = worker.drained.is_some();
                    slot.last_port = worker.port;
                }
                slot
            };
            self.slots.push(slot);
        }
        for mut slot in old {
            let owner = slot.fixed_port.map(|port| slot.spec.address(port));
            let owner = owner.and_then(|address| cx.shared.owners.get(&address));
            let is_lost = owner.is_some_and(|owner| *owner != self.config.name);
            if stay && serves(&slot) && !is_lost {
                slot.leaving = true;
                self.slots.push(slot);
                continue;
            }
            for worker in slot.into_workers() {
                self.dismiss(worker, RetireReason::Removed, cx);
            }
        }
    }

    /// Whether the slots that are not in `numbered` stay until the others are proven: that is so if
    /// a reload adds slots or changes the settings of the rest, and old and new workers may run at
    /// once.
    fn stay_until_proven(
        &self,
        numbered: &[(u32, Option<u16>)],
        previous: &config::Service,
        kind: Kind,
    ) -> bool {
        // When fixed ports are replaced by free ones or the other way round, the same number means
        // another slot.
        let same_numbers =
            mem::discriminant(&previous.slots) == mem::discriminant(&self.config.slots);
        if kind != Kind::Reload || !same_numbers || self.config.rollout.order == Order::StopFirst {
            return false;
        }
        let is_kept = |slot: &&Slot| numbered.contains(&(slot.number, slot.fixed_port));
        let (kept, going): (Vec<_>, Vec<_>) = self.slots.iter().partition(is_kept);
        let is_unproven = |slot: &&Slot| slot.unproven || slot.spec != self.config.worker;
        let has_new = kept.len() < numbered.len() || kept.iter().any(is_unproven);
        has_new && going.into_iter().any(serves)
    }

    /// Removes the slots that stayed only until others were proven; returns whether there were any.
    pub(super) fn remove_leaving(&mut self, cx: &mut Context<'_>) -> bool {
        let leaving: Vec<_> = self.slots.extract_if(.., |slot| slot.leaving).collect();
        let some = !leaving.is_empty();
        for worker in leaving.into_iter().flat_map(Slot::into_workers) {
            self.dismiss(worker, RetireReason::Removed, cx);
        }
        some
    }

    /// Finds a worker that is draining only because an earlier reload removed its slot, and that
    /// fits the new slot exactly, and brings it back.
    fn resumable(&mut self, slot: &Slot, cx: &mut Context<'_>) -> Option<Worker> {
        let index = self.retiring.iter().position(|worker| {
            matches!(worker.phase, Phase::Draining { why: RetireReason::Removed, .. })
                && worker.spec == slot.spec
                && worker.slot == slot.number
                && worker.fixed_port == slot.fixed_port
        })?;
        let mut worker = self.retiring.remove(index);
        worker.resume(cx.now, cx.effects);
        if slot.drained && worker.drained.is_none() {
            worker.drain(cx.now, cx.effects);
        }
        self.note_of(note_of(&worker), Fact::Resumed, cx);
        Some(worker)
    }
}

/// Whether a worker of the slot serves, or may soon serve again.
fn serves(slot: &Slot) -> bool {
    slot.workers().any(Worker::can_stay)
}

/// The numbers and ports of the slots of `config`, in order. A port keeps its number while it has a
/// slot, or has an outgoing worker that may come back; a new port gets the lowest free number.
pub(super) fn numbered(
    config: &config::Service,
    slots: &[Slot],
    retiring: &[Worker],
) -> Vec<(u32, Option<u16>)> {
    let ports = match &config.slots {
        Slots::Count(count) => return (0..count.get()).map(|number| (number, None)).collect(),
        Slots::Ports(ports) => ports,
    };
    let mut known = BTreeSet::new();
    let numbers: Vec<_> = ports
        .iter()
        .map(|&port| {
            let slot = slots.iter().find(|slot| slot.fixed_port == Some(port));
            let number = slot.map(|slot| slot.number).or_else(|| {
                let left = retiring.iter().find(|worker| worker.fixed_port == Some(port))?;
                let free = slots.iter().all(|slot| slot.number != left.slot);
                free.then_some(left.slot)
            });
            number.filter(|&number| known.insert(number))
        })
        .collect();
    let workers = slots.iter().flat_map(Slot::workers).chain(retiring);
    let held: BTreeSet<_> = workers.map(|worker| worker.slot).chain(known).collect();
    let mut free = (0..).filter(|number| !held.contains(number));
    let numbers = numbers.into_iter().filter_map(|number| number.or_else(|| free.next()));
    numbers.zip(ports.iter().copied().map(Some)).collect()
}
