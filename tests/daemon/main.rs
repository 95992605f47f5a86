//! The real `lbd` with real workers, from outside: what it does, and what happens when something goes
//! wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod accept_proxy;
mod admin;
mod bench;
mod cli;
mod common;
mod contrib;
mod direct;
mod environment;
mod faults;
mod health;
mod limits;
mod log;
mod log_schema;
mod manual;
mod metrics;
mod output_file;
mod package;
mod pictures;
mod proxy_protocol;
mod releases;
mod reload;
mod routing;
mod sockets;
mod stop;
mod supervision;
mod systemd;
mod usage;
mod waiting;
mod worker;
