//! The threaded server: a thread for each connection, blocking reads and writes.

use std::{
    collections::HashMap,
    io::{self, IoSlice, Read, Write},
    net::{Shutdown, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use futures_util::FutureExt;
use http_body_util::BodyExt;
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Uri, Version,
    body::{Body as _, Bytes},
    header::{CONNECTION, CONTENT_LENGTH, DATE, HeaderName, HeaderValue, TRANSFER_ENCODING},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    ACCEPT_BACKOFF, FIRST_REQUEST_GRACE, HEAD_TIMEOUT, MAX_HEAD, WorkerError,
    files::{Body, Files},
    socket::Listener,
    system,
};

/// The most threads, and so connections, at once. Further connections wait in the accept queue.
const MAX_THREADS: usize = 1024;

/// When all threads are in use: the time, in milliseconds, until the next check for room.
const FULL_PAUSE_MS: u8 = 10;

/// Enough for a connection's thread: its buffers are on the heap.
const STACK: usize = 256 * 1024;

/// The most headers in a request; hyper has the same limit.
const MAX_HEADERS: usize = 100;

/// How long a client may accept no byte of an answer: a thread is too expensive to wait forever.
const WRITE_TIMEOUT: Duration = HEAD_TIMEOUT;

/// How much of an unwanted request body is read, and for how long. Otherwise closing would reset
/// the connection before the client has read the answer.
const LINGER: (usize, Duration) = (256 * 1024, Duration::from_secs(1));

/// Serves until `stop` is readable, then stops gracefully. Holds at most `capacity` connections.
pub(super) fn run(
    mut listener: Listener,
    files: Files,
    stop: &UnixStream,
    capacity: usize,
) -> Result<(), WorkerError> {
    let server = Arc::new(Server {
        files,
        stopping: AtomicBool::new(false),
        connections: Mutex::new(HashMap::new()),
        one_ended: Condvar::new(),
        capacity: capacity.min(MAX_THREADS),
    });
    while server.wait(&listener, stop).map_err(system("wait for connections"))? {
        match listener.accept(false) {
            Ok(stream) => server.spawn(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => back_off(&error),
        }
    }
    server.stop(listener);
    Ok(())
}

struct Server {
    files: Files,
    stopping: AtomicBool,
    connections: Mutex<Table>,
    one_ended: Condvar,
    capacity: usize,
}

type Table = HashMap<RawFd, Arc<Connection>>;

struct Connection {
    stream: TcpStream,
    /// Whether a request has arrived on this connection.
    asked: AtomicBool,
}

impl Server {
    /// Waits until there is a connection to accept and room for it (true), or a stop signal
    /// (false).
    fn wait(&self, listener: &Listener, stop: &UnixStream) -> io::Result<bool> {
        loop {
            let mut fds = [
                PollFd::new(stop.as_fd(), PollFlags::POLLIN),
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            ];
            // When all threads are in use, don't poll the listener, but check for room
            // periodically.
            let is_full = self.is_full(&self.connections());
            let polled = if is_full {
                poll(&mut fds[..1], FULL_PAUSE_MS)
            } else {
                poll(&mut fds, PollTimeout::NONE)
            };
            match polled {
                Ok(_) if fds[0].any() == Some(true) => return Ok(false),
                Ok(_) if !is_full => return Ok(true),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn spawn(self: &Arc<Self>, stream: TcpStream) {
        let connection = Arc::new(Connection { stream, asked: AtomicBool::new(false) });
        // The descriptor's number identifies the connection: no other open connection has it, and
        // the descriptor stays open until the connection is removed from the table.
        let id = connection.stream.as_raw_fd();
        self.connections().insert(id, Arc::clone(&connection));
        loop {
            let (server, connection) = (Arc::clone(self), Arc::clone(&connection));
            let started = thread::Builder::new().stack_size(STACK).spawn(move || {
                // The outcome does not matter: a client that goes away is no error.
                let _ = connection.converse(&server);
                server.connections().remove(&id);
                server.one_ended.notify_all();
            });
            match started {
                Ok(_) => return,
                Err(error) => back_off(&error),
            }
        }
    }

    /// Shuts down the read side of each connection. That wakes a thread that waits for a request,
    /// keeps data that has already arrived, and does not disturb an answer that is being written.
    fn stop(self: &Arc<Self>, mut listener: Listener) {
        self.stopping.store(true, Ordering::SeqCst);
        self.end_reading(|connection| connection.asked.load(Ordering::SeqCst));
        loop {
            drop(self.wait_while(Some(FIRST_REQUEST_GRACE), |table| self.is_full(table)));
            if self.is_full(&self.connections()) {
                self.end_reading(|_| true);
                drop(self.wait_while(None, |table| self.is_full(table)));
            }
            match listener.accept(false) {
                Ok(stream) => self.spawn(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => back_off(&error),
            }
        }
        drop(listener);
        drop(self.wait_while(Some(FIRST_REQUEST_GRACE), |table| !table.is_empty()));
        self.end_reading(|_| true);
        drop(self.wait_while(None, |table| !table.is_empty()));
    }

    fn end_reading(&self, of: impl Fn(&Connection) -> bool) {
        for connection in self.connections().values().filter(|connection| of(connection)) {
            // Fails if the client has already closed the connection.
            let _ = connection.stream.shutdown(Shutdown::Read);
        }
    }

    fn wait_while(
        &self,
        at_most: Option<Duration>,
        mut condition: impl FnMut(&Table) -> bool,
    ) -> MutexGuard<'_, Table> {
        let connections = self.connections();
        match at_most {
            None => self
                .one_ended
                .wait_while(connections, |table| condition(table))
                .unwrap_or_else(PoisonError::into_inner),
            Some(at_most) => {
                self.one_ended
                    .wait_timeout_while(connections, at_most, |table| condition(table))
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        }
    }

    fn is_full(&self, table: &Table) -> bool {
        table.len() >= self.capacity
    }

    fn connections(&self) -> MutexGuard<'_, Table> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    fn converse(&self, server: &Server) -> io::Result<()> {
        self.stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let mut received = Vec::with_capacity(4096);
        loop {
            let Head { request, keeps_alive, has_body } = match self.read_head(&mut received)? {
                Some(Ok(head)) => head,
                Some(Err(status)) => {
                    self.write(&Method::GET, server.files.refusal(status), CLOSE)?;
                    return self.linger();
                }
                None => return Ok(()),
            };
            self.asked.store(true, Ordering::SeqCst);
            let method = request.method().clone();
            let persistence = if has_body || server.stopping.load(Ordering::SeqCst) {
                CLOSE
            } else {
                keeps_alive
            };
            let answer = server.files.answer(request).now_or_never();
            let answer =
                answer.unwrap_or_else(|| server.files.refusal(StatusCode::INTERNAL_SERVER_ERROR));
            self.write(&method, answer, persistence)?;
            if persistence == CLOSE {
                return if has_body { self.linger() } else { Ok(()) };
            }
        }
    }

    /// Takes the next request's head from the front of `received`. Returns the status to refuse it
    /// with if it is invalid, or `None` if the client is done or too slow.
    fn read_head(&self, received: &mut Vec<u8>) -> io::Result<Option<Result<Head, StatusCode>>> {
        let deadline = Instant::now() + HEAD_TIMEOUT;
        let mut chunk = [0; 4096];
        loop {
            if !received.is_empty() {
                match Head::parse(received) {
                    Ok(Some((head, length))) => {
                        received.drain(..length);
                        return Ok(Some(Ok(head)));
                    }
                    Ok(None) if received.len() >= MAX_HEAD => {
                        return Ok(Some(Err(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)));
                    }
                    Ok(None) => {}
                    Err(status) => return Ok(Some(Err(status))),
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            match (&self.stream).read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(length) => received.extend_from_slice(&chunk[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn write(
        &self,
        method: &Method,
        response: Response<Body>,
        persistence: Persistence,
    ) -> io::Result<()> {
        let (head, body) = response.into_parts();
        let mut text = format!("HTTP/1.1 {}\r\n", head.status).into_bytes();
        let mut put = |name: &HeaderName, value: &[u8]| {
            text.extend_from_slice(name.as_str().as_bytes());
            text.extend_from_slice(b": ");
            text.extend_from_slice(value);
            text.extend_from_slice(b"\r\n");
        };
        for (name, value) in &head.headers {
            put(name, value.as_bytes());
        }
        if let Some(length) = body.size_hint().exact()
            && !head.headers.contains_key(CONTENT_LENGTH)
            && head.status != StatusCode::NOT_MODIFIED
        {
            put(&CONTENT_LENGTH, length.to_string().as_bytes());
        }
        if let Some(persistence) = persistence {
            put(&CONNECTION, persistence.as_bytes());
        }
        put(&DATE, httpdate::fmt_http_date(SystemTime::now()).as_bytes());
        text.extend_from_slice(b"\r\n");

        if method == Method::HEAD {
            return (&self.stream).write_all(&text);
        }
        let mut left = head.headers.get(CONTENT_LENGTH).and_then(length_of);
        let mut body = body;
        let mut before = &text[..];
        while let Some(data) = next_data(&mut body)? {
            left = left.map(|left| left.saturating_sub(data.len() as u64));
            write_both(&self.stream, before, &data)?;
            before = &[];
        }
        if left.is_some_and(|left| left > 0) {
            // The file got shorter. HTTP/1.1 signals an incomplete body by closing early.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (&self.stream).write_all(before)
    }

    /// Gives the client time to read the answer before the connection is closed.
    fn linger(&self) -> io::Result<()> {
        let (most, at_most) = LINGER;
        self.stream.shutdown(Shutdown::Write)?;
        self.stream.set_read_timeout(Some(at_most))?;
        io::copy(&mut (&self.stream).take(most as u64), &mut io::sink())?;
        Ok(())
    }
}

/// The value of the answer's `Connection` header: `None` if HTTP/1.1's default applies.
type Persistence = Option<&'static str>;
const CLOSE: Persistence = Some("close");

struct Head {
    request: Request<()>,
    keeps_alive: Persistence,
    has_body: bool,
}

impl Head {
    /// Parses the request at the front of `received`. Returns it and its length; `None` if it is
    /// incomplete.
    fn parse(received: &[u8]) -> Result<Option<(Self, usize)>, StatusCode> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        let length = match parsed.parse(received) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(httparse::Error::TooManyHeaders) => {
                return Err(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
            }
            Err(_) => return Err(StatusCode::BAD_REQUEST),
        };
        let request = Self::request(&parsed).ok_or(StatusCode::BAD_REQUEST)?;
        let headers = request.headers();
        let keeps_alive = match request.version() {
            Version::HTTP_11 if says(headers, "close") => CLOSE,
            Version::HTTP_11 => None,
            _ if says(headers, "keep-alive") => Some("keep-alive"),
            _ => CLOSE,
        };
        let has_body = headers.contains_key(TRANSFER_ENCODING)
            || headers.get(CONTENT_LENGTH).is_some_and(|value| length_of(value) != Some(0));
        Ok(Some((Self { request, keeps_alive, has_body }, length)))
    }

    fn request(parsed: &httparse::Request<'_, '_>) -> Option<Request<()>> {
        let mut request = Request::new(());
        *request.method_mut() = Method::from_bytes(parsed.method?.as_bytes()).ok()?;
        *request.uri_mut() = Uri::try_from(parsed.path?).ok()?;
        *request.version_mut() =
            if parsed.version? == 0 { Version::HTTP_10 } else { Version::HTTP_11 };
        for header in &*parsed.headers {
            let name = HeaderName::from_bytes(header.name.as_bytes()).ok()?;
            request.headers_mut().append(name, HeaderValue::from_bytes(header.value).ok()?);
        }
        Some(request)
    }
}

/// Whether `Connection` lists `option`.
fn says(headers: &HeaderMap, option: &str) -> bool {
    let options = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    options.flat_map(|list| list.split(',')).any(|one| one.trim().eq_ignore_ascii_case(option))
}

fn length_of(value: &HeaderValue) -> Option<u64> {
    value.to_str().ok()?.parse().ok()
}

/// The next piece of a body. It is always ready at once: see [`super::files`].
fn next_data(body: &mut Body) -> io::Result<Option<Bytes>> {
    match body.frame().now_or_never() {
        Some(Some(frame)) => {
            let frame = frame.map_err(io::Error::other)?;
            Ok(Some(frame.into_data().unwrap_or_default()))
        }
        Some(None) => Ok(None),
        None => Err(io::Error::other("a file that was not read at once")),
    }
}

/// Writes one after the other, in a single system call if the socket accepts both.
fn write_both(mut stream: &TcpStream, first: &[u8], second: &[u8]) -> io::Result<()> {
    let written = stream.write_vectored(&[IoSlice::new(first), IoSlice::new(second)])?;
    match written.checked_sub(first.len()) {
        Some(written) => stream.write_all(&second[written..]),
        None => {
            stream.write_all(&first[written..])?;
            stream.write_all(second)
        }
    }
}

fn back_off(error: &io::Error) {
    tracing::warn!(%error, "cannot take on a connection");
    thread::sleep(ACCEPT_BACKOFF);
}
