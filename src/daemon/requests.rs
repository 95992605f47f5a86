//! The requests of operators over the admin API, and the answers they wait for.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    sync::Arc,
    time::SystemTime,
};

use tracing::warn;

use super::{Daemon, Stage};
use crate::{
    admin::{Answer, Failure, Reloaded, Request, Restarted, SlotDrain, metrics, status},
    config,
    supervisor::{Chosen, Coming, Event, Service, Ticket},
};

/// The requests that the supervisor works on, by their tickets.
#[derive(Debug, Default)]
pub(super) struct Requests {
    tickets: u64,
    waiting: HashMap<Ticket, Waiting>,
    finished: Vec<(Ticket, Result<Vec<String>, String>)>,
    /// Restarts of several services that share one answer.
    sets: HashMap<u64, RestartSet>,
}

/// The answer to give when a request has ended, and who gets it.
#[derive(Debug)]
pub(super) enum Waiting {
    Reload {
        askers: Vec<Asker>,
        reloaded: Reloaded,
        before: Generations,
    },
    Restart {
        asker: Answer<Restarted>,
        restarted: Restarted,
    },
    /// One restart of a [`RestartSet`].
    PartOf {
        set: u64,
    },
}

/// A client of the admin API that waits for a reload.
#[derive(Debug)]
pub(super) enum Asker {
    Reload(Answer<Reloaded>),
    /// After the reload, every worker of the service (or of all services, or of the one slot) is to
    /// be new.
    Restart {
        service: Option<String>,
        slot: Option<u32>,
        answer: Answer<Restarted>,
    },
}

/// The generation of each slot's worker, by service and slot number.
pub(super) type Generations = BTreeMap<(Arc<str>, u32), u64>;

/// Restarts that are under way together and share one answer.
#[derive(Debug)]
struct RestartSet {
    left: usize,
    errors: Vec<String>,
    asker: Answer<Restarted>,
    restarted: Restarted,
}

impl Asker {
    pub(super) fn refuse(self, failure: Failure) {
        // The asker may have gone away; then sending fails.
        match self {
            Self::Reload(answer) => _ = answer.send(Err(failure)),
            Self::Restart { answer, .. } => _ = answer.send(Err(failure)),
        }
    }
}

/// When the configuration was loaded, and whether that succeeded.
#[derive(Debug)]
pub(super) struct ReloadHistory {
    /// When the configuration in force was loaded.
    pub(super) loaded_at: SystemTime,
    /// The result of the last reload; the start counts as a successful one.
    pub(super) last: status::Reload,
    /// The ticket of the last accepted reload, until another is tried.
    ticket: Option<Ticket>,
    ok: u64,
    refused: u64,
    failed: u64,
    /// When the last successful reload was loaded.
    succeeded_at: SystemTime,
}

impl Requests {
    pub(super) fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    /// Makes a ticket for a request that somebody waits for.
    pub(super) fn wait(&mut self, waiting: Waiting) -> Ticket {
        let ticket = self.ticket();
        self.waiting.insert(ticket, waiting);
        ticket
    }

    /// Stores the supervisor's answer, which [`Daemon::tell_askers`] passes on.
    pub(super) fn finish(&mut self, ticket: Ticket, result: Result<Vec<String>, String>) {
        self.finished.push((ticket, result));
    }

    fn part_finished(&mut self, number: u64, result: Result<Vec<String>, String>) {
        let Some(set) = self.sets.get_mut(&number) else { return };
        set.left -= 1;
        match result {
            Ok(warnings) => set.restarted.warnings.extend(warnings),
            Err(error) => set.errors.push(error),
        }
        if set.left == 0
            && let Some(RestartSet { errors, asker, restarted, .. }) = self.sets.remove(&number)
        {
            let _ = asker.send(match errors.is_empty() {
                true => Ok(restarted),
                false => Err(Failure::Failed(errors.join("\n"))),
            });
        }
    }
}

impl ReloadHistory {
    pub(super) fn new() -> Self {
        let now = SystemTime::now();
        let last = status::Reload { ok: true, at: rfc3339(now), error: None };
        Self { loaded_at: now, last, ticket: None, ok: 0, refused: 0, failed: 0, succeeded_at: now }
    }

    pub(super) fn refused(&mut self, error: String) {
        self.record(SystemTime::now(), Some(error));
        self.ticket = None;
        self.refused += 1;
    }

    /// Records an accepted reload. Its rollouts may still fail; their result comes with `ticket`.
    pub(super) fn accepted(&mut self, ticket: Ticket) {
        self.loaded_at = SystemTime::now();
        self.record(self.loaded_at, None);
        self.ticket = Some(ticket);
    }

    /// Records the result of a reload's rollouts. All are counted, but only the last reload's
    /// result is the current state.
    fn rolled_out(&mut self, ticket: Ticket, result: &Result<Vec<String>, String>) {
        let is_last = self.ticket == Some(ticket);
        match result {
            Ok(_) => {
                self.ok += 1;
                if is_last {
                    self.succeeded_at = self.loaded_at;
                }
            }
            Err(error) => {
                self.failed += 1;
                if is_last {
                    self.record(self.loaded_at, Some(error.clone()));
                }
            }
        }
    }

    pub(super) fn counts(&self) -> metrics::Reloads {
        metrics::Reloads {
            ok: self.ok,
            refused: self.refused,
            failed: self.failed,
            last_ok: self.last.ok,
            succeeded_at: self.succeeded_at,
        }
    }

    fn record(&mut self, at: SystemTime, error: Option<String>) {
        self.last = status::Reload { ok: error.is_none(), at: rfc3339(at), error };
    }
}

impl Daemon<'_> {
    /// Answers a request at once, or has [`Self::tell_askers`] answer it later.
    pub(super) fn request(&mut self, request: Request) {
        match request {
            Request::Status(asker) => {
                let _ = asker.send(self.status());
            }
            Request::Metrics(asker) => {
                let _ = asker.send(self.metrics());
            }
            Request::Reload(asker) => self.reload(vec![Asker::Reload(asker)]),
            Request::ReloadAndRestart { service, slot, answer } => {
                self.reload(vec![Asker::Restart { service, slot, answer }]);
            }
            Request::Restart { service, slot, answer } => self.restart(&service, slot, answer),
            Request::SetDrained { service, slot, drained, answer } => {
                let _ = answer.send(self.set_drained(&service, slot, drained));
            }
            Request::Stop if self.stage == Stage::Running => self.stop(),
            Request::Stop => {}
        }
    }

    /// Answers the requests that the supervisor has finished. Called at the end of a turn of the
    /// event loop, when all effects that the answers are about have been carried out.
    pub(super) fn tell_askers(&mut self) {
        // A request that is started here may finish at once.
        while !self.requests.finished.is_empty() {
            for (ticket, result) in mem::take(&mut self.requests.finished) {
                self.tell_asker(ticket, result);
            }
        }
    }

    fn tell_asker(&mut self, ticket: Ticket, result: Result<Vec<String>, String>) {
        match self.requests.waiting.remove(&ticket) {
            Some(Waiting::Reload { askers, mut reloaded, before }) => {
                self.reload_history.rolled_out(ticket, &result);
                if let Ok(warnings) = &result {
                    reloaded.warnings.clone_from(warnings);
                }
                for asker in askers {
                    match (asker, &result) {
                        (asker, Err(error)) => asker.refuse(Failure::Failed(error.clone())),
                        (Asker::Reload(answer), Ok(_)) => _ = answer.send(Ok(reloaded.clone())),
                        (Asker::Restart { service, slot, answer }, Ok(_)) => {
                            self.restart_rest(service, slot, &before, reloaded.clone(), answer);
                        }
                    }
                }
            }
            Some(Waiting::Restart { asker, mut restarted }) => {
                let answer = match result {
                    Ok(warnings) => {
                        restarted.warnings.extend(warnings);
                        Ok(restarted)
                    }
                    // The warnings may explain the failure.
                    Err(error) => {
                        let lines = std::iter::once(error).chain(restarted.warnings);
                        Err(Failure::Failed(lines.collect::<Vec<_>>().join("\n")))
                    }
                };
                let _ = asker.send(answer);
            }
            Some(Waiting::PartOf { set }) => self.requests.part_finished(set, result),
            // The first `Apply` at the daemon's start: nobody waits for its answer.
            None => {}
        }
    }

    fn restart(&mut self, name: &str, slot: Option<u32>, asker: Answer<Restarted>) {
        let service = match self.known(name, slot) {
            Ok(service) => service,
            Err(failure) => {
                let _ = asker.send(Err(failure));
                return;
            }
        };
        let workers = slot.map_or(service.slots.len(), |_| 1);
        let service = Some(Arc::clone(&service.config.name));
        let warnings = self.is_file_changed().into_iter().collect();
        let restarted = Restarted { workers, reloaded: None, warnings };
        let ticket = self.requests.wait(Waiting::Restart { asker, restarted });
        self.handle(Event::Restart { service, slots: slot.into(), ticket });
    }

    /// A remark if the configuration file has changed since it was loaded.
    fn is_file_changed(&self) -> Option<String> {
        let path = self.config.path.as_deref()?;
        let now = config::digest(path)?;
        if self.config.digest == Some(now) {
            return None;
        }
        let path = path.display();
        let hint = "lbd reload applies it, lbd restart --reload does both";
        warn!(%path, hint, "the file has changed since it was loaded, a restart does not apply it");
        Some(format!(
            "{path} has changed since it was loaded, and workers are started with what was loaded: \
             `lbd reload` applies it, `lbd restart --reload` does both"
        ))
    }

    /// The generation of each slot's worker.
    pub(super) fn generations(&self) -> Generations {
        let services = self.supervisor.services();
        let slots = services.flat_map(|service| {
            let name = &service.config.name;
            service.slots.iter().map(|s| ((Arc::clone(name), s.number), s.generation))
        });
        slots.collect()
    }

    /// After a reload: restarts the workers that the reload has not replaced.
    fn restart_rest(
        &mut self,
        service: Option<String>,
        slot: Option<u32>,
        before: &Generations,
        reloaded: Reloaded,
        asker: Answer<Restarted>,
    ) {
        if let Some(name) = &service
            && let Err(failure) = self.known(name, slot)
        {
            let _ = asker.send(Err(failure));
            return;
        }
        let services = self.supervisor.services();
        let wanted = services.filter(|found| {
            let name = &*found.config.name;
            found.is_open() && service.as_deref().is_none_or(|wanted| wanted == name)
        });
        let (mut workers, mut old) = (0, Vec::new());
        for service in wanted {
            let slots = service.slots.iter().filter(|s| slot.is_none_or(|slot| slot == s.number));
            let name = &service.config.name;
            let is_old = |number: u32, generation: u64| {
                before.get(&(Arc::clone(name), number)) == Some(&generation)
            };
            workers += slots.clone().count();
            let left = slots.filter(|s| is_old(s.number, s.generation)).map(|s| s.number);
            let left: Vec<_> = left.collect();
            if !left.is_empty() {
                let slots = slot.map_or(Chosen::These(left), Chosen::One);
                old.push((Arc::clone(name), slots));
            }
        }
        let restarted = Restarted { workers, reloaded: Some(reloaded), warnings: Vec::new() };
        if old.is_empty() {
            let _ = asker.send(Ok(restarted));
            return;
        }
        let (set, left) = (self.requests.ticket().0, old.len());
        let errors = Vec::new();
        self.requests.sets.insert(set, RestartSet { left, errors, asker, restarted });
        for (service, slots) in old {
            let ticket = self.requests.wait(Waiting::PartOf { set });
            self.handle(Event::Restart { service: Some(service), slots, ticket });
        }
    }

    /// Drains a slot, or resumes it. When this returns, the new rotation is published to the data
    /// threads.
    fn set_drained(&mut self, name: &str, slot: u32, drained: bool) -> Result<SlotDrain, Failure> {
        let service = Arc::clone(&self.known(name, Some(slot))?.config.name);
        self.handle(match drained {
            true => Event::Drain { service, slot },
            false => Event::Resume { service, slot },
        });
        let service = self.known(name, Some(slot))?;
        let worker = self.slot_status(service, slot).ok_or_else(|| no_slot(service, slot))?;
        let rotation = service.rotation();
        let in_rotation = rotation.workers.len();
        let warning = match rotation.coming {
            Coming::Never if in_rotation == 0 => Some(format!(
                "no worker of {name} is in rotation, and none is to come: its clients are turned \
                 away until one is resumed"
            )),
            Coming::Never | Coming::Now | Coming::At(_) => None,
        };
        let state = worker.state;
        // A connection that the kernel gave the worker just now is in no sample yet: unless the
        // worker is known to hold none, count at least one.
        let known = worker.connections.active.unwrap_or(0) + worker.connections.queued.unwrap_or(0);
        let current = service.slots.iter().find(|found| found.number == slot);
        let current = current.and_then(|slot| slot.current.as_ref());
        let unseen = current.is_some_and(|worker| !self.workers.holds_nothing(worker.id));
        let active = known.max(u64::from(unseen));
        Ok(SlotDrain { drained: worker.drained, state, active, in_rotation, warning })
    }

    /// The service `name`, if it has this slot and may be changed.
    fn known(&self, name: &str, slot: Option<u32>) -> Result<&Service, Failure> {
        if self.stage != Stage::Running {
            return Err(Failure::Failed("lbd is stopping".to_owned()));
        }
        let Some(service) = self.supervisor.service(name) else {
            let known: Vec<_> = self.config.services.iter().map(|service| &*service.name).collect();
            let message = format!("there is no service {name:?}, but {}", known.join(", "));
            return Err(Failure::NotFound(message));
        };
        if !service.is_open() {
            return Err(Failure::Failed(format!("{name} is being removed")));
        }
        let unknown = |slot: &u32| service.slots.iter().all(|found| found.number != *slot);
        slot.filter(unknown).map_or(Ok(service), |slot| Err(no_slot(service, slot)))
    }
}

fn no_slot(service: &Service, slot: u32) -> Failure {
    let known: Vec<_> = service.slots.iter().map(|slot| slot.number.to_string()).collect();
    let (name, known) = (&service.config.name, known.join(", "));
    Failure::NotFound(format!("there is no slot {slot} in {name}, but {known}"))
}

pub(super) fn rfc3339(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}
