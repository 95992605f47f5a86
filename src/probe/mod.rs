//! Probes of workers. A probe is either a bare connection that the worker has to accept, or a GET
//! whose status is checked.
//!
//! A probe knows nothing of rise, fall or intervals, which are the business of the
//! [`supervisor`](crate::supervisor). It only reports what it saw.
//!
//! - A successful connect proves nothing: the kernel answers it if there is a listening socket,
//!   whatever the process is doing. So a bare probe passes only when the program has *accepted* its
//!   connection.
//! - A busy worker accepts later. At most one connection of a probe waits in its accept queue:
//!   while it waits, the next probe uses it too instead of making a new one.
//! - A probe ends with an orderly shutdown: it sends a FIN, and reads what the worker sends before
//!   it closes. Otherwise a program that greets its clients would see its greeting refused. The
//!   next probe waits for that shutdown.

mod connection;
mod http;

use std::{
    cell::RefCell,
    io,
    rc::Rc,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use socket2::{SockAddr, Socket};
use tokio::{
    task::{JoinHandle, spawn_local},
    time::{error::Elapsed, timeout, timeout_at},
};

use crate::{
    config::{Probe, ProxyProtocol},
    net::{Endpoint, diag::SharedDiag},
    supervisor::{ProbeOutcome, Verdict},
};
use connection::Connection;

/// The target of a probe, and the kind of probe.
#[derive(Debug, Clone)]
pub struct Target {
    /// The kind of probe.
    pub probe: Probe,
    /// Where the worker listens.
    pub endpoint: Endpoint,
    /// Whether the worker creates its listening socket itself, so that no other process has it.
    pub makes_its_own: bool,
    /// The PROXY header that the worker expects on every connection.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// How long one probe may take.
    pub timeout: Duration,
}

/// The probes of one worker: one at a time, and what is left of the previous one.
#[derive(Debug, Clone, Default)]
pub struct Prober(Rc<RefCell<State>>);

#[derive(Debug, Default)]
struct State {
    /// Asked whether a connection was accepted.
    diag: SharedDiag,
    /// The connection that waits in the worker's accept queue, if any.
    waiting: Option<Connection>,
    /// The shutdown of the last connection.
    ending: Option<Ending>,
}

#[derive(Debug)]
struct Ending {
    /// The shutdown, limited to the timeout of a probe.
    task: JoinHandle<Result<(), Elapsed>>,
    /// Whether the worker answered the probe in time. If not, it may never read the end either.
    in_time: bool,
}

impl Prober {
    /// Creates a prober that asks `diag` whether its connections were accepted.
    #[must_use]
    pub fn new(diag: SharedDiag) -> Self {
        Self(Rc::new(RefCell::new(State { diag, ..State::default() })))
    }

    /// Whether a connection of an earlier probe waits to be accepted. If so, the next probe uses
    /// it, and needs no new socket.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.0.borrow().waiting.is_some()
    }

    /// The local address of the connection that waits.
    #[must_use]
    pub fn waits_from(&self) -> Option<SockAddr> {
        self.0.borrow().waiting.as_ref()?.local_address()
    }

    /// Gives up the connection that waits: it was drained from the queue, not accepted by the
    /// worker.
    pub fn forget(&self) {
        self.0.borrow_mut().waiting = None;
    }

    /// Probes `target` once, over the connection that waits, or over `socket`, which is not
    /// connected yet. `answered` returns how many clients the worker has begun to answer so far.
    /// Takes at most `target.timeout`, after the shutdown of the previous probe, which takes no
    /// longer. Dropping the future gives up.
    ///
    /// To be called in a [`LocalSet`](tokio::task::LocalSet).
    pub async fn probe(
        &self,
        target: &Target,
        socket: io::Result<Socket>,
        answered: impl Fn() -> u64,
    ) -> ProbeOutcome {
        self.hear_out().await;
        let began = Instant::now();
        let until = began + target.timeout;
        let before = answered();
        let (mut connection, diag) = {
            let mut state = self.0.borrow_mut();
            (state.waiting.take(), state.diag.clone())
        };
        let asked = ask(target, socket, &diag, &mut connection);
        let result = match timeout_at(until.into(), asked).await {
            Ok(result) => result,
            Err(_) => late(target, &mut connection, answered() > before),
        };
        let mut state = self.0.borrow_mut();
        match (&result, connection) {
            (
                Err(ProbeError::NotAccepted(_) | ProbeError::Busy | ProbeError::Lacking(_)),
                connection,
            ) => state.waiting = connection,
            (result, Some(connection)) => {
                let task = spawn_local(timeout(target.timeout, connection.end()));
                let in_time = !matches!(result, Err(ProbeError::NotAnswered(_)));
                // At most one shutdown at a time, however short the interval is.
                if let Some(before) = state.ending.replace(Ending { task, in_time }) {
                    before.task.abort();
                }
            }
            (_, None) => {}
        }
        let verdict = match result {
            Ok(()) => Verdict::Passed,
            Err(error) if error.says_nothing() => Verdict::Unknown(error.to_string()),
            Err(error) => Verdict::Failed(error.to_string()),
        };
        ProbeOutcome { took: began.elapsed(), verdict }
    }

    /// Waits for the shutdown of the last probe, if the worker has answered that probe. If the
    /// connection were cut off in the middle of the response, the worker would see an error of its
    /// client.
    async fn hear_out(&self) {
        let ending = self.0.borrow_mut().ending.take_if(|ending| ending.in_time);
        if let Some(ending) = ending {
            // Done, or timed out.
            _ = ending.task.await;
        }
    }
}

/// Why a probe did not pass.
#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error("cannot connect to {0}: {1}")]
    Connect(String, io::Error),
    #[error("lbd has nothing left to probe it with: {0}")]
    Lacking(io::Error),
    #[error("it closed its listening socket")]
    Closed,
    #[error("its accept queue is full")]
    Full,
    /// A connect to a port inside the range of ephemeral ports can be given that very port as its
    /// source; TCP's simultaneous open (RFC 9293, 3.5) then connects the socket to itself.
    #[error("nobody listens on {0}: the connection was one to itself")]
    SelfConnect(String),
    #[error("cannot send to it: {0}")]
    Send(io::Error),
    #[error("no connection within {}", humantime::format_duration(*.0))]
    NotConnected(Duration),
    #[error("a connection is not accepted within {}", humantime::format_duration(*.0))]
    NotAccepted(Duration),
    #[error("it is busy: it answers others, and has not come to the probe yet")]
    Busy,
    #[error("no answer within {}", humantime::format_duration(*.0))]
    NotAnswered(Duration),
    #[error("GET {path}: {reason}")]
    Http { path: String, reason: http::NoAnswer },
    #[error("GET {path}: status {status} is not expected")]
    Status { path: String, status: u16 },
}

impl ProbeError {
    /// Whether the error proves no fault of the worker.
    fn says_nothing(&self) -> bool {
        matches!(self, Self::Lacking(_) | Self::Busy)
    }

    /// Classifies the error of a connect to `endpoint`.
    fn connect(endpoint: &Endpoint, error: io::Error) -> Self {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(
                // connect(2) returns EAGAIN for a TCP socket if no local port is free.
                Errno::EAGAIN
                | Errno::EADDRNOTAVAIL
                | Errno::EADDRINUSE
                | Errno::EMFILE
                | Errno::ENFILE
                | Errno::ENOBUFS
                | Errno::ENOMEM,
            ) => Self::Lacking(error),
            _ => Self::Connect(endpoint.to_string(), error),
        }
    }
}

/// Connects, unless there is a connection, and sends the request. If the future is dropped,
/// `connection` is what has been established so far.
async fn ask(
    target: &Target,
    socket: io::Result<Socket>,
    diag: &SharedDiag,
    connection: &mut Option<Connection>,
) -> Result<(), ProbeError> {
    let open = match connection {
        Some(open) => open,
        None => {
            let socket = socket.map_err(|error| ProbeError::connect(&target.endpoint, error))?;
            let made = Connection::make(target, socket, diag).await?;
            connection.insert(made)
        }
    };
    match &target.probe {
        Probe::Tcp => {
            let accepted = open.accepted().await;
            if accepted.is_err() {
                // The connection has ended, so the next probe cannot use it.
                *connection = None;
            }
            accepted
        }
        Probe::Http { path, expect, .. } => {
            let answer = open.answer().await;
            let status =
                answer.map_err(|reason| ProbeError::Http { path: path.clone(), reason })?;
            match expect.contains(status) {
                true => Ok(()),
                false => Err(ProbeError::Status { path: path.clone(), status }),
            }
        }
    }
}

/// The result of a probe that has timed out. `progress`: the worker answered another client
/// meanwhile.
fn late(
    target: &Target,
    connection: &mut Option<Connection>,
    progress: bool,
) -> Result<(), ProbeError> {
    let limit = target.timeout;
    let is_bare = target.probe == Probe::Tcp;
    let is_queued = connection.as_mut().map(Connection::is_queued).transpose();
    Err(match (is_queued, progress) {
        // It was accepted since the last check.
        (Ok(Some(false)), _) if is_bare => return Ok(()),
        (Ok(Some(false)), _) => ProbeError::NotAnswered(limit),
        // The accept queue is in the order of arrival. If an earlier client is answered now, the
        // probe will be reached.
        (Ok(Some(true) | None), true) => ProbeError::Busy,
        (Ok(Some(true)), false) => ProbeError::NotAccepted(limit),
        // On a unix socket only a full accept queue makes a connect wait.
        (Ok(None), false) if target.endpoint.inet().is_none() => ProbeError::Full,
        (Ok(None), false) => ProbeError::NotConnected(limit),
        // The answer is missing, whether or not the connection was accepted.
        (Err(_), false) if !is_bare => ProbeError::NotAnswered(limit),
        (Err(error), _) => error,
    })
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        io::{Read, Write},
        net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
        os::fd::AsFd,
        thread,
    };

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use tokio::task::LocalSet;

    use super::*;
    use crate::{config::StatusSet, net::UnnamedUnixListener};

    const SECOND: Duration = Duration::from_secs(1);

    fn target(probe: Probe, address: SocketAddr, timeout: Duration) -> Target {
        let endpoint = address.into();
        Target { probe, endpoint, makes_its_own: true, proxy_protocol: None, timeout }
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, future)
    }

    async fn once(prober: &Prober, target: &Target) -> Verdict {
        let socket = target.endpoint.way_of_a_probe();
        prober.probe(target, socket, || 0).await.verdict
    }

    /// One probe, by a prober of its own.
    fn probe(probe: Probe, address: SocketAddr, limit: Duration) -> Option<String> {
        let verdict = run(once(&Prober::default(), &target(probe, address, limit)));
        match verdict {
            Verdict::Passed => None,
            Verdict::Failed(error) => Some(error),
            other => panic!("{other:?}"),
        }
    }

    fn http(path: &str) -> Probe {
        Probe::Http { path: path.to_owned(), host: None, expect: StatusSet(vec![(200, 399)]) }
    }

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    /// Answers one connection with `answer`, and gives back what was asked and what came after the
    /// answer: the bytes until the client's end.
    fn server(answer: &[u8]) -> (SocketAddr, thread::JoinHandle<(String, io::Result<usize>)>) {
        let (listener, address) = listener();
        let answer = answer.to_vec();
        let asked = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            let mut buffer = [0; 1024];
            while !asked.ends_with(b"\r\n\r\n") {
                let n = stream.read(&mut buffer).unwrap();
                asked.extend_from_slice(&buffer[..n]);
            }
            let wrote = stream.write_all(&answer);
            _ = stream.shutdown(Shutdown::Write);
            let rest = wrote.and_then(|()| stream.read(&mut buffer));
            (String::from_utf8(asked).unwrap(), rest)
        });
        (address, asked)
    }

    #[test]
    fn a_connection_passes_when_it_is_accepted_and_not_before() {
        let (listener, address) = listener();
        let error = "a connection is not accepted within 50ms".to_owned();
        assert_eq!(probe(Probe::Tcp, address, SECOND / 20), Some(error));
        let accepts = thread::spawn(move || {
            // The first one is the one that was given up.
            let (mut first, mut second) =
                (listener.accept().unwrap().0, listener.accept().unwrap().0);
            assert_eq!(first.read(&mut [0]).unwrap(), 0);
            second.write_all(b"220 ready\r\n").unwrap();
            assert_eq!(second.read(&mut [0]).unwrap(), 0, "it ends, and is not reset");
            drop(listener);
        });
        assert_eq!(probe(Probe::Tcp, address, 20 * SECOND), None);
        accepts.join().unwrap();
        assert_eq!(
            probe(Probe::Tcp, address, SECOND),
            Some(format!("cannot connect to {address}: Connection refused (os error 111)"))
        );
    }

    #[test]
    fn one_probe_waits_in_a_queue_however_often_it_is_asked_for() {
        let (listener, address) = listener();
        let target = target(Probe::Tcp, address, SECOND / 20);
        let prober = Prober::default();
        run(async {
            for _ in 0..5 {
                let verdict = once(&prober, &target).await;
                let Verdict::Failed(error) = verdict else { panic!("{verdict:?}") };
                assert_eq!(error, "a connection is not accepted within 50ms");
                assert!(prober.is_waiting());
            }
            let from = prober.waits_from().unwrap().as_socket();
            let accepted = listener.accept().unwrap();
            assert_eq!(Some(accepted.1), from);
            listener.set_nonblocking(true).unwrap();
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
            let long = Target { timeout: 20 * SECOND, ..target };
            assert_eq!(once(&prober, &long).await, Verdict::Passed);
            assert!(!prober.is_waiting());
        });
    }

    #[test]
    fn a_worker_that_answers_others_meanwhile_is_busy_and_nothing_else() {
        let (_listener, address) = listener();
        let target = target(Probe::Tcp, address, SECOND / 20);
        let prober = Prober::default();
        let answered = Cell::new(7);
        run(async {
            let counted = || answered.replace(answered.get() + 1);
            let outcome = prober.probe(&target, target.endpoint.way_of_a_probe(), counted).await;
            assert!(matches!(outcome.verdict, Verdict::Unknown(_)), "{outcome:?}");
            assert!(prober.is_waiting());
        });
    }

    #[test]
    fn what_lbd_lacks_is_no_fault_of_the_worker() {
        let (_listener, address) = listener();
        for errno in [Errno::EMFILE, Errno::ENFILE, Errno::EADDRNOTAVAIL, Errno::EADDRINUSE] {
            let target = target(Probe::Tcp, address, SECOND);
            let socket = Err(io::Error::from(errno));
            let outcome = run(Prober::default().probe(&target, socket, || 0));
            assert!(matches!(outcome.verdict, Verdict::Unknown(_)), "{outcome:?}");
        }
    }

    /// Probes once with this prober, and calls `at_the_end` when the time is over.
    async fn until_late(prober: &Prober, target: &Target, at_the_end: impl Fn()) -> Verdict {
        let calls = Cell::new(0);
        let answered = || {
            // It is asked as a probe begins, and when it is over without a result.
            if calls.replace(calls.get() + 1) == 1 {
                at_the_end();
            }
            0
        };
        prober.probe(target, target.endpoint.way_of_a_probe(), answered).await.verdict
    }

    #[test]
    fn a_connection_that_is_accepted_as_the_time_is_over_is_a_pass() {
        let (listener, address) = listener();
        let target = target(Probe::Tcp, address, SECOND / 20);
        let accepted = RefCell::new(None);
        let prober = Prober::default();
        run(async {
            let accept = || _ = accepted.replace(Some(listener.accept().unwrap()));
            assert_eq!(until_late(&prober, &target, accept).await, Verdict::Passed);
            assert!(!prober.is_waiting());
        });
    }

    #[test]
    fn where_lbd_lacks_what_tells_of_a_connection_it_says_nothing() {
        let (listener, address) = listener();
        let short = target(Probe::Tcp, address, SECOND / 20);
        let diag = SharedDiag::default();
        let prober = Prober::new(diag.clone());
        run(async {
            // Before it connects, and when the time is over.
            diag.fail_once();
            let verdict = once(&prober, &short).await;
            assert!(matches!(verdict, Verdict::Unknown(_)), "{verdict:?}");
            let verdict = until_late(&prober, &short, || diag.fail_once()).await;
            assert!(matches!(verdict, Verdict::Unknown(_)), "{verdict:?}");
            assert!(prober.is_waiting(), "the next one goes on with it");
            // In between: another look tells.
            diag.fail_once();
            let verdict = once(&prober, &short).await;
            assert!(matches!(verdict, Verdict::Failed(_)), "{verdict:?}");
            let from = prober.waits_from().unwrap().as_socket();
            let accepted = listener.accept().unwrap();
            assert_eq!(Some(accepted.1), from);
            diag.fail_once();
            let long = Target { timeout: 20 * SECOND, ..short };
            assert_eq!(once(&prober, &long).await, Verdict::Passed);
        });
    }

    /// A unix socket with a full queue of these clients.
    fn full() -> (UnnamedUnixListener, Target, Vec<Socket>) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnnamedUnixListener::open(folder.path()).unwrap();
        listener.socket().listen(1).unwrap();
        let endpoint = listener.endpoint().clone();
        let mut clients = Vec::new();
        loop {
            let client = endpoint.unconnected().unwrap();
            match endpoint.connect(&client) {
                Ok(()) => clients.push(client),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        let (makes_its_own, timeout) = (false, SECOND / 20);
        let probe = Probe::Tcp;
        let target = Target { probe, endpoint, makes_its_own, proxy_protocol: None, timeout };
        (listener, target, clients)
    }

    #[test]
    fn a_full_queue_of_a_unix_socket_is_waited_for() {
        let (listener, target, clients) = full();
        listener.socket().set_read_timeout(Some(20 * SECOND)).unwrap();
        let target = Target { timeout: 20 * SECOND, ..target };
        let prober = Prober::default();
        run(async {
            let accepts = async {
                // The probe was here first, and has found no room.
                let count = clients.len() + 1;
                let accept = move |_| listener.socket().accept().unwrap();
                let accept = move || (0..count).map(accept).collect::<Vec<_>>();
                tokio::task::spawn_blocking(accept).await.unwrap()
            };
            let (verdict, accepted) = tokio::join!(biased; once(&prober, &target), accepts);
            assert_eq!(verdict, Verdict::Passed);
            drop(accepted);
        });
    }

    #[test]
    fn a_full_queue_of_a_unix_socket_is_a_failure_unless_others_are_answered() {
        let (_listener, target, _clients) = full();
        let prober = Prober::default();
        run(async {
            let verdict = once(&prober, &target).await;
            assert_eq!(verdict, Verdict::Failed("its accept queue is full".to_owned()));
            let answered = Cell::new(7);
            let counted = || answered.replace(answered.get() + 1);
            let outcome = prober.probe(&target, target.endpoint.way_of_a_probe(), counted).await;
            assert!(matches!(outcome.verdict, Verdict::Unknown(_)), "{outcome:?}");
        });
    }

    #[test]
    fn http_sends_path_and_host_and_judges_the_status() {
        let (address, asked) = server(b"HTTP/1.1 204 No Content\r\n\r\n");
        assert_eq!(probe(http("/up?deep=1"), address, SECOND), None);
        let (asked, _) = asked.join().unwrap();
        let asked = asked.to_ascii_lowercase();
        assert!(asked.starts_with("get /up?deep=1 http/1.1\r\n"), "{asked}");
        assert!(asked.contains(&format!("\r\nhost: {address}\r\n")), "{asked}");

        let (address, _) = server(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n");
        assert_eq!(
            probe(http("/up"), address, SECOND),
            Some("GET /up: status 503 is not expected".to_owned())
        );
    }

    #[test]
    fn an_answer_is_read_to_its_end() {
        let body = vec![b'x'; 900_000];
        let head = b"HTTP/1.0 200 OK\r\n\r\n";
        let (address, asked) = server(&[&head[..], &body].concat());
        run(async {
            let prober = Prober::default();
            let verdict = once(&prober, &target(http("/"), address, 20 * SECOND)).await;
            assert_eq!(verdict, Verdict::Passed);
            // What is left of it goes on beside everything else.
            let asked = tokio::task::spawn_blocking(move || asked.join().unwrap());
            let (_, rest) = asked.await.unwrap();
            assert_eq!(rest.unwrap(), 0, "an end, and no reset");
        });
    }

    #[test]
    fn an_answer_that_takes_longer_than_the_interval_is_read_to_its_end() {
        let (listener, address) = listener();
        let (tell, told) = std::sync::mpsc::channel();
        let server = thread::spawn(move || {
            let answer = |body: &[u8]| {
                let mut stream = listener.accept().unwrap().0;
                assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
                stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n").unwrap();
                stream.write_all(body).unwrap();
                stream
            };
            thread::scope(|scope| {
                let mut slow = answer(b"begins");
                // Answers the next probe at once, if there is one before this answer's end.
                scope.spawn(|| drop(answer(b"")));
                _ = told.recv_timeout(SECOND / 10);
                for _ in 0..10 {
                    // Fails where the connection is gone.
                    slow.write_all(b"goes on").unwrap();
                    thread::sleep(SECOND / 100);
                }
            });
        });
        run(async {
            let prober = Prober::default();
            let target = target(http("/"), address, 20 * SECOND);
            for _ in 0..2 {
                assert_eq!(once(&prober, &target).await, Verdict::Passed);
            }
            _ = tell.send(());
            let served = tokio::task::spawn_blocking(move || server.join());
            served.await.unwrap().expect("every answer is heard out");
        });
    }

    #[test]
    fn interim_answers_are_passed_over_and_bounded() {
        let hints = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n";
        let (address, _) = server(&[&hints.repeat(50)[..], b"HTTP/1.1 200 OK\r\n\r\n"].concat());
        assert_eq!(probe(http("/"), address, 20 * SECOND), None);
        let (address, _) = server(&hints.repeat(100_000));
        let error = probe(http("/"), address, 20 * SECOND).unwrap();
        assert!(error.contains("no end"), "{error}");
    }

    #[test]
    fn a_server_that_accepts_but_never_answers_fails_in_time() {
        let (listener, address) = listener();
        let accepted = thread::spawn(move || listener.accept().unwrap());
        let began = Instant::now();
        assert_eq!(
            probe(http("/"), address, SECOND / 5),
            Some("no answer within 200ms".to_owned())
        );
        assert!(began.elapsed() < 10 * SECOND);
        drop(accepted.join().unwrap());
    }

    #[test]
    fn what_is_not_http_is_named() {
        for (answer, part) in [
            (&b"220 mail.example ESMTP\r\n"[..], "not HTTP: \"220 mail.example ESMTP"),
            (b"\x15\x03\x03\x00\x02\x02\x46", "in TLS"),
            (b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x05\x00\x00@\x00", "in HTTP/2"),
            (b"", "without an answer"),
            (b"HTTP/1.1 200 OK\r\nx", "before the head"),
        ] {
            let (address, _) = server(answer);
            let error = probe(http("/"), address, 20 * SECOND).unwrap();
            assert!(error.starts_with("GET /: ") && error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_reset_tells_that_somebody_was_there() {
        let (listener, address) = listener();
        let resets = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let socket = Socket::from(stream);
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            listener
        });
        assert_eq!(probe(Probe::Tcp, address, 20 * SECOND), None);
        drop(resets.join().unwrap());
    }

    /// Waits until a connection is in the queue.
    fn queued(listener: &TcpListener) {
        let fd = PollFd::new(listener.as_fd(), PollFlags::POLLIN);
        assert_eq!(poll(&mut [fd], PollTimeout::from(20_000u16)).unwrap(), 1);
    }

    #[test]
    fn a_reset_by_closing_the_listening_socket_is_no_pass() {
        let closed = Some("it closed its listening socket".to_owned());
        for listens_again in [false, true] {
            let (listener, address) = listener();
            let closes = thread::spawn(move || {
                queued(&listener);
                // The number of the socket is not given to the next one at once.
                drop(listener);
                listens_again.then(|| TcpListener::bind(address).unwrap())
            });
            assert_eq!(probe(Probe::Tcp, address, 20 * SECOND), closed, "{listens_again}");
            drop(closes.join().unwrap());
        }
    }

    #[test]
    fn what_was_said_before_the_listening_socket_was_closed_is_a_pass() {
        let (listener, address) = listener();
        let says = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // Closed before it speaks, so that neither is there when the bytes come.
            drop(listener);
            stream.write_all(b"220 ready\r\n").unwrap();
        });
        assert_eq!(probe(Probe::Tcp, address, 20 * SECOND), None);
        says.join().unwrap();
    }

    #[test]
    fn a_connection_to_itself_is_no_pass() {
        // Binding the source port to the target makes happen at once what chance does rarely.
        let socket = Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let target = target(Probe::Tcp, address, SECOND);
        let outcome = run(Prober::default().probe(&target, Ok(socket), || 0));
        let Verdict::Failed(error) = outcome.verdict else { panic!("{outcome:?}") };
        assert!(error.starts_with("nobody listens on 127.0.0.1:"), "{error}");
        drop(TcpStream::connect(address));
    }
}
