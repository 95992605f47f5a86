//! The processes below this one, found in `/proc`, and how to kill and reap them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::process::ExitStatusExt as _,
    process::ExitStatus,
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::{Pid, getpgrp},
};
use rustix::process::{WaitOptions, wait, waitpid};

/// One entry of the process table: the fields of `/proc/PID/stat` (proc_pid_stat(5)) that are used
/// here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) parent: i32,
    pub(super) group: i32,
    /// All threads have ended, and the parent has not reaped the process. (The kernel also shows a
    /// process as a zombie if only its first thread has ended.)
    pub(super) zombie: bool,
    /// In clock ticks since boot. Pid and start time together identify a process uniquely.
    pub(super) start: u64,
}

/// Tells a process from a later one with the same pid.
pub(super) fn identity(process: &Process) -> (i32, u64) {
    (process.pid, process.start)
}

/// Reads the process table. It may or may not include processes that begin or end meanwhile.
pub(super) fn processes() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            let pid: i32 = name.to_str()?.parse().ok()?;
            parse_stat(pid, &fs::read(format!("/proc/{pid}/stat")).ok()?)
        })
        .collect()
}

/// Those of `all` that are below one of `roots`, at any depth. The roots are not included.
pub(super) fn below(all: &[Process], roots: &[i32]) -> Vec<Process> {
    let mut children: BTreeMap<i32, Vec<Process>> = BTreeMap::new();
    for process in all {
        children.entry(process.parent).or_default().push(*process);
    }
    let mut found = Vec::new();
    let mut parents = roots.to_vec();
    while let Some(parent) = parents.pop() {
        // Removed from the map: the table is not a snapshot and may contain cycles, which would
        // loop forever.
        let children = children.remove(&parent).unwrap_or_default();
        parents.extend(children.iter().map(|process| process.pid));
        found.extend(children);
    }
    found
}

/// The worker's own processes, as lbd sees them: everything below the guard except the guard's own
/// process group. A worker can't join that group, because it is in another session.
pub(super) fn worker_of(all: &[Process], guard: i32) -> Vec<Process> {
    let mut found = below(all, &[guard]);
    found.retain(|process| process.group != guard);
    found
}

/// Sends SIGKILL to the process groups of `processes`, except to this process's own, and to each
/// process.
///
/// A group is killed in one step, so that a process that forks as fast as it can does not escape.
/// This kills no unrelated process: a group lies within one session, and a session lies below the
/// process that created it, so a group with one member in the tree is in the tree as a whole.
pub(super) fn kill_all(processes: &[Process]) {
    let own = getpgrp().as_raw();
    let alive = || processes.iter().filter(|process| !process.zombie);
    // Each group once: the cost of a signal grows with the number of members.
    let groups: BTreeSet<i32> = alive().map(|process| process.group).collect();
    for group in groups.into_iter().filter(|&group| group != own) {
        // An error, here and below, means that the process or group is gone.
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    for process in alive() {
        let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
    }
}

/// What [`reap`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reaped {
    /// This child had ended in this way. It is reaped now.
    Ended(i32, ExitStatus),
    /// There are matching children, but none has ended.
    Alive,
    /// There is no matching child.
    None,
}

/// Reaps one child that has ended: `pid`, or any child if `None`. Never blocks.
///
/// Does not use nix, whose `waitpid` reaps a child that was killed by a real-time signal and then
/// fails.
pub(super) fn reap(pid: Option<i32>) -> Reaped {
    let ended = match pid {
        None => wait(WaitOptions::NOHANG),
        Some(_) => waitpid(pid.and_then(rustix::process::Pid::from_raw), WaitOptions::NOHANG),
    };
    match ended {
        Ok(None) => Reaped::Alive,
        Ok(Some((pid, status))) => {
            Reaped::Ended(pid.as_raw_nonzero().get(), ExitStatus::from_raw(status.as_raw()))
        }
        Err(_) => Reaped::None,
    }
}

fn parse_stat(pid: i32, stat: &[u8]) -> Option<Process> {
    // The second field is the program's name in parentheses, which may contain anything, also `)`.
    let end = stat.iter().rposition(|&byte| byte == b')')?;
    let mut fields = str::from_utf8(&stat[end + 1..]).ok()?.split_ascii_whitespace();
    let ended = matches!(fields.next()?, "Z" | "X");
    let parent = fields.next()?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    // Threads are field 20 (the fifth was read last), and `start` is field 22.
    let threads: u32 = fields.nth(14)?.parse().ok()?;
    let start = fields.nth(1)?.parse().ok()?;
    let zombie = ended && threads <= 1;
    Some(Process { pid, parent, group, zombie, start })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, id};

    use super::*;

    #[test]
    fn a_name_with_parentheses_and_blanks_does_not_shift_the_fields() {
        let stat = b"42 (a) R 1 (b) Z 7 41 40 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 12345 0 0";
        assert_eq!(
            parse_stat(42, stat),
            Some(Process { pid: 42, parent: 7, group: 41, zombie: true, start: 12345 })
        );
        // Its first thread has ended, another has not.
        let stat = b"42 (a) Z 7 41 40 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 2 0 12345 0 0";
        assert!(!parse_stat(42, stat).unwrap().zombie);
        assert_eq!(parse_stat(42, b"42 (a"), None);
    }

    #[test]
    fn below_finds_every_depth_and_nothing_else() {
        let process = |pid, parent| Process { pid, parent, group: pid, zombie: false, start: 0 };
        let all = [process(9, 4), process(2, 1), process(4, 2), process(5, 3), process(3, 1)];
        let mut found: Vec<i32> = below(&all, &[2]).iter().map(|process| process.pid).collect();
        found.sort_unstable();
        assert_eq!(found, [4, 9]);
    }

    #[test]
    fn a_child_is_in_the_table_until_it_is_reaped() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let own = i32::try_from(id()).unwrap();
        assert!(below(&processes(), &[own]).iter().any(|process| process.pid == pid));
        assert!(child.wait().unwrap().success());
        assert!(!processes().iter().any(|process| process.pid == pid));
        assert_eq!(reap(Some(pid)), Reaped::None);
    }
}
