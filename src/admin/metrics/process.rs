//! Metrics from `/proc`: about lbd itself, under the names that all Prometheus clients use, and the
//! workers' CPU time.

use std::{collections::HashMap, fs};

use nix::sys::resource::{Resource, getrlimit};

use super::{
    super::{Process, usage::Tree},
    page::Labels,
};

/// lbd's own process. Values that can't be read are missing.
#[derive(Debug, Default)]
pub(super) struct Own {
    pub(super) cpu_seconds: Option<f64>,
    pub(super) open_fds: Option<f64>,
    pub(super) max_fds: Option<f64>,
    pub(super) virtual_memory_bytes: Option<f64>,
    pub(super) resident_memory_bytes: Option<f64>,
    pub(super) start_time_seconds: Option<f64>,
    pub(super) threads: Option<f64>,
}

impl Own {
    pub(super) fn look(booted: Option<f64>) -> Self {
        let process = i32::try_from(std::process::id()).ok().and_then(Process::look);
        let of = |value: fn(Process) -> f64| process.map(value);
        Self {
            cpu_seconds: of(|process| process.cpu_seconds),
            // Without the descriptor that this directory is read with.
            open_fds: fs::read_dir("/proc/self/fd").ok().map(|all| (all.count() - 1) as f64),
            max_fds: getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft as f64),
            virtual_memory_bytes: of(|process| process.virtual_bytes as f64),
            resident_memory_bytes: of(|process| process.resident_bytes as f64),
            start_time_seconds: process.and_then(|process| process.start_time(booted?)),
            threads: of(|process| process.threads as f64),
        }
    }
}

/// When the machine was booted, in seconds since the Unix epoch: `btime` of `/proc/stat`
/// (proc_stat(5)).
pub(super) fn booted() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

/// The CPU time of each slot: of all its workers, past ones included, with everything that they
/// started. What a worker used after its last look is lost when it ends.
#[derive(Debug, Default)]
pub(in crate::admin) struct CpuTimes(HashMap<Labels, CpuTime>);

#[derive(Debug, Default)]
struct CpuTime {
    /// CPU time of workers that are gone.
    gone: f64,
    /// CPU time of the current workers, by guard pid and start time, which identify a worker
    /// uniquely.
    there: HashMap<(i32, u64), f64>,
}

impl CpuTimes {
    /// Takes in what `trees` knows of the guards of these slots, and forgets all other slots. A
    /// slot none of whose workers was ever seen is left out.
    pub(super) fn look<'a>(
        &mut self,
        slots: impl Iterator<Item = (Labels, &'a [i32])>,
        trees: &HashMap<i32, Tree>,
    ) -> Vec<(Labels, f64)> {
        let mut before = std::mem::take(&mut self.0);
        for (labels, guards) in slots {
            let known = before.remove(&labels);
            let was_seen = known.is_some();
            let mut time = known.unwrap_or_default();
            let seen = guards.iter().filter_map(|&guard| Some((guard, trees.get(&guard)?)));
            time.update(seen.map(|(guard, tree)| ((guard, tree.began), tree.cpu_seconds)));
            // Also keep a worker that has used less CPU time than the kernel's unit: a series must
            // not vanish.
            if was_seen || !time.there.is_empty() {
                self.0.insert(labels, time);
            }
        }
        let seconds = |time: &CpuTime| time.gone + time.there.values().sum::<f64>();
        let mut all: Vec<_> =
            self.0.iter().map(|(labels, time)| (labels.clone(), seconds(time))).collect();
        all.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        all
    }
}

impl CpuTime {
    fn update(&mut self, processes: impl Iterator<Item = ((i32, u64), f64)>) {
        let mut there: HashMap<_, _> = processes.collect();
        for (process, seconds) in &self.there {
            match there.get_mut(process) {
                // The kernel scales user and system time separately, and sometimes rounds their sum
                // down.
                Some(now) => *now = now.max(*seconds),
                None => self.gone += seconds,
            }
        }
        self.there = there;
    }
}

#[cfg(test)]
mod tests {
    use super::{super::super::usage::Trees, *};

    #[test]
    fn cpu_time_never_falls() {
        let mut time = CpuTime::default();
        let mut sum = |processes: &[((i32, u64), f64)]| {
            time.update(processes.iter().copied());
            time.gone + time.there.values().sum::<f64>()
        };
        assert_eq!(sum(&[((7, 1), 1.0)]), 1.0);
        assert_eq!(sum(&[((7, 1), 2.0), ((8, 5), 0.5)]), 2.5);
        assert_eq!(sum(&[((8, 5), 0.75)]), 2.75);
        assert_eq!(sum(&[]), 2.75);
        assert_eq!(sum(&[((8, 9), 0.25)]), 3.0, "the same id, another process");
        assert_eq!(sum(&[((8, 9), 0.125)]), 3.0);
    }

    #[test]
    fn this_process_is_told_and_no_process_is_left_out() {
        let own = Own::look(booted());
        assert!(own.start_time_seconds.unwrap() > 1e9 && own.threads.unwrap() >= 1.0);
        assert!(own.virtual_memory_bytes > own.resident_memory_bytes);
        assert!(own.open_fds.unwrap() >= 3.0 && own.max_fds > own.open_fds);
        let labels = |slot: &str| vec![("slot", slot.to_owned())];
        let pid = [std::process::id().cast_signed()];
        let slots = [(labels("1"), &[][..]), (labels("0"), &pid[..])];
        let mut times = CpuTimes::default();
        let trees = Trees::default().look(&pid);
        let seen = times.look(slots.into_iter(), &trees);
        assert!(matches!(&seen[..], [(slot, 0.0..)] if *slot == labels("0")));
        // Between two processes it is still told.
        let none = HashMap::new();
        assert_eq!(times.look([(labels("0"), &[][..])].into_iter(), &none).len(), 1);
        assert!(times.look([].into_iter(), &none).is_empty());
        assert!(times.0.is_empty());
    }
}
