//! The bound of the queue: in bytes, as lines are of any length.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use tracing_appender::non_blocking::NonBlocking;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait for a slow writer …
pub(super) const LINES: usize = 4096;
/// … and what they may hold together, in bytes.
const BYTES: usize = 8 * 1024 * 1024;

/// What the queue holds. A short line counts as more, so that the lines in it are bounded as well:
/// the queue itself is never full.
#[derive(Debug, Default)]
pub(super) struct Held(AtomicUsize);

impl Held {
    fn cost(line: &[u8]) -> usize {
        line.len().max(BYTES / LINES)
    }

    /// Whether there is room for `line`, which then is taken.
    fn admits(&self, line: &[u8]) -> bool {
        let more = |held| Some(held + Self::cost(line)).filter(|held| *held <= BYTES);
        self.0.fetch_update(Relaxed, Relaxed, more).is_ok()
    }

    fn release(&self, line: &[u8]) {
        self.0.fetch_sub(Self::cost(line), Relaxed);
    }
}

/// Where lines enter the queue; each is written at once. What there is no room for is counted.
#[derive(Debug, Clone)]
pub(super) struct Entrance {
    pub(super) queue: NonBlocking,
    pub(super) held: Arc<Held>,
    pub(super) lost: Arc<AtomicUsize>,
}

impl Write for Entrance {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.held.admits(line) {
            return self.queue.write(line);
        }
        self.lost.fetch_add(1, Relaxed);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Entrance {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Where they leave it, each in one call.
#[derive(Debug)]
pub(super) struct Way<W> {
    pub(super) out: W,
    pub(super) held: Arc<Held>,
}

impl<W: Write> Write for Way<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.held.release(line);
        self.out.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_bytes_are_bounded() {
        for (length, fit) in [(1, LINES), (200, LINES), (16 * 1024, BYTES / (16 * 1024))] {
            let (held, line) = (Held::default(), vec![b'x'; length]);
            assert_eq!((0..2 * LINES).filter(|_| held.admits(&line)).count(), fit, "{length}");
            held.release(&line);
            assert!(held.admits(&line) && !held.admits(&line));
        }
    }
}
