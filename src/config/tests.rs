mod accepted;

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const SERVICE: &str = "[service.web]\nlisten = \"127.0.0.1:44444\"\ncommand = [\"x\"]\n";

#[test]
fn refuses_with_line_key_and_what_would_be_right() {
    let corpus = include_str!("tests/refused.txt");
    let mut count = 0;
    // The first two blocks say what this is.
    for case in corpus.trim_end().split("\n\n").skip(2) {
        let (text, said): (Vec<_>, Vec<_>) = case.lines().partition(|l| !l.starts_with("=> "));
        let said: Vec<_> = said.iter().map(|line| &line[3..]).collect();
        let mut text = text.join("\n");
        if !text.starts_with("# whole file") {
            text.insert_str(0, SERVICE);
        }
        assert_eq!(refusal(&text), said.join("\n"), "of\n{text}");
        // The same with the line ends of another system.
        assert_eq!(refusal(&text.replace('\n', "\r\n")), said.join("\n"), "of\n{text}");
        count += 1;
    }
    assert!(count > 100, "{count} cases");
}

#[test]
fn reports_every_error_of_a_file_at_once_and_by_line() {
    let text = r#"
[log]
level = "loud"

[service.web]
listen = ["127.0.0.1:80", "localhost:81"]
command = []
ports = [
    9002,
    9003,
    9002,
    "9004",
]
balnce = "round-robin"

[service.web.health]
interval = "0s"
rise = 0

[service.api]
listen = "0.0.0.0:80"
workers = 0
stop = { signal = "TREM", drain = "wiat" }

[admni]
"#;
    let expected = r#"3: log.level: "loud" is not known here; expected "error" or "warn" or "info" or "debug" or "trace"
6: service.web.listen: "localhost:81" has a name in it; write "127.0.0.1:81"
7: service.web.command: empty; expected an array such as ["node", "server.js"]
11: service.web.ports: port 9002 is listed twice; give each worker its own port
12: service.web.ports: expected an integer, found a string
14: service.web.balnce: unknown key; did you mean `balance`?
17: service.web.health.interval: must be longer than zero
18: service.web.health.rise: expected a number from 1 to 1000, found 0
20: service.api: nothing to run; write command = ["node", "server.js"] or root = "www"
21: service.api.listen: 0.0.0.0:80 overlaps 127.0.0.1:80 (service.web.listen, line 6): a wildcard takes the port of every address; keep one of them
22: service.api.workers: expected a number from 1 to 1024, found 0
23: service.api.stop.signal: "TREM" is not a signal; expected one such as "TERM" or "QUIT"
23: service.api.stop.drain: "wiat" is not known here; did you mean "wait"?
25: admni: unknown key; did you mean `admin`?"#;
    assert_eq!(refusal(text), expected);
}

#[test]
fn what_is_not_toml_hides_nothing_else_and_makes_nothing_up() {
    // The error takes `listen` out of the tree: that it is missing is not worth saying.
    let text = "[service.web]\ncommand = [\"x\"]\nworkers = 0\nlisten 127.0.0.1:80\n";
    assert_eq!(
        refusal(text),
        "3: service.web.workers: expected a number from 1 to 1024, found 0\n\
         4: not valid TOML: key with no value, expected `=`"
    );
    // What follows a broken value is still judged.
    let text = "[service.web]\nlisten = 127.0.0.1:80\ncommand = [\"x\"]\nworkers = 0\n";
    assert_eq!(
        refusal(text),
        "2: not valid TOML: invalid float; put text in quotes, such as \"text\"\n\
         4: service.web.workers: expected a number from 1 to 1024, found 0"
    );
    // The open bracket puts the rest into another table: its keys are not called unknown.
    let text = "[service.web\nlisten = \"127.0.0.1:80\"\ncommand = [\"x\"]\nworkers = 4\n";
    assert_eq!(refusal(text), "1: not valid TOML: unclosed table, expected `]`");
    // Above the damage they are.
    let text = format!("{SERVICE}lisen = 3\n[service.b\n");
    assert_eq!(
        refusal(&text),
        "4: service.web.lisen: unknown key; did you mean `listen`?\n\
         5: not valid TOML: unclosed table, expected `]`"
    );
}

#[test]
fn a_service_has_1024_ports_at_most() {
    let ports: Vec<String> = (1..=1025).map(|port| port.to_string()).collect();
    assert_eq!(
        refusal(&format!("{SERVICE}ports = [{}]", ports.join(", "))),
        "4: service.web.ports: 1025 ports; expected at most 1024"
    );
    let config = accepted(&format!("{SERVICE}ports = [{}]", ports[..1024].join(", ")));
    assert_eq!(config.services[0].slots.count(), 1024);
}

#[test]
fn one_line_holds_all_problems() {
    let error = parse("[log]\nformat = 3\n", Path::new("/srv/lb.toml")).unwrap_err();
    assert_eq!(
        error.one_line(),
        "/srv/lb.toml: no service; add one such as [service.web], with `listen` and `command` or \
         `root`; /srv/lb.toml:2: log.format: expected a string, found an integer"
    );
}

#[test]
fn a_file_that_cannot_be_read_is_one_sentence() {
    let (folder, path) = file("");
    let said = |path: &Path| {
        let error = read(path).unwrap_err().to_string();
        error.replace(&folder.path().display().to_string(), "")
    };
    let missing = folder.path().join("no.toml");
    assert_eq!(said(&missing), "/no.toml: no such file; write it, or name another with --config");
    assert_eq!(said(folder.path()), ": a directory; expected a file such as lb.toml");
    assert_eq!(said(Path::new("")), ": the path is empty; write one");
    fs::write(&path, b"[log]\n\xff\n").unwrap();
    assert_eq!(said(&path), "/lb.toml:2: not UTF-8 text; save the file as UTF-8");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::read(&path).is_err() {
        // Root may read it all the same.
        let denied = "/lb.toml: permission denied; let the user that lbd runs as read it";
        assert_eq!(said(&path), denied);
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&String::from_utf8_lossy(&bytes), Path::new("/srv/lb.toml"));
    }

    #[test]
    fn no_heap_of_pieces_makes_it_panic(pieces in prop::collection::vec(piece(), 0..40)) {
        judge(&pieces.concat());
    }

    #[test]
    fn no_slip_in_a_good_file_makes_it_panic(
        from in 0..FULL.len(),
        length in 0..20_usize,
        insert in piece(),
    ) {
        let mut text = FULL.to_owned();
        text.replace_range(from..(from + length).min(FULL.len()), insert);
        judge(&text);
    }
}

/// A refusal has at least one problem, and each is on one line of the file and of the message.
fn judge(text: &str) {
    if let Err(error) = parse(text, Path::new("/srv/lb.toml")) {
        assert!(!error.problems.is_empty());
        for problem in &error.problems {
            assert!(
                problem.line.is_none_or(|line| line <= text.split('\n').count()),
                "{problem:?}"
            );
            assert!(!problem.message.contains('\n'), "{problem:?}");
        }
        assert!(error.problems.is_sorted_by_key(|problem| problem.line));
    }
}

const FULL: &str = "[log]\nlevel = \"info\"\n[service.web]\nlisten = [\"127.0.0.1:80\", \"unix:x\"]\n\
    command = [\"x\"]\nports = [9002, 9003]\nenv = { A = \"1\" }\nhealth.http = \"/\"\n\
    health.expect = \"200-299\"\n[service.web.stop]\nsignal = \"TERM\"\ntimeout = \"1s\"\n";

fn piece() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "[service.web]\n",
        "[[service]]\n",
        "[service",
        "[log]\n",
        "listen",
        "ports",
        "health.",
        "expect",
        "command",
        "workers",
        "interval",
        " = ",
        "\"",
        "\"\"\"",
        "'",
        "[",
        "]",
        "{",
        "}",
        ",",
        ".",
        "\n",
        "#",
        "9002",
        "-1",
        "1e9",
        "99999999999999999999",
        "0x",
        "\"1s\"",
        "\"127.0.0.1:80\"",
        "\"unix:\"",
        "\"\\u0000\"",
        "é",
        "\"[::]:80\"",
        "true",
        "1979-05-27",
        "a",
        "=",
    ])
}

/// A file in a folder of its own.
fn file(text: &str) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("lb.toml");
    fs::write(&path, text).unwrap();
    (folder, path)
}

/// What is said of `text` as the file `/srv/lb.toml`, without the file's name.
fn refusal(text: &str) -> String {
    match parse(text, Path::new("/srv/lb.toml")) {
        Ok(config) => panic!("accepted: {text}\n{config:?}"),
        Err(error) => error.to_string().replace("/srv/lb.toml: ", "").replace("/srv/lb.toml:", ""),
    }
}

fn accepted(text: &str) -> Config {
    parse(text, Path::new("/srv/lb.toml")).unwrap_or_else(|error| panic!("{text}\n{error}"))
}

#[test]
fn a_file_that_is_no_toml_is_not_told_line_by_line() {
    let text = "root:x:0:0:root:/root:/bin/bash\n".repeat(50);
    let told = refusal(&text);
    assert_eq!(told.lines().count(), 5, "{told}");
    assert!(told.ends_with("; and 45 more lines are not valid TOML"), "{told}");
}
