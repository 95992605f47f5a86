//! The built-in HTTP workers: the files beneath one folder, served by an async server or by a
//! thread per connection.
//!
//! Both are one process; scaling is running more of them. They differ in
//! how they wait and in nothing else: what a request is answered with comes from [`files`], what a
//! path may reach from [`root`], where connections come from [`socket`]. A comparison of the two
//! therefore measures the waiting.
//!
//! Files are opened and read inline, without a pool of threads. Nearly always they are in the page
//! cache, where a read costs less than handing it to another thread and back. On a slow disk a read
//! holds up the other connections of *this* worker, which is one of several; a disk that hangs
//! makes its probe fail, and the balancer routes around it.
//!
//! A graceful stop (SIGTERM or SIGINT) loses nothing that reached the worker:
//!
//! 1. what waits in the accept queue is accepted, then the listener is let go;
//! 2. connections that are idle after a request are closed at once, requests being answered are
//!    finished and answered with `Connection: close`;
//! 3. a connection that has not sent its first request yet has [`FIRST_REQUEST_GRACE`] to do so: the
//!    balancer may have routed a client here a moment ago;
//! 4. [`run`] returns when the last one is gone. A second signal ends the process at once.
//!
//! There is no limit on how long a client may take to read an answer: that is the balancer's
//! `idle-timeout`. What a worker holds at once is bounded, see [`capacity`].

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

/// How long a connection without any request yet is kept in a graceful stop.
const FIRST_REQUEST_GRACE: Duration = Duration::from_millis(500);

/// How long accepting pauses after an error that only time can cure, such as a full descriptor
/// table.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// The largest request head (request line and headers) in bytes; a larger one is answered with 431.
const MAX_HEAD: usize = 32 * 1024;

/// What `lbd worker` was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The folder whose files are served; relative to the working folder.
    pub root: PathBuf,
    /// A thread for each connection and blocking I/O, instead of an async runtime.
    pub threaded: bool,
    /// The address to listen on, before the inherited sockets and `PORT`.
    pub listen: Option<SocketAddr>,
    /// What `X-Served-By` says; the service and the port where `None`.
    pub served_by: Option<String>,
}

/// Why a worker could not start, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// None of the three ways to get a socket applies.
    #[error(
        "no socket to serve on: give --listen ADDRESS:PORT, pass a listening socket as LISTEN_FDS, \
         or set PORT in the environment"
    )]
    NoSocket,
    /// `PORT` holds something else.
    #[error("PORT is {0:?} in the environment, expected a port number from 1 to 65535")]
    Port(String),
    /// A descriptor from 3 on is not what `LISTEN_FDS` promised.
    #[error("a descriptor from 3 on, passed as LISTEN_FDS, is not a listening TCP or unix socket")]
    Inherited,
    /// The address is taken, not ours, or privileged.
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
    /// The kernel refused something that a worker can't do without.
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
/// The socket is the first that applies: `options.listen`; those from descriptor 3 on that were passed
/// to this process by `sd_listen_fds(3)`'s protocol; `PORT` on 127.0.0.1.
///
/// Blocks the calling thread, and installs the process's handlers of SIGTERM, SIGINT and SIGALRM:
/// call it once, from the main thread of a process that does nothing else.
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

/// Names what was being done when the kernel said no.
fn system(doing: &'static str) -> impl FnOnce(io::Error) -> WorkerError {
    move |source| WorkerError::System { doing, source }
}

/// A socket that becomes readable on the first SIGTERM or SIGINT. The second one ends the process
/// in the signal handler, so that it works whatever the process is busy with.
fn stop_signals() -> io::Result<UnixStream> {
    let (stop, handler) = UnixStream::pair()?;
    stop.set_nonblocking(true)?;
    let stopping = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        // In this order: the flag is not set yet when the first signal comes by.
        flag::register_conditional_shutdown(signal, 1, Arc::clone(&stopping))?;
        flag::register(signal, Arc::clone(&stopping))?;
        pipe::register(signal, handler.try_clone()?)?;
    }
    Ok(stop)
}

/// How many connections this process may hold at once: half of the descriptors it may open, since
/// each connection may have a file open as well, less some for itself. The soft limit is raised to
/// the hard one first: it is low for the sake of `select(2)`, which nothing here uses.
fn capacity() -> usize {
    const OWN: u64 = 32;
    const PER_CONNECTION: u64 = 2;
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 256 };
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    };
    // The upper bound keeps the sum within what a semaphore counts; no machine gets there.
    usize::try_from(limit.saturating_sub(OWN) / PER_CONNECTION)
        .map_or(1 << 20, |n| n.clamp(1, 1 << 20))
}
