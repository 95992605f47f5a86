//! Listening sockets that the service manager made and passed to lbd (sd_listen_fds(3)).
//!
//! They outlive lbd, so clients that connect while lbd is being restarted wait in their accept
//! queues instead of being refused. So lbd never changes anything about such a socket that its next
//! owner would notice: its accept queue is not emptied when lbd closes it, and no filter is
//! attached to it. lbd keeps a copy for as long as it runs, so that a reload that brings an address
//! back finds its socket again.

use std::{
    collections::HashMap,
    io,
    os::fd::{FromRawFd as _, OwnedFd, RawFd},
    sync::Arc,
};

use socket2::{Socket, Type};
use tracing::{info, warn};

use crate::{
    config::{self, Listen, UnixAccess},
    net::{BindError, Listener, Shared},
};

/// The sockets that were passed to this process according to its environment, not yet examined.
#[derive(Debug)]
pub struct Passed(io::Result<Vec<(OwnedFd, String)>>);

impl Passed {
    /// Takes the descriptors that `LISTEN_FDS`, `LISTEN_PID` and `LISTEN_FDNAMES` name; none if
    /// they are meant for another process. From here on they are close-on-exec. The variables stay
    /// set, but are not passed on to workers, like all others that are for lbd alone.
    ///
    /// # Safety
    /// To be called once, before this process opens a descriptor or forks: only then are the
    /// descriptors from 3 on those that the service manager left, and owned by nothing else.
    #[must_use]
    pub unsafe fn from_environment() -> Self {
        // SAFETY: the caller says that the descriptors are ours alone; that each is open has just
        // been seen, by a call on it that went well.
        let own = |fd: RawFd| unsafe { OwnedFd::from_raw_fd(fd) };
        let fds = sd_notify::listen_fds_with_names();
        Self(fds.map(|fds| fds.map(|(fd, name)| (own(fd), name)).collect()))
    }

    /// No passed sockets.
    #[must_use]
    pub fn none() -> Self {
        Self(Ok(Vec::new()))
    }
}

/// The passed sockets that a configuration has used since the start.
#[derive(Debug)]
pub(super) struct PassedSockets {
    sockets: Vec<Arc<Shared>>,
    /// Sockets that are used for an address that they are not bound to, because their name says so:
    /// indexes into `sockets`.
    named: HashMap<Listen, usize>,
}

impl PassedSockets {
    /// Keeps the sockets that `services` use; logs which they don't, and closes those.
    pub(super) fn choose(passed: Passed, services: &[config::Service]) -> Self {
        let fds = passed.0.unwrap_or_else(|error| {
            warn!(%error, "cannot take over the sockets that LISTEN_FDS tells of");
            Vec::new()
        });
        let mut found = Vec::new();
        for (fd, name) in fds {
            match inspect(fd) {
                Ok(socket) => found.push((socket, name)),
                Err(Unfit { address, why }) => {
                    warn!(name, address, why, "a passed socket is of no use, closed");
                }
            }
        }
        Self::assign(found, services)
    }

    /// Assigns to each address the socket that is bound to it. The remaining sockets are assigned
    /// by name, in order: to the service of that name, for an address of the same kind that has no
    /// socket yet.
    fn assign(found: Vec<(Socket, String)>, services: &[config::Service]) -> Self {
        let mut sockets: Vec<Arc<Shared>> = Vec::new();
        let mut left = Vec::new();
        let wanted = |listen: &Listen| services.iter().any(|s| s.listen.contains(listen));
        for (socket, name) in found {
            let Ok(shared) = Shared::new(socket, name) else { continue };
            // Two sockets on one address share it by SO_REUSEPORT: lbd uses only the first.
            let twin = sockets.iter().any(|other| other.address() == shared.address());
            if wanted(shared.address()) && !twin {
                sockets.push(Arc::new(shared));
            } else {
                left.push(shared);
            }
        }
        let mut named = HashMap::new();
        for shared in left {
            let service = services.iter().find(|service| *service.name == *shared.name());
            let listen = service.and_then(|service| {
                service.listen.iter().find(|listen| {
                    same_kind(listen, shared.address())
                        && !named.contains_key(*listen)
                        && !sockets.iter().any(|socket| socket.address() == *listen)
                })
            });
            let (name, address) = (shared.name(), shared.address());
            let Some(listen) = listen.cloned() else {
                let hint = "no service listens there or has this name";
                warn!(name, %address, hint, "a passed socket is of no use, closed");
                continue;
            };
            info!(service = name, %listen, %address, "a passed socket is used for its name");
            named.insert(listen, sockets.len());
            sockets.push(Arc::new(shared));
        }
        Self { sockets, named }
    }

    /// The socket for `listen`, if one was passed.
    pub(super) fn find(&self, listen: &Listen) -> Option<&Arc<Shared>> {
        let bound = self.sockets.iter().find(|socket| socket.address() == listen);
        bound.or_else(|| self.sockets.get(*self.named.get(listen)?))
    }

    /// A listener on the socket for `listen`, if one was passed. Who may connect to it is up to the
    /// process that made it.
    pub(super) fn listener(
        &self,
        listen: &Listen,
        access: &UnixAccess,
    ) -> Option<Result<Listener, BindError>> {
        let shared = self.find(listen)?;
        if *access != UnixAccess::default() {
            let (name, address) = (shared.name(), shared.address());
            let hint = "write SocketMode=, SocketUser= and SocketGroup= in its unit instead";
            warn!(name, %address, hint, "a passed socket keeps its mode and owner");
        }
        Some(Listener::share(shared, listen))
    }

    /// Logs which of the sockets `services` no longer use. They stay open, and clients that connect
    /// there wait until an address comes back or the owner closes the socket.
    pub(super) fn tell_unused(&self, services: &[config::Service]) {
        let listens: Vec<_> = services.iter().flat_map(|service| &service.listen).collect();
        for (index, socket) in self.sockets.iter().enumerate() {
            let named = self.named.iter().filter(|(_, other)| **other == index);
            let mut stands_for = named.map(|(listen, _)| listen).chain([socket.address()]);
            if !stands_for.any(|listen| listens.contains(&listen)) {
                let (name, address) = (socket.name(), socket.address());
                let hint = "its clients wait until an address is its again or its unit is stopped";
                warn!(name, %address, hint, "a passed socket is not used any more");
            }
        }
    }

    /// Adds to an error that a passed socket, which is never closed, is why `listen` could not be
    /// bound, if that is so.
    pub(super) fn explain(&self, listen: &Listen, error: BindError) -> BindError {
        if error.kind() != io::ErrorKind::AddrInUse {
            return error;
        }
        match self.sockets.iter().find(|socket| in_the_way(socket, listen)) {
            Some(socket) => {
                let (name, address) = (socket.name(), socket.address());
                let takes = match (address, listen) {
                    (Listen::Tcp(a), Listen::Tcp(b)) if a.is_ipv6() && b.is_ipv4() => {
                        " and takes IPv4 clients too, unless BindIPv6Only=ipv6-only is set for it"
                    }
                    _ => "",
                };
                error.with_hint(format!(
                    "; the socket that was passed as {name:?} is bound to {address}{takes}: change \
                     the socket unit to this address and restart both units"
                ))
            }
            None => error,
        }
    }
}

/// Why a passed descriptor can't be used.
struct Unfit {
    address: Option<String>,
    why: String,
}

/// Checks that a descriptor is a listening stream socket.
fn inspect(fd: OwnedFd) -> Result<Socket, Unfit> {
    let socket = Socket::from(fd);
    let kind = socket.r#type().map_err(|error| Unfit { address: None, why: error.to_string() })?;
    let address = Shared::address_of(&socket);
    let shown = address.as_ref().map(ToString::to_string);
    let unfit = |why: &str| Err(Unfit { address: shown.clone(), why: why.to_owned() });
    if kind != Type::STREAM {
        return unfit("it is no stream socket: write ListenStream=");
    }
    if address.is_none() {
        return unfit("it has neither an IP address nor a path");
    }
    match socket.is_listener() {
        Ok(true) => Ok(socket),
        _ => unfit("it does not listen: write Accept=no"),
    }
}

fn same_kind(a: &Listen, b: &Listen) -> bool {
    matches!((a, b), (Listen::Tcp(_), Listen::Tcp(_)) | (Listen::Unix(_), Listen::Unix(_)))
}

/// Whether `socket` is what keeps `listen` from being bound.
fn in_the_way(socket: &Shared, listen: &Listen) -> bool {
    let (Listen::Tcp(bound), Listen::Tcp(wanted)) = (socket.address(), listen) else {
        return false;
    };
    let both = socket.is_dual_stack();
    let wildcard = bound.ip().is_unspecified() || wanted.ip().is_unspecified();
    let same_family = bound.is_ipv4() == wanted.is_ipv4();
    bound.port() == wanted.port() && (bound == wanted || wildcard && (same_family || both))
}
