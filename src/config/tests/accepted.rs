//! What a configuration turns into.

use std::{
    collections::BTreeMap,
    num::{NonZeroU32, NonZeroU64},
    sync::Arc,
    time::Duration,
};

use nix::sys::signal::Signal;

use super::*;

#[test]
fn the_shortest_useful_file_has_every_default() {
    let text = r#"
[service.web]
listen  = "127.0.0.1:44444"
command = ["node", "server.js"]
ports   = [9002, 9003, 9004, 9005]
"#;
    let second = Duration::from_secs(1);
    let expected = Config {
        path: Some(PathBuf::from("/srv/lb.toml")),
        log: Log {
            level: Level::Info,
            format: LogFormat::Text,
            access: true,
            file: None,
            rotate: Rotate::Never,
            keep: None,
            output_rate: number(10_000),
        },
        admin: Admin::default(),
        services: vec![Service {
            name: "web".into(),
            listen: vec![Listen::Tcp(([127, 0, 0, 1], 44444).into())],
            unix_access: BTreeMap::new(),
            slots: Slots::Ports(vec![9002, 9003, 9004, 9005]),
            worker: Arc::new(WorkerSpec {
                program: Program::Command(vec!["node".to_owned(), "server.js".to_owned()]),
                host: [127, 0, 0, 1].into(),
                socket: SocketMode::Bind,
                proxy_protocol: None,
                public: Vec::new(),
                env: BTreeMap::new(),
                user: None,
                group: None,
                umask: None,
                directory: PathBuf::from("/srv"),
                output: Output::Log,
                open_files: None,
                processes: None,
            }),
            routing: Routing {
                balance: Balance::RoundRobin,
                max_connections: None,
                worker_connections: None,
                connect_timeout: second,
                idle_timeout: 3600 * second,
                hold_timeout: 10 * second,
                accept_proxy: Networks::default(),
                keepalive: 60 * second,
            },
            health: Health {
                probe: Probe::Tcp,
                interval: second,
                timeout: second,
                rise: number(1),
                fall: number(3),
                start_timeout: 60 * second,
                owner: Owner::Tree,
            },
            restart: Restart {
                min_delay: second / 10,
                max_delay: 30 * second,
                reset_after: 10 * second,
                unhealthy_after: 30 * second,
            },
            rollout: Rollout { order: Order::StartFirst, settle: second / 2 },
            stop: Stop {
                signal: Signal::SIGTERM,
                drain: Drain::Wait,
                drain_timeout: 30 * second,
                timeout: 10 * second,
                to: StopTo::Group,
            },
            limits: Limits { memory: None, max_age: None },
        }],
        process_limits: vec![],
        digest: None,
        lines: BTreeMap::new(),
    };
    let accepted = accepted(text);
    assert_eq!(accepted.lines["service.web.ports"], 5);
    assert_eq!(Config { lines: BTreeMap::new(), ..accepted }, expected);
    assert_eq!(
        describe(&expected.services[0]),
        "web: listen 127.0.0.1:44444; 4 workers on 127.0.0.1, ports 9002, 9003, 9004, 9005; \
         command node server.js; route proxy; balance round-robin; probe tcp every 1s"
    );
}

#[test]
fn every_key_is_read() {
    let text = r#"
[log]
level = "debug"
format = "json"
access = false
file = "log/lbd.log"
rotate = "daily"
keep = 7
output-rate = "500/s"

[admin]
socket = "run/admin.sock"
listen = ["127.0.0.1:9000", "[::1]:9000"]

[service."a.b_c-1"]
listen = [
    "[::]:80", "0.0.0.0:80", "unix:run//./x.sock",
    { unix = "/y", mode = "640", owner = "www", group = 33 },
]
command = ["./server", "--port={port}", "{anything}"]
workers = 3
host = "::1"
socket = "inherit"
route = "proxy"
proxy-protocol = "v2"
balance = "source-hash"
user = 33
group = "www-data"
umask = "027"
directory = "/"
output = "./out.log"
max-connections = 100
connect-timeout = "250ms"
idle-timeout = "1m 30s"
hold-timeout = "0s"
accept-proxy-protocol = ["10.0.0.0/8", "2001:db8::1", "unix"]
keepalive = "2m"
env.A = "1"
env."B.C" = ""

[service."a.b_c-1".health]
http = "/healthz?deep=1"
host = "example.org:80"
expect = [204, "200-299, 304"]
interval = "2s"
timeout = "3s"
rise = 2
fall = 5
start-timeout = "4s"

[service."a.b_c-1".restart]
min-delay = "1s"
max-delay = "1s"
reset-after = "5s"
unhealthy-after = "6s"

[service."a.b_c-1".rollout]
order = "stop-first"
settle = "0s"

[service."a.b_c-1".stop]
signal = "SIGQUIT"
drain = "signal"
drain-timeout = "7s"
timeout = "0s"
to = "main"

[service."a.b_c-1".limits]
memory = "1.5GiB"
open-files = 1000
processes = 20
max-age = "1day"
max-connections = 30
"#;
    let second = Duration::from_secs(1);
    let config = accepted(text);
    let log = Log {
        level: Level::Debug,
        format: LogFormat::Json,
        access: false,
        file: Some(PathBuf::from("/srv/log/lbd.log")),
        rotate: Rotate::Daily,
        keep: Some(number(7)),
        output_rate: number(500),
    };
    assert_eq!(config.log, log);
    let admin = Admin {
        socket: Some(PathBuf::from("/srv/run/admin.sock")),
        listen: vec![([127, 0, 0, 1], 9000).into(), "[::1]:9000".parse().unwrap()],
        token_file: None,
        token: None,
    };
    assert_eq!(config.admin, admin);
    let words = ["./server", "--port={port}", "{anything}"];
    let env = [("A", "1"), ("B.C", "")];
    let expected = Service {
        name: "a.b_c-1".into(),
        listen: vec![
            Listen::Tcp("[::]:80".parse().unwrap()),
            Listen::Tcp("0.0.0.0:80".parse().unwrap()),
            Listen::Unix(PathBuf::from("/srv/run/x.sock")),
            Listen::Unix(PathBuf::from("/y")),
        ],
        unix_access: [(
            PathBuf::from("/y"),
            UnixAccess { mode: 0o640, owner: Some("www".into()), group: Some("33".into()) },
        )]
        .into(),
        slots: Slots::Count(number(3)),
        worker: Arc::new(WorkerSpec {
            program: Program::Command(words.map(str::to_owned).to_vec()),
            host: "::1".parse().unwrap(),
            socket: SocketMode::Inherit,
            proxy_protocol: Some(ProxyProtocol::V2),
            public: Vec::new(),
            env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            user: Some("33".to_owned()),
            group: Some("www-data".to_owned()),
            umask: Some(0o027),
            directory: PathBuf::from("/"),
            output: Output::File(PathBuf::from("/srv/out.log")),
            open_files: Some(number(1000)),
            processes: Some(number(20)),
        }),
        routing: Routing {
            balance: Balance::SourceHash,
            max_connections: Some(number(100)),
            worker_connections: Some(number(30)),
            connect_timeout: second / 4,
            idle_timeout: 90 * second,
            hold_timeout: Duration::ZERO,
            accept_proxy: Networks {
                inet: vec![
                    Network::new([10, 0, 0, 0].into(), 8).unwrap(),
                    Network::new("2001:db8::1".parse().unwrap(), 128).unwrap(),
                ],
                unix: true,
            },
            keepalive: 120 * second,
        },
        health: Health {
            probe: Probe::Http {
                path: "/healthz?deep=1".to_owned(),
                host: Some("example.org:80".to_owned()),
                expect: StatusSet(vec![(204, 204), (200, 299), (304, 304)]),
            },
            interval: 2 * second,
            timeout: 3 * second,
            rise: number(2),
            fall: number(5),
            start_timeout: 4 * second,
            owner: Owner::Tree,
        },
        restart: Restart {
            min_delay: second,
            max_delay: second,
            reset_after: 5 * second,
            unhealthy_after: 6 * second,
        },
        rollout: Rollout { order: Order::StopFirst, settle: Duration::ZERO },
        stop: Stop {
            signal: Signal::SIGQUIT,
            drain: Drain::Signal,
            drain_timeout: 7 * second,
            timeout: Duration::ZERO,
            to: StopTo::Main,
        },
        limits: Limits {
            memory: NonZeroU64::new(3 << 29),
            max_age: Some(Duration::from_secs(24 * 3600)),
        },
    };
    assert_eq!(
        describe(&expected),
        "a.b_c-1: listen [::]:80, 0.0.0.0:80, unix:/srv/run/x.sock, unix:/y; 3 workers on free ports of \
         ::1; command ./server --port={port} {anything}; route proxy; proxy-protocol v2; \
         balance source-hash; \
         probe http /healthz?deep=1 expecting 204, 200-299, 304 every 2s; \
         limits memory 1.5 GiB, open-files 1000, processes 20, max-age 1day, max-connections 30"
    );
    assert_eq!(config.services, [expected]);
    assert_eq!(
        config.refuse_process_limits("there is no cgroup").unwrap_err().to_string(),
        "/srv/lb.toml:71: service.\"a.b_c-1\".limits.processes: there is no cgroup; remove it, or \
         run lbd where it has a cgroup with the pids controller, such as systemd's Delegate=yes \
         gives it"
    );
}

#[test]
fn a_root_changes_the_defaults() {
    let (folder, path) = file("[service.web]\nlisten = \"[::1]:80\"\nroot = \"www\"\n");
    fs::create_dir(folder.path().join("www")).unwrap();
    let config = read(&path).unwrap();
    let [service] = &config.services[..] else { panic!("{config:?}") };
    assert_eq!(service.worker.program, Program::Root(folder.path().join("www")));
    assert_eq!(service.worker.socket, SocketMode::Inherit);
    assert_eq!(service.stop.drain, Drain::Signal);
    let any = Probe::Http { path: "/".to_owned(), host: None, expect: StatusSet(vec![(100, 599)]) };
    assert_eq!(service.health.probe, any);
    let cores = std::thread::available_parallelism().unwrap().get();
    assert_eq!(service.slots.count(), cores);

    let with = |more: &str| {
        fs::write(&path, format!("[service.a]\nlisten = \"[::1]:80\"\nroot = \"www\"\n{more}"))
            .unwrap();
        read(&path).unwrap().services.remove(0)
    };
    let own = with("socket = \"bind\"\nstop.drain = \"wait\"\nhealth.http = \"/up\"\n");
    assert_eq!(own.worker.socket, SocketMode::Bind);
    assert_eq!(own.stop.drain, Drain::Wait);
    let up =
        Probe::Http { path: "/up".to_owned(), host: None, expect: StatusSet(vec![(200, 399)]) };
    assert_eq!(own.health.probe, up);
    let narrow = with("health.expect = 200\nhealth.host = \"h\"\n").health.probe;
    let expect = StatusSet(vec![(200, 200)]);
    assert_eq!(narrow, Probe::Http { path: "/".to_owned(), host: Some("h".to_owned()), expect });
}

#[test]
fn direct_workers_have_a_socket_on_each_address() {
    let (_folder, path) = file(
        "[service.web]\nlisten = [\"127.0.0.1:80\", \"[::1]:80\"]\ncommand = [\"x\"]\n\
         route = \"direct\"\nsocket = \"inherit\"\nports = [81, 82]\nbalance = \"source-hash\"\n",
    );
    let config = read(&path).unwrap();
    let [service] = &config.services[..] else { panic!("{config:?}") };
    assert_eq!(service.worker.route(), Route::Direct);
    assert_eq!(service.worker.socket, SocketMode::Direct);
    let listen = ["127.0.0.1:80", "[::1]:80"].map(|address| address.parse().unwrap());
    assert_eq!(service.worker.public, listen);
    assert_eq!(
        describe(service),
        "web: listen 127.0.0.1:80, [::1]:80; 2 workers on sockets of their own there; command x; \
         route direct; balance source-hash; probe tcp every 1s"
    );
}

#[test]
fn more_addresses_than_a_worker_can_have_sockets_are_refused() {
    let addresses: Vec<String> = (1..=65).map(|port| format!("\"127.0.0.1:{port}\"")).collect();
    let listen = addresses.join(", ");
    let (_folder, path) = file(&format!(
        "[service.web]\nlisten = [{listen}]\ncommand = [\"x\"]\nroute = \"direct\"\n"
    ));
    let error = read(&path).unwrap_err().to_string();
    assert!(error.contains("more than 64 addresses do not go with"), "{error}");
}

#[test]
fn addresses_that_do_not_meet_are_accepted() {
    for (mine, other) in [
        ("0.0.0.0:80", "[::]:80"),
        ("127.0.0.1:80", "[::]:80"),
        ("127.0.0.1:80", "127.0.0.2:80"),
        ("127.0.0.1:80", "127.0.0.1:81"),
        ("unix:a", "unix:b"),
    ] {
        let config = accepted(&format!(
            "[service.a]\nlisten = \"{mine}\"\ncommand = [\"x\"]\nports = [9002]\n\
             [service.b]\nlisten = \"{other}\"\ncommand = [\"x\"]\nports = [9002]\nhost = \"::1\"\n"
        ));
        assert_eq!(config.services.len(), 2);
    }
}

#[test]
fn the_owner_of_a_listening_socket_is_believed_as_the_file_says() {
    for (word, owner) in [("tree", Owner::Tree), ("user", Owner::User), ("any", Owner::Any)] {
        assert_eq!(service(&format!("health.owner = \"{word}\"")).health.owner, owner);
    }
}

#[test]
fn services_keep_the_order_of_the_file() {
    let text = "[service.b.health]\nrise = 2\n[service.a]\nlisten = \"unix:a\"\ncommand = [\"x\"]\n\
                [service.c]\nlisten = \"unix:c\"\ncommand = [\"x\"]\n[service.b]\nlisten = \"unix:b\"\n\
                command = [\"x\"]\n";
    let names: Vec<_> = accepted(text).services.iter().map(|s| s.name.to_string()).collect();
    assert_eq!(names, ["a", "c", "b"]);
}

#[test]
fn signals_and_accounts_may_be_written_in_two_ways() {
    for name in ["INT", "SIGINT"] {
        assert_eq!(service(&format!("stop.signal = \"{name}\"")).stop.signal, Signal::SIGINT);
    }
    for user in ["0", "\"0\""] {
        let user = service(&format!("user = {user}")).worker.user.clone();
        assert_eq!(user.as_deref(), Some("0"));
    }
}

#[test]
fn a_network_has_the_addresses_that_begin_like_it() {
    let accept = |networks: &str| {
        service(&format!("accept-proxy-protocol = {networks}")).routing.accept_proxy
    };
    for (networks, inside, outside) in [
        ("\"10.0.0.0/8\"", ["10.0.0.0", "10.255.255.255"], ["9.255.255.255", "11.0.0.0"]),
        ("\"10.1.2.3\"", ["10.1.2.3", "::ffff:10.1.2.3"], ["10.1.2.2", "::10.1.2.3"]),
        ("\"192.0.2.128/25\"", ["192.0.2.128", "192.0.2.255"], ["192.0.2.127", "::1"]),
        ("\"0.0.0.0/0\"", ["255.0.0.1", "::ffff:0.0.0.1"], ["::1", "2001:db8::1"]),
        ("\"::/0\"", ["::1", "ffff::"], ["127.0.0.1", "::ffff:127.0.0.1"]),
        ("[\"::1\", \"2001:db8::/33\"]", ["::1", "2001:db8:7fff::1"], ["::2", "2001:db8:8000::"]),
    ] {
        let networks = accept(networks);
        let contains = |ip: &str| networks.contains(Some(ip.parse().unwrap()));
        assert_eq!(inside.map(contains), [true; 2], "{networks:?}");
        assert_eq!(outside.map(contains), [false; 2], "{networks:?}");
        assert!(!networks.contains(None));
    }
    assert!(!Networks::default().contains(Some([127, 0, 0, 1].into())));
}

#[test]
fn a_byte_order_mark_is_no_error() {
    assert_eq!(accepted(&format!("\u{feff}{SERVICE}")).services.len(), 1);
}

#[test]
fn a_command_line_makes_a_service() {
    let argv = ["node", "a b", ""].map(str::to_owned).to_vec();
    let listen = ["127.0.0.1:8080", "[::1]:8080"].map(str::to_owned);
    let config = from_command(&listen, Some(4), argv[..2].to_vec()).unwrap();
    let folder = current_folder().unwrap();
    assert_eq!((config.path, config.log), (None, Log::default()));
    let mut expected = service("workers = 4");
    expected.name = "app".into();
    expected.listen = listen.iter().map(|l| Listen::Tcp(l.parse().unwrap())).collect();
    let program = Program::Command(argv[..2].to_vec());
    let worker = WorkerSpec { program, directory: folder, ..(*expected.worker).clone() };
    expected.worker = Arc::new(worker);
    assert_eq!(config.services, [expected.clone()]);
    assert!(describe(&expected).contains("; command node \"a b\"; "), "{}", describe(&expected));

    let listen = ["127.0.0.1:80", "*:80", "0.0.0.0:80"].map(str::to_owned);
    assert_eq!(
        from_command(&listen, Some(0), argv).unwrap_err().to_string(),
        "--listen: \"*:80\" has no address; write \"127.0.0.1:80\", or \"0.0.0.0:80\" for every \
         interface\n\
         --workers: expected a number from 1 to 1024, found 0\n\
         --listen: 0.0.0.0:80 overlaps 127.0.0.1:80 (--listen): a wildcard takes the port of every \
         address; keep one of them"
    );
    assert_eq!(
        from_command(&listen[..1], None, vec![String::new()]).unwrap_err().to_string(),
        "the command: the program is empty; write its name or path"
    );
    assert_eq!(
        from_command(&[], None, Vec::new()).unwrap_err().to_string(),
        "--listen: missing; write one such as --listen 127.0.0.1:8080\n\
         the command: missing; write one such as -- node server.js"
    );
}

fn number(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).unwrap()
}

fn service(extra: &str) -> Service {
    accepted(&format!("{SERVICE}{extra}\n")).services.remove(0)
}
