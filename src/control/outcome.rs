//! What the end, the health and the deadlines of single workers mean for their service.

use std::time::Duration;

use super::{
    event::{Cause, Event, Fact, Failure, NoteWorker, Why, WorkerId},
    service::{Context, Service},
    slot::{LastExit, note_of},
    worker::{Change, Phase},
};

/// How a slot lost a worker.
struct Loss {
    id: WorkerId,
    subject: NoteWorker,
    /// The longest it had been healthy without a break.
    healthy: Duration,
    reason: String,
    failure: Failure,
}

impl Service {
    /// Handles what happened to one of its workers; `false` where it has none of that incarnation.
    pub(super) fn worker_event(
        &mut self,
        id: WorkerId,
        event: Event,
        cx: &mut Context<'_>,
    ) -> bool {
        if !self.workers().any(|worker| worker.id == id) {
            return false;
        }
        match event {
            Event::Spawned { port, .. } => {
                self.with(id, |worker, _| worker.port = port);
                self.remember_port(id);
            }
            Event::Started { pid, .. } => {
                let now = cx.now;
                let actions = &mut *cx.actions;
                self.with(id, |worker, config| {
                    worker.program_started(pid, &config.stop, now, actions);
                });
                self.note_worker(id, Fact::Started, cx);
            }
            Event::Failed { reason, .. } => self.ended(id, reason, Cause::NotStarted, cx),
            Event::Exited { status, by_signal, .. } => {
                let cause = if by_signal { Cause::Signal } else { Cause::Exit };
                self.ended(id, status, cause, cx);
            }
            Event::Gone { .. } => {
                // A guard that died without a word says only this.
                self.ended(id, "lost".to_owned(), Cause::Signal, cx);
                self.retiring.retain(|worker| worker.id != id);
            }
            Event::Probed { outcome, .. } => {
                let (now, mut change) = (cx.now, Change::None);
                self.with(id, |worker, config| {
                    change = worker.probed(outcome, &config.health, now);
                });
                self.changed(id, change, cx);
            }
            Event::Memory { bytes, .. } => {
                let now = cx.now;
                self.with(id, |worker, config| worker.measured(bytes, &config.limits, now));
            }
            Event::Idle { .. } => {
                let now = cx.now;
                let actions = &mut *cx.actions;
                self.with(id, |worker, config| worker.idle(&config.stop, now, actions));
            }
            Event::Closed { .. }
            | Event::Apply { .. }
            | Event::Restart { .. }
            | Event::Drain { .. }
            | Event::Resume { .. }
            | Event::Stop
            | Event::Abort => {}
        }
        true
    }

    /// Looks at the clock of every worker.
    pub(super) fn timeout(&mut self, cx: &mut Context<'_>) {
        let ids: Vec<_> = self.workers().map(|worker| worker.id).collect();
        for id in ids {
            let (now, mut change) = (cx.now, Change::None);
            let actions = &mut *cx.actions;
            self.with(id, |worker, config| {
                let patience = config.restart.unhealthy_after;
                change = worker.timeout(&config.health, patience, now, actions);
            });
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
                self.promote(id, cx);
            }
            Change::Unhealthy { error } => self.note_worker(id, Fact::Unhealthy { error }, cx),
            Change::StartTimeout => {
                let health = &self.config.health;
                let shown = humantime::format_duration(health.start_timeout);
                let mut reason = format!("not healthy within {shown}");
                if let Some(error) = self.last_probe_error(id) {
                    reason = format!("{reason}: {error}");
                }
                self.replace_failed(id, reason, cx);
            }
            Change::UnhealthyTooLong => {
                let shown = humantime::format_duration(self.config.restart.unhealthy_after);
                let mut reason = format!("unhealthy for {shown}");
                if let Some(error) = self.last_probe_error(id) {
                    reason = format!("{reason}: {error}");
                }
                self.replace_failed(id, reason, cx);
            }
            Change::DrainTimeout => {
                let actions = &mut *cx.actions;
                self.with(id, |worker, config| {
                    if let Phase::Draining { why, .. } = worker.phase {
                        worker.ask_to_stop(why, &config.stop, now, actions);
                    }
                });
            }
            Change::StopTimeout => {
                let why = "it did not end within the stop timeout";
                self.note_worker(id, Fact::Killed { why }, cx);
                let actions = &mut *cx.actions;
                self.with(id, |worker, _| {
                    if let Phase::Stopping { why, .. } = worker.phase {
                        worker.kill(why, now, actions);
                    }
                });
            }
        }
    }

    /// A replacement that became healthy takes over.
    fn promote(&mut self, id: WorkerId, cx: &mut Context<'_>) {
        let Some(slot) =
            self.slots.iter_mut().find(|slot| slot.next.as_ref().is_some_and(|w| w.id == id))
        else {
            return;
        };
        let old = slot.current.as_ref().map(|worker| worker.id);
        if let Some(old) = old {
            self.outgrown(old, cx);
            self.retire(old, Why::Replaced, cx);
        }
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.holds(id)) {
            slot.current = slot.next.take();
        }
        self.remember_port(id);
    }

    /// The slot's port is that of the worker that fills it, not of one that may yet fail to.
    fn remember_port(&mut self, id: WorkerId) {
        for slot in &mut self.slots {
            if let Some(worker) = slot.current.as_ref().filter(|worker| worker.id == id) {
                slot.last_port = worker.port;
            }
        }
    }

    /// A worker that never got, or no longer is, healthy makes way for a new one.
    fn replace_failed(&mut self, id: WorkerId, reason: String, cx: &mut Context<'_>) {
        let Some(index) = self.slots.iter().position(|slot| slot.holds(id)) else {
            return;
        };
        let starting = self.slots[index].workers().any(|w| w.id == id && w.on_its_way());
        let Some(mut worker) = self.slots[index].take(id) else { return };
        let (subject, healthy) = (note_of(&worker), worker.longest_health(cx.now));
        if starting {
            worker.kill(Why::Unhealthy, cx.now, cx.actions);
        } else {
            worker.retire(Why::Unhealthy, &self.config.stop, cx.now, cx.actions);
        }
        self.retiring.push(worker);
        self.failed(index, Loss { id, subject, healthy, reason, failure: Failure::NotHealthy }, cx);
    }

    /// A program ended, or could not be started.
    fn ended(&mut self, id: WorkerId, status: String, cause: Cause, cx: &mut Context<'_>) {
        if let Some(worker) = self.retiring.iter_mut().find(|worker| worker.id == id) {
            if worker.phase == Phase::Ended {
                return;
            }
            let subject = note_of(worker);
            let cause = match worker.phase {
                Phase::Stopping { why: Why::Unhealthy, .. } => Cause::Unhealthy,
                Phase::Stopping { .. } => Cause::Stopped,
                Phase::Launching
                | Phase::Starting
                | Phase::Healthy
                | Phase::Unhealthy
                | Phase::Draining { .. }
                | Phase::Ended => cause,
            };
            let asked = match worker.phase {
                Phase::Draining { why, .. } | Phase::Stopping { why, .. } => why != Why::Unhealthy,
                Phase::Launching
                | Phase::Starting
                | Phase::Healthy
                | Phase::Unhealthy
                | Phase::Ended => false,
            };
            worker.ended(cx.now);
            let slot = worker.slot;
            if let Some(slot) = self.slots.iter_mut().find(|s| s.number == slot) {
                slot.exits[cause as usize] += 1;
                slot.exited(LastExit { status: status.clone(), at: cx.now, asked });
            }
            self.note_of(subject, Fact::Stopped { reason: status }, cx);
            return;
        }
        let Some(index) = self.slots.iter().position(|slot| slot.holds(id)) else {
            return;
        };
        let Some(mut worker) = self.slots[index].take(id) else { return };
        let (subject, healthy) = (note_of(&worker), worker.longest_health(cx.now));
        worker.ended(cx.now);
        self.retiring.push(worker);
        self.slots[index].exits[cause as usize] += 1;
        let failure =
            if cause == Cause::NotStarted { Failure::NotStarted } else { Failure::Exited };
        self.failed(index, Loss { id, subject, healthy, reason: status, failure }, cx);
    }

    /// A slot lost its worker, or the replacement of it, by a failure.
    fn failed(&mut self, index: usize, loss: Loss, cx: &mut Context<'_>) {
        let Loss { id, subject, healthy, reason, failure } = loss;
        let open = self.is_open();
        let slot = &mut self.slots[index];
        if failure == Failure::NotStarted {
            // Perhaps somebody has the port that was asked for: try another one, if any will do.
            slot.last_port = slot.fixed_port;
        }
        slot.exited(LastExit { status: reason.clone(), at: cx.now, asked: false });
        let restart_in = (open && slot.is_vacant()).then(|| {
            let delay = slot.backoff.failed(healthy, &self.config.restart, cx.shared.random.f64());
            slot.start_at = cx.now + delay;
            delay
        });
        let failures = slot.backoff.failures();
        self.note_of(
            subject,
            Fact::Down { reason: reason.clone(), restart_in, failures, failure },
            cx,
        );
        if self.rollout.as_ref().is_some_and(|rollout| rollout.waits_for(id)) {
            self.recycling_failed(index, &reason, cx);
            self.fail_rollout(format!("slot {}: {reason}", subject.slot), cx);
        }
    }

    fn last_probe_error(&self, id: WorkerId) -> Option<String> {
        self.workers().find(|worker| worker.id == id)?.last_probe.as_ref()?.error.clone()
    }
}
