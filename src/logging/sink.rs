//! Writes log lines to their target. Used only by the queue's thread.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl, readlinkat},
    libc,
    unistd::geteuid,
};
use tracing::warn;

use super::rotation::{Period, prune};
use crate::config::{Log, Rotate};

/// Lines are written in batches: up to this many bytes, or until the queue is empty.
const BATCH: usize = 64 * 1024;

/// How long lines are collected after a batch was written. A single line is written at once. If
/// there are thousands per second, waking this thread for each would cost the logging thread more
/// than the line itself.
const PAUSE: Duration = Duration::from_millis(5);

/// How long to wait before trying again to begin a new file.
const RETRY: Duration = Duration::from_secs(60);

/// Writes lines to standard error or a file. Never fails: a line that can't be written is lost and
/// counted.
pub(super) struct Sink {
    target: Box<dyn Write + Send>,
    /// The target's path and rotation; `None` for standard error.
    place: Option<LogPlace>,
    reopen: Arc<AtomicBool>,
    lost: Arc<AtomicUsize>,
    batch: Vec<u8>,
    /// The target ends in the middle of a line.
    torn: bool,
}

/// The file, or series of files, that lines go to.
struct LogPlace {
    path: PathBuf,
    /// How often a new file is begun, and the period of the file that is open.
    rotation: Option<(Period, u64)>,
    /// The most files to keep.
    keep: Option<usize>,
    /// When beginning a new file may be tried again.
    retry_at: Option<Instant>,
}

impl Sink {
    /// Writes to standard error. Counts lost lines in `lost`.
    pub(super) fn stderr(lost: Arc<AtomicUsize>) -> Self {
        Self::new(Box::new(io::stderr()), None, Arc::default(), lost)
    }

    /// Writes to the file that `settings` describes. Reopens it before the next lines when `reopen`
    /// is set.
    pub(super) fn file(
        path: &Path,
        settings: &Log,
        reopen: Arc<AtomicBool>,
        lost: Arc<AtomicUsize>,
    ) -> io::Result<Self> {
        let period = match settings.rotate {
            Rotate::Never => None,
            Rotate::Hourly => Some(Period::Hour),
            Rotate::Daily => Some(Period::Day),
        };
        let mut place = LogPlace {
            path: path.to_owned(),
            rotation: period.map(|period| (period, 0)),
            keep: settings.keep.map(|keep| keep.get() as usize),
            retry_at: None,
        };
        let file = place.open(SystemTime::now())?;
        Ok(Self::new(Box::new(file), Some(place), reopen, lost))
    }

    fn new(
        target: Box<dyn Write + Send>,
        place: Option<LogPlace>,
        reopen: Arc<AtomicBool>,
        lost: Arc<AtomicUsize>,
    ) -> Self {
        Self { target, place, reopen, lost, batch: Vec::with_capacity(BATCH), torn: false }
    }

    /// Reopens the file if that was requested, and begins the next one when it is time.
    fn renew(&mut self, now: SystemTime) {
        let Some(place) = &mut self.place else { return };
        let asked = self.reopen.swap(false, Relaxed);
        if !asked && !place.is_over(now) {
            return;
        }
        match place.open(now) {
            Ok(new) => {
                self.target = Box::new(new);
                self.torn = false;
            }
            // Continue with the old file. This line goes into the queue, behind those that are
            // being written.
            Err(error) => {
                place.retry_at = Some(Instant::now() + RETRY);
                let path = place.path.display();
                warn!(%path, %error, "the log file can't be opened anew");
            }
        }
    }

    fn write_batch(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        self.renew(SystemTime::now());
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

impl LogPlace {
    /// Whether the period of the open file is over.
    fn is_over(&self, now: SystemTime) -> bool {
        self.rotation.is_some_and(|(period, current)| period.of(now) != current)
            && self.retry_at.is_none_or(|at| Instant::now() >= at)
    }

    /// Opens the file for lines that are written now, and removes old files beyond the limit.
    fn open(&mut self, now: SystemTime) -> io::Result<File> {
        let Some((period, current)) = &mut self.rotation else { return append(&self.path) };
        let number = period.of(now);
        let path = period.file(&self.path, number);
        let file = append(&path)?;
        *current = number;
        self.retry_at = None;
        if let Some(keep) = self.keep
            && let Err(error) = prune(&self.path, keep, &path)
        {
            let path = self.path.display();
            warn!(%path, %error, "old log files can't be removed");
        }
        Ok(file)
    }
}

/// Opens a log file for appending, and creates it if it is missing. Does not follow a link, because
/// another user may have made it so that lbd writes where that user may not. Does not wait for the
/// other end of a pipe (open(2), fifo(7)).
fn append(path: &Path) -> io::Result<File> {
    let open = |path: &Path, is_new: bool| {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        OpenOptions::new().create(is_new).append(true).custom_flags(flags).open(path)
    };
    let mut is_behind_a_link = false;
    let opened = match open(path, true) {
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            is_behind_a_link = true;
            let device = device_behind(path).map(|device| open(&device, false));
            device.unwrap_or_else(|| Err(io::Error::other(A_LINK)))
        }
        opened => opened,
    };
    let file = opened.map_err(|error| match error.raw_os_error() {
        // A pipe without a reader, or a socket (open(2)).
        Some(libc::ENXIO) => io::Error::other(NOT_A_FILE),
        _ => error,
    })?;
    let kind = file.metadata()?.file_type();
    // Only root can create a device.
    if !kind.is_char_device() && (is_behind_a_link || !kind.is_file()) {
        return Err(io::Error::other(NOT_A_FILE));
    }
    if kind.is_char_device() {
        // A terminal accepts lines at its own speed, so writes to it must block.
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    }
    Ok(file)
}

/// The device that a link leads to, if root or lbd's own user made the link. Containers often
/// redirect a log like that.
fn device_behind(path: &Path) -> Option<PathBuf> {
    // Opened without following (O_PATH, open(2)), so that the link that is checked is the link that
    // is read.
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    let link = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    let is_trusted = [0, geteuid().as_raw()].contains(&link.metadata().ok()?.uid());
    let to = PathBuf::from(readlinkat(&link, "").ok()?);
    let to = path.parent().unwrap_or(path).join(to);
    let is_device = fs::symlink_metadata(&to).is_ok_and(|found| found.file_type().is_char_device());
    (is_trusted && is_device).then_some(to)
}

const A_LINK: &str =
    "it is a link; write the path that it leads to, or leave out `file` for standard error";
const NOT_A_FILE: &str = "it is not a regular file; expected one, or the path of a new one";

#[cfg(test)]
mod tests {
    use std::{
        num::NonZeroU32,
        os::unix::fs::symlink,
        sync::{Mutex, MutexGuard, PoisonError},
    };

    use nix::{sys::stat::Mode, unistd::mkfifo};

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

    #[test]
    fn a_new_day_begins_a_new_file_and_old_ones_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lbd.log");
        let settings = Log { rotate: Rotate::Daily, keep: NonZeroU32::new(2), ..Log::default() };
        let mut sink = Sink::file(&path, &settings, Arc::default(), Arc::default()).unwrap();
        fs::write(folder.path().join("lbd.log.important"), "").unwrap();
        let day = Duration::from_secs(24 * 3600);
        let today = SystemTime::now();
        let mut write = |days: u32, line: &str| {
            sink.renew(today + days * day);
            sink.target.write_all(line.as_bytes()).unwrap();
        };
        for (days, line) in [(0, "a\n"), (0, "b\n"), (1, "c\n"), (2, "d\n"), (2, "e\n")] {
            write(days, line);
        }
        let file = |days: u32| Period::Day.file(&path, Period::Day.of(today + days * day));
        let read = |days| fs::read_to_string(file(days)).ok();
        assert_eq!([0, 1, 2].map(read), [None, Some("c\n".into()), Some("d\ne\n".into())]);
        assert!(folder.path().join("lbd.log.important").exists());
        // One that can't be opened is let be for a while: the last one is written on.
        mkfifo(&file(3), Mode::from_bits_truncate(0o600)).unwrap();
        write(3, "f\n");
        fs::remove_file(file(3)).unwrap();
        write(3, "g\n");
        assert_eq!(read(2).as_deref(), Some("d\ne\nf\ng\n"));
    }

    #[test]
    fn only_a_file_of_its_own_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let open = |name: &str| append(&path(name)).map(drop).map_err(|error| error.to_string());
        assert_eq!(open("new"), Ok(()));
        symlink(path("elsewhere"), path("link")).unwrap();
        symlink(path("new"), path("other")).unwrap();
        for link in ["link", "other"] {
            let error = open(link).unwrap_err();
            assert!(error.starts_with("it is a link; write the path"), "{error}");
        }
        assert!(!path("elsewhere").exists());
        mkfifo(&path("pipe"), Mode::from_bits_truncate(0o600)).unwrap();
        assert_eq!(open("pipe"), Err(NOT_A_FILE.to_owned()));
        // Also where somebody reads it.
        let reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path("pipe"))
            .unwrap();
        assert_eq!(open("pipe"), Err(NOT_A_FILE.to_owned()));
        drop(reader);
        drop(std::os::unix::net::UnixListener::bind(path("socket")).unwrap());
        assert_eq!(open("socket"), Err(NOT_A_FILE.to_owned()));
        symlink("/dev/full", path("full")).unwrap();
        symlink("full", path("twice")).unwrap();
        assert_eq!(append(Path::new("/dev/full")).map(drop).ok(), Some(()));
        assert_eq!(open("full"), Ok(()), "of whoever runs this");
        assert_eq!(open("twice"), Err(A_LINK.to_owned()));
        if geteuid().is_root() {
            std::os::unix::fs::lchown(path("full"), Some(65534), None).unwrap();
            assert_eq!(open("full"), Err(A_LINK.to_owned()), "of somebody else");
        }
    }
}
