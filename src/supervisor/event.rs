//! What the supervision core is told, and what it asks for.

use std::{
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use crate::config;

/// One incarnation of a worker: never used twice while lbd runs, so a late answer can't be taken
/// for one about the successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

/// A request that somebody waits for; echoed in [`Effect::Answer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// Which slots of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chosen {
    /// All that there are.
    All,
    /// One that somebody named: its new worker is in rotation, also if the slot was drained.
    One(u32),
    /// These.
    These(Vec<u32>),
}

impl Chosen {
    /// Whether this slot is among them.
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

/// What happened outside.
#[derive(Debug, Clone)]
pub enum Event {
    /// [`Effect::Spawn`] was carried out: its guard runs, and the worker will be on this port.
    Spawned {
        /// The incarnation.
        id: WorkerId,
        /// The port it is reached on; `None` on a unix socket.
        port: Option<u16>,
    },
    /// The program runs.
    Started {
        /// The incarnation.
        id: WorkerId,
        /// The process id of the program (not of its guard).
        pid: i32,
    },
    /// The program could not be started. [`Event::Gone`] follows.
    Failed {
        /// The incarnation.
        id: WorkerId,
        /// Why, as a sentence.
        reason: String,
        /// Nothing was started, since what it needs (its port) is taken for now: to look again costs
        /// next to nothing.
        cheap: bool,
    },
    /// The program ended. [`Event::Gone`] follows when what it left behind is gone too.
    Exited {
        /// The incarnation.
        id: WorkerId,
        /// How it ended.
        exit: Exit,
        /// The last lines that it wrote, oldest first, as far as they came through lbd: few, and
        /// harmless to show.
        said: Vec<String>,
    },
    /// No process of this incarnation is left. Always its last event.
    Gone {
        /// The incarnation.
        id: WorkerId,
    },
    /// A probe that was asked for ended.
    Probed {
        /// The incarnation.
        id: WorkerId,
        /// What it showed.
        outcome: ProbeOutcome,
    },
    /// How much memory it and all that it started have, as was just measured.
    Memory {
        /// The incarnation.
        id: WorkerId,
        /// Resident, in bytes.
        bytes: u64,
    },
    /// A retired worker holds no connection any more. Not to be said for a [`Effect::Retire`] that
    /// an [`Effect::Reinstate`] took back.
    Idle {
        /// The incarnation.
        id: WorkerId,
    },
    /// Nobody will ask this service for a worker any more: its listeners are closed and emptied.
    /// Not to be said for a [`Effect::Close`] that an [`Event::Apply`] with the service overtook.
    Closed {
        /// The service.
        service: Arc<str>,
    },
    /// A valid configuration whose listeners are bound takes effect.
    Apply {
        /// All services that shall be.
        services: Vec<config::Service>,
        /// Who waits for the rollouts that follow.
        ticket: Ticket,
    },
    /// Replace the workers of one service, or of all, one at a time.
    Restart {
        /// The service; all of them where `None`.
        service: Option<Arc<str>>,
        /// Which of its workers.
        slots: Chosen,
        /// Who waits for the end.
        ticket: Ticket,
    },
    /// An operator wants no connection to go to this slot, until [`Event::Resume`]. Its worker runs
    /// on.
    Drain {
        /// The service.
        service: Arc<str>,
        /// The slot's number.
        slot: u32,
    },
    /// Takes that back.
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

/// What a probe showed.
#[derive(Debug, Clone, PartialEq)]
pub struct ProbeOutcome {
    /// How long it took.
    pub took: Duration,
    /// What that says of the worker.
    pub verdict: Verdict,
}

impl ProbeOutcome {
    /// Why it did not pass; `None` where it did.
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

/// What a probe says of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It works.
    Passed,
    /// It does not, for this reason.
    Failed(String),
    /// A new worker never will, for this reason: no further probe is needed.
    Hopeless(String),
    /// Nothing: lbd itself lacks something (a descriptor, a port), or the worker has more to do than
    /// it can at the moment, but goes on.
    Unknown(String),
}

/// What the driver shall do, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Start a worker; answer with [`Event::Spawned`] or [`Event::Failed`] and [`Event::Gone`].
    Spawn(Spawn),
    /// Ask the worker to stop with this signal. Its end is told when its whole tree has ended, or at
    /// [`Effect::Kill`].
    Signal {
        /// The incarnation.
        id: WorkerId,
        /// The signal.
        signal: Signal,
        /// Who gets it.
        to: config::StopTo,
        /// How long until the worker is killed.
        timeout: Duration,
    },
    /// SIGKILL to everything that the worker ever started.
    Kill {
        /// The incarnation.
        id: WorkerId,
    },
    /// Probe it; answer with [`Event::Probed`], also where it is retired meanwhile.
    Probe(ProbeOrder),
    /// The set of workers in rotation, when one is due, or how they are chosen from, changed.
    Publish(Publication),
    /// Hand it no connection any more, and say [`Event::Idle`] as soon as it holds none; at once
    /// where that was asked for before and is so already.
    Retire {
        /// The incarnation.
        id: WorkerId,
    },
    /// It may be handed connections again.
    Reinstate {
        /// The incarnation.
        id: WorkerId,
    },
    /// The worker will not take what waits unread in its accept queue: hand that to others of its
    /// service, and what still comes, until [`Effect::KeepQueue`] or its end.
    DrainQueue {
        /// The incarnation.
        id: WorkerId,
        /// Why it will not.
        why: Untaken,
    },
    /// It takes itself again what waits in its accept queue.
    KeepQueue {
        /// The incarnation.
        id: WorkerId,
    },
    /// No worker has a socket on this port any more whose sockets are inherited, nor will one take over
    /// what is left there: close it. Who waits there is another worker's client.
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
    /// The service is gone for good: nothing of it is left to ask for.
    Forget {
        /// The service.
        service: Arc<str>,
    },
    /// A request came to its end.
    Answer {
        /// Which one.
        ticket: Ticket,
        /// What is to be known about its success, a sentence each; or why it failed: a sentence,
        /// and perhaps lines that the worker wrote.
        result: Result<Vec<String>, String>,
    },
    /// The service runs on these settings now, and not on those last applied: a rollout failed.
    Restored(Box<config::Service>),
    /// Something a user wants to read in the log.
    Note(Note),
    /// Every worker is gone: the daemon may end.
    Finished,
}

/// Why a worker does not take what waits in its accept queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Untaken {
    /// Its probes fail.
    Hangs,
    /// It was asked to end. What lbd sent to it before, it may still take; what the kernel gives it, it
    /// may not.
    Stops,
}

/// A worker to be started.
#[derive(Debug, Clone, PartialEq)]
pub struct Spawn {
    /// The new incarnation.
    pub id: WorkerId,
    /// Its service.
    pub service: Arc<str>,
    /// Its slot.
    pub slot: u32,
    /// The port it shall be on; the driver picks a free one where `None`.
    pub port: Option<u16>,
    /// The port of its slot, where it stands in on another one for as long as that is not to be had.
    pub stands_in_for: Option<u16>,
    /// What to start.
    pub spec: Arc<config::WorkerSpec>,
}

/// A probe to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeOrder {
    /// The incarnation.
    pub id: WorkerId,
    /// What it does.
    pub what: config::Probe,
    /// How long it may take.
    pub timeout: Duration,
    /// Whose listening socket is believed on the worker's port.
    pub owner: config::Owner,
}

/// Who can be handed the connections of a service from now on, and how one is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Publication {
    /// The service.
    pub service: Arc<str>,
    /// Who can be handed a connection.
    pub rotation: Rotation,
    /// How one of them is chosen, and how connections are treated.
    pub routing: Arc<config::Routing>,
}

/// Who can be handed a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation {
    /// The healthy workers, in the order of the configuration.
    pub workers: Vec<WorkerId>,
    /// Whether to wait where there are none.
    pub coming: Coming,
}

/// When a worker is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Coming {
    /// One is being started.
    Now,
    /// The first is due to be started then.
    At(Instant),
    /// None.
    Never,
}

/// A fact for the log, about one worker or one service.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// The service.
    pub service: Arc<str>,
    /// The worker, where it is about one.
    pub worker: Option<NoteWorker>,
    /// What happened.
    pub fact: Fact,
}

/// Which worker a [`Note`] is about.
#[derive(Debug, Clone, PartialEq)]
pub struct NoteWorker {
    /// The incarnation; `None` where it is about a slot that nobody is in.
    pub id: Option<WorkerId>,
    /// What it was started with, or would be.
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
    /// It is in rotation; the time since it was started, for a new one.
    Healthy {
        /// From the start of the program; `None` where it was unhealthy in between.
        after: Option<Duration>,
    },
    /// It is out of rotation because probes failed.
    Unhealthy {
        /// What the last probe showed.
        error: String,
    },
    /// It runs for some time and is not healthy yet. Said once.
    NotYetHealthy {
        /// What the last probe showed.
        error: String,
        /// How long it has been running.
        after: Duration,
    },
    /// The program ended, or could not be started, unasked.
    Down {
        /// How.
        how: Down,
        /// When the slot is filled again; `None` where another worker is in it, or where the
        /// service is on its way out.
        restart_in: Option<Duration>,
        /// How often in a row it failed.
        failures: u32,
        /// It had been healthy before.
        was_healthy: bool,
    },
    /// It ended after it was asked to.
    Stopped {
        /// How.
        how: Down,
    },
    /// Out of rotation; its connections are given time to end.
    Draining {
        /// Why.
        why: RetireReason,
    },
    /// An operator took its slot out of rotation; it runs on.
    Drained,
    /// A worker that was draining is back in rotation.
    Resumed,
    /// Its time to stop is over: it is killed.
    Killed {
        /// Why.
        why: &'static str,
    },
    /// It is past a limit and is being replaced; it serves until its successor is proven, unless it
    /// is to be stopped first.
    Recycling {
        /// Which limit.
        worn: LimitExceeded,
    },
    /// The successor of a worker that was to be replaced failed: the worker stays for now.
    NotRecycled {
        /// Why.
        reason: String,
        /// When the next attempt is made.
        retry_in: Duration,
    },
    /// A rolling replacement begins.
    RolloutBegun {
        /// How many workers are replaced.
        workers: usize,
    },
    /// A rolling replacement is complete.
    RolloutDone {
        /// What is not as it was to be: a sentence each.
        skipped: Vec<String>,
    },
    /// A rolling replacement failed; the old settings stay in force.
    RolloutFailed {
        /// Why.
        reason: String,
        /// What the worker that failed wrote last.
        said: Vec<String>,
    },
}

/// Why a worker is replaced at nobody's order: the limit that it is past, or what is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitExceeded {
    /// It has more memory than it may have.
    Memory {
        /// How much it has, in bytes.
        bytes: u64,
        /// How much it may have.
        limit: u64,
    },
    /// It has run for long enough.
    Age {
        /// For how long.
        age: Duration,
        /// For how long it may.
        limit: Duration,
    },
    /// Its probes have failed for so long.
    Unhealthy {
        /// For how long.
        time: Duration,
    },
    /// It stands in for one on the slot's own port, which may be to be had again.
    StandIn,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It ended itself, with this status.
    Code(i32),
    /// The signal of this number ended it.
    Signal(i32),
    /// Its guard was killed, and the program by the kernel right after it.
    GuardKilled,
    /// Nobody told.
    Unknown,
}

impl Exit {
    /// What the metrics count it as.
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

/// How a worker ended, or why it was given up. Shown as a phrase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Down {
    /// The program ended.
    Exited(Exit),
    /// What it needs is taken for now: nothing was started. Why, as a sentence.
    NotTried(String),
    /// The program could not be started. Why, as a sentence.
    NotStarted(String),
    /// It was not healthy for too long. Why, as a phrase.
    NotHealthy(String),
}

impl Down {
    /// What went wrong.
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

/// What went wrong with a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DownKind {
    /// What it needs is taken for now: nothing was started.
    NotTried,
    /// The program could not be started.
    NotStarted,
    /// The program ended.
    Exited,
    /// It runs, but was not healthy for too long: it is stopped.
    NotHealthy,
}

/// Why a worker is no more, as the metrics count it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCause {
    /// The program ended by itself, with whatever status.
    Exit,
    /// A signal ended it that lbd did not send.
    Signal,
    /// It could not be started.
    NotStarted,
    /// lbd ended it: its probes had failed for too long.
    Unhealthy,
    /// lbd ended it: it was replaced or removed.
    Stopped,
}

impl ExitCause {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Exit, Self::Signal, Self::NotStarted, Self::Unhealthy, Self::Stopped];

    /// What the metrics call it.
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
    /// Another one takes its place.
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
