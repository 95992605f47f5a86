//! The supervision core: decides when workers are started, probed, replaced and stopped.
//!
//! This module owns the state of every service, slot and worker. It does no I/O, reads no clock and
//! runs no task. The driver (`daemon`) tells it what happened ([`Supervisor::handle`]) and what
//! time it is ([`Supervisor::timeout`]), and carries out the [`Effect`]s that it returns. So each
//! transition can be tested by itself, and whole histories by simulation.
//!
//! ```text
//! Supervisor ─ Service ─┬─ Slot ─┬─ current: Worker
//!                       │        └─ next: Worker      (its replacement, until it is proven)
//!                       ├─ retiring: Worker …         (on their way out)
//!                       └─ Rollout                    (replacing one slot after the other)
//! ```

mod backoff;
mod event;
mod health;
mod outcome;
mod ports;
mod reconcile;
mod recycle;
mod registry;
mod rollout;
mod service;
#[cfg(test)]
mod simulation;
mod slot;
#[cfg(test)]
mod tests;
mod worker;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

pub use event::{
    Chosen, Coming, Down, DownKind, Effect, Event, Exit, ExitCause, Fact, LimitExceeded, Note,
    NoteWorker, ProbeOrder, ProbeOutcome, Publication, RetireReason, Rotation, Spawn, Ticket,
    Untaken, Verdict, WorkerId,
};
pub use service::Service;
pub use slot::{LastExit, Slot};
pub use worker::{Phase, Worker};

use ports::Ports;
use registry::{Registry, ServiceKey, Touched};
use rollout::Kind;
use service::{Context, Shared};

/// The state of all supervised services.
#[derive(Debug, Clone)]
pub struct Supervisor {
    services: Registry,
    ports: Ports,
    shared: Shared,
    stopping: bool,
    finished: bool,
    waiting: HashMap<Ticket, Waiting>,
}

/// A request that has no answer yet, and how many services still have to answer it.
#[derive(Debug, Clone)]
struct Waiting {
    services: usize,
    warnings: Vec<String>,
    errors: Vec<String>,
}

impl Waiting {
    fn new(services: usize) -> Self {
        Self { services, warnings: Vec::new(), errors: Vec::new() }
    }
}

impl Supervisor {
    /// A supervisor without services; [`Event::Apply`] adds them. `seed` seeds the jitter of
    /// restarts: the same seed and the same events give the same effects.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            services: Registry::default(),
            ports: Ports::default(),
            shared: Shared::new(seed),
            stopping: false,
            finished: false,
            waiting: HashMap::new(),
        }
    }

    /// Handles an event that happened at `now`, and returns what the driver has to do. An event
    /// about a worker or a service that is gone changes nothing.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Effect> {
        let (mut effects, mut touched) = (Vec::new(), Touched::new());
        let mut cx = Context { now, shared: &mut self.shared, effects: &mut effects };
        match event {
            Event::Spawned { id, .. }
            | Event::Started { id, .. }
            | Event::Failed { id, .. }
            | Event::Exited { id, .. }
            | Event::Gone { id }
            | Event::Probed { id, .. }
            | Event::Memory { id, .. }
            | Event::Idle { id } => {
                let key = self.services.of_worker(id);
                if let Some(service) = key.and_then(|key| self.services.get_mut(key)) {
                    service.worker_event(id, event, &mut cx);
                }
                touched.extend(key);
            }
            Event::Closed { service: name } => {
                touched.extend(self.services.named(&name));
                self.each(&touched, &mut effects, now, Service::closed);
            }
            Event::Apply { services, ticket } => {
                touched = self.apply(services, ticket, now, &mut effects);
            }
            Event::Restart { service, slots, ticket } => {
                touched = self.restart(service.as_deref(), &slots, ticket, now, &mut effects);
            }
            Event::Drain { service: name, slot } => {
                touched.extend(self.open(&name));
                self.each(&touched, &mut effects, now, |service, cx| service.drain(slot, cx));
            }
            Event::Resume { service: name, slot } => {
                touched.extend(self.open(&name));
                self.each(&touched, &mut effects, now, |service, cx| service.resume(slot, cx));
            }
            Event::Stop => {
                self.stopping = true;
                touched.extend(self.services.keys());
                let close = |service: &mut Service, cx: &mut Context<'_>| {
                    service.close(RetireReason::Stopping, cx);
                };
                self.each(&touched, &mut effects, now, close);
            }
            Event::Abort => {
                self.stopping = true;
                touched.extend(self.services.keys());
                self.each(&touched, &mut effects, now, Service::abort);
            }
        }
        self.settle(touched, effects, now)
    }

    /// Handles every deadline that has passed at `now`. To be called when [`Self::deadline`] has
    /// come.
    pub fn timeout(&mut self, now: Instant) -> Vec<Effect> {
        let (mut effects, due) = (Vec::new(), self.services.due(now));
        self.each(&due, &mut effects, now, Service::timeout);
        self.settle(due, effects, now)
    }

    /// When to call [`Self::timeout`] next, if no event comes before; `None` if no deadline is
    /// pending.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.services.deadline()
    }

    /// All services in the order in which they were added, including those that are being removed.
    pub fn services(&self) -> impl Iterator<Item = &Service> + Clone {
        self.services.iter()
    }

    /// The service of that name.
    #[must_use]
    pub fn service(&self, name: &str) -> Option<&Service> {
        self.services.get(self.services.named(name)?)
    }

    /// The workers of this service that can be handed a connection.
    #[must_use]
    pub fn rotation(&self, service: &str) -> Option<Rotation> {
        self.service(service).map(Service::rotation)
    }

    fn each(
        &mut self,
        keys: &Touched,
        effects: &mut Vec<Effect>,
        now: Instant,
        act: impl Fn(&mut Service, &mut Context<'_>),
    ) {
        let mut cx = Context { now, shared: &mut self.shared, effects };
        for &key in keys {
            if let Some(service) = self.services.get_mut(key) {
                act(service, &mut cx);
            }
        }
    }

    /// The service of that name, unless it is being removed or stopped.
    fn open(&self, name: &str) -> Option<ServiceKey> {
        let key = self.services.named(name)?;
        self.services.get(key).filter(|service| service.is_open()).map(|_| key)
    }

    fn apply(
        &mut self,
        targets: Vec<crate::config::Service>,
        ticket: Ticket,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) -> Touched {
        if self.stopping {
            effects.push(Effect::Answer { ticket, result: Err("lbd is stopping".to_owned()) });
            return Touched::new();
        }
        self.waiting.insert(ticket, Waiting::new(targets.len()));
        let mut cx = Context { now, shared: &mut self.shared, effects };
        cx.shared.owners.clear();
        for target in &targets {
            cx.shared.claim_ports(target);
        }
        let wanted: HashSet<_> = targets.iter().map(|target| Arc::clone(&target.name)).collect();
        let is_removed = |service: &Service| !wanted.contains(&service.config.name);
        let removed = self.services.chosen(is_removed);
        for &key in &removed {
            if let Some(service) = self.services.get_mut(key) {
                service.close(RetireReason::Removed, &mut cx);
            }
        }
        for target in targets {
            let known = self.services.named(&target.name);
            match known.and_then(|key| self.services.get_mut(key)) {
                Some(service) => service.apply(target, Some(ticket), Kind::Reload, &mut cx),
                None => {
                    self.services.add(Service::new(target, now));
                    cx.effects.push(Effect::Answer { ticket, result: Ok(Vec::new()) });
                }
            }
        }
        self.services.keys().collect()
    }

    fn restart(
        &mut self,
        name: Option<&str>,
        slots: &Chosen,
        ticket: Ticket,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) -> Touched {
        let chosen = self.services.chosen(|service| {
            service.is_open()
                && name.is_none_or(|name| &*service.config.name == name)
                && (*slots == Chosen::All || service.slots.iter().any(|s| slots.has(s.number)))
        });
        if self.stopping || chosen.is_empty() {
            let error = match (name, slots) {
                _ if self.stopping => "lbd is stopping".to_owned(),
                (Some(name), Chosen::All | Chosen::These(_)) => {
                    format!("there is no service {name:?}")
                }
                (Some(name), Chosen::One(slot)) => format!("there is no slot {slot} in {name:?}"),
                (None, _) => "there is no service".to_owned(),
            };
            effects.push(Effect::Answer { ticket, result: Err(error) });
            return Touched::new();
        }
        self.waiting.insert(ticket, Waiting::new(chosen.len()));
        self.each(&chosen, effects, now, |service, cx| service.restart(slots, ticket, cx));
        chosen
    }

    /// Finishes an event: advances the rollouts and starts the workers that are due in the services
    /// that changed, forgets the services that are gone, and sorts the effects.
    fn settle(
        &mut self,
        mut touched: Touched,
        mut effects: Vec<Effect>,
        now: Instant,
    ) -> Vec<Effect> {
        self.occupy_ports(&mut touched);
        let mut cx = Context { now, shared: &mut self.shared, effects: &mut effects };
        // When a rollout step occupies or frees a port, the services that wait for that port are
        // examined again too.
        let mut left = touched.clone();
        while let Some(key) = left.pop_first() {
            let Some(service) = self.services.get_mut(key) else { continue };
            while service.advance_rollout(&self.ports, &mut cx) {
                let waiting = self.ports.occupy(key, service.outgoing());
                left.extend(&waiting);
                touched.extend(waiting);
            }
        }
        for key in &touched {
            if let Some(service) = self.services.get_mut(*key) {
                service.settle(&self.ports, &mut cx);
            }
        }
        // Another service may have taken the port over: then it stays open.
        effects.retain(|effect| match effect {
            Effect::ReleasePort { address } => !self.services().any(|s| s.keeps_port(address)),
            _ => true,
        });
        self.occupy_ports(&mut touched);
        for key in touched {
            let Some(service) = self.services.get(key) else { continue };
            if service.is_gone() {
                effects.push(Effect::Forget { service: Arc::clone(&service.config.name) });
                self.ports.forget(key);
                self.services.remove(key);
            } else {
                let asked = service.slots.iter().flat_map(|slot| service.addresses_of(slot));
                self.ports.ask(key, asked);
                self.services.file(key, &self.ports);
            }
        }
        if self.stopping && self.services.is_empty() && !self.finished {
            self.finished = true;
            effects.push(Effect::Finished);
        }
        let mut effects = self.join_answers(effects);
        // Accept queues are drained before a worker is started that would inherit them. And a
        // rotation without a worker is published before that worker refuses connections, so that no
        // data thread still picks it.
        effects.sort_by_key(|effect| match effect {
            Effect::DrainQueue { .. } | Effect::KeepQueue { .. } | Effect::ReleasePort { .. } => 0,
            Effect::Reinstate { .. } => 1,
            Effect::Publish { .. } => 2,
            _ => 3,
        });
        effects
    }

    /// Records which ports the outgoing workers of these services still occupy. Adds the services
    /// that wait for such a port to `touched`.
    fn occupy_ports(&mut self, touched: &mut Touched) {
        for key in touched.clone() {
            let Some(service) = self.services.get(key) else { continue };
            touched.extend(self.ports.occupy(key, service.outgoing()));
        }
    }

    /// Merges the answers of the services that work on one request into a single answer, given when
    /// the last of them has answered.
    fn join_answers(&mut self, effects: Vec<Effect>) -> Vec<Effect> {
        let mut joined = Vec::with_capacity(effects.len());
        for effect in effects {
            let Effect::Answer { ticket, result } = &effect else {
                joined.push(effect);
                continue;
            };
            let Some(waiting) = self.waiting.get_mut(ticket) else {
                joined.push(effect);
                continue;
            };
            waiting.services -= 1;
            match result {
                Ok(warnings) => waiting.warnings.extend(warnings.iter().cloned()),
                Err(error) => waiting.errors.push(error.clone()),
            }
            if waiting.services == 0
                && let Some(Waiting { warnings, errors, .. }) = self.waiting.remove(ticket)
            {
                // An error that quotes a worker's last output has several lines.
                let apart =
                    if errors.iter().any(|error| error.contains('\n')) { "\n" } else { "; " };
                let result = if errors.is_empty() { Ok(warnings) } else { Err(errors.join(apart)) };
                joined.push(Effect::Answer { ticket: *ticket, result });
            }
        }
        joined
    }
}

#[cfg(test)]
impl Supervisor {
    /// Asserts that every index agrees with a full scan.
    fn check_indexes(&self) {
        self.services.check(&self.ports);
    }

    /// Asserts that a service whose deadline has not come has nothing to do.
    fn check_rest(&self, now: Instant) {
        let due = self.services.due(now);
        let rest = self.services.keys().filter(|key| !due.contains(key)).collect();
        let (mut copy, mut effects) = (self.clone(), Vec::new());
        copy.each(&rest, &mut effects, now, Service::timeout);
        let effects = copy.settle(rest, effects, now);
        assert_eq!(effects, [], "not told by the deadline {:?}", self.deadline());
        assert_eq!(copy.deadline(), self.deadline(), "the deadline is not that of all");
    }
}
