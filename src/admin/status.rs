//! The shape of `/status`, written by the server and read by the client.
//!
//! Points in time are RFC 3339 in UTC with milliseconds, spans are seconds with milliseconds (a
//! probe's with microseconds).

use std::fmt;

use serde::{Deserialize, Serialize};

/// Everything about a running daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// lbd's version.
    pub version: String,
    /// lbd's own process id.
    pub pid: u32,
    /// Since it was started.
    pub uptime_seconds: f64,
    /// Where its configuration comes from.
    pub config: Config,
    /// The services, in the order of the configuration; those on their way out until they are gone.
    pub services: Vec<Service>,
}

/// Where the configuration comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The absolute path of the file; `None` for `lbd run`.
    pub path: Option<String>,
    /// When the configuration in force was read.
    pub loaded_at: String,
    /// How the last reload went; before the first, the start.
    pub last_reload: Reload,
}

/// How a reload went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// The file was accepted, and no replacement of a worker has failed.
    pub ok: bool,
    /// When it was asked for.
    pub at: String,
    /// Why it was refused or failed.
    pub error: Option<String>,
}

/// One service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Where clients connect.
    pub listen: Vec<String>,
    /// How connections reach the workers.
    pub route: String,
    /// How the kernel shares them out, with `route = "direct"` alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steering: Option<Steering>,
    /// How a worker is chosen.
    pub balance: String,
    /// One a slot, in order.
    pub workers: Vec<Worker>,
    /// Workers that take over from one in `workers` as soon as they are healthy.
    pub replacements: Vec<Worker>,
    /// Workers that left their slot and are not gone yet.
    pub retiring: Vec<Worker>,
}

/// How the kernel shares out connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steering {
    /// `ebpf`: in strict rotation. `classic`: to a random worker each.
    pub kind: String,
    /// Why not by eBPF.
    pub why: Option<String>,
}

/// One worker, or the vacant slot of one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Worker {
    /// Its slot.
    pub slot: u32,
    /// Its port; `None` before lbd has picked one.
    pub port: Option<u16>,
    /// The program's process id; `None` while it does not run.
    pub pid: Option<i32>,
    /// The how-many-eth worker of its slot it is, from 1 on; 0 before the first was started.
    pub generation: u64,
    /// Where it is in its life.
    pub state: State,
    /// Since when it is in this state.
    pub since_seconds: f64,
    /// An operator took its slot out of rotation.
    pub drained: bool,
    /// Workers started in its slot in the place of one that ended, or could not be started, unasked.
    pub restarts: u64,
    /// How the last worker of its slot ended that nobody had asked to, or why it could not be started.
    pub last_exit: Option<String>,
    /// Its connections.
    pub connections: Connections,
    /// What passed through them.
    pub bytes: Bytes,
    /// The process id of its guard: the worker is all that is below.
    #[serde(skip)]
    pub guard: Option<i32>,
    /// The resident memory of the program and all that it started.
    pub resident_bytes: Option<u64>,
    /// The CPU time that they have used, user and system, those that have ended too.
    pub cpu_seconds: Option<f64>,
    /// What the last probe showed; `None` before the first.
    pub last_probe: Option<Probe>,
}

/// Where a worker is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The slot waits before it is filled again.
    Backoff,
    /// Not proven yet.
    Starting,
    /// In rotation.
    Healthy,
    /// Out of rotation since its probes failed.
    Unhealthy,
    /// Out of rotation: for good, and its connections are given time to end; or for as long as an
    /// operator wants.
    Draining,
    /// Asked to end, or ended and being cleared away.
    Stopping,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Backoff,
        Self::Starting,
        Self::Healthy,
        Self::Unhealthy,
        Self::Draining,
        Self::Stopping,
    ];
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Backoff => "backoff",
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
        })
    }
}

/// A worker's connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Connections {
    /// Held now; `None` where that can't be told.
    pub active: Option<u64>,
    /// Taken, ever; `None` where nobody counts them (`route = "direct"` by classic BPF).
    pub total: Option<u64>,
    /// Connects that were refused, failed or timed out.
    pub failed: u64,
    /// Waiting in the worker's own accept queue, with `route = "direct"` alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued: Option<u64>,
    /// Taken in the last second; `None` where nobody counted.
    pub per_second: Option<f64>,
}

/// What passed through a worker's connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// To clients; `None` with `route = "direct"`, where they don't pass through lbd.
    pub sent: Option<u64>,
    /// From clients; likewise.
    pub received: Option<u64>,
}

/// What a probe showed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// It passed.
    pub ok: bool,
    /// How long it took.
    pub seconds: f64,
    /// Why it failed.
    pub error: Option<String>,
}

impl Status {
    /// The services of which no worker is healthy.
    pub fn without_health(&self) -> impl Iterator<Item = &str> {
        let healthy = |service: &Service| service.workers.iter().any(|w| w.state == State::Healthy);
        self.services.iter().filter(move |s| !healthy(s)).map(|service| &*service.name)
    }

    /// All workers, those on their way in and out included.
    pub fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.services.iter().flat_map(Service::all)
    }
}

impl Service {
    /// Its workers, those on their way in and out included.
    pub fn all(&self) -> impl Iterator<Item = &Worker> {
        self.workers.iter().chain(&self.replacements).chain(&self.retiring)
    }

    /// The same, to be changed.
    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut Worker> {
        self.workers.iter_mut().chain(&mut self.replacements).chain(&mut self.retiring)
    }
}
