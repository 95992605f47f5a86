//! The counters of workers and services for the metrics, beyond what `/status` shows.
//!
//! All counters only grow. Data threads add to them and never read them. What happens on every
//! connection, on all threads alike, is counted in per-thread shards of a [`Histogram`]; rare
//! events share one counter.

use std::{
    array,
    ops::AddAssign,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use super::outcome::{ConnectError, Outcome};
use crate::{
    histogram::{Durations, Histogram},
    per_thread::PerThread,
};

/// Counts by reason, in a fixed order of the reasons.
pub type Reasons<const N: usize> = [(&'static str, u64); N];

/// One worker's counters.
#[derive(Debug, Default)]
pub(crate) struct WorkerCounters {
    refusals: [AtomicU64; ConnectError::ALL.len()],
    failures: [AtomicU64; Outcome::OF_TAKEN.len()],
    connect: Histogram,
    duration: Histogram,
    relayed: PerThread<Relayed>,
}

/// What one thread has relayed between clients and a worker.
#[derive(Debug, Default)]
struct Relayed {
    /// Bytes sent to clients.
    sent: AtomicU64,
    /// Bytes sent to the worker.
    received: AtomicU64,
    /// Connections that the worker has begun to answer.
    answered: AtomicU64,
}

/// The counters of one service: of connections that have no worker, or do not have one yet.
#[derive(Debug, Default)]
pub(crate) struct ServiceCounters {
    failures: [AtomicU64; Outcome::OF_OTHERS.len()],
    held: AtomicU64,
    hold: Histogram,
    retried: AtomicU64,
    rescued: AtomicU64,
}

/// A snapshot of a worker's counters, or the sum of several workers'.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkerTally {
    /// Connections it took.
    pub total: u64,
    /// Bytes sent to clients.
    pub sent: u64,
    /// Bytes sent to the worker.
    pub received: u64,
    /// The time from the connect to the worker's answer, for each connection it took. The
    /// resolution is a turn of the loop: what is answered at once counts as zero.
    pub connect: Durations,
    /// The time from acceptance to the end, for each connection it took that has ended.
    pub duration: Durations,
    refusals: [u64; ConnectError::ALL.len()],
    failures: [u64; Outcome::OF_TAKEN.len()],
}

/// A snapshot of a service's counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ServiceTally {
    /// Connections that had to wait for a worker.
    pub held: u64,
    /// How long they waited, for those that have a worker now or were given up.
    pub hold: Durations,
    /// Connections that a worker took after another did not.
    pub retried: u64,
    /// Connections drained from the accept queue of a worker that had exited or hung.
    pub rescued: u64,
    failures: [u64; Outcome::OF_OTHERS.len()],
}

impl WorkerCounters {
    pub(crate) fn count_refusal(&self, refusal: ConnectError) {
        self.refusals[refusal as usize].fetch_add(1, Relaxed);
    }

    pub(crate) fn count_connect(&self, thread: usize, took: Duration) {
        self.connect.count(thread, took);
    }

    pub(crate) fn count_end(&self, thread: usize, end: Outcome, lasted: Duration) {
        self.duration.count(thread, lasted);
        if let Some(reason) = Outcome::OF_TAKEN.iter().position(|known| *known == end) {
            self.failures[reason].fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn count_bytes(&self, thread: usize, sent: u64, received: u64) {
        let relayed = self.relayed.of(thread);
        if sent > 0 {
            relayed.sent.fetch_add(sent, Relaxed);
        }
        if received > 0 {
            relayed.received.fetch_add(received, Relaxed);
        }
    }

    pub(crate) fn count_answered(&self, thread: usize) {
        self.relayed.of(thread).answered.fetch_add(1, Relaxed);
    }

    pub(crate) fn sent(&self) -> u64 {
        self.relayed.iter().map(|relayed| relayed.sent.load(Relaxed)).sum()
    }

    pub(crate) fn received(&self) -> u64 {
        self.relayed.iter().map(|relayed| relayed.received.load(Relaxed)).sum()
    }

    pub(crate) fn answered(&self) -> u64 {
        self.relayed.iter().map(|relayed| relayed.answered.load(Relaxed)).sum()
    }

    /// Connections that the worker took.
    pub(crate) fn taken(&self) -> u64 {
        self.connect.read().len()
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refusals.iter().map(|count| count.load(Relaxed)).sum()
    }

    /// A snapshot of these counters. The connections that the kernel hands to a worker are not
    /// included.
    pub(crate) fn read(&self) -> WorkerTally {
        let connect = self.connect.read();
        WorkerTally {
            total: connect.len(),
            sent: self.sent(),
            received: self.received(),
            connect,
            duration: self.duration.read(),
            refusals: load(&self.refusals),
            failures: load(&self.failures),
        }
    }
}

impl ServiceCounters {
    pub(crate) fn count_end(&self, end: Outcome) {
        if let Some(reason) = Outcome::OF_OTHERS.iter().position(|known| *known == end) {
            self.failures[reason].fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn count_held(&self) {
        self.held.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_hold(&self, thread: usize, took: Duration) {
        self.hold.count(thread, took);
    }

    pub(crate) fn count_retried(&self) {
        self.retried.fetch_add(1, Relaxed);
    }

    pub(crate) fn count_rescued(&self) {
        self.rescued.fetch_add(1, Relaxed);
    }

    pub(crate) fn read(&self) -> ServiceTally {
        ServiceTally {
            held: self.held.load(Relaxed),
            hold: self.hold.read(),
            retried: self.retried.load(Relaxed),
            rescued: self.rescued.load(Relaxed),
            failures: load(&self.failures),
        }
    }
}

impl WorkerTally {
    /// Failed connects, by reason.
    #[must_use]
    pub fn refusals(&self) -> Reasons<{ ConnectError::ALL.len() }> {
        array::from_fn(|reason| (ConnectError::ALL[reason].name(), self.refusals[reason]))
    }

    /// Connections it took that did not end well, by reason.
    #[must_use]
    pub fn failures(&self) -> Reasons<{ Outcome::OF_TAKEN.len() }> {
        array::from_fn(|reason| (Outcome::OF_TAKEN[reason].name(), self.failures[reason]))
    }
}

impl ServiceTally {
    /// Connections that no worker took, by reason.
    #[must_use]
    pub fn failures(&self) -> Reasons<{ Outcome::OF_OTHERS.len() }> {
        array::from_fn(|reason| (Outcome::OF_OTHERS[reason].name(), self.failures[reason]))
    }
}

impl AddAssign for WorkerTally {
    fn add_assign(&mut self, other: Self) {
        self.total += other.total;
        self.sent += other.sent;
        self.received += other.received;
        self.connect += other.connect;
        self.duration += other.duration;
        add(&mut self.refusals, other.refusals);
        add(&mut self.failures, other.failures);
    }
}

fn load<const N: usize>(counters: &[AtomicU64; N]) -> [u64; N] {
    array::from_fn(|reason| counters[reason].load(Relaxed))
}

fn add<const N: usize>(sums: &mut [u64; N], others: [u64; N]) {
    for (sum, other) in sums.iter_mut().zip(others) {
        *sum += other;
    }
}
