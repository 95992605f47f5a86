//! One incarnation of a worker: the life of one child, from the order to start it until nothing of
//! it is left.
//!
//! ```text
//! Launching ─▶ Starting ─▶ Healthy ◀─▶ Unhealthy
//!     │            │          │            │
//!     └────────────┴────┬─────┴────────────┘
//!                       ▼
//!                   Draining ─▶ Stopping ─▶ Ended ─▶ (gone)
//! ```
//!
//! Any state may go to `Ended` by the program's own end, and a worker that drains goes back to where
//! it was if it is wanted again. This module decides when to probe, what the probes add up to, and when
//! a deadline of this one worker has passed; what follows for the slot is the service's business: also
//! when an unhealthy worker has been so for too long, and when a healthy one is proven.

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

/// A new worker is probed again this soon after its first failure; the pause doubles up to
/// `interval`, so that a program that listens quickly is in rotation quickly.
const FIRST_PROBE_PAUSE: Duration = Duration::from_millis(20);

/// A new worker that is not healthy after so long gets a line that says why: most are by then, and
/// a user who waits in front of a terminal begins to wonder.
const LATE: Duration = Duration::from_secs(5);

/// One child's life.
#[derive(Debug, Clone)]
pub struct Worker {
    /// The incarnation.
    pub id: WorkerId,
    /// What it was started with.
    pub spec: Arc<WorkerSpec>,
    /// The how-many-eth worker of its slot it is, counted from 1.
    pub generation: u64,
    /// Its slot's number.
    pub slot: u32,
    /// The port that the configuration gave it; `None` where lbd picks one.
    pub fixed_port: Option<u16>,
    /// Where it is reached; where lbd picks a port, known once it is spawned.
    pub port: Option<u16>,
    /// The program's process id, while it runs.
    pub pid: Option<i32>,
    /// Where it is in its life.
    pub phase: Phase,
    /// Since when it is in this phase.
    pub since: Instant,
    /// When the program began to run; when it was ordered, before that.
    pub started: Instant,
    /// What the last probe showed.
    pub last_probe: Option<ProbeOutcome>,
    /// How near it is to its limits.
    pub usage: LimitUsage,
    /// It counts among the restarts of its slot, once it is known that something was started.
    pub counts: bool,
    /// It fills its slot on a port of its own, while the slot's port is not to be had.
    pub stands_in: bool,
    /// Since when an operator has it out of rotation, whatever its phase; see [`Slot::drained`](super::Slot::drained).
    pub drained: Option<Instant>,
    /// It was said that it is not healthy yet.
    late: bool,
    tally: Tally,
    probe: ProbeClock,
    pause: Duration,
    /// The phase it drains from and since when it was in that, to go back to.
    drained_from: Option<(Phase, Instant)>,
    /// The longest it was healthy without a break, this time not counted.
    healthiest: Duration,
}

/// Where a worker is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Ordered; the program does not run yet.
    Launching,
    /// The program runs and is not proven yet.
    Starting,
    /// In rotation.
    Healthy,
    /// Out of rotation since its probes failed.
    Unhealthy,
    /// Out of rotation for good; its connections are given until then.
    Draining {
        /// Why it is to go.
        why: RetireReason,
        /// When it is signalled even if it still holds connections.
        until: Instant,
    },
    /// Asked to end.
    Stopping {
        /// Why.
        why: RetireReason,
        /// When it is killed; `None` once that was done.
        kill_at: Option<Instant>,
    },
    /// The program ended; what it left behind is being removed.
    Ended,
}

impl Phase {
    /// Why a worker in this phase does not take what waits in its accept queue, where it does not.
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
    /// Asked for; began then.
    Running(Instant),
    /// Asked for before the worker was taken out of service: its result doesn't count.
    Stale,
}

/// What a probe's result or a deadline changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Nothing that anybody else needs to know.
    None,
    /// It is proven healthy, for the first time or again.
    Healthy {
        /// It is the first time.
        first: bool,
    },
    /// It is healthy no more.
    Unhealthy {
        /// What the last probe showed.
        error: String,
    },
    /// It is not healthy for so long that a user may wonder why. Said once.
    Late,
    /// It did not become healthy in time.
    StartTimeout,
    /// It can't become healthy.
    Hopeless,
    /// The time for its connections to end is over.
    DrainTimeout,
    /// The time to end by itself is over.
    StopTimeout,
}

impl Worker {
    /// A worker that was just ordered.
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

    /// The address that is its own; known as soon as its port is. It has none with
    /// [`SocketMode::Direct`].
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        let port = self.port.filter(|_| self.spec.socket != SocketMode::Direct)?;
        Some(self.spec.address(port))
    }

    /// Whether new connections may go to it.
    #[must_use]
    pub fn in_rotation(&self) -> bool {
        self.phase == Phase::Healthy && self.drained.is_none()
    }

    /// Whether it can go on while its replacement is started beside it.
    #[must_use]
    pub fn can_stay(&self) -> bool {
        matches!(self.phase, Phase::Healthy | Phase::Unhealthy)
    }

    /// When it will have been healthy without a break for `settle`.
    #[must_use]
    pub fn settled_at(&self, settle: Duration) -> Option<Instant> {
        (self.phase == Phase::Healthy).then(|| self.since + settle)
    }

    /// Whether it may yet become healthy by itself.
    #[must_use]
    pub fn on_its_way(&self) -> bool {
        matches!(self.phase, Phase::Launching | Phase::Starting)
    }

    /// The longest it was healthy without a break.
    #[must_use]
    pub fn longest_health(&self, now: Instant) -> Duration {
        let this_time =
            if self.phase == Phase::Healthy { now - self.since } else { Duration::ZERO };
        self.healthiest.max(this_time)
    }

    /// The program runs: the first probe is due at once, or the signal if it is to end already.
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

    /// A probe ended. Results for a worker that is not probed in its phase change nothing: one
    /// that drains stays out of rotation, however well it answers.
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
            // Fast at first, but a pass that only waits for `rise` needs no more patience.
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

    /// Takes it out of service: gives its connections time, or asks it to end at once, as `stop`
    /// says. Does nothing where that was done before.
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
                // Where the worker ends its own connections the signal follows at once; retiring comes
                // first so that no new one is on its way to it. One that is replaced for its failed
                // probes may be busy with what it has, and gets the time that a drain is given.
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

    /// Takes it out of rotation for as long as an operator wants. It runs on and is probed, but no
    /// probe changes that, and how ill it may be is the operator's business.
    pub fn drain(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        self.drained = Some(now);
        effects.push(Effect::Retire { id: self.id });
    }

    /// The operator wants it back: in rotation at once where it is healthy. One that is not has its
    /// full time to become so.
    pub fn undrain(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        self.drained = None;
        if self.phase == Phase::Unhealthy {
            self.since = now;
        }
        effects.push(Effect::Reinstate { id: self.id });
    }

    /// Brings a worker that only drains back to where it was: one that was unhealthy has still to
    /// prove itself, and one that an operator had set aside stays so.
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

    /// Its last connection ended: a draining worker is asked to end.
    pub fn idle(&mut self, stop: &Stop, now: Instant, effects: &mut Vec<Effect>) {
        if let Phase::Draining { why, .. } = self.phase {
            self.ask_to_stop(why, stop, now, effects);
        }
    }

    /// Sends the stop signal; SIGKILL follows at the deadline. Where the program does not run yet
    /// the signal would be lost, and is sent when it does.
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

    /// Kills it and everything it started, once.
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

    /// When [`Self::timeout`] wants to be called next.
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

    /// Looks at the clock: tells which deadline has passed, or else asks for the probe that is due.
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

    /// Whatever a probe that is still running shows won't count.
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
