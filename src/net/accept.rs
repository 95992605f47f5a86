//! Accepting from a blocking socket from which another process accepts too, without being blocked.
//!
//! `O_NONBLOCK` is a flag of the open file description (fcntl(2)), and lbd shares that of a
//! worker's listening socket with the worker: setting it on one side would change what `accept`
//! does on the other. So the flag stays as it is. Readiness from poll(2) or epoll does not need it.
//! The critical step is from "readable" to `accept`: if the other process takes the connection in
//! between, a blocking `accept` waits for the next one, and everything else in this thread waits
//! too. That can't be prevented (there is no accept with `MSG_DONTWAIT`), so it is bounded: an
//! interval timer, armed around the call, interrupts it. Two `timer_settime` calls cost far less
//! than a separate thread that would hand over each connection. No race is left: if a tick comes
//! too early, another one follows.

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

/// How long [`Acceptor::accept`] can block at most, when another process has taken the connection.
const BOUND: Duration = Duration::from_millis(20);

/// Accepts from blocking sockets, on the thread that created it.
pub struct Acceptor {
    alarm: Alarm,
    permit: Option<MayAccept>,
    is_short: bool,
}

/// A function that is called before each accept: whether there is room for one more connection.
pub type MayAccept = Box<dyn FnMut() -> bool>;

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor").field("is_short", &self.is_short).finish_non_exhaustive()
    }
}

impl Acceptor {
    /// Creates one for this thread. It takes over `SIGALRM` in the whole process.
    ///
    /// # Errors
    /// If the system has no timer left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { alarm: Alarm::new()?, permit: None, is_short: false })
    }

    /// From now on accepts only while `permit` returns true; with `None`, without a limit.
    pub fn set_permit(&mut self, permit: Option<MayAccept>) {
        self.permit = permit;
    }

    /// Whether connections were left in a queue since the last [`begin`](Self::begin), for lack of
    /// a permit or of descriptors.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.is_short
    }

    /// Resets [`is_short`](Self::is_short).
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

/// As [`Acceptor::accept`], for a non-blocking socket.
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
    /// No connection waits.
    Empty,
    /// The connection that it would have returned is gone, or the call was interrupted. There may
    /// be another one.
    Lost,
    /// No descriptor or memory is left, or another condition that is just as likely to last.
    Exhausted,
}

impl AcceptFailure {
    /// Classifies an `error` of accept(2), which also returns errors that happened to the
    /// connection before it was accepted.
    pub(crate) fn of(error: &io::Error) -> Self {
        match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
            // EINVAL: a unix socket that is shut down for reading, with an empty queue. poll(2)
            // reports it as readable because of its end.
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
