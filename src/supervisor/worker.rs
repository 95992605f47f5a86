//! One worker: the life of one child process, from the order to start it until no process of it is
//! left.
//!
//! ```text
//! Launching ─▶ Starting ─▶ Healthy ◀─▶ Unhealthy
//!     │            │          │            │
//!     └────────────┴────┬─────┴────────────┘
//!                       ▼
//!                   Draining ─▶ Stopping ─▶ Ended ─▶ (gone)
//! ```
//!
//! Any state may go to `Ended` when the program ends by itself, and a draining worker that is
//! wanted again goes back to the state it drained from. This module decides when to probe the
//! worker, what its probe results add up to, and when one of its own deadlines has passed. What
//! follows for the slot is decided by the service: among other things when a worker has been
//! unhealthy for too long, and when a healthy worker is proven.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    event::{Effect, ProbeOrder, ProbeOutcome, RetireReason, Untaken, Verdict, WorkerId},
    health::Tally,
    recycle::LimitUsage,
};
use crate::config::{Drain, Health, SocketMode, Stop, WorkerSpec};

/// The pause between a new worker's first probes. It doubles after each failure, up to `interval`,
/// so that a program that starts quickly is in rotation quickly.
const FIRST_PROBE_PAUSE: Duration = Duration::from_millis(20);

/// A new worker that is not healthy after this time gets a log line that says why: most workers are
/// healthy by then, and a user in front of a terminal begins to wonder.
const LATE: Duration = Duration::from_secs(5);

/// The state of one worker.
#[derive(Debug, Clone)]
pub struct Worker {
    /// The worker's id.
    pub id: WorkerId,
    /// The settings that it was started with.
    pub spec: Arc<WorkerSpec>,
    /// Its number among the workers of its slot, counted from 1.
    pub generation: u64,
    /// Its slot's number.
    pub slot: u32,
    /// The slot's fixed port; `None` if lbd picks a port.
    pub fixed_port: Option<u16>,
    /// The port that it is reached on; if lbd picks the port, known once the worker is spawned.
    pub port: Option<u16>,
    /// The program's process id, while it runs.
    pub pid: Option<i32>,
    /// Its current phase.
    pub phase: Phase,
    /// When it entered this phase.
    pub since: Instant,
    /// When the program began to run; before that, when the start was ordered.
    pub started: Instant,
    /// The result of the last probe.
    pub last_probe: Option<ProbeOutcome>,
    /// What it has used up of its limits.
    pub usage: LimitUsage,
    /// It counts as a restart of its slot, once a process was started for it.
    pub counts: bool,
    /// It is a stand-in: it runs on a free port while the slot's own port is taken.
    pub stands_in: bool,
    /// When an operator drained it, whatever its phase; see
    /// [`Slot::drained`](super::Slot::drained).
    pub drained: Option<Instant>,
    /// [`Change::Late`] was reported.
    late: bool,
    tally: Tally,
    probe: ProbeClock,
    pause: Duration,
    /// The phase that it drains from, and when it had entered that phase: the state to go back to.
    drained_from: Option<(Phase, Instant)>,
    /// The longest unbroken time of health, not counting the current one.
    healthiest: Duration,
}

/// A phase in a worker's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The start was ordered; the program does not run yet.
    Launching,
    /// The program runs and is not proven yet.
    Starting,
    /// It passed its probes, and can be in rotation.
    Healthy,
    /// It is out of rotation because its probes failed.
    Unhealthy,
    /// It is being taken out of service, and its connections have time to end.
    Draining {
        /// Why it is taken out of service.
        why: RetireReason,
        /// When it is sent the stop signal even if it still holds connections.
        until: Instant,
    },
    /// It was asked to end.
    Stopping {
        /// Why.
        why: RetireReason,
        /// When it is killed; `None` once it was.
        kill_at: Option<Instant>,
    },
    /// The program ended; the processes that it left behind are being removed.
    Ended,
}

impl Phase {
    /// Why a worker in this phase does not accept the connections in its accept queue; `None` if it
    /// does.
    fn untaken(self) -> Option<Untaken> {
        match self {
            Self::Unhealthy => Some(Untaken::Hangs),
            Self::Stopping { .. } => Some(Untaken::Stops),
            Self::Launching
            | Self::Starting
            | Self::Healthy
            | Self::Draining { .. }
            | Self::Ended => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProbeClock {
    /// Not probed in this phase.
    Off,
    Due(Instant),
    /// A probe was ordered at this time.
    Running(Instant),
    /// A probe that was ordered before the worker was taken out of service still runs; its result
    /// doesn't count.
    Stale,
}

/// What a probe result or a deadline changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Nothing that concerns the service.
    None,
    /// The worker became healthy, for the first time or again.
    Healthy {
        /// Whether this is the first time.
        first: bool,
    },
    /// The worker became unhealthy.
    Unhealthy {
        /// The error of the last probe.
        error: String,
    },
    /// The worker has not become healthy for so long that a user may wonder why. Reported once.
    Late,
    /// The worker did not become healthy within `health.start-timeout`.
    StartTimeout,
    /// The worker can't become healthy.
    Hopeless,
    /// The drain timeout is over.
    DrainTimeout,
    /// The stop timeout is over.
    StopTimeout,
}

impl Worker {
    /// A worker whose start was just ordered.
    #[must_use]
    pub fn new(
        id: WorkerId,
        spec: Arc<WorkerSpec>,
        slot: u32,
        fixed_port: Option<u16>,
        now: Instant,
    ) -> Self {
        Self {
            id,
            spec,
            generation: 1,
            slot,
            fixed_port,
            port: fixed_port,
            pid: None,
            phase: Phase::Launching,
            since: now,
            started: now,
            last_probe: None,
            usage: LimitUsage::default(),
            counts: false,
            stands_in: false,
            drained: None,
            late: false,
            tally: Tally::default(),
            probe: ProbeClock::Off,
            pause: FIRST_PROBE_PAUSE,
            drained_from: None,
            healthiest: Duration::ZERO,
        }
    }

    /// The worker's own address; known as soon as its port is. There is none with
    /// [`SocketMode::Direct`].
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        let port = self.port.filter(|_| self.spec.socket != SocketMode::Direct)?;
        Some(self.spec.address(port))
    }

    /// Whether new connections may go to the worker.
    #[must_use]
    pub fn in_rotation(&self) -> bool {
        self.phase == Phase::Healthy && self.drained.is_none()
    }

    /// Whether the worker can go on running while its replacement is started.
    #[must_use]
    pub fn can_stay(&self) -> bool {
        matches!(self.phase, Phase::Healthy | Phase::Unhealthy)
    }

    /// When the worker will have been healthy for `settle` without a break; `None` while it is not
    /// healthy.
    #[must_use]
    pub fn settled_at(&self, settle: Duration) -> Option<Instant> {
        (self.phase == Phase::Healthy).then(|| self.since + settle)
    }

    /// Whether the worker is being started and may become healthy.
    #[must_use]
    pub fn on_its_way(&self) -> bool {
        matches!(self.phase, Phase::Launching | Phase::Starting)
    }

    /// The longest time that the worker was healthy without a break.
    #[must_use]
    pub fn longest_health(&self, now: Instant) -> Duration {
        let this_time =
            if self.phase == Phase::Healthy { now - self.since } else { Duration::ZERO };
        self.healthiest.max(this_time)
    }

    /// The program runs. The first probe is due at once; if the worker is to end already, it gets
    /// the stop signal instead.
    pub fn program_started(
        &mut self,
        pid: i32,
        stop: &Stop,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        self.pid = Some(pid);
        match self.phase {
            Phase::Launching => {
                self.started = now;
                self.enter(Phase::Starting, now, effects);
                self.probe = ProbeClock::Due(now);
            }
            Phase::Stopping { kill_at: Some(at), .. } => {
                let timeout = at.saturating_duration_since(now);
                effects.push(self.signal(stop, timeout));
            }
            Phase::Starting
            | Phase::Healthy
            | Phase::Unhealthy
            | Phase::Draining { .. }
            | Phase::Stopping { kill_at: None, .. }
            | Phase::Ended => {}
        }
    }

    /// Handles a probe result. It is ignored in a phase in which the worker is not probed: a
    /// draining worker stays out of rotation, however well it answers.
    pub fn probed(
        &mut self,
        outcome: ProbeOutcome,
        health: &Health,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) -> Change {
        let began = match self.probe {
            ProbeClock::Running(began) => began,
            ProbeClock::Stale => {
                let resumed = matches!(self.phase, Phase::Healthy | Phase::Unhealthy);
                self.probe = if resumed { ProbeClock::Due(now) } else { ProbeClock::Off };
                return Change::None;
            }
            ProbeClock::Off | ProbeClock::Due(_) => return Change::None,
        };
        let verdict = outcome.verdict.clone();
        self.last_probe = Some(outcome);
        match verdict {
            Verdict::Passed => self.tally.count(true),
            Verdict::Failed(_) | Verdict::Hopeless(_) => self.tally.count(false),
            Verdict::Unknown(_) => {}
        }
        let passed = verdict == Verdict::Passed;
        let is_late = !self.late && now.duration_since(self.started) >= LATE;
        let change = match (self.phase, verdict) {
            (Phase::Starting, Verdict::Passed) if self.tally.risen(health.rise) => {
                self.enter(Phase::Healthy, now, effects);
                Change::Healthy { first: true }
            }
            (Phase::Unhealthy, Verdict::Passed) if self.tally.risen(health.rise) => {
                self.enter(Phase::Healthy, now, effects);
                Change::Healthy { first: false }
            }
            (Phase::Healthy, Verdict::Failed(error) | Verdict::Hopeless(error))
                if self.tally.fallen(health.fall) =>
            {
                self.enter(Phase::Unhealthy, now, effects);
                Change::Unhealthy { error }
            }
            (Phase::Starting, Verdict::Hopeless(_)) => Change::Hopeless,
            (Phase::Starting, Verdict::Failed(_) | Verdict::Unknown(_)) if is_late => {
                self.late = true;
                Change::Late
            }
            (
                Phase::Launching
                | Phase::Starting
                | Phase::Healthy
                | Phase::Unhealthy
                | Phase::Draining { .. }
                | Phase::Stopping { .. }
                | Phase::Ended,
                Verdict::Passed | Verdict::Failed(_) | Verdict::Hopeless(_) | Verdict::Unknown(_),
            ) => Change::None,
        };
        let next = if self.phase == Phase::Starting {
            // Only failures lengthen the pause: after a pass, `rise` is to be reached quickly.
            let pause = self.pause.min(health.interval);
            if !passed {
                self.pause = self.pause.saturating_mul(2);
            }
            now + pause
        } else {
            now.max(began + health.interval)
        };
        self.probe = ProbeClock::Due(next);
        change
    }

    /// Takes the worker out of service: gives its connections time to end, or asks it to end at
    /// once, as `stop` says. Does nothing if the worker was retired before.
    pub fn retire(
        &mut self,
        why: RetireReason,
        stop: &Stop,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        match self.phase {
            Phase::Launching | Phase::Starting => {
                effects.push(Effect::Retire { id: self.id });
                self.ask_to_stop(why, stop, now, effects);
            }
            Phase::Healthy | Phase::Unhealthy => {
                // With `stop.drain = "signal"` the worker ends its own connections, and the signal
                // follows at once; `Retire` comes first so that no new connection is on its way to
                // it. A worker that is replaced because its probes failed may be busy with the
                // connections it has, and always gets the drain timeout.
                if stop.drain == Drain::Signal && why != RetireReason::Unhealthy {
                    effects.push(Effect::Retire { id: self.id });
                    self.ask_to_stop(why, stop, now, effects);
                } else {
                    self.stop_probing();
                    self.drained_from = Some((self.phase, self.since));
                    self.enter(
                        Phase::Draining { why, until: now + stop.drain_timeout },
                        now,
                        effects,
                    );
                    effects.push(Effect::Retire { id: self.id });
                }
            }
            Phase::Draining { .. } | Phase::Stopping { .. } | Phase::Ended => {}
        }
    }

    /// Takes the worker out of rotation until [`Self::undrain`]. It keeps running and is still
    /// probed, but no probe brings it back into rotation, and it is not replaced for being
    /// unhealthy: that is up to the operator.
    pub fn drain(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        self.drained = Some(now);
        effects.push(Effect::Retire { id: self.id });
    }

    /// Undoes [`Self::drain`]: a healthy worker is back in rotation at once. An unhealthy one has
    /// its full time to become healthy before it is replaced.
    pub fn undrain(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        self.drained = None;
        if self.phase == Phase::Unhealthy {
            self.since = now;
        }
        effects.push(Effect::Reinstate { id: self.id });
    }

    /// Brings a draining worker back to the phase it drained from. An unhealthy worker must still
    /// pass its probes, and one that an operator drained stays out of rotation.
    pub fn resume(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let Some((phase, since)) = self.drained_from.take() else { return };
        self.enter(phase, since, effects);
        self.tally = Tally::default();
        if self.probe == ProbeClock::Off {
            self.probe = ProbeClock::Due(now);
        }
        if self.drained.is_none() {
            effects.push(Effect::Reinstate { id: self.id });
        }
    }

    /// The worker's last connection ended: if it drains, it is asked to end.
    pub fn idle(&mut self, stop: &Stop, now: Instant, effects: &mut Vec<Effect>) {
        if let Phase::Draining { why, .. } = self.phase {
            self.ask_to_stop(why, stop, now, effects);
        }
    }

    /// Sends the stop signal; SIGKILL follows at the deadline. If the program does not run yet, the
    /// signal would be lost, and is sent once it runs.
    pub fn ask_to_stop(
        &mut self,
        why: RetireReason,
        stop: &Stop,
        now: Instant,
        effects: &mut Vec<Effect>,
    ) {
        self.stop_probing();
        self.drained_from = None;
        self.enter(Phase::Stopping { why, kill_at: Some(now + stop.timeout) }, now, effects);
        if self.pid.is_some() {
            effects.push(self.signal(stop, stop.timeout));
        }
    }

    fn signal(&self, stop: &Stop, timeout: Duration) -> Effect {
        Effect::Signal { id: self.id, signal: stop.signal, to: stop.to, timeout }
    }

    /// Kills the worker and every process that it started. Does nothing the second time.
    pub fn kill(&mut self, why: RetireReason, now: Instant, effects: &mut Vec<Effect>) {
        self.stop_probing();
        self.drained_from = None;
        match self.phase {
            Phase::Stopping { kill_at: None, .. } | Phase::Ended => return,
            Phase::Stopping { .. } => self.phase = Phase::Stopping { why, kill_at: None },
            Phase::Launching
            | Phase::Starting
            | Phase::Healthy
            | Phase::Unhealthy
            | Phase::Draining { .. } => {
                self.enter(Phase::Stopping { why, kill_at: None }, now, effects);
            }
        }
        effects.push(Effect::Kill { id: self.id });
    }

    /// The program ended.
    pub fn ended(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        self.pid = None;
        self.stop_probing();
        self.drained_from = None;
        self.enter(Phase::Ended, now, effects);
    }

    /// When to call [`Self::timeout`] next.
    #[must_use]
    pub fn deadline(&self, health: &Health) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Launching | Phase::Starting => Some(self.started + health.start_timeout),
            Phase::Draining { until, .. } => Some(until),
            Phase::Stopping { kill_at, .. } => kill_at,
            Phase::Healthy | Phase::Unhealthy | Phase::Ended => None,
        };
        let probe = match self.probe {
            ProbeClock::Due(at) => Some(at),
            ProbeClock::Off | ProbeClock::Running(_) | ProbeClock::Stale => None,
        };
        [phase, probe].into_iter().flatten().min()
    }

    /// Checks the deadlines: returns the one that has passed, or else orders the probe that is due.
    pub fn timeout(&mut self, health: &Health, now: Instant, effects: &mut Vec<Effect>) -> Change {
        let change = match self.phase {
            Phase::Launching | Phase::Starting if now >= self.started + health.start_timeout => {
                Change::StartTimeout
            }
            Phase::Draining { until, .. } if now >= until => Change::DrainTimeout,
            Phase::Stopping { kill_at: Some(at), .. } if now >= at => Change::StopTimeout,
            Phase::Launching
            | Phase::Starting
            | Phase::Healthy
            | Phase::Unhealthy
            | Phase::Draining { .. }
            | Phase::Stopping { .. }
            | Phase::Ended => Change::None,
        };
        if let ProbeClock::Due(at) = self.probe
            && at <= now
            && change == Change::None
        {
            self.probe = ProbeClock::Running(now);
            let (id, what) = (self.id, health.probe.clone());
            let Health { timeout, owner, .. } = *health;
            effects.push(Effect::Probe(ProbeOrder { id, what, timeout, owner }));
        }
        change
    }

    /// Stops probing; the result of a probe that still runs won't count.
    fn stop_probing(&mut self) {
        self.probe = match self.probe {
            ProbeClock::Running(_) | ProbeClock::Stale => ProbeClock::Stale,
            ProbeClock::Off | ProbeClock::Due(_) => ProbeClock::Off,
        };
    }

    fn enter(&mut self, phase: Phase, since: Instant, effects: &mut Vec<Effect>) {
        let (before, after) = (self.phase.untaken(), phase.untaken());
        if before != after {
            let id = self.id;
            effects.push(match after {
                Some(why) => Effect::DrainQueue { id, why },
                None => Effect::KeepQueue { id },
            });
        }
        self.healthiest = self.longest_health(since);
        self.phase = phase;
        self.since = since;
    }
}
