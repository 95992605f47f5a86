//! Which worker occupies which port, and so whether a worker can be started while another one still
//! has its port.
//!
//! A port that workers bind themselves has room for one worker. A port whose sockets are inherited
//! has room for two, so that one can take over from the other. A service's public address
//! (`route = "direct"`) has room for any number of workers.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::SocketAddr,
};

use super::{
    registry::{ServiceKey, Touched},
    worker::{Phase, Worker},
};
use crate::config::{SocketMode, WORKERS_ON_A_PORT};

/// The addresses that outgoing workers of all services still occupy, since a port may move from one
/// service to another; and the services that may have to wait for these addresses.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Ports {
    occupants: HashMap<SocketAddr, Vec<Occupant>>,
    /// The same by service: its outgoing workers' addresses, and whether each is shared.
    occupied: BTreeMap<ServiceKey, Vec<(SocketAddr, bool)>>,
    /// The services that may need an address.
    askers: HashMap<SocketAddr, BTreeSet<ServiceKey>>,
    /// The addresses that each service may need.
    asked: BTreeMap<ServiceKey, Vec<SocketAddr>>,
}

/// An outgoing worker, which still occupies an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Occupant {
    service: ServiceKey,
    shares: bool,
}

impl Ports {
    /// Sets the outgoing workers of `service`. Returns the services that may now fill a slot sooner
    /// or later than they had planned.
    pub(super) fn occupy<'w>(
        &mut self,
        service: ServiceKey,
        outgoing: impl Iterator<Item = &'w Worker>,
    ) -> Touched {
        let occupant = |worker: &Worker| {
            // An ended worker blocks the port until no process of it is left: its successor then
            // takes over its socket, with the connections in the accept queue.
            let shares = worker.spec.socket == SocketMode::Inherit && worker.phase != Phase::Ended;
            Some((worker.address()?, shares))
        };
        let mut now: Vec<_> = outgoing.filter_map(occupant).collect();
        now.sort_unstable();
        let before = self.occupied.get(&service).map_or(&[][..], Vec::as_slice);
        if before == now {
            return Touched::new();
        }
        let changed: HashSet<_> = before.iter().chain(&now).map(|(address, _)| *address).collect();
        for address in &changed {
            let here = now.iter().filter(|(occupied, _)| occupied == address);
            let here = here.map(|&(_, shares)| Occupant { service, shares });
            let occupants = self.occupants.entry(*address).or_default();
            occupants.retain(|occupant| occupant.service != service);
            occupants.extend(here);
            occupants.sort_unstable();
            if occupants.is_empty() {
                self.occupants.remove(address);
            }
        }
        match now.is_empty() {
            true => _ = self.occupied.remove(&service),
            false => _ = self.occupied.insert(service, now),
        }
        changed.iter().filter_map(|address| self.askers.get(address)).flatten().copied().collect()
    }

    /// Sets the addresses that `service` may need.
    pub(super) fn ask(&mut self, service: ServiceKey, addresses: impl Iterator<Item = SocketAddr>) {
        let mut now: Vec<_> = addresses.collect();
        now.sort_unstable();
        now.dedup();
        let before = self.asked.get(&service).map_or(&[][..], Vec::as_slice);
        if before == now {
            return;
        }
        for address in before {
            if let Some(askers) = self.askers.get_mut(address) {
                askers.remove(&service);
                if askers.is_empty() {
                    self.askers.remove(address);
                }
            }
        }
        for address in &now {
            self.askers.entry(*address).or_default().insert(service);
        }
        match now.is_empty() {
            true => _ = self.asked.remove(&service),
            false => _ = self.asked.insert(service, now),
        }
    }

    /// Forgets a service that is gone.
    pub(super) fn forget(&mut self, service: ServiceKey) {
        self.occupy(service, std::iter::empty());
        self.ask(service, std::iter::empty());
    }

    /// Whether one more worker fits on `address`, in addition to the outgoing workers there and to
    /// `others` that share it and stay.
    pub(super) fn leave_room(
        &self,
        address: SocketAddr,
        socket: SocketMode,
        others: usize,
    ) -> bool {
        let there = self.occupants.get(&address).map_or(&[][..], Vec::as_slice);
        match socket {
            SocketMode::Direct => true,
            SocketMode::Bind => others == 0 && there.is_empty(),
            SocketMode::Inherit => {
                there.iter().all(|occupant| occupant.shares)
                    && there.len() + others < WORKERS_ON_A_PORT
            }
            // A unix socket occupies no port.
            SocketMode::Unix => true,
        }
    }
}
