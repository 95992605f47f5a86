//! `lbd` supervises an app's worker processes and balances connections between them.
//!
//! The map, imports running downward only:
//!
//! ```text
//! cli ─┬─ daemon ─┬─ admin ─────────┐      the operator's side: an HTTP API and its client
//!      │          ├─ proxy ─────────┤      the data plane: client ─▶ worker, threads of its own
//!      │          ├─ probe ─────────┤      one look at one worker
//!      │          ├─ process ───────┤      children: guard, signals, output
//!      │          ├─ supervisor ────┼─ config   state × event ─▶ actions, pure
//!      │          └─ logging ───────┘
//!      ├─ bench ─── admin, config          the comparison: load, tables, a plot
//!      ├─ admin
//!      └─ worker                           the built-in HTTP worker, a program of its own
//! ```
//!
//! `net`, `histogram` and `per_thread` are below all of them, and know nothing of lbd but
//! what `config` calls things. `printable` is below these: whatever is shown of others goes through it.
//!
//! With `route = "direct"` connections don't come through `proxy` at all: `net::direct` has the
//! kernel hand them out, and `daemon` tells it to whom.
//!
//! Three journeys, each a straight line:
//!
//! - a connection: `proxy`'s listener ─▶ pool ─▶ relay ─▶ counters;
//! - a child: `supervisor` says spawn ─▶ `process` ─▶ `probe` ─▶ `supervisor` ─▶ the pool is published; it
//!   ends ─▶ `supervisor` ─▶ a pool without it ─▶ backoff ─▶ spawn;
//! - a SIGHUP: `daemon` ─▶ `config` reads and compares ─▶ `supervisor` ─▶ actions ─▶ "reloaded".

pub mod admin;
pub mod bench;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod histogram;
pub mod logging;
pub mod net;
pub mod per_thread;
pub mod printable;
pub mod probe;
pub mod process;
pub mod proxy;
pub mod supervisor;
pub mod worker;
