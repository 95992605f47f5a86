//! Where lines end up. Called by the queue's thread alone.

use std::{
    fmt,
    fs::OpenOptions,
    io::{self, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use tracing::warn;
use tracing_appender::rolling::{RollingFileAppender, Rotation};

use crate::config::{Log, Rotate};

/// Lines are written together, up to this many bytes, or when the queue is empty.
const BATCH: usize = 64 * 1024;

/// How long lines gather after some have been written. A line that comes alone is written at once; of
/// thousands a second each would wake this thread, which costs whoever logs it more than the line.
const PAUSE: Duration = Duration::from_millis(5);

/// Writes lines to standard error or a file. It never fails: a line that can't be written is lost,
/// and counted.
pub(super) struct Sink {
    target: Box<dyn Write + Send>,
    /// Opens the target anew; `None` for standard error.
    open: Option<Opener>,
    reopen: Arc<AtomicBool>,
    lost: Arc<AtomicUsize>,
    batch: Vec<u8>,
    /// The target ends in the middle of a line.
    torn: bool,
}

type Opener = Box<dyn Fn() -> io::Result<Box<dyn Write + Send>> + Send>;

impl Sink {
    /// To standard error. Lost lines are counted in `lost`.
    pub(super) fn stderr(lost: Arc<AtomicUsize>) -> Self {
        Self::new(Box::new(io::stderr()), None, Arc::default(), lost)
    }

    /// To the file that `settings` describe, which is opened anew before the next lines when
    /// `reopen` is set.
    pub(super) fn file(
        path: &Path,
        settings: &Log,
        reopen: Arc<AtomicBool>,
        lost: Arc<AtomicUsize>,
    ) -> io::Result<Self> {
        let open = opener(path, settings);
        Ok(Self::new(open()?, Some(open), reopen, lost))
    }

    fn new(
        target: Box<dyn Write + Send>,
        open: Option<Opener>,
        reopen: Arc<AtomicBool>,
        lost: Arc<AtomicUsize>,
    ) -> Self {
        Self { target, open, reopen, lost, batch: Vec::with_capacity(BATCH), torn: false }
    }

    fn write_batch(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        if let Some(open) = self.open.as_ref().filter(|_| self.reopen.swap(false, Relaxed)) {
            match open() {
                Ok(new) => {
                    self.target = new;
                    self.torn = false;
                }
                // The old one is better than none. This line waits in the queue behind those that
                // are being written.
                Err(error) => warn!(%error, "the log file can't be opened anew"),
            }
        }
        if self.torn {
            self.batch.insert(0, b'\n');
        }
        let mut rest = self.batch.as_slice();
        while !rest.is_empty() {
            match self.target.write(rest) {
                Ok(written @ 1..) => {
                    self.torn = rest[written - 1] != b'\n';
                    rest = &rest[written..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => {
                    let lines = rest.iter().filter(|byte| **byte == b'\n').count();
                    self.lost.fetch_add(lines, Relaxed);
                    break;
                }
            }
        }
        self.batch.clear();
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.batch.extend_from_slice(bytes);
        if self.batch.len() >= BATCH {
            self.write_batch();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let is_some = !self.batch.is_empty();
        self.write_batch();
        let _ = self.target.flush();
        if is_some {
            thread::sleep(PAUSE);
        }
        Ok(())
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sink").field("torn", &self.torn).finish_non_exhaustive()
    }
}

fn opener(path: &Path, settings: &Log) -> Opener {
    let rotation = match settings.rotate {
        Rotate::Never => {
            let path = path.to_owned();
            return Box::new(move || {
                let file = OpenOptions::new().create(true).append(true).open(&path)?;
                Ok(Box::new(file))
            });
        }
        Rotate::Hourly => Rotation::HOURLY,
        Rotate::Daily => Rotation::DAILY,
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut builder = RollingFileAppender::builder().rotation(rotation).filename_prefix(name);
    if let Some(keep) = settings.keep {
        builder = builder.max_log_files(keep.get() as usize);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new(".")).to_owned();
    Box::new(move || {
        let appender = builder.build(&folder).map_err(io::Error::other)?;
        Ok(Box::new(appender))
    })
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        num::NonZeroU32,
        sync::{Mutex, MutexGuard, PoisonError},
    };

    use super::*;

    /// Room for so many bytes.
    #[derive(Clone, Default)]
    struct Disk(Arc<Mutex<(usize, Vec<u8>)>>);

    impl Disk {
        fn inner(&self) -> MutexGuard<'_, (usize, Vec<u8>)> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let (room, content) = &mut *self.inner();
            let fits = bytes.len().min(*room - content.len());
            if fits == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            content.extend_from_slice(&bytes[..fits]);
            Ok(fits)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_full_disk_does_not_take_is_counted_and_later_lines_are_whole() {
        let (disk, lost) = (Disk::default(), Arc::new(AtomicUsize::new(0)));
        let mut sink = Sink::new(Box::new(disk.clone()), None, Arc::default(), Arc::clone(&lost));
        let mut write = |lines: &str, room| {
            disk.inner().0 = room;
            sink.write_all(lines.as_bytes()).unwrap();
            sink.flush().unwrap();
        };
        write("one\n", 100);
        write("two\nthree\nfour\n", 10);
        assert_eq!(lost.load(Relaxed), 2, "three is cut, four has no room");
        write("five\n", 10);
        assert_eq!(lost.load(Relaxed), 3 + 1, "the line break that mends three counts too");
        write("six\n", 100);
        let content = String::from_utf8(disk.inner().1.clone()).unwrap();
        assert_eq!(content, "one\ntwo\nth\nsix\n");
    }

    #[test]
    fn a_file_that_was_moved_away_is_opened_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (path, old) = (folder.path().join("lbd.log"), folder.path().join("old"));
        let reopen = Arc::new(AtomicBool::new(false));
        let (settings, lost) = (Log::default(), Arc::default());
        let mut sink = Sink::file(&path, &settings, Arc::clone(&reopen), lost).unwrap();
        let mut line = |text: &[u8]| {
            sink.write_all(text).unwrap();
            sink.flush().unwrap();
        };
        line(b"one\n");
        fs::rename(&path, &old).unwrap();
        line(b"two\n");
        reopen.store(true, Relaxed);
        line(b"three\n");
        assert_eq!(fs::read_to_string(&old).unwrap(), "one\ntwo\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "three\n");
    }

    #[test]
    fn a_rotated_file_has_the_time_in_its_name_and_can_be_opened_anew() {
        let folder = tempfile::tempdir().unwrap();
        let keep = NonZeroU32::new(2);
        let settings = Log { rotate: Rotate::Daily, keep, ..Log::default() };
        let reopen = Arc::new(AtomicBool::new(false));
        let path = folder.path().join("lbd.log");
        let mut sink = Sink::file(&path, &settings, Arc::clone(&reopen), Arc::default()).unwrap();
        sink.write_all(b"one\n").unwrap();
        sink.flush().unwrap();
        let files = || -> Vec<_> {
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
        };
        let name = files()[0].file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.starts_with("lbd.log.20"), "{name}");
        fs::remove_file(&files()[0]).unwrap();
        reopen.store(true, Relaxed);
        sink.write_all(b"two\n").unwrap();
        sink.flush().unwrap();
        assert_eq!(fs::read_to_string(&files()[0]).unwrap(), "two\n");
    }
}
