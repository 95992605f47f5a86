//! Histograms of durations.
//!
//! The data threads count into [`Histogram`], which costs two additions that no other thread waits
//! for. [`Durations`] is a snapshot of one. Snapshots can be added up, so that many workers in a
//! row make one history.

use std::{
    array,
    ops::AddAssign,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use crate::per_thread::PerThread;

/// The upper bounds of the buckets, in microseconds: three per decade up to ten seconds, then
/// typical idle timeouts.
const BOUNDS: [u64; 21] = [
    100,
    250,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    30_000_000,
    60_000_000,
    300_000_000,
    1_800_000_000,
    3_600_000_000,
];

/// One per bound, and one for all longer durations.
const BUCKETS: usize = BOUNDS.len() + 1;

/// Counts durations on several threads.
#[derive(Debug, Default)]
pub struct Histogram(PerThread<Shard>);

/// The part that one thread counts into.
#[derive(Debug, Default)]
struct Shard {
    buckets: [AtomicU64; BUCKETS],
    micros: AtomicU64,
}

/// How many durations fell into each bucket, and their sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durations {
    buckets: [u64; BUCKETS],
    micros: u64,
}

impl Histogram {
    /// Counts one duration; `thread` is the number of the calling thread.
    pub fn count(&self, thread: usize, duration: Duration) {
        let shard = self.0.of(thread);
        let micros = micros(duration);
        shard.buckets[bucket(micros)].fetch_add(1, Relaxed);
        if micros > 0 {
            shard.micros.fetch_add(micros, Relaxed);
        }
    }

    /// What was counted so far.
    #[must_use]
    pub fn read(&self) -> Durations {
        let mut all = Durations::default();
        for shard in self.0.iter() {
            all += Durations {
                buckets: array::from_fn(|bucket| shard.buckets[bucket].load(Relaxed)),
                micros: shard.micros.load(Relaxed),
            };
        }
        all
    }
}

impl Durations {
    /// Counts one more.
    pub fn count(&mut self, duration: Duration) {
        let micros = micros(duration);
        self.buckets[bucket(micros)] += 1;
        self.micros = self.micros.saturating_add(micros);
    }

    /// The number of durations.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Whether there was none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sum of all durations, in seconds.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.micros as f64 / 1e6
    }

    /// Each bound in seconds, up to `longest`, and how many durations were no longer than it.
    pub fn cumulative(&self, longest: Duration) -> impl Iterator<Item = (f64, u64)> {
        let longest = micros(longest);
        let mut count = 0;
        BOUNDS.iter().zip(self.buckets).take_while(move |(bound, _)| **bound <= longest).map(
            move |(bound, bucket)| {
                count += bucket;
                (*bound as f64 / 1e6, count)
            },
        )
    }
}

impl Default for Durations {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], micros: 0 }
    }
}

impl AddAssign for Durations {
    fn add_assign(&mut self, other: Self) {
        for (bucket, more) in self.buckets.iter_mut().zip(other.buckets) {
            *bucket += more;
        }
        self.micros = self.micros.saturating_add(other.micros);
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn bucket(micros: u64) -> usize {
    BOUNDS.partition_point(|bound| *bound < micros)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_bound_is_the_last_of_its_bucket() {
        let mut durations = Durations::default();
        for micros in [0, 100, 101, 250, 3_600_000_000, 3_600_000_001] {
            durations.count(Duration::from_micros(micros));
        }
        let all: Vec<_> = durations.cumulative(Duration::MAX).collect();
        assert_eq!(all[..3], [(0.0001, 2), (0.00025, 4), (0.0005, 4)]);
        assert_eq!(all.last(), Some(&(3600.0, 5)));
        assert_eq!((durations.len(), durations.seconds()), (6, 7_200.000_452));
        assert_eq!(durations.cumulative(Duration::from_secs(10)).last(), Some((10.0, 4)));
        assert!(BOUNDS.is_sorted());
    }

    #[test]
    fn threads_that_share_a_shard_lose_nothing() {
        let histogram = Histogram::default();
        thread::scope(|scope| {
            for thread in 0..24 {
                let histogram = &histogram;
                scope.spawn(move || {
                    for _ in 0..1_000 {
                        histogram.count(thread, Duration::from_millis(2));
                    }
                });
            }
        });
        let mut twice = histogram.read();
        assert_eq!((twice.len(), twice.seconds()), (24_000, 48.0));
        twice += histogram.read();
        assert_eq!((twice.len(), twice.seconds()), (48_000, 96.0));
    }
}
