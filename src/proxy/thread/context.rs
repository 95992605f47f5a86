//! What a data thread has, whatever engine drives its connections.

use std::{io, mem, sync::Arc, time::Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use slab::Slab;

use super::{threads::Threads, token::Subject};
use crate::proxy::balance::{Pool, ServiceHandle, WaitList};

/// A thread's buffer, and so the most that one connection may keep in each direction.
pub(in crate::proxy) const BUFFER: usize = 64 * 1024;

/// What one data thread has.
pub(in crate::proxy) struct Context {
    pub(in crate::proxy) threads: Arc<Threads>,
    /// Its number.
    pub(in crate::proxy) thread: usize,
    pub(in crate::proxy) epoll: Epoll,
    /// When the last edges were taken: the time of everything that follows from them.
    pub(in crate::proxy) now: Instant,
    pub(in crate::proxy) buffer: Box<[u8]>,
    pub(in crate::proxy) services: Slab<Service>,
}

/// A thread's view of a service.
pub(in crate::proxy) struct Service {
    pub(in crate::proxy) handle: Arc<ServiceHandle>,
    pub(in crate::proxy) pool: Arc<Pool>,
    version: u64,
    /// The version of the pool in which those that wait have last looked for a worker, and how often
    /// they had been told to.
    looked: (u64, u64),
    pub(in crate::proxy) waiters: WaitList,
    /// All of its workers are on this machine.
    pub(in crate::proxy) is_local: bool,
    /// Frontends and connections that refer to it.
    uses: usize,
}

impl Context {
    /// For the thread with this number, which wakes up when it is told to.
    pub(in crate::proxy) fn new(threads: Arc<Threads>, thread: usize) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let wakeup = EpollEvent::new(EpollFlags::EPOLLIN, Subject::Wakeup as u64);
        epoll.add(threads.event(thread), wakeup)?;
        let (now, buffer) = (Instant::now(), vec![0; BUFFER].into());
        Ok(Self { threads, thread, epoll, now, buffer, services: Slab::new() })
    }

    /// Takes over a newly published pool.
    pub(in crate::proxy) fn refresh(&mut self, service: usize) {
        let service = &mut self.services[service];
        if service.handle.version() != service.version {
            let before = Arc::clone(&service.pool);
            (service.pool, service.version) = service.handle.current();
            if !Arc::ptr_eq(&before, &service.pool) {
                // Whatever was doubted, the supervisor has decided since.
                service.waiters.doubt = None;
                // Connects that are under way go to one of those before, where there is none now.
                if !service.pool.backends().is_empty() {
                    service.is_local = is_local(&service.pool);
                }
            }
        }
    }

    /// The key of a service, which lasts until it is [left](Self::leave_service) as often as used.
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

    /// One more refers to a service that is in use.
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
        // Nobody's turn comes after that of one who waits here.
        self.services.iter().for_each(|(_, service)| service.handle.set_head(self.thread, None));
        self.threads.ended(self.thread);
    }
}

impl Service {
    /// Whether there is something new for those that wait since this was asked last.
    pub(in crate::proxy) fn is_news(&mut self) -> bool {
        let news = (self.version, self.handle.calls());
        mem::replace(&mut self.looked, news) != news
    }

    /// Until when the longest waiting is held.
    pub(in crate::proxy) fn hold_deadline(&self) -> Option<Instant> {
        let (came, _) = self.waiters.first()?;
        came.checked_add(self.pool.routing().hold_timeout)
    }

    /// Tells the other threads who waits longest here.
    pub(in crate::proxy) fn tell_head(&self, thread: usize) {
        self.handle.set_head(thread, self.waiters.first().map(|(came, _)| came));
    }
}

fn is_local(pool: &Pool) -> bool {
    pool.backends().iter().all(|backend| backend.is_local())
}
