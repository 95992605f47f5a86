//! The sockets of a worker: of the program and everything that it started.

use std::{collections::BTreeSet, fs, io};

use super::tree::{processes, worker_of};

/// What a scan of a worker's processes found.
#[derive(Debug, Default)]
pub struct Holdings {
    /// The inodes of its sockets.
    pub sockets: BTreeSet<u32>,
    /// The effective users of its processes.
    pub users: BTreeSet<u32>,
    /// lbd may not look into at least one of the processes: it runs as another user, or is not
    /// dumpable (PR_SET_DUMPABLE(2const)).
    pub is_partial: bool,
}

impl Holdings {
    /// Scans everything below the guard with this pid, in `/proc`. Takes milliseconds where there
    /// are many processes, and may wait for a lock of one of them.
    #[must_use]
    pub fn of_worker(guard: i32) -> Self {
        let mut holdings = Self::default();
        for process in worker_of(&processes(), guard) {
            holdings.users.extend(user(process.pid));
            let looked = sockets(process.pid, |inode| {
                holdings.sockets.insert(inode);
            });
            holdings.is_partial |= looked.is_err();
        }
        holdings
    }
}

/// The effective user of a process (proc_pid_status(5), Uid). The owner of its folder in `/proc`
/// won't do: that is root if the process is not dumpable.
fn user(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Calls `found` with the inode of each socket that the process has. A process that has ended has
/// none.
///
/// # Errors
///
/// Where lbd may not look into the process.
pub(super) fn sockets(pid: i32, mut found: impl FnMut(u32)) -> io::Result<()> {
    let entries = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    // An entry that can't be read is gone by now, or its process is.
    let targets = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    targets.filter_map(|target| socket_inode(target.to_str()?)).for_each(&mut found);
    Ok(())
}

/// `socket:[123]` (proc_pid_fd(5)).
fn socket_inode(link: &str) -> Option<u32> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::{
        net::TcpListener,
        os::fd::OwnedFd,
        process::{Command, Stdio, id},
    };

    use nix::unistd::geteuid;

    use super::{super::tree::below, *};
    use crate::net::diag::inode_of;

    #[test]
    fn what_a_process_below_has_is_found_with_its_user() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = inode_of(&listener).unwrap();
        // A shell with a child that has it.
        let mut child = Command::new("sh")
            .args(["-c", "sleep 1000; true"])
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .spawn()
            .unwrap();
        let holdings = Holdings::of_worker(i32::try_from(id()).unwrap());
        assert!(holdings.sockets.contains(&inode), "{holdings:?}");
        assert!(holdings.users.contains(&geteuid().as_raw()));
        for process in below(&processes(), &[i32::try_from(child.id()).unwrap()]) {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(process.pid),
                nix::sys::signal::Signal::SIGKILL,
            )
            .unwrap();
        }
        child.wait().unwrap();
        assert!(Holdings::of_worker(i32::MAX).sockets.is_empty());
    }

    #[test]
    fn links_of_other_kinds_are_none() {
        assert_eq!(socket_inode("socket:[42]"), Some(42));
        assert_eq!(socket_inode("pipe:[42]"), None);
        assert_eq!(socket_inode("/tmp/socket:[42]"), None);
    }
}
