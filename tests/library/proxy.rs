//! The data plane over real sockets, with workers in this process.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    num::{NonZeroU32, NonZeroUsize},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use lbd::{
    config::{Listen, Routing, UnixAccess},
    net::{Listener, UnnamedUnixListener},
    proxy::{Backend, DataPlane, FrontendId, Pool, ServiceHandle, Settings},
};
use socket2::{Domain, SockRef, Socket, Type};

const DEADLINE: Duration = Duration::from_secs(20);

/// A plane of two threads with one service and one listener.
struct Rig {
    plane: DataPlane,
    route: Arc<ServiceHandle>,
    listener: FrontendId,
    address: SocketAddr,
}

impl Rig {
    fn new(routing: Routing, workers: &[SocketAddr]) -> Self {
        Self::with(routing, &backends(workers), None)
    }

    fn with(routing: Routing, backends: &[Arc<Backend>], coming: Option<Instant>) -> Self {
        Self::on("127.0.0.1:0", 10_000, routing, backends, coming)
    }

    fn on(
        address: &str,
        max_held: usize,
        routing: Routing,
        backends: &[Arc<Backend>],
        coming: Option<Instant>,
    ) -> Self {
        Self::of(2, address, max_held, routing, backends, coming)
    }

    /// A plane of so many threads.
    fn of(
        threads: usize,
        address: &str,
        max_held: usize,
        routing: Routing,
        backends: &[Arc<Backend>],
        coming: Option<Instant>,
    ) -> Self {
        Self::of_early(threads, address, max_held, routing, backends, coming, |_| {})
    }

    /// The same, where `early` comes to the address before anybody accepts there.
    fn of_early(
        threads: usize,
        address: &str,
        max_held: usize,
        routing: Routing,
        backends: &[Arc<Backend>],
        coming: Option<Instant>,
        early: impl FnOnce(SocketAddr),
    ) -> Self {
        let settings = Settings {
            threads: NonZeroUsize::new(threads).unwrap(),
            max_held: NonZeroUsize::new(max_held).unwrap(),
        };
        let plane = DataPlane::start(settings).unwrap();
        let pool = Pool::new(backends.to_vec(), coming, Arc::new(routing));
        let route = plane.service("web".into(), pool, Arc::new(AtomicBool::new(false)));
        let mut address: SocketAddr = address.parse().unwrap();
        let listener = Listener::bind(&Listen::Tcp(address), &UnixAccess::default()).unwrap();
        address.set_port(listener.port().unwrap());
        early(address);
        let listener = plane.open(&route, listener);
        Self { plane, route, listener, address }
    }

    fn connect(&self) -> TcpStream {
        let client = TcpStream::connect(self.address).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        client
    }

    /// What a client that says nothing reads first. Whoever is turned away at once may hear of it by
    /// connect.
    fn first_read(&self) -> io::Result<usize> {
        let mut client = TcpStream::connect(self.address)?;
        client.set_read_timeout(Some(DEADLINE))?;
        client.read(&mut [0])
    }

    fn publish(&self, routing: Routing, backends: &[Arc<Backend>], coming: Option<Instant>) {
        self.route.publish(Pool::new(backends.to_vec(), coming, Arc::new(routing)));
    }

    fn close(&self) -> io::Result<()> {
        runtime().block_on(self.plane.close(self.listener))
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn backends(workers: &[SocketAddr]) -> Vec<Arc<Backend>> {
    let backend = |(slot, &address): (usize, &SocketAddr)| {
        let label = format!("web/{}", address.port()).into();
        Backend::new(slot as u64, slot as u32, label, address.into(), None, Arc::default())
    };
    workers.iter().enumerate().map(backend).collect()
}

/// A worker that treats each connection in a thread of its own.
fn worker(treat: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
    worker_on("127.0.0.1:0", treat)
}

fn worker_on(address: &str, treat: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let treat = treat.clone();
            thread::spawn(move || treat(stream));
        }
    });
    address
}

/// A worker that says who it is, and closes.
fn naming(name: &'static str) -> SocketAddr {
    worker(move |mut stream| stream.write_all(name.as_bytes()).unwrap())
}

fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

/// An address where nobody listens, kept from others for as long as the socket lives.
fn refusing() -> (Socket, SocketAddr) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address)
}

/// An address whose accept queue is full, so that a connect gets no answer.
fn stalling() -> (Vec<Socket>, SocketAddr) {
    let (listener, address) = refusing();
    listener.listen(0).unwrap();
    let mut held = vec![listener];
    loop {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let is_full = socket.connect_timeout(&address.into(), Duration::from_millis(100)).is_err();
        held.push(socket);
        if is_full {
            return (held, address);
        }
    }
}

fn said(mut stream: impl Read) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < end, "in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn reset_on_close(stream: &TcpStream) {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

fn is_reset(result: io::Result<usize>) -> bool {
    result.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn connections_rotate_over_both_threads() {
    let rig = Rig::new(Routing::default(), &["1", "2", "3", "4"].map(naming));
    for round in 0..100 {
        let names: Vec<_> = (0..4).map(|_| said(rig.connect())).collect();
        assert_eq!(names, ["1", "2", "3", "4"], "in round {round}");
    }
}

/// A listener of the test's own, and the plane in front of it.
fn in_front_of_one() -> (TcpListener, Rig) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let rig = Rig::new(Routing::default(), &[listener.local_addr().unwrap()]);
    (listener, rig)
}

#[test]
fn a_worker_gets_a_connection_together_with_its_first_bytes() {
    const ROUNDS: usize = 200;
    let (worker, rig) = in_front_of_one();
    let accepting = thread::spawn(move || {
        let has_bytes = |_: &usize| {
            let (mut accepted, _) = worker.accept().unwrap();
            accepted.set_nonblocking(true).unwrap();
            accepted.read(&mut [0; 5]).is_ok_and(|count| count == 5)
        };
        (0..ROUNDS).filter(has_bytes).count()
    });
    for _ in 0..ROUNDS {
        let mut client = rig.connect();
        // As long as a client may need that has to be woken, and longer than a connect takes.
        let connected = Instant::now();
        while connected.elapsed() < Duration::from_micros(300) {}
        client.write_all(b"hello").unwrap();
        _ = client.read(&mut [0]);
    }
    // Not always: on a busy machine it needs more than the millisecond it has.
    let together = accepting.join().unwrap();
    assert!(together >= ROUNDS / 4, "{together} of {ROUNDS}");
}

#[test]
fn a_worker_that_speaks_first_is_not_kept_waiting() {
    let (worker, rig) = in_front_of_one();
    let begun = Instant::now();
    for _ in 0..50 {
        let mut client = rig.connect();
        let (mut accepted, _) = worker.accept().unwrap();
        accepted.write_all(b"220").unwrap();
        drop(accepted);
        assert_eq!(said(&mut client), "220");
    }
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    // Nor where there is something to read, but nothing that would end the handshake: an urgent byte
    // is not passed on.
    let begun = Instant::now();
    for _ in 0..50 {
        let mut client = rig.connect();
        assert_eq!(SockRef::from(&client).send_out_of_band(b"!").unwrap(), 1);
        let (mut accepted, _) = worker.accept().unwrap();
        accepted.write_all(b"220").unwrap();
        drop(accepted);
        assert_eq!(said(&mut client), "220");
    }
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[test]
fn a_client_that_ends_without_a_byte_costs_no_connection_to_a_worker() {
    let all = backends(&[naming("1")]);
    for way in 0..3 {
        let mut shut = None;
        let end = |address| {
            let client = TcpStream::connect(address).unwrap();
            match way {
                0 => drop(client),
                1 => {
                    reset_on_close(&client);
                    drop(client);
                }
                _ => {
                    client.shutdown(Shutdown::Write).unwrap();
                    shut = Some(client);
                }
            }
        };
        let routing = Routing::default();
        let rig = Rig::of_early(1, "127.0.0.1:0", 10_000, routing, &all, None, end);
        if let Some(mut client) = shut {
            assert_eq!(client.read(&mut [0]).unwrap(), 0, "an end, and no reset");
        }
        // One that stays gets a greeting.
        assert_eq!(said(rig.connect()), "1");
        assert_eq!(all[0].traffic().total, Some(way + 1));
        let failures = rig.route.tally().failures();
        assert!(failures.iter().all(|(_, count)| *count == 0), "{failures:?}");
    }
}

#[test]
fn a_refused_worker_is_skipped() {
    let (_bound, refusing) = refusing();
    let all = backends(&[naming("1"), refusing, naming("3"), naming("4")]);
    let rig = Rig::with(Routing::default(), &all, None);
    let names: Vec<_> = (0..6).map(|_| said(rig.connect())).collect();
    assert_eq!(names, ["1", "3", "4", "1", "3", "4"]);
    assert_eq!((all[1].traffic().failed, all[1].traffic().total), (2, Some(0)));
    assert_eq!((all[2].traffic().failed, all[2].traffic().total), (0, Some(2)));
}

#[test]
fn a_stalled_worker_is_skipped_long_before_its_connect_would_be_repeated() {
    let (_queue, stalling) = stalling();
    let rig = Rig::new(Routing::default(), &[stalling, naming("2")]);
    let begun = Instant::now();
    assert_eq!(said(rig.connect()), "2");
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
    // The next clients don't even try.
    let begun = Instant::now();
    for _ in 0..20 {
        assert_eq!(said(rig.connect()), "2");
    }
    assert!(begun.elapsed() < Duration::from_millis(300), "{:?}", begun.elapsed());
}

#[test]
fn a_connection_is_held_while_a_worker_is_on_its_way() {
    let rig = Rig::with(Routing::default(), &[], Some(Instant::now()));
    let client = rig.connect();
    until("held", || rig.route.waiting() == 1);
    assert_eq!(rig.route.active(), 1);
    rig.publish(Routing::default(), &[], Some(Instant::now() + Duration::from_secs(1)));
    rig.publish(Routing::default(), &backends(&[naming("1")]), None);
    assert_eq!(said(client), "1");
    until("released", || rig.route.waiting() == 0 && rig.route.active() == 0);
}

#[test]
fn a_held_connection_outlives_a_worker_that_refuses() {
    let (_bound, refusing) = refusing();
    let rig = Rig::new(Routing::default(), &[refusing]);
    let client = rig.connect();
    until("held", || rig.route.waiting() == 1);
    rig.publish(Routing::default(), &[], Some(Instant::now()));
    rig.publish(Routing::default(), &backends(&[naming("1")]), None);
    assert_eq!(said(client), "1");
}

#[test]
fn a_connection_is_held_no_longer_than_the_hold_timeout() {
    let routing = Routing { hold_timeout: Duration::from_millis(200), ..Routing::default() };
    let rig = Rig::with(routing, &[], Some(Instant::now()));
    let begun = Instant::now();
    assert!(is_reset(rig.first_read()));
    assert!((200..900).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
}

#[test]
fn with_no_worker_to_come_a_connection_is_reset_at_once() {
    let late = Instant::now() + Duration::from_secs(60);
    for coming in [None, Some(late)] {
        let rig = Rig::with(Routing::default(), &[], coming);
        let begun = Instant::now();
        assert!(is_reset(rig.first_read()));
        assert!(begun.elapsed() < Duration::from_secs(1));
    }
}

#[test]
fn a_held_client_that_leaves_frees_its_place() {
    let rig = Rig::with(Routing::default(), &[], Some(Instant::now()));
    let (ends, resets) = (rig.connect(), rig.connect());
    until("held", || rig.route.waiting() == 2);
    drop(ends);
    until("one left", || rig.route.active() == 1);
    reset_on_close(&resets);
    drop(resets);
    until("none left", || rig.route.active() == 0 && rig.route.waiting() == 0);
}

#[test]
fn a_half_close_stays_one_from_either_side() {
    // The worker answers only when the client has ended, and goes on after its own end.
    let rig = Rig::new(
        Routing::default(),
        &[worker(|mut stream| {
            let request = said(&stream);
            stream.write_all(request.to_uppercase().as_bytes()).unwrap();
        })],
    );
    let mut client = rig.connect();
    client.write_all(b"hello").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(said(client), "HELLO");

    let (heard, hears) = std::sync::mpsc::channel();
    let rig = Rig::new(
        Routing::default(),
        &[worker(move |mut stream| {
            stream.write_all(b"bye").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            heard.send(said(stream)).unwrap();
        })],
    );
    let mut client = rig.connect();
    assert_eq!(said(&client), "bye");
    client.write_all(b"still here").unwrap();
    drop(client);
    assert_eq!(hears.recv_timeout(DEADLINE).unwrap(), "still here");
}

#[test]
fn a_reset_stays_a_reset_from_either_side() {
    let (heard, hears) = std::sync::mpsc::channel();
    let rig = Rig::new(
        Routing::default(),
        &[worker(move |mut stream| {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            if byte == *b"w" {
                stream.write_all(b"part").unwrap();
                reset_on_close(&stream);
            } else {
                stream.write_all(b"go").unwrap();
                heard.send(stream.read(&mut byte)).unwrap();
            }
        })],
    );
    let mut client = rig.connect();
    client.write_all(b"w").unwrap();
    let mut text = String::new();
    let error = client.read_to_string(&mut text).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    let mut client = rig.connect();
    client.write_all(b"c").unwrap();
    client.read_exact(&mut [0; 2]).unwrap();
    reset_on_close(&client);
    drop(client);
    assert!(is_reset(hears.recv_timeout(DEADLINE).unwrap()));
}

#[test]
fn a_reset_is_seen_behind_backpressure_and_after_a_half_close() {
    let rig = Rig::new(
        Routing::default(),
        &[worker(|mut stream| while stream.write_all(&[0; 64 * 1024]).is_ok() {})],
    );
    // The client reads nothing, so that the relay doesn't read the worker either.
    let client = rig.connect();
    let before = || rig.route.active();
    until("connected", || before() == 1);
    until_still(|| queued(&client));
    reset_on_close(&client);
    drop(client);
    until("ended", || rig.route.active() == 0);

    let read = Arc::new(AtomicBool::new(false));
    let has_read = Arc::clone(&read);
    let rig = Rig::new(
        Routing::default(),
        &[worker(move |mut stream| {
            assert_eq!(said(&stream), "x");
            stream.write_all(b"y").unwrap();
            until("read", || has_read.load(SeqCst));
            reset_on_close(&stream);
        })],
    );
    let mut client = rig.connect();
    client.write_all(b"x").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    client.read_exact(&mut [0]).unwrap();
    read.store(true, SeqCst);
    assert!(is_reset(client.read(&mut [0])));
}

#[test]
fn a_reset_worker_is_seen_while_the_client_reads_nothing() {
    let (go, goes) = std::sync::mpsc::channel::<()>();
    let goes = Arc::new(std::sync::Mutex::new(goes));
    let rig = Rig::new(
        Routing::default(),
        &[worker(move |mut stream| {
            stream.set_nonblocking(true).unwrap();
            let goes = goes.lock().unwrap();
            while goes.try_recv().is_err() {
                _ = stream.write(&[0; 64 * 1024]).is_ok();
            }
            reset_on_close(&stream);
        })],
    );
    let client = rig.connect();
    until_still(|| queued(&client));
    go.send(()).unwrap();
    until("ended", || rig.route.active() == 0);
    let error = io::copy(&mut &client, &mut io::sink()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

/// Bytes that wait to be read.
fn queued(stream: &TcpStream) -> usize {
    let mut buffer = vec![0; 16 << 20];
    stream.set_nonblocking(true).unwrap();
    let count = stream.peek(&mut buffer).unwrap_or(0);
    stream.set_nonblocking(false).unwrap();
    count
}

/// Waits until a growing number has stopped to grow.
fn until_still(mut number: impl FnMut() -> usize) -> usize {
    let (mut last, mut since) = (number(), Instant::now());
    until("still", || {
        let now = number();
        if now != last || now == 0 {
            (last, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_millis(200)
    });
    last
}

/// A stream of numbers that differs at every place.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

const VOLUME: usize = 256 << 20;

fn send_noise(mut stream: &TcpStream, seed: u64) {
    let mut noise = Noise(seed);
    let mut block = vec![0; 64 * 1024];
    for number in 0..VOLUME / block.len() {
        noise.fill(&mut block);
        if number % 64 == 0 {
            let (single, rest) = block.split_at(100);
            single.iter().for_each(|byte| stream.write_all(&[*byte]).unwrap());
            stream.write_all(rest).unwrap();
        } else {
            stream.write_all(&block).unwrap();
        }
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

fn expect_noise(mut stream: &TcpStream, seed: u64) {
    let mut noise = Noise(seed);
    let (mut expected, mut block) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    for number in 0..VOLUME / block.len() {
        noise.fill(&mut expected);
        stream.read_exact(&mut block).unwrap();
        assert!(block == expected, "block {number} differs");
    }
    assert_eq!(stream.read(&mut block).unwrap(), 0);
}

#[test]
fn bytes_pass_unchanged_both_ways_at_once() {
    let all = backends(&[worker(|stream| {
        thread::scope(|scope| {
            scope.spawn(|| send_noise(&stream, 1));
            expect_noise(&stream, 2);
        });
    })]);
    let rig = Rig::with(Routing::default(), &all, None);
    let client = rig.connect();
    thread::scope(|scope| {
        scope.spawn(|| send_noise(&client, 2));
        expect_noise(&client, 1);
    });
    until("ended", || rig.route.active() == 0);
    let traffic = all[0].traffic();
    assert_eq!((traffic.sent, traffic.received), (Some(VOLUME as u64), Some(VOLUME as u64)));
    assert_eq!((traffic.active, traffic.total, traffic.failed), (Some(0), Some(1), 0));
}

#[test]
fn an_idle_connection_is_ended_politely_and_a_busy_one_is_not() {
    let routing = Routing { idle_timeout: Duration::from_millis(300), ..Routing::default() };
    let rig = Rig::new(routing, &[worker(echo)]);
    let mut idle = rig.connect();
    let mut busy = rig.connect();
    let begun = Instant::now();
    let ended = thread::spawn(move || (idle.read(&mut [0]), begun.elapsed()));
    while begun.elapsed() < Duration::from_millis(900) {
        busy.write_all(b"x").unwrap();
        busy.read_exact(&mut [0]).unwrap();
        thread::sleep(Duration::from_millis(20));
    }
    let (result, after) = ended.join().unwrap();
    assert_eq!(result.unwrap(), 0);
    assert!((300..800).contains(&after.as_millis()), "{after:?}");
}

/// A worker that ends its side after what it was sent, or at once.
fn an_idle_end_is_seen_by_worker(ends: bool) -> (io::Result<usize>, Duration) {
    let (heard, hears) = std::sync::mpsc::channel();
    let worker = worker(move |mut stream| {
        stream.write_all(b"hello").unwrap();
        heard.send(stream.read(&mut [0])).unwrap();
        if !ends {
            thread::sleep(Duration::from_secs(3));
        }
    });
    let routing = Routing { idle_timeout: Duration::from_millis(100), ..Routing::default() };
    let rig = Rig::new(routing, &[worker]);
    let mut client = rig.connect();
    client.read_exact(&mut [0; 5]).unwrap();
    let ended = hears.recv_timeout(DEADLINE).unwrap();
    let begun = Instant::now();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    if ends {
        drop(client);
    }
    until("it is closed", || rig.route.active() == 0);
    (ended, begun.elapsed())
}

#[test]
fn an_idle_connection_has_a_moment_to_take_its_end_and_no_more() {
    let (ended, took) = an_idle_end_is_seen_by_worker(true);
    assert_eq!(ended.unwrap(), 0);
    assert!(took < Duration::from_millis(700), "{took:?}");
    let (ended, took) = an_idle_end_is_seen_by_worker(false);
    assert_eq!(ended.unwrap(), 0);
    assert!((500..2_500).contains(&took.as_millis()), "{took:?}");
}

#[test]
fn what_an_idle_reader_has_not_taken_is_cut_off() {
    let routing = Routing { idle_timeout: Duration::from_millis(300), ..Routing::default() };
    let worker = worker(|mut stream| while stream.write_all(&[0; 64 * 1024]).is_ok() {});
    let rig = Rig::new(routing, &[worker]);
    let client = rig.connect();
    until("it is closed", || rig.route.active() == 1);
    until("it is closed", || rig.route.active() == 0);
    // An end behind a part of it would pass for the end of the whole.
    let error = io::copy(&mut &client, &mut io::sink()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn no_more_than_max_connections_reach_the_workers() {
    let now = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let worker = worker({
        let (now, most) = (Arc::clone(&now), Arc::clone(&most));
        move |stream| {
            most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
            thread::sleep(Duration::from_millis(2));
            now.fetch_sub(1, SeqCst);
            echo(stream);
        }
    });
    let limit = |max| Routing { max_connections: NonZeroU32::new(max), ..Routing::default() };
    let all = backends(&[worker]);
    let rig = Rig::with(limit(3), &all, None);
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let mut client = rig.connect();
                    client.write_all(b"x").unwrap();
                    client.read_exact(&mut [0]).unwrap();
                    assert!(rig.route.active() <= 3);
                }
            });
        }
    });
    assert_eq!(all[0].traffic().total, Some(320));
    assert!(most.load(SeqCst) <= 3, "{most:?}");

    let clients: Vec<_> = (0..5).map(|_| rig.connect()).collect();
    until("full", || all[0].traffic().total == Some(323));
    rig.publish(limit(5), &all, None);
    until("more", || all[0].traffic().total == Some(325));
    drop(clients);
}

fn each_at_most(worker_connections: u32) -> Routing {
    let worker_connections = NonZeroU32::new(worker_connections);
    Routing { worker_connections, ..Routing::default() }
}

#[test]
fn no_worker_has_more_than_it_may_and_whoever_waits_gets_the_first_free_place() {
    // Each worker knows itself how many it has.
    let now: [Arc<AtomicUsize>; 2] = Default::default();
    let workers = now.clone().map(|now| {
        worker(move |mut stream| {
            let has = now.fetch_add(1, SeqCst) + 1;
            stream.read_exact(&mut [0]).unwrap();
            // Before the end of the stream, which is what gives the place back.
            now.fetch_sub(1, SeqCst);
            stream.write_all(&[u8::try_from(has).unwrap()]).unwrap();
        })
    });
    let all = backends(&workers);
    let rig = Rig::with(each_at_most(2), &all, None);
    thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let mut client = rig.connect();
                    client.write_all(b"x").unwrap();
                    let mut has = [0];
                    client.read_exact(&mut has).unwrap();
                    assert!(has[0] <= 2, "{has:?}");
                    assert!(all.iter().all(|backend| backend.active() <= 2));
                }
            });
        }
    });
    assert_eq!(all.iter().map(|backend| backend.traffic().total).sum::<Option<u64>>(), Some(1600));
    until("released", || rig.route.waiting() == 0 && rig.route.active() == 0);
}

#[test]
fn the_longest_waiting_goes_first_and_a_wider_limit_lets_all_in() {
    let all = backends(&[worker(echo)]);
    let rig = Rig::with(each_at_most(1), &all, None);
    let mut clients: Vec<_> = (0..6)
        .map(|number| {
            let client = rig.connect();
            // Not before it is there: two threads may take them in any order.
            until("its turn", || {
                rig.route.active() == number + 1
                    && all[0].traffic().total == Some(1)
                    && rig.route.waiting() == number
            });
            client
        })
        .collect();
    assert_eq!(rig.route.waiting(), 5);
    assert_eq!(all[0].traffic().total, Some(1));
    drop(clients.remove(0));
    until("the next", || all[0].traffic().total == Some(2));
    assert_eq!(rig.route.waiting(), 4);
    // One that leaves while it waits takes nobody's place.
    drop(clients.remove(3));
    until("gone", || rig.route.waiting() == 3);
    rig.publish(each_at_most(2), &all, None);
    until("wider", || all[0].traffic().total == Some(3));
    assert_eq!(rig.route.waiting(), 2);
    rig.publish(Routing::default(), &all, None);
    until("no limit", || all[0].traffic().total == Some(5));
    for client in &mut clients {
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn where_all_are_full_a_connection_waits_no_longer_than_the_hold_timeout() {
    let routing = Routing { hold_timeout: Duration::from_millis(200), ..each_at_most(1) };
    let all = backends(&[worker(echo)]);
    let rig = Rig::with(routing, &all, None);
    let _first = rig.connect();
    until("full", || all[0].traffic().total == Some(1));
    let begun = Instant::now();
    assert!(is_reset(rig.first_read()));
    assert!((200..900).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
}

#[test]
fn a_full_worker_is_waited_for_though_another_refuses() {
    let (_bound, refusing) = refusing();
    let all = backends(&[refusing, worker(echo)]);
    let rig = Rig::with(each_at_most(1), &all, None);
    let first = rig.connect();
    until("full", || all[1].traffic().total == Some(1));
    let mut second = rig.connect();
    until("waiting", || rig.route.waiting() == 1);
    drop(first);
    second.write_all(b"x").unwrap();
    second.read_exact(&mut [0]).unwrap();
    assert!(all[0].traffic().failed >= 1);
}

/// A worker on unix whose queue has room for one, which is taken.
fn full() -> (UnnamedUnixListener, UnixStream, Arc<Backend>) {
    let folder = tempfile::tempdir().unwrap();
    let worker = UnnamedUnixListener::open(folder.path()).unwrap();
    worker.socket().listen(0).unwrap();
    worker.socket().set_read_timeout(Some(DEADLINE)).unwrap();
    let client = worker.endpoint().unconnected().unwrap();
    worker.endpoint().connect(&client).unwrap();
    let backend =
        Backend::new(7, 7, "web/7".into(), worker.endpoint().clone(), None, Arc::default());
    (worker, client.into(), backend)
}

/// Takes the next connection and says who it is.
fn name_next(worker: &UnnamedUnixListener, name: &str) {
    let (mut connection, _) = worker.socket().accept().unwrap();
    // Whoever has left takes no name.
    _ = connection.write_all(name.as_bytes());
}

#[test]
fn a_worker_with_a_full_queue_is_skipped() {
    let (_worker, _client, full) = full();
    let mut all = vec![Arc::clone(&full)];
    all.extend(backends(&[naming("a")]));
    let rig = Rig::with(Routing::default(), &all, None);
    for _ in 0..4 {
        assert_eq!(said(rig.connect()), "a");
    }
    assert_eq!(full.traffic().total, Some(0));
    assert!(full.traffic().failed > 0);
}

#[test]
fn where_all_queues_are_full_connections_wait_in_order_for_one_that_is_not() {
    let (worker, _client, full) = full();
    // Each thread has an order of its own.
    let (one, backends) = (1, [Arc::clone(&full)]);
    let rig = Rig::of(one, "127.0.0.1:0", 100, Routing::default(), &backends, None);
    let clients: Vec<_> = (0..3)
        .map(|count| {
            let client = rig.connect();
            until("it waits", || rig.route.waiting() == count + 1);
            client
        })
        .collect();
    assert_eq!(full.traffic().failed, 1, "the others came behind it");
    // No connection of lbd's ends meanwhile: that there is room, it finds out by itself.
    name_next(&worker, "nobody");
    for (client, name) in clients.into_iter().zip(["1", "2", "3"]) {
        name_next(&worker, name);
        assert_eq!(said(client), name);
    }
    assert_eq!(full.traffic().failed, 1, "and looks were not counted");
}

#[test]
fn where_all_queues_stay_full_a_connection_waits_no_longer_than_the_hold_timeout() {
    let (_worker, _client, full) = full();
    let routing = Routing { hold_timeout: Duration::from_millis(200), ..Routing::default() };
    let rig = Rig::with(routing, &[full], None);
    let begun = Instant::now();
    assert!(is_reset(rig.connect().read(&mut [0])));
    assert!(begun.elapsed() >= Duration::from_millis(200));
    until("its place is free", || rig.route.active() == 0);
}

#[test]
fn the_budget_of_the_process_holds_over_all_services() {
    let all = backends(&[worker(echo)]);
    let rig = Rig::on("127.0.0.1:0", 4, Routing::default(), &all, None);
    let mut clients: Vec<_> = (0..8).map(|_| rig.connect()).collect();
    until("full", || all[0].traffic().total == Some(4));
    assert_eq!(rig.plane.held(), 4);
    for (number, mut client) in clients.drain(..).enumerate() {
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        assert!(all[0].traffic().total <= Some(5 + number as u64));
    }
    until("empty", || rig.plane.held() == 0);
}

#[test]
fn closing_a_listener_resets_nobody() {
    for (listen, host) in [("127.0.0.1:0", "127.0.0.1:0"), ("[::1]:0", "[::1]:0")] {
        let worker = worker_on(host, |mut stream| {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            stream.write_all(&byte).unwrap();
        });
        let rig = Rig::on(listen, 10_000, Routing::default(), &backends(&[worker]), None);
        let served = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    // Until the first SYN that gets no answer.
                    let timeout = Duration::from_millis(500);
                    while let Ok(mut client) = TcpStream::connect_timeout(&rig.address, timeout) {
                        client.write_all(b"x").unwrap();
                        let mut byte = [0];
                        client.read_exact(&mut byte).expect("reset after the connect succeeded");
                        served.fetch_add(1, SeqCst);
                    }
                });
            }
            until("under way", || served.load(SeqCst) > 200);
            rig.close().unwrap();
        });
        let refused = TcpStream::connect(rig.address).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        runtime().block_on(rig.route.emptied());
    }
}

#[test]
fn closing_a_unix_listener_resets_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.sock");
    let rig = Rig::new(Routing::default(), &[worker(echo)]);
    let listener = Listener::bind(&Listen::Unix(path.clone()), &UnixAccess::default()).unwrap();
    let listener = rig.plane.open(&rig.route, listener);
    let served = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Ok(mut client) = UnixStream::connect(&path) {
                    client.write_all(b"hello").unwrap();
                    client.shutdown(Shutdown::Write).unwrap();
                    assert_eq!(said(client), "hello");
                    served.fetch_add(1, SeqCst);
                }
            });
        }
        until("under way", || served.load(SeqCst) > 200);
        runtime().block_on(rig.plane.close(listener)).unwrap();
    });
    assert!(!path.exists());
}

#[test]
fn a_closed_listener_leaves_its_connections_alone() {
    let rig = Rig::new(Routing::default(), &[worker(echo)]);
    let mut client = rig.connect();
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    rig.close().unwrap();
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    assert_eq!(rig.route.active(), 1);
}

/// One service with one place, which somebody has, and a listener that is closed then, with so many
/// who wait there. How long that took, how many turns the threads took meanwhile, and those who waited.
fn closed_while_full(
    listen: &Listen,
    waiting: usize,
    connect: impl Fn() -> Box<dyn Read>,
) -> (Duration, u64, Vec<Box<dyn Read>>) {
    let routing = Routing {
        max_connections: NonZeroU32::new(1),
        hold_timeout: Duration::from_secs(1),
        ..Routing::default()
    };
    let rig = Rig::new(routing, &[worker(echo)]);
    let listener = Listener::bind(listen, &UnixAccess::default()).unwrap();
    let listener = rig.plane.open(&rig.route, listener);
    let mut client = rig.connect();
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    let waiting = (0..waiting).map(|_| connect()).collect();
    let (begun, before) = (Instant::now(), rig.plane.progress().iter().sum::<u64>());
    let closed = runtime()
        .block_on(async { tokio::time::timeout(DEADLINE, rig.plane.close(listener)).await });
    closed.expect("it is closed at last").unwrap();
    let (took, turns) = (begun.elapsed(), rig.plane.progress().iter().sum::<u64>() - before);
    // It goes on.
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    (took, turns, waiting)
}

#[test]
fn a_listener_of_a_full_service_can_be_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.sock");
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let tcp = || -> Box<dyn Read> {
        let client = TcpStream::connect(free).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        Box::new(client)
    };
    let unix = || -> Box<dyn Read> {
        let client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        Box::new(client)
    };
    for listen in [Listen::Tcp(free), Listen::Unix(path.clone())] {
        let connect = |count| match listen {
            Listen::Tcp(_) => closed_while_full(&listen, count, tcp),
            Listen::Unix(_) => closed_while_full(&listen, count, unix),
        };
        // Nobody waits: there is nothing to wait for.
        let (took, turns, _) = connect(0);
        assert!(took < Duration::from_millis(900), "{listen} {took:?}");
        assert!(turns < 100, "{listen} {turns}");
        // Those who wait do so for as long as anybody waits for a worker, and not for ever.
        let (took, turns, mut waiting) = connect(3);
        assert!(took >= Duration::from_secs(1), "{listen} {took:?}");
        assert!(turns < 200, "{listen} {turns}");
        for client in &mut waiting {
            assert!(is_reset(client.read(&mut [0])), "{listen}");
        }
    }
}

#[test]
fn who_was_refused_while_another_worker_is_on_its_way_is_served_by_the_first_that_takes_him() {
    let bound = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    bound.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = bound.local_addr().unwrap().as_socket().unwrap();
    let all = backends(&[address]);
    let coming = Some(Instant::now());
    let rig = Rig::of(1, "127.0.0.1:0", 10_000, Routing::default(), &all, coming);
    let first = rig.connect();
    until("it waits", || rig.route.waiting() == 1);
    // It listens after all, and nothing is published.
    bound.listen(16).unwrap();
    let listener = TcpListener::from(bound);
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            _ = stream.write_all(b"here");
        }
    });
    let begun = Instant::now();
    assert_eq!(said(first), "here");
    assert_eq!(said(rig.connect()), "here");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn a_cut_resets_both_sides() {
    let (heard, hears) = std::sync::mpsc::channel();
    let backends = backends(&[worker(move |mut stream| {
        heard.send(stream.read(&mut [0])).unwrap();
    })]);
    let rig = Rig::with(Routing::default(), &backends, None);
    let mut client = rig.connect();
    until("taken", || backends[0].traffic().total == Some(1));
    assert_eq!((rig.route.active(), rig.plane.held()), (1, 1));
    rig.plane.cut();
    assert!(is_reset(client.read(&mut [0])));
    assert!(is_reset(hears.recv_timeout(DEADLINE).unwrap()));
}

#[test]
fn every_thread_makes_progress_when_asked() {
    let rig = Rig::new(Routing::default(), &[]);
    let before = rig.plane.progress();
    assert_eq!(before.len(), 2);
    until("progress", || {
        rig.plane.progress().iter().zip(&before).all(|(now, before)| now > before)
    });
}

#[test]
fn a_retired_upstream_tells_when_its_last_connection_ends() {
    let drained = Arc::new(tokio::sync::Notify::new());
    let backend =
        Backend::new(1, 0, "web/1".into(), worker(echo).into(), None, Arc::clone(&drained));
    let rig = Rig::with(Routing::default(), &[Arc::clone(&backend)], None);
    let client = rig.connect();
    until("taken", || backend.traffic().total == Some(1));
    assert!(!backend.retire());
    drop(client);
    runtime().block_on(drained.notified());
    assert_eq!(backend.active(), 0);
}

#[derive(Clone, Default)]
struct Lines(Arc<std::sync::Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn each_connection_gets_one_line_at_its_end() {
    let lines = Lines::default();
    let writer = lines.clone();
    tracing_subscriber::fmt()
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .without_time()
        .init();
    let text = || String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();

    let settings = Settings { threads: NonZeroUsize::MIN, max_held: NonZeroUsize::MAX };
    let plane = DataPlane::start(settings).unwrap();
    let access = Arc::new(AtomicBool::new(true));
    let worker = worker(echo);
    let pool = |all| Pool::new(all, None, Arc::new(Routing::default()));
    let route = plane.service("logged".into(), pool(backends(&[worker])), Arc::clone(&access));
    let listener =
        Listener::bind(&Listen::Tcp(([127, 0, 0, 1], 0).into()), &UnixAccess::default()).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], listener.port().unwrap()));
    plane.open(&route, listener);

    let mut client = TcpStream::connect(address).unwrap();
    client.write_all(b"hello").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(said(&client), "hello");
    until("a line", || text().contains(" end=closed"));
    let line = format!(
        "connection service=\"logged\" slot=0 port={port} client={client} worker=\"web/{port}\" \
         sent=5 received=5 duration=",
        port = worker.port(),
        client = client.local_addr().unwrap(),
    );
    assert!(text().contains(&line), "{line}\n{}", text());

    route.publish(pool(vec![]));
    let client = TcpStream::connect(address).unwrap();
    until("a line", || text().contains(" end=no-worker"));
    let line = format!(
        "connection service=\"logged\" client={} worker=\"-\" sent=0 received=0",
        client.local_addr().unwrap()
    );
    assert!(text().contains(&line), "{line}\n{}", text());

    access.store(false, SeqCst);
    TcpStream::connect(address).unwrap();
    until("ended", || route.active() == 0);
    plane.cut();
    assert_eq!(text().lines().filter(|line| line.contains("logged")).count(), 2);
}
