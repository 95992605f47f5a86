//! How each worker is reached: the sockets that lbd makes for workers, from before a worker's start
//! until nobody waits in its accept queue any more.
//!
//! Every worker has one binding, whatever `socket` and `route` say, and its life takes the same steps:
//! [`open`](Bindings::open), [`sockets`](Bindings::sockets) to pass to its process,
//! [`probe_socket`](Bindings::probe_socket), [`activate`](Bindings::activate) when it is in rotation,
//! [`drain_queue`](Bindings::drain_queue) where it will not take what waits, and
//! [`release`](Bindings::release) when no process has the sockets any more. What is left in them then
//! comes from [`collect_leftovers`](Bindings::collect_leftovers), unless a successor takes it over.
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

/// A client that waited unread at a worker, and the service whose it is.
pub(in crate::daemon) type Drained = (Arc<str>, DrainedConnection);

/// How all workers are reached.
#[derive(Debug)]
pub(in crate::daemon) struct Bindings {
    workers: HashMap<WorkerId, Bound>,
    /// The ports whose sockets workers inherit: a port outlives each of its workers.
    ports: HashMap<SocketAddr, InheritedPort>,
    /// Those that may have sockets which nobody has.
    leftover_ports: BTreeSet<SocketAddr>,
    /// The unix sockets of workers that are gone, with what waits there.
    orphans: Vec<Orphan>,
    /// Where a unix socket can be made.
    folder: PathBuf,
    /// The public addresses that workers have sockets on.
    pub(in crate::daemon) direct_listeners: DirectListeners,
    /// When those are looked after again.
    watch_at: Instant,
    /// Clients that waited for workers which are gone, to be handed over.
    left: Vec<Drained>,
    /// Queues were emptied, since [`begin`](Self::begin), that may fill again.
    may_grow: bool,
    acceptor: Acceptor,
}

/// How one worker is reached.
#[derive(Debug)]
struct Bound {
    service: Arc<str>,
    /// The header that it expects.
    proxy_protocol: Option<ProxyProtocol>,
    binding: Binding,
}

#[derive(Debug)]
enum Binding {
    /// At a port that it binds itself: lbd has no socket there.
    Own,
    /// At this one of the [ports](Bindings::ports).
    Inherited {
        address: SocketAddr,
        /// lbd has picked the port, as none was asked for.
        is_picked: bool,
    },
    Unix(UnnamedUnixListener),
    Direct(Direct),
}

/// A worker that the kernel hands connections to.
#[derive(Debug)]
struct Direct {
    route: PinnedRoute,
    /// A copy of the probe's socket while that may wait in the worker's accept queue: nobody else has
    /// its port meanwhile, and what comes from there is no client.
    probe: Option<Socket>,
}

/// A port whose sockets workers inherit, and the service whose workers do.
#[derive(Debug)]
struct InheritedPort {
    port: Port<WorkerId>,
    service: Arc<str>,
    /// No worker will be on it any more.
    is_released: bool,
}

#[derive(Debug)]
struct Orphan {
    socket: UnnamedUnixListener,
    service: Arc<str>,
    proxy_protocol: Option<ProxyProtocol>,
}

/// What [`Bindings::open`] has made.
#[derive(Debug)]
pub(super) struct Opened {
    /// How connections get to the worker.
    pub reached: Reached,
    /// Where the worker is to listen.
    pub listens: Listens,
    /// Its port, if it has one. Where all workers of a service are on the same, that is a name, if it
    /// was given one.
    pub port: Option<u16>,
}

/// How connections get to a worker.
#[derive(Debug)]
pub(super) enum Reached {
    At(Endpoint),
    /// Past those that share its addresses.
    By(PinnedRoutes),
}

/// What became of the worker that had the sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Former {
    /// No process ever had them.
    NeverRan,
    /// It never was healthy.
    Failed,
    /// It was.
    Served,
}

/// The sockets for a worker can't be had.
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
    /// None yet. Unix sockets are made in `folder`.
    ///
    /// # Errors
    /// Where the system has no timer left.
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

    /// Makes the sockets that a worker is to have, without a client for it yet.
    ///
    /// # Errors
    /// Where one can't be had, and none is kept.
    pub(super) fn open(&mut self, order: &Spawn) -> Result<Opened, OpenError> {
        let spec = &*order.spec;
        let wanted = spec.address(order.port.unwrap_or(0));
        let (binding, opened) = match spec.socket {
            // Whoever has the port would pass for the worker that is to bind it.
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

    /// A listening socket for the worker, on a port that is bound now if it is not yet.
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

    /// A listening socket for the worker on each of its public addresses.
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

    /// A socket for a probe, to be connected to `endpoint`, where the worker is reached. Where several
    /// listen, the connection reaches the one that is meant if it is made while the guard is there,
    /// and before the next call of this for any of them.
    ///
    /// # Errors
    /// Where there is no descriptor or no port for it.
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

    /// No probe waits in the worker's accept queue any more.
    pub(super) fn probe_ended(&mut self, id: WorkerId) {
        if let Some(Bound { binding: Binding::Direct(direct), .. }) = self.workers.get_mut(&id) {
            direct.probe = None;
        }
    }

    /// Whom connections to the address of `id` reach until it is [activated](Self::activate), where
    /// that one expects another header than `id` does.
    pub(super) fn displaced_by(&self, id: WorkerId) -> Option<WorkerId> {
        let bound = self.workers.get(&id)?;
        let Binding::Inherited { address, .. } = bound.binding else { return None };
        let before = self.ports.get(&address)?.port.selected().filter(|before| *before != id)?;
        let is_other = self.workers.get(&before)?.proxy_protocol != bound.proxy_protocol;
        is_other.then_some(before)
    }

    /// The worker is in rotation: connections to an address that it shares with others reach it from
    /// now on.
    ///
    /// # Errors
    /// Where the system refuses it, and they reach whom they reached before.
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

    /// The same for the public addresses of a service: its workers in rotation, each with its slot,
    /// have turns there, and nobody else.
    pub(super) fn rotate(&self, service: &str, balance: Balance, turns: &[(u32, WorkerId)]) {
        self.direct_listeners.rotate(service, balance, turns);
    }

    /// How many connections wait for a worker whose connections don't come through lbd.
    pub(in crate::daemon) fn queued(&self, id: WorkerId) -> Option<u64> {
        self.direct_listeners.queued(id)
    }

    /// Accepts every client that waits for the worker, which may go on to accept too, as far as there
    /// is a `permit`; its probe's connection is closed if it waits there. `None` where lbd has no
    /// socket to accept from.
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

    /// No process has the worker's sockets any more. They stay, with what waits in them, until a
    /// successor takes them over or [`collect_leftovers`](Self::collect_leftovers) empties them. Tells
    /// whether what led to the worker may lead to a successor from now on.
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
                    // Who asked for it was never told which it is, and can't release it.
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
                    // Before the kernel moves what waits to somebody who would answer them too.
                    let waiting = self.direct_listeners.drain_queue(id, &mut self.acceptor);
                    self.left.extend(of_service(&service, direct.clients(waiting)));
                }
                self.direct_listeners.leave(id, Instant::now());
            }
        }
        false
    }

    /// No worker will be on this port any more whose sockets workers inherit: it is closed when
    /// [nobody waits](Self::collect_leftovers) there.
    pub(in crate::daemon) fn release_port(&mut self, address: SocketAddr) {
        if let Some(inherited) = self.ports.get_mut(&address) {
            inherited.is_released = true;
            self.leftover_ports.insert(address);
        }
    }

    /// Begins anew to remember whether there is [more to drain](Self::has_more_to_drain).
    pub(super) fn begin(&mut self) {
        self.may_grow = false;
        self.acceptor.begin();
    }

    /// Whether queues are to be looked at again soon, for clients that nobody tells of: the kernel may
    /// have given a worker a connection whose handshake ends only now, a data thread may have been on
    /// the way to it, and where there was no room for all that wait, there will be.
    pub(in crate::daemon) fn has_more_to_drain(&self) -> bool {
        self.may_grow || self.direct_listeners.has_leftovers() || self.acceptor.is_short()
    }

    /// Takes the clients out of the sockets of workers that are gone. They are to be handed to another
    /// worker of their service; where none `can_serve`, they are left to a successor, as long as there
    /// `is` such a service, and the port was not [released](Self::release_port). `permit` is asked for
    /// each client of a service; without one it stays where it is, for the next time.
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
                // Who comes by an older pool goes to another worker.
                _ = socket.refuse();
                acceptor.set_permit(Some(permit(service)));
                let clients = with_header(*proxy_protocol, socket.drain_queue(acceptor));
                drained.extend(of_service(service, clients));
            }
            !is_over || acceptor.is_short()
        });
        drained
    }

    /// The same at public addresses, with those that the kernel gave to nobody.
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
        // Nothing was put in front of what the kernel gave to them.
        let client = |socket| DrainedConnection { socket, proxy_protocol: None };
        drained.extend(clients.into_iter().map(|(service, socket)| (service, client(socket))));
        drained
    }

    /// When the public addresses are to be looked after again at the latest.
    pub(in crate::daemon) fn watch_at(&self) -> Option<Instant> {
        (!self.direct_listeners.is_empty()).then_some(self.watch_at)
    }
}

impl Direct {
    /// The clients among those that waited.
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
        // Nothing was put in front of what the kernel gave to it.
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
    /// Why `address` can't be had.
    fn of(address: SocketAddr, error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::AddrInUse {
            Self::PortTaken(address, Holder::of(address))
        } else {
            Self::Bind(address, error)
        }
    }
}

/// What would help against who has it.
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
