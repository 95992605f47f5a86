//! Which worker a connection goes to, and what its client sees.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    self, Daemon, Mark, PATIENCE, Ports,
    client::{KeepAlive, connect, counts, get, is_turned_away, port, try_get, turns},
    command, eventually, kill_hard, needs,
};
use socket2::{Domain, SockRef, Socket, Type};

/// Not probed again after the first time.
const ONE_PROBE: &str = "health.interval = \"1h\"";

#[test]
fn sequential_connections_go_round_exactly() {
    let ports = Ports::take(4);
    let daemon = Daemon::healthy(&ports.service(&command(&["http"])), 4);
    let expected: Vec<_> = ports.all().into_iter().cycle().take(40).collect();
    assert_eq!(turns(ports.address(), 40), expected);
    // Each was logged, at its end: in whatever order the ends came.
    let lines = daemon.wait_many(Mark::START, "connection", &[("end", "closed")], 40);
    let logged: Vec<u16> = lines.iter().map(|line| line.number("port")).collect();
    assert_eq!(counts(&logged), counts(&expected));
}

#[test]
fn the_rotation_is_one_for_all_data_threads() {
    let ports = Ports::take(3);
    let _daemon = Daemon::healthy(&ports.service(&command(&["http"])), 3);
    let address = ports.address();
    let clients: Vec<_> = (0..4).map(|_| thread::spawn(move || turns(address, 30))).collect();
    let all: Vec<_> = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
    assert_eq!(counts(&all), ports.all().into_iter().map(|port| (port, 40)).collect());
}

/// How many connections each data thread holds. It waits for both of a connection's sockets, and for
/// the listener at `address`, with an epoll instance of its own, which says so in proc(5).
fn held_by_thread(pid: i32, address: SocketAddr) -> Vec<usize> {
    // "sl  local_address rem_address   st …", an inode in the tenth column, and 0A for a listener.
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let port = format!(":{:04X}", address.port());
    let rows = table.lines().map(|row| row.split_whitespace().collect::<Vec<_>>());
    let is_listener = |row: &Vec<&str>| row[1].ends_with(&port) && row[3] == "0A";
    let inode = rows.skip(1).find(is_listener).unwrap()[9].parse::<u64>().unwrap();
    let files = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let infos = files.filter_map(|file| fs::read_to_string(file.unwrap().path()).ok());
    infos
        .filter(|info| info.contains(&format!(" ino:{inode:x} ")))
        .map(|info| info.lines().filter(|line| line.starts_with("tfd:")).count() / 2 - 1)
        .collect()
}

#[test]
fn connections_that_come_slowly_are_spread_over_the_data_threads() {
    let ports = Ports::take(2);
    let daemon = Daemon::healthy(&ports.service(&command(&["http"])), 2);
    let mut clients = Vec::new();
    for _ in 0..24 {
        // Each finds all threads waiting.
        let mut client = KeepAlive::new(ports.address());
        assert_eq!(client.get("/").unwrap().0, 200);
        clients.push(client);
    }
    let held = held_by_thread(daemon.pid(), ports.address());
    assert_eq!(held.iter().sum::<usize>(), 24, "{held:?}");
    let (least, most) = (held.iter().min().unwrap(), held.iter().max().unwrap());
    assert!(most - least <= 2, "{held:?}");
    let cores = thread::available_parallelism().unwrap().get();
    assert_eq!(held.len(), cores, "a thread for each core");
}

#[test]
fn least_connections_go_to_who_has_least() {
    let ports = Ports::take(3);
    let keys = format!("balance = \"least-connections\"\n{}", command(&["http"]));
    let daemon = Daemon::healthy(&ports.service(&keys), 3);
    // Held open, six are two for each.
    let mut held: Vec<_> = (0..6).map(|_| KeepAlive::new(ports.address())).collect();
    let mut port_of = |client: &mut KeepAlive| -> u16 {
        let body = String::from_utf8(client.get("/").unwrap().1).unwrap();
        body.split(' ').next().unwrap().parse().unwrap()
    };
    let taken: Vec<_> = held.iter_mut().map(&mut port_of).collect();
    assert_eq!(counts(&taken), ports.all().into_iter().map(|port| (port, 2)).collect());
    // The one that lost one gets the next, whoever's turn it is.
    for lost in [4, 0, 2] {
        let address = held[lost].stream().local_addr().unwrap().to_string();
        held[lost].stream().shutdown(Shutdown::Both).unwrap();
        daemon.wait(Mark::START, "connection", &[("client", &address)]);
        held[lost] = KeepAlive::new(ports.address());
        assert_eq!(port_of(&mut held[lost]), taken[lost]);
    }
}

#[test]
fn source_hash_sticks() {
    let ports = Ports::take(4);
    let keys = format!("balance = \"source-hash\"\n{}", command(&["http"]));
    let _daemon = Daemon::healthy(&ports.service(&keys), 4);
    let from = |last: u8| -> u16 {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, last], 0)).into()).unwrap();
        socket.connect(&ports.address().into()).unwrap();
        let mut stream = TcpStream::from(socket);
        stream.write_all(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.lines().last().unwrap().split(' ').next().unwrap().parse().unwrap()
    };
    let first: Vec<_> = (1..=32).map(from).collect();
    let second: Vec<_> = (1..=32).map(from).collect();
    assert_eq!(first, second);
    assert_eq!(counts(&first).len(), 4, "{first:?}");
}

#[test]
fn a_worker_that_refuses_the_connect_is_skipped() {
    let ports = Ports::take(3);
    // It listens until it is told not to, and lives on: only the connect tells.
    let keys = format!(
        "command = [\"sh\", \"-c\", \"\"\"[ {{slot}} = 1 ] && exec {0} closing stop || exec {0} http\"\"\"]\n{ONE_PROBE}",
        common::fixture()
    );
    let daemon = Daemon::healthy(&ports.service(&keys), 3);
    daemon.tell_worker("stop");
    let others = counts(&turns(ports.address(), 12));
    assert_eq!(others.keys().copied().collect::<Vec<_>>(), [ports.worker(0), ports.worker(2)]);
    assert_eq!(others.values().sum::<usize>(), 12);
    assert!(daemon.said(Mark::START, "worker exited").is_empty());
}

#[test]
fn a_worker_that_stalls_the_connect_is_skipped() {
    let ports = Ports::take(2);
    let keys = format!(
        "command = [\"sh\", \"-c\", \"\"\"[ {{slot}} = 0 ] && exec {0} stalling stop || exec {0} http\"\"\"]\n\
         connect-timeout = \"50ms\"\n{ONE_PROBE}",
        common::fixture()
    );
    let daemon = Daemon::healthy(&ports.service(&keys), 2);
    daemon.tell_worker("stop");
    assert_eq!(turns(ports.address(), 6), [ports.worker(1); 6]);
}

#[test]
fn clients_are_held_while_a_worker_is_on_its_way() {
    let ports = Ports::take(2);
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("gate");
    let words = ["http", "--gate", gate.to_str().unwrap()];
    let daemon = Daemon::start_in(folder, &ports.service(&command(&words)));
    daemon.wait_many(Mark::START, "worker started", &[], 2);
    let address = ports.address();
    let clients: Vec<_> = (0..8).map(|_| thread::spawn(move || get(address, "/"))).collect();
    // Nobody is answered or sent away before there is a worker.
    let mut early = connect(address);
    early.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert_eq!(early.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert!(clients.iter().all(|client| !client.is_finished()));
    fs::write(gate, "").unwrap();
    for client in clients {
        client.join().unwrap();
    }
}

#[test]
fn clients_are_held_when_the_last_worker_died() {
    let ports = Ports::take(1);
    let keys = format!("{}\nrestart.min-delay = \"200ms\"", command(&["http"]));
    let daemon = Daemon::healthy(&ports.service(&keys), 1);
    let mut pid = daemon.worker_pid(ports.worker(0));
    for restart in 1..=3 {
        kill_hard(pid);
        let exits = daemon.wait_many(Mark::START, "worker exited", &[], restart);
        // In backoff at this moment.
        assert!(exits[restart - 1].number::<f64>("restart_in") >= 0.2);
        get(ports.address(), "/");
        let started = daemon.wait_many(Mark::START, "worker started", &[], restart + 1);
        pid = started[restart].pid();
    }
}

#[test]
fn a_held_client_is_let_go_after_the_hold_timeout() {
    let ports = Ports::take(1);
    let keys = format!("{}\nhold-timeout = \"300ms\"", command(&["silent"]));
    let daemon = Daemon::start(&ports.service(&keys));
    daemon.wait(Mark::START, "worker started", &[]);
    let begun = Instant::now();
    assert!(is_turned_away(ports.address()));
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    daemon.wait(Mark::START, "connection", &[("end", "hold-timeout"), ("worker", "-")]);
}

#[test]
fn with_no_worker_to_come_clients_are_closed_at_once() {
    let ports = Ports::take(1);
    let keys = format!(
        "{}\nhold-timeout = \"5s\"\nrestart.min-delay = \"1h\"\nrestart.max-delay = \"1h\"",
        command(&["exit", "3"])
    );
    let daemon = Daemon::start(&ports.service(&keys));
    let line = daemon.wait(Mark::START, "worker exited", &[]);
    assert_eq!(line.get("status"), Some("exit status 3"), "{}", line.raw);
    assert!(is_turned_away(ports.address()));
    let line = daemon.wait(Mark::START, "connection", &[("end", "no-worker")]);
    assert!(line.number::<f64>("duration") < 1.0, "{}", line.raw);
}

#[test]
fn a_connection_without_bytes_ends_at_the_idle_timeout() {
    let ports = Ports::take(1);
    let keys = format!("{}\nidle-timeout = \"300ms\"", command(&["echo"]));
    let daemon = Daemon::healthy(&ports.service(&keys), 1);
    let mut client = connect(ports.address());
    client.write_all(b"a").unwrap();
    client.read_exact(&mut [0]).unwrap();
    let begun = Instant::now();
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "an end, and no reset");
    assert!(begun.elapsed() >= Duration::from_millis(250), "{:?}", begun.elapsed());
    let line = daemon.wait(Mark::START, "connection", &[("end", "idle")]);
    assert_eq!((line.get("sent"), line.get("received")), (Some("1"), Some("1")));
}

#[test]
fn a_node_server_without_an_error_listener_survives_the_end_of_an_idle_client() {
    if !needs::has(needs::APPS, "node", "nodejs") {
        return;
    }
    let ports = Ports::take(1);
    let server = "require('net').createServer(s => { s.write('hello'); s.on('data', d => s.write(d)) })\
                  .listen(process.env.PORT, '127.0.0.1')";
    let keys =
        format!("command = [\"node\", \"-e\", {server:?}]\nidle-timeout = \"400ms\"\n{ONE_PROBE}");
    let daemon = Daemon::healthy(&ports.service(&keys), 1);
    let (mut idle, mut active) = (connect(ports.address()), connect(ports.address()));
    idle.read_exact(&mut [0; 5]).unwrap();
    active.read_exact(&mut [0; 5]).unwrap();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1_500) {
        active.write_all(b"x").unwrap();
        active.read_exact(&mut [0]).unwrap();
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(idle.read(&mut [0]).unwrap(), 0);
    daemon.wait(Mark::START, "connection", &[("end", "idle")]);
    assert!(daemon.said(Mark::START, "worker exited").is_empty());
}

#[test]
fn an_end_without_an_answer_is_called_one() {
    let ports = Ports::take(1);
    let daemon = Daemon::healthy(&ports.service(&command(&["forget"])), 1);
    let mut client = connect(ports.address());
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "an end, and no reset");
    drop(client);
    let line = daemon.wait(Mark::START, "connection", &[("end", "no-answer")]);
    assert_eq!((line.get("sent"), line.get("received")), (Some("0"), Some("18")));
    assert_eq!(daemon.workers("web")[0]["connections"]["total"], 1);
    // Who has ended first waits for none: so does a sender of data.
    let since = daemon.now();
    let mut client = connect(ports.address());
    client.write_all(b"data").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    daemon.wait(since, "connection", &[("end", "closed")]);
}

#[test]
fn a_client_that_ends_its_side_still_gets_its_answer() {
    let ports = Ports::take(1);
    let _daemon = Daemon::healthy(&ports.service(&command(&["echo"])), 1);
    let mut client = connect(ports.address());
    let sent: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    let mut writer = client.try_clone().unwrap();
    let copy = sent.clone();
    let writer = thread::spawn(move || {
        writer.write_all(&copy).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    client.read_to_end(&mut received).unwrap();
    writer.join().unwrap();
    assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
}

#[test]
fn a_worker_that_ends_its_side_still_hears_its_client() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let heard = folder.path().join("heard");
    let words = ["hear", heard.to_str().unwrap()];
    let daemon =
        Daemon::start_in(folder, &ports.service(&format!("{}\n{ONE_PROBE}", command(&words))));
    daemon.wait_healthy(Mark::START, 1);
    let mut client = connect(ports.address());
    client.write_all(b"?").unwrap();
    let mut said = String::new();
    client.read_to_string(&mut said).unwrap();
    assert_eq!(said, "bye");
    client.write_all(b"after the end").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let line = daemon.wait(Mark::START, "connection", &[("end", "closed")]);
    assert_eq!((line.get("sent"), line.get("received")), (Some("3"), Some("14")));
    eventually("the worker heard it", || {
        fs::read_to_string(&heard).is_ok_and(|text| text == "?after the end")
    });
}

#[test]
fn a_reset_by_the_worker_is_one_for_the_client() {
    let ports = Ports::take(1);
    let daemon = Daemon::healthy(&ports.service(&command(&["reset"])), 1);
    let mut client = connect(ports.address());
    client.write_all(b"x").unwrap();
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    daemon.wait(Mark::START, "connection", &[("end", "worker-reset"), ("received", "1")]);
}

#[test]
fn a_reset_by_the_client_is_one_for_the_worker() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let heard = folder.path().join("heard");
    let words = ["hear", heard.to_str().unwrap()];
    let daemon =
        Daemon::start_in(folder, &ports.service(&format!("{}\n{ONE_PROBE}", command(&words))));
    daemon.wait_healthy(Mark::START, 1);
    let mut client = connect(ports.address());
    client.write_all(b"?").unwrap();
    client.read_to_end(&mut Vec::new()).unwrap();
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    daemon.wait(Mark::START, "connection", &[("end", "client-reset")]);
    eventually("the worker saw it", || {
        fs::read_to_string(&heard).is_ok_and(|text| text == "ConnectionReset")
    });
}

#[test]
fn past_max_connections_new_ones_wait() {
    let ports = Ports::take(2);
    let keys = format!("max-connections = 2\n{}", command(&["http"]));
    let daemon = Daemon::healthy(&ports.service(&keys), 2);
    let mut held: Vec<_> = (0..2).map(|_| KeepAlive::new(ports.address())).collect();
    for client in &mut held {
        client.get("/").unwrap();
    }
    let mut third = KeepAlive::new(ports.address());
    third.send("/").unwrap();
    third.stream().set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert_eq!(third.head().unwrap_err().kind(), ErrorKind::WouldBlock);
    third.stream().set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(daemon.said(Mark::START, "connection").is_empty());
    held.pop();
    assert_eq!(third.answer().unwrap().0, 200);
}

#[test]
fn ipv6_and_unix_sockets() {
    let ports = Ports::take(2);
    let v6: SocketAddr = ([0, 0, 0, 0, 0, 0, 0, 1], ports.address().port()).into();
    let config = format!(
        "[service.web]\nlisten = [\"{}\", \"{v6}\", \"unix:run.sock\"]\nports = {:?}\n{}",
        ports.address(),
        ports.all(),
        command(&["http"])
    );
    let daemon = Daemon::healthy(&config, 2);
    let through_unix = || {
        let mut stream = UnixStream::connect(daemon.path("run.sock")).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.lines().last().unwrap().split(' ').next().unwrap().parse::<u16>().unwrap()
    };
    // One rotation, whichever way they come.
    let [first, second] = [ports.worker(0), ports.worker(1)];
    assert_eq!(
        [port(ports.address()), port(v6), through_unix(), port(v6)],
        [first, second, first, second]
    );
    daemon.wait(Mark::START, "listening", &[("address", &v6.to_string())]);
    let lines = daemon.wait_many(Mark::START, "connection", &[], 4);
    assert!(lines.iter().any(|line| line.get("client") == Some("unix")), "{lines:?}");
    assert!(lines.iter().any(|line| line.get("client").unwrap().starts_with("[::1]:")));
}

#[test]
fn a_worker_port_that_somebody_else_took_is_never_routed_to() {
    let ports = Ports::take(2);
    let stranger = std::net::TcpListener::bind(("127.0.0.1", ports.worker(0))).unwrap();
    let keys = format!("{}\nrestart.max-delay = \"200ms\"", command(&["http"]));
    let daemon = Daemon::start(&ports.service(&keys));
    let taken = ports.worker(0).to_string();
    let line = daemon.wait(Mark::START, "worker not started", &[("slot", "0")]);
    let error = line.get("error").unwrap();
    assert!(error.contains("taken") && error.contains(&taken), "{error}");
    assert!(line.get("restart_in").is_some(), "{}", line.raw);
    assert_eq!(turns(ports.address(), 6), [ports.worker(1); 6]);
    stranger.set_nonblocking(true).unwrap();
    assert_eq!(stranger.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    // Once it is free the slot fills by itself.
    drop(stranger);
    daemon.wait(Mark::START, "worker healthy", &[("port", &taken)]);
    assert_eq!(counts(&turns(ports.address(), 4)).len(), 2);
    assert!(try_get(ports.address(), "/").is_ok());
}
