//! Reloads, as many and as fast as it pleases, under load.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use crate::common::{
    self, Daemon, Line, Mark, Ports,
    client::{KeepAlive, Load, turns},
    command, eventually, named,
    proc::{descriptors, resident},
    www,
};
use nix::sys::signal::Signal::SIGHUP;

/// A hundred SIGHUPs 100 ms apart, three and five workers by turns, under `load`.
fn storm(keys: &str, load: impl FnOnce(SocketAddr) -> Load) {
    let ports = Ports::take(5);
    let all = ports.all();
    let five = format!("[log]\naccess = false\n{}", ports.service(keys));
    let three = format!("[log]\naccess = false\n{}", ports.service_of(&all[..3], keys));
    let daemon = Daemon::healthy(&three, 3);
    let pids = daemon.slot_pids();
    let load = load(ports.address());
    // What is made once and kept: after a first round trip.
    let settled = || {
        eventually("three workers and nothing else", || daemon.processes().len() == 7);
        (descriptors(daemon.pid()), resident(daemon.pid()))
    };
    daemon.must_reload(&five);
    daemon.must_reload(&three);
    let (fds, memory) = settled();
    for round in 0..100 {
        daemon.write_config(if round % 2 == 0 { &five } else { &three });
        daemon.signal(SIGHUP);
        thread::sleep(Duration::from_millis(100));
    }
    // The last one is in force, and each was heard.
    eventually("three workers", || daemon.workers("web").len() == 3);
    load.more(50);
    let failures = load.end();
    assert!(failures.is_empty(), "{failures:?}");
    let outcome = |line: &Line| matches!(&*line.message, "reloaded" | "reload refused");
    let outcomes: Vec<_> = daemon.log.lines(Mark::START).into_iter().filter(outcome).collect();
    assert!(outcomes.iter().all(|line| line.message == "reloaded"), "{outcomes:?}");
    assert!(outcomes.len() > 80, "{}", outcomes.len());
    assert_eq!(daemon.slot_pids(), pids);
    let (fds_after, memory_after) = settled();
    // The load has gone, with at most two descriptors for each client and its upstream.
    assert!(fds_after <= fds, "{fds} {fds_after}");
    assert!(memory_after < memory + (8 << 20), "{memory} {memory_after}");
}

#[test]
fn a_storm_over_built_in_workers() {
    storm(&format!("root = {:?}", www()), |address| Load::start(address, "/page.html"));
}

#[test]
fn a_storm_over_commands_with_connections_that_are_kept() {
    storm(&command(&["http"]), |address| Load::keep_alive(address, "/"));
}

#[test]
fn of_two_signals_at_once_the_last_file_wins() {
    let ports = Ports::take(3);
    let all = ports.all();
    let keys = command(&["http"]);
    let daemon = Daemon::healthy(&ports.service_of(&all[..1], &keys), 1);
    for count in [2, 3, 1, 3, 2, 1] {
        // It is stopped, so that both wait for it when it goes on.
        common::freeze(daemon.pid());
        daemon.write_config(&ports.service_of(&all[..4 - count], &keys));
        daemon.signal(SIGHUP);
        daemon.write_config(&ports.service_of(&all[..count], &keys));
        daemon.signal(SIGHUP);
        common::thaw(daemon.pid());
        eventually("the last file", || daemon.workers("web").len() == count);
    }
    assert!(daemon.said(Mark::START, "reload refused").is_empty());
    assert_eq!(turns(ports.address(), 2), [all[0]; 2]);
}

#[test]
fn a_new_address_that_is_taken_refuses_all_and_leaves_the_old_one() {
    let (ports, other) = (Ports::take(2), Ports::take(0));
    let keys = command(&["http"]);
    let config = ports.service(&keys);
    let daemon = Daemon::healthy(&config, 2);
    let load = Load::start(ports.address(), "/");
    let somebody = TcpListener::bind(other.address()).unwrap();
    let moved = config.replace(&ports.address().to_string(), &other.address().to_string());
    let line = daemon.reload(&moved);
    assert_eq!(line.message, "reload refused");
    assert!(line.get("error").unwrap().contains(&other.address().to_string()), "{}", line.raw);
    load.more(50);
    load.end_without_failure();
    drop(somebody);

    // Bound before the old one is let go: at any moment one of them answers.
    let watcher = thread::spawn({
        let addresses = [ports.address(), other.address()];
        move || {
            let mut both = 0;
            loop {
                let [old, new] = addresses.map(|address| TcpStream::connect(address).is_ok());
                assert!(old || new, "nobody listens");
                both += usize::from(old && new);
                if !old {
                    return both;
                }
            }
        }
    });
    let since = daemon.now();
    daemon.must_reload(&moved);
    daemon.wait(since, "listening", &[("address", &other.address().to_string())]);
    watcher.join().unwrap();
    assert_eq!(turns(other.address(), 4).len(), 4);
}

/// The requests that fail while a reload takes this file for that one.
fn reloads_without_a_failure(ports: &Ports, files: [&str; 2], workers: usize) {
    let daemon = Daemon::healthy(files[0], workers);
    let load = Load::start(ports.address(), "/");
    let mut held = KeepAlive::new(ports.address());
    held.get("/").unwrap();
    for round in 0..10 {
        daemon.must_reload(files[(round + 1) % 2]);
        load.more(20);
    }
    load.end_without_failure();
    assert_eq!(held.get("/").unwrap().0, 200);
}

#[test]
fn an_address_moves_to_its_wildcard_and_back() {
    let ports = Ports::take(2);
    let config = ports.service(&command(&["http"]));
    let wildcard = config.replace("\"127.0.0.1:", "\"0.0.0.0:");
    assert_ne!(config, wildcard);
    reloads_without_a_failure(&ports, [&config, &wildcard], 2);
}

#[test]
fn an_address_moves_from_one_service_to_another() {
    let (public, spare) = (Ports::take(0), Ports::take(0));
    let (one, two) = (Ports::take(2), Ports::take(2));
    let keys = command(&["http"]);
    let config = |first: &Ports, second: &Ports| {
        let at = |workers: &Ports, listen: &Ports| {
            let config = workers.service(&keys);
            config.replace(&workers.address().to_string(), &listen.address().to_string())
        };
        format!("{}{}", at(&one, first), named("two", &at(&two, second)))
    };
    let files = [config(&public, &spare), config(&spare, &public)];
    reloads_without_a_failure(&public, [&files[0], &files[1]], 4);
}
