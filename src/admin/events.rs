//! `GET /events`: everything as it happens, as server-sent events (HTML Living Standard, 9.2).
//!
//! | event | data | when |
//! | --- | --- | --- |
//! | `access` | what the client may change: `free`, with the `token`, or `never` | once, first |
//! | `samples` | the last minute of each slot: connections a second and held | once, then |
//! | `note` | a line of lbd's log, except those caused by traffic | the last 100, then each |
//! | `status` | the same as `/status` | once, then; and again when there are other services or slots |
//! | `news` | what has changed since | once a second, and soon after each note |
//!
//! `news` always has `uptime_seconds`; each `since_seconds` grows with it and is not sent. Every
//! other field replaces the value sent before: `config`; and in `services`, by `name`, the changed
//! fields of each of its `workers`, by `slot`, and its complete `replacements` and `retiring`.
//!
//! Nothing is queued for a slow client: when it has received one event it gets the latest state,
//! and after a reconnect everything.

use std::{collections::VecDeque, convert::Infallible, sync::Arc};

use axum::{
    Extension,
    extract::State,
    http::{StatusCode, header},
    response::{
        IntoResponse, Response,
        sse::{Event, Sse},
    },
};
use futures_util::stream;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    answer::Error,
    caller::{Changes, Via},
    news::News,
    sampler::Latest,
    status::Status,
};
use crate::{
    logging::{Reader, Recent},
    printable,
};

/// How many event streams may be open at once over the unix socket, and over TCP. However many
/// dashboards are open, some of a listener's connections are left for commands.
const MAX_STREAMS: usize = 8;

/// What the streams are made from.
#[derive(Debug)]
pub(super) struct Watched {
    recent: Recent,
    latest: Latest,
    /// Separate from TCP, where anybody can connect, so that TCP clients can't use up the streams
    /// of those who may use the socket.
    over_unix: Arc<Semaphore>,
    over_tcp: Arc<Semaphore>,
}

impl Watched {
    pub(super) fn new(recent: Recent, latest: Latest) -> Self {
        let places = || Arc::new(Semaphore::new(MAX_STREAMS));
        Self { recent, latest, over_unix: places(), over_tcp: places() }
    }

    /// The state at the last look.
    pub(super) fn latest(&self) -> &Latest {
        &self.latest
    }

    fn watch(&self, via: Via, changes: Changes) -> Option<Watcher> {
        let places = match via {
            Via::Unix => &self.over_unix,
            Via::Tcp { .. } => &self.over_tcp,
        };
        let permit = Arc::clone(places).try_acquire_owned().ok()?;
        let mut latest = self.latest.clone();
        // So that the first event reports the look that was made before.
        latest.mark_changed();
        let notes = self.recent.read();
        let pending = event("access", &Access { changes }).into_iter().collect();
        Some(Watcher { latest, notes, pending, told: None, _permit: permit })
    }
}

/// The first event of a stream.
#[derive(Debug, Serialize)]
struct Access {
    changes: Changes,
}

pub(super) async fn events(
    State(watched): State<Arc<Watched>>,
    Extension(via): Extension<Via>,
    Extension(changes): Extension<Changes>,
) -> Response {
    let Some(watcher) = watched.watch(via, changes) else {
        let message = format!("{MAX_STREAMS} watch already, which is as many as can");
        let refusal = Error::new(StatusCode::SERVICE_UNAVAILABLE, message);
        // A refused client must not keep one of the remaining connections either.
        return ([(header::CONNECTION, "close")], refusal).into_response();
    };
    let events = stream::unfold(watcher, async |mut watcher| {
        let event = watcher.next().await?;
        Some((Ok::<_, Infallible>(event), watcher))
    });
    ([(header::CACHE_CONTROL, "no-store")], Sse::new(events)).into_response()
}

/// One client, and what to send it next.
#[derive(Debug)]
struct Watcher {
    latest: Latest,
    notes: Reader,
    /// Bounded: at most the notes that are kept, plus three.
    pending: VecDeque<Event>,
    /// The last status that the client was sent; `None` before the first.
    told: Option<Arc<Status>>,
    _permit: OwnedSemaphorePermit,
}

impl Watcher {
    /// The next event; `None` when the daemon ends.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Some(event);
            }
            tokio::select! {
                biased;
                () = self.notes.changed(), if self.told.is_some() => self.tell_notes(),
                changed = self.latest.changed() => {
                    changed.ok()?;
                    self.tell_all();
                }
            }
        }
    }

    fn tell_all(&mut self) {
        let look = Arc::clone(&self.latest.borrow_and_update());
        let Some(status) = &look.status else { return };
        if self.told.is_none() {
            self.pending.extend(event("samples", &*look.samples));
        }
        // Notes of what happened come before the resulting status.
        self.tell_notes();
        let told = self.told.replace(Arc::clone(status));
        let news = told.as_deref().and_then(|told| News::between(told, status));
        self.pending.extend(match news {
            Some(news) => event("news", &news),
            None => event("status", &**status),
        });
    }

    fn tell_notes(&mut self) {
        let unread = self.notes.unread();
        self.pending.extend(unread.iter().filter_map(|note| event("note", &**note)));
    }
}

fn event(name: &str, data: &impl Serialize) -> Option<Event> {
    // Fails only for maps whose keys are not strings, which there are none of.
    let text = serde_json::to_string(data).ok()?;
    Some(Event::default().event(name).data(printable::json(&text)))
}
