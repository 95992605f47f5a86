//! The admin API over TCP: who may look, who may change something, and what strangers cost.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use crate::common::http::{Answer, Client};
use crate::common::{self, Daemon, Mark, Port, Ports, command, other_address};
use tempfile::TempDir;

const TOKEN: &str = "s3cret-t0ken";
const BEARER: &str = "Authorization: Bearer s3cret-t0ken\r\n";

/// `[admin]` with these addresses, and the token where there is to be one.
fn admin(listen: &str, token: bool) -> String {
    let token = if token { "token-file = \"token\"\n" } else { "" };
    format!("[admin]\nlisten = {listen}\n{token}")
}

/// A folder with the token in it.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_token(&folder.path().join("token"), TOKEN, 0o600);
    folder
}

fn write_token(path: &std::path::Path, token: &str, mode: u32) {
    fs::write(path, format!("{token}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A daemon with one worker, healthy, and `admin` in its file.
fn start(admin: &str, ports: &Ports) -> Daemon {
    let daemon = Daemon::start_in(folder(), &format!("{admin}{}", service(ports)));
    daemon.wait_healthy(Mark::START, 1);
    daemon
}

fn service(ports: &Ports) -> String {
    ports.service(&command(&["http"]))
}

fn local(port: &Port) -> SocketAddr {
    ([127, 0, 0, 1], port.number).into()
}

/// The answer to one request with these header lines, on a connection of its own.
fn ask(address: SocketAddr, request: &str, headers: &str) -> Answer {
    let mut client = Client::connect(address);
    client.send(format!("{request} HTTP/1.1\r\n{headers}\r\n"));
    client.answer()
}

/// The same with the Host that a client sends by itself.
fn ask_plainly(address: SocketAddr, request: &str, headers: &str) -> Answer {
    ask(address, request, &format!("Host: {address}\r\n{headers}"))
}

fn error(answer: &Answer) -> String {
    let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    body["error"].as_str().unwrap().to_owned()
}

#[test]
fn this_machine_may_look_and_only_the_token_changes_anything() {
    let (ports, port) = (Ports::take(1), Port::take());
    let address = local(&port);
    let daemon = start(&admin(&format!("\"{address}\""), true), &ports);
    assert_eq!(
        daemon.said(Mark::START, "admin listening")[0].get("address"),
        Some(&*address.to_string())
    );
    let pids = daemon.slot_pids();
    // To look.
    let answer = ask_plainly(address, "GET /status", "");
    let status: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!((answer.status, &status["pid"]), (200, &daemon.pid().into()));
    assert_eq!(ask_plainly(address, "GET /healthz", BEARER).status, 200);
    // To change something.
    for path in ["/reload", "/stop", "/services/web/restart", "/nothing"] {
        let request = format!("POST {path}");
        let missing = ask_plainly(address, &request, "");
        assert_eq!(
            (missing.status, missing.header("www-authenticate")),
            (401, Some("Bearer realm=\"lbd\""))
        );
        assert_eq!(
            error(&missing),
            "expected the header Authorization: Bearer TOKEN, with the token of [admin] token-file"
        );
        for wrong in ["Bearer s3cret-t0ke", "Bearer s3cret-t0kenx", "bearer S3cret-t0ken"] {
            let began = Instant::now();
            let wrong = ask_plainly(address, &request, &format!("Authorization: {wrong}\r\n"));
            assert_eq!(wrong.status, 401);
            assert_eq!(error(&wrong), "this is not the token of [admin] token-file");
            assert!(began.elapsed() >= Duration::from_millis(250), "guessing has to take its time");
        }
        let twice = ask_plainly(address, &request, &format!("{BEARER}{BEARER}"));
        assert_eq!(twice.status, 401);
    }
    assert_eq!(daemon.slot_pids(), pids);
    assert!(daemon.said(Mark::START, "reloaded").is_empty());
    assert_eq!(ask_plainly(address, "POST /nothing", BEARER).status, 404);
    assert_eq!(ask_plainly(address, "POST /reload", BEARER).status, 200);
    assert_eq!(ask_plainly(address, "POST /services/web/restart", BEARER).status, 200);
    assert_ne!(daemon.slot_pids(), pids);
    let mut daemon = daemon;
    assert_eq!(ask_plainly(address, "POST /stop", BEARER).status, 202);
    daemon.wait_stopped();
}

#[test]
fn without_a_token_nothing_can_be_changed() {
    let (ports, port) = (Ports::take(1), Port::take());
    let address = local(&port);
    let daemon = start(&admin(&format!("\"{address}\""), false), &ports);
    for headers in ["", BEARER, "Authorization: Bearer \r\n"] {
        let answer = ask_plainly(address, "POST /stop", headers);
        assert_eq!(answer.status, 403);
        assert_eq!(
            error(&answer),
            "nothing can be changed over TCP without a token, and [admin] token-file is not set"
        );
        assert_eq!(ask_plainly(address, "GET /healthz", headers).status, 200);
    }
    // The unix socket is as ever.
    assert!(daemon.lbd(&["reload"]).status.success());
}

#[test]
fn no_web_page_gets_anywhere() {
    let (ports, port) = (Ports::take(1), Port::take());
    let address = local(&port);
    let daemon = start(&admin(&format!("\"{address}\""), true), &ports);
    let rebound = format!("Host: evil.example:{}\r\n", port.number);
    let posted = format!("Host: {address}\r\nOrigin: http://evil.example\r\n");
    let sandboxed = format!("Host: {address}\r\nOrigin: null\r\n");
    let neighbour = format!("Host: {address}\r\nOrigin: http://127.0.0.1:1\r\n");
    let embedded = format!("Host: {address}\r\nSec-Fetch-Site: cross-site\r\n");
    for headers in [&rebound, &posted, &sandboxed, &neighbour, &embedded] {
        for (request, token) in [("POST /stop", BEARER), ("POST /stop", ""), ("GET /status", "")] {
            let answer = ask(address, request, &format!("{headers}{token}"));
            assert_eq!(answer.status, 403, "{request} {headers}");
            let expected =
                "asked on behalf of another host; expected Host: localhost or the address itself";
            assert_eq!(error(&answer), expected);
        }
    }
    // Its own page may, under each name of its own.
    for host in [address.to_string(), format!("localhost:{}", port.number)] {
        let own = format!("Host: {host}\r\nOrigin: http://{host}\r\n{BEARER}");
        assert_eq!(ask(address, "POST /reload", &own).status, 200, "{own}");
    }
    // A monitor that has the token may call it by any name.
    assert_eq!(ask(address, "GET /status", &format!("{rebound}{BEARER}")).status, 200);
    // One that is no browser may call it by none.
    let mut old = TcpStream::connect(address).unwrap();
    old.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    old.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
    drop(daemon);
}

#[test]
fn other_machines_need_the_token_to_look() {
    let Some(ip) = other_address() else { return }; // there is no other address to come from
    let (ports, port) = (Ports::take(1), Port::take());
    let wildcard = format!("\"0.0.0.0:{}\"", port.number);
    let (far, near) = (SocketAddr::new(ip, port.number), local(&port));
    let mut daemon = start(&admin(&wildcard, true), &ports);
    assert_eq!(ask_plainly(far, "GET /status", "").status, 401);
    assert_eq!(ask_plainly(far, "GET /status", "Authorization: Bearer x\r\n").status, 401);
    assert_eq!(ask_plainly(far, "GET /status", BEARER).status, 200);
    // A browser can't bring it to begin with: it gets the page, which asks for it and holds nothing.
    let page = ask_plainly(far, "GET /", "");
    assert_eq!((page.status, page.header("content-type")), (401, Some("text/html; charset=utf-8")));
    assert_eq!(page.header("www-authenticate"), Some("Bearer realm=\"lbd\""));
    assert!(
        page.header("content-security-policy").is_some() && page.body.starts_with(b"<!doctype")
    );
    assert_eq!(
        ask_plainly(far, "POST /reload", BEARER).status,
        200,
        "its own address is a good host"
    );
    assert_eq!(ask_plainly(near, "GET /status", "").status, 200);
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    daemon.wait_stopped();
    let daemon = Daemon::start(&format!("{}{}", admin(&wildcard, false), service(&ports)));
    daemon.wait_healthy(Mark::START, 1);
    let answer = ask_plainly(far, "GET /status", "");
    assert_eq!(answer.status, 403);
    let expected = "other machines need a token to look, and [admin] token-file is not set";
    assert_eq!(error(&answer), expected);
    assert_eq!(ask_plainly(near, "GET /status", "").status, 200);
}

#[test]
fn it_listens_on_ipv6_and_on_several_addresses() {
    if TcpListener::bind("[::1]:0").is_err() {
        return; // this machine has no IPv6
    }
    let (ports, port) = (Ports::take(1), Port::take());
    let addresses = [local(&port), SocketAddr::new("::1".parse().unwrap(), port.number)];
    let list = format!("[\"{}\", \"{}\"]", addresses[0], addresses[1]);
    let daemon = start(&admin(&list, true), &ports);
    for address in addresses {
        assert_eq!(ask_plainly(address, "GET /healthz", "").status, 200);
        assert_eq!(ask_plainly(address, "POST /reload", "").status, 401);
        assert_eq!(ask_plainly(address, "POST /reload", BEARER).status, 200);
    }
    drop(daemon);
}

#[test]
fn a_reload_reads_the_token_again() {
    let (ports, port) = (Ports::take(1), Port::take());
    let address = local(&port);
    let config = format!("{}{}", admin(&format!("\"{address}\""), true), service(&ports));
    let daemon = start(&admin(&format!("\"{address}\""), true), &ports);
    let pids = daemon.slot_pids();
    let healthz = |token: &str| {
        ask_plainly(address, "POST /nothing", &format!("Authorization: Bearer {token}\r\n")).status
    };
    // What must not be a token is refused, and the old one stays.
    write_token(&daemon.path("token"), "next", 0o644);
    let line = daemon.reload(&config);
    assert_eq!(line.message, "reload refused", "{}", line.raw);
    assert!(line.raw.contains("is open to every user; give it mode 0600"), "{}", line.raw);
    assert_eq!((healthz(TOKEN), healthz("next")), (404, 401));
    write_token(&daemon.path("token"), "next", 0o600);
    daemon.must_reload(&config);
    assert_eq!((healthz(TOKEN), healthz("next")), (401, 404));
    assert_eq!(daemon.slot_pids(), pids);
    // Another place is for a restart.
    let line = daemon.reload(&config.replacen(
        &address.to_string(),
        &format!("127.0.0.9:{}", port.number),
        1,
    ));
    assert!(line.raw.contains("a change of admin.listen needs a restart"), "{}", line.raw);
}

#[test]
fn what_is_wrong_with_it_is_said_at_the_start() {
    let (ports, port) = (Ports::take(1), Port::take());
    let address = local(&port);
    let config = format!("{}{}", admin(&format!("\"{address}\""), true), service(&ports));
    // The port is somebody else's: nothing was started.
    let taken = TcpListener::bind(address).unwrap();
    let mut daemon = Daemon::start_in(folder(), &config);
    assert_eq!(daemon.wait_exit().code(), Some(1));
    let lines = daemon.log.lines(Mark::START);
    let said: Vec<_> = lines.iter().map(|line| line.raw.as_str()).collect();
    let expected = format!(
        "lbd: cannot listen on {address}, an admin.listen: Address already in use (os error 98); \
         stop what listens there, or choose another port"
    );
    assert_eq!(said, [expected]);
    drop(taken);
    // Everybody can read the token.
    let folder = folder();
    write_token(&folder.path().join("token"), TOKEN, 0o644);
    fs::write(folder.path().join("lb.toml"), &config).unwrap();
    for arguments in [&["check"][..], &[]] {
        let output = common::lbd(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(78));
        let said = String::from_utf8(output.stderr).unwrap();
        let token = folder.path().join("token");
        let expected = format!(
            "lb.toml:3: admin.token-file: {} is open to every user; give it mode 0600\n",
            token.display()
        );
        assert_eq!(said, expected);
    }
}

#[test]
fn slow_clients_are_let_go_and_starve_nobody() {
    let (ports, port) = (Ports::take(1), Port::take());
    let address = local(&port);
    let daemon = start(&admin(&format!("\"{address}\""), true), &ports);
    // As many as it holds, each with a byte of its head now and then, and more that wait.
    let mut slow: Vec<_> = (0..lbd::admin::MAX_CONNECTIONS + 8)
        .map(|_| {
            let stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
            stream
        })
        .collect();
    let began = Instant::now();
    for stream in &mut slow {
        stream.write_all(b"GET /status HTTP/1.1\r\nHost: localhost\r\nX-Slow: ").unwrap();
    }
    let trickle: Vec<_> = slow.iter().map(|stream| stream.try_clone().unwrap()).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Until the last of them was let go; both ends give up in the end.
            for mut stream in trickle.iter().cycle() {
                if began.elapsed() > Duration::from_secs(12) {
                    break;
                }
                let _ = stream.write_all(b"x");
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        // The unix socket and the service have connections of their own.
        for _ in 0..5 {
            let asked = Instant::now();
            assert!(daemon.lbd(&["status"]).status.success());
            assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
            assert_eq!(common::client::turns(ports.address(), 1), ports.all());
        }
        assert!(began.elapsed() < Duration::from_secs(5), "none was let go before");
        // Somebody who comes last is answered when the slow ones are out of time.
        assert_eq!(ask_plainly(address, "GET /healthz", "").status, 200);
        assert!(began.elapsed() < Duration::from_secs(12));
    });
    for mut stream in slow {
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "half a head is no request");
    }
}

#[test]
fn a_stranger_costs_little() {
    let (ports, port) = (Ports::take(1), Port::take());
    let address = local(&port);
    let daemon = start(&admin(&format!("\"{address}\""), true), &ports);
    // Whoever may not ask is not listened to for long: neither the body nor a second request.
    let mut client = Client::connect(address);
    client.send(format!("POST /stop HTTP/1.1\r\nHost: {address}\r\nContent-Length: 4000\r\n\r\n"));
    let answer = client.answer();
    assert_eq!((answer.status, answer.header("connection")), (401, Some("close")));
    assert_eq!(client.drain(), 0);
    let huge = ask_plainly(address, "GET /status", &format!("X: {}\r\n", "x".repeat(20_000)));
    assert_eq!(huge.status, 431);
    let mut client = Client::connect(address);
    client.send(format!(
        "POST /reload HTTP/1.1\r\nHost: {address}\r\n{BEARER}Content-Length: 5000\r\n\r\n"
    ));
    client.send("x".repeat(5000));
    assert_eq!(client.answer().status, 413);
    drop(daemon);
}

#[test]
fn a_wrong_token_leaves_a_line_without_it() {
    let (ports, port) = (Ports::take(1), Port::take());
    let address = local(&port);
    let daemon = start(&admin(&format!("\"{address}\""), true), &ports);
    let wrong = "Authorization: Bearer almost-s3cret\r\n";
    for number in 0..14 {
        let method = if number % 2 == 0 { "GET" } else { "POST" };
        assert_eq!(ask_plainly(address, &format!("{method} /status"), wrong).status, 401);
    }
    let lines = daemon.wait_many(Mark::START, "a wrong admin token", &[], 10);
    assert_eq!(ask_plainly(address, "GET /status", "").status, 200);
    assert!(lines.iter().all(|line| line.get("client").unwrap().starts_with("127.0.0.1:")));
    assert_eq!(daemon.said(Mark::START, "a wrong admin token").len(), 10, "more are counted");
    assert!(!daemon.log.text().contains("almost"));
    // What is not even tried is none of those.
    assert_eq!(ask_plainly(address, "POST /stop", "").status, 401);
    assert_eq!(daemon.said(Mark::START, "a wrong admin token").len(), 10);
}

#[test]
fn those_who_say_nothing_make_room_for_those_who_do() {
    let (ports, port) = (Ports::take(1), Port::take());
    let address = local(&port);
    let daemon = start(&admin(&format!("\"{address}\""), true), &ports);
    let begun = Instant::now();
    // Nothing, half a head, and a head that promises more than comes.
    let beginnings = [
        "",
        "GET /status HTTP/1.1\r\nHost: localhost\r\nX: ",
        "GET /status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n",
    ];
    let mut slow = Vec::new();
    let mut more = |count: usize| {
        for number in 0..count {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(beginnings[number % 3].as_bytes()).unwrap();
            slow.push(stream);
        }
    };
    more(80);
    let mut longest = Duration::ZERO;
    for _ in 0..40 {
        more(2);
        let asked = Instant::now();
        assert_eq!(ask_plainly(address, "GET /healthz", "").status, 200);
        longest = longest.max(asked.elapsed());
        assert!(daemon.lbd(&["status"]).status.success());
    }
    assert!(longest < Duration::from_secs(3), "{longest:?} of {:?}", begun.elapsed());
    // Those who watch stay, whoever comes.
    let mut watching = TcpStream::connect(address).unwrap();
    watching.set_read_timeout(Some(common::PATIENCE)).unwrap();
    write!(watching, "GET /events HTTP/1.1\r\nHost: {address}\r\n\r\n").unwrap();
    let mut lines = BufReader::new(watching).lines();
    let mut watch = |count: usize| {
        let is_look = |line: &String| ["event: status", "event: news"].contains(&&**line);
        let seen = lines.by_ref().map_while(Result::ok).filter(is_look).take(count);
        assert_eq!(seen.count(), count, "it was cut");
    };
    watch(1);
    more(64);
    watch(2);
}
