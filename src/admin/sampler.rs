//! Samples the status once a second for event streams: a rate needs two looks, and a sparkline a
//! minute of them.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use serde::Serialize;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use super::{Status, main_thread::Daemon, news::steady};
use crate::logging::Recent;

/// The time between two looks.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);
/// How many looks are kept.
const REMEMBERED: usize = 60;
/// The shortest time between two looks, however much happens.
const SHORTEST: Duration = Duration::from_millis(100);

/// The last look, shared by all event streams. It ends with the server.
pub(super) type Latest = watch::Receiver<Arc<Look>>;

/// One look.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// `None` before the first look.
    ///
    /// Values that have not changed notably since the look before keep their old values.
    pub(super) status: Option<Arc<Status>>,
    /// The samples of the last minute.
    pub(super) samples: Arc<Samples>,
    /// Connections a second over the last second, by service, slot and generation.
    rates: HashMap<Key, f64>,
}

/// The samples of the last minute, per slot.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Samples {
    interval_seconds: u64,
    services: Vec<ServiceSamples>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct ServiceSamples {
    name: String,
    workers: Vec<WorkerSamples>,
}

/// Oldest first. The last entries of both lists come from the same look.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct WorkerSamples {
    slot: u32,
    per_second: VecDeque<Option<f64>>,
    active: VecDeque<u64>,
}

type Key = (String, u32, u64);

impl Look {
    /// Fills in the rates, which a single look at the daemon can't provide.
    pub(super) fn rate(&self, status: &mut Status) {
        for service in &mut status.services {
            let name = service.name.clone();
            for worker in service.all_mut() {
                let key = (name.clone(), worker.slot, worker.generation);
                worker.connections.per_second = self.rates.get(&key).copied();
            }
        }
    }
}

/// Looks once a second, and soon after each note, forever. Dropping it also ends the event streams
/// that watch `latest`.
pub(super) async fn run(daemon: Daemon, recent: Recent, latest: watch::Sender<Arc<Look>>) {
    let mut memory = Memory::default();
    let mut notes = recent.read();
    let mut tick = interval(INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let regular = tokio::select! {
            _ = tick.tick() => true,
            () = notes.changed(), if latest.receiver_count() > 1 => false,
        };
        let began = Instant::now();
        notes.unread();
        // The main thread is busy, or ending; if it is ending, this task will soon be dropped.
        let Ok(mut status) = daemon.look().await else { continue };
        if regular {
            memory.remember(&status);
        }
        let look = memory.look();
        look.rate(&mut status);
        if let Some(before) = &latest.borrow().status {
            steady(&mut status, before, memory.looks);
        }
        latest.send_replace(Arc::new(Look { status: Some(Arc::new(status)), ..look }));
        sleep_until(began + SHORTEST).await;
    }
}

/// What was seen in earlier looks.
#[derive(Debug, Default)]
struct Memory {
    /// The number of regular looks.
    looks: usize,
    /// Each worker's total of connections at the last regular look.
    totals: HashMap<Key, u64>,
    rates: HashMap<Key, f64>,
    samples: Arc<Samples>,
}

impl Memory {
    fn remember(&mut self, status: &Status) {
        self.looks = self.looks.wrapping_add(1);
        let totals: HashMap<Key, u64> = status
            .services
            .iter()
            .flat_map(|service| service.all().map(move |worker| (service, worker)))
            .filter_map(|(service, worker)| {
                let key = (service.name.clone(), worker.slot, worker.generation);
                Some((key, worker.connections.total?))
            })
            .collect();
        let first = self.samples.services.is_empty();
        let rate = |(key, total): (&Key, &u64)| {
            let before = match self.totals.get(key) {
                Some(before) => *before,
                // A worker that is new since the last look had no connections then.
                None if !first => 0,
                None => return None,
            };
            Some((key.clone(), total.saturating_sub(before) as f64 / INTERVAL.as_secs_f64()))
        };
        self.rates = totals.iter().filter_map(rate).collect();
        self.totals = totals;
        self.samples = Arc::new(self.samples(status));
    }

    fn samples(&self, status: &Status) -> Samples {
        let services = status.services.iter().map(|service| {
            let before = self.samples.services.iter().find(|before| before.name == service.name);
            let workers = service.workers.iter().map(|worker| {
                let before = before
                    .and_then(|before| before.workers.iter().find(|old| old.slot == worker.slot));
                let (mut per_second, mut active) = before
                    .map(|before| (before.per_second.clone(), before.active.clone()))
                    .unwrap_or_default();
                let key = (service.name.clone(), worker.slot, worker.generation);
                push(&mut per_second, self.rates.get(&key).copied());
                push(&mut active, worker.connections.active.unwrap_or(0));
                WorkerSamples { slot: worker.slot, per_second, active }
            });
            ServiceSamples { name: service.name.clone(), workers: workers.collect() }
        });
        Samples { interval_seconds: INTERVAL.as_secs(), services: services.collect() }
    }

    fn look(&self) -> Look {
        Look { status: None, samples: Arc::clone(&self.samples), rates: self.rates.clone() }
    }
}

fn push<T>(samples: &mut VecDeque<T>, sample: T) {
    if samples.len() == REMEMBERED {
        samples.pop_front();
    }
    samples.push_back(sample);
}
