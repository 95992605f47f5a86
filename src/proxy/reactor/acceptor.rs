//! The accept loop of a data thread.

use std::{
    collections::BTreeMap,
    mem,
    time::{Duration, Instant},
};

use nix::sys::epoll::{EpollEvent, EpollFlags};
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::net::AcceptFailure;
use crate::proxy::{
    balance::{ServiceHandle, Shortage},
    tcp,
    thread::{
        context::Context,
        frontend::{Frontend, Target},
        threads::Command,
        token,
    },
};

/// How many clients are accepted on one listener before other events get their turn.
const ACCEPTS: usize = 4;

/// How long a listener pauses after lbd had no descriptor or memory for a client.
const PAUSE: Duration = Duration::from_millis(100);

/// How long a TCP listener that is being closed waits for handshakes whose last segment is still in
/// transit. The kernel has answered their SYNs, so the client may see them as complete.
const HANDSHAKE: Duration = Duration::from_millis(200);

/// The frontends on which a thread accepts, by their numbers.
#[derive(Default)]
pub(super) struct Acceptor(BTreeMap<u32, OpenFrontend>);

struct OpenFrontend {
    frontend: Frontend,
    /// The thread's key of the target's service.
    service: usize,
    state: State,
    closing: Option<Closing>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The listener is registered with epoll.
    Open,
    /// A connection limit is reached. The thread is woken when there may be room.
    Full,
    /// Not accepting until this instant.
    Paused(Instant),
}

struct Closing {
    /// From this instant on, the listener is closed when its accept queue is empty.
    at: Instant,
    /// Until this instant, clients in the accept queue may wait for a permit. It is bounded because
    /// whatever would release a permit may itself wait for this close.
    until: Instant,
    /// Dropped when the thread has released the listener.
    _done: mpsc::Sender<()>,
}

impl Acceptor {
    /// The next time at which [`Self::tend`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.0.values().filter_map(OpenFrontend::deadline).min()
    }

    /// Starts accepting on a frontend.
    pub(super) fn open(&mut self, cx: &mut Context, id: u32, frontend: Frontend) {
        let service = cx.use_service(service_of(&frontend.target));
        let state = State::Paused(cx.now);
        self.0.insert(id, OpenFrontend { frontend, service, state, closing: None });
        self.resume(cx, id);
    }

    /// Uses `target` for clients accepted from now on.
    pub(super) fn retarget(&mut self, cx: &mut Context, id: u32, target: Target) {
        let Some(open) = self.0.get_mut(&id) else { return };
        let former = mem::replace(&mut open.service, cx.use_service(service_of(&target)));
        open.frontend.target = target;
        cx.leave_service(former);
    }

    /// Begins to close a frontend. What is queued is accepted first, unless another process will
    /// serve the queue.
    pub(super) fn close(
        &mut self,
        cx: &mut Context,
        tcp: &mut tcp::Engine,
        id: u32,
        done: mpsc::Sender<()>,
    ) {
        let Some(open) = self.0.get_mut(&id) else { return };
        let listener = &open.frontend.listener;
        let (is_tcp, is_shared) = (listener.is_tcp(), listener.is_shared());
        let at = if is_tcp && !is_shared { cx.now + HANDSHAKE } else { cx.now };
        // The same time as clients wait for a worker.
        let patience = cx.services[open.service].pool.routing().hold_timeout;
        let until = at.checked_add(patience).unwrap_or(at);
        open.closing = Some(Closing { at, until, _done: done });
        if is_shared {
            self.let_go_if_closed(cx, id);
        } else {
            self.accept(cx, tcp, id);
        }
    }

    /// Retries the frontends that had reached a limit: there may be room now.
    pub(super) fn retry(&mut self, cx: &mut Context, tcp: &mut tcp::Engine) {
        for id in self.due(|open| open.state == State::Full) {
            self.resume(cx, id);
            self.accept(cx, tcp, id);
        }
    }

    /// Continues the frontends whose pause is over, and those that are closing.
    pub(super) fn tend(&mut self, cx: &mut Context, tcp: &mut tcp::Engine) {
        let now = cx.now;
        for id in self.due(|open| open.deadline().is_some_and(|at| at <= now)) {
            self.resume(cx, id);
            // Where epoll won't have it again, nobody can be accepted.
            if self.0.get(&id).is_some_and(|open| open.state != State::Open && open.gives_up(now)) {
                self.let_go(cx, id);
                continue;
            }
            self.accept(cx, tcp, id);
        }
    }

    /// Accepts waiting clients, within the limits.
    pub(super) fn accept(&mut self, cx: &mut Context, tcp: &mut tcp::Engine, id: u32) {
        for _ in 0..ACCEPTS {
            let Some(open) = self.0.get(&id).filter(|open| open.state == State::Open) else {
                return;
            };
            let (Frontend { listener, target }, service) = (&open.frontend, open.service);
            let permit = match target.permit() {
                Ok(permit) => permit,
                // No client waits yet, and epoll reports when one does.
                Err(_) if !listener.has_clients(open.closing.is_some()) => {
                    return self.let_go_if_closed(cx, id);
                }
                Err(what) => {
                    let handle = service_of(target);
                    if open.gives_up(cx.now) {
                        return self.let_go(cx, id);
                    }
                    if !handle.shortages().lasts(what) {
                        handle.is_short_of(what);
                    }
                    return self.pause(cx, id, State::Full);
                }
            };
            match listener.accept() {
                Ok((socket, peer)) => {
                    if listener.recovers() {
                        info!(listen = %listener.listen(), "accepting again");
                    }
                    // While other connections wait for a worker, a new one stays on this thread:
                    // each thread has a wait list of its own, and on this one it queues behind
                    // them, as a rule.
                    let stays = permit.service().waiting() > 0;
                    match cx.threads.seat(cx.thread, stays) {
                        own if own == cx.thread => {
                            tcp.admit(cx, service, permit, socket, peer, cx.now);
                        }
                        other => {
                            let begun = cx.now;
                            let take = Command::Take { connection: socket, peer, permit, begun };
                            cx.threads.tell_one(other, take);
                        }
                    }
                }
                Err(error) => match AcceptFailure::of(&error) {
                    AcceptFailure::Empty => {
                        permit.service().shortages().end(&Shortage::OF_LISTENERS);
                        drop(permit);
                        return self.let_go_if_closed(cx, id);
                    }
                    AcceptFailure::Lost => {}
                    AcceptFailure::Exhausted if open.gives_up(cx.now) => {
                        drop(permit);
                        return self.let_go(cx, id);
                    }
                    AcceptFailure::Exhausted => {
                        if listener.fails() {
                            warn!(listen = %listener.listen(), %error, "can't accept; clients wait");
                        }
                        return self.pause(cx, id, State::Paused(cx.now + PAUSE));
                    }
                },
            }
        }
    }

    fn let_go_if_closed(&mut self, cx: &mut Context, id: u32) {
        let is_over =
            |open: &OpenFrontend| open.closing.as_ref().is_some_and(|closing| closing.at <= cx.now);
        if self.0.get(&id).is_some_and(is_over) {
            self.let_go(cx, id);
        }
    }

    fn let_go(&mut self, cx: &mut Context, id: u32) {
        if let Some(OpenFrontend { frontend, service, closing, .. }) = self.0.remove(&id) {
            _ = cx.epoll.delete(&*frontend.listener);
            // In this order: when all threads have dropped `done`, the socket is closed.
            drop(frontend);
            drop(closing);
            cx.leave_service(service);
        }
    }

    fn resume(&mut self, cx: &mut Context, id: u32) {
        let Some(open) = self.0.get_mut(&id).filter(|open| open.state != State::Open) else {
            return;
        };
        // Exclusive: one client wakes one thread, not all of them (epoll_ctl(2)).
        let interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLEXCLUSIVE;
        let event = EpollEvent::new(interest, token::of_listener(id));
        open.state = match cx.epoll.add(&*open.frontend.listener, event) {
            Ok(()) => State::Open,
            Err(_) => State::Paused(cx.now + PAUSE),
        };
    }

    fn pause(&mut self, cx: &mut Context, id: u32, state: State) {
        if let Some(open) = self.0.get_mut(&id) {
            open.state = state;
            _ = cx.epoll.delete(&*open.frontend.listener);
        }
    }

    fn due(&self, wanted: impl Fn(&OpenFrontend) -> bool) -> Vec<u32> {
        self.0.iter().filter(|(_, open)| wanted(open)).map(|(&id, _)| id).collect()
    }
}

impl OpenFrontend {
    fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Open => self.closing.as_ref().map(|closing| closing.at),
            State::Full => self.closing.as_ref().map(|closing| closing.until),
            State::Paused(until) => Some(until),
        }
    }

    /// Whether the frontend is closing, and its clients have waited for a permit as long as they
    /// may.
    fn gives_up(&self, now: Instant) -> bool {
        self.closing.as_ref().is_some_and(|closing| closing.until <= now)
    }
}

fn service_of(target: &Target) -> &std::sync::Arc<ServiceHandle> {
    match target {
        Target::Tcp(service) => service,
    }
}
