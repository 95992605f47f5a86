//! The process that writes a worker's output into a file, where `output` is one.
//!
//! ```text
//! guard ──┬── program … ──pipe──▶ writer ──▶ file
//!         └── writer
//! ```
//!
//! It is forked by the guard and becomes the worker's user before it opens the file: whatever there is
//! at the path, and however the worker changes that, is opened with the worker's own rights, and
//! charged to its quota. It can wait for a slow disk as long as it takes, for it holds up nobody but
//! the worker, which waits too once the pipe is full: nothing is dropped. lbd could not replace a
//! descriptor that the program holds; this can, so that the file can be moved away and opened anew.
//!
//! It ends when nobody can write to the pipe any more and all of it is written, also after a SIGKILL of
//! lbd. It is not in the worker's cgroup, nor in a process group of its own, which tells it from the
//! worker's processes.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Read as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::{
    fcntl::OFlag,
    libc,
    poll::{PollFd, PollFlags, poll},
    sys::{prctl, stat::Mode, stat::umask},
    unistd::{ForkResult, Pid, dup2_stdin, fork},
};
use thiserror::Error;

use super::{
    channel::{Description, Order, Package, hear, pair, poll_timeout, tell},
    exec::{ExecError, aside, identity, words},
};

/// What a pipe holds (pipe(7)), so what one read finds at most.
const BUFFER: usize = 64 * 1024;

/// How long the rest of a line is waited for. Files that several workers write to so have whole lines.
const LINE: Duration = Duration::from_millis(20);

/// Between two attempts to write to a disk that is full.
const RETRY: Duration = Duration::from_millis(200);

/// Between two complaints.
const SILENCE: Duration = Duration::from_secs(10);

/// Why the file is not written to, as one sentence.
#[derive(Debug, Error)]
enum WriterError {
    #[error("{0}")]
    User(#[from] ExecError),
    #[error("cannot read where its output goes: {0}")]
    Description(io::Error),
    #[error("cannot open its output {0:?}{whom}: {cause}", whom = as_whom(.1), cause = why(.2))]
    Open(PathBuf, Option<String>, io::Error),
    #[error(
        "cannot open its output {0:?}: it is a symbolic link, and none is followed; name the file itself"
    )]
    Link(PathBuf),
    #[error("cannot open its output {0:?}: it is not a regular file; expected one, or nothing")]
    NotRegular(PathBuf),
    #[error("cannot write its output to {0:?}: {cause}; the worker waits", cause = why(.1))]
    Write(PathBuf, io::Error),
}

/// The guard's side of a writer.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) pid: Pid,
    /// To be told to open the file anew; and what it complains about.
    pub(super) channel: OwnedFd,
}

/// What the program waits for before it runs: that its writer has opened the file.
#[derive(Debug)]
pub(super) struct Opened(File);

impl Writer {
    /// Forks a writer where the package has something for one to read. To be called before the program
    /// is forked.
    pub(super) fn fork(mut package: Package) -> io::Result<(Package, Option<(Self, Opened)>)> {
        let Some(reader) = package.reader.take() else { return Ok((package, None)) };
        let (channel, theirs) = pair()?;
        let (opened, announce) = io::pipe()?;
        // SAFETY: this process has one thread, so the child may do whatever it could.
        match unsafe { fork() }? {
            ForkResult::Child => {
                // What the program has would not end as long as this process has it too, and the
                // guard's way to lbd (standard input) would not as well.
                let description = package.into_description();
                drop((channel, opened));
                let file = File::open("/dev/null").and_then(|null| Ok(dup2_stdin(null)?));
                let write = file
                    .map_err(WriterError::Description)
                    .and_then(|()| Output::open(&description));
                let mut announce = File::from(OwnedFd::from(announce));
                let status = match write {
                    Ok(output) => {
                        let _ = announce.write_all(&[0]);
                        drop(announce);
                        copy(output, File::from(reader), Some(theirs));
                        0
                    }
                    Err(error) => {
                        let _ = announce.write_all(error.to_string().as_bytes());
                        1
                    }
                };
                // SAFETY: ends this process at once, without what the guard has set up to run at its
                // own exit.
                unsafe { libc::_exit(status) }
            }
            ForkResult::Parent { child } => {
                let opened = Opened(File::from(OwnedFd::from(opened)));
                Ok((package, Some((Self { pid: child, channel }, opened))))
            }
        }
    }

    /// Has the file opened anew.
    pub(super) fn reopen(&self) {
        // An error says that it has ended.
        let _ = tell(&self.channel, &Order::Reopen);
    }
}

impl Opened {
    /// The same, where none of the program's descriptors is to be.
    pub(super) fn aside(self) -> nix::Result<Self> {
        Ok(Self(File::from(aside(&self.0)?)))
    }

    /// Until the file is open; or why it is not.
    pub(super) fn wait(mut self) -> Result<(), String> {
        let mut outcome = Vec::new();
        match self.0.read_to_end(&mut outcome) {
            Ok(_) if outcome == [0] => Ok(()),
            Ok(1..) => Err(String::from_utf8_lossy(&outcome).into_owned()),
            Ok(0) | Err(_) => Err("the process that writes its output has ended".to_owned()),
        }
    }
}

/// The open file, and where it is.
#[derive(Debug)]
struct Output {
    file: File,
    path: PathBuf,
    user: Option<String>,
}

impl Output {
    /// Becomes the worker's user for good, and opens the file.
    fn open(description: &File) -> Result<Self, WriterError> {
        let mut what = Description::read(description).map_err(WriterError::Description)?;
        let _ = prctl::set_name(c"lbd-output");
        if let Some(mask) = what.umask {
            umask(Mode::from_bits_truncate(mask));
        }
        identity(what.user.as_deref(), what.group.as_deref(), &mut what.env)?;
        let path = PathBuf::from(what.output.take().unwrap_or_default());
        let file = open(&path, what.user.as_deref())?;
        Ok(Self { file, path, user: what.user })
    }

    fn reopen(&mut self) -> Result<(), WriterError> {
        self.file = open(&self.path, self.user.as_deref())?;
        Ok(())
    }
}

/// Opens or makes a regular file, and nothing else: a link is not followed, and a FIFO not waited for.
fn open(path: &PathBuf, user: Option<&str>) -> Result<File, WriterError> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let opened = OpenOptions::new().append(true).create(true).custom_flags(flags.bits()).open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP) => WriterError::Link(path.clone()),
        // A FIFO that nobody reads, or a socket (open(2)).
        Some(libc::ENXIO) => WriterError::NotRegular(path.clone()),
        _ => WriterError::Open(path.clone(), user.map(str::to_owned), error),
    })?;
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(file),
        Ok(_) => Err(WriterError::NotRegular(path.clone())),
        Err(error) => Err(WriterError::Open(path.clone(), user.map(str::to_owned), error)),
    }
}

/// Writes what comes from `reader` until it ends. Without a `channel`, the guard has ended.
fn copy(mut output: Output, mut reader: File, mut channel: Option<OwnedFd>) {
    let mut pending = Vec::with_capacity(2 * BUFFER);
    // Until then the rest of the last line is waited for; and then, where none came, not any more.
    let mut flush_at: Option<Instant> = None;
    let mut flush = false;
    let mut complained: Option<Instant> = None;
    let mut ended = false;
    loop {
        let whole = pending.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let all = ended || flush || whole == 0 && pending.len() >= BUFFER;
        let ready = if all { pending.len() } else { whole };
        let mut failed = false;
        if ready > 0 {
            match output.file.write(&pending[..ready]) {
                Ok(written @ 1..) => drop(pending.drain(..written)),
                Ok(0) => failed = true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    failed = true;
                    if complained.is_none_or(|at| at.elapsed() >= SILENCE) {
                        complained = Some(Instant::now());
                        complain(channel.as_ref(), &WriterError::Write(output.path.clone(), error));
                    }
                    if ended && channel.is_none() {
                        return;
                    }
                }
            }
        }
        if ready == 0 && ended {
            return;
        }
        if pending.is_empty() {
            (flush_at, flush) = (None, false);
        }
        // Nothing is read while something can be written: that is how the worker is made to wait.
        let timeout = match (failed, ready > 0) {
            (true, _) => Some(RETRY),
            (false, true) => Some(Duration::ZERO),
            (false, false) => flush_at.map(|at| at.saturating_duration_since(Instant::now())),
        };
        let wants_more = ready == 0 && !ended;
        let (readable, ordered) = wait(wants_more.then_some(&reader), channel.as_ref(), timeout);
        if ordered && let Some(guard) = &channel {
            match hear::<Order>(guard) {
                Ok(Some(_)) => {
                    if let Err(error) = output.reopen() {
                        complain(channel.as_ref(), &error);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Ok(None) | Err(_) => channel = None,
            }
        }
        flush |= wants_more && !readable && flush_at.is_some_and(|at| at <= Instant::now());
        if readable {
            let before = pending.len();
            pending.resize(before + BUFFER, 0);
            let read = reader.read(&mut pending[before..]);
            pending.truncate(before + *read.as_ref().unwrap_or(&0));
            let begins_a_line = pending[before..].contains(&b'\n');
            match read {
                Ok(0) => ended = true,
                Ok(_) if begins_a_line || flush_at.is_none() => {
                    flush_at = Some(Instant::now() + LINE);
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => ended = true,
            }
        }
    }
}

/// Whether there is something to read, and an order.
fn wait(
    reader: Option<&File>,
    channel: Option<&OwnedFd>,
    timeout: Option<Duration>,
) -> (bool, bool) {
    let mut fds = Vec::with_capacity(2);
    fds.extend(reader.map(|reader| PollFd::new(reader.as_fd(), PollFlags::POLLIN)));
    fds.extend(channel.map(|channel| PollFd::new(channel.as_fd(), PollFlags::POLLIN)));
    let _ = poll(&mut fds, poll_timeout(timeout));
    // An error or an end is something to be read, too.
    let mut is_ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
    let readable = reader.is_some() && is_ready.next().unwrap_or(false);
    (readable, channel.is_some() && is_ready.next().unwrap_or(false))
}

fn complain(channel: Option<&OwnedFd>, error: &WriterError) {
    if let Some(channel) = channel {
        // An error says that the guard has ended, or does not listen.
        let _ = tell(channel, &error.to_string());
    }
}

fn as_whom(user: &Option<String>) -> String {
    user.as_ref().map(|user| format!(" as the user {user:?}")).unwrap_or_default()
}

/// The kernel's reason, as part of a sentence.
fn why(error: &io::Error) -> String {
    let errno = error.raw_os_error().map(nix::errno::Errno::from_raw);
    errno.map_or_else(|| error.to_string(), words)
}
