//! A public address whose connections the kernel itself hands to the workers.
//!
//! Each worker has a listening socket of its own on the address, and lbd has one, the *fallback
//! socket*. All are in one `SO_REUSEPORT` group, and a BPF program decides for each new connection
//! which socket gets it. There is no second connection and no copying, and the worker sees the
//! client's own address.
//!
//! ```text
//!             ┌─ program: whose turn? ─┐
//! SYN ─▶ group│  worker 0's socket     │─▶ its accept queue ─▶ worker 0
//!             │  worker 1's socket     │─▶ its accept queue ─▶ worker 1
//!             │  fallback socket       │─▶ lbd: holds the client, or assigns it
//!             └────────────────────────┘
//! ```
//!
//! Sockets without a turn in the rotation get no connection: those of workers that are not proven
//! healthy yet, that hang, drain or have exited. If no worker is in rotation, the fallback socket
//! gets every connection. lbd keeps a copy of each socket, so that its accept queue outlives the
//! worker. A [`PinnedRoute`] reaches one particular worker, as a probe needs it: the program
//! recognises the connection by its source port.
//!
//! Through its socket each worker has access to the group, and can replace the program or detach it
//! (socket(7)). So there is one more socket, the *sentinel*, which never has a turn. Now and then
//! lbd connects to it by a pinned route, as it would to a worker. If the connection does not arrive
//! there, the program in force is not lbd's own ([`Public::watch`]).
//!
//! Two kinds of programs implement one interface (`steer`): [`Kind::Ebpf`] if lbd may load it, else
//! [`Kind::Classic`]. [`Public::open`] tells which one is used, and why not the better one.

mod assembler;
mod bpf;
mod classic;
mod ebpf;
mod steer;
#[cfg(test)]
mod tests;
mod turns;

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::libc;
use socket2::{Domain, Socket, Type};

use super::{Acceptor, BACKLOG, accept_all, queue_length, refuse_new, unconnected};
use classic::Classic;
use ebpf::{Ebpf, KEYS};
use steer::Steer;
pub use turns::Choice;
use turns::{FALLBACK, Key, Turn};

/// The key of the sentinel. As the second socket, it also turns the fallback socket into a group.
const SENTINEL: Key = FALLBACK + 1;

/// How long a socket without turns stays open if the kernel does not move its queue to other
/// sockets: time for handshakes whose last segment is still in transit.
const HANDSHAKE: Duration = Duration::from_secs(1);

/// How connections are steered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Steering {
    /// The kind of program.
    pub kind: Kind,
    /// Why it is not the better kind, if so.
    pub why: Option<String>,
}

/// The kind of program that steers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// An eBPF program: strict rotation, counted.
    Ebpf,
    /// A classic BPF program: a random worker for each connection, not counted.
    Classic,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ebpf => "ebpf",
            Self::Classic => "classic",
        })
    }
}

/// A public address, and the sockets on it. Dropping it leaves the fallback socket as it was
/// before.
#[derive(Debug)]
pub struct Public<Owner> {
    address: SocketAddr,
    inside: SocketAddr,
    /// A copy of lbd's own socket.
    fallback: Socket,
    sentinel: Socket,
    /// A test that the next [`watch`](Self::watch) will send, and one that the last `watch` sent.
    prepared: Option<Test>,
    sent: Option<Test>,
    steer: Arc<dyn Steer>,
    steering: Steering,
    closed: Option<Closed>,
    members: Vec<Member<Owner>>,
    /// Sockets whose workers have exited, and since when.
    leaving: Vec<(Instant, Key, Socket)>,
}

/// A test connection to the sentinel.
#[derive(Debug)]
struct Test {
    socket: Socket,
    /// Routes the connection until it is established.
    pass: Option<PinGuard>,
}

impl Test {
    /// Connects. Returns `None` if lbd itself is short of what it needs for that.
    fn send(mut self, to: SocketAddr) -> Option<Self> {
        match self.socket.connect(&to.into()) {
            // On loopback the connection is usually established when this returns.
            Ok(()) => self.pass = None,
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
                if self.socket.peer_addr().is_ok() {
                    self.pass = None;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(_) => return None,
        }
        Some(self)
    }

    /// Whether this test is among the `clients` that the sentinel got; it is removed from them.
    /// Also true if the test is still in transit, which proves nothing.
    fn arrived(self, clients: &mut Vec<Socket>) -> bool {
        let own = self.socket.local_addr().ok().and_then(|local| local.as_socket());
        let is_own = |client: &Socket| {
            own.is_some() && client.peer_addr().ok().and_then(|peer| peer.as_socket()) == own
        };
        let found = clients.iter().position(is_own).map(|index| clients.swap_remove(index));
        // Closes by a reset, to leave no socket in TIME_WAIT every second.
        _ = self.socket.set_linger(Some(Duration::ZERO));
        let is_under_way =
            matches!(self.socket.take_error(), Ok(None)) && self.socket.peer_addr().is_err();
        found.is_some() || is_under_way
    }
}

/// The result of [`Public::watch`].
#[derive(Debug)]
pub struct Watched {
    /// Clients whose connections arrived at the sentinel: no worker has them, so they have to be
    /// assigned.
    pub clients: Vec<Socket>,
    /// Whether another process had replaced or detached the program.
    pub is_foreign: bool,
    /// Whether the program could be attached again.
    pub renewed: io::Result<()>,
}

/// How new clients are kept away from the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closed {
    /// By a filter on each socket that drops SYNs.
    Filters,
    /// By the program, which refuses all clients or sends them to the fallback socket.
    Program,
}

#[derive(Debug)]
struct Member<Owner> {
    owner: Owner,
    key: Key,
    socket: Socket,
}

impl<Owner: Copy + PartialEq> Public<Owner> {
    /// Creates a group around `fallback`, a listening TCP socket. It continues to get every client
    /// until the first call of [`rotate`](Self::rotate).
    ///
    /// # Errors
    /// If other sockets can't share its address (it belongs to another user, or not to lbd alone),
    /// or the kernel allows no steering program.
    pub fn open(fallback: &Socket) -> io::Result<Self> {
        let fallback = fallback.try_clone()?;
        let address = fallback.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidInput)?;
        let inside = inside(address);
        fallback.set_reuse_port(true)?;
        // A socket that listens already becomes a group only when a second socket joins it, and
        // only then can a program be attached. The second socket is the sentinel. Until the program
        // is attached it may get clients; the first `watch` returns them.
        let sentinel = beside(&fallback, address)?;
        sentinel.listen(BACKLOG)?;
        let (steer, steering) = Self::steer(&fallback, inside)?;
        let (members, leaving) = (Vec::new(), Vec::new());
        steer.join(SENTINEL, &sentinel)?;
        Ok(Self {
            address,
            inside,
            fallback,
            sentinel,
            prepared: None,
            sent: None,
            steer,
            steering,
            closed: None,
            members,
            leaving,
        })
    }

    /// Removes a socket without turns from the group: at once if the kernel moves its queue to
    /// other sockets, else after a while.
    fn dismiss(&mut self, key: Key, socket: Socket, now: Instant) {
        if self.steer.moves() {
            self.steer.leave(key, &socket);
        } else {
            self.leaving.push((now, key, socket));
        }
    }

    fn steer(fallback: &Socket, inside: SocketAddr) -> io::Result<(Arc<dyn Steer>, Steering)> {
        match Ebpf::start(fallback, inside) {
            Ok(steer) => Ok((Arc::new(steer), Steering { kind: Kind::Ebpf, why: None })),
            Err(refused) => {
                let why = match refused.source.kind() {
                    io::ErrorKind::PermissionDenied => "lbd has no CAP_BPF".to_owned(),
                    _ => format!("the kernel refuses the eBPF program: {refused}"),
                };
                let steer = Classic::start(fallback, inside)?;
                Ok((Arc::new(steer), Steering { kind: Kind::Classic, why: Some(why) }))
            }
        }
    }

    /// The address that clients connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How its connections are steered.
    #[must_use]
    pub fn steering(&self) -> &Steering {
        &self.steering
    }

    /// Creates a socket for `owner`, without a turn in the rotation.
    ///
    /// # Errors
    /// If the system refuses it, or the group is full.
    pub fn join(&mut self, owner: Owner) -> io::Result<()> {
        let taken = |key: &Key| {
            let leaving = self.leaving.iter().map(|(_, key, _)| key);
            self.members.iter().map(|member| &member.key).chain(leaving).any(|other| other == key)
        };
        let free = (SENTINEL + 1..KEYS).find(|key| !taken(key));
        let key = free.ok_or_else(|| io::Error::other("too many workers on this address"))?;
        let socket = beside(&self.fallback, self.address)?;
        socket.listen(BACKLOG)?;
        self.steer.join(key, &socket)?;
        self.members.push(Member { owner, key, socket });
        Ok(())
    }

    /// The socket of `owner`. It is blocking, as workers expect.
    #[must_use]
    pub fn socket(&self, owner: Owner) -> Option<&Socket> {
        self.member(owner).map(|member| &member.socket)
    }

    /// From now on new connections go to the owners in `turns`, in this order, and to no other
    /// socket. Each turn also has the number of its slot, which a successor shares. The turns of an
    /// owner that has no socket here go to the fallback socket.
    ///
    /// # Errors
    /// If the system refuses it; nothing changes then.
    pub fn rotate(
        &self,
        choice: Choice,
        turns: impl IntoIterator<Item = (u32, Owner)>,
    ) -> io::Result<()> {
        if self.closed == Some(Closed::Program) {
            return Ok(());
        }
        let key = |owner| self.member(owner).map_or(FALLBACK, |member| member.key);
        let turn = |(place, owner)| Turn { place, key: key(owner) };
        let turns: Vec<Turn> = turns.into_iter().map(turn).collect();
        // The same as an empty rotation, which costs nothing per connection.
        let all_fallback = turns.iter().all(|turn| turn.key == FALLBACK);
        self.steer.rotate(choice, if all_fallback { &[] } else { &turns })
    }

    /// Checks whether lbd's own program is still in force, and attaches it again. To be called
    /// about once a second: the result is about the time since the last call.
    pub fn watch(&mut self, acceptor: &mut Acceptor) -> Watched {
        let mut clients = accept_all(&self.sentinel, acceptor);
        let is_foreign = self.sent.take().is_some_and(|test| !test.arrived(&mut clients));
        // Sent before the program is attached again, so that the test is about the program in force
        // so far.
        let test = self.prepared.take().or_else(|| self.prepare_test());
        self.sent = test.and_then(|test| test.send(self.inside));
        let renewed = self.steer.renew(&self.fallback);
        if self.steer.except_renews() {
            self.prepared = self.prepare_test();
        }
        Watched { clients, is_foreign, renewed }
    }

    fn prepare_test(&self) -> Option<Test> {
        let steer = Arc::clone(&self.steer);
        let way = PinnedRoute { inside: self.inside, key: SENTINEL, routed_before: 0, steer };
        let (socket, pass) = way.open().ok()?;
        Some(Test { socket, pass: Some(pass) })
    }

    /// A route by which lbd reaches `owner` and no other worker.
    #[must_use]
    pub fn way_to(&self, owner: Owner) -> Option<PinnedRoute> {
        let key = self.member(owner)?.key;
        Some(PinnedRoute {
            inside: self.inside,
            key,
            routed_before: self.steer.routed(key).unwrap_or_default(),
            steer: Arc::clone(&self.steer),
        })
    }

    /// The number of connections in `owner`'s accept queue.
    #[must_use]
    pub fn queued(&self, owner: Owner) -> Option<u32> {
        queue_length(&self.member(owner)?.socket).ok()
    }

    /// Drains the accept queue of `owner`, which may go on accepting meanwhile. Connections made by
    /// a [`PinnedRoute`] are included.
    pub fn drain_queue(&self, owner: Owner, acceptor: &mut Acceptor) -> Vec<Socket> {
        let member = self.member(owner);
        member.map_or_else(Vec::new, |member| accept_all(&member.socket, acceptor))
    }

    /// Removes the socket of `owner`; no process but lbd has it any more, and it must have no turn.
    /// The kernel moves its queued connections to other sockets, or
    /// [`collect_leftovers`](Self::collect_leftovers) returns them.
    pub fn leave(&mut self, owner: Owner, now: Instant) {
        let Some(index) = self.members.iter().position(|member| member.owner == owner) else {
            return;
        };
        let Member { key, socket, .. } = self.members.swap_remove(index);
        self.dismiss(key, socket, now);
    }

    /// Drains the queues of sockets removed by [`leave`](Self::leave), and closes those whose time
    /// is over.
    pub fn collect_leftovers(&mut self, now: Instant, acceptor: &mut Acceptor) -> Vec<Socket> {
        let mut drained = Vec::new();
        for (since, key, socket) in std::mem::take(&mut self.leaving) {
            drained.extend(accept_all(&socket, acceptor));
            if now >= since + HANDSHAKE && !acceptor.is_short() {
                self.steer.leave(key, &socket);
            } else {
                self.leaving.push((since, key, socket));
            }
        }
        drained
    }

    /// Whether [`collect_leftovers`](Self::collect_leftovers) has anything left to do.
    #[must_use]
    pub fn has_leftovers(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// Keeps new clients out of every socket. Clients whose connect has been answered stay in the
    /// queues. A new client's SYN is dropped; it retries a second later, and finds either another
    /// server or a closed port. If lbd may attach no filter (Linux 6.18 requires a capability for
    /// it), the program refuses new clients at once.
    ///
    /// # Errors
    /// If neither is possible: clients go to the fallback socket.
    pub fn close(&mut self) -> io::Result<()> {
        let filtered = self.members.iter().try_for_each(|member| refuse_new(&member.socket));
        self.closed = Some(Closed::Filters);
        filtered.or_else(|error| {
            self.closed = Some(Closed::Program);
            self.steer.close().then_some(()).ok_or(error)
        })
    }

    /// Lets new clients in, but leaves them in the queue of the fallback socket, for the process
    /// that has it next.
    ///
    /// # Errors
    /// If the system refuses it; nothing changes then.
    pub fn use_fallback(&mut self) -> io::Result<()> {
        self.steer.rotate(Choice::Rotation, &[])?;
        self.closed = Some(Closed::Program);
        Ok(())
    }

    /// Undoes [`close`](Self::close) and [`use_fallback`](Self::use_fallback). Calls of [`rotate`](Self::rotate)
    /// take effect again.
    ///
    /// # Errors
    /// If a filter can't be detached.
    pub fn reopen(&mut self) -> io::Result<()> {
        match self.closed.take() {
            None => Ok(()),
            Some(Closed::Program) => self.steer.rotate(Choice::Rotation, &[]),
            Some(Closed::Filters) => {
                // Sockets that joined since have no filter, and detaching none is an error.
                self.members.iter().for_each(|member| _ = member.socket.detach_filter());
                self.fallback.detach_filter()
            }
        }
    }

    /// A copy of lbd's own socket.
    ///
    /// # Errors
    /// If no descriptor is left.
    pub fn fallback(&self) -> io::Result<Socket> {
        self.fallback.try_clone()
    }

    fn member(&self, owner: Owner) -> Option<&Member<Owner>> {
        self.members.iter().find(|member| member.owner == owner)
    }
}

impl<Owner> Drop for Public<Owner> {
    fn drop(&mut self) {
        let leaving = self.leaving.drain(..).map(|(_, key, socket)| (key, socket));
        let members = self.members.drain(..).map(|Member { key, socket, .. }| (key, socket));
        for (key, socket) in members.chain(leaving) {
            self.steer.leave(key, &socket);
        }
        self.steer.leave(SENTINEL, &self.sentinel);
        self.steer.end(&self.fallback);
        // Otherwise any program of the same user could join the port.
        _ = self.fallback.set_reuse_port(false);
    }
}

/// Creates a socket bound to the same `address` as `fallback`. A dual-stack socket (IPV6_V6ONLY,
/// ipv6(7)) can share its port only with other dual-stack sockets.
fn beside(fallback: &Socket, address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(fallback.only_v6()?)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// The address at which lbd itself reaches sockets that listen on `address`.
fn inside(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

/// A route to one particular worker, whichever workers have turns. Can be used on any thread.
#[derive(Debug, Clone)]
pub struct PinnedRoute {
    inside: SocketAddr,
    key: Key,
    routed_before: u64,
    steer: Arc<dyn Steer>,
}

impl PinnedRoute {
    /// The address to connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.inside
    }

    /// Creates a non-blocking socket to connect with. The connection reaches the worker if it is
    /// made while the [`PinGuard`] exists. It is refused if the worker does not listen.
    ///
    /// # Errors
    /// If no descriptor or no port is left.
    pub fn open(&self) -> io::Result<(Socket, PinGuard)> {
        let socket = unconnected(self.inside)?;
        socket.bind(&SocketAddr::new(self.inside.ip(), 0).into())?;
        let local = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        self.steer.except(local.port(), self.key)?;
        Ok((socket, PinGuard { steer: Arc::clone(&self.steer), source: local.port() }))
    }

    /// How many connections the worker got by its turns, if that is counted.
    #[must_use]
    pub fn routed(&self) -> Option<u64> {
        Some(self.steer.routed(self.key)?.saturating_sub(self.routed_before))
    }
}

/// Routes a connection to its worker. To be dropped when the connection is established.
#[derive(Debug)]
pub struct PinGuard {
    steer: Arc<dyn Steer>,
    source: u16,
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        self.steer.except_no_more(self.source);
    }
}
