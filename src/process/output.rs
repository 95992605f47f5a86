//! Where a worker's standard output and error go, and how they get into lbd's log, line by line.
//! (If `output` is a file, a [writer](super::writer) writes it.)
//!
//! Workers write whatever they like, as fast as they like. So one thread only reads their output.
//! It never makes a worker wait: lines beyond the rate that the log accepts are counted and
//! dropped.

use std::{
    cell::{Cell, RefCell},
    fs::{File, OpenOptions},
    io::{self, ErrorKind, PipeReader, PipeWriter},
    num::NonZeroU32,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use nix::sys::stat::{Mode, fchmod};
use tokio::{
    net::unix::pipe::Receiver,
    runtime,
    sync::{Notify, mpsc, oneshot, watch},
    task::{LocalSet, spawn_local, yield_now},
    time::{Instant, sleep, timeout},
};
use tracing::{info, warn};

use super::{
    Identity,
    environment::expand_path,
    lines::{LastLines, Lines, text},
};
use crate::config::Output;

/// A line counts once per this many bytes against the worker's rate.
const UNIT: usize = 1024;
/// How much unused rate a worker can save up for a burst.
const BURST: Duration = Duration::from_secs(1);

/// The time between two reports of dropped lines.
const REPORT: Duration = Duration::from_secs(1);

/// How long the shutdown waits for output that is still being written. Usually there is none.
const PATIENCE: Duration = Duration::from_secs(1);

/// A worker's standard output and error.
#[derive(Debug)]
pub struct Streams {
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
    /// Where to send the worker's pid.
    pub(super) pid: Option<oneshot::Sender<i32>>,
    /// The read end of the pipe for both streams, and the file that the writer appends to.
    pub(super) file: Option<(OwnedFd, PathBuf)>,
    last_words: LastWords,
}

impl Streams {
    /// Two open files.
    pub fn new(stdout: impl Into<OwnedFd>, stderr: impl Into<OwnedFd>) -> Self {
        let last_words = LastWords::default();
        let (stdout, stderr) = (stdout.into(), stderr.into());
        Self { stdout, stderr, pid: None, file: None, last_words }
    }

    /// The worker's last lines, updated until after its end.
    #[must_use]
    pub fn last_words(&self) -> LastWords {
        self.last_words.clone()
    }
}

/// The last lines that a worker wrote, as far as they passed through lbd: none unless its output is
/// [`Output::Log`].
#[derive(Debug, Clone, Default)]
pub struct LastWords {
    lines: Arc<Mutex<LastLines>>,
    /// The sender is dropped when all output has been read; `None` where no output passes through
    /// lbd.
    reading: Option<watch::Receiver<()>>,
}

impl LastWords {
    /// Creates it empty. The caller drops the sender when all output has been read.
    fn new() -> (Self, watch::Sender<()>) {
        let (sender, reading) = watch::channel(());
        (Self { lines: Arc::default(), reading: Some(reading) }, sender)
    }

    /// The lines so far, oldest first, without control characters: at most twenty lines and 4 KiB.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).all()
    }

    /// Returns when all output has been read, that is when every process that can write to it has
    /// ended, or after `patience`.
    pub async fn complete(&self, patience: Duration) {
        if let Some(mut reading) = self.reading.clone() {
            // Nothing is ever sent: an error means that the sender is gone.
            let _ = timeout(patience, reading.changed()).await;
        }
    }

    fn add(&self, line: &[u8]) {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).add(line);
    }
}

/// Opens the targets of the workers' output, and owns the thread that turns output into log lines.
///
/// Dropping it blocks until the output written so far is logged, for at most a second.
#[derive(Debug)]
pub struct Outputs {
    /// How many lines per second each worker may log.
    rate: NonZeroU32,
    jobs: Option<mpsc::UnboundedSender<Job>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Outputs {
    /// Starts the thread. Each worker may log `rate` lines per second; further lines are dropped.
    pub fn start(rate: NonZeroU32) -> io::Result<Self> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let (jobs, mut queue) = mpsc::unbounded_channel();
        let thread = thread::Builder::new().name("output".to_owned()).spawn(move || {
            let readers = LocalSet::new();
            readers.block_on(&runtime, async {
                while let Some(job) = queue.recv().await {
                    spawn_local(follow(job));
                }
            });
            let _ = runtime.block_on(async { timeout(PATIENCE, readers).await });
        })?;
        Ok(Self { rate, jobs: Some(jobs), thread: Some(thread) })
    }

    /// Opens `output` for this `worker`.
    ///
    /// With [`Output::Log`], each line becomes an event `output` with the fields `service`, `slot`,
    /// `port`, `pid`, `stream` and `line`, and `split` if the line continues in the next event.
    /// Once a second, an event `output dropped` reports how many `lines` were dropped.
    pub fn open(&self, output: &Output, worker: Identity<'_>) -> io::Result<Streams> {
        match output {
            Output::Inherit => Ok(Streams::new(
                io::stdout().as_fd().try_clone_to_owned()?,
                io::stderr().as_fd().try_clone_to_owned()?,
            )),
            Output::Null => both(OpenOptions::new().write(true).open("/dev/null")?),
            Output::File(path) => {
                // One pipe for both streams, so that the file keeps the order in which they were
                // written. The file is not opened here, but by the writer as the worker's user.
                let (reader, writer) = pipe()?;
                let streams = Streams::new(writer.try_clone()?, writer);
                Ok(Streams { file: Some((reader.into(), expand_path(path, worker))), ..streams })
            }
            Output::Log => {
                let (stdout, stdout_write) = pipe()?;
                let (stderr, stderr_write) = pipe()?;
                let (announce, pid) = oneshot::channel();
                let (last_words, reading) = LastWords::new();
                let job = Job {
                    rate: self.rate,
                    service: worker.service.into(),
                    slot: worker.slot,
                    port: worker.port,
                    pid,
                    stdout,
                    stderr,
                    last_words: last_words.clone(),
                    reading,
                };
                let jobs = self.jobs.as_ref().ok_or(ErrorKind::BrokenPipe)?;
                jobs.send(job).map_err(|_| ErrorKind::BrokenPipe)?;
                let streams = Streams::new(stdout_write, stderr_write);
                Ok(Streams { pid: Some(announce), last_words, ..streams })
            }
        }
    }
}

impl Drop for Outputs {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Makes a pipe that a worker of another user can reopen through `/dev/stdout` and `/dev/stderr`:
/// that needs write permission, and the pipe belongs to lbd. No other process can find the pipe:
/// the path leads through `/proc/PID/fd` of a process that holds it.
fn pipe() -> io::Result<(PipeReader, PipeWriter)> {
    let (reader, writer) = io::pipe()?;
    fchmod(&writer, Mode::from_bits_truncate(0o622))?;
    Ok((reader, writer))
}

fn both(file: File) -> io::Result<Streams> {
    Ok(Streams::new(file.try_clone()?, file))
}

/// One worker whose output is read.
#[derive(Debug)]
struct Job {
    rate: NonZeroU32,
    service: Arc<str>,
    slot: u32,
    port: Option<u16>,
    pid: oneshot::Receiver<i32>,
    stdout: PipeReader,
    stderr: PipeReader,
    last_words: LastWords,
    /// Dropped when all output has been read.
    reading: watch::Sender<()>,
}

/// Reads a worker's output until no process can write to it any more.
async fn follow(job: Job) {
    let Job { rate, service, slot, port, pid, stdout, stderr, last_words, reading } = job;
    // Known as soon as the program runs. A program that never ran has no pid and no output.
    let pid = pid.await.ok();
    let allowance = RefCell::new(Allowance::new(rate, Instant::now()));
    let dropped = Cell::new(0_u64);
    let drop_noticed = Notify::new();

    let log = |stream: &'static str, line: &[u8], split: bool| {
        last_words.add(line);
        if allowance.borrow_mut().admits(line, Instant::now()) {
            let split = split.then_some(true);
            let line = text(line);
            info!(
                target: "output",
                service = &*service, slot, port, pid, stream, line, split, "output"
            );
        } else {
            dropped.set(dropped.get() + 1);
            drop_noticed.notify_one();
        }
    };
    let report = || {
        let lines = dropped.take();
        if lines > 0 {
            warn!(service = &*service, slot, port, pid, lines, "output dropped");
        }
    };
    let reports = async {
        loop {
            drop_noticed.notified().await;
            sleep(REPORT).await;
            report();
        }
    };
    let reads = async {
        tokio::join!(
            read(stdout, |line, split| log("stdout", line, split)),
            read(stderr, |line, split| log("stderr", line, split)),
        );
    };
    tokio::select! {
        () = reads => report(),
        () = reports => {}
    }
    drop(reading);
}

/// Reads `pipe` until it ends. A pipe that can't be read counts as ended.
async fn read(pipe: PipeReader, mut emit: impl FnMut(&[u8], bool)) {
    let Ok(pipe) = Receiver::from_owned_fd(pipe.into()) else { return };
    let mut lines = Lines::default();
    while pipe.readable().await.is_ok() {
        match read_once(&pipe, &mut lines, &mut emit) {
            Ok(0) => break,
            // Let the other workers' readers run.
            Ok(_) => yield_now().await,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    lines.end(emit);
}

/// A separate function, so that idle workers don't keep a buffer in their future.
fn read_once(
    pipe: &Receiver,
    lines: &mut Lines,
    emit: impl FnMut(&[u8], bool),
) -> io::Result<usize> {
    let mut buffer = [0; 32 * 1024];
    let length = pipe.try_read(&mut buffer)?;
    lines.feed(&buffer[..length], emit);
    Ok(length)
}

/// A worker's log rate: a leaky bucket, stored as the time at which the bucket will be empty.
#[derive(Debug)]
struct Allowance {
    paid: Instant,
    /// The time that one line costs.
    cost: Duration,
}

impl Allowance {
    fn new(rate: NonZeroU32, now: Instant) -> Self {
        Self { paid: now, cost: Duration::from_secs(1) / rate.get() }
    }

    fn admits(&mut self, line: &[u8], now: Instant) -> bool {
        self.paid = self.paid.max(now);
        if self.paid - now >= BURST {
            return false;
        }
        let units = 1 + line.len() / UNIT;
        self.paid += self.cost * u32::try_from(units).unwrap_or(u32::MAX);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_may_log_a_burst_and_then_a_line_each_millisecond() {
        let start = Instant::now();
        let mut allowance = Allowance::new(NonZeroU32::new(1000).unwrap(), start);
        let admitted = (0..6000).filter(|_| allowance.admits(b"line", start)).count();
        assert_eq!(admitted, 1000);
        let later = start + Duration::from_millis(10);
        let admitted = (0..100).filter(|_| allowance.admits(b"line", later)).count();
        assert_eq!(admitted, 10);
    }

    #[test]
    fn a_long_line_counts_as_several() {
        let start = Instant::now();
        let mut allowance = Allowance::new(NonZeroU32::new(1000).unwrap(), start);
        let line = [b'x'; 8 * UNIT - 1];
        let admitted = (0..6000).filter(|_| allowance.admits(&line, start)).count();
        assert_eq!(admitted, 125);
    }
}
