//! The built-in HTTP workers: the files beneath one folder, served by an async server or by a
//! thread per connection.
//!
//! Each is a single process; to scale, run several. They differ only in how they wait: [`files`]
//! builds the answers, [`root`] decides which files a path may reach, and [`socket`] provides the
//! connections. So a comparison of the two measures the waiting.
//!
//! Files are opened and read inline, without a thread pool. They are nearly always in the page
//! cache, where a read costs less than handing it to another thread and back. On a slow disk, a
//! read delays the other connections of *this* worker, which is one of several. If a disk hangs,
//! the worker's probe fails and the balancer routes around the worker.
//!
//! A graceful stop (SIGTERM or SIGINT) loses nothing that reached the worker:
//!
//! 1. Connections in the accept queue are accepted, then the listener is closed.
//! 2. Connections that are idle after a request are closed at once. Requests that are being
//!    answered are finished, with `Connection: close`.
//! 3. A connection that has not sent its first request yet has [`FIRST_REQUEST_GRACE`] to do so:
//!    the balancer may have routed a client here a moment ago.
//! 4. [`run`] returns when the last connection is gone. A second signal ends the process at once.
//!
//! There is no limit on how long a client may take to read an answer: that is the balancer's
//! `idle-timeout`. The number of connections is bounded, see [`capacity`].

mod files;
mod root;
mod serve;
mod socket;
mod threaded;

use std::{
    io,
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
    low_level::pipe,
};

use files::Files;
use socket::Listener;

/// How long a request's head may take to arrive, counted from the previous answer, so that it also
/// bounds an idle keep-alive connection. nginx's `keepalive_timeout` has the same default.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);

/// How long, during a graceful stop, a connection may take to send its first request.
const FIRST_REQUEST_GRACE: Duration = Duration::from_millis(500);

/// How long accepting pauses after an error that only time can cure, such as a full descriptor
/// table.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// The largest request head (request line and headers) in bytes; a larger one is answered with 431.
const MAX_HEAD: usize = 32 * 1024;

/// What `lbd worker` was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The folder to serve; relative to the working directory.
    pub root: PathBuf,
    /// Use a thread per connection and blocking I/O instead of an async runtime.
    pub threaded: bool,
    /// The address to listen on. Takes precedence over the inherited sockets and `PORT`.
    pub listen: Option<SocketAddr>,
    /// The value of `X-Served-By`; service and port if `None`.
    pub served_by: Option<String>,
}

/// Why a worker could not start or continue.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// There is no listen address, no inherited socket and no `PORT`.
    #[error(
        "no socket to serve on: give --listen ADDRESS:PORT, pass a listening socket as LISTEN_FDS, \
         or set PORT in the environment"
    )]
    NoSocket,
    /// `PORT` is not a port number.
    #[error("PORT is {0:?} in the environment, expected a port number from 1 to 65535")]
    Port(String),
    /// A descriptor from 3 on is not a listening socket, as `LISTEN_FDS` promised.
    #[error("a descriptor from 3 on, passed as LISTEN_FDS, is not a listening TCP or unix socket")]
    Inherited,
    /// The address is in use, not local, or privileged.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address that was asked for.
        address: SocketAddr,
        /// What `bind` or `listen` said.
        source: io::Error,
    },
    /// The root is missing, unreadable or not a folder.
    #[error("cannot serve root {}: {source}, expected a folder that may be read", path.display())]
    Root {
        /// The root as given.
        path: PathBuf,
        /// What opening it said.
        source: io::Error,
    },
    /// A system call failed that the worker can't do without.
    #[error("cannot {doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Serves the files of `options.root` until SIGTERM or SIGINT, then stops gracefully.
///
/// The worker uses the first socket that applies: `options.listen`; the sockets passed from
/// descriptor 3 on by the protocol of `sd_listen_fds(3)`; `PORT` on 127.0.0.1.
///
/// Blocks the calling thread, and installs the process's handlers for SIGTERM, SIGINT and SIGALRM.
/// Call it once, from the main thread of a process that does nothing else.
///
/// # Errors
///
/// Everything that is wrong with the options, the environment or the root is found before the
/// first connection is accepted.
pub fn run(options: &Options) -> Result<(), WorkerError> {
    let stop = stop_signals().map_err(system("install signal handlers"))?;
    let listener = Listener::from_environment(options.listen)?;
    let files = Files::new(&options.root, options.served_by.as_deref(), listener.port())
        .map_err(|source| WorkerError::Root { path: options.root.clone(), source })?;
    let capacity = capacity();
    if options.threaded {
        threaded::run(listener, files, &stop, capacity)
    } else {
        serve::run(listener, files, stop, capacity)
    }
}

/// Adds what was being done to an error of the kernel.
fn system(doing: &'static str) -> impl FnOnce(io::Error) -> WorkerError {
    move |source| WorkerError::System { doing, source }
}

/// Returns a socket that becomes readable on the first SIGTERM or SIGINT. The second signal ends
/// the process in the signal handler, so that it works whatever the process is busy with.
fn stop_signals() -> io::Result<UnixStream> {
    let (stop, handler) = UnixStream::pair()?;
    stop.set_nonblocking(true)?;
    let stopping = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        // The order of registration matters: at the first signal, the conditional shutdown must see
        // the flag not yet set.
        flag::register_conditional_shutdown(signal, 1, Arc::clone(&stopping))?;
        flag::register(signal, Arc::clone(&stopping))?;
        pipe::register(signal, handler.try_clone()?)?;
    }
    Ok(stop)
}

/// How many connections this process may hold at once: half of its descriptor limit, because each
/// connection may also have a file open, minus some descriptors for the process itself. First
/// raises the soft limit to the hard limit: the soft one is low for the sake of `select(2)`, which
/// is not used here.
fn capacity() -> usize {
    const OWN: u64 = 32;
    const PER_CONNECTION: u64 = 2;
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 256 };
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    };
    // The upper bound is what a semaphore can count; no machine reaches it.
    usize::try_from(limit.saturating_sub(OWN) / PER_CONNECTION)
        .map_or(1 << 20, |n| n.clamp(1, 1 << 20))
}
