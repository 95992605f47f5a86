//! What holds a port that can't be bound.

use std::{
    fmt, fs,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use super::diag::{Diag, ListeningSocket, TcpState};

/// How long lbd searches the processes for the one that has a socket. It is short, since the caller
/// has other work.
const SEARCH: Duration = Duration::from_millis(50);

/// What holds a port. The text is a continuation of "port 80 of 127.0.0.1 is".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// A program listens there.
    Listener {
        /// The user who made the socket.
        uid: u32,
        /// The pid and the name of the process, if lbd may see it.
        process: Option<(i32, String)>,
    },
    /// A connection uses it as its local port: either an outgoing connection, or one accepted by a
    /// program that no longer listens.
    Connection {
        /// The user who has the connection.
        uid: u32,
        /// The pid and the name of the process, if lbd may see it.
        process: Option<(i32, String)>,
    },
    /// No process: connections there have ended, and the kernel remembers the last of them for this
    /// long (RFC 9293, section 3.6.1). That blocks the port only if the program that had the
    /// connections did not set `SO_REUSEADDR` (socket(7)), or the program that binds does not.
    TimeWait(Duration),
    /// Connections there were closed, but the peer has not acknowledged everything yet.
    Orphan,
    /// Not known, or the port is free by now.
    Unknown,
}

impl Holder {
    /// Finds out what prevents `address` from being bound. Takes some milliseconds, and 0.1 s at
    /// most.
    #[must_use]
    pub fn of(address: SocketAddr) -> Self {
        Self::look(address).unwrap_or(Self::Unknown)
    }

    fn look(address: SocketAddr) -> Option<Self> {
        let mut diag = Diag::open().ok()?;
        let is_in_the_way = |other: IpAddr| overlaps(address.ip(), other);
        let listeners = diag.listeners(address.port()).ok()?;
        let listener = listeners
            .into_iter()
            .find(|ListeningSocket { address, .. }| is_in_the_way(address.ip()));
        if let Some(ListeningSocket { inode, uid, .. }) = listener {
            return Some(Self::Listener { uid, process: process_of(inode) });
        }
        let ends = diag.ends_at(address.port()).ok()?;
        let here = || ends.iter().filter(|end| is_in_the_way(end.address.ip()));
        let connection = here().find(|end| end.connection.is_accepted());
        if let Some(end) = connection {
            let process = process_of(end.connection.inode);
            return Some(Self::Connection { uid: end.connection.uid, process });
        }
        let remembered = here().filter(|end| end.connection.state == TcpState::TimeWait);
        let time_wait = remembered.map(|end| end.expires).max().map(Self::TimeWait);
        time_wait.or_else(|| here().next().map(|_| Self::Orphan))
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listener { uid, process } => {
                f.write_str("taken by another program: ")?;
                show(f, process.as_ref(), *uid)
            }
            Self::Connection { uid, process } => {
                f.write_str("in use by a connection of ")?;
                show(f, process.as_ref(), *uid)
            }
            Self::TimeWait(left) => write!(
                f,
                "in TIME_WAIT for another {} s, though nobody has it",
                left.as_millis().div_ceil(1000)
            ),
            Self::Orphan => f.write_str(
                "in use by a connection that is being closed, though no program has it any more",
            ),
            Self::Unknown => f.write_str("taken by another program"),
        }
    }
}

fn show(f: &mut fmt::Formatter<'_>, process: Option<&(i32, String)>, uid: u32) -> fmt::Result {
    match process {
        Some((pid, name)) => write!(f, "{name} (pid {pid}, user {uid})"),
        None => write!(f, "one of user {uid}"),
    }
}

/// Whether sockets at both addresses can't be bound to the same port. A wildcard covers all
/// addresses of its family, and that of IPv6 also those of IPv4, unless it is IPV6_V6ONLY
/// (ipv6(7)).
fn overlaps(wanted: IpAddr, other: IpAddr) -> bool {
    let same_family = wanted.is_ipv4() == other.is_ipv4();
    wanted == other.to_canonical()
        || wanted.is_unspecified() && same_family
        || other.is_unspecified() && (same_family || other.is_ipv6())
}

/// The pid and the name of the process that has the socket.
fn process_of(inode: u32) -> Option<(i32, String)> {
    let until = Instant::now() + SEARCH;
    let wanted = format!("socket:[{inode}]");
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        if Instant::now() >= until {
            return None;
        }
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // Only root can see those of other users' processes.
        let Ok(fds) = fs::read_dir(entry.path().join("fd")) else { continue };
        for fd in fds.flatten() {
            if Instant::now() >= until {
                return None;
            }
            if fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == &*wanted) {
                let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                // The process chooses its name itself: escaped, it can't write control sequences to
                // a terminal.
                return Some((pid, name.trim_end().escape_debug().to_string()));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
        process,
    };

    use nix::unistd::getuid;
    use socket2::{Domain, Socket, Type};

    use super::*;
    use crate::net::free;

    /// A listener as programs make it that know nothing of `SO_REUSEADDR`, and one connection at it.
    fn connection() -> (Socket, Socket, TcpStream) {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        listener.listen(1).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let client = TcpStream::connect(address).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        (listener, accepted, client)
    }

    #[test]
    fn a_listener_is_named() {
        for (bound, wanted) in [
            ("127.0.0.1:0", [127, 0, 0, 1]),
            ("0.0.0.0:0", [127, 0, 0, 1]),
            ("127.0.0.1:0", [0, 0, 0, 0]),
            ("[::]:0", [127, 0, 0, 1]),
        ] {
            let listener = TcpListener::bind(bound).unwrap();
            let wanted = SocketAddr::from((wanted, listener.local_addr().unwrap().port()));
            let Holder::Listener { uid, process } = Holder::of(wanted) else { panic!("{bound}") };
            assert_eq!(uid, getuid().as_raw());
            // That is where the machine is not too busy to look through its processes.
            assert!(process.is_none_or(|(pid, _)| pid == i32::try_from(process::id()).unwrap()));
            drop(listener);
            assert_eq!(Holder::of(wanted), Holder::Unknown);
        }
    }

    #[test]
    fn what_is_left_of_connections_is_told_from_a_program() {
        let (listener, accepted, mut client) = connection();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        drop(listener);
        assert!(free(address).is_err());
        assert!(matches!(Holder::of(address), Holder::Connection { .. }));
        // This end first, so that it is the one that waits.
        drop(accepted);
        client.read_exact(&mut [0]).unwrap_err();
        assert_eq!(Holder::of(address), Holder::Orphan);
        drop(client);
        let until = Instant::now() + Duration::from_secs(5);
        while !matches!(Holder::of(address), Holder::TimeWait(_)) {
            assert!(Instant::now() < until, "{:?}", Holder::of(address));
        }
        assert!(free(address).is_err(), "it is in the way");
        let Holder::TimeWait(left) = Holder::of(address) else { panic!() };
        assert!((50..=60).contains(&left.as_secs()), "{left:?}");
        let text = Holder::of(address).to_string();
        assert!(text.starts_with("in TIME_WAIT for another "), "{text}");
    }

    #[test]
    fn an_outgoing_connection_is_one() {
        let (_listener, _accepted, client) = connection();
        let own = client.local_addr().unwrap();
        let Holder::Connection { uid, .. } = Holder::of(own) else { panic!() };
        assert_eq!(uid, getuid().as_raw());
    }

    #[test]
    fn other_addresses_are_not_in_the_way() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (wanted, other, expected) in [
            ("127.0.0.1", "127.0.0.2", false),
            ("127.0.0.1", "::1", false),
            ("::1", "0.0.0.0", false),
            ("::", "127.0.0.1", false),
            ("127.0.0.1", "::ffff:127.0.0.1", true),
            ("::1", "::", true),
        ] {
            assert_eq!(overlaps(ip(wanted), ip(other)), expected, "{wanted} {other}");
        }
    }
}
