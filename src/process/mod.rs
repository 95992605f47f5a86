//! Worker processes: starting, signalling and reaping them, and their output.
//!
//! lbd never forks a worker itself. It re-executes its own binary as a *template* ([`exec_main`]), which
//! forks a *guard* for each worker, and the guard forks the program:
//!
//! ```text
//! lbd ──┬── template                      forks the guards, which are lbd's children
//!       ├── guard ── program ── what the program starts
//!       └── guard ─┬─ program
//!                  └─ writer ─▶ file      if its output goes to a file
//! ```
//!
//! The guard is single-threaded, runs no async runtime, and is a subreaper: every process that the
//! program forks stays below the guard, however it daemonizes. A worker ends in one of four ways,
//! and none leaves a process behind:
//!
//! - The program exits by itself: the guard reports the exit, kills what is left below itself, and
//!   exits.
//! - lbd asks the program to stop: the guard waits until the program's whole process group has
//!   ended, then signals the processes that are left. It kills those that don't end in time, or all
//!   of them when lbd orders it, and reports the exit.
//! - lbd ends, for whatever reason: the guard reads end of file from the control channel and kills
//!   everything.
//! - The guard is killed: the kernel kills the program (parent-death signal) and reparents the
//!   other processes to lbd, which is a subreaper too, and which kills and reaps them
//!   ([`Spawner`]).
//!
//! Where a cgroup is delegated to lbd, each worker has its own ([`Cgroups`]). The cgroup is killed
//! as a whole before anything else is killed. The guard is not in it.
//!
//! This module owns every child of lbd. It makes no decisions: `supervisor` decides what to start,
//! when to signal and what an exit means.

mod cgroup;
mod channel;
mod connections;
mod environment;
mod exec;
mod guard;
mod holdings;
mod init;
mod lines;
mod memory;
mod output;
mod spawn;
mod stop;
mod template;
mod tree;
mod writer;

pub use cgroup::{Cgroup, Cgroups, NoCgroups};
pub use connections::{ConnectionGauge, Counted};
pub use environment::{Identity, environment, expand};
pub use holdings::Holdings;
pub use init::stay_as_init;
pub use memory::{MemoryGauge, Watched};
pub use output::{LastWords, Outputs, Streams};
pub use spawn::{Child, ChildEvent, Controller, Launch, Spawner};
pub use template::exec_main;

use std::{os::unix::process::ExitStatusExt as _, process::ExitStatus};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// The program exited with this status (0 to 255).
    Code(i32),
    /// This signal killed the program.
    Signal(i32),
    /// The guard was killed, and the kernel killed the program right after it.
    Lost,
}

impl Exit {
    fn from_status(status: ExitStatus) -> Self {
        match status.code() {
            Some(code) => Self::Code(code),
            None => Self::Signal(status.signal().unwrap_or_default()),
        }
    }

    /// The exit status that a shell would show.
    fn status(self) -> u8 {
        let status = match self {
            Self::Code(code) => code,
            Self::Signal(number) => 128 + number,
            Self::Lost => 128 + Signal::SIGKILL as i32,
        };
        u8::try_from(status).unwrap_or(u8::MAX)
    }
}
