//! `lbd` supervises an app's worker processes and balances connections between them.
//!
//! The map, imports running downward only; `docs/ARCHITECTURE.md` walks through it:
//!
//! ```text
//! cli ─┬─ daemon ─┬─ admin          the operator's side: an HTTP API and its client
//!      │          ├─ proxy          the data plane: client ─▶ worker, on threads of its own
//!      │          ├─ probe          one look at one worker
//!      │          ├─ process        children: guard, signals, output
//!      │          ├─ supervisor     state × event ─▶ effects, pure
//!      │          └─ logging
//!      ├─ bench ─── admin           the comparison: load, tables, a plot
//!      ├─ admin
//!      └─ worker                    the built-in HTTP worker, a program of its own
//!
//! net              sockets, and the programs in the kernel that steer them
//! config           lb.toml ─▶ types
//! histogram, per_thread, printable
//! ```
//!
//! The daemon is an event loop. It reports each event to the `supervisor`, which makes all
//! decisions, and carries out the effects that the supervisor returns, through `process`, `proxy`
//! and `net`. The data threads decide only which worker gets which connection. With `route =
//! "direct"`, connections bypass `proxy`: the kernel distributes them as `net::direct` sets up, and
//! `daemon` keeps the kernel's list of workers up to date.

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
