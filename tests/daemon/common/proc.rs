//! What `/proc` tells of a process (proc(5)).

use std::{fs, time::Duration};

use nix::unistd::{SysconfVar, sysconf};

/// The processor time that it has used, in its own code and in the kernel for it.
pub(crate) fn cpu(pid: i32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name, in parentheses, may hold anything; the fields after it are counted from 3.
    let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks = |field: usize| fields[field - 3].parse::<u32>().unwrap();
    let per_second = sysconf(SysconfVar::CLK_TCK).unwrap().unwrap();
    Duration::from_secs(u64::from(ticks(14) + ticks(15))) / u32::try_from(per_second).unwrap()
}

/// Whether all of its threads are stopped.
pub(crate) fn is_stopped(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let stats = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("stat")));
    stats.flatten().all(|stat| stat.rsplit_once(") ").unwrap().1.starts_with('T'))
}

/// Its threads: their ids and names.
pub(crate) fn threads(pid: i32) -> Vec<(i32, String)> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(Result::unwrap);
    let name = |entry: &fs::DirEntry| fs::read_to_string(entry.path().join("comm")).unwrap();
    let id = |entry: &fs::DirEntry| entry.file_name().to_str().unwrap().parse().unwrap();
    entries.map(|entry| (id(&entry), name(&entry).trim_end().to_owned())).collect()
}

/// Its resident memory, in bytes.
pub(crate) fn resident(pid: i32) -> usize {
    status(pid, "VmRSS").unwrap().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

/// How many descriptors it has open.
pub(crate) fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// How often its first thread has waited for something (`voluntary_ctxt_switches`).
pub(crate) fn waits(pid: i32) -> u64 {
    status(pid, "voluntary_ctxt_switches").unwrap().parse().unwrap()
}

/// Its parent; `None` where it has ended.
pub(crate) fn parent(pid: i32) -> Option<i32> {
    status(pid, "PPid")?.parse().ok()
}

/// Whether it is there, and more than what its parent has not asked after.
pub(crate) fn is_alive(pid: i32) -> bool {
    status(pid, "State").is_some_and(|state| !state.starts_with(['Z', 'X']))
}

/// Those whose parent it is.
pub(crate) fn children(pid: i32) -> Vec<i32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// Whether anybody listens on this port of IPv4.
pub(crate) fn is_listened_on(port: u16) -> bool {
    const LISTEN: &str = "0A";
    let sockets = fs::read_to_string("/proc/net/tcp").unwrap();
    sockets.lines().skip(1).any(|line| {
        // Its number, its local and its remote address in hexadecimal, and its state.
        let fields: Vec<_> = line.split_whitespace().collect();
        fields[1].ends_with(&format!(":{port:04X}")) && fields[3] == LISTEN
    })
}

/// The line `key` of its status; `None` where it has ended.
fn status(pid: i32, key: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}
