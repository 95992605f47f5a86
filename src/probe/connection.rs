//! The connection of a probe: establishing it, waiting for its accept or the answer, and ending it.

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

/// The pause between two checks whether a connection was accepted, or between two attempts at a
/// full accept queue: at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// The most bytes of a worker's response that are read before the connection is closed.
const MOST_READ: usize = 1 << 20;

/// A connection to a worker, over which the probe has sent everything that it sends.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    diag: SharedDiag,
    /// Whether it is known to have been accepted.
    is_accepted: bool,
    /// The inode of the listening socket just before the connect, if the worker can close that
    /// socket and the kernel tells: closing a listening socket resets the connections in its queue.
    listened: Option<Option<u32>>,
    /// What has arrived of the response to a GET.
    reading: Reading,
}

#[derive(Debug)]
enum Stream {
    Tcp { stream: TcpStream, client: SocketAddr, server: SocketAddr },
    Unix { stream: UnixStream, inode: u32 },
}

/// What arrived on a connection.
enum Heard {
    Bytes,
    /// The end of the stream, or an error.
    End,
}

impl Connection {
    /// Connects, and sends the PROXY header that the worker expects, and then the GET, or for a
    /// bare probe a FIN at once. That FIN completes the handshake even if the listener waits for a
    /// first byte (tcp(7), `TCP_DEFER_ACCEPT`): it ignores only a bare ACK.
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
            // For a GET the response is proof enough. And sockets that lbd made stay open when the
            // worker closes its copy, since lbd has one too.
            _ => None,
        };
        let stream = match target.endpoint.inet() {
            None => {
                let mut pause = FIRST_PAUSE;
                // A unix connect has succeeded or failed when it returns (unix(7)). EAGAIN means
                // that the accept queue is full. A burst may do that to any worker, and nothing
                // tells when there is room, so try again.
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
                    // It was connected and then reset: a refused connect has another error.
                    Err(error) if is_cut_off(&error) => {}
                    Err(error) => return Err(failed(error)),
                }
                // The bytes after a header must not wait until the header is acknowledged.
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

    /// The local address.
    pub(super) fn local_address(&self) -> Option<SockAddr> {
        match &self.stream {
            Stream::Tcp { client, .. } => Some((*client).into()),
            Stream::Unix { stream, .. } => SockRef::from(stream).local_addr().ok(),
        }
    }

    /// Whether it still waits in the worker's accept queue. False if this kernel never tells.
    ///
    /// # Errors
    /// If lbd lacks a resource to find out.
    pub(super) fn is_queued(&mut self) -> Result<bool, ProbeError> {
        self.look().map(|is_accepted| !is_accepted)
    }

    /// Completes when the worker has accepted it; at once if this kernel never tells.
    ///
    /// # Errors
    /// If it has ended without proof that it was accepted.
    pub(super) async fn accepted(&mut self) -> Result<(), ProbeError> {
        let mut pause = FIRST_PAUSE;
        // A resource that is short now may be available at the next check.
        while !matches!(self.look(), Ok(true)) {
            // A worker that sends something has accepted the connection, and may have closed it by
            // the next check.
            match timeout(pause, self.heard()).await {
                Ok(Heard::Bytes) => self.is_accepted = true,
                Ok(Heard::End) => self.ended()?,
                Err(_) => pause = (pause * 2).min(LONGEST_PAUSE),
            }
        }
        Ok(())
    }

    /// Reads the status of the response to the GET.
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

    /// Sends a FIN, reads what the worker sends, up to a limit, and closes.
    pub(super) async fn end(self) {
        // Fails only if the peer is gone.
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
            // Some servers take a FIN behind the request to mean that the client has gone.
            Probe::Http { .. } => Ok(()),
        }
    }

    /// Checks whether the kernel says that it was accepted; also true if this kernel never tells.
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

    /// Handles that the connection was ended or reset. A worker that has accepted it can do that.
    /// But closing the listening socket also resets the connections in its queue, even if the
    /// program never accepts: then this is an error.
    fn ended(&mut self) -> Result<(), ProbeError> {
        if let (Some(before), Stream::Tcp { server, .. }) = (self.listened, &self.stream) {
            let now = told(&self.diag, |diag| diag.listener(*server))?;
            // If no socket was found before and none is found now, the address leads to where this
            // kernel does not look, such as another network namespace.
            if now.is_some_and(|now| now != before) {
                return Err(ProbeError::Closed);
            }
        }
        self.is_accepted = true;
        Ok(())
    }

    /// Completes when something has arrived.
    async fn heard(&self) -> Heard {
        let came = match &self.stream {
            Stream::Tcp { stream, .. } => stream.peek(&mut [0]).await,
            // Only a worker that has accepted it can end it, since lbd also holds the listening
            // socket.
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

/// The kernel's answer; `None` if this kernel never tells.
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

/// Whether the error means that the peer reset an established connection.
fn is_cut_off(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), ConnectionReset | NotConnected | BrokenPipe)
}
