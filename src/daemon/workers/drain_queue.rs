//! The clients that wait for workers which will not take them: they are taken out of the accept
//! queues, for others.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Instant,
};

use super::{InheritedPort, InheritedUnix, WorkerHandle, WorkerTable};
use crate::{
    daemon::direct_listeners::WATCH_PAUSE,
    net::{DrainedConnection, MayAccept},
    supervisor::WorkerId,
};

impl WorkerTable {
    /// Forgets a worker of which nothing is left. Its socket stays, with what waits in it, until
    /// somebody takes it over or [`Self::drain_queue`] empties it.
    pub(in crate::daemon) fn forget(
        &mut self,
        id: WorkerId,
        permit: impl Fn(&Arc<str>) -> MayAccept,
    ) {
        let Some(handle) = self.handles.remove(&id) else { return };
        let address = handle.backend.endpoint().inet();
        if handle.pinned.is_some() {
            if handle.probe.is_some() {
                self.acceptor.set_permit(Some(permit(&handle.service)));
                // Before the kernel moves what waits to somebody who would answer them too.
                let waiting = self.direct_listeners.drain_queue(id, &mut self.acceptor).into_iter();
                let clients = waiting.filter(|socket| !handle.is_probe(socket));
                let client = |socket| DrainedConnection { socket, proxy_protocol: None };
                self.left
                    .extend(clients.map(|socket| (Arc::clone(&handle.service), client(socket))));
            }
            handle.backend.left();
            self.direct_listeners.leave(id, Instant::now());
            self.count_connections();
        } else if let Some(inherited) = address.and_then(|address| self.ports.get_mut(&address)) {
            inherited.port.abandon(id, !handle.proven);
            handle.backend.displace(true);
        }
    }

    /// When [`Self::drain_direct_queues`] is to be called again at the latest.
    pub(in crate::daemon) fn watch_at(&self) -> Option<Instant> {
        (!self.direct_listeners.is_empty()).then_some(self.watch_at)
    }

    /// As [`Self::drain_queue`], of workers that the kernel hands connections to: those that are `ejected`
    /// and those that are gone. Addresses that are not `wanted` and that no worker has
    /// a socket on are let go. `permit` is asked for each connection of a service; without one it stays
    /// where it is.
    pub(in crate::daemon) fn drain_direct_queues(
        &mut self,
        wanted: &BTreeSet<SocketAddr>,
        ejected: &[WorkerId],
        can_serve: impl Fn(&str) -> bool,
        permit: impl Fn(&Arc<str>) -> MayAccept,
        now: Instant,
    ) -> Vec<(Arc<str>, DrainedConnection)> {
        let Self { handles, acceptor, direct_listeners, watch_at, left: waiting, .. } = self;
        // Nothing was put in front of what the kernel gave to them.
        let client = |socket| DrainedConnection { socket, proxy_protocol: None };
        let mut left = direct_listeners.collect_leftovers(wanted, now, acceptor, &permit);
        if *watch_at <= now {
            *watch_at = now + WATCH_PAUSE;
            left.extend(direct_listeners.watch(now, acceptor));
        }
        let left = left.into_iter();
        let left = left.map(|(service, socket)| (service, client(socket)));
        let mut drained: Vec<_> = std::mem::take(waiting).into_iter().chain(left).collect();
        for id in ejected {
            let Some(handle) = handles.get(id) else { continue };
            // Not while it is being probed: the probe is for it to answer.
            if handle.pinned.is_some() && !handle.probing && can_serve(&handle.service) {
                acceptor.set_permit(Some(permit(&handle.service)));
                let waiting = direct_listeners.drain_queue(*id, acceptor).into_iter();
                let clients = waiting.filter(|socket| !handle.is_probe(socket)).map(client);
                handle.prober.forget();
                drained.extend(clients.map(|client| (Arc::clone(&handle.service), client)));
            }
        }
        drained
    }

    /// Takes the connections out of every accept queue where nobody will: of a worker that is gone,
    /// or one of the `ejected`. They are to be handed to another worker of their service; where none
    /// `can_serve`, they are left to a successor, as long as there `is` such a service. Ports that are
    /// not `needed` any more are closed. `permit` is asked for each connection of a service; without one
    /// it stays where it is, for the next time.
    pub(in crate::daemon) fn drain_queue(
        &mut self,
        needed: &HashSet<SocketAddr>,
        ejected: &[WorkerId],
        can_serve: impl Fn(&str) -> bool,
        is: impl Fn(&str) -> bool,
        permit: impl Fn(&Arc<str>) -> MayAccept,
    ) -> Vec<(Arc<str>, DrainedConnection)> {
        let Self { handles, acceptor, .. } = self;
        acceptor.begin();
        // Not while it is being probed: the probe is for it to answer.
        let hangs = |id: &WorkerId| {
            ejected.contains(id) && handles.get(id).is_some_and(|handle| !handle.probing)
        };
        let mut drained = Vec::new();
        self.ports.retain(|address, InheritedPort { port, service }| {
            let stays = needed.contains(address);
            acceptor.set_permit(Some(permit(service)));
            let mut sockets = port.collect_leftovers(acceptor);
            if !stays || can_serve(service) {
                sockets.extend(port.drain_queue(None, acceptor));
            }
            if can_serve(service) {
                let here = |id: &&WorkerId| port.socket(**id).is_some() && hangs(id);
                for &id in ejected.iter().filter(here) {
                    sockets.extend(port.drain_queue(Some(id), acceptor));
                    forget_probe(handles, id);
                }
            }
            drained.extend(sockets.into_iter().map(|socket| (Arc::clone(service), socket)));
            stays || acceptor.is_short()
        });
        self.unnamed.retain(|id, inherited| {
            let InheritedUnix { socket, service, proxy_protocol } = inherited;
            let is_gone = !handles.contains_key(id);
            let is_over = is_gone && (can_serve(service) || !is(service));
            if is_over {
                // Who comes by an older pool goes to another worker.
                _ = socket.refuse();
            }
            if is_over || can_serve(service) && hangs(id) {
                forget_probe(handles, *id);
                let connection = |socket| {
                    let proxy_protocol = *proxy_protocol;
                    (Arc::clone(service), DrainedConnection { socket, proxy_protocol })
                };
                acceptor.set_permit(Some(permit(service)));
                drained.extend(socket.drain_queue(acceptor).into_iter().map(connection));
            }
            !is_over || acceptor.is_short()
        });
        drained
    }

    /// Whether connections were left where nobody accepts them, since there was no room for more.
    pub(in crate::daemon) fn has_left_some(&self) -> bool {
        self.acceptor.is_short()
    }
}

/// What was waiting for a worker was taken out of its queue, and a probe's connection with it.
fn forget_probe(handles: &HashMap<WorkerId, WorkerHandle>, id: WorkerId) {
    if let Some(handle) = handles.get(&id) {
        handle.prober.forget();
    }
}
