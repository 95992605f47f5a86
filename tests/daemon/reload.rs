//! SIGHUP: the difference is applied, and what did not change goes on as it was.

use std::net::{Shutdown, TcpListener, TcpStream};

use crate::common::{
    self, Daemon, Mark, Ports,
    client::{KeepAlive, Load, counts, get, turns},
    command, eventually, kill_hard, named, www,
};
use nix::sys::signal::Signal;

#[test]
fn a_service_is_added_and_removed() {
    let (web, api) = (Ports::take(2), Ports::take(2));
    let one = web.service(&command(&["http"]));
    let both = format!("{one}{}", named("api", &api.service(&command(&["http"]))));
    let daemon = Daemon::healthy(&one, 2);
    let pids = daemon.pids(&web);
    let load = Load::start(web.address(), "/");

    let line = daemon.must_reload(&both);
    assert_eq!(
        (line.get("added"), line.get("removed"), line.get("changed")),
        (Some("1"), Some("0"), Some("0"))
    );
    daemon.wait(Mark::START, "listening", &[("service", "api")]);
    daemon.wait_many(Mark::START, "worker healthy", &[("service", "api")], 2);
    assert_eq!(turns(api.address(), 4), [api.all(), api.all()].concat());

    let line = daemon.must_reload(&one);
    assert_eq!(
        (line.get("added"), line.get("removed"), line.get("changed")),
        (Some("0"), Some("1"), Some("0"))
    );
    daemon.wait_many(Mark::START, "worker exited", &[("service", "api")], 2);
    eventually("nobody listens there", || TcpStream::connect(api.address()).is_err());
    // lbd, and a guard and a program for each.
    eventually("nothing of it is left", || daemon.processes().len() == 5);
    for port in api.all() {
        TcpListener::bind(("127.0.0.1", port)).unwrap();
    }
    load.end_without_failure();
    assert_eq!(daemon.pids(&web), pids);
}

/// Takes ports away and adds others, under load.
fn ports_come_and_go(keys: &str, path: &'static str) {
    let ports = Ports::take(4);
    let [a, b, c, d] = ports.all().try_into().unwrap();
    let daemon = Daemon::healthy(&ports.service_of(&[a, b], keys), 2);
    let pid = |port: u16| daemon.worker_pid(port);
    let healthy = |port: u16| {
        daemon.wait(Mark::START, "worker healthy", &[("port", &port.to_string())]);
        pid(port)
    };
    let gone = |port: u16| {
        daemon.wait(Mark::START, "worker exited", &[("port", &port.to_string())]);
    };
    let (pid_a, pid_b) = (pid(a), pid(b));
    let load = Load::start(ports.address(), path);
    daemon.must_reload(&ports.service_of(&[a, b, c, d], keys));
    let (pid_c, pid_d) = (healthy(c), healthy(d));
    load.more(100);
    daemon.must_reload(&ports.service_of(&[d, b], keys));
    gone(a);
    gone(c);
    load.more(100);
    daemon.must_reload(&ports.service_of(&[c, b, d], keys));
    eventually("the new one on an old port", || pid(c) != pid_c);
    daemon.wait(Mark::START, "worker healthy", &[("pid", &pid(c).to_string())]);
    load.more(100);
    load.end_without_failure();
    assert_eq!((pid(a), pid(b), pid(d)), (pid_a, pid_b, pid_d));
    assert_eq!(daemon.said(Mark::START, "worker exited").len(), 2);
    assert_eq!(daemon.said(Mark::START, "reloaded").len(), 3);
}

#[test]
fn ports_come_and_go_without_a_failed_request() {
    ports_come_and_go(&command(&["http"]), "/");
}

#[test]
fn ports_of_built_in_workers_come_and_go_without_a_failed_request() {
    ports_come_and_go(&format!("root = {:?}", www()), "/page.html");
}

#[test]
fn the_order_of_ports_is_the_order_of_turns() {
    let ports = Ports::take(3);
    let [a, b, c] = ports.all().try_into().unwrap();
    let daemon = Daemon::healthy(&ports.service(&command(&["http"])), 3);
    let pids = daemon.pids(&ports);
    daemon.must_reload(&ports.service_of(&[c, a, b], &command(&["http"])));
    let seen = turns(ports.address(), 6);
    let start = seen.iter().position(|port| *port == c).unwrap();
    assert_eq!(seen[start..start + 3], [c, a, b]);
    assert_eq!(daemon.pids(&ports), pids);
}

#[test]
fn policies_change_without_touching_workers() {
    let ports = Ports::take(3);
    let keys = command(&["http"]);
    let daemon = Daemon::healthy(&ports.service(&keys), 3);
    let pids = daemon.pids(&ports);
    let mut held = KeepAlive::new(ports.address());
    held.get("/").unwrap();
    let line = daemon.must_reload(&ports.service(&format!(
        "{keys}\nbalance = \"source-hash\"\nmax-connections = 7\nconnect-timeout = \"2s\"\n\
         idle-timeout = \"2h\"\nhold-timeout = \"1s\"\nhealth.interval = \"50ms\"\n\
         restart.min-delay = \"1s\"\nstop.timeout = \"1s\""
    )));
    assert_eq!(line.get("changed"), Some("1"));
    // The same client, so one worker.
    assert_eq!(counts(&turns(ports.address(), 9)).len(), 1);
    assert_eq!(held.get("/").unwrap().0, 200);
    assert_eq!(daemon.pids(&ports), pids);
    assert!(daemon.said(Mark::START, "worker exited").is_empty());
}

#[test]
fn the_same_file_changes_nothing() {
    let ports = Ports::take(2);
    let config = ports.service(&command(&["http"]));
    let daemon = Daemon::healthy(&config, 2);
    let since = daemon.now();
    let line = daemon.must_reload(&format!("# a comment\n{config}\n"));
    for key in ["added", "removed", "changed"] {
        assert_eq!(line.get(key), Some("0"), "{}", line.raw);
    }
    assert_eq!(turns(ports.address(), 4).len(), 4);
    assert!(daemon.said(since, "worker started").is_empty());
}

#[test]
fn a_wrong_file_is_one_line_and_changes_nothing() {
    let ports = Ports::take(2);
    let config = ports.service(&command(&["http"]));
    let daemon = Daemon::healthy(&config, 2);
    let pids = daemon.pids(&ports);
    let load = Load::start(ports.address(), "/");
    let lines = config.lines().count();
    for (broken, wanted) in [
        (
            format!("{config}balnce = 1\nworkers = 2\n"),
            vec![
                format!(
                    "lb.toml:{}: service.web.balnce: unknown key; did you mean `balance`?",
                    lines + 1
                ),
                format!("lb.toml:{}: service.web.workers: ", lines + 2),
            ],
        ),
        (format!("{config}[log"), vec![format!("lb.toml:{}: not valid TOML", lines + 1)]),
        (String::new(), vec!["lb.toml: no service".to_owned()]),
        (
            "[service.web]\nroot = \"nowhere\"\nlisten = \"127.0.0.1:1\"".to_owned(),
            vec!["lb.toml:2: service.web.root: ".to_owned()],
        ),
    ] {
        let since = daemon.now();
        let line = daemon.reload(&broken);
        assert_eq!(line.message, "reload refused", "{}", line.raw);
        let error = line.get("error").unwrap();
        for part in wanted {
            assert!(error.contains(&part), "{part} in {error}");
        }
        load.more(50);
        assert_eq!(daemon.said(since, "reload refused").len(), 1);
        assert!(daemon.said(since, "reloaded").is_empty());
    }
    std::fs::remove_file(daemon.path("lb.toml")).unwrap();
    let since = daemon.now();
    daemon.signal(Signal::SIGHUP);
    let line = daemon.wait(since, "reload refused", &[]);
    assert!(line.get("error").unwrap().contains("lb.toml: no such file"), "{}", line.raw);
    load.end_without_failure();
    assert_eq!(daemon.pids(&ports), pids);
    assert!(daemon.said(Mark::START, "worker exited").is_empty());
    // And it is not stuck.
    daemon.must_reload(&config);
}

#[test]
fn the_address_changes_and_old_connections_go_on() {
    let (old, new) = (Ports::take(2), Ports::take(0));
    let keys = command(&["http"]);
    let config = old.service(&keys);
    let daemon = Daemon::healthy(&config, 2);
    let pids = daemon.pids(&old);
    let mut held = KeepAlive::new(old.address());
    held.get("/").unwrap();
    daemon.must_reload(&config.replace(&old.address().to_string(), &new.address().to_string()));
    daemon.wait(Mark::START, "listening", &[("address", &new.address().to_string())]);
    assert_eq!(counts(&turns(new.address(), 4)).len(), 2);
    eventually("nobody listens on the old one", || TcpStream::connect(old.address()).is_err());
    assert_eq!(held.get("/").unwrap().0, 200);
    assert_eq!(daemon.pids(&old), pids);
    // And back, at once.
    daemon.must_reload(&config);
    assert_eq!(counts(&turns(old.address(), 4)).len(), 2);
}

#[test]
fn an_address_that_is_taken_refuses_the_whole_reload() {
    let (web, other) = (Ports::take(2), Ports::take(1));
    let keys = command(&["http"]);
    let config = web.service(&keys);
    let daemon = Daemon::healthy(&config, 2);
    let _somebody = TcpListener::bind(other.address()).unwrap();
    let changed = web.service_of(&[web.worker(0)], &keys);
    let line = daemon.reload(&format!("{changed}{}", named("other", &other.service(&keys))));
    assert_eq!(line.message, "reload refused");
    let error = line.get("error").unwrap();
    assert!(
        error.contains("service other") && error.contains(&other.address().to_string()),
        "{error}"
    );
    assert_eq!(turns(web.address(), 4), [web.all(), web.all()].concat());
    assert!(daemon.said(Mark::START, "worker exited").is_empty());
    assert_eq!(daemon.said(Mark::START, "worker started").len(), 2);
    assert!(daemon.said(Mark::START, "reloaded").is_empty());
}

#[test]
fn log_level_and_access_change_at_once() {
    let ports = Ports::take(1);
    let service = ports.service(&command(&["http"]));
    let daemon = Daemon::healthy(&service, 1);
    let with = |log: &str| format!("[log]\n{log}\n{service}");
    // The client that ended its side first sees the end once the connection is over and logged.
    let connect = || {
        let mut client = KeepAlive::new(ports.address());
        client.get("/").unwrap();
        client.stream().shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.rest().unwrap(), b"");
        client.stream().local_addr().unwrap().to_string()
    };
    let mut logged = vec![connect()];
    daemon.must_reload(&with("access = false"));
    connect();
    connect();
    daemon.must_reload(&with("access = true"));
    logged.push(connect());
    daemon.wait_many(Mark::START, "connection", &[], 2);

    // With a level of warn even the outcome is not written; what went wrong is.
    daemon.write_config(&with("level = \"warn\""));
    let since = daemon.now();
    daemon.signal(Signal::SIGHUP);
    kill_hard(daemon.worker_pid(ports.worker(0)));
    daemon.wait(since, "worker exited", &[]);
    connect();
    let line = daemon.reload("");
    assert_eq!(line.message, "reload refused");
    let said = daemon.log.lines(since);
    assert!(said.iter().all(|line| line.level == "WARN"), "{said:?}");

    daemon.must_reload(&with("level = \"info\""));
    logged.push(connect());
    let lines = daemon.wait_many(Mark::START, "connection", &[], 3);
    let clients: Vec<_> = lines.iter().map(|line| line.get("client").unwrap()).collect();
    assert_eq!(clients, logged);
}

#[test]
fn what_needs_a_restart_is_refused() {
    let ports = Ports::take(1);
    let service = ports.service(&command(&["http"]));
    let daemon = Daemon::healthy(&service, 1);
    let config = format!(
        "[log]\nformat = \"json\"\nlevel = \"debug\"\n{service}balance = \"source-hash\"\n"
    );
    let line = daemon.reload(&config);
    assert_eq!(line.message, "reload refused");
    assert_eq!(line.get("error"), Some("a change of log.format needs a restart"));
    assert!(daemon.said(Mark::START, "reloaded").is_empty());
}

#[test]
fn a_new_command_replaces_the_workers_one_by_one() {
    let ports = Ports::take(3);
    let daemon = Daemon::healthy(&ports.service(&command(&["http", "old"])), 3);
    let old = daemon.pids(&ports);
    let load = Load::start(ports.address(), "/argv");
    let since = daemon.now();
    daemon.must_reload(&ports.service(&command(&["http", "new"])));
    daemon.wait(since, "workers replaced", &[("service", "web")]);
    load.more(50);
    load.end_without_failure();
    let argv: Vec<_> = (0..3).map(|_| get(ports.address(), "/argv")).collect();
    assert_eq!(argv, ["http\nnew"; 3]);
    let new = daemon.pids(&ports);
    assert!(new.iter().all(|pid| !old.contains(pid)), "{old:?} {new:?}");
    // One at a time: each has its successor before the next one goes.
    let lines = daemon.log.lines(since);
    let steps: Vec<_> = lines
        .iter()
        .filter(|l| matches!(&*l.message, "worker healthy" | "worker exited"))
        .map(|l| (&*l.message, l.number::<u16>("port")))
        .collect();
    // Each port is its worker's own, so that another one stands in while it is handed over.
    assert_eq!(steps.len(), 3 * 4, "{steps:?}");
    for (port, steps) in ports.all().into_iter().zip(steps.chunks(4)) {
        let stand_in = steps[0].1;
        assert!(!ports.all().contains(&stand_in), "{steps:?}");
        let expected = [
            ("worker healthy", stand_in),
            ("worker exited", port),
            ("worker healthy", port),
            ("worker exited", stand_in),
        ];
        assert_eq!(steps, expected);
    }
}

#[test]
fn where_the_old_one_is_to_stop_first_it_does() {
    let ports = Ports::take(2);
    let free = Ports::take(0);
    let on_free =
        |key: &str| format!("[service.web]\nlisten = \"{}\"\nworkers = 2\n{key}", free.address());
    let shapes = [
        ports.service(""),
        ports.service("socket = \"inherit\""),
        on_free(""),
        on_free("socket = \"inherit\""),
        on_free("socket = \"unix\""),
        on_free("route = \"direct\""),
    ];
    for shape in shapes {
        let config = |argument: &str| {
            let command = command(&["http", argument]);
            format!(
                "{shape}\n{command}\nrollout.order = \"stop-first\"\nrollout.settle = \"50ms\"\n"
            )
        };
        let daemon = Daemon::healthy(&config("old"), 2);
        for change in ["a reload", "a restart"] {
            let since = daemon.now();
            match change {
                "a reload" => drop(daemon.must_reload(&config("new"))),
                _ => assert!(daemon.lbd(&["restart"]).status.success()),
            }
            daemon.wait(since, "workers replaced", &[("service", "web")]);
            let lines = daemon.log.lines(since);
            let steps: Vec<_> = lines
                .iter()
                .filter(|l| {
                    matches!(&*l.message, "worker exited" | "worker started" | "worker healthy")
                })
                .map(|l| (&*l.message, l.number::<u32>("slot")))
                .collect();
            let step =
                |slot| ["worker exited", "worker started", "worker healthy"].map(|m| (m, slot));
            assert_eq!(steps, [step(0), step(1)].concat(), "{change} of {shape}");
        }
    }
}

#[test]
fn a_replacement_on_a_free_port_comes_first() {
    let ports = Ports::take(0);
    let config = |word: &str| {
        let command = command(&["http", word]);
        format!("[service.web]\nlisten = \"{}\"\nworkers = 1\n{command}", ports.address())
    };
    let daemon = Daemon::healthy(&config("old"), 1);
    let load = Load::start(ports.address(), "/");
    let since = daemon.now();
    daemon.must_reload(&config("new"));
    daemon.wait(since, "worker exited", &[]);
    load.more(50);
    load.end_without_failure();
    let lines = daemon.log.lines(since);
    let at = |message: &str| lines.iter().position(|line| line.message == message).unwrap();
    assert!(at("worker healthy") < at("worker exited"));
    assert_eq!(get(ports.address(), "/argv"), "http\nnew");
}

#[test]
fn a_rollout_that_fails_leaves_the_old_settings() {
    let ports = Ports::take(3);
    let daemon = Daemon::healthy(&ports.service(&command(&["http", "old"])), 3);
    let pids = daemon.pids(&ports);
    let load = Load::start(ports.address(), "/");
    let since = daemon.now();
    daemon.must_reload(&ports.service(&command(&["exit", "9"])));
    let line = daemon.wait(since, "replacement failed, the old settings stay in force", &[]);
    let error = line.get("error").unwrap();
    assert!(error.contains("exit status 9") && error.contains("stop-first"), "{}", line.raw);
    assert!(error.ends_with("the 3 old workers still serve, nothing changed"), "{}", line.raw);
    load.more(50);
    load.end_without_failure();
    assert_eq!(counts(&turns(ports.address(), 6)).len(), 3);
    let now = daemon.pids(&ports);
    assert_eq!(now, pids, "none was touched");
    // Also for later restarts.
    let since = daemon.now();
    kill_hard(now[2]);
    daemon.wait_healthy(since, 1);
    let argv: Vec<_> = (0..3).map(|_| get(ports.address(), "/argv")).collect();
    assert_eq!(argv, ["http\nold"; 3]);
}

#[test]
fn a_worker_that_drains_for_a_removal_resumes_with_its_pid() {
    let ports = Ports::take(2);
    let [kept, removed] = ports.all().try_into().unwrap();
    let keys = command(&["http"]);
    let daemon = Daemon::healthy(&ports.service(&keys), 2);
    let pid = daemon.worker_pid(removed);
    let mut held: Vec<_> = (0..2).map(|_| KeepAlive::new(ports.address())).collect();
    for client in &mut held {
        client.get("/").unwrap();
    }
    daemon.must_reload(&ports.service_of(&[kept], &keys));
    let (port, shown) = (removed.to_string(), pid.to_string());
    let fields = [("port", &*port), ("pid", &shown), ("connections", "1"), ("why", "removed")];
    daemon.wait(Mark::START, "draining", &fields);
    assert_eq!(turns(ports.address(), 4), [kept; 4]);
    daemon.must_reload(&ports.service(&keys));
    daemon.wait(Mark::START, "worker resumed", &fields[..2]);
    assert_eq!(counts(&turns(ports.address(), 4)), [(kept, 2), (removed, 2)].into());
    for client in &mut held {
        assert_eq!(client.get("/").unwrap().0, 200);
    }
    assert_eq!(daemon.worker_pid(removed), pid);
    assert!(daemon.said(Mark::START, "worker exited").is_empty());
}

#[test]
fn a_drain_ends_at_its_timeout() {
    let ports = Ports::take(2);
    let [kept, removed] = ports.all().try_into().unwrap();
    let keys = format!("{}\nstop.drain-timeout = \"300ms\"", command(&["http"]));
    let daemon = Daemon::healthy(&ports.service(&keys), 2);
    let mut held: Vec<_> = (0..2).map(|_| KeepAlive::new(ports.address())).collect();
    for client in &mut held {
        client.get("/").unwrap();
    }
    let since = daemon.now();
    daemon.must_reload(&ports.service_of(&[kept], &keys));
    let draining = daemon.wait(since, "draining", &[]).read.unwrap();
    let exited = daemon.wait(since, "worker exited", &[("port", &removed.to_string())]);
    let took = exited.read.unwrap() - draining;
    assert!((0.29..5.0).contains(&took.as_secs_f64()), "{took:?}");
    assert_eq!(held.iter_mut().filter_map(|client| client.get("/").ok()).count(), 1);
}

#[test]
fn without_a_file_there_is_nothing_to_reload() {
    let ports = Ports::take(0);
    let listen = ports.address().to_string();
    let words = ["run", "--listen", &listen, "--workers", "1", "--", &common::fixture(), "http"];
    let daemon = Daemon::spawn(tempfile::tempdir().unwrap(), &words);
    daemon.wait_healthy(Mark::START, 1);
    daemon.signal(Signal::SIGHUP);
    let line = daemon.wait(Mark::START, "reload refused", &[]);
    assert_eq!(line.get("error"), Some("lbd was started without a configuration file"));
    assert_eq!(turns(ports.address(), 2).len(), 2);
}
