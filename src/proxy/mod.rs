//! The data plane: it accepts clients' connections, picks a backend for each, and relays the bytes.
//!
//! The path of a connection: a [`Listener`](crate::net::Listener) has a [`Target`], which names the
//! service that its clients reach → `reactor::acceptor` takes a permit and accepts → `tcp::engine`
//! reads the client's PROXY header (if one is expected) and first bytes, picks a backend from the
//! [`Pool`] and connects, or puts the connection on the wait list → `tcp::relay` → one line in the
//! access log. The data plane owns clients' connections and nothing else: it never starts, probes
//! or stops a worker, and it asks no other part of lbd anything. The driver publishes a [`Pool`]
//! and reads counters.
//!
//! Imports run downward only:
//!
//! ```text
//! plane        the driver's handle: commands in, counters out
//! reactor      a data thread's loop, and the acceptor
//! tcp          the engine that relays bytes
//! thread       the state of a thread that any engine uses: epoll, clock, buffer, deadline lists
//! balance      which backend gets which connection; knows no engine
//! ```
//!
//! # Design and measurements
//!
//! A [`DataPlane`] is a few threads. Each runs a loop over its own epoll instance and a slab of
//! connections, which are small state machines and not tasks. System calls as counted by `strace -c
//! -f` (50 concurrent clients, responses of 102 bytes), with HAProxy 2.6 and nginx 1.22 doing the
//! same work for comparison:
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
//! The three differ little, and 94 % of the time is spent in the kernel. What remains to be
//! optimised is how often other processes are woken, and how much work each wakeup brings:
//!
//! - Each socket is registered once, edge-triggered, for all events. It is never deregistered:
//!   closing it does that. A read that does not fill the buffer is taken to be the last one, which
//!   saves the read that would return EAGAIN. A FIN that epoll has already announced is not read
//!   either.
//! - lbd connects to a worker as soon as the client has sent something, or after a millisecond,
//!   since in many protocols the server speaks first. On loopback lbd asks for the result of the
//!   connect at once, and the client's bytes are the last segment of the handshake. So the worker
//!   wakes up once, for a connection that already has a request in it. Without both measures the
//!   worker reads 1.7 times per request and wakes up 1.8 times, instead of 1.1 and 0.9, and the
//!   whole system uses 4 % more CPU time (medians of `bench/run new-connections`; either measure
//!   alone gains nothing).
//! - The end of a stream is sent together with its last bytes.
//! - Listeners are registered with `EPOLLEXCLUSIVE`, so that one client wakes one thread. If that
//!   thread has more connections than another, it hands the new one over (`thread::threads`).
//!   Without the handover, `bench/run` gets 7 % fewer requests on kept connections, and 8 % fewer
//!   new connections.
//! - For large bodies on loopback, the kernel's socket queues are kept short (`tcp::relay`).
//! - Counters that change once per connection are kept in cache lines of the thread's own, and use
//!   the time taken at the start of the loop's turn (`balance::counters`).
//! - Each thread relays through one buffer of 64 KiB. An idle connection costs about 250 bytes in
//!   this module.
//! - Timeouts need no timers: connections are kept in linked lists in the order of their deadlines
//!   (`thread::deadlines`).
//!
//! # The wait lists
//!
//! Connections that wait for a worker, for whatever reason, are in one list per service and thread
//! (`balance::wait_list`), oldest first. Only the first connection in a list looks for a worker,
//! and its result stands for all behind it. So a newly published [`Pool`], or a worker that has
//! room again, costs the same however many connections wait. The threads tell each other the
//! arrival time of their oldest waiting connection ([`ServiceHandle`]), so that the oldest of all
//! goes first. Beside four workers that crash again and again, 9,000 waiting connections cost what
//! 2,000 cost (0.2 s of CPU time in 8 s, the starts of the workers included); before, each start
//! had cost a look at every one of them.
//!
//! If an accept queue is full, TCP drops the SYN and retransmits it a second later (RFC 6298),
//! although the queue has usually had room long before. So lbd abandons an unanswered connect on
//! this machine after a few milliseconds. It tries again, with one connection at a time, when a
//! connection to that worker ends or a short timer expires.
//!
//! Tried, and not kept because no difference could be measured: `SCHED_BATCH` and other time slices
//! (sched_setattr(2)) for these threads.
//!
//! # Invariants
//!
//! - It never fakes a clean end of stream: a connection that is cut off (because lbd stops, or
//!   because there is no worker) is reset. An idle connection is closed on purpose, when nothing is
//!   in transit: both sides get a FIN, and a moment to react to it.
//! - It never exceeds `max-connections`.
//! - It never closes a listener that has clients in its accept queue, except a listener that
//!   another process also holds ([`Shared`](crate::net::Shared)): that process can then serve the
//!   queue.

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
