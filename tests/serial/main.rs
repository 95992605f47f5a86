//! What a process has one of, and what a test changes for all of it: its children, its limit of
//! descriptors, its logger. One of these tests runs at a time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod descriptors;
mod output;
mod process;

use tokio::sync::Mutex;

/// Held by whichever test runs.
static TURN: Mutex<()> = Mutex::const_new(());
