//! Who is on which port: whether a worker can be started while another one still has its port.
//!
//! A port that workers bind themselves is one worker's. A port whose sockets are inherited is shared
//! by two for as long as one takes over from the other. On a service's public address there is room
//! for any number of them.

use std::net::SocketAddr;

use super::worker::{Phase, Worker};
use crate::config::{SocketMode, WORKERS_ON_A_PORT};

/// The workers on their way out, by where they are reached.
#[derive(Debug, Default)]
pub(super) struct Outgoing(Vec<Occupant>);

#[derive(Debug)]
struct Occupant {
    address: SocketAddr,
    shares: bool,
}

impl<'w> FromIterator<&'w Worker> for Outgoing {
    fn from_iter<I: IntoIterator<Item = &'w Worker>>(workers: I) -> Self {
        let occupant = |worker: &Worker| {
            // One that has ended leaves its socket, and what queues in it, to its successor.
            let shares = worker.spec.socket == SocketMode::Inherit && worker.phase != Phase::Ended;
            Some(Occupant { address: worker.address()?, shares })
        };
        Self(workers.into_iter().filter_map(occupant).collect())
    }
}

impl Outgoing {
    /// Whether one more worker fits on `address`, besides these and `others` that share it and stay.
    pub(super) fn leave_room(
        &self,
        address: SocketAddr,
        socket: SocketMode,
        others: usize,
    ) -> bool {
        let mut there = self.0.iter().filter(|occupant| occupant.address == address);
        match socket {
            SocketMode::Direct => true,
            SocketMode::Bind => others == 0 && there.next().is_none(),
            SocketMode::Inherit => {
                let (shared, all) = there.fold((0, 0), |(shared, all), occupant| {
                    (shared + usize::from(occupant.shares), all + 1)
                });
                shared == all && all + others < WORKERS_ON_A_PORT
            }
            // It is on none.
            SocketMode::Unix => true,
        }
    }
}
