//! Accepting from a blocking socket that somebody else accepts from too, without being held up.
//!
//! `O_NONBLOCK` is a flag of the open file description (fcntl(2)), and lbd shares that of a worker's
//! listening socket with the worker: setting it on one side would change what `accept` does on the
//! other. So the flag stays as it is. Readiness from poll(2) or epoll does not need it. What needs
//! care is the step from "readable" to `accept`: if the other holder takes the connection in between,
//! a blocking `accept` waits for the next one, and everything else in this thread waits with it. That
//! can't be prevented (there is no accept with `MSG_DONTWAIT`), so it is bounded: an interval timer,
//! armed around the call, interrupts it. Two `timer_settime` calls cost far less than handing each
//! connection over from a thread of its own, and there is no race left: a tick that comes too early
//! is followed by another.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{
            SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction,
        },
        timer::{Expiration, Timer, TimerSetTimeFlags},
    },
    time::ClockId,
    unistd::gettid,
};
use socket2::Socket;

/// The longest a stolen connection can hold up [`Acceptor::accept`].
const BOUND: Duration = Duration::from_millis(20);

/// Accepts from blocking sockets on the thread that made it.
pub struct Acceptor {
    alarm: Alarm,
    permit: Option<MayAccept>,
    is_short: bool,
}

/// Asked before each connection: whether there is room for one more.
pub type MayAccept = Box<dyn FnMut() -> bool>;

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor").field("is_short", &self.is_short).finish_non_exhaustive()
    }
}

impl Acceptor {
    /// For this thread. It takes `SIGALRM` for itself, in the whole process.
    ///
    /// # Errors
    /// Where the system has no timer left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { alarm: Alarm::new()?, permit: None, is_short: false })
    }

    /// From now on accepts only as long as `permit` says so; with `None`, whatever there is.
    pub fn set_permit(&mut self, permit: Option<MayAccept>) {
        self.permit = permit;
    }

    /// Whether connections were left in a queue since this was last asked of and [taken
    /// back](Self::begin), for want of a permit or of descriptors.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.is_short
    }

    /// Forgets that any were left.
    pub fn begin(&mut self) {
        self.is_short = false;
    }

    /// Takes the next connection out of the accept queue of a blocking socket, with these flags of
    /// accept4(2). Never blocks for longer than 20 ms.
    ///
    /// # Errors
    /// `WouldBlock` when the queue is empty; any other error is one that only time can cure
    /// (descriptors or memory run out, or there is no permit), so the caller backs off. Errors of a
    /// single connection are skipped, as accept(2) says.
    pub fn accept(&mut self, socket: &Socket, flags: i32) -> io::Result<Socket> {
        let mut is_permitted = false;
        loop {
            if !is_readable(socket.as_fd())? {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            if !is_permitted && self.permit.as_mut().is_some_and(|permit| !permit()) {
                self.is_short = true;
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            is_permitted = true;
            self.alarm.arm(BOUND)?;
            let accepted = socket.accept4(flags);
            self.alarm.arm(Duration::ZERO)?;
            match accepted {
                Ok((connection, _peer)) => return Ok(connection),
                Err(error) => match AcceptFailure::of(&error) {
                    AcceptFailure::Lost => {}
                    AcceptFailure::Empty => return Err(io::ErrorKind::WouldBlock.into()),
                    AcceptFailure::Exhausted => {
                        self.is_short = true;
                        return Err(error);
                    }
                },
            }
        }
    }
}

/// The same for a socket that is non-blocking.
///
/// # Errors
/// As [`Acceptor::accept`].
pub fn accept_nonblocking(socket: &Socket, flags: i32) -> io::Result<Socket> {
    loop {
        match socket.accept4(flags) {
            Ok((connection, _peer)) => return Ok(connection),
            Err(error) if AcceptFailure::of(&error) == AcceptFailure::Lost => {}
            Err(error) => return Err(error),
        }
    }
}

/// Why accept(2) has returned no connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AcceptFailure {
    /// None waits.
    Empty,
    /// The one that it would have returned is gone, or the call was interrupted: the next may be there.
    Lost,
    /// There is no descriptor or memory left, or something that's just as likely to last.
    Exhausted,
}

impl AcceptFailure {
    /// What `error` of accept(2) says. It passes on what went wrong with the connection before it was
    /// accepted.
    pub(crate) fn of(error: &io::Error) -> Self {
        match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
            // EINVAL: a unix socket that is shut down for reading, with nobody left in its queue; poll(2)
            // calls it readable for its end.
            Errno::EAGAIN | Errno::EINVAL => Self::Empty,
            Errno::EINTR
            | Errno::ECONNABORTED
            | Errno::EPERM
            | Errno::EPROTO
            | Errno::ENETDOWN
            | Errno::ENOPROTOOPT
            | Errno::EHOSTDOWN
            | Errno::ENONET
            | Errno::EHOSTUNREACH
            | Errno::EOPNOTSUPP
            | Errno::ENETUNREACH => Self::Lost,
            _ => Self::Exhausted,
        }
    }
}

/// An interval timer that interrupts the system calls of the thread that created it.
#[derive(Debug)]
struct Alarm(Timer);

impl Alarm {
    fn new() -> io::Result<Self> {
        extern "C" fn interrupt(_: i32) {}
        // No SA_RESTART: the point is that `accept` returns EINTR.
        let action =
            SigAction::new(SigHandler::Handler(interrupt), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, and nothing else in lbd or its built-in worker uses SIGALRM.
        unsafe { sigaction(Signal::SIGALRM, &action) }?;
        SigSet::from(Signal::SIGALRM).thread_unblock()?;
        let event = SigEvent::new(SigevNotify::SigevThreadId {
            signal: Signal::SIGALRM,
            thread_id: gettid().as_raw(),
            si_value: 0,
        });
        Ok(Self(Timer::new(ClockId::CLOCK_MONOTONIC, event)?))
    }

    /// Ticks every `interval` from now on; never, if that is zero.
    fn arm(&mut self, interval: Duration) -> io::Result<()> {
        let expiration = Expiration::Interval(interval.into());
        Ok(self.0.set(expiration, TimerSetTimeFlags::empty())?)
    }
}

fn is_readable(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut fds = [PollFd::new(socket, PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, os::fd::OwnedFd, time::Instant};

    use super::*;

    /// The step that can't be reached from outside at will: the connection is gone after the look.
    #[test]
    fn the_alarm_ends_an_accept_that_blocks() {
        let socket: Socket = OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap()).into();
        let mut acceptor = Acceptor::new().unwrap();
        for _ in 0..3 {
            let start = Instant::now();
            acceptor.alarm.arm(BOUND).unwrap();
            let error = socket.accept().unwrap_err();
            acceptor.alarm.arm(Duration::ZERO).unwrap();
            assert_eq!(error.kind(), io::ErrorKind::Interrupted);
            assert!(start.elapsed() >= BOUND);
        }
    }
}
