//! What a process uses, from `/proc/PID/stat` (proc_pid_stat(5)).

use std::fs;

use nix::unistd::{SysconfVar, sysconf};

/// A process, as the kernel accounts it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Process {
    /// Memory that is in RAM, in bytes. The kernel's counters may lag by some pages a thread.
    pub resident_bytes: u64,
    /// Address space, in bytes.
    pub virtual_bytes: u64,
    /// Threads.
    pub threads: u64,
    /// CPU time, user and system.
    pub cpu_seconds: f64,
    /// When it began, in clock ticks after boot: with the pid it names one process for ever.
    pub began: u64,
    /// It has ended, and waits for its parent to take note.
    pub ended: bool,
}

impl Process {
    /// Looks at the process `pid`; `None` where there is none, or not to be seen from here.
    #[must_use]
    pub fn look(pid: i32) -> Option<Self> {
        let ticks = per(SysconfVar::CLK_TCK)?;
        let page = per(SysconfVar::PAGE_SIZE)?;
        parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?, ticks, page)
    }

    /// When it began, in seconds since the Unix epoch; `booted` is when the machine did.
    #[must_use]
    pub fn start_time(&self, booted: f64) -> Option<f64> {
        Some(booted + self.began as f64 / per(SysconfVar::CLK_TCK)? as f64)
    }
}

fn per(what: SysconfVar) -> Option<u64> {
    u64::try_from(sysconf(what).ok()??).ok()
}

fn parse(stat: &str, ticks_a_second: u64, page_size: u64) -> Option<Process> {
    // The second field is the program's name in parentheses, which may hold any of them itself.
    let (_, fields) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    // Numbered as in the manual, where the state is the third.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let ticks = field(14)? + field(15)?;
    Some(Process {
        resident_bytes: field(24)? * page_size,
        virtual_bytes: field(23)?,
        threads: field(20)?,
        cpu_seconds: ticks as f64 / ticks_a_second as f64,
        began: field(22)?,
        ended: matches!(*fields.first()?, "Z" | "X"),
    })
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
        };
        assert_eq!(parse(STAT, 100, 4096), Some(expected));
        let ended = STAT.replace(") S", ") Z");
        assert_eq!(parse(&ended, 100, 4096), Some(Process { ended: true, ..expected }));
        assert_eq!(parse("7 (a) S 1", 100, 4096), None);
    }

    #[test]
    fn this_process_is_there_and_no_process_has_no_id() {
        let own = i32::try_from(std::process::id()).unwrap();
        let process = Process::look(own).unwrap();
        assert!(process.resident_bytes > 100_000 && !process.ended, "{process:?}");
        assert_eq!(Process::look(0), None);
    }
}
