//! Lines for systemd's journal: each begins with its level (sd-daemon(3)), which journald strips.

use std::{
    env,
    fmt::{self, Display},
    io::{self, Write as _},
    os::fd::AsFd,
};

use nix::sys::stat::fstat;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

use crate::printable;

/// Whether standard error goes to the journal. systemd names the journal's file (systemd.exec(5),
/// `$JOURNAL_STREAM`), but standard error may have been redirected since.
pub(super) fn is_there() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    fstat(io::stderr().as_fd()).is_ok_and(|file| names(&stream, file.st_dev, file.st_ino))
}

/// Whether `stream` is the `DEVICE:INODE` of this file.
fn names(stream: &str, device: u64, inode: u64) -> bool {
    let parts = stream.split_once(':');
    parts.is_some_and(|(d, i)| d.parse() == Ok(device) && i.parse() == Ok(inode))
}

/// Writes to standard error why lbd can't run, in the journal with level error. Characters that a
/// terminal obeys are replaced. A failed write is ignored.
pub fn complain(why: &impl Display) {
    let mut text = printable::lines(&why.to_string()).into_owned();
    if is_there() {
        let prefix = Prefix(Level::ERROR);
        text = text.lines().map(|line| format!("{prefix}{line}\n")).collect();
    } else {
        text.push('\n');
    }
    let _ = io::stderr().write_all(text.as_bytes());
}

/// A syslog level in angle brackets.
struct Prefix(Level);

impl Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Level::ERROR => "<3>",
            Level::WARN => "<4>",
            Level::INFO => "<6>",
            _ => "<7>",
        })
    }
}

/// Formats lines with `F`, and prefixes each with its level.
pub(super) struct Prefixed<F>(pub(super) F);

impl<S, N, F> FormatEvent<S, N> for Prefixed<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "{}", Prefix(*event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_known_by_its_device_and_inode() {
        assert!(names("8:12345", 8, 12345));
        for other in ["8:1234", "9:12345", "8", "", ":", "8:", "8:12345:1", "12345:8", "x:y"] {
            assert!(!names(other, 8, 12345), "{other}");
        }
    }
}
