//! `lbd status --watch`: shows the status again each second until the user ends it. If the daemon
//! goes away, waits for it to come back.

use std::{
    borrow::Cow,
    env,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use nix::libc::{SIGHUP, SIGINT, SIGTERM, SIGTSTP, SIGWINCH};
use signal_hook::low_level::emulate_default_handler;
use signal_hook_tokio::Signals;
use tokio::time::{MissedTickBehavior, interval};

use super::{
    Error,
    operate::{Target, print_as_is},
    overview::{View, render, span},
    table::{cut, styled_width},
};
use crate::{admin::Status, printable};

/// The time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Shows the status until a signal ends it, which is the normal way to end.
///
/// # Errors
///
/// If there is no daemon at the start, or printing fails.
pub(super) async fn watch(target: &Target, json: bool) -> Result<(), Error> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGTSTP, SIGWINCH])?;
    let mut seen = Seen::new(target.look().await?.status().await?);
    let mut clock = interval(INTERVAL);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    clock.tick().await;
    let mut output = Output::new(json)?;
    loop {
        output.show(&seen)?;
        let mut next = std::pin::pin!(async {
            clock.tick().await;
            look(target).await
        });
        loop {
            tokio::select! {
                result = &mut next => {
                    seen.take_in(result);
                    break;
                }
                signal = signals.next() => match signal {
                    Some(SIGWINCH) => output.redraw(&seen)?,
                    Some(SIGTSTP) => {
                        output.suspended(|| emulate_default_handler(SIGTSTP))?;
                        output.redraw(&seen)?;
                    }
                    _ => return Ok(()),
                },
            }
        }
    }
}

/// Finds the daemon anew each time: after a restart it may be another process, elsewhere.
async fn look(target: &Target) -> Result<Status, Error> {
    Ok(target.find().await?.status().await?)
}

/// What is known of the daemon.
struct Seen {
    status: Status,
    at: Instant,
    /// The status before the last one.
    earlier: Option<Status>,
    /// Why the last look failed.
    trouble: Option<String>,
}

impl Seen {
    fn new(status: Status) -> Self {
        Self { status, at: Instant::now(), earlier: None, trouble: None }
    }

    fn take_in(&mut self, result: Result<Status, Error>) {
        match result {
            Ok(status) => {
                self.earlier = Some(std::mem::replace(&mut self.status, status));
                self.at = Instant::now();
                self.trouble = None;
            }
            Err(error) => {
                let trouble = error.to_string();
                let line = trouble.lines().next().unwrap_or_default();
                self.trouble = Some(printable::line(line).into_owned());
            }
        }
    }

    fn shown(&self, view: View) -> String {
        render(&self.status, self.earlier.as_ref(), view)
    }
}

/// Where the output goes.
enum Output {
    /// One line of JSON per look.
    Json { told: Told },
    /// One table after another.
    Text { told: Told },
    /// Redrawn in place.
    Screen(Screen),
}

/// What has already been printed about a failure, so that it is printed only once.
type Told = Option<String>;

impl Output {
    fn new(json: bool) -> io::Result<Self> {
        Ok(match json {
            true => Self::Json { told: None },
            false if obeys() => Self::Screen(Screen::enter()?),
            false => Self::Text { told: None },
        })
    }

    fn show(&mut self, seen: &Seen) -> Result<(), Error> {
        match self {
            Self::Screen(screen) => Ok(screen.draw(seen)?),
            Self::Json { told } | Self::Text { told } if seen.trouble.is_some() => {
                if *told != seen.trouble {
                    told.clone_from(&seen.trouble);
                    let _ = writeln!(io::stderr(), "{}", told.as_deref().unwrap_or_default());
                }
                Ok(())
            }
            Self::Json { told } => {
                *told = None;
                let line = serde_json::to_string(&seen.status).map_err(io::Error::from)?;
                print_as_is(&(printable::json(&line).into_owned() + "\n"))
            }
            Self::Text { told } => {
                *told = None;
                print_as_is(&(seen.shown(view()) + "\n"))
            }
        }
    }

    /// Redraws the last status on a screen. Prints nothing to other outputs.
    fn redraw(&mut self, seen: &Seen) -> Result<(), Error> {
        match self {
            Self::Screen(screen) => Ok(screen.draw(seen)?),
            Self::Json { .. } | Self::Text { .. } => Ok(()),
        }
    }

    /// Restores the terminal while this process is suspended.
    fn suspended(&mut self, stop: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        match self {
            Self::Screen(_) => {
                Screen::leave()?;
                stop()?;
                Screen::begin()
            }
            Self::Json { .. } | Self::Text { .. } => stop(),
        }
    }
}

/// How to display the status on standard output.
pub(super) fn view() -> View {
    let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    View { width: size().map(|(width, _)| width), colour: obeys() && !is_set("NO_COLOR") }
}

/// Whether standard output is a terminal that obeys control sequences.
fn obeys() -> bool {
    io::stdout().is_terminal() && env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// The columns and rows of standard output.
fn size() -> Option<(usize, usize)> {
    let (width, height) = terminal_size::terminal_size_of(io::stdout())?;
    Some((width.0.into(), height.0.into()))
}

/// The terminal's alternate screen (xterm's control sequences, which all current terminals have).
/// Dropping it restores the previous content.
struct Screen(());

impl Screen {
    fn enter() -> io::Result<Self> {
        Self::begin()?;
        Ok(Self(()))
    }

    /// Switches to the alternate screen, hides the cursor, and turns off line wrapping.
    fn begin() -> io::Result<()> {
        write("\x1b[?1049h\x1b[?25l\x1b[?7l")
    }

    fn leave() -> io::Result<()> {
        write("\x1b[?7h\x1b[?25h\x1b[?1049l")
    }

    fn draw(&self, seen: &Seen) -> io::Result<()> {
        let (width, height) = size().unwrap_or((80, 24));
        let mut text = String::new();
        let mut view = view();
        if let Some(trouble) = &seen.trouble {
            // The last status stays visible, but is out of date.
            let since = span(seen.at.elapsed().as_secs_f64());
            let trouble = cut(&format!("{trouble}; waiting for it since {since}"), width);
            text = match view.colour {
                true => format!("\x1b[31m{trouble}\x1b[0m\n"),
                false => trouble + "\n",
            };
            view.colour = false;
        }
        text += &seen.shown(view);
        write(&frame(&text, width, height))
    }
}

/// Draws `text` on a screen of this size, over whatever is on it (ECMA-48). Each line is
/// overwritten first, and then the rest of it is erased, so that nothing flickers.
fn frame(text: &str, width: usize, height: usize) -> String {
    let mut lines: Vec<_> = text.lines().map(Cow::Borrowed).collect();
    if lines.len() > height {
        let more = lines.len() - height.saturating_sub(1);
        lines.truncate(height.saturating_sub(1));
        lines.push(cut(&format!("… and {more} more lines"), width).into());
    }
    let mut frame = "\x1b[H".to_owned();
    for (row, line) in lines.iter().enumerate() {
        frame += if row > 0 { "\r\n" } else { "" };
        frame += line;
        // After the last column the cursor is still on that column: erasing from there would erase
        // the character.
        frame += if styled_width(line) < width { "\x1b[K" } else { "" };
    }
    frame += if lines.len() < height { "\r\n\x1b[J" } else { "" };
    frame
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = Self::leave();
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_fills_the_screen_is_left_whole() {
        let text = "\x1b[31mabcd\x1b[0m\nab\n";
        let top = "\x1b[H\x1b[31mabcd\x1b[0m";
        assert_eq!(frame(text, 4, 3), format!("{top}\r\nab\x1b[K\r\n\x1b[J"));
        assert_eq!(frame(text, 4, 2), format!("{top}\r\nab\x1b[K"), "nothing is below");
        assert_eq!(frame(text, 20, 1), "\x1b[H… and 2 more lines\x1b[K");
        assert_eq!(frame("é日", 3, 1), "\x1b[Hé日");
    }
}
