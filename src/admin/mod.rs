//! How a running daemon is looked at and operated: HTTP over a unix socket, and over TCP where the
//! configuration says so.
//!
//! ```text
//! lbd status, reload, …            the admin thread                 the main thread
//! client ── finds ─▶ socket ─▶ server ─ access ─ api ── Request, bounded ─▶ daemon, which answers each
//! ```
//!
//! The server has a thread of its own, so that parsing, `/proc` and slow clients cost neither
//! traffic nor supervision a moment. It owns no state: what it tells, the daemon told it. Server and
//! client share the types of [`status`], and where the socket is is decided in one place (`place`)
//! for both.

mod access;
mod answer;
mod api;
mod caller;
mod client;
mod connections;
mod dashboard;
mod events;
mod find;
mod folder;
mod main_thread;
pub mod metrics;
mod news;
mod place;
mod sampler;
mod server;
mod socket;
pub mod status;
mod usage;

use tokio::sync::oneshot;

pub use access::CurrentToken;
pub use client::{Client, ClientError};
pub use find::{Running, Survey};
pub use place::Instance;
pub use server::{MAX_CONNECTIONS, Server, ServerError, TcpSockets};
pub use socket::{ClaimError, Socket};
pub use status::{State, Status};
pub use usage::Process;

use serde::{Deserialize, Serialize};

/// Says in the log what was passed over on the way to the admin socket.
pub fn tell_remarks(socket: &Socket) {
    for error in socket.remarks() {
        tracing::warn!(error, "the admin socket is not as it should be");
    }
}

/// What somebody wants of the daemon. Who asked may be gone by the time it is answered.
#[derive(Debug)]
pub enum Request {
    /// How everything is, now.
    Status(oneshot::Sender<Status>),
    /// All that is counted, now.
    Metrics(oneshot::Sender<metrics::Snapshot>),
    /// Read the file again, and answer when what changed is in force.
    Reload(Answer<Reloaded>),
    /// Read the file again, see to it that all workers of a service, or of all, or that of one slot
    /// are new, and answer at the end of both.
    ReloadAndRestart {
        /// The service; all of them where `None`.
        service: Option<String>,
        /// The slot; all of them where `None`.
        slot: Option<u32>,
        /// Where the answer goes.
        answer: Answer<Restarted>,
    },
    /// Replace the workers of a service one at a time, or that of one slot, and answer at the end.
    Restart {
        /// Its name.
        service: String,
        /// The slot; all of them where `None`.
        slot: Option<u32>,
        /// Where the answer goes.
        answer: Answer<Restarted>,
    },
    /// Take a slot out of rotation or put it back in, and answer when that is so.
    Place {
        /// The service.
        service: String,
        /// The slot.
        slot: u32,
        /// Out of rotation.
        drained: bool,
        /// Where the answer goes.
        answer: Answer<Placed>,
    },
    /// Stop gracefully; while that is under way already it changes nothing.
    Stop,
}

/// Where the daemon answers a request.
pub type Answer<T> = oneshot::Sender<Result<T, Failure>>;

/// What a reload changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// Services that are new.
    pub added: usize,
    /// Services that are gone.
    pub removed: usize,
    /// Services with other settings than before.
    pub changed: usize,
    /// What an operator should know of it: a sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// What a restart did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restarted {
    /// How many workers were replaced.
    pub workers: usize,
    /// What was reloaded before, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reloaded: Option<Reloaded>,
    /// What an operator should know of it: a sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// Where an operator has put a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Placed {
    /// Out of rotation at the operator's wish, until it is resumed.
    pub drained: bool,
    /// Where it is in its life.
    pub state: State,
    /// The connections that it holds.
    pub active: u64,
    /// How many workers of the service are in rotation.
    pub in_rotation: usize,
    /// What clients of the service will notice of it, if anything.
    pub warning: Option<String>,
}

/// Why the daemon did not do what it was asked to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// There is nothing of that name.
    #[error("{0}")]
    NotFound(String),
    /// The file is refused; nothing changed.
    #[error("{0}")]
    Refused(String),
    /// It can't be done now, or it was tried and failed.
    #[error("{0}")]
    Failed(String),
}
