//! A worker's start: its sockets, its process, and what is told of it from then on.

use std::{
    cell::Cell,
    io,
    net::SocketAddr,
    num::NonZeroU32,
    os::fd::AsFd,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, task::spawn_local};

use super::{InheritedPort, InheritedUnix, WorkerHandle, WorkerTable, listening::Listening};
use crate::{
    config::{Program, SocketMode},
    net::{self, Endpoint, Holder, Port, UnnamedUnixListener},
    probe::Prober,
    process::{self, Cgroup, Child, ChildEvent, Exit, Identity, LastWords, Launch},
    proxy::{Backend, PinnedRoutes},
    supervisor::{Event, Spawn, WorkerId},
};

/// How long the end of a worker that never was healthy is held back for the rest of its output: what
/// it said last is why it ended.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// A worker could not be started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("port {} of {} is {}{}", .0.port(), .0.ip(), .1, taken_hint(.0.port(), .1))]
    PortTaken(SocketAddr, Holder),
    #[error("cannot bind {0}: {1}")]
    Bind(SocketAddr, io::Error),
    #[error("cannot make a unix socket in {}: {}", .0.display(), .1)]
    Unix(PathBuf, io::Error),
    #[error("cannot open its output: {0}")]
    Output(io::Error),
    #[error("cannot limit its processes: {0}")]
    Cgroup(io::Error),
    #[error("cannot start a process: {0}")]
    Spawn(io::Error),
}

impl WorkerTable {
    /// Starts a worker; what becomes of it comes as events, these being the first.
    pub(in crate::daemon) fn spawn(&mut self, order: &Spawn) -> Vec<Event> {
        let id = order.id;
        match self.start(order) {
            Ok(port) => vec![Event::Spawned { id, port }],
            Err(error) => {
                let cheap = matches!(error, StartError::PortTaken(..));
                vec![Event::Failed { id, reason: error.to_string(), cheap }, Event::Gone { id }]
            }
        }
    }

    /// The port of the worker, if it has one.
    fn start(&mut self, order: &Spawn) -> Result<Option<u16>, StartError> {
        let spec = &*order.spec;
        if spec.socket == SocketMode::Direct {
            return self.start_direct(order);
        }
        let wanted = spec.address(order.port.unwrap_or(0));
        let endpoint: Endpoint = match spec.socket {
            SocketMode::Inherit => self.inherit(wanted, order)?.into(),
            SocketMode::Unix => self.inherit_unix(order)?,
            // Whoever has the port would pass for the worker that is to bind it.
            SocketMode::Bind | SocketMode::Direct => {
                net::free(wanted).map_err(|error| port_error(wanted, error))?.into()
            }
        };
        let address = endpoint.inet();
        let started = self.launch(order, endpoint, None);
        if started.is_err() {
            self.unnamed.remove(&order.id);
            if let Some(inherited) = address.and_then(|address| self.ports.get_mut(&address)) {
                // No process has had it.
                inherited.port.abandon(order.id, false);
            }
        }
        started.map(|()| address.map(|address| address.port()))
    }

    /// Starts a worker with sockets of its own on the public addresses. Its port is a name, if it has
    /// been given one.
    fn start_direct(&mut self, order: &Spawn) -> Result<Option<u16>, StartError> {
        let join = self.direct_listeners.join(order);
        join.map_err(|(address, error)| StartError::Bind(address, error))?;
        let routes = self.direct_listeners.ways_to(order);
        let address =
            routes.as_ref().map_or(order.spec.address(0), |routes| routes.first.address());
        let started = self.launch(order, address.into(), routes);
        if started.is_err() {
            self.direct_listeners.leave(order.id, Instant::now());
        }
        self.count_connections();
        started.map(|()| Some(order.port.unwrap_or(address.port())))
    }

    /// A listening unix socket for the worker.
    fn inherit_unix(&mut self, order: &Spawn) -> Result<Endpoint, StartError> {
        let failed = |error| StartError::Unix(self.folder.clone(), error);
        let socket = UnnamedUnixListener::open(&self.folder).map_err(failed)?;
        let endpoint = socket.endpoint().clone();
        let (service, proxy_protocol) = (Arc::clone(&order.service), order.spec.proxy_protocol);
        self.unnamed.insert(order.id, InheritedUnix { socket, service, proxy_protocol });
        Ok(endpoint)
    }

    /// A listening socket for the worker, on a port that is bound now if it is not yet.
    fn inherit(&mut self, wanted: SocketAddr, order: &Spawn) -> Result<SocketAddr, StartError> {
        let (service, proxy_protocol) = (Arc::clone(&order.service), order.spec.proxy_protocol);
        if let Some(inherited) = self.ports.get_mut(&wanted) {
            let joined = inherited.port.join(order.id, proxy_protocol);
            joined.map_err(|error| port_error(wanted, error))?;
            inherited.service = service;
            return Ok(wanted);
        }
        let port = Port::open(wanted, order.id, proxy_protocol);
        let port = port.map_err(|error| port_error(wanted, error))?;
        let address = port.address();
        self.ports.insert(address, InheritedPort { port, service });
        Ok(address)
    }

    fn launch(
        &mut self,
        order: &Spawn,
        endpoint: Endpoint,
        routes: Option<PinnedRoutes>,
    ) -> Result<(), StartError> {
        let spec = &*order.spec;
        let port = endpoint.inet().map(|address| address.port());
        let identity = Identity {
            service: &order.service,
            slot: order.slot,
            port: order.port.filter(|_| routes.is_some()).or(port),
        };
        // Where all are on the same port, that tells nobody from the others.
        let port = if routes.is_some() { order.port } else { port };
        let number = port.map_or(order.slot, u32::from);
        let label: Arc<str> = format!("{}/{number}", order.service).into();
        let streams = self.outputs.open(&spec.output, identity).map_err(StartError::Output)?;
        let last_words = streams.last_words();
        let (program, argv) = match &spec.program {
            Program::Command(argv) => (None, process::expand(argv, identity)),
            Program::Root(root) => {
                let root = root.to_string_lossy().into_owned();
                let mut argv = vec!["lbd", "worker", "--root", &root];
                if routes.is_some() {
                    argv.extend(["--served-by", &label]);
                }
                let argv = argv.into_iter().map(str::to_owned).collect();
                (Some(PathBuf::from("/proc/self/exe")), argv)
            }
        };
        let unnamed = self.unnamed.get(&order.id).map(|inherited| inherited.socket.socket());
        let on_port = || self.ports.get(&endpoint.inet()?)?.port.socket(order.id);
        let inherited = match &routes {
            Some(_) => self.direct_listeners.sockets(order),
            None => unnamed.or_else(on_port).into_iter().collect(),
        };
        let cgroup = self.cgroup(spec.processes)?;
        let launch = Launch {
            label: label.to_string(),
            program,
            argv,
            env: process::environment(
                std::env::vars_os(),
                &spec.env,
                spec.user.as_deref(),
                identity,
            ),
            directory: spec.directory.clone(),
            listeners: inherited
                .into_iter()
                .map(|socket| (socket.as_fd(), order.service.to_string()))
                .collect(),
            streams,
            umask: spec.umask,
            user: spec.user.clone(),
            group: spec.group.clone(),
            open_files: Some(self.descriptors.of_worker(spec.open_files)),
            cgroup,
        };
        let child = self.spawner.spawn(launch).map_err(StartError::Spawn)?;
        let (id, idle) = (order.id, Arc::clone(&self.idle));
        let pinned = routes.as_ref().map(|routes| routes.first.clone());
        let backend = match routes {
            Some(routes) => Backend::direct(id.0, order.slot, label, routes, idle),
            None => Backend::new(id.0, order.slot, label, endpoint, spec.proxy_protocol, idle),
        };
        let (controller, guard) = (child.controller(), child.guard_pid());
        let service = Arc::clone(&order.service);
        self.slot_stats.open(&service, order.slot, Arc::clone(&backend));
        let was_healthy = Rc::new(Cell::new(false));
        let address = backend.endpoint().inet();
        let listening =
            Listening::new(self.diag.clone(), spec.socket, address, guard, order.stands_in_for);
        spawn_local(report(Reported {
            child,
            id,
            service: Arc::clone(&order.service),
            slot: order.slot,
            last_words: last_words.clone(),
            was_healthy: Rc::clone(&was_healthy),
            events: self.events.clone(),
        }));
        let handle = WorkerHandle {
            controller,
            guard,
            service,
            backend,
            retired: false,
            probing: false,
            proven: false,
            pinned,
            prober: Prober::new(self.diag.clone()),
            listening,
            probe: None,
            last_words,
            was_healthy,
        };
        self.handles.insert(id, handle);
        Ok(())
    }

    /// A worker's own cgroup, where there can be one. It has to be where its `processes` are
    /// limited.
    fn cgroup(&self, processes: Option<NonZeroU32>) -> Result<Option<Cgroup>, StartError> {
        let made = self.cgroups.as_ref().map(|cgroups| cgroups.make(processes)).transpose();
        match (made, processes) {
            (Ok(None), Some(_)) => Err(StartError::Cgroup(io::ErrorKind::Unsupported.into())),
            (Ok(cgroup), _) => Ok(cgroup),
            (Err(error), Some(_)) => Err(StartError::Cgroup(error)),
            (Err(error), None) => {
                tracing::warn!(%error, "a worker has no cgroup of its own");
                Ok(None)
            }
        }
    }
}

/// A child whose fate is told.
struct Reported {
    child: Child,
    id: WorkerId,
    service: Arc<str>,
    slot: u32,
    last_words: LastWords,
    /// A probe has passed.
    was_healthy: Rc<Cell<bool>>,
    events: mpsc::Sender<Event>,
}

/// Hands on what becomes of a child until nothing of it is left.
async fn report(reported: Reported) {
    let Reported { mut child, id, service, slot, last_words, was_healthy, events } = reported;
    loop {
        let event = match child.next().await {
            Some(ChildEvent::Started { pid }) => Event::Started { id, pid },
            Some(ChildEvent::Failed(reason)) => Event::Failed { id, reason, cheap: false },
            Some(ChildEvent::Exited(exit)) => {
                let by_signal = !matches!(exit, Exit::Code(_));
                if !was_healthy.get() {
                    last_words.complete(LAST_WORDS).await;
                }
                let said = last_words.lines();
                Event::Exited { id, status: exit.to_string(), by_signal, said }
            }
            Some(ChildEvent::Output(error)) => {
                tracing::warn!(service = &*service, slot, error, "output not written");
                continue;
            }
            Some(ChildEvent::Gone) => Event::Gone { id },
            None => return,
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// What would help against who has it.
fn taken_hint(port: u16, holder: &Holder) -> String {
    match holder {
        Holder::Listener { process: Some(_), .. } | Holder::Orphan => String::new(),
        Holder::Listener { .. } | Holder::Unknown => {
            format!("; `ss -ltnp 'sport = :{port}'` shows which")
        }
        Holder::Connection { .. } => format!(
            "; `sysctl net.ipv4.ip_local_reserved_ports={port}` keeps it from being given to those \
             that go out"
        ),
        Holder::TimeWait(_) => {
            "; with socket = \"inherit\" nobody has to wait for it, or have the \
             program set SO_REUSEADDR"
                .to_owned()
        }
    }
}

/// Why `address` can't be had.
fn port_error(address: SocketAddr, error: io::Error) -> StartError {
    if error.kind() == io::ErrorKind::AddrInUse {
        StartError::PortTaken(address, Holder::of(address))
    } else {
        StartError::Bind(address, error)
    }
}
