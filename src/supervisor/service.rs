//! One service: its slots, its outgoing workers, and its rollout if one is under way.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    net::SocketAddr,
    sync::Arc,
    time::Instant,
};

use super::{
    event::{
        Coming, Effect, Fact, LimitExceeded, Note, NoteWorker, Publication, RetireReason, Rotation,
        Spawn, Ticket, WorkerId,
    },
    ports::Ports,
    reconcile::numbered,
    recycle::LimitUsage,
    rollout::{Kind, Rollout},
    slot::{Slot, note_of, note_of_slot},
    worker::{Phase, Worker},
};
use crate::config::{self, Order, Slots, SocketMode};

/// What handling an event needs besides the service itself.
pub(super) struct Context<'a> {
    pub now: Instant,
    pub shared: &'a mut Shared,
    pub effects: &'a mut Vec<Effect>,
}

/// State that all services share.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    /// The last worker id that was given out.
    pub ids: u64,
    pub random: fastrand::Rng,
    /// Which service owns each fixed port.
    pub owners: BTreeMap<SocketAddr, Arc<str>>,
}

impl Shared {
    pub(super) fn new(seed: u64) -> Self {
        Self { ids: 0, random: fastrand::Rng::with_seed(seed), owners: BTreeMap::new() }
    }

    /// Makes `service` the owner of its fixed ports, and of no others.
    pub(super) fn claim_ports(&mut self, service: &config::Service) {
        self.owners.retain(|_, owner| *owner != service.name);
        if let Slots::Ports(ports) = &service.slots {
            let owned = |&port| (service.worker.address(port), Arc::clone(&service.name));
            self.owners.extend(ports.iter().map(owned));
        }
    }
}

/// In which position of a slot a worker is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Position {
    /// As the worker of a vacant slot.
    Slot,
    /// As the replacement of the slot's worker.
    Beside,
    /// As a replacement on a free port instead of the slot's own port.
    StandIn,
}

/// One service under supervision.
#[derive(Debug, Clone)]
pub struct Service {
    /// The settings in force; during a rollout, the new settings.
    pub config: config::Service,
    /// One slot for each worker, in the order of the configuration.
    pub slots: Vec<Slot>,
    /// Workers that were taken out of their slot, or ended, and still have processes.
    pub retiring: Vec<Worker>,
    pub(super) rollout: Option<Rollout>,
    /// The settings to return to if the rollout fails.
    pub(super) fallback: Option<config::Service>,
    life: Life,
    published: Option<Publication>,
    /// The ports whose inherited sockets stay open: its workers have them, or the next workers of
    /// its slots will.
    kept_ports: BTreeSet<SocketAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Open,
    /// Its listeners are closing and their accept queues are being emptied; the workers still
    /// serve.
    Closing(RetireReason),
    /// Its workers are being taken out of service.
    Closed,
}

impl Service {
    pub(super) fn new(config: config::Service, now: Instant) -> Self {
        let slots = numbered(&config, &[], &[])
            .into_iter()
            .map(|(number, port)| Slot::new(number, port, Arc::clone(&config.worker), now))
            .collect();
        Self {
            config,
            slots,
            retiring: Vec::new(),
            rollout: None,
            fallback: None,
            life: Life::Open,
            published: None,
            kept_ports: BTreeSet::new(),
        }
    }

    /// The workers that can be handed a connection now.
    #[must_use]
    pub fn rotation(&self) -> Rotation {
        let workers = self.slots.iter().filter_map(Slot::serving).map(|worker| worker.id).collect();
        let coming = self.slots.iter().map(|slot| self.coming(slot)).min();
        Rotation { workers, coming: coming.unwrap_or(Coming::Never) }
    }

    /// The current rotation with the service's name and its routing settings.
    #[must_use]
    pub fn publication(&self) -> Publication {
        let routing = Arc::new(self.config.routing.clone());
        Publication { service: self.name(), rotation: self.rotation(), routing }
    }

    fn coming(&self, slot: &Slot) -> Coming {
        if slot.on_its_way() {
            Coming::Now
        } else if slot.is_vacant() && !slot.drained && !slot.leaving && self.is_filled() {
            // A start that is due but waits for the predecessor to be gone counts as due too.
            Coming::At(slot.start_at)
        } else {
            Coming::Never
        }
    }

    /// All workers that are not gone, in any phase.
    pub fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.slots.iter().flat_map(Slot::workers).chain(&self.retiring)
    }

    /// Whether the service is neither being removed nor being stopped.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.life == Life::Open
    }

    /// Whether vacant slots are filled: while the service is open; and, when lbd stops, until its
    /// listeners are empty, since clients that are still let in may have to wait for a worker.
    pub(super) fn is_filled(&self) -> bool {
        matches!(self.life, Life::Open | Life::Closing(RetireReason::Stopping))
    }

    /// The outgoing workers, including those in slots that are retired as soon as the listeners are
    /// empty.
    pub(super) fn outgoing(&self) -> impl Iterator<Item = &Worker> {
        let closing = self.slots.iter().filter(|_| !self.is_open());
        closing.flat_map(Slot::workers).chain(&self.retiring)
    }

    /// Whether the service is closed and has no workers left.
    pub(super) fn is_gone(&self) -> bool {
        self.life == Life::Closed && self.workers().next().is_none()
    }

    /// Applies new settings: adds and removes slots, changes policies at once, and replaces workers
    /// whose settings changed one at a time. What did not change is not disturbed.
    pub(super) fn apply(
        &mut self,
        target: config::Service,
        ticket: Option<Ticket>,
        kind: Kind,
        cx: &mut Context<'_>,
    ) {
        if self.rollout.is_some() && target == self.config {
            self.join_rollout(ticket, cx);
            return;
        }
        self.life = Life::Open;
        let previous = mem::replace(&mut self.config, target);
        let wanted = Arc::clone(&self.config.worker);
        let proving = self.abandon_rollout("another change was applied", Some(&wanted), cx);
        self.reconcile(&previous, kind, cx);
        let is_new = |slot: &&Slot| slot.unproven || slot.spec != self.config.worker;
        // The worker that the previous rollout was proving is waited for first, and its slot is not
        // replaced again.
        let is_left = |slot: &&Slot| {
            slot.spec != self.config.worker || proving.is_none_or(|id| !slot.holds(id))
        };
        let slots = self.slots.iter().filter(|slot| !slot.leaving);
        let has_new_slots = slots.clone().any(|slot| slot.unproven);
        let todo = slots.filter(is_new).filter(is_left).map(|slot| slot.number).collect();
        // While a rollout is unfinished, the fallback from before it is kept: the settings since
        // then have never been proven.
        let is_unproven = previous.worker != self.config.worker || has_new_slots;
        if kind == Kind::Reload && self.fallback.is_none() && is_unproven {
            self.fallback = Some(previous);
        }
        self.begin_rollout(todo, proving, ticket, kind, cx);
    }

    /// Stops accepting. The workers are stopped when [`Event::Closed`](super::Event::Closed) says
    /// that no client will need one any more.
    pub(super) fn close(&mut self, why: RetireReason, cx: &mut Context<'_>) {
        match self.life {
            Life::Open => {
                let reason = match why {
                    RetireReason::Stopping => "lbd is stopping",
                    RetireReason::Removed | RetireReason::Replaced | RetireReason::Unhealthy => {
                        "the service was removed"
                    }
                };
                self.abandon_rollout(reason, None, cx);
                self.life = Life::Closing(why);
                cx.effects.push(Effect::Close { service: self.name() });
            }
            // A removed service stays removed when lbd stops as well: its slots are not filled
            // again.
            Life::Closing(_) | Life::Closed => {}
        }
    }

    /// Kills every worker at once.
    pub(super) fn abort(&mut self, cx: &mut Context<'_>) {
        self.end_rollout(Err("lbd is stopping".to_owned()), cx);
        self.life = Life::Closed;
        self.retiring.extend(self.slots.drain(..).flat_map(Slot::into_workers));
        for worker in &mut self.retiring {
            worker.kill(RetireReason::Stopping, cx.now, cx.effects);
        }
    }

    /// The service's listeners are closed, and their accept queues are empty: its workers are
    /// retired.
    pub(super) fn closed(&mut self, cx: &mut Context<'_>) {
        if let Life::Closing(why) = self.life {
            self.life = Life::Closed;
            for worker in mem::take(&mut self.slots).into_iter().flat_map(Slot::into_workers) {
                self.dismiss(worker, why, cx);
            }
        }
    }

    /// The addresses that the slot's next worker needs, and may have to wait for.
    pub(super) fn addresses_of(&self, slot: &Slot) -> impl Iterator<Item = SocketAddr> {
        let next = slot.wanted_port().map(|port| slot.spec.address(port));
        let replacement = slot.fixed_port.map(|port| self.config.worker.address(port));
        next.into_iter().chain(replacement)
    }

    /// When to call [`Self::timeout`] next.
    pub(super) fn deadline(&self, ports: &Ports) -> Option<Instant> {
        let workers = self.workers().filter_map(|worker| worker.deadline(&self.config.health));
        let slots =
            self.slots.iter().filter(|slot| self.may_fill(slot, ports)).map(|slot| slot.start_at);
        let recycling = self.recycling_deadline(ports);
        workers.chain(slots).chain(recycling).chain(self.proven_at()).min()
    }

    /// Starts the workers that are due, and publishes the rotation if it changed. Called after
    /// every event that may have changed the service, when the rollouts have advanced.
    pub(super) fn settle(&mut self, ports: &Ports, cx: &mut Context<'_>) {
        for index in 0..self.slots.len() {
            let slot = &self.slots[index];
            if slot.start_at <= cx.now && self.may_fill(slot, ports) {
                let id = self.spawn(index, Position::Slot, cx);
                if let Some(rollout) = &mut self.rollout {
                    rollout.filled(self.slots[index].number, id);
                }
            }
        }
        let is_published = |published: &Publication| {
            *published.routing == self.config.routing && published.rotation == self.rotation()
        };
        if !self.published.as_ref().is_some_and(is_published) && !self.is_gone() {
            let publication = self.publication();
            self.published = Some(publication.clone());
            cx.effects.push(Effect::Publish(publication));
        }
        let kept = self.inherited_ports();
        let before = mem::replace(&mut self.kept_ports, kept);
        let released = before.difference(&self.kept_ports);
        cx.effects.extend(released.map(|&address| Effect::ReleasePort { address }));
    }

    /// Whether the sockets at `address` stay open for workers of this service to inherit.
    pub(super) fn keeps_port(&self, address: &SocketAddr) -> bool {
        self.kept_ports.contains(address)
    }

    fn inherited_ports(&self) -> BTreeSet<SocketAddr> {
        let slots = self.slots.iter().map(|slot| (&slot.spec, slot.last_port));
        let workers = self.workers().map(|worker| (&worker.spec, worker.port));
        let inherited = |(spec, port): (&Arc<config::WorkerSpec>, Option<u16>)| {
            port.filter(|_| spec.socket == SocketMode::Inherit).map(|port| spec.address(port))
        };
        slots.chain(workers).filter_map(inherited).collect()
    }

    pub(super) fn name(&self) -> Arc<str> {
        Arc::clone(&self.config.name)
    }

    pub(super) fn note(&self, fact: Fact, cx: &mut Context<'_>) {
        cx.effects.push(Effect::Note(Note { service: self.name(), worker: None, fact }));
    }

    /// Starts a worker in the slot at `index`.
    pub(super) fn spawn(
        &mut self,
        index: usize,
        position: Position,
        cx: &mut Context<'_>,
    ) -> WorkerId {
        cx.shared.ids += 1;
        let id = WorkerId(cx.shared.ids);
        let slot = &mut self.slots[index];
        // A replacement on purpose does not count as a restart, unless it is for an unhealthy
        // worker.
        let vacates = |rollout: &Rollout| {
            !matches!(rollout.recycles(), Some(LimitExceeded::Unhealthy { .. }))
                && (position != Position::Slot || rollout.vacates(slot.number))
        };
        let wanted = self.rollout.as_ref().is_some_and(vacates);
        slot.generation += 1;
        let port = match position {
            Position::Slot => slot.wanted_port(),
            Position::Beside => slot.fixed_port,
            Position::StandIn => None,
        };
        let spec = Arc::clone(&slot.spec);
        let mut worker = Worker::new(id, spec, slot.number, slot.fixed_port, cx.now);
        worker.port = port;
        worker.usage = LimitUsage::new(&mut cx.shared.random);
        worker.generation = slot.generation;
        worker.counts = slot.begun && !wanted;
        worker.stands_in = position == Position::StandIn;
        cx.effects.push(Effect::Spawn(Spawn {
            id,
            service: Arc::clone(&self.config.name),
            slot: slot.number,
            port,
            stands_in_for: slot.fixed_port.filter(|_| position == Position::StandIn),
            spec: Arc::clone(&slot.spec),
        }));
        let undrains = self.rollout.as_ref().is_some_and(|rollout| rollout.undrains(slot.number));
        // If the new worker is the only one in the slot, the slot is drained no more. (Beside an
        // old, drained worker that happens when the new one is proven.)
        slot.drained &= !(undrains && position == Position::Slot);
        if slot.drained && !undrains {
            worker.drain(cx.now, cx.effects);
        }
        match position {
            Position::Slot => slot.current = Some(worker),
            Position::Beside | Position::StandIn => slot.next = Some(worker),
        }
        id
    }

    /// Takes a worker out of its slot, and out of service as [`Self::dismiss`] does.
    pub(super) fn retire(&mut self, id: WorkerId, why: RetireReason, cx: &mut Context<'_>) {
        if let Some(worker) = self.slots.iter_mut().find_map(|slot| slot.take(id)) {
            self.dismiss(worker, why, cx);
        }
    }

    /// Drains a slot for an operator. Its worker keeps running: if it is just being replaced for a
    /// limit that it exceeds, that rollout is abandoned.
    pub(super) fn drain(&mut self, number: u32, cx: &mut Context<'_>) {
        let Some(index) = self.slots.iter().position(|slot| slot.number == number) else { return };
        if let Some(rollout) = &mut self.rollout {
            rollout.leave_drained(number);
        }
        let is_in_rotation = |worker: &Worker| worker.drained.is_none();
        if self.slots[index].drained && !self.slots[index].workers().any(is_in_rotation) {
            return;
        }
        self.slots[index].drained = true;
        let is_replaced = self.slots[index].next.is_some();
        if is_replaced && self.rollout.as_ref().and_then(Rollout::recycles).is_some() {
            self.abandon_rollout("an operator took the worker out of rotation", None, cx);
        }
        let slot = &mut self.slots[index];
        for worker in slot.workers_mut().filter(|worker| worker.drained.is_none()) {
            worker.drain(cx.now, cx.effects);
        }
        let subject = note_of_slot(slot);
        self.note_of(subject, Fact::Drained, cx);
    }

    /// Undoes [`Self::drain`].
    pub(super) fn resume(&mut self, number: u32, cx: &mut Context<'_>) {
        let slot = self.slots.iter_mut().find(|slot| slot.number == number && slot.drained);
        let Some(slot) = slot else { return };
        slot.drained = false;
        for worker in slot.workers_mut().filter(|worker| worker.drained.is_some()) {
            worker.undrain(cx.now, cx.effects);
        }
        let subject = note_of_slot(slot);
        self.note_of(subject, Fact::Resumed, cx);
    }

    /// Takes a worker that left its slot out of service by the rules of `stop`.
    pub(super) fn dismiss(&mut self, mut worker: Worker, why: RetireReason, cx: &mut Context<'_>) {
        if !matches!(worker.phase, Phase::Draining { .. } | Phase::Stopping { .. } | Phase::Ended) {
            self.note_of(note_of(&worker), Fact::Draining { why }, cx);
        }
        worker.retire(why, &self.config.stop, cx.now, cx.effects);
        self.retiring.push(worker);
    }

    /// Whether a worker can be started in the slot: the slot is vacant and to be filled, outgoing
    /// workers leave room on its port, and, if only one worker of a slot may run at a time, they
    /// are gone.
    fn may_fill(&self, slot: &Slot, ports: &Ports) -> bool {
        let room = |port| ports.leave_room(slot.spec.address(port), slot.spec.socket, 0);
        self.is_filled()
            && slot.is_vacant()
            && !slot.leaving
            && slot.wanted_port().is_none_or(room)
            && !(self.runs_one_at_a_time(slot) && self.is_being_left(slot))
    }

    /// Whether a worker of this slot must be gone before the next one is started: because of
    /// `rollout.order`, or because its replacement failed beside it.
    fn runs_one_at_a_time(&self, slot: &Slot) -> bool {
        let is_tried_alone = |rollout: &Rollout| {
            rollout.vacates(slot.number)
                && matches!(rollout.recycles(), Some(LimitExceeded::Unhealthy { .. }))
        };
        self.config.rollout.order == Order::StopFirst
            || self.rollout.as_ref().is_some_and(is_tried_alone)
    }

    /// Whether an earlier worker of this slot is not gone yet.
    fn is_being_left(&self, slot: &Slot) -> bool {
        self.retiring.iter().any(|worker| worker.slot == slot.number)
    }

    pub(super) fn note_worker(&self, id: WorkerId, fact: Fact, cx: &mut Context<'_>) {
        if let Some(worker) = self.workers().find(|worker| worker.id == id) {
            self.note_of(note_of(worker), fact, cx);
        }
    }

    pub(super) fn note_of(&self, worker: NoteWorker, fact: Fact, cx: &mut Context<'_>) {
        let note = Note { service: self.name(), worker: Some(worker), fact };
        cx.effects.push(Effect::Note(note));
    }

    pub(super) fn with(&mut self, id: WorkerId, act: impl FnOnce(&mut Worker, &config::Service)) {
        let worker = self
            .slots
            .iter_mut()
            .flat_map(Slot::workers_mut)
            .chain(&mut self.retiring)
            .find(|worker| worker.id == id);
        if let Some(worker) = worker {
            act(worker, &self.config);
        }
    }
}
