//! The HTTP endpoints. `access` decides who may use them.

use std::sync::{Arc, Mutex, PoisonError};

use axum::{
    Router,
    extract::{FromRef, Path, State},
    http::{StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::json;

use super::{
    Reloaded, Request, Restarted, SlotDrain, Status,
    answer::{Error, Json},
    dashboard,
    events::{Watched, events},
    main_thread::Daemon,
    metrics,
};

/// The routes.
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

/// What the endpoints share.
#[derive(Debug, Clone)]
pub(super) struct Context {
    daemon: Daemon,
    watched: Arc<Watched>,
    /// The workers' CPU times, accumulated over all scrapes.
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

impl FromRef<Context> for Arc<Watched> {
    fn from_ref(context: &Context) -> Self {
        Self::clone(&context.watched)
    }
}

/// 200 if every service has a healthy worker.
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
    let (snapshot, trees) = context.daemon.metrics().await?;
    let mut cpu = context.cpu.lock().unwrap_or_else(PoisonError::into_inner);
    let page = metrics::page(&snapshot, trees, &mut cpu);
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], page))
}

/// With `?restart=true`, also replaces all workers.
async fn reload(State(daemon): State<Daemon>, uri: Uri) -> Result<Response, Error> {
    if flag(&uri, "restart")? {
        return Ok(Json(daemon.reload_and_restart(None, None).await?).into_response());
    }
    let reloaded: Reloaded = daemon.ask(Request::Reload).await??;
    Ok(Json(reloaded).into_response())
}

/// With `?reload=true`, rereads the file first.
async fn restart(
    State(daemon): State<Daemon>,
    Path(service): Path<String>,
    uri: Uri,
) -> Result<Json<Restarted>, Error> {
    Ok(Json(daemon.restart(service, None, flag(&uri, "reload")?).await?))
}

async fn restart_worker(
    State(daemon): State<Daemon>,
    Path((service, slot)): Path<(String, String)>,
    uri: Uri,
) -> Result<Json<Restarted>, Error> {
    let slot = Some(number(&slot)?);
    Ok(Json(daemon.restart(service, slot, flag(&uri, "reload")?).await?))
}

/// Whether the query contains `NAME=true`.
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
) -> Result<Json<SlotDrain>, Error> {
    Ok(Json(daemon.set_drained(service, number(&slot)?, true).await?))
}

async fn resume(
    State(daemon): State<Daemon>,
    Path((service, slot)): Path<(String, String)>,
) -> Result<Json<SlotDrain>, Error> {
    Ok(Json(daemon.set_drained(service, number(&slot)?, false).await?))
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
    daemon.stop().await?;
    Ok((StatusCode::ACCEPTED, Json(json!({ "stopping": true }))))
}
