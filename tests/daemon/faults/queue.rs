//! What waits in an accept queue is answered, whatever becomes of the worker it waits for.

use std::{
    io::Write,
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::common::{
    Daemon, Mark, Ports,
    client::{KeepAlive, Load, connect, port},
    command, eventually, freeze, kill_hard,
    proc::descriptors,
    thaw, www,
};
use nix::sys::signal::Signal;

const CLIENTS: usize = 40;

/// Fixtures on inherited sockets, with this health.
fn inheriting(ports: &Ports, health: &str) -> String {
    let keys = command(&["http"]);
    ports.service(&format!("{keys}\nsocket = \"inherit\"\nhealth = {{ {health} }}"))
}

/// A probe that will not come while the test runs.
const NEVER: &str = "interval = \"1h\"";

/// Clients that have asked for `path` and wait for the answer.
fn asked(address: SocketAddr, path: &str) -> Vec<KeepAlive> {
    let ask = |_| {
        let mut client = KeepAlive::new(address);
        client.send(path).unwrap();
        client
    };
    (0..CLIENTS).map(ask).collect()
}

/// Reads what each is answered: who it was.
fn answers(clients: Vec<KeepAlive>) -> Vec<String> {
    let answer = |mut client: KeepAlive| {
        let (status, body) = client.answer().expect("an answer");
        assert_eq!(status, 200);
        String::from_utf8(body).unwrap()
    };
    clients.into_iter().map(answer).collect()
}

/// Waits until lbd has handed all of them to a worker.
fn handed_over(daemon: &Daemon) {
    eventually("all are handed over", || {
        let active = |worker: &serde_json::Value| worker["connections"]["active"].as_u64().unwrap();
        daemon.workers("web").iter().map(active).sum::<u64>() == CLIENTS as u64
    });
}

#[test]
fn clients_of_a_frozen_worker_are_answered_by_another() {
    let ports = Ports::take(2);
    let health = "http = \"/health\", interval = \"100ms\", timeout = \"200ms\", fall = 2";
    let daemon = Daemon::healthy(&inheriting(&ports, health), 2);
    let frozen = daemon.worker_pid(ports.worker(0));
    let well = format!("{} {}", ports.worker(1), daemon.worker_pid(ports.worker(1)));
    freeze(frozen);
    let begun = Instant::now();
    let clients = asked(ports.address(), "/");
    assert_eq!(answers(clients), vec![well; CLIENTS]);
    let took = begun.elapsed();
    // fall × (interval + timeout), and time for two busy cores.
    assert!(took < Duration::from_millis(600 + 1400), "{took:?}");

    // Nobody answers its probes in its stead, however many connections are taken out of its queue.
    let pid = frozen.to_string();
    let since = daemon.now();
    let load = Load::start(ports.address(), "/");
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        let worker = &daemon.workers("web")[0];
        assert_eq!((&worker["state"], &worker["pid"]), (&"unhealthy".into(), &frozen.into()));
        assert_eq!(worker["last_probe"]["ok"], false);
    }
    load.end_without_failure();
    assert!(daemon.said(since, "worker healthy").is_empty());

    // And back, as it was.
    thaw(frozen);
    daemon.wait(since, "worker healthy", &[("pid", &pid)]);
    eventually("its turns", || port(ports.address()) == ports.worker(0));
    assert_eq!(daemon.slot_pids()[0], frozen);
    assert!(daemon.said(Mark::START, "worker exited").is_empty());
}

#[test]
fn clients_of_a_frozen_built_in_worker_are_answered_by_another() {
    let ports = Ports::take(2);
    let keys = format!(
        "root = {:?}\nhealth = {{ interval = \"100ms\", timeout = \"200ms\", fall = 2 }}\n\
         restart.unhealthy-after = \"1s\"",
        www()
    );
    let daemon = Daemon::healthy(&ports.service(&keys), 2);
    let frozen = daemon.worker_pid(ports.worker(0));
    freeze(frozen);
    assert_eq!(answers(asked(ports.address(), "/page.html")).len(), CLIENTS);
    // It does not come back: it is replaced.
    daemon.wait(Mark::START, "worker exited", &[("pid", &frozen.to_string())]);
    daemon.wait_healthy(Mark::START, 3);
    assert_ne!(daemon.slot_pids()[0], frozen);
    assert_eq!(answers(asked(ports.address(), "/page.html")).len(), CLIENTS);
}

#[test]
fn clients_of_a_worker_killed_while_they_wait_are_answered() {
    let ports = Ports::take(2);
    let daemon = Daemon::healthy(&inheriting(&ports, NEVER), 2);
    let killed = daemon.worker_pid(ports.worker(0));
    freeze(killed);
    let clients = asked(ports.address(), "/");
    handed_over(&daemon);
    kill_hard(killed);
    let answers = answers(clients);
    assert!(answers.iter().all(|answer| !answer.ends_with(&format!(" {killed}"))), "{answers:?}");
}

#[test]
fn clients_of_the_only_worker_wait_for_its_successor() {
    let ports = Ports::take(1);
    let daemon = Daemon::healthy(&inheriting(&ports, NEVER), 1);
    let killed = daemon.worker_pid(ports.worker(0));
    freeze(killed);
    let clients = asked(ports.address(), "/");
    handed_over(&daemon);
    kill_hard(killed);
    let answers = answers(clients);
    let successor = format!("{} {}", ports.worker(0), daemon.slot_pids()[0]);
    assert_ne!(daemon.slot_pids()[0], killed);
    assert_eq!(answers, vec![successor; CLIENTS]);
}

#[test]
fn clients_of_the_only_worker_outlive_its_being_replaced_for_not_answering() {
    let ports = Ports::take(1);
    let health = "http = \"/health\", interval = \"100ms\", timeout = \"100ms\", fall = 2";
    let config = inheriting(&ports, health);
    // It can't be drained: what waits for it would wait for ever.
    let daemon = Daemon::healthy(
        &format!(
            "{config}restart.unhealthy-after = \"300ms\"\n\
             stop = {{ drain-timeout = \"100ms\", timeout = \"100ms\" }}\n"
        ),
        1,
    );
    let frozen = daemon.worker_pid(ports.worker(0));
    freeze(frozen);
    let clients = asked(ports.address(), "/");
    let answers = answers(clients);
    daemon.wait(Mark::START, "worker exited", &[("pid", &frozen.to_string())]);
    // Asked to end, it was continued, and may still have taken a few.
    assert_eq!(answers.len(), CLIENTS);
    assert_ne!(daemon.slot_pids()[0], frozen);
}

#[test]
fn a_burst_just_before_a_stop_is_answered() {
    for _ in 0..5 {
        let ports = Ports::take(2);
        let mut daemon = Daemon::healthy(&ports.service(&command(&["http"])), 2);
        let clients: Vec<_> = (0..50).map(|_| connect(ports.address())).collect();
        daemon.signal(Signal::SIGTERM);
        for client in clients {
            let mut client = KeepAlive::over(client);
            assert_eq!(client.get("/").unwrap().0, 200);
        }
        daemon.wait_stopped();
    }
}

#[test]
fn more_than_there_is_room_for_stay_where_they_wait_until_there_is() {
    const WAITING: usize = 900;
    let ports = Ports::take(2);
    let health = "interval = \"200ms\", timeout = \"1s\", fall = 2";
    let daemon = Daemon::with_descriptors(256, &inheriting(&ports, health));
    daemon.wait_healthy(Mark::START, 2);
    let killed = daemon.worker_pid(ports.worker(0));
    freeze(killed);
    // They need no descriptor of lbd's: anybody on the machine can connect to a worker's port.
    let worker = SocketAddr::from(([127, 0, 0, 1], ports.worker(0)));
    let clients: Vec<_> = (0..WAITING)
        .map(|_| {
            // The workers have as few descriptors, and are not to keep the connection.
            let mut client = connect(worker);
            client.write_all(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
            KeepAlive::over(client)
        })
        .collect();
    let since = daemon.now();
    kill_hard(killed);
    let mut most = 0;
    for mut client in clients {
        assert_eq!(client.answer().expect("an answer").0, 200);
        most = most.max(descriptors(daemon.pid()));
    }
    assert!(most < 256, "{most}");
    for message in ["worker unhealthy", "can't accept; clients wait"] {
        assert!(daemon.said(since, message).is_empty(), "{message}");
    }
}
