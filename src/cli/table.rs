//! `lbd status` for people: a row a worker, process and traffic together.

use bytesize::ByteSize;

use crate::admin::{
    Status,
    status::{Probe, Service, State, Worker},
};

/// How much of a sentence is shown in a column.
const MAX_TEXT: usize = 40;

/// The status as lines of at most `width` columns; the least important columns are left out where
/// that is too narrow for all.
pub(super) fn render(status: &Status, width: Option<usize>, colour: bool) -> String {
    let workers = || status.services.iter().flat_map(|s| s.all().map(move |worker| (s, worker)));
    let mut columns: Vec<Column> = LAYOUT
        .iter()
        .map(|&(importance, align, title, cell)| {
            let cells: Vec<_> = workers().map(|(service, worker)| cell(service, worker)).collect();
            let widths = cells.iter().map(|cell| cell.chars().count());
            let width = widths.chain([title.len()]).max().unwrap_or_default();
            Column { importance, align, title, cells, width }
        })
        .collect();
    while width.is_some_and(|width| total(&columns) > width) && columns.len() > 1 {
        let least = columns.iter().map(|column| column.importance).max();
        columns.retain(|column| Some(column.importance) != least);
    }
    let mut text = heading(status, width);
    text += &line(columns.iter().map(|column| column.padded(column.title)));
    for (row, (_, worker)) in workers().enumerate() {
        text += &line(columns.iter().map(|column| {
            let cell = column.padded(&column.cells[row]);
            match colour && column.title == STATE {
                true => format!("\x1b[{}m{cell}\x1b[0m", sgr(worker.state)),
                false => cell,
            }
        }));
    }
    text
}

struct Column {
    importance: u8,
    align: Align,
    title: &'static str,
    cells: Vec<String>,
    width: usize,
}

#[derive(Clone, Copy)]
enum Align {
    Left,
    Right,
}

type Cell = fn(&Service, &Worker) -> String;

const STATE: &str = "STATE";

/// The columns from left to right; of the greatest number is who goes first.
const LAYOUT: &[(u8, Align, &str, Cell)] = {
    use Align::{Left, Right};
    &[
        (0, Left, "SERVICE", |service, _| service.name.clone()),
        (0, Right, "SLOT", |_, worker| worker.slot.to_string()),
        (3, Right, "PORT", |_, worker| optional(worker.port)),
        (2, Right, "PID", |_, worker| optional(worker.pid)),
        (0, Left, STATE, |_, worker| worker.state.to_string()),
        (1, Right, "FOR", |_, worker| span(worker.since_seconds)),
        (4, Right, "ACTIVE", |_, worker| worker.connections.active.to_string()),
        (6, Right, "TOTAL", |_, worker| worker.connections.total.to_string()),
        (7, Right, "FAILED", |_, worker| worker.connections.failed.to_string()),
        (9, Right, "SENT", |_, worker| bytes(worker.bytes.sent)),
        (10, Right, "RECEIVED", |_, worker| bytes(worker.bytes.received)),
        (5, Right, "RESTARTS", |_, worker| worker.restarts.to_string()),
        (8, Right, "MEMORY", |_, worker| worker.resident_bytes.map_or_else(none, bytes)),
        (11, Right, "CPU", |_, worker| {
            worker.cpu_seconds.map_or_else(none, |seconds| format!("{seconds:.1}s"))
        }),
        (13, Left, "LAST PROBE", |_, worker| worker.last_probe.as_ref().map_or_else(none, probe)),
        (12, Left, "LAST EXIT", |_, worker| {
            worker.last_exit.as_deref().map_or_else(none, shortened)
        }),
    ]
};

impl Column {
    fn padded(&self, text: &str) -> String {
        let width = self.width;
        match self.align {
            Align::Left => format!("{text:<width$}"),
            Align::Right => format!("{text:>width$}"),
        }
    }
}

fn total(columns: &[Column]) -> usize {
    columns.iter().map(|column| column.width).sum::<usize>() + 2 * columns.len().saturating_sub(1)
}

fn line(cells: impl Iterator<Item = String>) -> String {
    let cells: Vec<_> = cells.collect();
    format!("{}\n", cells.join("  ").trim_end())
}

/// What is to be said of the daemon as a whole.
fn heading(status: &Status, width: Option<usize>) -> String {
    let config = &status.config;
    let from = config.path.as_deref().unwrap_or("no file");
    let mut lines = vec![format!(
        "lbd {}, pid {}, up {}, {from}",
        status.version,
        status.pid,
        span(status.uptime_seconds)
    )];
    if let Some(reload) = Some(&config.last_reload).filter(|reload| !reload.ok) {
        let error = reload.error.as_deref().unwrap_or_default();
        lines.push(format!("the reload of {} failed: {error}", reload.at));
    }
    let fitting = |line: String| match width {
        Some(width) => line.chars().take(width).chain(['\n']).collect(),
        None => line + "\n",
    };
    lines.into_iter().map(fitting).collect()
}

/// SGR parameters (ECMA-48): green, yellow, red.
fn sgr(state: State) -> &'static str {
    match state {
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

fn bytes(count: u64) -> String {
    ByteSize::b(count).display().iec_short().to_string()
}

fn probe(probe: &Probe) -> String {
    match &probe.error {
        None => format!("{:.1}ms", probe.seconds * 1000.0),
        Some(error) => shortened(error),
    }
}

fn shortened(text: &str) -> String {
    if text.chars().count() <= MAX_TEXT {
        return text.to_owned();
    }
    text.chars().take(MAX_TEXT - 1).chain(['…']).collect()
}

/// The two largest units: `12s`, `3m 5s`, `2h 59m`, `40d 7h`.
fn span(seconds: f64) -> String {
    // What is shown is whole seconds, and far from the largest u64.
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
            since_seconds: 3723.5,
            restarts: 2,
            last_exit: Some("killed by SIGKILL".to_owned()),
            connections: Connections { active: 1, total: 20, failed: 3 },
            bytes: Bytes { sent: 5_000_000, received: 12 },
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
                balance: "round-robin".to_owned(),
                workers: vec![worker(0, State::Healthy), worker(1, State::Backoff)],
                retiring: vec![worker(0, State::Draining)],
            }],
        }
    }

    #[test]
    fn a_row_a_worker() {
        let expected = "\
lbd 1.2.3, pid 7, up 1d 1h, /etc/lb.toml
SERVICE  SLOT  PORT   PID  STATE       FOR  ACTIVE  TOTAL  FAILED  SENT  RECEIVED  RESTARTS  MEMORY   CPU  LAST PROBE  LAST EXIT
web         0  9002  4711  healthy   1h 2m       1     20       3  4.8M       12B         2   10.0M  1.2s  0.4ms       killed by SIGKILL
web         1  9002     -  backoff   1h 2m       1     20       3  4.8M       12B         2   10.0M  1.2s  0.4ms       killed by SIGKILL
web         0  9002     -  draining  1h 2m       1     20       3  4.8M       12B         2   10.0M  1.2s  0.4ms       killed by SIGKILL
";
        assert_eq!(render(&status(), None, false), expected);
    }

    #[test]
    fn it_fits_whatever_the_width() {
        let mut status = status();
        status.config.last_reload =
            Reload { ok: false, at: "now".to_owned(), error: Some("e".repeat(200)) };
        for width in 23..200 {
            for line in render(&status, Some(width), false).lines() {
                assert!(line.chars().count() <= width, "{width}: {line}");
            }
        }
        let narrow = render(&status, Some(40), false);
        assert!(narrow.contains("SERVICE  SLOT   PID  STATE       FOR\n"), "{narrow}");
    }

    #[test]
    fn colour_is_by_state_and_changes_no_width() {
        let plain = render(&status(), None, false);
        let coloured = render(&status(), None, true);
        for (part, colour) in [("healthy ", 32), ("backoff ", 31), ("draining", 33)] {
            assert!(coloured.contains(&format!("\x1b[{colour}m{part}\x1b[0m")), "{coloured}");
        }
        let mut stripped = coloured.replace("\x1b[0m", "");
        for colour in [31, 32, 33] {
            stripped = stripped.replace(&format!("\x1b[{colour}m"), "");
        }
        assert_eq!(stripped, plain);
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
