//! Clients that wait for a worker: in turn, as long as they were promised, and at no cost to others.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::Path,
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
    client::{KeepAlive, connect, get, is_turned_away},
    command, eventually, fixture, named,
    needs::{self, NETWORKS},
    proc::{cpu, descriptors, is_listened_on},
    stays,
};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::Signal::{SIGQUIT, SIGTERM},
};

/// The first probe is the only one: no other is in a worker's queue.
const ONE_PROBE: &str = "health.interval = \"1h\"";

/// So many clients come one after the other, and ask. In which order they were answered, and all that
/// went wrong.
fn burst(address: SocketAddr, clients: usize) -> (Vec<usize>, Vec<String>) {
    let turn = Arc::new(AtomicUsize::new(0));
    let ask = |_| {
        let mut client = KeepAlive::new(address);
        client.send("/").unwrap();
        let turn = Arc::clone(&turn);
        thread::spawn(move || {
            let answer = client.answer();
            let turn = turn.fetch_add(1, Ordering::Relaxed);
            answer.map(|_| turn).map_err(|error| error.to_string())
        })
    };
    let asking: Vec<_> = (0..clients).map(ask).collect();
    let (mut turns, mut failures) = (Vec::new(), Vec::new());
    for client in asking {
        match client.join().unwrap() {
            Ok(turn) => turns.push(turn),
            Err(error) => failures.push(error),
        }
    }
    (turns, failures)
}

#[test]
fn a_burst_that_the_workers_queues_have_no_room_for_waits_in_turn() {
    for (socket, clients, millis) in [("bind", 60, 100), ("bind", 200, 20), ("unix", 200, 20)] {
        let ports = Ports::take(2);
        let slow = command(&["slow", &millis.to_string(), "5"]);
        let keys = format!("{slow}\nhold-timeout = \"30s\"\n{ONE_PROBE}");
        let service = match socket {
            "bind" => ports.service(&keys),
            _ => format!(
                "[service.web]\nlisten = \"{}\"\nworkers = 2\nsocket = \"unix\"\n{keys}",
                ports.address()
            ),
        };
        let daemon = Daemon::healthy(&service, 2);
        // Both accept: their sockets are as they are to be.
        for _ in 0..2 {
            get(ports.address(), "/");
        }
        let begun = Instant::now();
        let (turns, failures) = burst(ports.address(), clients);
        let took = begun.elapsed();
        assert!(failures.is_empty(), "{socket}, {clients}: {failures:?}");
        // None is far from its turn, but for a few at the beginning: the workers take them out of
        // their own queues side by side, and it takes a moment to notice that these are full.
        let astray = |(came, turn): &(usize, &usize)| came.abs_diff(**turn) > 24;
        let astray = turns.iter().enumerate().filter(astray).count();
        assert!(astray <= clients / 20, "{socket}, {clients}: {astray} in {turns:?}");
        // And the workers are kept busy.
        let least = Duration::from_millis(clients as u64 * millis / 2);
        assert!(took < least * 2 + Duration::from_secs(1), "{socket}, {clients}: {took:?}");
        let line = daemon.wait(Mark::START, "clients wait", &[("service", "web")]);
        assert_eq!(line.get("short_of"), Some("the workers' accept queues"), "{}", line.raw);
        assert_eq!(daemon.said(Mark::START, "clients wait").len(), 1);
    }
}

#[test]
fn whose_turn_does_not_come_within_the_hold_timeout_is_told_so() {
    let ports = Ports::take(1);
    let keys =
        format!("{}\nhold-timeout = \"500ms\"\n{ONE_PROBE}", command(&["slow", "5000", "1"]));
    let daemon = Daemon::healthy(&ports.service(&keys), 1);
    // One is being answered, and two wait in the worker's own queue.
    let _first: Vec<_> = common::client::asking(3, ports.address());
    eventually("they are at the worker", || daemon.workers("web")[0]["connections"]["total"] == 3);
    let begun = Instant::now();
    assert!(is_turned_away(ports.address()));
    assert!((400..3_000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    let line = daemon.wait(Mark::START, "connection", &[("end", "hold-timeout")]);
    assert!(line.number::<f64>("duration") >= 0.5, "{}", line.raw);
}

/// A worker that exits as long as there is no such file.
fn crashing(file: &Path) -> String {
    let script = format!("[ -e {} ] && exec {} http; exit 3", file.display(), fixture());
    format!("command = [\"sh\", \"-c\", {script:?}]\nrestart.max-delay = \"300ms\"")
}

/// The processor time that lbd uses within three seconds, in which another service is asked all the
/// time, and the slowest answer of that one.
fn cost(daemon: &Daemon, other: SocketAddr) -> (Duration, Duration) {
    let (before, begun) = (cpu(daemon.pid()), Instant::now());
    let mut slowest = Duration::ZERO;
    while begun.elapsed() < Duration::from_secs(3) {
        let asked = Instant::now();
        get(other, "/");
        slowest = slowest.max(asked.elapsed());
        thread::sleep(Duration::from_millis(10));
    }
    (cpu(daemon.pid()) - before, slowest)
}

#[test]
fn thousands_that_wait_cost_next_to_nothing() {
    const HELD: usize = 4_000;
    // It stays so for other tests, which are none the worse for it.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    assert!(most > 2 * HELD as u64, "a test of {HELD} connections with {most} descriptors");
    let (held, other) = (Ports::take(4), Ports::take(1));
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("gate");
    let keys = format!("{}\nhold-timeout = \"60s\"", crashing(&gate));
    let config =
        format!("{}\n{}", held.service(&keys), named("other", &other.service(&command(&["http"]))));
    let daemon = Daemon::start_in(folder, &config);
    daemon.wait_healthy(Mark::START, 1);
    let (without, slowest_without) = cost(&daemon, other.address());
    let clients: Vec<_> = (0..HELD).map(|_| connect(held.address())).collect();
    eventually("they wait", || descriptors(daemon.pid()) > HELD);

    let restarts = || {
        let of = |worker: &serde_json::Value| worker["restarts"].as_u64().unwrap();
        daemon.workers("web").iter().map(of).sum::<u64>()
    };
    let before = restarts();
    let (with, slowest) = cost(&daemon, other.address());
    let crashes = restarts() - before;
    assert!(crashes > 8, "{crashes}");
    println!("{without:?} and {slowest_without:?} without, {with:?} and {slowest:?} with them");
    // It takes several times as long where each of them is looked at with each start of a worker.
    assert!(with < 2 * without + Duration::from_millis(200), "{with:?}, and {without:?} without");

    File::create(gate).unwrap();
    for client in clients {
        let mut client = KeepAlive::over(client);
        assert_eq!(client.get("/").unwrap().0, 200);
    }
}

#[test]
fn whoever_waits_as_lbd_is_asked_to_stop_is_served_when_the_worker_comes() {
    for is_in_backoff in [false, true] {
        let ports = Ports::take(1);
        let folder = tempfile::tempdir().unwrap();
        let gate = folder.path().join("gate");
        let program = match is_in_backoff {
            true => crashing(&gate),
            false => command(&["http", "--gate", gate.to_str().unwrap()]),
        };
        let keys = format!("{program}\nhold-timeout = \"30s\"");
        let mut daemon = Daemon::start_in(folder, &ports.service(&keys));
        daemon.wait(Mark::START, "worker started", &[]);
        let asking = common::client::asking(10, ports.address());
        let since = daemon.now();
        daemon.signal(SIGTERM);
        daemon.wait(since, "stopping", &[]);
        let port = ports.address().port();
        eventually("its listener is emptied and gone", || !is_listened_on(port));
        File::create(gate).unwrap();
        common::client::answered(asking);
        daemon.wait_stopped();
    }
}

#[test]
fn whoever_waits_as_lbd_stops_waits_no_longer_than_promised_or_until_it_stops_at_once() {
    for at_once in [false, true] {
        let ports = Ports::take(1);
        let hold = if at_once { "60s" } else { "1s" };
        let keys = format!("{}\nhold-timeout = \"{hold}\"", command(&["silent"]));
        let mut daemon = Daemon::start(&ports.service(&keys));
        daemon.wait(Mark::START, "worker started", &[]);
        let mut client = connect(ports.address());
        // It is accepted once its listener is empty, which the stop waits for.
        daemon.signal(SIGTERM);
        daemon.wait(Mark::START, "stopping", &[]);
        if at_once {
            daemon.signal(SIGQUIT);
        }
        let error = client.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        daemon.wait_stopped();
        let end = if at_once { "no-worker" } else { "hold-timeout" };
        daemon.wait(Mark::START, "connection", &[("end", end)]);
    }
}

#[test]
fn the_idle_clients_of_one_service_leave_another_its_share() {
    let (idle, other) = (Ports::take(1), Ports::take(1));
    let config = |services: &[&str]| services.join("\n");
    let web = idle.service(&command(&["http"]));
    let second = named("other", &other.service(&command(&["http"])));
    let daemon = Daemon::with_descriptors(256, &config(&[&web, &second]));
    daemon.wait_healthy(Mark::START, 2);
    let clients: Vec<_> = (0..160).map(|_| connect(idle.address())).collect();
    let line = daemon.wait(Mark::START, "clients wait", &[("service", "web")]);
    assert_eq!(line.get("short_of"), Some("descriptors"), "{}", line.raw);
    assert!(line.get("hint").unwrap().contains("LimitNOFILE"), "{}", line.raw);
    for _ in 0..3 {
        let begun = Instant::now();
        get(other.address(), "/");
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }
    // It was said once, and is not said anew for each that comes and goes.
    drop(clients);
    get(idle.address(), "/");
    let clients: Vec<_> = (0..160).map(|_| connect(idle.address())).collect();
    get(other.address(), "/");
    assert_eq!(daemon.said(Mark::START, "clients wait").len(), 1);

    // One that a reload adds has its share as soon as others leave.
    let third = Ports::take(1);
    let added = named("third", &third.service(&command(&["http"])));
    daemon.must_reload(&config(&[&web, &second, &added]));
    daemon.wait_healthy(Mark::START, 3);
    drop(clients.into_iter().take(100).collect::<Vec<_>>());
    get(third.address(), "/");
}

#[test]
fn a_limit_that_makes_clients_wait_is_named() {
    for (key, number) in [("max-connections", 2), ("limits.max-connections", 3)] {
        let ports = Ports::take(1);
        let keys = format!("{}\n{key} = {number}", command(&["http"]));
        let daemon = Daemon::healthy(&ports.service(&keys), 1);
        let mut clients: Vec<_> = (0..number).map(|_| KeepAlive::new(ports.address())).collect();
        clients.iter_mut().for_each(|client| assert_eq!(client.get("/").unwrap().0, 200));
        assert_eq!(daemon.said(Mark::START, "clients wait").len(), 0);
        let mut late = KeepAlive::new(ports.address());
        late.send("/").unwrap();
        let line = daemon.wait(Mark::START, "clients wait", &[("service", "web")]);
        assert_eq!(line.get("short_of"), Some(key), "{}", line.raw);
        assert_eq!(line.number::<u32>("limit"), number, "{}", line.raw);
        drop(clients);
        assert_eq!(late.answer().unwrap().0, 200);
    }
}

#[test]
fn without_a_local_port_clients_wait_and_nothing_is_the_workers_fault() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("web.sock");
    let config = format!(
        "[service.web]\nlisten = \"unix:{}\"\nports = {:?}\n{}\n{ONE_PROBE}",
        socket.display(),
        ports.all(),
        command(&["http"])
    );
    fs::write(folder.path().join("lb.toml"), config).unwrap();
    let script = "ip link set lo up && echo 40000 40199 > /proc/sys/net/ipv4/ip_local_port_range \
                  && exec \"$0\" --config lb.toml";
    let possible =
        Command::new("unshare").args(["--net", "ip", "link", "set", "lo", "up"]).output();
    if !possible.is_ok_and(|output| output.status.success()) {
        return needs::missing(NETWORKS, "no network of its own can be made");
    }
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", script, env!("CARGO_BIN_EXE_lbd")]);
    let daemon = Daemon::run(folder, command);
    daemon.wait_healthy(Mark::START, 1);
    let ask = |_| {
        let client = UnixStream::connect(&socket).unwrap();
        client.set_read_timeout(Some(common::PATIENCE)).unwrap();
        (&client).write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        client
    };
    let answered = |client: &UnixStream| {
        let mut some = [0; 12];
        (&*client).read_exact(&mut some).unwrap();
        assert_eq!(&some, b"HTTP/1.1 200");
    };
    // One after the other, so that the worker's queue has room; a probe may still have a port.
    let clients: Vec<_> = (0..199).map(ask).inspect(answered).collect();
    let late: Vec<_> = (0..40).map(ask).collect();
    let line = daemon.wait(Mark::START, "clients wait", &[("service", "web")]);
    assert_eq!(line.get("short_of"), Some("local ports"), "{}", line.raw);
    assert!(line.get("hint").unwrap().contains("socket = \"unix\""), "{}", line.raw);
    stays("they all wait", Duration::from_millis(700), || {
        daemon.said(Mark::START, "connection").is_empty()
    });
    assert_eq!(daemon.workers("web")[0]["connections"]["failed"], 0);
    drop(clients);
    late.iter().for_each(answered);
}
