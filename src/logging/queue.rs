//! The limit of the log's queue: in bytes, because lines can have any length.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use tracing_appender::non_blocking::NonBlocking;
use tracing_subscriber::fmt::MakeWriter;

/// The most lines that may wait for a slow writer …
pub(super) const LINES: usize = 4096;
/// … and the most bytes in them.
const BYTES: usize = 8 * 1024 * 1024;

/// The size of the queue's content. A short line counts as longer than it is, so that the byte
/// limit bounds the number of lines too: the queue itself never gets full.
#[derive(Debug, Default)]
pub(super) struct Held(AtomicUsize);

impl Held {
    fn cost(line: &[u8]) -> usize {
        line.len().max(BYTES / LINES)
    }

    /// Whether there is room for `line`. If so, its size is added.
    fn admits(&self, line: &[u8]) -> bool {
        let more = |held| Some(held + Self::cost(line)).filter(|held| *held <= BYTES);
        self.0.fetch_update(Relaxed, Relaxed, more).is_ok()
    }

    fn release(&self, line: &[u8]) {
        self.0.fetch_sub(Self::cost(line), Relaxed);
    }
}

/// The sending end of the queue. Each write is one line. Lines that don't fit are counted.
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

/// The receiving end of the queue. Each call writes one line.
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
