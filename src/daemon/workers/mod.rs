//! The table of worker processes: starts, signals and probes them as the supervisor asks, and turns
//! what happens to them into events.

mod bindings;
mod launcher;
mod listening;
mod usage;

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    io,
    num::NonZeroU32,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use tokio::{
    sync::{Notify, mpsc},
    task::spawn_local,
};

use super::{descriptors::Descriptors, slot_stats::SlotStats};
use crate::{
    config::{Balance, StopTo},
    net::{MayAccept, diag::SharedDiag},
    probe::{self, Prober},
    process::{Cgroups, Controller, Counted, Identity, LastWords, Watched},
    proxy::Backend,
    supervisor::{Event, ProbeOrder, ProbeOutcome, Spawn, Untaken, Verdict, WorkerId},
};
pub(super) use bindings::Drained;
use bindings::{Bindings, Former, OpenError, Opened, Reached};
use launcher::{LaunchError, Launched, Launcher, Named, Reported, report};
use listening::Listening;
use usage::UsageSamplers;

/// All worker processes of the daemon.
#[derive(Debug)]
pub(super) struct WorkerTable {
    launcher: Launcher,
    events: mpsc::Sender<Event>,
    /// Notified when a retired worker's last connection ends.
    idle: Arc<Notify>,
    handles: HashMap<WorkerId, WorkerHandle>,
    pub(super) slot_stats: SlotStats,
    /// The sockets by which each worker is reached.
    pub(super) bindings: Bindings,
    /// The workers whose accept queues are drained, and why.
    untaken: BTreeMap<WorkerId, Untaken>,
    /// The kernel's socket diagnostics, which probes ask about their connections and about who
    /// listens.
    diag: SharedDiag,
    usage: UsageSamplers,
}

/// What the driver keeps for one worker.
#[derive(Debug)]
struct WorkerHandle {
    controller: Controller,
    guard: i32,
    service: Arc<str>,
    backend: Arc<Backend>,
    retired: bool,
    /// A probe is running.
    probing: bool,
    /// A probe has passed.
    proven: bool,
    prober: Prober,
    listening: Listening,
    /// The last lines of its output.
    last_words: LastWords,
    /// The same as `proven`, shared with the task that reports the worker's end.
    was_healthy: Rc<Cell<bool>>,
}

/// A worker could not be started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
}

impl WorkerTable {
    pub(super) fn new(
        descriptors: Descriptors,
        cgroups: Option<Cgroups>,
        events: mpsc::Sender<Event>,
        idle: Arc<Notify>,
        folder: PathBuf,
        output_rate: NonZeroU32,
    ) -> io::Result<Self> {
        Ok(Self {
            launcher: Launcher::new(descriptors, cgroups, output_rate)?,
            usage: UsageSamplers::new(events.clone()),
            events,
            idle,
            handles: HashMap::new(),
            slot_stats: SlotStats::default(),
            bindings: Bindings::new(folder)?,
            untaken: BTreeMap::new(),
            diag: SharedDiag::default(),
        })
    }

    /// Starts a worker and returns its first events; later events come through the channel.
    pub(super) fn spawn(&mut self, order: &Spawn) -> Vec<Event> {
        let id = order.id;
        match self.start(order) {
            Ok(port) => vec![Event::Spawned { id, port }],
            Err(error) => {
                let cheap = matches!(error, StartError::Open(OpenError::PortTaken(..)));
                vec![Event::Failed { id, reason: error.to_string(), cheap }, Event::Gone { id }]
            }
        }
    }

    /// Makes a worker's sockets and starts its process; returns its port, if it has one.
    fn start(&mut self, order: &Spawn) -> Result<Option<u16>, StartError> {
        let opened = self.bindings.open(order)?;
        let port = opened.port;
        if let Err(error) = self.launch(order, opened) {
            self.bindings.release(order.id, Former::NeverRan, |_| Box::new(|| false));
            return Err(error.into());
        }
        Ok(port)
    }

    /// Starts the process of a worker whose sockets are open.
    fn launch(&mut self, order: &Spawn, opened: Opened) -> Result<(), LaunchError> {
        let Opened { reached, listens, port } = opened;
        let (id, slot, spec) = (order.id, order.slot, &*order.spec);
        // With `route = "direct"` all workers are on the same port, which does not identify a
        // worker.
        let is_shared = matches!(reached, Reached::By(_));
        let own_port = if is_shared { order.port } else { port };
        let number = own_port.map_or(slot, u32::from);
        let label: Arc<str> = format!("{}/{number}", order.service).into();
        let identity = Identity { service: &order.service, slot, port };
        let named = Named { identity, label: &label, by_label: is_shared };
        let sockets = self.bindings.sockets(order);
        let Launched { child, last_words } = self.launcher.launch(order, named, sockets)?;
        let idle = Arc::clone(&self.idle);
        let backend = match reached {
            Reached::At(endpoint) => {
                Backend::new(id.0, slot, label, endpoint, spec.proxy_protocol, idle)
            }
            Reached::By(routes) => Backend::direct(id.0, slot, label, routes, idle),
        };
        let (controller, guard) = (child.controller(), child.guard_pid());
        let service = Arc::clone(&order.service);
        self.slot_stats.open(&service, slot, Arc::clone(&backend));
        let was_healthy = Rc::new(Cell::new(false));
        spawn_local(report(Reported {
            child,
            id,
            service: Arc::clone(&service),
            slot,
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
            prober: Prober::new(self.diag.clone()),
            listening: Listening::new(self.diag.clone(), listens, guard, order.stands_in_for),
            last_words,
            was_healthy,
        };
        self.handles.insert(id, handle);
        if is_shared {
            self.count_connections();
        }
        Ok(())
    }

    pub(super) fn stop(&self, id: WorkerId, signal: Signal, to: StopTo, timeout: Duration) {
        if let Some(handle) = self.handles.get(&id) {
            handle.controller.stop(signal, to, timeout);
        }
    }

    pub(super) fn kill(&self, id: WorkerId) {
        if let Some(handle) = self.handles.get(&id) {
            handle.controller.kill();
        }
    }

    /// Reopens the files that workers' output is written to.
    pub(super) fn reopen_outputs(&self) {
        self.handles.values().for_each(|handle| handle.controller.reopen_output());
    }

    /// Starts one probe, in a task of its own.
    pub(super) fn probe(&mut self, order: ProbeOrder) {
        let ProbeOrder { id, what, timeout, owner } = order;
        let Some(handle) = self.handles.get_mut(&id) else { return };
        handle.probing = true;
        let endpoint = handle.backend.endpoint().clone();
        // If an earlier probe's connection still waits in the accept queue, no other is needed.
        let opened = match handle.prober.is_waiting() {
            true => Err(io::ErrorKind::NotConnected.into()),
            false => self.bindings.probe_socket(id, &endpoint),
        };
        let (socket, pass) = match opened {
            Ok((socket, pass)) => (Ok(socket), pass),
            Err(error) => (Err(error), None),
        };
        let target = probe::Target {
            probe: what,
            endpoint,
            makes_its_own: handle.listening.makes_its_own(),
            proxy_protocol: handle.backend.proxy_protocol(),
            timeout,
        };
        let is_new = !handle.proven;
        let (prober, listening) = (handle.prober.clone(), handle.listening.clone());
        let (backend, events) = (Arc::clone(&handle.backend), self.events.clone());
        spawn_local(async move {
            let answered = || backend.answered();
            let mut outcome = prober.probe(&target, socket, answered).await;
            drop(pass);
            listening.judge(&mut outcome, owner, is_new).await;
            // Fails only if the daemon has ended.
            let _ = events.send(Event::Probed { id, outcome }).await;
        });
    }

    /// Records the result of a probe.
    pub(super) fn probed(&mut self, id: WorkerId, outcome: &ProbeOutcome) {
        if let Some(handle) = self.handles.get_mut(&id) {
            handle.probing = false;
            handle.proven |= outcome.verdict == Verdict::Passed;
            handle.was_healthy.set(handle.proven);
            if !handle.prober.is_waiting() {
                self.bindings.probe_ended(id);
            }
            self.slot_stats.probed(&handle.service, handle.backend.slot(), outcome);
        }
    }

    /// Stops handing connections to a worker; returns whether it holds none.
    pub(super) fn retire(&mut self, id: WorkerId) -> bool {
        let Some(handle) = self.handles.get_mut(&id) else { return false };
        handle.retired = true;
        let idle = handle.backend.retire();
        self.count_connections();
        idle
    }

    pub(super) fn reinstate(&mut self, id: WorkerId) {
        if let Some(handle) = self.handles.get_mut(&id) {
            handle.retired = false;
            handle.backend.reinstate();
        }
        self.count_connections();
    }

    /// The process id of the worker's guard, while there is one.
    pub(super) fn guard(&self, id: WorkerId) -> Option<i32> {
        self.handles.get(&id).map(|handle| handle.guard)
    }

    /// Has the connections counted of workers whose connections don't pass through lbd.
    fn count_connections(&mut self) {
        let direct = self.handles.values().filter(|handle| handle.backend.is_direct());
        let counted = |handle: &WorkerHandle| Counted {
            guard: handle.guard,
            urgent: handle.retired,
            subject: (Arc::clone(&handle.backend), handle.backend.epoch()),
        };
        let workers = direct.map(counted).collect();
        self.usage.count_connections(self.bindings.direct_listeners.addresses(), workers);
    }

    /// Sets the workers whose memory is measured and reported as events, each with its limit in
    /// bytes.
    pub(super) fn measure(&mut self, limits: impl Iterator<Item = (WorkerId, u64)>) {
        let watched = |(id, limit): (WorkerId, u64)| {
            let guard = self.handles.get(&id)?.guard;
            Some(Watched { id: id.0, guard, limit })
        };
        self.usage.measure(limits.filter_map(watched).collect());
    }

    /// The retired workers that hold no connection.
    pub(super) fn idle(&self) -> Vec<WorkerId> {
        let idle = |(id, handle): &(&WorkerId, &WorkerHandle)| {
            handle.retired
                && handle.backend.is_idle()
                && self.bindings.queued(**id).unwrap_or(0) == 0
        };
        self.handles.iter().filter(idle).map(|(id, _)| *id).collect()
    }

    /// Whether the worker is known to hold no connection.
    pub(super) fn holds_nothing(&self, id: WorkerId) -> bool {
        self.handles.get(&id).is_none_or(|handle| handle.backend.is_idle())
    }

    pub(super) fn backend(&self, id: WorkerId) -> Option<&Arc<Backend>> {
        self.handles.get(&id).map(|handle| &handle.backend)
    }

    /// Sets the workers in rotation: from now on, new connections to addresses that they share with
    /// other workers reach these workers.
    pub(super) fn activate(&mut self, service: &str, balance: Balance, workers: &[WorkerId]) {
        let mut turns = Vec::with_capacity(workers.len());
        for &id in workers {
            let Some(WorkerHandle { backend, .. }) = self.handles.get(&id) else { continue };
            turns.push((backend.slot(), id));
            // The new worker may expect another PROXY protocol header than its predecessor. A data
            // thread that still uses the previous pool may be connecting to the predecessor, and
            // reach the new worker with the wrong header. So the predecessor is marked as displaced
            // first: the data thread checks the mark before it sends anything.
            let before = self.bindings.displaced_by(id);
            let displaced = before.and_then(|id| Some(&self.handles.get(&id)?.backend));
            displaced.inspect(|before| before.displace(true));
            match self.bindings.activate(id) {
                Ok(()) => backend.displace(false),
                Err(error) => {
                    displaced.inspect(|before| before.displace(false));
                    let address = backend.endpoint();
                    tracing::error!(%address, %error, "cannot steer connections to the new worker");
                }
            }
        }
        self.bindings.rotate(service, balance, &turns);
    }

    /// Forgets a worker that has no process left.
    pub(super) fn forget(&mut self, id: WorkerId, permit: impl FnOnce(&Arc<str>) -> MayAccept) {
        let Some(handle) = self.handles.remove(&id) else { return };
        self.untaken.remove(&id);
        let WorkerHandle { backend, proven, .. } = handle;
        let former = if proven { Former::Served } else { Former::Failed };
        backend.left();
        if self.bindings.release(id, former, permit) {
            backend.displace(true);
        }
        if backend.is_direct() {
            self.count_connections();
        }
    }

    /// The worker will not accept what waits in its accept queue: the queue is drained from now on.
    pub(super) fn drain_queue(&mut self, id: WorkerId, why: Untaken) {
        if self.handles.contains_key(&id) {
            self.untaken.insert(id, why);
        }
    }

    /// The worker accepts its connections itself again: the queue is drained no more.
    pub(super) fn keep_queue(&mut self, id: WorkerId) {
        self.untaken.remove(&id);
    }

    /// Takes the clients out of every accept queue whose worker is gone or [does not accept
    /// them](Self::drain_queue). See [`Bindings::collect_leftovers`].
    pub(super) fn drain_queues(
        &mut self,
        can_serve: impl Fn(&str) -> bool,
        is: impl Fn(&str) -> bool,
        permit: impl Fn(&Arc<str>) -> MayAccept,
    ) -> Vec<Drained> {
        self.bindings.begin();
        let mut drained = self.bindings.collect_leftovers(&can_serve, is, &permit);
        drained.extend(self.drain_untaken(false, can_serve, permit));
        drained
    }

    /// The same for workers that the kernel hands connections to. See
    /// [`Bindings::collect_public_leftovers`].
    pub(super) fn drain_direct_queues(
        &mut self,
        can_serve: impl Fn(&str) -> bool,
        permit: impl Fn(&Arc<str>) -> MayAccept,
        now: Instant,
    ) -> Vec<Drained> {
        let mut drained = self.bindings.collect_public_leftovers(&permit, now);
        drained.extend(self.drain_untaken(true, can_serve, permit));
        drained
    }

    fn drain_untaken(
        &mut self,
        is_direct: bool,
        can_serve: impl Fn(&str) -> bool,
        permit: impl Fn(&Arc<str>) -> MayAccept,
    ) -> Vec<Drained> {
        let mut drained = Vec::new();
        for (id, why) in &self.untaken {
            let Some(handle) = self.handles.get(id) else { continue };
            // A stopping worker still serves the connections that lbd made to it, and lbd makes no
            // new ones. So its queue is drained only with `route = "direct"`.
            let is_due = is_direct || *why == Untaken::Hangs;
            if handle.backend.is_direct() != is_direct || !is_due {
                continue;
            }
            // Not during a probe: the worker itself has to answer the probe.
            if handle.probing || !can_serve(&handle.service) {
                continue;
            }
            if let Some(clients) = self.bindings.drain_queue(*id, permit(&handle.service)) {
                // The connection of a waiting probe was taken out with them.
                handle.prober.forget();
                drained.extend(clients);
            }
        }
        drained
    }

    /// The last lines of the worker's output, as far as the output passed through lbd.
    pub(super) fn last_words(&self, id: WorkerId) -> Vec<String> {
        self.handles.get(&id).map(|handle| handle.last_words.lines()).unwrap_or_default()
    }

    /// Reaps the orphans of guards that were killed. To be called on SIGCHLD.
    pub(super) fn reap(&self) {
        self.launcher.reap();
    }
}
