//! A frontend: a listener and its target.

use std::{sync::Arc, time::Duration};

use crate::{
    net::Listener,
    proxy::balance::{Permit, ServiceHandle, Shortage},
};

/// Identifies a frontend for the life of a [`DataPlane`](crate::proxy::DataPlane).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendId(pub(in crate::proxy) u32);

/// A listener, and the target that its clients are connected to.
#[derive(Debug, Clone)]
pub(in crate::proxy) struct Frontend {
    pub(in crate::proxy) listener: Arc<Listener>,
    pub(in crate::proxy) target: Target,
}

/// The target of a frontend. Several frontends may have the same one.
#[derive(Debug, Clone)]
pub enum Target {
    /// A worker of this service. The client's bytes are relayed unchanged.
    Tcp(Arc<ServiceHandle>),
}

impl From<&Arc<ServiceHandle>> for Target {
    fn from(service: &Arc<ServiceHandle>) -> Self {
        Self::Tcp(Arc::clone(service))
    }
}

impl Target {
    /// The TCP keepalive time for clients.
    pub(in crate::proxy) fn keepalive(&self) -> Duration {
        match self {
            Self::Tcp(service) => service.current().0.routing().keepalive,
        }
    }

    /// Takes a permit for one more connection, before it is accepted.
    ///
    /// # Errors
    /// What is exhausted.
    pub(in crate::proxy) fn permit(&self) -> Result<Permit, Shortage> {
        match self {
            Self::Tcp(service) => Permit::take(service),
        }
    }
}
