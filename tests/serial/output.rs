//! Workers' output, whatever it is, as lines of lbd's log.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    num::NonZeroU32,
    sync::{Mutex, OnceLock},
    time::Duration,
};

use super::TURN;
use lbd::{
    config::{OUTPUT_RATE, Output},
    process::{Child, ChildEvent, Exit, Identity, Launch, Outputs, Spawner},
};
use tokio::{sync::MutexGuard, time::timeout};
use tracing::{Event, Subscriber, field::Field};
use tracing_subscriber::{Layer, layer::Context, layer::SubscriberExt as _, registry};

const DEADLINE: Duration = Duration::from_secs(60);

/// A rate that a flood is far above, in lines a second.
const FEW: NonZeroU32 = NonZeroU32::new(100).unwrap();

/// The longest line that stays one.
const LONGEST: usize = 64 * 1024;

/// One event: its fields as text.
type Fields = BTreeMap<&'static str, String>;

/// Everything logged in this process.
static LOGGED: Mutex<Vec<Fields>> = Mutex::new(Vec::new());

struct Capture;

impl<S: Subscriber> Layer<S> for Capture {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        struct Visit(Fields);
        impl tracing::field::Visit for Visit {
            fn record_str(&mut self, field: &Field, value: &str) {
                self.0.insert(field.name(), value.to_owned());
            }
            fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
                self.0.insert(field.name(), format!("{value:?}"));
            }
        }
        let mut visit = Visit(Fields::new());
        event.record(&mut visit);
        LOGGED.lock().unwrap().push(visit.0);
    }
}

/// The children of a process are one family.
fn turn() -> MutexGuard<'static, ()> {
    static CAPTURE: OnceLock<()> = OnceLock::new();
    CAPTURE.get_or_init(|| {
        tracing::subscriber::set_global_default(registry().with(Capture)).unwrap();
    });
    TURN.blocking_lock()
}

/// Runs `script` with its output at `output`; its pid, and what was logged about `service`.
fn run(service: &str, output: &Output, script: &str) -> (i32, Vec<Fields>) {
    let (pid, logged, _) = run_to_the_last_word(service, output, script, OUTPUT_RATE);
    (pid, logged)
}

/// The same with so many lines a second, and what it said last.
fn run_to_the_last_word(
    service: &str,
    output: &Output,
    script: &str,
    rate: NonZeroU32,
) -> (i32, Vec<Fields>, Vec<String>) {
    let outputs = Outputs::start(rate).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (pid, last_words) = runtime.block_on(async {
        let spawner = Spawner::with_guard(env!("CARGO_BIN_EXE_lbd").into()).unwrap();
        let worker = Identity { service, slot: 1, port: Some(9003) };
        let launch = Launch {
            label: format!("{service}/9003"),
            program: None,
            argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec![("PATH".into(), std::env::var_os("PATH").unwrap())],
            directory: "/".into(),
            listeners: Vec::new(),
            streams: outputs.open(output, worker).unwrap(),
            umask: None,
            user: None,
            group: None,
            open_files: None,
            cgroup: None,
        };
        let last_words = launch.streams.last_words();
        let mut child = spawner.spawn(launch).unwrap();
        let Some(ChildEvent::Started { pid }) = next(&mut child).await else { panic!() };
        assert_eq!(next(&mut child).await, Some(ChildEvent::Exited(Exit::Code(0))));
        assert_eq!(next(&mut child).await, Some(ChildEvent::Gone));
        last_words.complete(DEADLINE).await;
        (pid, last_words.lines())
    });
    // Returns when all of it is logged.
    drop(outputs);
    let mut logged = LOGGED.lock().unwrap();
    // Other tests' events have no such field.
    let is_its = |fields: &mut Fields| fields.get("service").is_some_and(|name| name == service);
    (pid, logged.extract_if(.., is_its).collect(), last_words)
}

async fn next(child: &mut Child) -> Option<ChildEvent> {
    timeout(DEADLINE, child.next()).await.expect("did not happen in time")
}

fn lines<'a>(logged: &'a [Fields], stream: &str) -> Vec<&'a str> {
    let of_stream =
        logged.iter().filter(|fields| fields.get("stream").is_some_and(|s| s == stream));
    of_stream.map(|fields| fields["line"].as_str()).collect()
}

#[test]
fn each_line_is_one_event_with_its_worker_and_stream() {
    let _turn = turn();
    let (pid, logged) = run("lines", &Output::Log, "echo one; echo two >&2; printf three");
    assert_eq!(lines(&logged, "stdout"), ["one", "three"]);
    assert_eq!(lines(&logged, "stderr"), ["two"]);
    let expected = [
        ("line", "one"),
        ("message", "output"),
        ("pid", &pid.to_string()),
        ("port", "9003"),
        ("service", "lines"),
        ("slot", "1"),
        ("stream", "stdout"),
    ];
    let first = logged.iter().find(|fields| fields["line"] == "one").unwrap();
    assert_eq!(*first, Fields::from(expected.map(|(name, value)| (name, value.to_owned()))));
}

#[test]
fn what_was_said_last_is_known_at_the_end_also_where_it_was_dropped() {
    let _turn = turn();
    let script =
        "yes flood | head -n 100000; printf 'Error: \\033[31mno such module'; echo; exit 0";
    let (_, logged, last) = run_to_the_last_word("last", &Output::Log, script, FEW);
    assert!(logged.iter().any(|fields| fields["message"] == "output dropped"));
    assert_eq!(last.len(), 20);
    assert!(last[..19].iter().all(|line| line == "flood"), "{last:?}");
    assert_eq!(last[19], "Error: ␛[31mno such module");
    let (_, _, last) = run_to_the_last_word("silent", &Output::Null, "echo nobody hears it", FEW);
    assert!(last.is_empty(), "{last:?}");
}

#[test]
fn long_lines_stay_whole_and_what_is_written_in_a_hurry_is_not_dropped() {
    let _turn = turn();
    // As a JSON log with a stack trace in it, and an application that logs two thousand requests a
    // second for a second.
    let script = "head -c 65536 /dev/zero | tr '\\0' x; echo; yes request | head -n 2000";
    let (_, logged) = run("hurry", &Output::Log, script);
    let lines = lines(&logged, "stdout");
    assert_eq!(lines.len(), 2001, "{:?}", logged.last());
    assert_eq!(lines[0].len(), LONGEST);
    assert!(lines[1..].iter().all(|line| *line == "request"));
    assert!(logged.iter().all(|fields| fields["message"] == "output"));
}

#[test]
fn binary_and_a_closed_stdout_do_no_harm() {
    let _turn = turn();
    let script =
        r"printf 'a\000b\377\033[2Jc\nnext\n'; exec >&-; echo lost; echo still >&2; exit 0";
    let (_, logged) = run("binary", &Output::Log, script);
    assert_eq!(lines(&logged, "stdout"), ["a␀b\u{fffd}␛[2Jc", "next"]);
    assert!(lines(&logged, "stderr").contains(&"still"), "{logged:?}");
}

#[test]
fn a_flood_without_a_newline_is_read_to_its_end_and_mostly_dropped() {
    let _turn = turn();
    // 64 MiB, in one line. A worker that has to wait for its reader would not end.
    let script = "head -c 67108864 /dev/zero; echo; echo >&2 end";
    let (_, logged, _) = run_to_the_last_word("flood", &Output::Log, script, FEW);
    let flood = lines(&logged, "stdout");
    assert!(flood.iter().all(|line| line.chars().count() <= LONGEST));
    let dropped: u64 = logged
        .iter()
        .filter(|fields| fields["message"] == "output dropped")
        .map(|fields| fields["lines"].parse::<u64>().unwrap())
        .sum();
    assert!(dropped > 0, "all {} lines were logged", flood.len());
    // The flood is a whole number of the longest lines; and `end` is one more.
    let seen = u64::try_from(logged.iter().filter(|f| f["message"] == "output").count()).unwrap();
    assert_eq!(seen + dropped, 67_108_864 / LONGEST as u64 + 1);
}

#[test]
fn a_file_is_appended_to() {
    let _turn = turn();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("worker.log");
    for _ in 0..2 {
        let (_, logged) = run("file", &Output::File(path.clone()), "echo out; echo err >&2");
        assert!(logged.is_empty(), "{logged:?}");
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), "out\nerr\nout\nerr\n");
}

#[test]
fn nothing_is_heard_of_null() {
    let _turn = turn();
    let (_, logged) = run("null", &Output::Null, "echo out; echo err >&2");
    assert!(logged.is_empty(), "{logged:?}");
}
