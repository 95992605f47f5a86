//! Ports that no other test has, whichever process it runs in.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{self, UnixListener},
    },
    process,
    sync::atomic::{AtomicU16, Ordering},
};

/// Below where the kernel picks ports for outgoing connections (`ip_local_port_range`).
const FIRST: u16 = 10_000;
const COUNT: u16 = 20_000;

/// One port, taken for as long as this is kept.
///
/// The lock is a unix socket in the abstract namespace (unix(7)): the kernel gives a name to one at
/// a time, and takes it back from whoever ends, in whatever way.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) number: u16,
    _lock: UnixListener,
}

impl Port {
    pub(crate) fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.number).into()
    }

    /// A port that is free and stays so, but for whoever is told its number.
    pub(crate) fn take() -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        // Processes that start together begin far from each other.
        let begin = u16::try_from(process::id().wrapping_mul(7_919) % u32::from(COUNT)).unwrap();
        for _ in 0..COUNT {
            let offset = NEXT.fetch_add(1, Ordering::Relaxed);
            let number = FIRST + begin.wrapping_add(offset) % COUNT;
            let name = format!("lbd-test-port-{number}");
            let name = net::SocketAddr::from_abstract_name(name).unwrap();
            let Ok(lock) = UnixListener::bind_addr(&name) else { continue };
            if TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok() {
                return Self { number, _lock: lock };
            }
        }
        panic!("no free port from {FIRST} to {}", FIRST + COUNT);
    }
}
