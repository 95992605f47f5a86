//! What is in `contrib/` and `docs/metrics.md` is true of a real page of `/metrics`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use crate::common::{
    Daemon, Ports, command,
    metrics::{Family, Metrics, family, with_admin},
    promtool::promtool,
};
use serde_json::{Value, json};

/// What Prometheus gives to each series by itself.
const TARGET: [&str; 2] = ["job", "instance"];

fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(source(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn dashboard() -> Value {
    serde_json::from_str(&read("contrib/grafana/lbd.json")).unwrap()
}

/// A page on which nothing is missing: of a worker that runs.
fn page() -> Metrics {
    let ports = Ports::take(1);
    let config = with_admin(&ports.service(&command(&["http"])));
    Metrics::of(&Daemon::healthy(&config, 1))
}

/// All values of this key, however deep.
fn values<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a Value>) {
    match value {
        Value::Object(map) => {
            found.extend(map.get(key));
            map.values().for_each(|value| values(value, key, found));
        }
        Value::Array(all) => all.iter().for_each(|value| values(value, key, found)),
        _ => {}
    }
}

/// The expressions of the dashboard, and what its variables are taken from.
fn expressions(dashboard: &Value) -> Vec<String> {
    let mut found = Vec::new();
    values(dashboard, "expr", &mut found);
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let definitions = variables.iter().filter_map(|variable| variable["definition"].as_str());
    let selectors = definitions.map(|definition| {
        let inner = definition.strip_prefix("label_values(").unwrap().strip_suffix(')').unwrap();
        inner.rsplit_once(", ").unwrap().0
    });
    let expressions = found.iter().map(|value| value.as_str().unwrap());
    expressions.chain(selectors).map(str::to_owned).collect()
}

/// The metrics that are named in `text`, each with the labels that it is selected by.
fn selectors(text: &str) -> Vec<(&str, Vec<&str>)> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_word) {
        let word = &rest[at..];
        let (word, after) = word.split_at(word.find(|c| !is_word(c)).unwrap_or(word.len()));
        if ["lbd_", "process_"].iter().any(|prefix| word.starts_with(prefix)) {
            let matchers =
                after.strip_prefix('{').map_or("", |inner| inner.split('}').next().unwrap());
            let labels = matchers.split("\",").filter_map(|matcher| matcher.split('=').next());
            let labels = labels.map(|label| label.trim_end_matches('!').trim());
            found.push((word, labels.filter(|label| !label.is_empty()).collect()));
        }
        rest = after;
    }
    found
}

#[test]
fn every_metric_and_label_in_contrib_is_on_the_page() {
    let families = page().families;
    let mut used = BTreeSet::new();
    let mut check = |place: &str, text: &str| {
        for (name, labels) in selectors(text) {
            let known = families.get(family(name));
            let known = known.unwrap_or_else(|| panic!("{place}: there is no {name}"));
            for label in labels {
                let is_there = known.labels.iter().any(|known| known == label)
                    || TARGET.contains(&label)
                    || (label == "le" && name.ends_with("_bucket"));
                assert!(is_there, "{place}: {name} has no {label}");
            }
            used.insert(family(name).to_owned());
        }
    };
    let dashboard = dashboard();
    for expression in expressions(&dashboard) {
        check("the dashboard", &expression);
    }
    for file in ["contrib/prometheus/lbd.rules.yml", "contrib/prometheus/lbd.test.yml"] {
        check(file, &read(file));
    }
    assert!(used.len() > 25, "{used:?}");
}

#[test]
fn promtool_takes_every_rule_and_every_expression() {
    let rules = source("contrib/prometheus");
    let said = promtool(&rules, &["check", "rules", "lbd.rules.yml"], "");
    if said.is_none() {
        return;
    }
    promtool(&rules, &["test", "rules", "lbd.test.yml"], "");

    // What Grafana puts in for its variables. YAML is read as JSON too.
    let rule = |expression: &String| {
        let expression = expression.replace("$__rate_interval", "1m");
        json!({ "record": "lbd:panel", "expr": expression })
    };
    let all: Vec<_> = expressions(&dashboard()).iter().map(rule).collect();
    let folder = tempfile::tempdir().unwrap();
    let groups = json!({ "groups": [{ "name": "dashboard", "rules": all }] });
    fs::write(folder.path().join("rules.yml"), groups.to_string()).unwrap();
    // A name for all of them is to it as good as a rule that is there twice.
    let said = promtool(folder.path(), &["check", "rules", "--lint=none", "rules.yml"], "");
    assert!(said.unwrap().contains(&format!("SUCCESS: {} rules found", all.len())));
}

#[test]
fn every_alert_is_shown_to_fire() {
    let (rules, tests) =
        (read("contrib/prometheus/lbd.rules.yml"), read("contrib/prometheus/lbd.test.yml"));
    let alerts: Vec<_> =
        rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    for alert in alerts {
        let named = [format!("alertname: {alert}\n"), format!("alertname=\"{alert}\"")];
        assert!(named.iter().any(|name| tests.contains(name)), "{alert} is not tested");
    }
}

#[test]
fn the_dashboard_runs_on_any_data_source() {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut sources = Vec::new();
    values(&dashboard, "datasource", &mut sources);
    for source in sources {
        let is_grafana = source["uid"] == "-- Grafana --";
        assert!(is_grafana || source["uid"] == "${datasource}", "{source}");
    }
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<_> =
        variables.iter().map(|variable| variable["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["datasource", "job", "instance", "service", "slot"]);
    for expression in expressions(&dashboard) {
        let known = |rest: &&str| {
            names.iter().chain(&["__rate_interval"]).any(|name| rest.starts_with(name))
        };
        assert!(expression.split('$').skip(1).all(|rest| known(&rest)), "{expression}");
    }

    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
    let mut taken = BTreeSet::new();
    for panel in panels {
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap());
        assert!(x + w <= 24, "{}", panel["title"]);
        for place in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(taken.insert(place), "{} is over another", panel["title"]);
        }
    }
}

/// The table of `docs/metrics.md`, made from the page.
fn table(families: &BTreeMap<String, Family>) -> String {
    let row = |(name, family): (&String, &Family)| {
        let labels: Vec<_> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let labels = if labels.is_empty() { "none".to_owned() } else { labels.join(", ") };
        format!("| `{name}` | {} | {labels} | {} |\n", family.kind, family.help)
    };
    let rows: String = families.iter().map(row).collect();
    format!("| name | type | labels | meaning |\n| --- | --- | --- | --- |\n{rows}")
}

#[test]
fn what_is_documented_is_the_page() {
    let (documented, page) = (read("docs/metrics.md"), page());
    let table = table(&page.families);
    assert!(documented.contains(&table), "docs/metrics.md should have this table:\n{table}");

    // By metric and label, as the second table has them.
    let mut values: BTreeMap<(&str, &str), BTreeSet<&str>> = BTreeMap::new();
    let mut of = ("", "");
    for row in documented.lines().skip_while(|line| !line.starts_with("| label | of")).skip(2) {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let word = |cell: usize| cells[cell].trim_matches('`');
        if !cells[2].is_empty() {
            of = (word(2), word(1));
        }
        let cell = cells[3].split(", ").map(|value| value.trim_matches('`'));
        values.entry(of).or_default().extend(cell.filter(|value| !value.is_empty()));
    }
    let mut checked = 0;
    for ((metric, label), values) in values.iter().filter(|(_, values)| !values.is_empty()) {
        let there = page.label_values(metric, label);
        assert_eq!(
            there.iter().map(|value| &**value).collect::<BTreeSet<_>>(),
            *values,
            "{metric}"
        );
        checked += 1;
    }
    assert_eq!(checked, 6);

    let count = |wanted: &dyn Fn(&str) -> bool| page.count(wanted);
    let of_slot = count(&|series| series.contains("slot=\"0\""));
    let of_service = count(&|series| series.contains("service=")) - of_slot;
    let others = count(&|_| true) - of_slot - of_service;
    let sentence = format!("{of_slot} a slot, {of_service} a service and {others} of lbd itself");
    assert!(documented.contains(&sentence), "it is {sentence}");
}
