//! Exponential backoff: how long to wait before a worker that ended is started again.

use std::time::Duration;

use super::event::DownKind;
use crate::config::Restart;

/// The longest delay if an attempt costs nothing, because it is known beforehand that a start would
/// fail (the port is taken).
const SOON: Duration = Duration::from_secs(2);

/// Counts the failures of one slot in a row.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    failures: u32,
    doublings: u32,
}

impl Backoff {
    /// Counts a failure of a worker whose longest unbroken time of health was `healthy` (zero if it
    /// never was healthy), and returns the delay before the next start.
    ///
    /// A worker that was healthy for `reset-after` resets the count, and its first restart is
    /// immediate. Otherwise the delay doubles from `min-delay` up to `max-delay`; if the attempt
    /// cost nothing, up to two seconds, within these two bounds. `random` in `0.0..1.0` adds
    /// jitter: the delay is multiplied by `1.0..1.25` (`0.8..1.0` at the upper bound), so that
    /// workers that failed together don't restart together. The result is never under `min-delay`
    /// nor over `max-delay`.
    pub fn failed(
        &mut self,
        healthy: Duration,
        failure: DownKind,
        settings: &Restart,
        random: f64,
    ) -> Duration {
        if !healthy.is_zero() && healthy >= settings.reset_after {
            *self = Self::default();
            return Duration::ZERO;
        }
        let max = match failure {
            DownKind::NotTried => settings.max_delay.min(SOON.max(settings.min_delay)),
            DownKind::NotStarted | DownKind::Exited | DownKind::NotHealthy => settings.max_delay,
        };
        let base = 2u32
            .checked_pow(self.doublings)
            .and_then(|factor| settings.min_delay.checked_mul(factor))
            .map_or(max, |delay| delay.min(max));
        self.failures = self.failures.saturating_add(1);
        if base < max {
            self.doublings += 1;
        }
        let high = base.mul_f64(1.25).min(max);
        let low = base.min(high.mul_f64(0.8)).max(settings.min_delay.min(high));
        low + (high - low).mul_f64(random.clamp(0.0, 1.0))
    }

    /// How many times in a row the slot failed.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Forgets every failure, since other settings are started next.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DownKind::{Exited, NotTried};

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn doubles_from_min_to_max() {
        let settings = Restart::default();
        let mut backoff = Backoff::default();
        let delays: Vec<_> = (0..11)
            .map(|_| backoff.failed(Duration::ZERO, Exited, &settings, 0.0).as_millis())
            .collect();
        assert_eq!(
            delays,
            [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 24_000, 24_000, 24_000],
            "lowest jitter"
        );
        assert_eq!(backoff.failures(), 11);
        let mut backoff = Backoff::default();
        let delays: Vec<_> = (0..10)
            .map(|_| backoff.failed(Duration::ZERO, Exited, &settings, 1.0).as_millis())
            .collect();
        assert_eq!(delays, [125, 250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
    }

    #[test]
    fn first_exit_after_enough_health_is_free() {
        let settings = Restart::default();
        let mut backoff = Backoff::default();
        for _ in 0..5 {
            backoff.failed(Duration::ZERO, Exited, &settings, 0.0);
        }
        assert_eq!(backoff.failed(MS(9_999), Exited, &settings, 0.0), MS(3200));
        assert_eq!(backoff.failed(MS(10_000), Exited, &settings, 0.0), Duration::ZERO);
        assert_eq!(
            backoff.failed(MS(50), Exited, &settings, 0.0),
            MS(100),
            "the second one is not"
        );
    }

    #[test]
    fn stays_within_its_bounds_whatever_they_are() {
        for (min, max) in [(0, 0), (0, 10), (7, 7), (100, 101), (1, u64::from(u32::MAX))] {
            let settings = Restart { min_delay: MS(min), max_delay: MS(max), ..Restart::default() };
            for random in [0.0, 0.5, 1.0] {
                let mut backoff = Backoff::default();
                for _ in 0..100 {
                    let delay = backoff.failed(Duration::ZERO, Exited, &settings, random);
                    assert!(delay >= MS(min) && delay <= MS(max), "{delay:?} of {min}..{max}");
                }
            }
        }
    }

    #[test]
    fn what_costs_nothing_is_tried_every_other_second() {
        let settings = Restart::default();
        let mut backoff = Backoff::default();
        let delays: Vec<_> = (0..40)
            .map(|_| backoff.failed(Duration::ZERO, NotTried, &settings, 1.0).as_millis())
            .collect();
        assert_eq!(delays[..5], [125, 250, 500, 1000, 2000]);
        assert!(delays[5..].iter().all(|&delay| delay == 2000), "{delays:?}");
        assert_eq!(backoff.failures(), 40);
        let crash = backoff.failed(Duration::ZERO, Exited, &settings, 0.0);
        assert_eq!(crash, MS(3200), "it is no longer free, and goes on where it was");
        for (min, max, expected) in [(0, 500, 500), (3000, 30_000, 3000), (7, 7, 7)] {
            let settings = Restart { min_delay: MS(min), max_delay: MS(max), ..settings.clone() };
            let mut backoff = Backoff::default();
            let last = (0..40).map(|_| backoff.failed(Duration::ZERO, NotTried, &settings, 1.0));
            assert_eq!(last.last(), Some(MS(expected)), "{min}..{max}");
        }
    }
}
