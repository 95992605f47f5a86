//! The services' public side: their listeners and what is published to the data threads.

use std::{
    collections::HashMap,
    io,
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

/// The public sides of all services, by name.
#[derive(Debug)]
pub(super) struct Frontends {
    plane: Rc<DataPlane>,
    access: Arc<AtomicBool>,
    /// What the service manager made, and keeps.
    passed: PassedSockets,
    frontends: HashMap<Arc<str>, Front>,
    /// Services that are gone but still hold connections: clients that read slowly.
    lingering: Vec<Arc<ServiceHandle>>,
}

#[derive(Debug)]
struct Front {
    route: Arc<ServiceHandle>,
    open: HashMap<Listen, FrontendId>,
    /// What its listeners were last told.
    keepalive: Duration,
}

/// What a reload opens: nothing of it takes a client yet, so that the reload can still be refused.
#[derive(Debug, Default)]
pub(super) struct Bound {
    new: Vec<(Arc<str>, Listener)>,
    /// Open listeners that go from one service to another.
    moving: Vec<Move>,
    /// Who may connect to open unix sockets changes at once, and back if the reload is refused.
    access: Vec<AccessChange>,
}

impl Bound {
    /// The IP addresses that are bound for it.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        let address = |listener: &Listener| match listener.listen() {
            Listen::Tcp(address) => Some(*address),
            Listen::Unix(_) => None,
        };
        self.new.iter().filter_map(|(_, listener)| address(listener)).collect()
    }
}

#[derive(Debug)]
struct Move {
    listen: Listen,
    from: Arc<str>,
    to: Arc<str>,
}

impl Frontends {
    pub(super) fn new(
        plane: Rc<DataPlane>,
        access: Arc<AtomicBool>,
        passed: PassedSockets,
    ) -> Self {
        Self { plane, access, passed, frontends: HashMap::new(), lingering: Vec::new() }
    }

    /// Binds every address of `services` that is not open yet and for which no socket was passed, or is
    /// among the `direct_listeners`. Nobody is accepted until [`Self::open`]; dropped, all are let go.
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
                if let Some(id) = self.id(listen) {
                    let change = self.plane.set_access(id, &access);
                    bound.access.extend(change.map_err(|error| (Arc::clone(&name), error))?);
                }
                match self.owner(listen) {
                    Some(owner) if *owner == service.name => {}
                    Some(owner) => bound.moving.push(Move {
                        listen: listen.clone(),
                        from: Arc::clone(owner),
                        to: name,
                    }),
                    None => match self.bind_one(listen, &access, services, direct_listeners) {
                        Ok(listener) => bound.new.push((name, listener)),
                        Err(error) => return Err((name, error)),
                    },
                }
            }
        }
        Ok(bound)
    }

    /// lbd's own socket at `address`: one that is open, or was just bound.
    pub(super) fn socket(&self, address: SocketAddr, bound: &Bound) -> Option<io::Result<Socket>> {
        let listen = Listen::Tcp(address);
        let open = self.frontends.values().find_map(|front| front.open.get(&listen));
        open.and_then(|id| self.plane.socket(*id)).or_else(|| {
            let new = bound.new.iter().find(|(_, listener)| *listener.listen() == listen);
            new.map(|(_, listener)| listener.socket())
        })
    }

    /// Detaches what changes hands from the service that had it, which is not to close it.
    pub(super) fn detach(&mut self, bound: &Bound) -> Vec<(Arc<str>, Listen, FrontendId)> {
        let take = |change: &Move| {
            let id = self.frontends.get_mut(&change.from)?.open.remove(&change.listen)?;
            Some((Arc::clone(&change.to), change.listen.clone(), id))
        };
        bound.moving.iter().filter_map(take).collect()
    }

    /// Takes clients on what was bound, and on what was detached for it. The services must have been
    /// published before.
    pub(super) fn open(&mut self, bound: Bound, moved: Vec<(Arc<str>, Listen, FrontendId)>) {
        bound.access.into_iter().for_each(AccessChange::keep);
        for (name, listen, id) in moved {
            if let Some(front) = self.frontends.get_mut(&name) {
                let socket = self.passed.find(&listen).map(|shared| shared.name());
                tracing::info!(service = &*name, address = %listen, socket, "listening");
                self.plane.retarget(id, &front.route);
                front.open.insert(listen, id);
            }
        }
        for (name, listener) in bound.new {
            if let Some(front) = self.frontends.get_mut(&name) {
                let listen = listener.listen().clone();
                let socket = self.passed.find(&listen).map(|shared| shared.name());
                tracing::info!(service = &*name, address = %listen, socket, "listening");
                let id = self.plane.open(&front.route, listener);
                front.open.insert(listen, id);
            }
        }
    }

    fn id(&self, listen: &Listen) -> Option<FrontendId> {
        self.frontends.values().find_map(|front| front.open.get(listen)).copied()
    }

    fn owner(&self, listen: &Listen) -> Option<&Arc<str>> {
        let has = |front: &Front| front.open.contains_key(listen);
        self.frontends.iter().find(|(_, front)| has(front)).map(|(name, _)| name)
    }

    /// Binds beside those of our own listeners on the same port that `services` do without: as
    /// `0.0.0.0:80` beside `127.0.0.1:80`, which it replaces. A passed socket is taken instead, where
    /// there is one, and never replaced.
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
        let open = self.frontends.values().flat_map(|front| &front.open);
        let replaced: Vec<_> =
            open.filter(|(open, _)| goes(open) && overlaps(open)).map(|(_, id)| *id).collect();
        match listen {
            Listen::Tcp(address) if !replaced.is_empty() => {
                self.plane.bind_beside(*address, &replaced)
            }
            Listen::Tcp(_) | Listen::Unix(_) => Listener::bind(listen, access),
        }
        .map_err(|error| self.passed.explain(listen, error))
    }

    /// The listeners of `service` that are not in `keep`: to be closed by the caller.
    pub(super) fn take_closing(&mut self, service: &str, keep: &[Listen]) -> Vec<FrontendId> {
        let Some(front) = self.frontends.get_mut(service) else { return Vec::new() };
        front.open.extract_if(|listen, _| !keep.contains(listen)).map(|(_, id)| id).collect()
    }

    /// Whether the socket at `listen` is the service manager's too.
    pub(super) fn is_passed(&self, listen: &Listen) -> bool {
        self.passed.find(listen).is_some()
    }

    /// Says which passed sockets `services` have no use for: nobody is refused there, and nobody is
    /// served.
    pub(super) fn tell_unused(&self, services: &[config::Service]) {
        self.passed.tell_unused(services);
    }

    /// Publishes who can be handed a connection.
    pub(super) fn publish(&mut self, name: &Arc<str>, pool: Pool) {
        let keepalive = pool.routing().keepalive;
        if let Some(front) = self.frontends.get_mut(name) {
            front.route.publish(pool);
            if std::mem::replace(&mut front.keepalive, keepalive) != keepalive {
                front.open.values().for_each(|id| self.plane.keep_alive(*id, keepalive));
            }
            return;
        }
        let route = self.plane.service(Arc::clone(name), pool, Arc::clone(&self.access));
        let front = Front { route, open: HashMap::new(), keepalive };
        self.frontends.insert(Arc::clone(name), front);
    }

    pub(super) fn route(&self, service: &str) -> Option<&Arc<ServiceHandle>> {
        self.frontends.get(service).map(|front| &front.route)
    }

    /// Lets go of a service that has neither listeners nor workers left.
    pub(super) fn forget(&mut self, service: &str) {
        self.lingering.extend(self.frontends.remove(service).map(|front| front.route));
        self.lingering.retain(|route| route.active() > 0);
    }

    /// Connections held by all services.
    pub(super) fn active(&self) -> usize {
        self.routes().map(|route| route.active()).sum()
    }

    /// Returns when no service holds a connection. May be dropped at any time.
    pub(super) async fn emptied(&self) {
        for route in self.routes() {
            route.emptied().await;
        }
    }

    fn routes(&self) -> impl Iterator<Item = &Arc<ServiceHandle>> {
        self.frontends.values().map(|front| &front.route).chain(&self.lingering)
    }
}
