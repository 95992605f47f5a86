//! Who asks: what connections, access and answers know of a request's sender.

use std::net::SocketAddr;

use serde::Serialize;

use crate::config::Token;

/// The way a request came in: an extension of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Via {
    /// Over the unix socket, which only the daemon's user and root can open.
    Unix,
    /// Over TCP.
    Tcp {
        /// The address that the client connected to.
        local: SocketAddr,
        /// The client's.
        peer: SocketAddr,
    },
}

/// What whoever asks may change: an extension of each request that is let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Changes {
    /// All.
    Free,
    /// All, with the token.
    Token,
    /// Nothing, since there is no token.
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
