//! The validated form of a configuration. Its types can't hold an invalid value.
//!
//! Settings are grouped by the cost of changing them. [`WorkerSpec`] is what a worker process is
//! started with, so a change replaces the process. [`Routing`], [`Health`], [`Restart`], [`Stop`]
//! and [`Limits`] are read by lbd alone, and a change takes effect in place.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::{NonZeroU32, NonZeroU64},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::token::Token;

/// A whole, valid configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The absolute path of the file it came from; `None` for `lbd run`.
    pub path: Option<PathBuf>,
    /// Where lbd's own log goes.
    pub log: Log,
    /// How lbd itself is operated.
    pub admin: Admin,
    /// The services, in the order of the file. Never empty.
    pub services: Vec<Service>,
    /// Where the file limits the processes of a worker, which not every lbd can do.
    pub process_limits: Vec<Place>,
    /// A hash of the file's bytes, comparable only within this process; `None` if the configuration
    /// was not read from a file.
    pub digest: Option<u64>,
    /// The line of each key, by the key in full.
    pub lines: BTreeMap<String, usize>,
}

/// The location of a setting in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Counted from 1.
    pub line: usize,
    /// The key in full.
    pub key: String,
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// The least severe level that is written.
    pub level: Level,
    /// Text or JSON lines.
    pub format: LogFormat,
    /// Whether each connection gets a line at its end.
    pub access: bool,
    /// The file to write to; standard error where `None`.
    pub file: Option<PathBuf>,
    /// When to begin a new file.
    pub rotate: Rotate,
    /// How many rotated files are kept; all where `None`.
    pub keep: Option<NonZeroU32>,
    /// How many lines per second each worker may write into the log, with `output = "log"`.
    pub output_rate: NonZeroU32,
}

/// The default of `log.output-rate`.
pub const OUTPUT_RATE: NonZeroU32 = NonZeroU32::new(10_000).unwrap();

impl Default for Log {
    fn default() -> Self {
        Self {
            level: Level::Info,
            format: LogFormat::Text,
            access: true,
            file: None,
            rotate: Rotate::Never,
            keep: None,
            output_rate: OUTPUT_RATE,
        }
    }
}

/// `[admin]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Admin {
    /// The absolute path of the unix socket; lbd picks one where `None`.
    pub socket: Option<PathBuf>,
    /// The TCP addresses of the admin API; none if empty.
    pub listen: Vec<SocketAddr>,
    /// The absolute path of the file with the token.
    pub token_file: Option<PathBuf>,
    /// The content of the token file. Without a token nothing can be changed over TCP.
    pub token: Option<Token>,
}

/// `[log] level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// `[log] format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum LogFormat {
    Text,
    Json,
}

/// `[log] rotate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Rotate {
    Never,
    Hourly,
    Daily,
}

/// `[service.NAME]`: a set of listeners, and the workers behind them.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    /// NAME: letters, digits, `-`, `_` and `.`; not empty.
    pub name: Arc<str>,
    /// Where clients connect. Never empty, no duplicates in the whole file.
    pub listen: Vec<Listen>,
    /// Who may connect to the unix sockets among the listeners; sockets without an entry have the
    /// default.
    pub unix_access: BTreeMap<PathBuf, UnixAccess>,
    /// How many workers there are, and on which ports.
    pub slots: Slots,
    /// What each worker is started with.
    pub worker: Arc<WorkerSpec>,
    /// How connections reach the workers.
    pub routing: Routing,
    /// How a worker is probed.
    pub health: Health,
    /// How a worker that has ended is restarted.
    pub restart: Restart,
    /// How running workers are replaced by new ones.
    pub rollout: Rollout,
    /// How a worker is stopped.
    pub stop: Stop,
    /// When to replace a worker although nothing is wrong with it.
    pub limits: Limits,
}

/// The most addresses that a service with `route = "direct"` can listen on: each of its workers has
/// a socket on each.
pub const MAX_LISTENERS: usize = 64;

/// One address of `listen`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Listen {
    /// An IP address and port. Port 0 is refused.
    Tcp(SocketAddr),
    /// An absolute path of a unix stream socket.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Who may connect to a unix socket. Connecting requires write permission for the socket's file
/// (unix(7)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnixAccess {
    /// The file's permission bits.
    pub mode: u32,
    /// The file's owner, a name or a number, resolved at bind time; `None` means lbd's own user.
    pub owner: Option<String>,
    /// The file's group, in the same form.
    pub group: Option<String>,
}

impl Default for UnixAccess {
    /// Anybody who can reach the folder may connect, as with a TCP port.
    fn default() -> Self {
        Self { mode: 0o666, owner: None, group: None }
    }
}

impl Service {
    /// Who may connect to its unix socket at `path`.
    #[must_use]
    pub fn access(&self, path: &Path) -> UnixAccess {
        self.unix_access.get(path).cloned().unwrap_or_default()
    }
}

/// `ports` or `workers`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Slots {
    /// One worker on each of these ports, in this order. Never empty, no duplicates.
    Ports(Vec<u16>),
    /// This many workers, on free ports that are picked when each is started, or on unix sockets.
    Count(NonZeroU32),
}

impl Slots {
    /// How many workers there are. Never zero.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::Ports(ports) => ports.len(),
            // A u32 fits into usize: lbd runs on Linux with 32-bit or 64-bit pointers.
            Self::Count(count) => count.get() as usize,
        }
    }
}

/// What a worker process is started with. Two equal specs start the same worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerSpec {
    /// What to run.
    pub program: Program,
    /// The address that the workers' ports are on.
    pub host: IpAddr,
    /// Who binds the port.
    pub socket: SocketMode,
    /// Whether and how the worker is told who its client is. Not in [`Routing`], because a running
    /// worker understands only one form: each keeps getting the form that it was started for.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// The addresses on which the worker has a socket, with [`SocketMode::Direct`]; else empty.
    pub public: Vec<SocketAddr>,
    /// Variables added to lbd's own environment.
    pub env: BTreeMap<String, String>,
    /// The user to run as: a name or a number, resolved when the worker is started.
    pub user: Option<String>,
    /// The group to run as: a name or a number; the user's own where only `user` is set.
    pub group: Option<String>,
    /// The file mode creation mask; lbd's own where `None`.
    pub umask: Option<u32>,
    /// The working directory, absolute, with its links unresolved: it is looked up at each start,
    /// and may not exist now.
    pub directory: PathBuf,
    /// Where the worker's standard output and error go.
    pub output: Output,
    /// `limits.open-files`: the worker's soft and hard `RLIMIT_NOFILE`; `None` keeps the limits
    /// that lbd was started with.
    pub open_files: Option<NonZeroU32>,
    /// `limits.processes`: the most processes and threads of the worker, including everything that
    /// it starts. Takes effect only where [`Config::process_limits`] says so, and lbd has a cgroup
    /// for the worker.
    pub processes: Option<NonZeroU32>,
}

impl WorkerSpec {
    /// The address of a worker on `port`. With [`SocketMode::Direct`] it is only for display: the
    /// port is just a name, and nobody listens on it.
    #[must_use]
    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.host, port)
    }

    /// How connections reach the worker.
    #[must_use]
    pub fn route(&self) -> Route {
        match self.socket {
            SocketMode::Bind | SocketMode::Inherit | SocketMode::Unix => Route::Proxy,
            SocketMode::Direct => Route::Direct,
        }
    }
}

/// `route`: how connections reach the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Through lbd.
    Proxy,
    /// From the kernel, directly into the worker's own socket on the public address.
    Direct,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Proxy => "proxy",
            Self::Direct => "direct",
        })
    }
}

/// `root` or `command`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    /// The built-in worker serves this folder (absolute).
    Root(PathBuf),
    /// argv of the program, with `{port}`, `{slot}` and `{service}` still in it. Never empty.
    Command(Vec<String>),
}

/// The most workers with inherited sockets on one port at once: the current one, and the one that
/// replaces it.
pub const WORKERS_ON_A_PORT: usize = 2;

/// `socket`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketMode {
    /// The worker binds its port itself.
    Bind,
    /// lbd binds the port and passes the listening socket as descriptor 3.
    Inherit,
    /// Like `Inherit`, but with a unix socket, so without a port.
    Unix,
    /// The worker has a listening socket on each address of its service, from descriptor 3 on:
    /// `route = "direct"`.
    Direct,
}

/// `proxy-protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

impl fmt::Display for ProxyProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

/// `output`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Logged by lbd, line by line, with the worker's identity.
    Log,
    /// lbd's own standard output and error.
    Inherit,
    /// Discarded.
    Null,
    /// Appended to this file (absolute), with `{slot}` and `{service}` still in it.
    File(PathBuf),
}

/// How connections reach the workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routing {
    /// How a worker is chosen.
    pub balance: Balance,
    /// The most connections that the service holds at once; `None` is no limit.
    pub max_connections: Option<NonZeroU32>,
    /// `limits.max-connections`: the most connections that one worker holds at once; `None` is no
    /// limit.
    pub worker_connections: Option<NonZeroU32>,
    /// How long one worker may take to accept a connection.
    pub connect_timeout: Duration,
    /// A connection without a byte in either direction for this long is closed.
    pub idle_timeout: Duration,
    /// How long a connection waits while no worker is healthy but one may become so, or while all
    /// are at their connection limit.
    pub hold_timeout: Duration,
    /// `accept-proxy-protocol`: the clients whose connections begin with a PROXY header.
    pub accept_proxy: Networks,
    /// After this long without traffic, TCP probes whether the other end is still there. Whole
    /// seconds, not zero.
    pub keepalive: Duration,
}

impl Default for Routing {
    fn default() -> Self {
        Self {
            balance: Balance::RoundRobin,
            max_connections: None,
            worker_connections: None,
            connect_timeout: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(3600),
            hold_timeout: Duration::from_secs(10),
            accept_proxy: Networks::default(),
            keepalive: Duration::from_secs(60),
        }
    }
}

/// A set of networks, and optionally the clients of unix sockets, which have no address.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Networks {
    /// The networks, in the order of the file.
    pub inet: Vec<Network>,
    /// Whether the set contains clients on unix sockets.
    pub unix: bool,
}

impl Networks {
    /// Whether the set contains a client at `ip`, or, for `None`, a client on a unix socket.
    #[must_use]
    pub fn contains(&self, ip: Option<IpAddr>) -> bool {
        match ip {
            // An IPv4 client counts as IPv4 also if it connected to an IPv6 socket.
            Some(ip) => {
                let ip = ip.to_canonical();
                self.inet.iter().any(|network| network.contains(ip))
            }
            None => self.unix,
        }
    }
}

/// The IP addresses that share a prefix, in CIDR notation (RFC 4632, RFC 4291).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// The first address of the network.
    address: IpAddr,
    /// The length of the common prefix, in bits: up to 32 for IPv4, 128 for IPv6.
    prefix: u8,
}

impl Network {
    /// `None` if the prefix is too long for the family, or the address has bits set after the
    /// prefix.
    #[must_use]
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let network = Self { address, prefix };
        (prefix <= bits_of(address) && network.first() == address).then_some(network)
    }

    /// The network that `address` is in.
    #[must_use]
    pub fn around(address: IpAddr, prefix: u8) -> Self {
        let network = Self { address, prefix: prefix.min(bits_of(address)) };
        Self { address: network.first(), ..network }
    }

    /// Whether the network contains `ip`. An IPv4 address that is mapped into IPv6 is not in an
    /// IPv4 network.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.address.is_ipv4()
            && Self { address: ip, ..*self }.first() == self.address
    }

    fn first(&self) -> IpAddr {
        let behind = u32::from(bits_of(self.address) - self.prefix);
        match self.address {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(behind).unwrap_or(0);
                Ipv4Addr::from_bits(v4.to_bits() & mask).into()
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(behind).unwrap_or(0);
                Ipv6Addr::from_bits(v6.to_bits() & mask).into()
            }
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// The length of this family's addresses, in bits.
fn bits_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// `balance`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    /// Strict rotation.
    RoundRobin,
    /// The worker that holds the fewest connections; round robin among equals.
    LeastConnections,
    /// The same client address goes to the same worker while the set of workers stays the same.
    SourceHash,
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RoundRobin => "round-robin",
            Self::LeastConnections => "least-connections",
            Self::SourceHash => "source-hash",
        })
    }
}

/// `[service.NAME.health]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// What a probe does.
    pub probe: Probe,
    /// The time between the starts of two probes. Not zero.
    pub interval: Duration,
    /// How long one probe may take. Not zero.
    pub timeout: Duration,
    /// Successful probes in a row that make a worker healthy.
    pub rise: NonZeroU32,
    /// Failed probes in a row that make a healthy worker unhealthy.
    pub fall: NonZeroU32,
    /// A new worker that is not healthy after this time is killed and counts as failed.
    pub start_timeout: Duration,
    /// Whose listening socket lbd trusts on the port of a worker that binds the port itself.
    pub owner: Owner,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            probe: Probe::Tcp,
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            rise: NonZeroU32::MIN,
            fall: NonZeroU32::MIN.saturating_add(2),
            start_timeout: Duration::from_secs(60),
            owner: Owner::Tree,
        }
    }
}

/// `health.owner`: whose listening socket lbd trusts on a worker's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// A socket that one of the worker's processes holds or, where lbd may not look, one of the
    /// worker's user.
    Tree,
    /// A socket of the worker's user.
    User,
    /// Anybody's socket, for example that of a container engine's proxy, which listens for the
    /// worker.
    Any,
}

/// What a probe does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// Connects, and passes when the program has accepted the connection.
    Tcp,
    /// Sends a GET and reads the status.
    Http {
        /// The request target; begins with `/`.
        path: String,
        /// The Host header; the worker's own address where `None`.
        host: Option<String>,
        /// The statuses that count as a success.
        expect: StatusSet,
    },
}

/// A set of HTTP statuses, as inclusive ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusSet(pub Vec<(u16, u16)>);

impl StatusSet {
    /// Whether `status` is in the set.
    #[must_use]
    pub fn contains(&self, status: u16) -> bool {
        self.0.iter().any(|&(low, high)| (low..=high).contains(&status))
    }
}

/// `[service.NAME.restart]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restart {
    /// The delay before the first restart of a worker that never became healthy.
    pub min_delay: Duration,
    /// The longest delay.
    pub max_delay: Duration,
    /// After it was healthy for this long, a worker's first exit restarts it without a delay.
    pub reset_after: Duration,
    /// A worker that has been unhealthy for this long is replaced.
    pub unhealthy_after: Duration,
}

impl Default for Restart {
    fn default() -> Self {
        Self {
            min_delay: Duration::from_millis(100),
            max_delay: Duration::from_secs(30),
            reset_after: Duration::from_secs(10),
            unhealthy_after: Duration::from_secs(30),
        }
    }
}

/// `[service.NAME.rollout]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rollout {
    /// Whether the new or the old worker goes first in a replacement.
    pub order: Order,
    /// How long a new worker must have been healthy before the rollout takes its next step.
    pub settle: Duration,
}

impl Default for Rollout {
    fn default() -> Self {
        Self { order: Order::StartFirst, settle: Duration::from_millis(500) }
    }
}

/// `rollout.order`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The new worker is proven before the old one is stopped. If both would have to bind the same
    /// port, the new worker first starts on a free port.
    StartFirst,
    /// The old worker is stopped before the new one is started.
    StopFirst,
}

/// `[service.NAME.stop]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// The signal that asks the worker to stop.
    pub signal: Signal,
    /// Who waits for the connections in flight.
    pub drain: Drain,
    /// How long lbd waits for a draining worker's connections.
    pub drain_timeout: Duration,
    /// The time from the signal to SIGKILL.
    pub timeout: Duration,
    /// Which processes get the signal.
    pub to: StopTo,
}

impl Default for Stop {
    fn default() -> Self {
        Self {
            signal: Signal::SIGTERM,
            drain: Drain::Wait,
            drain_timeout: Duration::from_secs(30),
            timeout: Duration::from_secs(10),
            to: StopTo::Group,
        }
    }
}

/// `stop.to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopTo {
    /// The program and its whole process group.
    Group,
    /// Only the program, which is to end its own children. Processes that outlive it get the signal
    /// later, before lbd kills them.
    Main,
}

/// `drain`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drain {
    /// lbd waits for the worker's connections to end, then signals.
    Wait,
    /// lbd signals the worker as soon as it is out of rotation; the worker finishes its connections
    /// itself.
    Signal,
}

/// When to replace a worker although nothing is wrong with it: lbd starts a new worker and drains
/// this one. The rest of `[service.NAME.limits]` is in [`WorkerSpec`] and [`Routing`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limits {
    /// Replace it above this many bytes of memory.
    pub memory: Option<NonZeroU64>,
    /// Replace it at this age. Up to a tenth earlier, so that not all workers are due at once. Not
    /// zero.
    pub max_age: Option<Duration>,
}

/// The default of `host`.
pub const DEFAULT_HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
