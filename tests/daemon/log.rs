//! What lbd writes, where, and what happens when it can't.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    net::TcpStream,
    os::unix::fs::MetadataExt,
    process::Command,
};

use crate::common::{
    Daemon, Line, Mark, Ports,
    client::{KeepAlive, get, turns},
    command, eventually, fixture,
};
use nix::sys::signal::Signal::{SIGTERM, SIGUSR1};

/// The lines of a log file so far.
fn lines(path: &std::path::Path) -> Vec<Line> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_inclusive('\n')
        .filter(|l| l.ends_with('\n'))
        .map(|l| Line::parse(l.trim_end()))
        .collect()
}

#[test]
fn the_life_of_a_daemon_in_its_messages() {
    let ports = Ports::take(1);
    let config = ports.service(&command(&["http"]));
    let mut daemon = Daemon::healthy(&config, 1);
    let port = ports.worker(0).to_string();
    let pid = daemon.worker_pid(ports.worker(0)).to_string();
    let address = ports.address().to_string();
    let worker = [("service", "web"), ("slot", "0"), ("port", &*port), ("pid", &*pid)];
    daemon.wait(Mark::START, "listening", &[("service", "web"), ("address", &address)]);
    daemon.wait(Mark::START, "worker started", &worker);
    daemon.wait(Mark::START, "worker healthy", &worker);
    daemon.must_reload(&config);
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    let exited = daemon.wait(Mark::START, "worker exited", &worker);
    assert_eq!(exited.get("status"), Some("killed by SIGTERM"));
    // Each line has a time and a level, and a message that is not empty.
    for line in daemon.log.lines(Mark::START) {
        assert!(matches!(&*line.level, "INFO" | "WARN" | "ERROR"), "{}", line.raw);
        let time = line.raw.split(' ').next().unwrap();
        assert!(time.len() == 27 && time.ends_with('Z') && time.contains('T'), "{time}");
        assert!(!line.message.is_empty(), "{}", line.raw);
    }
}

#[test]
fn a_connection_is_one_line_at_its_end() {
    let ports = Ports::take(1);
    let daemon = Daemon::healthy(&ports.service(&command(&["http"])), 1);
    let mut client = KeepAlive::new(ports.address());
    client.get("/bytes/1000").unwrap();
    assert!(daemon.said(Mark::START, "connection").is_empty());
    let address = client.stream().local_addr().unwrap().to_string();
    drop(client);
    let line = daemon.wait(Mark::START, "connection", &[("client", &address)]);
    assert_eq!(line.get("service"), Some("web"));
    assert_eq!(line.get("worker"), Some(&*format!("web/{}", ports.worker(0))));
    assert_eq!(line.get("port"), Some(&*ports.worker(0).to_string()));
    assert_eq!(line.get("end"), Some("closed"));
    let request = "GET /bytes/1000 HTTP/1.1\r\nHost: test\r\n\r\n";
    let answer = "HTTP/1.1 200 -\r\nContent-Length: 1000\r\nConnection: keep-alive\r\n\r\n";
    assert_eq!(line.number::<usize>("received"), request.len());
    assert_eq!(line.number::<usize>("sent"), answer.len() + 1000);
    assert!((0.0..20.0).contains(&line.number::<f64>("duration")));
}

#[test]
fn access_false_writes_none() {
    let ports = Ports::take(1);
    let config = format!("[log]\naccess = false\n{}", ports.service(&command(&["http"])));
    let mut daemon = Daemon::healthy(&config, 1);
    turns(ports.address(), 3);
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert!(daemon.said(Mark::START, "connection").is_empty());
}

#[test]
fn json_has_the_same_messages_and_fields() {
    let ports = Ports::take(1);
    let config = format!("[log]\nformat = \"json\"\n{}", ports.service(&command(&["http"])));
    let mut daemon = Daemon::start(&config);
    daemon.log.wait_for(Mark::START, "healthy", 1, |line| line.raw.contains("\"worker healthy\""));
    turns(ports.address(), 1);
    daemon.write_config("=");
    daemon.signal(nix::sys::signal::Signal::SIGHUP);
    daemon.log.wait_for(Mark::START, "refused", 1, |line| line.raw.contains("\"reload refused\""));
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    let lines: Vec<serde_json::Value> = daemon
        .log
        .lines(Mark::START)
        .iter()
        .map(|line| serde_json::from_str(&line.raw).unwrap_or_else(|_| panic!("{}", line.raw)))
        .collect();
    let one = |message: &str| {
        let mut found = lines.iter().filter(|line| line["message"] == message);
        let line = found.next().unwrap_or_else(|| panic!("no {message}"));
        assert!(found.next().is_none(), "two of {message}");
        assert!(line["timestamp"].is_string() && line["level"].is_string(), "{line}");
        line
    };
    let port = ports.worker(0);
    assert_eq!(one("listening")["address"], ports.address().to_string());
    let started = one("worker started");
    assert_eq!(
        (&started["service"], &started["slot"], &started["port"]),
        (&"web".into(), &0.into(), &port.into())
    );
    assert!(started["pid"].is_i64());
    for message in ["worker healthy", "worker exited"] {
        assert_eq!((&one(message)["port"], &one(message)["pid"]), (&port.into(), &started["pid"]));
    }
    let connection = one("connection");
    assert_eq!(connection["worker"], format!("web/{port}"));
    assert_eq!(connection["end"], "closed");
    assert!(connection["sent"].is_u64() && connection["received"].is_u64());
    assert!(connection["duration"].is_f64() && connection["client"].is_string());
    assert!(one("reload refused")["error"].as_str().unwrap().contains("lb.toml:1"));
    one("stopped");
}

#[test]
fn output_becomes_tagged_lines_whatever_it_is() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let script = "printf 'plain\\nkey=value \"quoted\"\\n\\033[31mred\\0\\377\\n'; \
                  printf 'forged\\rworker healthy port=1\\n' >&2; printf 'no newline'";
    fs::write(folder.path().join("say"), format!("#!/bin/sh\n{script}; exec {} http\n", fixture()))
        .unwrap();
    let config = ports.service("command = [\"sh\", \"say\"]");
    let mut daemon = Daemon::start_in(folder, &config);
    daemon.wait_healthy(Mark::START, 1);
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    let port = ports.worker(0).to_string();
    let pid = daemon.worker_pid(ports.worker(0)).to_string();
    let output = daemon.said(Mark::START, "output");
    let said = |stream: &str| -> Vec<&str> {
        let of = output.iter().filter(|line| line.get("stream") == Some(stream));
        of.map(|line| line.get("line").unwrap()).collect()
    };
    assert_eq!(
        said("stdout"),
        ["plain", "key=value \"quoted\"", "␛[31mred␀\u{fffd}", "no newline"]
    );
    assert_eq!(said("stderr"), ["forged␍worker healthy port=1"]);
    for line in &output {
        let fields = [("service", "web"), ("slot", "0"), ("port", &*port), ("pid", &*pid)];
        assert!(line.is("output", &fields), "{}", line.raw);
    }
    assert_eq!(daemon.said(Mark::START, "worker healthy").len(), 1);
}

#[test]
fn a_worker_that_floods_is_neither_slowed_nor_lets_others_wait() {
    let ports = Ports::take(1);
    const LINES: usize = 200_000;
    let count = LINES.to_string();
    let daemon = Daemon::start(&ports.service(&command(&["spam", &count])));
    // It serves only after it has written everything.
    daemon.wait_healthy(Mark::START, 1);
    assert_eq!(turns(ports.address(), 2).len(), 2);
    let dropped = daemon.wait(Mark::START, "output dropped", &[("service", "web")]);
    assert!(dropped.number::<usize>("lines") > 0);
    let written = daemon.said(Mark::START, "output").len();
    assert!((1..LINES).contains(&written), "{written}");
}

#[test]
fn output_goes_where_it_is_told() {
    let (null, file, inherit) = (Ports::take(1), Ports::take(1), Ports::take(1));
    let service = |name: &str, ports: &Ports, output: &str| {
        let command = format!(
            "command = [\"sh\", \"-c\", \"echo from {name}; exec {} http\"]\noutput = {output:?}",
            fixture()
        );
        ports.service(&command).replace("[service.web]", &format!("[service.{name}]"))
    };
    let config = [
        service("null", &null, "null"),
        service("file", &file, "worker.log"),
        service("inherit", &inherit, "inherit"),
    ]
    .concat();
    let folder = tempfile::tempdir().unwrap();
    let stdout = folder.path().join("stdout");
    fs::write(folder.path().join("lb.toml"), config).unwrap();
    // The shell is gone when lbd runs, so that it has standard output as a file.
    let mut command = Command::new("sh");
    let script = "exec \"$0\" --config lb.toml >stdout";
    command.args(["-c", script, env!("CARGO_BIN_EXE_lbd")]);
    let daemon = Daemon::run(folder, command);
    daemon.wait_healthy(Mark::START, 3);
    assert_eq!(fs::read_to_string(daemon.path("worker.log")).unwrap(), "from file\n");
    assert_eq!(fs::read_to_string(stdout).unwrap(), "from inherit\n");
    assert!(daemon.said(Mark::START, "output").is_empty());
    assert!(!daemon.log.text().contains("from null"));
}

#[test]
fn a_log_file_is_opened_anew_on_sigusr1() {
    let ports = Ports::take(1);
    let service = ports.service(&command(&["http"]));
    let mut daemon = Daemon::start(&format!("[log]\nfile = \"lbd.log\"\n{service}"));
    let (path, old) = (daemon.path("lbd.log"), daemon.path("lbd.log.1"));
    let count = |path: &std::path::Path, message: &str| {
        lines(path).iter().filter(|line| line.message == message).count()
    };
    eventually("healthy", || count(&path, "worker healthy") == 1);
    turns(ports.address(), 1);
    eventually("a line", || count(&path, "connection") == 1);
    fs::rename(&path, &old).unwrap();
    daemon.signal(SIGUSR1);
    // What it writes goes to the new file as soon as it has heard.
    eventually("the new file", || {
        turns(ports.address(), 1);
        path.exists()
    });
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert_eq!((count(&old, "stopped"), count(&path, "stopped")), (0, 1));
    assert_eq!(count(&path, "worker exited"), 1);
    assert_eq!(daemon.log.text(), "", "nothing on standard error");
}

#[test]
fn a_log_file_that_cannot_be_opened_anew_is_kept_and_that_is_said() {
    let ports = Ports::take(1);
    let service = ports.service(&command(&["http"]));
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("logs")).unwrap();
    let config = format!("[log]\nfile = \"logs/lbd.log\"\n{service}");
    let daemon = Daemon::start_in(folder, &config);
    let says = |path: &std::path::Path, message: &str| {
        lines(path).iter().any(|line| line.message == message)
    };
    eventually("healthy", || says(&daemon.path("logs/lbd.log"), "worker healthy"));
    fs::rename(daemon.path("logs"), daemon.path("old")).unwrap();
    daemon.signal(SIGUSR1);
    let message = "the log file can't be opened anew";
    eventually("it is said", || {
        turns(ports.address(), 1);
        says(&daemon.path("old/lbd.log"), message)
    });
    // The next time it can be.
    fs::create_dir(daemon.path("logs")).unwrap();
    daemon.signal(SIGUSR1);
    eventually("a new file", || {
        turns(ports.address(), 1);
        says(&daemon.path("logs/lbd.log"), "connection")
    });
}

/// Runs lbd with standard error at `path`, which systemd would have named as the journal.
fn journaled(config: &str, path: &str) -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lb.toml"), config).unwrap();
    let file = File::create(folder.path().join("journal")).unwrap().metadata().unwrap();
    let mut command = Command::new("sh");
    let script = format!("exec \"$0\" --config lb.toml 2>>{path}");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_lbd")]);
    command.env("JOURNAL_STREAM", format!("{}:{}", file.dev(), file.ino()));
    Daemon::run(folder, command)
}

#[test]
fn in_the_journal_each_line_begins_with_its_level() {
    for format in ["text", "json"] {
        let ports = Ports::take(1);
        let keys = "command = [\"sh\", \"-c\", \"echo hello; exec no-such-program\"]";
        let config = format!("[log]\nformat = \"{format}\"\n{}", ports.service(keys));
        let mut daemon = journaled(&config, "journal");
        let text = || fs::read_to_string(daemon.path("journal")).unwrap();
        eventually("it has failed", || text().contains("worker exited"));
        daemon.signal(SIGTERM);
        assert_eq!(daemon.wait_exit().code(), Some(0));
        let text = fs::read_to_string(daemon.path("journal")).unwrap();
        let begin = |level: &str, message: &str| match format {
            // journald has the time.
            "text" => format!("{level} {message}"),
            _ => level[..3].to_owned() + "{\"timestamp\":\"",
        };
        for (message, level) in [
            ("starting", "<6> INFO"),
            ("worker started", "<6> INFO"),
            ("output", "<6> INFO"),
            ("worker exited", "<4> WARN"),
        ] {
            let line = text.lines().find(|line| line.contains(message)).unwrap();
            assert!(line.starts_with(&begin(level, message)), "{line}");
        }
        for line in text.lines() {
            assert!(["<3>", "<4>", "<6>"].iter().any(|level| line.starts_with(level)), "{line}");
        }
    }
}

#[test]
fn what_ends_lbd_is_an_error_in_the_journal() {
    let config = "[service.web]\nlisten = 1\nworkers = 0\n";
    let mut daemon = journaled(config, "journal");
    assert_eq!(daemon.wait_exit().code(), Some(78));
    let text = fs::read_to_string(daemon.path("journal")).unwrap();
    assert!(text.lines().count() > 2, "{text}");
    assert!(text.lines().all(|line| line.starts_with("<3>lb.toml:")), "{text}");
}

#[test]
fn what_is_not_the_journal_gets_no_levels() {
    let ports = Ports::take(1);
    let mut daemon = journaled(&ports.service(&command(&["http"])), "other");
    let text = |daemon: &Daemon| fs::read_to_string(daemon.path("other")).unwrap_or_default();
    eventually("healthy", || text(&daemon).contains("worker healthy"));
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert!(text(&daemon).lines().all(|line| !line.contains('<')), "{}", text(&daemon));
    assert_eq!(lines(&daemon.path("other")).last().unwrap().message, "stopped");
}

/// What lbd writes to a terminal until its worker is healthy.
fn on_a_terminal(no_color: Option<&str>) -> String {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lb.toml"), ports.service(&command(&["http"]))).unwrap();
    let pty = nix::pty::openpty(None, None).unwrap();
    let terminal = nix::unistd::ttyname(&pty.slave).unwrap();
    let mut command = Command::new("sh");
    let script = format!("exec \"$0\" --config lb.toml 2>{}", terminal.display());
    command.args(["-c", &script, env!("CARGO_BIN_EXE_lbd")]).env_remove("NO_COLOR");
    command.envs(no_color.map(|value| ("NO_COLOR", value)));
    let _daemon = Daemon::run(folder, command);
    let mut text = String::new();
    let mut screen = BufReader::new(File::from(pty.master));
    while !text.contains("worker healthy") {
        assert_ne!(screen.read_line(&mut text).unwrap(), 0, "{text}");
    }
    text
}

#[test]
fn a_terminal_gets_colours_unless_no_color_is_set() {
    assert!(on_a_terminal(None).contains("\u{1b}["));
    // Where it is empty, it is as good as not there (no-color.org).
    assert!(on_a_terminal(Some("")).contains("\u{1b}["));
    let plain = on_a_terminal(Some("1"));
    assert!(!plain.contains('\u{1b}'), "{plain}");
}

#[test]
fn a_rotated_log_has_its_date_in_its_name() {
    let ports = Ports::take(1);
    let service = ports.service(&command(&["http"]));
    let log = "[log]\nfile = \"lbd.log\"\nrotate = \"daily\"\nkeep = 2\n";
    let mut daemon = Daemon::start(&format!("{log}{service}"));
    let find = || {
        let names = fs::read_dir(daemon.folder.path()).unwrap();
        let mut names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.find(|name| name.starts_with("lbd.log."))
    };
    eventually("the file", || find().is_some_and(|n| !lines(&daemon.path(&n)).is_empty()));
    let name = find().unwrap();
    let date = name.strip_prefix("lbd.log.").unwrap();
    assert!(date.len() == 10 && date.split('-').count() == 3, "{name}");
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert!(lines(&daemon.path(&name)).iter().any(|line| line.message == "stopped"));
}

#[test]
fn a_full_disk_stops_nothing() {
    let ports = Ports::take(2);
    let service = ports.service(&command(&["http"]));
    let mut daemon = Daemon::start(&format!("[log]\nfile = \"/dev/full\"\n{service}"));
    // lbd's log can't tell when it listens; then clients are held until there is a worker.
    eventually("it listens", || TcpStream::connect(ports.address()).is_ok());
    for _ in 0..200 {
        get(ports.address(), "/");
    }
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    daemon.assert_nothing_runs();
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lb.toml"), ports.service(&command(&["spam", "20000"]))).unwrap();
    // A pipe that is full from the beginning, and has a reader that never reads.
    nix::unistd::mkfifo(&folder.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let reader = File::options().read(true).write(true).open(folder.path().join("pipe")).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" --config lb.toml 2>pipe", env!("CARGO_BIN_EXE_lbd")]);
    let mut daemon = Daemon::run(folder, command);
    eventually("it listens", || TcpStream::connect(ports.address()).is_ok());
    for _ in 0..500 {
        get(ports.address(), "/");
    }
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    daemon.assert_nothing_runs();
    drop(reader);
}

#[test]
fn standard_error_that_is_closed_stops_nothing() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lb.toml"), ports.service(&command(&["http"]))).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" --config lb.toml 0<&- 1>&- 2>&-", env!("CARGO_BIN_EXE_lbd")]);
    let mut daemon = Daemon::run(folder, command);
    daemon.log.wait_for_end();
    eventually("it listens", || TcpStream::connect(ports.address()).is_ok());
    // None of its sockets became one of the standard descriptors.
    let descriptors = get(ports.address(), "/descriptors");
    assert!(descriptors.starts_with("0 /dev/null\n1 pipe:"), "{descriptors}");
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

#[test]
fn a_log_file_that_cannot_be_opened_is_1() {
    let ports = Ports::take(1);
    let service = ports.service(&command(&["http"]));
    let mut daemon = Daemon::start(&format!("[log]\nfile = \"no/folder/lbd.log\"\n{service}"));
    assert_eq!(daemon.wait_exit().code(), Some(1));
    let said = daemon.log.text();
    assert!(said.starts_with("lbd: cannot open the log file "), "{said}");
    assert!(said.contains("/no/folder/lbd.log: "), "{said}");
    daemon.assert_nothing_runs();
}

#[test]
fn a_log_file_that_is_none_is_refused_and_nothing_waits() {
    let ports = Ports::take(1);
    let service = ports.service(&command(&["http"]));
    let folder = || tempfile::tempdir().unwrap();
    let start = |folder: tempfile::TempDir| {
        let mut daemon = Daemon::start_in(folder, &format!("[log]\nfile = \"lbd.log\"\n{service}"));
        assert_eq!(daemon.wait_exit().code(), Some(1));
        daemon.assert_nothing_runs();
        let said = daemon.log.text();
        assert!(said.starts_with("lbd: cannot open the log file "), "{said}");
        (daemon.folder.path().to_owned(), said)
    };
    // A pipe that nobody reads.
    let with_pipe = folder();
    let path = with_pipe.path().join("lbd.log");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let (_, said) = start(with_pipe);
    assert!(said.contains("it is not a regular file; expected one"), "{said}");
    // A link, which somebody may have put there to have root write elsewhere.
    let with_link = folder();
    let elsewhere = folder();
    let target = elsewhere.path().join("precious");
    std::os::unix::fs::symlink(&target, with_link.path().join("lbd.log")).unwrap();
    let (_, said) = start(with_link);
    assert!(said.contains("it is a link; write the path that it leads to"), "{said}");
    assert!(!target.exists());
    // Neither is it followed later.
    let mut daemon = Daemon::start(&format!("[log]\nfile = \"lbd.log\"\n{service}"));
    let path = daemon.path("lbd.log");
    let is_said = |message: &str| lines(&path).iter().any(|line| line.message == message);
    eventually("it is ready", || is_said("ready"));
    let old = daemon.path("old.log");
    fs::rename(&path, &old).unwrap();
    std::os::unix::fs::symlink(&target, &path).unwrap();
    daemon.signal(SIGUSR1);
    // It writes on where it was.
    let is_told = || lines(&old).iter().any(|l| l.message == "the log file can't be opened anew");
    eventually("it says so", || {
        get(ports.address(), "/");
        is_told()
    });
    assert!(!target.exists());
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

#[test]
fn rotation_removes_nothing_that_it_has_not_made() {
    let ports = Ports::take(1);
    let service = ports.service(&command(&["http"]));
    let folder = tempfile::tempdir().unwrap();
    let others = ["lbd.log", "lbd.log.important", "lbd.logbook.txt", "lbd.log.2026-01-01.gz"];
    let old = ["lbd.log.2020-01-01", "lbd.log.2020-01-02"];
    for name in others.iter().chain(&old) {
        fs::write(folder.path().join(name), "").unwrap();
    }
    let log = "[log]\nfile = \"lbd.log\"\nrotate = \"hourly\"\nkeep = 1\n";
    let mut daemon = Daemon::start_in(folder, &format!("{log}{service}"));
    eventually("it serves", || TcpStream::connect(ports.address()).is_ok());
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
    for name in others {
        assert!(daemon.path(name).exists(), "{name}");
    }
    for name in old {
        assert!(!daemon.path(name).exists(), "{name}");
    }
}

#[test]
fn nothing_in_a_line_turns_text_around() {
    let ports = Ports::take(1);
    // U+202E, U+2066, U+009B and DEL.
    let line = r"safe\342\200\256exe\342\201\246\302\23331m\177\n";
    let script = format!("printf '{line}'; exec {} http", fixture());
    let service = ports.service(&format!("command = [\"sh\", \"-c\", '''{script}''']"));
    for format in ["text", "json"] {
        let mut daemon = Daemon::start(&format!("[log]\nformat = \"{format}\"\n{service}"));
        eventually("it says so", || daemon.log.text().contains("safe"));
        daemon.signal(SIGTERM);
        assert_eq!(daemon.wait_exit().code(), Some(0));
        let said = daemon.log.text();
        let is_bad = |c: char| {
            (c.is_control() && c != '\n')
                || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        };
        assert!(!said.contains(is_bad), "{said:?}");
    }
}
