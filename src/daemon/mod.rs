//! The driver: an event loop that waits for events, passes them to the supervisor, and carries out
//! the effects that the supervisor returns.
//!
//! It runs on the main thread, in one `current_thread` runtime, and is the only part of lbd that
//! starts child processes. It keeps processes, sockets and routes, by worker id or service name,
//! but none of the supervisor's state: what they mean is for the supervisor to know.

mod descriptors;
mod direct_listeners;
mod effects;
mod event_log;
mod frontends;
mod limits;
mod metrics;
mod notify;
mod passed;
mod reload;
mod requests;
mod shutdown;
mod slot_stats;
mod status;
mod status_line;
mod warnings;
mod workers;

use std::{
    io,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use nix::{
    libc::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1},
    sys::prctl,
};
use signal_hook_tokio::Signals;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinSet,
    time::sleep_until,
};
use tracing::{info, warn};

use crate::{
    admin::{self, ClaimError, ServerError},
    config::{Config, ConfigError, Token, shown_key},
    logging::{LogError, Logging},
    net::BindError,
    process::Cgroups,
    proxy::{DataPlane, Settings},
    supervisor::{Event, Service, Supervisor},
};
use descriptors::Descriptors;
pub use direct_listeners::SteerError;
use effects::ReservedPermits;
use event_log::EventLog;
use frontends::Frontends;
use notify::Manager;
pub use passed::Passed;
use passed::PassedSockets;
use requests::{Asker, ReloadHistory, Requests};
use workers::WorkerTable;

/// How many events may wait for the main thread; a sender of one more waits.
const QUEUED_EVENTS: usize = 1024;

/// How many requests of operators may wait for the main thread; a sender of one more waits.
const QUEUED_REQUESTS: usize = 16;

/// How much more time the service manager is asked for than lbd's own deadlines allow.
const SLACK: Duration = Duration::from_secs(10);

/// A second SIGTERM or SIGINT within this time after the first one is taken for the same request.
const TWICE: Duration = Duration::from_millis(200);

/// How long an immediate stop may take before lbd exits anyway; the guards then kill the remaining
/// workers.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

/// The daemon could not start, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The log file can't be opened.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Another daemon runs with this configuration, or the `[admin] socket` can't be used.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The admin API can't be served.
    #[error(transparent)]
    Admin(#[from] ServerError),
    /// lbd can't listen on an address of a service.
    #[error("service {service}: {source}{place}")]
    Bind {
        /// The service.
        service: Arc<str>,
        /// Where the configuration has the address, in brackets; empty without a configuration
        /// file.
        place: String,
        /// The reason.
        source: BindError,
    },
    /// The kernel can't be set up to hand out a service's connections (`route = "direct"`).
    #[error("service {service}: {source}")]
    Steer {
        /// The service.
        service: Arc<str>,
        /// The reason.
        source: SteerError,
    },
    /// The configuration asks for something that lbd can't do here.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The system denies something that the daemon needs.
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
}

/// Where the configuration has a service's addresses, after a space:
/// `(/etc/lb.toml:3: service.web.listen)`.
fn place_of_listen(config: &Config, service: &str) -> String {
    let Some(file) = &config.path else { return String::new() };
    let key = format!("service.{}.listen", shown_key(service));
    let line = config.lines.get(&key).map(|line| format!(":{line}")).unwrap_or_default();
    format!(" ({}{line}: {key})", file.display())
}

/// Runs the daemon until it is stopped. Blocks. Of the sockets that were `passed` to it, it uses
/// those whose addresses `config` asks for.
///
/// # Errors
/// If the daemon can't start. No process is left running then.
pub fn run(config: Config, passed: Passed) -> Result<(), DaemonError> {
    supervise(config, passed).inspect_err(notify::failed)
}

fn supervise(config: Config, passed: Passed) -> Result<(), DaemonError> {
    // Processes of lbd's own user, such as a worker without a user of its own, can't trace lbd or
    // read or change its memory (ptrace(2)), and no core dump holds clients' data. If the kernel
    // refuses this, lbd runs all the same.
    let _ = prctl::set_dumpable(false);
    // First of all: if two daemons have the same configuration, the second one must not change
    // anything.
    let socket = match admin::Socket::claim(&config) {
        Err(error) if !matches!(error, ClaimError::NoFolder(_)) => return Err(error.into()),
        socket => socket,
    };
    let descriptors = Descriptors::raise();
    // Before any process is started: if a port is taken, lbd does not start.
    let tcp = admin::TcpSockets::bind(&config.admin.listen)?;
    // Declared first and so dropped last: log lines of the shutdown are still written.
    let logging = Logging::start(&config.log)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tasks = tokio::task::LocalSet::new();
    tasks.block_on(&runtime, async {
        let signals = Signals::new([SIGHUP, SIGTERM, SIGINT, SIGQUIT, SIGUSR1, SIGCHLD])?;
        let (sender, requests) = mpsc::channel(QUEUED_REQUESTS);
        if let Err(error) = &socket {
            warn!(%error, "the commands of lbd can't reach it, but signals can");
        }
        if let Ok(socket) = &socket {
            admin::tell_remarks(socket);
        }
        for address in &config.admin.listen {
            info!(%address, token = config.admin.token.is_some(), "admin listening");
        }
        let (token, current) = watch::channel(config.admin.token.clone());
        // Preferably the admin socket's folder, which only lbd and few others can write to. Sockets
        // are in it only for a moment.
        let folder = socket.as_ref().ok().and_then(|socket| socket.path().parent());
        let folder = folder.map_or_else(std::env::temp_dir, Path::to_owned);
        // Dropped after the daemon, so that clients of the admin API that wait for the stop get an
        // answer.
        let _server = admin::Server::start(socket.ok(), tcp, current, sender, logging.recent())?;
        let daemon = Daemon::start(config, passed, &logging, descriptors, token, folder)?;
        daemon.run(signals, requests).await;
        Ok(())
    })
}

struct Daemon<'a> {
    /// The configuration in force.
    config: Config,
    supervisor: Supervisor,
    workers: WorkerTable,
    frontends: Frontends,
    plane: Rc<DataPlane>,
    access: Arc<AtomicBool>,
    /// The token that the admin API asks for over TCP.
    token: watch::Sender<Option<Token>>,
    logging: &'a Logging,
    manager: Manager,
    /// Why the number of workers' processes can't be limited; `None` if it can.
    no_process_limits: Option<String>,
    event_log: EventLog,
    events: mpsc::Receiver<Event>,
    idle: Arc<Notify>,
    /// Tasks that close listeners and empty their accept queues. A task returns the service if it
    /// closes all of the service's listeners.
    closing: JoinSet<Option<Arc<str>>>,
    /// Permits for connections that were taken out of accept queues.
    reserved: ReservedPermits,
    /// When accept queues are drained again, if nothing happens before.
    drain_at: Option<Instant>,
    /// A reload that waits until `closing` is empty, and those who asked for it.
    reload_wanted: Option<Vec<Asker>>,
    requests: Requests,
    reload_history: ReloadHistory,
    stage: Stage,
    ready: bool,
    started: Instant,
    dropped_lines: usize,
    dropped_told: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    /// A graceful stop, begun at this time.
    Stopping(Instant),
    /// An immediate stop, begun at this time.
    Aborting(Instant),
    /// No worker is left. After a graceful stop, which began at this time, lbd still waits for
    /// clients for the rest of the drain timeout; with `None` it does not wait.
    Finished(Option<Instant>),
}

impl<'a> Daemon<'a> {
    fn start(
        config: Config,
        passed: Passed,
        logging: &'a Logging,
        descriptors: Descriptors,
        token: watch::Sender<Option<Token>>,
        folder: PathBuf,
    ) -> Result<Self, DaemonError> {
        let now = Instant::now();
        let cgroups = Cgroups::claim();
        let no_process_limits = limits::no_process_limits(&cgroups);
        if let Some(why) = &no_process_limits {
            config.refuse_process_limits(why)?;
        }
        let (sender, events) = mpsc::channel(QUEUED_EVENTS);
        let idle = Arc::new(Notify::new());
        let start_timeouts = config.services.iter().map(|service| service.health.start_timeout);
        let patience = start_timeouts.max().unwrap_or_default() + SLACK;
        let workers = config.services.iter().map(|service| service.slots.count()).sum();
        let max_held = descriptors.connections(workers, config.admin.listen.len());
        let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let plane = Rc::new(DataPlane::start(Settings { threads, max_held })?);
        let access = Arc::new(AtomicBool::new(config.log.access));
        let passed = PassedSockets::choose(passed, &config.services);
        let mut daemon = Self {
            supervisor: Supervisor::new(seed()),
            workers: WorkerTable::new(
                descriptors,
                cgroups.ok(),
                sender,
                Arc::clone(&idle),
                folder,
                config.log.output_rate,
            )?,
            frontends: Frontends::new(Rc::clone(&plane), Arc::clone(&access), passed),
            plane,
            access,
            token,
            logging,
            manager: Manager::from_environment(now, now + patience),
            no_process_limits,
            event_log: EventLog::default(),
            events,
            idle,
            closing: JoinSet::new(),
            reserved: ReservedPermits::default(),
            drain_at: None,
            reload_wanted: None,
            requests: Requests::default(),
            reload_history: ReloadHistory::new(),
            stage: Stage::Running,
            ready: false,
            started: now,
            dropped_lines: 0,
            dropped_told: now,
            config,
        };
        let services = &daemon.config.services;
        let bound = daemon
            .frontends
            .bind(services, &daemon.workers.bindings.direct_listeners)
            .map_err(|(service, source)| {
                let place = place_of_listen(&daemon.config, &service);
                DaemonError::Bind { service, place, source }
            })?;
        let steerable = daemon
            .workers
            .bindings
            .direct_listeners
            .prepare(services, |address| daemon.frontends.socket(address, &bound))
            .map_err(|(service, source)| DaemonError::Steer { service, source })?;
        let pid = std::process::id();
        info!(version = env!("CARGO_PKG_VERSION"), pid, "starting");
        let connections = daemon.plane.max_held();
        info!(limit = descriptors.limit, connections, "descriptors");
        daemon.workers.bindings.direct_listeners.adopt(steerable, &daemon.config.services);
        let (services, ticket) = (daemon.config.services.clone(), daemon.requests.ticket());
        daemon.handle(Event::Apply { services, ticket });
        daemon.frontends.open(bound);
        warnings::tell(&daemon.config);
        Ok(daemon)
    }

    /// Runs the event loop until no worker is left, then waits for the last connections.
    async fn run(mut self, mut signals: Signals, mut asked: mpsc::Receiver<admin::Request>) {
        while !matches!(self.stage, Stage::Finished(_)) {
            let deadline = self.deadline();
            let clock = sleep_until(deadline.unwrap_or_else(far_future).into());
            tokio::select! {
                Some(event) = self.events.recv() => self.handle(event),
                Some(signal) = signals.next() => self.signal(signal),
                Some(request) = asked.recv() => self.request(request),
                () = self.idle.notified() => self.look_for_idle(),
                Some(Ok(service)) = self.closing.join_next() => self.closed(service),
                () = clock, if deadline.is_some() => self.timeout(),
            }
            self.tell_askers();
            self.tell_dropped_lines();
            self.tell_manager();
        }
        self.flush(&mut signals, &mut asked).await;
        // Before the last log line, since each connection that is cut has its line in the access
        // log.
        self.plane.cut();
        let uptime = event_log::seconds(self.started.elapsed());
        info!(uptime, "stopped");
    }

    fn deadline(&self) -> Option<Instant> {
        let own = match self.stage {
            Stage::Aborting(since) => Some(since + ABORT_PATIENCE),
            Stage::Running | Stage::Stopping(_) | Stage::Finished(_) => self.supervisor.deadline(),
        };
        own.into_iter().chain(self.drain_at).chain(self.manager.deadline()).min()
    }

    fn timeout(&mut self) {
        let now = Instant::now();
        if let Stage::Aborting(since) = self.stage
            && now >= since + ABORT_PATIENCE
        {
            warn!("some workers could not be killed in time, their guards go on");
            self.stage = Stage::Finished(None);
            return;
        }
        let effects = self.supervisor.timeout(now);
        self.perform(effects, true);
    }

    fn signal(&mut self, signal: i32) {
        match signal {
            SIGHUP => self.reload(Vec::new()),
            SIGTERM | SIGINT if self.stage == Stage::Running => self.stop(),
            SIGTERM | SIGINT if self.is_one_of_two(Instant::now()) => {}
            SIGTERM | SIGINT | SIGQUIT => self.abort(),
            SIGUSR1 => {
                self.logging.reopen();
                self.workers.reopen_outputs();
            }
            SIGCHLD => self.workers.reap(),
            _ => {}
        }
    }

    /// Whether a stop has just begun. timeout(1) sends the signal to the process and then to its
    /// group; the second signal must not turn the graceful stop into an immediate one.
    fn is_one_of_two(&self, now: Instant) -> bool {
        let began = match self.stage {
            Stage::Stopping(since) | Stage::Finished(Some(since)) => Some(since),
            Stage::Running | Stage::Aborting(_) | Stage::Finished(None) => None,
        };
        began.is_some_and(|since| now.saturating_duration_since(since) < TWICE)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Exited { id, .. } => self.exited(id),
            Event::Gone { id } => {
                self.exited(id);
                self.forget_worker(id);
            }
            Event::Probed { id, ref outcome } => self.workers.probed(id, outcome),
            _ => {}
        }
        let is_routine = matches!(event, Event::Probed { .. } | Event::Memory { .. });
        let effects = self.supervisor.handle(event, Instant::now());
        self.perform(effects, is_routine);
    }

    fn look_for_idle(&mut self) {
        for id in self.workers.idle() {
            self.handle(Event::Idle { id });
        }
    }

    fn look_whether_ready(&mut self) {
        if self.ready || self.stage != Stage::Running {
            return;
        }
        let is_served = |service: &Service| !service.rotation().workers.is_empty();
        self.ready = self.supervisor.services().all(is_served);
        if self.ready {
            let after = event_log::seconds(self.started.elapsed());
            info!(after, "ready");
            self.tell_ready();
        }
    }

    fn tell_ready(&mut self) {
        self.manager.ready(&self.status_line(), Instant::now());
    }

    /// Tells the service manager what is due at the end of a turn of the event loop.
    fn tell_manager(&mut self) {
        let now = Instant::now();
        self.manager.timeout(now, || self.plane.progress());
        if self.manager.wants_status(now) {
            self.manager.status(&self.status_line(), now);
        }
    }

    fn tell_dropped_lines(&mut self) {
        let dropped = self.logging.dropped_lines();
        if dropped > self.dropped_lines && self.dropped_told.elapsed() >= Duration::from_secs(1) {
            let lines = dropped - self.dropped_lines;
            // With the total, since this line is lost as well while the disk is full.
            warn!(lines, total = dropped, "log lines dropped, the log is full or too slow");
            self.dropped_lines = dropped;
            self.dropped_told = Instant::now();
        }
    }

    fn set_access(&self, access: bool) {
        self.access.store(access, Ordering::Relaxed);
    }
}

/// A random seed, so that restarts on different machines are not synchronised.
fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

/// A time for a timer that is not armed.
fn far_future() -> Instant {
    Instant::now() + Duration::from_secs(24 * 3600)
}
