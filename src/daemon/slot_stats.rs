//! Counts what each slot has done so far, over all its workers.
//!
//! Each worker's counters start at zero, and may change until its last connection ends, which may
//! be after its process ended. So a slot's total is a sum over its generations: those that may
//! still change are kept one by one, and the others as a single sum.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::{
    histogram::Durations,
    proxy::{Backend, WorkerTally},
    supervisor::{ProbeOutcome, Verdict},
};

/// The counters of all slots, by service and slot number.
#[derive(Debug, Default)]
pub(super) struct SlotStats(HashMap<Arc<str>, BTreeMap<u32, Account>>);

/// The counters of one slot.
#[derive(Debug, Default)]
struct Account {
    /// The generations whose counters may still change.
    open: Vec<Arc<Backend>>,
    /// The sum over all other generations.
    closed: WorkerTally,
    probes: Probes,
}

/// The results of probes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Probes {
    pub(super) passed: u64,
    pub(super) failed: u64,
    pub(super) took: Durations,
}

/// A slot's totals.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// The connections of its workers now, including those being made; `None` if that is not known.
    pub(super) active: Option<usize>,
    pub(super) tally: WorkerTally,
    pub(super) probes: Probes,
}

impl SlotStats {
    /// Adds a new generation of a slot.
    pub(super) fn open(&mut self, service: &Arc<str>, slot: u32, backend: Arc<Backend>) {
        let slots = self.0.entry(Arc::clone(service)).or_default();
        let account = slots.entry(slot).or_default();
        // Not only when the counters are read, so that a crash loop does not fill the memory if
        // nobody reads them.
        account.close();
        account.open.push(backend);
    }

    pub(super) fn probed(&mut self, service: &str, slot: u32, outcome: &ProbeOutcome) {
        let account = self.0.get_mut(service).and_then(|slots| slots.get_mut(&slot));
        if let Some(Account { probes, .. }) = account {
            match outcome.verdict {
                Verdict::Passed => probes.passed += 1,
                Verdict::Failed(_) | Verdict::Hopeless(_) => probes.failed += 1,
                // This says nothing about the worker.
                Verdict::Unknown(_) => {}
            }
            probes.took.count(outcome.took);
        }
    }

    /// The totals of a slot; zero if it never had a worker.
    pub(super) fn read(&mut self, service: &str, slot: u32) -> Entry {
        let account = self.0.get_mut(service).and_then(|slots| slots.get_mut(&slot));
        let Some(account) = account else { return Entry { active: Some(0), ..Entry::default() } };
        account.close();
        let mut entry = Entry { tally: account.closed, probes: account.probes, active: None };
        for backend in &account.open {
            entry.tally += backend.tally();
        }
        entry.active = account.open.iter().map(|backend| backend.connections()).sum();
        entry
    }

    /// Forgets the slots that are not `wanted`.
    pub(super) fn retain(&mut self, wanted: impl Fn(&str, u32) -> bool) {
        self.0.retain(|service, slots| {
            slots.retain(|slot, _| wanted(service, *slot));
            !slots.is_empty()
        });
    }
}

impl Account {
    /// Moves the generations that no pool and no connection refers to any more into the sum.
    fn close(&mut self) {
        let closed = &mut self.closed;
        self.open.retain_mut(|backend| {
            let last = Arc::get_mut(backend);
            if let Some(backend) = &last {
                *closed += backend.tally();
            }
            last.is_none()
        });
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, time::Duration};

    use super::*;

    fn backend(id: u64) -> Arc<Backend> {
        let address = SocketAddr::from(([127, 0, 0, 1], 9002));
        Backend::new(id, 0, "web/9002".into(), address.into(), None, Arc::default())
    }

    #[test]
    fn generations_that_nobody_holds_are_closed() {
        let (mut slot_stats, web) = (SlotStats::default(), Arc::from("web"));
        let held = backend(0);
        slot_stats.open(&web, 0, Arc::clone(&held));
        for id in 1..100 {
            slot_stats.open(&web, 0, backend(id));
        }
        assert_eq!(slot_stats.0[&web][&0].open.len(), 2, "the held one, and the last");
        drop(held);
        slot_stats.read("web", 0);
        assert!(slot_stats.0[&web][&0].open.is_empty());
    }

    #[test]
    fn slots_that_are_gone_are_forgotten() {
        let (mut slot_stats, web) = (SlotStats::default(), Arc::from("web"));
        let passed = ProbeOutcome { took: Duration::from_millis(1), verdict: Verdict::Passed };
        for slot in 0..3 {
            slot_stats.open(&web, slot, backend(slot.into()));
            slot_stats.probed("web", slot, &passed);
        }
        slot_stats.probed("api", 0, &passed);
        slot_stats.retain(|_, slot| slot == 1);
        let passed = |slot_stats: &mut SlotStats, slot| slot_stats.read("web", slot).probes.passed;
        assert_eq!([0, 1, 2].map(|slot| passed(&mut slot_stats, slot)), [0, 1, 0]);
        slot_stats.retain(|_, _| false);
        assert!(slot_stats.0.is_empty());
    }
}
