//! What can be asked over HTTP, and how it is answered. Who may ask is decided in `access`.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    extract::{FromRef, Path, State},
    http::{StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Serialize;
use serde_json::json;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{
    Failure, Placed, Reloaded, Request, Restarted, Status, dashboard,
    events::{Watched, events},
    metrics,
    usage::Trees,
};
use crate::printable;

/// How long the main thread may take to tell how everything is.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// Every path there is.
pub(super) fn router(context: Context) -> Router {
    Router::new()
        .route(dashboard::PATH, get(dashboard::page))
        .route("/healthz", get(healthz))
        .route("/status", get(status))
        .route("/metrics", get(metrics))
        .route("/events", get(events))
        .route("/reload", post(reload))
        .route("/stop", post(stop))
        .route("/services/{name}/restart", post(restart))
        .route("/services/{name}/workers/{slot}/restart", post(restart_worker))
        .route("/services/{name}/workers/{slot}/drain", post(drain))
        .route("/services/{name}/workers/{slot}/resume", post(resume))
        .fallback(async || Error::new(StatusCode::NOT_FOUND, "there is nothing at this path"))
        .method_not_allowed_fallback(async || {
            Error::new(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
        })
        .with_state(context)
}

/// What requests are answered from.
#[derive(Debug, Clone)]
pub(super) struct Context {
    daemon: Daemon,
    pub(super) watched: Arc<Watched>,
    /// What was seen of the workers so far.
    cpu: Arc<Mutex<metrics::CpuTimes>>,
}

impl Context {
    pub(super) fn new(daemon: Daemon, watched: Watched) -> Self {
        Self { daemon, watched: Arc::new(watched), cpu: Arc::default() }
    }
}

impl FromRef<Context> for Daemon {
    fn from_ref(context: &Context) -> Self {
        context.daemon.clone()
    }
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

async fn status(State(context): State<Context>) -> Result<Json<Status>, Error> {
    let mut status = context.daemon.look().await?;
    context.watched.latest().borrow().rate(&mut status);
    Ok(Json(status))
}

async fn metrics(State(context): State<Context>) -> Result<impl IntoResponse, Error> {
    let snapshot = context.daemon.ask_soon(Request::Metrics).await?;
    let mut cpu = context.cpu.lock().unwrap_or_else(PoisonError::into_inner);
    let page = metrics::page(&snapshot, &context.daemon.trees, &mut cpu);
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], page))
}

/// With `?restart=true` all workers are new afterwards.
async fn reload(State(daemon): State<Daemon>, uri: Uri) -> Result<Response, Error> {
    if flag(&uri, "restart")? {
        return Ok(daemon.reload_and_restart(None, None).await?.into_response());
    }
    let reloaded: Reloaded = daemon.ask(Request::Reload).await??;
    Ok(Json(reloaded).into_response())
}

/// With `?reload=true` the file is read before.
async fn restart(
    State(daemon): State<Daemon>,
    Path(service): Path<String>,
    uri: Uri,
) -> Result<Json<Restarted>, Error> {
    daemon.restart(service, None, flag(&uri, "reload")?).await
}

async fn restart_worker(
    State(daemon): State<Daemon>,
    Path((service, slot)): Path<(String, String)>,
    uri: Uri,
) -> Result<Json<Restarted>, Error> {
    let slot = Some(number(&slot)?);
    daemon.restart(service, slot, flag(&uri, "reload")?).await
}

/// Whether the query says `NAME=true`.
fn flag(uri: &Uri, name: &str) -> Result<bool, Error> {
    match uri.query().unwrap_or_default().split_once('=') {
        None if uri.query().is_none_or(str::is_empty) => Ok(false),
        Some((key, "true")) if key == name => Ok(true),
        Some((key, "false")) if key == name => Ok(false),
        _ => {
            let message = format!("unknown parameters; expected ?{name}=true or none");
            Err(Error::new(StatusCode::BAD_REQUEST, message))
        }
    }
}

async fn drain(
    State(daemon): State<Daemon>,
    Path((service, slot)): Path<(String, String)>,
) -> Result<Json<Placed>, Error> {
    daemon.place(service, &slot, true).await
}

async fn resume(
    State(daemon): State<Daemon>,
    Path((service, slot)): Path<(String, String)>,
) -> Result<Json<Placed>, Error> {
    daemon.place(service, &slot, false).await
}

fn number(slot: &str) -> Result<u32, Error> {
    slot.parse().map_err(|_| {
        let message = format!("{slot:?} is not a slot; expected its number, such as 0");
        Error::new(StatusCode::NOT_FOUND, message)
    })
}

async fn stop(
    State(daemon): State<Daemon>,
) -> Result<(StatusCode, Json<serde_json::Value>), Error> {
    daemon.requests.send(Request::Stop).await.map_err(|_| Error::gone())?;
    Ok((StatusCode::ACCEPTED, Json(json!({ "stopping": true }))))
}

/// The main thread, to be asked.
#[derive(Debug, Clone)]
pub(super) struct Daemon {
    requests: mpsc::Sender<Request>,
    /// What was seen of the workers' processes.
    trees: Arc<Trees>,
}

impl Daemon {
    pub(super) fn new(requests: mpsc::Sender<Request>) -> Self {
        Self { requests, trees: Arc::default() }
    }

    /// How everything is, with what `/proc` knows.
    pub(super) async fn look(&self) -> Result<Status, Error> {
        let mut status = self.status().await?;
        let guards: Vec<i32> = status.workers().filter_map(|worker| worker.guard).collect();
        let trees = self.trees.look(&guards);
        for worker in status.services.iter_mut().flat_map(|service| service.all_mut()) {
            let tree =
                worker.guard.and_then(|guard| trees.get(&guard)).filter(|_| worker.pid.is_some());
            worker.resident_bytes = worker.resident_bytes.or(tree.map(|tree| tree.resident_bytes));
            worker.cpu_seconds = tree.map(|tree| tree.cpu_seconds);
        }
        Ok(status)
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, Error> {
        let (sender, answer) = oneshot::channel();
        self.requests.send(request(sender)).await.map_err(|_| Error::gone())?;
        answer.await.map_err(|_| Error::gone())
    }

    async fn restart(
        &self,
        service: String,
        slot: Option<u32>,
        reload: bool,
    ) -> Result<Json<Restarted>, Error> {
        if reload {
            return self.reload_and_restart(Some(service), slot).await;
        }
        Ok(Json(self.ask(|answer| Request::Restart { service, slot, answer }).await??))
    }

    async fn reload_and_restart(
        &self,
        service: Option<String>,
        slot: Option<u32>,
    ) -> Result<Json<Restarted>, Error> {
        let request = |answer| Request::ReloadAndRestart { service, slot, answer };
        Ok(Json(self.ask(request).await??))
    }

    async fn place(
        &self,
        service: String,
        slot: &str,
        drained: bool,
    ) -> Result<Json<Placed>, Error> {
        let slot = number(slot)?;
        let request = |answer| Request::Place { service, slot, drained, answer };
        Ok(Json(self.ask(request).await??))
    }

    async fn status(&self) -> Result<Status, Error> {
        self.ask_soon(Request::Status).await
    }

    /// As [`Daemon::ask`], for what the main thread answers at once.
    async fn ask_soon<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, Error> {
        let busy = |_| Error::new(StatusCode::SERVICE_UNAVAILABLE, "lbd is too busy to answer");
        timeout(STATUS_TIMEOUT, self.ask(request)).await.map_err(busy)?
    }
}

/// An answer in JSON, in which nothing is obeyed by a terminal that it is printed on.
#[derive(Debug)]
pub(super) struct Json<T>(pub(super) T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        // Maps with keys that are no strings are all that it refuses.
        let text = serde_json::to_string(&self.0).unwrap_or_default();
        let content_type = [(header::CONTENT_TYPE, "application/json")];
        (content_type, printable::json(&text).into_owned()).into_response()
    }
}

/// What went wrong, as `{ "error": "…" }`.
#[derive(Debug)]
pub(super) struct Error(StatusCode, String);

impl Error {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
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
