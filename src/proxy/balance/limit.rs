//! A limit on the number of connections held at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// Counts connections, and never admits more than the limit.
#[derive(Debug)]
pub(super) struct ConnectionLimit {
    held: AtomicUsize,
    limit: AtomicUsize,
    /// Whether a client was turned away since the last wakeup.
    waiting: AtomicBool,
}

/// What has to be done after a connection was given back.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Left {
    /// Clients wait that may come in now: wake the threads.
    pub(super) wake: bool,
    /// No connection is held any more.
    pub(super) empty: bool,
}

impl ConnectionLimit {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            held: AtomicUsize::new(0),
            limit: AtomicUsize::new(limit),
            waiting: AtomicBool::new(false),
        }
    }

    pub(super) fn held(&self) -> usize {
        self.held.load(SeqCst)
    }

    /// Counts one more connection, if the limit allows. After `false`, the next
    /// [`leave`](Self::leave) or [`set_limit`](Self::set_limit) that makes room tells its caller to
    /// wake the threads.
    pub(super) fn enter(&self) -> bool {
        self.try_enter() || {
            self.waiting.store(true, SeqCst);
            // Room made between the check and the mark wakes no thread: check again.
            self.try_enter()
        }
    }

    pub(super) fn limit(&self) -> usize {
        self.limit.load(SeqCst)
    }

    /// Counts one more connection, even beyond the limit.
    pub(super) fn force(&self) {
        self.held.fetch_add(1, SeqCst);
    }

    pub(super) fn leave(&self) -> Left {
        let empty = self.held.fetch_sub(1, SeqCst) == 1;
        Left { wake: self.take_waiting(), empty }
    }

    /// Changes the limit. Returns whether clients wait that may come in now.
    pub(super) fn set_limit(&self, limit: usize) -> bool {
        self.limit.store(limit, SeqCst);
        self.take_waiting()
    }

    /// As [`enter`](Self::enter), but for a caller that does not wait for room.
    pub(super) fn try_enter(&self) -> bool {
        let limit = self.limit.load(SeqCst);
        self.held.fetch_update(SeqCst, SeqCst, |held| (held < limit).then_some(held + 1)).is_ok()
    }

    /// The plain load keeps the cache line shared while no client waits, which is nearly always.
    fn take_waiting(&self) -> bool {
        self.waiting.load(SeqCst) && self.waiting.swap(false, SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    #[test]
    fn no_more_than_the_limit_and_a_wakeup_for_those_turned_away() {
        let limit = ConnectionLimit::new(2);
        assert!(limit.enter() && limit.enter() && !limit.enter());
        assert_eq!(limit.leave(), Left { wake: true, empty: false });
        assert_eq!(limit.leave(), Left { wake: false, empty: true });
        assert!(limit.enter());
        assert!(!limit.set_limit(1));
        assert!(!limit.enter());
        assert!(limit.set_limit(2));
        assert!(limit.enter());
    }

    #[test]
    fn nobody_turned_away_is_forgotten() {
        let limit = ConnectionLimit::new(1);
        let (wake, woken) = mpsc::channel();
        thread::scope(|scope| {
            let holder = scope.spawn(|| {
                for _ in 0..10_000 {
                    while !limit.enter() {
                        std::hint::spin_loop();
                    }
                    if limit.leave().wake {
                        wake.send(()).unwrap();
                    }
                }
                drop(wake);
            });
            let limit = &limit;
            scope.spawn(move || {
                for _ in 0..10_000 {
                    while !limit.enter() {
                        // A lost wakeup would leave this waiting while the other goes on and ends.
                        match woken.recv() {
                            Ok(()) => {}
                            Err(_) => assert_eq!(limit.held(), 0),
                        }
                    }
                    limit.leave();
                }
            });
            holder.join().unwrap();
        });
    }
}
