//! Replacing the workers of a service one at a time.
//!
//! The replacement is started beside the old worker, and takes over when it has been healthy for
//! `rollout.settle`; before that it serves only if the old one can't. Where both would have to bind
//! the same port, a *stand-in* on a free port is proven first and serves in the slot until the old
//! worker has left the port; then the slot gets a worker on its own port in the same way. If that one
//! fails, the stand-in stays, and the port is tried again later. With `rollout.order = "stop-first"`
//! the old worker is drained and stopped before the new one is started.
//!
//! A replacement that fails ends the rollout: what still runs on the old settings stays, and what
//! was already moved to the new ones is moved back. But a slot that was down before says nothing
//! about the new settings: it is started with them, and nobody waits for it as long as others serve.
//! And a worker that is replaced because it hangs makes way all the same, in case the program can't
//! run twice.

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

/// A rolling replacement under way.
#[derive(Debug, Clone)]
pub(super) struct Rollout {
    kind: Kind,
    began: Instant,
    /// Who waits for its end.
    tickets: Vec<Ticket>,
    /// How many workers it replaces in all.
    workers: usize,
    /// How many it has replaced.
    replaced: usize,
    /// The numbers of the slots still to do.
    todo: VecDeque<u32>,
    step: Step,
    /// The one that was proven for the slot whose turn is next, and serves until its port is free.
    stand_in: Option<WorkerId>,
    /// What is not as it was to be, though the rollout goes on: a sentence each.
    skipped: Vec<String>,
    /// A slot that an operator had taken out of rotation, and wants back with a new worker.
    undrains: Option<u32>,
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
    Recycle(LimitExceeded),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The next slot can be taken up.
    Ready,
    /// This slot's worker makes way; its successor is not started yet.
    Vacating { slot: u32, proof: Proof },
    /// This one must become healthy.
    Proving { id: WorkerId, proof: Proof },
}

/// What a new worker has to show, and what follows if it does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proof {
    /// It is the first with these settings in its slot: it has to settle, and its failure is the
    /// rollout's.
    Settings,
    /// The same of one in a slot that was down before: its failure is the rollout's only if no other
    /// serves or is still to come.
    Revival,
    /// Its settings are proven by the stand-in, which stays if this one fails.
    Port,
}

/// Whether a replacement can be started while the old worker serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beside {
    /// It can.
    Now,
    /// On another port, since both need this one to themselves.
    StandIn,
    /// When an earlier one, which is on its way out, has left the port.
    Later,
    /// The old one does not serve anyway, or is to be stopped first.
    Never,
}

impl Rollout {
    /// Tells that a worker was started in a vacant slot.
    pub(super) fn filled(&mut self, number: u32, id: WorkerId) {
        if let Step::Vacating { slot, proof } = self.step
            && slot == number
        {
            self.step = Step::Proving { id, proof };
        }
    }

    /// Whether this slot's worker makes way for one that is not started yet.
    pub(super) fn vacates(&self, number: u32) -> bool {
        matches!(self.step, Step::Vacating { slot, .. } if slot == number)
    }

    /// Why a worker is replaced at nobody's order, where it is that.
    pub(super) fn recycles(&self) -> Option<LimitExceeded> {
        match self.kind {
            Kind::Recycle(worn) => Some(worn),
            Kind::Reload | Kind::Restart | Kind::Rollback => None,
        }
    }

    /// Whether it is up to this worker how the rollout goes on.
    pub(super) fn waits_for(&self, id: WorkerId) -> bool {
        self.proving() == Some(id)
    }

    /// Whether the next worker of this slot is to be in rotation though the slot is drained.
    pub(super) fn undrains(&self, slot: u32) -> bool {
        self.undrains == Some(slot)
    }

    /// An operator wants this slot out of rotation after all.
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

    /// Replaces the workers of these slots by ones with the same settings.
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
        // One that was just started in its stead counts as restarted.
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

    /// How far `rollout` is and what it waits for, as a phrase.
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

    /// Answers a reload that changes nothing when the one under way is done.
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

    /// Takes up the next slot where the one before is done. Whether it is to be called again, with
    /// the `ports` that are occupied then.
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
                    // The old worker is on its way out now, and may be on the port that is wanted.
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
                    // One that was started in a new slot meanwhile only has to prove itself.
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

    /// When the worker that the rollout waits for has shown what it has to, if nothing happens
    /// before; `None` where it is not healthy, or none is waited for. In the past where it has left
    /// its slot.
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

    /// The worker that the rollout waited for is proven: it takes over from the one that it was
    /// started beside.
    fn promote(&mut self, id: WorkerId, cx: &mut Context<'_>) {
        let why = self.why_replaced();
        let Some(rollout) = &mut self.rollout else { return };
        rollout.step = Step::Ready;
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.holds(id)) else { return };
        slot.unproven = false;
        let proven = slot.workers().find(|worker| worker.id == id);
        let stands_in = proven.is_some_and(|worker| worker.stands_in);
        // A new worker that an operator wants in rotation brings its slot back.
        slot.drained &= proven.is_none_or(|worker| worker.drained.is_some());
        match rollout.kind {
            // The slot has another turn, when the old worker has left the port.
            Kind::Reload | Kind::Restart | Kind::Rollback if stands_in => {
                rollout.stand_in = Some(id);
                rollout.todo.push_front(slot.number);
            }
            // So it has here, but others that are due need not wait for that.
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

    /// Why the worker whose turn it is makes way.
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
            // Nobody is served by it anyway, and perhaps the program can't run twice.
            (_, Kind::Recycle(LimitExceeded::Unhealthy { .. })) if kept => {
                self.start_after(index, cx);
                return;
            }
            // These settings are known to work: the slot's own backoff brings it back.
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
            cx.effects.push(Effect::Restored(Box::new(old.clone())));
            for slot in self.slots.iter_mut().filter(|slot| slot.is_vacant()) {
                slot.backoff.reset();
                slot.start_at = cx.now;
            }
            self.apply(old, None, Kind::Rollback, cx);
        }
    }

    /// Ends a rollout whose purpose is gone. The worker that it waited for is handed on to the next
    /// one where it runs on the settings that are `wanted` then; else a replacement makes way, unless
    /// it serves in the stead of one that can't, or that has ended.
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
        // A port that is but a name is nobody's.
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

    /// Starts the replacement of the worker in the slot at `index`, which goes on meanwhile.
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

    /// Has the worker in the slot at `index` make way, if there is one, for its successor.
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
        // Its stand-in may be what it lost, or it is all that this is about.
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

    /// What is started in the slot at `index` from now on has the settings in force.
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

/// What a rollout that failed leaves, with so many workers in rotation, and the old worker of the slot
/// that failed still `kept` or not: part of a sentence.
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
