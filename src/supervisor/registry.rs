//! All services, with indexes by name, worker and deadline.
//!
//! An event about one worker costs time in proportion to its service's size, not to the number of
//! services: no lookup here scans all of them. After each event the services that changed are
//! [filed](Registry::file) again. The entries of the others stay right, since they depend only on
//! the service itself and on the ports that outgoing workers occupy; and a service that waits for
//! such a port counts as changed when the port's occupants change.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use super::{event::WorkerId, ports::Ports, service::Service};

/// A service's key in the indexes. Keys are never reused, and ascend in the order in which services
/// were added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ServiceKey(u64);

/// Services that an event or a deadline has changed.
pub(super) type Touched = BTreeSet<ServiceKey>;

/// The services by key, name, worker and deadline.
#[derive(Debug, Clone, Default)]
pub(super) struct Registry {
    services: BTreeMap<ServiceKey, Entry>,
    last_key: u64,
    by_name: HashMap<Arc<str>, ServiceKey>,
    by_worker: HashMap<WorkerId, ServiceKey>,
    by_deadline: BTreeSet<(Instant, ServiceKey)>,
}

/// A service, and its current entries in the indexes by worker and by deadline.
#[derive(Debug, Clone)]
struct Entry {
    service: Service,
    workers: Vec<WorkerId>,
    deadline: Option<Instant>,
}

impl Registry {
    pub(super) fn add(&mut self, service: Service) -> ServiceKey {
        self.last_key += 1;
        let key = ServiceKey(self.last_key);
        self.by_name.insert(Arc::clone(&service.config.name), key);
        self.services.insert(key, Entry { service, workers: Vec::new(), deadline: None });
        key
    }

    /// Removes the service from every index.
    pub(super) fn remove(&mut self, key: ServiceKey) -> Option<Service> {
        let Entry { service, workers, deadline } = self.services.remove(&key)?;
        self.by_name.remove(&service.config.name);
        workers.iter().for_each(|id| _ = self.by_worker.remove(id));
        deadline.inspect(|&at| _ = self.by_deadline.remove(&(at, key)));
        Some(service)
    }

    /// Updates the service's entries by worker and by deadline. To be called when the service has
    /// changed, or the occupants of a port that it waits for have.
    pub(super) fn file(&mut self, key: ServiceKey, ports: &Ports) {
        let Some(entry) = self.services.get_mut(&key) else { return };
        if !entry.service.workers().map(|worker| worker.id).eq(entry.workers.iter().copied()) {
            entry.workers.iter().for_each(|id| _ = self.by_worker.remove(id));
            entry.workers.clear();
            entry.workers.extend(entry.service.workers().map(|worker| worker.id));
            self.by_worker.extend(entry.workers.iter().map(|&id| (id, key)));
        }
        let deadline = entry.service.deadline(ports);
        let before = std::mem::replace(&mut entry.deadline, deadline);
        if before != deadline {
            before.inspect(|&at| _ = self.by_deadline.remove(&(at, key)));
            self.by_deadline.extend(deadline.map(|at| (at, key)));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Service> + Clone {
        self.services.values().map(|entry| &entry.service)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = ServiceKey> {
        self.services.keys().copied()
    }

    /// The services for which `is_chosen` holds.
    pub(super) fn chosen(&self, is_chosen: impl Fn(&Service) -> bool) -> Touched {
        let chosen = self.services.iter().filter(|(_, entry)| is_chosen(&entry.service));
        chosen.map(|(key, _)| *key).collect()
    }

    pub(super) fn get(&self, key: ServiceKey) -> Option<&Service> {
        self.services.get(&key).map(|entry| &entry.service)
    }

    pub(super) fn get_mut(&mut self, key: ServiceKey) -> Option<&mut Service> {
        self.services.get_mut(&key).map(|entry| &mut entry.service)
    }

    pub(super) fn named(&self, name: &str) -> Option<ServiceKey> {
        self.by_name.get(name).copied()
    }

    /// The service that this worker belongs to; `None` once the worker is gone.
    pub(super) fn of_worker(&self, id: WorkerId) -> Option<ServiceKey> {
        self.by_worker.get(&id).copied()
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.by_deadline.first().map(|(at, _)| *at)
    }

    /// The services with something to do at `now`.
    pub(super) fn due(&self, now: Instant) -> Touched {
        self.by_deadline.iter().take_while(|(at, _)| *at <= now).map(|(_, key)| *key).collect()
    }
}

#[cfg(test)]
impl Registry {
    /// Asserts that every index agrees with a scan of all services.
    pub(super) fn check(&self, ports: &Ports) {
        let services = || self.services.iter().map(|(key, entry)| (*key, &entry.service));
        let names = services().map(|(key, service)| (Arc::clone(&service.config.name), key));
        assert_eq!(self.by_name, names.collect(), "by name");
        let of = |(key, service): (_, &Service)| {
            service.workers().map(|worker| (worker.id, key)).collect::<Vec<_>>()
        };
        assert_eq!(self.by_worker, services().flat_map(of).collect(), "by worker");
        let deadlines = services().filter_map(|(key, s)| Some((s.deadline(ports)?, key)));
        assert_eq!(self.by_deadline, deadlines.collect(), "by deadline");
        let mut anew = Ports::default();
        for (key, service) in services() {
            anew.occupy(key, service.outgoing());
            anew.ask(key, service.slots.iter().flat_map(|slot| service.addresses_of(slot)));
        }
        assert_eq!(*ports, anew, "ports");
    }
}
