//! The data plane without descriptors, which the limit of the process takes from it.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    num::NonZeroUsize,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::{Duration, Instant},
};

use super::TURN;
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

/// The limit below which so many numbers are free: other tests may have left gaps between those that
/// are taken.
fn limit_with_room_for(count: usize) -> u64 {
    let path = |number: &u64| PathBuf::from(format!("/proc/self/fd/{number}"));
    let mut free = (0..).filter(|number| !path(number).is_symlink());
    free.nth(count - 1).unwrap() + 1
}

#[test]
fn without_descriptors_clients_wait_and_nothing_spins() {
    let _turn = TURN.blocking_lock();
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
    setrlimit(Resource::RLIMIT_NOFILE, limit_with_room_for(4), hard).unwrap();
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
