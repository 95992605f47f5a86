//! What is measured of the workers: memory, and connections that they have without lbd.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use tokio::sync::mpsc;

use crate::{
    process::{ConnectionGauge, Counted, MemoryGauge, Watched},
    proxy::Backend,
    supervisor::{Event, WorkerId},
};

/// Whose connections are counted, and since which of its retirements.
type Sampled = (Arc<Backend>, u32);

/// The threads that measure, each started when there is something to measure.
#[derive(Debug)]
pub(super) struct UsageSamplers {
    events: mpsc::Sender<Event>,
    memory: Option<MemoryGauge>,
    /// Whose memory is measured.
    watched: Vec<Watched>,
    connections: Option<ConnectionGauge<Sampled>>,
}

impl UsageSamplers {
    /// Memory is told as `events`.
    pub(super) fn new(events: mpsc::Sender<Event>) -> Self {
        Self { events, memory: None, watched: Vec::new(), connections: None }
    }

    /// From now on the connections of these workers on these addresses are counted, and no others;
    /// the upstream learns how many.
    pub(super) fn count_connections(
        &mut self,
        addresses: BTreeSet<SocketAddr>,
        workers: Vec<Counted<Sampled>>,
    ) {
        if workers.is_empty() && self.connections.is_none() {
            return;
        }
        let start = || {
            ConnectionGauge::start(|(backend, epoch): &Sampled, count| {
                backend.sampled(*epoch, count);
            })
        };
        match self.connections.take().map_or_else(start, Ok) {
            Ok(gauge) => {
                gauge.watch(addresses, workers);
                self.connections = Some(gauge);
            }
            Err(error) => tracing::warn!(%error, "cannot count the workers' connections"),
        }
    }

    /// From now on the memory of these is measured, and of no others.
    pub(super) fn measure(&mut self, watched: Vec<Watched>) {
        if watched == self.watched {
            return;
        }
        let events = self.events.clone();
        let start = || {
            MemoryGauge::start(move |id, bytes| {
                // Fails only where the daemon has ended.
                let _ = events.blocking_send(Event::Memory { id: WorkerId(id), bytes });
            })
        };
        match self.memory.take().map_or_else(start, Ok) {
            Ok(gauge) => {
                gauge.watch(watched.clone());
                self.memory = Some(gauge);
                self.watched = watched;
            }
            Err(error) => tracing::warn!(%error, "cannot measure the workers' memory"),
        }
    }
}
