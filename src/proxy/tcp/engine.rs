//! The TCP engine: assigns a connection to a worker or puts it on the wait list, relays it, and
//! ends it.

use std::{
    io::{self, Read},
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::epoll::{EpollEvent, EpollFlags},
};
use slab::Slab;
use socket2::Socket;

use super::{
    connect::{connect, errno, is_self_connected},
    connection::{Connection, Said, Stage},
    relay::{Pumped, Side},
};
use crate::{
    net::{
        Peer, Reach,
        proxy_protocol::{Ends, LONGEST_RECEIVED, NoHeader, received},
    },
    proxy::{
        balance::{Choice, ConnectError, NoBackend, Outcome, Permit, ReservedPermit, Shortage},
        thread::{
            context::{Context, Service},
            deadlines::{DeadlineList, Links},
            token::{self, Subject},
        },
    },
};

/// How long lbd waits for a client's first bytes before it connects to a worker all the same: in
/// many protocols the server speaks first.
const GRACE: Duration = Duration::from_millis(1);

/// How long a connection may take to send its PROXY header, where one is required. A proxy sends
/// the header first, in one piece.
const HEADER: Duration = Duration::from_secs(10);

/// How long a worker on this machine may take to answer a connect, whatever `connect-timeout`
/// allows. The kernel answers at once, unless the worker's accept queue is full. Then it drops the
/// SYN, and the next SYN is sent a second later (RFC 6298), although the queue has usually had room
/// for other connections long before.
const LOCAL_ANSWER: Duration = Duration::from_millis(5);

/// How long both peers have to react after lbd has closed an idle connection.
const NOTICE: Duration = Duration::from_secs(1);

/// The pause before lbd tries again whether a worker's accept queue is still full.
const FULL: Duration = Duration::from_millis(5);

/// The pause before lbd tries again when it is itself short of something. Also the longest that
/// waiting connections wait if nothing tells them of room.
const SHORT: Duration = Duration::from_millis(50);

/// How old an unanswered connect has to be before another attempt makes sense.
const STALE: Duration = Duration::from_millis(1);

/// How long a connection that every worker of the pool refused waits for the supervisor to notice.
/// The supervisor learns of a worker's death within milliseconds, and then starts its successor.
const DOUBT: Duration = Duration::from_millis(250);

/// The result of an attempt to find a worker.
enum Found {
    /// The connection has a worker, or is being connected to one, or has ended.
    Done,
    /// There is no worker, for this reason.
    None(WaitReason),
}

/// Why there is no worker for a connection although the pool is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WaitReason {
    /// Every worker refused it.
    Refused,
    /// Not every worker refused it, but this is short for the others.
    Short(Shortage),
}

/// The deadline lists of one service, one for each stage that has a list.
type Deadlines = [DeadlineList; Stage::QUEUED.len()];

/// The TCP connections of one data thread.
#[derive(Default)]
pub(in crate::proxy) struct Engine {
    connections: Slab<Connection>,
    generation: u32,
    /// Indexed by the key of the service.
    deadlines: Vec<Deadlines>,
    /// Connections that have more to relay, but have used up their turn.
    runnable: Vec<u64>,
}

impl Engine {
    /// Handles one epoll edge of a connection.
    pub(in crate::proxy) fn follow(&mut self, cx: &mut Context, token: u64, edge: EpollFlags) {
        self.shielded(cx, token, |engine, cx, key| engine.step(cx, key, Subject::of(token), edge));
    }

    /// Whether there are connections that can continue without an edge.
    pub(in crate::proxy) fn has_runnable(&self) -> bool {
        !self.runnable.is_empty()
    }

    /// Takes the connections that can continue without an edge, to be passed to [`Self::run`].
    pub(in crate::proxy) fn take_runnable(&mut self) -> Vec<u64> {
        mem::take(&mut self.runnable)
    }

    /// Continues a connection that was runnable.
    pub(in crate::proxy) fn run(&mut self, cx: &mut Context, token: u64) {
        self.shielded(cx, token, |engine, cx, key| {
            engine.connections[key].is_runnable = false;
            engine.relay(cx, key);
        });
    }

    /// Starts a client's connection that was accepted at `begun` and is [seated] on this thread.
    ///
    /// [seated]: crate::proxy::thread::threads::Threads::seat
    pub(in crate::proxy) fn admit(
        &mut self,
        cx: &mut Context,
        service: usize,
        permit: Permit,
        socket: Socket,
        peer: Peer,
        begun: Instant,
    ) {
        self.start(cx, service, permit, socket, peer, None, begun);
    }

    /// Starts a connection. `said` is what is already known about its client from elsewhere, if
    /// anything.
    #[expect(clippy::too_many_arguments, reason = "each is what a connection begins with")]
    fn start(
        &mut self,
        cx: &mut Context,
        service: usize,
        permit: Permit,
        socket: Socket,
        peer: Peer,
        said: Option<Box<Said>>,
        begun: Instant,
    ) {
        self.generation = self.generation.wrapping_add(1);
        // The socket of an adopted connection may be a unix one, even if its client has an IP
        // address.
        let reach = if said.is_some() { Reach::Unix } else { peer.reach() };
        let client = Side::new(socket, reach);
        cx.share_service(service);
        if self.deadlines.len() <= service {
            self.deadlines.resize_with(service + 1, Deadlines::default);
        }
        let generation = self.generation;
        let mut connection =
            Connection::new(client, peer, service as u32, generation, permit, begun);
        // A connection that lbd itself had made (and drained) began with lbd's own header, which
        // has been removed already.
        let begins_with_header =
            said.is_none() && cx.services[service].pool.routing().accept_proxy.contains(peer.ip());
        let stage =
            if begins_with_header { Stage::AwaitingHeader } else { Stage::AwaitingFirstBytes };
        connection.said = said;
        let key = self.connections.insert(connection);
        let token = self.token(key, Subject::Client);
        let event = EpollEvent::new(Side::INTEREST, token);
        match cx.epoll.add(&self.connections[key].client.socket, event) {
            Ok(()) => self.enter(cx, key, stage),
            Err(_) => self.finish(cx, key, Outcome::Failed),
        }
    }

    /// Starts a connection that lbd drained from a worker's accept queue.
    pub(in crate::proxy) fn adopt(
        &mut self,
        cx: &mut Context,
        connection: Socket,
        client: Option<Ends>,
        ReservedPermit(permit): ReservedPermit,
    ) {
        let service = cx.use_service(permit.service());
        let lbd = || connection.peer_addr().ok()?.as_socket();
        let peer = client.map(|ends| ends.client).or_else(lbd).map_or(Peer::Unix, Peer::Inet);
        if connection.set_nonblocking(true).is_ok() {
            let said = Some(Box::new(Said::ByLbd(client)));
            self.start(cx, service, permit, connection, peer, said, cx.now);
        } else {
            cx.threads.left(cx.thread);
        }
        cx.leave_service(service);
    }

    /// Assigns all connections whose clients have not sent anything yet.
    pub(in crate::proxy) fn assign_all(&mut self, cx: &mut Context) {
        for key in self.keys(Stage::AwaitingFirstBytes, |_| true) {
            let token = self.token(key, Subject::Client);
            self.shielded(cx, token, Self::assign);
        }
    }

    /// Checks the connections of workers whose process has exited.
    pub(in crate::proxy) fn leave_exited(&mut self, cx: &mut Context) {
        let is_exited =
            |c: &Connection| c.worker.as_ref().is_some_and(|(_, lease)| lease.is_exited());
        for key in self.keys(Stage::Relaying, is_exited) {
            let token = self.token(key, Subject::Client);
            self.shielded(cx, token, Self::relay);
        }
    }

    /// Handles the expired deadlines of one service.
    pub(in crate::proxy) fn expire(&mut self, cx: &mut Context, service: usize) {
        self.expire_waiters(cx, service);
        for stage in Stage::QUEUED {
            while let Some(of) = cx.services.get(service)
                && let Some(key) = self.list(service, stage).and_then(DeadlineList::first)
                && self.stage_deadline(of, service, stage).is_some_and(|at| at <= cx.now)
            {
                let token = self.token(key, Subject::Client);
                match stage {
                    Stage::AwaitingHeader => self.finish(cx, key, Outcome::NoHeader),
                    Stage::AwaitingFirstBytes => self.shielded(cx, token, Self::assign),
                    Stage::Connecting => self.shielded(cx, token, |engine, cx, key| {
                        engine.skip(cx, key, ConnectError::Timeout);
                    }),
                    Stage::Relaying => self.shielded(cx, token, Self::end_idle),
                    Stage::Ending | Stage::AwaitingWorker => self.finish(cx, key, Outcome::Idle),
                }
            }
        }
    }

    /// The next deadline.
    pub(in crate::proxy) fn deadline(&self, cx: &Context) -> Option<Instant> {
        let of = |(key, service): (usize, &Service)| {
            let deadline = |stage| self.stage_deadline(service, key, stage);
            let waiters = [service.waiters.deadline(), service.hold_deadline()];
            let waiters = waiters.into_iter().flatten();
            Stage::QUEUED.into_iter().filter_map(deadline).chain(waiters).min()
        };
        cx.services.iter().filter_map(of).min()
    }

    /// When the first connection of a service in this stage expires.
    fn stage_deadline(&self, of: &Service, service: usize, stage: Stage) -> Option<Instant> {
        let first = self.list(service, stage)?.first()?;
        let routing = of.pool.routing();
        let wait = match stage {
            Stage::AwaitingHeader => HEADER,
            Stage::AwaitingFirstBytes => GRACE,
            Stage::Connecting if of.is_local => routing.connect_timeout.min(LOCAL_ANSWER),
            Stage::Connecting => routing.connect_timeout,
            // Never too early: the connection may have relayed its last byte up to one grain after
            // the time for which it is in the list.
            Stage::Relaying => routing.idle_timeout.saturating_add(grain(routing.idle_timeout)),
            Stage::Ending => NOTICE,
            Stage::AwaitingWorker => return None,
        };
        self.connections[first].links.since.checked_add(wait)
    }

    /// The deadline list of a service and stage, if the stage has one.
    fn list(&self, service: usize, stage: Stage) -> Option<&DeadlineList> {
        self.deadlines.get(service)?.get(stage as usize)
    }

    /// Resets all connections.
    pub(in crate::proxy) fn finish_all(&mut self, cx: &mut Context) {
        for key in self.connections.iter().map(|(key, _)| key).collect::<Vec<_>>() {
            self.finish(cx, key, Outcome::Stopped);
        }
    }

    /// The connections in this stage for which `wanted` is true.
    fn keys(&self, stage: Stage, wanted: impl Fn(&Connection) -> bool) -> Vec<usize> {
        let lists = self.deadlines.iter().filter_map(|lists| lists.get(stage as usize));
        let keys = lists.flat_map(|list| list.iter(&self.connections));
        keys.filter(|key| wanted(&self.connections[*key])).collect()
    }

    fn token(&self, key: usize, side: Subject) -> u64 {
        token::of_connection(key, self.connections[key].generation, side)
    }

    /// Runs one step of a connection. A panic in it ends that connection only, and not the thread's
    /// others. What the step shares with them (lists, counters) is changed by calls that can't fail
    /// half-way.
    fn shielded(
        &mut self,
        cx: &mut Context,
        token: u64,
        step: impl FnOnce(&mut Self, &mut Context, usize),
    ) {
        let key = token::key(token);
        let is_current = |c: &Connection| token::is_of(token, c.generation);
        if !self.connections.get(key).is_some_and(is_current) {
            // A child that was just forked may keep a closed socket registered in epoll for a
            // moment.
            return;
        }
        if catch_unwind(AssertUnwindSafe(|| step(self, cx, key))).is_err() {
            tracing::error!("a connection was reset because of a fault in lbd");
            if self.connections.get(key).is_some_and(is_current) {
                self.finish(cx, key, Outcome::Failed);
            }
        }
    }

    fn step(&mut self, cx: &mut Context, key: usize, side: Subject, edge: EpollFlags) {
        let connection = &mut self.connections[key];
        let is_broken = edge.contains(EpollFlags::EPOLLERR);
        match (side, &mut connection.worker) {
            (Subject::Worker, Some((worker, _))) => worker.note(edge),
            (Subject::Worker, None) => return,
            _ => connection.client.note(edge),
        }
        match (connection.stage, side) {
            (Some(Stage::Relaying), side) => {
                self.relay(cx, key);
                // If the error could not be read yet because unwritten bytes come before it.
                let end = if side == Subject::Worker {
                    Outcome::WorkerReset
                } else {
                    Outcome::ClientReset
                };
                if is_broken && self.connections.contains(key) {
                    self.finish(cx, key, end);
                }
            }
            (Some(Stage::Ending), _) => self.look_whether_noticed(cx, key),
            (Some(Stage::Connecting), Subject::Worker) => self.connected(cx, key, edge),
            (Some(Stage::AwaitingFirstBytes | Stage::AwaitingHeader), _) if is_broken => {
                let end = connection.early_end();
                self.finish(cx, key, end);
            }
            (Some(Stage::Connecting), _) if is_broken => self.finish(cx, key, Outcome::ClientGone),
            (Some(Stage::AwaitingHeader), _) => self.read_header(cx, key),
            (Some(Stage::AwaitingFirstBytes), _) if connection.client.is_readable() => {
                self.assign(cx, key)
            }
            (Some(Stage::AwaitingFirstBytes | Stage::Connecting), _) => {}
            _ if is_broken || connection.client.is_spent() => {
                self.finish(cx, key, Outcome::ClientGone)
            }
            _ => {}
        }
    }

    /// Reads as much of the PROXY header as has arrived, and continues when it is complete.
    fn read_header(&mut self, cx: &mut Context, key: usize) {
        let connection = &mut self.connections[key];
        if !connection.client.is_readable() {
            return;
        }
        let begin = &mut cx.buffer[..LONGEST_RECEIVED];
        let received = match connection.client.peek(begin) {
            Ok(0) => return self.finish(cx, key, Outcome::NothingSaid),
            Ok(count) => received(&begin[..count]).map(|header| (header, count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => return self.finish(cx, key, Outcome::ClientGone),
        };
        let header = match received {
            Ok((Some(header), count)) if header.length <= count => header,
            // The rest of the header will cause another edge.
            Ok((_, count)) if count < LONGEST_RECEIVED && !connection.client.is_closed() => return,
            Ok(_) | Err(NoHeader) => return self.finish(cx, key, Outcome::NoHeader),
        };
        let rest = &mut cx.buffer[..header.length];
        if (&connection.client.socket).read_exact(rest).is_err() {
            return self.finish(cx, key, Outcome::ClientGone);
        }
        if let Some(ends) = header.ends {
            connection.is_of(ends);
        }
        self.enter(cx, key, Stage::AwaitingFirstBytes);
        // The client's bytes behind the header may have arrived already. Then they cause no further
        // edge.
        if self.connections[key].client.look() {
            self.assign(cx, key);
        }
    }

    /// Finds a worker for a connection if no other connection waits; otherwise puts it on the wait
    /// list.
    fn assign(&mut self, cx: &mut Context, key: usize) {
        let connection = &mut self.connections[key];
        // A client that connects and closes at once only checks whether the port is open (a port
        // check by a load balancer, say). Its connect has succeeded; no worker gets the connection.
        if connection.stage == Some(Stage::AwaitingFirstBytes) && connection.client.is_spent() {
            let end = connection.early_end();
            return self.finish(cx, key, end);
        }
        let service = connection.service as usize;
        cx.refresh(service);
        let Service { waiters, handle, pool, .. } = &cx.services[service];
        if waiters.is_empty() && handle.waiting() == 0 {
            match self.find(cx, key, Choice::Clear) {
                Found::Done => {}
                // The wait list was empty, so its new first connection has to start the attempts.
                Found::None(WaitReason::Short(_)) => {
                    self.wait(cx, key);
                    self.advance(cx, service);
                }
                Found::None(why) => self.stay(cx, key, why),
            }
        } else if pool.backends().is_empty() {
            // There is no worker to try.
            self.hold(cx, key);
        } else {
            let is_first = waiters.is_empty() || waiters.doubt.is_some();
            let has_looked = self.connections[key].stage == Some(Stage::AwaitingWorker);
            self.wait(cx, key);
            if has_looked {
                // Its attempt came to nothing in the middle of an advance, which is not begun again
                // from within.
                let retry_at = cx.now + FULL;
                if let Some(Service { waiters, .. }) = cx.services.get_mut(service) {
                    waiters.look_again.get_or_insert(retry_at);
                }
            } else if is_first {
                self.advance(cx, service);
            }
        }
    }

    /// Lets the connections on the wait list look for a worker, longest waiting first, until one
    /// finds none: then the others would not either.
    pub(in crate::proxy) fn advance(&mut self, cx: &mut Context, service: usize) {
        loop {
            let Some(Service { waiters, handle, pool, .. }) = cx.services.get_mut(service) else {
                return;
            };
            waiters.look_again = None;
            if let Some(key) = waiters.looking {
                // A connect on this machine that the kernel has not answered at once is not worth
                // waiting for once another connection has ended: connect again.
                let is_stale = |c: &Connection| c.links.since + STALE <= cx.now;
                if cx.services[service].is_local && is_stale(&self.connections[key]) {
                    self.leave_worker(cx, key);
                    self.connections[key].tried.clear();
                    self.look_for(cx, key, false);
                }
                if cx.services.get(service).is_none_or(|s| s.waiters.looking.is_some()) {
                    return;
                }
                continue;
            }
            let Some((came, key)) = waiters.first() else {
                handle.pass_on(Some(cx.thread));
                return;
            };
            if pool.backends().is_empty() {
                if !self.hold(cx, key) {
                    continue;
                }
                return;
            }
            if !handle.is_turn(cx.thread, came) {
                waiters.look_again = Some(cx.now + SHORT);
                return;
            }
            self.connections[key].tried.clear();
            self.look_for(cx, key, false);
            let Some(Service { waiters, .. }) = cx.services.get_mut(service) else { return };
            if waiters.first() == Some((came, key)) {
                // It still waits. If nothing else triggers its next attempt, a timer has to.
                if waiters.look_again.is_none() && waiters.doubt.is_none() {
                    waiters.look_again = Some(cx.now + SHORT);
                }
                return;
            }
        }
    }

    /// Lets a connection that waits, or that left the wait list for an attempt, try the workers
    /// that it has not tried yet. If `is_last` and all of them refuse, it is given up.
    fn look_for(&mut self, cx: &mut Context, key: usize, is_last: bool) {
        let token = self.token(key, Subject::Client);
        self.shielded(cx, token, |engine, cx, key| match engine.find(cx, key, Choice::Any) {
            Found::Done => {}
            Found::None(WaitReason::Refused) if is_last => {
                engine.finish(cx, key, Outcome::NoWorker)
            }
            Found::None(why) => engine.stay(cx, key, why),
        });
    }

    /// Ends connections that have waited too long, and lets the first one look for a worker if its
    /// time has come.
    fn expire_waiters(&mut self, cx: &mut Context, service: usize) {
        while let Some(of) = cx.services.get(service)
            && let Some((_, key)) = of.waiters.first()
            && of.hold_deadline().is_some_and(|at| at <= cx.now)
        {
            let is_refused = of.waiters.doubt.is_some();
            self.finish(cx, key, if is_refused { Outcome::NoWorker } else { Outcome::HoldTimeout });
        }
        let now = cx.now;
        let Some(Service { waiters, .. }) = cx.services.get_mut(service) else { return };
        if waiters.look_again.is_some_and(|at| at <= now) {
            self.advance(cx, service);
        }
        self.resolve_doubt(cx, service);
    }

    /// Gives up connections that every worker refused and that have waited long enough ([`DOUBT`])
    /// for the supervisor to notice.
    fn resolve_doubt(&mut self, cx: &mut Context, service: usize) {
        while let Some(Service { waiters, .. }) = cx.services.get_mut(service)
            && waiters.doubt.is_some_and(|at| at <= cx.now)
            && let Some((_, key)) = waiters.first()
        {
            if waiters.looking.is_some() {
                waiters.doubt = None;
                return;
            }
            let joined = self.connections[key].links.since;
            if joined + DOUBT > cx.now {
                waiters.doubt = Some(joined + DOUBT);
                return;
            }
            self.connections[key].tried.clear();
            self.look_for(cx, key, true);
            let of = cx.services.get_mut(service);
            if let Some(Service { waiters, .. }) = of
                && waiters.first().is_some_and(|(_, first)| first == key)
            {
                // The connection waits for another reason now.
                waiters.doubt = None;
            }
        }
    }

    /// Tries the workers, beginning with those whose accept queues have room.
    fn find(&mut self, cx: &mut Context, key: usize, choice: Choice) -> Found {
        let service = self.connections[key].service as usize;
        cx.refresh(service);
        let pool = Arc::clone(&cx.services[service].pool);
        let connection = &mut self.connections[key];
        let client = connection.peer().ip();
        let handle = &cx.services[service].handle;
        let (mut is_marked, mut short) = (choice == Choice::Any, None);
        if is_marked {
            handle.mark_crowded();
        }
        loop {
            let mut lease = match pool.pick(client, &mut connection.tried, choice) {
                Ok(lease) => lease,
                Err(NoBackend::Left) => break,
                Err(NoBackend::Congested) => {
                    short.get_or_insert(Shortage::Queues);
                    break;
                }
                Err(NoBackend::HasRoom) if is_marked => {
                    short.get_or_insert(Shortage::Workers);
                    break;
                }
                Err(NoBackend::HasRoom) => {
                    handle.mark_crowded();
                    is_marked = true;
                    continue;
                }
            };
            connection.tried.push(lease.id());
            let was_congested = lease.is_congested();
            // While connections wait because queues are nearly full, a handshake has to complete
            // before the next one begins: the queue may have room when the SYN arrives, and be full
            // when the final ACK does. So the final ACK is not delayed then.
            let bytes_follow = connection.client.is_readable() && choice == Choice::Clear;
            let error = match connect(&mut lease, bytes_follow, pool.routing()) {
                Ok((socket, is_connected)) => {
                    let token = token::of_connection(key, connection.generation, Subject::Worker);
                    let event = EpollEvent::new(Side::INTEREST, token);
                    match cx.epoll.add(&socket, event) {
                        Ok(()) => {
                            connection.worker = Some((Side::new(socket, lease.reach()), lease));
                            if is_connected {
                                self.begin(cx, key, Duration::ZERO);
                                return Found::Done;
                            }
                            let is_look = choice == Choice::Any
                                && (was_congested || cx.services[service].is_local);
                            self.enter(cx, key, Stage::Connecting);
                            cx.services[service].waiters.looking = if is_look {
                                Some(key)
                            } else {
                                cx.services[service].waiters.looking
                            };
                            return Found::Done;
                        }
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            match (Shortage::of(error), error) {
                // Another worker may be reachable: by another port, or over a unix socket.
                (Some(Shortage::Ports), _) => short = Some(Shortage::Ports),
                // Any other worker would fail the same way.
                (Some(own), _) => {
                    short = Some(own);
                    break;
                }
                // On a unix socket: the accept queue is full. (On TCP the SYN would be dropped.)
                (None, Errno::EAGAIN) => {
                    lease.set_congested(true);
                    short.get_or_insert(Shortage::Queues);
                    // Attempts for waiting connections are not counted as refusals, since they are
                    // made often.
                    if choice == Choice::Clear {
                        connection.is_retried = true;
                        lease.count_refusal(ConnectError::Timeout);
                    }
                }
                (None, error) => {
                    connection.is_retried = true;
                    lease.count_refusal(ConnectError::of(error));
                }
            }
            drop(lease);
            if choice == Choice::Clear {
                handle.has_room();
            }
        }
        // An earlier attempt may have failed because of a full queue.
        let was_full = self.connections[key].met_full_queue.then_some(Shortage::Queues);
        match short.or(was_full) {
            Some(short) => Found::None(WaitReason::Short(short)),
            None => Found::None(WaitReason::Refused),
        }
    }

    /// Puts the connection on the wait list for the reason `why`.
    fn stay(&mut self, cx: &mut Context, key: usize, why: WaitReason) {
        let connection = &self.connections[key];
        let (begun, service) = (connection.begun(), connection.service as usize);
        let Service { pool, .. } = &cx.services[service];
        if pool.backends().is_empty() {
            self.hold(cx, key);
            return;
        }
        let is_coming = pool.is_coming_by(begun);
        if !self.wait(cx, key) {
            return;
        }
        let now = cx.now;
        let Service { waiters, handle, pool, .. } = &mut cx.services[service];
        match why {
            WaitReason::Short(short) => {
                if !handle.shortages().lasts(short) {
                    handle.is_short_of(short);
                }
                let pause = if short == Shortage::Queues { FULL } else { SHORT };
                waiters.look_again.get_or_insert(now + pause);
            }
            // Another worker is being started, and will be published in a new pool. But the workers
            // that refused may take the next attempt before that.
            WaitReason::Refused if is_coming => {
                waiters.look_again.get_or_insert(now + SHORT);
            }
            WaitReason::Refused => {
                let doubt = pool.routing().hold_timeout.min(DOUBT);
                waiters.doubt.get_or_insert(now + doubt);
            }
        }
    }

    /// Handles a connection while the pool is empty: it waits if a worker will be started in time,
    /// and else ends. Returns whether it waits.
    fn hold(&mut self, cx: &mut Context, key: usize) -> bool {
        let connection = &self.connections[key];
        let pool = &cx.services[connection.service as usize].pool;
        if pool.is_coming_by(connection.begun()) {
            self.wait(cx, key)
        } else if connection.client.is_spent() {
            self.finish(cx, key, Outcome::ClientGone);
            false
        } else {
            self.finish(cx, key, Outcome::NoWorker);
            false
        }
    }

    /// Puts the connection on the wait list, or keeps it there, unless the client has left. Returns
    /// whether it waits.
    fn wait(&mut self, cx: &mut Context, key: usize) -> bool {
        let connection = &self.connections[key];
        if connection.stage == Some(Stage::AwaitingWorker) {
            return true;
        }
        if connection.client.is_spent() {
            self.finish(cx, key, Outcome::ClientGone);
            return false;
        }
        self.enter(cx, key, Stage::AwaitingWorker);
        true
    }

    /// Handles the first edge of a worker's socket: the worker accepted the connection, or it did
    /// not.
    fn connected(&mut self, cx: &mut Context, key: usize, edge: EpollFlags) {
        if edge.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
            let worker = self.connections[key].worker.as_ref();
            let error = worker.and_then(|(worker, _)| worker.socket.take_error().ok()?);
            self.skip(cx, key, ConnectError::of(error.map_or(Errno::UnknownErrno, errno)));
        } else if edge.contains(EpollFlags::EPOLLOUT) {
            let connection = &self.connections[key];
            let (since, service) = (connection.links.since, connection.service as usize);
            let was_looking = cx.services[service].waiters.looking == Some(key);
            self.begin(cx, key, cx.now - since);
            if was_looking {
                self.advance(cx, service);
            }
        }
    }

    /// Goes from the connect, which took `took`, to the relay.
    fn begin(&mut self, cx: &mut Context, key: usize, took: Duration) {
        let connection = &mut self.connections[key];
        let is_alone = cx.services[connection.service as usize].waiters.is_empty();
        let Some((worker, lease)) = &mut connection.worker else { return };
        lease.pin = None;
        if is_self_connected(&worker.socket, lease) {
            return self.skip(cx, key, ConnectError::Refused);
        }
        if lease.is_displaced() {
            self.leave_worker(cx, key);
            return self.assign(cx, key);
        }
        lease.has_taken = true;
        if is_alone {
            lease.set_congested(false);
        }
        lease.count_taken(cx.thread, took);
        let proxy_protocol = lease.proxy_protocol();
        let counters = connection.service().counters();
        if connection.is_retried {
            counters.count_retried();
        }
        if let Some(since) = connection.held_since {
            counters.count_hold(cx.thread, cx.now - since);
            connection.held_since = None;
        }
        connection.tried = Vec::new();
        self.enter(cx, key, Stage::Relaying);
        if let Some(version) = proxy_protocol
            && let Err(end) = self.connections[key].introduce(version, cx.thread, &mut cx.buffer)
        {
            return self.finish(cx, key, end);
        }
        self.relay(cx, key);
    }

    /// Leaves the worker that did not take the connection, and tries the next.
    fn skip(&mut self, cx: &mut Context, key: usize, refusal: ConnectError) {
        let connection = &mut self.connections[key];
        let service = connection.service as usize;
        let was_looking = cx.services[service].waiters.looking == Some(key);
        if let Some((_, lease)) = &connection.worker {
            connection.is_retried = true;
            if refusal == ConnectError::Timeout {
                connection.met_full_queue = true;
                lease.set_congested(true);
            }
            // Attempts for waiting connections are not counted as refusals, since they are made
            // often.
            if !was_looking || refusal != ConnectError::Timeout {
                lease.count_refusal(refusal);
            }
        }
        self.leave_worker(cx, key);
        if was_looking {
            self.look_for(cx, key, false);
            if cx.services.get(service).is_some_and(|s| s.waiters.looking == Some(key)) {
                return;
            }
            if let Some(Service { waiters, .. }) = cx.services.get_mut(service)
                && waiters.looking.is_none()
                && waiters.look_again.is_none()
                && waiters.doubt.is_none()
            {
                waiters.look_again = Some(cx.now + FULL);
            }
        } else {
            self.assign(cx, key);
        }
    }

    fn leave_worker(&mut self, cx: &mut Context, key: usize) {
        let connection = &mut self.connections[key];
        if let Some((worker, lease)) = connection.worker.take() {
            // Closing the socket deregisters it too, but not while a child that was just forked
            // shares it.
            _ = cx.epoll.delete(&worker.socket);
            drop((worker, lease));
            let Service { waiters, handle, .. } = &cx.services[connection.service as usize];
            // An attempt by a waiting connection that failed has made no room.
            if waiters.looking != Some(key) {
                handle.has_room();
            }
        }
    }

    fn relay(&mut self, cx: &mut Context, key: usize) {
        let connection = &mut self.connections[key];
        let before = connection.bytes();
        match connection.relay(cx.thread, &mut cx.buffer) {
            Ok(Pumped::Done) => {
                let end = connection.own_end();
                return self.finish(cx, key, end);
            }
            Ok(Pumped::Yields) => {
                if !mem::replace(&mut connection.is_runnable, true) {
                    let token = self.token(key, Subject::Client);
                    self.runnable.push(token);
                }
            }
            Ok(Pumped::Waits) => {}
            Err(end) => return self.finish(cx, key, end),
        }
        let connection = &self.connections[key];
        let service = &cx.services[connection.service as usize];
        let age = cx.now.saturating_duration_since(connection.links.since);
        if connection.bytes() > before && age >= grain(service.pool.routing().idle_timeout) {
            self.enter(cx, key, Stage::Relaying);
        }
    }

    /// Ends an idle connection. It sends a FIN to both sides instead of a reset, which makes
    /// programs fail that would otherwise just see the end.
    fn end_idle(&mut self, cx: &mut Context, key: usize) {
        self.connections[key].say_end();
        self.enter(cx, key, Stage::Ending);
        self.look_whether_noticed(cx, key);
    }

    fn look_whether_noticed(&mut self, cx: &mut Context, key: usize) {
        if self.connections[key].has_noticed(&mut cx.buffer) {
            self.finish(cx, key, Outcome::Idle);
        }
    }

    fn enter(&mut self, cx: &mut Context, key: usize, stage: Stage) {
        self.leave(cx, key);
        let connection = &mut self.connections[key];
        connection.stage = Some(stage);
        let service = connection.service as usize;
        if let Some(list) = self.deadlines[service].get_mut(stage as usize) {
            list.push(&mut self.connections, key, cx.now);
            return;
        }
        let service = &mut cx.services[service];
        connection.links = Links::new(cx.now);
        service.handle.begins_to_wait();
        if connection.held_since.is_none() {
            connection.held_since = Some(cx.now);
            service.handle.counters().count_held();
        }
        service.waiters.join(connection.begun(), key);
        service.tell_head(cx.thread);
    }

    fn leave(&mut self, cx: &mut Context, key: usize) {
        let connection = &mut self.connections[key];
        let key_of = connection.service as usize;
        let service = &mut cx.services[key_of];
        let Some(stage) = connection.stage.take() else { return };
        if service.waiters.looking == Some(key) {
            service.waiters.looking = None;
            // If this connection does not return to the list, nothing else triggers the next
            // attempt.
            if !service.waiters.is_empty() {
                service.waiters.look_again.get_or_insert(cx.now);
            }
        }
        if let Some(list) = self.deadlines[key_of].get_mut(stage as usize) {
            list.remove(&mut self.connections, key);
            return;
        }
        let begun = connection.begun();
        service.waiters.leave(begun, key);
        service.tell_head(cx.thread);
        if service.handle.ends_to_wait() {
            service.handle.shortages().end(&Shortage::OF_WORKERS);
        }
    }

    fn finish(&mut self, cx: &mut Context, key: usize, end: Outcome) {
        let stage = self.connections[key].stage;
        let is_taken = matches!(stage, Some(Stage::Relaying | Stage::Ending));
        self.leave(cx, key);
        let mut connection = self.connections.remove(key);
        cx.threads.left(cx.thread);
        connection.end = end;
        match &connection.worker {
            Some((_, lease)) if is_taken => {
                lease.count_end(cx.thread, end, cx.now - connection.begun());
            }
            _ => connection.service().counters().count_end(end),
        }
        if let Some(since) = connection.held_since {
            connection.service().counters().count_hold(cx.thread, cx.now - since);
        }
        cx.leave_service(connection.service as usize);
    }
}

/// How stale the position of a busy connection in the idle list may become before it is moved to
/// the end.
fn grain(idle_timeout: Duration) -> Duration {
    (idle_timeout / 16).min(Duration::from_secs(1))
}
