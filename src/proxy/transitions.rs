//! The steps of a connection: placed with a worker, or held, relayed, ended.

use std::{
    io::{self, Read},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::epoll::{EpollEvent, EpollFlags},
};
use socket2::{Domain, Socket};

use super::{
    backend::{Backend, Lease},
    connection::{Connection, Outcome, Stage},
    counters::ConnectError,
    deadlines::Links,
    listener::keepalive,
    pool::{Choice, NoBackend},
    reactor::{Reactor, Service, Subject, grain},
    relay::{Pumped, Side},
    shortage::Shortage,
};
use crate::{
    config::Routing,
    net::proxy_protocol::{LONGEST_RECEIVED, NoHeader, received},
};

/// How long it takes until the next look at whether a worker's accept queue still is full.
const FULL: Duration = Duration::from_millis(5);

/// The same for what lbd itself is short of, and the longest that those wait whom nobody tells of
/// room.
const SHORT: Duration = Duration::from_millis(50);

/// How old a look has to be for another one to make sense.
const STALE: Duration = Duration::from_millis(1);

/// How long a connection that every worker of the pool refused waits for the supervisor to notice: a
/// worker's death is known within milliseconds, and its successor is then on its way.
const DOUBT: Duration = Duration::from_millis(250);

/// What became of an attempt to find a worker.
enum Found {
    /// The connection has one, or is being connected, or is no more.
    Done,
    /// None: this is why.
    None(WaitReason),
}

/// Why there is no worker for a connection, though there are some in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WaitReason {
    /// Each of them refused it.
    Refused,
    /// Not all of them did, and for the others there is too little of this.
    Short(Shortage),
}

impl Reactor {
    /// Follows one edge of a connection.
    pub(super) fn step(&mut self, key: usize, side: Subject, edge: EpollFlags) {
        let connection = &mut self.connections[key];
        let is_broken = edge.contains(EpollFlags::EPOLLERR);
        match (side, &mut connection.worker) {
            (Subject::Worker, Some((worker, _))) => worker.note(edge),
            (Subject::Worker, None) => return,
            _ => connection.client.note(edge),
        }
        match (connection.stage, side) {
            (Some(Stage::Relaying), side) => {
                self.relay(key);
                // Where it couldn't be read for what is in front of it.
                let end = if side == Subject::Worker {
                    Outcome::WorkerReset
                } else {
                    Outcome::ClientReset
                };
                if is_broken && self.connections.contains(key) {
                    self.finish(key, end);
                }
            }
            (Some(Stage::Ending), _) => self.look_whether_noticed(key),
            (Some(Stage::Connecting), Subject::Worker) => self.connected(key, edge),
            (Some(Stage::AwaitingFirstBytes | Stage::AwaitingHeader), _) if is_broken => {
                let end = connection.early_end();
                self.finish(key, end);
            }
            (Some(Stage::Connecting), _) if is_broken => self.finish(key, Outcome::ClientGone),
            (Some(Stage::AwaitingHeader), _) => self.read_header(key),
            (Some(Stage::AwaitingFirstBytes), _) if connection.client.is_readable() => {
                self.assign(key)
            }
            (Some(Stage::AwaitingFirstBytes | Stage::Connecting), _) => {}
            _ if is_broken || connection.client.is_spent() => self.finish(key, Outcome::ClientGone),
            _ => {}
        }
    }

    /// Reads the PROXY header as far as it has come, and goes on when it is whole.
    fn read_header(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        if !connection.client.is_readable() {
            return;
        }
        let begin = &mut self.buffer[..LONGEST_RECEIVED];
        let received = match connection.client.peek(begin) {
            Ok(0) => return self.finish(key, Outcome::NothingSaid),
            Ok(count) => received(&begin[..count]).map(|header| (header, count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => return self.finish(key, Outcome::ClientGone),
        };
        let header = match received {
            Ok((Some(header), count)) if header.length <= count => header,
            // The rest makes another edge.
            Ok((_, count)) if count < LONGEST_RECEIVED && !connection.client.is_closed() => return,
            Ok(_) | Err(NoHeader) => return self.finish(key, Outcome::NoHeader),
        };
        let rest = &mut self.buffer[..header.length];
        if (&connection.client.socket).read_exact(rest).is_err() {
            return self.finish(key, Outcome::ClientGone);
        }
        if let Some(ends) = header.ends {
            connection.is_of(ends);
        }
        self.enter(key, Stage::AwaitingFirstBytes);
        // What is behind it may be there already, and makes no edge of its own then.
        if self.connections[key].client.look() {
            self.assign(key);
        }
    }

    /// Finds a worker for a connection that none waits in front of; else it waits behind them.
    pub(super) fn assign(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        // Whoever only looks whether somebody is there has an answer, and the worker no connection.
        if connection.stage == Some(Stage::AwaitingFirstBytes) && connection.client.is_spent() {
            let end = connection.early_end();
            return self.finish(key, end);
        }
        let service = connection.service as usize;
        self.refresh(service);
        let Service { line, route, pool, .. } = &self.services[service];
        if line.is_empty() && route.held() == 0 {
            match self.find(key, Choice::Clear) {
                Found::Done => {}
                // An empty line needs somebody who looks.
                Found::None(WaitReason::Short(_)) => {
                    self.wait(key);
                    self.advance(service);
                }
                Found::None(why) => self.stay(key, why),
            }
        } else if pool.backends().is_empty() {
            // Nothing to look for.
            self.hold(key);
        } else {
            let is_first = line.is_empty() || line.doubt.is_some();
            self.wait(key);
            if is_first {
                self.advance(service);
            }
        }
    }

    /// Has those that wait for a worker look for one, longest waiting first, until one finds none: the
    /// others would not either.
    pub(super) fn advance(&mut self, service: usize) {
        loop {
            let Some(Service { line, route, pool, .. }) = self.services.get_mut(service) else {
                return;
            };
            line.look_again = None;
            if let Some(key) = line.looking {
                // A connect that the kernel has not answered at once on this machine is not worth
                // waiting for when somebody has left: it asks again.
                let is_stale = |c: &Connection| c.links.since + STALE <= self.now;
                if self.services[service].is_local && is_stale(&self.connections[key]) {
                    self.leave_worker(key);
                    self.connections[key].tried.clear();
                    self.look_for(key, false);
                }
                if self.services.get(service).is_none_or(|s| s.line.looking.is_some()) {
                    return;
                }
                continue;
            }
            let Some((came, key)) = line.first() else {
                route.pass_on(Some(self.thread));
                return;
            };
            if pool.backends().is_empty() {
                if !self.hold(key) {
                    continue;
                }
                return;
            }
            if !route.is_turn(self.thread, came) {
                line.look_again = Some(self.now + SHORT);
                return;
            }
            self.connections[key].tried.clear();
            self.look_for(key, false);
            let Some(Service { line, .. }) = self.services.get_mut(service) else { return };
            if line.first() == Some((came, key)) {
                // It waits on, and where nothing else will, the clock has it look again.
                if line.look_again.is_none() && line.doubt.is_none() {
                    line.look_again = Some(self.now + SHORT);
                }
                return;
            }
        }
    }

    /// Has one that waits, or has left the line for a look, try the workers that it has not tried. Where
    /// it `is_last`, and all refuse it, it is given up.
    fn look_for(&mut self, key: usize, is_last: bool) {
        let token = self.token(key, Subject::Client);
        self.shielded(token, |reactor, key| match reactor.find(key, Choice::Any) {
            Found::Done => {}
            Found::None(WaitReason::Refused) if is_last => reactor.finish(key, Outcome::NoWorker),
            Found::None(why) => reactor.stay(key, why),
        });
    }

    /// Ends the waiting of those who have waited too long, and has the first look whose time it is.
    pub(super) fn expire_line(&mut self, service: usize) {
        while let Some(of) = self.services.get(service)
            && let Some((_, key)) = of.line.first()
            && of.hold_deadline().is_some_and(|at| at <= self.now)
        {
            let is_refused = of.line.doubt.is_some();
            self.finish(key, if is_refused { Outcome::NoWorker } else { Outcome::HoldTimeout });
        }
        let now = self.now;
        let Some(Service { line, .. }) = self.services.get_mut(service) else { return };
        if line.look_again.is_some_and(|at| at <= now) {
            self.advance(service);
        }
        self.resolve_doubt(service);
    }

    /// Gives up those that were refused by all and have given the supervisor time to notice.
    fn resolve_doubt(&mut self, service: usize) {
        while let Some(Service { line, .. }) = self.services.get_mut(service)
            && line.doubt.is_some_and(|at| at <= self.now)
            && let Some((_, key)) = line.first()
        {
            if line.looking.is_some() {
                line.doubt = None;
                return;
            }
            let joined = self.connections[key].links.since;
            if joined + DOUBT > self.now {
                line.doubt = Some(joined + DOUBT);
                return;
            }
            self.connections[key].tried.clear();
            self.look_for(key, true);
            let of = self.services.get_mut(service);
            if let Some(Service { line, .. }) = of
                && line.first().is_some_and(|(_, first)| first == key)
            {
                // It waits for something else now.
                line.doubt = None;
            }
        }
    }

    /// Tries the workers, those first whose queues have room.
    fn find(&mut self, key: usize, choice: Choice) -> Found {
        let service = self.connections[key].service as usize;
        self.refresh(service);
        let pool = Arc::clone(&self.services[service].pool);
        let connection = &mut self.connections[key];
        let client = connection.peer().ip();
        let route = &self.services[service].route;
        let (mut is_marked, mut short) = (choice == Choice::Any, None);
        if is_marked {
            route.mark_crowded();
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
                    route.mark_crowded();
                    is_marked = true;
                    continue;
                }
            };
            connection.tried.push(lease.id());
            let was_congested = lease.is_congested();
            // Where queues are nearly full, a handshake is to be over before the next one begins: there
            // is room for a connection when its SYN comes and perhaps not when its end does.
            let bytes_follow = connection.client.is_readable() && choice == Choice::Clear;
            let error = match connect(&mut lease, bytes_follow, pool.routing()) {
                Ok((socket, is_connected)) => {
                    let token = u64::from(connection.generation) << 34
                        | (key as u64) << 2
                        | Subject::Worker as u64;
                    let event = EpollEvent::new(Side::INTEREST, token);
                    match self.epoll.add(&socket, event) {
                        Ok(()) => {
                            connection.worker = Some((Side::new(socket, lease.reach()), lease));
                            if is_connected {
                                self.begin(key, Duration::ZERO);
                                return Found::Done;
                            }
                            let is_look = choice == Choice::Any
                                && (was_congested || self.services[service].is_local);
                            self.enter(key, Stage::Connecting);
                            self.services[service].line.looking = if is_look {
                                Some(key)
                            } else {
                                self.services[service].line.looking
                            };
                            return Found::Done;
                        }
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            match (Shortage::of(error), error) {
                // From another port, or by another way, the next one may be reached.
                (Some(Shortage::Ports), _) => short = Some(Shortage::Ports),
                // That would be so with any other.
                (Some(own), _) => {
                    short = Some(own);
                    break;
                }
                // On unix: its queue is full, as a TCP one would be that drops the SYN.
                (None, Errno::EAGAIN) => {
                    lease.set_congested(true);
                    short.get_or_insert(Shortage::Queues);
                    // Looks are not counted: they are made for those that wait, and often.
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
                route.has_room();
            }
        }
        // What came to nothing because of a full queue, before this attempt.
        let was_full = self.connections[key].met_full_queue.then_some(Shortage::Queues);
        match short.or(was_full) {
            Some(short) => Found::None(WaitReason::Short(short)),
            None => Found::None(WaitReason::Refused),
        }
    }

    /// Waits, for that reason, in the line.
    fn stay(&mut self, key: usize, why: WaitReason) {
        let connection = &self.connections[key];
        let (begun, service) = (connection.begun(), connection.service as usize);
        let Service { pool, .. } = &self.services[service];
        if pool.backends().is_empty() {
            self.hold(key);
            return;
        }
        let is_coming = pool.is_coming_by(begun);
        if !self.wait(key) {
            return;
        }
        let now = self.now;
        let Service { line, route, pool, .. } = &mut self.services[service];
        match why {
            WaitReason::Short(short) => {
                if !route.shortages().lasts(short) {
                    route.is_short_of(short);
                }
                let pause = if short == Shortage::Queues { FULL } else { SHORT };
                line.look_again.get_or_insert(now + pause);
            }
            // It is published when it is there; but those that refused may take the next one before.
            WaitReason::Refused if is_coming => {
                line.look_again.get_or_insert(now + SHORT);
            }
            WaitReason::Refused => {
                let doubt = pool.routing().hold_timeout.min(DOUBT);
                line.doubt.get_or_insert(now + doubt);
            }
        }
    }

    /// Waits where there are no workers, if one is on its way. Whether it does.
    fn hold(&mut self, key: usize) -> bool {
        let connection = &self.connections[key];
        let pool = &self.services[connection.service as usize].pool;
        if pool.is_coming_by(connection.begun()) {
            self.wait(key)
        } else if connection.client.is_spent() {
            self.finish(key, Outcome::ClientGone);
            false
        } else {
            self.finish(key, Outcome::NoWorker);
            false
        }
    }

    /// Joins those that wait, or stays among them, unless the client has left. Whether it does.
    fn wait(&mut self, key: usize) -> bool {
        let connection = &self.connections[key];
        if connection.stage == Some(Stage::AwaitingWorker) {
            return true;
        }
        if connection.client.is_spent() {
            self.finish(key, Outcome::ClientGone);
            return false;
        }
        self.enter(key, Stage::AwaitingWorker);
        true
    }

    /// The first edge of a worker's socket: it took the connection, or it didn't.
    fn connected(&mut self, key: usize, edge: EpollFlags) {
        if edge.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
            let worker = self.connections[key].worker.as_ref();
            let error = worker.and_then(|(worker, _)| worker.socket.take_error().ok()?);
            self.skip(key, ConnectError::of(error.map_or(Errno::UnknownErrno, errno)));
        } else if edge.contains(EpollFlags::EPOLLOUT) {
            let connection = &self.connections[key];
            let (since, service) = (connection.links.since, connection.service as usize);
            let was_looking = self.services[service].line.looking == Some(key);
            self.begin(key, self.now - since);
            if was_looking {
                self.advance(service);
            }
        }
    }

    /// Goes from the connect, which took so long, to the relay.
    fn begin(&mut self, key: usize, took: Duration) {
        let connection = &mut self.connections[key];
        let is_alone = self.services[connection.service as usize].line.is_empty();
        let Some((worker, lease)) = &mut connection.worker else { return };
        lease.pass = None;
        if is_self_connected(&worker.socket, lease) {
            return self.skip(key, ConnectError::Refused);
        }
        if lease.is_displaced() {
            self.leave_worker(key);
            return self.assign(key);
        }
        lease.has_taken = true;
        if is_alone {
            lease.set_congested(false);
        }
        lease.count_taken(self.thread, took);
        let proxy_protocol = lease.proxy_protocol();
        let counters = connection.service().counters();
        if connection.is_retried {
            counters.count_retried();
        }
        if let Some(since) = connection.held_since {
            counters.count_hold(self.thread, self.now - since);
            connection.held_since = None;
        }
        connection.tried = Vec::new();
        self.enter(key, Stage::Relaying);
        if let Some(version) = proxy_protocol
            && let Err(end) = self.connections[key].introduce(version, &mut self.buffer)
        {
            return self.finish(key, end);
        }
        self.relay(key);
    }

    /// Leaves the worker that didn't take the connection, and tries the next.
    pub(super) fn skip(&mut self, key: usize, refusal: ConnectError) {
        let connection = &mut self.connections[key];
        let service = connection.service as usize;
        let was_looking = self.services[service].line.looking == Some(key);
        if let Some((_, lease)) = &connection.worker {
            connection.is_retried = true;
            if refusal == ConnectError::Timeout {
                connection.met_full_queue = true;
                lease.set_congested(true);
            }
            // Looks are not counted: they are made for those that wait, and often.
            if !was_looking || refusal != ConnectError::Timeout {
                lease.count_refusal(refusal);
            }
        }
        self.leave_worker(key);
        if was_looking {
            self.look_for(key, false);
            if self.services.get(service).is_some_and(|s| s.line.looking == Some(key)) {
                return;
            }
            if let Some(Service { line, .. }) = self.services.get_mut(service)
                && line.looking.is_none()
                && line.look_again.is_none()
                && line.doubt.is_none()
            {
                line.look_again = Some(self.now + FULL);
            }
        } else {
            self.assign(key);
        }
    }

    fn leave_worker(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        if let Some((worker, lease)) = connection.worker.take() {
            // The close does it as well, but not while a fork in progress shares the socket.
            _ = self.epoll.delete(&worker.socket);
            drop((worker, lease));
            let Service { line, route, .. } = &self.services[connection.service as usize];
            // After a look there is as much room as before it.
            if line.looking != Some(key) {
                route.has_room();
            }
        }
    }

    pub(super) fn relay(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        let before = connection.bytes();
        match connection.relay(&mut self.buffer) {
            Ok(Pumped::Done) => {
                let end = connection.own_end();
                return self.finish(key, end);
            }
            Ok(Pumped::Yields) => {
                if !std::mem::replace(&mut connection.is_runnable, true) {
                    let token = self.token(key, Subject::Client);
                    self.runnable.push(token);
                }
            }
            Ok(Pumped::Waits) => {}
            Err(end) => return self.finish(key, end),
        }
        let connection = &self.connections[key];
        let service = &self.services[connection.service as usize];
        let age = self.now.saturating_duration_since(connection.links.since);
        if connection.bytes() > before && age >= grain(service.pool.routing().idle_timeout) {
            self.enter(key, Stage::Relaying);
        }
    }

    /// Ends a connection that no byte came over for too long: not by cutting it off, which makes
    /// programs fail that would otherwise take it for what it is.
    pub(super) fn end_idle(&mut self, key: usize) {
        self.connections[key].say_end();
        self.enter(key, Stage::Ending);
        self.look_whether_noticed(key);
    }

    fn look_whether_noticed(&mut self, key: usize) {
        if self.connections[key].has_noticed(&mut self.buffer) {
            self.finish(key, Outcome::Idle);
        }
    }

    pub(super) fn enter(&mut self, key: usize, stage: Stage) {
        self.leave(key);
        let connection = &mut self.connections[key];
        connection.stage = Some(stage);
        let service = &mut self.services[connection.service as usize];
        if let Some(queue) = service.queue(stage) {
            queue.push(&mut self.connections, key, self.now);
            return;
        }
        connection.links = Links::new(self.now);
        service.route.begins_to_wait();
        if connection.held_since.is_none() {
            connection.held_since = Some(self.now);
            service.route.counters().count_held();
        }
        service.line.join(connection.begun(), key);
        service.tell_head(self.thread);
    }

    fn leave(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        let service = &mut self.services[connection.service as usize];
        let Some(stage) = connection.stage.take() else { return };
        if service.line.looking == Some(key) {
            service.line.looking = None;
            // Where it does not come back, nobody else has those behind it look.
            if !service.line.is_empty() {
                service.line.look_again.get_or_insert(self.now);
            }
        }
        if let Some(queue) = service.queue(stage) {
            queue.remove(&mut self.connections, key);
            return;
        }
        let begun = connection.begun();
        service.line.leave(begun, key);
        service.tell_head(self.thread);
        if service.route.ends_to_wait() {
            service.route.shortages().end(&Shortage::OF_WORKERS);
        }
    }

    pub(super) fn finish(&mut self, key: usize, end: Outcome) {
        let stage = self.connections[key].stage;
        let is_taken = matches!(stage, Some(Stage::Relaying | Stage::Ending));
        self.leave(key);
        let mut connection = self.connections.remove(key);
        self.threads.left(self.thread);
        connection.end = end;
        match &connection.worker {
            Some((_, lease)) if is_taken => {
                lease.count_end(self.thread, end, self.now - connection.begun());
            }
            _ => connection.service().counters().count_end(end),
        }
        if let Some(since) = connection.held_since {
            connection.service().counters().count_hold(self.thread, self.now - since);
        }
        self.leave_service(connection.service as usize);
    }
}

/// Begins to connect, and tells whether it is done; else an edge tells how it went.
///
/// On loopback the handshake is over when connect() returns, though it says EINPROGRESS: it held the
/// socket's lock while the answer came. A second call asks, and saves a turn of the loop, and the
/// worker a wakeup for a connection without its first bytes.
///
/// Where the client's bytes are about to follow, they are to end the handshake too: its last segment
/// is not sent by itself (tcp(7), `TCP_QUICKACK`), so that the worker is woken once, for a connection
/// with a request in it, and not before. Were there none after all, the kernel would send it 200 ms
/// later.
///
/// On loopback the kernel tells at once when the other end is gone; elsewhere somebody has to ask.
fn connect(
    backend: &mut Lease,
    bytes_follow: bool,
    routing: &Routing,
) -> Result<(Socket, bool), Errno> {
    let domain = backend.domain();
    let (socket, pass) = backend.socket().map_err(errno)?;
    backend.pass = pass;
    if domain != Domain::UNIX {
        socket.set_tcp_nodelay(true).map_err(errno)?;
        if bytes_follow && backend.is_local() {
            socket.set_tcp_quickack(false).map_err(errno)?;
        }
        if !backend.is_local() {
            socket.set_tcp_keepalive(&keepalive(routing.keepalive)).map_err(errno)?;
        }
    }
    for _ in 0..2 {
        match backend.endpoint().connect(&socket).map_err(errno) {
            Ok(()) => return Ok((socket, true)),
            Err(Errno::EINPROGRESS) if backend.is_local() => {}
            Err(Errno::EINPROGRESS | Errno::EALREADY) => break,
            Err(error) => return Err(error),
        }
    }
    Ok((socket, false))
}

fn errno(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// Whether the system gave the connection the very port it was to reach, and so connected it to
/// itself (RFC 9293, section 3.5, simultaneous open): nobody listens there.
fn is_self_connected(socket: &Socket, backend: &Backend) -> bool {
    let at = backend.endpoint().address();
    backend.is_ephemeral() && socket.local_addr().is_ok_and(|local| local == *at)
}
