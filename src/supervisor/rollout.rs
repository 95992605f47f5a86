//! Rollouts: replacing the workers of a service one at a time.
//!
//! The replacement is started beside the old worker, and takes over when it has been healthy for
//! `rollout.settle`; before that it serves only if the old worker can't. If both would have to bind
//! the same port, a *stand-in* on a free port is proven first, and serves in the slot until the old
//! worker has left the port. Then the slot gets a worker on its own port in the same way. If that
//! worker fails, the stand-in stays, and the port is tried again later. With
//! `rollout.order = "stop-first"` the old worker is drained and stopped before the new one is
//! started.
//!
//! A replacement that fails ends the rollout: workers that still run on the old settings stay, and
//! slots that were already moved to the new settings are moved back. There are two exceptions. A
//! slot that was down before the rollout says nothing about the new settings: it is started with
//! them, but nobody waits for it as long as other workers serve. And a worker that is replaced
//! because it hangs is stopped even if its replacement fails, in case the program can't run twice.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    event::{Chosen, DownKind, Effect, Fact, LimitExceeded, RetireReason, Ticket, WorkerId},
    ports::Ports,
    service::{Context, Position, Service},
    slot::Slot,
    worker::Phase,
};
use crate::config::{Order, Slots, SocketMode, WorkerSpec};

/// A rollout that is under way.
#[derive(Debug, Clone)]
pub(super) struct Rollout {
    kind: Kind,
    began: Instant,
    /// The requests that are answered at its end.
    tickets: Vec<Ticket>,
    /// How many workers it is to replace.
    workers: usize,
    /// How many it has replaced so far.
    replaced: usize,
    /// The numbers of the slots still to do.
    todo: VecDeque<u32>,
    step: Step,
    /// The stand-in that was proven for the next slot in `todo`; it serves until the slot's own
    /// port is free.
    stand_in: Option<WorkerId>,
    /// What did not succeed although the rollout goes on: a sentence each.
    skipped: Vec<String>,
    /// A drained slot whose new worker an operator wants in rotation.
    undrains: Option<u32>,
}

/// Why workers are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A reload changed their settings.
    Reload,
    /// An operator asked for a restart.
    Restart,
    /// A reload failed, and workers go back to the settings they ran with before.
    Rollback,
    /// A worker exceeds this limit. Nobody waits for this rollout, and any other one takes
    /// precedence.
    Recycle(LimitExceeded),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The next slot can be started.
    Ready,
    /// The slot's old worker is being stopped; its successor is not started yet.
    Vacating { slot: u32, proof: Proof },
    /// This new worker must become healthy.
    Proving { id: WorkerId, proof: Proof },
}

/// What a new worker has to prove, and what happens if it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proof {
    /// It is the first worker with these settings in its slot: it must be healthy for
    /// `rollout.settle`, and its failure fails the rollout.
    Settings,
    /// The same for a slot that was down before: its failure fails the rollout only if no other
    /// worker serves or is still to be replaced.
    Revival,
    /// The stand-in has proven the settings: the worker must only become healthy on the slot's own
    /// port. If it fails, the stand-in stays.
    Port,
}

/// Whether a replacement can be started while the old worker serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beside {
    /// It can be started now.
    Now,
    /// Only on another port, as a stand-in, since both workers would bind the same port.
    StandIn,
    /// Once an earlier, outgoing worker has left the port.
    Later,
    /// No: the old worker does not serve anyway, or is to be stopped first.
    Never,
}

impl Rollout {
    /// Records that a worker was started in a vacant slot.
    pub(super) fn filled(&mut self, number: u32, id: WorkerId) {
        if let Step::Vacating { slot, proof } = self.step
            && slot == number
        {
            self.step = Step::Proving { id, proof };
        }
    }

    /// Whether this slot's worker is being stopped for a successor that is not started yet.
    pub(super) fn vacates(&self, number: u32) -> bool {
        matches!(self.step, Step::Vacating { slot, .. } if slot == number)
    }

    /// The limit that the worker exceeds, if that is why it is replaced.
    pub(super) fn recycles(&self) -> Option<LimitExceeded> {
        match self.kind {
            Kind::Recycle(worn) => Some(worn),
            Kind::Reload | Kind::Restart | Kind::Rollback => None,
        }
    }

    /// Whether the rollout waits for this worker to be proven.
    pub(super) fn waits_for(&self, id: WorkerId) -> bool {
        self.proving() == Some(id)
    }

    /// Whether the next worker of this slot is to be in rotation although the slot is drained.
    pub(super) fn undrains(&self, slot: u32) -> bool {
        self.undrains == Some(slot)
    }

    /// An operator drained this slot again: its new worker stays out of rotation.
    pub(super) fn leave_drained(&mut self, slot: u32) {
        self.undrains.take_if(|undrains| *undrains == slot);
    }

    fn proving(&self) -> Option<WorkerId> {
        match self.step {
            Step::Proving { id, .. } => Some(id),
            Step::Ready | Step::Vacating { .. } => None,
        }
    }
}

impl Service {
    /// Begins to replace the workers in the slots `todo`. If the previous rollout left a worker
    /// `proving`, that worker must become healthy first.
    pub(super) fn begin_rollout(
        &mut self,
        todo: VecDeque<u32>,
        proving: Option<WorkerId>,
        ticket: Option<Ticket>,
        kind: Kind,
        cx: &mut Context<'_>,
    ) {
        let workers = todo.len() + usize::from(proving.is_some());
        let proof = Proof::Settings;
        let step = proving.map_or(Step::Ready, |id| Step::Proving { id, proof });
        if workers > 0 && !matches!(kind, Kind::Recycle(_)) {
            self.note(Fact::RolloutBegun { workers }, cx);
        }
        self.rollout = Some(Rollout {
            kind,
            began: cx.now,
            tickets: Vec::from_iter(ticket),
            workers,
            replaced: 0,
            todo,
            step,
            stand_in: None,
            skipped: Vec::new(),
            undrains: None,
        });
    }

    /// Restarts the workers of these slots, with the same settings.
    pub(super) fn restart(&mut self, slots: &Chosen, ticket: Ticket, cx: &mut Context<'_>) {
        let proving = if self.rollout.as_ref().and_then(Rollout::recycles).is_some() {
            let spec = Arc::clone(&self.config.worker);
            self.abandon_rollout("somebody asked for a restart", Some(&spec), cx)
        } else {
            None
        };
        if let Some(rollout) = &self.rollout {
            let (name, how) = (self.name(), self.progress(rollout, cx.now));
            let busy = format!("a rolling replacement of {name} is already under way, {how}");
            cx.effects.push(Effect::Answer { ticket, result: Err(busy) });
            return;
        }
        // A replacement that the abandoned rollout has just started counts as restarted already.
        let old = |found: &&Slot| proving.is_none_or(|id| !found.holds(id));
        let chosen = |found: &&Slot| slots.has(found.number) && !found.leaving;
        let todo = self.slots.iter().filter(chosen).filter(old).map(|slot| slot.number).collect();
        self.begin_rollout(todo, proving, Some(ticket), Kind::Restart, cx);
        if let Some(rollout) = &mut self.rollout {
            rollout.undrains = match slots {
                Chosen::One(slot) => Some(*slot),
                Chosen::All | Chosen::These(_) => None,
            };
        }
    }

    /// The progress of `rollout` and what it waits for, as a phrase.
    fn progress(&self, rollout: &Rollout, now: Instant) -> String {
        let seconds = now.saturating_duration_since(rollout.began).as_secs();
        let since = humantime::format_duration(Duration::from_secs(seconds));
        let Rollout { replaced, workers, .. } = rollout;
        let waits = match rollout.step {
            Step::Ready => "a port to be free".to_owned(),
            Step::Vacating { slot, .. } => format!("the old worker of slot {slot} to end"),
            Step::Proving { id, .. } => match self.workers().find(|worker| worker.id == id) {
                Some(worker) => format!("the new worker of slot {} to be healthy", worker.slot),
                None => "a new worker".to_owned(),
            },
        };
        format!("for {since}: {replaced} of {workers} replaced, waiting for {waits}")
    }

    /// A reload that changes nothing is answered at the end of the reload that is under way, or at
    /// once if there is none.
    pub(super) fn join_rollout(&mut self, ticket: Option<Ticket>, cx: &mut Context<'_>) {
        match &mut self.rollout {
            Some(Rollout { kind: Kind::Reload | Kind::Rollback, tickets, .. }) => {
                tickets.extend(ticket);
            }
            Some(Rollout { kind: Kind::Restart | Kind::Recycle(_), .. }) | None => {
                let answer = |ticket| Effect::Answer { ticket, result: Ok(Vec::new()) };
                cx.effects.extend(ticket.map(answer));
            }
        }
    }

    /// Moves the rollout on as far as possible. Returns whether to call this again after `ports`
    /// has been updated, since a worker that was just retired may occupy a port.
    pub(super) fn advance_rollout(&mut self, ports: &Ports, cx: &mut Context<'_>) -> bool {
        while self.rollout.is_some() || self.begin_recycling(ports, cx) {
            let Some(rollout) = &mut self.rollout else { return false };
            match rollout.step {
                Step::Vacating { .. } => return false,
                Step::Proving { id, .. } => {
                    if self.proven_at().is_none_or(|at| at > cx.now) {
                        return false;
                    }
                    self.promote(id, cx);
                    // The old worker was retired, and may occupy the port that the next one needs.
                    return true;
                }
                Step::Ready => {
                    let Some(&number) = rollout.todo.front() else {
                        let leave_ports = self.remove_leaving(cx);
                        self.finish_rollout(cx);
                        if leave_ports {
                            return true;
                        }
                        continue;
                    };
                    let Some(index) = self.slots.iter().position(|slot| slot.number == number)
                    else {
                        rollout.todo.pop_front();
                        continue;
                    };
                    // A worker that was started in a new slot meanwhile has the new settings
                    // already, and only has to prove itself.
                    let slot = &self.slots[index];
                    let started = slot.current.as_ref().filter(|worker| {
                        slot.unproven
                            && worker.spec == self.config.worker
                            && worker.phase != Phase::Unhealthy
                    });
                    if let Some(id) = started.map(|worker| worker.id) {
                        rollout.todo.pop_front();
                        rollout.step = Step::Proving { id, proof: Proof::Settings };
                        continue;
                    }
                    let beside = self.beside(&self.slots[index], ports);
                    if beside == Beside::Later {
                        return false;
                    }
                    if let Some(rollout) = &mut self.rollout {
                        rollout.todo.pop_front();
                    }
                    match beside {
                        Beside::Now => self.start_beside(index, Position::Beside, cx),
                        Beside::StandIn => self.start_beside(index, Position::StandIn, cx),
                        Beside::Never | Beside::Later => self.start_after(index, cx),
                    }
                    return true;
                }
            }
        }
        false
    }

    /// When the worker that the rollout waits for will be proven, if nothing happens before; `None`
    /// if that worker is not healthy, or if the rollout waits for none. In the past if the worker
    /// has left its slot.
    pub(super) fn proven_at(&self) -> Option<Instant> {
        let Step::Proving { id, proof } = self.rollout.as_ref()?.step else { return None };
        let mut workers = self.slots.iter().flat_map(Slot::workers);
        let Some(worker) = workers.find(|worker| worker.id == id) else {
            return self.rollout.as_ref().map(|rollout| rollout.began);
        };
        worker.settled_at(match proof {
            Proof::Settings | Proof::Revival => self.config.rollout.settle,
            Proof::Port => Duration::ZERO,
        })
    }

    /// The worker that the rollout waited for is proven: it takes over from the old worker of its
    /// slot.
    fn promote(&mut self, id: WorkerId, cx: &mut Context<'_>) {
        let why = self.why_replaced();
        let Some(rollout) = &mut self.rollout else { return };
        rollout.step = Step::Ready;
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.holds(id)) else { return };
        slot.unproven = false;
        let proven = slot.workers().find(|worker| worker.id == id);
        let stands_in = proven.is_some_and(|worker| worker.stands_in);
        // If the proven worker is in rotation at an operator's request, its slot is drained no
        // more.
        slot.drained &= proven.is_none_or(|worker| worker.drained.is_some());
        match rollout.kind {
            // The slot gets another turn, once the old worker has left the port.
            Kind::Reload | Kind::Restart | Kind::Rollback if stands_in => {
                rollout.stand_in = Some(id);
                rollout.todo.push_front(slot.number);
            }
            // The slot's own port is tried again as well, by a rollout of its own: other workers
            // that are due need not wait for it.
            Kind::Recycle(_) if stands_in => {}
            Kind::Reload | Kind::Restart | Kind::Rollback | Kind::Recycle(_) => {
                rollout.replaced += 1;
            }
        }
        if slot.next.as_ref().is_none_or(|next| next.id != id) {
            return;
        }
        if let Some(old) = slot.current.as_ref().map(|worker| worker.id) {
            self.outgrown(old, cx);
            self.retire(old, why, cx);
        }
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.holds(id)) {
            slot.promote();
        }
    }

    /// The reason for which the rollout retires old workers.
    fn why_replaced(&self) -> RetireReason {
        match self.rollout.as_ref().and_then(Rollout::recycles) {
            Some(LimitExceeded::Unhealthy { .. }) => RetireReason::Unhealthy,
            Some(
                LimitExceeded::Memory { .. } | LimitExceeded::Age { .. } | LimitExceeded::StandIn,
            )
            | None => RetireReason::Replaced,
        }
    }

    /// The worker in the slot at `index`, which the rollout waited for, failed.
    pub(super) fn fail_rollout(
        &mut self,
        index: usize,
        reason: &str,
        failure: DownKind,
        said: &[String],
        cx: &mut Context<'_>,
    ) {
        let serving = self.serving();
        let slot = &self.slots[index];
        let number = slot.number;
        let Some(rollout) = &mut self.rollout else { return };
        let Step::Proving { id, proof } = rollout.step else { return };
        let old = slot.current.as_ref().filter(|worker| worker.id != id);
        let (kept, recycles) = (old.is_some(), rollout.recycles().is_some());
        rollout.step = Step::Ready;
        let goes_on = match (proof, rollout.kind) {
            (Proof::Port, _) if old.is_some_and(|stand_in| stand_in.phase == Phase::Healthy) => {
                let of = |port: Option<u16>| port.map_or_else(String::new, |port| port.to_string());
                let (stand_in, own) = (of(old.and_then(|worker| worker.port)), of(slot.fixed_port));
                rollout.skipped.push(format!(
                    "slot {number} serves on port {stand_in} until {own} is to be had: {reason}"
                ));
                true
            }
            (Proof::Revival, _) if serving > 0 || !rollout.todo.is_empty() => {
                rollout
                    .skipped
                    .push(format!("slot {number} did not serve before either: {reason}"));
                true
            }
            // The old worker is unhealthy and serves nobody, and perhaps the program can't run
            // twice: stop the old worker first.
            (_, Kind::Recycle(LimitExceeded::Unhealthy { .. })) if kept => {
                self.start_after(index, cx);
                return;
            }
            // Without a fallback the settings were proven before: the slot's own backoff restarts
            // the worker.
            (_, Kind::Reload) if self.fallback.is_none() => {
                rollout.skipped.push(format!("slot {number}: {reason}"));
                true
            }
            (_, Kind::Rollback | Kind::Recycle(_)) => true,
            (_, Kind::Reload | Kind::Restart) => false,
        };
        if goes_on {
            if kept && (proof == Proof::Port || recycles) {
                self.recycling_failed(index, reason, failure, cx);
            }
            return;
        }
        let stays = kept || self.slots.iter().any(|slot| slot.leaving);
        let outcome = outcome(rollout, stays, serving);
        let reason = format!("slot {number}: {reason}; {outcome}");
        let mut error = format!("{}: {reason}", self.name());
        if !said.is_empty() {
            error = format!("{error}; it said last:");
            said.iter().for_each(|line| error.extend(["\n    ", line]));
        }
        self.note(Fact::RolloutFailed { reason, said: said.to_vec() }, cx);
        self.end_rollout(Err(error), cx);
        self.realign();
        if let Some(mut old) = self.fallback.take() {
            // The listeners changed before the rollout began, and stay as they are. A port that
            // went to another service is not taken back either.
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
            cx.effects.push(Effect::Restored(Box::new(old.clone())));
            for slot in self.slots.iter_mut().filter(|slot| slot.is_vacant()) {
                slot.backoff.reset();
                slot.start_at = cx.now;
            }
            self.apply(old, None, Kind::Rollback, cx);
        }
    }

    /// Ends a rollout that is no longer wanted. If the worker that it waited for runs on the
    /// `wanted` settings, returns that worker, so that the next rollout waits for it. Any other
    /// replacement is retired, unless it serves because the old worker can't or has ended: then it
    /// takes over the slot.
    pub(super) fn abandon_rollout(
        &mut self,
        reason: &str,
        wanted: Option<&Arc<WorkerSpec>>,
        cx: &mut Context<'_>,
    ) -> Option<WorkerId> {
        let (waited_for, why) = (self.rollout.as_ref()?.proving(), self.why_replaced());
        self.end_rollout(Err(reason.to_owned()), cx);
        let proving = self
            .slots
            .iter()
            .flat_map(Slot::workers)
            .find(|worker| waited_for == Some(worker.id) && wanted == Some(&worker.spec))
            .map(|worker| worker.id);
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            let next = slot.next.as_ref().map(|worker| worker.id);
            let Some(next) = next.filter(|&id| proving != Some(id)) else { continue };
            let serves = slot.serving().is_some_and(|worker| worker.id == next) && !slot.drained;
            match slot.current.as_ref().map(|worker| worker.id) {
                None => slot.promote(),
                Some(old) if serves => {
                    self.retire(old, why, cx);
                    self.slots[index].promote();
                }
                Some(_) => self.retire(next, RetireReason::Replaced, cx),
            }
        }
        self.realign();
        proving
    }

    /// Sets every slot's settings to those of its worker, and those of a vacant slot to the
    /// fallback's, which are known to work.
    fn realign(&mut self) {
        for slot in &mut self.slots {
            if let Some(worker) = slot.next.as_ref().or(slot.current.as_ref()) {
                slot.spec = worker.spec.clone();
            } else if let Some(old) = &self.fallback {
                slot.spec = old.worker.clone();
            }
        }
    }

    /// Whether the worker in `slot` can stay until its replacement is proven.
    pub(super) fn beside(&self, slot: &Slot, ports: &Ports) -> Beside {
        let staying = slot.current.as_ref().filter(|worker| worker.can_stay());
        let Some(current) = staying else { return Beside::Never };
        if self.config.rollout.order == Order::StopFirst {
            return Beside::Never;
        }
        let Some(port) = slot.fixed_port else { return Beside::Now };
        let target = &self.config.worker;
        let address = target.address(port);
        // With `route = "direct"` a slot's port is only a name, and nobody binds it.
        let is_bound = target.socket != SocketMode::Direct;
        let shared = is_bound && current.address() == Some(address);
        let is_one_workers = [target, &current.spec].map(|spec| spec.socket == SocketMode::Bind);
        if shared && is_one_workers.contains(&true) {
            Beside::StandIn
        } else if ports.leave_room(address, target.socket, usize::from(shared)) {
            Beside::Now
        } else {
            Beside::Later
        }
    }

    /// Starts the replacement of the worker in the slot at `index`, which keeps running meanwhile.
    fn start_beside(&mut self, index: usize, position: Position, cx: &mut Context<'_>) {
        self.renew(index);
        let current = self.slots[index].current.as_ref().map(|worker| worker.id);
        let stand_in = self.rollout.as_mut().and_then(|rollout| rollout.stand_in.take());
        let proof = match current.is_some() && current == stand_in {
            true => Proof::Port,
            false => Proof::Settings,
        };
        let id = self.spawn(index, position, cx);
        if let Some(rollout) = &mut self.rollout {
            rollout.step = Step::Proving { id, proof };
        }
    }

    /// Retires the worker in the slot at `index`, if there is one, so that its successor is started
    /// afterwards.
    fn start_after(&mut self, index: usize, cx: &mut Context<'_>) {
        let (why, serves) = (self.why_replaced(), self.serving() > 0);
        let slot = &mut self.slots[index];
        let number = slot.number;
        let fails = slot.backoff.failures() > 0;
        let is_down = slot.current.as_ref().is_none_or(|worker| !worker.can_stay());
        let is_down = is_down && !slot.unproven;
        slot.start_at = cx.now;
        let old = slot.current.as_ref().map(|worker| worker.id);
        self.renew(index);
        if let Some(id) = old {
            self.outgrown(id, cx);
            self.retire(id, why, cx);
        }
        let Some(rollout) = &mut self.rollout else { return };
        // A slot that has just lost its stand-in was not down before. And if the rollout is about
        // this slot only, its result is the rollout's result.
        let was_down = is_down && rollout.stand_in.take().is_none() && rollout.workers > 1;
        rollout.step = match (was_down, fails && serves) {
            (true, true) => {
                rollout.skipped.push(format!(
                    "slot {number} was down before: it is started anew, and was not waited for"
                ));
                Step::Ready
            }
            (true, false) => Step::Vacating { slot: number, proof: Proof::Revival },
            (false, _) => Step::Vacating { slot: number, proof: Proof::Settings },
        };
    }

    /// From now on the slot at `index` starts workers with the settings in force.
    fn renew(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.spec = Arc::clone(&self.config.worker);
        if self.rollout.as_ref().and_then(Rollout::recycles).is_none() {
            slot.backoff.reset();
        }
    }

    /// How many workers are in rotation.
    fn serving(&self) -> usize {
        self.slots.iter().filter_map(Slot::serving).count()
    }

    fn finish_rollout(&mut self, cx: &mut Context<'_>) {
        self.fallback = None;
        let worth_a_line = |rollout: &&Rollout| {
            rollout.workers > 0 && matches!(rollout.kind, Kind::Reload | Kind::Restart)
        };
        if let Some(rollout) = self.rollout.as_ref().filter(worth_a_line) {
            let skipped = rollout.skipped.clone();
            self.note(Fact::RolloutDone { skipped }, cx);
        }
        self.end_rollout(Ok(()), cx);
    }

    pub(super) fn end_rollout(&mut self, result: Result<(), String>, cx: &mut Context<'_>) {
        let Some(rollout) = self.rollout.take() else { return };
        let name = &self.config.name;
        let skipped = rollout.skipped.iter().map(|skipped| format!("{name}: {skipped}"));
        let result = result.map(|()| skipped.collect::<Vec<_>>());
        for ticket in rollout.tickets {
            cx.effects.push(Effect::Answer { ticket, result: result.clone() });
        }
    }
}

/// Describes what a failed rollout leaves behind, as part of a sentence: `serving` workers are in
/// rotation, and the old worker of the slot that failed was `kept` or not.
fn outcome(rollout: &Rollout, kept: bool, serving: usize) -> String {
    let unchanged = kept && rollout.replaced == 0 && rollout.skipped.is_empty();
    let serve = match (serving, unchanged) {
        (0, _) => "no worker serves".to_owned(),
        (1, true) => "the old worker still serves, nothing changed".to_owned(),
        (_, true) => format!("the {serving} old workers still serve, nothing changed"),
        (1, false) => "1 worker serves".to_owned(),
        (_, false) => format!("{serving} workers serve"),
    };
    let (one, many) = match rollout.kind {
        Kind::Reload | Kind::Rollback | Kind::Recycle(_) => {
            ("goes back to the old settings", "go back to the old settings")
        }
        Kind::Restart => ("stays", "stay"),
    };
    match rollout.replaced {
        0 => serve,
        1 => format!("{serve}; the one that was replaced before {one}"),
        replaced => format!("{serve}; the {replaced} that were replaced before {many}"),
    }
}
