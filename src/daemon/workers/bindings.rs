//! How each worker is reached: the sockets that lbd makes for a worker, from before its start until
//! its accept queue is empty after its end.
//!
//! Every worker has one binding, for every kind of `socket` and `route`, with the same steps:
//! [`open`](Bindings::open); [`sockets`](Bindings::sockets), which are passed to its process;
//! [`probe_socket`](Bindings::probe_socket); [`activate`](Bindings::activate) when it is in
//! rotation; [`drain_queue`](Bindings::drain_queue) if it will not accept what waits in its accept
//! queue; and [`release`](Bindings::release) when no process has the sockets any more.
//! [`collect_leftovers`](Bindings::collect_leftovers) then takes out the connections that still
//! wait there, unless a successor takes the sockets over.
//!
//! | `socket`    | open                          | activate                    | drain queue   |
//! | ----------- | ----------------------------- | --------------------------- | ------------- |
//! | `bind`      | looks whether the port is free | nothing                    | can't be done |
//! | `inherit`   | a socket on the slot's port   | the port leads to it        | accepts       |
//! | `unix`      | a socket without a name       | nothing                     | accepts       |
//! | (`direct`)  | one on each public address    | by [`rotate`](Bindings::rotate) | accepts   |

use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use socket2::Socket;

use super::listening::Listens;
use crate::{
    config::{Balance, ProxyProtocol, SocketMode},
    daemon::direct_listeners::{DirectListeners, WATCH_PAUSE},
    net::{
        self, Acceptor, DrainedConnection, Endpoint, Holder, MayAccept, Port, UnnamedUnixListener,
        direct::{PinGuard, PinnedRoute},
    },
    proxy::PinnedRoutes,
    supervisor::{Spawn, WorkerId},
};

/// A client's connection that was taken out of a worker's accept queue, and its service.
pub(in crate::daemon) type Drained = (Arc<str>, DrainedConnection);

/// The bindings of all workers.
#[derive(Debug)]
pub(in crate::daemon) struct Bindings {
    workers: HashMap<WorkerId, Bound>,
    /// The ports whose sockets workers inherit. A port outlives each of its workers.
    ports: HashMap<SocketAddr, InheritedPort>,
    /// The ports that may have sockets whose workers are gone.
    leftover_ports: BTreeSet<SocketAddr>,
    /// The unix sockets of workers that are gone, with the connections that wait there.
    orphans: Vec<Orphan>,
    /// The folder in which unix sockets are made.
    folder: PathBuf,
    /// The public addresses on which workers have sockets (`route = "direct"`).
    pub(in crate::daemon) direct_listeners: DirectListeners,
    /// When the public addresses are checked again.
    watch_at: Instant,
    /// Clients of workers that are gone, to be handed over next time.
    left: Vec<Drained>,
    /// Since [`begin`](Self::begin), queues were drained that may fill again.
    may_grow: bool,
    acceptor: Acceptor,
}

/// The binding of one worker.
#[derive(Debug)]
struct Bound {
    service: Arc<str>,
    /// The PROXY protocol header that it expects.
    proxy_protocol: Option<ProxyProtocol>,
    binding: Binding,
}

#[derive(Debug)]
enum Binding {
    /// The worker binds its port itself: lbd has no socket there.
    Own,
    /// The worker inherits a socket on this one of the [ports](Bindings::ports).
    Inherited {
        address: SocketAddr,
        /// lbd picked the port, since the slot has none.
        is_picked: bool,
    },
    Unix(UnnamedUnixListener),
    Direct(Direct),
}

/// The binding of a worker that the kernel hands connections to.
#[derive(Debug)]
struct Direct {
    route: PinnedRoute,
    /// A copy of the probe's socket, while the probe's connection may wait in the worker's accept
    /// queue. The copy keeps the local port from being reused, so a connection from that port is
    /// the probe's and not a client's.
    probe: Option<Socket>,
}

/// A port whose sockets workers inherit, and the service of these workers.
#[derive(Debug)]
struct InheritedPort {
    port: Port<WorkerId>,
    service: Arc<str>,
    /// No further worker will inherit a socket on this port.
    is_released: bool,
}

#[derive(Debug)]
struct Orphan {
    socket: UnnamedUnixListener,
    service: Arc<str>,
    proxy_protocol: Option<ProxyProtocol>,
}

/// The result of [`Bindings::open`].
#[derive(Debug)]
pub(super) struct Opened {
    /// How connections get to the worker.
    pub reached: Reached,
    /// Where the worker is to listen.
    pub listens: Listens,
    /// Its port, if it has one. With `route = "direct"`, where all workers of a service share their
    /// ports, this is the slot's fixed port, which is only a name, or else that of a public
    /// address.
    pub port: Option<u16>,
}

/// How connections get to a worker.
#[derive(Debug)]
pub(super) enum Reached {
    At(Endpoint),
    /// By a pinned route, past the other workers that share its addresses.
    By(PinnedRoutes),
}

/// How far the worker that had the sockets had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Former {
    /// Its process was never started.
    NeverRan,
    /// It never became healthy.
    Failed,
    /// It had been healthy.
    Served,
}

/// The sockets for a worker can't be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error("port {} of {} is {}{}", .0.port(), .0.ip(), .1, taken_hint(.0.port(), .1))]
    PortTaken(SocketAddr, Holder),
    #[error("cannot bind {0}: {1}")]
    Bind(SocketAddr, io::Error),
    #[error("cannot make a unix socket in {}: {}", .0.display(), .1)]
    Unix(PathBuf, io::Error),
}

impl Bindings {
    /// No bindings yet. Unix sockets are made in `folder`.
    ///
    /// # Errors
    /// If the system has no timer left.
    pub(super) fn new(folder: PathBuf) -> io::Result<Self> {
        Ok(Self {
            workers: HashMap::new(),
            ports: HashMap::new(),
            leftover_ports: BTreeSet::new(),
            orphans: Vec::new(),
            folder,
            direct_listeners: DirectListeners::default(),
            watch_at: Instant::now(),
            left: Vec::new(),
            may_grow: false,
            acceptor: Acceptor::new()?,
        })
    }

    /// Makes the sockets for a worker. No client reaches the worker by them yet.
    ///
    /// # Errors
    /// If a socket can't be made. None is kept then.
    pub(super) fn open(&mut self, order: &Spawn) -> Result<Opened, OpenError> {
        let spec = &*order.spec;
        let wanted = spec.address(order.port.unwrap_or(0));
        let (binding, opened) = match spec.socket {
            // If another process had the port, it would be taken for the worker that is to bind it.
            SocketMode::Bind => {
                let address = net::free(wanted).map_err(|error| OpenError::of(wanted, error))?;
                (Binding::Own, Opened::at(address, Listens::Itself(address)))
            }
            SocketMode::Inherit => {
                let address = self.inherit(wanted, order)?;
                let opened = Opened::at(address, Listens::Passed(Some(address)));
                (Binding::Inherited { address, is_picked: order.port.is_none() }, opened)
            }
            SocketMode::Unix => {
                let failed = |error| OpenError::Unix(self.folder.clone(), error);
                let socket = UnnamedUnixListener::open(&self.folder).map_err(failed)?;
                let reached = Reached::At(socket.endpoint().clone());
                let opened = Opened { reached, listens: Listens::Passed(None), port: None };
                (Binding::Unix(socket), opened)
            }
            SocketMode::Direct => {
                let routes = self.join(order)?;
                let direct = Direct { route: routes.first.clone(), probe: None };
                let port = order.port.unwrap_or(routes.first.address().port());
                let (reached, listens) = (Reached::By(routes), Listens::Publicly);
                (Binding::Direct(direct), Opened { reached, listens, port: Some(port) })
            }
        };
        let (service, proxy_protocol) = (Arc::clone(&order.service), spec.proxy_protocol);
        self.workers.insert(order.id, Bound { service, proxy_protocol, binding });
        Ok(opened)
    }

    /// Makes a listening socket for the worker, on a port that is bound now if it was not bound
    /// before.
    fn inherit(&mut self, wanted: SocketAddr, order: &Spawn) -> Result<SocketAddr, OpenError> {
        let (service, proxy_protocol) = (Arc::clone(&order.service), order.spec.proxy_protocol);
        if let Some(inherited) = self.ports.get_mut(&wanted) {
            let joined = inherited.port.join(order.id, proxy_protocol);
            joined.map_err(|error| OpenError::of(wanted, error))?;
            inherited.service = service;
            inherited.is_released = false;
            return Ok(wanted);
        }
        let port = Port::open(wanted, order.id, proxy_protocol);
        let port = port.map_err(|error| OpenError::of(wanted, error))?;
        let address = port.address();
        self.ports.insert(address, InheritedPort { port, service, is_released: false });
        Ok(address)
    }

    /// Makes a listening socket for the worker on each of its public addresses.
    fn join(&mut self, order: &Spawn) -> Result<PinnedRoutes, OpenError> {
        let joined = self.direct_listeners.join(order);
        joined.map_err(|(address, error)| OpenError::Bind(address, error))?;
        let routes = self.direct_listeners.ways_to(order);
        routes.ok_or_else(|| {
            OpenError::Bind(order.spec.address(0), io::ErrorKind::AddrNotAvailable.into())
        })
    }

    /// The sockets to be passed to the worker's process.
    pub(super) fn sockets(&self, order: &Spawn) -> Vec<&Socket> {
        match self.workers.get(&order.id).map(|bound| &bound.binding) {
            None | Some(Binding::Own) => Vec::new(),
            Some(Binding::Inherited { address, .. }) => {
                let inherited = self.ports.get(address);
                inherited
                    .and_then(|inherited| inherited.port.socket(order.id))
                    .into_iter()
                    .collect()
            }
            Some(Binding::Unix(socket)) => vec![socket.socket()],
            Some(Binding::Direct(_)) => self.direct_listeners.sockets(order),
        }
    }

    /// A socket for a probe, to be connected to the worker's `endpoint`. If several workers listen
    /// there, the connection reaches the right one if it is made while the returned guard exists,
    /// and before the next call of this function for any of them.
    ///
    /// # Errors
    /// If there is no descriptor or no port left for it.
    pub(super) fn probe_socket(
        &mut self,
        id: WorkerId,
        endpoint: &Endpoint,
    ) -> io::Result<(Socket, Option<PinGuard>)> {
        match self.workers.get_mut(&id).map(|bound| &mut bound.binding) {
            Some(Binding::Direct(direct)) => {
                let (socket, guard) = direct.route.open()?;
                direct.probe = socket.try_clone().ok();
                Ok((socket, Some(guard)))
            }
            Some(Binding::Inherited { address, .. })
                if let Some(inherited) = self.ports.get_mut(address) =>
            {
                Ok((inherited.port.way_to(id)?, None))
            }
            Some(Binding::Own | Binding::Inherited { .. } | Binding::Unix(_)) | None => {
                Ok((endpoint.way_of_a_probe()?, None))
            }
        }
    }

    /// Records that no probe waits in the worker's accept queue any more.
    pub(super) fn probe_ended(&mut self, id: WorkerId) {
        if let Some(Bound { binding: Binding::Direct(direct), .. }) = self.workers.get_mut(&id) {
            direct.probe = None;
        }
    }

    /// The worker that connections to the address of `id` reach until `id` is
    /// [activated](Self::activate), if that worker expects another PROXY protocol header than `id`.
    pub(super) fn displaced_by(&self, id: WorkerId) -> Option<WorkerId> {
        let bound = self.workers.get(&id)?;
        let Binding::Inherited { address, .. } = bound.binding else { return None };
        let before = self.ports.get(&address)?.port.selected().filter(|before| *before != id)?;
        let is_other = self.workers.get(&before)?.proxy_protocol != bound.proxy_protocol;
        is_other.then_some(before)
    }

    /// The worker is in rotation: from now on, connections to an address that it shares with its
    /// predecessor reach this worker.
    ///
    /// # Errors
    /// If the system refuses it. The connections then reach the same worker as before.
    pub(super) fn activate(&mut self, id: WorkerId) -> io::Result<()> {
        let Some(bound) = self.workers.get(&id) else { return Ok(()) };
        match &bound.binding {
            Binding::Inherited { address, .. } => match self.ports.get_mut(address) {
                Some(inherited) => inherited.port.select(id),
                None => Ok(()),
            },
            Binding::Own | Binding::Unix(_) | Binding::Direct(_) => Ok(()),
        }
    }

    /// The same for the public addresses of a service: its workers in rotation, each given with its
    /// slot, share the new connections, and no other worker gets any.
    pub(super) fn rotate(&self, service: &str, balance: Balance, turns: &[(u32, WorkerId)]) {
        self.direct_listeners.rotate(service, balance, turns);
    }

    /// How many connections wait in a worker's accept queues, if its connections don't pass through
    /// lbd.
    pub(in crate::daemon) fn queued(&self, id: WorkerId) -> Option<u64> {
        self.direct_listeners.queued(id)
    }

    /// Accepts the clients that wait for the worker, as long as there is a `permit` for each; the
    /// worker may go on accepting too. If the connection of its probe waits there, it is closed.
    /// `None` if lbd has no socket to accept from.
    pub(super) fn drain_queue(&mut self, id: WorkerId, permit: MayAccept) -> Option<Vec<Drained>> {
        let Self { workers, ports, direct_listeners, acceptor, may_grow, .. } = self;
        let Bound { service, proxy_protocol, binding } = workers.get(&id)?;
        acceptor.set_permit(Some(permit));
        let drained = match binding {
            Binding::Own => return None,
            Binding::Inherited { address, .. } => {
                ports.get(address)?.port.drain_queue(Some(id), acceptor)
            }
            Binding::Unix(socket) => with_header(*proxy_protocol, socket.drain_queue(acceptor)),
            Binding::Direct(direct) => direct.clients(direct_listeners.drain_queue(id, acceptor)),
        };
        *may_grow = true;
        Some(of_service(service, drained))
    }

    /// No process has the worker's sockets any more. They stay open, with the connections that wait
    /// there, until a successor takes them over or [`collect_leftovers`](Self::collect_leftovers)
    /// empties them. Returns whether connections to this worker may reach a successor from now on.
    pub(super) fn release(
        &mut self,
        id: WorkerId,
        former: Former,
        permit: impl FnOnce(&Arc<str>) -> MayAccept,
    ) -> bool {
        let Some(bound) = self.workers.remove(&id) else { return false };
        let Bound { service, proxy_protocol, binding } = bound;
        match binding {
            Binding::Own => {}
            Binding::Inherited { address, is_picked } => {
                if let Some(inherited) = self.ports.get_mut(&address) {
                    inherited.port.abandon(id, former == Former::Failed);
                    // The supervisor was never told which port lbd picked, and so can't release it.
                    inherited.is_released |= is_picked && former == Former::NeverRan;
                    self.leftover_ports.insert(address);
                    return true;
                }
            }
            Binding::Unix(socket) => {
                if former != Former::NeverRan {
                    self.orphans.push(Orphan { socket, service, proxy_protocol });
                }
            }
            Binding::Direct(direct) => {
                if direct.probe.is_some() {
                    self.acceptor.set_permit(Some(permit(&service)));
                    // Before the kernel moves the waiting connections to another worker, which
                    // would answer the probe as well.
                    let waiting = self.direct_listeners.drain_queue(id, &mut self.acceptor);
                    self.left.extend(of_service(&service, direct.clients(waiting)));
                }
                self.direct_listeners.leave(id, Instant::now());
            }
        }
        false
    }

    /// No further worker will inherit a socket on this port: it is closed once its accept queues
    /// are [empty](Self::collect_leftovers).
    pub(in crate::daemon) fn release_port(&mut self, address: SocketAddr) {
        if let Some(inherited) = self.ports.get_mut(&address) {
            inherited.is_released = true;
            self.leftover_ports.insert(address);
            // It may come after this event's look at the queues.
            self.may_grow = true;
        }
    }

    /// Resets what [`has_more_to_drain`](Self::has_more_to_drain) remembers.
    pub(super) fn begin(&mut self) {
        self.may_grow = false;
        self.acceptor.begin();
    }

    /// Whether to drain queues again soon, since connections may arrive there without an event: the
    /// kernel may have given a worker a connection whose handshake ends only now; a data thread may
    /// have been connecting to the worker; and connections that were left for want of a permit may
    /// get one.
    pub(in crate::daemon) fn has_more_to_drain(&self) -> bool {
        self.may_grow || self.direct_listeners.has_leftovers() || self.acceptor.is_short()
    }

    /// Takes the clients out of the accept queues of workers that are gone. The caller hands them
    /// to other workers of their service. If no worker `can_serve` a service, its clients stay for
    /// a successor, as long as there `is` such a service and the port was not
    /// [released](Self::release_port). `permit` is asked for each client; a client without a permit
    /// stays in the queue until the next time.
    pub(super) fn collect_leftovers(
        &mut self,
        can_serve: impl Fn(&str) -> bool,
        is: impl Fn(&str) -> bool,
        permit: impl Fn(&Arc<str>) -> MayAccept,
    ) -> Vec<Drained> {
        let Self { ports, leftover_ports, orphans, acceptor, may_grow, .. } = self;
        let mut drained = Vec::new();
        leftover_ports.retain(|address| {
            let Some(inherited) = ports.get_mut(address) else { return false };
            let InheritedPort { port, service, is_released } = inherited;
            acceptor.set_permit(Some(permit(service)));
            drained.extend(of_service(service, port.collect_leftovers(acceptor)));
            if *is_released || can_serve(service) {
                drained.extend(of_service(service, port.drain_queue(None, acceptor)));
                *may_grow |= port.has_leftovers();
            }
            if *is_released && !acceptor.is_short() {
                ports.remove(address);
                return false;
            }
            *is_released || port.has_leftovers()
        });
        orphans.retain(|Orphan { socket, service, proxy_protocol }| {
            let is_over = can_serve(service) || !is(service);
            if is_over {
                // Data threads that still use an older pool then get an error and pick another
                // worker.
                _ = socket.refuse();
                acceptor.set_permit(Some(permit(service)));
                let clients = with_header(*proxy_protocol, socket.drain_queue(acceptor));
                drained.extend(of_service(service, clients));
            }
            !is_over || acceptor.is_short()
        });
        drained
    }

    /// The same at public addresses, including the clients that the kernel gave to no worker.
    pub(super) fn collect_public_leftovers(
        &mut self,
        permit: impl Fn(&Arc<str>) -> MayAccept,
        now: Instant,
    ) -> Vec<Drained> {
        let Self { direct_listeners, acceptor, watch_at, left, .. } = self;
        let mut drained = std::mem::take(left);
        let mut clients = direct_listeners.collect_leftovers(now, acceptor, &permit);
        if *watch_at <= now {
            *watch_at = now + WATCH_PAUSE;
            clients.extend(direct_listeners.watch(now, acceptor));
        }
        // The kernel hands over client connections as they are, without a PROXY protocol header.
        let client = |socket| DrainedConnection { socket, proxy_protocol: None };
        drained.extend(clients.into_iter().map(|(service, socket)| (service, client(socket))));
        drained
    }

    /// When the public addresses are to be checked again at the latest.
    pub(in crate::daemon) fn watch_at(&self) -> Option<Instant> {
        (!self.direct_listeners.is_empty()).then_some(self.watch_at)
    }
}

impl Direct {
    /// The clients among the accepted connections: all but the probe's.
    fn clients(&self, waiting: Vec<Socket>) -> Vec<DrainedConnection> {
        let is_probe = |accepted: &Socket| {
            let from = |probe: &Socket| {
                Some(
                    probe.local_addr().ok()?.as_socket()?
                        == accepted.peer_addr().ok()?.as_socket()?,
                )
            };
            self.probe.as_ref().and_then(from) == Some(true)
        };
        // The kernel hands over client connections as they are, without a PROXY protocol header.
        with_header(None, waiting.into_iter().filter(|socket| !is_probe(socket)).collect())
    }
}

impl Opened {
    fn at(address: SocketAddr, listens: Listens) -> Self {
        Self { reached: Reached::At(address.into()), listens, port: Some(address.port()) }
    }
}

fn with_header(
    proxy_protocol: Option<ProxyProtocol>,
    sockets: Vec<Socket>,
) -> Vec<DrainedConnection> {
    let connection = |socket| DrainedConnection { socket, proxy_protocol };
    sockets.into_iter().map(connection).collect()
}

fn of_service(service: &Arc<str>, drained: Vec<DrainedConnection>) -> Vec<Drained> {
    drained.into_iter().map(|connection| (Arc::clone(service), connection)).collect()
}

impl OpenError {
    /// Why `address` can't be bound.
    fn of(address: SocketAddr, error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::AddrInUse {
            Self::PortTaken(address, Holder::of(address))
        } else {
            Self::Bind(address, error)
        }
    }
}

/// What an operator can do about the holder of the port.
fn taken_hint(port: u16, holder: &Holder) -> String {
    match holder {
        Holder::Listener { process: Some(_), .. } | Holder::Orphan => String::new(),
        Holder::Listener { .. } | Holder::Unknown => {
            format!("; `ss -ltnp 'sport = :{port}'` shows which")
        }
        Holder::Connection { .. } => format!(
            "; `sysctl net.ipv4.ip_local_reserved_ports={port}` keeps it from being given to those \
             that go out"
        ),
        Holder::TimeWait(_) => {
            "; with socket = \"inherit\" nobody has to wait for it, or have the \
             program set SO_REUSEADDR"
                .to_owned()
        }
    }
}
