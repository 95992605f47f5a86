//! lbd's side of a worker: starts the guard, sends it orders, receives its reports, and reaps it.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    ffi::OsString,
    io::{self, ErrorKind},
    mem,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt as _,
    },
    path::PathBuf,
    process::ExitStatus,
    rc::{Rc, Weak},
    time::Duration,
};

use nix::{
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    unistd::{Pid, getpid},
};
use rustix::process::PidfdFlags;
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
    sync::oneshot,
    time::{Instant, sleep},
};

use super::{
    Cgroup, Exit, Streams, cgroup,
    channel::{Description, Order, Report, hear, pair, start, tell},
    template::Template,
    tree::{Process, Reaped, below, identity, kill_all, processes, reap},
};
use crate::config::StopTo;

/// How long the `Gone` event of a worker whose guard was killed is delayed while the kernel keeps
/// one of its processes from dying.
const PATIENCE: Duration = Duration::from_secs(5);

/// The pause between two scans for processes that a killed guard left behind.
const TICK: Duration = Duration::from_millis(5);

/// What to start.
#[derive(Debug)]
pub struct Launch<'a> {
    /// What `ps` shows for the guard, such as `web/9002`.
    pub label: String,
    /// The file to run, if it is not the one that `argv[0]` names.
    pub program: Option<PathBuf>,
    /// Not empty, and without placeholders. The first word is looked up in the `PATH` of `env` or,
    /// if it contains a `/`, from `directory`.
    pub argv: Vec<String>,
    /// The complete environment, except for what starting the worker adds (see
    /// [`environment`](super::environment())).
    pub env: Vec<(OsString, OsString)>,
    /// The working directory.
    pub directory: PathBuf,
    /// The listening sockets and their names. They are passed from descriptor 3 on, unchanged (so
    /// they stay blocking); at most [`MAX_LISTENERS`](crate::config::MAX_LISTENERS).
    pub listeners: Vec<(BorrowedFd<'a>, String)>,
    /// Where the standard output and error go.
    pub streams: Streams,
    /// The file mode creation mask; `None` keeps lbd's own.
    pub umask: Option<u32>,
    /// The user's name or number; `None` keeps lbd's own.
    pub user: Option<String>,
    /// The group's name or number; `None` means the user's own group or, without a user, lbd's.
    pub group: Option<String>,
    /// The soft and the hard limit of open files; `None` keeps lbd's own.
    pub open_files: Option<(u64, u64)>,
    /// The cgroup for this program alone.
    pub cgroup: Option<Cgroup>,
}

/// What happens to a started worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChildEvent {
    /// The program runs.
    Started {
        /// The program's process id.
        pid: i32,
    },
    /// The program never ran, for this reason: a sentence.
    Failed(String),
    /// The program ended. Processes that it started may still exist for a moment, unless the worker
    /// was asked to stop.
    Exited(Exit),
    /// The output file can't be written or reopened, for this reason: a sentence. The writer tries
    /// again.
    Output(String),
    /// No process of the worker is left. Always the last event.
    Gone,
}

/// Starts guards, and kills what a killed guard leaves behind. There is one `Spawner` in a process.
///
/// It treats every child of this process that it did not start as such a leftover, and kills it.
/// Exempt are the children that the process had from the beginning (those of a shell that ended
/// with `exec lbd`), and their descendants. So nothing else in this process may start children.
#[derive(Debug, Clone)]
pub struct Spawner(Rc<ChildRegistry>);

#[derive(Debug)]
struct ChildRegistry {
    /// The binary that templates are started from.
    binary: PathBuf,
    /// The process that guards are forked from; `None` before the first, and after one has ended.
    template: RefCell<Option<Template>>,
    /// The guards that have not been reaped yet.
    guards: RefCell<BTreeSet<i32>>,
    /// The children that existed before, and their descendants, by pid and start time.
    strangers: RefCell<BTreeSet<(i32, u64)>>,
    /// Some processes that a killed guard left behind have not been waited for yet.
    unfinished: Cell<bool>,
}

impl Spawner {
    /// Makes this process a subreaper (PR_SET_CHILD_SUBREAPER(2const)).
    pub fn new() -> io::Result<Self> {
        Self::with_guard("/proc/self/exe".into())
    }

    /// Like [`new`](Self::new), but with another binary that has [`exec_main`](super::exec_main) as
    /// its `exec` command. For processes that are not lbd: tests.
    pub fn with_guard(binary: PathBuf) -> io::Result<Self> {
        prctl::set_child_subreaper(true)?;
        let registry = ChildRegistry {
            binary,
            template: RefCell::default(),
            guards: RefCell::default(),
            strangers: RefCell::default(),
            unfinished: Cell::new(false),
        };
        let before = below(&processes(), &[getpid().as_raw()]);
        registry.strangers.borrow_mut().extend(before.iter().map(identity));
        Ok(Self(Rc::new(registry)))
    }

    /// Starts a worker. [`Child::next`] reports what happens to it, also if the program does not
    /// exist.
    ///
    /// Fails where there are no descriptors, memory or processes left. Must be called in a tokio
    /// runtime.
    pub fn spawn(&self, launch: Launch<'_>) -> io::Result<Child> {
        let Launch { streams, listeners, cgroup, .. } = launch;
        let (listeners, names): (Vec<_>, _) = listeners.into_iter().unzip();
        let description = Description {
            program: launch.program.map(PathBuf::into_os_string),
            argv: launch.argv.into_iter().map(OsString::from).collect(),
            env: launch.env,
            directory: launch.directory.into_os_string(),
            umask: launch.umask,
            user: launch.user,
            group: launch.group,
            output: streams.file.as_ref().map(|(_, path)| path.clone().into_os_string()),
            open_files: launch.open_files,
            listeners: names,
        };
        let (ours, theirs) = pair()?;
        let (stdout, stderr) = (streams.stdout.as_fd(), streams.stderr.as_fd());
        let reader = streams.file.as_ref().map(|(reader, _)| reader.as_fd());
        let folder = cgroup.as_ref().map(Cgroup::directory);
        start(&ours, &description, stdout, stderr, reader, &listeners, folder)?;
        // SAFETY: `ours` is open, and its `AsyncFd` alone owns it, and never gives it back.
        let socket = unsafe { AsyncFd::register_with_interest(ours, Interest::READABLE) }?;
        let guard = GuardProcess::new(self.0.fork_guard(theirs.as_fd(), &launch.label)?)
            // The guard finds that lbd has abandoned it, and ends.
            .inspect_err(|_| self.0.unfinished.set(true))?;
        self.0.guards.borrow_mut().insert(guard.pid);
        Ok(Child {
            channel: Rc::new(GuardChannel { socket, guard: guard.pid, alive: Cell::new(true) }),
            guard,
            phase: Phase::Starting(streams.pid),
            cgroup,
            registry: Rc::clone(&self.0),
        })
    }

    /// Reaps ended children that are not guards. Must be called on `SIGCHLD`; costs almost nothing
    /// where there are none.
    pub fn reap(&self) {
        self.0.template.borrow_mut().take_if(|template| template.has_ended());
        if self.0.unfinished.get() || !self.0.strangers.borrow().is_empty() {
            self.0.sweep();
        }
    }
}

impl ChildRegistry {
    /// Makes the template fork a guard; see [`Template::fork_guard`].
    fn fork_guard(&self, channel: BorrowedFd<'_>, label: &str) -> io::Result<i32> {
        let mut current = self.template.borrow_mut();
        let mut fork = || {
            let template = match &mut *current {
                Some(template) => template,
                None => current.insert(Template::start(&self.binary)?),
            };
            // A template that does not answer may still do so later: what it forks then counts as a
            // leftover.
            template.fork_guard(channel, label).inspect_err(|error| {
                if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::TimedOut) {
                    *current = None;
                    self.unfinished.set(true);
                }
            })
        };
        match fork() {
            // Somebody has killed the template since: fork from a new one.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => fork(),
            outcome => outcome,
        }
    }

    /// Kills and reaps the descendants of this process that it neither started nor had from the
    /// beginning. Returns how many such children it found; zero means that none are left.
    fn sweep(&self) -> usize {
        let own = getpid().as_raw();
        let all = processes();
        let guards = self.guards.borrow();
        let template = self.template.borrow().as_ref().map(Template::pid);
        let is_ours = |pid: i32| guards.contains(&pid) || template == Some(pid);
        let mut strangers = self.strangers.borrow_mut();
        let known = |process: &Process| strangers.contains(&identity(process));

        // Processes that the strangers started since are strangers too, and are reparented to lbd
        // when their parents end.
        let (theirs, left): (Vec<Process>, Vec<Process>) = all
            .iter()
            .filter(|process| process.parent == own && !is_ours(process.pid))
            .partition(|process| known(process));
        let pids = |list: &[Process]| list.iter().map(|process| process.pid).collect::<Vec<_>>();
        let mut still: BTreeSet<_> =
            all.iter().filter(|process| known(process)).map(identity).collect();
        still.extend(below(&all, &pids(&theirs)).iter().map(identity));
        *strangers = still;

        kill_all(&left);
        kill_all(&below(&all, &pids(&left)));
        for process in theirs.iter().chain(&left) {
            reap(Some(process.pid));
        }
        // Count those just reaped as well: their own children may not have been recognised in this
        // scan.
        self.unfinished.set(!left.is_empty());
        left.len()
    }
}

/// A started worker. Dropping it kills the worker, as the end of lbd would.
#[derive(Debug)]
pub struct Child {
    channel: Rc<GuardChannel>,
    guard: GuardProcess,
    phase: Phase,
    /// Removed as soon as no process is left.
    cgroup: Option<Cgroup>,
    registry: Rc<ChildRegistry>,
}

#[derive(Debug)]
enum Phase {
    /// The program has not started yet. Holds where to send its pid.
    Starting(Option<oneshot::Sender<i32>>),
    Running,
    /// Until the guard has ended.
    Ending,
    /// Until nothing is left that a killed guard left behind, or until this time.
    Clearing(Instant),
    Gone,
}

impl Child {
    /// The guard's pid. The program's pid is in [`ChildEvent::Started`].
    pub fn guard_pid(&self) -> i32 {
        self.channel.guard
    }

    /// A handle that can signal the worker, independent of where this `Child` is.
    pub fn controller(&self) -> Controller {
        Controller(Rc::downgrade(&self.channel))
    }

    /// The next event: `Started` and `Exited`, or `Failed`; then `Gone`; and `None` after that.
    /// `Output` may come before `Exited`.
    ///
    /// Cancel safe. While the program runs this may wait forever, and [`ChildEvent::Gone`] may take
    /// as long as the kernel keeps a killed process from dying.
    pub async fn next(&mut self) -> Option<ChildEvent> {
        loop {
            match &mut self.phase {
                Phase::Starting(_) | Phase::Running => {
                    let report = self.channel.hear().await;
                    return Some(self.take(report));
                }
                Phase::Ending => {
                    let status = self.guard.ended().await;
                    self.channel.alive.set(false);
                    self.registry.guards.borrow_mut().remove(&self.channel.guard);
                    self.phase = match status.and_then(|status| status.signal()) {
                        // A guard ends by itself only when nothing is left.
                        None => Phase::Clearing(Instant::now()),
                        Some(_) => {
                            if let Some(cgroup) = &self.cgroup {
                                let _ = cgroup::kill(cgroup.directory());
                            }
                            Phase::Clearing(Instant::now() + PATIENCE)
                        }
                    };
                }
                Phase::Clearing(until) => {
                    let until = *until;
                    if Instant::now() < until && self.registry.sweep() > 0 {
                        sleep(TICK).await;
                    } else {
                        self.phase = Phase::Gone;
                        self.cgroup = None;
                        return Some(ChildEvent::Gone);
                    }
                }
                Phase::Gone => return None,
            }
        }
    }

    /// Converts a report into an event; `None` means that the guard has ended.
    fn take(&mut self, report: Option<Report>) -> ChildEvent {
        if let Some(Report::Output(sentence)) = report {
            return ChildEvent::Output(sentence);
        }
        match (report, mem::replace(&mut self.phase, Phase::Ending)) {
            (Some(Report::Started(pid)), Phase::Starting(waiting)) => {
                self.phase = Phase::Running;
                if let Some(waiting) = waiting {
                    let _ = waiting.send(pid);
                }
                ChildEvent::Started { pid }
            }
            (Some(Report::Failed(reason)), _) => ChildEvent::Failed(reason),
            (Some(Report::Exited(exit)), _) => ChildEvent::Exited(exit),
            (_, Phase::Starting(_)) => ChildEvent::Failed("its guard was killed".to_owned()),
            (_, _) => ChildEvent::Exited(Exit::Lost),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Nobody else waits for the guard, which is about to end.
        if self.channel.alive.get()
            && let Ok(runtime) = Handle::try_current()
            && let Ok(guard) = GuardProcess::new(self.guard.pid)
        {
            runtime.spawn(async move { guard.ended().await });
        }
    }
}

/// Signals a worker. Does nothing once the worker has ended.
#[derive(Debug, Clone)]
pub struct Controller(Weak<GuardChannel>);

impl Controller {
    /// Sends `signal` to the program's process group. If the program has not started yet, the
    /// signal is sent as soon as it has. A stopped process is continued, so that it can act on the
    /// signal.
    pub fn signal(&self, signal: Signal) {
        self.order(Order::Signal(signal as i32));
    }

    /// Asks the worker to stop with `signal`, sent as [`signal`](Self::signal) does, or to the
    /// program alone. From now on the worker's end is reported only when its whole process tree has
    /// ended: the rest of its process group is waited for without a limit, and then other processes
    /// get the signal and a short time. The caller ends the wait with [`kill`](Self::kill), after
    /// `timeout`.
    pub fn stop(&self, signal: Signal, to: StopTo, timeout: Duration) {
        self.order(Order::Stop(signal as i32, to, timeout));
    }

    /// Reopens the worker's output file, if its output goes to one.
    pub fn reopen_output(&self) {
        self.order(Order::Reopen);
    }

    /// Kills the program and everything that it started, in whatever session.
    pub fn kill(&self) {
        self.order(Order::Kill);
    }

    fn order(&self, order: Order) {
        let Some(channel) = self.0.upgrade().filter(|channel| channel.alive.get()) else { return };
        // An error means that the guard has ended, which `Child::next` is about to report.
        let _ = tell(&channel.socket, &order);
        // The guard may have been stopped (SIGSTOP), and nothing else would continue it.
        let _ = kill(Pid::from_raw(channel.guard), Signal::SIGCONT);
    }
}

/// A guard, as a child of this process.
#[derive(Debug)]
struct GuardProcess {
    pid: i32,
    /// Readable when the guard has ended (pidfd_open(2)).
    handle: AsyncFd<OwnedFd>,
}

impl GuardProcess {
    /// `pid` must be a child that has not been reaped.
    fn new(pid: i32) -> io::Result<Self> {
        let child = rustix::process::Pid::from_raw(pid).ok_or(ErrorKind::InvalidInput)?;
        let handle = rustix::process::pidfd_open(child, PidfdFlags::empty())?;
        // SAFETY: `handle` is open, and its `AsyncFd` alone owns it, and never gives it back.
        let handle = unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE) }?;
        Ok(Self { pid, handle })
    }

    /// Waits until the guard has ended, and reaps it; `None` if it was reaped elsewhere. Cancel
    /// safe.
    async fn ended(&self) -> Option<ExitStatus> {
        loop {
            let mut ready = self.handle.readable().await.ok()?;
            match reap(Some(self.pid)) {
                Reaped::Ended(_, status) => return Some(status),
                Reaped::Alive => ready.clear_ready(),
                Reaped::None => return None,
            }
        }
    }
}

/// The channel to a guard.
#[derive(Debug)]
struct GuardChannel {
    socket: AsyncFd<OwnedFd>,
    guard: i32,
    /// The guard has not been reaped, so its pid can't belong to another process.
    alive: Cell<bool>,
}

impl GuardChannel {
    /// Waits for the guard's next report; `None` if the guard has ended.
    async fn hear(&self) -> Option<Report> {
        let report = self.socket.async_io(Interest::READABLE, |socket| hear(socket)).await;
        report.ok().flatten()
    }
}
