//! Clients: one request, and many at once.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use super::{PATIENCE, eventually};

/// An open connection to `address`, which no read can wait on for ever.
pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// What a client that says nothing reads first: how many bytes, the end, or an error. One that is
/// turned away at once may be so before it knows that it was taken: then connect reports the reset.
pub(crate) fn first_read(address: SocketAddr) -> io::Result<usize> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.read(&mut [0; 1])
}

/// Whether a client that says nothing is sent away without a byte, by a clean end or a reset.
pub(crate) fn is_turned_away(address: SocketAddr) -> bool {
    match first_read(address) {
        Ok(read) => read == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

/// A connection over which one request is made after the other.
#[derive(Debug)]
pub(crate) struct KeepAlive(BufReader<TcpStream>);

impl KeepAlive {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self::over(connect(address))
    }

    pub(crate) fn over(stream: TcpStream) -> Self {
        Self(BufReader::new(stream))
    }

    /// The status and the body.
    pub(crate) fn get(&mut self, path: &str) -> io::Result<(u16, Vec<u8>)> {
        self.send(path)?;
        self.answer()
    }

    pub(crate) fn send(&mut self, path: &str) -> io::Result<()> {
        write!(self.0.get_mut(), "GET {path} HTTP/1.1\r\nHost: test\r\n\r\n")
    }

    pub(crate) fn answer(&mut self) -> io::Result<(u16, Vec<u8>)> {
        let (status, length) = self.head()?;
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok((status, body))
    }

    /// The status and the length of a body that is still to be read.
    pub(crate) fn head(&mut self) -> io::Result<(u16, usize)> {
        let (mut first, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.parse().unwrap();
            }
            if first.is_empty() {
                first = line;
            } else if line.is_empty() {
                let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
                return Ok((status.unwrap_or_else(|| panic!("{first:?}")), length));
            }
        }
    }

    /// The rest of what comes.
    pub(crate) fn rest(&mut self) -> io::Result<Vec<u8>> {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest).map(|_| rest)
    }

    /// So many more bytes, which are dropped; how many came before the end.
    pub(crate) fn skip(&mut self, bytes: u64) -> io::Result<u64> {
        io::copy(&mut self.0.by_ref().take(bytes), &mut io::sink())
    }

    pub(crate) fn stream(&self) -> &TcpStream {
        self.0.get_ref()
    }
}

/// The body of `path`, over a connection of its own.
pub(crate) fn try_get(address: SocketAddr, path: &str) -> io::Result<Vec<u8>> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (status, body) = KeepAlive::over(stream).get(path)?;
    assert_eq!(status, 200, "{path}");
    Ok(body)
}

pub(crate) fn get(address: SocketAddr, path: &str) -> String {
    String::from_utf8(try_get(address, path).unwrap()).unwrap()
}

/// The port of the fixture that takes the next connection.
pub(crate) fn port(address: SocketAddr) -> u16 {
    get(address, "/").split(' ').next().unwrap().parse().unwrap()
}

/// The ports of the fixtures that take the next `count` connections, one after the other.
pub(crate) fn turns(address: SocketAddr, count: usize) -> Vec<u16> {
    (0..count).map(|_| port(address)).collect()
}

/// Some clients that make one request after the other, each over a new connection.
#[derive(Debug)]
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<Vec<Failure>>>,
}

/// A request without its whole answer.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) client: SocketAddr,
    pub(crate) begun: Instant,
    pub(crate) error: String,
}

impl Load {
    pub(crate) const CLIENTS: usize = 4;

    /// Each request over a connection of its own, until [`Self::end`].
    pub(crate) fn start(address: SocketAddr, path: &'static str) -> Self {
        Self::with(address, path, 1)
    }

    /// Some requests over each connection, which is then left as a browser leaves it.
    pub(crate) fn keep_alive(address: SocketAddr, path: &'static str) -> Self {
        Self::with(address, path, 20)
    }

    /// As [`Self::start`], of so many clients.
    pub(crate) fn many(clients: usize, address: SocketAddr, path: &'static str) -> Self {
        Self::of(clients, address, path, 1)
    }

    fn with(address: SocketAddr, path: &'static str, requests: usize) -> Self {
        Self::of(Self::CLIENTS, address, path, requests)
    }

    fn of(clients: usize, address: SocketAddr, path: &'static str, requests: usize) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = |_| {
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            thread::spawn(move || {
                let mut failures = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    // A refused connect is an error of this machine or of the daemon: no excuse.
                    let mut client = KeepAlive::new(address);
                    for _ in 0..requests {
                        match client.get(path) {
                            Ok((200, _)) => _ = done.fetch_add(1, Ordering::Relaxed),
                            other => {
                                failures.push(Failure {
                                    client: client.stream().local_addr().unwrap(),
                                    begun,
                                    error: format!("{other:?}"),
                                });
                                break;
                            }
                        }
                    }
                }
                failures
            })
        };
        let clients = (0..clients).map(client).collect();
        let load = Self { stop, done, clients };
        load.more(50);
        load
    }

    /// Waits until so many more requests were answered.
    pub(crate) fn more(&self, requests: usize) {
        let before = self.done.load(Ordering::Relaxed);
        eventually("requests under load", || {
            self.done.load(Ordering::Relaxed) >= before + requests
        });
    }

    pub(crate) fn end(self) -> Vec<Failure> {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    }

    pub(crate) fn end_without_failure(self) {
        let failures = self.end();
        assert!(failures.is_empty(), "{failures:?}");
    }
}

/// So many clients, each of which has asked for `/` and waits.
pub(crate) fn asking(count: usize, address: SocketAddr) -> Vec<KeepAlive> {
    let ask = |_| {
        let mut client = KeepAlive::new(address);
        client.send("/").unwrap();
        client
    };
    (0..count).map(ask).collect()
}

/// Each of them gets an answer.
pub(crate) fn answered(asking: Vec<KeepAlive>) {
    for mut client in asking {
        assert_eq!(client.answer().expect("an answer").0, 200);
    }
}

/// How often each port occurs.
pub(crate) fn counts(ports: &[u16]) -> BTreeMap<u16, usize> {
    let mut counts = BTreeMap::new();
    for port in ports {
        *counts.entry(*port).or_default() += 1;
    }
    counts
}
