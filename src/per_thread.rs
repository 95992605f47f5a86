//! Counters with a separate shard for each thread, each in its own cache lines.

/// Up to this many threads have a shard each; further threads share.
const SHARDS: usize = 8;

/// A `T` for each thread, so that no thread waits for a cache line that another has changed.
#[derive(Debug, Default)]
pub struct PerThread<T>([Shard<T>; SHARDS]);

/// x86 fetches cache lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard<T>(T);

impl<T> PerThread<T> {
    /// The shard of the thread with this number.
    pub fn of(&self, thread: usize) -> &T {
        &self.0[thread % SHARDS].0
    }

    /// The shards of all threads.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|shard| &shard.0)
    }
}
