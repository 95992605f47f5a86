//! Waking the data threads.

use std::io;

use nix::sys::eventfd::{EfdFlags, EventFd};

/// For each data thread what its epoll instance wakes up for (eventfd(2)).
#[derive(Debug)]
pub(crate) struct Waker(Box<[EventFd]>);

impl Waker {
    /// # Errors
    /// Where there are no descriptors left.
    pub(crate) fn new(threads: usize) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        (0..threads).map(|_| Ok(EventFd::from_flags(flags)?)).collect::<io::Result<_>>().map(Self)
    }

    /// How many threads there are.
    pub(crate) fn threads(&self) -> usize {
        self.0.len()
    }

    /// Has one thread look at what it was told, at new pools, and at the limits.
    pub(crate) fn wake(&self, thread: usize) {
        // EAGAIN says that it has been told more often than can be counted: it will wake up.
        _ = self.0[thread].write(1);
    }

    /// Has every thread do that.
    pub(crate) fn wake_all(&self) {
        (0..self.0.len()).for_each(|thread| self.wake(thread));
    }

    /// What tells the thread: it is readable from a [`Self::wake`] to the next [`Self::woken`].
    pub(crate) fn event(&self, thread: usize) -> &EventFd {
        &self.0[thread]
    }

    /// The thread is about to look: whoever wakes it after this has it look again.
    pub(crate) fn woken(&self, thread: usize) {
        _ = self.0[thread].read();
    }
}
