//! How a rotation goes on over a change of its members, whoever turns it: the data threads, or the
//! kernel.

/// Where the cursor has to stand for the rotation to go on after the slot that had the last turn, so
/// that a change hits no worker twice in a row. `turns` were taken among the slots of `before`; the
/// members are those of `after` from now on.
pub(crate) fn continued(turns: u64, before: &[u32], after: &[u32]) -> u64 {
    let index = |turn: u64| usize::try_from(turn % (before.len().max(1) as u64)).ok();
    let last = turns.checked_sub(1).and_then(index).and_then(|index| before.get(index));
    // Zero says that nobody had a turn yet.
    let Some(last) = last else { return 0 };
    let next = after.iter().position(|slot| slot > last).unwrap_or(0);
    // A whole round later is the same place.
    (next + after.len()) as u64
}
