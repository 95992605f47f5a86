//! Worker processes: starting, signalling and reaping them, and their output.
//!
//! lbd never forks a worker itself. It re-executes its own binary as a *template* ([`exec_main`]), which
//! forks a *guard* for each worker, and the guard forks the program:
//!
//! ```text
//! lbd ──┬── template                      guards are forked from it, and lbd's children
//!       ├── guard ── program ── what the program starts
//!       └── guard ─┬─ program
//!                  └─ writer ─▶ file      where its output goes to one
//! ```
//!
//! The guard is single-threaded, runs no runtime, and is a subreaper: whatever the
//! program forks, however it daemonizes, stays below it. So one of four things ends a worker, and
//! none leaves a process behind:
//!
//! - the program ends unasked: the guard reports it, kills what is left below itself, and ends;
//! - the program is asked to stop: the guard waits until all of its process group has ended, asks what
//!   is left, kills what does not end then or when lbd says so, and reports the end;
//! - lbd ends, however: the guard reads the end of the control channel, and kills it all;
//! - the guard is killed: the kernel kills the program (its parent-death signal), and the rest is
//!   handed to lbd, a subreaper too, which kills and reaps it ([`Spawner`]).
//!
//! Where a cgroup is delegated to lbd, each worker has one of its own ([`Cgroups`]), which is killed
//! as a whole before anything else is; the guard is outside of it.
//!
//! This module owns every child of lbd. It decides nothing: what to start, when to signal and what
//! an exit means is for `supervisor`.

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
    /// It ended itself, with this status (0 to 255).
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// Its guard was killed, and the program by the kernel right after it.
    Lost,
}

impl Exit {
    fn from_status(status: ExitStatus) -> Self {
        match status.code() {
            Some(code) => Self::Code(code),
            None => Self::Signal(status.signal().unwrap_or_default()),
        }
    }

    /// What a shell would make of it.
    fn status(self) -> u8 {
        let status = match self {
            Self::Code(code) => code,
            Self::Signal(number) => 128 + number,
            Self::Lost => 128 + Signal::SIGKILL as i32,
        };
        u8::try_from(status).unwrap_or(u8::MAX)
    }
}
