//! lbd as PID 1, the first process of a container.
//!
//! PID 1 is given every orphan of the container, and must reap it; and lbd kills what it is given,
//! for that is what a dead guard left behind. So as PID 1 lbd splits in two: the first process is
//! an init that reaps and passes signals on, and lbd proper is its child, which is given the orphans
//! of its own guards and no others.

use std::{io, process::ExitCode};

use nix::{
    sys::signal::{SigSet, SigmaskHow, Signal, kill},
    unistd::{ForkResult, Pid, fork, getpid, setpgid, tcsetpgrp},
};

use super::{
    Exit,
    tree::{Reaped, reap},
};

/// Where this process is PID 1, forks: the first process stays here as init until lbd proper ends,
/// and returns its exit status. Returns `None` in lbd proper, and in any process that is not PID 1.
///
/// To be called before there is a second thread. As the kernel kills what is left in a container
/// when its PID 1 ends, no end of either process leaves a worker behind.
pub fn stay_as_init() -> io::Result<Option<ExitCode>> {
    if getpid() != Pid::from_raw(1) {
        return Ok(None);
    }
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    // SAFETY: this process has one thread, so the child may do whatever it could.
    match unsafe { fork() }? {
        ForkResult::Child => {
            // In the foreground of its terminal, if any, on its own: a ^C is for one of the two,
            // and lbd takes a second one as the wish to stop at once.
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            let _ = tcsetpgrp(io::stdin(), getpid());
            before.thread_set_mask()?;
            Ok(None)
        }
        ForkResult::Parent { child } => loop {
            // An error is a real-time signal, which nobody sends.
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
