//! Resource usage of a process, and of a worker with everything that it started, from
//! `/proc/PID/stat` (proc_pid_stat(5)).

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    sync::{Mutex, PoisonError},
};

use nix::unistd::{SysconfVar, sysconf};

/// A process's usage, as the kernel accounts for it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Process {
    /// Resident memory, in bytes. The kernel's counters may lag by a few pages per thread.
    pub resident_bytes: u64,
    /// Address space, in bytes.
    pub virtual_bytes: u64,
    /// The number of threads.
    pub threads: u64,
    /// CPU time, user and system.
    pub cpu_seconds: f64,
    /// Start time, in clock ticks after boot. Together with the pid it identifies a process
    /// uniquely.
    pub began: u64,
    /// The process has ended and has not been reaped.
    pub ended: bool,
    /// CPU time of the children that it has reaped, and of theirs.
    reaped_seconds: f64,
    parent: i32,
    group: i32,
}

impl Process {
    /// Reads the usage of the process `pid`; `None` if it does not exist or can't be read.
    #[must_use]
    pub fn look(pid: i32) -> Option<Self> {
        let ticks = per(SysconfVar::CLK_TCK)?;
        let page = per(SysconfVar::PAGE_SIZE)?;
        parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?, ticks, page)
    }

    /// Its start time, in seconds since the Unix epoch; `booted` is the machine's boot time.
    #[must_use]
    pub fn start_time(&self, booted: f64) -> Option<f64> {
        Some(booted + self.began as f64 / per(SysconfVar::CLK_TCK)? as f64)
    }
}

fn per(what: SysconfVar) -> Option<u64> {
    u64::try_from(sysconf(what).ok()??).ok()
}

fn parse(stat: &str, ticks_a_second: u64, page_size: u64) -> Option<Process> {
    // The second field is the program's name in parentheses, which may itself contain parentheses.
    let (_, fields) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    // Numbered as in the manual, where the state is field 3.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let ticks = field(14)? + field(15)?;
    Some(Process {
        resident_bytes: field(24)? * page_size,
        virtual_bytes: field(23)?,
        threads: field(20)?,
        cpu_seconds: ticks as f64 / ticks_a_second as f64,
        began: field(22)?,
        ended: matches!(*fields.first()?, "Z" | "X"),
        reaped_seconds: (field(16)? + field(17)?) as f64 / ticks_a_second as f64,
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
    })
}

/// A worker's usage: of the program and everything that it started.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Tree {
    /// The guard's start time. Together with the guard's pid it identifies a worker uniquely.
    pub(super) began: u64,
    /// Resident memory, in bytes. Shared pages count once per process.
    pub(super) resident_bytes: u64,
    /// CPU time, user and system, including that of ended processes.
    pub(super) cpu_seconds: f64,
}

/// Reads the workers' usage. Each worker is identified by its guard's pid.
#[derive(Debug, Default)]
pub(super) struct Trees {
    /// The largest CPU time seen so far of each current worker.
    most: Mutex<HashMap<(i32, u64), f64>>,
}

impl Trees {
    /// The usage of those of these workers that exist. CPU time never decreases, although a scan is
    /// no atomic snapshot: a process may end during it, or have a parent that does not wait for it.
    pub(super) fn look(&self, guards: &[i32]) -> HashMap<i32, Tree> {
        if guards.is_empty() {
            return HashMap::new();
        }
        let mut found = trees(&processes(), guards);
        let mut most = self.most.lock().unwrap_or_else(PoisonError::into_inner);
        for (guard, tree) in &mut found {
            let most = most.entry((*guard, tree.began)).or_default();
            *most = most.max(tree.cpu_seconds);
            tree.cpu_seconds = *most;
        }
        // A caller that asks for only some of the workers must not forget the others.
        most.retain(|(guard, began), _| {
            found.get(guard).map_or_else(
                || Process::look(*guard).is_some_and(|process| process.began == *began),
                |tree| tree.began == *began,
            )
        });
        found
    }
}

fn trees(processes: &BTreeMap<i32, Process>, guards: &[i32]) -> HashMap<i32, Tree> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for (pid, process) in processes {
        children.entry(process.parent).or_default().push(*pid);
    }
    let mut of = |guard: i32| {
        let own = processes.get(&guard)?;
        // The guard's own usage is not the worker's.
        let (mut resident_bytes, mut cpu_seconds) = (0, own.reaped_seconds);
        let mut parents = vec![guard];
        while let Some(parent) = parents.pop() {
            // Removed from the map: the table is not a snapshot and may contain cycles, which would
            // loop forever.
            for pid in children.remove(&parent).unwrap_or_default() {
                let process = &processes[&pid];
                // A process in the guard's process group belongs to the guard: it is the writer.
                if process.group != guard {
                    resident_bytes += process.resident_bytes;
                    cpu_seconds += process.cpu_seconds + process.reaped_seconds;
                    parents.push(pid);
                }
            }
        }
        Some((guard, Tree { began: own.began, resident_bytes, cpu_seconds }))
    };
    guards.iter().copied().filter_map(&mut of).collect()
}

/// The process table.
fn processes() -> BTreeMap<i32, Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: i32| Some((pid, Process::look(pid)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "7 (a ) 1 (b) S 1 7 7 0 -1 4194560 1 2 3 4 150 25 5 6 20 0 1 0 8765 9 10 18";

    #[test]
    fn a_name_may_hold_anything() {
        let expected = Process {
            resident_bytes: 10 * 4096,
            virtual_bytes: 9,
            threads: 1,
            cpu_seconds: 1.75,
            began: 8765,
            ended: false,
            reaped_seconds: 0.11,
            parent: 1,
            group: 7,
        };
        assert_eq!(parse(STAT, 100, 4096), Some(expected));
        let ended = STAT.replace(") S", ") Z");
        assert_eq!(parse(&ended, 100, 4096), Some(Process { ended: true, ..expected }));
        assert_eq!(parse("7 (a) S 1", 100, 4096), None);
    }

    #[test]
    fn a_worker_is_all_below_its_guard_and_what_has_ended() {
        let process = |parent, group, cpu_seconds, reaped_seconds| Process {
            resident_bytes: 1 << 20,
            virtual_bytes: 0,
            threads: 1,
            cpu_seconds,
            began: 5,
            ended: false,
            reaped_seconds,
            parent,
            group,
        };
        let table = BTreeMap::from([
            (10, process(1, 10, 64.0, 0.5)),
            (11, process(10, 11, 1.0, 2.0)),
            (12, process(11, 12, 4.0, 0.0)),
            (13, process(10, 10, 128.0, 0.0)),
            (20, process(1, 20, 256.0, 0.0)),
        ]);
        let tree = Tree { began: 5, resident_bytes: 2 << 20, cpu_seconds: 7.5 };
        assert_eq!(trees(&table, &[10, 30]), HashMap::from([(10, tree)]));
    }

    #[test]
    fn cpu_time_of_a_worker_never_falls() {
        let own = i32::try_from(std::process::id()).unwrap();
        let looked = Trees::default();
        let began = looked.look(&[own])[&own].began;
        looked.most.lock().unwrap().insert((own, began), 1e9);
        looked.most.lock().unwrap().insert((own, began + 1), 2e9);
        looked.look(&[]);
        assert_eq!(looked.look(&[own])[&own].cpu_seconds, 1e9);
        assert_eq!(looked.most.lock().unwrap().len(), 1, "another's is forgotten");
    }

    #[test]
    fn this_process_is_there_and_no_process_has_no_id() {
        let own = i32::try_from(std::process::id()).unwrap();
        let process = Process::look(own).unwrap();
        assert!(process.resident_bytes > 100_000 && !process.ended, "{process:?}");
        assert_eq!(Process::look(0), None);
    }
}
