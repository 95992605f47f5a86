//! How it went: a connection as a whole, and the attempt to reach one worker.

use std::fmt;

use nix::errno::Errno;

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Both sides ended their streams.
    Closed,
    /// The worker ended it without a word, though the client had said something and had not ended.
    NoAnswer,
    ClientReset,
    WorkerReset,
    /// The client left before it had a worker.
    ClientGone,
    /// The client left at once, and never said anything: somebody looked whether lbd is there.
    NothingSaid,
    /// It did not begin with the PROXY header that it has to begin with.
    NoHeader,
    Idle,
    /// No worker became healthy, or had room, in time.
    HoldTimeout,
    /// There was none, and none was to come.
    NoWorker,
    /// lbd stopped.
    Stopped,
    /// A fault in lbd.
    Failed,
}

impl Outcome {
    /// Those of a connection that a worker has taken, but [`Self::Closed`].
    pub(crate) const OF_TAKEN: [Self; 6] = [
        Self::ClientReset,
        Self::WorkerReset,
        Self::NoAnswer,
        Self::Idle,
        Self::Stopped,
        Self::Failed,
    ];
    /// Those of one that none has taken.
    pub(crate) const OF_OTHERS: [Self; 6] = [
        Self::ClientGone,
        Self::HoldTimeout,
        Self::NoWorker,
        Self::NoHeader,
        Self::Stopped,
        Self::Failed,
    ];

    /// What the access log and the metrics call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::NoAnswer => "no-answer",
            Self::ClientReset => "client-reset",
            Self::WorkerReset => "worker-reset",
            Self::ClientGone | Self::NothingSaid => "client-gone",
            Self::NoHeader => "no-header",
            Self::Idle => "idle",
            Self::HoldTimeout => "hold-timeout",
            Self::NoWorker => "no-worker",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }

    /// Whether both sides have ended their streams, or nobody is there to be told anything else, so
    /// that a close shows no end that there was not.
    pub(crate) fn is_orderly(self) -> bool {
        matches!(self, Self::Closed | Self::NoAnswer | Self::NothingSaid)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a worker did not take a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectError {
    Refused,
    /// It did not answer in time: as a rule, its accept queue is full.
    Timeout,
    /// Anything else, such as that there is no route to its host.
    Error,
}

impl ConnectError {
    pub(crate) const ALL: [Self; 3] = [Self::Refused, Self::Timeout, Self::Error];

    pub(crate) fn of(errno: Errno) -> Self {
        match errno {
            Errno::ECONNREFUSED => Self::Refused,
            Errno::ETIMEDOUT => Self::Timeout,
            _ => Self::Error,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Error => "error",
        }
    }
}
