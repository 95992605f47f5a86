//! Which socket has which turn, in the form in which both steerings look it up.

use std::net::IpAddr;

/// The number of a socket in its group, which it keeps for as long as it is there.
pub(super) type Key = u32;

/// The socket that gets what no other one is to get: lbd's own.
pub(super) const FALLBACK: Key = 0;

/// How a connection is given its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// One after the other.
    Rotation,
    /// By the client's address: the same one for the same client, as long as it is there.
    SourceHash,
}

/// Which buckets of clients belong to which socket: each has the one that draws the highest number
/// for it (rendezvous hashing: Thaler and Ravishankar, 1998). So one that leaves moves its own
/// clients only, and gets them back.
pub(super) fn buckets(turns: &[Turn], count: u32) -> Vec<Key> {
    let owner = |bucket| {
        let drawn = |turn: &&Turn| mix(mix(bucket) ^ mix(turn.place.wrapping_add(0x5bd1_e995)));
        turns.iter().max_by_key(drawn).map(|turn| turn.key)
    };
    (0..count).filter_map(owner).collect()
}

/// One socket's part in the rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn {
    /// Where it stands: the same for whoever takes its place.
    pub(super) place: u32,
    pub(super) key: Key,
}

/// The number that a client's bucket comes from, as both programs compute it: its lowest bits count.
#[cfg(test)]
pub(super) fn hash(client: IpAddr) -> u32 {
    finish(fold(client))
}

/// The words of an address in network order, one after the other.
pub(super) fn words(address: IpAddr) -> Vec<u32> {
    match address {
        IpAddr::V4(v4) => vec![v4.to_bits()],
        IpAddr::V6(v6) => {
            let bits = v6.to_bits();
            [96, 64, 32, 0].iter().map(|shift| (bits >> shift) as u32).collect()
        }
    }
}

/// Multiplied in between the words of an IPv6 address.
pub(super) const FOLD: u32 = 0x9e37_79b1;

/// The steps after that: odd factors, and shifts, of MurmurHash3's `fmix32` (A. Appleby, in the
/// public domain). Every bit of the input changes about half of the output's.
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
