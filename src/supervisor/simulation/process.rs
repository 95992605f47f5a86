//! One program that the simulated machine runs.

use std::{sync::Arc, time::Instant};

use super::super::{Spawn, Verdict};
use crate::config::Health;

/// The actual state of a started program, as opposed to what the core knows of it.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) service: Arc<str>,
    pub(super) slot: u32,
    /// Its slot's fixed port.
    pub(super) fixed_port: Option<u16>,
    pub(super) port: Option<u16>,
    /// It was started on a free port although its slot has a fixed one.
    pub(super) stands_in: bool,
    /// It inherits its socket, and so can share its port with another one that does.
    pub(super) inherits: bool,
    /// It ends by itself, never becomes healthy, or can't be started.
    pub(super) bad: bool,
    pub(super) ignores_signals: bool,
    pub(super) hung: bool,
    /// What the core was told about it.
    pub(super) told: Told,
    /// Its end is under way.
    pub(super) ending: bool,
    pub(super) retired: bool,
    /// How often it was retired or reinstated.
    pub(super) turns: u32,
    pub(super) connections: u32,
    pub(super) probing: bool,
    pub(super) killed: bool,
    pub(super) book: HealthBook,
    /// It was retired because its probes failed, and its connections have until then.
    pub(super) spared_until: Option<Instant>,
    /// When the last event about it that is scheduled so far reaches the core.
    pub(super) last: Instant,
}

impl Process {
    /// A program that was just ordered. A few are bad at random.
    pub(super) fn new(
        Spawn { service, slot, port, .. }: &Spawn,
        inherits: bool,
        now: Instant,
        random: &mut fastrand::Rng,
    ) -> Self {
        Self {
            service: Arc::clone(service),
            slot: *slot,
            fixed_port: None,
            port: *port,
            stands_in: false,
            inherits,
            bad: random.u8(..) < 25,
            ignores_signals: random.u8(..) < 60,
            hung: false,
            told: Told::Nothing,
            ending: false,
            retired: false,
            turns: 0,
            connections: 0,
            probing: false,
            killed: false,
            book: HealthBook::default(),
            spared_until: None,
            last: now,
        }
    }
}

/// The health that follows from the probe results that the core was told, computed independently of
/// the core.
#[derive(Debug, Default)]
pub(super) struct HealthBook {
    passes: u32,
    failures: u32,
    /// Since when the worker is healthy without a break.
    pub(super) since: Option<Instant>,
}

impl HealthBook {
    pub(super) fn enter(&mut self, verdict: &Verdict, health: &Health, now: Instant) {
        match verdict {
            Verdict::Passed => {
                (self.passes, self.failures) = (self.passes + 1, 0);
                if self.passes >= health.rise.get() {
                    self.since = self.since.or(Some(now));
                }
            }
            Verdict::Failed(_) | Verdict::Hopeless(_) => {
                (self.passes, self.failures) = (0, self.failures + 1);
                if self.failures >= health.fall.get() {
                    self.since = None;
                }
            }
            Verdict::Unknown(_) => {}
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub(super) enum Told {
    Nothing,
    Started,
    Ended,
    Gone,
}
