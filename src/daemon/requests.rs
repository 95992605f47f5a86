//! What operators ask for over the admin socket, and who waits for the end of it.

use std::{collections::HashMap, mem, sync::Arc, time::SystemTime};

use super::{Daemon, Stage};
use crate::{
    admin::{Answer, Failure, Placed, Reloaded, Request, Restarted, metrics, status},
    control::{Coming, Event, Service, Ticket},
};

/// Requests that control works on, by their tickets.
#[derive(Debug, Default)]
pub(super) struct Requests {
    tickets: u64,
    waiting: HashMap<Ticket, Waiting>,
    finished: Vec<(Ticket, Result<Vec<String>, String>)>,
}

/// What is to be said at the end, and to whom.
#[derive(Debug)]
pub(super) enum Waiting {
    Reload { askers: Vec<Answer<Reloaded>>, reloaded: Reloaded },
    Restart { asker: Answer<Restarted>, restarted: Restarted },
}

/// When the configuration was read, and how that went.
#[derive(Debug)]
pub(super) struct Loads {
    /// When the one in force was.
    pub(super) loaded_at: SystemTime,
    /// How the last attempt went; the start counts as one that went well.
    pub(super) last: status::Reload,
    /// Of the last reload that was accepted, until another is tried.
    ticket: Option<Ticket>,
    ok: u64,
    refused: u64,
    failed: u64,
    /// When the last one that went well was read.
    succeeded_at: SystemTime,
}

impl Requests {
    pub(super) fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    /// A ticket that somebody waits for.
    pub(super) fn wait(&mut self, waiting: Waiting) -> Ticket {
        let ticket = self.ticket();
        self.waiting.insert(ticket, waiting);
        ticket
    }

    /// Takes note of control's answer, which [`Daemon::tell_askers`] passes on.
    pub(super) fn finish(&mut self, ticket: Ticket, result: Result<Vec<String>, String>) {
        self.finished.push((ticket, result));
    }
}

impl Loads {
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

    /// Its rollouts may still fail: they answer to `ticket`.
    pub(super) fn accepted(&mut self, ticket: Ticket) {
        self.loaded_at = SystemTime::now();
        self.record(self.loaded_at, None);
        self.ticket = Some(ticket);
    }

    /// Of several reloads only the last one says how it is.
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
    /// Answers at once, or sees to it that [`Self::tell_askers`] will.
    pub(super) fn request(&mut self, request: Request) {
        match request {
            Request::Status(asker) => {
                let _ = asker.send(self.status());
            }
            Request::Metrics(asker) => {
                let _ = asker.send(self.metrics());
            }
            Request::Reload(asker) => self.reload(vec![asker]),
            Request::Restart { service, slot, answer } => self.restart(&service, slot, answer),
            Request::Place { service, slot, drained, answer } => {
                let _ = answer.send(self.place(&service, slot, drained));
            }
            Request::Stop if self.stage == Stage::Running => self.stop(),
            Request::Stop => {}
        }
    }

    /// Answers what control has finished. Called at the end of a turn, when everything that the
    /// answer is about has been carried out.
    pub(super) fn tell_askers(&mut self) {
        for (ticket, result) in mem::take(&mut self.requests.finished) {
            match self.requests.waiting.remove(&ticket) {
                Some(Waiting::Reload { askers, reloaded }) => {
                    self.loads.rolled_out(ticket, &result);
                    let answer = result.map(|warnings| Reloaded { warnings, ..reloaded });
                    let answer = answer.map_err(Failure::Failed);
                    tell(askers, &answer);
                }
                Some(Waiting::Restart { asker, restarted }) => {
                    let answer = result.map(|warnings| Restarted { warnings, ..restarted });
                    tell([asker], &answer.map_err(Failure::Failed));
                }
                // The start of the daemon, which nobody asked for.
                None => {}
            }
        }
    }

    fn restart(&mut self, name: &str, slot: Option<u32>, asker: Answer<Restarted>) {
        let service = match self.known(name, slot) {
            Ok(service) => service,
            Err(failure) => return tell([asker], &Err(failure)),
        };
        let workers = slot.map_or(service.slots.len(), |_| 1);
        let service = Some(Arc::clone(&service.config.name));
        let restarted = Restarted { workers, warnings: Vec::new() };
        let ticket = self.requests.wait(Waiting::Restart { asker, restarted });
        self.handle(Event::Restart { service, slot, ticket });
    }

    /// When this returns, the data threads know it.
    fn place(&mut self, name: &str, slot: u32, drained: bool) -> Result<Placed, Failure> {
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
        // What the kernel gave it in this instant is counted in the next.
        let known = worker.connections.active.unwrap_or(0) + worker.connections.queued.unwrap_or(0);
        let current = service.slots.iter().find(|found| found.number == slot);
        let current = current.and_then(|slot| slot.current.as_ref());
        let unseen = current.is_some_and(|worker| !self.fleet.holds_nothing(worker.id));
        let active = known.max(u64::from(unseen));
        Ok(Placed { drained: worker.drained, state, active, in_rotation, warning })
    }

    /// The service `name`, which has this slot, and on which there is something to do.
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

/// Whoever asked may have gone away since.
pub(super) fn tell<T: Clone>(
    askers: impl IntoIterator<Item = Answer<T>>,
    answer: &Result<T, Failure>,
) {
    for asker in askers {
        let _ = asker.send(answer.clone());
    }
}

pub(super) fn rfc3339(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}
