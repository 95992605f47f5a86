//! Somebody else on a worker's port: never taken for the worker.

use std::{
    net::{IpAddr, Ipv4Addr, TcpListener},
    time::{Duration, Instant},
};

use crate::common::{
    Daemon, Mark, Ports,
    client::{Load, counts, turns},
    command, eventually, kill_hard,
};

/// Another program with a listener on a worker's port, which counts who comes.
struct Impostor(TcpListener);

impl Impostor {
    /// `None` while somebody else has the port.
    fn try_on(address: impl Into<IpAddr>, port: u16) -> Option<Self> {
        let listener = TcpListener::bind((address.into(), port)).ok()?;
        listener.set_nonblocking(true).unwrap();
        Some(Self(listener))
    }

    /// How many connections it was given since it was asked last.
    fn visitors(&self) -> usize {
        std::iter::from_fn(|| self.0.accept().ok()).count()
    }
}

fn config(ports: &Ports, socket: &str) -> String {
    let keys = command(&["http"]);
    ports.service(&format!(
        "{keys}\nsocket = {socket:?}\nhealth.interval = \"20ms\"\n\
         restart = {{ min-delay = \"300ms\", max-delay = \"600ms\" }}"
    ))
}

/// Waits until two more starts of the worker in slot 0 were tried, of which the log says nothing.
fn is_tried_again(daemon: &Daemon) {
    let tries = || daemon.workers("web")[0]["generation"].as_u64().unwrap();
    let before = tries();
    eventually("it is tried again and again", || tries() >= before + 2);
    // Twice at most: a busy machine may not have had the time to find out who has the port at first.
    assert!(daemon.said(Mark::START, "worker not started").len() <= 2);
}

/// Somebody has the port, on `address`, before lbd starts.
fn is_not_routed_to(socket: &str, address: Ipv4Addr) {
    // A port may be free on 127.0.0.1 and still have something of an earlier test on it elsewhere.
    let (ports, impostor) = (0..20)
        .find_map(|_| {
            let ports = Ports::take(2);
            Impostor::try_on(address, ports.worker(0)).map(|impostor| (ports, impostor))
        })
        .expect("a port for the impostor");
    let (taken, well) = (ports.worker(0), ports.worker(1));
    let daemon = Daemon::start(&config(&ports, socket));
    let line = daemon.wait(Mark::START, "worker not started", &[("slot", "0")]);
    let error = line.get("error").unwrap();
    let begins = format!("port {taken} of 127.0.0.1 is taken by another program: ");
    assert!(error.starts_with(&begins), "{}", line.raw);
    // Who it is, or, where the machine is too busy to look for it, how to find out.
    let ss = format!("; `ss -ltnp 'sport = :{taken}'` shows which");
    let pid = format!(" (pid {}, user ", std::process::id());
    assert!(error.contains(&pid) || error.ends_with(&ss), "{}", line.raw);
    let load = Load::start(ports.address(), "/");
    is_tried_again(&daemon);
    assert_eq!(turns(ports.address(), 4), [well; 4]);
    let worker = &daemon.workers("web")[0];
    assert!(worker["last_exit"].as_str().unwrap().contains("is taken by"), "{worker}");
    assert_eq!(impostor.visitors(), 0);
    // And the worker has it as soon as it is free.
    drop(impostor);
    let begun = Instant::now();
    daemon.wait(Mark::START, "worker healthy", &[("port", &taken.to_string())]);
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    load.more(20);
    load.end_without_failure();
    assert_eq!(counts(&turns(ports.address(), 4)), [(taken, 2), (well, 2)].into());
}

#[test]
fn one_who_has_the_port_of_a_worker_that_binds() {
    is_not_routed_to("bind", Ipv4Addr::LOCALHOST);
}

#[test]
fn one_who_has_that_port_on_every_address() {
    is_not_routed_to("bind", Ipv4Addr::UNSPECIFIED);
}

#[test]
fn one_who_has_the_port_of_a_worker_that_inherits() {
    is_not_routed_to("inherit", Ipv4Addr::LOCALHOST);
}

#[test]
fn one_who_has_the_inherited_port_on_every_address() {
    is_not_routed_to("inherit", Ipv4Addr::UNSPECIFIED);
}

#[test]
fn one_who_takes_the_port_when_the_worker_dies() {
    let ports = Ports::take(2);
    let (taken, well) = (ports.worker(0), ports.worker(1));
    let daemon = Daemon::healthy(&config(&ports, "bind"), 2);
    let since = daemon.now();
    kill_hard(daemon.worker_pid(taken));
    let mut impostor = None;
    eventually("the port", || {
        impostor = Impostor::try_on(Ipv4Addr::LOCALHOST, taken);
        impostor.is_some()
    });
    let impostor = impostor.unwrap();
    // Before it is known that the worker is dead, a probe may have been on its way to it.
    daemon.wait(since, "worker exited", &[]);
    impostor.visitors();
    let load = Load::start(ports.address(), "/");
    daemon.wait(since, "worker not started", &[("slot", "0")]);
    is_tried_again(&daemon);
    assert_eq!(turns(ports.address(), 4), [well; 4]);
    load.end_without_failure();
    assert_eq!(impostor.visitors(), 0);
    drop(impostor);
    daemon.wait(since, "worker healthy", &[("port", &taken.to_string())]);
}

#[test]
fn one_who_would_take_an_inherited_port_when_the_worker_dies() {
    let ports = Ports::take(1);
    let daemon = Daemon::healthy(&config(&ports, "inherit"), 1);
    let since = daemon.now();
    kill_hard(daemon.worker_pid(ports.worker(0)));
    daemon.wait(since, "worker exited", &[]);
    // lbd has not let go of it.
    assert!(Impostor::try_on(Ipv4Addr::LOCALHOST, ports.worker(0)).is_none());
    daemon.wait_healthy(since, 1);
    assert!(Impostor::try_on(Ipv4Addr::LOCALHOST, ports.worker(0)).is_none());
}
