//! The driver: waits for what happens, tells the supervisor, and does what the supervisor asks for.
//!
//! It runs on the main thread, in one `current_thread` runtime, and is the only place where children
//! are started. It holds no state that the supervisor holds: processes, sockets and routes by their
//! incarnation or name, and nothing of what they mean.

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

/// Events that wait for the main thread; whoever brings one more waits too.
const QUEUED_EVENTS: usize = 1024;

/// Operators' requests that wait for the main thread; whoever brings one more waits too.
const QUEUED_REQUESTS: usize = 16;

/// What the service manager grants on top of the longest time that lbd's own deadlines allow.
const SLACK: Duration = Duration::from_secs(10);

/// A second SIGTERM or SIGINT that comes this soon after the first is the same wish.
const TWICE: Duration = Duration::from_millis(200);

/// How long a stop at once may take before lbd ends anyway; its guards then finish the work.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

/// The daemon could not start, or not go on.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The log file can't be opened.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Another daemon runs with this configuration, or `[admin] socket` can't be had.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The admin API can't be served.
    #[error(transparent)]
    Admin(#[from] ServerError),
    /// A service's own address can't be listened on.
    #[error("service {service}: {source}{place}")]
    Bind {
        /// Which service.
        service: Arc<str>,
        /// Where the configuration says so, in brackets; nothing where it is no file.
        place: String,
        /// Why.
        source: BindError,
    },
    /// The kernel can't be had to hand out a service's connections.
    #[error("service {service}: {source}")]
    Steer {
        /// Which service.
        service: Arc<str>,
        /// Why.
        source: SteerError,
    },
    /// The configuration asks for what this lbd can't do.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The system denies what the daemon can't do without.
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
}

/// ` (/etc/lb.toml:3: service.web.listen)`.
fn place_of_listen(config: &Config, service: &str) -> String {
    let Some(file) = &config.path else { return String::new() };
    let key = format!("service.{}.listen", shown_key(service));
    let line = config.lines.get(&key).map(|line| format!(":{line}")).unwrap_or_default();
    format!(" ({}{line}: {key})", file.display())
}

/// Runs the daemon until it is stopped, on the sockets that were `passed` to it as far as they are
/// those that `config` asks for. Blocks.
///
/// # Errors
/// Where it can't start. Nothing is left running then.
pub fn run(config: Config, passed: Passed) -> Result<(), DaemonError> {
    supervise(config, passed).inspect_err(notify::failed)
}

fn supervise(config: Config, passed: Passed) -> Result<(), DaemonError> {
    // What has lbd's user, as a worker without a user of its own, can't trace it, nor read or change its
    // memory (ptrace(2)); and no core of it has anybody's data in it. Where the kernel refuses it, that
    // is no reason not to run.
    let _ = prctl::set_dumpable(false);
    // First of all: of two daemons with one configuration the second must not touch a thing.
    let socket = match admin::Socket::claim(&config) {
        Err(error) if !matches!(error, ClaimError::NoFolder(_)) => return Err(error.into()),
        socket => socket,
    };
    let descriptors = Descriptors::raise();
    // Before anything runs: a port that is taken ends it all.
    let tcp = admin::TcpSockets::bind(&config.admin.listen)?;
    // Declared first, dropped last: what the end has to say is still written.
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
        // Where lbd can write, and few others: it is needed for a moment at a time.
        let folder = socket.as_ref().ok().and_then(|socket| socket.path().parent());
        let folder = folder.map_or_else(std::env::temp_dir, Path::to_owned);
        // Dropped after the daemon, so that whoever waits for it gets an answer.
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
    /// What the admin API asks for over TCP.
    token: watch::Sender<Option<Token>>,
    logging: &'a Logging,
    manager: Manager,
    /// Why workers' processes can't be limited, where they can't.
    no_process_limits: Option<String>,
    event_log: EventLog,
    events: mpsc::Receiver<Event>,
    idle: Arc<Notify>,
    /// Listeners that are being emptied; the service where all of its are.
    closing: JoinSet<Option<Arc<str>>>,
    /// Places for connections that were taken out of accept queues.
    reserved: ReservedPermits,
    /// When accept queues are looked at again, whatever happens.
    drain_at: Option<Instant>,
    /// A reload that waits for that, and who waits for it.
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
    /// Since then, gracefully.
    Stopping(Instant),
    /// Since then, at once.
    Aborting(Instant),
    /// No worker is left. Clients are waited for as long as the stop that began then allows; not at
    /// all where there is no such time.
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

    /// Waits and handles until no worker and no connection is left.
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
        // Before the last line: each connection that is cut has its own.
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

    /// Whether a stop has just begun: timeout(1) sends the signal to the process and then to its group,
    /// which is no second wish.
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

    /// What there is to say to the service manager at the end of a turn.
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
            // Also in all: where the disk is full, this line is lost as well.
            warn!(lines, total = dropped, "log lines dropped, the log is full or too slow");
            self.dropped_lines = dropped;
            self.dropped_told = Instant::now();
        }
    }

    fn set_access(&self, access: bool) {
        self.access.store(access, Ordering::Relaxed);
    }
}

/// Restarts of different machines shall not go in step.
fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

/// What a timer that is not armed would wait for.
fn far_future() -> Instant {
    Instant::now() + Duration::from_secs(24 * 3600)
}
