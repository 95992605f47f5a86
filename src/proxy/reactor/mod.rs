//! A data thread: its loop, which calls the acceptor and the engine.

mod acceptor;

use std::{io, mem, sync::Arc, time::Instant};

use nix::sys::epoll::{EpollEvent, EpollTimeout};

use super::{
    tcp,
    thread::{
        context::Context,
        threads::{Command, Threads},
        token::{self, Subject},
    },
};
use acceptor::Acceptor;

/// How many edges are taken from the kernel at once.
const EDGES: usize = 256;

pub(super) struct Reactor {
    cx: Context,
    acceptor: Acceptor,
    tcp: tcp::Engine,
    /// How many worker exits it has handled.
    exits: u64,
}

impl Reactor {
    /// # Errors
    /// If no descriptors are left.
    pub(super) fn new(threads: Arc<Threads>, thread: usize) -> io::Result<Self> {
        let cx = Context::new(threads, thread)?;
        Ok(Self { cx, acceptor: Acceptor::default(), tcp: tcp::Engine::default(), exits: 0 })
    }

    /// Runs until the stop command, and then resets all its connections.
    pub(super) fn run(mut self) {
        let mut edges = vec![EpollEvent::empty(); EDGES];
        loop {
            let timeout = if self.tcp.has_runnable() { Some(self.cx.now) } else { self.deadline() };
            // It can fail with EINTR; its other errors mean a wrong argument.
            let count = self.cx.epoll.wait(&mut edges, self.timeout(timeout)).unwrap_or(0);
            self.cx.now = Instant::now();
            self.cx.threads.count_turn(self.cx.thread);

            let mut is_woken = false;
            let mut clients = Vec::new();
            let runnable = self.tcp.take_runnable();
            for edge in &edges[..count] {
                let token = edge.data();
                match Subject::of(token) {
                    Subject::Wakeup => is_woken = true,
                    Subject::Listener => clients.push(token::frontend(token)),
                    Subject::Client | Subject::Worker => {
                        self.tcp.follow(&mut self.cx, token, edge.events());
                    }
                }
            }
            for token in runnable {
                self.tcp.run(&mut self.cx, token);
            }
            if is_woken && self.run_commands() {
                break;
            }
            if timeout.is_some_and(|deadline| deadline <= self.cx.now) {
                self.expire();
            }
            // Accept last, so that no connection of this turn gets the key of one that ended in the
            // same turn.
            for id in clients {
                self.acceptor.accept(&mut self.cx, &mut self.tcp, id);
            }
        }
        self.tcp.finish_all(&mut self.cx);
    }

    /// Runs the queued commands of the main thread. Returns true on the stop command.
    fn run_commands(&mut self) -> bool {
        let Self { cx, acceptor, tcp, .. } = self;
        let mut stops = false;
        for command in cx.threads.commands(cx.thread) {
            match command {
                Command::Open { id, frontend } => acceptor.open(cx, id.0, frontend),
                Command::Retarget { id, target } => acceptor.retarget(cx, id.0, target),
                Command::Close { id, done } => acceptor.close(cx, tcp, id.0, done),
                Command::Adopt { connection, client, permit } => {
                    tcp.adopt(cx, connection, client, permit);
                }
                Command::Take { connection, peer, permit, begun } => {
                    let service = cx.use_service(permit.service());
                    tcp.admit(cx, service, permit, connection, peer, begun);
                    cx.leave_service(service);
                }
                Command::AssignAll { done } => {
                    tcp.assign_all(cx);
                    drop(done);
                }
                Command::Stop => stops = true,
            }
        }
        if stops {
            return true;
        }
        for service in cx.service_keys() {
            if !cx.services.contains(service) {
                continue;
            }
            cx.refresh(service);
            if cx.services[service].is_news() {
                tcp.advance(cx, service);
            }
        }
        let exits = cx.threads.exits();
        if mem::replace(&mut self.exits, exits) != exits {
            tcp.leave_exited(cx);
        }
        acceptor.retry(cx, tcp);
        false
    }

    /// Handles expired deadlines.
    fn expire(&mut self) {
        for service in self.cx.service_keys() {
            self.tcp.expire(&mut self.cx, service);
        }
        self.acceptor.tend(&mut self.cx, &mut self.tcp);
    }

    /// The next deadline.
    fn deadline(&self) -> Option<Instant> {
        self.tcp.deadline(&self.cx).into_iter().chain(self.acceptor.deadline()).min()
    }

    /// The epoll timeout until `deadline`, rounded up, so as not to wake up early and wait again.
    fn timeout(&self, deadline: Option<Instant>) -> EpollTimeout {
        let Some(deadline) = deadline else { return EpollTimeout::NONE };
        if deadline <= self.cx.now {
            return EpollTimeout::ZERO;
        }
        let wait = deadline.saturating_duration_since(Instant::now());
        let millis = wait.as_micros().div_ceil(1_000);
        i32::try_from(millis).ok().and_then(|m| m.try_into().ok()).unwrap_or(EpollTimeout::MAX)
    }
}
