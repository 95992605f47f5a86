//! The worker processes, as the driver handles them: it starts, signals and probes them as the supervisor
//! asks, and turns what becomes of them into events.

mod drain_queue;
mod listening;
mod start;
mod usage;

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

use super::{descriptors::Descriptors, direct_listeners::DirectListeners, slot_stats::SlotStats};
use crate::{
    config::{Balance, Health, ProxyProtocol, StopTo},
    net::{
        self, Acceptor, DrainedConnection, Port, UnnamedUnixListener, diag::SharedDiag,
        direct::PinnedRoute,
    },
    probe::{self, Prober},
    process::{Cgroups, Controller, Counted, LastWords, Outputs, Spawner, Watched},
    proxy::Backend,
    supervisor::{Event, ProbeOutcome, Verdict, WORKERS_ON_A_PORT, WorkerId},
};
use listening::Listening;
use usage::UsageSamplers;

const _: () = assert!(WORKERS_ON_A_PORT == net::SHARERS);

/// All worker processes of the daemon.
#[derive(Debug)]
pub(super) struct WorkerTable {
    spawner: Spawner,
    outputs: Outputs,
    descriptors: Descriptors,
    events: mpsc::Sender<Event>,
    /// Notified when a retired worker's last connection ends.
    idle: Arc<Notify>,
    handles: HashMap<WorkerId, WorkerHandle>,
    pub(super) slot_stats: SlotStats,
    /// The ports whose sockets workers inherit.
    ports: HashMap<SocketAddr, InheritedPort>,
    /// The unix sockets that workers inherit, those of workers that are gone with what waits there.
    unnamed: HashMap<WorkerId, InheritedUnix>,
    /// Where one can be made.
    folder: PathBuf,
    /// The public addresses that workers have sockets on.
    pub(super) direct_listeners: DirectListeners,
    /// When they are looked after again.
    watch_at: Instant,
    /// Clients that waited for workers which are gone, to be handed over.
    left: Vec<(Arc<str>, DrainedConnection)>,
    acceptor: Acceptor,
    /// Whom probes ask about their connections, and who listens.
    diag: SharedDiag,
    cgroups: Option<Cgroups>,
    usage: UsageSamplers,
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
    socket: UnnamedUnixListener,
    service: Arc<str>,
    proxy_protocol: Option<ProxyProtocol>,
}

/// One worker.
#[derive(Debug)]
struct WorkerHandle {
    controller: Controller,
    guard: i32,
    service: Arc<str>,
    backend: Arc<Backend>,
    retired: bool,
    /// A probe is on its way.
    probing: bool,
    /// A probe has passed.
    proven: bool,
    /// How lbd reaches it, where the kernel hands it connections.
    pinned: Option<PinnedRoute>,
    prober: Prober,
    listening: Listening,
    /// A copy of the probe's socket while that may wait in the accept queue of a worker that has `pinned`:
    /// nobody else has its port meanwhile, and what comes from there is no client.
    probe: Option<Socket>,
    /// What it said last.
    last_words: LastWords,
    /// A probe has passed: known to whoever tells of its end.
    was_healthy: Rc<Cell<bool>>,
}

impl WorkerHandle {
    /// Whether this connection, which waited for it, is its probe's.
    fn is_probe(&self, accepted: &Socket) -> bool {
        let from = |probe: &Socket| {
            Some(probe.local_addr().ok()?.as_socket()? == accepted.peer_addr().ok()?.as_socket()?)
        };
        self.probe.as_ref().and_then(from) == Some(true)
    }
}

impl WorkerTable {
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
            usage: UsageSamplers::new(events.clone()),
            events,
            idle,
            handles: HashMap::new(),
            slot_stats: SlotStats::default(),
            ports: HashMap::new(),
            unnamed: HashMap::new(),
            folder,
            direct_listeners: DirectListeners::default(),
            watch_at: Instant::now(),
            left: Vec::new(),
            acceptor: Acceptor::new()?,
            diag: SharedDiag::default(),
            cgroups,
        })
    }

    pub(super) fn stop(&self, id: WorkerId, signal: Signal, to: StopTo, timeout: Duration) {
        if let Some(handle) = self.handles.get(&id) {
            handle.controller.stop(signal, to, timeout);
        }
    }

    pub(super) fn kill(&self, id: WorkerId) {
        if let Some(handle) = self.handles.get(&id) {
            handle.controller.kill();
        }
    }

    /// Has the files opened anew that workers' output goes to.
    pub(super) fn reopen_outputs(&self) {
        self.handles.values().for_each(|handle| handle.controller.reopen_output());
    }

    /// Probes once, beside everything else.
    pub(super) fn probe(&mut self, id: WorkerId, health: &Health) {
        let Some(handle) = self.handles.get_mut(&id) else { return };
        handle.probing = true;
        let endpoint = handle.backend.endpoint().clone();
        let inherited = endpoint.inet().and_then(|address| self.ports.get_mut(&address));
        // Where several listen, the connection has to reach the one that is meant. One that waits
        // there already needs no other.
        let (socket, pass) = match (&handle.pinned, inherited) {
            _ if handle.prober.is_waiting() => (Err(io::ErrorKind::NotConnected.into()), None),
            (Some(pinned), _) => match pinned.open() {
                Ok((socket, pass)) => (Ok(socket), Some(pass)),
                Err(error) => (Err(error), None),
            },
            (None, Some(inherited)) => (inherited.port.way_to(id), None),
            (None, None) => (endpoint.way_of_a_probe(), None),
        };
        if handle.pinned.is_some()
            && let Ok(socket) = &socket
        {
            handle.probe = socket.try_clone().ok();
        }
        let target = probe::Target {
            probe: health.probe.clone(),
            endpoint,
            socket: handle.listening.socket(),
            proxy_protocol: handle.backend.proxy_protocol(),
            timeout: health.timeout,
        };
        let (owner, is_new) = (health.owner, !handle.proven);
        let (prober, listening) = (handle.prober.clone(), handle.listening.clone());
        let (backend, events) = (Arc::clone(&handle.backend), self.events.clone());
        spawn_local(async move {
            let answered = || backend.answered();
            let mut outcome = prober.probe(&target, socket, answered).await;
            drop(pass);
            listening.judge(&mut outcome, owner, is_new).await;
            // Fails only where the daemon has ended.
            let _ = events.send(Event::Probed { id, outcome }).await;
        });
    }

    /// The probe that was asked for has ended.
    pub(super) fn probed(&mut self, id: WorkerId, outcome: &ProbeOutcome) {
        if let Some(handle) = self.handles.get_mut(&id) {
            handle.probing = false;
            handle.proven |= outcome.verdict == Verdict::Passed;
            handle.was_healthy.set(handle.proven);
            if !handle.prober.is_waiting() {
                handle.probe = None;
            }
            self.slot_stats.probed(&handle.service, handle.backend.slot(), outcome);
        }
    }

    /// No connection is handed to it any more; tells whether it holds none.
    pub(super) fn retire(&mut self, id: WorkerId) -> bool {
        let Some(handle) = self.handles.get_mut(&id) else { return false };
        handle.retired = true;
        let idle = handle.backend.retire();
        self.count_connections();
        idle
    }

    pub(super) fn reinstate(&mut self, id: WorkerId) {
        if let Some(handle) = self.handles.get_mut(&id) {
            handle.retired = false;
            handle.backend.reinstate();
        }
        self.count_connections();
    }

    /// The process id of its guard, while there is one.
    pub(super) fn guard(&self, id: WorkerId) -> Option<i32> {
        self.handles.get(&id).map(|handle| handle.guard)
    }

    /// Has the connections counted of those that have them without lbd.
    fn count_connections(&mut self) {
        let direct = self.handles.values().filter(|handle| handle.pinned.is_some());
        let counted = |handle: &WorkerHandle| Counted {
            guard: handle.guard,
            urgent: handle.retired,
            subject: (Arc::clone(&handle.backend), handle.backend.epoch()),
        };
        let workers = direct.map(counted).collect();
        self.usage.count_connections(self.direct_listeners.addresses(), workers);
    }

    /// These workers' memory is measured from now on, and told as events; the number is the limit.
    pub(super) fn measure(&mut self, limits: impl Iterator<Item = (WorkerId, u64)>) {
        let watched = |(id, limit): (WorkerId, u64)| {
            let guard = self.handles.get(&id)?.guard;
            Some(Watched { id: id.0, guard, limit })
        };
        self.usage.measure(limits.filter_map(watched).collect());
    }

    /// The retired workers that hold no connection.
    pub(super) fn idle(&self) -> Vec<WorkerId> {
        let idle = |(id, handle): &(&WorkerId, &WorkerHandle)| {
            handle.retired
                && handle.backend.is_idle()
                && self.direct_listeners.queued(**id).unwrap_or(0) == 0
        };
        self.handles.iter().filter(idle).map(|(id, _)| *id).collect()
    }

    /// Whether the worker of this incarnation is known to hold no connection.
    pub(super) fn holds_nothing(&self, id: WorkerId) -> bool {
        self.handles.get(&id).is_none_or(|handle| handle.backend.is_idle())
    }

    /// Whether the kernel hands connections to one of these.
    pub(super) fn is_direct(&self, workers: &[WorkerId]) -> bool {
        workers.iter().any(|id| self.handles.get(id).is_some_and(|handle| handle.pinned.is_some()))
    }

    pub(super) fn backend(&self, id: WorkerId) -> Option<&Arc<Backend>> {
        self.handles.get(&id).map(|handle| &handle.backend)
    }

    /// These are the ones in rotation: on the ports they share with others, new connections are
    /// theirs.
    pub(super) fn select(&mut self, workers: &[WorkerId]) {
        for &id in workers {
            let Some(WorkerHandle { backend, .. }) = self.handles.get(&id) else { continue };
            let Some(address) = backend.endpoint().inet() else { continue };
            let Some(InheritedPort { port, .. }) = self.ports.get_mut(&address) else { continue };
            let before = port.selected().filter(|before| *before != id);
            // Who is on the way to it by the pool before reaches the new one, with its header.
            let displaced = before
                .and_then(|before| Some(&self.handles.get(&before)?.backend))
                .filter(|before| before.proxy_protocol() != backend.proxy_protocol());
            displaced.inspect(|before| before.displace(true));
            match port.select(id) {
                Ok(()) => backend.displace(false),
                Err(error) => {
                    displaced.inspect(|before| before.displace(false));
                    tracing::error!(%address, %error, "cannot steer connections to the new worker");
                }
            }
        }
    }

    /// The same for the addresses whose connections the kernel hands out.
    pub(super) fn rotate(&self, service: &str, balance: Balance, workers: &[WorkerId]) {
        let turn = |id: &WorkerId| Some((self.handles.get(id)?.backend.slot(), *id));
        let turns: Vec<_> = workers.iter().filter_map(turn).collect();
        self.direct_listeners.rotate(service, balance, &turns);
    }

    /// The last lines that the worker wrote, as far as they came through lbd.
    pub(super) fn last_words(&self, id: WorkerId) -> Vec<String> {
        self.handles.get(&id).map(|handle| handle.last_words.lines()).unwrap_or_default()
    }

    /// Reaps what killed guards left behind. To be called on SIGCHLD.
    pub(super) fn reap(&self) {
        self.spawner.reap();
    }
}
