//! A page of `/metrics`, as a scraper sees it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use super::{Daemon, PATIENCE};

/// Where the daemon of [`with_admin`] is asked, in its folder.
pub(crate) const SOCKET: &str = "admin.sock";

/// `config`, with an admin socket in the folder.
pub(crate) fn with_admin(config: &str) -> String {
    format!("{config}\n[admin]\nsocket = \"{SOCKET}\"\n")
}

/// The head and the body of the answer to `METHOD /metrics`.
pub(crate) fn ask(socket: &Path, method: &str) -> (String, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request =
        format!("{method} /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// What a page says of one family.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Family {
    pub(crate) help: String,
    pub(crate) kind: String,
    /// All labels that any of its series has, in their order; but `le`.
    pub(crate) labels: Vec<String>,
}

/// One page.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) text: String,
    pub(crate) families: BTreeMap<String, Family>,
    /// Each value by `name{labels}`, as written.
    series: BTreeMap<String, f64>,
}

impl Metrics {
    pub(crate) fn of(daemon: &Daemon) -> Self {
        let (head, body) = ask(&daemon.path(SOCKET), "GET");
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        Self::parse(body)
    }

    pub(crate) fn parse(text: String) -> Self {
        let mut families: BTreeMap<String, Family> = BTreeMap::new();
        let mut series = BTreeMap::new();
        for line in text.lines() {
            if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|l| l.split_once(' '))
            {
                help.clone_into(&mut families.entry(name.to_owned()).or_default().help);
            } else if let Some((name, kind)) =
                line.strip_prefix("# TYPE ").and_then(|line| line.split_once(' '))
            {
                kind.clone_into(&mut families.entry(name.to_owned()).or_default().kind);
            } else {
                let (name, value) = line.rsplit_once(' ').unwrap();
                let twice = series.insert(name.to_owned(), value.parse().unwrap());
                assert!(twice.is_none(), "twice: {name}");
                let (name, labels) = name.split_once('{').unwrap_or((name, ""));
                let family = families.get_mut(family(name)).unwrap_or_else(|| panic!("{name}"));
                for label in labels.split("\",").filter_map(|label| label.split_once('=')) {
                    if label.0 != "le" && !family.labels.iter().any(|known| known == label.0) {
                        family.labels.push(label.0.to_owned());
                    }
                }
            }
        }
        Self { text, families, series }
    }

    /// The value of a series, written as in a query: `name{label="value"}`. The labels that the
    /// page has and this doesn't are of no matter, as long as it means one series.
    pub(crate) fn get(&self, wanted: &str) -> Option<f64> {
        let found = self.matching(wanted);
        assert!(found.len() <= 1, "{wanted} is ambiguous: {found:?}");
        found.first().map(|(_, value)| *value)
    }

    pub(crate) fn value(&self, wanted: &str) -> f64 {
        self.get(wanted).unwrap_or_else(|| panic!("no {wanted} in\n{}", self.text))
    }

    /// The sum of all such series.
    pub(crate) fn sum(&self, wanted: &str) -> f64 {
        self.matching(wanted).iter().map(|(_, value)| value).sum()
    }

    fn matching(&self, wanted: &str) -> Vec<(&str, f64)> {
        let (name, labels) = parts(wanted);
        let matches = |series: &str| {
            let (other, others) = parts(series);
            other == name && labels.is_subset(&others)
        };
        let found = self.series.iter().filter(|(series, _)| matches(series));
        found.map(|(series, value)| (series.as_str(), *value)).collect()
    }

    /// All series of counters and histograms, which may only grow.
    pub(crate) fn growing(&self) -> impl Iterator<Item = (&str, f64)> {
        let grows = |series: &str| {
            let name = series.split('{').next().unwrap();
            self.families[family(name)].kind != "gauge"
        };
        self.series.iter().filter(move |(s, _)| grows(s)).map(|(s, value)| (s.as_str(), *value))
    }

    /// How many series there are like that, by `name{labels}`.
    pub(crate) fn count(&self, wanted: impl Fn(&str) -> bool) -> usize {
        self.series.keys().filter(|series| wanted(series)).count()
    }

    /// The values that this label has in the series of this name.
    pub(crate) fn label_values(&self, name: &str, label: &str) -> BTreeSet<String> {
        let of_name = self.series.keys().map(|series| parts(series)).filter(|(n, _)| *n == name);
        let labels = of_name.flat_map(|(_, labels)| labels);
        let values = labels.filter_map(|one| one.strip_prefix(label)?.strip_prefix('='));
        values.map(|value| value.trim_matches('"').to_owned()).collect()
    }

    /// Whether any series has this in its labels.
    pub(crate) fn mentions(&self, label: &str) -> bool {
        self.series.keys().any(|series| parts(series).1.contains(label))
    }
}

/// The family that a series of this name belongs to.
pub(crate) fn family(name: &str) -> &str {
    let histogram = |end| name.strip_suffix(end).filter(|name| name.ends_with("_seconds"));
    ["_bucket", "_sum", "_count"].iter().find_map(histogram).unwrap_or(name)
}

/// The name and the labels of a series.
fn parts(series: &str) -> (&str, BTreeSet<&str>) {
    let Some((name, labels)) = series.split_once('{') else { return (series, BTreeSet::new()) };
    let labels = labels.strip_suffix('}').unwrap();
    (name, labels.split(',').map(|label| label.trim()).filter(|label| !label.is_empty()).collect())
}
