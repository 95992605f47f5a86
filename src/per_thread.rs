//! What several threads count, each in cache lines of its own.

/// Threads up to this number have a shard each; more of them share.
const SHARDS: usize = 8;

/// One of `T` for each thread, so that none has to wait for a cache line that another has changed.
#[derive(Debug, Default)]
pub struct PerThread<T>([Shard<T>; SHARDS]);

/// x86 fetches cache lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard<T>(T);

impl<T> PerThread<T> {
    /// That of the thread with this number.
    pub fn of(&self, thread: usize) -> &T {
        &self.0[thread % SHARDS].0
    }

    /// Those of all threads.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|shard| &shard.0)
    }
}
