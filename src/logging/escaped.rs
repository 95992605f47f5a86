//! JSON log lines without characters that a terminal obeys, or that change the direction of text.

use std::{cell::RefCell, fmt};

use tracing::{Event, Subscriber};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

use crate::printable;

/// Formats lines with `F`, and then also escapes characters that JSON need not escape.
pub(super) struct Escaped<F>(pub(super) F);

thread_local! {
    static LINE: RefCell<String> = const { RefCell::new(String::new()) };
}

impl<S, N, F> FormatEvent<S, N> for Escaped<F>
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
        LINE.with_borrow_mut(|line| {
            line.clear();
            self.0.format_event(context, Writer::new(line), event)?;
            // Most lines are ASCII, where serde_json has escaped everything but DEL. For them the
            // only cost is a scan of the bytes.
            match line.is_ascii() && !line.contains('\x7f') {
                true => writer.write_str(line),
                false => writer.write_str(&printable::json(line)),
            }
        })
    }
}
