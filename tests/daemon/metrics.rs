//! `/metrics` of a running daemon, after traffic and faults that are known.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::common::{
    Daemon, Mark, Ports,
    client::{KeepAlive, Load, answered, asking, connect, get, is_turned_away, turns},
    command, eventually, fixture, freeze, kill_hard,
    metrics::{Metrics, SOCKET, ask, with_admin},
    named,
    promtool::promtool,
    thaw,
};
use socket2::SockRef;

/// Not probed again after the first time.
const ONE_PROBE: &str = "health.interval = \"1h\"";

fn healthy(config: &str, workers: usize) -> Daemon {
    Daemon::healthy(&with_admin(config), workers)
}

/// Waits until `series` has this value.
fn until(daemon: &Daemon, series: &str, value: f64) {
    eventually(&format!("{series} {value}"), || Metrics::of(daemon).get(series) == Some(value));
}

/// Sends `request`, and tells how many bytes came back.
fn exchange(address: SocketAddr, request: &str) -> usize {
    let mut client = connect(address);
    client.write_all(request.as_bytes()).unwrap();
    client.read_to_end(&mut Vec::new()).unwrap()
}

#[test]
fn connections_and_bytes_are_exact() {
    let ports = Ports::take(2);
    let daemon = healthy(&ports.service(&command(&["http"])), 2);
    let request = "GET /bytes/1000 HTTP/1.1\r\nConnection: close\r\n\r\n";
    let sent: usize = (0..10).map(|_| exchange(ports.address(), request)).sum();
    daemon.wait_many(Mark::START, "connection", &[("end", "closed")], 10);
    // The line comes before the sockets are closed.
    eventually("none is held", || Metrics::of(&daemon).sum("lbd_connections_active") == 0.0);
    let mut open = KeepAlive::new(ports.address());
    open.get("/bytes/0").unwrap();
    let metrics = Metrics::of(&daemon);
    for (slot, active) in [(0, 1.0), (1, 0.0)] {
        let of = |name: &str| metrics.value(&format!("{name}{{service=\"web\",slot=\"{slot}\"}}"));
        assert_eq!(of("lbd_connections_active"), active);
        assert_eq!(of("lbd_connections_total"), 5.0 + active);
        assert_eq!(of("lbd_connect_duration_seconds_count"), 5.0 + active);
        assert_eq!(of("lbd_connection_duration_seconds_count"), 5.0, "of those that ended");
        assert!(of("lbd_connection_duration_seconds_sum") > 0.0);
        assert_eq!(of("lbd_worker_up"), 1.0);
        assert_eq!(of("lbd_worker_restarts_total"), 0.0);
        let other = metrics.sum(&format!("lbd_connections_failed_total{{slot=\"{slot}\"}}"));
        assert_eq!(other, 0.0);
    }
    let second = "{slot=\"1\"}";
    assert_eq!(
        metrics.value(&format!("lbd_received_bytes_total{second}")),
        request.len() as f64 * 5.0
    );
    assert_eq!(metrics.value(&format!("lbd_sent_bytes_total{second}")), sent as f64 / 2.0);
    assert_eq!(metrics.sum("lbd_connections_held_total"), 0.0);
    assert_eq!(metrics.sum("lbd_connections_retried_total"), 0.0);
}

#[test]
fn the_page_is_one_that_prometheus_takes() {
    let ports = Ports::take(1);
    let daemon = healthy(&ports.service(&command(&["http"])), 1);
    let (head, page) = ask(&daemon.path(SOCKET), "GET");
    let header = "\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n";
    assert!(head.starts_with("HTTP/1.1 200 ") && head.contains(header), "{head}");
    assert!(page.ends_with('\n'));
    let (head, nothing) = ask(&daemon.path(SOCKET), "HEAD");
    assert!(head.starts_with("HTTP/1.1 200 ") && head.contains(header), "{head}");
    assert_eq!(nothing, "");
    let (head, _) = ask(&daemon.path(SOCKET), "POST");
    assert!(head.starts_with("HTTP/1.1 405 "), "{head}");

    let metrics = Metrics::parse(page);
    assert_eq!(metrics.value("lbd_config_last_reload_successful"), 1.0);
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(metrics.value(&format!("lbd_build_info{{version=\"{version}\"}}")), 1.0);
    let state = |state: &str| metrics.value(&format!("lbd_worker_state{{state=\"{state}\"}}"));
    assert_eq!((state("healthy"), state("starting"), state("backoff")), (1.0, 0.0, 0.0));
    assert!(metrics.value("lbd_worker_resident_memory_bytes") > 100_000.0);
    assert!(metrics.value("lbd_worker_cpu_seconds_total") >= 0.0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    // The clock may have been set since the machine was booted, if hardly by minutes.
    for start in [
        "process_start_time_seconds",
        "lbd_worker_start_time_seconds",
        "lbd_config_last_reload_success_timestamp_seconds",
    ] {
        let since = now - metrics.value(start);
        assert!((-60.0..600.0).contains(&since), "{start}: {since} s ago");
    }
    assert!(metrics.value("process_resident_memory_bytes") > 1e6);
    assert!(metrics.value("process_open_fds") < metrics.value("process_max_fds"));
    for (name, family) in &metrics.families {
        assert!(!family.help.is_empty() && !family.kind.is_empty(), "{name}");
        assert!(name.starts_with("lbd_") || name.starts_with("process_"), "{name}");
    }
}

#[test]
fn promtool_has_nothing_to_complain_about() {
    let ports = Ports::take(2);
    let daemon = healthy(&ports.service(&command(&["http"])), 2);
    turns(ports.address(), 4);
    let page = Metrics::of(&daemon).text;
    let said = promtool(daemon.folder.path(), &["check", "metrics"], &page);
    assert_eq!(said.unwrap_or_default(), "");
}

#[test]
fn a_worker_that_refuses_is_counted_and_the_connection_is_not_lost() {
    let ports = Ports::take(3);
    // It listens until it is told not to, and lives on: only the connect tells.
    let keys = format!(
        "command = [\"sh\", \"-c\", \"\"\"[ {{slot}} = 1 ] && exec {0} closing stop || exec {0} http\"\"\"]\n{ONE_PROBE}",
        fixture()
    );
    let daemon = healthy(&ports.service(&keys), 3);
    daemon.tell_worker("stop");
    turns(ports.address(), 12);
    let metrics = Metrics::of(&daemon);
    assert_eq!(metrics.value("lbd_connect_failures_total{slot=\"1\",reason=\"refused\"}"), 6.0);
    assert_eq!(metrics.sum("lbd_connect_failures_total"), 6.0);
    assert_eq!(metrics.value("lbd_connections_retried_total"), 6.0);
    let totals = ["0", "1", "2"]
        .map(|slot| metrics.value(&format!("lbd_connections_total{{slot=\"{slot}\"}}")));
    assert_eq!(totals, [6.0, 0.0, 6.0]);
    assert_eq!(metrics.sum("lbd_connections_failed_total"), 0.0);
}

#[test]
fn a_worker_that_stalls_is_counted_by_its_timeout() {
    let ports = Ports::take(2);
    let keys = format!(
        "command = [\"sh\", \"-c\", \"\"\"[ {{slot}} = 0 ] && exec {0} stalling stop || exec {0} http\"\"\"]\n\
         connect-timeout = \"50ms\"\n{ONE_PROBE}",
        fixture()
    );
    let daemon = healthy(&ports.service(&keys), 2);
    daemon.tell_worker("stop");
    turns(ports.address(), 3);
    let metrics = Metrics::of(&daemon);
    // Once, and then it is left alone for a second.
    let failures = metrics.sum("lbd_connect_failures_total");
    assert!((1.0..3.0).contains(&failures), "{failures}");
    let timeouts = "lbd_connect_failures_total{slot=\"0\",reason=\"timeout\"}";
    assert_eq!(metrics.value(timeouts), failures);
    assert_eq!(metrics.value("lbd_connections_retried_total"), failures);
    let at_once = "lbd_connect_duration_seconds_bucket{slot=\"1\",le=\"0.0001\"}";
    assert_eq!(metrics.value(at_once), 3.0);
}

#[test]
fn ends_are_counted_by_their_reasons() {
    let ports = Ports::take(1);
    let keys = format!("{}\nidle-timeout = \"100ms\"", command(&["echo"]));
    let daemon = healthy(&ports.service(&keys), 1);
    let client = |ports: &Ports| {
        let mut client = connect(ports.address());
        client.write_all(b"a").unwrap();
        client.read_exact(&mut [0]).unwrap();
        client
    };
    let closed = client(&ports);
    closed.shutdown(Shutdown::Write).unwrap();
    (&closed).read_to_end(&mut Vec::new()).unwrap();
    let reset = client(&ports);
    SockRef::from(&reset).set_linger(Some(Duration::ZERO)).unwrap();
    drop(reset);
    daemon.wait(Mark::START, "connection", &[("end", "client-reset")]);
    let idle = client(&ports);
    daemon.wait(Mark::START, "connection", &[("end", "idle")]);
    drop(idle);

    let other = Ports::take(1);
    let reset = named("resetting", &other.service(&command(&["reset"])));
    daemon.must_reload(&with_admin(&format!("{}\n{reset}", ports.service(&keys))));
    daemon.wait(Mark::START, "worker healthy", &[("service", "resetting")]);
    let mut client = connect(other.address());
    client.write_all(b"a").unwrap();
    client.read_to_end(&mut Vec::new()).unwrap_err();
    daemon.wait(Mark::START, "connection", &[("end", "worker-reset")]);

    let metrics = Metrics::of(&daemon);
    let failed = |service: &str, slot: &str, reason: &str| {
        metrics.value(&format!(
            "lbd_connections_failed_total{{service=\"{service}\",slot=\"{slot}\",reason=\"{reason}\"}}"
        ))
    };
    assert_eq!(failed("web", "0", "client-reset"), 1.0);
    assert_eq!(failed("web", "0", "idle"), 1.0);
    assert_eq!(failed("resetting", "0", "worker-reset"), 1.0);
    assert_eq!(metrics.sum("lbd_connections_failed_total"), 3.0);
    let ended = "lbd_connection_duration_seconds_count{service=\"web\"}";
    assert_eq!(metrics.value(ended), 3.0);
    let idle = |le: &str| {
        metrics.value(&format!(
            "lbd_connection_duration_seconds_bucket{{service=\"web\",le=\"{le}\"}}"
        ))
    };
    assert!(idle("0.1") < 3.0, "the idle one lasted for longer");
    assert_eq!(idle("3600"), 3.0);
}

#[test]
fn who_waits_for_a_worker_is_counted_and_timed() {
    let ports = Ports::take(2);
    let folder = tempfile::tempdir().unwrap();
    let gate = folder.path().join("gate");
    let words = ["http", "--gate", gate.to_str().unwrap()];
    let config = with_admin(&ports.service(&command(&words)));
    let daemon = Daemon::start_in(folder, &config);
    daemon.wait_many(Mark::START, "worker started", &[], 2);
    let address = ports.address();
    let begun = Instant::now();
    let clients: Vec<_> = (0..8).map(|_| thread::spawn(move || get(address, "/"))).collect();
    until(&daemon, "lbd_connections_waiting", 8.0);
    let metrics = Metrics::of(&daemon);
    assert_eq!(metrics.value("lbd_connections_held_total"), 8.0);
    assert_eq!(metrics.value("lbd_hold_duration_seconds_count"), 0.0);
    assert_eq!(metrics.sum("lbd_worker_up"), 0.0);
    assert_eq!(metrics.sum("lbd_worker_state{state=\"starting\"}"), 2.0);
    fs::write(gate, "").unwrap();
    for client in clients {
        client.join().unwrap();
    }
    let metrics = Metrics::of(&daemon);
    assert_eq!(metrics.value("lbd_connections_waiting"), 0.0);
    assert_eq!(metrics.value("lbd_connections_held_total"), 8.0);
    assert_eq!(metrics.value("lbd_hold_duration_seconds_count"), 8.0);
    let waited = metrics.value("lbd_hold_duration_seconds_sum");
    assert!(waited > 0.0 && waited <= 8.0 * begun.elapsed().as_secs_f64(), "{waited}");
    assert_eq!(metrics.sum("lbd_connections_total"), 8.0);
    assert_eq!(metrics.sum("lbd_connections_failed_total"), 0.0);
}

#[test]
fn who_gets_no_worker_is_counted_by_the_reason() {
    let (silent, dead) = (Ports::take(1), Ports::take(1));
    let silent_keys = format!("{}\nhold-timeout = \"100ms\"", command(&["silent"]));
    let dead_keys = format!(
        "{}\nhold-timeout = \"5s\"\nrestart.min-delay = \"1h\"\nrestart.max-delay = \"1h\"",
        command(&["exit", "3"])
    );
    let services =
        format!("{}\n{}", silent.service(&silent_keys), named("dead", &dead.service(&dead_keys)));
    let daemon = Daemon::start(&with_admin(&services));
    daemon.wait(Mark::START, "worker started", &[("service", "web")]);
    daemon.wait(Mark::START, "worker exited", &[("service", "dead")]);
    for address in [silent.address(), dead.address(), dead.address()] {
        assert!(is_turned_away(address));
    }
    daemon.wait(Mark::START, "connection", &[("service", "web"), ("end", "hold-timeout")]);
    daemon.wait_many(Mark::START, "connection", &[("end", "no-worker")], 2);
    let metrics = Metrics::of(&daemon);
    let failed = |service: &str, reason: &str| {
        metrics.value(&format!(
            "lbd_connections_failed_total{{service=\"{service}\",slot=\"\",reason=\"{reason}\"}}"
        ))
    };
    assert_eq!((failed("web", "hold-timeout"), failed("web", "no-worker")), (1.0, 0.0));
    assert_eq!((failed("dead", "hold-timeout"), failed("dead", "no-worker")), (0.0, 2.0));
    assert_eq!(metrics.sum("lbd_connections_failed_total"), 3.0);
    let held =
        |what: &str, service: &str| metrics.value(&format!("{what}{{service=\"{service}\"}}"));
    assert_eq!(held("lbd_connections_held_total", "web"), 1.0);
    assert_eq!(held("lbd_hold_duration_seconds_count", "web"), 1.0);
    // Its time is up after 100 ms, of which the first went by before it was placed.
    assert!(held("lbd_hold_duration_seconds_sum", "web") >= 0.09);
    assert_eq!(held("lbd_connections_held_total", "dead"), 0.0);

    let dead = |what: &str| metrics.value(&format!("{what}{{service=\"dead\"}}"));
    assert!((3000.0..=3600.0).contains(&dead("lbd_worker_backoff_seconds")));
    assert_eq!(dead("lbd_worker_consecutive_failures"), 1.0);
    assert_eq!(metrics.value("lbd_worker_exits_total{service=\"dead\",cause=\"exit\"}"), 1.0);
    let state = "lbd_worker_state{service=\"dead\",state=\"backoff\"}";
    assert_eq!((metrics.value(state), dead("lbd_worker_up")), (1.0, 0.0));
    assert_eq!(metrics.get("lbd_worker_resident_memory_bytes{service=\"dead\"}"), None);
    assert_eq!(metrics.get("lbd_worker_start_time_seconds{service=\"dead\"}"), None);
}

#[test]
fn who_is_rescued_is_counted_once_more() {
    const CLIENTS: usize = 40;
    let ports = Ports::take(2);
    let keys = format!(
        "{}\nsocket = \"inherit\"\nhealth = {{ http = \"/health\", interval = \"100ms\", timeout = \"200ms\", fall = 2 }}",
        command(&["http"])
    );
    let daemon = healthy(&ports.service(&keys), 2);
    let frozen = daemon.worker_pid(ports.worker(0));
    freeze(frozen);
    let asked = asking(CLIENTS, ports.address());
    answered(asked);
    let metrics = Metrics::of(&daemon);
    let rescued = metrics.value("lbd_connections_rescued_total");
    assert!(rescued >= 1.0);
    // Each of those was handed out twice: to the worker that hangs, and to the other.
    assert_eq!(metrics.sum("lbd_connections_total"), CLIENTS as f64 + rescued);
    assert!(metrics.value("lbd_probes_total{slot=\"0\",result=\"fail\"}") >= 2.0);
    assert_eq!(metrics.value("lbd_worker_state{slot=\"0\",state=\"unhealthy\"}"), 1.0);
    thaw(frozen);
}

#[test]
fn exits_are_counted_by_their_causes() {
    let ports = Ports::take(1);
    let inherit = |keys: &str| ports.service(&format!("{keys}\nsocket = \"inherit\""));
    let daemon = healthy(&inherit(&command(&["http"])), 1);
    let exits = |cause: &str| format!("lbd_worker_exits_total{{cause=\"{cause}\"}}");
    kill_hard(daemon.worker_pid(ports.worker(0)));
    daemon.wait_healthy(Mark::START, 2);
    let metrics = Metrics::of(&daemon);
    assert_eq!(metrics.value(&exits("signal")), 1.0);
    assert_eq!(metrics.sum("lbd_worker_exits_total"), 1.0);
    assert_eq!(metrics.value("lbd_worker_restarts_total"), 1.0);
    // Asked to end, by a signal of lbd's own.
    assert!(daemon.lbd(&["restart"]).status.success());
    until(&daemon, &exits("stopped"), 1.0);
    // Not to be started.
    daemon.must_reload(&with_admin(&inherit("command = [\"/no/such/program\"]")));
    daemon.wait(Mark::START, "worker not started", &[]);
    eventually("the old one is back", || {
        let metrics = Metrics::of(&daemon);
        metrics.value(&exits("not-started")) >= 1.0 && metrics.value("lbd_worker_up") == 1.0
    });
    // Never healthy.
    let silent = format!("{}\nhealth.start-timeout = \"100ms\"", command(&["silent"]));
    daemon.must_reload(&with_admin(&inherit(&silent)));
    eventually("it is given up", || Metrics::of(&daemon).value(&exits("unhealthy")) >= 1.0);
    let metrics = Metrics::of(&daemon);
    assert_eq!(metrics.value(&exits("signal")), 1.0);
    assert_eq!(metrics.value(&exits("exit")), 0.0);
}

#[test]
fn probes_are_counted_and_timed() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let status = folder.path().join("status");
    let keys = format!(
        "{}\nhealth = {{ http = \"/health\", interval = \"20ms\", fall = 1000 }}",
        command(&["http", "--status", status.to_str().unwrap()])
    );
    let config = with_admin(&ports.service(&keys));
    let daemon = Daemon::start_in(folder, &config);
    daemon.wait_healthy(Mark::START, 1);
    let results = |metrics: &Metrics| {
        ["pass", "fail"]
            .map(|result| metrics.value(&format!("lbd_probes_total{{result=\"{result}\"}}")))
    };
    eventually("it passes", || results(&Metrics::of(&daemon))[0] >= 5.0);
    let before = results(&Metrics::of(&daemon))[1];
    fs::write(status, "500").unwrap();
    eventually("it fails", || results(&Metrics::of(&daemon))[1] >= before + 5.0);
    let metrics = Metrics::of(&daemon);
    assert_eq!(
        metrics.value("lbd_probe_duration_seconds_count"),
        results(&metrics).iter().sum::<f64>()
    );
    assert!(metrics.value("lbd_probe_duration_seconds_sum") > 0.0);
}

#[test]
fn reloads_are_counted_by_their_results() {
    let ports = Ports::take(1);
    let config = with_admin(&ports.service(&command(&["http"])));
    let daemon = Daemon::healthy(&config, 1);
    let result = |result: &str| format!("lbd_config_reloads_total{{result=\"{result}\"}}");
    let began = Metrics::of(&daemon).value("lbd_config_last_reload_success_timestamp_seconds");
    daemon.must_reload(&format!("{config}\n[log]\naccess = false\n"));
    until(&daemon, &result("ok"), 1.0);
    let succeeded = Metrics::of(&daemon).value("lbd_config_last_reload_success_timestamp_seconds");
    assert!(succeeded > began);

    assert_eq!(daemon.reload("[service.web]\nworkers = 0\n").message, "reload refused");
    let metrics = Metrics::of(&daemon);
    assert_eq!(metrics.value(&result("refused")), 1.0);
    assert_eq!(metrics.value("lbd_config_last_reload_successful"), 0.0);

    // Accepted, but the new worker fails.
    daemon.must_reload(&with_admin(&ports.service(&command(&["exit", "3"]))));
    until(&daemon, &result("failed"), 1.0);
    let metrics = Metrics::of(&daemon);
    assert_eq!(metrics.value("lbd_config_last_reload_successful"), 0.0);
    let timestamp = "lbd_config_last_reload_success_timestamp_seconds";
    assert_eq!(metrics.value(timestamp), succeeded, "of what is in force again");

    daemon.must_reload(&config);
    until(&daemon, &result("ok"), 2.0);
    assert_eq!(Metrics::of(&daemon).value("lbd_config_last_reload_successful"), 1.0);
    assert_eq!(Metrics::of(&daemon).sum("lbd_config_reloads_total"), 4.0);
}

#[test]
fn no_counter_ever_falls() {
    let ports = Ports::take(2);
    // Whoever holds a connection open is waited for, but not for long.
    let keys = format!("{}\nstop.drain-timeout = \"500ms\"", command(&["http"]));
    let daemon = healthy(&ports.service(&keys), 2);
    let mut last = Metrics::of(&daemon);
    let mut look = || {
        let now = Metrics::of(&daemon);
        for (series, before) in last.growing() {
            let after = now.get(series).unwrap_or_else(|| panic!("{series} is gone"));
            assert!(after >= before, "{series} fell from {before} to {after}");
        }
        last = now;
    };
    let load = Load::start(ports.address(), "/bytes/100");
    for _ in 0..2 {
        let mut lasting = KeepAlive::new(ports.address());
        lasting.get("/").unwrap();
        thread::scope(|scope| {
            let restart = scope.spawn(|| daemon.lbd(&["restart", "web"]));
            while !restart.is_finished() {
                look();
            }
            assert!(restart.join().unwrap().status.success());
        });
        load.more(20);
        look();
    }
    load.end_without_failure();
    kill_hard(daemon.worker_pid(ports.worker(0)));
    eventually("it is started again", || {
        look();
        // Two at the start, this one, and in each restart two for each slot: one that stands in
        // while the port is handed over, and one on the port.
        daemon.said(Mark::START, "worker healthy").len() == 2 + 1 + 2 * 2 * 2
    });
    eventually("all have ended", || Metrics::of(&daemon).sum("lbd_connections_active") == 0.0);
    look();
    // Each connection that was logged was counted, in whatever generation.
    let metrics = Metrics::of(&daemon);
    let count = metrics.sum("lbd_connections_total") as usize;
    let logged = daemon.wait_many(Mark::START, "connection", &[], count);
    for (slot, restarts) in [("0", 1.0), ("1", 0.0)] {
        let of = |name: &str| metrics.value(&format!("{name}{{slot=\"{slot}\"}}"));
        let of_slot = || logged.iter().filter(|line| line.get("slot") == Some(slot));
        assert_eq!(of("lbd_connections_total"), of_slot().count() as f64);
        assert_eq!(of("lbd_connection_duration_seconds_count"), of_slot().count() as f64);
        let bytes =
            |field: &str| of_slot().map(|line| line.number::<u64>(field)).sum::<u64>() as f64;
        assert_eq!(of("lbd_sent_bytes_total"), bytes("sent"));
        assert_eq!(of("lbd_received_bytes_total"), bytes("received"));
        assert_eq!(of("lbd_worker_restarts_total"), restarts);
    }
}

#[test]
fn bytes_that_come_after_their_worker_is_gone_are_counted() {
    let ports = Ports::take(1);
    let daemon = healthy(&ports.service(&command(&["http"])), 1);
    let mut client = connect(ports.address());
    client.write_all(b"GET /bytes/64000000 HTTP/1.1\r\n\r\n").unwrap();
    let sent = || Metrics::of(&daemon).value("lbd_sent_bytes_total");
    eventually("lbd waits for the client", || {
        let before = sent();
        thread::sleep(Duration::from_millis(50));
        before > 0.0 && before == sent()
    });
    // What the kernel has of its answer still comes.
    kill_hard(daemon.worker_pid(ports.worker(0)));
    daemon.wait_healthy(Mark::START, 2);
    let before = sent();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert!(answer.len() as f64 > before, "{} of {before}", answer.len());
    drop(client);
    daemon.wait(Mark::START, "connection", &[("sent", &answer.len().to_string())]);
    let metrics = Metrics::of(&daemon);
    assert_eq!(metrics.value("lbd_sent_bytes_total"), answer.len() as f64);
    assert_eq!(metrics.value("lbd_connection_duration_seconds_count"), 1.0);
}

#[test]
fn what_a_reload_removes_is_gone() {
    let (ports, other) = (Ports::take(3), Ports::take(1));
    let web = |workers: &[u16]| ports.service_of(workers, &command(&["http"]));
    let odd = "a.b-c_D.9";
    // Such a name is quoted in TOML.
    let other_service = named(&format!("\"{odd}\""), &other.service(&command(&["http"])));
    let both = with_admin(&format!("{}\n{other_service}", web(&ports.all())));
    let daemon = Daemon::healthy(&both, 4);
    turns(ports.address(), 6);
    turns(other.address(), 2);
    let total = format!("lbd_connections_total{{service=\"{odd}\",slot=\"0\"}}");
    assert_eq!(Metrics::of(&daemon).value(&total), 2.0);

    daemon.must_reload(&with_admin(&web(&ports.all()[..2])));
    eventually("it is gone", || {
        let metrics = Metrics::of(&daemon);
        !metrics.mentions(&format!("service=\"{odd}\"")) && !metrics.mentions("slot=\"2\"")
    });
    let metrics = Metrics::of(&daemon);
    assert_eq!(metrics.value("lbd_connections_total{slot=\"1\"}"), 2.0, "the others go on");
    // Whoever comes back begins anew.
    daemon.must_reload(&both);
    daemon.wait(Mark::START, "worker healthy", &[("service", odd)]);
    assert_eq!(Metrics::of(&daemon).value(&total), 0.0);
}

#[test]
fn scrapers_that_do_not_read_hold_up_nobody() {
    let ports = Ports::take(1);
    let daemon = healthy(&ports.service(&command(&["http"])), 1);
    let request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let slow: Vec<_> = (0..12)
        .map(|_| {
            let mut slow = UnixStream::connect(daemon.path(SOCKET)).unwrap();
            // More answers than there is room for between here and there.
            for _ in 0..200 {
                slow.write_all(request).unwrap();
            }
            slow
        })
        .collect();
    let began = Instant::now();
    turns(ports.address(), 50);
    Metrics::of(&daemon);
    kill_hard(daemon.worker_pid(ports.worker(0)));
    daemon.wait_healthy(Mark::START, 2);
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    drop(slow);
}
