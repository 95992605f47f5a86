//! Progress display on a terminal while a command waits.

use std::{io, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::interval;

use crate::printable;

/// How often a waiting command checks the progress.
pub(super) const INTERVAL: Duration = Duration::from_millis(200);

/// One line on standard error, removed at the end; nothing if standard error is no terminal.
pub(super) struct Bar(ProgressBar);

/// The progress of something.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// How much is done, and of how much, if that is known.
    pub(super) done: Option<(u64, u64)>,
    /// What is in progress.
    pub(super) now: String,
}

impl Bar {
    pub(super) fn new(what: &str) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(style("{spinner} {prefix} {wide_msg}"));
        bar.set_prefix(printable::line(what).into_owned());
        bar.enable_steady_tick(INTERVAL);
        Self(bar)
    }

    /// Waits for `done`, and shows the progress that `progress` reports.
    pub(super) async fn during<T>(
        &self,
        done: impl Future<Output = T>,
        progress: impl AsyncFn() -> Option<Progress>,
    ) -> T {
        let mut done = std::pin::pin!(done);
        if self.0.is_hidden() {
            return done.await;
        }
        let mut clock = interval(INTERVAL);
        loop {
            tokio::select! {
                done = &mut done => return done,
                _ = clock.tick() => {
                    // The daemon may answer slowly: the end of the wait must not be delayed by
                    // that.
                    tokio::select! {
                        biased;
                        done = &mut done => return done,
                        progress = progress() => progress.into_iter().for_each(|p| self.show(p)),
                    }
                }
            }
        }
    }

    pub(super) fn show(&self, progress: Progress) {
        if let Some((position, length)) = progress.done {
            if self.0.length().is_none() {
                let bar = style("{spinner} {prefix} [{bar:24}] {pos}/{len} {wide_msg}");
                self.0.set_style(bar.progress_chars("=> "));
            }
            self.0.set_length(length);
            self.0.set_position(position);
        }
        self.0.set_message(printable::line(&progress.now).into_owned());
    }

    /// Prints a line that stays, above the progress line.
    pub(super) fn note(&self, text: &str) {
        self.0.suspend(|| {
            let _ = io::Write::write_all(&mut io::stderr(), text.as_bytes());
        });
    }
}

/// The templates are known to be valid.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
