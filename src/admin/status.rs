//! The format of `/status`, written by the server and read by the client.
//!
//! Times are RFC 3339 in UTC with milliseconds. Durations are in seconds with milliseconds (a
//! probe's with microseconds).

use std::fmt;

use serde::{Deserialize, Serialize};

/// The status of a running daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// lbd's version.
    pub version: String,
    /// lbd's own process id.
    pub pid: u32,
    /// The time since lbd started.
    pub uptime_seconds: f64,
    /// Where its configuration comes from.
    pub config: Config,
    /// The services, in the order of the configuration. A removed service is listed until it is
    /// gone.
    pub services: Vec<Service>,
}

/// Where the configuration comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The absolute path of the file; `None` for `lbd run`.
    pub path: Option<String>,
    /// When the configuration in force was read.
    pub loaded_at: String,
    /// How the last reload went; before the first reload, how the start went.
    pub last_reload: Reload,
}

/// How a reload went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// The file was accepted, and no replacement of a worker has failed.
    pub ok: bool,
    /// When it was requested.
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
    /// How the kernel distributes connections; only with `route = "direct"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steering: Option<Steering>,
    /// How a worker is chosen.
    pub balance: String,
    /// One per slot, in order.
    pub workers: Vec<Worker>,
    /// New workers that will take over from one in `workers` once they are healthy.
    pub replacements: Vec<Worker>,
    /// Workers that have left their slot but have not ended yet.
    pub retiring: Vec<Worker>,
}

/// How the kernel distributes connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steering {
    /// `ebpf`: in strict rotation. `classic`: each to a random worker.
    pub kind: String,
    /// Why eBPF is not used.
    pub why: Option<String>,
}

/// A worker, or a vacant slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Worker {
    /// Its slot.
    pub slot: u32,
    /// Its port; `None` until lbd has picked one.
    pub port: Option<u16>,
    /// The program's process id; `None` while the program does not run.
    pub pid: Option<i32>,
    /// A counter of the workers started in this slot: 1 for the first; 0 if none was started yet.
    pub generation: u64,
    /// The worker's state.
    pub state: State,
    /// How long it has been in this state.
    pub since_seconds: f64,
    /// An operator took its slot out of rotation.
    pub drained: bool,
    /// Workers started in this slot to replace one that ended unexpectedly or could not be started.
    pub restarts: u64,
    /// How the slot's last worker that ended unexpectedly ended, or why it could not be started.
    pub last_exit: Option<String>,
    /// Its connections.
    pub connections: Connections,
    /// The bytes that passed through its connections.
    pub bytes: Bytes,
    /// The pid of its guard. The worker is every process below the guard.
    #[serde(skip)]
    pub guard: Option<i32>,
    /// The resident memory of the program and everything that it started.
    pub resident_bytes: Option<u64>,
    /// Their CPU time, user and system, including that of ended processes.
    pub cpu_seconds: Option<f64>,
    /// The result of the last probe; `None` before the first.
    pub last_probe: Option<Probe>,
}

/// The state of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The slot is vacant until the next start.
    Backoff,
    /// Not yet proven by probes.
    Starting,
    /// In rotation.
    Healthy,
    /// Out of rotation because its probes failed.
    Unhealthy,
    /// Out of rotation: for good, while its connections are given time to end; or because an
    /// operator drained it.
    Draining,
    /// Asked to stop, or ended and being cleaned up.
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
    /// Held now; `None` if unknown.
    pub active: Option<u64>,
    /// Accepted in total; `None` if not counted (`route = "direct"` by classic BPF).
    pub total: Option<u64>,
    /// Connects that were refused, failed or timed out.
    pub failed: u64,
    /// Waiting in the worker's own accept queue; only with `route = "direct"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued: Option<u64>,
    /// Accepted in the last second; `None` if not counted.
    pub per_second: Option<f64>,
}

/// The bytes that passed through a worker's connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// To clients; `None` with `route = "direct"`, where they don't pass through lbd.
    pub sent: Option<u64>,
    /// From clients; likewise.
    pub received: Option<u64>,
}

/// The result of a probe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// Whether the probe passed.
    pub ok: bool,
    /// How long it took.
    pub seconds: f64,
    /// Why it failed.
    pub error: Option<String>,
}

impl Status {
    /// The services that have no healthy worker.
    pub fn without_health(&self) -> impl Iterator<Item = &str> {
        let healthy = |service: &Service| service.workers.iter().any(|w| w.state == State::Healthy);
        self.services.iter().filter(move |s| !healthy(s)).map(|service| &*service.name)
    }

    /// All workers, including those being started or stopped.
    pub fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.services.iter().flat_map(Service::all)
    }
}

impl Service {
    /// The service's workers, including those being started or stopped.
    pub fn all(&self) -> impl Iterator<Item = &Worker> {
        self.workers.iter().chain(&self.replacements).chain(&self.retiring)
    }

    /// Like [`Self::all`], but mutable.
    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut Worker> {
        self.workers.iter_mut().chain(&mut self.replacements).chain(&mut self.retiring)
    }
}
