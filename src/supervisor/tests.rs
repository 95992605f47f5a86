//! Each transition by name, against a driver and a clock that are made up.

mod drains;
mod lives;
mod probes;
mod queues;
mod recycling;
mod reloads;
mod rollouts;
mod settling;
mod skipped;
mod stand_ins;
mod stops;
mod unhealthy;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    num::NonZeroU32,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Chosen, Coming, Down, DownKind, Effect, Event, Exit, Fact, Phase, ProbeOrder, ProbeOutcome,
    Publication, Service, Spawn, Supervisor, Ticket, Untaken, Verdict, WorkerId,
};
use crate::config::{
    self, DEFAULT_HOST, Drain, Order, Output, Program, Restart, Rollout, Slots, SocketMode, Stop,
    WorkerSpec,
};

const MS: fn(u64) -> Duration = Duration::from_millis;
const SEC: fn(u64) -> Duration = Duration::from_secs;

/// A worker that differs from another one by its command.
pub(super) fn spec(command: &str) -> Arc<WorkerSpec> {
    Arc::new(WorkerSpec {
        program: Program::Command(vec![command.to_owned()]),
        host: DEFAULT_HOST,
        socket: SocketMode::Bind,
        proxy_protocol: None,
        public: Vec::new(),
        env: BTreeMap::new(),
        user: None,
        group: None,
        umask: None,
        directory: PathBuf::from("/"),
        output: Output::Null,
        open_files: None,
        processes: None,
    })
}

/// A service with every default, but a restart delay that knows no jitter, always 100 ms, and no
/// time to settle.
pub(super) fn service(name: &str, command: &str, slots: Slots) -> config::Service {
    config::Service {
        name: name.into(),
        listen: Vec::new(),
        unix_access: Default::default(),
        slots,
        worker: spec(command),
        routing: config::Routing::default(),
        health: config::Health::default(),
        restart: Restart { max_delay: MS(100), ..Restart::default() },
        rollout: Rollout { settle: Duration::ZERO, ..Rollout::default() },
        stop: Stop::default(),
        limits: config::Limits::default(),
    }
}

/// The service "web" on these ports.
fn ports(command: &str, ports: &[u16]) -> config::Service {
    service("web", command, Slots::Ports(ports.to_vec()))
}

/// The service "web" with that many workers on free ports.
fn count(command: &str, workers: u32) -> config::Service {
    service("web", command, Slots::Count(NonZeroU32::new(workers).unwrap()))
}

/// `service`, whose old workers go before the new ones are started.
fn stop_first(mut service: config::Service) -> config::Service {
    service.rollout.order = Order::StopFirst;
    service
}

/// A supervisor, the time, and what it asked for.
struct World {
    supervisor: Supervisor,
    now: Instant,
    spawns: Vec<Spawn>,
    probing: BTreeSet<u64>,
    facts: Vec<Fact>,
    /// The workers whose queues are drained.
    untaken: BTreeMap<u64, Untaken>,
    /// The ports that were released.
    released: Vec<SocketAddr>,
}

impl World {
    /// Nothing healthy yet: `service` was just applied, with ticket 0.
    fn begin(service: config::Service) -> Self {
        let mut world = Self {
            supervisor: Supervisor::new(1),
            now: Instant::now(),
            spawns: Vec::new(),
            probing: BTreeSet::new(),
            facts: Vec::new(),
            untaken: BTreeMap::new(),
            released: Vec::new(),
        };
        world.apply(0, [service]);
        world
    }

    /// All workers of `service` are healthy.
    fn healthy(service: config::Service) -> Self {
        let mut world = Self::begin(service);
        for spawn in world.spawns.clone() {
            world.up(spawn.id.0);
        }
        world
    }

    /// What was asked for, as text; facts, and what is about queues, are kept apart.
    fn record(&mut self, effects: Vec<Effect>) -> Vec<String> {
        let mut shown = Vec::new();
        for effect in effects {
            shown.push(match effect {
                Effect::Spawn(spawn) => {
                    let port = spawn.port.map_or_else(|| "any".to_owned(), |port| port.to_string());
                    let Program::Command(command) = &spawn.spec.program else {
                        panic!("{spawn:?}")
                    };
                    let text = format!("spawn {} {} on {port}", spawn.id.0, command[0]);
                    self.spawns.push(spawn);
                    text
                }
                Effect::Signal { id, signal, .. } => format!("{signal} {}", id.0),
                Effect::Kill { id } => format!("kill {}", id.0),
                Effect::Probe(ProbeOrder { id, .. }) => {
                    assert!(self.probing.insert(id.0), "{} is probed twice at once", id.0);
                    format!("probe {}", id.0)
                }
                Effect::Publish(Publication { service, .. }) => format!("publish {service}"),
                Effect::Retire { id } => format!("retire {}", id.0),
                Effect::Reinstate { id } => format!("reinstate {}", id.0),
                Effect::DrainQueue { id, why } => {
                    self.untaken.insert(id.0, why);
                    continue;
                }
                Effect::KeepQueue { id } => {
                    self.untaken.remove(&id.0);
                    continue;
                }
                Effect::ReleasePort { address } => {
                    self.released.push(address);
                    continue;
                }
                Effect::Close { service } => format!("close {service}"),
                Effect::Forget { service } => format!("forget {service}"),
                Effect::Answer { ticket, result: Ok(warnings) } => {
                    let warnings = warnings.iter().map(|warning| format!(" ({warning})"));
                    format!("answer {}{}", ticket.0, warnings.collect::<String>())
                }
                Effect::Answer { ticket, result: Err(e) } => format!("answer {}: {e}", ticket.0),
                Effect::Restored(service) => format!("restored {}", service.name),
                Effect::Finished => "finished".to_owned(),
                Effect::Note(note) => {
                    self.facts.push(note.fact);
                    continue;
                }
            });
        }
        shown
    }

    fn event(&mut self, event: Event) -> Vec<String> {
        let effects = self.supervisor.handle(event, self.now);
        self.record(effects)
    }

    fn apply<const N: usize>(
        &mut self,
        ticket: u64,
        services: [config::Service; N],
    ) -> Vec<String> {
        self.event(Event::Apply { services: services.into(), ticket: Ticket(ticket) })
    }

    fn restart(&mut self, ticket: u64, service: Option<&str>) -> Vec<String> {
        let service = service.map(Into::into);
        self.event(Event::Restart { service, slots: Chosen::All, ticket: Ticket(ticket) })
    }

    fn restart_slot(&mut self, ticket: u64, slot: u32) -> Vec<String> {
        let service = Some("web".into());
        self.event(Event::Restart { service, slots: Chosen::One(slot), ticket: Ticket(ticket) })
    }

    fn drain(&mut self, slot: u32) -> Vec<String> {
        self.event(Event::Drain { service: "web".into(), slot })
    }

    fn resume(&mut self, slot: u32) -> Vec<String> {
        self.event(Event::Resume { service: "web".into(), slot })
    }

    /// Lets time pass, from one deadline to the next.
    fn wait(&mut self, time: Duration) -> Vec<String> {
        let (end, mut shown) = (self.now + time, Vec::new());
        while let Some(deadline) = self.supervisor.deadline().filter(|&at| at <= end) {
            self.now = self.now.max(deadline);
            let effects = self.supervisor.timeout(self.now);
            shown.extend(self.record(effects));
            let next = self.supervisor.deadline();
            assert!(next.is_none_or(|next| next > self.now), "a deadline that does not pass");
        }
        self.now = end;
        shown
    }

    fn spawned(&mut self, id: u64) -> Vec<String> {
        let spawn = self.spawns.iter().find(|spawn| spawn.id.0 == id).unwrap();
        let port = spawn.port.or(Some(40_000 + u16::try_from(id).unwrap()));
        self.event(Event::Spawned { id: WorkerId(id), port })
    }

    fn started(&mut self, id: u64) -> Vec<String> {
        let mut shown = self.spawned(id);
        let pid = 1000 + i32::try_from(id).unwrap();
        shown.extend(self.event(Event::Started { id: WorkerId(id), pid }));
        shown
    }

    /// The next probe's result, as soon as there is a probe; what followed from the result.
    fn probed(&mut self, id: u64, error: Option<&str>) -> Vec<String> {
        while !self.probing.contains(&id) {
            let deadline = self.supervisor.deadline().expect("no probe is due");
            self.wait(deadline.saturating_duration_since(self.now));
        }
        self.answer_probe(id, error)
    }

    fn answer_probe(&mut self, id: u64, error: Option<&str>) -> Vec<String> {
        let verdict = error.map_or(Verdict::Passed, |error| Verdict::Failed(error.to_owned()));
        self.judge_probe(id, verdict)
    }

    fn judge_probe(&mut self, id: u64, verdict: Verdict) -> Vec<String> {
        self.probing.remove(&id);
        let outcome = ProbeOutcome { took: MS(1), verdict };
        self.event(Event::Probed { id: WorkerId(id), outcome })
    }

    fn pass(&mut self, id: u64) -> Vec<String> {
        self.probed(id, None)
    }

    fn fail(&mut self, id: u64) -> Vec<String> {
        self.probed(id, Some("connection refused"))
    }

    /// As many failures as make a healthy worker unhealthy.
    fn fall(&mut self, id: u64) -> Vec<String> {
        self.fail(id);
        self.fail(id);
        self.fail(id)
    }

    /// Runs, and passed its first probe.
    fn up(&mut self, id: u64) -> Vec<String> {
        self.started(id);
        self.pass(id)
    }

    fn exit(&mut self, id: u64) -> Vec<String> {
        self.event(Event::Exited { id: WorkerId(id), exit: Exit::Code(1), said: Vec::new() })
    }

    fn gone(&mut self, id: u64) -> Vec<String> {
        self.probing.remove(&id);
        self.event(Event::Gone { id: WorkerId(id) })
    }

    fn end(&mut self, id: u64) -> Vec<String> {
        let mut shown = self.exit(id);
        shown.extend(self.gone(id));
        shown
    }

    fn fail_to_start(&mut self, id: u64) -> Vec<String> {
        let reason = "no such file".to_owned();
        let mut shown = self.event(Event::Failed { id: WorkerId(id), reason, cheap: false });
        shown.extend(self.gone(id));
        shown
    }

    /// Nothing was started: the port is taken.
    fn port_taken(&mut self, id: u64) -> Vec<String> {
        let reason = "port 9002 is taken".to_owned();
        let mut shown = self.event(Event::Failed { id: WorkerId(id), reason, cheap: true });
        shown.extend(self.gone(id));
        shown
    }

    fn idle(&mut self, id: u64) -> Vec<String> {
        self.event(Event::Idle { id: WorkerId(id) })
    }

    fn closed(&mut self) -> Vec<String> {
        self.event(Event::Closed { service: "web".into() })
    }

    fn web(&self) -> &Service {
        self.supervisor.service("web").unwrap()
    }

    fn phase(&self, id: u64) -> Option<Phase> {
        self.web().workers().find(|worker| worker.id.0 == id).map(|worker| worker.phase)
    }

    fn rotation(&self) -> Vec<u64> {
        self.web().rotation().workers.into_iter().map(|id| id.0).collect()
    }

    fn coming(&self) -> Coming {
        self.web().rotation().coming
    }

    /// The number, the port and the worker of each slot.
    fn slots(&self) -> Vec<(u32, Option<u16>, Option<u64>)> {
        let current = |slot: &super::Slot| slot.current.as_ref().map(|worker| worker.id.0);
        self.web().slots.iter().map(|slot| (slot.number, slot.fixed_port, current(slot))).collect()
    }
}
