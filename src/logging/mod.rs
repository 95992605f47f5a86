//! lbd's own log: one line per event, as `key=value` text or as JSON, to standard error or a file.
//! `docs/log.md` lists all messages and their fields.
//!
//! Lines go through a bounded queue to a thread of their own, so that a full disk or a stuck pipe
//! never delays traffic or supervision. Lines that don't fit are dropped and counted.

mod escaped;
mod journal;
mod queue;
mod recent;
mod rotation;
mod sink;

use std::{
    cell::RefCell,
    fmt::Write as _,
    io::{self, IsTerminal},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    Registry,
    filter::LevelFilter,
    fmt::{self, FormatFields, format, time::SystemTime},
    layer::{Layer, SubscriberExt},
    reload,
};

use crate::{
    config::{Level, Log, LogFormat},
    printable,
};
use escaped::Escaped;
use journal::Prefixed;
pub use journal::complain;
use queue::{Entrance, Held, Way};
pub use recent::{KEPT, Note, Reader, Recent};
use sink::Sink;

/// The log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file can't be written.
    #[error("cannot open the log file {}: {source}", path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The log was set up before.
    #[error("the log is already set up")]
    Twice,
}

/// The running log. Dropping it writes the queued lines, which takes at most about a second.
#[derive(Debug)]
pub struct Logging {
    level: reload::Handle<LevelFilter, Registry>,
    reopen: Arc<AtomicBool>,
    /// Lines that were dropped because the queue was full, or because they could not be written.
    lost: Arc<AtomicUsize>,
    recent: Recent,
    _writer: WorkerGuard,
}

impl Logging {
    /// Opens the log for the whole process. May be called only once.
    ///
    /// # Errors
    /// Where the file can't be opened for appending.
    pub fn start(settings: &Log) -> Result<Self, LogError> {
        let reopen = Arc::new(AtomicBool::new(false));
        let lost = Arc::new(AtomicUsize::new(0));
        let sink = match &settings.file {
            None => Sink::stderr(Arc::clone(&lost)),
            Some(path) => Sink::file(path, settings, Arc::clone(&reopen), Arc::clone(&lost))
                .map_err(|source| LogError::Open { path: path.clone(), source })?,
        };
        let held = Arc::new(Held::default());
        let (queue, guard) = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(queue::LINES)
            .thread_name("lbd-log")
            .finish(Way { out: sink, held: Arc::clone(&held) });
        let writer = Entrance { queue, held, lost: Arc::clone(&lost) };
        let (filter, level) = reload::Layer::new(filter_of(settings.level));
        let lines = layer(settings, writer).with_filter(filter);
        let recent = Recent::default();
        let registry = Registry::default().with(lines).with(recent.layer());
        tracing::subscriber::set_global_default(registry).map_err(|_| LogError::Twice)?;
        Ok(Self { level, reopen, lost, recent, _writer: guard })
    }

    /// Changes the least severe level that is written.
    pub fn set_level(&self, level: Level) {
        // Fails only if the subscriber is gone, and then nothing is logged anyway.
        let _ = self.level.reload(filter_of(level));
    }

    /// Reopens the file before the next line, after somebody has moved it away.
    pub fn reopen(&self) {
        self.reopen.store(true, Ordering::Relaxed);
    }

    /// The last lines, whatever the configured level.
    #[must_use]
    pub fn recent(&self) -> Recent {
        self.recent.clone()
    }

    /// How many lines were dropped so far because the writer was too slow, or could not write.
    #[must_use]
    pub fn dropped_lines(&self) -> usize {
        self.lost.load(Ordering::Relaxed)
    }
}

/// The layer that formats events, depending on `settings` and the target.
fn layer(settings: &Log, writer: Entrance) -> Box<dyn Layer<Registry> + Send + Sync> {
    let on_stderr = settings.file.is_none();
    let in_journal = on_stderr && journal::is_there();
    let lines = fmt::layer().with_target(false).with_writer(writer);
    match settings.format {
        LogFormat::Text => {
            let colours = on_stderr
                && io::stderr().is_terminal()
                && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            let lines = lines.with_ansi(colours).fmt_fields(key_value_fields());
            // The journal adds the time itself.
            if in_journal {
                lines.without_time().map_event_format(Prefixed).boxed()
            } else {
                lines.with_timer(SystemTime).boxed()
            }
        }
        LogFormat::Json => {
            let lines =
                lines.json().flatten_event(true).with_current_span(false).with_span_list(false);
            let lines = lines.map_event_format(Escaped);
            if in_journal { lines.map_event_format(Prefixed).boxed() } else { lines.boxed() }
        }
    }
}

fn filter_of(level: Level) -> LevelFilter {
    match level {
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    }
}

thread_local! {
    static VALUE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// `message key=value …`. A value is quoted only if it would not be a single word otherwise.
fn key_value_fields() -> impl for<'w> FormatFields<'w> + Send + Sync + 'static {
    use tracing_subscriber::field::MakeExt;
    format::debug_fn(|writer, field, value| {
        if field.name() == "message" {
            return write!(writer, "{value:?}");
        }
        VALUE.with_borrow_mut(|text| {
            text.clear();
            write!(text, "{value:?}")?;
            // A recorded &str arrives quoted, a displayed value does not.
            let quoted = text.len() >= 2 && text.starts_with('"') && text.ends_with('"');
            // A worker's line is already sanitised, and may be long.
            if field.name() != "line" && text.contains(printable::is_control) {
                // This is a displayed value, whatever it begins and ends with.
                return write!(writer, "{field}={text:?}");
            }
            let inner = if quoted { &text[1..text.len() - 1] } else { text.as_str() };
            if !quoted && let (true, Ok(number)) = (inner.contains("e-"), inner.parse::<f64>()) {
                // More readable than 5.2e-5 for 52 microseconds.
                return write!(writer, "{field}={number:.6}");
            }
            let one_word = !inner.is_empty()
                && !inner.contains(|c: char| c.is_whitespace() || matches!(c, '"' | '\\' | '='));
            match (one_word, quoted) {
                (true, _) => write!(writer, "{field}={inner}"),
                (false, true) => write!(writer, "{field}={text}"),
                (false, false) => write!(writer, "{field}={text:?}"),
            }
        })
    })
    .delimited(" ")
}

#[cfg(test)]
mod tests {
    use std::{io::Write, sync::Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn text_values_are_quoted_only_where_they_must_be() {
        let memory = Memory::default();
        let writer = memory.clone();
        let lines = fmt::layer()
            .without_time()
            .with_target(false)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .fmt_fields(key_value_fields());
        tracing::subscriber::with_default(Registry::default().with(lines), || {
            tracing::info!(service = "web", slot = 0, client = %"127.0.0.1:5", "connection");
            tracing::info!(line = "two words", error = %"a \"b\" c", empty = "", "output");
            tracing::info!(line = "a=b\nworker started pid=1\u{1b}[31m", took = 0.25, "output");
            tracing::info!(duration = 52.4e-6, service = "1e-5", "connection");
            tracing::info!(error = %"\"a\u{1b}[2J\"", line = "x\u{202e}y", path = %"\u{2066}", "output");
        });
        let text = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().map(str::trim_start).collect();
        assert_eq!(
            lines,
            [
                "INFO connection service=web slot=0 client=127.0.0.1:5",
                r#"INFO output line="two words" error="a \"b\" c" empty="""#,
                r#"INFO output line="a=b\nworker started pid=1\u{1b}[31m" took=0.25"#,
                "INFO connection duration=0.000052 service=1e-5",
                r#"INFO output error="\"a\u{1b}[2J\"" line="x\u{202e}y" path="\u{2066}""#,
            ]
        );
    }

    #[test]
    fn json_values_are_escaped_beyond_what_json_asks_for() {
        let memory = Memory::default();
        let writer = memory.clone();
        let lines = fmt::layer().json().flatten_event(true).with_current_span(false);
        let lines = lines.with_writer(move || writer.clone()).map_event_format(Escaped);
        let foreign = "safe\u{202e}exe\u{7f}\u{9b}\u{1b} é";
        tracing::subscriber::with_default(Registry::default().with(lines), || {
            tracing::info!(line = foreign, "output");
            tracing::info!(line = "\u{7f}", "output");
        });
        let text = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].contains(r#"safe\u202eexe\u007f\u009b\u001b é"#), "{text}");
        let value: serde_json::Value = serde_json::from_str(lines[0]).unwrap();
        assert_eq!(value["line"], foreign);
        assert!(lines[1].contains(r#""\u007f""#) && lines.len() == 2, "{text}");
    }
}
