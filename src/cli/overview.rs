//! `lbd status` for people: one row per worker, with its process and its traffic.

use bytesize::ByteSize;

use super::table::{self, Align, Cell, Column, cut};
use crate::{
    admin::{
        Status,
        status::{Probe, Service, State, Worker},
    },
    printable,
};

/// The most further lines of a reload's error that are shown, so that room is left for the workers.
const MOST_OF_AN_ERROR: usize = 6;

/// How to display the status.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct View {
    /// The terminal's width; `None` if there is no terminal, and then nothing is left out or cut.
    pub(super) width: Option<usize>,
    /// Whether to colour the state.
    pub(super) colour: bool,
}

/// The status as lines that fit the `view`. With an `earlier` status of the same daemon, shows what
/// was used and accepted since then; else CPU is the average since the start.
pub(super) fn render(status: &Status, earlier: Option<&Status>, view: View) -> String {
    let since = earlier.and_then(|earlier| Since::new(earlier, status));
    let rows: Vec<Row<'_>> = status
        .services
        .iter()
        .flat_map(|service| service.all().map(move |worker| (service, worker)))
        .map(|(service, worker)| Row {
            service,
            worker,
            before: since.as_ref().and_then(|since| since.worker(service, worker)),
            seconds: since.as_ref().map_or(0.0, |since| since.seconds),
        })
        .collect();
    let columns: Vec<_> = LAYOUT
        .iter()
        .map(|&(importance, align, title, least, cell)| {
            let cells = rows.iter().map(cell).collect();
            Column { title, align, importance, least, cells }
        })
        .collect();
    let mut lines = heading(status, view);
    lines.extend(table::lines(&columns, view.width, view.colour));
    lines.into_iter().map(|line| line + "\n").collect()
}

/// A worker, and the same worker at the earlier look.
struct Row<'s> {
    service: &'s Service,
    worker: &'s Worker,
    before: Option<&'s Worker>,
    /// The time between the two.
    seconds: f64,
}

/// The earlier status.
struct Since<'s> {
    status: &'s Status,
    seconds: f64,
}

impl<'s> Since<'s> {
    /// `None` if the two come from different daemons, or from the same moment.
    fn new(earlier: &'s Status, now: &Status) -> Option<Self> {
        let seconds = now.uptime_seconds - earlier.uptime_seconds;
        (earlier.pid == now.pid && seconds > 0.0).then_some(Self { status: earlier, seconds })
    }

    /// The same worker process in the earlier status.
    fn worker(&self, service: &Service, worker: &Worker) -> Option<&'s Worker> {
        let service = self.status.services.iter().find(|earlier| earlier.name == service.name)?;
        service.all().find(|earlier| {
            (earlier.slot, earlier.generation, earlier.pid)
                == (worker.slot, worker.generation, worker.pid)
        })
    }
}

type ToCell = fn(&Row<'_>) -> Cell;

/// The columns from left to right: importance, alignment, title, minimal width, and the content.
const LAYOUT: &[(u8, Align, &str, usize, ToCell)] = {
    use Align::{Left, Right};
    &[
        (0, Left, "SERVICE", 8, |row| Cell::new(&row.service.name)),
        (0, Right, "SLOT", 4, |row| Cell::new(row.worker.slot.to_string())),
        (3, Right, "PORT", 5, |row| Cell::new(optional(row.worker.port))),
        (2, Right, "PID", 7, |row| Cell::new(optional(row.worker.pid))),
        (0, Left, "STATE", 9, |row| Cell::new(state(row.worker)).styled(colour(row.worker))),
        (1, Right, "FOR", 6, |row| Cell::new(span(row.worker.since_seconds))),
        (4, Right, "ACTIVE", 6, |row| {
            Cell::new(row.worker.connections.active.map_or_else(none, count))
        }),
        (5, Right, "CONN/S", 6, |row| Cell::new(rate(row))),
        (9, Right, "TOTAL", 7, |row| {
            Cell::new(row.worker.connections.total.map_or_else(none, count))
        }),
        (8, Right, "FAILED", 6, |row| {
            let failed = row.worker.connections.failed;
            Cell::new(count(failed)).styled(if failed > 0 { "31" } else { "" })
        }),
        (11, Right, "SENT", 6, |row| Cell::new(row.worker.bytes.sent.map_or_else(none, bytes))),
        (12, Right, "RECEIVED", 6, |row| {
            Cell::new(row.worker.bytes.received.map_or_else(none, bytes))
        }),
        (6, Right, "RESTARTS", 4, |row| Cell::new(count(row.worker.restarts))),
        (10, Right, "CPU", 5, |row| Cell::new(cpu(row))),
        (7, Right, "MEMORY", 6, |row| {
            Cell::new(row.worker.resident_bytes.map_or_else(none, bytes))
        }),
        (14, Left, "LAST PROBE", 10, |row| probe(row.worker.last_probe.as_ref())),
        (13, Left, "LAST EXIT", 14, |row| {
            Cell::new(row.worker.last_exit.clone().unwrap_or_else(none))
        }),
    ]
};

/// The lines about the daemon as a whole.
fn heading(status: &Status, view: View) -> Vec<String> {
    let config = &status.config;
    let from = config.path.as_deref().unwrap_or("no file");
    let (version, pid) = (&status.version, status.pid);
    let mut lines =
        vec![format!("lbd {version}, pid {pid}, up {}, {from}", span(status.uptime_seconds))];
    if let Some(reload) = Some(&config.last_reload).filter(|reload| !reload.ok) {
        let error = reload.error.as_deref().unwrap_or_default();
        let mut told = error.lines().filter(|line| !line.trim().is_empty());
        let first = told.next().unwrap_or_default();
        lines.push(format!("the reload of {} failed: {first}", reload.at));
        // The further lines may be the worker's last output, which often shows why it failed.
        let indented = |line: &str| format!("    {}", line.strip_prefix("    ").unwrap_or(line));
        lines.extend(told.by_ref().take(MOST_OF_AN_ERROR).map(indented));
        if let more @ 1.. = told.count() {
            lines.push(format!("    … and {more} more lines; `lbd status --json` has them all"));
        }
    }
    let width = view.width.unwrap_or(usize::MAX);
    let clean = |line: &String| cut(&printable::line(line).replace('\t', " "), width);
    lines.iter().map(clean).collect()
}

/// The state as in `/status`, plus "drained" if the state doesn't show it.
fn state(worker: &Worker) -> String {
    match worker.state {
        State::Draining | State::Stopping => worker.state.to_string(),
        state if worker.drained => format!("{state}, drained"),
        state => state.to_string(),
    }
}

/// SGR parameters (ECMA-48): green, yellow, red.
fn colour(worker: &Worker) -> &'static str {
    match worker.state {
        State::Healthy => "32",
        State::Starting | State::Draining | State::Stopping => "33",
        State::Backoff | State::Unhealthy => "31",
    }
}

fn none() -> String {
    "-".to_owned()
}

fn optional(value: Option<impl ToString>) -> String {
    value.map_or_else(none, |value| value.to_string())
}

/// Exact if the number is short enough.
fn count(number: u64) -> String {
    match number {
        0..1_000_000 => number.to_string(),
        1_000_000..1_000_000_000 => format!("{:.2}M", number as f64 / 1e6),
        _ => format!("{:.2}G", number as f64 / 1e9),
    }
}

/// Connections per second: the daemon's own rate, or the difference between two looks.
fn rate(row: &Row<'_>) -> String {
    let taken = |before: &Worker| {
        let (now, then) = (row.worker.connections.total?, before.connections.total?);
        Some(now.saturating_sub(then) as f64 / row.seconds)
    };
    let rate = row.worker.connections.per_second.or_else(|| row.before.and_then(taken));
    rate.map_or_else(none, |rate| {
        if rate < 9.95 { format!("{rate:.1}") } else { count(rate.round() as u64) }
    })
}

/// The fraction of a core used between two looks, or on average since the worker's start.
fn cpu(row: &Row<'_>) -> String {
    let Some(used) = row.worker.cpu_seconds else { return none() };
    match row.before.and_then(|before| before.cpu_seconds) {
        Some(before) => format!("{:.0}%", 100.0 * (used - before).max(0.0) / row.seconds),
        None if used < 60.0 => format!("{used:.1}s"),
        None => span(used),
    }
}

fn bytes(count: u64) -> String {
    ByteSize::b(count).display().iec_short().to_string()
}

fn probe(probe: Option<&Probe>) -> Cell {
    match probe {
        None => Cell::new(none()),
        Some(Probe { error: None, seconds, .. }) => Cell::new(format!("{:.1}ms", seconds * 1000.0)),
        Some(Probe { error: Some(error), .. }) => Cell::new(error).styled("31"),
    }
}

/// The two largest units: `12s`, `3m 5s`, `2h 59m`, `40d 7h`.
pub(super) fn span(seconds: f64) -> String {
    // Whole seconds are shown, far below the largest u64.
    let seconds = seconds.max(0.0) as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::status::{Bytes, Config, Connections, Reload};

    fn worker(slot: u32, state: State) -> Worker {
        Worker {
            slot,
            port: Some(9002),
            pid: (state == State::Healthy).then_some(4711),
            generation: 3,
            state,
            drained: false,
            since_seconds: 3723.5,
            restarts: 2,
            last_exit: Some("killed by SIGKILL".to_owned()),
            connections: Connections {
                active: Some(1),
                total: Some(20),
                failed: 3,
                queued: None,
                per_second: None,
            },
            bytes: Bytes { sent: Some(5_000_000), received: Some(12) },
            guard: None,
            resident_bytes: Some(10 << 20),
            cpu_seconds: Some(1.25),
            last_probe: Some(Probe { ok: true, seconds: 0.00042, error: None }),
        }
    }

    fn status() -> Status {
        Status {
            version: "1.2.3".to_owned(),
            pid: 7,
            uptime_seconds: 90_061.0,
            config: Config {
                path: Some("/etc/lb.toml".to_owned()),
                loaded_at: "2026-01-02T03:04:05.678Z".to_owned(),
                last_reload: Reload { ok: true, at: "now".to_owned(), error: None },
            },
            services: vec![Service {
                name: "web".to_owned(),
                listen: Vec::new(),
                route: "proxy".to_owned(),
                steering: None,
                balance: "round-robin".to_owned(),
                workers: vec![worker(0, State::Healthy), worker(1, State::Backoff)],
                replacements: Vec::new(),
                retiring: vec![worker(0, State::Draining)],
            }],
        }
    }

    fn plain(width: Option<usize>) -> View {
        View { width, colour: false }
    }

    #[test]
    fn a_row_a_worker() {
        let expected = "\
lbd 1.2.3, pid 7, up 1d 1h, /etc/lb.toml
SERVICE  SLOT  PORT   PID  STATE       FOR  ACTIVE  CONN/S  TOTAL  FAILED  SENT  RECEIVED  RESTARTS   CPU  MEMORY  LAST PROBE  LAST EXIT
web         0  9002  4711  healthy   1h 2m       1       -     20       3  4.8M       12B         2  1.2s   10.0M  0.4ms       killed by SIGKILL
web         1  9002     -  backoff   1h 2m       1       -     20       3  4.8M       12B         2  1.2s   10.0M  0.4ms       killed by SIGKILL
web         0  9002     -  draining  1h 2m       1       -     20       3  4.8M       12B         2  1.2s   10.0M  0.4ms       killed by SIGKILL
";
        assert_eq!(render(&status(), None, plain(None)), expected);
    }

    #[test]
    fn the_readme_shows_these_columns() {
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let readme = include_str!("../../README.md");
        let shown = readme.lines().find(|line| line.starts_with("SERVICE  SLOT"));
        let titles: Vec<_> = LAYOUT.iter().flat_map(|column| words(column.2)).collect();
        assert_eq!(shown.map(words), Some(titles));
    }

    #[test]
    fn a_second_look_tells_what_happened_between() {
        let before = status();
        let mut now = status();
        now.uptime_seconds += 2.0;
        let workers = &mut now.services[0].workers;
        workers[0].connections.total = workers[0].connections.total.map(|total| total + 500);
        workers[0].cpu_seconds = Some(2.25);
        workers[1].generation += 1;
        let shown = render(&now, Some(&before), plain(None));
        let rows: Vec<Vec<&str>> =
            shown.lines().skip(2).map(|l| l.split_whitespace().collect()).collect();
        assert_eq!((rows[0][8], rows[0][14]), ("250", "50%"), "{shown}");
        assert_eq!((rows[1][8], rows[1][14]), ("-", "1.2s"), "another worker: {shown}");
        // The daemon's own count is better.
        now.services[0].workers[0].connections.per_second = Some(0.5);
        assert!(render(&now, Some(&before), plain(None)).contains("  0.5  "));
        // Another daemon, or the same moment.
        now.pid += 1;
        let other = render(&now, Some(&before), plain(None));
        assert!(!other.contains('%'), "{other}");
        assert!(!render(&before, Some(&before), plain(None)).contains('%'));
    }

    #[test]
    fn it_fits_whatever_the_width() {
        let mut status = status();
        status.config.last_reload =
            Reload { ok: false, at: "now".to_owned(), error: Some("é\n".repeat(200)) };
        status.services[0].name = "a-name-that-nobody-expected-to-be-that-long".to_owned();
        for width in 7..250 {
            for line in render(&status, None, plain(Some(width))).lines() {
                assert!(line.chars().count() <= width, "{width}: {line}");
            }
        }
    }

    #[test]
    fn nothing_that_a_daemon_says_is_obeyed() {
        let bad = "\u{1b}]0;x\u{7}\u{202e}";
        let mut status = status();
        status.version = bad.to_owned();
        status.config.path = Some(bad.to_owned());
        status.config.last_reload =
            Reload { ok: false, at: bad.to_owned(), error: Some(format!("{bad}\nmore")) };
        status.services[0].name = bad.to_owned();
        status.services[0].workers[0].last_exit = Some(bad.to_owned());
        let shown = render(&status, None, plain(None));
        assert!(!shown.contains(|c| printable::is_control(c) && c != '\n'), "{shown:?}");
        assert!(shown.contains("failed: ␛]0;x␇\u{fffd}\n    more\n"), "{shown}");
    }

    #[test]
    fn a_reload_that_failed_tells_what_the_worker_said_last() {
        let mut status = status();
        let error = "web: exit status 1; it said last:\n    Error: no module\n\n      at x.js:1";
        let reload = |error: String| Reload { ok: false, at: "now".to_owned(), error: Some(error) };
        status.config.last_reload = reload(error.to_owned());
        let shown = render(&status, None, plain(None));
        let expected = "\
the reload of now failed: web: exit status 1; it said last:
    Error: no module
      at x.js:1
SERVICE ";
        assert!(shown.contains(expected), "{shown}");
        status.config.last_reload = reload("a line\n".repeat(12));
        let shown = render(&status, None, plain(None));
        let expected =
            "    a line\n    … and 5 more lines; `lbd status --json` has them all\nSERVICE ";
        assert!(shown.contains(expected), "{shown}");
    }

    #[test]
    fn what_matters_most_is_shown_in_80_columns() {
        let shown = render(&status(), None, plain(Some(80)));
        let expected =
            "SERVICE  SLOT  PORT   PID  STATE       FOR  ACTIVE  CONN/S  RESTARTS  MEMORY";
        assert_eq!(shown.lines().nth(1), Some(expected), "{shown}");
    }

    #[test]
    fn colour_is_by_state() {
        let coloured = render(&status(), None, View { width: None, colour: true });
        for (part, colour) in [("healthy ", 32), ("backoff ", 31), ("draining", 33)] {
            assert!(coloured.contains(&format!("\x1b[{colour}m{part}\x1b[0m")), "{coloured}");
        }
    }

    #[test]
    fn an_operators_wish_shows() {
        let shown = |worker_state| {
            let mut worker = worker(0, worker_state);
            worker.drained = true;
            state(&worker)
        };
        assert_eq!(shown(State::Draining), "draining");
        assert_eq!(shown(State::Unhealthy), "unhealthy, drained");
        assert_eq!(shown(State::Backoff), "backoff, drained");
    }

    #[test]
    fn numbers_are_exact_while_they_are_short() {
        let shown = [0, 999_999, 1_000_000, 12_345_678, 5_000_000_000].map(count);
        assert_eq!(shown, ["0", "999999", "1.00M", "12.35M", "5.00G"]);
    }

    #[test]
    fn spans_have_two_units() {
        let spans = [(0.9, "0s"), (59.0, "59s"), (185.0, "3m 5s"), (10_799.0, "2h 59m")];
        for (seconds, shown) in spans {
            assert_eq!(span(seconds), shown);
        }
        assert_eq!(span(3_481_200.0), "40d 7h");
    }
}
