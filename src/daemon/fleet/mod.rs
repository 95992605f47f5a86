//! The worker processes, as the driver handles them: it starts, signals and probes them as the supervisor
//! asks, and turns what becomes of them into events.

mod gauges;
mod listening;
mod rescue;
mod start;

use std::{
    cell::Cell,
    collections::HashMap,
    io,
    net::SocketAddr,
    num::NonZeroU32,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use socket2::Socket;
use tokio::{
    sync::{Notify, mpsc},
    task::spawn_local,
};

use super::{descriptors::Descriptors, ledger::Ledger, publics::Publics};
use crate::{
    config::{Balance, Health, ProxyProtocol, StopTo},
    net::{self, Acceptor, Nameless, Port, Rescued, direct::Way},
    probe::{self, Prober},
    process::{Cgroups, Controller, Counted, LastWords, Outputs, Spawner, Watched},
    proxy::Upstream,
    supervisor::{Event, ProbeOutcome, Verdict, WORKERS_ON_A_PORT, WorkerId},
};
use gauges::Gauges;
use listening::Listening;

const _: () = assert!(WORKERS_ON_A_PORT == net::SHARERS);

/// All worker processes of the daemon.
#[derive(Debug)]
pub(super) struct Fleet {
    spawner: Spawner,
    outputs: Outputs,
    descriptors: Descriptors,
    events: mpsc::Sender<Event>,
    /// Notified when a retired worker's last connection ends.
    idle: Arc<Notify>,
    members: HashMap<WorkerId, Member>,
    pub(super) ledger: Ledger,
    /// The ports whose sockets workers inherit.
    ports: HashMap<SocketAddr, InheritedPort>,
    /// The unix sockets that workers inherit, those of workers that are gone with what waits there.
    nameless: HashMap<WorkerId, InheritedUnix>,
    /// Where one can be made.
    folder: PathBuf,
    /// The public addresses that workers have sockets on.
    pub(super) publics: Publics,
    /// When they are looked after again.
    watch_at: Instant,
    /// Clients that waited for workers which are gone, to be handed over.
    left: Vec<(Arc<str>, Rescued)>,
    acceptor: Acceptor,
    cgroups: Option<Cgroups>,
    gauges: Gauges,
}

/// A port whose sockets workers inherit, and the service whose workers do.
#[derive(Debug)]
struct InheritedPort {
    port: Port<WorkerId>,
    service: Arc<str>,
}

/// A unix socket that a worker inherits.
#[derive(Debug)]
struct InheritedUnix {
    socket: Nameless,
    service: Arc<str>,
    proxy_protocol: Option<ProxyProtocol>,
}

/// One worker.
#[derive(Debug)]
struct Member {
    controller: Controller,
    guard: i32,
    service: Arc<str>,
    upstream: Arc<Upstream>,
    retired: bool,
    /// A probe is on its way.
    probing: bool,
    /// A probe has passed.
    proven: bool,
    /// How lbd reaches it, where the kernel hands it connections.
    way: Option<Way>,
    prober: Prober,
    listening: Listening,
    /// A copy of the probe's socket while that may wait in the accept queue of a worker that has `way`:
    /// nobody else has its port meanwhile, and what comes from there is no client.
    probe: Option<Socket>,
    /// What it said last.
    last_words: LastWords,
    /// A probe has passed: known to whoever tells of its end.
    was_healthy: Rc<Cell<bool>>,
}

impl Member {
    /// Whether this connection, which waited for it, is its probe's.
    fn is_probe(&self, accepted: &Socket) -> bool {
        let from = |probe: &Socket| {
            Some(probe.local_addr().ok()?.as_socket()? == accepted.peer_addr().ok()?.as_socket()?)
        };
        self.probe.as_ref().and_then(from) == Some(true)
    }
}

impl Fleet {
    pub(super) fn new(
        descriptors: Descriptors,
        cgroups: Option<Cgroups>,
        events: mpsc::Sender<Event>,
        idle: Arc<Notify>,
        folder: PathBuf,
        output_rate: NonZeroU32,
    ) -> io::Result<Self> {
        Ok(Self {
            spawner: Spawner::new()?,
            outputs: Outputs::start(output_rate)?,
            descriptors,
            gauges: Gauges::new(events.clone()),
            events,
            idle,
            members: HashMap::new(),
            ledger: Ledger::default(),
            ports: HashMap::new(),
            nameless: HashMap::new(),
            folder,
            publics: Publics::default(),
            watch_at: Instant::now(),
            left: Vec::new(),
            acceptor: Acceptor::new()?,
            cgroups,
        })
    }

    pub(super) fn stop(&self, id: WorkerId, signal: Signal, to: StopTo, timeout: Duration) {
        if let Some(member) = self.members.get(&id) {
            member.controller.stop(signal, to, timeout);
        }
    }

    pub(super) fn kill(&self, id: WorkerId) {
        if let Some(member) = self.members.get(&id) {
            member.controller.kill();
        }
    }

    /// Has the files opened anew that workers' output goes to.
    pub(super) fn reopen_outputs(&self) {
        self.members.values().for_each(|member| member.controller.reopen_output());
    }

    /// Probes once, beside everything else.
    pub(super) fn probe(&mut self, id: WorkerId, health: &Health) {
        let Some(member) = self.members.get_mut(&id) else { return };
        member.probing = true;
        let endpoint = member.upstream.endpoint().clone();
        let inherited = endpoint.inet().and_then(|address| self.ports.get_mut(&address));
        // Where several listen, the connection has to reach the one that is meant. One that waits
        // there already needs no other.
        let (socket, pass) = match (&member.way, inherited) {
            _ if member.prober.is_waiting() => (Err(io::ErrorKind::NotConnected.into()), None),
            (Some(way), _) => match way.open() {
                Ok((socket, pass)) => (Ok(socket), Some(pass)),
                Err(error) => (Err(error), None),
            },
            (None, Some(inherited)) => (inherited.port.way_to(id), None),
            (None, None) => (endpoint.way_of_a_probe(), None),
        };
        if member.way.is_some()
            && let Ok(socket) = &socket
        {
            member.probe = socket.try_clone().ok();
        }
        let target = probe::Target {
            probe: health.probe.clone(),
            endpoint,
            proxy_protocol: member.upstream.proxy_protocol(),
            timeout: health.timeout,
        };
        let (owner, is_new) = (health.owner, !member.proven);
        let (prober, listening) = (member.prober.clone(), member.listening.clone());
        let (upstream, events) = (Arc::clone(&member.upstream), self.events.clone());
        spawn_local(async move {
            let answered = || upstream.answered();
            let mut outcome = prober.probe(&target, socket, answered).await;
            drop(pass);
            listening.judge(&mut outcome, owner, is_new).await;
            // Fails only where the daemon has ended.
            let _ = events.send(Event::Probed { id, outcome }).await;
        });
    }

    /// The probe that was asked for has ended.
    pub(super) fn probed(&mut self, id: WorkerId, outcome: &ProbeOutcome) {
        if let Some(member) = self.members.get_mut(&id) {
            member.probing = false;
            member.proven |= outcome.verdict == Verdict::Passed;
            member.was_healthy.set(member.proven);
            if !member.prober.is_waiting() {
                member.probe = None;
            }
            self.ledger.probed(&member.service, member.upstream.slot(), outcome);
        }
    }

    /// No connection is handed to it any more; tells whether it holds none.
    pub(super) fn retire(&mut self, id: WorkerId) -> bool {
        let Some(member) = self.members.get_mut(&id) else { return false };
        member.retired = true;
        let idle = member.upstream.retire();
        self.count_connections();
        idle
    }

    pub(super) fn reinstate(&mut self, id: WorkerId) {
        if let Some(member) = self.members.get_mut(&id) {
            member.retired = false;
            member.upstream.reinstate();
        }
        self.count_connections();
    }

    /// The process id of its guard, while there is one.
    pub(super) fn guard(&self, id: WorkerId) -> Option<i32> {
        self.members.get(&id).map(|member| member.guard)
    }

    /// Has the connections counted of those that have them without lbd.
    fn count_connections(&mut self) {
        let direct = self.members.values().filter(|member| member.way.is_some());
        let counted = |member: &Member| Counted {
            guard: member.guard,
            urgent: member.retired,
            subject: (Arc::clone(&member.upstream), member.upstream.epoch()),
        };
        let workers = direct.map(counted).collect();
        self.gauges.count_connections(self.publics.addresses(), workers);
    }

    /// These workers' memory is measured from now on, and told as events; the number is the limit.
    pub(super) fn measure(&mut self, limits: impl Iterator<Item = (WorkerId, u64)>) {
        let watched = |(id, limit): (WorkerId, u64)| {
            let guard = self.members.get(&id)?.guard;
            Some(Watched { id: id.0, guard, limit })
        };
        self.gauges.measure(limits.filter_map(watched).collect());
    }

    /// The retired workers that hold no connection.
    pub(super) fn idle(&self) -> Vec<WorkerId> {
        let idle = |(id, member): &(&WorkerId, &Member)| {
            member.retired
                && member.upstream.is_idle()
                && self.publics.queued(**id).unwrap_or(0) == 0
        };
        self.members.iter().filter(idle).map(|(id, _)| *id).collect()
    }

    /// Whether the worker of this incarnation is known to hold no connection.
    pub(super) fn holds_nothing(&self, id: WorkerId) -> bool {
        self.members.get(&id).is_none_or(|member| member.upstream.is_idle())
    }

    /// Whether the kernel hands connections to one of these.
    pub(super) fn is_direct(&self, workers: &[WorkerId]) -> bool {
        workers.iter().any(|id| self.members.get(id).is_some_and(|member| member.way.is_some()))
    }

    pub(super) fn upstream(&self, id: WorkerId) -> Option<&Arc<Upstream>> {
        self.members.get(&id).map(|member| &member.upstream)
    }

    /// These are the ones in rotation: on the ports they share with others, new connections are
    /// theirs.
    pub(super) fn select(&mut self, workers: &[WorkerId]) {
        for &id in workers {
            let Some(Member { upstream, .. }) = self.members.get(&id) else { continue };
            let Some(address) = upstream.endpoint().inet() else { continue };
            let Some(InheritedPort { port, .. }) = self.ports.get_mut(&address) else { continue };
            let before = port.selected().filter(|before| *before != id);
            // Who is on the way to it by the pool before reaches the new one, with its header.
            let displaced = before
                .and_then(|before| Some(&self.members.get(&before)?.upstream))
                .filter(|before| before.proxy_protocol() != upstream.proxy_protocol());
            displaced.inspect(|before| before.displace(true));
            match port.select(id) {
                Ok(()) => upstream.displace(false),
                Err(error) => {
                    displaced.inspect(|before| before.displace(false));
                    tracing::error!(%address, %error, "cannot steer connections to the new worker");
                }
            }
        }
    }

    /// The same for the addresses whose connections the kernel hands out.
    pub(super) fn rotate(&self, service: &str, balance: Balance, workers: &[WorkerId]) {
        let turn = |id: &WorkerId| Some((self.members.get(id)?.upstream.slot(), *id));
        let turns: Vec<_> = workers.iter().filter_map(turn).collect();
        self.publics.rotate(service, balance, &turns);
    }

    /// The last lines that the worker wrote, as far as they came through lbd.
    pub(super) fn last_words(&self, id: WorkerId) -> Vec<String> {
        self.members.get(&id).map(|member| member.last_words.lines()).unwrap_or_default()
    }

    /// Reaps what killed guards left behind. To be called on SIGCHLD.
    pub(super) fn reap(&self) {
        self.spawner.reap();
    }
}
