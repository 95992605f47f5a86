//! The frontends: which addresses clients connect to, what each leads to, and what is published to
//! the data threads about the services behind them.

use std::{
    collections::HashMap,
    io, mem,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use socket2::Socket;

use super::{direct_listeners::DirectListeners, passed::PassedSockets};
use crate::{
    config::{self, Listen, UnixAccess},
    net::{BindError, Listener},
    proxy::{AccessChange, DataPlane, FrontendId, Pool, ServiceHandle},
};

/// All frontends, and the services that they lead to.
#[derive(Debug)]
pub(super) struct Frontends {
    plane: Rc<DataPlane>,
    access: Arc<AtomicBool>,
    /// The listening sockets that the service manager made, and keeps open.
    passed: PassedSockets,
    /// The open frontends, by the address that clients connect to.
    open: HashMap<Listen, Frontend>,
    services: HashMap<Arc<str>, Service>,
    /// Services that are gone but still hold connections: clients that read slowly.
    lingering: Vec<Arc<ServiceHandle>>,
}

/// An open listener, and where its clients go.
#[derive(Debug)]
struct Frontend {
    id: FrontendId,
    /// The service that its clients go to; during a reload that moves the listener, already the new
    /// one.
    service: Arc<str>,
}

/// A service, as the data threads know it.
#[derive(Debug)]
struct Service {
    handle: Arc<ServiceHandle>,
    /// The keepalive interval that its listeners use.
    keepalive: Duration,
}

/// The listeners that a reload opens. None of them accepts a client yet, so the reload can still be
/// refused.
#[derive(Debug, Default)]
pub(super) struct Bound {
    new: Vec<(Arc<str>, Listener)>,
    /// Open listeners that move to another service, and that service.
    moving: Vec<(Listen, Arc<str>)>,
    /// Changes of who may connect to open unix sockets. They take effect at once, and are undone if
    /// the reload is refused.
    access: Vec<AccessChange>,
}

impl Bound {
    /// The IP addresses of the new listeners.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        let address = |listener: &Listener| match listener.listen() {
            Listen::Tcp(address) => Some(*address),
            Listen::Unix(_) => None,
        };
        self.new.iter().filter_map(|(_, listener)| address(listener)).collect()
    }

    /// The IP addresses of the open listeners that go to another service, and to which.
    pub(super) fn moved(&self) -> Vec<(SocketAddr, Arc<str>)> {
        let address = |(listen, to): &(Listen, Arc<str>)| match listen {
            Listen::Tcp(address) => Some((*address, Arc::clone(to))),
            Listen::Unix(_) => None,
        };
        self.moving.iter().filter_map(address).collect()
    }
}

impl Frontends {
    pub(super) fn new(
        plane: Rc<DataPlane>,
        access: Arc<AtomicBool>,
        passed: PassedSockets,
    ) -> Self {
        let (open, services) = (HashMap::new(), HashMap::new());
        Self { plane, access, passed, open, services, lingering: Vec::new() }
    }

    /// Binds every address of `services` that is not open yet, unless a socket was passed for it or
    /// the `direct_listeners` have it. Nothing is accepted before [`Self::open`]; dropping the
    /// result closes the new listeners.
    pub(super) fn bind(
        &self,
        services: &[config::Service],
        direct_listeners: &DirectListeners,
    ) -> Result<Bound, (Arc<str>, BindError)> {
        let mut bound = Bound::default();
        for service in services {
            for listen in &service.listen {
                let name = Arc::clone(&service.name);
                let access = match listen {
                    Listen::Unix(path) => service.access(path),
                    Listen::Tcp(_) => UnixAccess::default(),
                };
                let Some(frontend) = self.open.get(listen) else {
                    match self.bind_one(listen, &access, services, direct_listeners) {
                        Ok(listener) => bound.new.push((name, listener)),
                        Err(error) => return Err((name, error)),
                    }
                    continue;
                };
                let change = self.plane.set_access(frontend.id, &access);
                bound.access.extend(change.map_err(|error| (Arc::clone(&name), error))?);
                if frontend.service != name {
                    bound.moving.push((listen.clone(), name));
                }
            }
        }
        Ok(bound)
    }

    /// lbd's own socket at `address`: an open one, or one that was just bound.
    pub(super) fn socket(&self, address: SocketAddr, bound: &Bound) -> Option<io::Result<Socket>> {
        let listen = Listen::Tcp(address);
        let open = self.open.get(&listen);
        open.and_then(|frontend| self.plane.socket(frontend.id)).or_else(|| {
            let new = bound.new.iter().find(|(_, listener)| *listener.listen() == listen);
            new.map(|(_, listener)| listener.socket())
        })
    }

    /// Assigns the listeners that move to their new services, so that the old services don't close
    /// them.
    pub(super) fn detach(&mut self, bound: &Bound) {
        for (listen, to) in &bound.moving {
            if let Some(frontend) = self.open.get_mut(listen) {
                frontend.service = Arc::clone(to);
            }
        }
    }

    /// Starts to accept on the new listeners, and sends the clients of [detached](Self::detach)
    /// listeners to their new service. The services must have been published before.
    pub(super) fn open(&mut self, bound: Bound) {
        bound.access.into_iter().for_each(AccessChange::keep);
        for (listen, name) in bound.moving {
            if let (Some(frontend), Some(service)) =
                (self.open.get(&listen), self.services.get(&name))
            {
                self.plane.retarget(frontend.id, &service.handle);
                self.tell_listening(&name, &listen);
            }
        }
        for (name, listener) in bound.new {
            if let Some(service) = self.services.get(&name) {
                let listen = listener.listen().clone();
                self.tell_listening(&name, &listen);
                let id = self.plane.open(&service.handle, listener);
                self.open.insert(listen, Frontend { id, service: name });
            }
        }
    }

    fn tell_listening(&self, service: &str, listen: &Listen) {
        let socket = self.passed.find(listen).map(|shared| shared.name());
        tracing::info!(service, address = %listen, socket, "listening");
    }

    /// Binds an address, beside those of lbd's own listeners on the same port that `services` no
    /// longer have: for example `0.0.0.0:80` beside `127.0.0.1:80`, which it replaces. If a socket
    /// was passed for the address, that one is used instead, and is never replaced.
    fn bind_one(
        &self,
        listen: &Listen,
        access: &UnixAccess,
        services: &[config::Service],
        direct_listeners: &DirectListeners,
    ) -> Result<Listener, BindError> {
        if let Some(listener) = self.passed.listener(listen, access) {
            return listener;
        }
        if let Listen::Tcp(address) = listen
            && let Some(Ok(socket)) = direct_listeners.reopen(*address)
        {
            return Listener::again(socket, listen);
        }
        let goes = |open: &Listen| {
            !services.iter().any(|service| service.listen.contains(open))
                && self.passed.find(open).is_none()
        };
        let overlaps = |open: &Listen| match (open, listen) {
            (Listen::Tcp(open), Listen::Tcp(new)) => open.port() == new.port(),
            (Listen::Tcp(_) | Listen::Unix(_), _) => false,
        };
        let replaced = self.open.iter().filter(|(open, _)| goes(open) && overlaps(open));
        let replaced: Vec<_> = replaced.map(|(_, frontend)| frontend.id).collect();
        match listen {
            Listen::Tcp(address) if !replaced.is_empty() => {
                self.plane.bind_beside(*address, &replaced)
            }
            Listen::Tcp(_) | Listen::Unix(_) => Listener::bind(listen, access),
        }
        .map_err(|error| self.passed.explain(listen, error))
    }

    /// Takes out the listeners of `service` that are not in `keep`; the caller closes them.
    pub(super) fn take_closing(&mut self, service: &str, keep: &[Listen]) -> Vec<FrontendId> {
        let goes = |listen: &Listen, frontend: &mut Frontend| {
            *frontend.service == *service && !keep.contains(listen)
        };
        self.open.extract_if(goes).map(|(_, frontend)| frontend.id).collect()
    }

    /// Whether the listener at `listen` is open, and another service's than `service`.
    pub(super) fn leads_elsewhere(&self, listen: &Listen, service: &str) -> bool {
        self.open.get(listen).is_some_and(|frontend| *frontend.service != *service)
    }

    /// Whether the service manager passed the socket at `listen`, and so has it open too.
    pub(super) fn is_passed(&self, listen: &Listen) -> bool {
        self.passed.find(listen).is_some()
    }

    /// Logs which passed sockets `services` have no use for: clients there are neither refused nor
    /// served.
    pub(super) fn tell_unused(&self, services: &[config::Service]) {
        self.passed.tell_unused(services);
    }

    /// Publishes a service's pool to the data threads.
    pub(super) fn publish(&mut self, name: &Arc<str>, pool: Pool) {
        let keepalive = pool.routing().keepalive;
        if let Some(service) = self.services.get_mut(name) {
            service.handle.publish(pool);
            if mem::replace(&mut service.keepalive, keepalive) != keepalive {
                let its = self.open.values().filter(|frontend| frontend.service == *name);
                its.for_each(|frontend| self.plane.keep_alive(frontend.id, keepalive));
            }
            return;
        }
        let handle = self.plane.service(Arc::clone(name), pool, Arc::clone(&self.access));
        self.services.insert(Arc::clone(name), Service { handle, keepalive });
    }

    /// The service of that name, as the data threads know it.
    pub(super) fn service(&self, service: &str) -> Option<&Arc<ServiceHandle>> {
        self.services.get(service).map(|service| &service.handle)
    }

    /// Removes a service that has neither listeners nor workers left.
    pub(super) fn forget(&mut self, service: &str) {
        self.lingering.extend(self.services.remove(service).map(|service| service.handle));
        self.lingering.retain(|handle| handle.active() > 0);
    }

    /// The number of connections that all services hold.
    pub(super) fn active(&self) -> usize {
        self.handles().map(|handle| handle.active()).sum()
    }

    /// Returns when no service holds a connection. May be dropped at any time.
    pub(super) async fn emptied(&self) {
        for handle in self.handles() {
            handle.emptied().await;
        }
    }

    fn handles(&self) -> impl Iterator<Item = &Arc<ServiceHandle>> {
        self.services.values().map(|service| &service.handle).chain(&self.lingering)
    }
}
