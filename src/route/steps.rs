//! The steps of a connection: placed with a worker, or held, relayed, ended.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::epoll::{EpollEvent, EpollFlags},
};
use socket2::{Domain, Socket};

use super::{
    connection::{End, Stage},
    pool::{Nobody, Pool},
    reactor::{Reactor, Subject, grain},
    relay::{Pumped, Side},
    tally::Refusal,
    upstream::{Lease, Upstream},
};

/// How long it takes until the next look at whether a worker's accept queue still is full.
const FULL: Duration = Duration::from_millis(5);

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
                let end = if side == Subject::Worker { End::WorkerReset } else { End::ClientReset };
                if is_broken && self.connections.contains(key) {
                    self.finish(key, end);
                }
            }
            (Some(Stage::Connecting), Subject::Worker) => self.connected(key, edge),
            (Some(Stage::Fresh | Stage::Connecting), _) if is_broken => {
                self.finish(key, End::ClientGone);
            }
            (Some(Stage::Fresh), _) if connection.client.is_readable() => self.place(key),
            (Some(Stage::Fresh), _) => {}
            (Some(Stage::Connecting), _) => {}
            _ if is_broken || connection.client.is_spent() => self.finish(key, End::ClientGone),
            _ => {}
        }
    }

    /// Tries the next worker, or else waits for one, or else gives up.
    pub(super) fn place(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        let service = connection.service as usize;
        let client = connection.peer().ip();
        self.refresh(service);
        let pool = Arc::clone(&self.services[service].pool);
        let connection = &mut self.connections[key];
        let route = &self.services[service].route;
        let is_next = connection.stage == Some(Stage::Crowded);
        if !is_next && self.services[service].queues[Stage::Crowded as usize].first().is_some() {
            return self.crowd(key);
        }
        let (mut is_marked, mut is_full) = (false, false);
        loop {
            let mut lease = match pool.pick(client, &mut connection.tried) {
                Ok(lease) => lease,
                Err(Nobody::Left) => break,
                Err(Nobody::HasRoom) if is_marked => return self.crowd(key),
                Err(Nobody::HasRoom) => {
                    route.mark_crowded();
                    is_marked = true;
                    continue;
                }
            };
            connection.tried.push(lease.id());
            match connect(&mut lease, connection.client.is_readable()) {
                Ok((socket, is_connected)) => {
                    let token = u64::from(connection.generation) << 34
                        | (key as u64) << 2
                        | Subject::Worker as u64;
                    let event = EpollEvent::new(Side::INTEREST, token);
                    if self.epoll.add(&socket, event).is_err() {
                        drop(lease);
                        return self.finish(key, End::Failed);
                    }
                    connection.worker = Some((Side::new(socket, lease.reach()), lease));
                    if is_connected {
                        return self.begin(key, Duration::ZERO);
                    }
                    return self.enter(key, Stage::Connecting, self.now);
                }
                // Not the worker's fault, and no other's connect would fare better.
                Err(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM) => {}
                // On unix: its queue is full, as a TCP one would be that drops the SYN.
                Err(Errno::EAGAIN) => {
                    is_full = true;
                    if !is_next {
                        connection.is_retried = true;
                        lease.count_refusal(Refusal::Timeout);
                    }
                }
                Err(error) => {
                    connection.is_retried = true;
                    lease.count_refusal(Refusal::of(error));
                }
            }
            drop(lease);
            route.has_room();
        }
        if is_full {
            return self.queue(key);
        }
        self.hold(key, &pool);
    }

    /// Waits for a worker whose accept queue has room. Nobody tells of that, so it is looked for.
    fn queue(&mut self, key: usize) {
        let service = &mut self.services[self.connections[key].service as usize];
        service.look_again.get_or_insert(self.now + FULL);
        self.crowd(key);
    }

    /// Waits for a worker that has room for one more.
    fn crowd(&mut self, key: usize) {
        let connection = &self.connections[key];
        if connection.client.is_spent() {
            self.finish(key, End::ClientGone);
        } else if connection.stage != Some(Stage::Crowded) {
            // Whoever waits there already keeps its place among those that came with it.
            self.enter(key, Stage::Crowded, connection.begun());
        }
    }

    fn hold(&mut self, key: usize, pool: &Pool) {
        let connection = &self.connections[key];
        let begun = connection.begun();
        let until = begun.checked_add(pool.routing().hold_timeout);
        if connection.client.is_spent() {
            self.finish(key, End::ClientGone);
        } else if pool.coming().is_some_and(|at| until.is_none_or(|until| at <= until)) {
            self.enter(key, Stage::Held, begun);
        } else if !pool.upstreams().is_empty() {
            self.enter(key, Stage::Doubtful, self.now);
        } else {
            self.finish(key, End::NoWorker);
        }
    }

    /// The first edge of a worker's socket: it took the connection, or it didn't.
    fn connected(&mut self, key: usize, edge: EpollFlags) {
        if edge.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP) {
            let worker = self.connections[key].worker.as_ref();
            let error = worker.and_then(|(worker, _)| worker.socket.take_error().ok()?);
            self.skip(key, Refusal::of(error.map_or(Errno::UnknownErrno, errno)));
        } else if edge.contains(EpollFlags::EPOLLOUT) {
            let since = self.connections[key].links.since;
            self.begin(key, self.now - since);
        }
    }

    /// Goes from the connect, which took so long, to the relay.
    fn begin(&mut self, key: usize, took: Duration) {
        let connection = &mut self.connections[key];
        if let Some((_, lease)) = &mut connection.worker {
            lease.pass = None;
        }
        let Some((worker, lease)) = &connection.worker else { return };
        if is_self_connected(&worker.socket, lease) {
            return self.skip(key, Refusal::Refused);
        }
        if lease.is_displaced() {
            self.leave_worker(key);
            return self.place(key);
        }
        lease.count_taken(self.thread, took);
        let counters = connection.service().counters();
        if connection.is_retried {
            counters.count_retried();
        }
        if let Some(since) = connection.held_since {
            counters.count_hold(self.thread, self.now - since);
            connection.held_since = None;
        }
        connection.tried = Vec::new();
        let proxy_protocol = lease.proxy_protocol();
        self.enter(key, Stage::Relaying, self.now);
        if let Some(version) = proxy_protocol
            && let Err(end) = self.connections[key].introduce(version, &mut self.buffer)
        {
            return self.finish(key, end);
        }
        self.relay(key);
    }

    /// Leaves the worker that didn't take the connection, and tries the next.
    pub(super) fn skip(&mut self, key: usize, refusal: Refusal) {
        let connection = &mut self.connections[key];
        if let Some((_, lease)) = &connection.worker {
            connection.is_retried = true;
            lease.count_refusal(refusal);
        }
        self.leave_worker(key);
        self.place(key);
    }

    fn leave_worker(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        if let Some((worker, lease)) = connection.worker.take() {
            // The close does it as well, but not while a fork in progress shares the socket.
            _ = self.epoll.delete(&worker.socket);
            drop((worker, lease));
            self.services[connection.service as usize].route.has_room();
        }
    }

    pub(super) fn relay(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        let before = connection.bytes();
        match connection.relay(&mut self.buffer) {
            Ok(Pumped::Done) => return self.finish(key, End::Closed),
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
            self.enter(key, Stage::Relaying, self.now);
        }
    }

    pub(super) fn enter(&mut self, key: usize, stage: Stage, since: Instant) {
        self.leave(key);
        let connection = &mut self.connections[key];
        connection.stage = Some(stage);
        let service = &mut self.services[connection.service as usize];
        if stage.is_waiting() {
            service.route.count_waiting(true);
            if connection.held_since.is_none() {
                connection.held_since = Some(self.now);
                service.route.counters().count_held();
            }
        }
        service.queues[stage as usize].insert(&mut self.connections, key, since);
    }

    fn leave(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        let service = &mut self.services[connection.service as usize];
        if let Some(stage) = connection.stage.take() {
            if stage.is_waiting() {
                service.route.count_waiting(false);
            }
            service.queues[stage as usize].remove(&mut self.connections, key);
        }
    }

    pub(super) fn finish(&mut self, key: usize, end: End) {
        let is_taken = self.connections[key].stage == Some(Stage::Relaying);
        self.leave(key);
        let mut connection = self.connections.remove(key);
        self.crew.left(self.thread);
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
fn connect(upstream: &mut Lease, bytes_follow: bool) -> Result<(Socket, bool), Errno> {
    let domain = upstream.domain();
    let (socket, pass) = upstream.socket().map_err(errno)?;
    upstream.pass = pass;
    if domain != Domain::UNIX {
        socket.set_tcp_nodelay(true).map_err(errno)?;
        if bytes_follow && upstream.is_local() {
            socket.set_tcp_quickack(false).map_err(errno)?;
        }
    }
    for _ in 0..2 {
        match upstream.endpoint().connect(&socket).map_err(errno) {
            Ok(()) => return Ok((socket, true)),
            Err(Errno::EINPROGRESS) if upstream.is_local() => {}
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
fn is_self_connected(socket: &Socket, upstream: &Upstream) -> bool {
    let at = upstream.endpoint().address();
    upstream.is_ephemeral() && socket.local_addr().is_ok_and(|local| local == *at)
}
