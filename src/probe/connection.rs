//! The one connection of a probe: made, accepted or answered, and ended.

use std::{
    io,
    net::{Shutdown, SocketAddr},
    time::Duration,
};

use nix::libc;
use socket2::{SockAddr, SockRef, Socket};
use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
    time::{sleep, timeout},
};

use super::{
    ProbeError, Target,
    http::{self, NoAnswer, Reading},
};
use crate::{
    config::Probe,
    net::{
        diag::{Diag, SharedDiag, inode_of, never_tells},
        proxy_protocol::{Ends, Header},
    },
};

/// Between two looks whether a connection has been accepted, or two tries at a queue that is full: at
/// first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// As much of what a worker says is read before its connection is closed.
const MOST_READ: usize = 1 << 20;

/// A connection to a worker, over which everything that a probe says has been said.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    diag: SharedDiag,
    /// Whether it is known to have left the accept queue.
    is_accepted: bool,
    /// Who listened just before it was made, where that may change and the kernel tells: closing a
    /// listening socket resets what nobody has accepted.
    listened: Option<Option<u32>>,
    /// What came of the answer to a GET.
    reading: Reading,
}

#[derive(Debug)]
enum Stream {
    Tcp { stream: TcpStream, client: SocketAddr, server: SocketAddr },
    Unix { stream: UnixStream, inode: u32 },
}

/// What came over a connection.
enum Heard {
    Bytes,
    /// Its end, or an error.
    End,
}

impl Connection {
    /// Connects, and says what there is to say: the header that the worker expects, the GET, or else
    /// at once that nothing will come. That FIN completes the handshake also where the listener waits
    /// for a first byte (tcp(7), `TCP_DEFER_ACCEPT`): only a bare ACK is passed over then.
    pub(super) async fn make(
        target: &Target,
        socket: Socket,
        diag: &SharedDiag,
    ) -> Result<Self, ProbeError> {
        let failed = |error| ProbeError::connect(&target.endpoint, error);
        let listened = match (&target.probe, target.endpoint.inet()) {
            (Probe::Tcp, Some(server)) if target.makes_its_own => {
                told(diag, |diag| diag.listener(server))?
            }
            // An answer says more than who listens; and lbd has the other sockets too, so that they
            // stay open where the worker closes them.
            _ => None,
        };
        let stream = match target.endpoint.inet() {
            None => {
                let mut pause = FIRST_PAUSE;
                // It is over when it returns, one way or the other (unix(7)): EAGAIN says that the
                // queue is full, which a burst may do to any worker, and nothing tells when it isn't.
                while let Err(error) = target.endpoint.connect(&socket) {
                    if error.raw_os_error() != Some(libc::EAGAIN) {
                        return Err(failed(error));
                    }
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                let inode = inode_of(&socket).map_err(failed)?;
                Stream::Unix { stream: UnixStream::from_std(socket.into()).map_err(failed)?, inode }
            }
            Some(server) => {
                match target.endpoint.connect(&socket) {
                    Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
                        return Err(failed(error));
                    }
                    Ok(()) | Err(_) => {}
                }
                let stream = TcpStream::from_std(socket.into()).map_err(failed)?;
                stream.writable().await.map_err(failed)?;
                let client = stream.local_addr().map_err(failed)?;
                let error = stream.take_error().map_err(failed)?;
                match error.map_or_else(|| stream.peer_addr(), Err) {
                    Ok(peer) if peer == client => {
                        return Err(ProbeError::SelfConnect(target.endpoint.to_string()));
                    }
                    Ok(_) => {}
                    // It was connected, and is no more: a refusal has another name.
                    Err(error) if is_cut_off(&error) => {}
                    Err(error) => return Err(failed(error)),
                }
                // What follows a header must not wait until it has been acknowledged.
                stream.set_nodelay(true).map_err(failed)?;
                Stream::Tcp { stream, client, server }
            }
        };
        let diag = diag.clone();
        let mut connection =
            Self { stream, diag, is_accepted: false, listened, reading: Reading::default() };
        match connection.speak(target).await {
            Ok(()) => {}
            Err(error) if target.probe == Probe::Tcp && is_cut_off(&error) => {
                connection.ended()?;
            }
            Err(error) => return Err(ProbeError::Send(error)),
        }
        Ok(connection)
    }

    /// Where it comes from.
    pub(super) fn local_address(&self) -> Option<SockAddr> {
        match &self.stream {
            Stream::Tcp { client, .. } => Some((*client).into()),
            Stream::Unix { stream, .. } => SockRef::from(stream).local_addr().ok(),
        }
    }

    /// Whether it still waits in the worker's accept queue. Not where the kernel never tells.
    ///
    /// # Errors
    /// Where lbd lacks something to find out.
    pub(super) fn is_queued(&mut self) -> Result<bool, ProbeError> {
        self.look().map(|is_accepted| !is_accepted)
    }

    /// Returns when the worker has accepted it. Where the kernel never tells, that is at once.
    ///
    /// # Errors
    /// Where it has ended, and nothing tells that it was accepted.
    pub(super) async fn accepted(&mut self) -> Result<(), ProbeError> {
        let mut pause = FIRST_PAUSE;
        // What lacks for one look may be there for the next.
        while !matches!(self.look(), Ok(true)) {
            // Whoever speaks has accepted it, and may have closed it by the next look.
            match timeout(pause, self.heard()).await {
                Ok(Heard::Bytes) => self.is_accepted = true,
                Ok(Heard::End) => self.ended()?,
                Err(_) => pause = (pause * 2).min(LONGEST_PAUSE),
            }
        }
        Ok(())
    }

    /// The status of the answer to the GET.
    pub(super) async fn answer(&mut self) -> Result<u16, NoAnswer> {
        let mut buffer = vec![0; http::BUFFER];
        loop {
            if let Some(status) = self.reading.status()? {
                return Ok(status);
            }
            let count = self.read(&mut buffer).await.map_err(NoAnswer::Broken)?;
            self.is_accepted = true;
            if count == 0 {
                return Err(self.reading.ended());
            }
            self.reading.add(&buffer[..count])?;
        }
    }

    /// Reads what the worker has to say, within bounds, and closes it.
    pub(super) async fn end(self) {
        // Fails only where there is nobody any more.
        _ = self.shut();
        let mut buffer = vec![0; http::BUFFER];
        let mut left = self.reading.left().unwrap_or(MOST_READ).min(MOST_READ);
        while left > 0 {
            match self.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(count) => left = left.saturating_sub(count),
            }
        }
    }

    async fn speak(&self, target: &Target) -> io::Result<()> {
        let ends = match &self.stream {
            Stream::Tcp { client, server, .. } => Some(Ends { client: *client, server: *server }),
            Stream::Unix { .. } => None,
        };
        let header = target.proxy_protocol.map(|version| Header::of_probe(version, ends));
        let mut said = header.map_or_else(Vec::new, |header| header.as_bytes().to_vec());
        if let Probe::Http { path, host, .. } = &target.probe {
            let address = match &self.stream {
                Stream::Tcp { server, .. } => server.to_string(),
                Stream::Unix { .. } => "localhost".to_owned(),
            };
            let host = host.as_deref().unwrap_or(&address);
            said.extend(http::request(path, host).into_bytes());
        }
        let mut rest = &said[..];
        while !rest.is_empty() {
            let count = self.write(rest).await?;
            rest = &rest[count..];
        }
        match target.probe {
            Probe::Tcp => self.shut(),
            // There are servers that take the end of a request's stream for the end of its client.
            Probe::Http { .. } => Ok(()),
        }
    }

    /// Whether the kernel knows that it was accepted, or never knows.
    fn look(&mut self) -> Result<bool, ProbeError> {
        if !self.is_accepted {
            let looked = told(&self.diag, |diag| match &self.stream {
                Stream::Tcp { client, server, .. } => diag.is_accepted(*server, *client),
                Stream::Unix { inode, .. } => diag.is_unix_accepted(*inode),
            });
            self.is_accepted = looked?.unwrap_or(true);
        }
        Ok(self.is_accepted)
    }

    /// It was ended or reset. Whoever has accepted it can do so; and closing the socket that listens
    /// resets what waits there, of a program that may never have come to accept.
    fn ended(&mut self) -> Result<(), ProbeError> {
        if let (Some(before), Stream::Tcp { server, .. }) = (self.listened, &self.stream) {
            let now = told(&self.diag, |diag| diag.listener(*server))?;
            // Nobody listened, and nobody does: it leads to where the kernel does not tell of, as
            // into another network namespace.
            if now.is_some_and(|now| now != before) {
                return Err(ProbeError::Closed);
            }
        }
        self.is_accepted = true;
        Ok(())
    }

    /// Returns when something has come.
    async fn heard(&self) -> Heard {
        let came = match &self.stream {
            Stream::Tcp { stream, .. } => stream.peek(&mut [0]).await,
            // Nobody ends it but who has accepted it: lbd has the socket that listens.
            Stream::Unix { stream, .. } => stream.readable().await.map(|()| 1),
        };
        match came {
            Ok(1..) => Heard::Bytes,
            Ok(0) | Err(_) => Heard::End,
        }
    }

    async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.stream {
            Stream::Tcp { stream, .. } => {
                stream.async_io(Interest::READABLE, || stream.try_read(buffer)).await
            }
            Stream::Unix { stream, .. } => {
                stream.async_io(Interest::READABLE, || stream.try_read(buffer)).await
            }
        }
    }

    async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match &self.stream {
            Stream::Tcp { stream, .. } => {
                stream.async_io(Interest::WRITABLE, || stream.try_write(bytes)).await
            }
            Stream::Unix { stream, .. } => {
                stream.async_io(Interest::WRITABLE, || stream.try_write(bytes)).await
            }
        }
    }

    fn shut(&self) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp { stream, .. } => SockRef::from(stream).shutdown(Shutdown::Write),
            Stream::Unix { stream, .. } => SockRef::from(stream).shutdown(Shutdown::Write),
        }
    }
}

/// What the kernel answers; `None` where it never tells.
fn told<T>(
    diag: &SharedDiag,
    question: impl FnOnce(&mut Diag) -> io::Result<T>,
) -> Result<Option<T>, ProbeError> {
    match diag.ask(question) {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if never_tells(&error) => Ok(None),
        Err(error) => Err(ProbeError::Lacking(error)),
    }
}

/// Whether the other side has reset a connection that there was.
fn is_cut_off(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), ConnectionReset | NotConnected | BrokenPipe)
}
