//! The public addresses whose connections the kernel hands to workers (`route = "direct"`), and the
//! workers' sockets on them.
//!
//! lbd's own socket on such an address is a listener of the data plane like any other: connections
//! that the kernel gives to no worker come to lbd, which holds them and hands them on. An address
//! stays in this table for as long as a worker has a socket on it, even if the configuration has it
//! no more.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use socket2::Socket;

use crate::{
    config::{self, Balance, Listen, Route},
    net::{
        Acceptor, MayAccept,
        direct::{Choice, Public, Steering, Watched},
    },
    proxy::PinnedRoutes,
    supervisor::{Spawn, WorkerId},
};

/// The kernel can't be set up to hand out the connections to an address.
#[derive(Debug, thiserror::Error)]
#[error("cannot have the kernel hand out connections to {address}: {cause}{hint}")]
pub struct SteerError {
    address: SocketAddr,
    #[source]
    cause: io::Error,
    hint: &'static str,
}

/// All public addresses with `route = "direct"`.
#[derive(Debug, Default)]
pub(super) struct DirectListeners(HashMap<SocketAddr, Entry>);

/// How often lbd checks that connections are still steered by its own program.
pub(super) const WATCH_PAUSE: Duration = Duration::from_secs(1);

/// How long a warning about an address is not repeated.
const TOLD_PAUSE: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Entry {
    public: Public<WorkerId>,
    /// The service that has the address: the workers in its rotation get the connections.
    service: Arc<str>,
    /// lbd's own listener is closed, and the workers get no new clients.
    closed: bool,
    /// The configuration in force has the address.
    is_wanted: bool,
    /// The workers that have a socket here and are not gone.
    workers: BTreeSet<WorkerId>,
    /// When the log last said that another program steered the connections.
    told: Option<Instant>,
}

/// Addresses whose connections can be steered, but are not yet.
#[derive(Debug, Default)]
pub(super) struct Steerable(Vec<Public<WorkerId>>);

impl DirectListeners {
    /// Makes sure that the connections to all `route = "direct"` addresses of `services` can be
    /// steered. Changes nothing for clients and workers. `fallback` finds lbd's own socket on an
    /// address.
    ///
    /// # Errors
    /// The first address whose connections can't be steered.
    pub(super) fn prepare(
        &self,
        services: &[config::Service],
        fallback: impl Fn(SocketAddr) -> Option<io::Result<Socket>>,
    ) -> Result<Steerable, (Arc<str>, SteerError)> {
        let mut steerable = Vec::new();
        for service in services.iter().filter(|service| service.worker.route() == Route::Direct) {
            for &address in &service.worker.public {
                if self.0.contains_key(&address) {
                    continue;
                }
                let own = fallback(address).unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()));
                let public = own.and_then(|own| Public::open(&own));
                let failed = |cause| (Arc::clone(&service.name), SteerError::new(address, cause));
                steerable.push(public.map_err(failed)?);
            }
        }
        Ok(Steerable(steerable))
    }

    /// Makes `services` the owners of their addresses, and logs how new addresses are steered.
    pub(super) fn adopt(&mut self, steerable: Steerable, services: &[config::Service]) {
        let owner = |address: &SocketAddr| {
            services.iter().find(|service| service.worker.public.contains(address))
        };
        for public in steerable.0 {
            let Some(service) = owner(&public.address()) else { continue };
            let Steering { kind, why } = public.steering();
            let (service, address) = (Arc::clone(&service.name), public.address());
            tracing::info!(service = &*service, %address, %kind, why, "steering");
            let workers = BTreeSet::new();
            let (closed, is_wanted) = (false, true);
            let entry = Entry { public, service, closed, is_wanted, workers, told: None };
            self.0.insert(address, entry);
        }
        for (address, entry) in &mut self.0 {
            if let Some(service) = owner(address) {
                entry.service = Arc::clone(&service.name);
            }
        }
        self.want(services);
    }

    /// Keeps the addresses of `services`; others go when no worker has a socket on them.
    pub(super) fn want(&mut self, services: &[config::Service]) {
        for (address, entry) in &mut self.0 {
            let has = |service: &config::Service| service.worker.public.contains(address);
            entry.is_wanted = services.iter().any(has);
        }
    }

    /// lbd's listener for an address that is closed, but on which workers still have sockets, so
    /// that it can't be bound again.
    pub(super) fn reopen(&self, address: SocketAddr) -> Option<io::Result<Socket>> {
        self.0.get(&address).filter(|entry| entry.closed).map(|entry| entry.public.fallback())
    }

    /// Lets clients in again at the addresses for which [`reopen`](Self::reopen) gave a listener to
    /// the data plane, and at those that `moved` back to the service whose workers listen there.
    /// Returns the services to call [`rotate`](Self::rotate) for again.
    pub(super) fn opened(
        &mut self,
        addresses: Vec<SocketAddr>,
        moved: Vec<(SocketAddr, Arc<str>)>,
    ) -> BTreeSet<Arc<str>> {
        let mut services = BTreeSet::new();
        let new = addresses.into_iter().map(|address| (address, None));
        let moved = moved.into_iter().map(|(address, service)| (address, Some(service)));
        for (address, service) in new.chain(moved) {
            let is_closed = |entry: &&mut Entry| {
                entry.closed && service.as_ref().is_none_or(|service| *service == entry.service)
            };
            let Some(entry) = self.0.get_mut(&address).filter(is_closed) else { continue };
            entry.closed = false;
            services.insert(Arc::clone(&entry.service));
            if let Err(error) = entry.public.reopen() {
                tracing::error!(%address, %error, "cannot let clients in again");
            }
        }
        services
    }

    /// Stops giving new clients to the workers at the addresses of `service` that are not in
    /// `keep`. New clients are not let in: the kernel drops their SYN, or refuses them if lbd may
    /// attach no filter. If the listener `stays` open, they wait in its accept queue for its next
    /// owner instead.
    pub(super) fn close(
        &mut self,
        service: &str,
        keep: &[Listen],
        stays: impl Fn(&Listen) -> bool,
    ) {
        for (address, entry) in &mut self.0 {
            let listen = Listen::Tcp(*address);
            if *entry.service == *service && !keep.contains(&listen) && !entry.closed {
                entry.closed = true;
                let Entry { public, .. } = entry;
                let closed = if stays(&listen) { public.use_fallback() } else { public.close() };
                if let Err(error) = closed {
                    tracing::warn!(%address, %error, "clients may come until its workers end");
                }
            }
        }
    }

    /// Makes a socket for a worker on each of its addresses; none if one fails.
    pub(super) fn join(&mut self, order: &Spawn) -> Result<(), (SocketAddr, io::Error)> {
        for &address in &order.spec.public {
            let joined = match self.0.get_mut(&address) {
                Some(entry) => entry.join(order.id),
                None => Err(io::ErrorKind::NotFound.into()),
            };
            if let Err(error) = joined {
                self.leave(order.id, Instant::now());
                return Err((address, error));
            }
        }
        Ok(())
    }

    /// The sockets of a worker, in the order of its addresses.
    pub(super) fn sockets(&self, order: &Spawn) -> Vec<&Socket> {
        let socket = |address| self.0.get(address)?.public.socket(order.id);
        order.spec.public.iter().filter_map(socket).collect()
    }

    /// The pinned routes by which lbd reaches a worker.
    pub(super) fn ways_to(&self, order: &Spawn) -> Option<PinnedRoutes> {
        let pinned = |address| self.0.get(address)?.public.way_to(order.id);
        let mut routes = order.spec.public.iter().filter_map(pinned);
        Some(PinnedRoutes { first: routes.next()?, others: routes.collect() })
    }

    /// Has the kernel share the service's connections among the workers in rotation, each given
    /// with its slot.
    pub(super) fn rotate(&self, service: &str, balance: Balance, turns: &[(u32, WorkerId)]) {
        let choice = match balance {
            Balance::RoundRobin | Balance::LeastConnections => Choice::Rotation,
            Balance::SourceHash => Choice::SourceHash,
        };
        for (address, entry) in self.0.iter().filter(|(_, entry)| *entry.service == *service) {
            if let Err(error) = entry.public.rotate(choice, turns.iter().copied()) {
                tracing::error!(service, %address, %error, "cannot steer connections");
            }
        }
    }

    /// How many connections wait in a worker's accept queues.
    pub(super) fn queued(&self, id: WorkerId) -> Option<u64> {
        let queued: Vec<u32> =
            self.0.values().filter_map(|entry| entry.public.queued(id)).collect();
        (!queued.is_empty()).then(|| queued.into_iter().map(u64::from).sum())
    }

    /// How the connections of `service` are steered; if its addresses differ, the least capable
    /// way.
    pub(super) fn steering(&self, service: &str) -> Option<&Steering> {
        let own = self.0.values().filter(|entry| *entry.service == *service);
        own.map(|entry| entry.public.steering()).max_by_key(|steering| steering.kind)
    }

    /// The addresses that workers have sockets on.
    pub(super) fn addresses(&self) -> BTreeSet<SocketAddr> {
        self.0.keys().copied().collect()
    }

    /// Accepts the connections that wait for a worker which will not accept them.
    pub(super) fn drain_queue(&self, id: WorkerId, acceptor: &mut Acceptor) -> Vec<Socket> {
        self.0.values().flat_map(|entry| entry.public.drain_queue(id, acceptor)).collect()
    }

    /// No process has the worker's sockets any more.
    pub(super) fn leave(&mut self, id: WorkerId, now: Instant) {
        for entry in self.0.values_mut() {
            if entry.workers.remove(&id) {
                entry.public.leave(id, now);
            }
        }
    }

    /// Accepts connections that still arrive at sockets whose workers are gone, each with its
    /// service. Drops the addresses that are not [wanted](Self::want) and have no workers' sockets.
    pub(super) fn collect_leftovers(
        &mut self,
        now: Instant,
        acceptor: &mut Acceptor,
        permit: impl Fn(&Arc<str>) -> MayAccept,
    ) -> Vec<(Arc<str>, Socket)> {
        let mut drained = Vec::new();
        self.0.retain(|_, entry| {
            if entry.public.has_leftovers() {
                acceptor.set_permit(Some(permit(&entry.service)));
                let clients = entry.public.collect_leftovers(now, acceptor).into_iter();
                drained.extend(clients.map(|client| (Arc::clone(&entry.service), client)));
            }
            entry.is_wanted || !entry.workers.is_empty() || entry.public.has_leftovers()
        });
        drained
    }

    /// Checks that connections are still steered by lbd's program, and restores it otherwise: the
    /// sockets of all workers are in the reuseport group, and so a worker can detach the program or
    /// attach its own. To be called every [`WATCH_PAUSE`]. Returns the clients that meanwhile were
    /// given to no worker, each with its service.
    pub(super) fn watch(
        &mut self,
        now: Instant,
        acceptor: &mut Acceptor,
    ) -> Vec<(Arc<str>, Socket)> {
        let mut left = Vec::new();
        for (address, entry) in &mut self.0 {
            let Watched { clients, is_foreign, renewed } = entry.public.watch(acceptor);
            left.extend(clients.into_iter().map(|client| (Arc::clone(&entry.service), client)));
            let is_due = entry.told.is_none_or(|told| now >= told + TOLD_PAUSE);
            let service = &*entry.service;
            if (is_foreign || renewed.is_err()) && is_due {
                entry.told = Some(now);
                let error = renewed.err().map(|error| error.to_string());
                let hint = "a worker has replaced the program or taken it off, by its socket; until \
                            now it may have got connections out of turn";
                tracing::warn!(service, %address, error, hint, "somebody else steered connections");
            }
        }
        left
    }

    /// Whether there is something to [watch](Self::watch).
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether [`collect_leftovers`](Self::collect_leftovers) is to be called again soon.
    pub(super) fn has_leftovers(&self) -> bool {
        self.0.values().any(|entry| entry.public.has_leftovers())
    }
}

impl Entry {
    fn join(&mut self, id: WorkerId) -> io::Result<()> {
        self.public.join(id)?;
        self.workers.insert(id);
        Ok(())
    }
}

impl SteerError {
    fn new(address: SocketAddr, cause: io::Error) -> Self {
        let hint = match cause.kind() {
            io::ErrorKind::AddrInUse => {
                "; workers' sockets can't listen beside this one, which is another user's (as one \
                 that a service manager passes is): run lbd as that user, or write route = \"proxy\""
            }
            _ => "; write route = \"proxy\"",
        };
        Self { address, cause, hint }
    }
}
