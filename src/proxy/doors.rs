//! A data thread's accept loop: it only accepts.

use std::{
    collections::BTreeMap,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::epoll::{EpollEvent, EpollFlags},
};
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::{
    crew::Command,
    listener::Listener,
    reactor::{Reactor, door_token},
    service::Place,
    shortage::Shortage,
};

/// Clients accepted at one door before everybody else gets a turn.
const ACCEPTS: usize = 4;

/// How long a door stays shut that found no descriptor or memory for a client.
const PAUSE: Duration = Duration::from_millis(100);

/// How long a closed TCP listener waits for handshakes whose last segment is still on its way. The
/// kernel has answered those, so that they may be complete in the client's eyes.
const HANDSHAKE: Duration = Duration::from_millis(200);

/// The listeners that a thread accepts from.
#[derive(Default)]
pub(super) struct Doors(BTreeMap<u32, Door>);

struct Door {
    listener: Arc<Listener>,
    service: usize,
    state: State,
    closing: Option<Closing>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// epoll tells of clients.
    Open,
    /// There is no place; the bell tells when there is.
    Full,
    /// Until then.
    Paused(Instant),
}

struct Closing {
    /// From then on, an empty queue is the last of it.
    at: Instant,
    /// Until then, those in the queue may wait for a place; what gives one may wait for this to end.
    until: Instant,
    /// Dropped when the thread has let go.
    _done: mpsc::Sender<()>,
}

/// What accept() came back with.
enum Accept {
    Empty,
    /// That client is gone; the next may be there.
    Lost,
    /// There is no descriptor or memory left, or something that's just as likely to last.
    Exhausted,
}

impl Doors {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.0.values().filter_map(Door::deadline).min()
    }
}

impl Door {
    fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Open => self.closing.as_ref().map(|closing| closing.at),
            State::Full => self.closing.as_ref().map(|closing| closing.until),
            State::Paused(until) => Some(until),
        }
    }
}

impl Reactor {
    pub(super) fn open_door(&mut self, id: u32, listener: Arc<Listener>, service: usize) {
        let state = State::Paused(self.now);
        self.doors.0.insert(id, Door { listener, service, state, closing: None });
        self.open(id);
    }

    /// Whoever comes from now on is a client of `service`.
    pub(super) fn reassign_door(&mut self, id: u32, service: usize) {
        let former = match self.doors.0.get_mut(&id) {
            Some(door) => std::mem::replace(&mut door.service, service),
            None => service,
        };
        self.leave_service(former);
    }

    /// Begins to close: what is queued is accepted first, unless the queue has a next owner.
    pub(super) fn close_door(&mut self, id: u32, done: mpsc::Sender<()>) {
        let Some(door) = self.doors.0.get_mut(&id) else { return };
        let lasts = door.listener.is_tcp() && !door.listener.is_shared();
        let at = if lasts { self.now + HANDSHAKE } else { self.now };
        // As long as clients wait for a worker.
        let patience = self.services[door.service].pool.routing().hold_timeout;
        let until = at.checked_add(patience).unwrap_or(at);
        door.closing = Some(Closing { at, until, _done: done });
        if door.listener.is_shared() {
            self.let_go_if_closed(id);
        } else {
            self.accept(id);
        }
    }

    /// Opens the doors that were full: there may be places now.
    pub(super) fn retry_doors(&mut self) {
        for id in self.due(|door| door.state == State::Full) {
            self.open(id);
            self.accept(id);
        }
    }

    /// Opens the doors whose pause is over, and goes on with those that close.
    pub(super) fn tend_doors(&mut self) {
        let now = self.now;
        for id in self.due(|door| door.deadline().is_some_and(|at| at <= now)) {
            self.open(id);
            self.accept(id);
        }
    }

    /// Accepts who waits, as far as there are places.
    pub(super) fn accept(&mut self, id: u32) {
        for _ in 0..ACCEPTS {
            let Some(door) = self.doors.0.get(&id).filter(|door| door.state == State::Open) else {
                return;
            };
            let (listener, service) = (Arc::clone(&door.listener), door.service);
            let is_closing = door.closing.is_some();
            let route = &self.services[service].route;
            let place = match Place::take(route) {
                Ok(place) => place,
                // Nobody is kept waiting yet, and epoll tells when somebody is.
                Err(_) if !listener.has_clients(is_closing) => return self.let_go_if_closed(id),
                Err(what) => {
                    if self.gives_up(id) {
                        return;
                    }
                    let route = &self.services[service].route;
                    if !route.shortages().lasts(what) {
                        route.is_short_of(what);
                    }
                    return self.shut(id, State::Full);
                }
            };
            match listener.accept() {
                Ok((socket, peer)) => {
                    if listener.recovers() {
                        info!(listen = %listener.listen(), "accepting again");
                    }
                    // Who comes while others wait for a worker queues behind them, as a rule: each thread
                    // has a queue of its own.
                    let stays = place.service().held() > 0;
                    match self.crew.seat(self.thread, stays) {
                        own if own == self.thread => {
                            self.admit(service, place, socket, peer, None, self.now);
                        }
                        other => {
                            let begun = self.now;
                            let take = Command::Take { connection: socket, peer, place, begun };
                            self.crew.tell_one(other, take);
                        }
                    }
                }
                Err(error) => match classify(&error) {
                    Accept::Empty => {
                        place.service().shortages().end(&Shortage::OF_DOORS);
                        drop(place);
                        return self.let_go_if_closed(id);
                    }
                    Accept::Lost => {}
                    Accept::Exhausted if self.gives_up(id) => return,
                    Accept::Exhausted => {
                        if listener.fails() {
                            warn!(listen = %listener.listen(), %error, "can't accept; clients wait");
                        }
                        return self.shut(id, State::Paused(self.now + PAUSE));
                    }
                },
            }
        }
    }

    fn let_go_if_closed(&mut self, id: u32) {
        let is_over = |door: &Door| door.closing.as_ref().is_some_and(|c| c.at <= self.now);
        if self.doors.0.get(&id).is_some_and(is_over) {
            self.let_go(id);
        }
    }

    /// Lets go of a door whose clients have waited for a place for as long as they may; whether it
    /// is one.
    fn gives_up(&mut self, id: u32) -> bool {
        let is_over = |door: &Door| door.closing.as_ref().is_some_and(|c| c.until <= self.now);
        let gives_up = self.doors.0.get(&id).is_some_and(is_over);
        if gives_up {
            self.let_go(id);
        }
        gives_up
    }

    fn let_go(&mut self, id: u32) {
        if let Some(Door { listener, service, closing, .. }) = self.doors.0.remove(&id) {
            _ = self.epoll.delete(&*listener);
            // In this order: when all threads are done, the socket is closed.
            drop(listener);
            drop(closing);
            self.leave_service(service);
        }
    }

    fn open(&mut self, id: u32) {
        let Some(door) = self.doors.0.get_mut(&id).filter(|door| door.state != State::Open) else {
            return;
        };
        // Exclusive: one client wakes one thread, and not all of them (epoll_ctl(2)).
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        let event = EpollEvent::new(interest, door_token(id));
        door.state = match self.epoll.add(&*door.listener, event) {
            Ok(()) => State::Open,
            Err(_) => State::Paused(self.now + PAUSE),
        };
    }

    fn shut(&mut self, id: u32, state: State) {
        if let Some(door) = self.doors.0.get_mut(&id) {
            door.state = state;
            _ = self.epoll.delete(&*door.listener);
        }
    }

    fn due(&self, wanted: impl Fn(&Door) -> bool) -> Vec<u32> {
        self.doors.0.iter().filter(|(_, door)| wanted(door)).map(|(&id, _)| id).collect()
    }
}

/// accept(2) passes on what went wrong with the client's connection before it was accepted.
fn classify(error: &io::Error) -> Accept {
    match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
        // EINVAL: a unix socket that is shut down for reading, with nobody left in its queue.
        Errno::EAGAIN | Errno::EINVAL => Accept::Empty,
        Errno::ECONNABORTED
        | Errno::EINTR
        | Errno::EPROTO
        | Errno::EPERM
        | Errno::ENETDOWN
        | Errno::ENOPROTOOPT
        | Errno::EHOSTDOWN
        | Errno::ENONET
        | Errno::EHOSTUNREACH
        | Errno::EOPNOTSUPP
        | Errno::ENETUNREACH => Accept::Lost,
        _ => Accept::Exhausted,
    }
}
