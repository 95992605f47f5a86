//! Who is on which port: whether a worker can be started while another one still has its port.
//!
//! A port that workers bind themselves is one worker's. A port whose sockets are inherited is shared
//! by two for as long as one takes over from the other. On a service's public address there is room
//! for any number of them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::SocketAddr,
};

use super::{
    registry::{ServiceKey, Touched},
    worker::{Phase, Worker},
};
use crate::config::{SocketMode, WORKERS_ON_A_PORT};

/// The addresses that workers on their way out still occupy, of all services: a port may move from
/// one to another. And which services may have to wait for them.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Ports {
    occupants: HashMap<SocketAddr, Vec<Occupant>>,
    /// The same by service: where its workers are, and whether they share.
    occupied: BTreeMap<ServiceKey, Vec<(SocketAddr, bool)>>,
    /// Who may ask for room there.
    askers: HashMap<SocketAddr, BTreeSet<ServiceKey>>,
    /// The same by service.
    asked: BTreeMap<ServiceKey, Vec<SocketAddr>>,
}

/// A worker on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Occupant {
    service: ServiceKey,
    shares: bool,
}

impl Ports {
    /// These are the workers of `service` on their way out. Tells which services may fill a slot
    /// sooner or later than they thought.
    pub(super) fn occupy<'w>(
        &mut self,
        service: ServiceKey,
        outgoing: impl Iterator<Item = &'w Worker>,
    ) -> Touched {
        let occupant = |worker: &Worker| {
            // One that has ended leaves its socket, and what queues in it, to its successor.
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

    /// These are the addresses that `service` may ask room on.
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

    /// The service is gone.
    pub(super) fn forget(&mut self, service: ServiceKey) {
        self.occupy(service, std::iter::empty());
        self.ask(service, std::iter::empty());
    }

    /// Whether one more worker fits on `address`, besides those on their way out and `others` that
    /// share it and stay.
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
            // It is on none.
            SocketMode::Unix => true,
        }
    }
}
