//! Make before break: workers are replaced one at a time, and a replacement that fails costs
//! nothing.

use std::{collections::BTreeSet, fs, net::SocketAddr};

use crate::common::{
    Daemon, Mark, Ports,
    client::{Load, get},
    command, fixture, kill_hard, www,
};

/// The built-in worker as a command, so that lbd waits for its connections, on inherited sockets.
fn waiting_worker() -> String {
    format!(
        "command = [{:?}, \"worker\", \"--root\", {:?}]\nsocket = \"inherit\"\n\
         health = {{ http = \"/page.html\", interval = \"50ms\" }}",
        env!("CARGO_BIN_EXE_lbd"),
        www()
    )
}

/// `workers = 3`, on ports that lbd picks.
fn on_free_ports(ports: &Ports, keys: &str) -> String {
    format!("[service.web]\nlisten = \"{}\"\nworkers = 3\n{keys}\n", ports.address())
}

/// Starts what `config` describes, has `change` replace its three workers under `load`, and says
/// what the ports were before and after.
fn replaced(
    config: &str,
    load: impl FnOnce() -> Load,
    change: impl FnOnce(&Daemon),
) -> [Vec<u64>; 2] {
    let daemon = Daemon::healthy(config, 3);
    let shown = || -> (BTreeSet<i32>, Vec<u64>) {
        let workers = daemon.workers("web");
        assert!(workers.iter().all(|worker| worker["state"] == "healthy"), "{workers:?}");
        let ports = workers.iter().map(|worker| worker["port"].as_u64().unwrap());
        (daemon.slot_pids().into_iter().collect(), ports.collect())
    };
    let (old, before) = shown();
    let load = load();
    let since = daemon.now();
    change(&daemon);
    load.more(50);
    load.end_without_failure();
    let (new, after) = shown();
    assert!(new.is_disjoint(&old) && new.len() == 3, "{old:?} {new:?}");
    let old: Vec<_> = old.into_iter().collect();
    assert_eq!(daemon.fewest_in_rotation(since, &old), 3);
    assert_eq!(daemon.said(since, "worker healthy").len(), 3);
    [before, after]
}

fn restart(daemon: &Daemon) {
    let output = daemon.lbd(&["restart"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "web: workers replaced 3\n", "{output:?}");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_restart_on_fixed_ports_keeps_them_and_every_new_connection() {
    let ports = Ports::take(3);
    let keys = format!("root = {:?}", www());
    let load = || Load::start(ports.address(), "/page.html");
    let [before, after] = replaced(&ports.service(&keys), load, restart);
    assert_eq!(before, after);
}

#[test]
fn a_restart_on_fixed_ports_waits_for_connections_that_are_kept() {
    let ports = Ports::take(3);
    let load = || Load::keep_alive(ports.address(), "/page.html");
    let [before, after] = replaced(&ports.service(&waiting_worker()), load, restart);
    assert_eq!(before, after);
}

#[test]
fn a_restart_on_free_ports_fails_no_request() {
    let ports = Ports::take(0);
    let load = || Load::start(ports.address(), "/");
    replaced(&on_free_ports(&ports, &command(&["http"])), load, restart);
    let ports = Ports::take(0);
    let load = || Load::keep_alive(ports.address(), "/");
    replaced(&on_free_ports(&ports, &command(&["http"])), load, restart);
}

#[test]
fn a_changed_environment_reaches_every_worker_and_fails_no_request() {
    let ports = Ports::take(3);
    let config = |value: &str| {
        let keys = command(&["http"]);
        ports.service(&format!("{keys}\nsocket = \"inherit\"\nenv = {{ COLOUR = {value:?} }}"))
    };
    let reload = |daemon: &Daemon| {
        daemon.write_config(&config("blue"));
        let output = daemon.lbd(&["reload"]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert_eq!(colours(ports.address()), ["COLOUR=blue"; 3]);
    };
    let load = || Load::keep_alive(ports.address(), "/");
    let [before, after] = replaced(&config("green"), load, reload);
    assert_eq!(before, after);
}

/// What the next three workers were given.
fn colours(address: SocketAddr) -> Vec<String> {
    let colour = |_| {
        let environment = get(address, "/env");
        environment.lines().find(|line| line.starts_with("COLOUR=")).unwrap().to_owned()
    };
    (0..3).map(colour).collect()
}

#[test]
fn a_changed_environment_that_breaks_the_worker_stops_at_the_first() {
    let ports = Ports::take(3);
    // A program that only listens where it is told to.
    let config = |mode: &str, colour: &str| {
        ports.service(&format!(
            "command = [\"sh\", \"-c\", \"exec {} $MODE\"]\nsocket = \"inherit\"\n\
             env = {{ MODE = {mode:?}, COLOUR = {colour:?} }}\n\
             health = {{ http = \"/health\", start-timeout = \"500ms\", timeout = \"100ms\" }}",
            fixture()
        ))
    };
    let daemon = Daemon::healthy(&config("http", "green"), 3);
    let before = daemon.slot_pids();
    let load = Load::start(ports.address(), "/");
    let since = daemon.now();
    daemon.write_config(&config("silent", "blue"));
    let output = daemon.lbd(&["reload"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("web: slot 0") && error.contains("not healthy within 500ms"), "{error}");
    assert_eq!(daemon.slot_pids(), before);
    assert_eq!(daemon.fewest_in_rotation(since, &before), 3);
    load.more(50);
    load.end_without_failure();

    // And what is started later is what works.
    for pid in before {
        let since = daemon.now();
        kill_hard(pid);
        daemon.wait_healthy(since, 1);
    }
    assert_eq!(colours(ports.address()), ["COLOUR=green"; 3]);
    assert_eq!(daemon.lbd(&["restart"]).status.code(), Some(0));
    assert_eq!(colours(ports.address()), ["COLOUR=green"; 3]);
}

#[test]
fn a_restart_stops_where_a_replacement_does_not_become_healthy() {
    let ports = Ports::take(3);
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("gate");
    fs::write(&gate, "").unwrap();
    let keys = format!(
        "{}\nsocket = \"inherit\"\n\
         health = {{ http = \"/health\", start-timeout = \"500ms\", timeout = \"100ms\" }}",
        command(&["http", "--gate", gate.to_str().unwrap()])
    );
    let daemon = Daemon::start_in(folder, &ports.service(&keys));
    daemon.wait_healthy(Mark::START, 3);
    let before = daemon.slot_pids();
    let load = Load::start(ports.address(), "/");
    let since = daemon.now();
    fs::remove_file(&gate).unwrap();
    let output = daemon.lbd(&["restart", "web"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("slot 0") && error.contains("not healthy within 500ms"), "{error}");
    load.more(50);
    load.end_without_failure();
    assert_eq!(daemon.slot_pids(), before);
    assert_eq!(daemon.fewest_in_rotation(since, &before), 3);
    assert_eq!(daemon.said(since, "worker started").len(), 1, "the others were not tried");
    // The next one is not held up by the last.
    fs::write(&gate, "").unwrap();
    restart(&daemon);
}
