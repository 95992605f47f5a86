//! The built-in workers, from outside: the real binary, real sockets. Each test runs against the
//! async and against the threaded worker.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{fd::OwnedFd, unix::fs::symlink},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use crate::common::{Port, eventually, http::Client};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use tempfile::TempDir;

macro_rules! for_both {
    ($($test:ident),* $(,)?) => {
        mod asynchronous { $(#[test] fn $test() { super::$test(&[]); })* }
        mod threaded { $(#[test] fn $test() { super::$test(&["--threaded"]); })* }
    };
}

for_both!(
    whole_files_and_their_types,
    head_has_no_body,
    folders,
    ranges,
    conditional_requests,
    errors_are_signed_and_explained,
    nothing_outside_the_root,
    links_inside_the_root,
    special_files_are_not_served,
    one_connection_many_requests,
    http_1_0_keeps_alive_when_asked,
    malformed_requests,
    a_root_that_is_swapped,
    wrong_usage,
    port_from_the_environment,
    stop_finishes_a_download,
    stop_closes_idle_connections,
    stop_waits_for_a_first_request,
    stop_does_not_wait_for_ever_for_a_first_request,
    stop_serves_what_is_queued,
    second_signal_ends_at_once,
    inherited_socket_is_left_as_it_is,
    inherited_socket_that_somebody_else_empties,
);

/// What makes it the one or the other worker.
type Args = &'static [&'static str];

fn whole_files_and_their_types(mode: Args) {
    let www = Path::new(env!("CARGO_MANIFEST_DIR")).join("www");
    let worker = Worker::start(mode, &www);
    let mut client = worker.connect();
    for (name, kind) in [
        ("research_center.jpg", "image/jpeg"),
        ("pokijan.jpg", "image/jpeg"),
        ("page.html", "text/html; charset=utf-8"),
    ] {
        let answer = client.get(&format!("/{name}"));
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("content-type"), Some(kind));
        let file = fs::read(www.join(name)).unwrap();
        assert!(answer.body == file, "{name}: {} of {} bytes", answer.body.len(), file.len());
    }
}

fn head_has_no_body(mode: Args) {
    let root = root(&[("file.txt", "four")]);
    let worker = Worker::start(mode, root.path());
    let mut client = worker.connect();
    let head = client.head("/file.txt");
    assert_eq!((head.status, head.header("content-length")), (200, Some("4")));
    let missing = client.head("/missing");
    assert_eq!(missing.status, 404);
    // Had a body followed, this would not be an answer.
    assert_eq!(client.get("/file.txt").body, b"four");
}

fn folders(mode: Args) {
    let root = root(&[("index.html", "top"), ("sub/index.html", "below"), ("bare/file", "")]);
    let worker = Worker::start(mode, root.path());
    let mut client = worker.connect();
    assert_eq!(client.get("/").body, b"top");
    assert_eq!(client.get("/?query").body, b"top");
    assert_eq!(client.get("/sub/").body, b"below");
    for (path, location) in [("/sub", "/sub/"), ("/sub?q=1", "/sub/?q=1"), ("//sub", "/sub/")] {
        let answer = client.get(path);
        assert_eq!((answer.status, answer.header("location")), (307, Some(location)), "{path}");
    }
    assert_eq!(client.get("/bare/").status, 404);
    assert_eq!(client.get("/bare/file/").status, 404);
}

fn ranges(mode: Args) {
    let root = root(&[("digits", "0123456789")]);
    let worker = Worker::start(mode, root.path());
    let mut client = worker.connect();
    for (range, part, content_range) in [
        ("0-0", "0", "bytes 0-0/10"),
        ("2-4", "234", "bytes 2-4/10"),
        ("7-", "789", "bytes 7-9/10"),
        ("-2", "89", "bytes 8-9/10"),
    ] {
        let answer = client.get_with("/digits", &format!("Range: bytes={range}\r\n"));
        assert_eq!(answer.status, 206, "{range}");
        assert_eq!(answer.body, part.as_bytes(), "{range}");
        assert_eq!(answer.header("content-range"), Some(content_range));
    }
    let beyond = client.get_with("/digits", "Range: bytes=10-\r\n");
    assert_eq!((beyond.status, beyond.header("content-range")), (416, Some("bytes */10")));
    // Several ranges and other units are not supported, which HTTP has answered with the whole.
    for ignored in ["bytes=0-1,3-4", "lines=1-2"] {
        let answer = client.get_with("/digits", &format!("Range: {ignored}\r\n"));
        assert_eq!((answer.status, answer.body.len()), (200, 10), "{ignored}");
    }
}

fn conditional_requests(mode: Args) {
    let root = root(&[("file", "0123456789")]);
    let worker = Worker::start(mode, root.path());
    let mut client = worker.connect();
    let whole = client.get("/file");
    let tag = whole.header("etag").unwrap();
    let date = whole.header("last-modified").unwrap();
    for current in [format!("If-None-Match: {tag}"), format!("If-Modified-Since: {date}")] {
        let answer = client.get_with("/file", &format!("{current}\r\n"));
        assert_eq!((answer.status, answer.body.len()), (304, 0), "{current}");
    }
    let old = "If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT\r\n";
    assert_eq!(client.get_with("/file", old).status, 200);
    assert_eq!(client.get_with("/file", "If-Match: \"other\"\r\n").status, 412);
    for (condition, status, length) in [(tag, 206, 2), (date, 206, 2), ("\"other\"", 200, 10)] {
        let headers = format!("Range: bytes=0-1\r\nIf-Range: {condition}\r\n");
        let answer = client.get_with("/file", &headers);
        assert_eq!((answer.status, answer.body.len()), (status, length), "{condition}");
    }
}

fn errors_are_signed_and_explained(mode: Args) {
    let root = root(&[]);
    let worker = Worker::with(mode, root.path(), |command| {
        command.env("LBD_SERVICE", "web");
    });
    let signature = format!("web/{}", worker.address.port());
    let missing = worker.connect().get("/missing");
    let mut client = worker.connect();
    client.send("DELETE / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\nbody");
    let forbidden = client.answer();
    assert_eq!(forbidden.header("allow"), Some("GET,HEAD"));
    for (answer, status, text) in
        [(missing, 404, "404 Not Found\n"), (forbidden, 405, "405 Method Not Allowed\n")]
    {
        assert_eq!((answer.status, answer.body.as_slice()), (status, text.as_bytes()));
        assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
        assert_eq!(answer.header("server"), Some(concat!("lbd/", env!("CARGO_PKG_VERSION"))));
        assert_eq!(answer.header("x-served-by"), Some(signature.as_str()));
    }
}

fn nothing_outside_the_root(mode: Args) {
    let outer = root(&[("secret", "secret"), ("www/sub/file", "")]);
    let root = outer.path().join("www");
    symlink("../secret", root.join("out")).unwrap();
    symlink(outer.path().join("secret"), root.join("absolute")).unwrap();
    symlink("..", root.join("up")).unwrap();
    symlink("/proc/self/root", root.join("magic")).unwrap();
    let worker = Worker::start(mode, &root);
    let long = format!("/{}", "x".repeat(300));
    let secret = outer.path().join("secret");
    let absolute = format!("/{}", secret.display());
    for path in [
        "/../secret",
        "/sub/../../secret",
        "/%2e%2e/secret",
        "/%2E%2e/secret",
        "/.%2e/secret",
        "/..%2fsecret",
        "/%2e%2e%2fsecret",
        "/sub%2Ffile",
        "/..%5csecret",
        "/..\\secret",
        "/%00",
        "/sub/file%00",
        "/%ff",
        "/out",
        "/absolute",
        "/up/secret",
        "/magic/etc/passwd",
        &absolute,
        &long,
    ] {
        for method in ["GET", "HEAD"] {
            let mut client = worker.connect();
            client.send(format!("{method} {path} HTTP/1.1\r\nHost: test\r\n\r\n"));
            let status = client.head_of_answer().status;
            assert!(matches!(status, 400 | 404), "{method} {path}: {status}");
        }
    }
}

fn links_inside_the_root(mode: Args) {
    let root = root(&[("sub/file", "found")]);
    symlink("sub/file", root.path().join("relative")).unwrap();
    symlink(root.path().join("sub/file"), root.path().join("absolute")).unwrap();
    symlink("sub", root.path().join("folder")).unwrap();
    let worker = Worker::start(mode, root.path());
    let mut client = worker.connect();
    for path in ["/relative", "/absolute", "/folder/file", "/sub/../relative"] {
        let expected = if path.contains("..") { 404 } else { 200 };
        assert_eq!(client.get(path).status, expected, "{path}");
    }
}

fn special_files_are_not_served(mode: Args) {
    let root = root(&[]);
    mkfifo(&root.path().join("fifo"), Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(root.path().join("socket")).unwrap();
    let worker = Worker::start(mode, root.path());
    let mut client = worker.connect();
    for path in ["/fifo", "/socket"] {
        assert_eq!(client.get(path).status, 404, "{path}");
        assert_eq!(client.head(path).status, 404, "{path}");
    }
}

fn one_connection_many_requests(mode: Args) {
    let root = root(&[("a", "first"), ("b", "second")]);
    let worker = Worker::start(mode, root.path());
    let mut client = worker.connect();
    for _ in 0..100 {
        assert_eq!(client.get("/a").body, b"first");
    }
    // Pipelined, and cut in the middle of a line.
    client.send("GET /a HTTP/1.1\r\nHost: test\r\n\r\nGET /b HT");
    assert_eq!(client.answer().body, b"first");
    client.send("TP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    assert_eq!(client.answer().body, b"second");
    assert_eq!(client.drain(), 0);
}

fn http_1_0_keeps_alive_when_asked(mode: Args) {
    let root = root(&[("a", "first")]);
    let worker = Worker::start(mode, root.path());
    let mut client = worker.connect();
    client.send("GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert_eq!(client.answer().header("connection"), Some("keep-alive"));
    client.send("GET /a HTTP/1.0\r\n\r\n");
    assert_eq!(client.head_of_answer().status, 200);
    assert_eq!(client.drain(), 5);
}

fn malformed_requests(mode: Args) {
    let root = root(&[]);
    let worker = Worker::start(mode, root.path());
    let huge = format!("GET / HTTP/1.1\r\nHost: test\r\nX: {}\r\n\r\n", "x".repeat(40_000));
    for (request, status) in [
        ("NOT HTTP\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        ("GET /\0 HTTP/1.1\r\n\r\n", 400),
        (huge.as_str(), 431),
    ] {
        let mut client = worker.connect();
        client.send(request);
        let shown = &request[..request.len().min(40)];
        assert_eq!(client.head_of_answer().status, status, "{shown:?}");
    }
    assert_eq!(worker.connect().get("/").status, 404);
}

/// A deployment that swaps the link that is the root shows without a restart.
fn a_root_that_is_swapped(mode: Args) {
    let outer = root(&[("v1/file", "old"), ("v2/file", "new")]);
    let link = outer.path().join("www");
    symlink("v1", &link).unwrap();
    let worker = Worker::start(mode, &link);
    let mut client = worker.connect();
    assert_eq!(client.get("/file").body, b"old");
    symlink("v2", outer.path().join("next")).unwrap();
    fs::rename(outer.path().join("next"), &link).unwrap();
    eventually("the new folder is served", || client.get("/file").body == b"new");
}

fn wrong_usage(mode: Args) {
    let root = root(&[("file", "")]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let file = root.path().join("file");
    for (root, listen, port, said) in [
        (root.path(), None, None, "LISTEN_FDS"),
        (root.path(), None, Some("none"), "\"none\""),
        (root.path(), None, Some("0"), "1 to 65535"),
        (root.path(), Some(taken.as_str()), None, taken.as_str()),
        (Path::new("/nonexistent"), Some("127.0.0.1:0"), None, "/nonexistent"),
        (&*file, Some("127.0.0.1:0"), None, "expected a folder"),
    ] {
        let mut command = command(mode, root);
        command.args(listen.map(|address| ["--listen", address]).into_iter().flatten());
        command.envs(port.map(|port| ("PORT", port)));
        let output = command.stderr(Stdio::piped()).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(said) && error.trim_end().lines().count() == 1, "{error}");
    }
}

fn port_from_the_environment(mode: Args) {
    let root = root(&[("file", "by PORT")]);
    let port = Port::take();
    let mut command = command(mode, root.path());
    // Meant for another process, and so no socket of ours.
    command.env("LISTEN_FDS", "1").env("LISTEN_PID", "1");
    command.env("PORT", port.number.to_string());
    let worker = Worker::spawn(command, port.address(), Some(port));
    assert_eq!(worker.connect().get("/file").body, b"by PORT");
}

fn stop_finishes_a_download(mode: Args) {
    let root = root(&[]);
    let worker = Worker::start(mode, root.path());
    let mut client = download(&worker, root.path());
    worker.signal(Signal::SIGTERM);
    worker.wait_until_deaf();
    client.skip(DOWNLOAD - 1024);
    assert_eq!(client.drain(), 0);
    assert!(worker.end().success());
}

fn stop_closes_idle_connections(mode: Args) {
    let root = root(&[("file", "")]);
    let worker = Worker::start(mode, root.path());
    let mut idle = [(); 3].map(|()| worker.connect());
    for client in &mut idle {
        assert_eq!(client.get("/file").status, 200);
    }
    let asked = Instant::now();
    worker.signal(Signal::SIGINT);
    for client in &mut idle {
        assert_eq!(client.drain(), 0);
    }
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    assert!(worker.end().success());
}

fn stop_waits_for_a_first_request(mode: Args) {
    let root = root(&[("file", "just in time")]);
    let worker = Worker::start(mode, root.path());
    let mut client = worker.connect();
    worker.signal(Signal::SIGTERM);
    worker.wait_until_deaf();
    let answer = client.get("/file");
    assert_eq!(answer.body, b"just in time");
    assert_eq!(answer.header("connection"), Some("close"));
    assert_eq!(client.drain(), 0);
    assert!(worker.end().success());
}

fn stop_does_not_wait_for_ever_for_a_first_request(mode: Args) {
    let root = root(&[]);
    let worker = Worker::start(mode, root.path());
    let mut silent = worker.connect();
    let mut halfway = worker.connect();
    halfway.send("GET / HTTP");
    worker.signal(Signal::SIGTERM);
    assert_eq!(silent.drain(), 0);
    assert!(worker.end().success());
}

/// What waits in the accept queue of a worker when it is told to stop is answered.
fn stop_serves_what_is_queued(mode: Args) {
    let root = root(&[("file", "queued")]);
    let worker = Worker::start(mode, root.path());
    worker.signal(Signal::SIGSTOP);
    let mut clients: Vec<_> = (0..50).map(|_| worker.connect()).collect();
    let (speaking, silent) = clients.split_at_mut(25);
    for client in &mut *speaking {
        client.send("GET /file HTTP/1.1\r\nHost: test\r\n\r\n");
    }
    worker.signal(Signal::SIGTERM);
    worker.signal(Signal::SIGCONT);
    for client in speaking {
        assert_eq!(client.answer().body, b"queued");
    }
    for client in silent {
        assert_eq!(client.get("/file").body, b"queued");
    }
    assert!(worker.end().success());
}

fn second_signal_ends_at_once(mode: Args) {
    let root = root(&[]);
    let worker = Worker::start(mode, root.path());
    let _client = download(&worker, root.path());
    worker.signal(Signal::SIGTERM);
    worker.wait_until_deaf();
    worker.signal(Signal::SIGTERM);
    assert_eq!(worker.end().code(), Some(1));
}

fn inherited_socket_is_left_as_it_is(mode: Args) {
    let root = root(&[("file", "inherited")]);
    let (worker, listener) = Worker::inheriting(mode, root.path());
    for _ in 0..20 {
        assert_eq!(worker.connect().get("/file").body, b"inherited");
    }
    assert!(!is_nonblocking(&listener));
    let signed = worker.connect().get("/file");
    let port = listener.local_addr().unwrap().port();
    assert_eq!(signed.header("x-served-by"), Some(format!("lbd/{port}").as_str()));
    worker.signal(Signal::SIGTERM);
    assert!(worker.end().success());
    assert!(!is_nonblocking(&listener));
    // Our copy is as good as before: what comes now waits for the next worker.
    let mut client = Client::connect(listener.local_addr().unwrap());
    client.send("GET /file HTTP/1.1\r\n\r\n");
    assert!(listener.accept().is_ok());
}

/// Another holder of the socket takes connections the worker was told of: it neither hangs nor
/// misses the ones that are left for it.
fn inherited_socket_that_somebody_else_empties(mode: Args) {
    let root = root(&[("file", "inherited")]);
    let (worker, listener) = Worker::inheriting(mode, root.path());
    let mut kept = worker.connect();
    assert_eq!(kept.get("/file").status, 200);
    for _ in 0..20 {
        worker.signal(Signal::SIGSTOP);
        let _stolen = worker.connect();
        listener.accept().unwrap();
        worker.signal(Signal::SIGCONT);
        assert_eq!(kept.get("/file").status, 200);
    }
    assert_eq!(worker.connect().get("/file").status, 200);
    worker.signal(Signal::SIGTERM);
    assert!(worker.end().success());
}

/// A worker process that is killed if the test ends before it does.
struct Worker {
    child: Child,
    address: SocketAddr,
    /// Kept from others, where it is not that of a socket that is there.
    _port: Option<Port>,
}

impl Worker {
    fn start(mode: Args, root: &Path) -> Self {
        Self::with(mode, root, |_| {})
    }

    fn with(mode: Args, root: &Path, change: impl FnOnce(&mut Command)) -> Self {
        let port = Port::take();
        let mut command = command(mode, root);
        command.arg("--listen").arg(port.address().to_string());
        change(&mut command);
        Self::spawn(command, port.address(), Some(port))
    }

    /// With a blocking socket as descriptor 3, and our copy of it.
    fn inheriting(mode: Args, root: &Path) -> (Self, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(!is_nonblocking(&listener));
        let worker = command(mode, root);
        // The shell has the pid that the worker will have.
        let mut command = Command::new("sh");
        command
            .args(["-c", r#"LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@" 3<&0 0</dev/null"#])
            .arg(worker.get_program())
            .args(worker.get_args())
            .env_remove("PORT")
            .env_remove("LBD_SERVICE")
            .stdin(OwnedFd::from(listener.try_clone().unwrap()));
        (Self::spawn(command, listener.local_addr().unwrap(), None), listener)
    }

    fn spawn(mut command: Command, address: SocketAddr, port: Option<Port>) -> Self {
        let worker = Self { child: command.spawn().unwrap(), address, _port: port };
        eventually("the worker listens", || TcpStream::connect(address).is_ok());
        // An inherited socket was there before the worker: an answer tells that it is up.
        worker.connect().get("/");
        worker
    }

    fn connect(&self) -> Client {
        Client::connect(self.address)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Until nothing listens any more.
    fn wait_until_deaf(&self) {
        eventually("the listener is gone", || TcpStream::connect(self.address).is_err());
    }

    fn end(mut self) -> ExitStatus {
        let mut status = None;
        eventually("the worker has ended", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Fails where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const DOWNLOAD: u64 = 64 << 20;

/// A download that has begun and can't end before the client reads on: it is larger than what the
/// kernel keeps for both sides.
fn download(worker: &Worker, root: &Path) -> Client {
    fs::File::create(root.join("large")).unwrap().set_len(DOWNLOAD).unwrap();
    let mut client = worker.connect();
    client.send("GET /large HTTP/1.1\r\nHost: test\r\n\r\n");
    let head = client.head_of_answer();
    assert_eq!(head.header("content-length"), Some(DOWNLOAD.to_string().as_str()));
    client.skip(1024);
    client
}

fn command(mode: Args, root: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lbd"));
    command.arg("worker").args(mode).arg("--root").arg(root);
    for name in ["PORT", "LBD_SERVICE", "LISTEN_FDS", "LISTEN_PID"] {
        command.env_remove(name);
    }
    command
}

fn root(files: &[(&str, &str)]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    root
}

fn is_nonblocking(listener: &TcpListener) -> bool {
    let flags = fcntl(listener, FcntlArg::F_GETFL).unwrap();
    OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK)
}
