//! Keeps the last lines of the log for event streams.
//!
//! This is independent of the log's own queue and level: the dashboard shows that a worker exited
//! also if only errors are logged. Lines caused by traffic are left out: access lines (target
//! [`ACCESS`]) and the workers' output (target [`OUTPUT`]).

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use serde::Serialize;
use tokio::sync::watch;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::{Context, Layer},
    registry::LookupSpan,
};

use crate::printable;

/// The target of the line that is logged when a connection ends.
const ACCESS: &str = "access";
/// The target of a worker's output lines.
const OUTPUT: &str = "output";
/// How many notes are kept.
pub const KEPT: usize = 100;
/// How many bytes of a line's fields are kept: an error may quote anything.
const LONGEST: usize = 1000;

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    /// When it was written, RFC 3339 in UTC with milliseconds.
    pub at: String,
    /// `error`, `warn` or `info`.
    pub level: &'static str,
    /// What happened.
    pub message: String,
    /// The service that the line is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The slot that the line is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<u64>,
    /// The worker's port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u64>,
    /// The worker's pid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i64>,
    /// All other fields as `key=value`, for people to read.
    pub text: String,
}

/// The last [`KEPT`] notes. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Recent(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    notes: Mutex<VecDeque<Arc<Note>>>,
    /// The number of notes ever written.
    written: watch::Sender<u64>,
}

/// A position in the notes. Reading continues from there.
#[derive(Debug)]
pub struct Reader {
    recent: Recent,
    written: watch::Receiver<u64>,
    read: u64,
}

impl Recent {
    /// The layer that records lines, for the subscriber.
    pub(super) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let what = Targets::new()
            .with_default(LevelFilter::INFO)
            .with_target(ACCESS, LevelFilter::OFF)
            .with_target(OUTPUT, LevelFilter::OFF);
        self.clone().with_filter(what)
    }

    /// A reader that begins with the oldest note that is kept.
    #[must_use]
    pub fn read(&self) -> Reader {
        Reader { recent: self.clone(), written: self.0.written.subscribe(), read: 0 }
    }

    fn push(&self, note: Note) {
        let mut notes = self.notes();
        if notes.len() == KEPT {
            notes.pop_front();
        }
        notes.push_back(Arc::new(note));
        // Under the lock, so that the count and the notes always agree.
        self.0.written.send_modify(|written| *written += 1);
    }

    fn notes(&self) -> MutexGuard<'_, VecDeque<Arc<Note>>> {
        self.0.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reader {
    /// The notes since the last call, oldest first. Notes that are no longer kept are skipped.
    pub fn unread(&mut self) -> Vec<Arc<Note>> {
        let notes = self.recent.notes();
        let written = *self.written.borrow_and_update();
        let unread = usize::try_from(written - self.read).unwrap_or(usize::MAX);
        self.read = written;
        notes.iter().skip(notes.len().saturating_sub(unread)).cloned().collect()
    }

    /// Returns when there is an unread note. Cancel safe.
    pub async fn changed(&mut self) {
        if self.written.changed().await.is_err() {
            // Unreachable: this reader keeps the sender alive.
            std::future::pending().await
        }
    }
}

impl<S: Subscriber> Layer<S> for Recent {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warn",
            _ => "info",
        };
        let at = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        let mut fields = Fields(Note {
            at,
            level,
            message: String::new(),
            service: None,
            slot: None,
            port: None,
            pid: None,
            text: String::new(),
        });
        event.record(&mut fields);
        self.push(fields.0);
    }
}

struct Fields(Note);

impl Fields {
    fn add(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        use fmt::Write;
        let text = &mut self.0.text;
        let space = if text.is_empty() { "" } else { " " };
        // Writing to a String does not fail.
        let _ = write!(Bounded(text), "{space}{field}={}", printable::line(&value.to_string()));
    }
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "slot" => self.0.slot = Some(value),
            "port" => self.0.port = Some(value),
            _ => self.add(field, format_args!("{value}")),
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        match field.name() {
            "pid" => self.0.pid = Some(value),
            _ => self.add(field, format_args!("{value}")),
        }
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, format_args!("{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, format_args!("{value}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "service" => self.0.service = Some(value.to_owned()),
            _ if value.contains(char::is_whitespace) => {
                self.add(field, format_args!("{value:?}"));
            }
            _ => self.add(field, format_args!("{value}")),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.0.message = format!("{value:?}"),
            "service" => self.0.service = Some(format!("{value:?}")),
            _ => self.add(field, format_args!("{value:?}")),
        }
    }
}

/// Writes as much as fits, and an ellipsis if something is cut off.
struct Bounded<'a>(&'a mut String);

impl fmt::Write for Bounded<'_> {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        let room = LONGEST.saturating_sub(self.0.len());
        if more.len() <= room {
            self.0.push_str(more);
        } else if room > 0 {
            self.0.push_str(&more[..more.floor_char_boundary(room)]);
            self.0.push('…');
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tracing::{debug, error, info, warn};
    use tracing_subscriber::{Registry, layer::SubscriberExt};

    use super::*;

    fn noting(what: impl FnOnce()) -> (Recent, Reader) {
        let recent = Recent::default();
        let reader = recent.read();
        let subscriber = Registry::default().with(recent.layer());
        tracing::subscriber::with_default(subscriber, what);
        (recent, reader)
    }

    #[test]
    fn a_note_has_what_the_line_had() {
        let (_, mut reader) = noting(|| {
            let (service, slot, port, pid) = ("web", 3_u32, Some(9002_u16), Some(17_i32));
            let why: Option<&str> = None;
            warn!(service, slot, port, pid, status = "killed by SIGKILL", why, "worker exited");
            error!(error = %"no such file", path = ?"a b", after = 0.5, "reload refused");
        });
        let [exited, refused] = &reader.unread()[..] else { panic!() };
        assert_eq!((exited.level, &*exited.message), ("warn", "worker exited"));
        assert_eq!(exited.service.as_deref(), Some("web"));
        assert_eq!((exited.slot, exited.port, exited.pid), (Some(3), Some(9002), Some(17)));
        assert_eq!(exited.text, "status=\"killed by SIGKILL\"");
        assert_eq!((refused.level, &*refused.message), ("error", "reload refused"));
        assert_eq!(refused.text, "error=no such file path=\"a b\" after=0.5");
        assert!(refused.service.is_none() && refused.slot.is_none());
    }

    #[test]
    fn a_note_does_nothing_to_who_reads_it() {
        let (_, mut reader) = noting(|| {
            error!(error = %"\u{1b}[2J", line = "x\u{202e}y", "reload refused");
        });
        assert_eq!(reader.unread()[0].text, "error=␛[2J line=x\u{fffd}y");
    }

    #[test]
    fn traffic_and_details_are_left_out() {
        let (_, mut reader) = noting(|| {
            info!(target: ACCESS, "connection");
            info!(target: OUTPUT, "output");
            debug!("detail");
            info!("kept");
        });
        let kept = reader.unread();
        assert_eq!(kept.iter().map(|note| &*note.message).collect::<Vec<_>>(), ["kept"]);
    }

    #[test]
    fn the_last_ones_are_kept_and_each_is_read_once() {
        let (recent, mut reader) = noting(|| {
            for number in 0..KEPT + 5 {
                info!(number, "line");
            }
        });
        let texts: Vec<_> = reader.unread().iter().map(|note| note.text.clone()).collect();
        assert_eq!(texts.len(), KEPT);
        assert_eq!(texts[0], "number=5");
        assert!(reader.unread().is_empty());
        assert_eq!(recent.read().unread().len(), KEPT, "another begins at the oldest");
        tracing::subscriber::with_default(Registry::default().with(recent.layer()), || {
            info!(long = "é".repeat(LONGEST), "line");
        });
        let [note] = &reader.unread()[..] else { panic!() };
        assert!(note.text.len() <= LONGEST + '…'.len_utf8(), "{}", note.text.len());
        assert!(note.text.ends_with("é…"));
    }
}
