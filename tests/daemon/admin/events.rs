//! `GET /events`: what those are told who watch a running daemon.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::{Duration, Instant},
};

use crate::common::{self, Daemon, Mark, PATIENCE, Port, Ports, client, command, kill_hard, named};
use lbd::admin::MAX_CONNECTIONS;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// As many as may watch at once.
const MAX_STREAMS: usize = 8;

/// A daemon with its admin socket in its own folder.
fn start(ports: &Ports, log: &str) -> Daemon {
    let service = ports.service(&command(&["http"]));
    Daemon::start(&format!("[log]\n{log}\n[admin]\nsocket = \"admin.sock\"\n{service}"))
}

/// Somebody who watches: the stream, and the latest status, as far as it was told.
struct Watcher(BufReader<UnixStream>, Value);

impl Watcher {
    fn new(socket: PathBuf) -> Self {
        let mut watcher = Self::ask(socket);
        let mut status = String::new();
        watcher.0.read_line(&mut status).unwrap();
        assert!(status.starts_with("HTTP/1.1 200 "), "{status}");
        watcher
    }

    fn ask(socket: PathBuf) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        Self(BufReader::new(stream), Value::Null)
    }

    /// The next event, where `news` is taken into the status that it is news of; `None` at the end.
    fn next(&mut self) -> Option<(String, Value)> {
        let (name, data) = self.next_as_it_is()?;
        match &*name {
            "status" => self.1 = data,
            "news" => take_news(&mut self.1, &data),
            _ => return Some((name, data)),
        }
        Some(("status".to_owned(), self.1.clone()))
    }

    /// The next event; `None` at the end.
    fn next_as_it_is(&mut self) -> Option<(String, Value)> {
        let mut name = None;
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some(event) = line.strip_prefix("event: ") {
                name = Some(event.trim().to_owned());
            }
            if let (Some(data), Some(name)) = (line.strip_prefix("data: "), &name) {
                return Some((name.clone(), serde_json::from_str(data).unwrap()));
            }
        }
    }

    /// Reads on to the first event of this name that is `good`.
    fn until(&mut self, name: &str, good: impl Fn(&Value) -> bool) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < until, "no such {name}");
            let (found, data) = self.next().expect("it ended");
            if found == name && good(&data) {
                return data;
            }
        }
    }
}

/// What somebody who is told `news` knows then.
fn take_news(status: &mut Value, news: &Value) {
    status["uptime_seconds"] = news["uptime_seconds"].clone();
    if let Some(config) = news.get("config") {
        status["config"] = config.clone();
    }
    let by = |list: &Value, key: &str, value: &Value| {
        list.as_array().unwrap().iter().position(|one| &one[key] == value).unwrap()
    };
    for service in news["services"].as_array().unwrap_or(&Vec::new()) {
        let at = by(&status["services"], "name", &service["name"]);
        let known = &mut status["services"][at];
        for list in ["replacements", "retiring"] {
            if let Some(all) = service.get(list) {
                known[list] = all.clone();
            }
        }
        for worker in service["workers"].as_array().unwrap_or(&Vec::new()) {
            let at = by(&known["workers"], "slot", &worker["slot"]);
            let known = known["workers"][at].as_object_mut().unwrap();
            known.extend(worker.as_object().unwrap().clone());
        }
    }
}

fn workers(status: &Value) -> &Vec<Value> {
    status["services"][0]["workers"].as_array().unwrap()
}

#[test]
fn who_watches_is_told_what_was_what_happens_and_how_it_is() {
    let ports = Ports::take(2);
    // What happens is told at any level of the log.
    let daemon = start(&ports, "level = \"error\"");
    let socket = daemon.path("admin.sock");
    common::eventually("it is there", || socket.exists());
    let healthy = |status: &Value| workers(status).iter().all(|w| w["state"] == "healthy");
    Watcher::new(socket.clone()).until("status", healthy);

    let mut watcher = Watcher::new(socket);
    let (first, access) = watcher.next().unwrap();
    assert_eq!((&*first, &access), ("access", &json!({ "changes": "free" })));
    let (second, samples) = watcher.next().unwrap();
    assert_eq!((&*second, &samples["interval_seconds"]), ("samples", &json!(1)));
    assert_eq!(samples["services"][0]["workers"].as_array().unwrap().len(), 2);
    let mut told = Vec::new();
    let status = loop {
        match watcher.next().unwrap() {
            (name, note) if name == "note" => told.push(note),
            (name, status) => break (name == "status").then_some(status).unwrap(),
        }
    };
    let of = |message: &str| told.iter().filter(|note| note["message"] == message).count();
    assert_eq!((of("listening"), of("worker started"), of("worker healthy")), (1, 2, 2));
    // Which of them is ready to run first is open.
    let started = |note: &&Value| note["message"] == "worker started" && note["slot"] == 0;
    let started = told.iter().find(started).unwrap();
    assert_eq!((&started["level"], &started["service"]), (&"info".into(), &"web".into()));
    assert_eq!(started["port"], ports.worker(0));

    let victim = workers(&status)[0]["pid"].as_i64().unwrap();
    kill_hard(victim as i32);
    let began = Instant::now();
    let exited = watcher.until("note", |note| note["message"] == "worker exited");
    assert_eq!((&exited["level"], &exited["slot"]), (&"warn".into(), &0.into()));
    assert_eq!(exited["pid"], victim);
    assert!(exited["text"].as_str().unwrap().contains("SIGKILL"), "{exited}");
    watcher.until("status", |status| {
        let worker = &workers(status)[0];
        worker["pid"] != victim && worker["last_exit"] == "killed by SIGKILL"
    });
    assert!(began.elapsed() < PATIENCE);
}

#[test]
fn whoever_watches_what_does_nothing_is_told_next_to_nothing_until_something_happens() {
    const SERVICES: usize = 6;
    let ports: Vec<_> = (0..SERVICES).map(|_| Ports::take(1)).collect();
    let mut file = "[admin]\nsocket = \"admin.sock\"\n".to_owned();
    for (number, ports) in ports.iter().enumerate() {
        file += &named(&format!("s{number}"), &ports.service(&command(&["http"])));
    }
    let daemon = Daemon::healthy(&file, SERVICES);
    let socket = daemon.path("admin.sock");
    common::eventually("it is there", || socket.exists());
    let mut watcher = Watcher::new(socket);
    let whole = watcher.until("status", |status| {
        let is_healthy = |service: &Value| service["workers"][0]["state"] == "healthy";
        status["services"].as_array().unwrap().iter().all(is_healthy)
    });
    let row = whole["services"][0].to_string().len();

    // That a probe took longer is news, too, and on a busy machine many do: so it has several attempts.
    let quiet = |watcher: &mut Watcher| {
        let mut told = 0;
        for _ in 0..5 {
            let (name, data) = watcher.next_as_it_is().unwrap();
            assert_eq!(name, "news", "{data}");
            take_news(&mut watcher.1, &data);
            told += data.to_string().len();
        }
        told
    };
    let told = (0..5).map(|_| quiet(&mut watcher)).min().unwrap();
    assert!(told < row, "{told} bytes in five looks, where one service has {row}");

    let victim = whole["services"][3]["workers"][0]["pid"].as_i64().unwrap();
    let began = Instant::now();
    kill_hard(victim as i32);
    let row = loop {
        let (name, data) = watcher.next_as_it_is().unwrap();
        let services = data["services"].as_array().cloned().unwrap_or_default();
        let of_it = |service: &&Value| {
            service["name"] == "s3"
                && service["workers"][0]["pid"] != victim
                && service["workers"][0].get("pid").is_some()
        };
        if let (true, Some(service)) = (name == "news", services.iter().find(of_it)) {
            break service["workers"][0].clone();
        }
    };
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!((&row["slot"], row.get("port")), (&0.into(), None), "what is as it was is not told");
}

#[test]
fn a_minute_of_rates_adds_up_to_what_there_was() {
    let ports = Ports::take(2);
    let daemon = start(&ports, "");
    daemon.wait_healthy(Mark::START, 2);
    let socket = daemon.path("admin.sock");
    let mut watcher = Watcher::new(socket.clone());
    // Not before there is a look to compare with.
    let rate =
        |status: &Value, slot: usize| workers(status)[slot]["connections"]["per_second"].as_f64();
    watcher.until("status", |status| rate(status, 0).is_some());
    client::turns(ports.address(), 20);
    watcher.until("status", |status| rate(status, 0) > Some(0.0) || rate(status, 1) > Some(0.0));
    let seen = |total: u64| {
        move |status: &Value| {
            let of = |worker: &Value| worker["connections"]["total"].as_u64().unwrap();
            let quiet = workers(status).iter().all(|w| w["connections"]["per_second"] == 0.0);
            quiet && workers(status).iter().map(of).sum::<u64>() == total
        }
    };
    watcher.until("status", seen(20));
    let samples = Watcher::new(socket).until("samples", |_| true);
    for slot in 0..2 {
        let worker = &samples["services"][0]["workers"][slot];
        let rates = worker["per_second"].as_array().unwrap();
        assert_eq!(rates.iter().filter_map(Value::as_f64).sum::<f64>(), 10.0, "{worker}");
        assert_eq!(worker["active"].as_array().unwrap().len(), rates.len());
    }
}

#[test]
fn however_many_watch_it_can_still_be_operated() {
    let (ports, port) = (Ports::take(1), Port::take());
    let address = SocketAddr::from(([127, 0, 0, 1], port.number));
    let service = ports.service(&command(&["http"]));
    let admin = format!("[admin]\nsocket = \"admin.sock\"\nlisten = \"{address}\"");
    let daemon = Daemon::healthy(&format!("{admin}\n{service}"), 1);
    let socket = daemon.path("admin.sock");
    let watch = || {
        let mut watcher = Watcher::new(socket.clone());
        watcher.until("status", |_| true);
        watcher
    };
    let mut watchers: Vec<_> = (0..MAX_STREAMS).map(|_| watch()).collect();
    let mut refused = String::new();
    let mut one_more = Watcher::ask(socket.clone());
    one_more.0.read_line(&mut refused).unwrap();
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    assert!(daemon.lbd(&["status", "--json"]).status.success());
    // Nor do those that are turned away keep a connection.
    let turned_away: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| {
            let mut watcher = Watcher::ask(socket.clone());
            let mut answer = String::new();
            watcher.0.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
            watcher
        })
        .collect();
    let began = Instant::now();
    assert!(daemon.lbd(&["status"]).status.success());
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    drop(turned_away);
    // Those who watch over TCP have places of their own.
    let mut over_tcp = TcpStream::connect(address).unwrap();
    over_tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(over_tcp, "GET /events HTTP/1.1\r\nHost: {address}\r\n\r\n").unwrap();
    let mut head = [0; 12];
    over_tcp.read_exact(&mut head).unwrap();
    assert_eq!(&head, b"HTTP/1.1 200");
    drop(watchers.pop());
    common::eventually("there is room again", || {
        let mut answer = String::new();
        Watcher::ask(socket.clone()).0.read_line(&mut answer).unwrap();
        answer.starts_with("HTTP/1.1 200 ")
    });
}

#[test]
fn it_ends_with_the_daemon_and_does_not_hold_it_up() {
    let ports = Ports::take(1);
    let mut daemon = start(&ports, "");
    daemon.wait_healthy(Mark::START, 1);
    let mut watcher = Watcher::new(daemon.path("admin.sock"));
    watcher.until("status", |_| true);
    daemon.signal(Signal::SIGTERM);
    daemon.wait_exit();
    let mut rest = String::new();
    watcher.0.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("0\r\n\r\n"), "the answer is complete: {rest:?}");
    assert!(fs::metadata(daemon.path("admin.sock")).is_err());
}
