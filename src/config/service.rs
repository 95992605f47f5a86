//! Reads `[service.NAME]`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use super::{
    Balance, DEFAULT_HOST, Drain, Health, Limits, Listen, Networks, Order, Output, Owner, Probe,
    Program, ProxyProtocol, Restart, Rollout, Route, Routing, Service, Slots, SocketMode,
    StatusSet, Stop, StopTo, UnixAccess, WorkerSpec,
    addresses::{Claim, Claimant, Claims},
    limits,
    reader::{Table, Value},
    route,
    values::{self, MAX_WORKERS},
};

/// Reads the service `name`. Returns `None` if it has no address or no program, which has been
/// reported. Resolves relative paths against `base`. Adds the addresses to bind to `claims`.
pub(super) fn read(
    name: &str,
    mut table: Table<'_>,
    base: &Path,
    claims: &mut Claims,
) -> Option<Service> {
    let route = route::route(&mut table);
    if route == Route::Direct {
        route::refuse_keys(&mut table);
    }

    let listen = listen(&mut table, base, route, claims);
    let socket = match route {
        Route::Proxy => table.read("socket", |v| v.word(&SOCKETS)),
        Route::Direct => Some(route::socket(&mut table)),
    };
    let on_unix = socket == Some(SocketMode::Unix);
    let program = program(&mut table, base, on_unix);
    // The user's intention decides the defaults, even if the folder itself was refused.
    let built_in = table.has("root");
    if on_unix {
        table.read("host", |v| v.refuse::<()>("a unix socket has no IP address; remove it"));
    }
    let host = table.read("host", |v| v.parsed(values::ip)).unwrap_or(DEFAULT_HOST);
    let slots = slots(&mut table, host, on_unix, claims);
    let (default, drain) = if built_in {
        (SocketMode::Inherit, Drain::Signal)
    } else {
        (SocketMode::Bind, Drain::Wait)
    };
    let socket = socket.unwrap_or(default);
    let proxy_protocol = table.read("proxy-protocol", |value| {
        let version = value.word(&PROXY_PROTOCOLS)?;
        if built_in {
            return value.refuse(
                "the built-in worker does nothing with a client's address and expects no header; \
                 remove it",
            );
        }
        Some(version)
    });
    let env = env(table.table("env"));
    let user = table.read("user", account);
    let group = table.read("group", account);
    let umask = table.read("umask", |v| v.parsed(values::umask));
    // Not checked here but at each start, because it may be a link to the release that is current
    // then: see `WorkerSpec`.
    let directory = table.read("directory", |v| v.parsed(|text| values::path_in(base, text)));
    let output = table.read("output", |v| v.parsed(|text| values::output(text, base)));
    let mut addresses = listen.iter().flat_map(|listening| &listening.addresses);
    let has_unix = addresses.any(|address| matches!(address, Listen::Unix(_)));
    let mut routing = routing(&mut table, route, has_unix);
    let health = health(table.table("health"), built_in, socket);
    let restart = restart(table.table("restart"));
    let rollout = rollout(table.table("rollout"));
    let stop = stop(table.table("stop"), drain);
    let limits = limits::read(table.table("limits"), route);
    table.finish();

    routing.worker_connections = limits.max_connections;
    let worker = WorkerSpec {
        program: program?,
        host,
        socket,
        proxy_protocol,
        public: listen.as_ref().map(|listen| listen.public.clone()).unwrap_or_default(),
        env,
        user,
        group,
        umask,
        directory: directory.unwrap_or_else(|| base.to_owned()),
        output: output.unwrap_or(Output::Log),
        open_files: limits.open_files,
        processes: limits.processes,
    };
    let Listening { addresses, unix_access, .. } = listen?;
    Some(Service {
        name: name.into(),
        listen: addresses,
        unix_access,
        slots,
        worker: Arc::new(worker),
        routing,
        health,
        restart,
        rollout,
        stop,
        limits: limits.limits,
    })
}

/// A service of `lbd run`, with all defaults.
pub(super) fn of_command(
    name: &str,
    listen: Vec<Listen>,
    workers: Option<NonZeroU32>,
    argv: Vec<String>,
    directory: &Path,
) -> Service {
    Service {
        name: name.into(),
        listen,
        unix_access: BTreeMap::new(),
        slots: Slots::Count(workers.unwrap_or_else(cores)),
        worker: Arc::new(WorkerSpec {
            program: Program::Command(argv),
            host: DEFAULT_HOST,
            socket: SocketMode::Bind,
            proxy_protocol: None,
            public: Vec::new(),
            env: BTreeMap::new(),
            user: None,
            group: None,
            umask: None,
            directory: directory.to_owned(),
            output: Output::Log,
            open_files: None,
            processes: None,
        }),
        routing: Routing::default(),
        health: Health::default(),
        restart: Restart::default(),
        rollout: Rollout::default(),
        stop: Stop::default(),
        limits: Limits::default(),
    }
}

/// `listen`.
#[derive(Default)]
struct Listening {
    addresses: Vec<Listen>,
    /// The unix sockets whose access differs from the default.
    unix_access: BTreeMap<PathBuf, UnixAccess>,
    /// The addresses that workers get sockets on.
    public: Vec<SocketAddr>,
}

fn listen(
    table: &mut Table<'_>,
    base: &Path,
    route: Route,
    claims: &mut Claims,
) -> Option<Listening> {
    let Some(value) = table.take("listen") else {
        table.missing("listen", "missing; write one such as listen = \"127.0.0.1:8080\"");
        return None;
    };
    let items = value.one_or_list("an address or a list of them")?;
    let mut listening = Listening::default();
    for item in items {
        let (address, access) = if item.is_table() {
            let Some((path, access)) = unix_socket(&item, base) else { continue };
            (Listen::Unix(path), access)
        } else {
            let Some(address) = item.parsed(|text| values::listen(text, base)) else { continue };
            (address, UnixAccess::default())
        };
        claims.push(claim(&item, address.clone(), Claimant::Listener));
        if route == Route::Direct {
            let others = listening.public.len();
            listening.public.extend(route::public(&address, others, &item));
        }
        if let Listen::Unix(path) = &address
            && access != UnixAccess::default()
        {
            listening.unix_access.insert(path.clone(), access);
        }
        listening.addresses.push(address);
    }
    Some(listening)
}

/// `{ unix = "/run/x.sock", mode = "660", owner = "www", group = "www" }`.
fn unix_socket(item: &Value<'_>, base: &Path) -> Option<(PathBuf, UnixAccess)> {
    let mut table = item.table()?;
    let path = match table.take("unix") {
        Some(value) => value.parsed(|text| values::listen_path(text, base)),
        None => {
            table.missing("unix", "missing; write a path such as unix = \"/run/x.sock\"");
            None
        }
    };
    let access = UnixAccess {
        mode: table
            .read("mode", |v| v.parsed(values::socket_mode))
            .unwrap_or(UnixAccess::default().mode),
        owner: table.read("owner", account),
        group: table.read("group", account),
    };
    table.finish();
    Some((path?, access))
}

fn program(table: &mut Table<'_>, base: &Path, on_unix: bool) -> Option<Program> {
    match (table.take("root"), table.take("command")) {
        (Some(_), Some(command)) => {
            command.refuse("`root` is set too; keep the one of them that is to be run")
        }
        (Some(root), None) => root.parsed(|text| values::folder_in(base, text)).map(Program::Root),
        (None, Some(command)) => {
            let argv = command.list("an array such as [\"node\", \"server.js\"]")?;
            let word = |(number, item): (usize, &Value<'_>)| {
                let word =
                    item.parsed(if number == 0 { values::program } else { values::argument })?;
                if on_unix && word.contains("{port}") {
                    return item.refuse(
                        "a worker on a unix socket has no port, but the socket as descriptor 3; \
                         remove {port}",
                    );
                }
                Some(word)
            };
            Some(Program::Command(argv.iter().enumerate().filter_map(word).collect()))
        }
        (None, None) => {
            table.lacks(
                "nothing to run; write command = [\"node\", \"server.js\"] or root = \"www\"",
            );
            None
        }
    }
}

fn slots(table: &mut Table<'_>, host: IpAddr, on_unix: bool, claims: &mut Claims) -> Slots {
    let (mut ports, workers) = (table.take("ports"), table.take("workers"));
    if on_unix && let Some(ports) = ports.take() {
        ports.refuse::<()>(
            "a worker on a unix socket has no port; write a number of workers instead",
        );
    }
    if let (Some(_), Some(workers)) = (&ports, &workers) {
        workers.refuse::<()>("`ports` is set too, which has one worker a port; keep one of them");
    }
    if let Some(ports) = ports.and_then(|value| value.list("an array such as [9002, 9003]")) {
        return Slots::Ports(self::ports(&ports, host, claims));
    }
    let count = workers.and_then(|value| value.integer(1..=MAX_WORKERS)).and_then(NonZeroU32::new);
    Slots::Count(count.unwrap_or_else(cores))
}

fn ports(items: &[Value<'_>], host: IpAddr, claims: &mut Claims) -> Vec<u16> {
    if let Some(extra) = items.get(MAX_WORKERS as usize) {
        extra.refuse::<()>(format!("{} ports; expected at most {MAX_WORKERS}", items.len()));
    }
    let mut ports = Vec::new();
    for item in items {
        let port = item.integer(1..=u32::from(u16::MAX)).and_then(|port| u16::try_from(port).ok());
        let Some(port) = port else { continue };
        let address = Listen::Tcp(SocketAddr::new(host, port));
        claims.push(claim(item, address, Claimant::Worker));
        ports.push(port);
    }
    ports
}

fn claim(item: &Value<'_>, address: Listen, by: Claimant) -> Claim {
    Claim { address, by, key: item.key().to_owned(), line: Some(item.line()) }
}

fn cores() -> NonZeroU32 {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(cores).ok().and_then(NonZeroU32::new).unwrap_or(NonZeroU32::MIN)
}

fn env(table: Table<'_>) -> BTreeMap<String, String> {
    let entries = table.entries().into_iter();
    entries.filter_map(|(name, value)| Some((name.to_owned(), variable(name, &value)?))).collect()
}

fn variable(name: &str, value: &Value<'_>) -> Option<String> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return value.refuse("a variable's name must not be empty or have `=` or NUL in it");
    }
    if name == "PORT" || name.starts_with("LBD_") || name.starts_with("LISTEN_") {
        return value.refuse("lbd sets this variable for each worker; remove it");
    }
    value.parsed(|text| values::no_nul(text).map(|()| text.to_owned()))
}

fn account(value: Value<'_>) -> Option<String> {
    if value.is_integer() {
        return value.integer(0..=values::MAX_ID).map(|number| number.to_string());
    }
    value.parsed(values::account)
}

fn routing(table: &mut Table<'_>, route: Route, has_unix: bool) -> Routing {
    let default = Routing::default();
    let balance = |value: Value<'_>| match route {
        Route::Proxy => value.word(&BALANCES),
        Route::Direct => route::balance(&value),
    };
    Routing {
        balance: table.read("balance", balance).unwrap_or(default.balance),
        max_connections: table
            .read("max-connections", |v| v.integer(1..=u32::MAX))
            .and_then(NonZeroU32::new),
        worker_connections: default.worker_connections,
        connect_timeout: table.positive_duration("connect-timeout", default.connect_timeout),
        idle_timeout: table.positive_duration("idle-timeout", default.idle_timeout),
        hold_timeout: table.duration("hold-timeout", default.hold_timeout),
        accept_proxy: table
            .read("accept-proxy-protocol", |value| networks(value, has_unix))
            .unwrap_or(default.accept_proxy),
        keepalive: table
            .read("keepalive", |value| value.with_unit(values::keepalive))
            .unwrap_or(default.keepalive),
    }
}

fn networks(value: Value<'_>, has_unix: bool) -> Option<Networks> {
    let mut networks = Networks::default();
    for item in value.one_or_list("a network such as \"10.0.0.0/8\", or a list of them")? {
        match item.string()? {
            "unix" if has_unix => networks.unix = true,
            "unix" => {
                return item.refuse(
                    "\"unix\" has no effect: no address in `listen` is a unix socket's; remove it",
                );
            }
            _ => networks.inet.extend(item.parsed(values::network)),
        }
    }
    Some(networks)
}

fn health(mut table: Table<'_>, built_in: bool, socket: SocketMode) -> Health {
    let default = Health::default();
    let http = table.read("http", |v| v.parsed(values::request_target));
    let host = table.read("host", |v| v.parsed(values::host_header));
    let expect = table.read("expect", expect);
    let probe = match http {
        Some(path) => {
            Probe::Http { path, host, expect: expect.unwrap_or(StatusSet(vec![(200, 399)])) }
        }
        // A TCP probe can't detect a frozen worker. The built-in worker is known to speak HTTP.
        None if built_in => Probe::Http {
            path: "/".to_owned(),
            host,
            expect: expect.unwrap_or(StatusSet(vec![(100, 599)])),
        },
        None => Probe::Tcp,
    };
    if !built_in {
        table.only_with("http", &["expect", "host"]);
    }
    let health = Health {
        probe,
        interval: table.positive_duration("interval", default.interval),
        timeout: table.positive_duration("timeout", default.timeout),
        rise: table.read("rise", count).unwrap_or(default.rise),
        fall: table.read("fall", count).unwrap_or(default.fall),
        start_timeout: table.positive_duration("start-timeout", default.start_timeout),
        owner: table.read("owner", |value| owner(&value, socket)).unwrap_or(default.owner),
    };
    table.finish();
    health
}

fn count(value: Value<'_>) -> Option<NonZeroU32> {
    value.integer(1..=1000).and_then(NonZeroU32::new)
}

fn expect(value: Value<'_>) -> Option<StatusSet> {
    let mut ranges = Vec::new();
    for item in value.one_or_list("statuses such as \"200-299, 304\"")? {
        if item.is_integer() {
            let status = item.integer(100..=599).and_then(|status| u16::try_from(status).ok());
            ranges.extend(status.map(|status| (status, status)));
        } else {
            ranges.extend(item.parsed(values::statuses).into_iter().flat_map(|set| set.0));
        }
    }
    Some(StatusSet(ranges))
}

fn owner(value: &Value<'_>, socket: SocketMode) -> Option<Owner> {
    match socket {
        SocketMode::Bind => value.word(&OWNERS),
        SocketMode::Inherit | SocketMode::Unix | SocketMode::Direct => value.refuse(
            "lbd makes the listening socket itself and knows whose it is; remove it, or have the \
             worker bind its port with socket = \"bind\"",
        ),
    }
}

fn rollout(mut table: Table<'_>) -> Rollout {
    let default = Rollout::default();
    let rollout = Rollout {
        order: table.read("order", |v| v.word(&ORDERS)).unwrap_or(default.order),
        settle: table.duration("settle", default.settle),
    };
    table.finish();
    rollout
}

fn restart(mut table: Table<'_>) -> Restart {
    let default = Restart::default();
    let (shortest, longest) = (table.take("min-delay"), table.take("max-delay"));
    let min_delay = match &shortest {
        // Zero doubled stays zero: a program that fails at once would be restarted without end.
        Some(value) => value.with_unit(values::positive_duration),
        None => Some(default.min_delay),
    };
    let max_delay = match &longest {
        Some(value) => value.with_unit(values::duration),
        None => Some(default.max_delay),
    };
    if let (Some(min), Some(max)) = (min_delay, max_delay)
        && min > max
        && let Some(value) = longest.or(shortest)
    {
        let [min, max] = [min, max].map(humantime::format_duration);
        value.refuse::<()>(format!("min-delay ({min}) is longer than max-delay ({max})"));
    }
    let restart = Restart {
        min_delay: min_delay.unwrap_or(default.min_delay),
        max_delay: max_delay.unwrap_or(default.max_delay),
        reset_after: table.duration("reset-after", default.reset_after),
        unhealthy_after: table.duration("unhealthy-after", default.unhealthy_after),
    };
    table.finish();
    restart
}

fn stop(mut table: Table<'_>, drain: Drain) -> Stop {
    let default = Stop::default();
    let stop = Stop {
        signal: table.read("signal", |v| v.parsed(values::signal)).unwrap_or(default.signal),
        drain: table.read("drain", |v| v.word(&DRAINS)).unwrap_or(drain),
        drain_timeout: table.duration("drain-timeout", default.drain_timeout),
        timeout: table.duration("timeout", default.timeout),
        to: table.read("to", |v| v.word(&STOP_TO)).unwrap_or(default.to),
    };
    table.finish();
    stop
}

const SOCKETS: [(&str, SocketMode); 3] =
    [("bind", SocketMode::Bind), ("inherit", SocketMode::Inherit), ("unix", SocketMode::Unix)];

const PROXY_PROTOCOLS: [(&str, ProxyProtocol); 2] =
    [("v1", ProxyProtocol::V1), ("v2", ProxyProtocol::V2)];

const BALANCES: [(&str, Balance); 3] = [
    ("round-robin", Balance::RoundRobin),
    ("least-connections", Balance::LeastConnections),
    ("source-hash", Balance::SourceHash),
];

const OWNERS: [(&str, Owner); 3] =
    [("tree", Owner::Tree), ("user", Owner::User), ("any", Owner::Any)];

const ORDERS: [(&str, Order); 2] =
    [("start-first", Order::StartFirst), ("stop-first", Order::StopFirst)];

const DRAINS: [(&str, Drain); 2] = [("wait", Drain::Wait), ("signal", Drain::Signal)];

const STOP_TO: [(&str, StopTo); 2] = [("group", StopTo::Group), ("main", StopTo::Main)];
