//! lbd's side of a worker: its guard is started, told what to do, listened to and reaped here.

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

/// How long the last event of a killed guard's worker is held back while the kernel, not lbd, keeps
/// one of its processes from dying.
const PATIENCE: Duration = Duration::from_secs(5);

/// Between two looks for what a killed guard left behind.
const TICK: Duration = Duration::from_millis(5);

/// What to start.
#[derive(Debug)]
pub struct Launch<'a> {
    /// What `ps` shows beside the guard: `web/9002`.
    pub label: String,
    /// The file to run, where it is not the one that the first of `argv` names.
    pub program: Option<PathBuf>,
    /// Not empty, and without placeholders. The first is looked up in the `PATH` of `env`, or, with
    /// a `/` in it, from `directory`.
    pub argv: Vec<String>,
    /// All of it, but for what the start adds (see [`environment`](super::environment())).
    pub env: Vec<(OsString, OsString)>,
    /// The working folder.
    pub directory: PathBuf,
    /// The listening sockets to pass from descriptor 3 on, as they are (so: blocking), and their
    /// names; at most [`MAX_LISTENERS`](crate::config::MAX_LISTENERS).
    pub listeners: Vec<(BorrowedFd<'a>, String)>,
    /// Where standard output and error go.
    pub streams: Streams,
    /// The file mode creation mask; lbd's own where `None`.
    pub umask: Option<u32>,
    /// The user's name or number; lbd's own where `None`.
    pub user: Option<String>,
    /// The group's name or number; where `None`, the user's own, or lbd's.
    pub group: Option<String>,
    /// The soft and the hard limit of open files; lbd's own where `None`.
    pub open_files: Option<(u64, u64)>,
    /// The cgroup that the program is to be in, for itself.
    pub cgroup: Option<Cgroup>,
}

/// What becomes of a started worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChildEvent {
    /// The program runs.
    Started {
        /// The program's process id.
        pid: i32,
    },
    /// The program never ran, for this reason: a sentence.
    Failed(String),
    /// The program ended. What it started may still be there for an instant, but not where the
    /// worker was asked to stop.
    Exited(Exit),
    /// The file that its output goes to can't be written to, or opened anew, for this reason: a
    /// sentence. It is tried again.
    Output(String),
    /// Nothing of it is left: always the last event.
    Gone,
}

/// Starts guards, and takes in what a killed guard leaves behind. There is one in a process.
///
/// It takes every child of the process that it did not start for such a leftover, and kills it; but
/// not the children that the process had from the beginning (those of a shell that ended with
/// `exec lbd`), nor theirs. So nothing else in this process may start children.
#[derive(Debug, Clone)]
pub struct Spawner(Rc<ChildRegistry>);

#[derive(Debug)]
struct ChildRegistry {
    /// What templates are started from.
    binary: PathBuf,
    /// What guards are forked from; `None` before the first, and after the end of one.
    template: RefCell<Option<Template>>,
    /// The guards that are not reaped yet.
    guards: RefCell<BTreeSet<i32>>,
    /// What was there before, by pid and start time.
    strangers: RefCell<BTreeSet<(i32, u64)>>,
    /// A killed guard's leftovers could not be waited for.
    unfinished: Cell<bool>,
}

impl Spawner {
    /// Makes this process a subreaper (PR_SET_CHILD_SUBREAPER(2const)).
    pub fn new() -> io::Result<Self> {
        Self::with_guard("/proc/self/exe".into())
    }

    /// As [`new`](Self::new), with another binary that has [`exec_main`](super::exec_main) as its
    /// `exec` command, for processes that are not lbd: tests.
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

    /// Starts a worker. What becomes of it, a program that does not exist included, comes from
    /// [`Child::next`].
    ///
    /// Fails where there are no descriptors, memory or processes left. To be called in a tokio
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
            // It finds that lbd has left it alone, and ends.
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

    /// Reaps children other than guards that have ended. To be called on `SIGCHLD`; costs next to nothing
    /// where there are none.
    pub fn reap(&self) {
        self.0.template.borrow_mut().take_if(|template| template.has_ended());
        if self.0.unfinished.get() || !self.0.strangers.borrow().is_empty() {
            self.0.sweep();
        }
    }
}

impl ChildRegistry {
    /// Has the template fork a guard; see [`Template::fork_guard`].
    fn fork_guard(&self, channel: BorrowedFd<'_>, label: &str) -> io::Result<i32> {
        let mut current = self.template.borrow_mut();
        let mut fork = || {
            let template = match &mut *current {
                Some(template) => template,
                None => current.insert(Template::start(&self.binary)?),
            };
            // One that does not answer may do so later: what it forks then is a leftover.
            template.fork_guard(channel, label).inspect_err(|error| {
                if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::TimedOut) {
                    *current = None;
                    self.unfinished.set(true);
                }
            })
        };
        match fork() {
            // Somebody has killed it since.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => fork(),
            outcome => outcome,
        }
    }

    /// Kills and reaps what is below this process and was neither started here nor there before.
    /// How many such children it found: none are left when it finds none.
    fn sweep(&self) -> usize {
        let own = getpid().as_raw();
        let all = processes();
        let guards = self.guards.borrow();
        let template = self.template.borrow().as_ref().map(Template::pid);
        let is_ours = |pid: i32| guards.contains(&pid) || template == Some(pid);
        let mut strangers = self.strangers.borrow_mut();
        let known = |process: &Process| strangers.contains(&identity(process));

        // What strangers have started since is theirs, and comes here when they end.
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
        // Those just reaped count: what they left in turn was not seen as theirs, maybe.
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
    /// Removed as soon as nothing is left.
    cgroup: Option<Cgroup>,
    registry: Rc<ChildRegistry>,
}

#[derive(Debug)]
enum Phase {
    /// Until it has started: who is waiting for its pid.
    Starting(Option<oneshot::Sender<i32>>),
    Running,
    /// Until the guard has ended.
    Ending,
    /// Until there is nothing left that a killed guard left behind; or until then.
    Clearing(Instant),
    Gone,
}

impl Child {
    /// The guard's process id: not the program's, which is in [`ChildEvent::Started`].
    pub fn guard_pid(&self) -> i32 {
        self.channel.guard
    }

    /// What signals the worker, from wherever the driver keeps it.
    pub fn controller(&self) -> Controller {
        Controller(Rc::downgrade(&self.channel))
    }

    /// The next event: `Started` and `Exited`, or `Failed`; then `Gone`; and `None` after that. Before
    /// `Exited`, there may be `Output`.
    ///
    /// Cancel safe. It does not end by itself while the program runs, and [`ChildEvent::Gone`] may
    /// take as long as the kernel keeps a killed process from dying.
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
                        // It ends by itself only when nothing is left.
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

    /// The event that `report` is; `None` is the end of the guard.
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
        // Nobody else waits for its guard, which is about to end.
        if self.channel.alive.get()
            && let Ok(runtime) = Handle::try_current()
            && let Ok(guard) = GuardProcess::new(self.guard.pid)
        {
            runtime.spawn(async move { guard.ended().await });
        }
    }
}

/// Signals a worker. After its end, nothing happens.
#[derive(Debug, Clone)]
pub struct Controller(Weak<GuardChannel>);

impl Controller {
    /// Sends `signal` to the program and its process group; in the group's stead, if it has not
    /// started yet, as soon as it has. Continues a stopped one, so that it can act on the signal.
    pub fn signal(&self, signal: Signal) {
        self.order(Order::Signal(signal as i32));
    }

    /// Asks the worker to stop with `signal`, as [`signal`](Self::signal) sends it, or to the program
    /// alone. From now on the end of the program is its end only when its whole tree has ended:
    /// what is left of its process group is waited for without a bound, the rest gets the signal and
    /// a short time after that. [`kill`](Self::kill) cuts it short, to be called after `timeout`.
    pub fn stop(&self, signal: Signal, to: StopTo, timeout: Duration) {
        self.order(Order::Stop(signal as i32, to, timeout));
    }

    /// Has the file opened anew that its output goes to, if it goes to one.
    pub fn reopen_output(&self) {
        self.order(Order::Reopen);
    }

    /// Kills the program and everything that it started, whatever session that is in.
    pub fn kill(&self) {
        self.order(Order::Kill);
    }

    fn order(&self, order: Order) {
        let Some(channel) = self.0.upgrade().filter(|channel| channel.alive.get()) else { return };
        // An error says that the guard has ended, as `Child::next` is about to find.
        let _ = tell(&channel.socket, &order);
        // It may have been stopped; nothing else could wake it.
        let _ = kill(Pid::from_raw(channel.guard), Signal::SIGCONT);
    }
}

/// A guard as a child of this process.
#[derive(Debug)]
struct GuardProcess {
    pid: i32,
    /// Readable when it has ended (pidfd_open(2)).
    handle: AsyncFd<OwnedFd>,
}

impl GuardProcess {
    /// Of a child that has not been reaped.
    fn new(pid: i32) -> io::Result<Self> {
        let child = rustix::process::Pid::from_raw(pid).ok_or(ErrorKind::InvalidInput)?;
        let handle = rustix::process::pidfd_open(child, PidfdFlags::empty())?;
        // SAFETY: `handle` is open, and its `AsyncFd` alone owns it, and never gives it back.
        let handle = unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE) }?;
        Ok(Self { pid, handle })
    }

    /// Reaps it once it has ended; `None` where somebody else has. Cancel safe.
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

/// The way to a guard.
#[derive(Debug)]
struct GuardChannel {
    socket: AsyncFd<OwnedFd>,
    guard: i32,
    /// The guard has not been reaped, so `guard` is nobody else's.
    alive: Cell<bool>,
}

impl GuardChannel {
    /// What the guard reports next; `None` where it has ended.
    async fn hear(&self) -> Option<Report> {
        let report = self.socket.async_io(Interest::READABLE, |socket| hear(socket)).await;
        report.ok().flatten()
    }
}
