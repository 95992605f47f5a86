//! How a service reacts to what happens to a single worker: its end, its health, its deadlines.

use std::time::Duration;

use super::{
    event::{
        Down, DownKind, Event, Exit, ExitCause, Fact, LimitExceeded, NoteWorker, RetireReason,
        WorkerId,
    },
    rollout::Rollout,
    service::{Context, Service},
    slot::{LastExit, Slot, note_of},
    worker::{Change, Phase},
};

/// Added to the reason when a stand-in fails: what may be wrong.
const STOOD_IN: &str = " (started on a free port, to stand in while the port is handed over: for a \
    program that ignores $PORT or can't run twice set rollout.order = \"stop-first\")";

/// A worker that its slot has lost, and how.
struct Loss {
    id: WorkerId,
    generation: u64,
    subject: NoteWorker,
    /// The longest time that the worker was healthy without a break.
    healthy: Duration,
    how: Down,
    /// The worker's last output.
    said: Vec<String>,
    /// The worker was a stand-in.
    stood_in: bool,
}

impl Service {
    /// Handles an event about one of the service's workers.
    pub(super) fn worker_event(&mut self, id: WorkerId, event: Event, cx: &mut Context<'_>) {
        match event {
            Event::Spawned { port, .. } => {
                self.with(id, |worker, _| worker.port = port);
                self.remember_port(id);
                if let Some(slot) = self.slots.iter_mut().find(|slot| slot.holds(id)) {
                    slot.spawned(id);
                }
            }
            Event::Started { pid, .. } => {
                let now = cx.now;
                let effects = &mut *cx.effects;
                self.with(id, |worker, config| {
                    worker.program_started(pid, &config.stop, now, effects);
                });
                self.note_worker(id, Fact::Started, cx);
            }
            Event::Failed { reason, cheap, .. } => {
                let how = if cheap { Down::NotTried(reason) } else { Down::NotStarted(reason) };
                self.ended(id, how, ExitCause::NotStarted, Vec::new(), cx);
            }
            Event::Exited { exit, said, .. } => {
                self.ended(id, Down::Exited(exit), exit.cause(), said, cx);
            }
            Event::Gone { .. } => {
                // If the guard died before it could report the exit, `Gone` is all that is known.
                let exit = Exit::Unknown;
                self.ended(id, Down::Exited(exit), exit.cause(), Vec::new(), cx);
                self.retiring.retain(|worker| worker.id != id);
            }
            Event::Probed { outcome, .. } => {
                let (now, mut change) = (cx.now, Change::None);
                let effects = &mut *cx.effects;
                self.with(id, |worker, config| {
                    change = worker.probed(outcome, &config.health, now, effects);
                });
                self.changed(id, change, cx);
            }
            Event::Memory { bytes, .. } => {
                let now = cx.now;
                self.with(id, |worker, config| worker.measured(bytes, &config.limits, now));
            }
            Event::Idle { .. } => {
                let now = cx.now;
                let effects = &mut *cx.effects;
                self.with(id, |worker, config| worker.idle(&config.stop, now, effects));
            }
            Event::Closed { .. }
            | Event::Apply { .. }
            | Event::Restart { .. }
            | Event::Drain { .. }
            | Event::Resume { .. }
            | Event::Stop
            | Event::Abort => {}
        }
    }

    /// Checks the deadlines of every worker.
    pub(super) fn timeout(&mut self, cx: &mut Context<'_>) {
        let (health, mut changes) = (&self.config.health, Vec::new());
        let workers = self.slots.iter_mut().flat_map(Slot::workers_mut).chain(&mut self.retiring);
        for worker in workers {
            match worker.timeout(health, cx.now, cx.effects) {
                Change::None => {}
                change => changes.push((worker.id, change)),
            }
        }
        for (id, change) in changes {
            self.changed(id, change, cx);
        }
    }

    fn changed(&mut self, id: WorkerId, change: Change, cx: &mut Context<'_>) {
        let now = cx.now;
        match change {
            Change::None => {}
            Change::Healthy { first } => {
                let after = self
                    .workers()
                    .find(|worker| worker.id == id && first)
                    .map(|worker| now - worker.started);
                self.note_worker(id, Fact::Healthy { after }, cx);
                self.recovered(id, cx);
            }
            Change::Unhealthy { error } => {
                self.note_worker(id, Fact::Unhealthy { error: error.clone() }, cx);
                if self.rollout.as_ref().is_some_and(|rollout| rollout.waits_for(id)) {
                    self.not_proven(id, format!("unhealthy again: {error}"), cx);
                }
            }
            Change::Late => {
                let error = self.last_probe_error(id).unwrap_or_default();
                let started = self.workers().find(|worker| worker.id == id).map(|w| w.started);
                let after = started.map_or(Duration::ZERO, |started| now - started);
                self.note_worker(id, Fact::NotYetHealthy { error, after }, cx);
            }
            Change::Hopeless => {
                let reason = self.last_probe_error(id).unwrap_or_default();
                self.replace_failed(id, reason, cx);
            }
            Change::StartTimeout => {
                let health = &self.config.health;
                let shown = humantime::format_duration(health.start_timeout);
                let mut reason = format!("not healthy within {shown}");
                if let Some(error) = self.last_probe_error(id) {
                    reason = format!("{reason}: {error}");
                }
                self.replace_failed(id, reason, cx);
            }
            Change::DrainTimeout => {
                let effects = &mut *cx.effects;
                self.with(id, |worker, config| {
                    if let Phase::Draining { why, .. } = worker.phase {
                        worker.ask_to_stop(why, &config.stop, now, effects);
                    }
                });
            }
            Change::StopTimeout => {
                let why = "it did not end within the stop timeout";
                self.note_worker(id, Fact::Killed { why }, cx);
                let effects = &mut *cx.effects;
                self.with(id, |worker, _| {
                    if let Phase::Stopping { why, .. } = worker.phase {
                        worker.kill(why, now, effects);
                    }
                });
            }
        }
    }

    /// A worker became healthy. If it was being replaced because it was unhealthy, it stays.
    fn recovered(&mut self, id: WorkerId, cx: &mut Context<'_>) {
        let is_replaced = self.slots.iter().any(|slot| {
            slot.next.is_some() && slot.current.as_ref().is_some_and(|worker| worker.id == id)
        });
        let because = self.rollout.as_ref().and_then(Rollout::recycles);
        if is_replaced && matches!(because, Some(LimitExceeded::Unhealthy { .. })) {
            self.abandon_rollout("the worker is healthy again", None, cx);
        }
    }

    /// A new worker became healthy, but failed its probes again before it was proven.
    fn not_proven(&mut self, id: WorkerId, reason: String, cx: &mut Context<'_>) {
        let Some(index) = self.slots.iter().position(|slot| slot.holds(id)) else { return };
        let slot = &mut self.slots[index];
        if slot.current.as_ref().is_some_and(|worker| worker.id != id) {
            self.replace_failed(id, reason, cx);
        } else {
            // There is no other worker in the slot: this one stays, since it may recover.
            slot.promote();
            self.fail_rollout(index, &reason, DownKind::NotHealthy, &[], cx);
        }
    }

    /// Sets the slot's last port to its worker's port; a replacement, which may yet fail, does not
    /// count.
    fn remember_port(&mut self, id: WorkerId) {
        for slot in &mut self.slots {
            if let Some(worker) = slot.current.as_ref().filter(|worker| worker.id == id) {
                slot.last_port = worker.port;
            }
        }
    }

    /// Retires a worker that never became healthy, or is healthy no more, so that a new one is
    /// started.
    fn replace_failed(&mut self, id: WorkerId, reason: String, cx: &mut Context<'_>) {
        let Some(index) = self.slots.iter().position(|slot| slot.holds(id)) else {
            return;
        };
        let starting = self.slots[index].workers().any(|w| w.id == id && w.on_its_way());
        let Some(mut worker) = self.slots[index].take(id) else { return };
        let (subject, healthy) = (note_of(&worker), worker.longest_health(cx.now));
        let (generation, stood_in) = (worker.generation, worker.stands_in);
        if starting {
            worker.kill(RetireReason::Unhealthy, cx.now, cx.effects);
            self.retiring.push(worker);
        } else {
            self.dismiss(worker, RetireReason::Unhealthy, cx);
        }
        let (how, said) = (Down::NotHealthy(reason), Vec::new());
        let loss = Loss { id, generation, subject, healthy, how, said, stood_in };
        self.failed(index, loss, cx);
    }

    /// Handles the end of a program, or a failure to start it; `said` is its last output.
    fn ended(
        &mut self,
        id: WorkerId,
        how: Down,
        cause: ExitCause,
        said: Vec<String>,
        cx: &mut Context<'_>,
    ) {
        if let Some(worker) = self.retiring.iter_mut().find(|worker| worker.id == id) {
            if worker.phase == Phase::Ended {
                return;
            }
            let subject = note_of(worker);
            let cause = match worker.phase {
                Phase::Stopping { why: RetireReason::Unhealthy, .. } => ExitCause::Unhealthy,
                Phase::Stopping { .. } => ExitCause::Stopped,
                Phase::Launching
                | Phase::Starting
                | Phase::Healthy
                | Phase::Unhealthy
                | Phase::Draining { .. }
                | Phase::Ended => cause,
            };
            let asked = match worker.phase {
                Phase::Draining { why, .. } | Phase::Stopping { why, .. } => {
                    why != RetireReason::Unhealthy
                }
                Phase::Launching
                | Phase::Starting
                | Phase::Healthy
                | Phase::Unhealthy
                | Phase::Ended => false,
            };
            worker.ended(cx.now, cx.effects);
            let (slot, generation) = (worker.slot, worker.generation);
            if let Some(slot) = self.slots.iter_mut().find(|s| s.number == slot) {
                slot.exits[cause as usize] += 1;
                slot.exited(generation, LastExit { how: how.clone(), at: cx.now, asked });
            }
            self.note_of(subject, Fact::Stopped { how }, cx);
            return;
        }
        let Some(index) = self.slots.iter().position(|slot| slot.holds(id)) else {
            return;
        };
        let Some(mut worker) = self.slots[index].take(id) else { return };
        let (subject, healthy) = (note_of(&worker), worker.longest_health(cx.now));
        worker.ended(cx.now, cx.effects);
        self.slots[index].exits[cause as usize] += 1;
        let (stood_in, generation) = (worker.stands_in, worker.generation);
        self.retiring.push(worker);
        let loss = Loss { id, generation, subject, healthy, how, said, stood_in };
        self.failed(index, loss, cx);
    }

    /// Handles the failure of a slot's worker or of its replacement.
    fn failed(&mut self, index: usize, loss: Loss, cx: &mut Context<'_>) {
        let Loss { id, generation, subject, healthy, how, said, stood_in } = loss;
        let failure = how.kind();
        let is_filled = self.is_filled();
        let slot = &mut self.slots[index];
        if matches!(failure, DownKind::NotTried | DownKind::NotStarted) {
            // Perhaps another process has the port: try another port, unless the slot's port is
            // fixed.
            slot.last_port = slot.fixed_port;
        }
        slot.exited(generation, LastExit { how: how.clone(), at: cx.now, asked: false });
        let restart_in = (is_filled && slot.is_vacant() && !slot.leaving).then(|| {
            let (settings, random) = (&self.config.restart, cx.shared.random.f64());
            let delay = slot.backoff.failed(healthy, failure, settings, random);
            slot.start_at = cx.now + delay;
            delay
        });
        let failures = slot.backoff.failures();
        self.note_of(
            subject,
            Fact::Down { how: how.clone(), restart_in, failures, was_healthy: !healthy.is_zero() },
            cx,
        );
        if self.rollout.as_ref().is_some_and(|rollout| rollout.waits_for(id)) {
            let mut reason = how.to_string();
            if stood_in {
                reason += STOOD_IN;
            }
            self.fail_rollout(index, &reason, failure, &said, cx);
        }
    }

    fn last_probe_error(&self, id: WorkerId) -> Option<String> {
        let worker = self.workers().find(|worker| worker.id == id)?;
        worker.last_probe.as_ref()?.error().map(str::to_owned)
    }
}
