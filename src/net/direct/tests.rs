use std::{
    collections::BTreeMap,
    net::{TcpListener, TcpStream},
    os::fd::OwnedFd,
};

use super::*;

/// Set where both kinds have to be there.
const REQUIRED: &str = "LBD_REQUIRE_BPF";

/// A group of workers 1 to `count`, in rotation, steered by `kind`.
fn group(address: &str, kind: Kind, choice: Choice, count: u8) -> Option<Public<u8>> {
    let fallback = Socket::from(OwnedFd::from(TcpListener::bind(address).unwrap()));
    fallback.listen(BACKLOG).unwrap();
    let mut public = Public::open(&fallback).unwrap();
    if kind == Kind::Classic && public.steering.kind == Kind::Ebpf {
        public.steer = Arc::new(Classic::start(&fallback, public.inside).unwrap());
        public.steer.join(SENTINEL, &public.sentinel).unwrap();
        public.steering.kind = Kind::Classic;
    }
    if public.steering.kind != kind {
        let why = public.steering.why.as_deref();
        assert!(std::env::var(REQUIRED).unwrap_or_default().is_empty(), "no eBPF: {why:?}");
        eprintln!("NOT TESTED: no eBPF: {why:?}");
        return None;
    }
    for owner in 1..=count {
        public.join(owner).unwrap();
    }
    public.rotate(choice, (1..=count).map(|owner| (owner.into(), owner))).unwrap();
    Some(public)
}

fn both(test: impl Fn(&dyn Fn(Choice, u8) -> Option<Public<u8>>, Kind)) {
    for kind in [Kind::Ebpf, Kind::Classic] {
        for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"] {
            test(&|choice, count| group(address, kind, choice, count), kind);
        }
    }
}

fn connect(public: &Public<u8>, times: usize) -> Vec<TcpStream> {
    (0..times).map(|_| TcpStream::connect(public.inside).unwrap()).collect()
}

/// How many connections wait for each worker; 0 is the parking. They are taken out.
fn waiting(public: &Public<u8>) -> BTreeMap<u8, usize> {
    let mut acceptor = Acceptor::new().unwrap();
    let members = public.members.iter().map(|member| (member.owner, &member.socket));
    let mut all = members.chain([(0, &public.fallback)]);
    let mut waiting = BTreeMap::new();
    for (owner, socket) in &mut all {
        let count = accept_all(socket, &mut acceptor).len();
        if count > 0 {
            waiting.insert(owner, count);
        }
    }
    waiting
}

fn each(owners: impl IntoIterator<Item = u8>, count: usize) -> BTreeMap<u8, usize> {
    owners.into_iter().map(|owner| (owner, count)).collect()
}

/// Sends `count` connections, and demands that they go to `owners` alone, evenly.
fn goes_to(public: &Public<u8>, owners: &[u8], count: usize) {
    let _clients = connect(public, count);
    let waiting = waiting(public);
    match public.steering.kind {
        Kind::Ebpf => {
            let share = count / owners.len();
            assert_eq!(waiting, each(owners.iter().copied(), share), "{}", public.address);
        }
        Kind::Classic => {
            assert!(waiting.keys().all(|owner| owners.contains(owner)), "{waiting:?}");
            assert_eq!(waiting.values().sum::<usize>(), count);
        }
    }
}

#[test]
fn connections_take_turns() {
    both(|group, kind| {
        let Some(public) = group(Choice::Rotation, 4) else { return };
        match kind {
            Kind::Ebpf => {
                let mut order = Vec::new();
                for _ in 0..12 {
                    let _client = connect(&public, 1);
                    order.extend(waiting(&public).into_keys());
                }
                assert_eq!(order, [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]);
                let _clients = connect(&public, 400);
                assert_eq!(waiting(&public), each(1..=4, 100));
            }
            Kind::Classic => {
                let mut sum = BTreeMap::new();
                for _ in 0..10 {
                    let _clients = connect(&public, 400);
                    for (owner, count) in waiting(&public) {
                        *sum.entry(owner).or_insert(0) += count;
                    }
                }
                assert_eq!(sum.len(), 4);
                assert!(sum.values().all(|count| (880..1_120).contains(count)), "{sum:?}");
            }
        }
    });
}

#[test]
fn who_has_no_turn_gets_nothing_and_with_nobody_lbd_gets_all() {
    both(|group, _| {
        let Some(public) = group(Choice::Rotation, 3) else { return };
        goes_to(&public, &[1, 2, 3], 60);
        public.rotate(Choice::Rotation, [(1, 1), (3, 3)]).unwrap();
        goes_to(&public, &[1, 3], 60);
        public.rotate(Choice::Rotation, [(2, 2)]).unwrap();
        goes_to(&public, &[2], 60);
        public.rotate(Choice::Rotation, []).unwrap();
        goes_to(&public, &[0], 60);
        // One that has no socket here is reached through lbd.
        public.rotate(Choice::Rotation, [(1, 1), (9, 9)]).unwrap();
        goes_to(&public, &[0, 1], 60);
        public.rotate(Choice::Rotation, [(8, 8), (9, 9)]).unwrap();
        goes_to(&public, &[0], 60);
    });
}

#[test]
fn a_way_reaches_one_worker_and_disturbs_no_other_connection() {
    both(|group, _| {
        let Some(mut public) = group(Choice::Rotation, 2) else { return };
        public.join(3).unwrap();
        let ways = [1, 2, 3].map(|owner| public.way_to(owner).unwrap());
        for _ in 0..10 {
            for (owner, way) in (1..).zip(&ways) {
                let (socket, pass) = way.open().unwrap();
                socket.set_nonblocking(false).unwrap();
                socket.connect(&way.address().into()).unwrap();
                assert_eq!(waiting(&public), each([owner], 1));
                let _client = connect(&public, 1);
                let taken = waiting(&public);
                assert!(taken.len() == 1 && !taken.contains_key(&3), "{taken:?}");
                drop(pass);
            }
        }
        // Without its pass it is a connection like any other.
        let (socket, pass) = ways[2].open().unwrap();
        drop(pass);
        socket.set_nonblocking(false).unwrap();
        socket.connect(&ways[2].address().into()).unwrap();
        assert!(!waiting(&public).contains_key(&3));
    });
}

#[test]
fn whoever_leaves_the_others_get_everything() {
    both(|group, kind| {
        for leaver in 1..=4 {
            let Some(mut public) = group(Choice::Rotation, 4) else { return };
            let stayers: Vec<u8> = (1..=4).filter(|owner| *owner != leaver).collect();
            // As if a child that was forked just now had a copy.
            let _copy = public.socket(leaver).unwrap().try_clone().unwrap();
            let _clients = connect(&public, 40);
            let queued = public.queued(leaver).unwrap() as usize;
            public
                .rotate(Choice::Rotation, stayers.iter().map(|owner| (u32::from(*owner), *owner)))
                .unwrap();
            let now = Instant::now();
            public.leave(leaver, now);
            let mut acceptor = Acceptor::new().unwrap();
            let mut drained = public.collect_leftovers(now, &mut acceptor).len();
            assert_eq!(public.has_leftovers(), kind == Kind::Classic);
            drained += public.collect_leftovers(now + HANDSHAKE, &mut acceptor).len();
            assert!(!public.has_leftovers());
            let taken = waiting(&public);
            assert_eq!(taken.values().sum::<usize>() + drained, 40, "{leaver}: {taken:?}");
            assert_eq!(drained, if kind == Kind::Classic { queued } else { 0 });
            goes_to(&public, &stayers, 60);
            for owner in &stayers {
                let way = public.way_to(*owner).unwrap();
                let (socket, _pass) = way.open().unwrap();
                socket.set_nonblocking(false).unwrap();
                socket.connect(&way.address().into()).unwrap();
                assert_eq!(waiting(&public), each([*owner], 1));
            }
            public.join(5).unwrap();
            goes_to(&public, &stayers, 60);
            public.rotate(Choice::Rotation, [(5, 5)]).unwrap();
            goes_to(&public, &[5], 60);
        }
    });
}

#[test]
fn the_last_to_leave_leaves_what_waits_to_lbd() {
    both(|group, kind| {
        let Some(mut public) = group(Choice::Rotation, 1) else { return };
        let _clients = connect(&public, 10);
        public.rotate(Choice::Rotation, []).unwrap();
        public.leave(1, Instant::now());
        let drained = public.collect_leftovers(Instant::now(), &mut Acceptor::new().unwrap()).len();
        let parked = waiting(&public).get(&0).copied().unwrap_or_default();
        assert_eq!((parked, drained), if kind == Kind::Ebpf { (10, 0) } else { (0, 10) });
    });
}

#[test]
fn a_client_keeps_its_worker_while_that_is_there() {
    for kind in [Kind::Ebpf, Kind::Classic] {
        let Some(public) = group("0.0.0.0:0", kind, Choice::SourceHash, 4) else { continue };
        let taker = |client: u8| {
            let socket = unconnected(public.inside).unwrap();
            socket.set_nonblocking(false).unwrap();
            let source = SocketAddr::new(Ipv4Addr::new(127, 0, 1, client).into(), 0);
            socket.bind(&source.into()).unwrap();
            socket.connect(&public.inside.into()).unwrap();
            *waiting(&public).first_key_value().unwrap().0
        };
        let before: Vec<u8> = (1..=64).map(taker).collect();
        let count = match kind {
            Kind::Ebpf => 4096,
            Kind::Classic => 512,
        };
        let turns: Vec<Turn> = (1..=4).map(|key| Turn { place: key, key }).collect();
        let buckets = turns::buckets(&turns, count);
        let expected: Vec<u8> = (1..=64)
            .map(|client| turns::hash(Ipv4Addr::new(127, 0, 1, client).into()))
            .map(|hash| buckets[(hash % count) as usize] as u8)
            .collect();
        assert_eq!(before, expected, "as computed here");
        assert_eq!(before.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
        public
            .rotate(Choice::SourceHash, [1, 2, 4].map(|owner| (u32::from(owner), owner)))
            .unwrap();
        let after: Vec<u8> = (1..=64).map(taker).collect();
        assert!(before.iter().zip(&after).all(|(before, after)| *before == 3 || before == after));
        assert!(!after.contains(&3));
        public.rotate(Choice::SourceHash, []).unwrap();
        assert_eq!(taker(1), 0);
    }
}

#[test]
fn a_hashed_ipv6_client_keeps_its_worker_too() {
    for kind in [Kind::Ebpf, Kind::Classic] {
        let Some(public) = group("[::1]:0", kind, Choice::SourceHash, 4) else { continue };
        let _clients = connect(&public, 20);
        assert_eq!(waiting(&public).into_values().collect::<Vec<_>>(), [20]);
    }
}

#[test]
fn what_moves_under_source_hash_goes_where_new_connections_would() {
    let Some(mut public) = group("127.0.0.1:0", Kind::Ebpf, Choice::SourceHash, 4) else { return };
    let _clients = connect(&public, 10);
    let home = (1..=4).find(|owner| public.queued(*owner) == Some(10)).unwrap();
    let others = (1..=4).filter(|owner| *owner != home);
    public.rotate(Choice::SourceHash, others.map(|owner| (u32::from(owner), owner))).unwrap();
    public.leave(home, Instant::now());
    let moved = waiting(&public);
    let _clients = connect(&public, 10);
    assert_eq!(moved, waiting(&public));
}

#[test]
fn connections_are_counted_by_ebpf_but_not_those_by_a_way() {
    let Some(mut public) = group("127.0.0.1:0", Kind::Ebpf, Choice::Rotation, 2) else { return };
    let ways = [1, 2].map(|owner| public.way_to(owner).unwrap());
    let _clients = connect(&public, 10);
    let (socket, _pass) = ways[0].open().unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.connect(&public.inside.into()).unwrap();
    assert_eq!(ways.each_ref().map(PinnedRoute::routed), [Some(5), Some(5)]);
    assert_eq!([1, 2].map(|owner| public.queued(owner)), [Some(6), Some(5)]);
    // Whoever gets a number next begins at nothing.
    public.rotate(Choice::Rotation, [(2, 2)]).unwrap();
    public.leave(1, Instant::now());
    public.join(3).unwrap();
    assert_eq!(public.way_to(3).unwrap().routed(), Some(0));
}

#[test]
fn a_way_to_one_that_does_not_listen_is_refused() {
    let Some(public) = group("127.0.0.1:0", Kind::Ebpf, Choice::Rotation, 2) else { return };
    let way = public.way_to(1).unwrap();
    public.socket(1).unwrap().shutdown(std::net::Shutdown::Both).unwrap();
    let (socket, _pass) = way.open().unwrap();
    socket.set_nonblocking(false).unwrap();
    let refused = socket.connect(&way.address().into()).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    // And the others' connections that would be its go to lbd.
    let _clients = connect(&public, 10);
    assert_eq!(public.queued(2), Some(5));
}

#[test]
fn the_rotation_goes_on_over_a_change() {
    let Some(public) = group("127.0.0.1:0", Kind::Ebpf, Choice::Rotation, 4) else { return };
    let taker = || {
        let _client = connect(&public, 1);
        *waiting(&public).first_key_value().unwrap().0
    };
    assert_eq!([taker(), taker()], [1, 2]);
    public.rotate(Choice::Rotation, [1, 2, 4].map(|owner| (u32::from(owner), owner))).unwrap();
    assert_eq!([taker(), taker()], [4, 1]);
    public.rotate(Choice::Rotation, [1, 2, 3, 4].map(|owner| (u32::from(owner), owner))).unwrap();
    assert_eq!([taker(), taker()], [2, 3]);
}

#[test]
fn dropped_it_leaves_an_ordinary_listener() {
    both(|group, _| {
        let Some(public) = group(Choice::Rotation, 2) else { return };
        let (fallback, inside) = (public.fallback.try_clone().unwrap(), public.inside);
        drop(public);
        // And one that can be steered anew.
        let mut public = Public::open(&fallback).unwrap();
        public.join(7).unwrap();
        public.rotate(Choice::Rotation, [(7, 7)]).unwrap();
        goes_to(&public, &[7], 10);
        drop(public);
        assert!(!fallback.reuse_port().unwrap());
        let _clients: Vec<_> = (0..10).map(|_| TcpStream::connect(inside).unwrap()).collect();
        assert_eq!(accept_all(&fallback, &mut Acceptor::new().unwrap()).len(), 10);
    });
}

#[test]
fn one_that_is_closed_by_its_program_refuses_and_can_be_opened_again() {
    let Some(mut public) = group("127.0.0.1:0", Kind::Ebpf, Choice::Rotation, 2) else { return };
    let _waiting = connect(&public, 4);
    // As where no filter may be attached.
    public.closed = Some(Closed::Program);
    assert!(public.steer.close());
    let refused = TcpStream::connect(public.inside).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    public.rotate(Choice::Rotation, [(1, 1)]).unwrap();
    assert!(TcpStream::connect(public.inside).is_err());
    assert_eq!(waiting(&public), each([1, 2], 2), "who was there stays");
    public.reopen().unwrap();
    public.rotate(Choice::Rotation, [(1, 1), (2, 2)]).unwrap();
    goes_to(&public, &[1, 2], 10);
}

#[test]
fn a_parking_is_steered_again_while_somebody_asks_what_was_routed_before() {
    let Some(public) = group("127.0.0.1:0", Kind::Ebpf, Choice::Rotation, 2) else { return };
    let (fallback, way) = (public.fallback().unwrap(), public.way_to(1).unwrap());
    let _clients = connect(&public, 4);
    drop(public);
    let again = Public::<u8>::open(&fallback).unwrap();
    assert_eq!(again.steering, Steering { kind: Kind::Ebpf, why: None });
    assert_eq!(way.routed(), Some(2));
}

#[test]
fn what_belongs_to_no_connection_takes_no_turn() {
    let Some(public) = group("127.0.0.1:0", Kind::Ebpf, Choice::Rotation, 4) else { return };
    let mut acceptor = Acceptor::new().unwrap();
    let mut order = Vec::new();
    for _ in 0..40 {
        let client = TcpStream::connect(public.inside).unwrap();
        let mut taken = (1..=4).filter_map(|owner| {
            let accepted = accept_all(public.socket(owner).unwrap(), &mut acceptor).pop()?;
            Some((owner, accepted))
        });
        let (owner, accepted) = taken.next().unwrap();
        order.push(owner);
        // Reset by the one side, with bytes of the other on their way: those find nobody.
        accepted.set_linger(Some(Duration::ZERO)).unwrap();
        drop(accepted);
        _ = io::Write::write(&mut &client, b"x");
    }
    assert!(order.chunks(4).all(|round| round == [1, 2, 3, 4]), "{order:?}");
}

/// A worker puts on its own program, or takes lbd's off, by its socket.
#[test]
fn steering_by_somebody_else_is_seen_and_ended() {
    both(|group, kind| {
        let Some(mut public) = group(Choice::Rotation, 3) else { return };
        let acceptor = &mut Acceptor::new().unwrap();
        public.rotate(Choice::Rotation, [(1, 1), (2, 2)]).unwrap();
        // Nothing is wrong, however often it is looked.
        for _ in 0..5 {
            let watched = public.watch(acceptor);
            watched.renewed.unwrap();
            assert!(!watched.is_foreign && watched.clients.is_empty(), "{kind}");
            goes_to(&public, &[1, 2], 20);
        }
        let of_three = public.socket(3).unwrap().try_clone().unwrap();
        let everything_to = |index| {
            let ret = crate::net::steer::instruction(libc::BPF_RET | libc::BPF_K, 0, 0, index);
            crate::net::steer::attach(&of_three, &mut [ret]).unwrap();
        };
        // The kernel's order: the parking, the sentinel, 1, 2, 3.
        everything_to(4);
        let clients = connect(&public, 20);
        assert_eq!(waiting(&public), each([3], 20));
        drop(clients);
        public.watch(acceptor).renewed.unwrap();
        // The test, which went there too.
        waiting(&public);
        // From here on it is right again; and said so the next time.
        goes_to(&public, &[1, 2], 20);
        assert!(public.watch(acceptor).is_foreign, "{kind}");
        waiting(&public);
        assert!(!public.watch(acceptor).is_foreign, "{kind}");

        // What comes to the socket that nobody serves is handed on.
        everything_to(1);
        let clients = connect(&public, 3);
        assert_eq!(public.watch(acceptor).clients.len(), 3, "{kind}");
        drop(clients);
        goes_to(&public, &[1, 2], 20);

        ebpf::detach(&of_three);
        let clients = connect(&public, 100);
        assert!(waiting(&public).contains_key(&3), "{kind}: by a hash it gets some");
        drop(clients);
        public.watch(acceptor).renewed.unwrap();
        waiting(&public);
        goes_to(&public, &[1, 2], 20);
    });
}
