//! Computes what changed between two looks, for event streams. A full status of two hundred idle
//! workers is a hundred kilobytes, and the next one says the same.

use std::collections::HashMap;

use serde::Serialize;
use serde_json::{Map, Value};

use super::status::{Config, Service, Status, Worker};

/// How far a time span may be off before it is sent again, in seconds: spans are rounded to
/// milliseconds.
const OUT_OF_STEP: f64 = 0.01;
/// Changes of a worker's memory smaller than one part in this many are not sent.
const MEMORY_PART: u64 = 50;
/// The values that wander by themselves are sent once in this many looks; the workers take turns.
const TURNS: usize = 10;
/// A probe's duration is not sent again if it changed by less than this many seconds, or is less
/// than twice and more than half as long.
const PROBE_SECONDS: f64 = 0.002;

/// The changes between two looks that have the same services and slots.
///
/// A field that is present replaces the value sent before. An absent field is unchanged, except
/// that each `since_seconds` has grown by as much as `uptime_seconds`.
#[derive(Debug, Serialize)]
pub(super) struct News<'n> {
    uptime_seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<&'n Config>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    services: Vec<ServiceNews<'n>>,
}

/// A service with changes.
#[derive(Debug, Serialize)]
struct ServiceNews<'n> {
    name: &'n str,
    /// For each slot with changes: the changed fields, and `slot`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    workers: Vec<Map<String, Value>>,
    /// All replacements, if any changed: they are few and short-lived.
    #[serde(skip_serializing_if = "Option::is_none")]
    replacements: Option<&'n [Worker]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retiring: Option<&'n [Worker]>,
}

impl<'n> News<'n> {
    /// What changed from `told` to `now`; `None` if it is better to send `now` as a whole.
    pub(super) fn between(told: &Status, now: &'n Status) -> Option<Self> {
        let passed = now.uptime_seconds - told.uptime_seconds;
        let same = (told.pid, &told.version) == (now.pid, &now.version)
            && told.services.len() == now.services.len();
        let pairs = told.services.iter().zip(&now.services);
        if !same || !pairs.clone().all(|(told, now)| is_same(told, now)) {
            return None;
        }
        Some(Self {
            uptime_seconds: now.uptime_seconds,
            config: (told.config != now.config).then_some(&now.config),
            services: pairs
                .filter_map(|(told, now)| ServiceNews::between(told, now, passed))
                .collect(),
        })
    }
}

/// Whether two looks at a service have the same slots, and differ in nothing but the workers.
fn is_same(told: &Service, now: &Service) -> bool {
    // All fields are listed, so that a new one can't be forgotten here.
    let Service { name, listen, route, steering, balance, workers, replacements: _, retiring: _ } =
        told;
    (name, listen, route, steering, balance)
        == (&now.name, &now.listen, &now.route, &now.steering, &now.balance)
        && workers.len() == now.workers.len()
        && workers.iter().zip(&now.workers).all(|(told, now)| told.slot == now.slot)
}

impl<'n> ServiceNews<'n> {
    fn between(told: &Service, now: &'n Service, passed: f64) -> Option<Self> {
        let pairs = told.workers.iter().zip(&now.workers);
        let workers: Vec<_> =
            pairs.filter_map(|(told, now)| differences(told, now, passed)).collect();
        let list = |told: &[Worker], now: &'n [Worker]| {
            let same = told.len() == now.len()
                && told.iter().zip(now).all(|(told, now)| differences(told, now, passed).is_none());
            (!same).then_some(now)
        };
        let replacements = list(&told.replacements, &now.replacements);
        let retiring = list(&told.retiring, &now.retiring);
        let is_new = !workers.is_empty() || replacements.is_some() || retiring.is_some();
        is_new.then_some(Self { name: &now.name, workers, replacements, retiring })
    }
}

/// The changed fields of `now`, and its slot; `None` if nothing changed.
fn differences(told: &Worker, now: &Worker, passed: f64) -> Option<Map<String, Value>> {
    let mut expected = told.clone();
    if (told.since_seconds + passed - now.since_seconds).abs() < OUT_OF_STEP {
        expected.since_seconds = now.since_seconds;
    }
    // The guard is not sent.
    expected.guard = now.guard;
    if expected == *now {
        return None;
    }
    let fields = |worker: &Worker| match serde_json::to_value(worker) {
        Ok(Value::Object(fields)) => fields,
        // Fails only for maps whose keys are not strings, which there are none of.
        _ => Map::new(),
    };
    let (before, mut fields) = (fields(&expected), fields(now));
    fields.retain(|name, value| name == "slot" || before.get(name) != Some(value));
    Some(fields)
}

/// Keeps the values from `before` for changes that are not worth sending: a worker's memory, and
/// the duration of a probe with the same result as the one before. Both wander by themselves, on a
/// busy machine with each look. They are updated if they are far off and, for each worker, in one
/// of [`TURNS`] looks, counted by `look`.
pub(super) fn steady(now: &mut Status, before: &Status, look: usize) {
    type Key<'k> = (&'k str, u32, u64);
    let known: HashMap<Key<'_>, &Worker> = before
        .services
        .iter()
        .flat_map(|service| {
            service.all().map(|worker| ((&*service.name, worker.slot, worker.generation), worker))
        })
        .collect();
    let mut turn = look;
    for service in &mut now.services {
        let name = service.name.clone();
        for worker in service.all_mut() {
            turn = (turn + 1) % TURNS;
            let has_turn = turn == 0;
            let Some(before) = known.get(&(&*name, worker.slot, worker.generation)) else {
                continue;
            };
            if let (Some(now), Some(then)) = (&mut worker.resident_bytes, before.resident_bytes)
                && !(has_turn && now.abs_diff(then) > then / MEMORY_PART)
            {
                *now = then;
            }
            if let (Some(now), Some(then)) = (&mut worker.last_probe, &before.last_probe)
                && (now.ok, &now.error) == (then.ok, &then.error)
                && !(has_turn && is_far_off(now.seconds, then.seconds))
            {
                now.seconds = then.seconds;
            }
        }
    }
}

/// Whether the durations of two probes differ notably.
fn is_far_off(now: f64, then: f64) -> bool {
    (now - then).abs() > PROBE_SECONDS.max(now.min(then))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admin::{
        State,
        status::{Probe, Reload},
    };

    fn status(uptime: f64, slots: u32) -> Status {
        let worker = |slot| Worker {
            slot,
            port: Some(9000),
            pid: Some(7),
            generation: 1,
            state: State::Healthy,
            since_seconds: uptime - 1.0,
            drained: false,
            restarts: 0,
            last_exit: None,
            connections: Default::default(),
            bytes: Default::default(),
            guard: None,
            resident_bytes: Some(1_000_000),
            cpu_seconds: Some(0.5),
            last_probe: Some(Probe { ok: true, seconds: 0.0004, error: None }),
        };
        Status {
            version: "1".to_owned(),
            pid: 1,
            uptime_seconds: uptime,
            config: Config {
                path: None,
                loaded_at: String::new(),
                last_reload: Reload { ok: true, at: String::new(), error: None },
            },
            services: vec![Service {
                name: "web".to_owned(),
                listen: vec!["127.0.0.1:80".to_owned()],
                route: "proxy".to_owned(),
                steering: None,
                balance: "round-robin".to_owned(),
                workers: (0..slots).map(worker).collect(),
                replacements: Vec::new(),
                retiring: Vec::new(),
            }],
        }
    }

    fn news(told: &Status, now: &Status) -> Value {
        serde_json::to_value(News::between(told, now).unwrap()).unwrap()
    }

    #[test]
    fn time_that_passes_is_no_news() {
        assert_eq!(news(&status(5.0, 2), &status(6.0, 2)), json!({ "uptime_seconds": 6.0 }));
    }

    #[test]
    fn only_the_fields_that_differ_are_told() {
        let mut now = status(6.0, 2);
        let worker = &mut now.services[0].workers[1];
        (worker.pid, worker.state, worker.since_seconds) = (None, State::Backoff, 0.1);
        let retiring = now.services[0].workers[0].clone();
        let rows = json!([{ "slot": 1, "pid": null, "state": "backoff", "since_seconds": 0.1 }]);
        let expected =
            json!({ "uptime_seconds": 6.0, "services": [{ "name": "web", "workers": rows }] });
        assert_eq!(news(&status(5.0, 2), &now), expected);
        now.services[0].retiring.push(retiring);
        assert_eq!(
            news(&status(5.0, 2), &now)["services"][0]["retiring"].as_array().unwrap().len(),
            1
        );
    }

    #[test]
    fn other_services_or_slots_are_told_as_a_whole() {
        let told = status(5.0, 2);
        assert!(News::between(&told, &status(6.0, 3)).is_none());
        let mut now = status(6.0, 2);
        now.services[0].listen.clear();
        assert!(News::between(&told, &now).is_none());
        now.services.clear();
        assert!(News::between(&told, &now).is_none());
    }

    #[test]
    fn what_wanders_is_told_where_it_is_far_off_and_in_turn() {
        let before = status(5.0, 1);
        let seen = |memory, probe, look| {
            let mut now = status(6.0, 1);
            let worker = &mut now.services[0].workers[0];
            worker.resident_bytes = Some(memory);
            worker.last_probe.as_mut().unwrap().seconds = probe;
            steady(&mut now, &before, look);
            let worker = &now.services[0].workers[0];
            (worker.resident_bytes.unwrap(), worker.last_probe.as_ref().unwrap().seconds)
        };
        assert_eq!(seen(1_020_000, 0.0022, TURNS - 1), (1_000_000, 0.0004));
        assert_eq!(seen(1_020_001, 0.01, TURNS - 1), (1_020_001, 0.01));
        assert_eq!(seen(1_020_001, 0.01, 0), (1_000_000, 0.0004), "another's turn");
        let mut failed = status(6.0, 1);
        let probe = Probe { ok: false, seconds: 1.0, error: Some("refused".to_owned()) };
        failed.services[0].workers[0].last_probe = Some(probe.clone());
        steady(&mut failed, &before, 0);
        assert_eq!(failed.services[0].workers[0].last_probe, Some(probe), "at once");
    }
}
