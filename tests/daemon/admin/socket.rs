//! The admin socket and the commands on it, from outside: the real daemon, real workers.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::{
        fs::{PermissionsExt, chown, symlink},
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::common::Port;
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(20);

const STATUS: &str = "GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n";

#[test]
fn status_has_the_shape_of_the_contract() {
    let daemon = Daemon::start(&web(2));
    daemon.until(|status| states(status) == ["healthy", "healthy"]);
    assert_eq!(daemon.get("/"), 200);
    // The client may have its answer before it is counted.
    daemon.until(|status| {
        let workers = status["services"][0]["workers"].as_array().unwrap();
        workers.iter().any(|worker| worker["bytes"]["sent"].as_u64() > Some(0))
    });
    let status = daemon.status();
    let shape = json!({
        "version": "string", "pid": "number", "uptime_seconds": "number",
        "config": { "path": "string", "loaded_at": "string", "last_reload": { "ok": "bool", "at": "string", "error": "null" } },
        "services": [{
            "name": "string", "listen": ["string"], "route": "string", "balance": "string",
            "workers": [worker_shape(), worker_shape()],
            "replacements": [], "retiring": [],
        }],
    });
    assert_eq!(kinds(&status), shape);
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["pid"], daemon.child.id());
    assert_eq!(status["config"]["path"], daemon.file().to_str().unwrap());
    let service = &status["services"][0];
    assert_eq!(service["name"], "web");
    assert_eq!(service["listen"], json!([daemon.address.to_string()]));
    assert_eq!((&service["route"], &service["balance"]), (&json!("proxy"), &json!("round-robin")));
    let workers = service["workers"].as_array().unwrap();
    assert_eq!((&workers[0]["slot"], &workers[1]["slot"]), (&json!(0), &json!(1)));
    assert_eq!((&workers[0]["generation"], &workers[0]["restarts"]), (&json!(1), &json!(0)));
    let sum = |group: &str, name: &str| {
        workers.iter().map(|worker| worker[group][name].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!((sum("connections", "total"), sum("connections", "failed")), (1, 0));
    assert!(sum("bytes", "sent") > 0 && sum("bytes", "received") > 0);
    for worker in workers {
        let pid = worker["pid"].as_u64().unwrap();
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        assert!(command.starts_with("lbd\0worker\0"), "{command:?}");
        assert!(worker["resident_bytes"].as_u64().unwrap() > 100_000);
    }
}

#[test]
fn a_worker_that_crashes_is_in_backoff() {
    let daemon = Daemon::start(&crashing());
    daemon.until(|status| states(status) == ["backoff"]);
    let status = daemon.until(|status| {
        states(status) == ["backoff"] && status["services"][0]["workers"][0]["restarts"] == 1
    });
    let worker = &status["services"][0]["workers"][0];
    assert_eq!(worker["pid"], Value::Null);
    assert_eq!((&worker["resident_bytes"], &worker["cpu_seconds"]), (&Value::Null, &Value::Null));
    assert_eq!(worker["last_exit"], "exit status 3");
    assert_eq!(worker["generation"], 2);
    let answer = daemon.ask("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n");
    assert_eq!(answer, (503, r#"{"error":"no healthy worker: web"}"#.to_owned()));
}

#[test]
fn status_is_a_table_too() {
    let daemon = Daemon::start(&web(2));
    let status = daemon.until(|status| states(status) == ["healthy", "healthy"]);
    let output = daemon.lbd(&["status"]);
    let table = succeeded(&output);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 4, "{table}");
    assert!(lines[0].contains(daemon.file().to_str().unwrap()), "{table}");
    assert!(lines[1].starts_with("SERVICE  SLOT "), "{table}");
    for (row, worker) in lines[2..].iter().zip(status["services"][0]["workers"].as_array().unwrap())
    {
        let cells: Vec<String> = row.split_whitespace().map(str::to_owned).collect();
        let number = |name: &str| worker[name].to_string();
        assert_eq!(
            cells[..5],
            ["web", &number("slot"), &number("port"), &number("pid"), "healthy"]
        );
    }
    assert!(!table.contains('\x1b'), "colours in a pipe");
    let json: Value = serde_json::from_str(&succeeded(&daemon.lbd(&["status", "--json"]))).unwrap();
    assert_eq!(json["pid"], daemon.child.id());
}

#[test]
fn a_reload_says_how_it_went() {
    let daemon = Daemon::start(&web(1));
    daemon.until(|status| states(status) == ["healthy"]);
    // Done.
    daemon.configure(&web(3));
    let output = daemon.lbd(&["reload"]);
    assert_eq!(succeeded(&output), "reloaded: services added 0, removed 0, changed 1\n");
    assert_eq!(daemon.status()["config"]["last_reload"]["ok"], true);
    assert_eq!(daemon.status()["config"]["last_reload"]["error"], Value::Null);
    // Refused: a broken file takes nothing from the commands that don't need it.
    daemon.configure("[service.web]\nworkers = 0\n");
    let loaded = daemon.status()["config"]["loaded_at"].clone();
    let error = failed(&daemon.lbd(&["reload"]));
    let file = daemon.file().display().to_string();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines.len(), 3, "{error}");
    assert!(lines[0].starts_with(&format!("lbd: {file}:1: service.web.listen: missing;")));
    assert!(lines[1].starts_with(&format!("{file}:1: service.web: nothing to run;")));
    assert!(lines[2].starts_with(&format!("{file}:2: service.web.workers: expected a number")));
    let status = daemon.status();
    assert_eq!(status["config"]["last_reload"]["ok"], false);
    assert_eq!(status["config"]["loaded_at"], loaded);
    assert_eq!(states(&status).len(), 3);
    let (code, body) = daemon.ask("POST /reload HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(code, 422, "{body}");
    succeeded(&daemon.lbd(&["status"]));
    // Needs a restart.
    daemon.configure(&format!("[admin]\nsocket = \"x.sock\"\n{}", web(3)));
    let error = failed(&daemon.lbd(&["reload"]));
    assert_eq!(error, "lbd: a change of admin.socket needs a restart\n");
    // Accepted, but the new workers fail.
    daemon.configure(&crashing());
    let error = failed(&daemon.lbd(&["reload"]));
    assert!(error.contains("exit status 3"), "{error}");
    let reload = &daemon.status()["config"]["last_reload"];
    assert_eq!(reload["ok"], false);
    assert!(reload["error"].as_str().unwrap().contains("exit status 3"), "{reload}");
}

#[test]
fn a_restart_replaces_every_worker_and_loses_no_request() {
    let daemon = Daemon::start(&web(3));
    let before = daemon.until(|status| states(status) == ["healthy"; 3]);
    let stop = Arc::new(AtomicBool::new(false));
    let (good, bad) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (stop, good, bad) = (stop.clone(), good.clone(), bad.clone());
            let address = daemon.address;
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let count = if get(address, "/") == Some(200) { &good } else { &bad };
                    count.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let watched = thread::scope(|scope| {
        let restart = scope.spawn(|| daemon.lbd(&["restart", "web"]));
        let mut watched = Vec::new();
        while !restart.is_finished() {
            watched.push(daemon.status());
            thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(succeeded(&restart.join().unwrap()), "web: workers replaced 3\n");
        watched
    });
    stop.store(true, Ordering::Relaxed);
    clients.into_iter().for_each(|client| client.join().unwrap());
    let after = daemon.status();
    assert_eq!(states(&after), ["healthy"; 3]);
    for (old, new) in pids(&before).iter().zip(pids(&after)) {
        assert_ne!(*old, new);
    }
    let generations =
        |status: &Value| -> Vec<u64> { each(status, |w| w["generation"].as_u64().unwrap()) };
    assert_eq!(generations(&after), [2, 2, 2]);
    // One after the other: wherever one looks, the first few are new and the rest is old.
    for status in watched {
        let seen = generations(&status);
        assert!(seen.is_sorted_by(|a, b| a >= b), "{seen:?}");
        assert!(states(&status).iter().filter(|state| **state != "healthy").count() <= 1);
    }
    assert_eq!(bad.load(Ordering::Relaxed), 0, "of {}", good.load(Ordering::Relaxed));
    assert!(good.load(Ordering::Relaxed) > 20);
}

#[test]
fn a_restart_that_fails_says_why() {
    let daemon = Daemon::start(&web(1));
    let before = daemon.until(|status| states(status) == ["healthy"]);
    let error = failed(&daemon.lbd(&["restart", "wbe"]));
    assert_eq!(error, "lbd: there is no service \"wbe\", but web\n");
    let (code, _) = daemon.ask("POST /services/wbe/restart HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(code, 404);
    // The replacement finds nothing to serve.
    fs::remove_dir_all(daemon.folder.path().join("www")).unwrap();
    let error = failed(&daemon.lbd(&["restart"]));
    assert!(error.contains("slot 0: "), "{error}");
    assert_eq!(pids(&daemon.status()), pids(&before));
}

#[test]
fn stop_waits_until_nothing_is_left() {
    let mut daemon = Daemon::start(&web(2));
    let status = daemon.until(|status| states(status) == ["healthy", "healthy"]);
    assert_eq!(succeeded(&daemon.lbd(&["stop"])), "stopped\n");
    for pid in pids(&status) {
        assert_eq!(kill(Pid::from_raw(pid), None), Err(nix::errno::Errno::ESRCH));
    }
    // It has ended at once, not only soon.
    assert_eq!(daemon.child.try_wait().unwrap().unwrap().code(), Some(0));
    assert_eq!(fs::read_dir(daemon.runtime()).unwrap().count(), 0);
    let error = failed(&daemon.lbd(&["stop"]));
    let expected = format!(
        "lbd: no lbd runs with {}: nothing listens on {}/lb-",
        daemon.file().display(),
        daemon.runtime().display()
    );
    assert!(error.starts_with(&expected), "{error}");
}

#[test]
fn a_second_daemon_goes_and_touches_nothing() {
    let daemon = Daemon::start(&format!("[log]\nfile = \"log\"\n{}", web(1)));
    let before = daemon.until(|status| states(status) == ["healthy"]);
    let read = || fs::read_to_string(daemon.folder.path().join("log")).unwrap();
    // The log is written by a thread of its own, and this is its last line for now.
    let log = until(|| Some(read()).filter(|log| log.contains(" ready ")));
    // Even where the file has changed so that the two would not meet on a port.
    let port = Port::take();
    let other = web(1).replace("ADDRESS", &port.address().to_string());
    daemon.configure(&format!("[log]\nfile = \"log2\"\n{other}"));
    let output = daemon.lbd(&[]);
    let expected = format!(
        "lbd: another lbd already runs with {} (pid {})\n",
        daemon.file().display(),
        daemon.child.id()
    );
    assert_eq!(failed(&output), expected);
    assert!(!daemon.folder.path().join("log2").exists());
    assert_eq!(pids(&daemon.status()), pids(&before));
    assert_eq!(read(), log);
}

#[test]
fn of_two_that_start_at_once_one_runs() {
    let mut daemon = Daemon::prepare(&web(1));
    let mut both: Vec<_> = (0..2).map(|_| daemon.command(&[]).spawn().unwrap()).collect();
    let ended = until(|| both.iter_mut().position(|child| child.try_wait().unwrap().is_some()));
    let loser = both.remove(ended).wait_with_output().unwrap();
    assert!(failed(&loser).contains("another lbd already runs"), "{loser:?}");
    daemon.child = both.remove(0);
    daemon.until(|status| states(status) == ["healthy"]);
    succeeded(&daemon.lbd(&["stop"]));
}

#[test]
fn a_stale_socket_is_replaced_and_a_private_one_made() {
    let mut daemon = Daemon::start(&web(1));
    daemon.until(|status| states(status) == ["healthy"]);
    let socket = daemon.socket();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o7777, 0o600);
    kill(Pid::from_raw(daemon.child.id() as i32), Signal::SIGKILL).unwrap();
    daemon.child.wait().unwrap();
    assert!(socket.exists(), "nobody is left to remove it");
    failed(&daemon.lbd(&["status"]));
    daemon.child = daemon.command(&[]).spawn().unwrap();
    daemon.until(|status| states(status) == ["healthy"]);
    assert_eq!(daemon.socket(), socket);
}

#[test]
fn a_socket_of_ones_own_choice() {
    let daemon = Daemon::start(&format!("[admin]\nsocket = \"own.sock\"\n{}", web(1)));
    daemon.until(|status| states(status) == ["healthy"]);
    let own = daemon.folder.path().join("own.sock");
    assert_eq!(fs::metadata(&own).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(fs::read_link(daemon.socket()).unwrap(), own);
    // By its own path, from anywhere, and with no file at all.
    fs::remove_file(daemon.file()).unwrap();
    succeeded(&at_socket(&own));
    succeeded(&daemon.lbd(&["status"]));
    succeeded(&daemon.lbd(&["stop"]));
    assert!(!own.exists());
    assert_eq!(fs::read_dir(daemon.runtime()).unwrap().count(), 0);
}

#[test]
fn what_is_not_a_socket_is_left_alone() {
    let daemon = Daemon::prepare(&format!("[admin]\nsocket = \"precious\"\n{}", web(1)));
    let precious = daemon.folder.path().join("precious");
    fs::write(&precious, "data").unwrap();
    let error = failed(&daemon.lbd(&[]));
    let path = precious.display();
    let expected = format!(
        "lbd: cannot listen on {path}, the admin socket: there is a file that is not a socket\n"
    );
    assert_eq!(error, expected);
    assert_eq!(fs::read_to_string(&precious).unwrap(), "data");
}

#[test]
fn a_folder_that_others_could_meddle_with_is_not_used() {
    let mut daemon = Daemon::prepare(&web(1));
    let session = daemon.folder.path().join("session");
    let trap = daemon.folder.path().join("trap");
    fs::create_dir(&session).unwrap();
    fs::create_dir(&trap).unwrap();
    fs::set_permissions(daemon.runtime(), fs::Permissions::from_mode(0o777)).unwrap();
    symlink(&trap, session.join("lbd")).unwrap();
    let mut command = daemon.command(&[]);
    command.env("XDG_RUNTIME_DIR", &session);
    daemon.child = command.spawn().unwrap();
    // It ends up in one of its own: which one depends on who runs the test.
    until(|| succeeds(&daemon.lbd(&["status"])).then_some(()));
    assert_eq!(fs::read_dir(daemon.runtime()).unwrap().count(), 0);
    assert_eq!(fs::read_dir(&trap).unwrap().count(), 0);
    succeeded(&daemon.lbd(&["stop"]));
}

#[test]
fn nobody_asks_on_behalf_of_another_host() {
    let daemon = Daemon::start(&web(1));
    let before = daemon.until(|status| states(status) == ["healthy"]);
    for headers in [
        "Host: example.org",
        "Host: localhost\r\nOrigin: http://example.org",
        "Host: localhost\r\nOrigin: null",
    ] {
        for path in ["/stop", "/reload", "/services/web/restart"] {
            let (code, body) = daemon.ask(&format!("POST {path} HTTP/1.1\r\n{headers}\r\n\r\n"));
            assert_eq!(code, 403, "{path} {headers}: {body}");
        }
    }
    // To look is no change.
    assert_eq!(daemon.ask("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"), (200, "ok\n".to_owned()));
    let (code, _) = daemon.ask("POST /reload HTTP/1.1\r\nHost: lbd\r\nOrigin: http://lbd\r\n\r\n");
    assert_eq!(code, 200);
    assert_eq!(pids(&daemon.status()), pids(&before));
}

#[test]
fn what_is_not_there_is_said_in_json() {
    let daemon = Daemon::start(&web(1));
    for (request, code) in [
        ("GET /nothing", 404),
        ("GET /services/web", 404),
        ("GET /stop", 405),
        ("DELETE /status", 405),
        ("POST /status", 405),
    ] {
        let (status, body) = daemon.ask(&format!("{request} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        assert_eq!(status, code, "{request}");
        let body: Value = serde_json::from_str(&body).unwrap();
        assert!(body["error"].is_string(), "{request}: {body}");
    }
}

#[test]
fn nobody_keeps_it_busy() {
    let daemon = Daemon::start(&web(1));
    daemon.until(|status| states(status) == ["healthy"]);
    let head = "POST /reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n";
    let (code, _) = daemon.ask(&format!("{head}{}", "x".repeat(5000)));
    assert_eq!(code, 413);
    let huge =
        format!("GET /status HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "x".repeat(20_000));
    assert_eq!(daemon.ask(&huge).0, 431);
    // More idle connections than it holds, and one that does not send what it promised.
    let mut slow = daemon.connect();
    slow.write_all(head.as_bytes()).unwrap();
    let began = Instant::now();
    let idle: Vec<_> = (0..lbd::admin::MAX_CONNECTIONS + 4).map(|_| daemon.connect()).collect();
    assert_eq!(answer(&mut slow).0, 408);
    succeeded(&daemon.lbd(&["status"]));
    assert!(began.elapsed() < PATIENCE);
    for mut stream in idle {
        assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0, "it was let go");
    }
}

#[test]
fn a_socket_that_nobody_listens_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.sock");
    drop(UnixListener::bind(&path).unwrap());
    let output = at_socket(&path);
    let expected = format!("lbd: no lbd runs here: nothing listens on {}\n", path.display());
    assert_eq!(failed(&output), expected);
}

#[test]
fn a_stranger_is_not_believed() {
    const NOBODY: u32 = 65534;
    if !geteuid().is_root() {
        return; // there is no way to be two users
    }
    let mut daemon = Daemon::prepare(&crashing());
    let folder = daemon.folder.path().to_owned();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    chown(daemon.runtime(), Some(NOBODY), Some(NOBODY)).unwrap();
    // Where it was built may be closed to others.
    fs::copy(env!("CARGO_BIN_EXE_lbd"), folder.join("lbd")).unwrap();
    let mut command = Command::new(folder.join("lbd"));
    command.arg("--config").arg(daemon.file()).env("RUNTIME_DIRECTORY", daemon.runtime());
    command.env_remove("NOTIFY_SOCKET").stderr(Stdio::null()).uid(NOBODY).gid(NOBODY);
    daemon.child = command.spawn().unwrap();
    daemon.until(|_| true);
    // A service of that user's own, as the folder shows.
    succeeded(&daemon.lbd(&["status"]));
    // Somebody who could sneak a socket into a folder of root's.
    chown(daemon.runtime(), Some(0), Some(0)).unwrap();
    let error = failed(&at_socket(&daemon.socket()));
    assert!(error.ends_with("belongs to user 65534, and neither to you nor to root\n"), "{error}");
}

// ---- The harness ----

struct Daemon {
    child: Child,
    folder: TempDir,
    address: SocketAddr,
    _port: Port,
}

impl Daemon {
    /// Everything but the daemon itself. In `config`, ADDRESS is where clients will connect.
    fn prepare(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["www", "run"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        fs::write(folder.path().join("www/index.html"), "here").unwrap();
        let child = Command::new("true").spawn().unwrap();
        let port = Port::take();
        let daemon = Self { child, folder, address: port.address(), _port: port };
        daemon.configure(config);
        daemon
    }

    fn start(config: &str) -> Self {
        let mut daemon = Self::prepare(config);
        daemon.child = daemon.command(&[]).stderr(Stdio::null()).spawn().unwrap();
        until(|| TcpStream::connect(daemon.address).ok().map(drop));
        daemon
    }

    fn configure(&self, config: &str) {
        let config = config.replace("ADDRESS", &self.address.to_string());
        fs::write(self.file(), config).unwrap();
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("lb.toml")
    }

    fn runtime(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    fn socket(&self) -> PathBuf {
        let found: Vec<_> =
            fs::read_dir(self.runtime()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(found.len(), 1, "{found:?}");
        found.into_iter().next().unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lbd"));
        command
            .args(arguments)
            .args(["--config", self.file().to_str().unwrap()])
            .env("RUNTIME_DIRECTORY", self.runtime())
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn lbd(&self, arguments: &[&str]) -> Output {
        finished(self.command(arguments).spawn().unwrap())
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn ask(&self, request: &str) -> (u16, String) {
        let mut stream = self.connect();
        // It may have heard enough before the end.
        let _ = stream.write_all(request.as_bytes());
        answer(&mut stream)
    }

    fn status(&self) -> Value {
        let (code, body) = self.ask(STATUS);
        assert_eq!(code, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    /// The status as soon as there is a daemon to tell it and it is `good`.
    fn until(&self, good: impl Fn(&Value) -> bool) -> Value {
        until(|| {
            let socket = fs::read_dir(self.runtime()).unwrap().next()?.unwrap().path();
            UnixStream::connect(socket).ok()?;
            Some(self.status()).filter(|status| good(status))
        })
    }

    fn get(&self, path: &str) -> u16 {
        get(self.address, path).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A service of built-in workers.
fn web(workers: u32) -> String {
    format!("[service.web]\nlisten = \"ADDRESS\"\nroot = \"www\"\nworkers = {workers}\n")
}

/// A service whose worker ends at once.
fn crashing() -> String {
    "[service.web]\nlisten = \"ADDRESS\"\ncommand = [\"sh\", \"-c\", \"exit 3\"]\nworkers = 1\n\
     restart.min-delay = \"500ms\"\n"
        .to_owned()
}

/// What `check` finds, as soon as it finds it.
fn until<T>(mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The status of one answer to one request on a connection of its own.
fn get(address: SocketAddr, path: &str) -> Option<u16> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    answer.ends_with(b"here").then_some(())?;
    str::from_utf8(answer.get(9..12)?).ok()?.parse().ok()
}

/// The status and body of the next answer.
fn answer(stream: &mut UnixStream) -> (u16, String) {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() == length.map_or(0, |length| length.parse().unwrap()) {
                return (head[9..12].parse().unwrap(), body.to_owned());
            }
        }
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk) {
            Ok(0) => panic!("cut short: {text:?}"),
            Ok(read) => bytes.extend(&chunk[..read]),
            // A wait with a time limit is not taken up again (signal(7)).
            Err(error) => assert_eq!(error.kind(), ErrorKind::Interrupted, "{error}"),
        }
    }
}

/// What came of a command, which says too little to fill a pipe.
fn finished(mut child: Child) -> Output {
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it does not end");
        }
        thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

/// `lbd status`, from a folder without any file.
fn at_socket(path: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lbd"));
    command.args(["status", "--socket"]).arg(path).current_dir("/").output().unwrap()
}

fn succeeds(output: &Output) -> bool {
    output.status.code() == Some(0)
}

/// What a command printed that did well and had nothing to complain of.
fn succeeded(output: &Output) -> String {
    assert!(succeeds(output) && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What a command complained of that failed at run time.
fn failed(output: &Output) -> String {
    assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn each<T>(status: &Value, of: impl Fn(&Value) -> T) -> Vec<T> {
    status["services"][0]["workers"].as_array().unwrap().iter().map(of).collect()
}

fn states(status: &Value) -> Vec<String> {
    each(status, |worker| worker["state"].as_str().unwrap().to_owned())
}

fn pids(status: &Value) -> Vec<i32> {
    each(status, |worker| worker["pid"].as_i64().unwrap().try_into().unwrap())
}

/// The same with the kind of each value in its place.
fn kinds(value: &Value) -> Value {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) => "bool".into(),
        Value::Number(_) => "number".into(),
        Value::String(_) => "string".into(),
        Value::Array(items) => items.iter().map(kinds).collect(),
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| (name.clone(), kinds(value))).collect()
        }
    }
}

fn worker_shape() -> Value {
    json!({
        "slot": "number", "port": "number", "pid": "number", "generation": "number",
        "state": "string", "since_seconds": "number", "drained": "bool", "restarts": "number", "last_exit": "null",
        "connections": { "active": "number", "total": "number", "failed": "number", "per_second": "null" },
        "bytes": { "sent": "number", "received": "number" },
        "resident_bytes": "number", "cpu_seconds": "number",
        "last_probe": { "ok": "bool", "seconds": "number", "error": "null" },
    })
}
