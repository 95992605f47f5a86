//! Formats the results as text, Markdown and CSV.

use super::{Series, load::Measured};

/// How many causes of failed requests a row lists separately.
const MAX_CAUSES: usize = 5;

/// For people: a table per contender, with what failed, and the ratio of the two.
pub(super) fn text(all: &[Series]) -> String {
    let tables: Vec<_> = all.iter().map(|s| section(&s.name, &text_table(&rows(s)), s)).collect();
    let ratio = ratio(all).map(|ratio| format!("{}\n\n{}", ratio.title, text_table(&ratio.rows)));
    tables.into_iter().chain(ratio).collect::<Vec<_>>().join("\n")
}

/// Like [`text`], as Markdown for a README.
pub(super) fn markdown(all: &[Series]) -> String {
    let heading = |name: &str| format!("### {name}");
    let tables = all.iter().map(|s| section(&heading(&s.name), &markdown_table(&rows(s)), s));
    let ratio = ratio(all)
        .map(|ratio| format!("{}\n\n{}", heading(&ratio.title), markdown_table(&ratio.rows)));
    tables.chain(ratio).collect::<Vec<_>>().join("\n")
}

/// For programs: a header, and a row per contender and concurrency (RFC 4180, but with `\n`).
pub(super) fn csv(all: &[Series]) -> String {
    let record = |fields: Vec<String>| {
        fields.iter().map(|field| quoted(field)).collect::<Vec<_>>().join(",") + "\n"
    };
    let columns = COLUMNS.iter().map(|(title, _)| (*title).to_owned());
    let header = record(["Contender".to_owned()].into_iter().chain(columns).collect());
    let rows = all.iter().flat_map(|series| {
        let rows = rows(series).into_iter().skip(1);
        rows.map(|row| record([series.name.clone()].into_iter().chain(row).collect()))
    });
    [header].into_iter().chain(rows).collect()
}

type Cell = fn(&Measured) -> String;

/// The columns after the row's number. Latencies are measured from connecting to the last byte.
const COLUMNS: &[(&str, Option<Cell>)] = &[
    ("No", None),
    ("Concurrency", Some(|row| row.concurrency.to_string())),
    ("Time taken (s)", Some(|row| format!("{:.3}", row.seconds()))),
    ("Complete requests", Some(|row| row.complete().to_string())),
    ("Failed requests", Some(|row| row.failed().to_string())),
    ("Total transferred (bytes)", Some(|row| row.transferred.to_string())),
    ("Requests per second", Some(|row| format!("{:.2}", row.requests_per_second()))),
    ("Time per request (ms)", Some(|row| optional(row.mean()))),
    ("Transfer rate (KB/s)", Some(|row| format!("{:.2}", row.kilobytes_per_second()))),
    ("p50 (ms)", Some(|row| optional(row.percentile(50)))),
    ("p95 (ms)", Some(|row| optional(row.percentile(95)))),
    ("p99 (ms)", Some(|row| optional(row.percentile(99)))),
    ("max (ms)", Some(|row| optional(row.percentile(100)))),
];

/// A header, and a row per concurrency.
fn rows(series: &Series) -> Vec<Vec<String>> {
    let header = COLUMNS.iter().map(|(title, _)| (*title).to_owned()).collect();
    let row = |(index, measured): (usize, &Measured)| {
        let cell = |(_, cell): &(_, Option<Cell>)| {
            cell.map_or_else(|| (index + 1).to_string(), |cell| cell(measured))
        };
        COLUMNS.iter().map(cell).collect()
    };
    [header].into_iter().chain(series.rows.iter().enumerate().map(row)).collect()
}

struct Ratio {
    title: String,
    rows: Vec<Vec<String>>,
}

/// The ratio of the first series to the second, row by row.
fn ratio(all: &[Series]) -> Option<Ratio> {
    let [ours, baseline] = all else { return None };
    let header = ["No", "Concurrency", "Requests per second", "p99"].map(str::to_owned).to_vec();
    let times = |ratio: Option<f64>| {
        ratio.filter(|ratio| ratio.is_finite()).map_or_else(none, |ratio| format!("{ratio:.2}"))
    };
    let rows = ours.rows.iter().zip(&baseline.rows).enumerate().map(|(index, (ours, baseline))| {
        let p99 = ours.percentile(99).zip(baseline.percentile(99));
        vec![
            (index + 1).to_string(),
            ours.concurrency.to_string(),
            times(Some(ours.requests_per_second() / baseline.requests_per_second())),
            times(p99.map(|(ours, baseline)| ours / baseline)),
        ]
    });
    let title = format!("Ratio: {} / {}", ours.name, baseline.name);
    Some(Ratio { title, rows: [header].into_iter().chain(rows).collect() })
}

/// A table with its title, and what failed.
fn section(title: &str, table: &str, series: &Series) -> String {
    let causes: String = series.rows.iter().filter_map(causes).collect();
    let separator = if causes.is_empty() { "" } else { "\n" };
    format!("{title}\n\n{table}{separator}{causes}")
}

/// What failed in a row, most frequent first, on one line.
fn causes(row: &Measured) -> Option<String> {
    let failures = failures(row)?;
    Some(format!("Failed at concurrency {}: {failures}\n", row.concurrency))
}

/// `3 × timeout, 1 × connection reset`; `None` where nothing failed.
pub(super) fn failures(row: &Measured) -> Option<String> {
    let mut failures: Vec<_> = row.failures.iter().collect();
    failures.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let rest: usize = failures.iter().skip(MAX_CAUSES).map(|(_, count)| **count).sum();
    let mut told: Vec<_> = failures
        .iter()
        .take(MAX_CAUSES)
        .map(|(failure, count)| format!("{count} × {failure}"))
        .collect();
    if rest > 0 {
        told.push(format!("{rest} × other causes"));
    }
    (!told.is_empty()).then(|| told.join(", "))
}

/// Right-aligned columns, two spaces apart.
fn text_table(rows: &[Vec<String>]) -> String {
    let widths = widths(rows);
    rows.iter().map(|row| padded(row, &widths, "  ") + "\n").collect()
}

fn markdown_table(rows: &[Vec<String>]) -> String {
    let widths = widths(rows);
    let line = |row: &Vec<String>| format!("| {} |\n", padded(row, &widths, " | "));
    let dashes: Vec<_> = widths.iter().map(|width| "-".repeat(width - 1) + ":").collect();
    let (header, rows) = (rows.iter().take(1), rows.iter().skip(1));
    header.chain([&dashes]).chain(rows).map(line).collect()
}

fn padded(row: &[String], widths: &[usize], separator: &str) -> String {
    let cells = row.iter().zip(widths).map(|(cell, &width)| format!("{cell:>width$}"));
    cells.collect::<Vec<_>>().join(separator)
}

fn widths(rows: &[Vec<String>]) -> Vec<usize> {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    (0..columns).map(|column| width(column).unwrap_or_default()).collect()
}

fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n']) {
        return format!("\"{}\"", field.replace('"', "\"\""));
    }
    field.to_owned()
}

fn optional(value: Option<f64>) -> String {
    value.map_or_else(none, |value| format!("{value:.3}"))
}

fn none() -> String {
    "-".to_owned()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;
    use crate::bench::client::Failure;

    fn row(concurrency: usize, latencies: &[u32], failures: &[(Failure, usize)]) -> Measured {
        Measured {
            concurrency,
            elapsed: Duration::from_millis(500),
            latencies: latencies.to_vec(),
            failures: failures.iter().cloned().collect(),
            transferred: 10_240,
        }
    }

    fn two() -> [Series; 2] {
        let short = Failure::Short { received: 65_396, promised: Some(75_007) };
        let failures = [(Failure::Timeout, 1), (short, 3)];
        [
            Series {
                name: "ours".to_owned(),
                rows: vec![row(1, &[1000, 2000, 3000, 4000], &[]), row(50, &[500], &failures)],
            },
            Series {
                name: "a, \"b\"".to_owned(),
                rows: vec![row(1, &[500, 1000], &[]), row(50, &[], &[(Failure::Refused, 4)])],
            },
        ]
    }

    #[test]
    fn a_table_for_each_then_what_failed_then_the_ratio() {
        let expected = "\
ours

No  Concurrency  Time taken (s)  Complete requests  Failed requests  Total transferred (bytes)  Requests per second  Time per request (ms)  Transfer rate (KB/s)  p50 (ms)  p95 (ms)  p99 (ms)  max (ms)
 1            1           0.500                  4                0                      10240                 8.00                  2.500                 20.00     2.000     4.000     4.000     4.000
 2           50           0.500                  1                4                      10240                 2.00                  0.500                 20.00     0.500     0.500     0.500     0.500

Failed at concurrency 50: 3 × short body 65396 of 75007, 1 × timeout

a, \"b\"

No  Concurrency  Time taken (s)  Complete requests  Failed requests  Total transferred (bytes)  Requests per second  Time per request (ms)  Transfer rate (KB/s)  p50 (ms)  p95 (ms)  p99 (ms)  max (ms)
 1            1           0.500                  2                0                      10240                 4.00                  0.750                 20.00     0.500     1.000     1.000     1.000
 2           50           0.500                  0                4                      10240                 0.00                      -                 20.00         -         -         -         -

Failed at concurrency 50: 4 × connection refused

Ratio: ours / a, \"b\"

No  Concurrency  Requests per second   p99
 1            1                 2.00  4.00
 2           50                    -     -
";
        assert_eq!(text(&two()), expected);
    }

    #[test]
    fn one_alone_has_no_ratio() {
        let [ours, _] = two();
        let text = text(&[ours]);
        assert!(text.starts_with("ours\n\nNo  Concurrency"), "{text}");
        assert!(!text.contains("Ratio"), "{text}");
    }

    #[test]
    fn markdown_is_headings_and_tables() {
        let [mut ours, mut other] = two();
        ours.rows.truncate(1);
        other.rows.truncate(1);
        let markdown = markdown(&[ours, other]);
        let lines: Vec<_> = markdown.lines().collect();
        assert_eq!(lines[0], "### ours");
        assert_eq!(
            lines[2],
            "| No | Concurrency | Time taken (s) | Complete requests | Failed requests | \
             Total transferred (bytes) | Requests per second | Time per request (ms) | \
             Transfer rate (KB/s) | p50 (ms) | p95 (ms) | p99 (ms) | max (ms) |"
        );
        assert_eq!(lines[3].matches("-: |").count(), 13, "{}", lines[3]);
        assert_eq!(
            lines[4],
            "|  1 |           1 |          0.500 |                 4 |               0 | \
             \x20                   10240 |                8.00 |                 2.500 | \
             \x20              20.00 |    2.000 |    4.000 |    4.000 |    4.000 |"
        );
        assert_eq!(
            lines[12..],
            [
                "### Ratio: ours / a, \"b\"",
                "",
                "| No | Concurrency | Requests per second |  p99 |",
                "| -: | ----------: | ------------------: | ---: |",
                "|  1 |           1 |                2.00 | 4.00 |",
            ]
        );
    }

    #[test]
    fn csv_is_a_header_and_a_record_for_each_row() {
        assert_eq!(
            csv(&two()),
            "Contender,No,Concurrency,Time taken (s),Complete requests,Failed requests,Total \
             transferred (bytes),Requests per second,Time per request (ms),Transfer rate (KB/s),\
             p50 (ms),p95 (ms),p99 (ms),max (ms)\n\
             ours,1,1,0.500,4,0,10240,8.00,2.500,20.00,2.000,4.000,4.000,4.000\n\
             ours,2,50,0.500,1,4,10240,2.00,0.500,20.00,0.500,0.500,0.500,0.500\n\
             \"a, \"\"b\"\"\",1,1,0.500,2,0,10240,4.00,0.750,20.00,0.500,1.000,1.000,1.000\n\
             \"a, \"\"b\"\"\",2,50,0.500,0,4,10240,0.00,-,20.00,-,-,-,-\n"
        );
    }

    #[test]
    fn the_most_frequent_causes_are_told() {
        let status = |code: u16| (Failure::Status(code), usize::from(code));
        let told: BTreeMap<_, _> = (500..=507).map(status).collect();
        let row = Measured { failures: told, ..Measured::default() };
        assert_eq!(
            failures(&row).unwrap(),
            "507 × status 507 Insufficient Storage, 506 × status 506 Variant Also Negotiates, \
             505 × status 505 HTTP Version Not Supported, 504 × status 504 Gateway Timeout, \
             503 × status 503 Service Unavailable, 1503 × other causes"
        );
        assert_eq!(failures(&Measured::default()), None);
    }
}
