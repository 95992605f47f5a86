//! `lbd` supervises an app's worker processes and balances connections between them.
//!
//! The map, imports running downward only:
//!
//! ```text
//! cli ─┬─ daemon ─┬─ admin ─────────┐      the operator's side: an HTTP API and its client
//!      │          ├─ route ─────────┤      the data plane: client ─▶ worker, threads of its own
//!      │          ├─ probe ─────────┤      one look at one worker
//!      │          ├─ process ───────┤      children: guard, signals, output
//!      │          ├─ control ───────┼─ config   state × event ─▶ actions, pure
//!      │          └─ logging ───────┘
//!      ├─ bench ─── admin, config          the comparison: load, tables, a plot
//!      ├─ admin
//!      └─ worker                           the built-in HTTP worker, a program of its own
//! ```
//!
//! `sockets`, `proxy_protocol` and `histogram` are below all of them, and know nothing of lbd but
//! what `config` calls things. `printable` is below these: whatever is shown of others goes through it.
//!
//! With `route = "direct"` connections don't come through `route` at all: `sockets::direct` has the
//! kernel hand them out, and `daemon` tells it to whom.
//!
//! Three journeys, each a straight line:
//!
//! - a connection: `route`'s listener ─▶ pool ─▶ relay ─▶ counters;
//! - a child: `control` says spawn ─▶ `process` ─▶ `probe` ─▶ `control` ─▶ the pool is published; it
//!   ends ─▶ `control` ─▶ a pool without it ─▶ backoff ─▶ spawn;
//! - a SIGHUP: `daemon` ─▶ `config` reads and compares ─▶ `control` ─▶ actions ─▶ "reloaded".

pub mod admin;
pub mod bench;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod histogram;
pub mod logging;
pub mod printable;
pub mod probe;
pub mod process;
pub mod proxy_protocol;
pub mod route;
pub mod sockets;
pub mod worker;
