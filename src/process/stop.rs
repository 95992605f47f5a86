//! How a stop ends: a worker that was asked to stop has ended when its last process has, not its
//! first.
//!
//! With `npm start`, or a shell that waits for a server, the first process is a wrapper. A signal
//! to the process group kills the wrapper at once, while the server still answers requests. So the
//! exit of the first process does not end the stop: the rest of the process group has received the
//! signal and may take as long as it needs, until lbd orders a kill. A process that has left the
//! group (a helper in its own session) has not received the signal and might run forever: it gets
//! the signal when the group has ended, and then a short time to exit.
//!
//! With `stop.to = "main"` only the program gets the signal, and is expected to tell its group
//! itself. If it exits before its group (the primary of a node cluster exits when its workers have
//! stopped listening, while they still answer), the group may finish its work. Because some
//! processes in the group may not have been told after all, the group gets the signal shortly
//! before lbd would kill it.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use super::tree::{Process, identity};
use crate::config::StopTo;

/// How long processes that did not get the signal at first may take to exit once they get it.
const PATIENCE: Duration = Duration::from_secs(2);

/// A stop that was ordered.
#[derive(Debug)]
pub(super) struct Stop {
    signal: Signal,
    /// When to signal the group; `None` once the group has the signal.
    tell_group: Option<Instant>,
    /// Processes outside of the group that already got the signal.
    told: BTreeSet<(i32, u64)>,
    /// When to kill what is left; set once the group has ended.
    kill_at: Option<Instant>,
}

/// What to do about processes that outlived the program.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// Send the signal to these processes, and look again, at that time at the latest.
    Tell(Signal, Vec<i32>, Option<Instant>),
    /// The stop is over: kill whatever is left.
    Over,
}

impl Stop {
    /// `deadline` is the time at which lbd will order a kill.
    pub(super) fn new(signal: Signal, to: StopTo, deadline: Instant) -> Self {
        let tell_group = match to {
            StopTo::Group => None,
            StopTo::Main => Some(deadline.checked_sub(PATIENCE).unwrap_or(deadline)),
        };
        Self { signal, tell_group, told: BTreeSet::new(), kill_at: None }
    }

    /// Decides what to do about `left`, all remaining processes of the worker. Called once
    /// `program`, the first process and the leader of its group, has ended.
    pub(super) fn look(&mut self, left: &[Process], program: i32, now: Instant) -> Rest {
        let is_alive = |process: &&Process| !process.zombie;
        let (group, others): (Vec<&Process>, Vec<&Process>) =
            left.iter().filter(is_alive).partition(|process| process.group == program);
        if !group.is_empty() {
            let untold = match self.tell_group {
                Some(at) if at > now => return Rest::Tell(self.signal, Vec::new(), Some(at)),
                Some(_) => pids(&group),
                None => Vec::new(),
            };
            self.tell_group = None;
            return Rest::Tell(self.signal, untold, None);
        }
        let kill_at = *self.kill_at.get_or_insert(now + PATIENCE);
        if others.is_empty() || now >= kill_at {
            return Rest::Over;
        }
        let untold: Vec<&Process> =
            others.into_iter().filter(|process| self.told.insert(identity(process))).collect();
        Rest::Tell(self.signal, pids(&untold), Some(kill_at))
    }
}

fn pids(processes: &[&Process]) -> Vec<i32> {
    processes.iter().map(|process| process.pid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAM: i32 = 10;

    fn process(pid: i32, group: i32) -> Process {
        Process { pid, parent: 1, group, zombie: false, start: 0 }
    }

    fn tell(pids: &[i32], at: Option<Instant>) -> Rest {
        Rest::Tell(Signal::SIGTERM, pids.to_vec(), at)
    }

    #[test]
    fn the_group_has_the_signal_and_all_the_time_and_others_get_it_after_that() {
        let now = Instant::now();
        let mut stop = Stop::new(Signal::SIGTERM, StopTo::Group, now);
        let (server, helper) = (process(11, PROGRAM), process(12, 12));
        let later = now + Duration::from_secs(3600);
        assert_eq!(stop.look(&[server, helper], PROGRAM, now), tell(&[], None));
        assert_eq!(stop.look(&[server, helper], PROGRAM, later), tell(&[], None));
        let at = Some(later + PATIENCE);
        assert_eq!(stop.look(&[helper], PROGRAM, later), tell(&[12], at));
        let more = process(13, 13);
        assert_eq!(stop.look(&[helper, more], PROGRAM, later), tell(&[13], at), "once each");
        assert_eq!(stop.look(&[helper], PROGRAM, later + PATIENCE), Rest::Over);
    }

    #[test]
    fn the_group_of_a_program_that_was_told_alone_gets_the_signal_before_it_is_killed() {
        let begun = Instant::now();
        let deadline = begun + Duration::from_secs(10);
        let mut stop = Stop::new(Signal::SIGTERM, StopTo::Main, deadline);
        let (one, other) = (process(11, PROGRAM), process(12, PROGRAM));
        let now = deadline - PATIENCE;
        assert_eq!(stop.look(&[one, other], PROGRAM, begun), tell(&[], Some(now)));
        assert_eq!(stop.look(&[one, other], PROGRAM, now), tell(&[11, 12], None));
        assert_eq!(stop.look(&[other], PROGRAM, now), tell(&[], None));
        assert_eq!(stop.look(&[], PROGRAM, now), Rest::Over);
    }

    #[test]
    fn what_has_ended_and_waits_for_its_parent_is_not_waited_for() {
        let ended = Process { zombie: true, ..process(11, PROGRAM) };
        let now = Instant::now();
        let mut stop = Stop::new(Signal::SIGTERM, StopTo::Group, now);
        assert_eq!(stop.look(&[ended], PROGRAM, now), Rest::Over);
    }
}
