//! The guard: the process between lbd and one worker's program.
//!
//! The guard starts the program, forwards signals to it, reports how it ended, and leaves none of
//! its processes behind. It does not use its standard output and error, which nobody reads.

use std::{
    fs::File,
    io::{self, ErrorKind, Read as _},
    mem,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    process::ExitCode,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::{SigSet, Signal, kill, killpg},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{ForkResult, Pid, fork, getpid, pipe2, setsid},
};

use super::{
    Exit, cgroup,
    channel::{MESSAGE, Order, Report, hear, poll_timeout, started, tell},
    exec::become_program,
    stop::{Rest, Stop},
    tree::{Process, Reaped, below, kill_all, processes, reap},
    writer::Writer,
};
use crate::config::StopTo;

/// The pause between two scans of the process table while processes are being killed. It doubles,
/// up to [`LONGEST_PAUSE`], as long as a scan finds the same processes: those hang in the kernel.
const PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The longest time between two scans while the guard waits for the remaining processes of a worker
/// that was asked to stop. Most exits are announced by SIGCHLD, because orphans are reparented to
/// the guard.
const LONGEST_LOOK: Duration = Duration::from_millis(250);

/// How long the writer may take to write the worker's last output to its file.
const WRITE: Duration = Duration::from_secs(2);

/// A pause lasts at least this many times as long as the scan before it: a scan's cost grows with
/// the number of processes on the machine.
const REST: u32 = 10;

/// Guards the worker that lbd describes on `channel`. Returns when no process of the worker is
/// left, with the program's own status (128 + n for signal n).
///
/// Must be called in a single-threaded process that has no descriptors but the three standard ones,
/// blocks all signals, aborts on a panic, and is not dumpable.
pub(super) fn guard(channel: BorrowedFd<'_>) -> ExitCode {
    start(channel).unwrap_or_else(|error| {
        let _ = tell(channel, &Report::Failed(format!("cannot start a guard: {error}")));
        ExitCode::FAILURE
    })
}

fn start(channel: BorrowedFd<'_>) -> io::Result<ExitCode> {
    setsid()?;
    prctl::set_name(c"lbd-guard")?;
    prctl::set_child_subreaper(true)?;
    close_inherited()?;
    // If somebody stops the guard (SIGSTOP) and then kills lbd, the end of lbd continues the guard.
    prctl::set_pdeathsig(Signal::SIGCONT)?;
    if has_ended(channel) {
        return Ok(ExitCode::SUCCESS);
    }
    let Some(package) = started(channel)? else { return Ok(ExitCode::SUCCESS) };

    let ends = SignalFd::with_flags(
        &SigSet::from(Signal::SIGCHLD),
        SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
    )?;
    let (package, writer) = Writer::fork(package)?;
    let (writer, opened) = writer.unzip();
    let (outcome, errors) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let own = getpid();
    // SAFETY: this process has one thread, so the child may do whatever it could.
    match unsafe { fork() }? {
        ForkResult::Child => become_program(package, opened, errors, own),
        ForkResult::Parent { child } => {
            drop((errors, opened));
            let cgroup = package.into_cgroup();
            let start = Start::Pending(File::from(outcome));
            let channel = Some(channel);
            let guard = Guard {
                channel,
                ends,
                start,
                program: child,
                cgroup,
                writer,
                early: Vec::new(),
                stop: None,
                killed: false,
                exit: None,
            };
            Ok(guard.watch())
        }
    }
}

/// A guard whose program has been forked.
struct Guard<'a> {
    /// The channel to lbd; `None` once lbd has ended.
    channel: Option<BorrowedFd<'a>>,
    /// Readable when a child has ended.
    ends: SignalFd,
    start: Start,
    program: Pid,
    /// The directory of the program's cgroup. The guard itself is not in that cgroup.
    cgroup: Option<OwnedFd>,
    /// The process that writes the output to a file. It does not count as part of the worker.
    writer: Option<Writer>,
    /// Orders that arrived while the start was still pending.
    early: Vec<Order>,
    /// Set once lbd has asked the worker to stop: how far the stop has got.
    stop: Option<Stop>,
    /// lbd has ordered a kill, or has ended.
    killed: bool,
    /// How the program ended, once it has.
    exit: Option<Exit>,
}

/// Whether the fork became the program.
enum Start {
    /// Not known yet. The pipe will either reach end of file or hold the reason for the failure.
    Pending(File),
    Done,
    Failed,
}

impl Guard<'_> {
    /// Runs until no process of the program is left.
    fn watch(mut self) -> ExitCode {
        let exit = loop {
            self.wait(None);
            self.settle();
            self.obey();
            if let Some(exit) = self.reap() {
                break exit;
            }
        };
        // The forked child may have written its outcome since the last look.
        self.settle();
        if matches!(self.start, Start::Done) {
            self.wait_for_the_rest();
            self.report(&Report::Exited(exit));
        }
        // Only after the report, because lbd acts on the report at once. Usually there is nothing
        // left to kill.
        self.kill_the_rest();
        ExitCode::from(exit.status())
    }

    /// Waits until there is something to do, or until `timeout` has passed. The caller then tries
    /// everything, and none of that blocks.
    fn wait(&self, timeout: Option<Duration>) {
        let mut fds = vec![self.ends.as_fd()];
        fds.extend(self.channel);
        if let Start::Pending(outcome) = &self.start {
            fds.push(outcome.as_fd());
        }
        fds.extend(self.writer.iter().map(|writer| writer.channel.as_fd()));
        let mut fds: Vec<PollFd<'_>> =
            fds.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let _ = poll(&mut fds, poll_timeout(timeout));
    }

    /// Reports whether the forked child became the program, once that is known.
    fn settle(&mut self) {
        let Start::Pending(outcome) = &mut self.start else { return };
        let mut buffer = [0; MESSAGE];
        match outcome.read(&mut buffer) {
            Ok(0) => {
                self.start = Start::Done;
                self.report(&Report::Started(self.program.as_raw()));
                for order in mem::take(&mut self.early) {
                    self.carry_out(order);
                }
            }
            Ok(length) => {
                let reason = String::from_utf8_lossy(&buffer[..length]).into_owned();
                self.start = Start::Failed;
                self.report(&Report::Failed(reason));
            }
            Err(_) => {}
        }
    }

    /// Carries out the orders from lbd and forwards the writer's messages. The end of lbd counts as
    /// an order to kill.
    fn obey(&mut self) {
        self.hear_writer();
        while let Some(channel) = self.channel {
            match hear(channel) {
                Ok(Some(order)) => self.carry_out(order),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Ok(None) | Err(_) => {
                    self.channel = None;
                    self.carry_out(Order::Kill);
                }
            }
        }
    }

    fn hear_writer(&mut self) {
        while let Some(writer) = &self.writer {
            match hear::<String>(&writer.channel) {
                Ok(Some(sentence)) => self.report(&Report::Output(sentence)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // The writer has ended and is about to be reaped.
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Kill => {
                self.killed = true;
                self.kill();
            }
            Order::Reopen => self.writer.iter().for_each(Writer::reopen),
            // The child creates the program's process group some time before it executes the
            // program; until then there is no group to signal.
            order if matches!(self.start, Start::Pending(_)) => self.early.push(order),
            // Once the program is reaped, its number may belong to another process group.
            Order::Signal(_) | Order::Stop(..) if self.exit.is_some() => {}
            Order::Signal(signal) => self.signal(signal, StopTo::Group),
            Order::Stop(signal, to, timeout) => {
                let deadline = Instant::now() + timeout;
                let stop = |signal| Stop::new(signal, to, deadline);
                self.stop = Signal::try_from(signal).ok().map(stop);
                self.signal(signal, to);
            }
        }
    }

    /// Signals the program, or its process group. Both exist as long as the program has not been
    /// reaped. A stopped process is continued so that it can act on the signal.
    fn signal(&self, signal: i32, to: StopTo) {
        // Never fails: lbd took the number from the same list of signals.
        let Ok(signal) = Signal::try_from(signal) else { return };
        for signal in [signal, Signal::SIGCONT] {
            let _ = match to {
                StopTo::Group => killpg(self.program, signal),
                StopTo::Main => kill(self.program, signal),
            };
        }
    }

    /// Reaps every process below that has ended. Returns how the program ended, once it has.
    fn reap(&mut self) -> Option<Exit> {
        self.forget_ends();
        self.reap_all();
        self.exit
    }

    /// Consumes pending SIGCHLD notifications. Returns whether there was any.
    fn forget_ends(&self) -> bool {
        let mut any = false;
        while let Ok(Some(_)) = self.ends.read_signal() {
            any = true;
        }
        any
    }

    /// Reaps every child that has ended. Returns whether other children are left.
    fn reap_all(&mut self) -> bool {
        loop {
            match reap(None) {
                Reaped::Ended(pid, status) => {
                    if pid == self.program.as_raw() {
                        self.exit = self.exit.or(Some(Exit::from_status(status)));
                    }
                    self.writer.take_if(|writer| writer.pid.as_raw() == pid);
                }
                Reaped::Alive => return true,
                Reaped::None => return false,
            }
        }
    }

    /// All processes below the guard that belong to the worker.
    fn left(&self) -> Vec<Process> {
        let mut all = below(&processes(), &[getpid().as_raw()]);
        if let Some(writer) = &self.writer {
            all.retain(|process| process.pid != writer.pid.as_raw());
        }
        all
    }

    /// Called when the program has ended. If lbd asked the worker to stop, the worker counts as
    /// ended only when everything that the program started has ended too; see [`Stop`].
    fn wait_for_the_rest(&mut self) {
        let mut pause = PAUSE;
        let mut next = Instant::now();
        // A SIGCHLD can't bring the next scan forward to before this time.
        let mut soonest = next;
        while self.reap_all() && !self.killed {
            let now = Instant::now();
            if now >= next {
                let left = self.left();
                let Some(stop) = &mut self.stop else { return };
                soonest = now + now.elapsed() * REST;
                next = soonest.max(now + pause);
                pause = LONGEST_LOOK.min(pause * 2);
                match stop.look(&left, self.program.as_raw(), now) {
                    Rest::Over => return,
                    Rest::Tell(signal, pids, until) => {
                        next = until.map_or(next, |until| until.min(next));
                        for pid in pids {
                            // An error means that the process is gone. A stopped process is
                            // continued.
                            let _ = kill(Pid::from_raw(pid), signal);
                            let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
                        }
                    }
                }
            }
            self.wait(Some(next.saturating_duration_since(Instant::now())));
            self.obey();
            if self.forget_ends() {
                next = next.min(soonest);
            }
        }
    }

    fn report(&self, report: &Report) {
        if let Some(channel) = self.channel {
            // An error means that lbd has ended, which `obey` is about to find out.
            let _ = tell(channel, report);
        }
    }

    /// Kills everything below the guard once, and returns what it found there. A process that keeps
    /// forking can escape a single pass, unless it is in a cgroup.
    fn kill(&self) -> Vec<Process> {
        if let Some(folder) = &self.cgroup {
            // An error means that the kernel is too old for `cgroup.kill`. Killing by pid and group
            // then has to do.
            let _ = cgroup::kill(folder);
        }
        let found = self.left();
        kill_all(&found);
        found
    }

    /// Kills everything below this process, again and again until nothing is left.
    ///
    /// The guard is a subreaper: the children of a killed process become its own. So there is a
    /// reliable end condition: the guard has no children left. A single scan of the process table
    /// may miss processes, so the scan is repeated.
    ///
    /// The writer ends by itself once nobody can write to its pipe and all output is written.
    fn kill_the_rest(&mut self) {
        let mut pause = PAUSE;
        let mut before: Vec<Process> = Vec::new();
        let mut write_until = None;
        while self.reap_all() {
            let found = self.kill();
            pause = if found == before { LONGEST_PAUSE.min(pause * 2) } else { PAUSE };
            if let (true, Some(writer)) = (found.is_empty(), &self.writer) {
                let now = Instant::now();
                if now >= *write_until.get_or_insert(now + WRITE) {
                    let _ = kill(writer.pid, Signal::SIGKILL);
                }
            }
            before = found;

            let next = Instant::now() + pause;
            while self.reap_all() {
                self.hear_writer();
                let rest = next.saturating_duration_since(Instant::now());
                let ends = PollFd::new(self.ends.as_fd(), PollFlags::POLLIN);
                if poll(&mut [ends], poll_timeout(Some(rest))) == Ok(0) {
                    break;
                }
                self.forget_ends();
            }
        }
    }
}

/// Whether lbd has ended: lbd alone holds the other end of the channel.
fn has_ended(channel: BorrowedFd<'_>) -> bool {
    // poll(2) reports POLLHUP, the end of the other side, whatever events are requested.
    let mut ends = [PollFd::new(channel, PollFlags::empty())];
    poll(&mut ends, PollTimeout::ZERO) != Ok(0)
}

/// Closes descriptors that lbd inherited without close-on-exec, for example from a shell.
pub(super) fn close_inherited() -> io::Result<()> {
    // SAFETY: closes descriptors that nothing in this process has opened or knows of.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) })?;
    Ok(())
}
