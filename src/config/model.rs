//! The validated shape of a configuration: types that can't hold a wrong value.
//!
//! Settings are grouped by what a change of them costs: [`WorkerSpec`] is what a worker process is
//! started with, so a change replaces the process; [`Routing`], [`Health`], [`Restart`], [`Stop`]
//! and [`Limits`] are read by lbd alone and change in place.

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
    /// Where it limits the processes of a worker, which not every lbd can.
    pub process_limits: Vec<Place>,
    /// What tells the bytes of the file from any others, for as long as this process runs; `None`
    /// where it was not read from one.
    pub digest: Option<u64>,
    /// The line of each key, by the key in full.
    pub lines: BTreeMap<String, usize>,
}

/// Where in the file a setting is.
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
    /// When a new file is begun.
    pub rotate: Rotate,
    /// How many rotated files are kept; all where `None`.
    pub keep: Option<NonZeroU32>,
    /// How many lines a second each worker may write into it, with `output = "log"`.
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
    /// Where it is reached over TCP as well; nowhere where empty.
    pub listen: Vec<SocketAddr>,
    /// The absolute path of the file with the token.
    pub token_file: Option<PathBuf>,
    /// What was in it; without one nothing can be changed over TCP.
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

/// `[service.NAME]`: one set of listeners and the workers behind them.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    /// NAME: letters, digits, `-`, `_` and `.`; not empty.
    pub name: Arc<str>,
    /// Where clients connect. Never empty, no duplicates in the whole file.
    pub listen: Vec<Listen>,
    /// Who may connect to the unix sockets among them; those that are not here have the default.
    pub unix_access: BTreeMap<PathBuf, UnixAccess>,
    /// How many workers there are, and on which ports.
    pub slots: Slots,
    /// What each worker is started with.
    pub worker: Arc<WorkerSpec>,
    /// How connections reach the workers.
    pub routing: Routing,
    /// How a worker is probed.
    pub health: Health,
    /// How a worker that ended is started again.
    pub restart: Restart,
    /// How running workers are replaced by new ones.
    pub rollout: Rollout,
    /// How a worker is stopped.
    pub stop: Stop,
    /// When a worker is replaced though nothing is wrong with it.
    pub limits: Limits,
}

/// The most addresses that a service with `route = "direct"` can listen on: its workers have a socket
/// on each.
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

/// Who may connect to a unix socket: it takes the right to write to its file (unix(7)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnixAccess {
    /// The file's permission bits.
    pub mode: u32,
    /// The file's owner, a name or a number, resolved when it is bound; who lbd runs as where `None`.
    pub owner: Option<String>,
    /// Its group, likewise.
    pub group: Option<String>,
}

impl Default for UnixAccess {
    /// Whoever may search the folder may connect, as with a TCP port.
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
    /// That many workers, on free ports picked when each is started, or on unix sockets.
    Count(NonZeroU32),
}

impl Slots {
    /// How many workers there are. Never zero.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::Ports(ports) => ports.len(),
            // A u32 fits: lbd runs on Linux with pointers of 32 or 64 bits.
            Self::Count(count) => count.get() as usize,
        }
    }
}

/// What a worker process is started with. Two equal specs start the same worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerSpec {
    /// What is run.
    pub program: Program,
    /// The address that the workers' ports are on.
    pub host: IpAddr,
    /// Who binds the port.
    pub socket: SocketMode,
    /// Whether, and how, it is told who its client is. Here and not in [`Routing`], as a worker
    /// understands the one or the other: each is spoken to as it was started for.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// The addresses that it has a socket on, with [`SocketMode::Direct`]; empty without.
    pub public: Vec<SocketAddr>,
    /// Variables added to lbd's own environment.
    pub env: BTreeMap<String, String>,
    /// The user to run as: a name or a number, resolved when the worker is started.
    pub user: Option<String>,
    /// The group to run as: a name or a number; the user's own where only `user` is set.
    pub group: Option<String>,
    /// The file mode creation mask; lbd's own where `None`.
    pub umask: Option<u32>,
    /// The working folder, absolute, with its links: it is looked for at each start, and may not be
    /// there now.
    pub directory: PathBuf,
    /// Where the worker's standard output and error go.
    pub output: Output,
    /// `limits.open-files`: its soft and hard `RLIMIT_NOFILE`; what lbd was started with where
    /// `None`.
    pub open_files: Option<NonZeroU32>,
    /// `limits.processes`: how many processes and threads it may be, all that it starts included.
    /// Only where [`Config::process_limits`] says so, and lbd has a cgroup for it.
    pub processes: Option<NonZeroU32>,
}

impl WorkerSpec {
    /// Where a worker on `port` is reached. With [`SocketMode::Direct`] that is for show alone: there
    /// the port is a name, and nobody listens on it.
    #[must_use]
    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.host, port)
    }

    /// How its connections come to it.
    #[must_use]
    pub fn route(&self) -> Route {
        match self.socket {
            SocketMode::Bind | SocketMode::Inherit | SocketMode::Unix => Route::Proxy,
            SocketMode::Direct => Route::Direct,
        }
    }
}

/// `route`: how connections come to the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Through lbd.
    Proxy,
    /// From the kernel, into the worker's own socket on the public address.
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

/// How many workers with inherited sockets can be on one port at once: one, and the one that takes
/// over from it.
pub const WORKERS_ON_A_PORT: usize = 2;

/// `socket`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketMode {
    /// The worker binds its port itself.
    Bind,
    /// lbd binds the port and passes the listening socket as descriptor 3.
    Inherit,
    /// The same with a unix socket, which has no port.
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
    /// Lines into lbd's log, tagged.
    Log,
    /// lbd's own standard output and error.
    Inherit,
    /// Thrown away.
    Null,
    /// Appended to this file (absolute), with `{slot}` and `{service}` still in it.
    File(PathBuf),
}

/// How connections reach the workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routing {
    /// How a worker is chosen.
    pub balance: Balance,
    /// Held at once by the service; `None` is no limit.
    pub max_connections: Option<NonZeroU32>,
    /// `limits.max-connections`: held at once by one worker; `None` is no limit.
    pub worker_connections: Option<NonZeroU32>,
    /// How long one worker may take to accept a connection.
    pub connect_timeout: Duration,
    /// A connection with no byte either way for this long is closed.
    pub idle_timeout: Duration,
    /// How long a connection waits while no worker is healthy but one is on its way, or while none
    /// has room.
    pub hold_timeout: Duration,
    /// `accept-proxy-protocol`: whose connections begin with a PROXY header.
    pub accept_proxy: Networks,
    /// After this long in silence, TCP asks whether a connection's other end is still there. Whole
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

/// A set of networks, and perhaps the clients of unix sockets, which are in none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Networks {
    /// The networks, in the order of the file.
    pub inet: Vec<Network>,
    /// Whether clients on unix sockets belong to it too.
    pub unix: bool,
}

impl Networks {
    /// Whether a client at `ip`, or with `None` on a unix socket, belongs to it.
    #[must_use]
    pub fn contains(&self, ip: Option<IpAddr>) -> bool {
        match ip {
            // An IPv4 client is one on whatever socket it came.
            Some(ip) => {
                let ip = ip.to_canonical();
                self.inet.iter().any(|network| network.contains(ip))
            }
            None => self.unix,
        }
    }
}

/// The IP addresses that begin with the same bits, in CIDR notation (RFC 4632, RFC 4291).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// The first address of it.
    address: IpAddr,
    /// How many bits all of them have in common: up to 32 of IPv4, 128 of IPv6.
    prefix: u8,
}

impl Network {
    /// `None` where the family has no such prefix, or the address has bits behind it.
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

    /// Whether `ip` is in it. An IPv4 address that is mapped into IPv6 is not.
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

/// How many bits an address of this family has.
fn bits_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// `balance`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    /// Strict rotation.
    RoundRobin,
    /// The worker that holds the fewest connections; the rotation decides between equals.
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
    /// From one probe's start to the next one's. Not zero.
    pub interval: Duration,
    /// How long one probe may take. Not zero.
    pub timeout: Duration,
    /// Passes in a row that make a worker healthy.
    pub rise: NonZeroU32,
    /// Failures in a row that make a healthy worker unhealthy.
    pub fall: NonZeroU32,
    /// A new worker that is not healthy by then is killed and counts as failed.
    pub start_timeout: Duration,
    /// Whose listening socket is believed on the port of a worker that binds it itself.
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

/// `health.owner`: whose listening socket is believed on a worker's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// One that a process of the worker has; where lbd may not look, one of the worker's user.
    Tree,
    /// One of the worker's user.
    User,
    /// Whosever it is: a container engine's proxy listens for the worker.
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
        /// The good statuses.
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
    /// The delay before the first restart of a worker that never got healthy.
    pub min_delay: Duration,
    /// The longest delay.
    pub max_delay: Duration,
    /// After this long in health the first exit restarts with no delay.
    pub reset_after: Duration,
    /// An unhealthy worker that lives this long is replaced.
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
    /// What comes first where a worker is replaced.
    pub order: Order,
    /// How long a new worker must have been healthy before the next step of the replacement.
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
    /// The new worker is proven before the old one goes; on a free port first, where both would
    /// have to bind the same one.
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
    /// From the signal to SIGKILL.
    pub timeout: Duration,
    /// Who gets the signal.
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
    /// The program and all in its process group.
    Group,
    /// The program alone, which ends its own children; what it leaves gets it at its end.
    Main,
}

/// `drain`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drain {
    /// lbd waits for the worker's connections to end, then signals.
    Wait,
    /// lbd signals as soon as the worker is out of rotation; the worker finishes its connections.
    Signal,
}

/// When a worker is replaced though nothing is wrong with it: a new one is started, and this one
/// drained. The rest of `[service.NAME.limits]` is in [`WorkerSpec`] and [`Routing`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limits {
    /// Past this many bytes of memory.
    pub memory: Option<NonZeroU64>,
    /// Past this time since its start; up to a tenth earlier, so that not all are due at once. Not
    /// zero.
    pub max_age: Option<Duration>,
}

/// The default of `host`.
pub const DEFAULT_HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
