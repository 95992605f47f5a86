//! A data thread: its epoll instance, its loop, and whom it turns to.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use slab::Slab;
use socket2::Socket;

use super::{
    acceptor::Acceptor,
    connection::{Connection, Outcome, Said, Stage},
    counters::ConnectError,
    deadlines::DeadlineList,
    listener::Peer,
    pool::Pool,
    relay::{BUFFER, Reach, Side},
    service::{Permit, ReservedPermit, ServiceHandle},
    threads::{Command, Threads},
    wait_list::WaitList,
};
use crate::net::proxy_protocol::Ends;

/// Edges taken from the kernel at once.
const EDGES: usize = 256;

/// How long a client may take to say its first bytes before a worker is connected to all the same:
/// in many protocols the server speaks first.
const GRACE: Duration = Duration::from_millis(1);

/// How long a connection may take to say its PROXY header, where it has to begin with one. It is the
/// first thing that a proxy sends, in one piece.
const HEADER: Duration = Duration::from_secs(10);

/// How long a worker on this machine may take to answer a connect, whatever `connect-timeout` allows.
/// The kernel answers for it at once, but where its accept queue is full: then it drops the SYN, and
/// the next one goes out a second later (RFC 6298), when there has long been room for others.
const LOCAL_ANSWER: Duration = Duration::from_millis(5);

/// How long both sides have to take note of an end that lbd made.
const NOTICE: Duration = Duration::from_secs(1);

/// What an edge is about: the lowest two bits of its token. Above them are the connection's key (32
/// bits) and the lowest 30 bits of its generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject {
    Client = 0,
    Worker = 1,
    Listener = 2,
    Wakeup = 3,
}

/// One data thread.
pub(super) struct Reactor {
    pub(super) threads: Arc<Threads>,
    pub(super) thread: usize,
    pub(super) epoll: Epoll,
    /// When the last edges were taken: the time of everything that follows from them.
    pub(super) now: Instant,
    pub(super) buffer: Box<[u8]>,
    pub(super) connections: Slab<Connection>,
    generation: u32,
    pub(super) services: Slab<Service>,
    pub(super) acceptor: Acceptor,
    /// How many departures of workers it has seen to.
    exits: u64,
    /// Connections that could go on, but had their turn.
    pub(super) runnable: Vec<u64>,
}

/// A thread's view of a service.
pub(super) struct Service {
    pub(super) route: Arc<ServiceHandle>,
    pub(super) pool: Arc<Pool>,
    version: u64,
    /// The version by which those that wait have last looked for a worker.
    offered: u64,
    queues: [DeadlineList; Stage::QUEUED.len()],
    pub(super) line: WaitList,
    /// All of its workers are on this machine.
    pub(super) is_local: bool,
    /// Doors and connections that refer to it.
    uses: usize,
}

impl Reactor {
    pub(super) fn new(threads: Arc<Threads>, thread: usize) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let wakeup = EpollEvent::new(EpollFlags::EPOLLIN, Subject::Wakeup as u64);
        epoll.add(&threads.mailbox(thread).wakeup, wakeup)?;
        Ok(Self {
            threads,
            thread,
            epoll,
            now: Instant::now(),
            buffer: vec![0; BUFFER].into(),
            connections: Slab::new(),
            generation: 0,
            services: Slab::new(),
            acceptor: Acceptor::default(),
            exits: 0,
            runnable: Vec::new(),
        })
    }

    /// Runs until it is told to stop; all its connections are reset then.
    pub(super) fn run(mut self) {
        let mut edges = vec![EpollEvent::empty(); EDGES];
        loop {
            let timeout = if self.runnable.is_empty() { self.deadline() } else { Some(self.now) };
            // It fails with EINTR; its other errors tell of a wrong argument.
            let count = self.epoll.wait(&mut edges, self.timeout(timeout)).unwrap_or(0);
            self.now = Instant::now();
            self.threads.mailbox(self.thread).turns.fetch_add(1, Relaxed);

            let mut is_woken = false;
            let mut opened = Vec::new();
            let waited = std::mem::take(&mut self.runnable);
            for edge in &edges[..count] {
                let token = edge.data();
                match subject(token) {
                    Subject::Wakeup => is_woken = true,
                    Subject::Listener => opened.push((token >> 2) as u32),
                    side => self.shielded(token, |reactor, key| {
                        reactor.step(key, side, edge.events());
                    }),
                }
            }
            for token in waited {
                self.shielded(token, |reactor, key| {
                    reactor.connections[key].is_runnable = false;
                    reactor.relay(key);
                });
            }
            if is_woken && self.run_commands() {
                break;
            }
            if timeout.is_some_and(|deadline| deadline <= self.now) {
                self.expire();
            }
            // Last, so that no connection of this turn gets the key of one that ended in it.
            for id in opened {
                self.accept(id);
            }
        }
        for key in self.connections.iter().map(|(key, _)| key).collect::<Vec<_>>() {
            self.finish(key, Outcome::Stopped);
        }
    }

    /// Does what the main thread has asked for. True when that is to stop.
    fn run_commands(&mut self) -> bool {
        let mut stops = false;
        for command in self.threads.mailbox(self.thread).empty() {
            match command {
                Command::Open { id, listener, service } => {
                    let service = self.use_service(service);
                    self.open_listener(id.0, listener, service);
                }
                Command::Reassign { id, service } => {
                    let service = self.use_service(service);
                    self.reassign_listener(id.0, service);
                }
                Command::Close { id, done } => self.close_listener(id.0, done),
                Command::Adopt { connection, client, permit } => {
                    self.adopt(connection, client, permit);
                }
                Command::Take { connection, peer, permit, begun } => {
                    let service = self.use_service(Arc::clone(permit.route()));
                    self.admit(service, permit, connection, peer, None, begun);
                    self.leave_service(service);
                }
                Command::AssignAll { done } => {
                    for key in self.keys(Stage::AwaitingFirstBytes, |_| true) {
                        let token = self.token(key, Subject::Client);
                        self.shielded(token, Self::assign);
                    }
                    drop(done);
                }
                Command::Stop => stops = true,
            }
        }
        if stops {
            return true;
        }
        for service in self.services.iter().map(|(key, _)| key).collect::<Vec<_>>() {
            if !self.services.contains(service) {
                continue;
            }
            self.refresh(service);
            let Service { version, offered, .. } = &mut self.services[service];
            if std::mem::replace(offered, *version) != *version {
                self.advance(service);
            }
        }
        self.leave_exited();
        self.retry_listeners();
        false
    }

    /// Has another look at the connections of workers whose process is gone.
    fn leave_exited(&mut self) {
        let exits = self.threads.exits();
        if std::mem::replace(&mut self.exits, exits) == exits {
            return;
        }
        let is_exited =
            |c: &Connection| c.worker.as_ref().is_some_and(|(_, lease)| lease.is_exited());
        for key in self.keys(Stage::Relaying, is_exited) {
            let token = self.token(key, Subject::Client);
            self.shielded(token, Self::relay);
        }
    }

    /// Starts a connection that waited for a worker, and was accepted in its stead.
    fn adopt(
        &mut self,
        connection: Socket,
        client: Option<Ends>,
        ReservedPermit(permit): ReservedPermit,
    ) {
        let service = self.use_service(Arc::clone(permit.route()));
        let lbd = || connection.peer_addr().ok()?.as_socket();
        let peer = client.map(|ends| ends.client).or_else(lbd).map_or(Peer::Unix, Peer::Inet);
        if connection.set_nonblocking(true).is_ok() {
            let said = Some(Box::new(Said::ByLbd(client)));
            self.admit(service, permit, connection, peer, said, self.now);
        } else {
            self.threads.left(self.thread);
        }
        self.leave_service(service);
    }

    /// Starts a connection that has just been accepted, or adopted, and is seated here.
    pub(super) fn admit(
        &mut self,
        service: usize,
        permit: Permit,
        socket: Socket,
        peer: Peer,
        said: Option<Box<Said>>,
        begun: Instant,
    ) {
        self.generation = self.generation.wrapping_add(1);
        // An adopted connection may be a unix one, whoever its client is.
        let reach = if said.is_some() { Reach::Unix } else { peer.reach() };
        let client = Side::new(socket, reach);
        self.services[service].uses += 1;
        let generation = self.generation;
        let mut connection =
            Connection::new(client, peer, service as u32, generation, permit, begun);
        // lbd's own connection has begun with its own header, which is off already.
        let begins_with_header = said.is_none()
            && self.services[service].pool.routing().accept_proxy.contains(peer.ip());
        let stage =
            if begins_with_header { Stage::AwaitingHeader } else { Stage::AwaitingFirstBytes };
        connection.said = said;
        let key = self.connections.insert(connection);
        let token = self.token(key, Subject::Client);
        let event = EpollEvent::new(Side::INTEREST, token);
        match self.epoll.add(&self.connections[key].client.socket, event) {
            Ok(()) => self.enter(key, stage),
            Err(_) => self.finish(key, Outcome::Failed),
        }
    }

    /// A fault in one connection's step ends that connection, and not the thread's others. What the
    /// step shares with them (queues, counters) is changed by calls that can't fail half-way.
    pub(super) fn shielded(&mut self, token: u64, step: impl FnOnce(&mut Self, usize)) {
        let key = (token >> 2) as u32 as usize;
        let generation = (token >> 34) as u32;
        let is_current = |c: &Connection| c.generation & (u32::MAX >> 2) == generation;
        if !self.connections.get(key).is_some_and(is_current) {
            // A fork in progress may keep a closed socket registered for a moment.
            return;
        }
        if catch_unwind(AssertUnwindSafe(|| step(self, key))).is_err() {
            tracing::error!("a connection was reset because of a fault in lbd");
            if self.connections.get(key).is_some_and(is_current) {
                self.finish(key, Outcome::Failed);
            }
        }
    }

    /// Ends what has waited too long.
    fn expire(&mut self) {
        for service in self.services.iter().map(|(key, _)| key).collect::<Vec<_>>() {
            self.expire_line(service);
            for stage in Stage::QUEUED {
                while let Some(service) = self.services.get(service)
                    && let Some(key) = service.queues[stage as usize].first()
                    && service.deadline(stage, &self.connections).is_some_and(|at| at <= self.now)
                {
                    let token = self.token(key, Subject::Client);
                    match stage {
                        Stage::AwaitingHeader => self.finish(key, Outcome::NoHeader),
                        Stage::AwaitingFirstBytes => self.shielded(token, Self::assign),
                        Stage::Connecting => self.shielded(token, |reactor, key| {
                            reactor.skip(key, ConnectError::Timeout);
                        }),
                        Stage::Relaying => self.shielded(token, Self::end_idle),
                        Stage::Ending | Stage::AwaitingWorker => self.finish(key, Outcome::Idle),
                    }
                }
            }
        }
        self.tend_listeners();
    }

    /// The next instant at which something has waited too long.
    fn deadline(&self) -> Option<Instant> {
        let of = |service: &Service| {
            let deadline = |stage| service.deadline(stage, &self.connections);
            let line = [service.line.deadline(), service.hold_deadline()].into_iter().flatten();
            Stage::QUEUED.into_iter().filter_map(deadline).chain(line).min()
        };
        let connections = self.services.iter().filter_map(|(_, service)| of(service)).min();
        connections.into_iter().chain(self.acceptor.deadline()).min()
    }

    /// How long to wait at most: rounded up, so as not to come back early and wait again.
    fn timeout(&self, deadline: Option<Instant>) -> EpollTimeout {
        let Some(deadline) = deadline else { return EpollTimeout::NONE };
        if deadline <= self.now {
            return EpollTimeout::ZERO;
        }
        let wait = deadline.saturating_duration_since(Instant::now());
        let millis = wait.as_micros().div_ceil(1_000);
        i32::try_from(millis).ok().and_then(|m| m.try_into().ok()).unwrap_or(EpollTimeout::MAX)
    }

    /// Takes over a newly published pool.
    pub(super) fn refresh(&mut self, service: usize) {
        let service = &mut self.services[service];
        if service.route.version() != service.version {
            let before = Arc::clone(&service.pool);
            (service.pool, service.version) = service.route.current();
            if !Arc::ptr_eq(&before, &service.pool) {
                // Whatever was doubted, the supervisor has decided since.
                service.line.doubt = None;
                // Connects that are under way go to one of those before, where there is none now.
                if !service.pool.backends().is_empty() {
                    service.is_local = is_local(&service.pool);
                }
            }
        }
    }

    fn use_service(&mut self, route: Arc<ServiceHandle>) -> usize {
        let known = self.services.iter().find(|(_, known)| Arc::ptr_eq(&known.route, &route));
        let key = known.map(|(key, _)| key).unwrap_or_else(|| {
            let (pool, version) = route.current();
            self.services.insert(Service {
                route,
                is_local: is_local(&pool),
                pool,
                version,
                offered: version,
                queues: std::array::from_fn(|_| DeadlineList::new()),
                line: WaitList::default(),
                uses: 0,
            })
        });
        self.services[key].uses += 1;
        key
    }

    pub(super) fn leave_service(&mut self, key: usize) {
        self.services[key].uses -= 1;
        if self.services[key].uses == 0 {
            self.services.remove(key);
        }
    }

    /// The connections in this stage of which `wanted` is true.
    fn keys(&self, stage: Stage, wanted: impl Fn(&Connection) -> bool) -> Vec<usize> {
        let mut keys = Vec::new();
        for (_, service) in &self.services {
            let queue = &service.queues[stage as usize];
            keys.extend(
                queue.iter(&self.connections).filter(|key| wanted(&self.connections[*key])),
            );
        }
        keys
    }

    pub(super) fn token(&self, key: usize, subject: Subject) -> u64 {
        u64::from(self.connections[key].generation) << 34 | (key as u64) << 2 | subject as u64
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        // Nobody's turn comes after that of one who waits here.
        self.services.iter().for_each(|(_, service)| service.route.set_head(self.thread, None));
        self.threads.ended(self.thread);
    }
}

/// The token of a door's edges.
pub(super) fn listener_token(id: u32) -> u64 {
    u64::from(id) << 2 | Subject::Listener as u64
}

fn subject(token: u64) -> Subject {
    match token & 3 {
        0 => Subject::Client,
        1 => Subject::Worker,
        2 => Subject::Listener,
        _ => Subject::Wakeup,
    }
}

fn is_local(pool: &Pool) -> bool {
    pool.backends().iter().all(|backend| backend.is_local())
}

impl Service {
    fn deadline(&self, stage: Stage, all: &Slab<Connection>) -> Option<Instant> {
        let routing = self.pool.routing();
        let wait = match stage {
            Stage::AwaitingHeader => HEADER,
            Stage::AwaitingFirstBytes => GRACE,
            Stage::Connecting if self.is_local => routing.connect_timeout.min(LOCAL_ANSWER),
            Stage::Connecting => routing.connect_timeout,
            // Never early: the last byte may be a grain younger than the place in the queue.
            Stage::Relaying => routing.idle_timeout.saturating_add(grain(routing.idle_timeout)),
            Stage::Ending => NOTICE,
            Stage::AwaitingWorker => return None,
        };
        let first = self.queues[stage as usize].first()?;
        all[first].links.since.checked_add(wait)
    }

    /// Until when the longest waiting is held.
    pub(super) fn hold_deadline(&self) -> Option<Instant> {
        let (came, _) = self.line.first()?;
        came.checked_add(self.pool.routing().hold_timeout)
    }

    /// Tells the other threads who is the first in the line here.
    pub(super) fn tell_head(&self, thread: usize) {
        self.route.set_head(thread, self.line.first().map(|(came, _)| came));
    }

    pub(super) fn queue(&mut self, stage: Stage) -> Option<&mut DeadlineList> {
        self.queues.get_mut(stage as usize)
    }
}

/// How stale a busy connection's place in the idle queue may get before it is renewed.
pub(super) fn grain(idle_timeout: Duration) -> Duration {
    (idle_timeout / 16).min(Duration::from_secs(1))
}
