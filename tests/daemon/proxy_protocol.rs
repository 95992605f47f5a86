//! `proxy-protocol`: the first thing that a worker reads is whose connection it is.

use std::{
    fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
    thread,
};

use crate::common::{
    self, Daemon, Mark, PATIENCE, Ports,
    client::{KeepAlive, Load, connect, try_get},
    command, eventually, freeze, kill_hard,
    manager::{folder_with, pass},
};
use socket2::{Domain, Socket, Type};

const VERSIONS: [&str; 2] = ["v1", "v2"];

/// Not probed again after the first time.
const ONE_PROBE: &str = "health.interval = \"1h\"";

/// A service of fixtures that are told, and expect to be.
fn told(ports: &Ports, version: &str, keys: &str) -> String {
    let command = command(&["http", "--proxy", version]);
    ports.service(&format!("{command}\nproxy-protocol = \"{version}\"\n{keys}"))
}

/// The same, where the worker speaks first.
fn telling(ports: &Ports, version: &str, keys: &str) -> String {
    let command = command(&["tell", version]);
    ports.service(&format!("{command}\nproxy-protocol = \"{version}\"\n{keys}"))
}

/// What a worker is told of this client.
fn header_of(client: &TcpStream) -> String {
    let (ip, server) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
    let family = if ip.is_ipv4() { "TCP4" } else { "TCP6" };
    format!("PROXY {family} {} {} {} {}", ip.ip(), server.ip(), ip.port(), server.port())
}

/// Of one without an address.
fn nobody(version: &str) -> &str {
    if version == "v1" { "PROXY UNKNOWN" } else { "LOCAL" }
}

fn first_line(stream: impl Read) -> String {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

#[test]
fn a_worker_that_speaks_first_knows_to_whom() {
    for version in VERSIONS {
        let ports = Ports::take(2);
        let _daemon = Daemon::healthy(&telling(&ports, version, ""), 2);
        for _ in 0..4 {
            // It says nothing before it has been spoken to.
            let mut client = connect(ports.address());
            assert_eq!(first_line(&client), header_of(&client));
            // And what it says then has nothing in front of it.
            client.write_all(b"hello").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut echo = String::new();
            client.read_to_string(&mut echo).unwrap();
            assert_eq!(echo, "hello");
        }
    }
}

#[test]
fn what_the_client_says_follows_whole() {
    for version in VERSIONS {
        let ports = Ports::take(1);
        let daemon = Daemon::healthy(&telling(&ports, version, ""), 1);
        // Once less than what is read at once, and once a lot more.
        for length in [1, 100, 64 << 10, 4 << 20] {
            let client = connect(ports.address());
            let header = header_of(&client);
            let said: Vec<u8> = (0..=255).cycle().take(length).collect();
            let mut writer = client.try_clone().unwrap();
            let writing = thread::spawn(move || {
                writer.write_all(&said).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
                said
            });
            let mut reader = BufReader::new(&client);
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            assert_eq!(line.trim_end(), header);
            let mut echo = Vec::new();
            reader.read_to_end(&mut echo).unwrap();
            assert!(echo == writing.join().unwrap(), "{length} bytes");
            // The header is none of the client's bytes.
            let address = client.local_addr().unwrap().to_string();
            let line = daemon.wait(Mark::START, "connection", &[("client", &address)]);
            assert_eq!(line.get("received"), Some(&*length.to_string()));
            assert_eq!(line.get("end"), Some("closed"));
        }
    }
}

#[test]
fn clients_over_ipv6_and_unix() {
    for version in VERSIONS {
        let ports = Ports::take(1);
        let v6 = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, ports.address().port()));
        let listen = format!("listen = [\"{}\", \"{v6}\", \"unix:web.sock\"]", ports.address());
        let config = told(&ports, version, "")
            .replace(&format!("listen = \"{}\"", ports.address()), &listen);
        let daemon = Daemon::healthy(&config, 1);
        for address in [ports.address(), v6] {
            let client = connect(address);
            let header = header_of(&client);
            let answer = KeepAlive::over(client).get("/proxy").unwrap();
            assert_eq!(answer, (200, header.into_bytes()));
        }
        let mut client = UnixStream::connect(daemon.path("web.sock")).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"GET /proxy HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer.lines().last().unwrap(), nobody(version));
    }
}

#[test]
fn an_ipv4_client_on_a_dual_stack_socket_is_one() {
    for version in VERSIONS {
        let ports = Ports::take(1);
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        socket.set_only_v6(false).unwrap();
        let address = SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, ports.address().port()));
        socket.bind(&address.into()).unwrap();
        socket.listen(10).unwrap();
        let config = told(&ports, version, "")
            .replace(&format!("\"{}\"", ports.address()), &format!("\"{address}\""));
        let daemon = pass(folder_with(&config), vec![(OwnedFd::from(socket), "web")]);
        daemon.wait_healthy(Mark::START, 1);
        let client = connect(ports.address());
        let header = header_of(&client);
        assert!(header.starts_with("PROXY TCP4 127.0.0.1 127.0.0.1 "), "{header}");
        assert_eq!(KeepAlive::over(client).get("/proxy").unwrap(), (200, header.into_bytes()));
    }
}

#[test]
fn probes_begin_with_it_too() {
    for version in VERSIONS {
        for health in ["health.http = \"/health\"", ""] {
            let ports = Ports::take(1);
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("headers");
            let words = ["http", "--proxy", version, "--headers", file.to_str().unwrap()];
            let keys = format!(
                "{}\nproxy-protocol = \"{version}\"\nhealth.interval = \"20ms\"\n{health}",
                command(&words)
            );
            let daemon = Daemon::healthy(&ports.service(&keys), 1);
            let read = || fs::read_to_string(&file).unwrap_or_default();
            eventually("five probes", || read().lines().count() >= 5);
            for line in read().lines() {
                let words: Vec<_> = line.split(' ').collect();
                let worker = ports.worker(0).to_string();
                match (version, &words[..]) {
                    ("v2", ["LOCAL"]) => {}
                    // Of the probe's own connection: there are servers that refuse UNKNOWN.
                    ("v1", ["PROXY", "TCP4", "127.0.0.1", "127.0.0.1", _, port]) => {
                        assert_eq!(*port, worker);
                    }
                    _ => panic!("{version}: {line}"),
                }
            }
            assert!(daemon.said(Mark::START, "worker unhealthy").is_empty());
        }
    }
}

#[test]
fn a_worker_that_does_not_take_the_connection_costs_nothing_of_it() {
    let ports = Ports::take(2);
    let keys = format!(
        "command = [\"sh\", \"-c\", \"\"\"[ {{slot}} = 0 ] && exec {0} closing stop || exec {0} http --proxy v1\"\"\"]\n\
         proxy-protocol = \"v1\"\n{ONE_PROBE}",
        common::fixture()
    );
    let daemon = Daemon::healthy(&ports.service(&keys), 2);
    daemon.tell_worker("stop");
    for _ in 0..6 {
        let client = connect(ports.address());
        let header = header_of(&client);
        assert_eq!(KeepAlive::over(client).get("/proxy").unwrap(), (200, header.into_bytes()));
    }
}

#[test]
fn a_client_that_was_held_is_told_of_at_last() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("gate");
    let words = ["tell", "v2", "--gate", gate.to_str().unwrap()];
    let keys = format!("{}\nproxy-protocol = \"v2\"\nhealth.interval = \"20ms\"", command(&words));
    let daemon = Daemon::start(&ports.service(&keys));
    daemon.wait(Mark::START, "worker started", &[]);
    let silent = connect(ports.address());
    let mut speaks = connect(ports.address());
    speaks.write_all(b"hello").unwrap();
    fs::write(gate, "").unwrap();
    assert_eq!(first_line(&silent), header_of(&silent));
    let mut all = vec![0; header_of(&speaks).len() + 1 + 5];
    speaks.read_exact(&mut all).unwrap();
    assert_eq!(String::from_utf8(all).unwrap(), format!("{}\nhello", header_of(&speaks)));
}

#[test]
fn a_client_that_waited_for_another_worker_is_told_of_once_and_as_itself() {
    for version in VERSIONS {
        let ports = Ports::take(2);
        let keys = format!("socket = \"inherit\"\n{ONE_PROBE}");
        let daemon = Daemon::healthy(&told(&ports, version, &keys), 2);
        let killed = daemon.worker_pid(ports.worker(0));
        freeze(killed);
        let clients: Vec<_> = (0..20)
            .map(|_| {
                let client = connect(ports.address());
                let header = header_of(&client);
                let mut client = KeepAlive::over(client);
                client.send("/proxy").unwrap();
                (client, header)
            })
            .collect();
        eventually("half of them wait", || daemon.workers("web")[0]["connections"]["active"] == 10);
        let since = daemon.now();
        kill_hard(killed);
        for (mut client, header) in clients {
            assert_eq!(client.answer().unwrap(), (200, header.into_bytes()));
        }
        // Both halves of its way are the client's in the log.
        let lines = daemon.wait_many(since, "connection", &[("end", "closed")], 30);
        let mut seen = common::client::counts(
            &lines.iter().map(|line| port_of(line.get("client").unwrap())).collect::<Vec<_>>(),
        );
        seen.retain(|_, count| *count == 2);
        assert_eq!(seen.len(), 10, "{lines:#?}");
    }
}

fn port_of(address: &str) -> u16 {
    address.parse::<SocketAddr>().unwrap().port()
}

#[test]
fn a_client_on_a_unix_socket_that_waited_for_another_worker_stays_nobody() {
    for version in VERSIONS {
        let ports = Ports::take(1);
        let config = told(&ports, version, &format!("socket = \"inherit\"\n{ONE_PROBE}"))
            .replace(&format!("\"{}\"", ports.address()), "\"unix:web.sock\"");
        let daemon = Daemon::healthy(&config, 1);
        let killed = daemon.worker_pid(ports.worker(0));
        freeze(killed);
        let mut client = UnixStream::connect(daemon.path("web.sock")).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"GET /proxy HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
        eventually("it waits", || daemon.workers("web")[0]["connections"]["active"] == 1);
        kill_hard(killed);
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer.lines().last().unwrap(), nobody(version));
    }
}

#[test]
fn a_reload_that_changes_it_loses_nobody() {
    let ports = Ports::take(2);
    let keys = |version| told(&ports, version, "socket = \"inherit\"\nhealth.http = \"/health\"");
    let plain = ports.service(&format!(
        "{}\nsocket = \"inherit\"\nhealth.http = \"/health\"",
        command(&["http"])
    ));
    let daemon = Daemon::healthy(&plain, 2);
    let load = Load::start(ports.address(), "/");
    // Each worker is told in the way that it was started for, old and new ones side by side.
    for config in [keys("v1"), keys("v2"), keys("v1"), plain.clone(), keys("v2")] {
        let since = daemon.now();
        daemon.must_reload(&config);
        daemon.wait_many(since, "worker exited", &[], 2);
    }
    load.end_without_failure();
    let client = connect(ports.address());
    let header = header_of(&client);
    assert_eq!(KeepAlive::over(client).get("/proxy").unwrap(), (200, header.into_bytes()));
}

#[test]
fn who_waits_while_a_reload_changes_it_is_told_of_in_the_new_way() {
    // The worker that they waited for was told in the one way, the one that answers in the other.
    for (before, after) in [("v1", Some("v2")), ("v2", None)] {
        let ports = Ports::take(1);
        let keys = format!("socket = \"inherit\"\nstop.timeout = \"0s\"\n{ONE_PROBE}");
        let keys = format!("{keys}\nstop.drain-timeout = \"0s\"");
        let daemon = Daemon::healthy(&told(&ports, before, &keys), 1);
        freeze(daemon.worker_pid(ports.worker(0)));
        let client = connect(ports.address());
        let header = header_of(&client);
        let mut client = KeepAlive::over(client);
        client.send("/proxy").unwrap();
        eventually("it waits", || daemon.workers("web")[0]["connections"]["active"] == 1);
        match after {
            Some(after) => {
                daemon.must_reload(&told(&ports, after, &keys));
                assert_eq!(client.answer().unwrap(), (200, header.into_bytes()));
            }
            None => {
                let plain = ports.service(&format!("{}\n{keys}", command(&["http"])));
                daemon.must_reload(&plain);
                // There is no header in front of the request.
                assert_eq!(client.answer().unwrap(), (200, Vec::new()));
            }
        }
    }
}

#[test]
fn who_waited_where_nobody_is_told_is_not_taken_for_lbd() {
    for version in VERSIONS {
        let ports = Ports::take(1);
        let keys = format!("socket = \"inherit\"\nstop.timeout = \"0s\"\n{ONE_PROBE}");
        let keys = format!("{keys}\nstop.drain-timeout = \"0s\"");
        let plain = ports.service(&format!("{}\n{keys}", command(&["http"])));
        let daemon = Daemon::healthy(&plain, 1);
        freeze(daemon.worker_pid(ports.worker(0)));
        let mut client = KeepAlive::new(ports.address());
        client.send("/proxy").unwrap();
        eventually("it waits", || daemon.workers("web")[0]["connections"]["active"] == 1);
        daemon.must_reload(&told(&ports, version, &keys));
        assert_eq!(client.answer().unwrap(), (200, nobody(version).into()));
    }
}

#[test]
fn a_header_that_another_program_put_in_front_is_not_believed() {
    for version in VERSIONS {
        let ports = Ports::take(2);
        let keys = format!("socket = \"inherit\"\n{ONE_PROBE}");
        let daemon = Daemon::healthy(&told(&ports, version, &keys), 2);
        let frozen = daemon.worker_pid(ports.worker(0));
        freeze(frozen);
        // Anybody on the machine can connect to a worker's port.
        let mut stranger = connect(([127, 0, 0, 1], ports.worker(0)).into());
        let own = stranger.local_addr().unwrap().to_string();
        let header = header_of(&stranger);
        match version {
            "v1" => stranger.write_all(b"PROXY TCP4 203.0.113.9 203.0.113.1 1 2\r\n").unwrap(),
            _ => stranger
                .write_all(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\xcb\x00\x71\x09\xcb\x00\x71\x01\0\x01\0\x02")
                .unwrap(),
        }
        let mut stranger = KeepAlive::over(stranger);
        stranger.send("/proxy").unwrap();
        // Of those that lbd has handed to it, every second one waits there.
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let mut client = KeepAlive::new(ports.address());
                let header = header_of(client.stream());
                client.send("/proxy").unwrap();
                (client, header)
            })
            .collect();
        eventually("they wait", || daemon.workers("web")[0]["connections"]["active"] == 2);
        kill_hard(frozen);
        assert_eq!(stranger.answer().unwrap(), (200, header.into_bytes()));
        for (mut client, header) in clients {
            assert_eq!(client.answer().unwrap(), (200, header.into_bytes()), "lbd is believed");
        }
        drop(stranger);
        daemon.wait(Mark::START, "connection", &[("client", &own)]);
        assert!(!daemon.log.text().contains("203.0.113.9"));
    }
}

#[test]
fn a_worker_that_does_not_expect_it_is_not_put_in_charge() {
    let ports = Ports::take(2);
    let config = |keys: &str| {
        let health = "health = { http = \"/health\", start-timeout = \"500ms\" }";
        ports.service(&format!("{}\nsocket = \"inherit\"\n{health}\n{keys}", command(&["http"])))
    };
    let daemon = Daemon::healthy(&config(""), 2);
    let before = daemon.slot_pids();
    let load = Load::start(ports.address(), "/");
    daemon.write_config(&config("proxy-protocol = \"v1\""));
    let output = daemon.lbd(&["reload"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("web: slot 0") && error.contains("not healthy within 500ms"), "{error}");
    assert_eq!(daemon.slot_pids(), before);
    // Those that stayed are still told nothing.
    load.more(50);
    load.end_without_failure();
}

#[test]
fn a_worker_that_refuses_it_is_a_reset_and_not_an_end() {
    let ports = Ports::take(1);
    // It passes the one probe, which it does not read.
    let keys = format!("{}\nproxy-protocol = \"v1\"\n{ONE_PROBE}", command(&["reset"]));
    let _daemon = Daemon::healthy(&ports.service(&keys), 1);
    let mut client = connect(ports.address());
    let error = client.read(&mut [0; 16]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(try_get(ports.address(), "/").is_err());
}

#[test]
fn a_wrong_value_is_refused_with_what_would_be_right() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let address = listener.local_addr().unwrap();
    let config = format!(
        "[service.web]\nlisten = \"{address}\"\nroot = \".\"\nproxy-protocol = \"v2\"\n\
         [service.b]\nlisten = \"unix:b\"\ncommand = [\"x\"]\nproxy-protocol = \"2\"\n"
    );
    fs::write(folder.path().join("lb.toml"), config).unwrap();
    let output = common::lbd(folder.path(), &["--config", "lb.toml"]);
    assert_eq!(output.status.code(), Some(78));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("lb.toml:4: service.web.proxy-protocol: the built-in worker "), "{said}");
    assert!(
        said.contains("lb.toml:8: service.b.proxy-protocol: \"2\" is not known here"),
        "{said}"
    );
}
