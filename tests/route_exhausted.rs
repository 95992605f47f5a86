//! The data plane without descriptors; alone in its process, whose limit it changes.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    num::NonZeroUsize,
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::{Duration, Instant},
};

use lbd::{
    config::{Listen, Routing, UnixAccess},
    net::Listener,
    proxy::{Backend, DataPlane, Pool, Settings},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < end, "in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn without_descriptors_clients_wait_and_nothing_spins() {
    let worker = TcpListener::bind("127.0.0.1:0").unwrap();
    let backend = Backend::new(
        1,
        0,
        "web/1".into(),
        worker.local_addr().unwrap().into(),
        None,
        Arc::default(),
    );
    let pool = |all, coming| Pool::new(all, coming, Arc::new(Routing::default()));
    let threads = NonZeroUsize::new(2).unwrap();
    let plane = DataPlane::start(Settings { threads, max_held: NonZeroUsize::MAX }).unwrap();
    let access = Arc::new(AtomicBool::new(false));
    let route = plane.service("web".into(), pool(vec![], Some(Instant::now())), access);
    let listener =
        Listener::bind(&Listen::Tcp(([127, 0, 0, 1], 0).into()), &UnixAccess::default()).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], listener.port().unwrap()));
    let clients: Vec<_> = (0..10).map(|_| TcpStream::connect(address).unwrap()).collect();

    // Room for four more.
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let next = worker.try_clone().map(|copy| std::os::fd::AsRawFd::as_raw_fd(&copy)).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, next as u64 + 4, hard).unwrap();
    plane.open(&route, listener);
    until("four held", || route.waiting() == 4);
    let before: u64 = plane.progress().iter().sum();
    thread::sleep(Duration::from_millis(500));
    let turns = plane.progress().iter().sum::<u64>() - before;
    assert!(turns < 50, "{turns} turns in half a second");
    assert_eq!(route.active(), 4);

    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    until("all held", || route.waiting() == 10);
    route.publish(pool(vec![backend], None));
    for _ in &clients {
        worker.accept().unwrap().0.write_all(b"x").unwrap();
    }
    for mut client in clients {
        client.read_exact(&mut [0]).unwrap();
    }
}
