//! Generates the load: a number of requests by a number of concurrent clients, and their results.
//!
//! **Closed loop**, the default: each client sends its next request as soon as it has an answer. A
//! target that stalls then gets fewer requests, and the requests that would have waited are missing
//! in the latencies.
//!
//! **Open loop**, with a rate: requests are due at fixed times, whatever the target does. Each
//! latency counts from when the request was due, even if all clients were busy then. So a stall
//! shows in every request that it delayed (what hides it is called "coordinated omission"; see
//! wrk2).

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    sync::{Arc, Weak},
    thread,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use nix::sys::prctl;
use tokio::{sync::Semaphore, time::timeout};

use super::client::{Client, Failure, Target};

/// The settings that all rows share.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// How many requests a row makes. Not zero.
    pub requests: usize,
    /// Whether a client keeps its connection from one request to the next.
    pub keep_alive: bool,
    /// Requests per second in an open loop; `None` means a closed loop. More than zero.
    pub rate: Option<f64>,
    /// How long one request may take, connecting included.
    pub timeout: Duration,
    /// How long a row may take. Requests that are not answered by then have failed.
    pub time_limit: Duration,
}

/// The results of one row.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Measured {
    pub(super) concurrency: usize,
    /// From the start of the first request to the end of the last.
    pub(super) elapsed: Duration,
    /// Latencies of the complete requests, in microseconds, ascending.
    pub(super) latencies: Vec<u32>,
    /// How many requests failed, by cause.
    pub(super) failures: BTreeMap<Failure, usize>,
    /// Bytes received, including heads and incomplete answers.
    pub(super) transferred: u64,
}

impl Measured {
    pub(super) fn complete(&self) -> usize {
        self.latencies.len()
    }

    pub(super) fn failed(&self) -> usize {
        self.failures.values().sum()
    }

    /// Complete requests per second.
    pub(super) fn requests_per_second(&self) -> f64 {
        self.complete() as f64 / self.seconds()
    }

    /// The mean latency of the complete requests, in milliseconds; `None` if there are none.
    pub(super) fn mean(&self) -> Option<f64> {
        let sum: u64 = self.latencies.iter().map(|&latency| u64::from(latency)).sum();
        (self.complete() > 0).then(|| sum as f64 / self.complete() as f64 / 1000.0)
    }

    /// The latency that `percent` of the complete requests did not exceed, in milliseconds. Uses
    /// the nearest rank, so the value is always one that occurred. `None` if there are none.
    pub(super) fn percentile(&self, percent: usize) -> Option<f64> {
        let rank = (self.complete() * percent).div_ceil(100).max(1);
        self.latencies.get(rank - 1).map(|&latency| f64::from(latency) / 1000.0)
    }

    /// Units of 1024 bytes per second, as `ab` reports.
    pub(super) fn kilobytes_per_second(&self) -> f64 {
        self.transferred as f64 / 1024.0 / self.seconds()
    }

    pub(super) fn seconds(&self) -> f64 {
        // Avoids a division by zero if the clock is too coarse.
        self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Sends one request, to check that there is something to measure. Returns the length that every
/// answer must have.
pub(super) async fn reference(target: &Target, at_most: Duration) -> Result<u64, Failure> {
    let mut client = Client::new(target, false);
    timeout(at_most, client.get()).await.unwrap_or(Err(Failure::Timeout))
}

/// Makes the requests of one row, with `concurrency` at a time, and calls `done` after each. An
/// answer is complete if it has status 200 and a body of `expected` bytes.
///
/// Returns when `load.time_limit` is over, at the latest. Dropping the future closes its
/// connections.
pub(super) async fn drive(
    target: &Target,
    expected: u64,
    load: &Load,
    concurrency: usize,
    done: impl Fn(),
) -> Measured {
    let begin = Instant::now();
    let schedule = Schedule {
        next: Cell::new(0),
        requests: load.requests,
        begin,
        end: begin + load.time_limit,
        pace: load.rate.map(|rate| Pace::start(begin, rate, load.requests, concurrency)),
    };
    let measured = RefCell::new(Measured { concurrency, ..Measured::default() });
    // Polls only clients that were woken, not all.
    let clients: FuturesUnordered<_> = (0..concurrency)
        .map(|_| async {
            let mut client = Client::new(target, load.keep_alive);
            while let Some(due) = schedule.next().await {
                let result = ask(&mut client, load.timeout, schedule.end).await;
                let latency = due.elapsed();
                let mut measured = measured.borrow_mut();
                match result {
                    Ok(received) if received == expected => {
                        measured.latencies.push(micros(latency));
                    }
                    Ok(received) => measured.fail(Failure::Length { received, expected }),
                    Err(failure) => measured.fail(failure),
                }
                done();
            }
            measured.borrow_mut().transferred += client.received();
        })
        .collect();
    clients.collect::<()>().await;
    let mut measured = measured.into_inner();
    measured.elapsed = begin.elapsed();
    for _ in schedule.next.get()..load.requests {
        measured.fail(Failure::OutOfTime);
        done();
    }
    measured.latencies.sort_unstable();
    measured
}

impl Measured {
    fn fail(&mut self, failure: Failure) {
        *self.failures.entry(failure).or_default() += 1;
    }
}

/// Sends one request, which must end by `end` and take no longer than `at_most`.
async fn ask(client: &mut Client<'_>, at_most: Duration, end: Instant) -> Result<u64, Failure> {
    let left = end.saturating_duration_since(Instant::now());
    let late = if left < at_most { Failure::OutOfTime } else { Failure::Timeout };
    match timeout(at_most.min(left), client.get()).await {
        Ok(result) => result,
        Err(_) => {
            client.disconnect();
            Err(late)
        }
    }
}

fn micros(latency: Duration) -> u32 {
    u32::try_from(latency.as_micros()).unwrap_or(u32::MAX)
}

/// Hands out the requests to the clients.
struct Schedule {
    next: Cell<usize>,
    requests: usize,
    begin: Instant,
    end: Instant,
    pace: Option<Pace>,
}

impl Schedule {
    /// Takes the next request, waits until it is due, and returns the time at which it was due.
    /// `None` if no requests or no time are left.
    async fn next(&self) -> Option<Instant> {
        if let Some(pace) = &self.pace {
            let left = self.end.saturating_duration_since(Instant::now());
            timeout(left, pace.permits.acquire()).await.ok()?.ok()?.forget();
        }
        let (index, now) = (self.next.get(), Instant::now());
        if index == self.requests || now >= self.end {
            return None;
        }
        self.next.set(index + 1);
        Some(match &self.pace {
            Some(pace) => due(self.begin, pace.rate, index),
            None => now,
        })
    }
}

fn due(begin: Instant, rate: f64, index: usize) -> Instant {
    begin + Duration::from_secs_f64(index as f64 / rate)
}

/// A thread that adds a permit when a request is due. A runtime's timer has a resolution of a
/// millisecond, which is longer than many answers take.
struct Pace {
    rate: f64,
    permits: Arc<Semaphore>,
}

impl Pace {
    fn start(begin: Instant, rate: f64, requests: usize, clients: usize) -> Self {
        let permits = Arc::new(Semaphore::new(0));
        let given = Arc::downgrade(&permits);
        // The thread ends by itself, at the latest when its permits are no longer wanted.
        drop(thread::spawn(move || give_permits(&given, begin, rate, requests, clients)));
        Self { rate, permits }
    }
}

fn give_permits(
    permits: &Weak<Semaphore>,
    begin: Instant,
    rate: f64,
    requests: usize,
    clients: usize,
) -> Option<()> {
    // PR_SET_TIMERSLACK(2const): the default slack is 50 µs. If this is denied, latencies include
    // it.
    let _ = prctl::set_timerslack(1);
    for index in 0..requests {
        thread::sleep(due(begin, rate, index).saturating_duration_since(Instant::now()));
        permits.upgrade()?.add_permits(1);
    }
    // One extra permit per client, so that each finds out that no requests are left.
    permits.upgrade()?.add_permits(clients);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(latencies: impl IntoIterator<Item = u32>) -> Measured {
        let latencies = latencies.into_iter().collect();
        Measured { latencies, elapsed: Duration::from_secs(2), ..Measured::default() }
    }

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let hundred = measured((1..=100).map(|n| n * 1000));
        for percent in [1, 50, 95, 99, 100] {
            assert_eq!(hundred.percentile(percent), Some(percent as f64));
        }
        let four = measured([1000, 2000, 3000, 4000]);
        let of_four = [25, 26, 50, 51, 75, 95, 100].map(|percent| four.percentile(percent));
        assert_eq!(of_four, [1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0].map(Some));
        let one = measured([1500]);
        assert_eq!([1, 50, 100].map(|percent| one.percentile(percent)), [Some(1.5); 3]);
        assert_eq!(measured([]).percentile(99), None);
    }

    #[test]
    fn rates_are_of_complete_requests_and_all_bytes() {
        let mut measured = measured([1000, 2000, 6000]);
        measured.transferred = 4096;
        measured.fail(Failure::Reset);
        measured.fail(Failure::Reset);
        measured.fail(Failure::Status(404));
        assert_eq!((measured.complete(), measured.failed()), (3, 3));
        assert_eq!(measured.requests_per_second(), 1.5);
        assert_eq!(measured.kilobytes_per_second(), 2.0);
        assert_eq!(measured.mean(), Some(3.0));
        assert_eq!(Measured::default().mean(), None);
    }

    #[test]
    fn requests_are_due_at_fixed_times() {
        let begin = Instant::now();
        let after = |index| due(begin, 400.0, index) - begin;
        assert_eq!([0, 1, 1000].map(after), [0, 2_500, 2_500_000].map(Duration::from_micros));
    }
}
