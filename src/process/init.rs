//! lbd as PID 1, the first process of a container.
//!
//! All orphans in the container are reparented to PID 1, which must reap them. lbd however kills
//! every process that is reparented to it, because a dead guard left that process behind. So as PID
//! 1, lbd splits in two: the first process is an init that reaps and forwards signals, and lbd
//! proper is its child. Only the orphans of lbd's own guards are reparented to lbd proper.

use std::{io, process::ExitCode};

use nix::{
    sys::signal::{SigSet, SigmaskHow, Signal, kill},
    unistd::{ForkResult, Pid, fork, getpid, setpgid, tcsetpgrp},
};

use super::{
    Exit,
    tree::{Reaped, reap},
};

/// If this process is PID 1, forks: the first process stays in this function as init until lbd
/// proper ends, and returns lbd's exit status. Returns `None` in lbd proper, and in any process
/// that is not PID 1.
///
/// Must be called before a second thread exists. The kernel kills what is left in a container when
/// its PID 1 ends, so neither process can end and leave a worker behind.
pub fn stay_as_init() -> io::Result<Option<ExitCode>> {
    if getpid() != Pid::from_raw(1) {
        return Ok(None);
    }
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    // SAFETY: this process has one thread, so the child may do whatever it could.
    match unsafe { fork() }? {
        ForkResult::Child => {
            // Make lbd the foreground process group of its terminal, if there is one. A ^C must
            // reach only one of the two processes, because lbd takes a second ^C as a request to
            // stop at once.
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            let _ = tcsetpgrp(io::stdin(), getpid());
            before.thread_set_mask()?;
            Ok(None)
        }
        ForkResult::Parent { child } => loop {
            // An error means a real-time signal, which nobody sends.
            match SigSet::all().wait() {
                Ok(Signal::SIGCHLD) => {
                    while let Reaped::Ended(pid, status) = reap(None) {
                        if pid == child.as_raw() {
                            return Ok(Some(ExitCode::from(Exit::from_status(status).status())));
                        }
                    }
                }
                Ok(signal) => drop(kill(child, signal)),
                Err(_) => {}
            }
        },
    }
}
