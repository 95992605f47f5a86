//! `socket = "unix"`: workers without a port, on a unix socket that lbd makes and passes on.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr},
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use crate::common::{
    self, Daemon, Mark, Ports,
    client::{KeepAlive, Load, connect, get},
    command, eventually, freeze, kill_hard, thaw, www,
};
use nix::sys::signal::Signal::{SIGKILL, SIGTERM};
use socket2::SockRef;

/// A service with so many workers on unix sockets.
fn service(ports: &Ports, workers: usize, keys: &str) -> String {
    let address = ports.address();
    format!(
        "[service.web]\nlisten = \"{address}\"\nworkers = {workers}\nsocket = \"unix\"\n{keys}\n"
    )
}

/// A probe that will not come while the test runs.
const NEVER: &str = "health.interval = \"1h\"";

/// The slots and pids of the workers that take the next connections.
fn answers(address: SocketAddr, count: usize) -> Vec<String> {
    (0..count).map(|_| get(address, "/")).collect()
}

/// Clients that have asked for `path` and wait for the answer.
fn asked(address: SocketAddr, path: &str, count: usize) -> Vec<KeepAlive> {
    let ask = |_| {
        let mut client = KeepAlive::new(address);
        client.send(path).unwrap();
        client
    };
    (0..count).map(ask).collect()
}

fn answer(mut client: KeepAlive) -> String {
    let (status, body) = client.answer().expect("an answer");
    assert_eq!(status, 200);
    String::from_utf8(body).unwrap()
}

fn active(daemon: &Daemon) -> Vec<u64> {
    let workers = daemon.workers("web");
    workers.iter().map(|worker| worker["connections"]["active"].as_u64().unwrap()).collect()
}

#[test]
fn connections_go_round_and_nobody_has_a_port() {
    let ports = Ports::take(0);
    for health in ["", "health.http = \"/health\""] {
        let keys = format!("{}\n{health}", command(&["http"]));
        let daemon = Daemon::healthy(&service(&ports, 3, &keys), 3);
        let pids = daemon.slot_pids();
        let expected: Vec<_> = (0..9).map(|n| format!("{} {}", n % 3, pids[n % 3])).collect();
        assert_eq!(answers(ports.address(), 9), expected);

        let lines = daemon.wait_many(Mark::START, "connection", &[("end", "closed")], 9);
        assert!(lines.iter().all(|line| line.get("port").is_none()), "{lines:#?}");
        let mut labels: Vec<_> = lines.iter().map(|line| line.get("worker").unwrap()).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels, ["web/0", "web/1", "web/2"]);
        let healthy = daemon.wait(Mark::START, "worker healthy", &[("slot", "0")]);
        assert_eq!(healthy.get("port"), None);
        for worker in daemon.workers("web") {
            assert!(worker["port"].is_null(), "{worker}");
            assert_eq!(worker["connections"]["total"], 3);
            assert_eq!(worker["last_probe"]["ok"], true);
        }
        let table = String::from_utf8(daemon.lbd(&["status"]).stdout).unwrap();
        assert!(table.contains("healthy"), "{table}");
    }
}

#[test]
fn a_worker_gets_the_socket_and_no_port() {
    let ports = Ports::take(0);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lb.toml"), service(&ports, 1, &command(&["http", "{slot}"])))
        .unwrap();
    let mut lbd = Command::new(env!("CARGO_BIN_EXE_lbd"));
    // Not lbd's own either.
    lbd.args(["--config", "lb.toml"]).env("PORT", "1");
    let daemon = Daemon::run(folder, lbd);
    daemon.wait_healthy(Mark::START, 1);
    let environment = get(ports.address(), "/env");
    assert!(!environment.lines().any(|line| line.starts_with("PORT=")), "{environment}");
    for line in ["LBD_SERVICE=web", "LBD_SLOT=0", "LISTEN_FDS=1", "LISTEN_FDNAMES=web"] {
        assert!(environment.lines().any(|found| found == line), "{line} in {environment}");
    }
    assert_eq!(get(ports.address(), "/argv"), "http\n0");
    let descriptors = get(ports.address(), "/descriptors");
    let numbers: Vec<_> = descriptors.lines().map(|line| line.split_once(' ').unwrap()).collect();
    assert_eq!(numbers.iter().map(|(number, _)| *number).collect::<Vec<_>>(), ["0", "1", "2", "3"]);
    assert!(numbers[3].1.starts_with("socket:"), "{descriptors}");
}

#[test]
fn nobody_else_can_connect_to_a_worker() {
    let ports = Ports::take(0);
    let config =
        format!("{}[admin]\nsocket = \"admin.sock\"\n", service(&ports, 2, &command(&["http"])));
    let daemon = Daemon::healthy(&config, 2);
    // Nothing is left of where it was made.
    let left: Vec<_> = fs::read_dir(daemon.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "lb.toml")
        .collect();
    assert_eq!(left, ["admin.sock"]);
    // Each has a name there, and no socket listens on an abstract one.
    let inodes: Vec<_> = daemon
        .slot_pids()
        .iter()
        .map(|pid| fs::read_link(format!("/proc/{pid}/fd/3")).unwrap())
        .map(|link| link.to_str().unwrap()["socket:[".len()..].trim_end_matches(']').to_owned())
        .collect();
    let all = fs::read_to_string("/proc/net/unix").unwrap();
    for inode in inodes {
        let line = all.lines().find(|line| line.contains(&format!(" {inode} "))).unwrap();
        let path = line.split_whitespace().last().unwrap();
        assert!(path.starts_with('/') && !Path::new(path).exists(), "{line}");
        UnixStream::connect(path).unwrap_err();
    }
    assert_eq!(answers(ports.address(), 2).len(), 2);
}

#[test]
fn the_built_in_worker_takes_it_too() {
    for threaded in [false, true] {
        let ports = Ports::take(0);
        let keys = if threaded {
            let lbd = env!("CARGO_BIN_EXE_lbd");
            format!("command = [{lbd:?}, \"worker\", \"--threaded\", \"--root\", {:?}]", www())
        } else {
            format!("root = {:?}", www())
        };
        let mut daemon = Daemon::healthy(&service(&ports, 2, &keys), 2);
        let mut served_by = Vec::new();
        for _ in 0..2 {
            let mut client = connect(ports.address());
            client
                .write_all(b"GET /page.html HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                .unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            let answer = answer.to_ascii_lowercase();
            assert!(answer.starts_with("http/1.1 200 "), "{answer}");
            let line = answer.lines().find(|line| line.starts_with("x-served-by: "));
            served_by.push(line.unwrap().to_owned());
        }
        assert_eq!(served_by, ["x-served-by: web/0", "x-served-by: web/1"]);
        daemon.signal(SIGTERM);
        daemon.wait_stopped();
    }
}

#[test]
fn clients_of_a_killed_worker_are_answered_by_another() {
    let ports = Ports::take(0);
    let keys = format!("{}\n{NEVER}", command(&["http"]));
    let daemon = Daemon::healthy(&service(&ports, 2, &keys), 2);
    let killed = daemon.slot_pids()[0];
    freeze(killed);
    let clients = asked(ports.address(), "/", 40);
    eventually("half of them wait", || active(&daemon)[0] == 20);
    kill_hard(killed);
    for client in clients {
        let answer = answer(client);
        assert!(!answer.ends_with(&format!(" {killed}")), "{answer}");
    }
}

#[test]
fn clients_of_the_only_worker_wait_for_its_successor() {
    let ports = Ports::take(0);
    // They are not held: they stay where they wait.
    let keys = format!("{}\n{NEVER}\nhold-timeout = \"0s\"", command(&["http"]));
    let daemon = Daemon::healthy(&service(&ports, 1, &keys), 1);
    let killed = daemon.slot_pids()[0];
    freeze(killed);
    let clients = asked(ports.address(), "/", 40);
    eventually("they wait", || active(&daemon) == [40]);
    kill_hard(killed);
    for client in clients {
        let answer = answer(client);
        assert_eq!(answer, format!("0 {}", daemon.slot_pids()[0]));
        assert!(!answer.ends_with(&format!(" {killed}")));
    }
}

#[test]
fn clients_of_a_frozen_worker_are_answered_by_another_and_its_probes_are_not() {
    let ports = Ports::take(0);
    let health =
        "health = { http = \"/health\", interval = \"50ms\", timeout = \"100ms\", fall = 2 }";
    let folder = tempfile::tempdir().unwrap();
    let heads = folder.path().join("heads");
    let keys = format!("{}\n{health}", command(&["http", "--heads", heads.to_str().unwrap()]));
    let daemon = Daemon::healthy(&service(&ports, 2, &keys), 2);
    let pids = daemon.slot_pids();
    freeze(pids[0]);
    let since = daemon.now();
    for client in asked(ports.address(), "/", 40) {
        assert_eq!(answer(client), format!("1 {}", pids[1]));
    }
    daemon.wait(since, "worker unhealthy", &[("slot", "0")]);
    // Its probes go on failing, whoever empties its queue.
    let probes = || {
        let heads = fs::read_to_string(&heads).unwrap();
        heads.lines().filter(|line| line.starts_with("GET /health ")).count()
    };
    let before = probes();
    let load = Load::start(ports.address(), "/");
    eventually("some probes of the other", || probes() > before + 5);
    load.end_without_failure();
    assert!(daemon.said(since, "worker healthy").is_empty());
    assert_eq!(daemon.workers("web")[0]["last_probe"]["ok"], false);
    thaw(pids[0]);
    daemon.wait(since, "worker healthy", &[("slot", "0")]);
    eventually("its turns", || answers(ports.address(), 2).iter().any(|a| a.starts_with("0 ")));
}

#[test]
fn a_restart_fails_no_request_and_leaves_no_descriptor() {
    let ports = Ports::take(0);
    let daemon = Daemon::healthy(&service(&ports, 3, &command(&["http"])), 3);
    let open = || fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    let restart = || {
        let before = daemon.slot_pids();
        let since = daemon.now();
        assert_eq!(daemon.lbd(&["restart"]).status.code(), Some(0));
        assert_eq!(daemon.fewest_in_rotation(since, &before), 3);
        daemon.wait_many(since, "worker exited", &[], 3);
    };
    restart();
    let load = Load::start(ports.address(), "/");
    restart();
    load.end_without_failure();
    eventually("nothing is held", || active(&daemon) == [0, 0, 0]);
    let before = open();
    for _ in 0..3 {
        restart();
    }
    eventually("as many as before", || open() <= before);
}

#[test]
fn a_reload_moves_between_ports_and_unix_and_fails_no_request() {
    let ports = Ports::take(0);
    let unix = service(&ports, 2, &command(&["http"]));
    let inherit = unix.replace("\"unix\"", "\"inherit\"");
    let bind = unix.replace("\"unix\"", "\"bind\"");
    let told = service(
        &ports,
        2,
        &format!("{}\nproxy-protocol = \"v2\"", command(&["http", "--proxy", "v2"])),
    );
    let daemon = Daemon::healthy(&inherit, 2);
    let load = Load::start(ports.address(), "/");
    for config in [&unix, &bind, &unix, &told, &inherit, &told, &unix] {
        let since = daemon.now();
        daemon.must_reload(config);
        daemon.wait_many(since, "worker exited", &[], 2);
    }
    load.end_without_failure();
    let pids = daemon.slot_pids();
    let mut slots = answers(ports.address(), 2);
    slots.sort();
    assert_eq!(slots, [format!("0 {}", pids[0]), format!("1 {}", pids[1])]);
}

#[test]
fn a_service_that_is_removed_lets_its_clients_finish() {
    let ports = Ports::take(0);
    let other = Ports::take(0);
    let config = service(&ports, 1, &command(&["http"]));
    let stays = common::named("other", &service(&other, 1, &command(&["http"])));
    let daemon = Daemon::healthy(&format!("{config}{stays}"), 2);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("now");
    let client = asked(ports.address(), &format!("/when{}", file.display()), 1).remove(0);
    let pid = daemon.slot_pids()[0].to_string();
    let since = daemon.now();
    daemon.must_reload(&stays);
    daemon.wait(since, "draining", &[("pid", &pid)]);
    fs::write(&file, "").unwrap();
    assert_eq!(answer(client), "");
    daemon.wait(since, "worker exited", &[("pid", &pid)]);
    assert_eq!(answers(other.address(), 1).len(), 1);
}

#[test]
fn a_stop_finishes_what_is_in_flight() {
    let ports = Ports::take(0);
    let mut daemon = Daemon::healthy(&service(&ports, 2, &command(&["http"])), 2);
    let file = daemon.path("now");
    let clients = asked(ports.address(), &format!("/when{}", file.display()), 10);
    eventually("they are with the workers", || active(&daemon) == [5, 5]);
    let since = daemon.now();
    daemon.signal(SIGTERM);
    daemon.wait(since, "draining", &[]);
    fs::write(&file, "").unwrap();
    for client in clients {
        assert_eq!(answer(client), "");
    }
    daemon.wait_stopped();
}

#[test]
fn lbd_killed_leaves_nothing_and_a_new_start_serves() {
    let ports = Ports::take(0);
    let config = service(&ports, 2, &command(&["http"]));
    let mut daemon = Daemon::healthy(&config, 2);
    daemon.signal(SIGKILL);
    daemon.wait_exit();
    eventually("nothing runs", || daemon.processes().is_empty());
    let daemon = Daemon::healthy(&config, 2);
    assert_eq!(answers(ports.address(), 2).len(), 2);
    drop(daemon);
}

#[test]
fn bytes_half_closes_and_resets_pass_unchanged() {
    let ports = Ports::take(0);
    let daemon = Daemon::healthy(&service(&ports, 1, &command(&["echo"])), 1);
    let client = connect(ports.address());
    let said: Vec<u8> = (0..=255).cycle().take(4 << 20).collect();
    let mut writer = client.try_clone().unwrap();
    let writing = thread::spawn(move || {
        writer.write_all(&said).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
        said
    });
    let mut echo = Vec::new();
    (&client).read_to_end(&mut echo).unwrap();
    assert!(echo == writing.join().unwrap());
    daemon.wait(Mark::START, "connection", &[("end", "closed")]);
    drop(client);

    let client = connect(ports.address());
    (&client).write_all(b"x").unwrap();
    (&client).read_exact(&mut [0]).unwrap();
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    daemon.wait(Mark::START, "connection", &[("end", "client-reset")]);
}

#[test]
fn its_workers_are_told_who_the_client_is() {
    for version in ["v1", "v2"] {
        let ports = Ports::take(0);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("headers");
        let words = ["http", "--proxy", version, "--headers", file.to_str().unwrap()];
        let keys = format!("{}\nproxy-protocol = \"{version}\"\n{NEVER}", command(&words));
        let daemon = Daemon::healthy(&service(&ports, 1, &keys), 1);
        // The probe's connection has no addresses to be told.
        let nobody = if version == "v1" { "PROXY UNKNOWN\n" } else { "LOCAL\n" };
        eventually("the probe", || fs::read_to_string(&file).is_ok_and(|told| told == nobody));

        let killed = daemon.slot_pids()[0];
        freeze(killed);
        let client = connect(ports.address());
        let (ip, server) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let header =
            format!("PROXY TCP4 {} {} {} {}", ip.ip(), server.ip(), ip.port(), server.port());
        let mut client = KeepAlive::over(client);
        client.send("/proxy").unwrap();
        eventually("it waits", || active(&daemon) == [1]);
        kill_hard(killed);
        assert_eq!(answer(client), header);
    }
}

#[test]
fn what_has_no_meaning_with_it_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(
        folder.path().join("lb.toml"),
        "[service.web]\nlisten = \"127.0.0.1:1\"\nsocket = \"unix\"\nhost = \"::1\"\n\
         ports = [1]\ncommand = [\"x\", \"{port}\"]\n",
    )
    .unwrap();
    let output = common::lbd(folder.path(), &["check", "--config", "lb.toml"]);
    assert_eq!(output.status.code(), Some(78));
    let said = String::from_utf8(output.stderr).unwrap();
    for (line, key) in [(4, "host"), (5, "ports"), (6, "command")] {
        assert!(said.contains(&format!("lb.toml:{line}: service.web.{key}: ")), "{said}");
    }
    fs::write(
        folder.path().join("lb.toml"),
        "[service.web]\nlisten = \"127.0.0.1:1\"\nsocket = \"unix\"\nworkers = 2\ncommand = [\"x\"]\n",
    )
    .unwrap();
    let output = common::lbd(folder.path(), &["check", "--config", "lb.toml"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("; 2 workers on unix sockets; command x; "), "{said}");
}
