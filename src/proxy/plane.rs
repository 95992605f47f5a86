//! The handle by which the driver controls the data threads.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    num::NonZeroUsize,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use socket2::Socket;

use super::{
    balance::{Backend, Pool, ReservedPermit, ServiceHandle},
    reactor::Reactor,
    thread::{
        frontend::{Frontend, FrontendId, Target},
        threads::{Command, Threads},
    },
};
use crate::{
    config::UnixAccess,
    net::{BindError, Listener, pathname::Rights, proxy_protocol::Ends},
};

/// The settings of the data plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// The number of data threads.
    pub threads: NonZeroUsize,
    /// The limit on connections held at once by all services together. Beyond it, clients wait in
    /// the accept queues.
    pub max_held: NonZeroUsize,
}

/// The data threads. Dropping this resets every connection and waits for the threads to end.
#[derive(Debug)]
pub struct DataPlane {
    threads: Arc<Threads>,
    handles: Mutex<Vec<JoinHandle<()>>>,
    listeners: Mutex<BTreeMap<FrontendId, Arc<Listener>>>,
    next: AtomicU32,
}

impl DataPlane {
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// If the system refuses a thread or a descriptor.
    pub fn start(settings: Settings) -> io::Result<Self> {
        let count = settings.threads.get();
        let threads = Threads::new(count, settings.max_held.get())?;
        let plane = Self {
            threads: Arc::clone(&threads),
            handles: Mutex::default(),
            listeners: Mutex::default(),
            next: AtomicU32::new(0),
        };
        for thread in 0..count {
            let reactor = Reactor::new(Arc::clone(&threads), thread)?;
            let builder = thread::Builder::new().name(format!("lbd-data-{thread}"));
            lock(&plane.handles).push(builder.spawn(move || reactor.run())?);
        }
        Ok(plane)
    }

    /// Creates a service, for which listeners can then be opened. `access` says whether its
    /// connections are logged.
    #[must_use]
    pub fn service(
        &self,
        name: Arc<str>,
        pool: Pool,
        access: Arc<AtomicBool>,
    ) -> Arc<ServiceHandle> {
        ServiceHandle::new(name, pool, access, Arc::clone(self.threads.budget()))
    }

    /// Starts accepting from `listener` on all threads; its clients are served by `target`.
    pub fn open(&self, target: impl Into<Target>, listener: Listener) -> FrontendId {
        let id = FrontendId(self.next.fetch_add(1, Relaxed));
        let target = target.into();
        listener.keep_alive(target.keepalive());
        let listener = Arc::new(listener);
        self.listeners().insert(id, Arc::clone(&listener));
        let frontend = Frontend { listener, target };
        self.threads.tell(|| Command::Open { id, frontend: frontend.clone() });
        id
    }

    /// Points a frontend at another target. This also applies to clients that are still in its
    /// accept queue; no client is turned away meanwhile.
    pub fn retarget(&self, id: FrontendId, target: impl Into<Target>) {
        let target = target.into();
        self.keep_alive(id, target.keepalive());
        self.threads.tell(|| Command::Retarget { id, target: target.clone() });
    }

    /// Sets the TCP keepalive time of a frontend: clients accepted from now on are probed by TCP
    /// after being silent for so long.
    pub fn keep_alive(&self, id: FrontendId, after: Duration) {
        if let Some(listener) = self.listeners().get(&id) {
            listener.keep_alive(after);
        }
    }

    /// Binds an address that overlaps those of the listeners `open`, such as `0.0.0.0:80` and
    /// `127.0.0.1:80`. Those listeners are about to be closed in its favour.
    ///
    /// # Errors
    /// As [`Listener::bind`]; also if anyone else is on that port.
    pub fn bind_beside(
        &self,
        address: SocketAddr,
        open: &[FrontendId],
    ) -> Result<Listener, BindError> {
        let all = self.listeners();
        let beside: Vec<_> = open.iter().filter_map(|id| all.get(id)).map(|l| &**l).collect();
        Listener::bind_beside(address, &beside)
    }

    /// As [`Listener::set_access`], until the returned change is dropped; `None` if nothing
    /// changed.
    ///
    /// # Errors
    /// As [`Listener::set_access`].
    pub fn set_access(
        &self,
        id: FrontendId,
        access: &UnixAccess,
    ) -> Result<Option<AccessChange>, BindError> {
        let Some(listener) = self.listeners().get(&id).cloned() else { return Ok(None) };
        let before = listener.set_access(access)?;
        Ok(before.map(|before| AccessChange { listener, before: Some(before) }))
    }

    /// As [`Listener::socket`]; `None` if the frontend is closed.
    #[must_use]
    pub fn socket(&self, id: FrontendId) -> Option<io::Result<Socket>> {
        self.listeners().get(&id).map(|listener| listener.socket())
    }

    /// Reports that the process of `backend` has exited. Connections whose response is complete are
    /// then closed, even if their clients have not noticed.
    pub fn exited(&self, backend: &Backend) {
        backend.exits();
        // Without connections there is nothing to close. A connection that still reaches this
        // backend after all sees the mark that was set above.
        if backend.active() > 0 {
            self.threads.exited();
        }
    }

    /// Takes over a connection that lbd accepted from a worker's queue, and assigns it as if its
    /// client had just connected. `client` is the two ends of the client's own connection, if
    /// known.
    pub fn adopt(&self, permit: ReservedPermit, connection: Socket, client: Option<Ends>) {
        permit.0.service().counters().count_rescued();
        let thread = self.threads.seat_anywhere();
        self.threads.tell_one(thread, Command::Adopt { connection, client, permit });
    }

    /// Closes a listener without losing a client: no new client gets in, those in the accept queue
    /// are accepted, and the socket is closed when the last thread has let go of it. The future
    /// completes when every accepted client has a worker or is on a wait list: after about 0.2 s on
    /// TCP, at once on unix, later if `max-connections` makes clients wait. Established connections
    /// continue. Dropping the future does not stop what has begun.
    ///
    /// # Errors
    ///
    /// If new clients could not be kept out. The listener is closed nevertheless, and clients that
    /// connected at the last moment were reset.
    pub fn close(&self, id: FrontendId) -> impl Future<Output = io::Result<()>> + use<> {
        let listener = self.listeners().remove(&id);
        let quiet = listener.as_ref().map_or(Ok(()), |listener| listener.quiesce());
        // Dropped before the threads let go, so that a thread holds the last reference.
        drop(listener);
        let (done, mut let_go) = tokio::sync::mpsc::channel(1);
        self.threads.tell(|| Command::Close { id, done: done.clone() });
        let threads = Arc::clone(&self.threads);
        async move {
            drop(done);
            while let_go.recv().await.is_some() {}
            // The last clients may be in transit from one thread to another, or have sent nothing
            // yet.
            let (done, mut placed) = tokio::sync::mpsc::channel(1);
            threads.tell(|| Command::AssignAll { done: done.clone() });
            drop(done);
            while placed.recv().await.is_some() {}
            quiet
        }
    }

    /// Resets every connection, ends the threads, and waits for them. The wait is short because the
    /// threads themselves wait for nothing. The plane can't be used afterwards.
    pub fn cut(&self) {
        self.threads.tell(|| Command::Stop);
        for thread in lock(&self.handles).drain(..) {
            // A thread that panicked has reported the panic, and has reset its connections.
            _ = thread.join();
        }
        (0..self.threads.turns().len()).for_each(|thread| self.threads.ended(thread));
    }

    /// The number of loop turns that each thread has made so far, for a watchdog. This wakes the
    /// threads, so a thread that has made no further turn by the next call hangs.
    #[must_use]
    pub fn progress(&self) -> Vec<u64> {
        let turns = self.threads.turns();
        self.threads.wake_all();
        turns
    }

    /// The number of connections held, by all services together.
    #[must_use]
    pub fn held(&self) -> usize {
        self.threads.budget().held()
    }

    /// The limit on clients' connections. It excludes a few spare permits, which are kept for
    /// connections drained from the queue of a worker that has exited.
    #[must_use]
    pub fn max_held(&self) -> usize {
        self.threads.budget().limit()
    }

    fn listeners(&self) -> MutexGuard<'_, BTreeMap<FrontendId, Arc<Listener>>> {
        lock(&self.listeners)
    }
}

/// A change of who may connect to an open unix socket. Dropping it undoes the change.
#[derive(Debug)]
#[must_use]
pub struct AccessChange {
    listener: Arc<Listener>,
    before: Option<Rights>,
}

impl AccessChange {
    /// Makes the change permanent.
    pub fn keep(mut self) {
        self.before = None;
    }
}

impl Drop for AccessChange {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            self.listener.restore(before);
        }
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        self.cut();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
