//! The comparison: both contenders, servers that misbehave, and the same load by `ab`.

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use crate::common::{Daemon, Ports, eventually, kill_hard, lbd, www};
use nix::sys::signal::Signal;
use socket2::SockRef;
use tempfile::TempDir;

const COLUMNS: &str = "No,Concurrency,Time taken (s),Complete requests,Failed requests,Total \
                       transferred (bytes),Requests per second,Time per request (ms),Transfer rate \
                       (KB/s),p50 (ms),p95 (ms),p99 (ms),max (ms)";

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A folder with this as lb.toml.
fn folder(config: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lb.toml"), config).unwrap();
    folder
}

fn bench(folder: &Path, arguments: &[&str]) -> Output {
    lbd(folder, &[&["bench"], arguments].concat())
}

/// The records of `rows.csv`, which the run has to have written, without the header.
fn rows(folder: &Path) -> Vec<Vec<String>> {
    let csv = fs::read_to_string(folder.join("rows.csv")).unwrap();
    let mut lines = csv.lines();
    assert_eq!(lines.next(), Some(format!("Contender,{COLUMNS}").as_str()));
    lines.map(|line| line.split(',').map(str::to_owned).collect()).collect()
}

fn number(row: &[String], column: &str) -> f64 {
    let index = COLUMNS.split(',').position(|title| title == column).unwrap() + 1;
    row[index].parse().unwrap_or_else(|_| panic!("{column} of {row:?}"))
}

/// A server of the test's own: what it does with each request, by the number of that.
struct Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Server {
    fn start(answer: impl Fn(usize, &mut TcpStream) -> Next + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let (answer, requests) = (Arc::new(answer), Arc::new(AtomicUsize::new(0)));
        thread::spawn(move || {
            for stream in listener.incoming() {
                count.fetch_add(1, Ordering::Relaxed);
                let (answer, requests) = (Arc::clone(&answer), Arc::clone(&requests));
                thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    while read_request(&mut reader) {
                        let number = requests.fetch_add(1, Ordering::Relaxed);
                        match answer(number, &mut stream) {
                            Next::Go => {}
                            Next::Close => return,
                            Next::Reset => {
                                let now = Some(Duration::ZERO);
                                return SockRef::from(&stream).set_linger(now).unwrap();
                            }
                        }
                    }
                });
            }
        });
        Self { address, connections }
    }

    fn url(&self) -> String {
        format!("http://{}/", self.address)
    }
}

/// What a server does after an answer.
enum Next {
    Go,
    Close,
    Reset,
}

fn read_request(reader: &mut impl BufRead) -> bool {
    let mut line = String::new();
    loop {
        line.clear();
        match reader.read_line(&mut line) {
            Ok(0) | Err(_) => return false,
            Ok(_) if line == "\r\n" => return true,
            Ok(_) => {}
        }
    }
}

/// Whoever is gone has not got it.
fn say(stream: &mut TcpStream, bytes: &str) -> Next {
    match stream.write_all(bytes.as_bytes()) {
        Ok(()) => Next::Go,
        Err(_) => Next::Close,
    }
}

const WHOLE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole";

/// Elements closed in the order they were opened, every attribute quoted, no stray `&`.
fn assert_well_formed(svg: &str) {
    let (mut open, mut rest) = (Vec::new(), svg);
    while let Some((text, after)) = rest.split_once('<') {
        assert!(!text.contains('>') && text.matches('&').count() == text.matches(';').count());
        let (tag, after) = after.split_once('>').unwrap();
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        match (tag.strip_prefix('/'), tag.ends_with('/')) {
            (Some(name), _) => assert_eq!(open.pop(), Some(name)),
            (None, true) => {}
            (None, false) => open.push(tag.split(' ').next().unwrap()),
        }
        rest = after;
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
}

#[test]
fn both_contenders_and_their_ratio() {
    // Its own ports are taken, as by a daemon that runs with this file.
    let taken = [TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("[::1]:0").unwrap()];
    let [listen, worker] = taken.each_ref().map(|taken| taken.local_addr().unwrap());
    let folder = folder(&format!(
        "[service.web]\nlisten = \"{listen}\"\nhost = \"::1\"\nports = [{}]\nroot = {:?}",
        worker.port(),
        www()
    ));
    let folder = folder.path();
    let files = ["--markdown", "t.md", "--csv", "rows.csv", "--plot", "p.svg"];
    let output =
        bench(folder, &[&["--requests", "40", "--concurrency", "1,4"], &files[..]].concat());
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));

    let rows = rows(folder);
    let (ours, baseline) = ("1 async worker behind the balancer", "thread-per-connection server");
    let seen: Vec<_> = rows.iter().map(|row| [&row[0], &row[1], &row[2]]).collect();
    assert_eq!(
        seen,
        [[ours, "1", "1"], [ours, "2", "4"], [baseline, "1", "1"], [baseline, "2", "4"]]
    );
    let page = fs::metadata(www().join("page.html")).unwrap().len() as f64;
    for row in &rows {
        assert_eq!([&row[4], &row[5]], ["40", "0"], "{row:?}");
        let bytes = number(row, "Total transferred (bytes)") / 40.0;
        assert!((page + 100.0..page + 400.0).contains(&bytes), "a page and its head: {row:?}");
        let percentiles = ["p50 (ms)", "p95 (ms)", "p99 (ms)", "max (ms)"].map(|c| number(row, c));
        assert!(percentiles[0] > 0.0 && percentiles.is_sorted(), "{row:?}");
        let (rate, time) = (number(row, "Requests per second"), number(row, "Time taken (s)"));
        // As exact as a time in whole milliseconds tells.
        let exact = 40.0 / (time + 0.0006)..40.0 / (time - 0.0006);
        assert!(exact.contains(&rate), "{row:?}");
    }

    let table = text(&output.stdout);
    let sections: Vec<_> = table.split("\n\n").collect();
    assert_eq!([sections[0], sections[2]], [ours, baseline], "{table}");
    assert_eq!(sections[4], format!("Ratio: {ours} / {baseline}"), "{table}");
    for section in [sections[1], sections[3], sections[5]] {
        let rows: Vec<Vec<_>> =
            section.lines().skip(1).map(|line| line.split_whitespace().take(2).collect()).collect();
        assert_eq!(rows, [["1", "1"], ["2", "4"]], "{table}");
    }
    let markdown = fs::read_to_string(folder.join("t.md")).unwrap();
    assert!(markdown.starts_with(&format!("### {ours}\n\n| No | Concurrency |")), "{markdown}");
    let svg = fs::read_to_string(folder.join("p.svg")).unwrap();
    assert_well_formed(&svg);
    assert_eq!(svg.matches("<circle ").count(), 8, "two charts, two contenders, two rows: {svg}");
}

#[test]
fn on_the_ports_of_the_file_if_told_so() {
    let ports = Ports::take(2);
    let folder = folder(&ports.service(&format!("root = {:?}", www())));
    let arguments = ["--configured-ports", "--requests", "4", "--concurrency", "2"];
    let output = bench(folder.path(), &arguments);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));

    let _taken = TcpListener::bind(ports.address()).unwrap();
    let output = bench(folder.path(), &arguments);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()));
    let error = text(&output.stderr);
    assert!(
        error.starts_with("lbd bench: the balancer ended by itself, exit status: 1: "),
        "{error}"
    );
    assert!(error.contains(&ports.address().to_string()), "{error}");
}

#[test]
fn what_fails_is_told_by_its_cause() {
    let server = Server::start(|number, stream| match number {
        0 | 1 => say(stream, WHOLE),
        2 => say(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\nwhole"),
        3 | 4 => {
            say(stream, "HTTP/1.1 200 OK\r\nContent-Length: 75007\r\n\r\nonly this");
            Next::Close
        }
        5 => say(stream, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nlonger"),
        6 => Next::Close,
        7 => Next::Reset,
        8 => say(stream, "220 smtp.example.org ready\r\n\r\n"),
        // Until the client has enough.
        9 => Next::Go,
        _ => say(stream, WHOLE),
    });
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--requests", "12", "--concurrency", "1", "--timeout", "500ms"];
    let url = server.url();
    let output =
        bench(folder.path(), &[&["--url", &url, "--csv", "rows.csv"], &arguments[..]].concat());
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    let rows = rows(folder.path());
    assert_eq!(rows.len(), 1);
    assert_eq!([&rows[0][0], &rows[0][4], &rows[0][5]], [&url, "4", "8"]);
    let table = text(&output.stdout);
    let causes = "\n\nFailed at concurrency 1: 2 × short body 9 of 75007, 1 × connection reset, \
                  1 × connection closed without an answer, 1 × status 404 Not Found, 1 × body of 6 \
                  bytes instead of 5, 2 × other causes\n";
    assert!(table.ends_with(causes), "{table}");
    assert!(!table.contains("Ratio"), "{table}");
}

#[test]
fn keep_alive_is_a_connection_a_client() {
    for (extra, connections) in [(&["--keep-alive"][..], 1 + 2), (&[], 1 + 20)] {
        let server = Server::start(|_, stream| say(stream, WHOLE));
        let url = server.url();
        let arguments = ["--url", &url, "--requests", "20", "--concurrency", "2"];
        let output = bench(Path::new("/"), &[&arguments, extra].concat());
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
        assert_eq!(server.connections.load(Ordering::Relaxed), connections);
    }
}

#[test]
fn a_stall_is_in_every_request_that_it_delays() {
    // The first request after the reference one.
    let server = Server::start(|number, stream| {
        if number == 1 {
            thread::sleep(Duration::from_millis(300));
        }
        say(stream, WHOLE)
    });
    let folder = tempfile::tempdir().unwrap();
    let (url, load) = (server.url(), ["--requests", "20", "--concurrency", "1", "--rate", "100"]);
    let output = bench(folder.path(), &[&["--url", &url, "--csv", "rows.csv"], &load[..]].concat());
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    let rows = rows(folder.path());
    assert_eq!(rows[0][4], "20");
    // The n-th was due n × 10 ms after the first one, and none was answered within 300 ms.
    for (column, least) in [("max (ms)", 300.0), ("p50 (ms)", 200.0), ("p95 (ms)", 280.0)] {
        assert!(number(&rows[0], column) >= least, "{column}: {rows:?}");
    }
    // At a rate that it can do, the schedule is what takes the time.
    let output = bench(folder.path(), &[&["--url", &url, "--csv", "rows.csv"], &load[..]].concat());
    assert_eq!(output.status.code(), Some(0));
    assert!(number(&self::rows(folder.path())[0], "Time taken (s)") >= 0.19);
}

#[test]
fn a_row_ends_when_its_time_is_up() {
    let server = Server::start(|number, stream| match number {
        0..=4 => say(stream, WHOLE),
        _ => Next::Go,
    });
    let url = server.url();
    let arguments = ["--requests", "1000", "--concurrency", "3", "--time-limit", "500ms"];
    let output = bench(Path::new("/"), &[&["--url", &url], &arguments[..]].concat());
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    let table = text(&output.stdout);
    assert!(table.ends_with("Failed at concurrency 3: 996 × time limit reached\n"), "{table}");
}

#[test]
fn wrong_usage_is_2_and_no_table() {
    let url = "http://127.0.0.1:1/";
    for (arguments, said) in [
        (&["--concurrency", "0"][..], "0 is not in 1..=10000"),
        (&["--concurrency", "1,,5"], "--concurrency"),
        (&["--concurrency", "many"], "--concurrency"),
        (&["--requests", "0"], "0 is not in 1..=10000000"),
        (
            &["--requests", "9", "--concurrency", "1,10"],
            "--requests 9 is less than --concurrency 10",
        ),
        (&["--rate", "0"], "from 0.001 to 1000000"),
        (&["--rate", "NaN"], "from 0.001 to 1000000"),
        (&["--timeout", "0s"], "expected a time"),
        (&["--time-limit", "100000000000y"], "of a day at most"),
        (&["--path", "page.html"], "begins with /"),
        (&["--url", "https://127.0.0.1/"], "over plain http"),
        (&["--url", "127.0.0.1:80"], "expected http://HOST:PORT/PATH"),
        (&["--url", "/page.html"], "expected http://HOST:PORT/PATH"),
        (&["--url", url, "--path", "/"], "cannot be used with"),
        (&["--url", url, "--config", "lb.toml"], "cannot be used with"),
    ] {
        let output = bench(Path::new("/"), arguments);
        let error = text(&output.stderr);
        assert_eq!((output.status.code(), &*output.stdout), (Some(2), &b""[..]), "{error}");
        assert!(error.contains(said), "{arguments:?}: {error}");
    }
}

#[test]
fn a_target_that_is_none_is_told_and_no_table() {
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let missing = Server::start(|_, stream| {
        say(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone")
    });
    let silent = Server::start(|_, _| Next::Go);
    let short = Server::start(|_, stream| {
        say(stream, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort");
        Next::Close
    });
    let dies = Server::start(|number, stream| match number {
        0 => say(stream, WHOLE),
        _ => Next::Reset,
    });
    for (url, said) in [
        (format!("http://{gone}/"), "connection refused; expected"),
        (missing.url(), "status 404 Not Found; expected"),
        (silent.url(), "timeout; expected"),
        (short.url(), "short body 5 of 9; expected"),
        (dies.url(), "no request was complete at concurrency 2: 10 × connection reset"),
    ] {
        let arguments = ["--requests", "10", "--concurrency", "2", "--timeout", "300ms"];
        let output = bench(Path::new("/"), &[&["--url", &url], &arguments[..]].concat());
        let error = text(&output.stderr);
        assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{error}");
        assert!(error.starts_with(&format!("lbd bench: {url}: {said}")), "{error}");
    }
}

#[test]
fn contenders_that_cannot_be_are_told_and_no_table() {
    let root = format!("root = {:?}", www());
    let web = format!("[service.web]\nlisten = \"127.0.0.1:1\"\nworkers = 1\n{root}\n");
    let unix = format!("[service.web]\nlisten = \"unix:web.sock\"\n{root}\n");
    let command = "[service.web]\nlisten = \"127.0.0.1:1\"\ncommand = [\"true\"]\n";
    for (config, arguments, status, said) in [
        (&*web, &["--path", "/none.html"][..], 1, "/none.html: status 404 Not Found; expected"),
        (
            &web,
            &["--csv", "no/such/folder.csv"],
            1,
            "cannot write no/such/folder.csv: No such file",
        ),
        (&web, &["--plot", "."], 1, "cannot write .: is a directory"),
        (&web, &["--config", "none.toml"], 78, "none.toml: no such file"),
        (command, &[], 78, "lb.toml: no service with `root`"),
        (
            &unix,
            &["--configured-ports"],
            78,
            "lb.toml: the first service with `root` listens on no",
        ),
        ("[service.web]\n", &[], 78, "lb.toml:1: "),
    ] {
        let folder = folder(config);
        let output = bench(folder.path(), arguments);
        let error = text(&output.stderr);
        assert_eq!((output.status.code(), &*output.stdout), (Some(status), &b""[..]), "{error}");
        assert!(error.contains(said), "{error}");
    }
}

/// A comparison in the midst of a row that goes on for long.
fn long() -> Daemon {
    let folder = folder(&format!(
        "[service.web]\nlisten = \"127.0.0.1:1\"\nworkers = 1\nroot = {:?}",
        www()
    ));
    let mut command = Command::new(env!("CARGO_BIN_EXE_lbd"));
    command.args(["bench", "--rate", "20", "--requests", "2000"]);
    // So that what one that is killed leaves there is cleared away.
    command.env("TMPDIR", folder.path());
    let bench = Daemon::run(folder, command);
    // The balancer, as any daemon, tells how many connections it had: the reference request's, and
    // then those of the first row.
    eventually("load", || {
        let Some(balancer) = process(&bench, "--config") else { return false };
        let words = cmdline(balancer);
        let file = words.split('\0').find(|word| word.ends_with("/lb.toml")).unwrap();
        let output = lbd(Path::new("/"), &["status", "--json", "--config", file]);
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let total = &status["services"][0]["workers"][0]["connections"]["total"];
        total.as_u64().is_some_and(|total| total > 2)
    });
    // With itself, what the balancer's guards are forked from, a guard, and a worker.
    assert_eq!(bench.processes().len(), 6);
    bench
}

/// Which of its processes has this word in its command line.
fn process(bench: &Daemon, word: &str) -> Option<i32> {
    bench.processes().into_iter().find(|pid| cmdline(*pid).split('\0').any(|w| w == word))
}

fn cmdline(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

#[test]
fn nothing_is_left_running_when_it_is_interrupted() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut bench = long();
        bench.signal(signal);
        assert_eq!(bench.wait_exit().code(), Some(1));
        bench.assert_nothing_runs();
        assert_eq!(bench.log.text(), "lbd bench: interrupted\n");
    }
}

#[test]
fn nor_when_it_is_killed() {
    let bench = long();
    kill_hard(bench.pid());
    eventually("the end of the contenders", || bench.processes().iter().all(|p| *p == bench.pid()));
}

#[test]
fn a_contender_that_ends_ends_the_comparison() {
    for (word, name) in [("--threaded", "threaded server"), ("--config", "balancer")] {
        let mut bench = long();
        kill_hard(process(&bench, word).unwrap());
        assert_eq!(bench.wait_exit().code(), Some(1));
        // A balancer that is killed leaves its worker to the guard, which takes a moment.
        eventually("the end of all", || bench.processes().is_empty());
        let said = bench.log.text();
        let expected = format!("lbd bench: the {name} ended by itself, signal: 9 (SIGKILL): ");
        assert!(said.starts_with(&expected) && said.lines().count() == 1, "{said}");
    }
}

/// The same rows by the tool that most people know, against the running daemon.
#[test]
fn ab_finds_every_request_complete() {
    let ports = Ports::take(4);
    let _daemon = Daemon::healthy(&ports.service(&format!("root = {:?}", www())), 4);
    let url = format!("http://{}/page.html", ports.address());
    let page = fs::metadata(www().join("page.html")).unwrap().len();
    for concurrency in ["1", "5", "10", "20", "50", "100"] {
        let arguments = ["-q", "-s", "20", "-n", "1000", "-c", concurrency, &url];
        let output = match Command::new("ab").args(arguments).output() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Not by a macro, whose output the test's harness would keep.
                let note = "ab is not installed (apache2-utils): its rows are not measured";
                return writeln!(io::stderr(), "{note}").unwrap();
            }
            output => output.unwrap(),
        };
        let report = text(&output.stdout);
        assert!(output.status.success(), "{report}{}", text(&output.stderr));
        let value = |name: &str| {
            let line = report.lines().find_map(|line| line.strip_prefix(name));
            line.map(|rest| rest.trim_start_matches(':').trim().to_owned())
        };
        let is =
            |name, expected: &str| assert_eq!(value(name).as_deref(), Some(expected), "{report}");
        is("Complete requests", "1000");
        is("Failed requests", "0");
        is("Document Length", &format!("{page} bytes"));
        assert_eq!(value("Non-2xx responses"), None, "{report}");
    }
}
