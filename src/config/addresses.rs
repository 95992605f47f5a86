//! Finds address conflicts: no two sockets of a configuration may need the same address.

use std::{collections::HashMap, path::Path};

use super::{Listen, Problem};

/// All addresses that a configuration needs to bind.
#[derive(Default)]
pub(super) struct Claims(Vec<Claim>);

/// One address, and where the file requests it.
pub(super) struct Claim {
    pub(super) address: Listen,
    pub(super) by: Claimant,
    pub(super) key: String,
    pub(super) line: Option<usize>,
}

/// Who binds the address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Claimant {
    Listener,
    Worker,
}

impl Claims {
    pub(super) fn push(&mut self, claim: Claim) {
        self.0.push(claim);
    }

    /// One problem for each claim that conflicts with one on an earlier line.
    pub(super) fn conflicts(mut self) -> Vec<Problem> {
        self.0.sort_by_key(|claim| claim.line);
        let mut seen: HashMap<(u16, &Path), Vec<&Claim>> = HashMap::new();
        let mut problems = Vec::new();
        for claim in &self.0 {
            let rivals = seen.entry(place(&claim.address)).or_default();
            match rivals.iter().find(|rival| overlap(&rival.address, &claim.address)) {
                Some(rival) => problems.push(claim.conflict(rival)),
                None => rivals.push(claim),
            }
        }
        problems
    }
}

impl Claim {
    fn conflict(&self, earlier: &Self) -> Problem {
        use Claimant::{Listener, Worker};
        let address = &self.address;
        let same_key = self.key == earlier.key;
        let place = match earlier.line {
            Some(line) => format!("{}, line {line}", earlier.key),
            None => earlier.key.clone(),
        };
        let message = match (self.by, earlier.by) {
            (Listener, Listener) if *address != earlier.address => format!(
                "{address} overlaps {} ({place}): a wildcard takes the port of every address; keep one of them",
                earlier.address
            ),
            (Listener, Listener) if same_key => {
                format!("{address} is listed twice; keep one of them")
            }
            (Listener, Listener) => {
                format!("{address} is taken already ({place}); listen on another")
            }
            (Worker, Worker) if same_key => {
                format!("port {} is listed twice; give each worker its own port", port(address))
            }
            (Worker, Worker) => {
                format!("{address} is another worker's ({place}); give each worker its own port")
            }
            (Worker, Listener) => {
                format!(
                    "{address} is where clients connect ({place}); give the worker another port"
                )
            }
            (Listener, Worker) => {
                format!("{address} is a worker's ({place}); listen on another port")
            }
        };
        Problem { line: self.line, key: Some(self.key.clone()), message }
    }
}

/// What two addresses must have in common to conflict at all.
fn place(address: &Listen) -> (u16, &Path) {
    match address {
        Listen::Tcp(address) => (address.port(), Path::new("")),
        Listen::Unix(path) => (0, path),
    }
}

/// Whether binding one address makes binding the other fail with EADDRINUSE. Without SO_REUSEPORT,
/// a wildcard takes the port of all addresses of its family (ip(7)). It takes only its own
/// family's, because lbd sets IPV6_V6ONLY (ipv6(7)).
fn overlap(a: &Listen, b: &Listen) -> bool {
    match (a, b) {
        (Listen::Tcp(a), Listen::Tcp(b)) => {
            let wildcard = a.ip().is_unspecified() || b.ip().is_unspecified();
            a == b || wildcard && a.is_ipv4() == b.is_ipv4() && a.port() == b.port()
        }
        (a, b) => a == b,
    }
}

fn port(address: &Listen) -> u16 {
    place(address).0
}
