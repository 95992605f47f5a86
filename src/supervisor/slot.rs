//! A slot holds one worker of a service and, during a replacement, that worker's successor. It
//! knows which of the two serves, and when the next worker is started.

use std::{sync::Arc, time::Instant};

use super::{
    backoff::Backoff,
    event::{Down, ExitCause, NoteWorker, WorkerId},
    recycle::Recycling,
    worker::Worker,
};
use crate::config::{SocketMode, WorkerSpec};

/// One slot of a service: it holds at most one worker and its replacement.
#[derive(Debug, Clone)]
pub struct Slot {
    /// The slot's number in `LBD_SLOT`, logs and metrics. A fixed port keeps its number for as long
    /// as the configuration has the port, wherever the port stands in the list.
    pub number: u32,
    /// The slot's fixed port; `None` if lbd picks a port.
    pub fixed_port: Option<u16>,
    /// The settings that the next worker is started with.
    pub spec: Arc<WorkerSpec>,
    /// An operator has drained the slot: its workers get no connections. This lasts for as long as
    /// the slot does, even when its worker is replaced.
    pub drained: bool,
    /// A reload removes this slot as soon as the slots that replace it are proven; until then its
    /// worker serves.
    pub(super) leaving: bool,
    /// A reload added this slot to replace others, which stay until its first worker is proven.
    pub(super) unproven: bool,
    /// The slot's worker.
    pub current: Option<Worker>,
    /// The replacement for `current`, which takes over once it is proven. Before that it serves
    /// only while `current` can't.
    pub next: Option<Worker>,
    /// When the next worker is started, if the slot is vacant.
    pub start_at: Instant,
    /// The slot's failures in a row, and the restart delay that follows from them.
    pub backoff: Backoff,
    /// When the slot's worker may be replaced because it exceeds a limit.
    pub recycling: Recycling,
    /// How many workers were started in this slot so far.
    pub generation: u64,
    /// A process was started in this slot before. So the next one counts as a restart, unless it
    /// replaces a worker on purpose.
    pub begun: bool,
    /// How many workers were started in this slot because the one before ended, or failed to start,
    /// without lbd wanting that. An attempt that started nothing because the port was taken does
    /// not count.
    pub restarts: u64,
    /// How many of the slot's workers ended, by [`ExitCause`], in the order of [`ExitCause::ALL`].
    pub exits: [u64; ExitCause::ALL.len()],
    /// How and when the slot's last worker ended, or why it could not be started. If any worker
    /// ended without lbd asking it to, this is the last such end: a requested end does not
    /// overwrite it. A replacement that fails while the old worker stays does not count.
    pub last_exit: Option<LastExit>,
    /// The port of the last worker that held the slot.
    pub last_port: Option<u16>,
}

/// How a worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastExit {
    /// How it ended.
    pub how: Down,
    /// When it ended.
    pub at: Instant,
    /// lbd asked the worker to end: it was replaced or removed, or lbd stops.
    pub asked: bool,
}

impl Slot {
    /// A vacant slot, whose first worker is due at once.
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

    /// The port that the slot's next worker is started on; `None` if any port will do. An inherited
    /// socket outlives its worker, so a slot keeps its port with [`SocketMode::Inherit`].
    #[must_use]
    pub fn wanted_port(&self) -> Option<u16> {
        match self.spec.socket {
            SocketMode::Inherit => self.fixed_port.or(self.last_port),
            SocketMode::Bind | SocketMode::Unix | SocketMode::Direct => self.fixed_port,
        }
    }

    /// Whether the slot has neither a worker nor a replacement.
    #[must_use]
    pub fn is_vacant(&self) -> bool {
        self.current.is_none() && self.next.is_none()
    }

    /// The worker in rotation: `current`, or its replacement while `current` can't serve.
    #[must_use]
    pub fn serving(&self) -> Option<&Worker> {
        self.workers().find(|worker| worker.in_rotation())
    }

    /// Whether a worker of this slot that will be in rotation is being started.
    #[must_use]
    pub fn on_its_way(&self) -> bool {
        self.workers().any(|worker| worker.on_its_way() && worker.drained.is_none())
    }

    /// Makes the replacement the slot's worker.
    pub fn promote(&mut self) {
        if let Some(next) = self.next.take() {
            self.last_port = next.port;
            self.current = Some(next);
        }
    }

    /// The slot's workers: `current` and its replacement, as far as they exist.
    pub fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.current.iter().chain(&self.next)
    }

    /// The slot's workers, mutable.
    pub fn workers_mut(&mut self) -> impl Iterator<Item = &mut Worker> {
        self.current.iter_mut().chain(&mut self.next)
    }

    /// The slot's workers, by value.
    pub fn into_workers(self) -> impl Iterator<Item = Worker> {
        self.current.into_iter().chain(self.next)
    }

    /// Records that a process was started for this worker.
    pub(super) fn spawned(&mut self, id: WorkerId) {
        let counts = self.workers().any(|worker| worker.id == id && worker.counts);
        self.begun = true;
        self.restarts += u64::from(counts);
    }

    /// Records how the slot's worker of that `generation` ended. A requested end does not overwrite
    /// one that was not requested. The end of a failed replacement is ignored while the older
    /// worker stays.
    pub(super) fn exited(&mut self, generation: u64, exit: LastExit) {
        let is_kept = self.current.as_ref().is_some_and(|kept| kept.generation < generation);
        if !is_kept && (!exit.asked || self.last_exit.as_ref().is_none_or(|last| last.asked)) {
            self.last_exit = Some(exit);
        }
    }

    /// Whether this worker is in the slot.
    #[must_use]
    pub fn holds(&self, id: WorkerId) -> bool {
        self.workers().any(|worker| worker.id == id)
    }

    /// Takes this worker out of the slot.
    pub fn take(&mut self, id: WorkerId) -> Option<Worker> {
        self.current
            .take_if(|worker| worker.id == id)
            .or_else(|| self.next.take_if(|worker| worker.id == id))
    }
}

/// How a log note describes `worker`.
#[must_use]
pub(super) fn note_of(worker: &Worker) -> NoteWorker {
    let (id, spec) = (Some(worker.id), Arc::clone(&worker.spec));
    NoteWorker { id, spec, slot: worker.slot, port: worker.port, pid: worker.pid }
}

/// How a log note describes `slot`: by its worker, if it has one.
#[must_use]
pub(super) fn note_of_slot(slot: &Slot) -> NoteWorker {
    let vacant = || {
        let (id, spec) = (None, Arc::clone(&slot.spec));
        NoteWorker { id, spec, slot: slot.number, port: slot.fixed_port, pid: None }
    };
    slot.current.as_ref().map_or_else(vacant, note_of)
}
