//! The connections of one listener: limits their number, and decides which one is closed to make
//! room for a new one.
//!
//! Over TCP any process on this machine can connect and then stay silent, and must not lock out
//! other clients. So when all slots are taken, a connection that is waiting for its next request is
//! closed: among those of the address with the most such connections, the one that has waited
//! longest. A connection whose request is being answered is never closed.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::caller::Via;

/// All connections of a listener.
#[derive(Debug)]
pub(super) struct Connections {
    table: Mutex<Table>,
    most: usize,
    /// Notified when there may be room again.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Table {
    held: Vec<Held>,
    /// Counts up each time a connection arrives or begins to wait. Orders the waiting connections.
    turns: u64,
}

/// One connection.
#[derive(Debug)]
struct Held {
    id: u64,
    /// The client's address; `None` over the unix socket, whose connections are never closed to
    /// make room.
    peer: Option<IpAddr>,
    /// The turn at which it began to wait for a request; `None` while a request is being answered.
    waiting: Option<u64>,
    cut: Arc<Notify>,
}

/// A slot among the connections, held until dropped.
#[derive(Debug)]
pub(super) struct Seat {
    at: Presence,
    cut: Arc<Notify>,
}

/// Tells [`Connections`] whether a connection is busy. Used by the code that answers its requests.
#[derive(Debug, Clone)]
pub(super) struct Presence {
    all: Arc<Connections>,
    id: u64,
}

impl Connections {
    /// Allows at most this many connections.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { table: Mutex::default(), most, changed: Notify::new() })
    }

    /// Waits until there is room for one more connection, or a connection that can be closed to
    /// make room. Only one task at a time may wait. Cancel safe.
    pub(super) async fn room(&self) {
        loop {
            {
                let held = &self.table().held;
                if held.len() < self.most || longest_waiting(held).is_some() {
                    return;
                }
            }
            self.changed.notified().await;
        }
    }

    /// Takes a slot for a new connection. Must follow [`Self::room`].
    pub(super) fn take(self: &Arc<Self>, via: Via) -> Seat {
        let mut table = self.table();
        if table.held.len() >= self.most
            && let Some(index) = longest_waiting(&table.held)
        {
            table.held.swap_remove(index).cut.notify_one();
        }
        let id = table.turn();
        let peer = match via {
            Via::Unix => None,
            Via::Tcp { peer, .. } => Some(peer.ip().to_canonical()),
        };
        let cut = Arc::new(Notify::new());
        table.held.push(Held { id, peer, waiting: Some(id), cut: Arc::clone(&cut) });
        drop(table);
        Seat { at: Presence { all: Arc::clone(self), id }, cut }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn turn(&mut self) -> u64 {
        self.turns += 1;
        self.turns
    }

    fn get(&mut self, id: u64) -> Option<&mut Held> {
        self.held.iter_mut().find(|held| held.id == id)
    }
}

/// The connection to close to make room.
fn longest_waiting(all: &[Held]) -> Option<usize> {
    let waiting = |held: &Held| Some((held.peer?, held.waiting?));
    let of_peer = |peer| all.iter().filter_map(waiting).filter(|(other, _)| *other == peer).count();
    let candidates = all.iter().enumerate().filter_map(|(index, held)| {
        let (peer, since) = waiting(held)?;
        Some((index, of_peer(peer), since))
    });
    let first = candidates.max_by_key(|(_, many, since)| (*many, std::cmp::Reverse(*since)));
    first.map(|(index, ..)| index)
}

impl Seat {
    /// A handle for reporting what the connection is doing.
    pub(super) fn presence(&self) -> Presence {
        self.at.clone()
    }

    /// Waits until the slot is needed for another connection.
    pub(super) async fn needed(&self) {
        self.cut.notified().await;
    }
}

impl Presence {
    /// A complete request has arrived and is being answered.
    pub(super) fn acts(&self) {
        if let Some(held) = self.all.table().get(self.id) {
            held.waiting = None;
        }
    }

    /// The answer is ready: the connection is about to wait for its next request.
    pub(super) fn waits(&self) {
        let mut table = self.all.table();
        let turn = table.turn();
        if let Some(held) = table.get(self.id) {
            held.waiting = Some(turn);
        }
        self.all.changed.notify_one();
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.at.all.table().held.retain(|held| held.id != self.at.id);
        self.at.all.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn tcp(peer: &str) -> Via {
        let local = "127.0.0.1:9000".parse().unwrap();
        Via::Tcp { local, peer: format!("{peer}:5").parse().unwrap() }
    }

    fn is_cut(seat: &Seat) -> bool {
        seat.needed().now_or_never().is_some()
    }

    #[tokio::test]
    async fn the_longest_silent_of_the_most_makes_room() {
        let all = Connections::new(4);
        let mut seats = Vec::new();
        for peer in ["10.0.0.2", "127.0.0.1", "127.0.0.1", "10.0.0.3"] {
            all.room().await;
            seats.push(all.take(tcp(peer)));
        }
        assert!(seats.iter().all(|seat| !is_cut(seat)));
        all.room().await;
        seats.push(all.take(tcp("10.0.0.2")));
        assert!(seats.iter().map(is_cut).eq([false, true, false, false, false]));
        // Now it has the most; its first one is answered, and stays.
        seats[0].presence().acts();
        seats.push(all.take(tcp("10.0.0.2")));
        assert!(is_cut(&seats[2]), "one each: the oldest");
        seats[0].presence().waits();
        seats.push(all.take(tcp("10.0.0.9")));
        assert!(is_cut(&seats[4]), "it has waited for longer than the one that was answered");
    }

    #[tokio::test]
    async fn who_is_answered_is_waited_for() {
        let all = Connections::new(2);
        let seats = [all.take(tcp("127.0.0.1")), all.take(tcp("127.0.0.1"))];
        seats.iter().for_each(|seat| seat.presence().acts());
        assert!(all.room().now_or_never().is_none());
        seats[1].presence().waits();
        assert!(all.room().now_or_never().is_some());
        seats[1].presence().acts();
        drop(seats);
        assert!(all.room().now_or_never().is_some());
        assert!(all.table().held.is_empty());
    }

    #[tokio::test]
    async fn nobody_makes_room_on_the_unix_socket() {
        let all = Connections::new(1);
        let seat = all.take(Via::Unix);
        assert!(all.room().now_or_never().is_none());
        drop(seat);
        assert!(all.room().now_or_never().is_some());
    }
}
