//! The interface of both kinds of steering programs; it hides the programs and their maps.

use std::{fmt, io};

use socket2::Socket;

use super::turns::{Choice, Key, Turn};

/// Decides which socket of one `SO_REUSEPORT` group gets a new connection. Nothing here blocks.
///
/// At first every connection goes to [`FALLBACK`](super::turns::FALLBACK), lbd's own socket, which
/// is in the group from the beginning and stays.
pub(super) trait Steer: fmt::Debug + Send + Sync {
    /// Adds `socket`, which has just begun to listen in the group. It has no turn yet.
    fn join(&self, key: Key, socket: &Socket) -> io::Result<()>;

    /// Removes `socket`, which has no turn any more, from the group, and shuts it down. Its queued
    /// connections move to other sockets if [`moves`](Self::moves) says so, and are reset
    /// otherwise.
    fn leave(&self, key: Key, socket: &Socket);

    /// Whether the kernel moves queued connections of a socket that leaves to other sockets.
    fn moves(&self) -> bool;

    /// Replaces the rotation. If it is empty, the fallback socket gets every connection.
    fn rotate(&self, choice: Choice, turns: &[Turn]) -> io::Result<()>;

    /// A connection that lbd makes to itself from this source port goes to `key`, whatever the
    /// rotation is. It is refused if `key` does not listen.
    fn except(&self, source: u16, key: Key) -> io::Result<()>;

    /// Undoes [`except`](Self::except) for this source port.
    fn except_no_more(&self, source: u16);

    /// Stops giving new connections to workers until the next [`rotate`](Self::rotate). New
    /// connections are refused if the kind of program can do that (then this returns true);
    /// otherwise they go to the fallback socket.
    fn close(&self) -> bool;

    /// Attaches the program again, replacing whatever is in force. `fallback` is in the group.
    fn renew(&self, fallback: &Socket) -> io::Result<()>;

    /// Whether [`except`](Self::except) attaches the program again too.
    fn except_renews(&self) -> bool;

    /// Ends the steering, and releases its copies of sockets.
    fn end(&self, fallback: &Socket);

    /// How many connections went to `key` by its turns, if that is counted. The count includes
    /// those of earlier sockets with the same key.
    fn routed(&self, key: Key) -> Option<u64>;
}
