//! The admin API's server, on a thread of its own.
//!
//! What a client can use up is bounded: connections, the size of what it sends, and the time to
//! send and to read. Each listener has its own connections, so that the unix socket answers however
//! many connections come over TCP; and over TCP, silent connections make room for others.

use std::{io, net::SocketAddr, sync::Arc, thread, time::Duration};

use axum::{Router, http::header, middleware, response::Response};
use futures_util::future::{self, FutureExt, Shared};
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{mpsc, oneshot, watch},
    task::yield_now,
    time::{sleep, timeout},
};
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt;

use super::{
    Request, Socket,
    access::{CurrentToken, Gate, admit, seal},
    api::{Context, router},
    caller::Via,
    connections::{Connections, Seat},
    events::Watched,
    main_thread::Daemon,
    sampler,
};
use crate::logging::Recent;

/// The most connections held at once on each listener. Further ones wait in the accept queue, or
/// replace a silent one.
pub const MAX_CONNECTIONS: usize = 16;
/// The length of the accept queue.
const BACKLOG: i32 = 64;
/// The largest request head, in bytes. Also bounds how much of a connection is buffered in each
/// direction.
const MAX_HEAD: usize = 16 * 1024;
/// How long a head may take to arrive, counted from the last answer. So it also bounds how long a
/// connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may read nothing while data is waiting for it.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last answers may take when the daemon ends.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long accepting pauses after an error that only time can cure.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// How often to check that the unix socket can still be found.
const LOOK: Duration = Duration::from_secs(10);

/// The server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The thread, or its event loop, can't be started.
    #[error("cannot serve the admin API: {0}")]
    System(#[from] io::Error),
    /// An address of `[admin] listen` can't be bound.
    #[error("cannot listen on {address}, an admin.listen: {source}{}", hint(source))]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => "; stop what listens there, or choose another port",
        io::ErrorKind::AddrNotAvailable => "; choose an address of this machine",
        io::ErrorKind::PermissionDenied => "; choose a port from 1024 on",
        _ => "",
    }
}

/// Bound and listening TCP sockets that nobody accepts from yet.
#[derive(Debug, Default)]
pub struct TcpSockets(Vec<std::net::TcpListener>);

impl TcpSockets {
    /// Listens on `addresses`.
    ///
    /// # Errors
    ///
    /// [`ServerError::Bind`] for the first address that can't be bound.
    pub fn bind(addresses: &[SocketAddr]) -> Result<Self, ServerError> {
        let bound = addresses.iter().map(|&address| {
            listen(address).map_err(|source| ServerError::Bind { address, source })
        });
        bound.collect::<Result<_, _>>().map(Self)
    }
}

fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    use socket2::{Domain, Socket, Type};
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // Like the services' listeners: the IPv4 wildcard is a separate address.
        socket.set_only_v6(true)?;
    }
    // Accepted connections inherit both options (tcp(7)). Without a user timeout, a client whose
    // machine is gone would be kept until the kernel gives up, which takes a quarter of an hour.
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(WRITE_TIMEOUT))?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// The running server. When dropped it accepts no more connections, gives the last answers half a
/// second to be sent, and blocks until then.
#[derive(Debug)]
pub struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    /// Serves `socket` and `tcp`, and passes requests to `daemon`. Over TCP, `token` is what
    /// authorises a client. Event streams include the notes in `recent`. The socket is recreated if
    /// somebody removes its file, and removed when the server is dropped.
    ///
    /// # Errors
    ///
    /// Where the thread, or its event loop, can't be started.
    pub fn start(
        socket: Option<Socket>,
        tcp: TcpSockets,
        token: CurrentToken,
        daemon: mpsc::Sender<Request>,
        recent: Recent,
    ) -> Result<Self, ServerError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (unix, tcp) = {
            let _context = runtime.enter();
            let listening = |socket: Socket| -> io::Result<_> {
                Ok((UnixListener::from_std(socket.listener()?)?, socket))
            };
            let unix = socket.map(listening).transpose()?;
            let tcp: io::Result<Vec<_>> = tcp.0.into_iter().map(TcpListener::from_std).collect();
            (unix, tcp?)
        };
        let (latest, look) = watch::channel(Arc::default());
        let daemon = Daemon::new(daemon);
        let sampler = sampler::run(daemon.clone(), recent.clone(), latest);
        let router = router(Context::new(daemon, Watched::new(recent, look)))
            .layer(middleware::from_fn_with_state(Gate::new(token), admit))
            .layer(middleware::map_response(seal));
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new()
            .name("admin".to_owned())
            .spawn(move || runtime.block_on(serve(unix, tcp, &router, sampler, stopped)))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(
    unix: Option<(UnixListener, Socket)>,
    tcp: Vec<TcpListener>,
    router: &Router,
    sampler: impl Future<Output = ()>,
    stopped: oneshot::Receiver<()>,
) {
    let stopped = stopped.shared();
    // Dropped at the end, so that the shutdown does not wait for event streams.
    let sampler = async {
        tokio::select! {
            _ = stopped.clone() => {}
            () = sampler => {}
        }
    };
    let unix = future::join_all(unix.map(|(listener, socket)| {
        let (renew, renewed) = mpsc::channel(1);
        let stopped = stopped.clone();
        async move {
            let keeper = async {
                tokio::select! {
                    _ = stopped.clone() => {}
                    () = keep(socket, renew) => {}
                }
            };
            let serve = serve_on(listener, renewed, router, stopped.clone());
            future::join(serve, keeper).await;
        }
    }));
    let tcp = tcp.into_iter().map(|listener| {
        let (_, never) = mpsc::channel(1);
        serve_on(listener, never, router, stopped.clone())
    });
    future::join3(sampler, unix, future::join_all(tcp)).await;
}

/// Checks the socket's file, forever. If the socket had to be recreated, sends the new listener.
async fn keep(mut socket: Socket, renew: mpsc::Sender<UnixListener>) {
    let mut told = String::new();
    loop {
        sleep(LOOK).await;
        let restored = match socket.restore() {
            Ok(false) => continue,
            Ok(true) => socket.listener().and_then(UnixListener::from_std),
            Err(error) => Err(io::Error::other(error)),
        };
        match restored {
            Ok(listener) => {
                told.clear();
                tracing::warn!(path = %socket.path().display(), "the admin socket was gone, and is made again");
                super::tell_remarks(&socket);
                if renew.send(listener).await.is_err() {
                    return;
                }
            }
            // Don't log the same error again and again.
            Err(error) if error.to_string() == told => {}
            Err(error) => {
                told = error.to_string();
                tracing::warn!(%error, "the admin socket is gone, and can't be made again");
            }
        }
    }
}

/// Serves one listener, or the one that replaces it, until `stopped`. Then finishes the last
/// answers.
async fn serve_on<L: Listener>(
    mut listener: L,
    mut renewed: mpsc::Receiver<L>,
    router: &Router,
    mut stopped: Shared<oneshot::Receiver<()>>,
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(MAX_HEAD);
    let held = Connections::new(MAX_CONNECTIONS);
    let connections = GracefulShutdown::new();
    loop {
        let (stream, via, seat) = tokio::select! {
            _ = &mut stopped => break,
            Some(new) = renewed.recv() => {
                listener = new;
                continue;
            }
            next = next(&listener, &held) => next,
        };
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(WRITE_TIMEOUT));
        let (asked, answered) = (seat.presence(), seat.presence());
        let service = router
            .clone()
            .map_request(move |mut request: hyper::Request<Incoming>| {
                request.extensions_mut().insert(via);
                request.extensions_mut().insert(asked.clone());
                request
            })
            .map_response(move |response: Response| {
                // An event stream counts as being answered for as long as it is open.
                let content = response.headers().get(header::CONTENT_TYPE);
                if content.is_none_or(|content| content != "text/event-stream") {
                    answered.waits();
                }
                response
            });
        let service = TowerToHyperService::new(service);
        let connection = http.serve_connection(TokioIo::new(Box::pin(stream)), service);
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            // The outcome does not matter: a client that goes away is no error.
            tokio::select! {
                _ = connection => {}
                () = seat.needed() => {}
            }
        });
        // Let this connection read what it has already received before others are accepted.
        yield_now().await;
    }
    drop(listener);
    let _ = timeout(LAST_WORDS, connections.shutdown()).await;
}

/// Waits for the next client and room for it. Cancel safe.
async fn next<L: Listener>(listener: &L, held: &Arc<Connections>) -> (L::Stream, Via, Seat) {
    held.room().await;
    loop {
        match listener.accept().await {
            Ok((stream, via)) => return (stream, via, held.take(via)),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection on the admin socket");
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// Something that clients connect to.
trait Listener {
    type Stream: AsyncRead + AsyncWrite + Send + 'static;

    /// The next client. Cancel safe.
    async fn accept(&self) -> io::Result<(Self::Stream, Via)>;
}

impl Listener for UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn accept(&self) -> io::Result<(Self::Stream, Via)> {
        let (stream, _) = self.accept().await?;
        Ok((stream, Via::Unix))
    }
}

impl Listener for TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn accept(&self) -> io::Result<(Self::Stream, Via)> {
        let (stream, peer) = self.accept().await?;
        let local = stream.local_addr()?;
        Ok((stream, Via::Tcp { local, peer }))
    }
}
