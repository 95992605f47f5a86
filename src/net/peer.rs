//! The peer of a connection, and how it is reached.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    Inet(SocketAddr),
    /// A unix client has no address.
    Unix,
}

impl Peer {
    pub(crate) fn reach(self) -> Reach {
        match self {
            Self::Inet(address) if address.ip().to_canonical().is_loopback() => Reach::Loopback,
            Self::Inet(_) => Reach::Network,
            Self::Unix => Reach::Unix,
        }
    }

    pub(crate) fn ip(self) -> Option<IpAddr> {
        match self {
            Self::Inet(address) => Some(address.ip()),
            Self::Unix => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // An IPv4 client is shown in the same form on every listener.
            Self::Inet(address) => {
                SocketAddr::new(address.ip().to_canonical(), address.port()).fmt(f)
            }
            Self::Unix => f.write_str("unix"),
        }
    }
}

/// By what way a socket's peer is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// On another machine, by TCP.
    Network,
    /// On this machine, by TCP on its loopback interface.
    Loopback,
    /// On this machine, by a unix socket.
    Unix,
}
