//! The guard: the process between lbd and one worker's program.
//!
//! It starts the program, passes signals on to it, reports how it ended, and leaves nothing of it
//! behind. Nobody reads its standard output and error, and it writes to neither.

use std::{
    fs::File,
    io::{self, ErrorKind, Read as _},
    mem,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    panic,
    process::{ExitCode, abort},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        socket::{SockType, getsockopt, sockopt},
    },
    unistd::{ForkResult, fork, getpid, pipe2, setsid},
};

use super::{
    Exit, cgroup,
    channel::{MESSAGE, Order, Report, hear, started, tell},
    exec::become_program,
    tree::{Process, Reaped, below, kill_all, processes, reap},
};

/// Between two looks at the process table while processes are killed; doubled, up to
/// [`LONGEST_PAUSE`], while the look finds the same ones: they hang in the kernel.
const PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Runs the hidden `lbd exec`: what lbd starts for each worker. Returns when nothing of the worker
/// is left, with the program's own status (128 + n for signal n); or at once, with a message and
/// status 2, where it was not lbd that started it.
///
/// To be called first of all in `main`: the guard forks, so there must be one thread only.
pub fn exec_main() -> ExitCode {
    let stdin = io::stdin();
    if getsockopt(&stdin, sockopt::SockType) != Ok(SockType::SeqPacket) {
        eprintln!("lbd exec is how lbd starts a worker, and of no use by hand");
        return ExitCode::from(2);
    }
    // A panic would exit, and lbd would take that for an orderly end; a signal says it was none.
    panic::set_hook(Box::new(|_| abort()));
    guard(stdin.as_fd()).unwrap_or_else(|error| {
        let _ = tell(&stdin, &Report::Failed(format!("cannot start a guard: {error}")));
        ExitCode::FAILURE
    })
}

fn guard(channel: BorrowedFd<'_>) -> io::Result<ExitCode> {
    // A terminal's ^C and `pkill lbd` are for lbd, which then tells the guard what to do.
    SigSet::all().thread_block()?;
    setsid()?;
    prctl::set_name(c"lbd-guard")?;
    prctl::set_child_subreaper(true)?;
    close_inherited()?;
    let Some(package) = started(channel)? else { return Ok(ExitCode::SUCCESS) };

    let ends = SignalFd::with_flags(
        &SigSet::from(Signal::SIGCHLD),
        SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
    )?;
    let (outcome, errors) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let own = getpid();
    // SAFETY: this process has one thread, so the child may do whatever it could.
    match unsafe { fork() }? {
        ForkResult::Child => become_program(package, errors, own),
        ForkResult::Parent { child } => {
            drop(errors);
            let cgroup = package.into_cgroup();
            let program = child.as_raw();
            let start = Start::Pending(File::from(outcome));
            let channel = Some(channel);
            let guard = Guard { channel, ends, start, program, cgroup, early: Vec::new() };
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
    program: i32,
    /// The folder of the program's cgroup, which the guard is not in.
    cgroup: Option<OwnedFd>,
    /// Signals that came while the start was pending.
    early: Vec<i32>,
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
        loop {
            self.wait();
            self.settle();
            self.obey();
            if let Some(exit) = self.reap() {
                // The fork's last word may have come since.
                self.settle();
                if matches!(self.start, Start::Done) {
                    self.report(&Report::Exited(exit));
                }
                // Not before the report, which lbd acts on at once. As a rule it finds nothing.
                self.kill_the_rest();
                return ExitCode::from(exit.status());
            }
        }
    }

    /// Until there is something to do. Everything is then tried, and nothing of it blocks.
    fn wait(&self) {
        let mut fds = vec![self.ends.as_fd()];
        fds.extend(self.channel);
        if let Start::Pending(outcome) = &self.start {
            fds.push(outcome.as_fd());
        }
        let mut fds: Vec<PollFd<'_>> =
            fds.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let _ = poll(&mut fds, PollTimeout::NONE);
    }

    /// Reports whether the fork became the program, once that is known.
    fn settle(&mut self) {
        let Start::Pending(outcome) = &mut self.start else { return };
        let mut buffer = [0; MESSAGE];
        match outcome.read(&mut buffer) {
            Ok(0) => {
                self.start = Start::Done;
                self.report(&Report::Started(self.program));
                for signal in mem::take(&mut self.early) {
                    self.signal(signal);
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

    /// Does what lbd has ordered. The end of lbd is the order to kill.
    fn obey(&mut self) {
        while let Some(channel) = self.channel {
            match hear(channel) {
                Ok(Some(Order::Signal(signal))) => self.signal(signal),
                Ok(Some(Order::Kill)) => drop(self.kill()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Ok(None) | Err(_) => {
                    self.channel = None;
                    self.kill();
                }
            }
        }
    }

    /// Signals the program's process group, which exists as long as the program is not reaped.
    ///
    /// One that is stopped is continued, so that it can act on the signal.
    fn signal(&mut self, signal: i32) {
        if matches!(self.start, Start::Pending(_)) {
            // Its group is made by the fork, at some time before the program runs.
            self.early.push(signal);
            return;
        }
        for signal in [signal, libc::SIGCONT] {
            // SAFETY: no pointers are passed. (nix knows no real-time signals.)
            unsafe { libc::kill(-self.program, signal) };
        }
    }

    /// Reaps whatever has ended below. How the program ended, if it was among it.
    fn reap(&self) -> Option<Exit> {
        while let Ok(Some(_)) = self.ends.read_signal() {}
        let mut exit = None;
        while let Reaped::Ended(pid, status) = reap(None) {
            if pid == self.program {
                exit = Some(Exit::from_status(status));
            }
        }
        exit
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
        let found = below(&processes(), &[getpid().as_raw()]);
        kill_all(&found);
        found
    }

    /// Kills everything below this process, until nothing is left.
    ///
    /// What a killed process leaves becomes this one's child (it is a subreaper), so the end is certain:
    /// no child is left. A look at the process table may miss some: hence another, and another.
    fn kill_the_rest(&self) {
        let mut pause = PAUSE;
        let mut before: Vec<Process> = Vec::new();
        while reap_all() {
            let found = self.kill();
            pause = if found == before { LONGEST_PAUSE.min(pause * 2) } else { PAUSE };
            before = found;

            let next = Instant::now() + pause;
            while reap_all() {
                let rest = next.saturating_duration_since(Instant::now());
                let timeout = PollTimeout::try_from(rest).unwrap_or(PollTimeout::MAX);
                if poll(&mut [PollFd::new(self.ends.as_fd(), PollFlags::POLLIN)], timeout) == Ok(0)
                {
                    break;
                }
                while let Ok(Some(_)) = self.ends.read_signal() {}
            }
        }
    }
}

/// Reaps every child that has ended; whether there are others.
fn reap_all() -> bool {
    loop {
        match reap(None) {
            Reaped::Ended(..) => {}
            Reaped::Alive => return true,
            Reaped::None => return false,
        }
    }
}

/// Closes what lbd has inherited without close-on-exec, from a shell, say.
fn close_inherited() -> io::Result<()> {
    // SAFETY: closes descriptors that nothing in this process has opened or knows of.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) })?;
    Ok(())
}
