//! Builds the status from the supervisor (states), the worker table (traffic) and the
//! configuration.

use std::time::{Duration, Instant};

use super::{Daemon, event_log::seconds, requests::rfc3339};
use crate::{
    admin::status::{Bytes, Config, Connections, Probe, Service, State, Status, Steering, Worker},
    config::{Route, WorkerSpec},
    proxy::Traffic,
    supervisor::{self, Phase, Slot},
};

impl Daemon<'_> {
    /// The content of `/status`, except for what is read from `/proc`.
    pub(super) fn status(&self) -> Status {
        let now = Instant::now();
        let path = self.config.path.as_ref().map(|path| path.display().to_string());
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: seconds(now - self.started),
            config: Config {
                path,
                loaded_at: rfc3339(self.reload_history.loaded_at),
                last_reload: self.reload_history.last.clone(),
            },
            services: self.supervisor.services().map(|s| self.service(s, now)).collect(),
        }
    }

    /// What [`Self::status`] says about one slot; `None` if the service has no such slot.
    pub(super) fn slot_status(&self, service: &supervisor::Service, number: u32) -> Option<Worker> {
        let slot = service.slots.iter().find(|slot| slot.number == number)?;
        Some(self.slot(slot, Instant::now()))
    }

    fn slot(&self, slot: &Slot, now: Instant) -> Worker {
        match slot.workers().next() {
            Some(worker) => self.worker(worker, Some(slot), now),
            None => vacant(slot, now),
        }
    }

    fn service(&self, service: &supervisor::Service, now: Instant) -> Service {
        let of_slot = |slot: &Slot| self.slot(slot, now);
        let replacement = |slot: &Slot| {
            let next = slot.current.as_ref().and(slot.next.as_ref())?;
            Some(self.worker(next, Some(slot), now))
        };
        let outgoing = |worker: &supervisor::Worker| {
            let slot = service.slots.iter().find(|slot| slot.number == worker.slot);
            self.worker(worker, slot, now)
        };
        Service {
            name: service.config.name.to_string(),
            listen: service.config.listen.iter().map(ToString::to_string).collect(),
            route: service.config.worker.route().to_string(),
            steering: self.steering(service),
            balance: service.config.routing.balance.to_string(),
            workers: service.slots.iter().map(of_slot).collect(),
            replacements: service.slots.iter().filter_map(replacement).collect(),
            retiring: service.retiring.iter().map(outgoing).collect(),
        }
    }

    /// How the kernel distributes the service's connections; `None` if lbd distributes them.
    fn steering(&self, service: &supervisor::Service) -> Option<Steering> {
        let steering = self.workers.bindings.direct_listeners.steering(&service.config.name)?;
        Some(Steering { kind: steering.kind.to_string(), why: steering.why.clone() })
    }

    /// `slot` is the worker's slot, which may hold its successor by now; `None` if a reload has
    /// removed it.
    fn worker(&self, worker: &supervisor::Worker, slot: Option<&Slot>, now: Instant) -> Worker {
        let generation = worker.generation;
        let traffic = self.workers.backend(worker.id).map(|backend| backend.traffic());
        let traffic = traffic.unwrap_or_else(|| nothing(&worker.spec));
        Worker {
            slot: worker.slot,
            port: worker.port,
            pid: worker.pid,
            generation,
            state: state(worker),
            drained: worker.drained.is_some(),
            since_seconds: seconds(now.saturating_duration_since(since(worker))),
            restarts: slot.map_or_else(|| generation.saturating_sub(1), |slot| slot.restarts),
            last_exit: slot.and_then(last_exit),
            connections: Connections {
                active: traffic.active.map(|active| active as u64),
                total: traffic.total,
                failed: traffic.failed,
                queued: self.workers.bindings.queued(worker.id),
                per_second: None,
            },
            bytes: Bytes { sent: traffic.sent, received: traffic.received },
            guard: self.workers.guard(worker.id),
            // As measured for its memory limit, if it has one.
            resident_bytes: worker.usage.resident,
            cpu_seconds: None,
            last_probe: worker.last_probe.as_ref().map(|probe| Probe {
                ok: probe.error().is_none(),
                seconds: micros(probe.took),
                error: probe.error().map(str::to_owned),
            }),
        }
    }
}

/// The status of a vacant slot.
fn vacant(slot: &Slot, now: Instant) -> Worker {
    // A start that is due only waits for the predecessor to leave the port.
    let state = if slot.start_at > now { State::Backoff } else { State::Starting };
    let none = nothing(&slot.spec);
    // Since the start was due, or else since the last worker ended.
    let due = Some(slot.start_at).filter(|at| *at <= now);
    let ended = slot.last_exit.as_ref().map(|exit| exit.at);
    let since = due.into_iter().chain(ended).max().unwrap_or(now);
    Worker {
        slot: slot.number,
        port: slot.fixed_port.or(slot.last_port),
        pid: None,
        generation: slot.generation,
        state,
        drained: slot.drained,
        since_seconds: seconds(now.saturating_duration_since(since)),
        restarts: slot.restarts,
        last_exit: last_exit(slot),
        connections: Connections {
            active: none.active.map(|active| active as u64),
            total: none.total,
            ..Connections::default()
        },
        bytes: Bytes { sent: none.sent, received: none.received },
        guard: None,
        resident_bytes: None,
        cpu_seconds: None,
        last_probe: None,
    }
}

/// The traffic of a worker that does not exist: zero, as far as it would be known.
fn nothing(spec: &WorkerSpec) -> Traffic {
    let through = (spec.route() == Route::Proxy).then_some(0);
    Traffic { active: Some(0), total: through, failed: 0, sent: through, received: through }
}

/// How the slot's last worker ended that lbd had not asked to end: an end that lbd asked for is no
/// sign of trouble.
fn last_exit(slot: &Slot) -> Option<String> {
    let unasked = slot.last_exit.as_ref().filter(|exit| !exit.asked);
    unasked.map(|exit| exit.how.to_string())
}

fn state(worker: &supervisor::Worker) -> State {
    match worker.phase {
        Phase::Launching | Phase::Starting => State::Starting,
        Phase::Healthy if worker.drained.is_some() => State::Draining,
        Phase::Healthy => State::Healthy,
        Phase::Unhealthy => State::Unhealthy,
        Phase::Draining { .. } => State::Draining,
        Phase::Stopping { .. } | Phase::Ended => State::Stopping,
    }
}

/// Since when the worker is in its [`state`].
fn since(worker: &supervisor::Worker) -> Instant {
    match worker.phase {
        Phase::Healthy => worker.drained.map_or(worker.since, |drained| drained.max(worker.since)),
        Phase::Launching
        | Phase::Starting
        | Phase::Unhealthy
        | Phase::Draining { .. }
        | Phase::Stopping { .. }
        | Phase::Ended => worker.since,
    }
}

/// Seconds, to the microsecond: a probe on the same machine takes some hundred microseconds.
fn micros(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e6
}
