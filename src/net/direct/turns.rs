//! The turns of the rotation, in the form in which both kinds of programs look them up.

use std::net::IpAddr;

/// The number of a socket in its group. A socket keeps its number as long as it is in the group.
pub(super) type Key = u32;

/// The key of the fallback socket, lbd's own: it gets what no other socket is to get.
pub(super) const FALLBACK: Key = 0;

/// How a connection is assigned to a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Round robin.
    Rotation,
    /// By the client's address: the same client gets the same socket, as long as that has a turn.
    SourceHash,
}

/// Assigns each bucket of clients to a socket by rendezvous hashing (Thaler and Ravishankar, 1998):
/// the socket that draws the highest number for the bucket gets it. So when a socket leaves, only
/// its own clients move, and they return when it does.
pub(super) fn buckets(turns: &[Turn], count: u32) -> Vec<Key> {
    let owner = |bucket| {
        let drawn = |turn: &&Turn| mix(mix(bucket) ^ mix(turn.place.wrapping_add(0x5bd1_e995)));
        turns.iter().max_by_key(drawn).map(|turn| turn.key)
    };
    (0..count).filter_map(owner).collect()
}

/// One turn of a socket in the rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn {
    /// The slot of the worker, which a successor shares.
    pub(super) place: u32,
    pub(super) key: Key,
}

/// The hash by which a client's bucket is chosen, as both programs compute it. The lowest bits are
/// used.
#[cfg(test)]
pub(super) fn hash(client: IpAddr) -> u32 {
    finish(fold(client))
}

/// The 32-bit words of an address, in network order.
pub(super) fn words(address: IpAddr) -> Vec<u32> {
    match address {
        IpAddr::V4(v4) => vec![v4.to_bits()],
        IpAddr::V6(v6) => {
            let bits = v6.to_bits();
            [96, 64, 32, 0].iter().map(|shift| (bits >> shift) as u32).collect()
        }
    }
}

/// The factor between the words of an IPv6 address.
pub(super) const FOLD: u32 = 0x9e37_79b1;

/// The next steps: the shifts and odd factors of MurmurHash3's `fmix32` (A. Appleby, in the public
/// domain). Every bit of the input changes about half of the output's.
pub(super) const STEPS: [(u32, u32); 2] = [(16, 0x85eb_ca6b), (13, 0xc2b2_ae35)];
/// The last shift.
pub(super) const LAST: u32 = 16;

#[cfg(test)]
fn fold(client: IpAddr) -> u32 {
    words(client).into_iter().reduce(|hash, word| hash.wrapping_mul(FOLD) ^ word).unwrap_or(0)
}

fn finish(mut hash: u32) -> u32 {
    for (shift, factor) in STEPS {
        hash = (hash ^ (hash >> shift)).wrapping_mul(factor);
    }
    hash ^ (hash >> LAST)
}

fn mix(value: u32) -> u32 {
    finish(value.wrapping_add(FOLD))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn turns(places: impl IntoIterator<Item = u32>) -> Vec<Turn> {
        places.into_iter().map(|place| Turn { place, key: place + 1 }).collect()
    }

    #[test]
    fn buckets_are_shared_out_evenly_and_only_the_leavers_move() {
        let whole = buckets(&turns(0..4), 4096);
        let fewer = buckets(&turns([0, 2, 3]), 4096);
        let mut share = HashMap::new();
        for (before, after) in whole.iter().zip(&fewer) {
            assert!(*before == 2 || before == after);
            *share.entry(*before).or_insert(0) += 1;
        }
        assert!((1..=4).all(|key| (900..1_150).contains(&share[&key])), "{share:?}");
    }

    #[test]
    fn who_takes_a_place_gets_its_clients() {
        let successor = [Turn { place: 0, key: 9 }, Turn { place: 1, key: 2 }];
        let before = buckets(&turns(0..2), 64);
        let after = buckets(&successor, 64);
        assert!(before.iter().zip(&after).all(|(b, a)| if *b == 1 { *a == 9 } else { a == b }));
    }

    #[test]
    fn nobody_has_no_buckets() {
        assert!(buckets(&[], 64).is_empty());
    }
}
