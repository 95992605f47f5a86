//! Permits: each is the right to hold one connection.

use std::sync::Arc;

use super::{budget::Part, service::ServiceHandle, shortage::Shortage};

/// One of the connections that the service, and the whole process, may hold at once. It is taken
/// before the connection is accepted, so that the limits are never exceeded.
#[derive(Debug)]
pub(crate) struct Permit {
    service: Arc<ServiceHandle>,
    part: Part,
}

/// A permit for a connection that is to be [adopted](crate::proxy::DataPlane::adopt).
#[derive(Debug)]
pub struct ReservedPermit(pub(crate) Permit);

impl Permit {
    /// # Errors
    /// What is exhausted. The threads are woken when there may be room.
    pub(crate) fn take(service: &Arc<ServiceHandle>) -> Result<Self, Shortage> {
        if !service.limit().enter() {
            return Err(Shortage::Service);
        }
        let Some(part) = service.share().take() else {
            if service.leave() {
                service.waker().wake_all();
            }
            return Err(Shortage::Descriptors);
        };
        Ok(Self { service: Arc::clone(service), part })
    }

    pub(crate) fn service(&self) -> &Arc<ServiceHandle> {
        &self.service
    }
}

impl ReservedPermit {
    /// Takes a permit for a connection that is about to be drained from a worker's accept queue, if
    /// the process has room for it. The limit of the service does not apply: its client is
    /// connected already.
    #[must_use]
    pub fn take(service: &Arc<ServiceHandle>) -> Option<Self> {
        let part = service.share().take_spare()?;
        service.limit().force();
        Some(Self(Permit { service: Arc::clone(service), part }))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        // A connection drops its lease before its permit, so the worker has room now.
        self.service.has_room();
        let wake = self.service.share().give_back(self.part);
        if self.service.leave() || wake {
            self.service.waker().wake_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::balance::{Budget, Pool, Waker};

    fn budget(threads: usize, connections: usize) -> Arc<Budget> {
        Arc::new(Budget::new(connections, Arc::new(Waker::new(threads).unwrap())))
    }

    fn service(budget: &Arc<Budget>, name: &str) -> Arc<ServiceHandle> {
        let pool = Pool::new(Vec::new(), None, Arc::default());
        ServiceHandle::new(name.into(), pool, Arc::default(), Arc::clone(budget))
    }

    /// As many as it gets.
    fn all(service: &Arc<ServiceHandle>) -> Vec<Permit> {
        std::iter::from_fn(|| Permit::take(service).ok()).collect()
    }

    #[test]
    fn no_service_takes_the_share_of_another() {
        // Eight of them are kept.
        let budget = budget(2, 128);
        let first = service(&budget, "first");
        assert_eq!(all(&first).len(), 120, "alone, it has all");
        let second = service(&budget, "second");
        let (of_first, of_second) = (all(&first), all(&second));
        assert_eq!((of_first.len(), of_second.len()), (90, 30));
        assert_eq!(all(&first).len() + all(&second).len(), 0);
        // Whoever waited for a worker that is gone gets a permit all the same, but not without end.
        let reserved: Vec<_> = std::iter::from_fn(|| ReservedPermit::take(&first)).collect();
        assert_eq!(reserved.len(), 8);
        drop((of_first, of_second, reserved));

        // What one holds when another comes, it keeps, and then no more than the others leave.
        drop(second);
        let of_first = all(&first);
        assert_eq!(of_first.len(), 120);
        let second = service(&budget, "second");
        assert!(Permit::take(&second).is_err());
        drop(of_first);
        assert_eq!(all(&second).len(), 90);
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn where_there_is_not_a_place_for_each_nothing_is_divided_by_zero() {
        let budget = budget(1, 2);
        let services: Vec<_> = (0..5).map(|number| service(&budget, &number.to_string())).collect();
        let places: Vec<_> = services.iter().flat_map(all).collect();
        assert_eq!(places.len(), 2);
    }
}
