//! A simulated machine that carries out the core's effects, slowly and unreliably, and panics if an
//! effect makes no sense.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    super::{
        Effect, Event, Exit, Fact, Phase, ProbeOrder, ProbeOutcome, Publication, RetireReason,
        Rotation, Slot, Spawn, Supervisor, Ticket, Untaken, Verdict, Worker, WorkerId,
    },
    MS,
    process::{Process, Told},
};
use crate::config::{Order, Program, Service, SocketMode, WORKERS_ON_A_PORT};

/// The longest time from SIGKILL, or the end of a program, until no process of it is left.
const LEAVING: u64 = 2000;
/// The longest time to start or end a program, or to empty a listener.
const PROMPT: u64 = 500;

/// The longest time that an abort may take.
pub(super) const DYING: Duration = Duration::from_millis(PROMPT + LEAVING + PROMPT);
/// The longest time that a stop may take: the listeners, the longest drain, the longest stop
/// timeout, the end.
pub(super) const STOPPING: Duration = DYING.saturating_add(Duration::from_millis(PROMPT + 8000));

#[derive(Debug)]
enum Pending {
    Event(Event),
    Idle { id: WorkerId, turns: u32 },
    Closed { service: Arc<str> },
}

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) supervisor: Supervisor,
    pub(super) now: Instant,
    pub(super) random: fastrand::Rng,
    /// The configuration that was last applied or restored.
    pub(super) wanted: Vec<Service>,
    /// The requests without an answer.
    pub(super) tickets: Vec<Ticket>,
    /// Nothing fails any more.
    pub(super) calm: bool,
    pub(super) finished: bool,
    pub(super) steps: u64,
    /// The slots that operators drained and did not resume, as long as they exist.
    drained: BTreeSet<(Arc<str>, u32)>,
    /// Those of `drained` for which a restart was asked since: it may resume them.
    restarted: BTreeSet<(Arc<str>, u32)>,
    seed: u64,
    /// The programs that are not gone, as far as the core was told.
    processes: BTreeMap<WorkerId, Process>,
    published: BTreeMap<Arc<str>, Rotation>,
    pending: BTreeMap<(Instant, u64), Pending>,
    numbers: u64,
    newest: WorkerId,
    free_ports: u16,
    /// The workers whose queues are drained.
    untaken: BTreeMap<WorkerId, Untaken>,
    /// The ports whose sockets are inherited.
    inherited: BTreeSet<SocketAddr>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("LBD_SIM_SEED={} fails at step {}", self.seed, self.steps);
        }
    }
}

impl Machine {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            supervisor: Supervisor::new(seed),
            now: Instant::now(),
            random: fastrand::Rng::with_seed(seed),
            wanted: Vec::new(),
            tickets: Vec::new(),
            calm: false,
            finished: false,
            steps: 0,
            drained: BTreeSet::new(),
            restarted: BTreeSet::new(),
            seed,
            processes: BTreeMap::new(),
            published: BTreeMap::new(),
            pending: BTreeMap::new(),
            numbers: 0,
            newest: WorkerId(0),
            free_ports: 0,
            untaken: BTreeMap::new(),
            inherited: BTreeSet::new(),
        }
    }

    pub(super) fn ticket(&mut self) -> Ticket {
        self.numbers += 1;
        self.tickets.push(Ticket(self.numbers));
        Ticket(self.numbers)
    }

    /// Records a new configuration: pending closes of its services are dropped.
    pub(super) fn applied(&mut self, services: &[Service]) {
        self.wanted = services.to_vec();
        self.pending.retain(|_, pending| match pending {
            Pending::Closed { service } => services.iter().all(|s| s.name != *service),
            Pending::Event(_) | Pending::Idle { .. } => true,
        });
    }

    /// Lets the next thing happen: an event or a deadline.
    pub(super) fn proceed(&mut self) {
        let event = self.pending.first_key_value().map(|(&(at, _), _)| at);
        let deadline = self.supervisor.deadline();
        let Some(next) = event.into_iter().chain(deadline).min() else {
            self.now += MS(100);
            return;
        };
        self.now = self.now.max(next);
        let event_first = event == Some(next) && (deadline != Some(next) || self.random.bool());
        match self.pending.first_entry() {
            Some(entry) if event_first => {
                let pending = entry.remove();
                self.deliver(pending);
            }
            Some(_) | None => self.sweep(),
        }
    }

    /// Lets time pass while the daemon is too busy to notice.
    pub(super) fn sleep(&mut self) {
        self.now += MS(self.random.u64(0..3000));
    }

    /// Has the daemon handle its deadlines, whether one has passed or not.
    pub(super) fn sweep(&mut self) {
        // With a timeout of zero a deadline is due at once, but a worker has only a few of them.
        for _ in 0..4 {
            let effects = self.supervisor.timeout(self.now);
            self.perform(effects);
            if self.supervisor.deadline().is_none_or(|at| at > self.now) {
                return;
            }
        }
        panic!("a deadline that does not pass");
    }

    /// A client connects.
    pub(super) fn connect(&mut self) {
        let workers: Vec<_> = self.published.values().flat_map(|r| r.workers.clone()).collect();
        if let Some(id) = self.random.choice(workers) {
            self.processes.get_mut(&id).unwrap().connections += 1;
        }
    }

    /// A connection ends.
    pub(super) fn disconnect(&mut self) {
        let busy = self.processes.iter().filter(|(_, process)| process.connections > 0);
        let busy: Vec<_> = busy.map(|(&id, _)| id).collect();
        if let Some(id) = self.random.choice(busy) {
            self.processes.get_mut(&id).unwrap().connections -= 1;
            self.look_if_idle(id);
        }
    }

    /// A program ends unasked, or its guard is killed.
    pub(super) fn crash(&mut self) {
        if let Some(id) = self.any_running() {
            self.end(id, 0);
        }
    }

    /// A program answers no more, or again.
    pub(super) fn hang(&mut self) {
        if let Some(id) = self.any_running() {
            let process = self.processes.get_mut(&id).unwrap();
            process.hung = !process.hung;
        }
    }

    /// A program's memory is measured.
    pub(super) fn grow(&mut self) {
        if let Some(id) = self.any_running() {
            let bytes = self.random.u64(0..200);
            self.handle(Event::Memory { id, bytes });
        }
    }

    pub(super) fn restart(&mut self, service: Option<Arc<str>>, slot: Option<u32>) {
        let ticket = self.ticket();
        let is_chosen = |name: &str| service.as_deref().is_none_or(|service| service == name);
        let slots = self.supervisor.services().filter(|found| is_chosen(&found.config.name));
        let slots = slots.map(|found| Arc::clone(&found.config.name));
        let chosen: Vec<_> = slots.filter_map(|name| Some((name, slot?))).collect();
        let before = (self.drained.clone(), self.restarted.clone());
        for key in chosen {
            self.drained.remove(&key);
            self.restarted.insert(key);
        }
        self.handle(Event::Restart { service, slots: slot.into(), ticket });
        if !self.tickets.contains(&ticket) {
            // The request was refused, or there is no such slot.
            (self.drained, self.restarted) = before;
        }
    }

    /// An operator drains or resumes a slot, which takes effect at once and lasts for as long as
    /// the slot does.
    pub(super) fn position(&mut self, service: Arc<str>, slot: u32, drain: bool) {
        let name = Arc::clone(&service);
        if !drain {
            self.drained.remove(&(Arc::clone(&name), slot));
        }
        self.handle(match drain {
            true => Event::Drain { service, slot },
            false => Event::Resume { service, slot },
        });
        let found = self.supervisor.service(&name).filter(|service| service.is_open());
        let found = found.and_then(|s| s.slots.iter().find(|found| found.number == slot));
        assert!(found.is_none_or(|found| found.drained == drain), "the wish is not kept");
        if drain && found.is_some() {
            self.restarted.remove(&(Arc::clone(&name), slot));
            self.drained.insert((name, slot));
        }
    }

    pub(super) fn resume_all(&mut self) {
        let slots = self.supervisor.services().flat_map(|service| {
            service.slots.iter().map(|slot| (Arc::clone(&service.config.name), slot.number))
        });
        for (service, slot) in slots.collect::<Vec<_>>() {
            self.position(service, slot, false);
        }
    }

    pub(super) fn handle(&mut self, event: Event) {
        let effects = self.supervisor.handle(event, self.now);
        self.perform(effects);
    }

    fn any_running(&mut self) -> Option<WorkerId> {
        let running = self.processes.iter().filter(|(_, process)| !process.ending);
        let running: Vec<_> = running.map(|(&id, _)| id).collect();
        self.random.choice(running)
    }

    fn deliver(&mut self, pending: Pending) {
        let event = match pending {
            Pending::Idle { id, turns } => {
                if self.processes.get(&id).is_none_or(|process| process.turns != turns) {
                    return;
                }
                Event::Idle { id }
            }
            Pending::Closed { service } => Event::Closed { service },
            Pending::Event(event) => event,
        };
        let told = match &event {
            Event::Spawned { id, port } => {
                let workers = self.supervisor.services().flat_map(super::super::Service::workers);
                let worker =
                    workers.filter(|w| w.spec.socket == SocketMode::Inherit).find(|w| w.id == *id);
                let address = |worker: &Worker| Some(worker.spec.address((*port)?));
                let opened = worker.and_then(address);
                self.inherited.extend(opened);
                None
            }
            Event::Started { id, .. } => Some((id, Told::Started)),
            Event::Failed { id, .. } | Event::Exited { id, .. } => Some((id, Told::Ended)),
            Event::Gone { id } => Some((id, Told::Gone)),
            Event::Probed { id, outcome } => {
                if let Some(process) = self.processes.get_mut(id) {
                    process.probing = false;
                    if let Some(service) = self.supervisor.service(&process.service) {
                        process.book.enter(&outcome.verdict, &service.config.health, self.now);
                    }
                }
                None
            }
            _ => None,
        };
        match told {
            Some((id, Told::Gone)) => drop(self.processes.remove(id)),
            Some((id, told)) => self.processes.get_mut(id).unwrap().told = told,
            None => {}
        }
        self.handle(event);
    }

    fn later(&mut self, at: Instant, pending: Pending) {
        self.numbers += 1;
        self.pending.insert((at, self.numbers), pending);
    }

    /// Sends an event about a worker to the core, after all its earlier events.
    fn tell(&mut self, id: WorkerId, delay: u64, event: Event) {
        let delay = MS(self.random.u64(0..=delay));
        let process = self.processes.get_mut(&id).unwrap();
        process.last = process.last.max(self.now + delay);
        let at = process.last;
        self.later(at, Pending::Event(event));
    }

    fn end(&mut self, id: WorkerId, delay: u64) {
        let process = self.processes.get_mut(&id).unwrap();
        if process.ending {
            return;
        }
        process.ending = true;
        process.connections = 0;
        if self.random.u8(..) < 240 {
            self.tell(id, delay, Event::Exited { id, exit: Exit::Code(1), said: Vec::new() });
        }
        let leaving = if self.random.bool() { 0 } else { LEAVING };
        self.tell(id, leaving, Event::Gone { id });
    }

    fn look_if_idle(&mut self, id: WorkerId) {
        let process = &self.processes[&id];
        if process.retired && process.connections == 0 {
            let turns = process.turns;
            let at = self.now + MS(self.random.u64(0..50));
            self.later(at, Pending::Idle { id, turns });
        }
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        self.steps += 1;
        self.check_retirements(&effects);
        for effect in effects {
            assert!(!self.finished, "{effect:?} after the end");
            self.carry_out(effect);
        }
        let services = &self.supervisor;
        let is_there = |(name, slot): &(Arc<str>, u32)| {
            let service = services.service(name);
            service.is_some_and(|service| service.slots.iter().any(|s| s.number == *slot))
        };
        self.drained.retain(is_there);
        self.restarted.retain(is_there);
        self.check();
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Spawn(spawn) => self.spawn(spawn),
            Effect::Signal { id, .. } => {
                let process = &self.processes[&id];
                assert_eq!(process.told, Told::Started, "{id:?} is signalled: {process:?}");
                assert!(process.retired, "{id:?} is signalled before it was retired");
                let spared = process.spared_until.is_some_and(|until| self.now < until);
                assert!(!spared || process.connections == 0, "{id:?} is cut off: {process:?}");
                if self.calm || !process.ignores_signals {
                    self.end(id, 2 * PROMPT);
                }
            }
            Effect::Kill { id } => {
                let process = self.processes.get_mut(&id).unwrap();
                assert!(process.told < Told::Ended && !process.killed, "{id:?} is killed");
                process.killed = true;
                self.end(id, PROMPT);
            }
            Effect::Probe(ProbeOrder { id, .. }) => {
                let calm = self.calm;
                let process = self.processes.get_mut(&id).unwrap();
                assert!(process.told == Told::Started && !process.probing, "{id:?} is probed");
                let known = self.supervisor.services().flat_map(super::super::Service::workers);
                let drained = known.filter(|w| w.drained.is_some()).any(|worker| worker.id == id);
                assert!(!process.retired || drained, "{id:?} is probed");
                process.probing = true;
                let good = !process.ending && (calm || !(process.hung || process.bad));
                let took = MS(self.random.u64(0..100));
                let error = "timed out".to_owned();
                let verdict = match self.random.u8(..) {
                    0..20 if !calm => Verdict::Unknown(error),
                    _ if good => Verdict::Passed,
                    20..60 => Verdict::Hopeless(error),
                    _ => Verdict::Failed(error),
                };
                let outcome = ProbeOutcome { took, verdict };
                self.later(self.now + took, Pending::Event(Event::Probed { id, outcome }));
            }
            Effect::Publish(Publication { service, rotation, .. }) => {
                self.published.insert(service, rotation);
            }
            Effect::Retire { id } => {
                assert!(!self.is_published(id), "{id:?} is retired while it is in rotation");
                if !self.processes[&id].retired {
                    self.turn(id, true);
                }
                self.look_if_idle(id);
            }
            Effect::Reinstate { id } => {
                assert!(!self.is_published(id), "{id:?} is in rotation before it is reinstated");
                self.turn(id, false);
            }
            Effect::DrainQueue { id, why } => _ = self.untaken.insert(id, why),
            Effect::KeepQueue { id } => {
                assert!(self.untaken.remove(&id).is_some(), "{id:?} took it all along");
            }
            Effect::ReleasePort { address } => {
                assert!(!self.is_inherited(address), "{address} is released");
                self.inherited.remove(&address);
            }
            Effect::Close { service } => {
                let at = self.now + MS(self.random.u64(0..PROMPT));
                self.later(at, Pending::Closed { service });
            }
            Effect::Forget { service } => {
                let left = |p: &Process| p.service == service;
                assert!(!self.processes.values().any(left), "{service} is forgotten");
                let rotation = self.published.remove(&service);
                assert!(rotation.is_none_or(|rotation| rotation.workers.is_empty()));
            }
            Effect::Answer { ticket, .. } => {
                let index = self.tickets.iter().position(|&waiting| waiting == ticket);
                self.tickets.remove(index.expect("nobody waits for this answer"));
            }
            Effect::Restored(service) => {
                let old = self.wanted.iter_mut().find(|wanted| wanted.name == service.name);
                *old.expect("nobody wants this service") = *service;
            }
            Effect::Note(note) => {
                let pid = note.worker.and_then(|worker| worker.pid);
                if let (Fact::Draining { why: RetireReason::Unhealthy }, Some(pid)) =
                    (note.fact, pid)
                {
                    let service = self.supervisor.service(&note.service).unwrap();
                    let until = self.now + service.config.stop.drain_timeout;
                    let id = WorkerId(u64::try_from(pid).unwrap());
                    self.processes.get_mut(&id).unwrap().spared_until = Some(until);
                }
            }
            Effect::Finished => {
                assert!(self.processes.is_empty());
                self.finished = true;
            }
        }
    }

    fn spawn(&mut self, spawn: Spawn) {
        let Spawn { id, port, spec, .. } = &spawn;
        let (id, port) = (*id, *port);
        let Program::Command(argv) = &spec.program else { panic!("{spec:?}") };
        let inherits = spec.socket == SocketMode::Inherit;
        let mut process = Process::new(&spawn, inherits, self.now, &mut self.random);
        let service = self.supervisor.service(&spawn.service).unwrap();
        let of_its_slot = |other: &&Process| {
            other.service == spawn.service && other.slot == spawn.slot && other.told != Told::Gone
        };
        let is_alone = !self.processes.values().any(|other| of_its_slot(&other));
        let stops_first = service.config.rollout.order == Order::StopFirst;
        assert!(is_alone || !stops_first, "{id:?} is started beside its predecessor");
        let slots = &service.slots;
        let slot = slots.iter().find(|slot| slot.number == spawn.slot);
        process.fixed_port = slot.and_then(|slot| slot.fixed_port);
        process.stands_in = process.fixed_port.is_some_and(|fixed| port != Some(fixed));
        process.bad |= argv[0] == "bad";
        let fate = if process.bad && !self.calm { self.random.u8(0..5) } else { 5 };
        let there = self.processes.values().filter(|other| port.is_some() && other.port == port);
        let others = there.clone().count();
        let share = inherits && there.clone().all(|other| other.inherits);
        assert!(others < if share { WORKERS_ON_A_PORT } else { 1 }, "port {port:?} is in use");
        assert!(id > self.newest, "{id:?} was used before");
        self.newest = id;
        self.processes.insert(id, process);
        match fate {
            0 => {
                self.processes.get_mut(&id).unwrap().ending = true;
                let (reason, cheap) = ("no such file".to_owned(), self.random.bool());
                self.tell(id, PROMPT, Event::Failed { id, reason, cheap });
                self.tell(id, PROMPT, Event::Gone { id });
            }
            1 => {} // stuck, until it is killed
            _ => {
                let port = port.unwrap_or_else(|| self.free_port());
                self.processes.get_mut(&id).unwrap().port = Some(port);
                self.tell(id, PROMPT, Event::Spawned { id, port: Some(port) });
                self.tell(id, PROMPT, Event::Started { id, pid: i32::try_from(id.0).unwrap() });
                match fate {
                    2 => self.end(id, PROMPT),
                    // The program is healthy at first, and ends during `rollout.settle`.
                    3 => {
                        self.processes.get_mut(&id).unwrap().bad = false;
                        self.end(id, 4 * PROMPT);
                    }
                    _ => {}
                }
            }
        }
    }

    /// No port is given out twice: lbd keeps a socket that a worker is to inherit.
    fn free_port(&mut self) -> u16 {
        self.free_ports += 1;
        40_000 + self.free_ports
    }

    fn turn(&mut self, id: WorkerId, retired: bool) {
        let process = self.processes.get_mut(&id).unwrap();
        assert!(process.retired != retired, "{id:?}: {process:?}");
        process.retired = retired;
        process.turns += 1;
    }

    fn is_published(&self, id: WorkerId) -> bool {
        self.published.values().any(|rotation| rotation.workers.contains(&id))
    }

    /// Checks that exactly the workers that operators drained are drained.
    fn check_wishes(&self) {
        for service in self.supervisor.services().filter(|service| service.is_open()) {
            for slot in &service.slots {
                let wish = (Arc::clone(&service.config.name), slot.number);
                assert!(slot.drained || !self.drained.contains(&wish), "{wish:?} is forgotten");
                // After a restart, the new worker of a drained slot need not be drained.
                let is_out =
                    |current: bool| slot.drained && (current || !self.restarted.contains(&wish));
                let current = slot.current.as_ref().map(|worker| worker.id);
                for id in slot.workers().map(|worker| worker.id) {
                    let (out, retired) = (is_out(current == Some(id)), self.processes[&id].retired);
                    assert!(retired || !out, "{id:?} in {slot:?}");
                    assert!(!retired || slot.drained, "{id:?} in {slot:?}");
                    assert!(!retired || !self.is_published(id), "{id:?} is in rotation");
                }
            }
        }
    }

    /// With start-first order, no serving worker of a slot is retired for a successor that has not
    /// been healthy for `rollout.settle`. A stand-in has proven its settings already.
    fn check_retirements(&self, effects: &[Effect]) {
        for effect in effects {
            let Effect::Retire { id } = effect else { continue };
            let serves = |process: &&Process| {
                !process.stands_in && process.book.since.is_some() && self.is_published(*id)
            };
            let Some(process) = self.processes.get(id).filter(serves) else { continue };
            let service = self.supervisor.service(&process.service).unwrap();
            let settings = &service.config.rollout;
            let Some(slot) = service.slots.iter().find(|slot| {
                let same = slot.number == process.slot && slot.fixed_port == process.fixed_port;
                same && !slot.drained
            }) else {
                continue;
            };
            if !service.is_open() || settings.order == Order::StopFirst {
                continue;
            }
            let filler = slot.current.as_ref().map(|worker| worker.id);
            let successor = filler.and_then(|filler| self.processes.get(&filler));
            let since = successor.and_then(|process| process.book.since);
            // A replacement that served meanwhile is retired if the old worker is healthy again.
            let is_newer = filler.is_some_and(|filler| filler > *id);
            let settle = if is_newer { settings.settle } else { Duration::ZERO };
            let has_settled = since.is_some_and(|since| since + settle <= self.now);
            assert!(has_settled, "{id:?} makes way for {successor:?}");
        }
    }

    /// Checks that exactly the workers that are healthy by their probes are in rotation. (Probe
    /// results from while a worker was retired don't count.)
    fn check_health(&self) {
        let slots = self.supervisor.services().flat_map(|service| &service.slots);
        for worker in slots.flat_map(Slot::workers) {
            let process = &self.processes[&worker.id];
            if process.turns > 0 {
                continue;
            }
            let (healthy, serves) = (process.book.since.is_some(), self.is_published(worker.id));
            // A replacement serves only if the worker that it replaces does not.
            assert!(healthy || !serves, "{worker:?} is in rotation");
            let fills = process.told == Told::Started && !self.is_replacement(worker.id);
            assert!(!healthy || serves || !fills, "{worker:?} is not in rotation");
        }
    }

    fn is_replacement(&self, id: WorkerId) -> bool {
        let mut slots = self.supervisor.services().flat_map(|service| &service.slots);
        slots.any(|slot| slot.next.as_ref().is_some_and(|next| next.id == id))
    }

    /// Whether a worker has an inherited socket at `address`, or will be started on it.
    fn is_inherited(&self, address: SocketAddr) -> bool {
        self.supervisor.services().any(|service| {
            let slots = service.slots.iter().map(|slot| (&slot.spec, slot.last_port));
            let workers = service.workers().map(|worker| (&worker.spec, worker.port));
            slots.chain(workers).any(|(spec, port)| {
                let here = port.is_some_and(|port| spec.address(port) == address);
                here && spec.socket == SocketMode::Inherit
            })
        })
    }

    /// Checks that exactly the accept queues of workers that will not accept are drained, and that
    /// no port stays open that no worker will use.
    fn check_queues(&self) {
        let workers = self.supervisor.services().flat_map(super::super::Service::workers);
        let expected = workers.filter_map(|worker| match worker.phase {
            Phase::Unhealthy => Some((worker.id, Untaken::Hangs)),
            Phase::Stopping { .. } => Some((worker.id, Untaken::Stops)),
            _ => None,
        });
        assert_eq!(self.untaken, expected.collect());
        for address in &self.inherited {
            assert!(self.is_inherited(*address), "{address} is not released");
        }
    }

    /// Checks all invariants.
    fn check(&self) {
        self.supervisor.check_indexes();
        // Only at every fourth step, since this takes longer than the step itself.
        if self.steps.is_multiple_of(4) {
            self.supervisor.check_rest(self.now);
        }
        for service in self.supervisor.services() {
            let name = &service.config.name;
            assert_eq!(self.published.get(name), Some(&service.rotation()), "{name}'s rotation");
            let mut numbers = BTreeSet::new();
            for slot in &service.slots {
                assert!(numbers.insert(slot.number), "two slots {}", slot.number);
            }
            let replacements = service.slots.iter().filter(|slot| slot.next.is_some()).count();
            assert!(replacements <= 1, "more than one at a time");
            let known = service.workers().count();
            let alive = |p: &&Process| p.service == *name;
            assert_eq!(known, self.processes.values().filter(alive).count(), "lost a worker");
        }
        self.check_wishes();
        self.check_queues();
        self.check_health();
        for id in self.published.values().flat_map(|rotation| &rotation.workers) {
            let process = &self.processes[id];
            assert!(process.told == Told::Started && !process.retired, "{id:?} is in rotation");
        }
    }
}
