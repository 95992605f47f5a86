//! The supervision core: what happens to the workers, and when.
//!
//! It owns the state of every service, slot and worker, and does nothing itself: no I/O, no clock,
//! no task. The driver tells it what happened ([`Supervisor::handle`]) and what time it is
//! ([`Supervisor::timeout`]), and carries out the [`Effect`]s that come back. So each transition can
//! be tested by name, and whole histories by simulation.
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
mod rollout;
mod service;
#[cfg(test)]
mod simulation;
mod slot;
#[cfg(test)]
mod tests;
mod worker;

use std::{collections::HashMap, sync::Arc, time::Instant};

pub use event::{
    Chosen, DownKind, Effect, Event, ExitCause, Fact, LimitExceeded, Note, NoteWorker,
    ProbeOutcome, RetireReason, Spawn, Ticket, Untaken, Verdict, WorkerId,
};
pub use service::{Coming, Rotation, Service};
pub use slot::{LastExit, Slot};
pub use worker::{Phase, Worker};

use ports::Outgoing;
use rollout::Kind;
use service::{Context, Shared};

/// The state of everything that is supervised.
#[derive(Debug)]
pub struct Supervisor {
    services: Vec<Service>,
    shared: Shared,
    stopping: bool,
    finished: bool,
    waiting: HashMap<Ticket, Waiting>,
}

/// A request, and how many services have not answered it yet.
#[derive(Debug)]
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
    /// A supervisor of nothing yet; [`Event::Apply`] gives it services. `seed` is for the jitter of
    /// restarts: the same seed and events give the same actions.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            services: Vec::new(),
            shared: Shared::new(seed),
            stopping: false,
            finished: false,
            waiting: HashMap::new(),
        }
    }

    /// Takes in what happened, at `now`, and tells what to do. Events about a worker or service
    /// that is gone change nothing.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
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
                for service in &mut self.services {
                    if service.worker_event(id, event.clone(), &mut cx) {
                        break;
                    }
                }
            }
            Event::Closed { service: name } => {
                if let Some(service) = self.services.iter_mut().find(|s| s.config.name == name) {
                    service.closed(&mut cx);
                }
            }
            Event::Apply { services, ticket } => self.apply(services, ticket, now, &mut effects),
            Event::Restart { service, slots, ticket } => {
                self.restart(service.as_deref(), &slots, ticket, now, &mut effects);
            }
            Event::Drain { service: name, slot } => {
                if let Some(service) = open(&mut self.services, &name) {
                    service.drain(slot, &mut cx);
                }
            }
            Event::Resume { service: name, slot } => {
                if let Some(service) = open(&mut self.services, &name) {
                    service.resume(slot, &mut cx);
                }
            }
            Event::Stop => {
                self.stopping = true;
                for service in &mut self.services {
                    service.close(RetireReason::Stopping, &mut cx);
                }
            }
            Event::Abort => {
                self.stopping = true;
                for service in &mut self.services {
                    service.abort(&mut cx);
                }
            }
        }
        self.settle(effects, now)
    }

    /// Looks at the clock: to be called when [`Self::deadline`] has come.
    pub fn timeout(&mut self, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        let mut cx = Context { now, shared: &mut self.shared, effects: &mut effects };
        for service in &mut self.services {
            service.timeout(&mut cx);
        }
        self.settle(effects, now)
    }

    /// When [`Self::timeout`] has something to do, if nothing happens before.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let outgoing = self.outgoing();
        self.services.iter().filter_map(|service| service.deadline(&outgoing)).min()
    }

    /// The services, those that are on their way out included.
    #[must_use]
    pub fn services(&self) -> &[Service] {
        &self.services
    }

    /// The service of that name.
    #[must_use]
    pub fn service(&self, name: &str) -> Option<&Service> {
        self.services.iter().find(|service| &*service.config.name == name)
    }

    /// Who can be handed a connection of this service.
    #[must_use]
    pub fn rotation(&self, service: &str) -> Option<Rotation> {
        self.service(service).map(Service::rotation)
    }

    fn apply(
        &mut self,
        targets: Vec<crate::config::Service>,
        ticket: Ticket,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        if self.stopping {
            effects.push(Effect::Answer { ticket, result: Err("lbd is stopping".to_owned()) });
            return;
        }
        self.waiting.insert(ticket, Waiting::new(targets.len()));
        let mut cx = Context { now, shared: &mut self.shared, effects };
        cx.shared.owners.clear();
        for target in &targets {
            cx.shared.claim_ports(target);
        }
        for service in &mut self.services {
            if !targets.iter().any(|target| target.name == service.config.name) {
                service.close(RetireReason::Removed, &mut cx);
            }
        }
        for target in targets {
            match self.services.iter_mut().find(|s| s.config.name == target.name) {
                Some(service) => service.apply(target, Some(ticket), Kind::Reload, &mut cx),
                None => {
                    self.services.push(Service::new(target, now));
                    cx.effects.push(Effect::Answer { ticket, result: Ok(Vec::new()) });
                }
            }
        }
    }

    fn restart(
        &mut self,
        name: Option<&str>,
        slots: &Chosen,
        ticket: Ticket,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        let chosen = |service: &Service| {
            service.is_open()
                && name.is_none_or(|name| &*service.config.name == name)
                && (*slots == Chosen::All || service.slots.iter().any(|s| slots.has(s.number)))
        };
        let services = self.services.iter().filter(|service| chosen(service)).count();
        if self.stopping || services == 0 {
            let error = match (name, slots) {
                _ if self.stopping => "lbd is stopping".to_owned(),
                (Some(name), Chosen::All | Chosen::These(_)) => {
                    format!("there is no service {name:?}")
                }
                (Some(name), Chosen::One(slot)) => format!("there is no slot {slot} in {name:?}"),
                (None, _) => "there is no service".to_owned(),
            };
            effects.push(Effect::Answer { ticket, result: Err(error) });
            return;
        }
        self.waiting.insert(ticket, Waiting::new(services));
        let mut cx = Context { now, shared: &mut self.shared, effects };
        for service in self.services.iter_mut().filter(|service| chosen(service)) {
            service.restart(slots, ticket, &mut cx);
        }
    }

    /// Lets every service draw its conclusions, forgets those that are gone, and puts the actions
    /// in order.
    fn settle(&mut self, mut effects: Vec<Effect>, now: Instant) -> Vec<Effect> {
        for index in 0..self.services.len() {
            loop {
                let outgoing = self.outgoing();
                let mut cx = Context { now, shared: &mut self.shared, effects: &mut effects };
                if !self.services[index].advance_rollout(&outgoing, &mut cx) {
                    break;
                }
            }
        }
        let outgoing = self.outgoing();
        let mut cx = Context { now, shared: &mut self.shared, effects: &mut effects };
        for service in &mut self.services {
            service.settle(&outgoing, &mut cx);
        }
        // A port may move from one service to another.
        let services = &self.services;
        effects.retain(|effect| match effect {
            Effect::ReleasePort { address } => !services.iter().any(|s| s.keeps_port(address)),
            _ => true,
        });
        self.services.retain(|service| {
            let gone = service.is_gone();
            if gone {
                effects.push(Effect::Forget { service: Arc::clone(&service.config.name) });
            }
            !gone
        });
        if self.stopping && self.services.is_empty() && !self.finished {
            self.finished = true;
            effects.push(Effect::Finished);
        }
        let mut effects = self.join_answers(effects);
        // Who waits is taken out of a queue before a worker is started that would take it over. Data
        // threads must see a rotation without a worker before that worker turns them away.
        effects.sort_by_key(|effect| match effect {
            Effect::DrainQueue { .. } | Effect::KeepQueue { .. } | Effect::ReleasePort { .. } => 0,
            Effect::Reinstate { .. } => 1,
            Effect::Publish { .. } => 2,
            _ => 3,
        });
        effects
    }

    /// The workers on their way out, of all services: a port may move from one to another.
    fn outgoing(&self) -> Outgoing {
        self.services.iter().flat_map(Service::outgoing).collect()
    }

    /// One answer to a request that several services work on, when the last has answered.
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
                // What they wrote last makes several lines of one error.
                let apart =
                    if errors.iter().any(|error| error.contains('\n')) { "\n" } else { "; " };
                let result = if errors.is_empty() { Ok(warnings) } else { Err(errors.join(apart)) };
                joined.push(Effect::Answer { ticket: *ticket, result });
            }
        }
        joined
    }
}

/// The service of that name, unless it is on its way out.
fn open<'s>(services: &'s mut [Service], name: &str) -> Option<&'s mut Service> {
    services.iter_mut().find(|service| service.is_open() && &*service.config.name == name)
}
