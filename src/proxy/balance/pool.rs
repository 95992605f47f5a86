//! The pool: the immutable snapshot of backends by which connections are assigned.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use super::backend::{Backend, Lease, LeaseError};
use crate::{
    config::{Balance, Routing},
    net::rotation,
};

/// The backends of a service, as the supervisor last saw them.
///
/// Only the round-robin cursor changes. All threads share it, so that successive connections go to
/// successive workers, whichever thread accepts them.
#[derive(Debug)]
pub struct Pool {
    backends: Box<[Arc<Backend>]>,
    coming: Option<Instant>,
    routing: Arc<Routing>,
    cursor: AtomicUsize,
}

/// Why there is no worker for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoBackend {
    /// All backends were tried.
    Left,
    /// Some backends were not tried, because their accept queues were full a moment ago.
    Congested,
    /// Some backends were not tried, because they have as many connections as they may.
    HasRoom,
}

/// Which backends may be picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    /// Only backends whose accept queue is not known to be full.
    Clear,
    /// Those first, and then the backends whose queue was full: some connection has to find out
    /// whether they have room again.
    Any,
}

impl Pool {
    /// A pool of the healthy workers, in the order of the rotation. `coming` is the earliest
    /// instant at which another worker will be started (in the past: it is being started now);
    /// `None` if none will be.
    #[must_use]
    pub fn new(
        backends: Vec<Arc<Backend>>,
        coming: Option<Instant>,
        routing: Arc<Routing>,
    ) -> Self {
        Self { backends: backends.into(), coming, routing, cursor: AtomicUsize::new(0) }
    }

    /// The healthy workers, in the order of the rotation.
    #[must_use]
    pub fn backends(&self) -> &[Arc<Backend>] {
        &self.backends
    }

    /// The settings for balancing and timeouts.
    #[must_use]
    pub fn routing(&self) -> &Routing {
        &self.routing
    }

    /// Whether both pools have the same workers.
    pub(crate) fn has_those_of(&self, other: &Self) -> bool {
        let ids = |pool: &Self| pool.backends.iter().map(|u| u.id()).collect::<Vec<_>>();
        ids(self) == ids(other)
    }

    /// Whether another worker will be started soon enough for a connection that arrived at `came`,
    /// that is within `hold-timeout`.
    pub(crate) fn is_coming_by(&self, came: Instant) -> bool {
        let until = came.checked_add(self.routing.hold_timeout);
        self.coming.is_some_and(|at| until.is_none_or(|until| at <= until))
    }

    /// Continues the rotation of `old`: the next turn goes to the first slot after the one last
    /// used, so that a change of members gives no worker two turns in a row.
    pub(crate) fn succeed(&mut self, old: &Self) {
        let slots = |pool: &Self| pool.backends.iter().map(|u| u.slot()).collect::<Vec<_>>();
        let turns = old.cursor.load(Relaxed) as u64;
        *self.cursor.get_mut() = rotation::continued(turns, &slots(old), &slots(self)) as usize;
    }

    /// Picks the worker for a connection from `client` (`None`: the client has no address). Workers
    /// whose ids are in `tried` are left out; `tried` is unchanged on return.
    pub(crate) fn pick(
        &self,
        client: Option<IpAddr>,
        tried: &mut Vec<u64>,
        choice: Choice,
    ) -> Result<Lease, NoBackend> {
        match (self.pick_of(client, tried, Choice::Clear), choice) {
            (Err(NoBackend::Congested), Choice::Any) => self.pick_of(client, tried, Choice::Any),
            (Err(NoBackend::HasRoom), Choice::Any) if self.is_congested() => {
                self.pick_of(client, tried, Choice::Any)
            }
            (picked, _) => picked,
        }
    }

    fn is_congested(&self) -> bool {
        self.backends.iter().any(|backend| backend.is_congested())
    }

    fn pick_of(
        &self,
        client: Option<IpAddr>,
        tried: &mut Vec<u64>,
        choice: Choice,
    ) -> Result<Lease, NoBackend> {
        let (before, mut nobody) = (tried.len(), NoBackend::Left);
        let lease = loop {
            let backend = match (self.routing.balance, client) {
                (Balance::SourceHash, Some(client)) => self.hashed(client, tried),
                (Balance::LeastConnections, _) => self.least(tried),
                _ => self.next(tried),
            };
            let Some(backend) = backend else { break Err(nobody) };
            if choice == Choice::Clear && backend.is_congested() {
                if nobody == NoBackend::Left {
                    nobody = NoBackend::Congested;
                }
                tried.push(backend.id());
                continue;
            }
            match backend.acquire(self.routing.worker_connections) {
                Ok(lease) => break Ok(lease),
                Err(LeaseError::Full) => nobody = NoBackend::HasRoom,
                // The backend was retired after this snapshot was taken.
                Err(LeaseError::Retired) => {}
            }
            tried.push(backend.id());
        };
        tried.truncate(before);
        lease
    }

    /// Each attempt takes a turn of the rotation. Otherwise the turns of the workers that are
    /// passed over would all go to their one neighbour.
    fn next(&self, tried: &[u64]) -> Option<&Arc<Backend>> {
        let count = self.backends.len();
        let turns = (0..count).map(|_| self.turn());
        // Other threads take turns too, so this thread's turns may miss a worker: the chained
        // `0..count` covers all of them.
        turns.chain(0..count).map(|i| &self.backends[i]).find(|u| !tried.contains(&u.id()))
    }

    fn least(&self, tried: &[u64]) -> Option<&Arc<Backend>> {
        let (before, after) = self.backends.split_at(self.turn().min(self.backends.len()));
        // `min_by_key` returns the first of several equal ones: here the next in the rotation.
        after.iter().chain(before).filter(|u| !tried.contains(&u.id())).min_by_key(|u| u.active())
    }

    /// Rendezvous hashing (Thaler and Ravishankar, 1998): each slot draws a number for the client,
    /// and the highest wins. So when a slot leaves, only its own clients move, and they return when
    /// it does.
    fn hashed(&self, client: IpAddr, tried: &[u64]) -> Option<&Arc<Backend>> {
        let client = match client.to_canonical() {
            IpAddr::V4(v4) => u128::from(v4.to_bits()),
            IpAddr::V6(v6) => v6.to_bits(),
        };
        let seed = mix(mix(client as u64) ^ (client >> 64) as u64);
        self.backends
            .iter()
            .filter(|u| !tried.contains(&u.id()))
            .max_by_key(|u| mix(seed ^ u64::from(u.slot())))
    }

    fn turn(&self) -> usize {
        self.cursor.fetch_add(1, Relaxed) % self.backends.len().max(1)
    }
}

/// splitmix64's step: each bit of the input changes about half of the output's.
fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashMap,
        net::{Ipv4Addr, SocketAddr},
        num::NonZeroU32,
        time::Duration,
    };

    use super::*;

    fn backend(slot: u32) -> Arc<Backend> {
        let address = SocketAddr::from(([127, 0, 0, 1], 9002));
        Backend::new(
            slot.into(),
            slot,
            format!("web/{slot}").into(),
            address.into(),
            None,
            Arc::default(),
        )
    }

    fn pool(balance: Balance, backends: &[Arc<Backend>]) -> Pool {
        Pool::new(backends.to_vec(), None, Arc::new(Routing { balance, ..Routing::default() }))
    }

    fn slots(pool: &Pool, count: usize) -> Vec<u32> {
        (0..count).map(|_| pool.pick(None, &mut vec![], Choice::Clear).unwrap().slot()).collect()
    }

    fn four() -> Vec<Arc<Backend>> {
        (0..4).map(backend).collect()
    }

    #[test]
    fn connections_rotate() {
        let pool = pool(Balance::RoundRobin, &four());
        assert_eq!(slots(&pool, 9), [0, 1, 2, 3, 0, 1, 2, 3, 0]);
    }

    #[test]
    fn an_empty_pool_has_nobody() {
        for balance in [Balance::RoundRobin, Balance::LeastConnections, Balance::SourceHash] {
            let client = Some(Ipv4Addr::LOCALHOST.into());
            assert!(pool(balance, &[]).pick(client, &mut vec![], Choice::Clear).is_err());
        }
    }

    #[test]
    fn the_rotation_goes_on_over_a_change_of_members() {
        let all = four();
        for (used, members, expected) in [
            (0, vec![0, 1, 2, 3], vec![0, 1, 2, 3]),
            (1, vec![0, 1, 2, 3], vec![1, 2, 3, 0]),
            (2, vec![0, 2, 3], vec![2, 3, 0, 2]),
            (2, vec![0, 1, 3], vec![3, 0, 1, 3]),
            (4, vec![1, 2, 3], vec![1, 2, 3, 1]),
            (3, vec![0, 1], vec![0, 1, 0, 1]),
        ] {
            let old = pool(Balance::RoundRobin, &all);
            slots(&old, used);
            let members: Vec<_> = members.iter().map(|&i: &usize| Arc::clone(&all[i])).collect();
            let mut new = pool(Balance::RoundRobin, &members);
            new.succeed(&old);
            let mut again = pool(Balance::RoundRobin, &members);
            again.succeed(&new);
            assert_eq!(slots(&new, 4), expected, "after {used}");
            assert_eq!(slots(&again, 4), expected, "after {used}, published twice");
        }
    }

    #[test]
    fn a_refused_connection_takes_the_next_turn() {
        let pool = pool(Balance::RoundRobin, &four());
        assert_eq!(slots(&pool, 1), [0]);
        assert_eq!(pool.pick(None, &mut vec![1], Choice::Clear).unwrap().slot(), 2);
        assert_eq!(slots(&pool, 2), [3, 0]);
        assert_eq!(
            pool.pick(None, &mut vec![0, 1, 2, 3], Choice::Clear).unwrap_err(),
            NoBackend::Left
        );
    }

    #[test]
    fn a_retired_worker_is_passed_over() {
        let all = four();
        let pool = pool(Balance::RoundRobin, &all);
        all[1].retire();
        assert_eq!(slots(&pool, 4), [0, 2, 3, 0]);
        all.iter().for_each(|u| _ = u.retire());
        assert_eq!(pool.pick(None, &mut vec![], Choice::Clear).unwrap_err(), NoBackend::Left);
    }

    #[test]
    fn a_full_worker_is_passed_over_whatever_the_balance() {
        let client = Some(Ipv4Addr::LOCALHOST.into());
        for balance in [Balance::RoundRobin, Balance::LeastConnections, Balance::SourceHash] {
            let worker_connections = NonZeroU32::new(2);
            let routing = Routing { balance, worker_connections, ..Routing::default() };
            let pool = Pool::new(four(), None, Arc::new(routing));
            let leases: Vec<_> =
                (0..8).map(|_| pool.pick(client, &mut vec![], Choice::Clear).unwrap()).collect();
            let mut slots: Vec<_> = leases.iter().map(|lease| lease.slot()).collect();
            slots.sort_unstable();
            assert_eq!(slots, [0, 0, 1, 1, 2, 2, 3, 3]);
            assert_eq!(
                pool.pick(client, &mut vec![], Choice::Clear).unwrap_err(),
                NoBackend::HasRoom
            );
            let mut tried = vec![0, 1, 2, 3];
            assert_eq!(pool.pick(client, &mut tried, Choice::Clear).unwrap_err(), NoBackend::Left);
            drop(leases);
            assert!(pool.pick(client, &mut vec![], Choice::Clear).is_ok());
        }
    }

    #[test]
    fn one_whose_queue_was_full_is_picked_last_and_by_those_alone_who_look() {
        for balance in [Balance::RoundRobin, Balance::LeastConnections, Balance::SourceHash] {
            let all = four();
            let pool = pool(balance, &all);
            let client = Some(Ipv4Addr::LOCALHOST.into());
            let pick = |choice, tried: &[u64]| {
                pool.pick(client, &mut tried.to_vec(), choice).map(|lease| lease.slot())
            };
            all[..3].iter().for_each(|backend| backend.set_congested(true));
            for choice in [Choice::Clear, Choice::Any, Choice::Clear] {
                assert_eq!(pick(choice, &[]), Ok(3));
            }
            assert_eq!(pick(Choice::Clear, &[3]), Err(NoBackend::Congested));
            assert!(pick(Choice::Any, &[3]).is_ok_and(|slot| slot < 3));
            all[1].set_congested(false);
            assert_eq!(pick(Choice::Clear, &[3]), Ok(1));
            assert_eq!(pick(Choice::Any, &[3]), Ok(1));
            assert_eq!(pick(Choice::Any, &[0, 1, 2, 3]), Err(NoBackend::Left));
        }
    }

    #[test]
    fn every_thread_shares_one_rotation() {
        let all = four();
        let pool = pool(Balance::RoundRobin, &all);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1_000 {
                        pool.pick(None, &mut vec![], Choice::Clear)
                            .unwrap()
                            .count_taken(0, Duration::ZERO);
                    }
                });
            }
        });
        assert_eq!(all.iter().map(|u| u.traffic().total).collect::<Vec<_>>(), [Some(1_000); 4]);
    }

    #[test]
    fn the_least_loaded_is_taken_and_the_rotation_decides_between_equals() {
        let all = four();
        let pool = pool(Balance::LeastConnections, &all);
        assert_eq!(slots(&pool, 5), [0, 1, 2, 3, 0]);
        let _busy = (all[0].acquire(None), all[1].acquire(None), all[2].acquire(None));
        assert_eq!(slots(&pool, 3), [3, 3, 3]);
        assert_eq!(pool.pick(None, &mut vec![3], Choice::Clear).unwrap().slot(), 0);
    }

    #[test]
    fn a_client_keeps_its_worker_and_only_the_leavers_clients_move() {
        let all = four();
        let whole = pool(Balance::SourceHash, &all);
        let fewer = pool(Balance::SourceHash, &[&all[..1], &all[2..]].concat());
        let mut share = HashMap::new();
        for client in 0..4_000_u32 {
            let client = Some(IpAddr::from(Ipv4Addr::from_bits(0x0a00_0000 + client)));
            let home = whole.pick(client, &mut vec![], Choice::Clear).unwrap().slot();
            assert_eq!(whole.pick(client, &mut vec![], Choice::Clear).unwrap().slot(), home);
            let moved = fewer.pick(client, &mut vec![], Choice::Clear).unwrap().slot();
            assert!(home == 1 || moved == home);
            *share.entry(home).or_insert(0) += 1;
        }
        assert!((0..4).all(|slot| (900..1_100).contains(&share[&slot])), "{share:?}");
    }

    #[test]
    fn a_mapped_address_is_the_same_client() {
        let pool = pool(Balance::SourceHash, &four());
        for client in 0..64 {
            let v4 = Ipv4Addr::new(10, 0, 0, client);
            let plain = pool.pick(Some(v4.into()), &mut vec![], Choice::Clear).unwrap().slot();
            let mapped = pool
                .pick(Some(v4.to_ipv6_mapped().into()), &mut vec![], Choice::Clear)
                .unwrap()
                .slot();
            assert_eq!(plain, mapped);
        }
    }
}
