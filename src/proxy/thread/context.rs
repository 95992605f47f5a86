//! The state of a data thread that every engine uses.

use std::{io, mem, sync::Arc, time::Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use slab::Slab;

use super::{threads::Threads, token::Subject};
use crate::proxy::balance::{Pool, ServiceHandle, WaitList};

/// The size of a thread's buffer, and so the most that one connection may buffer in each direction.
pub(in crate::proxy) const BUFFER: usize = 64 * 1024;

/// The state of one data thread.
pub(in crate::proxy) struct Context {
    pub(in crate::proxy) threads: Arc<Threads>,
    /// The number of the thread.
    pub(in crate::proxy) thread: usize,
    pub(in crate::proxy) epoll: Epoll,
    /// When the last edges were taken. Everything that follows from them uses this as the current
    /// time.
    pub(in crate::proxy) now: Instant,
    pub(in crate::proxy) buffer: Box<[u8]>,
    pub(in crate::proxy) services: Slab<Service>,
}

/// A thread's view of a service.
pub(in crate::proxy) struct Service {
    pub(in crate::proxy) handle: Arc<ServiceHandle>,
    pub(in crate::proxy) pool: Arc<Pool>,
    version: u64,
    /// When waiting connections last looked for a worker: the version of the pool then, and how
    /// often they had been told to look.
    looked: (u64, u64),
    pub(in crate::proxy) waiters: WaitList,
    /// Whether all of its workers are on this machine.
    pub(in crate::proxy) is_local: bool,
    /// The number of frontends and connections that refer to it.
    uses: usize,
}

impl Context {
    /// Creates the state of thread number `thread`, and registers its wakeup descriptor.
    pub(in crate::proxy) fn new(threads: Arc<Threads>, thread: usize) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let wakeup = EpollEvent::new(EpollFlags::EPOLLIN, Subject::Wakeup as u64);
        epoll.add(threads.event(thread), wakeup)?;
        let (now, buffer) = (Instant::now(), vec![0; BUFFER].into());
        Ok(Self { threads, thread, epoll, now, buffer, services: Slab::new() })
    }

    /// Takes over a newly published pool, if there is one.
    pub(in crate::proxy) fn refresh(&mut self, service: usize) {
        let service = &mut self.services[service];
        if service.handle.version() != service.version {
            let before = Arc::clone(&service.pool);
            (service.pool, service.version) = service.handle.current();
            if !Arc::ptr_eq(&before, &service.pool) {
                // The supervisor has decided since; the doubt is over.
                service.waiters.doubt = None;
                // If the new pool is empty, connects in progress still go to workers of the old
                // one.
                if !service.pool.backends().is_empty() {
                    service.is_local = is_local(&service.pool);
                }
            }
        }
    }

    /// Returns the key of a service. It is valid until the service is [left](Self::leave_service)
    /// as often as it was used.
    pub(in crate::proxy) fn use_service(&mut self, handle: &Arc<ServiceHandle>) -> usize {
        let known = self.services.iter().find(|(_, known)| Arc::ptr_eq(&known.handle, handle));
        let key = known.map(|(key, _)| key).unwrap_or_else(|| {
            let (pool, version) = handle.current();
            self.services.insert(Service {
                handle: Arc::clone(handle),
                is_local: is_local(&pool),
                pool,
                version,
                looked: (version, handle.calls()),
                waiters: WaitList::default(),
                uses: 0,
            })
        });
        self.services[key].uses += 1;
        key
    }

    /// Counts one more reference to a service that is in use.
    pub(in crate::proxy) fn share_service(&mut self, key: usize) {
        self.services[key].uses += 1;
    }

    pub(in crate::proxy) fn leave_service(&mut self, key: usize) {
        self.services[key].uses -= 1;
        if self.services[key].uses == 0 {
            self.services.remove(key);
        }
    }

    /// The keys of all services that are in use.
    pub(in crate::proxy) fn service_keys(&self) -> Vec<usize> {
        self.services.iter().map(|(key, _)| key).collect()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Connections on other threads no longer have to wait for connections of this thread.
        self.services.iter().for_each(|(_, service)| service.handle.set_head(self.thread, None));
        self.threads.ended(self.thread);
    }
}

impl Service {
    /// Whether there has been news for the waiting connections since the last call.
    pub(in crate::proxy) fn is_news(&mut self) -> bool {
        let news = (self.version, self.handle.calls());
        mem::replace(&mut self.looked, news) != news
    }

    /// When the `hold-timeout` of the longest-waiting connection expires.
    pub(in crate::proxy) fn hold_deadline(&self) -> Option<Instant> {
        let (came, _) = self.waiters.first()?;
        came.checked_add(self.pool.routing().hold_timeout)
    }

    /// Publishes the arrival time of this thread's longest-waiting connection to the other threads.
    pub(in crate::proxy) fn tell_head(&self, thread: usize) {
        self.handle.set_head(thread, self.waiters.first().map(|(came, _)| came));
    }
}

fn is_local(pool: &Pool) -> bool {
    pool.backends().iter().all(|backend| backend.is_local())
}
