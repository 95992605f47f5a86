//! The driver's handle on the data threads.

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

/// How the data plane is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How many data threads there are.
    pub threads: NonZeroUsize,
    /// How many connections are held at once, by all services together; past it, clients wait in
    /// the accept queues.
    pub max_held: NonZeroUsize,
}

/// The data threads. Dropped, it resets every connection and waits for the threads to end.
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
    /// Where the system refuses a thread or a descriptor.
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

    /// A service to open listeners for. `access` says whether its connections are logged.
    #[must_use]
    pub fn service(
        &self,
        name: Arc<str>,
        pool: Pool,
        access: Arc<AtomicBool>,
    ) -> Arc<ServiceHandle> {
        ServiceHandle::new(name, pool, access, Arc::clone(self.threads.budget()))
    }

    /// Begins to accept from `listener`, on all threads: its clients get `target`.
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

    /// Has clients of a frontend get something else, those who wait there included: nobody is turned
    /// away meanwhile.
    pub fn retarget(&self, id: FrontendId, target: impl Into<Target>) {
        let target = target.into();
        self.keep_alive(id, target.keepalive());
        self.threads.tell(|| Command::Retarget { id, target: target.clone() });
    }

    /// Has TCP ask clients that come from now on, and are silent for so long, whether they are still
    /// there.
    pub fn keep_alive(&self, id: FrontendId, after: Duration) {
        if let Some(listener) = self.listeners().get(&id) {
            listener.keep_alive(after);
        }
    }

    /// Binds an address that overlaps those of open listeners, such as `0.0.0.0:80` and
    /// `127.0.0.1:80`, which are about to be closed in its favour.
    ///
    /// # Errors
    /// As [`Listener::bind`]: where anybody else is on that port too.
    pub fn bind_beside(
        &self,
        address: SocketAddr,
        open: &[FrontendId],
    ) -> Result<Listener, BindError> {
        let all = self.listeners();
        let beside: Vec<_> = open.iter().filter_map(|id| all.get(id)).map(|l| &**l).collect();
        Listener::bind_beside(address, &beside)
    }

    /// As [`Listener::set_access`], until the change is dropped; `None` where nothing changed.
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

    /// As [`Listener::socket`]; `None` where it is closed.
    #[must_use]
    pub fn socket(&self, id: FrontendId) -> Option<io::Result<Socket>> {
        self.listeners().get(&id).map(|listener| listener.socket())
    }

    /// The process of `backend` is gone: connections whose answer is complete are closed, although
    /// their clients may not have noticed.
    pub fn exited(&self, backend: &Backend) {
        backend.exits();
        // One that gets one after all looks for itself: that it is gone was said before.
        if backend.active() > 0 {
            self.threads.exited();
        }
    }

    /// Takes over a connection that was accepted in a worker's stead, and assigns it as if a client
    /// had just made it: the one with these ends, or one unknown.
    pub fn adopt(&self, permit: ReservedPermit, connection: Socket, client: Option<Ends>) {
        permit.0.service().counters().count_rescued();
        let thread = self.threads.seat_anywhere();
        self.threads.tell_one(thread, Command::Adopt { connection, client, permit });
    }

    /// Closes a listener without losing anybody: no new client gets in, those that wait are
    /// accepted, and the socket is closed when no thread has it any more. This returns when all of
    /// them have been given to a worker, or to those that wait for one: after about 0.2 s on TCP, at once on unix, later where `max-connections` makes clients wait.
    /// The connections go on. What has been begun is finished also when the future is dropped.
    ///
    /// # Errors
    ///
    /// Where new clients could not be kept out; the listener is closed nevertheless, and those that
    /// came in at its last moment were reset.
    pub fn close(&self, id: FrontendId) -> impl Future<Output = io::Result<()>> + use<> {
        let listener = self.listeners().remove(&id);
        let quiet = listener.as_ref().map_or(Ok(()), |listener| listener.quiesce());
        // Before the threads let go, so that theirs is the last.
        drop(listener);
        let (done, mut let_go) = tokio::sync::mpsc::channel(1);
        self.threads.tell(|| Command::Close { id, done: done.clone() });
        let threads = Arc::clone(&self.threads);
        async move {
            drop(done);
            while let_go.recv().await.is_some() {}
            // The last may be on their way from one thread to another, or have said nothing yet.
            let (done, mut placed) = tokio::sync::mpsc::channel(1);
            threads.tell(|| Command::AssignAll { done: done.clone() });
            drop(done);
            while placed.recv().await.is_some() {}
            quiet
        }
    }

    /// Resets every connection and ends the threads. It waits for them: that they have nothing to
    /// wait for themselves makes it short. Nothing can be done with the plane afterwards.
    pub fn cut(&self) {
        self.threads.tell(|| Command::Stop);
        for thread in lock(&self.handles).drain(..) {
            // A thread that panicked has reported it, and has reset what it had.
            _ = thread.join();
        }
        (0..self.threads.turns().len()).for_each(|thread| self.threads.ended(thread));
    }

    /// The turns that each thread's loop has made so far, for a watchdog. It wakes the threads, so
    /// that one which has made no turn by the next call hangs.
    #[must_use]
    pub fn progress(&self) -> Vec<u64> {
        let turns = self.threads.turns();
        self.threads.wake_all();
        turns
    }

    /// Connections held, by all services together.
    #[must_use]
    pub fn held(&self) -> usize {
        self.threads.budget().held()
    }

    /// How many clients' connections there may be: all but a few that are kept for those that
    /// wait for a worker which is gone.
    #[must_use]
    pub fn max_held(&self) -> usize {
        self.threads.budget().limit()
    }

    fn listeners(&self) -> MutexGuard<'_, BTreeMap<FrontendId, Arc<Listener>>> {
        lock(&self.listeners)
    }
}

/// Who may connect to an open unix socket has changed. Dropped, it is as it was before.
#[derive(Debug)]
#[must_use]
pub struct AccessChange {
    listener: Arc<Listener>,
    before: Option<Rights>,
}

impl AccessChange {
    /// It stays so.
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
