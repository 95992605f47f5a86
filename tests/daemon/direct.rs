//! `route = "direct"`: the kernel hands connections to the workers, and lbd keeps every promise that
//! it makes as a proxy. Each test runs with both kinds of steering: eBPF as the machine allows it, and
//! classic BPF by taking `CAP_BPF` away.

use std::{
    collections::BTreeSet,
    fs,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    self, Daemon, Mark, Ports,
    client::{KeepAlive, Load, answered, asking, connect, counts, get, port, try_get, turns},
    command, eventually, freeze, kill_hard,
    metrics::{Metrics, with_admin},
    thaw, www,
};
use nix::{
    sched::{CloneFlags, unshare},
    sys::signal::Signal,
};

/// Set where eBPF has to work, as in `.ci/run`.
const REQUIRED: &str = "LBD_REQUIRE_BPF";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ebpf,
    Classic,
}

const KINDS: [Kind; 2] = [Kind::Ebpf, Kind::Classic];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Classic => "classic",
        }
    }
}

/// A daemon that steers in this way, with so many healthy workers. `None` where it can't.
fn start(kind: Kind, config: &str, workers: usize) -> Option<Daemon> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lb.toml"), config).unwrap();
    let lbd = env!("CARGO_BIN_EXE_lbd");
    let mut command = match kind {
        Kind::Ebpf => Command::new(lbd),
        Kind::Classic => {
            let mut command = Command::new("setpriv");
            // CAP_SYS_ADMIN stands for CAP_BPF (capabilities(7)).
            let all = "--bounding-set=-bpf,-sys_admin";
            command.args([all, "--inh-caps=-bpf,-sys_admin", lbd]);
            command
        }
    };
    command.args(["--config", "lb.toml"]);
    let daemon = Daemon::run(folder, command);
    daemon.wait_healthy(Mark::START, workers);
    let steering = daemon.wait(Mark::START, "steering", &[]);
    if steering.get("kind") != Some(kind.name()) {
        assert!(std::env::var(REQUIRED).unwrap_or_default().is_empty(), "{}", steering.raw);
        eprintln!("NOT TESTED: {}", steering.raw);
        return None;
    }
    Some(daemon)
}

/// Fixtures with sockets of their own. Ports are their names.
fn service(ports: &Ports, words: &[&str], more: &str) -> String {
    let settle = "rollout.settle = \"10ms\"";
    ports.service(&format!("{}\nroute = \"direct\"\n{settle}\n{more}", command(words)))
}

fn http(ports: &Ports, more: &str) -> String {
    service(ports, &["http"], more)
}

/// Runs a test for both kinds, each with ports of its own.
fn both(workers: usize, test: impl Fn(Kind, &Ports)) {
    for kind in KINDS {
        test(kind, &Ports::take(workers));
    }
}

/// Whether `ports` get connections, and nobody else.
fn only(ports: &Ports, wanted: &[u16]) {
    let mut wanted = wanted.to_vec();
    wanted.sort_unstable();
    // Enough for chance to reach everybody.
    let taken: Vec<u16> = counts(&turns(ports.address(), 100)).into_keys().collect();
    assert_eq!(taken, wanted);
}

fn file(daemon: &Daemon, name: &str) -> String {
    daemon.path(name).to_str().unwrap().to_owned()
}

#[test]
fn connections_rotate_and_the_worker_is_the_clients_peer() {
    both(4, |kind, ports| {
        let Some(daemon) = start(kind, &http(ports, ""), 4) else { return };
        match kind {
            Kind::Ebpf => {
                let around = turns(ports.address(), 400);
                assert!(around.chunks(4).all(|round| round == ports.all()), "{around:?}");
            }
            Kind::Classic => {
                let taken = counts(&turns(ports.address(), 4_000));
                assert_eq!(taken.len(), 4);
                assert!(taken.values().all(|count| (880..1_120).contains(count)), "{taken:?}");
            }
        }
        // Nothing went through lbd.
        assert!(daemon.said(Mark::START, "connection").is_empty());
        let client = connect(ports.address());
        let peer = client.peer_addr().unwrap();
        eventually("the worker has the other end", || {
            let sockets = fs::read_to_string("/proc/net/tcp").unwrap();
            let end = |address: SocketAddr| format!(":{:04X}", address.port());
            let mine = end(client.local_addr().unwrap());
            sockets.lines().any(|line| {
                let mut fields = line.split_whitespace().skip(1);
                let (local, remote) = (fields.next().unwrap(), fields.next().unwrap());
                local.ends_with(&end(peer)) && remote.ends_with(&mine)
            })
        });
    });
}

/// The header `X-Served-By`.
fn served_by(address: SocketAddr) -> String {
    let mut client = connect(address);
    client.write_all(b"GET /page.html HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let header = answer.lines().find_map(|line| line.strip_prefix("x-served-by: "));
    header.unwrap_or_else(|| panic!("{answer}")).to_owned()
}

#[test]
fn the_built_in_worker_is_told_apart_by_its_port_or_else_its_slot() {
    both(3, |kind, ports| {
        let root = format!("root = {:?}\nroute = \"direct\"\n", www());
        let by_slot =
            format!("[service.web]\nlisten = \"{}\"\nworkers = 3\n{root}", ports.address());
        let named: Vec<_> = ports.all().iter().map(|port| format!("web/{port}")).collect();
        let numbered = [0, 1, 2].map(|slot| format!("web/{slot}")).to_vec();
        for (config, expected) in [(ports.service(&root), named), (by_slot, numbered)] {
            let Some(_daemon) = start(kind, &config, 3) else { return };
            let seen: BTreeSet<_> = (0..60).map(|_| served_by(ports.address())).collect();
            assert_eq!(seen, expected.into_iter().collect());
            // A name is nothing to connect to.
            let refused = TcpStream::connect(("127.0.0.1", ports.worker(0))).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        }
    });
}

#[test]
fn how_it_steers_and_why_is_in_the_log_and_the_status() {
    both(2, |kind, ports| {
        let Some(daemon) = start(kind, &http(ports, ""), 2) else { return };
        let line = daemon.wait(Mark::START, "steering", &[("service", "web")]);
        let output = daemon.lbd(&["status", "--json"]);
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let shown = &status["services"][0];
        assert_eq!(shown["route"], "direct");
        assert_eq!(shown["steering"]["kind"], kind.name());
        let why = (kind == Kind::Classic).then_some("lbd has no CAP_BPF");
        assert_eq!(shown["steering"]["why"].as_str(), why);
        assert_eq!(line.get("why"), why);
    });
}

#[test]
fn a_worker_gets_nothing_before_it_accepts() {
    both(2, |kind, ports| {
        let folder = tempfile::tempdir().unwrap();
        let gate = folder.path().join("gate");
        // The second one listens later: its socket is there, and takes connects.
        let late = format!(
            "command = [\"sh\", \"-c\", 'test $LBD_SLOT = 0 && exec \"$0\" http; \
             exec \"$0\" http --gate {}', {:?}]\nroute = \"direct\"\n",
            gate.display(),
            common::fixture(),
        );
        let Some(daemon) = start(kind, &ports.service(&late), 1) else { return };
        let second = ports.worker(1).to_string();
        let second = [("port", &*second)];
        daemon.wait(Mark::START, "worker started", &second);
        only(ports, &[ports.worker(0)]);
        assert_eq!(daemon.workers("web")[1]["state"], "starting");
        fs::write(&gate, "").unwrap();
        daemon.wait(Mark::START, "worker healthy", &second);
        only(ports, &ports.all());
    });
}

#[test]
fn clients_of_a_frozen_worker_are_answered_by_another() {
    both(3, |kind, ports| {
        let health = "health = { http = \"/health\", interval = \"100ms\", timeout = \"200ms\", \
                      fall = 2 }";
        let Some(daemon) = start(kind, &http(ports, health), 3) else { return };
        let frozen = daemon.worker_pid(ports.worker(1));
        freeze(frozen);
        let begun = Instant::now();
        let asked = asking(60, ports.address());
        answered(asked);
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        only(ports, &[ports.worker(0), ports.worker(2)]);
        // Nobody answers its probes in its stead.
        let since = daemon.now();
        let load = Load::start(ports.address(), "/");
        load.more(500);
        assert_eq!(daemon.workers("web")[1]["state"], "unhealthy");
        load.end_without_failure();
        assert!(daemon.said(since, "worker healthy").is_empty());
        thaw(frozen);
        daemon.wait(since, "worker healthy", &[("pid", &frozen.to_string())]);
        only(ports, &ports.all());
    });
}

#[test]
fn what_waits_for_a_worker_that_is_killed_is_answered_by_the_others() {
    both(3, |kind, ports| {
        let Some(daemon) = start(kind, &http(ports, "health.interval = \"1h\""), 3) else {
            return;
        };
        let killed = daemon.worker_pid(ports.worker(0));
        freeze(killed);
        let asked = asking(60, ports.address());
        eventually("some wait for it", || {
            daemon.workers("web")[0]["connections"]["queued"].as_u64().unwrap() > 5
        });
        kill_hard(killed);
        answered(asked);
        daemon.wait_healthy(Mark::START, 4);
        only(ports, &ports.all());
    });
}

#[test]
fn a_worker_killed_under_load_costs_only_what_it_was_answering() {
    both(4, |kind, ports| {
        let Some(daemon) = start(kind, &http(ports, ""), 4) else { return };
        let load = Load::many(50, ports.address(), "/");
        for round in 0..3 {
            let victim = ports.worker(round);
            let since = daemon.now();
            kill_hard(daemon.worker_pid(victim));
            let port = victim.to_string();
            daemon.wait(since, "worker exited", &[("port", &port)]);
            daemon.wait(since, "worker healthy", &[("port", &port)]);
            load.more(500);
        }
        let failures = load.end();
        // Those in its hands: it has a thread for each, and had a quarter of them.
        assert!(failures.len() <= 3 * 25, "{}: {failures:?}", failures.len());
        let cut = ["ConnectionReset", "UnexpectedEof", "BrokenPipe"];
        for failure in failures {
            assert!(cut.iter().any(|cut| failure.error.contains(cut)), "{failure:?}");
        }
    });
}

#[test]
fn clients_wait_while_a_worker_is_on_its_way_and_not_where_none_is() {
    both(1, |kind, ports| {
        let Some(daemon) = start(kind, &http(ports, "hold-timeout = \"20s\""), 1) else { return };
        let old = daemon.worker_pid(ports.worker(0));
        kill_hard(old);
        daemon.wait(Mark::START, "worker exited", &[]);
        assert_ne!(get(ports.address(), "/"), format!("{} {old}", ports.worker(0)));
        // The one that had to wait is the only one that went through lbd.
        daemon.wait(Mark::START, "connection", &[("end", "closed")]);
        turns(ports.address(), 10);
        assert_eq!(daemon.said(Mark::START, "connection").len(), 1);

        assert!(daemon.lbd(&["drain", "web", "0"]).status.success());
        let begun = Instant::now();
        try_get(ports.address(), "/").unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert!(daemon.lbd(&["resume", "web", "0"]).status.success());
        get(ports.address(), "/");
    });
}

#[test]
fn an_operator_drains_a_worker_and_waits_for_its_connections() {
    both(2, |kind, ports| {
        let Some(daemon) = start(kind, &http(ports, ""), 2) else { return };
        // One on each, whichever came first.
        let mut held = Vec::new();
        while !(0..2).all(|slot| held.iter().any(|(_, on)| *on == ports.worker(slot))) {
            let mut client = KeepAlive::new(ports.address());
            let (_, body) = client.get("/").unwrap();
            let on: u16 =
                String::from_utf8(body).unwrap().split(' ').next().unwrap().parse().unwrap();
            held.push((client, on));
        }
        let pid = daemon.worker_pid(ports.worker(0));
        thread::scope(|scope| {
            let drain = scope.spawn(|| daemon.lbd(&["drain", "web", "0", "--wait"]));
            daemon.wait(Mark::START, "draining", &[("why", "operator")]);
            only(ports, &[ports.worker(1)]);
            assert!(!drain.is_finished());
            held.retain(|(_, on)| *on != ports.worker(0));
            let output = drain.join().unwrap();
            assert!(output.status.success(), "{output:?}");
            let said = String::from_utf8(output.stdout).unwrap();
            assert_eq!(said, "web/0: out of rotation, no connection left\n");
        });
        assert!(daemon.lbd(&["resume", "web", "0"]).status.success());
        only(ports, &ports.all());
        assert_eq!(daemon.worker_pid(ports.worker(0)), pid);
    });
}

#[test]
fn reloads_and_rolling_restarts_lose_nothing() {
    both(4, |kind, ports| {
        let few = |count: usize, more: &str| {
            let all = ports.all();
            let keys = format!("{}\nroute = \"direct\"\n{more}", command(&["http"]));
            ports.service_of(&all[..count], &keys)
        };
        let Some(daemon) = start(kind, &few(2, ""), 2) else { return };
        let before = daemon.slot_pids();
        let new = Load::many(10, ports.address(), "/");
        let kept = Load::keep_alive(ports.address(), "/");
        let more = || {
            new.more(200);
            kept.more(200);
        };
        daemon.must_reload(&few(4, ""));
        daemon.wait_healthy(Mark::START, 4);
        more();
        assert_eq!(&daemon.slot_pids()[..2], before);
        only(ports, &ports.all());

        let changed = "env = { NEW = \"1\" }";
        let output = reload(&daemon, &few(4, changed));
        assert!(output.status.success(), "{output:?}");
        more();
        assert!(daemon.slot_pids().iter().all(|pid| !before.contains(pid)));
        assert!(get(ports.address(), "/env").contains("NEW=1"));

        let output = daemon.lbd(&["restart", "web"]);
        assert!(output.status.success(), "{output:?}");
        more();
        daemon.must_reload(&few(1, changed));
        more();
        only(ports, &[ports.worker(0)]);

        // Settings that don't work are rolled back.
        let broken =
            "env = { NEW = \"2\" }\nhealth = { http = \"/no\", start-timeout = \"300ms\" }";
        let output = reload(&daemon, &few(1, broken));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        more();
        new.end_without_failure();
        kept.end_without_failure();
    });
}

fn reload(daemon: &Daemon, config: &str) -> std::process::Output {
    daemon.write_config(config);
    daemon.lbd(&["reload"])
}

#[test]
fn a_service_goes_from_proxy_to_direct_and_back_without_a_failed_request() {
    both(3, |kind, ports| {
        let direct = http(ports, "");
        let proxy = ports.service(&format!("{}\nsocket = \"inherit\"", command(&["http"])));
        let Some(daemon) = start(kind, &direct, 3) else { return };
        let load = Load::many(10, ports.address(), "/");
        for (config, route) in [(&proxy, "proxy"), (&direct, "direct"), (&proxy, "proxy")] {
            let output = reload(&daemon, config);
            assert!(output.status.success(), "{route}: {output:?}");
            load.more(300);
            // Of the load too; what went before is still being told of.
            eventually(&format!("the route is {route}"), || {
                let since = daemon.now();
                assert_eq!(counts(&turns(ports.address(), 60)).len(), 3);
                daemon.said(since, "connection").is_empty() == (route == "direct")
            });
        }
        load.end_without_failure();
    });
}

#[test]
fn an_address_that_goes_to_another_service_is_served_at_once_and_so_when_it_comes_back() {
    both(2, |kind, ports| {
        let (other, api) = (Ports::take(0), Ports::take(1));
        let (moving, own) = (ports.address(), other.address());
        let direct = |addresses: &[SocketAddr]| {
            let listen: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            format!(
                "[service.web]\nlisten = {listen:?}\nports = {:?}\nroute = \"direct\"\n\
                 rollout.settle = \"3s\"\n{}\n",
                ports.all(),
                command(&["http"])
            )
        };
        let proxied = format!(
            "[service.api]\nlisten = \"{moving}\"\nports = {:?}\n{}\n",
            api.all(),
            command(&["http"])
        );
        let Some(daemon) = start(kind, &direct(&[moving, own]), 2) else { return };
        // The old workers of "web" have sockets there until each has a proven successor.
        daemon.must_reload(&format!("{}{proxied}", direct(&[own])));
        daemon.wait(Mark::START, "worker healthy", &[("service", "api")]);
        for _ in 0..20 {
            let began = Instant::now();
            assert_eq!(get(moving, "/argv"), "http");
            // A SYN that is dropped is sent again after a second.
            assert!(began.elapsed() < Duration::from_millis(900), "{:?}", began.elapsed());
        }
        daemon.must_reload(&direct(&[moving, own]));
        eventually("the kernel hands them out again", || {
            let since = daemon.now();
            (0..10).for_each(|_| assert_eq!(get(moving, "/argv"), "http"));
            daemon.said(since, "connection").is_empty()
        });
    });
}

#[test]
fn addresses_come_and_go() {
    both(2, |kind, ports| {
        let other = Ports::take(0);
        let on = |addresses: &[SocketAddr]| {
            let listen: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            format!(
                "[service.web]\nlisten = {listen:?}\nports = {:?}\nroute = \"direct\"\n{}\n",
                ports.all(),
                command(&["http"])
            )
        };
        let (one, two) = (ports.address(), other.address());
        let Some(daemon) = start(kind, &on(&[one]), 2) else { return };
        let load = Load::start(one, "/");
        for _ in 0..2 {
            // The fixture accepts from the first one: the other is served by nobody but lbd.
            let output = reload(&daemon, &on(&[one, two]));
            assert!(output.status.success(), "{output:?}");
            let output = reload(&daemon, &on(&[one]));
            assert!(output.status.success(), "{output:?}");
            load.more(50);
        }
        load.end_without_failure();
        let limit = Duration::from_millis(200);
        eventually("nobody is there", || {
            let connected = TcpStream::connect_timeout(&two, limit);
            connected.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        });
    });
}

#[test]
fn several_addresses_of_both_families_are_served() {
    both(0, |kind, ports| {
        let port = ports.address().port();
        let config = format!(
            "[service.web]\nlisten = [\"127.0.0.1:{port}\", \"[::1]:{port}\"]\nroot = {:?}\n\
             workers = 3\nroute = \"direct\"\n",
            www()
        );
        let Some(daemon) = start(kind, &config, 3) else { return };
        let v6: SocketAddr = format!("[::1]:{port}").parse().unwrap();
        for address in [ports.address(), v6] {
            for _ in 0..12 {
                assert_eq!(KeepAlive::new(address).get("/page.html").unwrap().0, 200);
            }
        }
        let workers = daemon.workers("web");
        if kind == Kind::Ebpf {
            let total =
                |worker: &serde_json::Value| worker["connections"]["total"].as_u64().unwrap();
            assert_eq!(workers.iter().map(total).collect::<Vec<_>>(), [8; 3]);
        }
        let load = Load::start(v6, "/page.html");
        kill_hard(daemon.slot_pids()[1]);
        daemon.wait_healthy(Mark::START, 4);
        load.more(100);
        assert!(load.end().len() <= Load::CLIENTS);
    });
}

#[test]
fn a_stop_waits_for_what_is_in_flight_and_leaves_nothing() {
    both(2, |kind, ports| {
        let Some(mut daemon) = start(kind, &http(ports, ""), 2) else { return };
        let gate = file(&daemon, "answer");
        let mut slow: Vec<_> = (0..4).map(|_| KeepAlive::new(ports.address())).collect();
        for client in &mut slow {
            client.send(&format!("/when{gate}")).unwrap();
        }
        eventually("they are in flight", || {
            let active = |worker: &serde_json::Value| worker["connections"]["active"].as_u64();
            daemon.workers("web").iter().filter_map(active).sum::<u64>() == 4
        });
        daemon.signal(Signal::SIGTERM);
        daemon.wait(Mark::START, "stopping", &[]);
        let draining = daemon.wait(Mark::START, "draining", &[("service", "web")]);
        assert_eq!(draining.get("connections"), Some("4"));
        assert!(daemon.said(Mark::START, "worker exited").is_empty());
        fs::write(&gate, "").unwrap();
        for client in &mut slow {
            assert_eq!(client.answer().unwrap().0, 200);
        }
        drop(slow);
        daemon.wait_stopped();
        assert!(TcpStream::connect(ports.address()).is_err());
    });
}

#[test]
fn a_stop_under_load_fails_no_request_of_the_built_in_worker() {
    both(0, |kind, ports| {
        let config = format!(
            "[service.web]\nlisten = \"{}\"\nroot = {:?}\nworkers = 3\nroute = \"direct\"\n",
            ports.address(),
            www()
        );
        let Some(mut daemon) = start(kind, &config, 3) else { return };
        let all = Arc::new(AtomicUsize::new(0));
        let clients: Vec<_> = (0..8)
            .map(|_| {
                let (address, all) = (ports.address(), Arc::clone(&all));
                thread::spawn(move || {
                    let mut answered = 0;
                    // A client is refused in the end, or comes again later: never cut off.
                    while let Ok(stream) =
                        TcpStream::connect_timeout(&address, Duration::from_millis(500))
                    {
                        let answer = KeepAlive::over(stream).get("/page.html");
                        assert_eq!(answer.expect("a whole answer").0, 200);
                        answered += 1;
                        all.fetch_add(1, Ordering::Relaxed);
                    }
                    answered
                })
            })
            .collect();
        eventually("in the middle of it", || all.load(Ordering::Relaxed) > 400);
        daemon.signal(Signal::SIGTERM);
        daemon.wait_stopped();
        for client in clients {
            assert!(client.join().unwrap() > 0);
        }
    });
}

#[test]
fn the_numbers_are_those_that_can_be_known() {
    both(2, |kind, ports| {
        let Some(daemon) = start(kind, &with_admin(&http(ports, "")), 2) else { return };
        turns(ports.address(), 10);
        let _held: Vec<_> = (0..6)
            .map(|_| {
                let mut client = KeepAlive::new(ports.address());
                client.get("/").unwrap();
                client
            })
            .collect();
        eventually("they are counted", || {
            let active = |worker: &serde_json::Value| worker["connections"]["active"].as_u64();
            daemon.workers("web").iter().filter_map(active).sum::<u64>() == 6
        });
        let metrics = Metrics::of(&daemon);
        for worker in daemon.workers("web") {
            let total = worker["connections"]["total"].as_u64();
            assert_eq!(total, (kind == Kind::Ebpf).then_some(8), "{worker}");
            assert_eq!(worker["connections"]["queued"], 0);
            assert!(worker["bytes"]["sent"].is_null() && worker["bytes"]["received"].is_null());
            let series = |name: &str| {
                metrics.get(&format!("{name}{{service=\"web\",slot=\"{}\"}}", worker["slot"]))
            };
            assert_eq!(series("lbd_connections_total"), total.map(|total| total as f64));
            assert_eq!(series("lbd_sent_bytes_total"), None);
            assert_eq!(series("lbd_connections_queued"), Some(0.0));
            assert!(series("lbd_connections_active").is_some());
        }
        let table = String::from_utf8(daemon.lbd(&["status"]).stdout).unwrap();
        assert!(table.contains("healthy"), "{table}");
    });
}

#[test]
fn a_client_keeps_its_worker_with_source_hash() {
    both(3, |kind, ports| {
        let config = http(ports, "balance = \"source-hash\"");
        let Some(daemon) = start(kind, &config, 3) else { return };
        let home = port(ports.address());
        assert_eq!(turns(ports.address(), 20), [home; 20]);
        let slot = ports.all().iter().position(|port| *port == home).unwrap();
        let slot = slot.to_string();
        assert!(daemon.lbd(&["drain", "web", &slot]).status.success());
        let away = port(ports.address());
        assert_ne!(away, home);
        assert_eq!(turns(ports.address(), 20), [away; 20]);
        assert!(daemon.lbd(&["resume", "web", &slot]).status.success());
        assert_eq!(turns(ports.address(), 20), [home; 20]);
        daemon.must_reload(&http(ports, ""));
        only(ports, &ports.all());
    });
}

/// Whether a program is on this machine: one that is missing is said to be.
fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        eprintln!("NOT TESTED: no {program}");
    }
    found
}

/// Each worker of `program` answers requests with its slot.
fn served_by_slots(kind: Kind, program: &str, address: SocketAddr) {
    let config = format!(
        "[service.web]\nlisten = \"{address}\"\nworkers = 3\nroute = \"direct\"\n{program}\n"
    );
    let Some(daemon) = start(kind, &config, 3) else { return };
    let slot = || {
        let mut client = connect(address);
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer.rsplit("slot ").next().unwrap().trim().to_owned()
    };
    let seen: BTreeSet<String> = (0..60).map(|_| slot()).collect();
    assert_eq!(seen, ["0", "1", "2"].map(str::to_owned).into());
    let output = daemon.lbd(&["restart", "web"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!((0..60).map(|_| slot()).collect::<BTreeSet<_>>(), seen);
}

#[test]
fn node_accepts_from_descriptor_3() {
    if !has("node") {
        return;
    }
    both(0, |kind, ports| {
        let serve = "require(`http`).createServer((_, a) => a.end(`slot ` + process.env.LBD_SLOT))\
                     .listen({ fd: 3 })";
        let program = format!("command = [\"node\", \"-e\", \"{serve}\"]");
        served_by_slots(kind, &program, ports.address());
    });
}

#[test]
fn pythons_asyncio_accepts_from_descriptor_3() {
    if !has("python3") {
        return;
    }
    both(0, |kind, ports| {
        let serve = r#"
import asyncio, os, socket
async def answer(reader, writer):
    await reader.readuntil(b"\r\n\r\n")
    body = ("slot " + os.environ["LBD_SLOT"]).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)
    await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(answer, sock=socket.socket(fileno=3))
    await server.serve_forever()
asyncio.run(main())
"#;
        let program = format!("command = [\"python3\", \"-c\", '''{serve}''']");
        served_by_slots(kind, &program, ports.address());
    });
}

/// A network of its own for this thread and what it starts, where the kernel moves queued connections
/// by itself, or does not. `None` where there can't be one.
fn network(moves: bool) -> Option<()> {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
        eprintln!("NOT TESTED: no network namespace: {error}");
        return None;
    }
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
    assert!(up.success());
    fs::write("/proc/sys/net/ipv4/tcp_migrate_req", if moves { "1" } else { "0" }).unwrap();
    Some(())
}

#[test]
fn nothing_is_lost_whatever_the_kernel_does_with_queues() {
    for moves in [true, false] {
        // The setting is the thread's network's.
        thread::scope(|scope| {
            scope.spawn(|| {
                if network(moves).is_none() {
                    return;
                }
                both(4, |kind, ports| {
                    let Some(daemon) = start(kind, &http(ports, ""), 4) else { return };
                    let load = Load::many(20, ports.address(), "/");
                    for _ in 0..3 {
                        let output = daemon.lbd(&["restart", "web"]);
                        assert!(output.status.success(), "{output:?}");
                        load.more(200);
                    }
                    load.end_without_failure();
                    let killed = daemon.slot_pids()[0];
                    freeze(killed);
                    let asked = asking(40, ports.address());
                    kill_hard(killed);
                    answered(asked);
                });
            });
        });
    }
}

#[test]
fn a_taken_address_ends_the_start_and_leaves_no_trace() {
    both(1, |kind, ports| {
        let holder = std::net::TcpListener::bind(ports.address()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("lb.toml"), http(ports, "")).unwrap();
        let mut daemon = Daemon::spawn(folder, &["--config", "lb.toml"]);
        assert_eq!(daemon.wait_exit().code(), Some(1));
        drop(holder);
        assert!(start(kind, &http(ports, ""), 1).is_some() || kind == Kind::Ebpf);
    });
}
