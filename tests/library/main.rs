//! The library in the process of the test: its data plane, and the order of its modules.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod layers;
mod proxy;
