//! The async server: hyper on one `current_thread` runtime.

use std::{
    convert::Infallible,
    io,
    os::unix::net::UnixStream as StdStream,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use hyper::{
    Request, Response,
    body::Incoming,
    header::{CONNECTION, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::{TcpStream, UnixStream},
    runtime,
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{sleep, timeout},
};

use super::{
    ACCEPT_BACKOFF, FIRST_REQUEST_GRACE, HEAD_TIMEOUT, MAX_HEAD, WorkerError,
    files::{Body, Files},
    socket::Listener,
    system,
};

/// Serves until `stop` is readable, then stops gracefully. Holds at most `capacity` connections.
pub(super) fn run(
    listener: Listener,
    files: Files,
    stop: StdStream,
    capacity: usize,
) -> Result<(), WorkerError> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(system("start the runtime"))?;
    runtime.block_on(async {
        let stop = UnixStream::from_std(stop).map_err(system("watch for signals"))?;
        // SAFETY: the descriptor belongs to the listener's socket, which the listener owns and
        // never replaces, so it stays open as long as the listener exists.
        let listener = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }
            .map_err(|error| system("watch the listening socket")(error.into()))?;
        Server::new(files, capacity).serve(listener, stop).await;
        Ok(())
    })
}

struct Server {
    files: Arc<Files>,
    http: http1::Builder,
    /// True once the stop signal has arrived.
    stopping: watch::Sender<bool>,
    /// One permit for each further connection that may be accepted.
    free: Arc<Semaphore>,
    capacity: usize,
}

impl Server {
    fn new(files: Files, capacity: usize) -> Self {
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_header_size(MAX_HEAD)
            // A client may close its sending half after its request.
            .half_close(true);
        Self {
            files: Arc::new(files),
            http,
            stopping: watch::Sender::new(false),
            free: Arc::new(Semaphore::new(capacity)),
            capacity,
        }
    }

    async fn serve(self, mut listener: AsyncFd<Listener>, stop: UnixStream) {
        {
            let mut stop = pin!(stop.readable());
            loop {
                tokio::select! {
                    biased;
                    _ = &mut stop => break,
                    (stream, permit) = self.next(&mut listener) => self.spawn(stream, permit),
                }
            }
        }
        self.stopping.send_replace(true);
        while let Some((stream, permit)) = self.queued(&mut listener).await {
            self.spawn(stream, permit);
        }
        drop(listener);
        // All permits are back when every connection has ended.
        let all = u32::try_from(self.capacity).unwrap_or(u32::MAX);
        let _ = self.free.acquire_many(all).await;
    }

    /// Waits for the next connection and a permit for it. Cancelling loses no connection.
    async fn next(&self, listener: &mut AsyncFd<Listener>) -> (TcpStream, OwnedSemaphorePermit) {
        let permit = self.permit().await;
        loop {
            let accepted = match listener.readable_mut().await {
                Ok(mut ready) => ready.try_io(|listener| accept(listener.get_mut())),
                Err(error) => Ok(Err(error)),
            };
            match accepted {
                Ok(Ok(stream)) => return (stream, permit),
                Ok(Err(error)) => back_off(&error).await,
                Err(_would_block) => {}
            }
        }
    }

    /// A connection that is already in the accept queue; `None` if the queue is empty.
    async fn queued(
        &self,
        listener: &mut AsyncFd<Listener>,
    ) -> Option<(TcpStream, OwnedSemaphorePermit)> {
        let permit = self.permit().await;
        loop {
            match accept(listener.get_mut()) {
                Ok(stream) => return Some((stream, permit)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) => back_off(&error).await,
            }
        }
    }

    async fn permit(&self) -> OwnedSemaphorePermit {
        match Arc::clone(&self.free).acquire_owned().await {
            Ok(permit) => permit,
            Err(_) => unreachable!("the semaphore is never closed"),
        }
    }

    fn spawn(&self, stream: TcpStream, permit: OwnedSemaphorePermit) {
        let http = self.http.clone();
        let files = Arc::clone(&self.files);
        let stopping = self.stopping.subscribe();
        tokio::spawn(async move {
            converse(http, stream, &files, stopping).await;
            drop(permit);
        });
    }
}

/// Answers the requests of one connection until either side ends it. The outcome does not matter: a
/// client that goes away is no error.
async fn converse(
    http: http1::Builder,
    stream: TcpStream,
    files: &Files,
    mut stopping: watch::Receiver<bool>,
) {
    let asked = AtomicBool::new(false);
    let phase = stopping.clone();
    let service = service_fn(|request| {
        asked.store(true, Ordering::Relaxed);
        answer(files, request, &phase)
    });
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    tokio::select! {
        _ = &mut connection => return,
        _ = stopping.wait_for(|stopping| *stopping) => {}
    }
    // hyper would take a connection without any request for an idle one, and close it.
    if !asked.load(Ordering::Relaxed) {
        let ended = timeout(FIRST_REQUEST_GRACE, &mut connection).await.is_ok();
        if ended || !asked.load(Ordering::Relaxed) {
            return;
        }
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

async fn answer(
    files: &Files,
    request: Request<Incoming>,
    stopping: &watch::Receiver<bool>,
) -> Result<Response<Body>, Infallible> {
    let (head, _body) = request.into_parts();
    let mut response = files.answer(Request::from_parts(head, ())).await;
    if *stopping.borrow() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response)
}

fn accept(listener: &mut Listener) -> io::Result<TcpStream> {
    TcpStream::from_std(listener.accept(true)?)
}

async fn back_off(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    sleep(ACCEPT_BACKOFF).await;
}
