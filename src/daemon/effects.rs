//! Carries out the supervisor's effects.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet, VecDeque},
    io,
    net::SocketAddr,
    path::Path,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::debug;

use super::{Daemon, Stage, frontends::Frontends, workers::Drained};
use crate::{
    config::{Output, Program},
    net::{
        DrainedConnection, MayAccept,
        diag::{self, Diag},
        proxy_protocol::{self, Ends},
    },
    proxy::{Pool, ReservedPermit},
    supervisor::{
        Coming, Down, Effect, Event, Exit, Fact, Note, Publication, Supervisor, WorkerId,
    },
};

/// Permits for connections that were taken out of an accept queue and are not handed to a data
/// thread yet, by service.
pub(super) type ReservedPermits = Rc<RefCell<HashMap<Arc<str>, Vec<ReservedPermit>>>>;

/// How long to wait for the PROXY protocol headers of rescued connections, all together: the data
/// thread that made such a connection sends its header with the next system call.
const HEADER: Duration = Duration::from_millis(100);
/// The pause between two attempts to drain queues that may grow without an event.
const DRAIN_PAUSE: Duration = Duration::from_millis(50);

/// The hint for a program that exited with status 0 before it accepted a connection.
const BACKGROUND: &str = "a program that goes into the background has to be told not to: daemon off, \
    --foreground, --nodaemon";
/// The hint for a Python program without any output.
const UNBUFFERED: &str =
    "it wrote nothing, for Python keeps its output back: set env.PYTHONUNBUFFERED = \"1\"";

impl Daemon<'_> {
    /// Carries out effects, and passes the events that they cause to the supervisor at once.
    /// `is_routine` says that the effects follow from an event that happens all the time; then,
    /// unless the effects themselves change something, readiness and memory limits are not checked
    /// again.
    pub(super) fn perform(&mut self, effects: Vec<Effect>, is_routine: bool) {
        let is_routine = is_routine && effects.iter().all(is_routine_effect);
        let mut queue = VecDeque::from(effects);
        while let Some(effect) = queue.pop_front_if(|effect| is_about_queues(effect)) {
            self.act(effect);
        }
        // Before new workers share the ports.
        let drained = self.drain_queues();
        while let Some(effect) = queue.pop_front() {
            for event in self.act(effect) {
                queue.extend(self.supervisor.handle(event, Instant::now()));
            }
        }
        // After the data threads and the kernel know the new rotation.
        self.hand_over(drained);
        self.drain_direct_queues();
        // Give back the unused permits: of connections that another process accepted first, or that
        // were probes.
        self.reserved.borrow_mut().clear();
        if !is_routine {
            self.look_whether_ready();
            self.measure();
        }
    }

    fn act(&mut self, effect: Effect) -> Vec<Event> {
        match effect {
            Effect::Spawn(order) => return self.workers.spawn(&order),
            Effect::Signal { id, signal, to, timeout } => {
                self.workers.stop(id, signal, to, timeout);
            }
            Effect::Kill { id } => self.workers.kill(id),
            Effect::Probe(order) => self.workers.probe(order),
            Effect::Publish(publication) => self.publish(publication),
            Effect::Retire { id } => {
                if self.workers.retire(id) {
                    return vec![Event::Idle { id }];
                }
            }
            Effect::Reinstate { id } => self.workers.reinstate(id),
            Effect::DrainQueue { id, why } => self.workers.drain_queue(id, why),
            Effect::KeepQueue { id } => self.workers.keep_queue(id),
            Effect::ReleasePort { address } => self.workers.bindings.release_port(address),
            Effect::Close { service } => {
                self.close_publics(&service, &[]);
                let listeners = self.frontends.take_closing(&service, &[]);
                self.close(listeners, Some(service));
            }
            Effect::Forget { service } => self.frontends.forget(&service),
            Effect::Answer { ticket, result } => self.requests.finish(ticket, result),
            Effect::Restored(service) => {
                for slot in &mut self.config.services {
                    if slot.name == service.name {
                        slot.clone_from(&service);
                    }
                }
                self.workers.bindings.direct_listeners.want(&self.config.services);
            }
            Effect::Note(note) => {
                let worker = note.worker.as_ref().and_then(|worker| worker.id);
                let held = worker.and_then(|id| self.workers.backend(id)?.connections());
                let hint = self.hint(&note);
                self.event_log.write(&note, held, hint, Instant::now());
            }
            Effect::Finished => {
                self.stage = Stage::Finished(match self.stage {
                    Stage::Stopping(since) => Some(since),
                    Stage::Running | Stage::Aborting(_) | Stage::Finished(_) => None,
                });
            }
        }
        Vec::new()
    }

    pub(super) fn publish(&mut self, publication: Publication) {
        let Publication { service, rotation, routing } = publication;
        // Before the pool is published, so that connections for a new worker reach it.
        self.workers.activate(&service, routing.balance, &rotation.workers);
        let workers =
            rotation.workers.iter().filter_map(|id| self.workers.backend(*id).cloned()).collect();
        let coming = match rotation.coming {
            Coming::Now => Some(Instant::now()),
            Coming::At(at) => Some(at),
            Coming::Never => None,
        };
        self.frontends.publish(&service, Pool::new(workers, coming, routing));
    }

    pub(super) fn exited(&self, id: WorkerId) {
        if let Some(backend) = self.workers.backend(id) {
            self.plane.exited(backend);
        }
    }

    /// A hint for an operator if a new worker does not become healthy and its output does not say
    /// why.
    fn hint(&self, note: &Note) -> Option<&'static str> {
        let (Fact::NotYetHealthy { .. } | Fact::Down { was_healthy: false, .. }) = &note.fact
        else {
            return None;
        };
        if let Fact::Down { how: Down::Exited(exit), .. } = &note.fact {
            return (*exit == Exit::Code(0)).then_some(BACKGROUND);
        }
        let worker = note.worker.as_ref()?;
        let Program::Command(argv) = &worker.spec.program else { return None };
        let name = Path::new(argv.first()?).file_name()?.to_str()?;
        let is_silent =
            worker.spec.output == Output::Log && self.workers.last_words(worker.id?).is_empty();
        let keeps_back = name.starts_with("python")
            && argv.iter().all(|argument| argument != "-u")
            && !worker.spec.env.contains_key("PYTHONUNBUFFERED")
            && std::env::var_os("PYTHONUNBUFFERED").is_none();
        (is_silent && keeps_back).then_some(UNBUFFERED)
    }

    /// Takes the connections out of the accept queues of workers that will not accept them, to be
    /// handed to other workers; closes the ports that no worker inherits any more.
    fn drain_queues(&mut self) -> Vec<Drained> {
        let supervisor = &self.supervisor;
        let can_serve = |service: &str| can_serve(supervisor, service);
        let is = |service: &str| supervisor.service(service).is_some();
        let (frontends, reserved) = (&self.frontends, &self.reserved);
        let permit = |service: &Arc<str>| permit(frontends, reserved, service);
        self.workers.drain_queues(can_serve, is, permit)
    }

    /// Does the same for workers that the kernel hands connections to (`route = "direct"`), and
    /// hands the clients over. That includes workers that were asked to end, since those may not
    /// accept what the kernel gave them.
    fn drain_direct_queues(&mut self) {
        let (supervisor, now) = (&self.supervisor, Instant::now());
        let can_serve = |service: &str| can_serve(supervisor, service);
        let (frontends, reserved) = (&self.frontends, &self.reserved);
        let permit = |service: &Arc<str>| permit(frontends, reserved, service);
        let drained = self.workers.drain_direct_queues(can_serve, permit, now);
        self.hand_over(drained);
        let again = self.workers.bindings.has_more_to_drain().then(|| now + DRAIN_PAUSE);
        self.drain_at = again.into_iter().chain(self.workers.bindings.watch_at()).min();
    }

    /// Forgets a worker that has no process left.
    pub(super) fn forget_worker(&mut self, id: WorkerId) {
        let (frontends, reserved) = (&self.frontends, &self.reserved);
        self.workers.forget(id, |service| permit(frontends, reserved, service));
    }

    fn hand_over(&self, drained: Vec<Drained>) {
        let deadline = Instant::now() + HEADER;
        let mut own = None;
        for (service, DrainedConnection { socket, proxy_protocol }) in drained {
            let ends = Ends::of(&socket);
            // Other programs on the machine can connect to a worker's port too, and could send a
            // forged header: a header is believed only on a connection that lbd made.
            let mut is_own = || {
                let own = own.get_or_insert_with(OwnConnections::look);
                ends.is_none_or(|ends| own.contain(ends.client, ends.server))
            };
            let taken_off = proxy_protocol
                .map(|version| match is_own() {
                    true => proxy_protocol::take_off(&socket, version, deadline),
                    false => {
                        proxy_protocol::take_off(&socket, version, Instant::now()).map(|_| ends)
                    }
                })
                .transpose();
            let permit = self.reserved.borrow_mut().get_mut(&service).and_then(Vec::pop);
            match (taken_off, permit) {
                (Ok(client), Some(permit)) => self.plane.adopt(permit, socket, client.flatten()),
                // The service is gone: the connection is closed.
                (Ok(_), None) => {}
                (Err(error), _) => {
                    // Reset the connection, so that the client does not take its end for the end of
                    // an answer.
                    _ = socket.set_linger(Some(Duration::ZERO));
                    debug!(service = &*service, %error, "a rescued connection had no header");
                }
            }
        }
    }
}

/// Whether the effect leaves workers and rotations unchanged.
fn is_routine_effect(effect: &Effect) -> bool {
    matches!(effect, Effect::Probe { .. } | Effect::Answer { .. })
}

/// Whether the effect only selects the queues that are drained from now on.
fn is_about_queues(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::DrainQueue { .. } | Effect::KeepQueue { .. } | Effect::ReleasePort { .. }
    )
}

/// Decides for each connection in an accept queue whether it may be taken out: only if the service
/// has a permit for it.
fn permit(frontends: &Frontends, reserved: &ReservedPermits, service: &Arc<str>) -> MayAccept {
    let (reserved, service) = (Rc::clone(reserved), Arc::clone(service));
    match frontends.service(&service).cloned() {
        Some(route) => Box::new(move || {
            let permit = ReservedPermit::take(&route);
            let is_permitted = permit.is_some();
            reserved.borrow_mut().entry(Arc::clone(&service)).or_default().extend(permit);
            is_permitted
        }),
        // The service is gone: there is no worker for the connection, and it is closed at once.
        None => Box::new(|| true),
    }
}

/// The connections to workers that lbd itself has made: their PROXY protocol headers can be
/// trusted.
struct OwnConnections(io::Result<(Diag, HashSet<u32>)>);

impl OwnConnections {
    fn look() -> Self {
        Self(Diag::open().and_then(|diag| Ok((diag, diag::own_sockets()?))))
    }

    /// Whether lbd made the connection from `client` to `server`. If the kernel does not tell, the
    /// answer is no.
    fn contain(&mut self, client: SocketAddr, server: SocketAddr) -> bool {
        let Ok((diag, own)) = &mut self.0 else { return false };
        diag.inode(client, server)
            .is_ok_and(|inode| inode.is_some_and(|inode| own.contains(&inode)))
    }
}

fn can_serve(supervisor: &Supervisor, service: &str) -> bool {
    supervisor.rotation(service).is_some_and(|rotation| !rotation.workers.is_empty())
}
