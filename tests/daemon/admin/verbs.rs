//! What operators do to single workers: drain, resume and restart, over HTTP and by command.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use crate::common::{
    self, Daemon, Mark, Ports,
    client::{KeepAlive, Load, get, is_turned_away, turns},
    command, eventually, freeze, kill_hard, proc,
};
use serde_json::{Value, json};

const QUICK: &str = "health.http = \"/\"\nhealth.interval = \"50ms\"\nhealth.timeout = \"100ms\"\n\
                     restart.max-delay = \"100ms\"";

/// Healthy workers on these ports, which are probed often.
fn start(ports: &Ports, keys: &str) -> Daemon {
    let service = ports.service(&format!("{}\n{QUICK}\n{keys}", command(&["http"])));
    Daemon::healthy(&format!("[admin]\nsocket = \"a.sock\"\n{service}"), ports.all().len())
}

/// The status and the body of the answer to a request.
fn ask(daemon: &Daemon, request: &str) -> (u16, Value) {
    let mut stream = UnixStream::connect(daemon.path("a.sock")).unwrap();
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    write!(stream, "{request} HTTP/1.1\r\nHost: lbd\r\nConnection: close\r\n\r\n").unwrap();
    let (mut stream, mut line) = (BufReader::new(stream), String::new());
    stream.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap().parse().unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    let (_, body) = rest.split_once("\r\n\r\n").unwrap();
    (status, serde_json::from_str(body).unwrap_or_else(|_| body.into()))
}

fn post(daemon: &Daemon, slot: impl std::fmt::Display, verb: &str) -> (u16, Value) {
    ask(daemon, &format!("POST /services/web/workers/{slot}/{verb}"))
}

fn done(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = daemon.lbd(arguments);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn refused(output: &Output) -> String {
    assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn worker(daemon: &Daemon, slot: usize) -> Value {
    daemon.workers("web").swap_remove(slot)
}

/// The ports that take the next six connections.
fn takers(ports: &Ports) -> Vec<u16> {
    let mut taken = turns(ports.address(), 6);
    taken.sort_unstable();
    taken.dedup();
    taken
}

#[test]
fn a_drained_worker_keeps_what_it_has_and_gets_no_more() {
    let ports = Ports::take(3);
    let daemon = start(&ports, "");
    let pids = daemon.slot_pids();
    // One connection on each.
    let mut held: Vec<_> = (0..3).map(|_| KeepAlive::new(ports.address())).collect();
    let on: Vec<u16> = held
        .iter_mut()
        .map(|client| {
            let body = String::from_utf8(client.get("/").unwrap().1).unwrap();
            body.split(' ').next().unwrap().parse().unwrap()
        })
        .collect();
    let since = daemon.now();
    let (status, body) = post(&daemon, 1, "drain");
    let expected = json!({
        "drained": true, "state": "draining", "active": 1, "in_rotation": 2, "warning": null,
    });
    assert_eq!((status, body), (200, expected.clone()));
    let others = [ports.worker(0), ports.worker(2)];
    // From that answer on.
    assert!(turns(ports.address(), 30).iter().all(|port| others.contains(port)));
    daemon.wait(since, "draining", &[("slot", "1"), ("why", "operator"), ("connections", "1")]);
    let drained = worker(&daemon, 1);
    assert_eq!((&drained["state"], &drained["drained"]), (&json!("draining"), &json!(true)));
    assert_eq!(worker(&daemon, 0)["drained"], false);
    // Ten probes that pass don't undo it, and asking again changes nothing.
    eventually("half a second", || worker(&daemon, 1)["since_seconds"].as_f64() > Some(0.5));
    assert_eq!(worker(&daemon, 1)["last_probe"]["ok"], true);
    assert_eq!(post(&daemon, 1, "drain"), (200, expected));
    assert_eq!(takers(&ports).len(), 2);
    assert_eq!(
        held[on.iter().position(|port| *port == ports.worker(1)).unwrap()].get("/").unwrap().0,
        200
    );
    drop(held);
    eventually("its connection ended", || worker(&daemon, 1)["connections"]["active"] == 0);
    assert_eq!(daemon.slot_pids(), pids);
    let (status, body) = post(&daemon, 1, "resume");
    let expected = json!({
        "drained": false, "state": "healthy", "active": 0, "in_rotation": 3, "warning": null,
    });
    assert_eq!((status, body), (200, expected));
    assert_eq!(takers(&ports), ports.all());
    daemon.wait(since, "worker resumed", &[("slot", "1")]);
    assert_eq!(daemon.slot_pids(), pids);
    assert_eq!(daemon.said(since, "worker exited").len(), 0);
}

#[test]
fn it_lasts_until_it_is_taken_back() {
    let ports = Ports::take(2);
    let daemon = start(&ports, "");
    assert_eq!(
        done(&daemon, &["drain", "web", "0"]),
        "web/0: out of rotation, no connection left\n"
    );
    let only = [ports.worker(1)];
    // Its process dies.
    let since = daemon.now();
    kill_hard(daemon.slot_pids()[0]);
    daemon.wait(since, "worker healthy", &[("slot", "0")]);
    assert_eq!((takers(&ports), &worker(&daemon, 0)["state"]), (only.to_vec(), &json!("draining")));
    // It is restarted with all the others; by itself, it would be back.
    let pid = daemon.slot_pids()[0];
    assert_eq!(done(&daemon, &["restart", "web"]), "web: workers replaced 2\n");
    assert_ne!(daemon.slot_pids()[0], pid);
    assert_eq!(takers(&ports), only);
    // A reload gives it other settings, and a reload changes nothing at all.
    let config = |keys: &str| {
        let service = ports.service(&format!("{}\n{QUICK}\n{keys}", command(&["http"])));
        format!("[admin]\nsocket = \"a.sock\"\n{service}")
    };
    let pid = daemon.slot_pids()[0];
    daemon.write_config(&config("env.X = \"1\""));
    done(&daemon, &["reload"]);
    assert_ne!(daemon.slot_pids()[0], pid);
    assert_eq!(takers(&ports), only);
    done(&daemon, &["reload"]);
    assert_eq!(takers(&ports), only);
    assert_eq!(done(&daemon, &["resume", "web", "0"]), "web/0: in rotation\n");
    assert_eq!(takers(&ports), ports.all());
}

#[test]
fn an_ill_one_is_left_alone() {
    let ports = Ports::take(2);
    let daemon = start(&ports, "restart.unhealthy-after = \"200ms\"");
    let pids = daemon.slot_pids();
    done(&daemon, &["drain", "web", "0"]);
    // As a debugger would stop it.
    freeze(pids[0]);
    daemon.wait(Mark::START, "worker unhealthy", &[("slot", "0")]);
    eventually("long past unhealthy-after", || {
        worker(&daemon, 0)["since_seconds"].as_f64() > Some(1.0)
    });
    let ill = worker(&daemon, 0);
    assert_eq!((&ill["state"], &ill["drained"]), (&json!("unhealthy"), &json!(true)));
    assert_eq!(daemon.slot_pids(), pids);
    assert_eq!(
        done(&daemon, &["resume", "web", "0"]),
        "web/0: unhealthy; in rotation as soon as it is healthy\n"
    );
    // Now it is lbd's business again.
    daemon.wait(Mark::START, "worker given up", &[("slot", "0")]);
    let old = pids[0].to_string();
    daemon.wait(Mark::START, "worker exited", &[("slot", "0"), ("pid", &old)]);
    eventually("its successor has its port", || {
        let now = worker(&daemon, 0);
        now["port"] == ports.worker(0) && now["state"] == "healthy"
    });
    assert_eq!(takers(&ports), ports.all());
}

#[test]
fn with_all_of_them_drained_clients_are_turned_away() {
    let ports = Ports::take(2);
    let daemon = start(&ports, "hold-timeout = \"30s\"");
    done(&daemon, &["drain", "web", "0"]);
    let output = daemon.lbd(&["drain", "web", "1"]);
    let warning = "no worker of web is in rotation, and none is to come: its clients are turned \
                   away until one is resumed";
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("lbd: warning: {warning}\n"));
    let (_, body) = post(&daemon, 1, "drain");
    assert_eq!((&body["in_rotation"], &body["warning"]), (&json!(0), &json!(warning)));
    // At once, and not after the hold timeout.
    let begun = Instant::now();
    assert!(is_turned_away(ports.address()));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!(ask(&daemon, "GET /healthz").0, 503);
    // That it is restarted brings nobody.
    kill_hard(daemon.slot_pids()[1]);
    daemon.wait_healthy(Mark::START, 3);
    assert!(is_turned_away(ports.address()));
    assert_eq!(post(&daemon, 1, "resume").0, 200);
    assert_eq!(takers(&ports), [ports.worker(1)]);
    assert_eq!(ask(&daemon, "GET /healthz").0, 200);
}

#[test]
fn a_command_waits_until_it_is_empty() {
    let ports = Ports::take(2);
    let daemon = start(&ports, "");
    let mut held = [KeepAlive::new(ports.address()), KeepAlive::new(ports.address())];
    for client in &mut held {
        client.get("/").unwrap();
    }
    let mut waiting = Command::new(env!("CARGO_BIN_EXE_lbd"))
        .args(["drain", "web", "0", "--wait", "--config", "lb.toml"])
        .current_dir(daemon.path(""))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("it is drained", || worker(&daemon, 0)["drained"] == true);
    assert_eq!(worker(&daemon, 0)["connections"]["active"], 1);
    // Each look at what is left is a wait for lbd's answer and one for the next look.
    let (pid, looked) = (i32::try_from(waiting.id()).unwrap(), 20);
    let before = proc::waits(pid);
    eventually("it has looked again", || proc::waits(pid) > before + looked);
    assert!(waiting.try_wait().unwrap().is_none(), "it holds a connection yet");
    drop(held);
    let output = waiting.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout, b"web/0: out of rotation, no connection left\n");
}

#[test]
fn one_worker_is_restarted_and_nobody_notices() {
    let ports = Ports::take(3);
    // The built-in worker: it finishes what it has begun, as no fixture does.
    let service = ports.service(&format!("root = \"{}\"", common::www().display()));
    let daemon = Daemon::healthy(&format!("[admin]\nsocket = \"a.sock\"\n{service}"), 3);
    let before = daemon.slot_pids();
    let load = Load::start(ports.address(), "/");
    for slot in ["1", "2", "1"] {
        let since = daemon.now();
        assert_eq!(
            done(&daemon, &["restart", "web", slot]),
            format!("web/{slot}: worker replaced\n")
        );
        daemon.wait(since, "worker exited", &[("slot", slot)]);
        assert_eq!(daemon.said(since, "worker started").len(), 1);
        load.more(20);
    }
    for verb in ["drain", "resume", "drain", "resume"] {
        assert_eq!(post(&daemon, 0, verb).0, 200);
        load.more(20);
    }
    load.end_without_failure();
    let after = daemon.slot_pids();
    assert_eq!(after[0], before[0]);
    assert!(after[1] != before[1] && after[2] != before[2]);
    let generations: Vec<_> =
        (0..3).map(|slot| worker(&daemon, slot)["generation"].clone()).collect();
    assert_eq!(generations, [1, 3, 2]);
}

#[test]
fn what_cannot_be_done_is_said() {
    let ports = Ports::take(2);
    let daemon = start(&ports, "");
    for verb in ["drain", "resume", "restart"] {
        let (status, body) = post(&daemon, 7, verb);
        assert_eq!((status, &body["error"]), (404, &json!("there is no slot 7 in web, but 0, 1")));
        for odd in ["x", "-1", "99999999999", "0x1"] {
            assert_eq!(post(&daemon, odd, verb).0, 404, "{odd}");
        }
        let (status, body) = ask(&daemon, &format!("POST /services/wbe/workers/0/{verb}"));
        assert_eq!((status, &body["error"]), (404, &json!("there is no service \"wbe\", but web")));
        assert_eq!(ask(&daemon, &format!("GET /services/web/workers/0/{verb}")).0, 405);
    }
    assert_eq!(post(&daemon, 0, "kill").0, 404);
    assert_eq!(
        refused(&daemon.lbd(&["drain", "web", "2"])),
        "lbd: there is no slot 2 in web, but 0, 1\n"
    );
    assert_eq!(
        refused(&daemon.lbd(&["resume", "x", "2"])),
        "lbd: there is no service \"x\", but web\n"
    );
    assert_eq!(
        refused(&daemon.lbd(&["restart", "web", "2"])),
        "lbd: there is no slot 2 in web, but 0, 1\n"
    );
    assert_eq!(daemon.lbd(&["drain", "web"]).status.code(), Some(2));
    assert_eq!(daemon.lbd(&["drain", "web", "x"]).status.code(), Some(2));
    assert!(daemon.workers("web").iter().all(|worker| worker["drained"] == false));
}

#[test]
fn what_a_replaced_worker_still_holds_is_told() {
    let ports = Ports::take(1);
    let daemon = start(&ports, "socket = \"inherit\"");
    let mut held = KeepAlive::new(ports.address());
    held.get("/").unwrap();
    let since = daemon.now();
    assert!(daemon.lbd(&["restart", "web"]).status.success());
    // Its successor, in the same slot, holds none.
    daemon.wait(since, "draining", &[("why", "replaced"), ("connections", "1")]);
}

#[test]
fn while_workers_are_replaced_no_other_replacement_begins() {
    let ports = Ports::take(1);
    let daemon = start(&ports, "");
    // The replacement hangs at its start for as long as it takes to ask.
    let config = ports.service(&format!("{}\n{QUICK}", command(&["silent"])));
    daemon.must_reload(&format!("[admin]\nsocket = \"a.sock\"\n{config}"));
    let (status, body) = post(&daemon, 0, "restart");
    let error = body["error"].as_str().unwrap();
    assert_eq!(status, 409, "{error}");
    let busy = "a rolling replacement of web is already under way, for ";
    let waits = "s: 0 of 1 replaced, waiting for the new worker of slot 0 to be healthy";
    assert!(error.starts_with(busy) && error.ends_with(waits), "{error}");
    // But to drain is possible.
    assert_eq!(post(&daemon, 0, "drain").0, 200);
}

#[test]
fn a_restart_says_that_the_file_has_changed() {
    let ports = Ports::take(1);
    let daemon = start(&ports, "");
    let argv = || get(ports.address(), "/argv");
    assert_eq!(done(&daemon, &["restart"]), "web: workers replaced 1\n");
    let new = |argument: &str| {
        let service = ports.service(&format!("{}\n{QUICK}", command(&["http", argument])));
        format!("[admin]\nsocket = \"a.sock\"\n{service}")
    };
    daemon.write_config(&new("new"));
    let said = format!(
        "{} has changed since it was loaded, and workers are started with what was loaded: \
         `lbd reload` applies it, `lbd restart --reload` does both",
        daemon.path("lb.toml").display()
    );
    for (arguments, done) in [
        (&["restart"][..], "web: workers replaced 1"),
        (&["restart", "web", "0"], "web/0: worker replaced"),
    ] {
        let output = daemon.lbd(arguments);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{done}\n"));
        assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("lbd: warning: {said}\n"));
    }
    assert_eq!(argv(), "http", "not applied");
    assert_eq!(
        daemon
            .said(
                Mark::START,
                "the file has changed since it was loaded, a restart does not apply it"
            )
            .len(),
        2
    );
    let (code, body) = ask(&daemon, "POST /services/web/restart");
    assert_eq!((code, body), (200, json!({ "workers": 1, "warnings": [said] })));
    // With the same bytes as before there is nothing to say.
    done(&daemon, &["reload"]);
    assert_eq!(argv(), "http\nnew");
    daemon.write_config(&new("newer"));
    daemon.write_config(&new("new"));
    done(&daemon, &["restart"]);
    assert_eq!(argv(), "http\nnew");
}

#[test]
fn a_restart_that_fails_says_so_too() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let script = format!("test -e broken && exit 5; exec {} http", common::fixture());
    let keys = format!("command = [\"sh\", \"-c\", {script:?}]");
    let daemon = Daemon::start_in(folder, &ports.service(&keys));
    daemon.wait_healthy(Mark::START, 1);
    std::fs::write(daemon.path("broken"), "").unwrap();
    daemon.write_config(&format!("# mended\n{}", ports.service(&keys)));
    let said = refused(&daemon.lbd(&["restart"]));
    let lines: Vec<_> = said.lines().collect();
    assert!(lines[0].starts_with("lbd: web: slot 0: "), "{said}");
    assert!(lines.last().unwrap().contains("lb.toml has changed since it was loaded"), "{said}");
}

#[test]
fn a_restart_with_a_reload_replaces_each_worker_once() {
    let (web, api) = (Ports::take(2), Ports::take(1));
    let of = |ports: &Ports, argument: &str| {
        let socket = "socket = \"inherit\"";
        ports.service(&format!("{}\n{QUICK}\n{socket}", command(&["http", argument])))
    };
    let config = |argument: &str| {
        let admin = "[admin]\nsocket = \"a.sock\"\n";
        format!("{admin}{}{}", of(&web, argument), common::named("api", &of(&api, "same")))
    };
    let daemon = Daemon::healthy(&config("old"), 3);
    let started = |since: Mark| daemon.said(since, "worker started").len();
    daemon.write_config(&config("new"));
    let since = daemon.now();
    let said = done(&daemon, &["restart", "--reload"]);
    assert_eq!(
        said,
        "reloaded: services added 0, removed 0, changed 1\nall services: workers replaced 3\n"
    );
    assert_eq!((started(since), get(web.address(), "/argv").as_str()), (3, "http\nnew"));
    // With nothing new it is a restart; of one service, or one worker of it.
    for (name, expected) in [(&["api"][..], 1), (&["web", "1"], 1), (&["web"], 2)] {
        let since = daemon.now();
        let said = done(&daemon, &[&["restart", "--reload"], name].concat());
        assert!(
            said.ends_with(&format!("{}: workers replaced {expected}\n", name.join("/"))),
            "{said}"
        );
        assert_eq!(started(since), expected);
    }
    let (code, body) = ask(&daemon, "POST /services/api/restart?reload=true");
    let reloaded = json!({ "added": 0, "removed": 0, "changed": 0, "warnings": [] });
    let expected = json!({ "workers": 1, "reloaded": reloaded, "warnings": [] });
    assert_eq!((code, body), (200, expected));
    assert_eq!(ask(&daemon, "POST /reload?restart=true").0, 200);
    assert_eq!(ask(&daemon, "POST /reload?restrat=true").0, 400);
    // A wrong file, and a service that is not in it: nothing happens at all.
    let since = daemon.now();
    let none = refused(&daemon.lbd(&["restart", "--reload", "wbe"]));
    assert_eq!(none, "lbd: there is no service \"wbe\" in the file\n");
    daemon.write_config("[service.web]\nworkers = 0\n");
    assert!(
        refused(&daemon.lbd(&["restart", "--reload"])).contains("lb.toml:2: service.web.workers")
    );
    assert_eq!((started(since), get(web.address(), "/argv").as_str()), (0, "http\nnew"));
    // What does not come up ends it, and the old ones serve.
    daemon.write_config(
        &config("new").replacen("\"http\"", "\"exit\"", 1).replacen("\"new\"", "\"7\"", 1),
    );
    let said = refused(&daemon.lbd(&["restart", "--reload"]));
    assert!(said.contains("web: slot 0: exit status 7"), "{said}");
    assert_eq!(get(web.address(), "/argv"), "http\nnew");
}

#[test]
fn a_deploy_leaves_no_sign_of_trouble() {
    let ports = Ports::take(2);
    let daemon = start(&ports, "socket = \"inherit\"");
    let signs = || -> Vec<_> {
        let workers = daemon.workers("web");
        workers.iter().map(|w| (w["restarts"].as_u64().unwrap(), w["last_exit"].clone())).collect()
    };
    done(&daemon, &["restart"]);
    done(&daemon, &["restart", "web", "1"]);
    let keys = format!("{}\n{QUICK}\nsocket = \"inherit\"", command(&["http", "new"]));
    let file = format!("[admin]\nsocket = \"a.sock\"\n{}", ports.service(&keys));
    daemon.write_config(&file);
    done(&daemon, &["reload"]);
    eventually("the old ones are gone", || {
        let exited = daemon.said(Mark::START, "worker exited");
        exited.len() == 5
    });
    assert_eq!(signs(), [(0, Value::Null), (0, Value::Null)]);
    // One that ends by itself is told, and stays told after the next deploy.
    let since = daemon.now();
    kill_hard(daemon.worker_pid(ports.worker(1)));
    daemon.wait_healthy(since, 1);
    assert_eq!(signs(), [(0, Value::Null), (1, "killed by SIGKILL".into())]);
    done(&daemon, &["restart"]);
    assert_eq!(signs(), [(0, Value::Null), (1, "killed by SIGKILL".into())]);
}
