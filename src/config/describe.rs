//! A service in one line, for `lbd check`.

use std::num::NonZeroU32;

use bytesize::ByteSize;

use super::{Listen, Probe, Program, Route, Service, Slots, SocketMode, StatusSet, values};

/// What lbd would run: name, addresses, workers, program, route, balance, probe and limits.
#[must_use]
pub fn describe(service: &Service) -> String {
    let Service { name, listen, worker, routing, health, .. } = service;
    let listen = joined(listen.iter().map(Listen::to_string));
    let host = worker.host;
    let workers = match &service.slots {
        _ if worker.route() == Route::Direct => "on sockets of their own there".to_owned(),
        Slots::Ports(ports) => {
            let ports = joined(ports.iter().map(u16::to_string));
            format!("on {host}, ports {ports}")
        }
        Slots::Count(_) if worker.socket == SocketMode::Unix => "on unix sockets".to_owned(),
        Slots::Count(_) => format!("on free ports of {host}"),
    };
    let count = service.slots.count();
    let plural = if count == 1 { "worker" } else { "workers" };
    let program = match &worker.program {
        Program::Root(folder) => format!("root {}", folder.display()),
        Program::Command(argv) => {
            let words: Vec<String> = argv.iter().map(|word| shown(word)).collect();
            format!("command {}", words.join(" "))
        }
    };
    let probe = match &health.probe {
        Probe::Tcp => "tcp".to_owned(),
        Probe::Http { path, expect, .. } => format!("http {path} expecting {}", statuses(expect)),
    };
    let proxy_protocol = worker.proxy_protocol.map(|version| format!("; proxy-protocol {version}"));
    let proxy_protocol = proxy_protocol.unwrap_or_default();
    let interval = humantime::format_duration(health.interval);
    let limits = limits(service);
    format!(
        "{name}: listen {listen}; {count} {plural} {workers}; {program}; route {}{proxy_protocol}; balance {}; probe {probe} every {interval}{limits}",
        worker.route(),
        routing.balance
    )
}

/// The per-worker limits that are set.
fn limits(service: &Service) -> String {
    let Service { worker, routing, limits, .. } = service;
    let number =
        |name: &str, number: Option<NonZeroU32>| number.map(|number| format!("{name} {number}"));
    let memory = limits.memory.map(|bytes| format!("memory {}", ByteSize::b(bytes.get())));
    let max_age = limits.max_age.map(humantime::format_duration);
    let set: Vec<String> = [
        memory,
        number("open-files", worker.open_files),
        number("processes", worker.processes),
        max_age.map(|age| format!("max-age {age}")),
        number("max-connections", routing.worker_connections),
    ]
    .into_iter()
    .flatten()
    .collect();
    if set.is_empty() { String::new() } else { format!("; limits {}", set.join(", ")) }
}

fn joined(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(", ")
}

fn statuses(set: &StatusSet) -> String {
    joined(set.0.iter().map(|&(low, high)| match low == high {
        true => low.to_string(),
        false => format!("{low}-{high}"),
    }))
}

/// A word of argv, quoted if it would not read as one word.
fn shown(word: &str) -> String {
    let plain = |c: char| !c.is_whitespace() && !c.is_control() && c != '"' && c != '\\';
    if word.chars().all(plain) { word.to_owned() } else { values::quoted(word) }
}
