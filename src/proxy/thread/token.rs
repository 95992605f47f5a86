//! The tokens that epoll's edges carry.
//!
//! The lowest two bits of a token are the subject. Above them are a connection's key (32 bits) and
//! the lowest 30 bits of its generation, or a frontend's number.

/// What an edge refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::proxy) enum Subject {
    Client = 0,
    Worker = 1,
    Listener = 2,
    Wakeup = 3,
}

impl Subject {
    pub(in crate::proxy) fn of(token: u64) -> Self {
        match token & 3 {
            0 => Self::Client,
            1 => Self::Worker,
            2 => Self::Listener,
            _ => Self::Wakeup,
        }
    }
}

/// The token of a connection: its key, and its generation, which distinguishes it from earlier
/// connections with the same key.
pub(in crate::proxy) fn of_connection(key: usize, generation: u32, side: Subject) -> u64 {
    u64::from(generation) << 34 | (key as u64) << 2 | side as u64
}

/// The key in the token of a connection.
pub(in crate::proxy) fn key(token: u64) -> usize {
    (token >> 2) as u32 as usize
}

/// Whether `token` belongs to a connection of this generation.
pub(in crate::proxy) fn is_of(token: u64, generation: u32) -> bool {
    generation & (u32::MAX >> 2) == (token >> 34) as u32
}

/// The token of a frontend's listener.
pub(in crate::proxy) fn of_listener(frontend: u32) -> u64 {
    u64::from(frontend) << 2 | Subject::Listener as u64
}

/// The frontend in the token of a listener.
pub(in crate::proxy) fn frontend(token: u64) -> u32 {
    (token >> 2) as u32
}
