//! What is known about a client: how its connection came in, and what it may change.

use std::net::SocketAddr;

use serde::Serialize;

use crate::config::Token;

/// How a request came in. Attached to each request as an extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Via {
    /// Over the unix socket, which only the daemon's user and root can open.
    Unix,
    /// Over TCP.
    Tcp {
        /// The address that the client connected to.
        local: SocketAddr,
        /// The client's address.
        peer: SocketAddr,
    },
}

/// What the client may change. Attached to each admitted request as an extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Changes {
    /// Everything.
    Free,
    /// Everything, with the token.
    Token,
    /// Nothing, because no token is configured.
    Never,
}

impl Changes {
    pub(super) fn of(via: Via, token: Option<&Token>) -> Self {
        match (via, token) {
            (Via::Unix, _) => Self::Free,
            (Via::Tcp { .. }, Some(_)) => Self::Token,
            (Via::Tcp { .. }, None) => Self::Never,
        }
    }
}
