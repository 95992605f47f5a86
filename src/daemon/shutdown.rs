//! Closing listeners and stopping the daemon, in an order that loses no connection: stop accepting,
//! take the connections that wait in accept queues, stop the workers, then send the rest of their
//! answers to the clients.

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use nix::libc::{SIGINT, SIGQUIT, SIGTERM};
use signal_hook_tokio::Signals;
use tokio::{sync::mpsc, time::sleep_until};
use tracing::{info, warn};

use super::{ABORT_PATIENCE, Daemon, SLACK, Stage, event_log};
use crate::{
    admin,
    config::{Listen, Stop},
    proxy::FrontendId,
    supervisor::Event,
};

impl Daemon<'_> {
    /// Begins a graceful stop: no new connections are accepted, connections in flight end, then the
    /// workers are stopped.
    pub(super) fn stop(&mut self) {
        info!(connections = self.all_held(), "stopping");
        let now = Instant::now();
        self.stage = Stage::Stopping(now);
        let longest = |timeout: fn(&Stop) -> Duration| {
            self.config.services.iter().map(|service| timeout(&service.stop)).max()
        };
        let held = self.config.services.iter().map(|service| service.routing.hold_timeout).max();
        let patience = held.unwrap_or_default()
            + longest(|stop| stop.drain_timeout).unwrap_or_default()
            + longest(|stop| stop.timeout).unwrap_or_default();
        self.manager.shutdown(&self.status_line(), now + patience + SLACK, now);
        self.handle(Event::Stop);
    }

    pub(super) fn abort(&mut self) {
        if matches!(self.stage, Stage::Aborting(_)) {
            return;
        }
        warn!(connections = self.all_held(), "stopping at once");
        let now = Instant::now();
        self.stage = Stage::Aborting(now);
        self.manager.shutdown(&self.status_line(), now + ABORT_PATIENCE + SLACK, now);
        self.handle(Event::Abort);
    }

    /// Stops giving new clients to the workers of `service`, at public addresses that are not in
    /// `keep`.
    pub(super) fn close_publics(&mut self, service: &str, keep: &[Listen]) {
        let frontends = &self.frontends;
        // Where the listener stays open for somebody else, clients wait in its accept queue.
        let stays = |listen: &Listen| {
            frontends.is_passed(listen) || frontends.leads_elsewhere(listen, service)
        };
        self.workers.bindings.direct_listeners.close(service, keep, stays);
    }

    /// Closes these listeners in the background, after accepting every client in their accept
    /// queues.
    pub(super) fn close(&mut self, listeners: Vec<FrontendId>, service: Option<Arc<str>>) {
        let plane = Rc::clone(&self.plane);
        // When lbd stops, clients on the wait list may still get a worker that is due within
        // `hold-timeout`.
        let is_stopping = matches!(self.stage, Stage::Stopping(_));
        let route = service.as_ref().filter(|_| is_stopping);
        let route = route.and_then(|service| self.frontends.service(service)).cloned();
        self.closing.spawn_local(async move {
            for listener in listeners {
                if let Err(error) = plane.close(listener).await {
                    warn!(%error, "clients that came in the last instant may have been reset");
                }
            }
            if let Some(route) = route {
                route.placed().await;
            }
            service
        });
    }

    pub(super) fn closed(&mut self, service: Option<Arc<str>>) {
        if let Some(service) = service {
            if matches!(self.stage, Stage::Stopping(_)) {
                self.tell_draining(&service);
            }
            self.handle(Event::Closed { service });
        }
        if self.closing.is_empty()
            && let Some(askers) = self.reload_wanted.take()
        {
            self.reload(askers);
        }
    }

    fn all_held(&self) -> usize {
        self.supervisor.services().map(|service| self.held(&service.config.name)).sum()
    }

    /// The connections of a service, including those that don't pass through lbd.
    fn held(&self, service: &str) -> usize {
        let relayed = self.frontends.service(service).map_or(0, |route| route.active());
        let workers = self.supervisor.service(service).into_iter().flat_map(|s| s.workers());
        let backends = workers.filter_map(|worker| self.workers.backend(worker.id));
        let direct = backends.filter(|backend| backend.is_direct());
        relayed + direct.filter_map(|backend| backend.connections()).sum::<usize>()
    }

    fn tell_draining(&self, service: &Arc<str>) {
        let held = self.held(service);
        let stop = self.supervisor.service(service).map(|service| &service.config.stop);
        if let (1.., Some(stop)) = (held, stop) {
            let up_to = event_log::seconds(stop.drain_timeout);
            let hint = "a second SIGTERM or Ctrl-C stops at once";
            info!(service = &**service, connections = held, up_to, hint, "draining");
        }
    }

    /// Waits after the last worker has ended, while its last answers are on their way to slow
    /// clients: for the rest of the drain timeout, unless lbd stops at once.
    pub(super) async fn flush(
        &mut self,
        signals: &mut Signals,
        asked: &mut mpsc::Receiver<admin::Request>,
    ) {
        let Stage::Finished(Some(since)) = self.stage else { return };
        let patience = self.config.services.iter().map(|service| service.stop.drain_timeout).max();
        let until = since + patience.unwrap_or_default();
        loop {
            let deadline = self.manager.deadline().map_or(until, |at| at.min(until));
            tokio::select! {
                () = self.frontends.emptied() => return,
                () = sleep_until(deadline.into()) => {
                    if deadline == until {
                        return;
                    }
                }
                Some(request) = asked.recv() => self.request(request),
                Some(signal) = signals.next() => {
                    let again =
                        matches!(signal, SIGTERM | SIGINT) && !self.is_one_of_two(Instant::now());
                    if again || signal == SIGQUIT {
                        return;
                    }
                }
            }
            self.tell_manager();
        }
    }
}
