//! Waking the data threads.

use std::io;

use nix::sys::eventfd::{EfdFlags, EventFd};

/// For each data thread the eventfd(2) that wakes its epoll instance.
#[derive(Debug)]
pub(crate) struct Waker(Box<[EventFd]>);

impl Waker {
    /// # Errors
    /// If no descriptors are left.
    pub(crate) fn new(threads: usize) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        (0..threads).map(|_| Ok(EventFd::from_flags(flags)?)).collect::<io::Result<_>>().map(Self)
    }

    /// The number of threads.
    pub(crate) fn threads(&self) -> usize {
        self.0.len()
    }

    /// Makes one thread check its commands, new pools, and the limits.
    pub(crate) fn wake(&self, thread: usize) {
        // EAGAIN means that the counter is at its maximum: the thread will wake up anyway.
        _ = self.0[thread].write(1);
    }

    /// Wakes every thread.
    pub(crate) fn wake_all(&self) {
        (0..self.0.len()).for_each(|thread| self.wake(thread));
    }

    /// The descriptor that the thread polls: readable from a [`Self::wake`] to the next
    /// [`Self::woken`].
    pub(crate) fn event(&self, thread: usize) -> &EventFd {
        &self.0[thread]
    }

    /// Resets the wakeup. To be called before the thread checks: a wakeup after this makes it check
    /// again.
    pub(crate) fn woken(&self, thread: usize) {
        _ = self.0[thread].read();
    }
}
