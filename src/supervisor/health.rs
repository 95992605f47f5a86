//! Rise and fall: how many probe results in a row change a worker's health.

use std::num::NonZeroU32;

/// Counts passed and failed probes in a row.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    passes: u32,
    failures: u32,
}

impl Tally {
    pub(super) fn count(&mut self, passed: bool) {
        if passed {
            self.passes = self.passes.saturating_add(1);
            self.failures = 0;
        } else {
            self.failures = self.failures.saturating_add(1);
            self.passes = 0;
        }
    }

    /// Whether there were `rise` passes in a row.
    #[must_use]
    pub(super) fn risen(&self, rise: NonZeroU32) -> bool {
        self.passes >= rise.get()
    }

    /// Whether there were `fall` failures in a row.
    #[must_use]
    pub(super) fn fallen(&self, fall: NonZeroU32) -> bool {
        self.failures >= fall.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_results_in_a_row_count() {
        let (rise, fall) = (NonZeroU32::new(2).unwrap(), NonZeroU32::new(3).unwrap());
        let mut tally = Tally::default();
        for (passed, risen, fallen) in [
            (true, false, false),
            (false, false, false),
            (false, false, false),
            (true, false, false),
            (false, false, false),
            (false, false, false),
            (false, false, true),
            (true, false, false),
            (true, true, false),
        ] {
            tally.count(passed);
            assert_eq!((tally.risen(rise), tally.fallen(fall)), (risen, fallen));
        }
    }
}
