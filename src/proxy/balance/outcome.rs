//! Outcomes: of a connection as a whole, and of the attempt to reach one worker.

use std::fmt;

use nix::errno::Errno;

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Both sides ended their streams.
    Closed,
    /// The worker ended the connection without sending anything, although the client had sent
    /// something and had not ended.
    NoAnswer,
    ClientReset,
    WorkerReset,
    /// The client left before it had a worker.
    ClientGone,
    /// The client left at once and never sent anything, as a port check does.
    NothingSaid,
    /// The client did not send the PROXY header that is required.
    NoHeader,
    Idle,
    /// No worker became healthy, or had room, in time.
    HoldTimeout,
    /// There was no worker, and none was being started.
    NoWorker,
    /// lbd stopped.
    Stopped,
    /// A fault in lbd.
    Failed,
}

impl Outcome {
    /// The outcomes of a connection that a worker has taken, except [`Self::Closed`].
    pub(crate) const OF_TAKEN: [Self; 6] = [
        Self::ClientReset,
        Self::WorkerReset,
        Self::NoAnswer,
        Self::Idle,
        Self::Stopped,
        Self::Failed,
    ];
    /// The outcomes of a connection that no worker has taken.
    pub(crate) const OF_OTHERS: [Self; 6] = [
        Self::ClientGone,
        Self::HoldTimeout,
        Self::NoWorker,
        Self::NoHeader,
        Self::Stopped,
        Self::Failed,
    ];

    /// The name in the access log and the metrics.
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

    /// Whether a plain close is right, instead of a reset: both sides have ended their streams, or
    /// no peer is left to mistake the close for a complete stream.
    pub(crate) fn is_orderly(self) -> bool {
        matches!(self, Self::Closed | Self::NoAnswer | Self::NothingSaid)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a connect to a worker failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectError {
    Refused,
    /// The connect was not answered in time, as a rule because the accept queue is full.
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
