//! One direction of a connection: it copies bytes from one socket to the other.
//!
//! Bytes pass through the thread's one buffer and are written at once. Only what the peer did not
//! take is kept, and until it is written nothing more is read. That is the backpressure: a slow
//! reader costs at most one buffer, and the sender's own socket fills up.
//!
//! # Bulk
//!
//! A sender that is faster than its reader fills the kernel's socket buffers, which grow to
//! megabytes per connection. A network path needs that much to be kept busy. The loopback interface
//! does not: there it only means that every byte has left the CPU cache before it is read. So after
//! the first read that fills the buffer, sockets on loopback get a receive window of two segments,
//! and a low limit on unsent bytes.
//!
//! Tried for bulk, and not kept: buffers of 16, 32, 128 and 256 KiB, which differ by less than the
//! noise between rounds; and splice(2) with pipes of 64 KiB to 1 MiB. splice(2) halves lbd's own
//! CPU time, but then the reader copies the bytes out of a cold cache: `bench/run bodies` was 4 %
//! to 11 % slower than nginx, where this code is 20 % faster.

use std::{
    fs,
    io::{self, ErrorKind, Read},
    net::Shutdown,
    os::fd::AsRawFd,
    sync::LazyLock,
    time::Duration,
};

use nix::{
    getsockopt_impl,
    libc::{self, MSG_MORE, MSG_NOSIGNAL},
    setsockopt_impl, sockopt_impl,
    sys::{
        epoll::EpollFlags,
        socket::{MsgFlags, getsockopt, setsockopt, sockopt::RcvBuf},
    },
};
use socket2::Socket;

use crate::net::Reach;

/// How many buffers are moved for one connection before the other connections of its thread get
/// their turn.
const TURN: usize = 4;

/// The receive window for a bulk sender on loopback (tcp(7), `TCP_WINDOW_CLAMP`): how much may be
/// in transit to lbd, or wait there. It is two segments, each just under 64 KiB there. With a
/// smaller window, a segment would wait for a window that never opens that far (RFC 9293, section
/// 3.8.6.2).
const AHEAD: i32 = 128 * 1024;

/// The receive buffer for that window, as `SO_RCVBUF` takes it. It is large, so that nothing is
/// dropped for lack of memory, and fixed, because otherwise the kernel resizes the window with the
/// buffer. (The kernel may still widen the window within this buffer.)
const AHEAD_MEMORY: usize = 256 * 1024;

/// The limit on unsent bytes for a bulk reader on loopback (tcp(7), `TCP_NOTSENT_LOWAT`).
const BEHIND: u32 = 32 * 1024;

sockopt_impl!(
    /// `TCP_WINDOW_CLAMP` (tcp(7)): the largest window that is offered to the sender.
    WindowClamp, Both, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, i32
);

/// The largest receive buffer that a socket may ask for (the kernel's admin-guide on
/// `net.core.rmem_max`).
fn most_memory() -> usize {
    static MOST: LazyLock<usize> = LazyLock::new(|| {
        let most = fs::read_to_string("/proc/sys/net/core/rmem_max");
        most.ok().and_then(|most| most.trim().parse().ok()).unwrap_or(0)
    });
    *MOST
}

/// One of a connection's two sockets, and its readiness: what epoll's edges have reported and no
/// read or write has disproved since.
#[derive(Debug)]
pub(super) struct Side {
    pub(super) socket: Socket,
    readable: bool,
    writable: bool,
    /// The peer's FIN has arrived: nothing comes after the bytes that are queued.
    closed: bool,
    /// A read that fills less than the buffer does not prove the socket empty: TCP stops short at
    /// an urgent mark, unix at a passed descriptor, and behind the last byte there may be an error.
    uneven: bool,
    is_loopback: bool,
}

impl Side {
    /// The events that a [`Side`] is registered for. `EPOLLOUT` costs no wakeups of its own: it
    /// causes an edge only after a short write.
    pub(super) const INTEREST: EpollFlags = EpollFlags::EPOLLIN
        .union(EpollFlags::EPOLLPRI)
        .union(EpollFlags::EPOLLOUT)
        .union(EpollFlags::EPOLLRDHUP)
        .union(EpollFlags::EPOLLET);

    /// The event of a socket that an error has closed.
    const BROKEN: EpollFlags = EpollFlags::EPOLLERR;

    pub(super) fn new(socket: Socket, reach: Reach) -> Self {
        let (uneven, is_loopback) = (reach == Reach::Unix, reach == Reach::Loopback);
        Self { socket, readable: false, writable: true, closed: false, uneven, is_loopback }
    }

    /// Limits how much the kernel receives ahead of lbd's reads. This does nothing if the socket's
    /// buffer is larger already, since the window that was offered with it can't be taken back, or
    /// if the system does not allow a buffer that is large enough. (If it fails, the socket works
    /// as before.)
    fn limit_ahead(&self) {
        let has = || getsockopt(&self.socket, RcvBuf).unwrap_or(usize::MAX);
        if self.is_loopback
            && most_memory() >= AHEAD as usize
            && has() <= 2 * AHEAD_MEMORY
            && self.socket.set_recv_buffer_size(AHEAD_MEMORY).is_ok()
        {
            _ = setsockopt(&self.socket, WindowClamp, &AHEAD);
        }
    }

    /// Limits how much the kernel accepts of lbd's writes before it has sent it.
    fn limit_behind(&self) {
        if self.is_loopback {
            _ = self.socket.set_tcp_notsent_lowat(BEHIND);
        }
    }

    /// Records an edge.
    pub(super) fn note(&mut self, edge: EpollFlags) {
        let readable = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP;
        self.readable |= edge.intersects(readable | EpollFlags::EPOLLERR);
        self.writable |= edge.intersects(EpollFlags::EPOLLOUT | EpollFlags::EPOLLERR);
        self.closed |= edge.contains(EpollFlags::EPOLLRDHUP);
        self.uneven |= edge.intersects(EpollFlags::EPOLLPRI | EpollFlags::EPOLLERR);
    }

    /// Whether there is something to read, by the last known state: bytes, an end or an error.
    pub(super) fn is_readable(&self) -> bool {
        self.readable
    }

    /// Reads into `into` what has arrived, without consuming it.
    pub(super) fn peek(&self, into: &mut [u8]) -> io::Result<usize> {
        nix::sys::socket::recv(self.socket.as_raw_fd(), into, MsgFlags::MSG_PEEK)
            .map_err(io::Error::from)
    }

    /// Asks the kernel whether there is something to read: bytes, an end or an error.
    pub(super) fn look(&mut self) -> bool {
        let peeked = self.peek(&mut [0]);
        self.readable = !peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        self.readable
    }

    /// Whether the peer is known to have ended its stream. There may still be bytes to read.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Discards what has arrived. Returns whether that was the last of it: the stream has ended, or
    /// is broken.
    pub(super) fn drain(&mut self, buffer: &mut [u8]) -> bool {
        for _ in 0..TURN {
            if !self.readable {
                return false;
            }
            match self.read(buffer) {
                Ok(Some(0)) | Err(_) => return true,
                Ok(_) => {}
            }
        }
        // A peer that sends this much after the end is not waited for.
        true
    }

    /// Sends a FIN to the peer. To be called when no bytes wait to be sent.
    pub(super) fn end(&self) {
        // Fails only if the peer has reset the connection already.
        _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Whether the peer has ended its stream and everything in it has been read.
    pub(super) fn is_spent(&self) -> bool {
        self.closed && matches!(self.socket.peek(&mut [std::mem::MaybeUninit::uninit()]), Ok(0))
    }

    /// Makes closing the socket a reset (socket(7), `SO_LINGER` of zero). A unix socket has no
    /// reset: its peer sees an end, or ECONNRESET if lbd left some of the peer's bytes unread.
    pub(super) fn reset_on_close(&self) {
        // Fails only if the peer has reset the connection already.
        _ = self.socket.set_linger(Some(Duration::ZERO));
    }

    /// Returns `None` if the read would block.
    fn read(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, Fault> {
        loop {
            match (&self.socket).read(buffer) {
                Ok(count) => return Ok(Some(count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(None);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Fault::Reading),
            }
        }
    }

    /// Returns how many bytes the socket took; fewer than all only if it would block. If the end
    /// follows at once (`end_follows`), it travels with the last bytes: the peer gets one segment
    /// and one wakeup instead of two.
    fn write(&mut self, bytes: &[u8], end_follows: bool) -> Result<usize, Fault> {
        let flags = if end_follows { MSG_NOSIGNAL | MSG_MORE } else { MSG_NOSIGNAL };
        loop {
            match self.socket.send_with_flags(bytes, flags) {
                Ok(count) => {
                    self.writable = count == bytes.len();
                    return Ok(count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.writable = false;
                    return Ok(0);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Fault::Writing),
            }
        }
    }
}

/// The state of one direction.
#[derive(Debug, Default)]
pub(super) struct Flow {
    rest: Option<Rest>,
    ended: bool,
    passed: bool,
    bulk: bool,
}

#[derive(Debug)]
struct Rest {
    bytes: Box<[u8]>,
    written: usize,
}

/// Why [`Flow::pump`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pumped {
    /// It continues with an edge of either socket.
    Waits,
    /// It could continue at once, but has used up its turn.
    Yields,
    /// The end has been passed on, or need not be.
    Done,
}

/// Which socket failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Reading,
    Writing,
}

impl Flow {
    /// Whether this direction's end has been read, whether or not it has been passed on.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether bytes were read that the other side has not taken yet.
    pub(super) fn has_rest(&self) -> bool {
        self.rest.is_some()
    }

    /// Whether the end of this direction has been passed on.
    pub(super) fn is_done(&self) -> bool {
        self.passed
    }

    /// Sends `header` before everything else, at once, together with the bytes that `from` has sent
    /// already: neither waits for the other, and if both are there they form one segment. Adds to
    /// `moved` the bytes of `from` that `to` took.
    ///
    /// To be called once, before the first [`Self::pump`].
    pub(super) fn lead(
        &mut self,
        header: &[u8],
        from: &mut Side,
        to: &mut Side,
        buffer: &mut [u8],
        moved: &mut u64,
    ) -> Result<(), Fault> {
        let (front, behind) = buffer.split_at_mut(header.len());
        front.copy_from_slice(header);
        let whole = header.len() + self.read(from, behind)?.unwrap_or(0);
        let taken = to.write(&buffer[..whole], self.ended)?;
        // A new socket always has room for the whole header.
        *moved += taken.saturating_sub(header.len()) as u64;
        if taken < whole {
            self.rest = Some(Rest { bytes: buffer[taken..whole].into(), written: 0 });
        }
        Ok(())
    }

    /// Moves what can be moved without blocking, and adds to `moved` the bytes that `to` took. The
    /// end is passed on as a shutdown of `to`, unless `last` says that `to` will be closed anyway.
    pub(super) fn pump(
        &mut self,
        from: &mut Side,
        to: &mut Side,
        last: bool,
        buffer: &mut [u8],
        moved: &mut u64,
    ) -> Result<Pumped, Fault> {
        for _ in 0..TURN {
            if let Some(rest) = &mut self.rest {
                if !to.writable {
                    return Ok(Pumped::Waits);
                }
                let taken = to.write(&rest.bytes[rest.written..], self.ended)?;
                *moved += taken as u64;
                rest.written += taken;
                if rest.written < rest.bytes.len() {
                    return Ok(Pumped::Waits);
                }
                self.rest = None;
            }
            if self.ended {
                if !self.passed && !last {
                    to.socket.shutdown(Shutdown::Write).map_err(|_| Fault::Writing)?;
                }
                self.passed = true;
                return Ok(Pumped::Done);
            }
            if !from.readable {
                return Ok(Pumped::Waits);
            }
            let Some(count) = self.read(from, buffer)? else { return Ok(Pumped::Waits) };
            if count == 0 {
                continue;
            }
            if count == buffer.len() && !self.bulk {
                self.bulk = true;
                from.limit_ahead();
                to.limit_behind();
            }
            let taken = to.write(&buffer[..count], self.ended)?;
            *moved += taken as u64;
            if taken < count {
                self.rest = Some(Rest { bytes: buffer[taken..count].into(), written: 0 });
            }
        }
        Ok(Pumped::Yields)
    }

    /// Moves the last bytes of `from`, a peer that no longer reads: what it sent before is still
    /// queued.
    pub(super) fn pump_last_words(
        &mut self,
        from: &mut Side,
        to: &mut Side,
        buffer: &mut [u8],
        moved: &mut u64,
    ) {
        from.note(Side::BROKEN);
        while let Ok(Pumped::Yields) = self.pump(from, to, true, buffer, moved) {}
    }

    /// Returns `None` if the read would block.
    fn read(&mut self, from: &mut Side, buffer: &mut [u8]) -> Result<Option<usize>, Fault> {
        let Some(count) = from.read(buffer)? else { return Ok(None) };
        if count < buffer.len() && !from.uneven {
            // The socket is empty now, and the next byte will cause a new edge (epoll(7), question
            // 9). So lbd saves the read that would only return EAGAIN, and the one for the end.
            from.readable = false;
            self.ended = from.closed;
        }
        self.ended |= count == 0;
        Ok(Some(count))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        mem::MaybeUninit,
        net::{TcpListener, TcpStream},
        thread,
        time::Instant,
    };

    use super::*;

    /// Both ends of a connection, the first of them as lbd has it.
    fn pair(reach: Reach) -> (Side, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let near = Socket::from(listener.accept().unwrap().0);
        near.set_nonblocking(true).unwrap();
        (Side::new(near, reach), far)
    }

    /// The window and the memory that one side has, and what the other one may keep unsent.
    #[derive(Debug, PartialEq)]
    struct Kept(i32, usize, u32);

    impl Kept {
        fn by(from: &Side, to: &Side) -> Self {
            let window = getsockopt(&from.socket, WindowClamp).unwrap();
            let memory = getsockopt(&from.socket, RcvBuf).unwrap();
            Self(window, memory, to.socket.tcp_notsent_lowat().unwrap())
        }
    }

    /// Relays so many bytes at most, of which so many wait before the first is read. What the kernel
    /// kept before, and after.
    fn relay(reach: Reach, bytes: usize, waiting: usize) -> [Kept; 2] {
        let ((mut from, mut sender), (mut to, mut reader)) = (pair(reach), pair(reach));
        let sending = thread::spawn(move || sender.write_all(&vec![7; bytes]).map(|()| sender));
        let reading = thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all)
        });
        let (mut flow, mut moved) = (Flow::default(), 0);
        let mut buffer = vec![0; waiting];
        let mut peeked = vec![MaybeUninit::uninit(); waiting];
        let until = Instant::now() + Duration::from_secs(30);
        while from.socket.peek(&mut peeked).unwrap_or(0) < waiting {
            assert!(Instant::now() < until, "so much never waits");
            thread::yield_now();
        }
        let before = Kept::by(&from, &to);
        while moved < bytes as u64 {
            assert!(Instant::now() < until, "it stalls at {moved}");
            (from.readable, to.writable) = (true, true);
            flow.pump(&mut from, &mut to, false, &mut buffer, &mut moved).unwrap();
        }
        let after = Kept::by(&from, &to);
        drop((sending.join().unwrap().unwrap(), to));
        assert!(reading.join().unwrap().unwrap() == vec![7; bytes]);
        [before, after]
    }

    #[test]
    fn the_kernel_keeps_little_of_bulk_on_loopback_and_nothing_else_changes() {
        // A small buffer, since the system may let a socket have less than the real one at first.
        const FULL: usize = 16 * 1024;
        // The kernel doubles what it is asked for (socket(7)), up to a limit that the system sets.
        let memory = 2 * AHEAD_MEMORY.min(most_memory());
        let [_, bulk] = relay(Reach::Loopback, 4 << 20, FULL);
        // As long as bytes come, the kernel may widen the window again, within the memory.
        assert_eq!((bulk.1, bulk.2), (memory, BEHIND));
        assert!((AHEAD..=memory as i32).contains(&bulk.0), "{bulk:?}");

        // A read that does not fill the buffer is no bulk.
        let (mut from, mut sender) = pair(Reach::Loopback);
        let (mut to, _reader) = pair(Reach::Loopback);
        let before = Kept::by(&from, &to);
        sender.write_all(b"few").unwrap();
        let (mut flow, mut moved) = (Flow::default(), 0);
        while moved < 3 {
            from.readable = true;
            flow.pump(&mut from, &mut to, false, &mut vec![0; FULL], &mut moved).unwrap();
        }
        assert_eq!(Kept::by(&from, &to), before);

        let [before, after] = relay(Reach::Network, 4 << 20, FULL);
        assert_eq!(after.2, before.2);
        assert_ne!(after.0, AHEAD, "its window grows");
    }

    #[test]
    fn a_limited_socket_has_a_window_of_two_segments() {
        let ((from, _sender), (to, _reader)) = (pair(Reach::Loopback), pair(Reach::Loopback));
        from.limit_ahead();
        to.limit_behind();
        let memory = 2 * AHEAD_MEMORY.min(most_memory());
        assert_eq!(Kept::by(&from, &to), Kept(AHEAD, memory, BEHIND));
        let ((from, _sender), (to, _reader)) = (pair(Reach::Network), pair(Reach::Network));
        let before = Kept::by(&from, &to);
        from.limit_ahead();
        to.limit_behind();
        assert_eq!(Kept::by(&from, &to), before);
    }

    #[test]
    fn memory_that_has_grown_is_not_taken_back() {
        let (from, _sender) = pair(Reach::Loopback);
        let (to, _reader) = pair(Reach::Loopback);
        from.socket.set_recv_buffer_size(most_memory()).unwrap();
        let before = Kept::by(&from, &to);
        from.limit_ahead();
        let is_more = before.1 > 2 * AHEAD_MEMORY;
        assert_eq!(Kept::by(&from, &to) == before, is_more, "{before:?}");
    }
}
