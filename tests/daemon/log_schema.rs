//! `docs/log.md` has every message that lbd can write, with its level and its fields, and no other.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use crate::common::{
    Daemon, Mark, Ports,
    client::{KeepAlive, turns},
    command, fixture, kill_hard, named,
};
use nix::sys::signal::Signal::{SIGHUP, SIGTERM};
use serde_json::Value;

/// What is said of one message: its levels and its fields.
type Schema = BTreeMap<String, (BTreeSet<String>, BTreeSet<String>)>;

/// Not of the daemon: a built-in worker logs for itself.
const NOT_OF_THE_DAEMON: [&str; 2] = ["src/worker", "src/bench"];

fn source_files(folder: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            source_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The arguments of a macro that begins at `text`, up to its closing parenthesis.
fn arguments(text: &str) -> Vec<String> {
    let (mut all, mut argument, mut depth) = (Vec::new(), String::new(), 0_u32);
    let mut characters = text.chars();
    let mut is_quoted = false;
    while let Some(character) = characters.next() {
        match character {
            '\\' if is_quoted => {
                argument.push(character);
                argument.extend(characters.next());
                continue;
            }
            '"' => is_quoted = !is_quoted,
            _ if is_quoted => {}
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' if depth > 0 => depth -= 1,
            ',' | ')' if depth == 0 => {
                all.extend(Some(argument.trim().to_owned()).filter(|text| !text.is_empty()));
                argument.clear();
                if character == ')' {
                    return all;
                }
                continue;
            }
            _ => {}
        }
        argument.push(character);
    }
    panic!("a macro without an end: {text:.80}");
}

/// Every call of a macro of `tracing` in the code: what can be written at all.
fn written() -> Schema {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    source_files(&root.join("src"), &mut files);
    let mut schema = Schema::new();
    for path in files {
        let name = path.strip_prefix(root).unwrap();
        let is_test = name.components().any(|part| part.as_os_str() == "tests");
        if is_test || NOT_OF_THE_DAEMON.iter().any(|folder| name.starts_with(folder)) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        for level in ["error", "warn", "info", "debug", "trace"] {
            for (at, _) in text.match_indices(&format!("{level}!(")) {
                let before = text[..at].chars().next_back();
                if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
                    continue;
                }
                let mut arguments = arguments(&text[at + level.len() + 2..]);
                let message = arguments.pop().unwrap();
                let message = message.trim_matches('"').to_owned();
                let (levels, fields) = schema.entry(message).or_default();
                levels.insert(level.to_uppercase());
                fields.extend(arguments.iter().filter(|a| !a.starts_with("target:")).map(
                    |argument| {
                        let name = argument.split('=').next().unwrap().trim();
                        name.trim_start_matches(['%', '?']).to_owned()
                    },
                ));
            }
        }
    }
    schema
}

/// The rows of the table whose first column is headed `head`: the words of its cells.
fn table(documented: &str, head: &str) -> Vec<Vec<String>> {
    let head = format!("| {head} |");
    let rows = documented.lines().skip_while(|line| !line.starts_with(&head)).skip(2);
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).skip(1).collect();
    rows.take_while(|line| line.starts_with('|')).map(cells).collect()
}

/// `docs/log.md`: the messages, and the type of each field in JSON.
fn documented() -> (Schema, BTreeMap<String, String>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/log.md");
    let text = fs::read_to_string(path).unwrap();
    let words = |cell: &str| -> BTreeSet<String> {
        let words = cell.split(", ").map(|word| word.trim_matches('`').to_owned());
        words.filter(|word| word != "none").collect()
    };
    let message =
        |row: &Vec<String>| (row[0].trim_matches('`').to_owned(), (words(&row[1]), words(&row[2])));
    let messages = table(&text, "message").iter().map(message).collect();
    let field = |row: &Vec<String>| (row[0].trim_matches('`').to_owned(), row[1].clone());
    (messages, table(&text, "field").iter().map(field).collect())
}

#[test]
fn all_that_is_written_is_documented_and_nothing_else() {
    let (written, (documented, fields)) = (written(), documented());
    assert!(written.len() > 40, "{written:#?}");
    for (message, schema) in &written {
        let known = documented.get(message);
        assert_eq!(known, Some(schema), "of {message:?} docs/log.md says something else");
    }
    for message in documented.keys() {
        assert!(
            written.contains_key(message),
            "{message:?} is in docs/log.md, but is never written"
        );
    }
    let used: BTreeSet<_> = written.values().flat_map(|(_, fields)| fields).collect();
    assert_eq!(used, fields.keys().collect());
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "string",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::Bool(_) => "boolean",
        Value::Null | Value::Array(_) | Value::Object(_) => "other",
    }
}

/// Holds each line that a daemon wrote against what is documented; the messages.
fn check(daemon: &Daemon) -> BTreeSet<String> {
    let (documented, fields) = documented();
    let mut messages = BTreeSet::new();
    for line in daemon.log.lines(Mark::START) {
        let raw = &line.raw;
        let object: serde_json::Map<String, Value> =
            serde_json::from_str(raw).unwrap_or_else(|error| panic!("{error}: {raw}"));
        let text = |key: &str| object[key].as_str().unwrap();
        let (levels, known) = documented.get(text("message")).unwrap_or_else(|| panic!("{raw}"));
        assert!(levels.contains(text("level")), "{raw}");
        let time = text("timestamp");
        assert!(time.len() == 27 && time.ends_with('Z') && time.contains('T'), "{raw}");
        for (key, value) in &object {
            if ["timestamp", "level", "message"].contains(&&**key) {
                continue;
            }
            assert!(known.contains(key), "{key} in {raw}");
            let (wanted, found) = (&*fields[key], type_of(value));
            // Whole numbers are numbers too.
            assert!(found == wanted || (wanted, found) == ("number", "integer"), "{key} in {raw}");
        }
        messages.insert(text("message").to_owned());
    }
    messages
}

/// Waits for a line with this message.
fn wait(daemon: &Daemon, message: &str, count: usize) {
    let wanted = format!("\"message\":\"{message}\"");
    daemon.log.wait_for(Mark::START, message, count, |line| line.raw.contains(&wanted));
}

#[test]
fn a_run_with_all_sorts_of_trouble_writes_what_is_documented() {
    let (web, dead, odd) = (Ports::take(2), Ports::take(1), Ports::take(1));
    let log = "[log]\nformat = \"json\"\nlevel = \"debug\"\n";
    let web_keys = |value: &str| {
        format!(
            "{}\nenv.X = \"{value}\"\nstop.timeout = \"100ms\"\nstop.drain-timeout = \"200ms\"",
            command(&["http", "--ignore-term"])
        )
    };
    let dead_service = named("dead", &dead.service("command = [\"/no/such/program\"]"));
    let silent = format!("echo a line; exec {} silent", fixture());
    let slow = format!("command = [\"sh\", \"-c\", {silent:?}]\nhealth.start-timeout = \"100ms\"");
    let odd_service = named("odd", &odd.service(&slow));
    let config = |value: &str| {
        format!("{log}{}\n{dead_service}\n{odd_service}", web.service(&web_keys(value)))
    };
    let mut daemon = Daemon::start(&config("1"));
    wait(&daemon, "worker healthy", 2);
    wait(&daemon, "worker not started", 1);
    wait(&daemon, "worker given up", 1);
    assert_eq!(turns(web.address(), 4).len(), 4);

    // A crash, a reload with a rollout, one that fails, and one that is refused.
    kill_hard(daemon.slot_pids()[0]);
    wait(&daemon, "worker healthy", 3);
    let mut held = KeepAlive::new(web.address());
    held.get("/").unwrap();
    let reload = |config: &str, message: &str, count: usize| {
        daemon.write_config(config);
        daemon.signal(SIGHUP);
        wait(&daemon, message, count);
    };
    reload(&config("2"), "workers replaced", 1);
    let broken = config("3").replace("\"http\"", "\"exit\", \"3\"");
    reload(&broken, "replacement failed, the old settings stay in force", 1);
    reload("x = 1\n", "reload refused", 1);
    assert!(daemon.lbd(&["drain", "web", "0"]).status.success());
    assert!(daemon.lbd(&["resume", "web", "0"]).status.success());
    let mut held = KeepAlive::new(web.address());
    held.get("/").unwrap();
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));

    let written = check(&daemon);
    let expected = [
        "connection",
        "descriptors",
        "draining",
        "listening",
        "output",
        "reload refused",
        "reloaded",
        "replacement failed, the old settings stay in force",
        "replacing workers",
        "starting",
        "stopped",
        "stopping",
        "worker exited",
        "worker given up",
        "worker healthy",
        "worker killed",
        "worker not started",
        "worker resumed",
        "worker started",
        "workers replaced",
    ];
    for message in expected {
        assert!(written.contains(message), "{message} of {written:?}");
    }
}
