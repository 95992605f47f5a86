//! The clients that wait for workers which will not take them: they are taken out of the accept
//! queues, for others.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Instant,
};

use super::{Fleet, InheritedPort, InheritedUnix, Member};
use crate::{
    daemon::publics::WATCH_PAUSE,
    net::{Permit, Rescued},
    supervisor::WorkerId,
};

impl Fleet {
    /// Forgets a worker of which nothing is left. Its socket stays, with what waits in it, until
    /// somebody takes it over or [`Self::rescue`] empties it.
    pub(in crate::daemon) fn forget(&mut self, id: WorkerId, permit: impl Fn(&Arc<str>) -> Permit) {
        let Some(member) = self.members.remove(&id) else { return };
        let address = member.upstream.endpoint().inet();
        if member.way.is_some() {
            if member.probe.is_some() {
                self.acceptor.set_permit(Some(permit(&member.service)));
                // Before the kernel moves what waits to somebody who would answer them too.
                let waiting = self.publics.rescue(id, &mut self.acceptor).into_iter();
                let clients = waiting.filter(|socket| !member.is_probe(socket));
                let client = |socket| Rescued { socket, proxy_protocol: None };
                self.left
                    .extend(clients.map(|socket| (Arc::clone(&member.service), client(socket))));
            }
            member.upstream.left();
            self.publics.leave(id, Instant::now());
            self.count_connections();
        } else if let Some(inherited) = address.and_then(|address| self.ports.get_mut(&address)) {
            inherited.port.abandon(id, !member.proven);
            member.upstream.displace(true);
        }
    }

    /// When [`Self::rescue_direct`] is to be called again at the latest.
    pub(in crate::daemon) fn watch_at(&self) -> Option<Instant> {
        (!self.publics.is_empty()).then_some(self.watch_at)
    }

    /// As [`Self::rescue`], of workers that the kernel hands connections to: those that are `ejected`
    /// and those that are gone. Addresses that are not `wanted` and that no worker has
    /// a socket on are let go. `permit` is asked for each connection of a service; without one it stays
    /// where it is.
    pub(in crate::daemon) fn rescue_direct(
        &mut self,
        wanted: &BTreeSet<SocketAddr>,
        ejected: &[WorkerId],
        can_serve: impl Fn(&str) -> bool,
        permit: impl Fn(&Arc<str>) -> Permit,
        now: Instant,
    ) -> Vec<(Arc<str>, Rescued)> {
        let Self { members, acceptor, publics, watch_at, left: waiting, .. } = self;
        // Nothing was put in front of what the kernel gave to them.
        let client = |socket| Rescued { socket, proxy_protocol: None };
        let mut left = publics.tidy(wanted, now, acceptor, &permit);
        if *watch_at <= now {
            *watch_at = now + WATCH_PAUSE;
            left.extend(publics.watch(now, acceptor));
        }
        let left = left.into_iter();
        let left = left.map(|(service, socket)| (service, client(socket)));
        let mut rescued: Vec<_> = std::mem::take(waiting).into_iter().chain(left).collect();
        for id in ejected {
            let Some(member) = members.get(id) else { continue };
            // Not while it is being probed: the probe is for it to answer.
            if member.way.is_some() && !member.probing && can_serve(&member.service) {
                acceptor.set_permit(Some(permit(&member.service)));
                let waiting = publics.rescue(*id, acceptor).into_iter();
                let clients = waiting.filter(|socket| !member.is_probe(socket)).map(client);
                member.prober.forget();
                rescued.extend(clients.map(|client| (Arc::clone(&member.service), client)));
            }
        }
        rescued
    }

    /// Takes the connections out of every accept queue where nobody will: of a worker that is gone,
    /// or one of the `ejected`. They are to be handed to another worker of their service; where none
    /// `can_serve`, they are left to a successor, as long as there `is` such a service. Ports that are
    /// not `needed` any more are closed. `permit` is asked for each connection of a service; without one
    /// it stays where it is, for the next time.
    pub(in crate::daemon) fn rescue(
        &mut self,
        needed: &HashSet<SocketAddr>,
        ejected: &[WorkerId],
        can_serve: impl Fn(&str) -> bool,
        is: impl Fn(&str) -> bool,
        permit: impl Fn(&Arc<str>) -> Permit,
    ) -> Vec<(Arc<str>, Rescued)> {
        let Self { members, acceptor, .. } = self;
        acceptor.begin();
        // Not while it is being probed: the probe is for it to answer.
        let hangs = |id: &WorkerId| {
            ejected.contains(id) && members.get(id).is_some_and(|member| !member.probing)
        };
        let mut rescued = Vec::new();
        self.ports.retain(|address, InheritedPort { port, service }| {
            let stays = needed.contains(address);
            acceptor.set_permit(Some(permit(service)));
            let mut sockets = port.tidy(acceptor);
            if !stays || can_serve(service) {
                sockets.extend(port.rescue(None, acceptor));
            }
            if can_serve(service) {
                let here = |id: &&WorkerId| port.socket(**id).is_some() && hangs(id);
                for &id in ejected.iter().filter(here) {
                    sockets.extend(port.rescue(Some(id), acceptor));
                    forget_probe(members, id);
                }
            }
            rescued.extend(sockets.into_iter().map(|socket| (Arc::clone(service), socket)));
            stays || acceptor.is_short()
        });
        self.nameless.retain(|id, inherited| {
            let InheritedUnix { socket, service, proxy_protocol } = inherited;
            let is_gone = !members.contains_key(id);
            let is_over = is_gone && (can_serve(service) || !is(service));
            if is_over {
                // Who comes by an older pool goes to another worker.
                _ = socket.refuse();
            }
            if is_over || can_serve(service) && hangs(id) {
                forget_probe(members, *id);
                let connection = |socket| {
                    let proxy_protocol = *proxy_protocol;
                    (Arc::clone(service), Rescued { socket, proxy_protocol })
                };
                acceptor.set_permit(Some(permit(service)));
                rescued.extend(socket.rescue(acceptor).into_iter().map(connection));
            }
            !is_over || acceptor.is_short()
        });
        rescued
    }

    /// Whether connections were left where nobody accepts them, since there was no room for more.
    pub(in crate::daemon) fn has_left_some(&self) -> bool {
        self.acceptor.is_short()
    }
}

/// What was waiting for a worker was taken out of its queue, and a probe's connection with it.
fn forget_probe(members: &HashMap<WorkerId, Member>, id: WorkerId) {
    if let Some(member) = members.get(&id) {
        member.prober.forget();
    }
}
