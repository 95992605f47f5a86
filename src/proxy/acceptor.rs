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
    listener::Listener,
    reactor::{Reactor, listener_token},
    service::Permit,
    shortage::Shortage,
    threads::Command,
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
pub(super) struct Acceptor(BTreeMap<u32, OpenListener>);

struct OpenListener {
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

impl Acceptor {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.0.values().filter_map(OpenListener::deadline).min()
    }
}

impl OpenListener {
    fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Open => self.closing.as_ref().map(|closing| closing.at),
            State::Full => self.closing.as_ref().map(|closing| closing.until),
            State::Paused(until) => Some(until),
        }
    }
}

impl Reactor {
    pub(super) fn open_listener(&mut self, id: u32, listener: Arc<Listener>, service: usize) {
        let state = State::Paused(self.now);
        self.acceptor.0.insert(id, OpenListener { listener, service, state, closing: None });
        self.open(id);
    }

    /// Whoever comes from now on is a client of `service`.
    pub(super) fn reassign_listener(&mut self, id: u32, service: usize) {
        let former = match self.acceptor.0.get_mut(&id) {
            Some(open) => std::mem::replace(&mut open.service, service),
            None => service,
        };
        self.leave_service(former);
    }

    /// Begins to close: what is queued is accepted first, unless the queue has a next owner.
    pub(super) fn close_listener(&mut self, id: u32, done: mpsc::Sender<()>) {
        let Some(open) = self.acceptor.0.get_mut(&id) else { return };
        let lasts = open.listener.is_tcp() && !open.listener.is_shared();
        let at = if lasts { self.now + HANDSHAKE } else { self.now };
        // As long as clients wait for a worker.
        let patience = self.services[open.service].pool.routing().hold_timeout;
        let until = at.checked_add(patience).unwrap_or(at);
        open.closing = Some(Closing { at, until, _done: done });
        if open.listener.is_shared() {
            self.let_go_if_closed(id);
        } else {
            self.accept(id);
        }
    }

    /// Opens the doors that were full: there may be places now.
    pub(super) fn retry_listeners(&mut self) {
        for id in self.due(|open| open.state == State::Full) {
            self.open(id);
            self.accept(id);
        }
    }

    /// Opens the doors whose pause is over, and goes on with those that close.
    pub(super) fn tend_listeners(&mut self) {
        let now = self.now;
        for id in self.due(|open| open.deadline().is_some_and(|at| at <= now)) {
            self.open(id);
            self.accept(id);
        }
    }

    /// Accepts who waits, as far as there are places.
    pub(super) fn accept(&mut self, id: u32) {
        for _ in 0..ACCEPTS {
            let Some(open) = self.acceptor.0.get(&id).filter(|open| open.state == State::Open)
            else {
                return;
            };
            let (listener, service) = (Arc::clone(&open.listener), open.service);
            let is_closing = open.closing.is_some();
            let route = &self.services[service].route;
            let permit = match Permit::take(route) {
                Ok(permit) => permit,
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
                    let stays = permit.service().held() > 0;
                    match self.threads.seat(self.thread, stays) {
                        own if own == self.thread => {
                            self.admit(service, permit, socket, peer, None, self.now);
                        }
                        other => {
                            let begun = self.now;
                            let take = Command::Take { connection: socket, peer, permit, begun };
                            self.threads.tell_one(other, take);
                        }
                    }
                }
                Err(error) => match classify(&error) {
                    Accept::Empty => {
                        permit.service().shortages().end(&Shortage::OF_LISTENERS);
                        drop(permit);
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
        let is_over = |open: &OpenListener| open.closing.as_ref().is_some_and(|c| c.at <= self.now);
        if self.acceptor.0.get(&id).is_some_and(is_over) {
            self.let_go(id);
        }
    }

    /// Lets go of a door whose clients have waited for a place for as long as they may; whether it
    /// is one.
    fn gives_up(&mut self, id: u32) -> bool {
        let is_over =
            |open: &OpenListener| open.closing.as_ref().is_some_and(|c| c.until <= self.now);
        let gives_up = self.acceptor.0.get(&id).is_some_and(is_over);
        if gives_up {
            self.let_go(id);
        }
        gives_up
    }

    fn let_go(&mut self, id: u32) {
        if let Some(OpenListener { listener, service, closing, .. }) = self.acceptor.0.remove(&id) {
            _ = self.epoll.delete(&*listener);
            // In this order: when all threads are done, the socket is closed.
            drop(listener);
            drop(closing);
            self.leave_service(service);
        }
    }

    fn open(&mut self, id: u32) {
        let Some(open) = self.acceptor.0.get_mut(&id).filter(|open| open.state != State::Open)
        else {
            return;
        };
        // Exclusive: one client wakes one thread, and not all of them (epoll_ctl(2)).
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        let event = EpollEvent::new(interest, listener_token(id));
        open.state = match self.epoll.add(&*open.listener, event) {
            Ok(()) => State::Open,
            Err(_) => State::Paused(self.now + PAUSE),
        };
    }

    fn shut(&mut self, id: u32, state: State) {
        if let Some(open) = self.acceptor.0.get_mut(&id) {
            open.state = state;
            _ = self.epoll.delete(&*open.listener);
        }
    }

    fn due(&self, wanted: impl Fn(&OpenListener) -> bool) -> Vec<u32> {
        self.acceptor.0.iter().filter(|(_, open)| wanted(open)).map(|(&id, _)| id).collect()
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
