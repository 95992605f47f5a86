//! What the data threads share with each other and with the main thread.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use socket2::Socket;
use tokio::sync::mpsc;

use super::{gate::Gate, listener::Listener, service::ServiceRoute};
use crate::proxy_protocol::Ends;

/// Names a listener for the life of a [`DataPlane`](super::DataPlane).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerId(pub(super) u32);

/// What a thread is told. Their number is bounded by what control does: three for each listener, and
/// one for each connection that waited for a worker which is gone.
#[derive(Debug)]
pub(super) enum Command {
    Open {
        id: ListenerId,
        listener: Arc<Listener>,
        service: Arc<ServiceRoute>,
    },
    /// Its clients are another service's from now on.
    Reassign {
        id: ListenerId,
        service: Arc<ServiceRoute>,
    },
    /// Accept what is queued, then let go of the listener and drop `done`.
    Close {
        id: ListenerId,
        done: mpsc::Sender<()>,
    },
    /// Take over a connection that was accepted elsewhere.
    Adopt {
        connection: Socket,
        client: Option<Ends>,
        service: Arc<ServiceRoute>,
    },
    /// Reset every connection and end.
    Stop,
}

/// The way to one thread.
#[derive(Debug)]
pub(super) struct Mailbox {
    commands: Mutex<Vec<Command>>,
    pub(super) bell: EventFd,
    /// Turns of the thread's loop.
    pub(super) turns: AtomicU64,
}

/// All threads, and the number of connections they may hold together.
#[derive(Debug)]
pub(super) struct Crew {
    mailboxes: Box<[Mailbox]>,
    budget: Gate,
    /// How often a worker's process was found to be gone.
    departures: AtomicU64,
    /// Which thread is the next to be told what only one is told.
    turn: AtomicUsize,
}

impl Crew {
    pub(super) fn new(threads: usize, max_held: usize) -> io::Result<Arc<Self>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let mailboxes = (0..threads).map(|_| {
            let bell = EventFd::from_flags(flags)?;
            Ok(Mailbox { commands: Mutex::default(), bell, turns: AtomicU64::new(0) })
        });
        let mailboxes = mailboxes.collect::<io::Result<_>>()?;
        Ok(Arc::new(Self {
            mailboxes,
            budget: Gate::new(max_held),
            departures: AtomicU64::new(0),
            turn: AtomicUsize::new(0),
        }))
    }

    pub(super) fn mailbox(&self, thread: usize) -> &Mailbox {
        &self.mailboxes[thread]
    }

    pub(super) fn budget(&self) -> &Gate {
        &self.budget
    }

    /// Makes every thread look at its mailbox, at new pools and at the gates.
    pub(super) fn wake_all(&self) {
        for mailbox in &self.mailboxes {
            // EAGAIN says that it has been rung more often than can be counted: rung it is.
            _ = mailbox.bell.write(1);
        }
    }

    /// Gives one thread a command: each in turn.
    pub(super) fn tell_one(&self, command: Command) {
        let turn = self.turn.fetch_add(1, Relaxed) % self.mailboxes.len();
        lock(&self.mailboxes[turn].commands).push(command);
        self.wake_all();
    }

    /// Gives each thread a command.
    pub(super) fn tell(&self, command: impl Fn() -> Command) {
        for mailbox in &self.mailboxes {
            lock(&mailbox.commands).push(command());
        }
        self.wake_all();
    }

    /// A worker's process is gone: its connections are to be looked at.
    pub(super) fn departed(&self) {
        self.departures.fetch_add(1, Release);
        self.wake_all();
    }

    pub(super) fn departures(&self) -> u64 {
        self.departures.load(Acquire)
    }

    pub(super) fn turns(&self) -> Vec<u64> {
        self.mailboxes.iter().map(|mailbox| mailbox.turns.load(Relaxed)).collect()
    }
}

impl Mailbox {
    /// Stops the ringing and takes what was put in before it.
    pub(super) fn empty(&self) -> Vec<Command> {
        _ = self.bell.read();
        std::mem::take(&mut lock(&self.commands))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
