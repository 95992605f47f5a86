//! Healthy is proven: a worker is believed when its own program has accepted a connection, and busy
//! is not dead.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    self, Daemon, Mark, Ports,
    client::{Load, connect, get, try_get},
    command, eventually, fixture, needs,
    proc::cpu,
};
use tempfile::TempDir;

/// Probes that come quickly.
const QUICK: &str = "health = { interval = \"50ms\", timeout = \"100ms\", fall = 2 }";

/// What Python programs have: the head of a request, or nothing where its client says no more.
const REQUEST: &str = r#"
def request(c):
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = c.recv(4096)
        if not piece:
            return None
        data += piece
    return data
"#;

/// Starts a daemon whose worker is this Python program, with its port as the first argument.
fn python(ports: &Ports, program: &str, keys: &str) -> Option<Daemon> {
    python_in(tempfile::tempdir().unwrap(), ports, program, keys)
}

/// The same in this folder.
fn python_in(folder: TempDir, ports: &Ports, program: &str, keys: &str) -> Option<Daemon> {
    if !needs::has(needs::APPS, "python3", "python3") {
        return None;
    }
    fs::write(folder.path().join("app.py"), format!("{REQUEST}{program}")).unwrap();
    let config = ports
        .service(&format!("command = [\"python3\", \"-u\", \"app.py\", \"{{port}}\"]\n{keys}"));
    Some(Daemon::start_in(folder, &config))
}

/// A program that stops when the test does.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended already.
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

/// The ways in which a worker comes to its socket: of three workers, with these keys.
fn modes(ports: &Ports) -> [(&'static str, String); 4] {
    let address = ports.address();
    let listen = format!("[service.web]\nlisten = \"{address}\"\n");
    [
        ("bind, fixed ports", ports.service("")),
        ("bind, free ports", format!("{listen}workers = 3\n")),
        ("inherit", ports.service("socket = \"inherit\"")),
        ("unix", format!("{listen}workers = 3\nsocket = \"unix\"\n")),
    ]
}

#[test]
fn a_broken_release_is_never_called_healthy_and_costs_nothing() {
    for mode in 0..4 {
        let ports = Ports::take(3);
        let (name, service) = &modes(&ports)[mode];
        let folder = tempfile::tempdir().unwrap();
        let release = folder.path().join("server.sh");
        fs::write(&release, format!("exec {} http\n", fixture())).unwrap();
        let config =
            format!("{service}\ncommand = [\"sh\", \"server.sh\"]\nrollout.settle = \"50ms\"\n");
        let daemon = Daemon::start_in(folder, &config);
        daemon.wait_healthy(Mark::START, 3);
        let before = daemon.slot_pids();
        let load = Load::start(ports.address(), "/");
        let since = daemon.now();
        fs::write(&release, "echo 'SyntaxError: Unexpected token' >&2\nexit 7\n").unwrap();
        let output = daemon.lbd(&["restart", "web"]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{name}: {error}");
        for part in ["slot 0", "exit status 7", "the 3 old workers still serve, nothing changed"] {
            assert!(error.contains(part), "{name}: {error}");
        }
        assert!(error.contains("\n    SyntaxError: Unexpected token"), "{name}: {error}");
        let failed = daemon.wait(since, "replacement failed, the old settings stay in force", &[]);
        assert_eq!(failed.get("said"), Some("SyntaxError: Unexpected token"));
        // The same by a reload: the environment breaks it.
        daemon.write_config(&format!("{config}env = {{ BROKEN = \"1\" }}\n"));
        let output = daemon.lbd(&["reload"]);
        assert_eq!(output.status.code(), Some(1), "{name}: {output:?}");
        load.more(20);
        load.end_without_failure();
        assert_eq!(daemon.slot_pids(), before, "{name}");
        assert!(daemon.said(since, "worker healthy").is_empty(), "{name}");
    }
}

/// Listens at once, boots for as long as the file `boot` says, and only then accepts or, where the
/// file `broken` is there, ends.
const SLOW: &str = r#"
import os, socket, sys, time
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("127.0.0.1", int(sys.argv[1])))
s.listen(64)
time.sleep(float(open("boot").read()))
if os.path.exists("broken"):
    sys.exit("ImportError: no module named app")
while True:
    c, _ = s.accept()
    if request(c):
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    c.close()
"#;

#[test]
fn a_master_that_listens_before_it_can_serve_is_waited_for() {
    let ports = Ports::take(2);
    let Some(daemon) = python(&ports, SLOW, "rollout.settle = \"50ms\"") else { return };
    fs::write(daemon.path("boot"), "0").unwrap();
    daemon.wait_healthy(Mark::START, 2);
    let before = daemon.slot_pids();

    // One that does not come up in the end is not believed in between.
    fs::write(daemon.path("boot"), "1").unwrap();
    fs::write(daemon.path("broken"), "").unwrap();
    let load = Load::start(ports.address(), "/");
    let since = daemon.now();
    let output = daemon.lbd(&["restart", "web"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("ImportError: no module named app"), "{error}");
    assert!(daemon.said(since, "worker healthy").is_empty());
    assert_eq!(daemon.slot_pids(), before);

    // And whoever needs long makes no client wait for it.
    fs::remove_file(daemon.path("broken")).unwrap();
    assert_eq!(daemon.lbd(&["restart", "web"]).status.code(), Some(0));
    load.more(20);
    load.end_without_failure();
    daemon.wait_many(since, "connection", &[], 20);
    for line in daemon.said(since, "connection") {
        assert!(line.number::<f64>("duration") < 0.9, "{}", line.raw);
    }
    let after = daemon.slot_pids();
    assert!(after.iter().zip(&before).all(|(new, old)| *new > 0 && new != old), "{after:?}");
}

#[test]
fn a_first_start_is_not_ready_before_a_worker_accepts() {
    let ports = Ports::take(1);
    let Some(daemon) = python(&ports, SLOW, "health.interval = \"20ms\"") else { return };
    fs::write(daemon.path("boot"), "0.7").unwrap();
    let healthy = daemon.wait(Mark::START, "worker healthy", &[]);
    assert!(healthy.number::<f64>("after") >= 0.7, "{}", healthy.raw);
    daemon.wait(Mark::START, "ready", &[]);
}

/// Listens, and never accepts: with the first client in its queue it ends, or does `closing` for as
/// long as the test takes, as a program does that its own supervisor starts again.
const CRASHING: &str = r#"
import os, select, socket, sys
while True:
    with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as s:
        select.select([s], [], [])
        if not os.path.exists("closing"):
            os._exit(7)
"#;

#[test]
fn a_program_that_crashes_with_the_probe_in_its_queue_is_never_called_healthy() {
    for closing in [false, true] {
        let ports = Ports::take(1);
        // Nothing but the probe itself is to notice.
        let keys = "restart.min-delay = \"10ms\"\nrestart.max-delay = \"10ms\"\n\
                    health = { interval = \"20ms\", start-timeout = \"1s\", owner = \"any\" }";
        let folder = tempfile::tempdir().unwrap();
        if closing {
            fs::write(folder.path().join("closing"), "").unwrap();
        }
        let Some(daemon) = python_in(folder, &ports, CRASHING, keys) else { return };
        if closing {
            daemon.wait(Mark::START, "worker given up", &[]);
        } else {
            daemon.wait(Mark::START, "worker exited", &[("failures", "5")]);
        }
        assert!(daemon.said(Mark::START, "worker healthy").is_empty(), "{closing}");
    }
}

#[test]
fn a_program_that_does_not_take_the_socket_it_was_given_is_told_so() {
    for (socket, slots) in [("inherit", "workers = 1"), ("unix", "workers = 1")] {
        let ports = Ports::take(0);
        let elsewhere = common::ports::Port::take();
        let config = format!(
            "[service.web]\nlisten = \"{}\"\n{slots}\nsocket = \"{socket}\"\n\
             command = [\"sh\", \"-c\", \"exec env -u LISTEN_FDS PORT={} {} http 3>&-\"]\n\
             health.interval = \"100ms\"",
            ports.address(),
            elsewhere.number,
            fixture()
        );
        let daemon = Daemon::start(&config);
        let line = daemon.wait(Mark::START, "worker not healthy yet", &[]);
        let error = line.get("error").unwrap();
        let there = format!("127.0.0.1:{}", elsewhere.number);
        assert!(error.contains(&there) && error.contains("descriptor 3"), "{socket}: {error}");
        assert!(daemon.said(Mark::START, "worker healthy").is_empty());
    }
}

/// One thread that takes as long as a request says, with a queue of five; tells what waited in it
/// after the first request.
const BUSY: &str = r#"
import socket, sys, time
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("127.0.0.1", int(sys.argv[1])))
s.listen(5)
while True:
    c, _ = s.accept()
    data = request(c)
    if not data:
        c.close()
        continue
    seconds = float(data.split(b" ")[1][1:] or b"0")
    if seconds >= 1:
        open("took", "w").close()
    time.sleep(seconds)
    if seconds >= 1:
        s.setblocking(False)
        waiting = 0
        try:
            while True:
                s.accept()[0].close()
                waiting += 1
        except BlockingIOError:
            pass
        s.setblocking(True)
        open("waiting", "w").write(str(waiting))
    c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    c.close()
"#;

#[test]
fn a_busy_worker_is_not_killed_with_its_request_in_its_hands() {
    for probe in ["", "http = \"/0\", "] {
        let ports = Ports::take(1);
        let keys = format!(
            "health = {{ {probe}interval = \"50ms\", timeout = \"50ms\", fall = 2 }}\n\
             restart.unhealthy-after = \"300ms\"\nrollout.settle = \"50ms\"\n\
             stop = {{ drain-timeout = \"30s\", timeout = \"100ms\" }}"
        );
        let Some(daemon) = python(&ports, BUSY, &keys) else { return };
        let old = daemon.wait(Mark::START, "worker healthy", &[]).pid();
        let since = daemon.now();
        let address = ports.address();
        let long = thread::spawn(move || try_get(address, "/2.5"));
        eventually("it is at it", || daemon.path("took").exists());
        // It is out of rotation, and another one is started, so that others are served meanwhile.
        daemon.wait(since, "worker unhealthy", &[("pid", &old.to_string())]);
        let given_up = daemon.wait(since, "worker given up", &[("pid", &old.to_string())]);
        assert!(given_up.get("error").unwrap().contains("is not accepted"), "{}", given_up.raw);
        daemon.wait(since, "draining", &[("pid", &old.to_string()), ("why", "unhealthy")]);
        assert_eq!(try_get(ports.address(), "/0").unwrap(), b"ok");
        assert_eq!(long.join().unwrap().unwrap(), b"ok");
        daemon.wait(since, "worker exited", &[("pid", &old.to_string())]);
        let waiting: u32 = fs::read_to_string(daemon.path("waiting")).unwrap().parse().unwrap();
        assert!(waiting <= 1, "{waiting} probes waited");
    }
}

#[test]
fn a_worker_that_is_busy_with_many_is_not_taken_for_dead() {
    let ports = Ports::take(2);
    // A probe waits far longer in their queues than it may take.
    let keys = "health = { interval = \"50ms\", timeout = \"400ms\", fall = 1 }";
    let Some(daemon) = python(&ports, BUSY, keys) else { return };
    daemon.wait_healthy(Mark::START, 2);
    let address = ports.address();
    let clients: Vec<_> =
        (0..12).map(|_| thread::spawn(move || try_get(address, "/0.2"))).collect();
    for client in clients {
        assert_eq!(client.join().unwrap().unwrap(), b"ok");
    }
    assert!(daemon.said(Mark::START, "worker unhealthy").is_empty());
}

#[test]
fn a_worker_that_stops_accepting_is_seen_by_a_bare_probe() {
    let ports = Ports::take(2);
    let keys = format!(
        "command = [\"sh\", \"-c\", \"\"\"[ {{slot}} = 0 ] && exec {0} stalling stop || exec {0} http\"\"\"]\n{QUICK}",
        fixture()
    );
    let daemon = Daemon::healthy(&ports.service(&keys), 2);
    daemon.tell_worker("stop");
    let line = daemon.wait(Mark::START, "worker unhealthy", &[("slot", "0")]);
    assert!(line.get("error").unwrap().contains("within 100ms"), "{}", line.raw);
    for _ in 0..4 {
        try_get(ports.address(), "/").unwrap();
    }
}

/// Greets whoever comes, and has nobody who listens for errors.
const GREETING: &str = "
const net = require('node:net');
let clients = 0;
net.createServer((socket) => {
  socket.write('220 ready\\r\\n');
  if (++clients == 200) require('node:fs').writeFileSync('many', '');
}).listen(process.env.PORT, '127.0.0.1');
";

#[test]
fn a_server_that_speaks_first_survives_its_probes() {
    if !needs::has(needs::APPS, "node", "nodejs") {
        return;
    }
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("server.js"), GREETING).unwrap();
    let keys = "command = [\"node\", \"server.js\"]\nhealth.interval = \"5ms\"";
    let daemon = Daemon::start_in(folder, &ports.service(keys));
    daemon.wait_healthy(Mark::START, 1);
    eventually("it was probed often", || daemon.path("many").exists());
    let mut greeting = [0; 11];
    connect(ports.address()).read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"220 ready\r\n");
    for message in ["worker exited", "worker unhealthy"] {
        assert!(daemon.said(Mark::START, message).is_empty());
    }
}

/// Answers a GET with a body, and tells whether anything went wrong with that.
const BODY: &str = r#"
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(40):
            self.wfile.write(b"x" * 10000)
    def log_message(self, *_):
        open("asked", "a").write("x")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"#;

#[test]
fn a_probe_reads_the_answer_that_it_has_asked_for() {
    let ports = Ports::take(1);
    let keys = "health = { http = \"/\", interval = \"5ms\" }";
    let Some(daemon) = python(&ports, BODY, keys) else { return };
    daemon.wait_healthy(Mark::START, 1);
    let asked = || fs::read(daemon.path("asked")).map_or(0, |asked| asked.len());
    eventually("it was probed often", || asked() > 50);
    let lines = daemon.said(Mark::START, "output");
    assert!(lines.is_empty(), "a traceback: {lines:?}");
}

#[test]
fn an_answer_without_end_costs_next_to_nothing() {
    let ports = Ports::take(1);
    let endless = r#"
import socket, sys, threading
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("127.0.0.1", int(sys.argv[1])))
s.listen(64)
def pour(c):
    try:
        c.recv(4096)
        while True:
            c.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n" * 100)
    except OSError:
        open("cut", "a").write("x")
while True:
    threading.Thread(target=pour, args=s.accept()[:1], daemon=True).start()
"#;
    let keys = "health = { http = \"/\", interval = \"100ms\" }";
    let Some(daemon) = python(&ports, endless, keys) else { return };
    let cut = || fs::read(daemon.path("cut")).map_or(0, |cut| cut.len());
    eventually("it was probed", || cut() > 3);
    let (before, began, so_far) = (cpu(daemon.pid()), Instant::now(), cut());
    eventually("it was probed more often", || cut() > so_far + 10);
    let used = cpu(daemon.pid()) - before;
    assert!(used < began.elapsed() / 4, "{used:?} of {:?}", began.elapsed());
    let error = daemon.workers("web")[0]["last_probe"]["error"].as_str().unwrap().to_owned();
    assert!(error.contains("no end"), "{error}");
}

/// Runs this Python program as another user, with these arguments, until it has said `ready`.
fn stranger(program: &str, argument: &str) -> Program {
    let mut child = Command::new("python3")
        .args(["-u", "-c", program, argument])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"ready\n");
    Program(child)
}

/// Answers everybody on a port, as this user.
fn thief(user: u32, port: u16) -> Program {
    let program = format!(
        r#"
import os, socket, sys
os.setgid({user}); os.setuid({user})
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("127.0.0.1", int(sys.argv[1])))
s.listen(64)
print("ready")
while True:
    c, _ = s.accept()
    while c.recv(4096):
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen")
        break
    c.shutdown(socket.SHUT_WR)
    while c.recv(4096):
        pass
    c.close()
"#
    );
    stranger(&program, &port.to_string())
}

#[test]
fn whoever_else_answers_on_a_workers_port_gets_no_client() {
    if !needs::is_root() || !needs::has(needs::APPS, "python3", "python3") {
        return;
    }
    // As it is by default, where lbd may look; by user; and for whoever wants it so.
    for (owner, user, named) in [
        ("", 65534, Some("health.owner = \"any\"")),
        ("", 0, Some("health.owner = \"user\"")),
        ("health.owner = \"user\"\n", 65534, Some("health.owner = \"any\"")),
        ("health.owner = \"user\"\n", 0, None),
        ("health.owner = \"any\"\n", 65534, None),
    ] {
        let ports = Ports::take(1);
        let keys = format!("command = [\"sleep\", \"1000\"]\nhold-timeout = \"100ms\"\n{owner}");
        let daemon = Daemon::start(&ports.service(&keys));
        daemon.wait(Mark::START, "worker started", &[]);
        // After the worker has its process, before it has the port.
        let _thief = thief(user, ports.worker(0));
        let Some(named) = named else {
            daemon.wait_healthy(Mark::START, 1);
            assert_eq!(get(ports.address(), "/"), "stolen");
            continue;
        };
        let line = daemon.wait(Mark::START, "worker not healthy yet", &[]);
        assert!(line.get("error").unwrap().contains(named), "{owner} {user}: {}", line.raw);
        assert!(try_get(ports.address(), "/").is_err());
        assert!(daemon.said(Mark::START, "worker healthy").is_empty());
    }
}

#[test]
fn a_port_that_changes_hands_while_the_worker_lives_is_noticed() {
    if !needs::is_root() || !needs::has(needs::APPS, "python3", "python3") {
        return;
    }
    let ports = Ports::take(1);
    let keys = format!("{}\n{QUICK}", command(&["closing", "stop"]));
    let daemon = Daemon::healthy(&ports.service(&keys), 1);
    daemon.tell_worker("stop");
    let _thief = thief(65534, ports.worker(0));
    daemon.wait(Mark::START, "worker unhealthy", &[]);
    eventually("the reason is the thief", || {
        let error = daemon.workers("web")[0]["last_probe"]["error"].as_str().unwrap().to_owned();
        error.contains("another program's")
    });
}

#[test]
fn where_a_program_listens_instead_is_said_within_seconds() {
    let elsewhere = common::ports::Port::take();
    for (bind, part) in [
        ("(\"::1\", int(sys.argv[1]))".to_owned(), "host = \"::1\"".to_owned()),
        (format!("(\"127.0.0.1\", {})", elsewhere.number), "$PORT".to_owned()),
    ] {
        let ports = Ports::take(1);
        let program = format!(
            "import socket, sys, time\naddress = {bind}\n\
             s = socket.socket(socket.AF_INET6 if ':' in address[0] else socket.AF_INET)\n\
             s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n\
             s.bind(address)\ns.listen(64)\ntime.sleep(1000)\n"
        );
        let Some(daemon) = python(&ports, &program, "") else { return };
        let line = daemon.wait(Mark::START, "worker not healthy yet", &[]);
        let error = line.get("error").unwrap();
        assert!(error.contains(&part) && error.contains("it listens on"), "{error}");
        assert!(line.number::<f64>("after") < 10.0, "{}", line.raw);
    }
}

#[test]
fn a_worker_that_ends_while_it_settles_ends_the_rollout() {
    let ports = Ports::take(2);
    let folder = tempfile::tempdir().unwrap();
    let release = folder.path().join("server.sh");
    fs::write(&release, format!("exec {} http\n", fixture())).unwrap();
    let keys = "command = [\"sh\", \"server.sh\"]\nsocket = \"inherit\"\nrollout.settle = \"2s\"";
    let daemon = Daemon::start_in(folder, &ports.service(keys));
    daemon.wait_healthy(Mark::START, 2);
    let before = daemon.slot_pids();
    // Accepts, and falls over soon after.
    let falls = "until [ -e fall ]; do sleep 0.01; done\nkill $!\nexit 3\n";
    fs::write(&release, format!("{} http &\n{falls}", fixture())).unwrap();
    let since = daemon.now();
    let output = thread::scope(|scope| {
        let restart = scope.spawn(|| daemon.lbd(&["restart", "web"]));
        daemon.wait(since, "worker healthy", &[]);
        fs::write(daemon.path("fall"), "").unwrap();
        restart.join().unwrap()
    });
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("exit status 3") && error.contains("nothing changed"), "{error}");
    assert_eq!(daemon.said(since, "worker healthy").len(), 1);
    assert_eq!(daemon.slot_pids(), before);
    assert_eq!(daemon.fewest_in_rotation(since, &before), 2);
}

#[test]
fn a_client_of_the_old_worker_does_not_keep_others_waiting() {
    let ports = Ports::take(1);
    let keys = format!(
        "{}\nhold-timeout = \"200ms\"\nrollout.settle = \"20ms\"\nstop.drain-timeout = \"30s\"",
        command(&["echo"])
    );
    let daemon = Daemon::healthy(&ports.service(&keys), 1);
    let mut old = echo(ports.address(), "first");
    let since = daemon.now();
    let mut restart = Program(
        Command::new(env!("CARGO_BIN_EXE_lbd"))
            .args(["restart", "web", "--config", "lb.toml"])
            .current_dir(daemon.folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    daemon.wait(since, "draining", &[]);
    // The old one has its port and its client still: the stand-in serves the others.
    let deadline = Instant::now() + Duration::from_secs(1);
    while Instant::now() < deadline {
        drop(echo(ports.address(), "others"));
    }
    old.write_all(b"still here").unwrap();
    old.read_exact(&mut [0; 10]).unwrap();
    assert!(restart.0.try_wait().unwrap().is_none());
    let worker = &daemon.workers("web")[0];
    assert_ne!(worker["port"], ports.worker(0), "{worker}");
    drop(old);
    assert_eq!(restart.0.wait().unwrap().code(), Some(0));
    let worker = &daemon.workers("web")[0];
    assert_eq!(worker["port"], ports.worker(0), "{worker}");
    drop(echo(ports.address(), "new"));
}

/// A connection over which that was said and sent back.
fn echo(address: SocketAddr, text: &str) -> TcpStream {
    let mut stream = connect(address);
    stream.write_all(text.as_bytes()).unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(back, text.as_bytes());
    stream
}

#[test]
fn a_program_that_ignores_its_port_is_refused_and_told_of_stop_first() {
    // It can't bind the port twice; or it can, and would pass for what it is to replace.
    for option in ["SO_REUSEADDR", "SO_REUSEPORT"] {
        let ports = Ports::take(1);
        let program = SLOW
            .replace("int(sys.argv[1])", &ports.worker(0).to_string())
            .replace("SO_REUSEADDR", option);
        let Some(daemon) = python(&ports, &program, "rollout.settle = \"50ms\"") else { return };
        fs::write(daemon.path("boot"), "0").unwrap();
        daemon.wait_healthy(Mark::START, 1);
        let before = daemon.slot_pids();
        let output = daemon.lbd(&["restart", "web"]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{option}: {error}");
        assert!(error.contains("rollout.order = \"stop-first\""), "{option}: {error}");
        assert!(
            error.contains("the old worker still serves, nothing changed"),
            "{option}: {error}"
        );
        assert_eq!(daemon.slot_pids(), before);
        // As it says.
        let config = fs::read_to_string(daemon.path("lb.toml")).unwrap();
        daemon.must_reload(&format!("{config}rollout.order = \"stop-first\"\n"));
        let output = daemon.lbd(&["restart", "web"]);
        assert_eq!(output.status.code(), Some(0), "{option}: {output:?}");
        assert_ne!(daemon.slot_pids(), before);
        assert_eq!(get(ports.address(), "/"), "ok");
    }
}

#[test]
fn a_slot_that_was_down_does_not_stop_a_rollout() {
    let ports = Ports::take(3);
    let taken = std::net::TcpListener::bind(("127.0.0.1", ports.worker(1))).unwrap();
    let config = |colour: &str| {
        let keys = format!("{}\nenv.COLOUR = \"{colour}\"", command(&["http"]));
        ports.service(&format!("{keys}\nrollout.settle = \"20ms\""))
    };
    let daemon = Daemon::start(&config("green"));
    daemon.wait_healthy(Mark::START, 2);
    let before = daemon.slot_pids();
    let since = daemon.now();
    let output = daemon.lbd(&["restart", "web"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let warning = String::from_utf8_lossy(&output.stderr);
    assert!(warning.contains("web: slot 1 was down before"), "{warning}");
    let line = daemon.wait(since, "workers replaced", &[]);
    assert!(line.get("skipped").unwrap().contains("slot 1"), "{}", line.raw);
    let after = daemon.slot_pids();
    assert!(after[0] != before[0] && after[2] != before[2] && after[1] == 0, "{after:?}");
    // And a reload is not rolled back by it.
    daemon.write_config(&config("blue"));
    assert_eq!(daemon.lbd(&["reload"]).status.code(), Some(0));
    let since = daemon.now();
    drop(taken);
    daemon.wait(since, "worker healthy", &[("slot", "1")]);
    for _ in 0..3 {
        assert!(get(ports.address(), "/env").contains("COLOUR=blue"));
    }
}

#[test]
fn a_worker_that_was_drained_is_back_when_it_was_restarted() {
    let ports = Ports::take(2);
    let keys = format!("{}\nsocket = \"inherit\"\nrollout.settle = \"20ms\"", command(&["http"]));
    let daemon = Daemon::healthy(&ports.service(&keys), 2);
    assert_eq!(daemon.lbd(&["drain", "web", "1"]).status.code(), Some(0));
    assert_eq!(daemon.workers("web")[1]["state"], "draining");
    // All of them: the drained one stays out.
    assert_eq!(daemon.lbd(&["restart", "web"]).status.code(), Some(0));
    assert_eq!(daemon.workers("web")[1]["state"], "draining");
    assert_eq!(daemon.lbd(&["restart", "web", "1"]).status.code(), Some(0));
    assert_eq!(daemon.workers("web")[1]["state"], "healthy");
}

#[test]
fn a_program_that_says_nothing_gets_a_hint() {
    let ports = Ports::take(1);
    let keys = "command = [\"sh\", \"-c\", \"sleep 1000 & exit 0\"]";
    let daemon = Daemon::start(&ports.service(keys));
    let line = daemon.wait(Mark::START, "worker exited", &[("status", "exit status 0")]);
    assert!(line.get("hint").unwrap().contains("background"), "{}", line.raw);
    if !needs::has(needs::APPS, "python3", "python3") {
        return;
    }
    let ports = Ports::take(1);
    let keys = "command = [\"python3\", \"-c\", \"import time; print(1); time.sleep(1000)\"]";
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lb.toml"), ports.service(keys)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lbd"));
    command.args(["--config", "lb.toml"]).env_remove("PYTHONUNBUFFERED");
    let daemon = Daemon::run(folder, command);
    let line = daemon.wait(Mark::START, "worker not healthy yet", &[]);
    assert!(line.get("hint").unwrap().contains("PYTHONUNBUFFERED"), "{}", line.raw);
}
