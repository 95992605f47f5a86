//! What both ways of steering can do: the one interface behind which programs and maps live.

use std::{fmt, io};

use socket2::Socket;

use super::turns::{Choice, Key, Turn};

/// Says which socket of one `SO_REUSEPORT` group gets a new connection. Nothing here blocks.
///
/// At first that is [`FALLBACK`](super::turns::FALLBACK), lbd's own socket, which is in the group from
/// the beginning and stays.
pub(super) trait Steer: fmt::Debug + Send + Sync {
    /// `socket` has just begun to listen in the group, and gets nothing yet.
    fn join(&self, key: Key, socket: &Socket) -> io::Result<()>;

    /// `socket`, which has no turn any more, leaves the group, and is shut down. What waits in it
    /// goes to another one where [`moves`](Self::moves) says so, and is reset elsewhere.
    fn leave(&self, key: Key, socket: &Socket);

    /// Whether the kernel moves what waits in a socket that leaves.
    fn moves(&self) -> bool;

    /// From now on these have turns, and nobody else; with none, the parking has them all.
    fn rotate(&self, choice: Choice, turns: &[Turn]) -> io::Result<()>;

    /// A connection that lbd makes to itself from this source port goes to `key`, whoever has
    /// turns; and is refused where `key` does not listen.
    fn except(&self, source: u16, key: Key) -> io::Result<()>;

    /// Takes that back.
    fn except_no_more(&self, source: u16);

    /// Gives no new connection to anybody until [`rotate`](Self::rotate): it is refused if that can be
    /// had, which is told, or else goes to the parking.
    fn close(&self) -> bool;

    /// Puts the program on anew, whatever is in force instead. `fallback` is in the group.
    fn renew(&self, fallback: &Socket) -> io::Result<()>;

    /// Whether [`except`](Self::except) does so too.
    fn except_renews(&self) -> bool;

    /// Lets go of its copies of sockets: nobody is steered any more.
    fn end(&self, fallback: &Socket);

    /// How many connections went to `key` by its turns, if that is counted. It goes on where an
    /// earlier holder of the number left off.
    fn routed(&self, key: Key) -> Option<u64>;
}
