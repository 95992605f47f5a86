//! Measures the workers' memory, on a thread of its own: reading about a process may wait for a
//! lock of that process.

use std::{
    fs, io,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use nix::unistd::{SysconfVar, sysconf};

use super::tree::{processes, worker_of};

/// The shortest pause between two measurements.
const PAUSE: Duration = Duration::from_secs(1);

/// A pause lasts at least this many times as long as the measurement before it: no more than 2 % of
/// a core.
const REST: u32 = 50;

/// A worker whose memory is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watched {
    /// Identifies the worker in the reports.
    pub id: u64,
    /// The pid of its guard: everything below the guard counts.
    pub guard: i32,
    /// The limit in bytes. Above it the measurement must be exact.
    pub limit: u64,
}

/// The thread that measures. It ends when this is dropped.
#[derive(Debug)]
pub struct MemoryGauge(mpsc::Sender<Vec<Watched>>);

impl MemoryGauge {
    /// Starts the thread, which calls `report` with a worker's id and its bytes.
    ///
    /// # Errors
    ///
    /// Where no thread can be started.
    pub fn start(report: impl FnMut(u64, u64) + Send + 'static) -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let builder = thread::Builder::new().name("lbd-memory".to_owned());
        builder.spawn(move || measure(&receiver, report))?;
        Ok(Self(sender))
    }

    /// From now on measures these workers, and no others.
    pub fn watch(&self, workers: Vec<Watched>) {
        // Fails only where the thread has panicked, which has been reported.
        let _ = self.0.send(workers);
    }
}

fn measure(subjects: &mpsc::Receiver<Vec<Watched>>, mut report: impl FnMut(u64, u64)) {
    let mut watched = Vec::new();
    let mut next = Instant::now();
    loop {
        let news = if watched.is_empty() {
            subjects.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            subjects.recv_timeout(next.saturating_duration_since(Instant::now()))
        };
        match news {
            Ok(workers) => watched = workers,
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                let begun = Instant::now();
                let all = processes();
                for Watched { id, guard, limit } in &watched {
                    let pids: Vec<i32> = worker_of(&all, *guard).iter().map(|p| p.pid).collect();
                    report(*id, resident(&pids, *limit));
                }
                next = Instant::now() + PAUSE.max(begun.elapsed() * REST);
            }
        }
    }
}

/// The resident memory of these processes, in bytes.
///
/// The sum of their resident sets counts shared pages once per process (a forking server shares
/// most of its pages), so it is never too low. Only if the sum exceeds the limit are shared pages
/// counted once: for that the kernel has to walk the page tables.
fn resident(pids: &[i32], limit: u64) -> u64 {
    let sum = |of: fn(i32) -> Option<u64>| pids.iter().filter_map(|&pid| of(pid)).sum();
    let resident: u64 = sum(resident_set);
    if resident <= limit || pids.len() < 2 {
        return resident;
    }
    sum(|pid| proportional_set(pid).or_else(|| resident_set(pid)))
}

/// `VmRSS`: the second field of `/proc/PID/statm`, in pages (proc_pid_statm(5)).
fn resident_set(pid: i32) -> Option<u64> {
    let page = u64::try_from(sysconf(SysconfVar::PAGE_SIZE).ok()??).ok()?;
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    Some(statm.split(' ').nth(1)?.parse::<u64>().ok()? * page)
}

/// `Pss`: each page divided by the number of processes that share it (the kernel's proc.rst,
/// smaps_rollup). `None` also where lbd may not look.
fn proportional_set(pid: i32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio, id};

    use super::*;

    #[test]
    fn a_process_is_measured_with_what_it_has_started() {
        let own = i32::try_from(id()).unwrap();
        let alone = resident(&[own], 0);
        assert!(alone > 500_000, "{alone}");
        assert_eq!(resident(&[], 0), 0);
        assert_eq!(resident(&[i32::MAX], 0), 0);
        // What a process has for itself alone is at most what it has.
        let (whole, share) = (resident_set(own).unwrap(), proportional_set(own).unwrap());
        assert!(share <= whole + 1_000_000, "{share} of {whole}");
    }

    #[test]
    fn reports_come_for_those_watched() {
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let (sender, reports) = mpsc::channel();
        let gauge = MemoryGauge::start(move |id, bytes| _ = sender.send((id, bytes))).unwrap();
        let guard = i32::try_from(id()).unwrap();
        gauge.watch(vec![Watched { id: 7, guard, limit: u64::MAX }]);
        let (id, bytes) = reports.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(id == 7 && bytes > 0, "{bytes}");
        drop(gauge);
        child.kill().unwrap();
        child.wait().unwrap();
        // The thread has ended, and its sender with it.
        while reports.recv_timeout(Duration::from_secs(20)) != Err(RecvTimeoutError::Disconnected) {
        }
    }
}
