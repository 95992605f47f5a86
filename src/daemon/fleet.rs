//! The worker processes, as the driver handles them: it starts, signals and probes them as control
//! asks, and turns what becomes of them into events.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    io,
    net::{Shutdown, SocketAddr},
    num::NonZeroU32,
    os::fd::AsFd,
    path::PathBuf,
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
    config::{Balance, Probe, Program, ProxyProtocol, SocketMode},
    control::{Event, ProbeOutcome, Spawn, WORKERS_ON_A_PORT, WorkerId},
    probe,
    process::{
        self, Cgroup, Cgroups, Child, ChildEvent, ConnectionGauge, Controller, Counted, Exit,
        Identity, Launch, MemoryGauge, Outputs, Spawner, Watched,
    },
    route::{Upstream, Ways},
    sockets::{self, Acceptor, Endpoint, Nameless, Port, Rescued, direct::Way},
};

const _: () = assert!(WORKERS_ON_A_PORT == sockets::SHARERS);

/// A worker could not be started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("port {} of {} is taken by another program; `ss -ltnp 'sport = :{}'` shows which", .0.port(), .0.ip(), .0.port())]
    PortTaken(SocketAddr),
    #[error("cannot bind {0}: {1}")]
    Bind(SocketAddr, io::Error),
    #[error("cannot make a unix socket in {}: {}", .0.display(), .1)]
    Unix(PathBuf, io::Error),
    #[error("cannot open its output: {0}")]
    Output(io::Error),
    #[error("cannot limit its processes: {0}")]
    Cgroup(io::Error),
    #[error("cannot start a process: {0}")]
    Spawn(io::Error),
}

/// How many probes of a worker that fail one after the other are remembered.
const PROBES: usize = 64;

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
    /// Clients that waited for workers which are gone, to be handed over.
    left: Vec<(Arc<str>, Rescued)>,
    acceptor: Acceptor,
    cgroups: Option<Cgroups>,
    /// Started when there is something to measure.
    gauge: Option<MemoryGauge>,
    watched: Vec<Watched>,
    /// Started when there is a worker that has connections without lbd.
    connections: Option<ConnectionGauge<Sampled>>,
}

/// Whose connections are counted, and since which of its retirements.
type Sampled = (Arc<Upstream>, u32);

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
    /// Copies of the sockets of the probes since the last one that passed. As long as they are there
    /// nobody else has their ports, and what comes from those is no client.
    probes: VecDeque<Socket>,
}

impl Member {
    fn remember_probe(&mut self, socket: &io::Result<Socket>) {
        if let Ok(Ok(copy)) = socket.as_ref().map(Socket::try_clone) {
            self.probes.truncate(PROBES - 1);
            self.probes.push_front(copy);
        }
    }

    /// Whether this connection, which waited for it, is one of its probes.
    fn is_probe(&self, accepted: &Socket) -> bool {
        let from = |probe: &Socket| {
            Some(probe.local_addr().ok()?.as_socket()? == accepted.peer_addr().ok()?.as_socket()?)
        };
        self.probes.iter().any(|probe| from(probe) == Some(true))
    }
}

impl Fleet {
    pub(super) fn new(
        descriptors: Descriptors,
        cgroups: Option<Cgroups>,
        events: mpsc::Sender<Event>,
        idle: Arc<Notify>,
        folder: PathBuf,
    ) -> io::Result<Self> {
        Ok(Self {
            spawner: Spawner::new()?,
            outputs: Outputs::start()?,
            descriptors,
            events,
            idle,
            members: HashMap::new(),
            ledger: Ledger::default(),
            ports: HashMap::new(),
            nameless: HashMap::new(),
            folder,
            publics: Publics::default(),
            left: Vec::new(),
            acceptor: Acceptor::new()?,
            cgroups,
            gauge: None,
            watched: Vec::new(),
            connections: None,
        })
    }

    /// Starts a worker; what becomes of it comes as events, these being the first.
    pub(super) fn spawn(&mut self, order: &Spawn) -> Vec<Event> {
        let id = order.id;
        match self.start(order) {
            Ok(port) => vec![Event::Spawned { id, port }],
            Err(error) => {
                vec![Event::Failed { id, reason: error.to_string() }, Event::Gone { id }]
            }
        }
    }

    pub(super) fn signal(&self, id: WorkerId, signal: Signal) {
        if let Some(member) = self.members.get(&id) {
            member.controller.signal(signal);
        }
    }

    pub(super) fn kill(&self, id: WorkerId) {
        if let Some(member) = self.members.get(&id) {
            member.controller.kill();
        }
    }

    /// Probes once, beside everything else.
    pub(super) fn probe(&mut self, id: WorkerId, probe: &Probe, limit: Duration) {
        let Some(member) = self.members.get_mut(&id) else { return };
        member.probing = true;
        let endpoint = member.upstream.endpoint().clone();
        let inherited = endpoint.inet().and_then(|address| self.ports.get_mut(&address));
        // A connect to a socket that lbd made succeeds before the program even looks at it, and the
        // kernel would hand it clients from then on.
        let is_direct = member.way.is_some();
        // Where several listen, the connection has to reach the one that is meant.
        let (socket, pass) = match (&member.way, inherited) {
            (Some(way), _) => match way.open() {
                Ok((socket, pass)) => (Ok(socket), Some(pass)),
                Err(error) => (Err(error), None),
            },
            (None, Some(inherited)) => (inherited.port.way_to(id), None),
            (None, None) => (endpoint.way_of_a_probe(), None),
        };
        if member.way.is_some() {
            member.remember_probe(&socket);
        }
        let (probe, events) = (probe.clone(), self.events.clone());
        let proxy_protocol = member.upstream.proxy_protocol();
        let manner = probe::Manner { proxy_protocol, accepted: is_direct && !member.proven };
        spawn_local(async move {
            let outcome = probe::run(&probe, &endpoint, socket, manner, limit).await;
            drop(pass);
            // Fails only where the daemon has ended.
            let _ = events.send(Event::Probed { id, outcome }).await;
        });
    }

    /// The probe that was asked for has ended.
    pub(super) fn probed(&mut self, id: WorkerId, outcome: &ProbeOutcome) {
        if let Some(member) = self.members.get_mut(&id) {
            member.probing = false;
            let passed = outcome.error.is_none();
            member.proven |= passed;
            if passed {
                // It accepts in turn: nothing of the earlier ones waits any more.
                member.probes.clear();
            } else {
                // Nobody reads an answer that comes now.
                member.probes.iter().for_each(|probe| _ = probe.shutdown(Shutdown::Both));
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

    /// Has the connections counted of those that have them without lbd.
    fn count_connections(&mut self) {
        let direct = self.members.values().filter(|member| member.way.is_some());
        let workers: Vec<_> = direct
            .map(|member| Counted {
                guard: member.guard,
                urgent: member.retired,
                subject: (Arc::clone(&member.upstream), member.upstream.epoch()),
            })
            .collect();
        if workers.is_empty() && self.connections.is_none() {
            return;
        }
        let start = || {
            ConnectionGauge::start(|(upstream, epoch): &Sampled, count| {
                upstream.sampled(*epoch, count);
            })
        };
        match self.connections.take().map_or_else(start, Ok) {
            Ok(gauge) => {
                gauge.watch(self.publics.addresses(), workers);
                self.connections = Some(gauge);
            }
            Err(error) => tracing::warn!(%error, "cannot count the workers' connections"),
        }
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

    /// Forgets a worker of which nothing is left. Its socket stays, with what waits in it, until
    /// somebody takes it over or [`Self::rescue`] empties it.
    pub(super) fn forget(&mut self, id: WorkerId) {
        let Some(member) = self.members.remove(&id) else { return };
        let address = member.upstream.endpoint().inet();
        if member.way.is_some() {
            if !member.probes.is_empty() {
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
            inherited.port.abandon(id);
            member.upstream.displace(true);
        }
    }

    /// As [`Self::rescue`], of workers that the kernel hands connections to: those that are `ejected`
    /// and those that are gone. Addresses that are not `wanted` and that no worker has
    /// a socket on are let go.
    pub(super) fn rescue_direct(
        &mut self,
        wanted: &BTreeSet<SocketAddr>,
        ejected: &[WorkerId],
        can_serve: impl Fn(&str) -> bool,
        now: Instant,
    ) -> Vec<(Arc<str>, Rescued)> {
        let Self { members, acceptor, publics, left: waiting, .. } = self;
        // Nothing was put in front of what the kernel gave to them.
        let client = |socket| Rescued { socket, proxy_protocol: None };
        let left = publics.tidy(wanted, now, acceptor).into_iter();
        let left = left.map(|(service, socket)| (service, client(socket)));
        let mut rescued: Vec<_> = std::mem::take(waiting).into_iter().chain(left).collect();
        for id in ejected {
            let Some(member) = members.get(id) else { continue };
            // Not while it is being probed: the probe is for it to answer.
            if member.way.is_some() && !member.probing && can_serve(&member.service) {
                let waiting = publics.rescue(*id, acceptor).into_iter();
                let clients = waiting.filter(|socket| !member.is_probe(socket)).map(client);
                rescued.extend(clients.map(|client| (Arc::clone(&member.service), client)));
            }
        }
        rescued
    }

    /// Takes the connections out of every accept queue where nobody will: of a worker that is gone,
    /// or one of the `ejected`. They are to be handed to another worker of their service; where none
    /// `can_serve`, they are left to a successor, as long as there `is` such a service. Ports that are
    /// not `needed` any more are closed.
    pub(super) fn rescue(
        &mut self,
        needed: &HashSet<SocketAddr>,
        ejected: &[WorkerId],
        can_serve: impl Fn(&str) -> bool,
        is: impl Fn(&str) -> bool,
    ) -> Vec<(Arc<str>, Rescued)> {
        let Self { members, acceptor, .. } = self;
        // Not while it is being probed: the probe is for it to answer.
        let hangs = |id: &WorkerId| {
            ejected.contains(id) && members.get(id).is_some_and(|member| !member.probing)
        };
        let mut rescued = Vec::new();
        self.ports.retain(|address, InheritedPort { port, service }| {
            let stays = needed.contains(address);
            let mut sockets = port.tidy(acceptor);
            if !stays || can_serve(service) {
                sockets.extend(port.rescue(None, acceptor));
            }
            if can_serve(service) {
                let here = |id: &&WorkerId| port.socket(**id).is_some() && hangs(id);
                for &id in ejected.iter().filter(here) {
                    sockets.extend(port.rescue(Some(id), acceptor));
                }
            }
            rescued.extend(sockets.into_iter().map(|socket| (Arc::clone(service), socket)));
            stays
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
                let connection = |socket| {
                    let proxy_protocol = *proxy_protocol;
                    (Arc::clone(service), Rescued { socket, proxy_protocol })
                };
                rescued.extend(socket.rescue(acceptor).into_iter().map(connection));
            }
            !is_over
        });
        rescued
    }

    /// These workers' memory is measured from now on, and told as events; the number is the limit.
    pub(super) fn measure(&mut self, limits: impl Iterator<Item = (WorkerId, u64)>) {
        let member = |(id, limit): (WorkerId, u64)| {
            let guard = self.members.get(&id)?.guard;
            Some(Watched { id: id.0, guard, limit })
        };
        let watched: Vec<Watched> = limits.filter_map(member).collect();
        if watched == self.watched {
            return;
        }
        let events = self.events.clone();
        let start = || {
            MemoryGauge::start(move |id, bytes| {
                // Fails only where the daemon has ended.
                let _ = events.blocking_send(Event::Memory { id: WorkerId(id), bytes });
            })
        };
        match self.gauge.take().map_or_else(start, Ok) {
            Ok(gauge) => {
                gauge.watch(watched.clone());
                self.gauge = Some(gauge);
                self.watched = watched;
            }
            Err(error) => tracing::warn!(%error, "cannot measure the workers' memory"),
        }
    }

    /// Reaps what killed guards left behind. To be called on SIGCHLD.
    pub(super) fn reap(&self) {
        self.spawner.reap();
    }

    /// The port of the worker, if it has one.
    fn start(&mut self, order: &Spawn) -> Result<Option<u16>, StartError> {
        let spec = &*order.spec;
        if spec.socket == SocketMode::Direct {
            return self.start_direct(order);
        }
        let wanted = spec.address(order.port.unwrap_or(0));
        let endpoint: Endpoint = match spec.socket {
            SocketMode::Inherit => self.inherit(wanted, order)?.into(),
            SocketMode::Unix => self.inherit_unix(order)?,
            // Whoever has the port would pass for the worker that is to bind it.
            SocketMode::Bind | SocketMode::Direct => {
                sockets::free(wanted).map_err(|error| port_error(wanted, error))?.into()
            }
        };
        let address = endpoint.inet();
        let started = self.launch(order, endpoint, None);
        if started.is_err() {
            self.nameless.remove(&order.id);
            if let Some(inherited) = address.and_then(|address| self.ports.get_mut(&address)) {
                inherited.port.abandon(order.id);
            }
        }
        started.map(|()| address.map(|address| address.port()))
    }

    /// Starts a worker with sockets of its own on the public addresses. Its port is a name, if it has
    /// been given one.
    fn start_direct(&mut self, order: &Spawn) -> Result<Option<u16>, StartError> {
        let join = self.publics.join(order);
        join.map_err(|(address, error)| StartError::Bind(address, error))?;
        let ways = self.publics.ways_to(order);
        let address = ways.as_ref().map_or(order.spec.address(0), |ways| ways.first.address());
        let started = self.launch(order, address.into(), ways);
        if started.is_err() {
            self.publics.leave(order.id, Instant::now());
        }
        self.count_connections();
        started.map(|()| Some(order.port.unwrap_or(address.port())))
    }

    /// A listening unix socket for the worker.
    fn inherit_unix(&mut self, order: &Spawn) -> Result<Endpoint, StartError> {
        let failed = |error| StartError::Unix(self.folder.clone(), error);
        let socket = Nameless::open(&self.folder).map_err(failed)?;
        let endpoint = socket.endpoint().clone();
        let (service, proxy_protocol) = (Arc::clone(&order.service), order.spec.proxy_protocol);
        self.nameless.insert(order.id, InheritedUnix { socket, service, proxy_protocol });
        Ok(endpoint)
    }

    /// A listening socket for the worker, on a port that is bound now if it is not yet.
    fn inherit(&mut self, wanted: SocketAddr, order: &Spawn) -> Result<SocketAddr, StartError> {
        let (service, proxy_protocol) = (Arc::clone(&order.service), order.spec.proxy_protocol);
        if let Some(inherited) = self.ports.get_mut(&wanted) {
            let joined = inherited.port.join(order.id, proxy_protocol);
            joined.map_err(|error| port_error(wanted, error))?;
            inherited.service = service;
            return Ok(wanted);
        }
        let port = Port::open(wanted, order.id, proxy_protocol);
        let port = port.map_err(|error| port_error(wanted, error))?;
        let address = port.address();
        self.ports.insert(address, InheritedPort { port, service });
        Ok(address)
    }

    fn launch(
        &mut self,
        order: &Spawn,
        endpoint: Endpoint,
        ways: Option<Ways>,
    ) -> Result<(), StartError> {
        let spec = &*order.spec;
        let port = endpoint.inet().map(|address| address.port());
        let identity = Identity {
            service: &order.service,
            slot: order.slot,
            port: order.port.filter(|_| ways.is_some()).or(port),
        };
        // Where all are on the same port, that tells nobody from the others.
        let port = if ways.is_some() { order.port } else { port };
        let number = port.map_or(order.slot, u32::from);
        let label: Arc<str> = format!("{}/{number}", order.service).into();
        let streams = self.outputs.open(&spec.output, identity).map_err(StartError::Output)?;
        let (program, argv) = match &spec.program {
            Program::Command(argv) => (None, process::expand(argv, identity)),
            Program::Root(root) => {
                let root = root.to_string_lossy().into_owned();
                let mut argv = vec!["lbd", "worker", "--root", &root];
                if ways.is_some() {
                    argv.extend(["--served-by", &label]);
                }
                let argv = argv.into_iter().map(str::to_owned).collect();
                (Some(PathBuf::from("/proc/self/exe")), argv)
            }
        };
        let nameless = self.nameless.get(&order.id).map(|inherited| inherited.socket.socket());
        let on_port = || self.ports.get(&endpoint.inet()?)?.port.socket(order.id);
        let inherited = match &ways {
            Some(_) => self.publics.sockets(order),
            None => nameless.or_else(on_port).into_iter().collect(),
        };
        let cgroup = self.cgroup(spec.processes)?;
        let launch = Launch {
            label: label.to_string(),
            program,
            argv,
            env: process::environment(
                std::env::vars_os(),
                &spec.env,
                spec.user.as_deref(),
                identity,
            ),
            directory: spec.directory.clone(),
            listeners: inherited
                .into_iter()
                .map(|socket| (socket.as_fd(), order.service.to_string()))
                .collect(),
            streams,
            umask: spec.umask,
            user: spec.user.clone(),
            group: spec.group.clone(),
            open_files: Some(self.descriptors.of_worker(spec.open_files)),
            cgroup,
        };
        let child = self.spawner.spawn(launch).map_err(StartError::Spawn)?;
        let (id, idle) = (order.id, Arc::clone(&self.idle));
        let way = ways.as_ref().map(|ways| ways.first.clone());
        let upstream = match ways {
            Some(ways) => Upstream::direct(id.0, order.slot, label, ways, idle),
            None => Upstream::new(id.0, order.slot, label, endpoint, spec.proxy_protocol, idle),
        };
        let (controller, guard) = (child.controller(), child.guard_pid());
        let service = Arc::clone(&order.service);
        self.ledger.open(&service, order.slot, Arc::clone(&upstream));
        let member = Member {
            controller,
            guard,
            service,
            upstream,
            retired: false,
            probing: false,
            proven: false,
            way,
            probes: VecDeque::new(),
        };
        self.members.insert(id, member);
        spawn_local(report(child, id, self.events.clone()));
        Ok(())
    }

    /// A worker's own cgroup, where there can be one. It has to be where its `processes` are
    /// limited.
    fn cgroup(&self, processes: Option<NonZeroU32>) -> Result<Option<Cgroup>, StartError> {
        let made = self.cgroups.as_ref().map(|cgroups| cgroups.make(processes)).transpose();
        match (made, processes) {
            (Ok(None), Some(_)) => Err(StartError::Cgroup(io::ErrorKind::Unsupported.into())),
            (Ok(cgroup), _) => Ok(cgroup),
            (Err(error), Some(_)) => Err(StartError::Cgroup(error)),
            (Err(error), None) => {
                tracing::warn!(%error, "a worker has no cgroup of its own");
                Ok(None)
            }
        }
    }
}

/// Hands on what becomes of a child until nothing of it is left.
async fn report(mut child: Child, id: WorkerId, events: mpsc::Sender<Event>) {
    loop {
        let event = match child.next().await {
            Some(ChildEvent::Started { pid }) => Event::Started { id, pid },
            Some(ChildEvent::Failed(reason)) => Event::Failed { id, reason },
            Some(ChildEvent::Exited(exit)) => {
                let by_signal = !matches!(exit, Exit::Code(_));
                Event::Exited { id, status: exit.to_string(), by_signal }
            }
            Some(ChildEvent::Gone) => Event::Gone { id },
            None => return,
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// Why `address` can't be had.
fn port_error(address: SocketAddr, error: io::Error) -> StartError {
    if error.kind() == io::ErrorKind::AddrInUse {
        StartError::PortTaken(address)
    } else {
        StartError::Bind(address, error)
    }
}
