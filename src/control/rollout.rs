//! Replacing the workers of a service one at a time.
//!
//! Where the port allows it, the replacement is started beside the old worker and takes over when it
//! is healthy; where it does not, the old worker is drained and stopped first. A replacement that
//! fails ends the rollout: what still runs on the old settings stays, and what was already moved to
//! the new ones is moved back.

use std::{collections::VecDeque, sync::Arc};

use super::{
    event::{Action, Fact, Ticket, Why, WorkerId, Worn},
    ports::Outgoing,
    service::{Context, Service},
    slot::Slot,
    worker::Phase,
};
use crate::config::{Slots, SocketMode, WorkerSpec};

/// A rolling replacement under way.
#[derive(Debug)]
pub(super) struct Rollout {
    kind: Kind,
    /// Who waits for its end.
    tickets: Vec<Ticket>,
    /// How many workers it replaces in all.
    workers: usize,
    /// The numbers of the slots still to do.
    todo: VecDeque<u32>,
    step: Step,
}

/// Why workers are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Their settings changed.
    Reload,
    /// Somebody asked for it.
    Restart,
    /// A reload failed, and they go back to what they ran before.
    Rollback,
    /// One is past this limit. Nobody waits for it, and anything else goes first.
    Recycle(Worn),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The next slot can be taken up.
    Ready,
    /// This slot's worker makes way; its successor is not started yet.
    Vacating(u32),
    /// This one must become healthy.
    Proving(WorkerId),
}

/// Whether a replacement can be started while the old worker serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beside {
    Now,
    /// When an earlier one, which is on its way out, has left the port.
    Later,
    /// Both need the port to themselves, or the old one does not serve anyway.
    Never,
}

impl Rollout {
    /// Tells that a worker was started in a vacant slot.
    pub(super) fn filled(&mut self, slot: u32, id: WorkerId) {
        if self.step == Step::Vacating(slot) {
            self.step = Step::Proving(id);
        }
    }

    /// Whether this slot's worker makes way for one that is not started yet.
    pub(super) fn vacates(&self, slot: u32) -> bool {
        self.step == Step::Vacating(slot)
    }

    /// The limit that a worker is replaced for, where it is that.
    pub(super) fn recycles(&self) -> Option<Worn> {
        match self.kind {
            Kind::Recycle(worn) => Some(worn),
            Kind::Reload | Kind::Restart | Kind::Rollback => None,
        }
    }

    /// Whether it is up to this worker how the rollout goes on.
    pub(super) fn waits_for(&self, id: WorkerId) -> bool {
        self.step == Step::Proving(id)
    }
}

impl Service {
    /// Begins to replace the workers in the slots `todo`, once `proving`, which was left by the
    /// rollout before, is healthy.
    pub(super) fn begin_rollout(
        &mut self,
        todo: VecDeque<u32>,
        proving: Option<WorkerId>,
        ticket: Option<Ticket>,
        kind: Kind,
        cx: &mut Context<'_>,
    ) {
        let workers = todo.len() + usize::from(proving.is_some());
        let step = proving.map_or(Step::Ready, Step::Proving);
        let tickets = Vec::from_iter(ticket);
        if workers > 0 && !matches!(kind, Kind::Recycle(_)) {
            self.note(Fact::RolloutBegun { workers }, cx);
        }
        self.rollout = Some(Rollout { kind, tickets, workers, todo, step });
    }

    /// Replaces every worker, or that of one slot, by one with the same settings.
    pub(super) fn restart(&mut self, slot: Option<u32>, ticket: Ticket, cx: &mut Context<'_>) {
        let proving = if self.rollout.as_ref().and_then(Rollout::recycles).is_some() {
            let spec = Arc::clone(&self.config.worker);
            self.abandon_rollout("somebody asked for a restart", Some(&spec), cx)
        } else {
            None
        };
        if self.rollout.is_some() {
            let busy = format!("a rolling replacement of {} is already under way", self.name());
            cx.actions.push(Action::Answer { ticket, result: Err(busy) });
            return;
        }
        // One that was just started in its stead counts as restarted.
        let old = |found: &&Slot| proving.is_none_or(|id| !found.holds(id));
        let chosen = |found: &&Slot| slot.is_none_or(|number| found.number == number);
        let todo = self.slots.iter().filter(chosen).filter(old).map(|slot| slot.number).collect();
        self.begin_rollout(todo, proving, Some(ticket), Kind::Restart, cx);
    }

    /// Answers a reload that changes nothing when the one under way is done.
    pub(super) fn join_rollout(&mut self, ticket: Option<Ticket>, cx: &mut Context<'_>) {
        match &mut self.rollout {
            Some(Rollout { kind: Kind::Reload | Kind::Rollback, tickets, .. }) => {
                tickets.extend(ticket);
            }
            Some(Rollout { kind: Kind::Restart | Kind::Recycle(_), .. }) | None => {
                let answer = |ticket| Action::Answer { ticket, result: Ok(()) };
                cx.actions.extend(ticket.map(answer));
            }
        }
    }

    /// Takes up the next slot where the one before is done. `outgoing` as in [`Self::settle`].
    pub(super) fn advance_rollout(&mut self, outgoing: &Outgoing, cx: &mut Context<'_>) {
        while self.rollout.is_some() || self.begin_recycling(cx) {
            let Some(rollout) = &mut self.rollout else { return };
            match rollout.step {
                Step::Vacating(_) => return,
                Step::Proving(id) => {
                    let proven = self
                        .slots
                        .iter()
                        .flat_map(|slot| slot.workers())
                        .find(|worker| worker.id == id)
                        .is_none_or(|worker| worker.phase == Phase::Healthy);
                    if !proven {
                        return;
                    }
                    rollout.step = Step::Ready;
                }
                Step::Ready => {
                    let Some(&number) = rollout.todo.front() else {
                        self.finish_rollout(cx);
                        continue;
                    };
                    let slot = self.slots.iter().position(|slot| slot.number == number);
                    let beside = slot.map(|index| self.beside(&self.slots[index], outgoing));
                    if beside == Some(Beside::Later) {
                        return;
                    }
                    if let Some(rollout) = &mut self.rollout {
                        rollout.todo.pop_front();
                    }
                    if let (Some(index), Some(beside)) = (slot, beside) {
                        self.replace(index, beside == Beside::Now, cx);
                    }
                }
            }
        }
    }

    /// The worker that the rollout waited for failed.
    pub(super) fn fail_rollout(&mut self, reason: String, cx: &mut Context<'_>) {
        let Some(rollout) = &mut self.rollout else { return };
        let known_to_work = match rollout.kind {
            Kind::Reload => self.fallback.is_none(),
            Kind::Restart => false,
            Kind::Rollback | Kind::Recycle(_) => true,
        };
        if known_to_work {
            // The slot's own backoff brings it back, the others go on.
            rollout.step = Step::Ready;
            return;
        }
        let error = format!("{}: {reason}", self.name());
        self.note(Fact::RolloutFailed { reason }, cx);
        self.end_rollout(Err(error), cx);
        self.realign();
        if let Some(mut old) = self.fallback.take() {
            // The listeners were changed before the rollout began, and stay so; and so does a port
            // that went to another service.
            old.listen.clone_from(&self.config.listen);
            if let Slots::Ports(ports) = &mut old.slots {
                let owners = &cx.shared.owners;
                let mine = |port: &u16| {
                    owners.get(&old.worker.address(*port)).is_none_or(|owner| *owner == old.name)
                };
                ports.retain(mine);
                if ports.is_empty() {
                    old.slots.clone_from(&self.config.slots);
                }
            }
            cx.shared.claim_ports(&old);
            cx.actions.push(Action::Restored(Box::new(old.clone())));
            for slot in self.slots.iter_mut().filter(|slot| slot.is_vacant()) {
                slot.backoff.reset();
                slot.start_at = cx.now;
            }
            self.apply(old, None, Kind::Rollback, cx);
        }
    }

    /// Ends a rollout whose purpose is gone. The worker that it waited for is handed on to the next
    /// one where it runs on the settings that are `wanted` then; else a replacement makes way.
    pub(super) fn abandon_rollout(
        &mut self,
        reason: &str,
        wanted: Option<&Arc<WorkerSpec>>,
        cx: &mut Context<'_>,
    ) -> Option<WorkerId> {
        let step = self.rollout.as_ref()?.step;
        self.end_rollout(Err(reason.to_owned()), cx);
        let proving = self
            .slots
            .iter()
            .flat_map(Slot::workers)
            .find(|worker| step == Step::Proving(worker.id) && wanted == Some(&worker.spec))
            .map(|worker| worker.id);
        let replacements = self.slots.iter().filter_map(|slot| slot.next.as_ref());
        let half_made = replacements.map(|next| next.id).find(|&id| proving != Some(id));
        if let Some(id) = half_made {
            self.retire(id, Why::Replaced, cx);
        }
        self.realign();
        proving
    }

    /// Has every slot start again what it runs, and a vacant one what is known to work.
    fn realign(&mut self) {
        for slot in &mut self.slots {
            if let Some(worker) = slot.next.as_ref().or(slot.current.as_ref()) {
                slot.spec = worker.spec.clone();
            } else if let Some(old) = &self.fallback {
                slot.spec = old.worker.clone();
            }
        }
    }

    /// Whether the worker in `slot` can stay until its replacement is healthy.
    fn beside(&self, slot: &Slot, outgoing: &Outgoing) -> Beside {
        let serving = slot.current.as_ref().filter(|worker| worker.phase == Phase::Healthy);
        let Some(current) = serving else { return Beside::Never };
        let Some(port) = slot.fixed_port else { return Beside::Now };
        let target = &self.config.worker;
        let address = target.address(port);
        // A port that is but a name is nobody's.
        let is_bound = target.socket != SocketMode::Direct;
        let shared = is_bound && current.address() == Some(address);
        let is_one_workers = [target, &current.spec].map(|spec| spec.socket == SocketMode::Bind);
        if shared && is_one_workers.contains(&true) {
            Beside::Never
        } else if outgoing.leave_room(address, target.socket, usize::from(shared)) {
            Beside::Now
        } else {
            Beside::Later
        }
    }

    /// Replaces the worker in the slot at `index`: by one beside it, or by one after it.
    fn replace(&mut self, index: usize, beside: bool, cx: &mut Context<'_>) {
        let target = self.config.worker.clone();
        let slot = &mut self.slots[index];
        slot.spec = target;
        if self.rollout.as_ref().and_then(Rollout::recycles).is_none() {
            slot.backoff.reset();
        }
        let number = slot.number;
        let step = if beside {
            Step::Proving(self.spawn(index, true, cx))
        } else {
            slot.start_at = cx.now;
            if let Some(id) = slot.current.as_ref().map(|worker| worker.id) {
                self.outgrown(id, cx);
                self.retire(id, Why::Replaced, cx);
            }
            Step::Vacating(number)
        };
        if let Some(rollout) = &mut self.rollout {
            rollout.step = step;
        }
    }

    fn finish_rollout(&mut self, cx: &mut Context<'_>) {
        self.fallback = None;
        let worth_a_line = |rollout: &Rollout| {
            rollout.workers > 0 && matches!(rollout.kind, Kind::Reload | Kind::Restart)
        };
        if self.rollout.as_ref().is_some_and(worth_a_line) {
            self.note(Fact::RolloutDone, cx);
        }
        self.end_rollout(Ok(()), cx);
    }

    pub(super) fn end_rollout(&mut self, result: Result<(), String>, cx: &mut Context<'_>) {
        for ticket in self.rollout.take().into_iter().flat_map(|rollout| rollout.tickets) {
            cx.actions.push(Action::Answer { ticket, result: result.clone() });
        }
    }
}
