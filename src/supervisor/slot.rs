//! One place for a worker in a service: which worker fills it, which one is to take over, which of
//! them serves, and when the next one is started.

use std::{sync::Arc, time::Instant};

use super::{
    backoff::Backoff,
    event::{Down, ExitCause, NoteWorker, WorkerId},
    recycle::Recycling,
    worker::Worker,
};
use crate::config::{SocketMode, WorkerSpec};

/// One place for a worker.
#[derive(Debug, Clone)]
pub struct Slot {
    /// What `LBD_SLOT`, logs and metrics call it. It stays with a port for as long as the port
    /// stays in the configuration, wherever in the list that is.
    pub number: u32,
    /// The port that the configuration gives it; `None` where lbd picks one.
    pub fixed_port: Option<u16>,
    /// What the next worker here is started with.
    pub spec: Arc<WorkerSpec>,
    /// An operator wants it out of rotation: whoever fills it gets no connection. Kept for as long
    /// as the slot is, whatever becomes of its workers.
    pub drained: bool,
    /// A reload takes it away, once what takes its place is proven; until then its worker serves.
    pub(super) leaving: bool,
    /// A reload made it, in the place of others that stay until its first worker is proven.
    pub(super) unproven: bool,
    /// The worker that fills it.
    pub current: Option<Worker>,
    /// The one that replaces `current` once it is proven, and serves for it before where it can't.
    pub next: Option<Worker>,
    /// When a vacant slot is filled again.
    pub start_at: Instant,
    /// How often it failed in a row.
    pub backoff: Backoff,
    /// When its worker may be replaced for being past a limit.
    pub recycling: Recycling,
    /// Workers started here so far.
    pub generation: u64,
    /// A process was started here: what is started next comes in the place of another.
    pub begun: bool,
    /// Workers started here in the place of one that ended, or could not be started, unasked. Where
    /// nothing was started, as the port was taken, that is none.
    pub restarts: u64,
    /// Workers of this slot that are no more, by [`ExitCause`], in the order of [`ExitCause::ALL`].
    pub exits: [u64; ExitCause::ALL.len()],
    /// How and when the last worker here ended, or why it could not be started; that of the last one
    /// that nobody had asked to, if there was one. The end of a replacement that failed, while the worker
    /// that it was to replace stays, is none of these.
    pub last_exit: Option<LastExit>,
    /// The port of the last worker that filled it.
    pub last_port: Option<u16>,
}

/// How a worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastExit {
    /// How.
    pub how: Down,
    /// When.
    pub at: Instant,
    /// lbd wanted it to end: it was replaced or removed, or lbd stops.
    pub asked: bool,
}

impl Slot {
    /// A vacant slot that is to be filled at once.
    #[must_use]
    pub fn new(number: u32, fixed_port: Option<u16>, spec: Arc<WorkerSpec>, now: Instant) -> Self {
        Self {
            number,
            fixed_port,
            spec,
            drained: false,
            leaving: false,
            unproven: false,
            current: None,
            next: None,
            start_at: now,
            backoff: Backoff::default(),
            recycling: Recycling::default(),
            generation: 0,
            begun: false,
            restarts: 0,
            exits: [0; ExitCause::ALL.len()],
            last_exit: None,
            last_port: fixed_port,
        }
    }

    /// The port that the next worker to fill it shall be on; `None` where any will do. An inherited
    /// socket outlives its worker, so the port is kept.
    #[must_use]
    pub fn wanted_port(&self) -> Option<u16> {
        match self.spec.socket {
            SocketMode::Inherit => self.fixed_port.or(self.last_port),
            SocketMode::Bind | SocketMode::Unix | SocketMode::Direct => self.fixed_port,
        }
    }

    /// Whether nobody fills it and nobody is about to.
    #[must_use]
    pub fn is_vacant(&self) -> bool {
        self.current.is_none() && self.next.is_none()
    }

    /// The worker that clients are sent to: the one that fills it, or its replacement where that one
    /// can't serve.
    #[must_use]
    pub fn serving(&self) -> Option<&Worker> {
        self.workers().find(|worker| worker.in_rotation())
    }

    /// Whether a worker in it that clients will be sent to is being started.
    #[must_use]
    pub fn on_its_way(&self) -> bool {
        self.workers().any(|worker| worker.on_its_way() && worker.drained.is_none())
    }

    /// The replacement fills it from now on.
    pub fn promote(&mut self) {
        if let Some(next) = self.next.take() {
            self.last_port = next.port;
            self.current = Some(next);
        }
    }

    /// The workers in it: at most the one that fills it and its replacement.
    pub fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.current.iter().chain(&self.next)
    }

    /// The same, to be changed.
    pub fn workers_mut(&mut self) -> impl Iterator<Item = &mut Worker> {
        self.current.iter_mut().chain(&mut self.next)
    }

    /// The workers in it, out of it.
    pub fn into_workers(self) -> impl Iterator<Item = Worker> {
        self.current.into_iter().chain(self.next)
    }

    /// A process was started for this worker.
    pub(super) fn spawned(&mut self, id: WorkerId) {
        let counts = self.workers().any(|worker| worker.id == id && worker.counts);
        self.begun = true;
        self.restarts += u64::from(counts);
    }

    /// Takes note of how a worker here, of that `generation`, ended. An end that was asked for is no news
    /// after one that was not, and that of a replacement none of the worker that it did not replace.
    pub(super) fn exited(&mut self, generation: u64, exit: LastExit) {
        let is_kept = self.current.as_ref().is_some_and(|kept| kept.generation < generation);
        if !is_kept && (!exit.asked || self.last_exit.as_ref().is_none_or(|last| last.asked)) {
            self.last_exit = Some(exit);
        }
    }

    /// Whether the worker of this incarnation is in it.
    #[must_use]
    pub fn holds(&self, id: WorkerId) -> bool {
        self.workers().any(|worker| worker.id == id)
    }

    /// Takes the worker of this incarnation out of the slot.
    pub fn take(&mut self, id: WorkerId) -> Option<Worker> {
        self.current
            .take_if(|worker| worker.id == id)
            .or_else(|| self.next.take_if(|worker| worker.id == id))
    }
}

/// What a note says of `worker`.
#[must_use]
pub(super) fn note_of(worker: &Worker) -> NoteWorker {
    let (id, spec) = (Some(worker.id), Arc::clone(&worker.spec));
    NoteWorker { id, spec, slot: worker.slot, port: worker.port, pid: worker.pid }
}

/// What a note says of `slot`, whoever fills it.
#[must_use]
pub(super) fn note_of_slot(slot: &Slot) -> NoteWorker {
    let vacant = || {
        let (id, spec) = (None, Arc::clone(&slot.spec));
        NoteWorker { id, spec, slot: slot.number, port: slot.fixed_port, pid: None }
    };
    slot.current.as_ref().map_or_else(vacant, note_of)
}
