//! The admin thread's handle to the main thread: sends requests and waits for the answers.

use std::{sync::Arc, time::Duration};

use axum::http::StatusCode;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{Request, Restarted, SlotDrain, Status, answer::Error, metrics, usage::Trees};

/// How long the main thread may take to report the status.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// Sends requests to the main thread.
#[derive(Debug, Clone)]
pub(super) struct Daemon {
    requests: mpsc::Sender<Request>,
    /// Resource usage of the workers' processes, as seen so far.
    trees: Arc<Trees>,
}

impl Daemon {
    pub(super) fn new(requests: mpsc::Sender<Request>) -> Self {
        Self { requests, trees: Arc::default() }
    }

    /// The status, including resource usage from `/proc`.
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

    pub(super) async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, Error> {
        let (sender, answer) = oneshot::channel();
        self.requests.send(request(sender)).await.map_err(|_| Error::gone())?;
        answer.await.map_err(|_| Error::gone())
    }

    pub(super) async fn restart(
        &self,
        service: String,
        slot: Option<u32>,
        reload: bool,
    ) -> Result<Restarted, Error> {
        if reload {
            return self.reload_and_restart(Some(service), slot).await;
        }
        Ok(self.ask(|answer| Request::Restart { service, slot, answer }).await??)
    }

    pub(super) async fn reload_and_restart(
        &self,
        service: Option<String>,
        slot: Option<u32>,
    ) -> Result<Restarted, Error> {
        let request = |answer| Request::ReloadAndRestart { service, slot, answer };
        Ok(self.ask(request).await??)
    }

    pub(super) async fn set_drained(
        &self,
        service: String,
        slot: u32,
        drained: bool,
    ) -> Result<SlotDrain, Error> {
        let request = |answer| Request::SetDrained { service, slot, drained, answer };
        Ok(self.ask(request).await??)
    }

    /// All counters, and the resource usage seen so far.
    pub(super) async fn metrics(&self) -> Result<(metrics::Snapshot, &Trees), Error> {
        Ok((self.ask_soon(Request::Metrics).await?, &self.trees))
    }

    /// Starts a graceful stop.
    pub(super) async fn stop(&self) -> Result<(), Error> {
        self.requests.send(Request::Stop).await.map_err(|_| Error::gone())
    }

    /// The status, without resource usage from `/proc`.
    pub(super) async fn status(&self) -> Result<Status, Error> {
        self.ask_soon(Request::Status).await
    }

    /// Like [`Daemon::ask`], for requests that the main thread answers at once.
    pub(super) async fn ask_soon<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, Error> {
        let busy = |_| Error::new(StatusCode::SERVICE_UNAVAILABLE, "lbd is too busy to answer");
        timeout(STATUS_TIMEOUT, self.ask(request)).await.map_err(busy)?
    }
}
