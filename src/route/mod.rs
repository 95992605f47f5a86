//! The data plane: listeners, the pool of workers, and the relay between the two.
//!
//! A connection's way: [`Listener`] → `doors` (accept) → `steps` ([`Pool`], connect) → `relay` →
//! one line in the access log. It owns the clients' connections and nothing else: it never starts,
//! probes or stops a worker, and asks nobody. Control publishes a [`Pool`] and reads counters.
//!
//! # Why it is as it is
//!
//! A [`DataPlane`] is a few threads, each a loop over its own epoll instance and a slab of
//! connections, which are small state machines and not tasks. What that saves was counted with
//! `strace -c` (50 clients at a time, answers of 102 bytes):
//!
//! | system calls | a connection with one request | a request on a kept connection |
//! | --- | --- | --- |
//! | accept4, socket, setsockopt (`TCP_NODELAY`), shutdown | 1 each | |
//! | connect, epoll_ctl, close | 2 each | |
//! | recvfrom | 3 | 2 |
//! | sendto | 2 | 2 |
//! | epoll_wait | 0.25 | 0.08 |
//!
//! - Each socket is registered once, edge-triggered, for everything, and never removed: its close
//!   does that. A read that does not fill the buffer is the last one, without another that would
//!   say so; an end that was announced before is not read either.
//! - The answer to a connect on loopback is asked for at once, and the client's first bytes follow,
//!   so that the worker wakes up to a connection with a request in it. The end of a stream travels
//!   with its last bytes.
//! - Listeners are registered exclusively, so that one client wakes one thread.
//! - What is counted at the end of a connection is counted in the thread's own cache lines, by the
//!   clock of its turn (`tally`).
//! - Bytes go through one buffer of 64 KiB a thread. An idle connection is about 250 bytes here.
//! - Timeouts are the order of a linked list (`queue`), not timers.
//!
//! # What it never does
//!
//! It never shows an end where there was none: what is cut off (by a timeout, by the end of lbd, for
//! want of a worker) is reset. It never exceeds `max-connections`. It never closes a listener with
//! clients in its queue, but one that others have too ([`Shared`]): theirs is the queue then.

mod connection;
mod crew;
mod doors;
mod gate;
mod listener;
mod plane;
mod pool;
mod queue;
mod reactor;
mod relay;
mod service;
mod shared;
mod steps;
mod tally;
mod upstream;

pub use crew::ListenerId;
pub use listener::{BindError, Listener};
pub use plane::{DataPlane, Settings};
pub use pool::Pool;
pub use service::ServiceRoute;
pub use shared::Shared;
pub use tally::{Reasons, ServiceTally, WorkerTally};
pub use upstream::{Traffic, Upstream};
