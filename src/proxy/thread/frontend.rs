//! A listener, and what it leads to.

use std::{sync::Arc, time::Duration};

use crate::{
    net::Listener,
    proxy::balance::{Permit, ServiceHandle, Shortage},
};

/// Names a frontend for the life of a [`DataPlane`](crate::proxy::DataPlane).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendId(pub(in crate::proxy) u32);

/// What clients of one address get.
#[derive(Debug, Clone)]
pub(in crate::proxy) struct Frontend {
    pub(in crate::proxy) listener: Arc<Listener>,
    pub(in crate::proxy) target: Target,
}

/// What a frontend leads to. Several may lead to one service.
#[derive(Debug, Clone)]
pub enum Target {
    /// A worker of this service: what the client sends is passed on as it is.
    Tcp(Arc<ServiceHandle>),
}

impl From<&Arc<ServiceHandle>> for Target {
    fn from(service: &Arc<ServiceHandle>) -> Self {
        Self::Tcp(Arc::clone(service))
    }
}

impl Target {
    /// How long a client may be silent before TCP asks whether it is still there.
    pub(in crate::proxy) fn keepalive(&self) -> Duration {
        match self {
            Self::Tcp(service) => service.current().0.routing().keepalive,
        }
    }

    /// The right to one more connection here, which is taken before it is accepted.
    ///
    /// # Errors
    /// What there is no more of.
    pub(in crate::proxy) fn permit(&self) -> Result<Permit, Shortage> {
        match self {
            Self::Tcp(service) => Permit::take(service),
        }
    }
}
