//! Measures the workers' memory, and counts the connections that don't pass through lbd.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use tokio::sync::mpsc;

use crate::{
    process::{ConnectionGauge, Counted, MemoryGauge, Watched},
    proxy::Backend,
    supervisor::{Event, WorkerId},
};

/// The backend whose connections are counted, and the epoch of its last retirement, which tells
/// older samples apart.
type Sampled = (Arc<Backend>, u32);

/// The measuring threads, each started when there is something to measure.
#[derive(Debug)]
pub(super) struct UsageSamplers {
    events: mpsc::Sender<Event>,
    memory: Option<MemoryGauge>,
    /// The workers whose memory is measured.
    watched: Vec<Watched>,
    connections: Option<ConnectionGauge<Sampled>>,
}

impl UsageSamplers {
    /// Memory measurements are sent to `events`.
    pub(super) fn new(events: mpsc::Sender<Event>) -> Self {
        Self { events, memory: None, watched: Vec::new(), connections: None }
    }

    /// Sets the workers and addresses of which connections are counted; each backend gets its
    /// count.
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

    /// Sets the workers whose memory is measured.
    pub(super) fn measure(&mut self, watched: Vec<Watched>) {
        if watched == self.watched {
            return;
        }
        let events = self.events.clone();
        let start = || {
            MemoryGauge::start(move |id, bytes| {
                // Fails only if the daemon has ended.
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
