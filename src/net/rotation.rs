//! How a rotation continues when its members change, both on the data threads and in the kernel.

/// The cursor with which the rotation continues at the slot after the one that had the last turn,
/// so that a change of members gives no worker two turns in a row. `turns` is the number of turns
/// taken so far among the slots of `before`; the members are those of `after` from now on.
pub(crate) fn continued(turns: u64, before: &[u32], after: &[u32]) -> u64 {
    let index = |turn: u64| usize::try_from(turn % (before.len().max(1) as u64)).ok();
    let last = turns.checked_sub(1).and_then(index).and_then(|index| before.get(index));
    // Zero means that no turn has been taken yet.
    let Some(last) = last else { return 0 };
    let next = after.iter().position(|slot| slot > last).unwrap_or(0);
    // Adding a whole round keeps the position, and avoids zero, which means that no turn was taken.
    (next + after.len()) as u64
}
