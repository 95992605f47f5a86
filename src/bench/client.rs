//! A client of a target: sends one GET at a time, and checks whether the answer is complete.

use std::{
    fmt,
    io::{self, ErrorKind},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use http_body_util::{BodyExt, Empty};
use hyper::{
    Request, StatusCode,
    body::{Body, Bytes},
    client::conn::http1::{self, SendRequest},
    header,
    http::uri::PathAndQuery,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    task::JoinHandle,
};

/// The server to be measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// Where connections go.
    pub(super) address: SocketAddr,
    /// The Host header.
    pub(super) host: String,
    /// What is asked for.
    pub(super) path: PathAndQuery,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.host, self.path)
    }
}

/// Why an answer is incomplete.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Failure {
    /// Nothing listens there.
    Refused,
    /// The connection was reset.
    Reset,
    /// The connection ended before an answer came.
    Closed,
    /// The answer has another status than 200.
    Status(u16),
    /// The connection ended within the body.
    Short { received: u64, promised: Option<u64> },
    /// The body is complete, but its length differs from the reference request's.
    Length { received: u64, expected: u64 },
    /// The answer is not valid HTTP/1.1.
    Malformed,
    /// The request took too long.
    Timeout,
    /// The time for the whole row ran out before or during this request.
    OutOfTime,
    /// Any other system error.
    Other(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("connection refused"),
            Self::Reset => f.write_str("connection reset"),
            Self::Closed => f.write_str("connection closed without an answer"),
            Self::Status(code) => match StatusCode::from_u16(*code) {
                // With the standard reason phrase: `404 Not Found`.
                Ok(status) => write!(f, "status {status}"),
                Err(_) => write!(f, "status {code}"),
            },
            Self::Short { received, promised: Some(promised) } => {
                write!(f, "short body {received} of {promised}")
            }
            Self::Short { received, promised: None } => write!(f, "short body {received}"),
            Self::Length { received, expected } => {
                write!(f, "body of {received} bytes instead of {expected}")
            }
            Self::Malformed => f.write_str("not an HTTP answer"),
            Self::Timeout => f.write_str("timeout"),
            Self::OutOfTime => f.write_str("time limit reached"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::from(&error)
    }
}

impl From<&io::Error> for Failure {
    fn from(error: &io::Error) -> Self {
        match error.kind() {
            ErrorKind::ConnectionRefused => Self::Refused,
            // Writing a request to a connection that the peer has closed fails with one or the
            // other.
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Self::Reset,
            ErrorKind::TimedOut => Self::Timeout,
            _ => Self::Other(error.to_string()),
        }
    }
}

impl From<hyper::Error> for Failure {
    fn from(error: hyper::Error) -> Self {
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            match cause.downcast_ref::<io::Error>() {
                Some(cause) if cause.kind() == ErrorKind::UnexpectedEof => return Self::Closed,
                Some(cause) => return cause.into(),
                None => source = cause.source(),
            }
        }
        match error {
            error if error.is_parse() => Self::Malformed,
            // The latter is a connection that ended between two answers.
            error if error.is_incomplete_message() || error.is_canceled() => Self::Closed,
            error => Self::Other(error.to_string()),
        }
    }
}

/// One client, with at most one connection and at most one request on it.
#[derive(Debug)]
pub(super) struct Client<'a> {
    target: &'a Target,
    keep_alive: bool,
    connection: Option<Connection>,
    received: Arc<AtomicU64>,
}

impl<'a> Client<'a> {
    /// A client without a connection yet. With `keep_alive` it keeps its connection as long as the
    /// target does; else each request uses a new one.
    pub(super) fn new(target: &'a Target, keep_alive: bool) -> Self {
        Self { target, keep_alive, connection: None, received: Arc::default() }
    }

    /// All bytes received so far, including heads.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Sends one request. Covers everything from connecting to the last byte, and returns the
    /// length of the complete body. If this future is dropped early, the connection must not be
    /// used again: call [`Self::disconnect`].
    pub(super) async fn get(&mut self) -> Result<u64, Failure> {
        let result = self.exchange().await;
        if result.is_err() || !self.keep_alive {
            self.disconnect();
        }
        result
    }

    /// Closes the connection, even during a request.
    pub(super) fn disconnect(&mut self) {
        self.connection = None;
    }

    async fn exchange(&mut self) -> Result<u64, Failure> {
        let request = self.request()?;
        // If the target has closed the connection since the last answer, that is no failure.
        let kept = self.connection.take().filter(|kept| !kept.sender.is_closed());
        let connection = match kept {
            Some(kept) => kept,
            None => Connection::open(self.target.address, &self.received).await?,
        };
        let sender = &mut self.connection.insert(connection).sender;
        sender.ready().await?;
        let answer = sender.send_request(request).await?;
        if answer.status() != StatusCode::OK {
            return Err(Failure::Status(answer.status().as_u16()));
        }
        let mut body = answer.into_body();
        let (promised, mut received) = (body.size_hint().exact(), 0);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| match Failure::from(error) {
                Failure::Closed => Failure::Short { received, promised },
                other => other,
            })?;
            received += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        Ok(received)
    }

    fn request(&self) -> Result<Request<Empty<Bytes>>, Failure> {
        let mut request = Request::get(self.target.path.as_str())
            .header(header::HOST, &self.target.host)
            .header(header::USER_AGENT, concat!("lbd/", env!("CARGO_PKG_VERSION")));
        if !self.keep_alive {
            request = request.header(header::CONNECTION, "close");
        }
        request.body(Empty::new()).map_err(|error| Failure::Other(error.to_string()))
    }
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Empty<Bytes>>,
    /// The task that drives the connection.
    driver: JoinHandle<hyper::Result<()>>,
}

impl Connection {
    async fn open(address: SocketAddr, received: &Arc<AtomicU64>) -> Result<Self, Failure> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let metered = Metered { stream, received: Arc::clone(received) };
        let (sender, connection) = http1::handshake(TokioIo::new(metered)).await?;
        Ok(Self { sender, driver: tokio::spawn(connection) })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// A stream that counts the bytes received.
#[derive(Debug)]
struct Metered {
    stream: TcpStream,
    received: Arc<AtomicU64>,
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let count = buffer.filled().len() - before;
        self.received.fetch_add(count as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Metered {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
