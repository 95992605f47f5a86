//! The HTTP side of the admin socket, on a thread of its own.
//!
//! What a client may cost is bounded: connections, the size of what it sends, and the time it takes
//! to send and to read.

use std::{io, thread, time::Duration};

use axum::{
    Json, Router,
    body::{Body, to_bytes},
    extract::{Path, Request as HttpRequest, State},
    http::{HeaderMap, StatusCode, header, uri::Authority},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use serde_json::json;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{sleep, timeout},
};
use tokio_io_timeout::TimeoutStream;

use super::{Failure, Process, Reloaded, Request, Restarted, Socket, Status};

/// Connections held at once; more wait to be taken.
pub const MAX_CONNECTIONS: usize = 16;
/// The largest request head, in bytes; so also how much of a connection is buffered either way.
const MAX_HEAD: usize = 16 * 1024;
/// The largest request body, in bytes. No request needs one.
const MAX_BODY: usize = 4 * 1024;
/// How long a head may take to come, counted from the last answer; so also how long a connection
/// may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a body may take to come.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may read nothing while there is something to read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the main thread may take to tell how everything is.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the last answers may take when the daemon ends.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long accepting pauses after an error that only time can cure.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// The server could not start.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve the admin socket: {0}")]
pub struct ServerError(#[from] io::Error);

/// The running server. Dropped, it takes nobody any more, gives the last answers half a second to
/// leave, and blocks until then.
#[derive(Debug)]
pub struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    /// Serves `socket`, and hands what is asked for to `daemon`.
    ///
    /// # Errors
    ///
    /// Where there can be no thread, or no event loop in it.
    pub fn start(socket: &Socket, daemon: mpsc::Sender<Request>) -> Result<Self, ServerError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = {
            let _context = runtime.enter();
            UnixListener::from_std(socket.listener()?)?
        };
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new()
            .name("admin".to_owned())
            .spawn(move || runtime.block_on(serve(listener, router(daemon), stopped)))?;
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

async fn serve(listener: UnixListener, router: Router, mut stopped: oneshot::Receiver<()>) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(MAX_HEAD);
    let free = std::sync::Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = GracefulShutdown::new();
    loop {
        let (stream, permit) = tokio::select! {
            _ = &mut stopped => break,
            next = next(&listener, &free) => next,
        };
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(WRITE_TIMEOUT));
        let service = TowerToHyperService::new(router.clone());
        let connection = http.serve_connection(TokioIo::new(Box::pin(stream)), service);
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            // How it ended matters to nobody: a client that goes away is no fault.
            let _ = connection.await;
            drop(permit);
        });
    }
    drop(listener);
    let _ = timeout(LAST_WORDS, connections.shutdown()).await;
}

/// The next client, once there is one and room for it. May be dropped at any time.
async fn next(
    listener: &UnixListener,
    free: &std::sync::Arc<Semaphore>,
) -> (UnixStream, Option<OwnedSemaphorePermit>) {
    // The semaphore is never closed.
    let permit = std::sync::Arc::clone(free).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, permit),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection on the admin socket");
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

fn router(daemon: mpsc::Sender<Request>) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/status", get(status))
        .route("/reload", post(reload))
        .route("/stop", post(stop))
        .route("/services/{name}/restart", post(restart))
        .fallback(async || Error::new(StatusCode::NOT_FOUND, "there is nothing at this path"))
        .method_not_allowed_fallback(async || {
            Error::new(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
        })
        .layer(middleware::from_fn(admit))
        .with_state(Daemon(daemon))
}

/// 200 where every service has a healthy worker.
async fn healthz(State(daemon): State<Daemon>) -> Result<&'static str, Error> {
    let status = daemon.status().await?;
    let missing: Vec<_> = status.without_health().collect();
    match (missing.is_empty(), status.services.is_empty()) {
        (true, false) => Ok("ok\n"),
        (true, true) => Err(Error::gone()),
        (false, _) => {
            let error = format!("no healthy worker: {}", missing.join(", "));
            Err(Error::new(StatusCode::SERVICE_UNAVAILABLE, error))
        }
    }
}

async fn status(State(daemon): State<Daemon>) -> Result<Json<Status>, Error> {
    let mut status = daemon.status().await?;
    for worker in status.services.iter_mut().flat_map(|service| service.all_mut()) {
        let process = worker.pid.and_then(Process::look);
        worker.resident_bytes = process.map(|process| process.resident_bytes);
        worker.cpu_seconds = process.map(|process| process.cpu_seconds);
    }
    Ok(Json(status))
}

async fn reload(State(daemon): State<Daemon>) -> Result<Json<Reloaded>, Error> {
    Ok(Json(daemon.ask(Request::Reload).await??))
}

async fn restart(
    State(daemon): State<Daemon>,
    Path(service): Path<String>,
) -> Result<Json<Restarted>, Error> {
    Ok(Json(daemon.ask(|answer| Request::Restart { service, answer }).await??))
}

async fn stop(
    State(daemon): State<Daemon>,
) -> Result<(StatusCode, Json<serde_json::Value>), Error> {
    daemon.0.send(Request::Stop).await.map_err(|_| Error::gone())?;
    Ok((StatusCode::ACCEPTED, Json(json!({ "stopping": true }))))
}

/// The main thread, to be asked.
#[derive(Debug, Clone)]
struct Daemon(mpsc::Sender<Request>);

impl Daemon {
    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, Error> {
        let (sender, answer) = oneshot::channel();
        self.0.send(request(sender)).await.map_err(|_| Error::gone())?;
        answer.await.map_err(|_| Error::gone())
    }

    async fn status(&self) -> Result<Status, Error> {
        let busy = |_| Error::new(StatusCode::SERVICE_UNAVAILABLE, "lbd is too busy to answer");
        timeout(STATUS_TIMEOUT, self.ask(Request::Status)).await.map_err(busy)?
    }
}

/// Lets no web page change anything, and takes no more of a body than there can be.
async fn admit(request: HttpRequest, next: Next) -> Response {
    if !request.method().is_safe() && !is_local(request.headers()) {
        let message = "asked on behalf of another host; expected Host: localhost";
        return Error::new(StatusCode::FORBIDDEN, message).into_response();
    }
    let (head, body) = request.into_parts();
    match timeout(BODY_TIMEOUT, to_bytes(body, MAX_BODY)).await {
        Ok(Ok(bytes)) => next.run(HttpRequest::from_parts(head, Body::from(bytes))).await,
        Ok(Err(_)) => {
            let message = format!("the body has more than {MAX_BODY} bytes");
            Error::new(StatusCode::PAYLOAD_TOO_LARGE, message).into_response()
        }
        Err(_) => {
            Error::new(StatusCode::REQUEST_TIMEOUT, "the body takes too long").into_response()
        }
    }
}

/// Whether a request was made to this machine, and not by a page of another host: one whose name
/// leads here (DNS rebinding), or one that lets its visitors post (CSRF).
fn is_local(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let Some(host) = text(header::HOST) else { return false };
    let local = host
        .parse::<Authority>()
        .is_ok_and(|host| ["localhost", "lbd", "127.0.0.1", "[::1]"].contains(&host.host()));
    let same = text(header::ORIGIN)
        .is_none_or(|origin| origin.split_once("://").is_some_and(|(_, origin)| origin == host));
    local && same
}

/// What went wrong, as `{ "error": "…" }`.
#[derive(Debug)]
struct Error(StatusCode, String);

impl Error {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self(status, message.into())
    }

    /// The main thread does not answer any more.
    fn gone() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "lbd is stopping")
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let status = match failure {
            Failure::NotFound(_) => StatusCode::NOT_FOUND,
            Failure::Refused(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Failure::Failed(_) => StatusCode::CONFLICT,
        };
        Self(status, failure.to_string())
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_may_ask_for_a_change() {
        let local = |host: Option<&str>, origin: Option<&str>| {
            let mut headers = HeaderMap::new();
            host.map(|host| headers.insert(header::HOST, host.parse().unwrap()));
            origin.map(|origin| headers.insert(header::ORIGIN, origin.parse().unwrap()));
            is_local(&headers)
        };
        for host in ["localhost", "lbd", "127.0.0.1:9000", "[::1]:9000", "localhost:80"] {
            assert!(local(Some(host), None), "{host}");
            assert!(local(Some(host), Some(&format!("http://{host}"))), "{host}");
            assert!(!local(Some(host), Some("http://example.org")), "{host}");
            assert!(!local(Some(host), Some("null")), "{host}");
        }
        for host in ["example.org", "localhost.example.org", "127.0.0.1.nip.io", "", "a@b@c", "::1"]
        {
            assert!(!local(Some(host), None), "{host}");
        }
        assert!(!local(Some("localhost:80"), Some("http://localhost:81")), "another port");
        assert!(!local(None, None));
    }
}
