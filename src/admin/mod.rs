//! The admin API, for observing and operating a running daemon: HTTP over a unix socket, and also
//! over TCP if configured.
//!
//! ```text
//! lbd status, reload, …            the admin thread                 the main thread
//! client ── finds ─▶ socket ─▶ server ─ access ─ api ── Request, bounded ─▶ daemon, which answers each
//! ```
//!
//! The server has its own thread, so that parsing, `/proc` and slow clients delay neither traffic
//! nor supervision. It owns no state: everything that it reports comes from the daemon. Server and
//! client share the types of [`status`], and one module, `location`, decides for both where the socket
//! is.

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
mod location;
mod main_thread;
pub mod metrics;
mod news;
mod sampler;
mod server;
mod socket;
pub mod status;
mod usage;

use tokio::sync::oneshot;

pub use access::CurrentToken;
pub use client::{Client, ClientError};
pub use find::{Running, Survey};
pub use location::Instance;
pub use server::{MAX_CONNECTIONS, Server, ServerError, TcpSockets};
pub use socket::{ClaimError, Socket};
pub use status::{State, Status};
pub use usage::Process;

use serde::{Deserialize, Serialize};

/// Logs what was skipped while choosing the admin socket's folder.
pub fn tell_remarks(socket: &Socket) {
    for error in socket.remarks() {
        tracing::warn!(error, "the admin socket is not as it should be");
    }
}

/// A request to the daemon. The client may be gone by the time it is answered.
#[derive(Debug)]
pub enum Request {
    /// The current status.
    Status(oneshot::Sender<Status>),
    /// The current counters.
    Metrics(oneshot::Sender<metrics::Snapshot>),
    /// Reload the file, and answer when the changes are in force.
    Reload(Answer<Reloaded>),
    /// Reload the file, make sure that all workers of a service, of all services, or of one slot
    /// are new, and answer when both are done.
    ReloadAndRestart {
        /// The service; all of them where `None`.
        service: Option<String>,
        /// The slot; all of them where `None`.
        slot: Option<u32>,
        /// Where the answer goes.
        answer: Answer<Restarted>,
    },
    /// Replace the workers of a service one at a time, or the worker of one slot, and answer when
    /// done.
    Restart {
        /// Its name.
        service: String,
        /// The slot; all of them where `None`.
        slot: Option<u32>,
        /// Where the answer goes.
        answer: Answer<Restarted>,
    },
    /// Take a slot out of rotation or put it back, and answer when done.
    SetDrained {
        /// The service.
        service: String,
        /// The slot.
        slot: u32,
        /// Out of rotation.
        drained: bool,
        /// Where the answer goes.
        answer: Answer<SlotDrain>,
    },
    /// Stop gracefully. Has no effect if a stop is already in progress.
    Stop,
}

/// Where the daemon sends its answer.
pub type Answer<T> = oneshot::Sender<Result<T, Failure>>;

/// What a reload changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// Services that were added.
    pub added: usize,
    /// Services that were removed.
    pub removed: usize,
    /// Services whose settings changed.
    pub changed: usize,
    /// Warnings for the operator, a sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// What a restart did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restarted {
    /// How many workers were replaced.
    pub workers: usize,
    /// What the reload before the restart changed, if one was requested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reloaded: Option<Reloaded>,
    /// Warnings for the operator, a sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// The result of a drain or resume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlotDrain {
    /// The operator has taken the worker out of rotation, until it is resumed.
    pub drained: bool,
    /// The worker's state.
    pub state: State,
    /// The connections that the worker holds.
    pub active: u64,
    /// How many workers of the service are in rotation.
    pub in_rotation: usize,
    /// A warning if clients of the service will be affected.
    pub warning: Option<String>,
}

/// Why the daemon did not do what was requested.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// There is no service or slot of that name.
    #[error("{0}")]
    NotFound(String),
    /// The file is refused; nothing changed.
    #[error("{0}")]
    Refused(String),
    /// It is not possible now, or it was tried and failed.
    #[error("{0}")]
    Failed(String),
}
