//! Reads `route`. Settings that don't work with `"direct"` are refused with the reason, never
//! ignored.

use std::net::SocketAddr;

use super::{
    Balance, Listen, MAX_LISTENERS, Route, SocketMode,
    reader::{Table, Value},
};

/// Keys of a service that concern connections which lbd makes or sees, and why each has no effect.
const KEYS: [(&str, &str); 7] = [
    ("host", "the workers are on the service's own address"),
    ("max-connections", "lbd does not hold the connections, so it can't count them in time"),
    ("connect-timeout", "there is no second connection to make"),
    ("idle-timeout", "lbd does not see the bytes; let the worker close idle connections"),
    ("proxy-protocol", "the worker sees the client's own address"),
    (
        "accept-proxy-protocol",
        "lbd does not see the bytes; have the program read the header itself",
    ),
    ("keepalive", "lbd does not hold the connections; have the program set SO_KEEPALIVE"),
];

/// Reads `route`.
pub(super) fn route(table: &mut Table<'_>) -> Route {
    let route = table.read("route", |value| match value.string()? {
        // Documented, but not implemented yet.
        "http" => value.refuse("\"http\" is not supported yet; write \"proxy\" or \"direct\""),
        _ => value.word(&ROUTES),
    });
    route.unwrap_or(Route::Proxy)
}

/// Refuses the service keys that have no effect with this route.
pub(super) fn refuse_keys(table: &mut Table<'_>) {
    for (key, why) in KEYS {
        table.read(key, |value| refuse::<()>(&value, why));
    }
}

/// Refuses the limits that have no effect with this route.
pub(super) fn refuse_limits(limits: &mut Table<'_>) {
    limits
        .read("max-connections", |value| refuse::<()>(&value, "lbd does not hold the connections"));
}

/// Reads `socket`, for which only one value is possible.
pub(super) fn socket(table: &mut Table<'_>) -> SocketMode {
    table.read("socket", |value| match value.string()? {
        "bind" => value.refuse(
            "\"bind\" does not go with route = \"direct\": the kernel hands connections to sockets \
             that lbd makes; write \"inherit\" and have the program accept from descriptor 3",
        ),
        "unix" => value.refuse(
            "\"unix\" does not go with route = \"direct\": the workers accept where clients connect; \
             remove it",
        ),
        _ => value.word(&[("inherit", SocketMode::Direct)]),
    });
    SocketMode::Direct
}

/// Reads `balance`.
pub(super) fn balance(value: &Value<'_>) -> Option<Balance> {
    match value.string()? {
        "least-connections" => value.refuse(
            "\"least-connections\" does not go with route = \"direct\": the kernel chooses before it \
             knows how many a worker has; write \"round-robin\" or \"source-hash\"",
        ),
        _ => value.word(&[
            ("round-robin", Balance::RoundRobin),
            ("source-hash", Balance::SourceHash),
        ]),
    }
}

/// The address that workers get a socket on, after `others` other addresses. An address that can't
/// be used is refused at `value`.
pub(super) fn public(listen: &Listen, others: usize, value: &Value<'_>) -> Option<SocketAddr> {
    match listen {
        Listen::Tcp(_) if others == MAX_LISTENERS => value.refuse(format!(
            "more than {MAX_LISTENERS} addresses do not go with route = \"direct\": a worker has a \
             socket on each; make it two services"
        )),
        Listen::Tcp(address) => Some(*address),
        Listen::Unix(_) => value.refuse(format!(
            "{listen} does not go with route = \"direct\": several sockets can't share a path; \
             give it a service of its own with route = \"proxy\""
        )),
    }
}

fn refuse<T>(value: &Value<'_>, why: &str) -> Option<T> {
    value.refuse(format!("does not go with route = \"direct\": {why}; remove it"))
}

const ROUTES: [(&str, Route); 2] = [("proxy", Route::Proxy), ("direct", Route::Direct)];
