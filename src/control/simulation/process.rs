//! One program that a made-up machine runs.

use std::{sync::Arc, time::Instant};

/// One started program, as it is outside.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) service: Arc<str>,
    pub(super) port: Option<u16>,
    /// It shares its port with others that do.
    pub(super) inherits: bool,
    /// It ends without being asked, never gets healthy, or can't be started.
    pub(super) bad: bool,
    pub(super) ignores_signals: bool,
    pub(super) hung: bool,
    /// What the core was told.
    pub(super) told: Told,
    /// Its end is under way.
    pub(super) ending: bool,
    pub(super) retired: bool,
    /// How often it was retired or reinstated.
    pub(super) turns: u32,
    pub(super) connections: u32,
    pub(super) probing: bool,
    pub(super) killed: bool,
    /// When the core gets to know the last thing that is known about it.
    pub(super) last: Instant,
}

impl Process {
    /// One that was just ordered. A few are bad by chance.
    pub(super) fn new(
        service: Arc<str>,
        port: Option<u16>,
        inherits: bool,
        now: Instant,
        random: &mut fastrand::Rng,
    ) -> Self {
        Self {
            service,
            port,
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
            last: now,
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
