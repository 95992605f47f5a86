//! Workers' lives: probed, killed, restarted, with what they are given.

use std::{
    fs,
    time::{Duration, Instant},
};

use crate::common::{
    self, Daemon, Line, Mark, Ports,
    client::{Load, counts, try_get, turns},
    command, eventually, fixture, kill_hard,
};
use nix::sys::signal::Signal;

#[test]
fn a_worker_killed_under_load_costs_only_what_was_in_its_hands() {
    let ports = Ports::take(4);
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("gate");
    fs::write(&gate, "").unwrap();
    let words = ["http", "--gate", gate.to_str().unwrap()];
    let daemon = Daemon::start_in(folder, &ports.service(&command(&words)));
    daemon.wait_healthy(Mark::START, 4);
    let load = Load::start(ports.address(), "/");

    let victim = ports.worker(2);
    let port = victim.to_string();
    let killed = daemon.worker_pid(victim);
    fs::remove_file(&gate).unwrap();
    let since = daemon.now();
    kill_hard(killed);
    let exited = daemon.wait(since, "worker exited", &[("port", &port)]);
    let gone = Instant::now();
    assert_eq!((exited.pid(), exited.get("status")), (killed, Some("killed by SIGKILL")));

    // Out of rotation at once: the others take all the turns, though its successor runs already.
    let successor = daemon.wait(since, "worker started", &[("port", &port)]);
    assert_ne!(successor.pid(), killed);
    load.more(200);
    assert!(!turns(ports.address(), 12).contains(&victim));

    // Back when its probe passes.
    fs::write(&gate, "").unwrap();
    daemon.wait(since, "worker healthy", &[("port", &port), ("pid", &successor.pid().to_string())]);
    load.more(200);
    let failures = load.end();
    let mut all = ports.all();
    let around = turns(ports.address(), 8);
    all.sort_unstable();
    assert_eq!(counts(&around), all.into_iter().map(|port| (port, 2)).collect());

    // At most one for each client was in its hands, and each failure was one of those.
    assert!(failures.len() <= Load::CLIENTS, "{failures:?}");
    for failure in failures {
        assert!(failure.begun < gone, "{failure:?}");
        let client = failure.client.to_string();
        let line = daemon.wait(Mark::START, "connection", &[("client", &client)]);
        assert_eq!(line.get("port"), Some(&*port), "{}", line.raw);
    }
}

#[test]
fn what_waits_in_an_inherited_socket_outlives_the_worker() {
    let ports = Ports::take(1);
    let root = common::www();
    let daemon = Daemon::healthy(&ports.service(&format!("root = {root:?}")), 1);
    let load = Load::start(ports.address(), "/index.html");
    let since = daemon.now();
    kill_hard(daemon.worker_pid(ports.worker(0)));
    daemon.wait_healthy(since, 1);
    load.more(100);
    assert!(load.end().len() <= Load::CLIENTS);
}

#[test]
fn everything_a_killed_worker_started_goes_with_it() {
    let ports = Ports::take(1);
    let daemon = Daemon::healthy(&ports.service(&command(&["http", "--fork"])), 1);
    let before = daemon.processes();
    // lbd, the guard, the program and what it has in the background.
    assert_eq!(before.len(), 4);
    let since = daemon.now();
    kill_hard(daemon.worker_pid(ports.worker(0)));
    daemon.wait_healthy(since, 1);
    eventually("the old ones are gone", || daemon.processes().len() == 4);
    let after = daemon.processes();
    assert_eq!(after.iter().filter(|pid| before.contains(pid)).count(), 1, "lbd alone");
}

#[test]
fn a_killed_guard_takes_its_worker_with_it_and_both_are_replaced() {
    let ports = Ports::take(1);
    let daemon = Daemon::healthy(&ports.service(&command(&["http", "--fork"])), 1);
    let worker = daemon.worker_pid(ports.worker(0));
    let parent = |pid: i32| -> i32 {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        line.unwrap().trim().parse().unwrap()
    };
    let guard = parent(worker);
    assert_ne!(guard, daemon.pid());
    let since = daemon.now();
    kill_hard(guard);
    daemon.wait(since, "worker exited", &[("pid", &worker.to_string())]);
    daemon.wait_healthy(since, 1);
    eventually("the old ones are gone", || daemon.processes().len() == 4);
    assert_eq!(counts(&turns(ports.address(), 3)), [(ports.worker(0), 3)].into());
}

#[test]
fn lbd_killed_leaves_nothing_behind() {
    let ports = Ports::take(2);
    let daemon = Daemon::healthy(&ports.service(&command(&["http", "--fork", "--ignore-term"])), 2);
    assert_eq!(daemon.processes().len(), 7);
    let begun = Instant::now();
    kill_hard(daemon.pid());
    eventually("all workers are gone", || daemon.processes().is_empty());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn a_tcp_probe_waits_until_the_worker_listens() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("gate");
    let words = ["http", "--gate", gate.to_str().unwrap()];
    let daemon = Daemon::start_in(folder, &ports.service(&command(&words)));
    daemon.wait(Mark::START, "worker started", &[]);
    fs::write(&gate, "").unwrap();
    let healthy = daemon.wait(Mark::START, "worker healthy", &[]);
    let started = daemon.wait(Mark::START, "worker started", &[]);
    assert_eq!(healthy.pid(), started.pid());
    assert_eq!(healthy.get("port"), Some(&*ports.worker(0).to_string()));
}

#[test]
fn an_http_probe_asks_as_told() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let status = folder.path().join("status");
    fs::write(&status, "503").unwrap();
    let config = ports.service(&format!(
        "{}\nhealth = {{ http = \"/health\", expect = \"200-299, 418\", host = \"app.test\", \
         interval = \"20ms\" }}",
        command(&["http", "--status", status.to_str().unwrap(), "--heads", "heads"])
    ));
    let daemon = Daemon::start_in(folder, &config);
    let heads = daemon.path("heads");
    eventually("a probe", || {
        fs::read_to_string(&heads).is_ok_and(|text| text.contains("\r\n\r\n"))
    });
    let text = fs::read_to_string(&heads).unwrap();
    let head = text.split_inclusive("\r\n\r\n").next().unwrap().to_ascii_lowercase();
    assert!(head.starts_with("get /health http/1.1\r\n"), "{head:?}");
    assert!(head.contains("\r\nhost: app.test\r\n"), "{head:?}");
    assert!(daemon.said(Mark::START, "worker healthy").is_empty());
    fs::write(&status, "418").unwrap();
    daemon.wait_healthy(Mark::START, 1);
    fs::write(&status, "300").unwrap();
    let line = daemon.wait(Mark::START, "worker unhealthy", &[]);
    assert_eq!(line.get("error"), Some("GET /health: status 300 is not expected"));
}

#[test]
fn an_unhealthy_worker_is_out_of_rotation_until_it_is_well() {
    let ports = Ports::take(2);
    let folder = tempfile::tempdir().unwrap();
    let status = folder.path().join("{port}");
    let words = ["http", "--status", status.to_str().unwrap()];
    let keys = format!(
        "{}\nhealth = {{ http = \"/health\", interval = \"10ms\", fall = 3, rise = 2 }}",
        command(&words)
    );
    let daemon = Daemon::start_in(folder, &ports.service(&keys));
    daemon.wait_healthy(Mark::START, 2);
    let [ill, well] = [ports.worker(0), ports.worker(1)];
    let pid = daemon.worker_pid(ill);
    let port = ill.to_string();
    for _ in 0..2 {
        let since = daemon.now();
        fs::write(daemon.path(&port), "500").unwrap();
        let line = daemon.wait(since, "worker unhealthy", &[("port", &port)]);
        assert_eq!(line.pid(), pid);
        assert_eq!(turns(ports.address(), 4), [well; 4]);
        fs::write(daemon.path(&port), "200").unwrap();
        let line = daemon.wait(since, "worker healthy", &[("port", &port)]);
        assert_eq!(line.pid(), pid);
        assert_eq!(counts(&turns(ports.address(), 4)), [(ill, 2), (well, 2)].into());
    }
    assert!(daemon.said(Mark::START, "worker exited").is_empty());
}

#[test]
fn it_takes_fall_failures_in_a_row() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let status = folder.path().join("status");
    let words = ["http", "--status", status.to_str().unwrap(), "--heads", "heads"];
    let keys = format!(
        "{}\nhealth = {{ http = \"/health\", interval = \"20ms\", fall = 5 }}",
        command(&words)
    );
    let daemon = Daemon::start_in(folder, &ports.service(&keys));
    daemon.wait_healthy(Mark::START, 1);
    fs::write(&status, "500").unwrap();
    let probes = || fs::read_to_string(daemon.path("heads")).unwrap().matches("\r\n\r\n").count();
    let before = probes();
    daemon.wait(Mark::START, "worker unhealthy", &[]);
    // The one on its way when the status changed may have been answered either way.
    assert!(probes() >= before + 4, "{} of 5", probes() - before);
}

#[test]
fn an_unhealthy_worker_is_replaced_after_a_while() {
    let ports = Ports::take(1);
    let keys = format!(
        "{}\nhealth = {{ http = \"/health\", interval = \"10ms\", timeout = \"100ms\", fall = 1 }}\n\
         restart = {{ unhealthy-after = \"300ms\" }}\nrollout.settle = \"20ms\"",
        command(&["http"])
    );
    let daemon = Daemon::healthy(&ports.service(&keys), 1);
    let old = daemon.worker_pid(ports.worker(0));
    let since = daemon.now();
    common::freeze(old);
    daemon.wait(since, "worker unhealthy", &[("pid", &old.to_string())]);
    let line = daemon.wait(since, "worker given up", &[("pid", &old.to_string())]);
    assert!(line.get("error").unwrap().starts_with("unhealthy for 300ms"), "{}", line.raw);
    // Another one is proven, on a port of its own, before the old one is asked to end.
    let stand_in = daemon.wait(since, "worker healthy", &[]);
    daemon.wait(since, "worker exited", &[("pid", &old.to_string())]);
    let port = ports.worker(0).to_string();
    let new = daemon.wait(since, "worker healthy", &[("port", &port)]);
    assert!(new.pid() != old && new.pid() != stand_in.pid());
    daemon.wait(since, "worker exited", &[("pid", &stand_in.pid().to_string())]);
    let steps = daemon.log.lines(since).into_iter();
    let steps = steps.filter(|l| matches!(&*l.message, "worker healthy" | "worker exited"));
    let steps: Vec<_> = steps.map(|line| line.pid()).collect();
    assert_eq!(steps, [stand_in.pid(), old, new.pid(), stand_in.pid()]);
    assert_eq!(turns(ports.address(), 1), [ports.worker(0)]);
}

#[test]
fn a_worker_that_does_not_become_healthy_is_killed_and_counts_as_failed() {
    let ports = Ports::take(1);
    let keys = format!(
        "{}\nhealth.start-timeout = \"200ms\"\nrestart.min-delay = \"10ms\"",
        command(&["silent", "--ignore-term"])
    );
    let daemon = Daemon::start(&ports.service(&keys));
    let line = daemon.wait(Mark::START, "worker given up", &[("failures", "2")]);
    let error = line.get("error").unwrap();
    assert!(error.starts_with("not healthy within 200ms"), "{error}");
    eventually("only the last one is left", || daemon.processes().len() <= 3);
}

#[test]
fn backoff_doubles_and_other_workers_serve() {
    let ports = Ports::take(2);
    let keys = format!(
        "command = [\"sh\", \"-c\", \"[ {{slot}} = 0 ] && exit 7 || exec {} http\"]\n\
         restart = {{ min-delay = \"20ms\", max-delay = \"160ms\" }}",
        fixture()
    );
    let daemon = Daemon::start(&ports.service(&keys));
    let exits = daemon.wait_many(Mark::START, "worker exited", &[("slot", "0")], 6);
    let failures: Vec<u32> = exits.iter().map(|line| line.number("failures")).collect();
    assert_eq!(failures, [1, 2, 3, 4, 5, 6]);
    for (line, least) in exits.iter().zip([0.020, 0.040, 0.080, 0.128, 0.128, 0.128]) {
        let delay: f64 = line.number("restart_in");
        let most = (least * 1.25_f64).min(0.160);
        assert!((least - 0.001..=most + 0.001).contains(&delay), "{least}: {}", line.raw);
        assert_eq!(line.get("status"), Some("exit status 7"));
    }
    assert_eq!(turns(ports.address(), 4), [ports.worker(1); 4]);
}

#[test]
fn after_enough_health_the_first_restart_has_no_delay() {
    let ports = Ports::take(1);
    let keys = format!(
        "{}\nrestart = {{ min-delay = \"20ms\", reset-after = \"1ms\" }}",
        command(&["http"])
    );
    let daemon = Daemon::healthy(&ports.service(&keys), 1);
    let healthy = daemon.wait(Mark::START, "worker healthy", &[]).read.unwrap();
    eventually("healthy for long enough", || healthy.elapsed() > Duration::from_millis(2));
    kill_hard(daemon.worker_pid(ports.worker(0)));
    let line = daemon.wait(Mark::START, "worker exited", &[]);
    assert_eq!(line.number::<f64>("restart_in"), 0.0, "{}", line.raw);
    daemon.wait_healthy(Mark::START, 2);
}

#[test]
fn a_program_that_cannot_be_run_is_one_line_and_backoff() {
    let ports = Ports::take(2);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("plain.txt"), "#!/bin/sh\n").unwrap();
    let service = |name: &str, ports: &Ports, command: &str| {
        ports.service(command).replace("[service.web]", &format!("[service.{name}]"))
    };
    let (missing, denied) = (Ports::take(1), Ports::take(1));
    let config = [
        service("missing", &missing, "command = [\"no-such-program-anywhere\"]"),
        service("denied", &denied, "command = [\"./plain.txt\"]"),
        ports.service(&command(&["http"])),
    ]
    .concat();
    let daemon = Daemon::start_in(folder, &config);
    daemon.wait_healthy(Mark::START, 2);
    for (name, reason) in
        [("missing", "cannot run \"no-such-program-anywhere\""), ("denied", "permission denied")]
    {
        let lines = daemon.wait_many(Mark::START, "worker not started", &[("service", name)], 2);
        for (line, failures) in lines.iter().zip(["1", "2"]) {
            assert!(line.get("error").unwrap().contains(reason), "{}", line.raw);
            assert_eq!(line.get("failures"), Some(failures));
        }
        let delay = |line: &Line| line.number::<f64>("restart_in");
        assert!(delay(&lines[0]) >= 0.1 && delay(&lines[1]) >= 0.2, "{lines:?}");
    }
    assert_eq!(turns(ports.address(), 2), ports.all());
}

#[test]
fn a_number_of_workers_is_on_ports_that_lbd_picks() {
    let ports = Ports::take(0);
    let config = format!(
        "[service.web]\nlisten = \"{}\"\nworkers = 3\n{}",
        ports.address(),
        command(&["http"])
    );
    let daemon = Daemon::healthy(&config, 3);
    let lines = daemon.said(Mark::START, "worker healthy");
    let mut picked: Vec<u16> = lines.iter().map(|line| line.number("port")).collect();
    let mut seen = turns(ports.address(), 3);
    picked.sort_unstable();
    seen.sort_unstable();
    assert_eq!(picked, seen);
    picked.dedup();
    assert_eq!(picked.len(), 3);
}

#[test]
fn a_frozen_worker_is_seen_by_an_http_probe() {
    let ports = Ports::take(2);
    let keys = format!(
        "root = {:?}\nhealth = {{ interval = \"20ms\", timeout = \"100ms\", fall = 2 }}",
        common::www()
    );
    let daemon = Daemon::healthy(&ports.service(&keys), 2);
    let frozen = daemon.worker_pid(ports.worker(0));
    let pid = nix::unistd::Pid::from_raw(frozen);
    nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
    let line = daemon.wait(Mark::START, "worker unhealthy", &[("pid", &frozen.to_string())]);
    assert_eq!(line.get("error"), Some("a connection is not accepted within 100ms"));
    for _ in 0..4 {
        try_get(ports.address(), "/index.html").unwrap();
    }
    nix::sys::signal::kill(pid, Signal::SIGCONT).unwrap();
    daemon.wait_many(Mark::START, "worker healthy", &[("pid", &frozen.to_string())], 2);
}
