//! Writes the supervisor's facts to the log.
//!
//! A worker that crashes many times a second for the same reason would flood the log with the same
//! line. So after ten equal lines in ten seconds, equal failures are folded into one line every ten
//! seconds. If nothing is started because a port is taken, one line a minute says so.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::{error, info, warn};

use crate::supervisor::{DownKind, Fact, LimitExceeded, Note, RetireReason};

/// How often a slot's failures for the same reason are logged: up to `lines` in each `window`; once
/// that is exceeded, one line in each `window`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pace {
    lines: u32,
    window: Duration,
}

/// For programs that were started.
const STARTED: Pace = Pace { lines: 10, window: Duration::from_secs(10) };
/// For programs that were not started, because the port is taken.
const NOT_TRIED: Pace = Pace { lines: 1, window: Duration::from_secs(60) };

/// Writes facts, and keeps what it needs to fold them.
#[derive(Debug, Default)]
pub(super) struct EventLog {
    /// The recent failures of each slot.
    folds: HashMap<(Arc<str>, u32), Fold>,
}

#[derive(Debug)]
struct Fold {
    reason: String,
    pace: Pace,
    /// When the window began.
    began: Instant,
    /// Lines that may still be written in it.
    left: u32,
    /// Failures since the last line that were not written.
    folded: u32,
}

impl EventLog {
    /// Writes one line, or folds it. `connections` is how many connections the worker holds; `hint`
    /// is advice for an operator, if there is any.
    pub(super) fn write(
        &mut self,
        note: &Note,
        connections: Option<usize>,
        hint: Option<&str>,
        now: Instant,
    ) {
        let service = &*note.service;
        let worker = note.worker.as_ref();
        let slot = worker.map(|worker| worker.slot);
        let port = worker.and_then(|worker| worker.port);
        let pid = worker.and_then(|worker| worker.pid);
        match &note.fact {
            Fact::Started => {
                // The first start after the port became free is logged, although failures were
                // folded before.
                let is_folded = |fold: &Fold| fold.folded > 0 && fold.pace == STARTED;
                if !self.folds.get(&key(note)).is_some_and(is_folded) {
                    info!(service, slot, port, pid, "worker started");
                }
            }
            Fact::Healthy { after } => {
                self.unfold(note);
                let after = after.map(seconds);
                info!(service, slot, port, pid, after, "worker healthy");
            }
            Fact::Unhealthy { error } => {
                warn!(service, slot, port, pid, error, "worker unhealthy");
            }
            Fact::NotYetHealthy { error, after } => {
                let after = seconds(*after);
                warn!(service, slot, port, pid, error, after, hint, "worker not healthy yet");
            }
            Fact::Down { how, restart_in, failures, .. } => {
                let (reason, failure) = (how.to_string(), how.kind());
                let pace = match failure {
                    DownKind::NotTried => NOT_TRIED,
                    DownKind::NotStarted | DownKind::Exited | DownKind::NotHealthy => STARTED,
                };
                let gist = match failure {
                    DownKind::NotTried => gist(&reason),
                    DownKind::NotStarted | DownKind::Exited | DownKind::NotHealthy => {
                        reason.clone()
                    }
                };
                let Some(folded) = self.fold(note, &gist, pace, now) else { return };
                let folded = (folded > 0).then_some(folded);
                let restart_in = restart_in.map(seconds);
                let failures = (*failures > 0).then_some(*failures);
                let (error, status) = (&reason, &reason);
                match failure {
                    DownKind::NotTried | DownKind::NotStarted => error!(
                        service,
                        slot, port, error, restart_in, failures, folded, "worker not started"
                    ),
                    DownKind::Exited => warn!(
                        service,
                        slot,
                        port,
                        pid,
                        status,
                        restart_in,
                        failures,
                        folded,
                        hint,
                        "worker exited"
                    ),
                    DownKind::NotHealthy => warn!(
                        service,
                        slot,
                        port,
                        pid,
                        error,
                        restart_in,
                        failures,
                        folded,
                        hint,
                        "worker given up"
                    ),
                }
            }
            Fact::Stopped { how } => {
                if !self.is_folded(note) {
                    let status = how.to_string();
                    info!(service, slot, port, pid, status, "worker exited");
                }
            }
            Fact::Draining { why } => {
                // When the whole daemon stops, each service has one line instead.
                if *why != RetireReason::Stopping {
                    let why = why.to_string();
                    info!(service, slot, port, pid, why, connections, "draining");
                }
            }
            Fact::Drained => {
                info!(service, slot, port, pid, why = "operator", connections, "draining");
            }
            Fact::Resumed => info!(service, slot, port, pid, "worker resumed"),
            Fact::Killed { why } => warn!(service, slot, port, pid, why, "worker killed"),
            Fact::Recycling { worn: LimitExceeded::Memory { bytes: memory, limit } } => {
                info!(service, slot, port, pid, why = "memory", memory, limit, "recycling");
            }
            Fact::Recycling { worn: LimitExceeded::Age { age, limit } } => {
                let (age, limit) = (seconds(*age), seconds(*limit));
                info!(service, slot, port, pid, why = "max-age", age, limit, "recycling");
            }
            // This one is logged as `Fact::Down`.
            Fact::Recycling { worn: LimitExceeded::Unhealthy { .. } } => {}
            Fact::Recycling { worn: LimitExceeded::StandIn } => {
                if !self.is_folded(note) {
                    info!(service, slot, port, pid, why = "port", "recycling");
                }
            }
            Fact::NotRecycled { reason, retry_in } => {
                // If the failure was folded, its consequence is folded too.
                if !self.is_folded(note) {
                    let retry_in = seconds(*retry_in);
                    warn!(service, slot, port, pid, error = reason, retry_in, "not recycled");
                }
            }
            Fact::RolloutBegun { workers } => info!(service, workers, "replacing workers"),
            Fact::RolloutDone { skipped } if skipped.is_empty() => {
                info!(service, "workers replaced");
            }
            Fact::RolloutDone { skipped } => {
                let skipped = skipped.join("; ");
                warn!(service, skipped, "workers replaced");
            }
            Fact::RolloutFailed { reason, said } => {
                let said = (!said.is_empty()).then(|| said.join(" | "));
                error!(
                    service,
                    error = reason,
                    said,
                    "replacement failed, the old settings stay in force"
                );
            }
        }
    }

    /// How many folded failures the line stands for in addition to its own; `None` if the line is
    /// not to be written.
    fn fold(&mut self, note: &Note, reason: &str, pace: Pace, now: Instant) -> Option<u32> {
        let Pace { lines, window } = pace;
        let new = || Fold { reason: reason.to_owned(), pace, began: now, left: lines, folded: 0 };
        let fold = self.folds.entry(key(note)).or_insert_with(new);
        if fold.reason != reason {
            let folded = fold.folded;
            *fold = Fold { left: lines - 1, ..new() };
            return Some(folded);
        }
        if now >= fold.began + window {
            fold.began = now;
            fold.left = if fold.folded > 0 { 1 } else { lines };
        }
        if fold.left == 0 {
            fold.folded += 1;
            return None;
        }
        fold.left -= 1;
        Some(std::mem::take(&mut fold.folded))
    }

    fn is_folded(&self, note: &Note) -> bool {
        self.folds.get(&key(note)).is_some_and(|fold| fold.folded > 0)
    }

    fn unfold(&mut self, note: &Note) {
        self.folds.remove(&key(note));
    }
}

/// The constant part of a reason: its beginning, without numbers. When a bind fails again and
/// again, the rest of the reason (who has the port, and for how long) may differ each time.
fn gist(reason: &str) -> String {
    let begins = reason.split([':', ';']).next().unwrap_or_default();
    begins.chars().filter(|c| !c.is_ascii_digit()).collect()
}

fn key(note: &Note) -> (Arc<str>, u32) {
    (Arc::clone(&note.service), note.worker.as_ref().map_or(u32::MAX, |worker| worker.slot))
}

/// Seconds with milliseconds, as the log shows them.
pub(super) fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config, supervisor::NoteWorker};

    fn of_slot_0(fact: Fact) -> Note {
        let listen = ["127.0.0.1:80".to_owned()];
        let config = config::from_command(&listen, Some(1), vec!["x".to_owned()]).unwrap();
        let spec = Arc::clone(&config.services[0].worker);
        let worker = NoteWorker { id: None, spec, slot: 0, port: None, pid: None };
        Note { service: "web".into(), worker: Some(worker), fact }
    }

    #[test]
    fn the_same_failure_is_written_ten_times_and_then_every_ten_seconds() {
        let down = of_slot_0(Fact::Started);
        let (mut event_log, began) = (EventLog::default(), Instant::now());
        let mut fold = |reason: &str, tenths: u32| {
            event_log.fold(&down, reason, STARTED, began + Duration::from_millis(100) * tenths)
        };
        let written: Vec<_> =
            (1..=250).filter_map(|n| fold("exit status 1", n).map(|folded| (n, folded))).collect();
        let first = (1..=10).map(|n| (n, 0));
        assert_eq!(written, first.chain([(101, 90), (201, 99)]).collect::<Vec<_>>());
        assert_eq!(fold("exit status 2", 251), Some(49), "another reason is told at once");
        assert_eq!(fold("exit status 2", 252), Some(0));
    }

    #[test]
    fn a_port_that_stays_taken_is_told_once_and_then_every_minute() {
        let down = of_slot_0(Fact::Started);
        let (mut event_log, began) = (EventLog::default(), Instant::now());
        let mut fold = |reason: &str, seconds: u64| {
            event_log.fold(&down, reason, NOT_TRIED, began + Duration::from_secs(seconds))
        };
        let written: Vec<_> =
            (0..=90).filter_map(|n| Some((2 * n, fold("taken", 2 * n)?))).collect();
        assert_eq!(written, [(0, 0), (60, 29), (120, 29), (180, 29)]);
    }

    #[test]
    fn a_taken_port_is_the_same_whoever_has_it_and_for_however_long() {
        let taken = "port 9002 of 127.0.0.1 is taken by another program";
        assert_eq!(
            gist(&format!("{taken}: node (pid 7, user 1)")),
            gist(&format!("{taken}; `ss`"))
        );
        let waits = |seconds: u32| {
            gist(&format!("port 9002 of 127.0.0.1 is in TIME_WAIT for another {seconds} s"))
        };
        assert_eq!(waits(9), waits(58));
        assert_ne!(waits(9), gist(taken));
    }

    #[test]
    fn an_exponential_backoff_is_never_folded() {
        let down = of_slot_0(Fact::Started);
        let (mut event_log, mut now) = (EventLog::default(), Instant::now());
        for doubling in 0..20 {
            assert_eq!(event_log.fold(&down, "exit status 1", STARTED, now), Some(0));
            now += Duration::from_millis(100 << doubling.min(8));
        }
        assert!(!event_log.is_folded(&down));
    }
}
