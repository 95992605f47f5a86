//! The data plane: listeners, the pool of workers, and the relay between the two.
//!
//! A connection's way: a [`Listener`](crate::net::Listener), whose [`Target`] says what its clients get →
//! `reactor::acceptor`, with a permit → `tcp::engine` (a PROXY header in front, the client's first bytes,
//! a backend out of the [`Pool`], connect; or the wait list) → `tcp::relay` → one line in the access log.
//! It owns the clients' connections and nothing else: it never starts, probes or stops a worker, and
//! asks nobody. The driver publishes a [`Pool`] and reads counters.
//!
//! Imports run downward only:
//!
//! ```text
//! plane        the driver's handle: commands in, counters out
//! reactor      a data thread's loop, and the acceptor
//! tcp          the engine that passes bytes on
//! thread       what any engine has of its thread: epoll, clock, buffer, lists of deadlines
//! balance      who gets which connection; knows of no engine
//! ```
//!
//! # Why it is as it is
//!
//! A [`DataPlane`] is a few threads, each a loop over its own epoll instance and a slab of
//! connections, which are small state machines and not tasks. Counted by `strace -c -f` (50 clients
//! at a time, answers of 102 bytes), beside HAProxy 2.6 and nginx 1.22 that do the same:
//!
//! | system calls | a connection with one request | a request on a kept connection |
//! | --- | --- | --- |
//! | accept4, socket, shutdown | 1 each | |
//! | connect, epoll_ctl, close, setsockopt (`TCP_NODELAY`, `TCP_QUICKACK`) | 2 each | |
//! | recvfrom | 3 | 2 |
//! | sendto | 2 | 2 |
//! | epoll_wait | 0.26 | 0.08 |
//! | together | 16.3 | 4.1 |
//! | HAProxy, nginx | 17.9, 17.1 | 4.3, 4.1 |
//!
//! They differ little there, and 94 % of the time is spent in the kernel. What is left to decide is
//! how often others are woken, and with how much to do:
//!
//! - Each socket is registered once, edge-triggered, for everything, and never removed: its close
//!   does that. A read that does not fill the buffer is the last one, without another that would
//!   say so; an end that was announced before is not read either.
//! - A worker is connected to once its client has said something, or after a millisecond, since in
//!   many protocols the server speaks first. The answer to a connect on loopback is asked for at
//!   once, and the client's bytes are the last segment of the handshake, so that the worker wakes up
//!   once, to a connection with a request in it. Without both it reads 1.7 times for each request
//!   and wakes up 1.8 times, instead of 1.1 and 0.9, and everything together takes 4 % more CPU time
//!   (medians of `bench/run new-connections`; the bytes alone, or the segment alone, gain nothing).
//! - The end of a stream travels with its last bytes.
//! - Listeners are registered exclusively, so that one client wakes one thread. A thread that then
//!   has more connections than another hands the new one over (`thread::threads`): without that,
//!   `bench/run` gets 7 % fewer requests on kept connections, and 8 % fewer new connections.
//! - Of large bodies little stays in the kernel's queues on loopback (`tcp::relay`).
//! - What is counted at the end of a connection is counted in the thread's own cache lines, by the
//!   clock of its turn (`balance::counters`).
//! - Bytes go through one buffer of 64 KiB a thread. An idle connection is about 250 bytes here.
//! - Timeouts are the order of a linked list (`thread::deadlines`), not timers.
//!
//! # Those that wait
//!
//! Whatever connections wait for a worker for, they are in one list for each service and thread
//! (`balance::wait_list`), in the order in which they came. Only the first looks for a worker, and what
//! it finds is the answer for all, so that a new [`Pool`] or a worker with room again costs the same
//! however many wait. The threads tell each other when their first came ([`ServiceHandle`]), and let the
//! one go first that came first. Beside
//! four workers that crash again and again, 9,000 that wait cost what 2,000 cost (0.2 s of processor
//! time in 8 s, the workers' starts included), where each start had cost a look at each of them.
//!
//! TCP drops the SYN where an accept queue is full and sends the next one a second later (RFC 6298), when there
//! has long been room: so an unanswered connect on this machine is given up after a few milliseconds and
//! made anew when a connection to that worker ends, or the clock says so, by one connection at a time.
//!
//! Tried, and not kept, since no difference could be measured: `SCHED_BATCH` and other time slices
//! (sched_setattr(2)) for these threads.
//!
//! # What it never does
//!
//! It never shows an end where there was none: what is cut off (by the end of lbd, for want of a
//! worker) is reset. An idle connection is ended by choice, with nothing on its way: both sides get an end, and a
//! moment to take it. It never exceeds `max-connections`. It never closes a listener with
//! clients in its queue, but one that others have too ([`Shared`](crate::net::Shared)): theirs is the queue then.

mod balance;
mod plane;
mod reactor;
mod tcp;
mod thread;

pub use balance::{
    Backend, PinnedRoutes, Pool, Reasons, ReservedPermit, ServiceHandle, ServiceTally, Traffic,
    WorkerTally,
};
pub use plane::{AccessChange, DataPlane, Settings};
pub use thread::frontend::{FrontendId, Target};
