//! A public address whose connections the kernel itself hands to the workers.
//!
//! Each worker has a listening socket of its own on the address, and lbd has one, the *parking*; all
//! are in one `SO_REUSEPORT` group, and a program says for each new connection which of them gets
//! it. No second connection, no copying, and the worker sees the client's own address.
//!
//! ```text
//!             ┌─ program: whose turn? ─┐
//! SYN ─▶ group│  worker 0's socket     │─▶ its accept queue ─▶ worker 0
//!             │  worker 1's socket     │─▶ its accept queue ─▶ worker 1
//!             │  parking               │─▶ lbd: holds the client, or hands it on
//!             └────────────────────────┘
//! ```
//!
//! Who has no turn gets nothing: workers that are not proven yet, that hang, drain or are gone. With
//! none in rotation the parking gets everybody. lbd keeps a copy of each socket, so that what queues in
//! it outlives the worker, and reaches one worker in particular by a [`PinnedRoute`]: a connection from a
//! source port that the program knows, as a probe needs it.
//!
//! Each worker has the group by its socket, and can replace the program or take it off (socket(7)). So
//! there is one socket more, the *sentinel*, which never has a turn: lbd connects to it now and then, as
//! it would to a worker, and where that does not arrive, the program in force is not its own
//! ([`Public::watch`]).
//!
//! There are two kinds of programs behind one interface (`steer`): [`Kind::Ebpf`] where lbd may load
//! it, else [`Kind::Classic`]. [`Public::open`] tells which, and why not the better one.

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

/// The socket that makes a group of the parking.
const SENTINEL: Key = FALLBACK + 1;

/// How long a socket without turns stays open where the kernel does not move what waits in it: for
/// handshakes whose last segment is still on its way.
const HANDSHAKE: Duration = Duration::from_secs(1);

/// How connections are steered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Steering {
    /// By what kind of program.
    pub kind: Kind,
    /// Why not by the better one.
    pub why: Option<String>,
}

/// What steers.
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

/// A public address, and the sockets on it. Dropped, it leaves the parking as it was before.
#[derive(Debug)]
pub struct Public<Owner> {
    address: SocketAddr,
    inside: SocketAddr,
    /// A copy of lbd's own.
    fallback: Socket,
    sentinel: Socket,
    /// A test whose connection will be made by the next [`watch`](Self::watch), and one whose was.
    prepared: Option<Test>,
    sent: Option<Test>,
    steer: Arc<dyn Steer>,
    steering: Steering,
    closed: Option<Closed>,
    members: Vec<Member<Owner>>,
    /// Sockets whose workers are gone, and since when.
    leaving: Vec<(Instant, Key, Socket)>,
}

/// A connection to the sentinel.
#[derive(Debug)]
struct Test {
    socket: Socket,
    /// Until it is made.
    pass: Option<PinGuard>,
}

impl Test {
    /// `None` where lbd itself lacks what it takes.
    fn send(mut self, to: SocketAddr) -> Option<Self> {
        match self.socket.connect(&to.into()) {
            // On loopback it is made as a rule when this returns.
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

    /// Whether it is among the `clients` that came to the sentinel, from which it is taken out. True
    /// also where it is on its way still, which says nothing.
    fn arrived(self, clients: &mut Vec<Socket>) -> bool {
        let own = self.socket.local_addr().ok().and_then(|local| local.as_socket());
        let is_own = |client: &Socket| {
            own.is_some() && client.peer_addr().ok().and_then(|peer| peer.as_socket()) == own
        };
        let found = clients.iter().position(is_own).map(|index| clients.swap_remove(index));
        // No TIME_WAIT each second.
        _ = self.socket.set_linger(Some(Duration::ZERO));
        let is_under_way =
            matches!(self.socket.take_error(), Ok(None)) && self.socket.peer_addr().is_err();
        found.is_some() || is_under_way
    }
}

/// What [`Public::watch`] found.
#[derive(Debug)]
pub struct Watched {
    /// Clients that were given to nobody, to be handed on.
    pub clients: Vec<Socket>,
    /// Somebody had replaced the program or taken it off.
    pub is_foreign: bool,
    /// Whether it could be put on anew.
    pub renewed: io::Result<()>,
}

/// How new clients are kept from the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closed {
    /// By a filter on each socket.
    Filters,
    /// By the program, which lets nobody in or leaves them to the parking.
    Program,
}

#[derive(Debug)]
struct Member<Owner> {
    owner: Owner,
    key: Key,
    socket: Socket,
}

impl<Owner: Copy + PartialEq> Public<Owner> {
    /// Makes a group around `fallback`, a listening TCP socket that goes on taking every client until
    /// [`rotate`](Self::rotate) says otherwise.
    ///
    /// # Errors
    /// Where others can't listen beside it (it is another user's, or not lbd's alone), or the kernel
    /// lets nobody steer.
    pub fn open(fallback: &Socket) -> io::Result<Self> {
        let fallback = fallback.try_clone()?;
        let address = fallback.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidInput)?;
        let inside = inside(address);
        fallback.set_reuse_port(true)?;
        // The kernel makes a group of a socket that listens already when a second one joins it, and
        // a program can only be attached then. Whom that one gets before comes from the first `watch`.
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

    /// A socket without turns leaves: at once where the kernel moves what waits in it.
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

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How its connections are steered.
    #[must_use]
    pub fn steering(&self) -> &Steering {
        &self.steering
    }

    /// Gives `owner` a socket, without a turn.
    ///
    /// # Errors
    /// Where the system refuses it, or there are too many in the group.
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

    /// The socket of `owner`: blocking, as it is passed on.
    #[must_use]
    pub fn socket(&self, owner: Owner) -> Option<&Socket> {
        self.member(owner).map(|member| &member.socket)
    }

    /// From now on new connections go to these, in this order, and to nobody else. Each is named by
    /// its place, which it has in common with whoever comes after it; one that has no socket here
    /// has its turns at the parking.
    ///
    /// # Errors
    /// Where the system refuses it, and it stays as it was.
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
        // The same as nobody, and at no cost for each connection.
        let all_parked = turns.iter().all(|turn| turn.key == FALLBACK);
        self.steer.rotate(choice, if all_parked { &[] } else { &turns })
    }

    /// Looks whether the program in force is lbd's own, and puts it on anew. To be called about once
    /// a second: what it finds is about the time since the last call.
    pub fn watch(&mut self, acceptor: &mut Acceptor) -> Watched {
        let mut clients = accept_all(&self.sentinel, acceptor);
        let is_foreign = self.sent.take().is_some_and(|test| !test.arrived(&mut clients));
        // Before the program is put on anew, so that it is the one in force which is asked.
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

    /// How lbd reaches `owner`, and nobody else.
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

    /// How many connections wait in `owner`'s accept queue.
    #[must_use]
    pub fn queued(&self, owner: Owner) -> Option<u32> {
        queue_length(&self.member(owner)?.socket).ok()
    }

    /// Accepts every connection that waits for `owner`, which may go on to accept too. Those that came
    /// by a [`PinnedRoute`] are among them.
    pub fn drain_queue(&self, owner: Owner, acceptor: &mut Acceptor) -> Vec<Socket> {
        let member = self.member(owner);
        member.map_or_else(Vec::new, |member| accept_all(&member.socket, acceptor))
    }

    /// Nobody has the socket of `owner` any more but lbd. What waits in it goes to the others by the
    /// kernel, or comes from [`collect_leftovers`](Self::collect_leftovers). It must have no turn.
    pub fn leave(&mut self, owner: Owner, now: Instant) {
        let Some(index) = self.members.iter().position(|member| member.owner == owner) else {
            return;
        };
        let Member { key, socket, .. } = self.members.swap_remove(index);
        self.dismiss(key, socket, now);
    }

    /// Accepts what waits in sockets that [`leave`](Self::leave), and closes those that have had
    /// their time.
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

    /// Whether [`collect_leftovers`](Self::collect_leftovers) has still something to do.
    #[must_use]
    pub fn has_leftovers(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// Lets no new client in, wherever it would go; those whose connect has been answered stay. A
    /// client comes again a second later, and finds either somebody else or a closed port; or is
    /// refused at once, where lbd may attach no filter (Linux 6.18 wants a capability for it).
    ///
    /// # Errors
    /// Where neither can be had: clients go to the parking.
    pub fn close(&mut self) -> io::Result<()> {
        let filtered = self.members.iter().try_for_each(|member| refuse_new(&member.socket));
        self.closed = Some(Closed::Filters);
        filtered.or_else(|error| {
            self.closed = Some(Closed::Program);
            self.steer.close().then_some(()).ok_or(error)
        })
    }

    /// Lets new clients in, but leaves them in the parking's queue: for whoever has that one next.
    ///
    /// # Errors
    /// Where the system refuses it, and it stays as it was.
    pub fn park(&mut self) -> io::Result<()> {
        self.steer.rotate(Choice::Rotation, &[])?;
        self.closed = Some(Closed::Program);
        Ok(())
    }

    /// Undoes [`close`](Self::close) and [`park`](Self::park): the next [`rotate`](Self::rotate) counts
    /// again.
    ///
    /// # Errors
    /// Where a filter can't be taken off.
    pub fn reopen(&mut self) -> io::Result<()> {
        match self.closed.take() {
            None => Ok(()),
            Some(Closed::Program) => self.steer.rotate(Choice::Rotation, &[]),
            Some(Closed::Filters) => {
                // Those that joined since have none, which is an error to take off.
                self.members.iter().for_each(|member| _ = member.socket.detach_filter());
                self.fallback.detach_filter()
            }
        }
    }

    /// A copy of lbd's own socket.
    ///
    /// # Errors
    /// Where there is no descriptor left.
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
        // Else any program of the same user could join.
        _ = self.fallback.set_reuse_port(false);
    }
}

/// A socket bound to the `address` that `fallback` is bound to. A dual-stack one (IPV6_V6ONLY, ipv6(7))
/// shares its port with its like alone.
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

/// Where lbd itself connects to what listens on `address`.
fn inside(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

/// How one worker is reached, whoever has turns. For any thread.
#[derive(Debug, Clone)]
pub struct PinnedRoute {
    inside: SocketAddr,
    key: Key,
    routed_before: u64,
    steer: Arc<dyn Steer>,
}

impl PinnedRoute {
    /// Where to connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.inside
    }

    /// A socket to connect with, non-blocking. The connection reaches the worker if it is made while
    /// the [`PinGuard`] is there, and is refused where that one does not listen.
    ///
    /// # Errors
    /// Where there is no descriptor or no port for it.
    pub fn open(&self) -> io::Result<(Socket, PinGuard)> {
        let socket = unconnected(self.inside)?;
        socket.bind(&SocketAddr::new(self.inside.ip(), 0).into())?;
        let local = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        self.steer.except(local.port(), self.key)?;
        Ok((socket, PinGuard { steer: Arc::clone(&self.steer), source: local.port() }))
    }

    /// How many connections the worker was given by its turns, if that is counted.
    #[must_use]
    pub fn routed(&self) -> Option<u64> {
        Some(self.steer.routed(self.key)?.saturating_sub(self.routed_before))
    }
}

/// What brings a connection to the worker that is meant. To be dropped when it is made.
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
