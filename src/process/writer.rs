//! The process that writes a worker's output to a file, if `output` is a path.
//!
//! ```text
//! guard ──┬── program … ──pipe──▶ writer ──▶ file
//!         └── writer
//! ```
//!
//! The guard forks the writer, and the writer becomes the worker's user before it opens the file.
//! So whatever is at the path, and however the worker changes it, is opened with the worker's own
//! rights and charged to its quota. The writer may wait for a slow disk as long as needed: it
//! delays only the worker, which blocks once the pipe is full. No output is dropped. lbd could not
//! replace a descriptor that the program holds, but the writer can reopen the file, so log rotation
//! can move it away.
//!
//! The writer ends when nobody can write to the pipe any more and all output is written, also after
//! a SIGKILL of lbd. It is not in the worker's cgroup, and it stays in the guard's process group,
//! which tells it from the worker's processes.

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

/// The capacity of a pipe (pipe(7)), and so the most that one read returns.
const BUFFER: usize = 64 * 1024;

/// How long to wait for the rest of a line. So lines stay whole in a file that several workers
/// write to.
const LINE: Duration = Duration::from_millis(20);

/// The pause between two attempts to write to a full disk.
const RETRY: Duration = Duration::from_millis(200);

/// The shortest time between two error reports.
const SILENCE: Duration = Duration::from_secs(10);

/// Why output can't be written to the file, as one sentence.
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
    /// Carries orders to reopen the file, and the writer's error reports.
    pub(super) channel: OwnedFd,
}

/// What the program waits for before it runs: its writer has opened the file.
#[derive(Debug)]
pub(super) struct Opened(File);

impl Writer {
    /// Forks a writer if the package has a pipe for it to read. Must be called before the program
    /// is forked.
    pub(super) fn fork(mut package: Package) -> io::Result<(Package, Option<(Self, Opened)>)> {
        let Some(reader) = package.reader.take() else { return Ok((package, None)) };
        let (channel, theirs) = pair()?;
        let (opened, announce) = io::pipe()?;
        // SAFETY: this process has one thread, so the child may do whatever it could.
        match unsafe { fork() }? {
            ForkResult::Child => {
                // As long as this process held the program's descriptors, or the guard's channel to
                // lbd (standard input), they would not reach end of file.
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

    /// Makes the writer reopen the file.
    pub(super) fn reopen(&self) {
        // An error means that the writer has ended.
        let _ = tell(&self.channel, &Order::Reopen);
    }
}

impl Opened {
    /// Moves the pipe to a descriptor that can't collide with the program's.
    pub(super) fn aside(self) -> nix::Result<Self> {
        Ok(Self(File::from(aside(&self.0)?)))
    }

    /// Waits until the file is open. Returns why it is not, if that fails.
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

/// Opens or creates a regular file, and nothing else: does not follow a link, and does not wait for
/// a FIFO.
fn open(path: &PathBuf, user: Option<&str>) -> Result<File, WriterError> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let opened = OpenOptions::new().append(true).create(true).custom_flags(flags.bits()).open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP) => WriterError::Link(path.clone()),
        // A FIFO without a reader, or a socket (open(2)).
        Some(libc::ENXIO) => WriterError::NotRegular(path.clone()),
        _ => WriterError::Open(path.clone(), user.map(str::to_owned), error),
    })?;
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(file),
        Ok(_) => Err(WriterError::NotRegular(path.clone())),
        Err(error) => Err(WriterError::Open(path.clone(), user.map(str::to_owned), error)),
    }
}

/// Copies from `reader` to the file until `reader` ends. `channel` is `None` once the guard has
/// ended.
fn copy(mut output: Output, mut reader: File, mut channel: Option<OwnedFd>) {
    let mut pending = Vec::with_capacity(2 * BUFFER);
    // Until `flush_at`, wait for the rest of an unfinished line; after that, `flush` writes it as
    // it is.
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
        // Don't read while there is something to write: this is the backpressure that makes the
        // worker wait.
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

/// Returns whether there is something to read, and whether there is an order.
fn wait(
    reader: Option<&File>,
    channel: Option<&OwnedFd>,
    timeout: Option<Duration>,
) -> (bool, bool) {
    let mut fds = Vec::with_capacity(2);
    fds.extend(reader.map(|reader| PollFd::new(reader.as_fd(), PollFlags::POLLIN)));
    fds.extend(channel.map(|channel| PollFd::new(channel.as_fd(), PollFlags::POLLIN)));
    let _ = poll(&mut fds, poll_timeout(timeout));
    // An error or end of file counts as readable, too.
    let mut is_ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
    let readable = reader.is_some() && is_ready.next().unwrap_or(false);
    (readable, channel.is_some() && is_ready.next().unwrap_or(false))
}

fn complain(channel: Option<&OwnedFd>, error: &WriterError) {
    if let Some(channel) = channel {
        // An error means that the guard has ended, or does not listen.
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
