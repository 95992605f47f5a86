//! Shortages: what makes clients wait although no worker has failed. Each is logged once, when it
//! begins.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use nix::errno::Errno;
use tracing::warn;

/// How long a shortage must have been over before its return is logged.
const QUIET: Duration = Duration::from_secs(60);

/// What is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shortage {
    /// `max-connections`.
    Service,
    /// `limits.max-connections`, on every worker.
    Workers,
    /// Room in the workers' accept queues.
    Queues,
    /// Descriptors.
    Descriptors,
    /// Local ports to connect from.
    Ports,
    /// Memory of the kernel.
    Memory,
}

impl Shortage {
    const COUNT: usize = 6;

    /// The shortages for which accepted connections wait.
    pub(crate) const OF_WORKERS: [Self; 4] =
        [Self::Workers, Self::Queues, Self::Ports, Self::Memory];
    /// The shortages for which clients wait in the listener's accept queue.
    pub(crate) const OF_LISTENERS: [Self; 2] = [Self::Service, Self::Descriptors];

    /// What lbd itself is short of when a system call fails with `errno`; `None` if the error is
    /// about the worker that was to be reached (connect(2), socket(2)).
    pub(crate) fn of(errno: Errno) -> Option<Self> {
        match errno {
            Errno::EMFILE | Errno::ENFILE => Some(Self::Descriptors),
            Errno::ENOBUFS | Errno::ENOMEM | Errno::ENOSPC => Some(Self::Memory),
            Errno::EADDRNOTAVAIL => Some(Self::Ports),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Service => "max-connections",
            Self::Workers => "limits.max-connections",
            Self::Queues => "the workers' accept queues",
            Self::Descriptors => "descriptors",
            Self::Ports => "local ports",
            Self::Memory => "memory",
        }
    }

    fn hint(self) -> &'static str {
        match self {
            Self::Service => {
                "raise `max-connections`, or add workers so that each connection is shorter"
            }
            Self::Workers => "raise `limits.max-connections`, or the number of workers",
            Self::Queues => {
                "more workers, a longer accept queue in the program (its backlog), or a longer `hold-timeout`"
            }
            Self::Descriptors => {
                "raise the limit that lbd is started with (`ulimit -n`, in systemd `LimitNOFILE=`)"
            }
            Self::Ports => {
                "`socket = \"unix\"`, a wider net.ipv4.ip_local_port_range, or more workers"
            }
            Self::Memory => {
                "the kernel has no memory for more sockets: see net.ipv4.tcp_mem and dmesg"
            }
        }
    }
}

/// What one service is short of.
#[derive(Debug, Default)]
pub(crate) struct Shortages {
    /// One bit for each ongoing shortage.
    lasting: AtomicU8,
    /// When each shortage ended last.
    over: Mutex<[Option<Instant>; Shortage::COUNT]>,
}

impl Shortages {
    pub(crate) fn lasts(&self, what: Shortage) -> bool {
        self.lasting.load(Relaxed) & 1 << what as u8 != 0
    }

    /// Reports that clients of `service` wait because `what`, of which there is `limit`, is
    /// exhausted.
    pub(crate) fn begins(&self, what: Shortage, service: &str, limit: Option<usize>) {
        let bit = 1 << what as u8;
        if self.lasts(what) || self.lasting.fetch_or(bit, Relaxed) & bit != 0 {
            return;
        }
        let over = self.over.lock().unwrap_or_else(PoisonError::into_inner)[what as usize];
        if over.is_none_or(|over| over.elapsed() >= QUIET) {
            let (short_of, hint) = (what.name(), what.hint());
            warn!(service, short_of, limit, hint, "clients wait");
        }
    }

    /// Reports that no client waits for any of these any more.
    pub(crate) fn end(&self, which: &[Shortage]) {
        let bits = which.iter().fold(0, |bits, what| bits | 1 << *what as u8);
        // The plain load keeps the cache line shared where nothing is short.
        if self.lasting.load(Relaxed) & bits == 0 {
            return;
        }
        let ended = self.lasting.fetch_and(!bits, Relaxed) & bits;
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        for what in which.iter().filter(|what| ended & 1 << **what as u8 != 0) {
            over[*what as usize] = Some(Instant::now());
        }
    }
}
