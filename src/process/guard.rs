//! The guard: the process between lbd and one worker's program.
//!
//! It starts the program, passes signals on to it, reports how it ended, and leaves nothing of it
//! behind. Nobody reads its standard output and error, and it writes to neither.

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

/// Between two looks at the process table while processes are killed; doubled, up to
/// [`LONGEST_PAUSE`], while the look finds the same ones: they hang in the kernel.
const PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The longest time between two looks while the rest of a worker that was asked to stop is waited for.
/// As a rule the end of a child is told (SIGCHLD), and whoever has lost its parent is one.
const LONGEST_LOOK: Duration = Duration::from_millis(250);

/// How long what a worker wrote at its end may take to be written to its file.
const WRITE: Duration = Duration::from_secs(2);

/// A pause is at least so many times the look before it, which takes as long as there are processes
/// on the machine.
const REST: u32 = 10;

/// Guards the worker that lbd describes on `channel`. Returns when nothing of it is left, with the
/// program's own status (128 + n for signal n).
///
/// To be called in a process with one thread and no descriptor but the three standard ones, in which
/// all signals are blocked, a panic aborts, and which is not dumpable.
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
    // Whoever has stopped the guard, and then killed lbd: the end of lbd continues it.
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
    /// To lbd; `None` once lbd has ended.
    channel: Option<BorrowedFd<'a>>,
    /// Readable when a child has ended.
    ends: SignalFd,
    start: Start,
    program: Pid,
    /// The folder of the program's cgroup, which the guard is not in.
    cgroup: Option<OwnedFd>,
    /// The process that writes the output into a file. It is no part of the worker.
    writer: Option<Writer>,
    /// Orders that came while the start was pending.
    early: Vec<Order>,
    /// That lbd has asked the worker to stop, and how far that is.
    stop: Option<Stop>,
    /// lbd has ordered to kill, or ended.
    killed: bool,
    /// How the program ended, once it has.
    exit: Option<Exit>,
}

/// Whether the fork became the program.
enum Start {
    /// Not known yet: this pipe will end, or hold the reason why not.
    Pending(File),
    Done,
    Failed,
}

impl Guard<'_> {
    /// Until nothing of the program is left.
    fn watch(mut self) -> ExitCode {
        let exit = loop {
            self.wait(None);
            self.settle();
            self.obey();
            if let Some(exit) = self.reap() {
                break exit;
            }
        };
        // The fork's last word may have come since.
        self.settle();
        if matches!(self.start, Start::Done) {
            self.wait_for_the_rest();
            self.report(&Report::Exited(exit));
        }
        // Not before the report, which lbd acts on at once. As a rule it finds nothing.
        self.kill_the_rest();
        ExitCode::from(exit.status())
    }

    /// Until there is something to do, or `timeout` is over. Everything is then tried, and nothing of
    /// it blocks.
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

    /// Reports whether the fork became the program, once that is known.
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

    /// Does what lbd has ordered, and passes on what the writer has to say. The end of lbd is the order
    /// to kill.
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
                // It is about to be reaped.
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
            // The program's group is made by the fork, at some time before the program runs.
            order if matches!(self.start, Start::Pending(_)) => self.early.push(order),
            // Its number may be another group's by now.
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

    /// Signals the program or its process group, which both exist as long as the program is not
    /// reaped. What is stopped is continued, so that it can act on the signal.
    fn signal(&self, signal: i32, to: StopTo) {
        // An error says that it has no such number: lbd has it from the same list.
        let Ok(signal) = Signal::try_from(signal) else { return };
        for signal in [signal, Signal::SIGCONT] {
            let _ = match to {
                StopTo::Group => killpg(self.program, signal),
                StopTo::Main => kill(self.program, signal),
            };
        }
    }

    /// Reaps whatever has ended below. How the program ended, once it has.
    fn reap(&mut self) -> Option<Exit> {
        self.forget_ends();
        self.reap_all();
        self.exit
    }

    /// Takes in that children have ended; whether any has.
    fn forget_ends(&self) -> bool {
        let mut any = false;
        while let Ok(Some(_)) = self.ends.read_signal() {
            any = true;
        }
        any
    }

    /// Reaps every child that has ended; whether there are others.
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

    /// Everything below this process that is the worker's.
    fn left(&self) -> Vec<Process> {
        let mut all = below(&processes(), &[getpid().as_raw()]);
        if let Some(writer) = &self.writer {
            all.retain(|process| process.pid != writer.pid.as_raw());
        }
        all
    }

    /// The program has ended. If it was asked to, it has not ended as a worker before all that it
    /// started has; see [`Stop`].
    fn wait_for_the_rest(&mut self) {
        let mut pause = PAUSE;
        let mut next = Instant::now();
        // Looks that children ask for by their end come no earlier than this.
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
                            // An error says that it is gone. One that is stopped is continued.
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
            // An error says that lbd has ended, as `obey` is about to find.
            let _ = tell(channel, report);
        }
    }

    /// Kills everything below this process, and tells what that was. What goes on to fork may miss
    /// it, unless it has a cgroup.
    fn kill(&self) -> Vec<Process> {
        if let Some(folder) = &self.cgroup {
            // An error says that the kernel is older than this: then the rest has to do.
            let _ = cgroup::kill(folder);
        }
        let found = self.left();
        kill_all(&found);
        found
    }

    /// Kills everything below this process, until nothing is left.
    ///
    /// What a killed process leaves becomes this one's child (it is a subreaper), so the end is certain:
    /// no child is left. A look at the process table may miss some: hence another, and another.
    ///
    /// The writer ends by itself when nobody can write to it any more, and what it has is written.
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

/// Whether lbd has ended: it alone has the other end.
fn has_ended(channel: BorrowedFd<'_>) -> bool {
    // The end of the other side is told whatever is asked for (poll(2), POLLHUP).
    let mut ends = [PollFd::new(channel, PollFlags::empty())];
    poll(&mut ends, PollTimeout::ZERO) != Ok(0)
}

/// Closes what lbd has inherited without close-on-exec, from a shell, say.
pub(super) fn close_inherited() -> io::Result<()> {
    // SAFETY: closes descriptors that nothing in this process has opened or knows of.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) })?;
    Ok(())
}
