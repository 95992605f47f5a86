//! The input and output of the supervision core: events, effects, and the facts it logs.

use std::{
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use crate::config;

/// Identifies one incarnation of a worker. An id is never reused while lbd runs, so a late answer
/// about a worker can't be mistaken for one about its successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

/// Identifies a request that waits for an answer; echoed in [`Effect::Answer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// A selection of a service's slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chosen {
    /// All slots.
    All,
    /// The one slot that an operator named: its new worker is in rotation, even if the slot was
    /// drained.
    One(u32),
    /// The slots with these numbers.
    These(Vec<u32>),
}

impl Chosen {
    /// Whether this slot is selected.
    #[must_use]
    pub fn has(&self, slot: u32) -> bool {
        match self {
            Self::All => true,
            Self::One(one) => *one == slot,
            Self::These(these) => these.contains(&slot),
        }
    }
}

impl From<Option<u32>> for Chosen {
    fn from(slot: Option<u32>) -> Self {
        slot.map_or(Self::All, Self::One)
    }
}

/// What happened, as the driver reports it.
#[derive(Debug, Clone)]
pub enum Event {
    /// [`Effect::Spawn`] was carried out: the worker's guard process runs, and its port is known.
    Spawned {
        /// The worker.
        id: WorkerId,
        /// The port that the worker is reached on; `None` with a unix socket.
        port: Option<u16>,
    },
    /// The worker's program runs.
    Started {
        /// The worker.
        id: WorkerId,
        /// The process id of the program (not of its guard).
        pid: i32,
    },
    /// The program could not be started. [`Event::Gone`] follows.
    Failed {
        /// The worker.
        id: WorkerId,
        /// The reason, as a sentence.
        reason: String,
        /// Nothing was started, because the port is taken at the moment: another attempt costs next
        /// to nothing.
        cheap: bool,
    },
    /// The program ended. [`Event::Gone`] follows once every process that it started is gone too.
    Exited {
        /// The worker.
        id: WorkerId,
        /// How it ended.
        exit: Exit,
        /// The last lines of its output, oldest first, as far as the output passed through lbd.
        /// They are few, and safe to show.
        said: Vec<String>,
    },
    /// No process of this worker is left. Always the worker's last event.
    Gone {
        /// The worker.
        id: WorkerId,
    },
    /// A probe that [`Effect::Probe`] asked for has ended.
    Probed {
        /// The worker.
        id: WorkerId,
        /// The probe's result.
        outcome: ProbeOutcome,
    },
    /// The memory of the worker and of all processes that it started, as just measured.
    Memory {
        /// The worker.
        id: WorkerId,
        /// Resident memory, in bytes.
        bytes: u64,
    },
    /// A retired worker holds no connection any more. Not to be sent for an [`Effect::Retire`] that
    /// an [`Effect::Reinstate`] has since undone.
    Idle {
        /// The worker.
        id: WorkerId,
    },
    /// No client will need a worker of this service any more: its listeners are closed, and their
    /// accept queues are empty. Not to be sent for an [`Effect::Close`] that a later
    /// [`Event::Apply`] with the service has overtaken.
    Closed {
        /// The service.
        service: Arc<str>,
    },
    /// Apply a valid configuration, whose listeners are bound already.
    Apply {
        /// All services of the configuration. Services that are not in it are removed.
        services: Vec<config::Service>,
        /// The request that is answered when the rollouts that follow have ended.
        ticket: Ticket,
    },
    /// Replace the workers of one service, or of all, one at a time.
    Restart {
        /// The service; `None` for all services.
        service: Option<Arc<str>>,
        /// Which slots' workers.
        slots: Chosen,
        /// The request that is answered when the restart has ended.
        ticket: Ticket,
    },
    /// An operator drains a slot: no connection goes to it until [`Event::Resume`]. Its worker
    /// keeps running.
    Drain {
        /// The service.
        service: Arc<str>,
        /// The slot's number.
        slot: u32,
    },
    /// Undoes [`Event::Drain`].
    Resume {
        /// The service.
        service: Arc<str>,
        /// The slot's number.
        slot: u32,
    },
    /// Graceful stop.
    Stop,
    /// Stop at once.
    Abort,
}

/// A probe's result.
#[derive(Debug, Clone, PartialEq)]
pub struct ProbeOutcome {
    /// How long the probe took.
    pub took: Duration,
    /// What the probe says about the worker.
    pub verdict: Verdict,
}

impl ProbeOutcome {
    /// Why the probe did not pass; `None` if it did.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        match &self.verdict {
            Verdict::Passed => None,
            Verdict::Failed(error) | Verdict::Hopeless(error) | Verdict::Unknown(error) => {
                Some(error)
            }
        }
    }
}

/// What a probe says about a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The worker answered as it should.
    Passed,
    /// The probe failed, for this reason.
    Failed(String),
    /// The probe failed, and a new worker will never pass it, for this reason: no further probe is
    /// needed.
    Hopeless(String),
    /// No verdict, for this reason: lbd itself lacks a resource (a descriptor, a port), or the
    /// worker is overloaded at the moment but makes progress. Counts neither as passed nor as
    /// failed.
    Unknown(String),
}

/// What the driver has to do. Effects are carried out in the order in which they are returned.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Start a worker; answer with [`Event::Spawned`] or [`Event::Failed`] and [`Event::Gone`].
    Spawn(Spawn),
    /// Send the worker the stop signal. Its end is reported when all processes that it started have
    /// ended, or after [`Effect::Kill`].
    Signal {
        /// The worker.
        id: WorkerId,
        /// The signal.
        signal: Signal,
        /// Which of its processes get the signal.
        to: config::StopTo,
        /// How long the worker has before it is killed.
        timeout: Duration,
    },
    /// Send SIGKILL to every process that the worker ever started.
    Kill {
        /// The worker.
        id: WorkerId,
    },
    /// Probe a worker; answer with [`Event::Probed`], even if the worker is retired meanwhile.
    Probe(ProbeOrder),
    /// The rotation, the time when its next worker is due, or the routing settings changed.
    Publish(Publication),
    /// Hand the worker no new connection, and send [`Event::Idle`] as soon as it holds none: at
    /// once if it holds none already, also when this was asked for before.
    Retire {
        /// The worker.
        id: WorkerId,
    },
    /// Undo [`Effect::Retire`]: the worker may be handed connections again.
    Reinstate {
        /// The worker.
        id: WorkerId,
    },
    /// The worker will not accept the connections that wait in its accept queue: hand them, and
    /// those that still arrive, to other workers of its service, until [`Effect::KeepQueue`] or the
    /// worker's end.
    DrainQueue {
        /// The worker.
        id: WorkerId,
        /// Why the worker does not accept them.
        why: Untaken,
    },
    /// Undo [`Effect::DrainQueue`]: the worker accepts its connections itself again.
    KeepQueue {
        /// The worker.
        id: WorkerId,
    },
    /// No worker inherits this port's sockets any more, and none will: close the port. Connections
    /// that still wait in its accept queues go to other workers.
    ReleasePort {
        /// The address and port.
        address: SocketAddr,
    },
    /// Stop accepting for this service, empty its accept queues, and answer with
    /// [`Event::Closed`].
    Close {
        /// The service.
        service: Arc<str>,
    },
    /// The service is gone, with all its workers: forget it.
    Forget {
        /// The service.
        service: Arc<str>,
    },
    /// Answer a request.
    Answer {
        /// The request.
        ticket: Ticket,
        /// On success, remarks, each a sentence. On failure the reason: a sentence, and perhaps
        /// lines of the worker's output.
        result: Result<Vec<String>, String>,
    },
    /// A rollout failed: the service runs on these settings again, not on those that were applied
    /// last.
    Restored(Box<config::Service>),
    /// Write a fact to the log.
    Note(Note),
    /// Every service is gone after a stop: the daemon may exit.
    Finished,
}

/// Why a worker does not accept the connections in its accept queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Untaken {
    /// It hangs: its probes fail.
    Hangs,
    /// It was asked to end. It may still accept connections that lbd made to it before; those that
    /// the kernel gave it (`route = "direct"`) must go to other workers.
    Stops,
}

/// A worker to be started.
#[derive(Debug, Clone, PartialEq)]
pub struct Spawn {
    /// The id of the new worker.
    pub id: WorkerId,
    /// Its service.
    pub service: Arc<str>,
    /// Its slot.
    pub slot: u32,
    /// The port to start it on; `None` lets the driver pick a free one.
    pub port: Option<u16>,
    /// The slot's own port, if the worker is a stand-in: it runs on another port while the slot's
    /// port is taken.
    pub stands_in_for: Option<u16>,
    /// What to start.
    pub spec: Arc<config::WorkerSpec>,
}

/// A probe to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeOrder {
    /// The worker.
    pub id: WorkerId,
    /// What kind of probe.
    pub what: config::Probe,
    /// The time limit.
    pub timeout: Duration,
    /// Which process's listening socket is accepted as the worker's own.
    pub owner: config::Owner,
}

/// The workers in rotation from now on, and how connections are distributed among them.
#[derive(Debug, Clone, PartialEq)]
pub struct Publication {
    /// The service.
    pub service: Arc<str>,
    /// The workers in rotation.
    pub rotation: Rotation,
    /// The balancing algorithm and the connection settings.
    pub routing: Arc<config::Routing>,
}

/// The workers of a service that can be handed a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation {
    /// The healthy workers, in the order of the configuration.
    pub workers: Vec<WorkerId>,
    /// When another worker is expected, so that clients can wait for it if `workers` is empty.
    pub coming: Coming,
}

/// When a service's next worker is expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Coming {
    /// A worker is being started.
    Now,
    /// The next start is due at this time.
    At(Instant),
    /// No start is planned.
    Never,
}

/// A fact for the log, about a worker or a service.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// The service.
    pub service: Arc<str>,
    /// The worker; `None` if the note is about the service.
    pub worker: Option<NoteWorker>,
    /// What happened.
    pub fact: Fact,
}

/// Which worker a [`Note`] is about.
#[derive(Debug, Clone, PartialEq)]
pub struct NoteWorker {
    /// The worker; `None` if the note is about a vacant slot.
    pub id: Option<WorkerId>,
    /// The settings that the worker runs with, or that the slot's next worker would get.
    pub spec: Arc<config::WorkerSpec>,
    /// Its slot.
    pub slot: u32,
    /// Its port, once it has one.
    pub port: Option<u16>,
    /// Its process id, while it has one.
    pub pid: Option<i32>,
}

/// What happened to a worker or a service.
#[derive(Debug, Clone, PartialEq)]
pub enum Fact {
    /// The program runs.
    Started,
    /// The worker passed its probes and is healthy.
    Healthy {
        /// How long after the start of the program, for a new worker; `None` if it was unhealthy in
        /// between.
        after: Option<Duration>,
    },
    /// The worker is out of rotation because its probes failed.
    Unhealthy {
        /// The error of the last probe.
        error: String,
    },
    /// The worker has been running for some time and is not healthy yet. Reported once.
    NotYetHealthy {
        /// The error of the last probe.
        error: String,
        /// How long it has been running.
        after: Duration,
    },
    /// The program ended without lbd asking it to, or could not be started, or its probes failed
    /// for too long.
    Down {
        /// What went wrong.
        how: Down,
        /// When the slot's next worker is started; `None` if another worker holds the slot, or if
        /// the service is being removed or stopped.
        restart_in: Option<Duration>,
        /// How many times in a row the slot failed.
        failures: u32,
        /// Whether the worker had ever been healthy.
        was_healthy: bool,
    },
    /// The worker ended after lbd asked it to.
    Stopped {
        /// How it ended.
        how: Down,
    },
    /// The worker is out of rotation, and its connections have time to end.
    Draining {
        /// Why.
        why: RetireReason,
    },
    /// An operator drained the worker's slot; the worker keeps running.
    Drained,
    /// A worker that was draining is back in rotation.
    Resumed,
    /// The worker did not end within its stop timeout, and is killed.
    Killed {
        /// Why.
        why: &'static str,
    },
    /// The worker exceeds a limit and is being replaced. It serves until its successor is proven,
    /// unless `rollout.order` has it stopped first.
    Recycling {
        /// Which limit.
        worn: LimitExceeded,
    },
    /// The successor of a worker that exceeds a limit failed: the worker stays for now.
    NotRecycled {
        /// Why.
        reason: String,
        /// When the next attempt is made.
        retry_in: Duration,
    },
    /// A rollout begins.
    RolloutBegun {
        /// How many workers are replaced.
        workers: usize,
    },
    /// A rollout is complete.
    RolloutDone {
        /// What the rollout skipped, each a sentence.
        skipped: Vec<String>,
    },
    /// A rollout failed; the old settings stay in force.
    RolloutFailed {
        /// Why.
        reason: String,
        /// The last output of the worker that failed.
        said: Vec<String>,
    },
}

/// Why lbd replaces a worker by itself: the limit that the worker exceeds, or what is wrong with
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitExceeded {
    /// It uses more memory than `limits.memory` allows.
    Memory {
        /// Its memory, in bytes.
        bytes: u64,
        /// The limit, in bytes.
        limit: u64,
    },
    /// It has run for longer than `limits.max-age` allows.
    Age {
        /// Its age.
        age: Duration,
        /// The limit.
        limit: Duration,
    },
    /// Its probes have failed for too long.
    Unhealthy {
        /// For how long.
        time: Duration,
    },
    /// It is a stand-in on another port, and the slot's own port may be free again.
    StandIn,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this status.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
    /// Its guard was killed; the kernel killed the program right after.
    GuardKilled,
    /// The cause is not known.
    Unknown,
}

impl Exit {
    /// The cause under which the metrics count this exit.
    pub(super) fn cause(self) -> ExitCause {
        match self {
            Self::Code(_) => ExitCause::Exit,
            Self::Signal(_) | Self::GuardKilled | Self::Unknown => ExitCause::Signal,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(number) => match Signal::try_from(number) {
                Ok(signal) => write!(f, "killed by {signal}"),
                Err(_) => write!(f, "killed by signal {number}"),
            },
            Self::GuardKilled => f.write_str("its guard was killed"),
            Self::Unknown => f.write_str("lost"),
        }
    }
}

/// How a worker ended, or why it was given up. Displayed as a phrase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Down {
    /// The program ended.
    Exited(Exit),
    /// Nothing was started, because the port is taken at the moment. Why, as a sentence.
    NotTried(String),
    /// The program could not be started. Why, as a sentence.
    NotStarted(String),
    /// It was unhealthy for too long. Why, as a phrase.
    NotHealthy(String),
}

impl Down {
    /// The kind of failure, without its reason.
    #[must_use]
    pub fn kind(&self) -> DownKind {
        match self {
            Self::Exited(_) => DownKind::Exited,
            Self::NotTried(_) => DownKind::NotTried,
            Self::NotStarted(_) => DownKind::NotStarted,
            Self::NotHealthy(_) => DownKind::NotHealthy,
        }
    }
}

impl fmt::Display for Down {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(exit) => exit.fmt(f),
            Self::NotTried(why) | Self::NotStarted(why) | Self::NotHealthy(why) => f.write_str(why),
        }
    }
}

/// The kind of a worker's failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DownKind {
    /// Nothing was started, because the port is taken at the moment.
    NotTried,
    /// The program could not be started.
    NotStarted,
    /// The program ended.
    Exited,
    /// It runs, but was unhealthy for too long: lbd stops it.
    NotHealthy,
}

/// Why a worker ended, as the metrics count it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCause {
    /// The program exited by itself, with any status.
    Exit,
    /// A signal that lbd did not send killed it.
    Signal,
    /// It could not be started.
    NotStarted,
    /// lbd ended it: its probes had failed for too long.
    Unhealthy,
    /// lbd ended it: it was replaced or removed.
    Stopped,
}

impl ExitCause {
    /// All causes, in the order in which [`Slot::exits`](super::Slot::exits) counts them.
    pub const ALL: [Self; 5] =
        [Self::Exit, Self::Signal, Self::NotStarted, Self::Unhealthy, Self::Stopped];

    /// The label value in the metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Exit => "exit",
            Self::Signal => "signal",
            Self::NotStarted => "not-started",
            Self::Unhealthy => "unhealthy",
            Self::Stopped => "stopped",
        }
    }
}

/// Why a worker is taken out of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetireReason {
    /// A reload removed it.
    Removed,
    /// Another worker replaces it.
    Replaced,
    /// Its probes failed for too long.
    Unhealthy,
    /// The daemon stops.
    Stopping,
}

impl fmt::Display for RetireReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Removed => "removed",
            Self::Replaced => "replaced",
            Self::Unhealthy => "unhealthy",
            Self::Stopping => "stopping",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_reads_as_a_person_would_say_it() {
        assert_eq!(Exit::Code(3).to_string(), "exit status 3");
        assert_eq!(Exit::Signal(9).to_string(), "killed by SIGKILL");
        assert_eq!(Exit::Signal(40).to_string(), "killed by signal 40");
        assert_eq!(Exit::GuardKilled.to_string(), "its guard was killed");
        assert_eq!(Exit::Unknown.to_string(), "lost");
    }
}
