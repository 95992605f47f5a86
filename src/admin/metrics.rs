//! The content of `/metrics`, in Prometheus' text format.
//!
//! A page is generated for each request, from the daemon's [`Snapshot`] and from `/proc`. There is
//! no registry, so the series of a removed slot disappear with it, and the number of series depends
//! on the configuration alone. Unknown values are left out.

mod page;
mod process;

use std::{
    collections::HashMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    Process,
    status::State,
    usage::{Tree, Trees},
};
use crate::histogram::Durations;
use page::{Labels, Page};
pub(super) use process::CpuTimes;
use process::{Own, booted};

/// The media type of the text format (Prometheus, "Exposition formats").
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// How often something happened, by reason.
pub type Reasons = Vec<(&'static str, u64)>;

/// The daemon's counters at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// How reloads went.
    pub reloads: Reloads,
    /// Lines that the log had no room for.
    pub dropped_log_lines: u64,
    /// The services, in the order of the configuration.
    pub services: Vec<Service>,
}

/// How reloads went. The start does not count as a reload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reloads {
    /// Reloads after which everything ran with the new settings.
    pub ok: u64,
    /// Reloads whose file was refused; nothing changed.
    pub refused: u64,
    /// Reloads whose file was accepted, but whose new workers failed, or which another reload
    /// overtook.
    pub failed: u64,
    /// Whether the last reload was neither refused nor failed; before the first reload, the same
    /// for the start.
    pub last_ok: bool,
    /// When the settings now in force were read.
    pub succeeded_at: SystemTime,
}

/// One service.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Connections that wait for a worker now.
    pub waiting: u64,
    /// Connections that ever had to wait for a worker.
    pub held: u64,
    /// How long connections waited for a worker.
    pub hold: Durations,
    /// Connections that a worker accepted after another worker had not.
    pub retried: u64,
    /// Connections taken over from the accept queue of a worker that was gone or hung.
    pub rescued: u64,
    /// Connections that no worker accepted.
    pub failures: Reasons,
    /// The slots, by number.
    pub slots: Vec<Slot>,
}

/// One slot. Sums cover all workers that it ever had.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Slot {
    /// Its number.
    pub number: u32,
    /// The state of its current worker.
    pub state: Option<State>,
    /// The program's pid of its current worker.
    pub pid: Option<i32>,
    /// The guard's pid of its current worker.
    pub guard: Option<i32>,
    /// The current worker's resident memory, if it is measured for a limit.
    pub resident: Option<u64>,
    /// The guards of all its workers, including those being started or stopped.
    pub guards: Vec<i32>,
    /// Workers started to replace one that ended unexpectedly or could not be started.
    pub restarts: u64,
    /// Consecutive failures of its workers.
    pub failures_in_a_row: u32,
    /// The time until the next worker is started, if the slot is vacant.
    pub backoff: Duration,
    /// Ended workers, by cause.
    pub exits: Reasons,
    /// Connections held now; `None`, here and below, if unknown.
    pub active: Option<u64>,
    /// Connections waiting in its worker's own accept queue.
    pub queued: Option<u64>,
    /// Connections accepted.
    pub total: Option<u64>,
    /// Bytes to clients.
    pub sent: Option<u64>,
    /// Bytes from clients.
    pub received: Option<u64>,
    /// Failed connects.
    pub connect_failures: Reasons,
    /// Accepted connections that did not end cleanly.
    pub failures: Reasons,
    /// How long connects took.
    pub connect: Durations,
    /// How long connections lasted.
    pub duration: Durations,
    /// Probes that passed.
    pub probes_passed: u64,
    /// Probes that failed.
    pub probes_failed: u64,
    /// How long probes took.
    pub probe: Durations,
}

/// The page: `snapshot`, and data from `/proc` about its processes and lbd itself.
pub(super) fn page(snapshot: &Snapshot, trees: &Trees, cpu: &mut CpuTimes) -> String {
    let slots = Slots::of(snapshot);
    let mut page = Page::default();
    connections(&mut page, snapshot, &slots);
    workers(&mut page, &slots);
    let booted = booted();
    let guards: Vec<i32> = slots.0.iter().flat_map(|(_, slot)| slot.guards.clone()).collect();
    processes(&mut page, &slots, booted, &trees.look(&guards), cpu);
    probes(&mut page, &slots);
    configuration(&mut page, snapshot);
    own(&mut page, booted);
    page.text()
}

fn connections(page: &mut Page, snapshot: &Snapshot, slots: &Slots<'_>) {
    let services = || snapshot.services.iter().map(|service| (of_service(service), service));
    page.counter(
        "lbd_connections_total",
        "Connections that a worker took.",
        slots.each_known(|slot| slot.total),
    );
    page.gauge(
        "lbd_connections_active",
        "Connections that a worker has now, those being made included.",
        slots.each_known(|slot| slot.active),
    );
    page.gauge(
        "lbd_connections_queued",
        "Connections that wait in a worker's own accept queue, with route = \"direct\".",
        slots.each_known(|slot| slot.queued),
    );
    page.gauge(
        "lbd_connections_waiting",
        "Connections that wait for a worker now.",
        services().map(|(labels, service)| (labels, service.waiting as f64)),
    );
    page.counter(
        "lbd_connections_held_total",
        "Connections that had to wait for a worker.",
        services().map(|(labels, service)| (labels, service.held as f64)),
    );
    page.counter(
        "lbd_connections_retried_total",
        "Connections that a worker took after another had not.",
        services().map(|(labels, service)| (labels, service.retried as f64)),
    );
    page.counter(
        "lbd_connections_rescued_total",
        "Connections taken over from the accept queue of a worker that was gone or hung.",
        services().map(|(labels, service)| (labels, service.rescued as f64)),
    );
    let unserved = services().flat_map(|(labels, service)| {
        let labels = with(&labels, "slot", String::new());
        by("reason", &labels, &service.failures)
    });
    page.counter(
        "lbd_connections_failed_total",
        "Connections that did not end well; slot is empty where no worker took them.",
        slots.each_by("reason", |slot| &slot.failures).chain(unserved),
    );
    page.counter(
        "lbd_connect_failures_total",
        "Connects to a worker that failed; the connection goes to another worker.",
        slots.each_by("reason", |slot| &slot.connect_failures),
    );
    page.counter(
        "lbd_sent_bytes_total",
        "Bytes from workers to clients.",
        slots.each_known(|slot| slot.sent),
    );
    page.counter(
        "lbd_received_bytes_total",
        "Bytes from clients to workers.",
        slots.each_known(|slot| slot.received),
    );
    page.histogram(
        "lbd_connection_duration_seconds",
        "How long connections lasted, from acceptance to the end.",
        Duration::MAX,
        slots.each(|slot| slot.duration),
    );
    page.histogram(
        "lbd_connect_duration_seconds",
        "How long workers took to take a connection; zero where the answer came at once.",
        Duration::from_secs(10),
        slots.each(|slot| slot.connect),
    );
    page.histogram(
        "lbd_hold_duration_seconds",
        "How long connections waited for a worker.",
        Duration::from_secs(60),
        services().map(|(labels, service)| (labels, service.hold)),
    );
}

fn workers(page: &mut Page, slots: &Slots<'_>) {
    page.gauge(
        "lbd_worker_up",
        "Whether the worker is healthy.",
        slots.each(|slot| f64::from(slot.state == Some(State::Healthy))),
    );
    let states = slots.0.iter().flat_map(|(labels, slot)| {
        State::ALL.map(|state| {
            let labels = with(labels, "state", state.to_string());
            (labels, f64::from(slot.state == Some(state)))
        })
    });
    page.gauge("lbd_worker_state", "1 for the state that the worker is in, 0 for others.", states);
    page.counter(
        "lbd_worker_restarts_total",
        "Workers started in the slot in the place of one that ended unasked, or could not be started.",
        slots.each(|slot| slot.restarts as f64),
    );
    page.counter(
        "lbd_worker_exits_total",
        "Workers of the slot that are no more, by cause.",
        slots.each_by("cause", |slot| &slot.exits),
    );
    page.gauge(
        "lbd_worker_backoff_seconds",
        "Time until the slot is filled again; zero where it is, or is about to be.",
        slots.each(|slot| slot.backoff.as_secs_f64()),
    );
    page.gauge(
        "lbd_worker_consecutive_failures",
        "How often in a row a worker of the slot failed.",
        slots.each(|slot| f64::from(slot.failures_in_a_row)),
    );
}

fn processes(
    page: &mut Page,
    slots: &Slots<'_>,
    booted: Option<f64>,
    trees: &HashMap<i32, Tree>,
    cpu: &mut CpuTimes,
) {
    let look = |slot: &Slot| slot.pid.and_then(Process::look).filter(|process| !process.ended);
    let processes: Vec<_> =
        slots.each(look).filter_map(|(labels, process)| Some((labels, process?))).collect();
    let start_time = |(labels, process): &(Labels, Process)| {
        Some((labels.clone(), process.start_time(booted?)?))
    };
    page.gauge(
        "lbd_worker_start_time_seconds",
        "When the worker was started, since the Unix epoch.",
        processes.iter().filter_map(start_time),
    );
    page.gauge(
        "lbd_worker_resident_memory_bytes",
        "Memory that the worker has in RAM, with all that it has started.",
        slots.each_known(|slot| {
            let tree =
                slot.guard.filter(|_| slot.pid.is_some()).and_then(|guard| trees.get(&guard));
            slot.resident.or(tree.map(|tree| tree.resident_bytes))
        }),
    );
    let guards = slots.0.iter().map(|(labels, slot)| (labels.clone(), &slot.guards[..]));
    page.counter(
        "lbd_worker_cpu_seconds_total",
        "CPU time, user and system, of the slot's workers with all that they started.",
        cpu.look(guards, trees),
    );
}

fn probes(page: &mut Page, slots: &Slots<'_>) {
    let results = slots.0.iter().flat_map(|(labels, slot)| {
        let results = [("pass", slot.probes_passed), ("fail", slot.probes_failed)];
        by("result", labels, &results)
    });
    page.counter("lbd_probes_total", "Probes of the slot's workers, by result.", results);
    page.histogram(
        "lbd_probe_duration_seconds",
        "How long probes took.",
        Duration::from_secs(10),
        slots.each(|slot| slot.probe),
    );
}

fn configuration(page: &mut Page, snapshot: &Snapshot) {
    let Reloads { ok, refused, failed, last_ok, succeeded_at } = snapshot.reloads;
    let results = [("ok", ok), ("refused", refused), ("failed", failed)];
    page.counter(
        "lbd_config_reloads_total",
        "Reloads that came to an end, by result.",
        by("result", &vec![], &results),
    );
    page.gauge(
        "lbd_config_last_reload_successful",
        "Whether the last reload was not refused and has not failed; before the first, 1.",
        [(vec![], f64::from(last_ok))],
    );
    let since_epoch = succeeded_at.duration_since(UNIX_EPOCH).unwrap_or_default();
    page.gauge(
        "lbd_config_last_reload_success_timestamp_seconds",
        "When the settings in force were read, since the Unix epoch.",
        [(vec![], since_epoch.as_secs_f64())],
    );
    page.counter(
        "lbd_log_lines_dropped_total",
        "Lines that the log had no room for, or could not write.",
        [(vec![], snapshot.dropped_log_lines as f64)],
    );
}

fn own(page: &mut Page, booted: Option<f64>) {
    let build = vec![
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("commit", env!("LBD_COMMIT").to_owned()),
    ];
    page.gauge("lbd_build_info", "1, with what lbd was built from as labels.", [(build, 1.0)]);
    let own = Own::look(booted);
    let one = |value: Option<f64>| value.map(|value| (vec![], value));
    page.counter(
        "process_cpu_seconds_total",
        "CPU time, user and system, that lbd used.",
        one(own.cpu_seconds),
    );
    page.gauge("process_open_fds", "Descriptors that lbd has open.", one(own.open_fds));
    page.gauge("process_max_fds", "Descriptors that lbd may have open.", one(own.max_fds));
    page.gauge(
        "process_virtual_memory_bytes",
        "Virtual memory of lbd.",
        one(own.virtual_memory_bytes),
    );
    page.gauge(
        "process_resident_memory_bytes",
        "Memory that lbd has in RAM.",
        one(own.resident_memory_bytes),
    );
    page.gauge(
        "process_start_time_seconds",
        "When lbd was started, since the Unix epoch.",
        one(own.start_time_seconds),
    );
    page.gauge("process_threads", "Threads of lbd.", one(own.threads));
}

/// All slots, with their labels.
struct Slots<'a>(Vec<(Labels, &'a Slot)>);

impl<'a> Slots<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        let slots = snapshot.services.iter().flat_map(|service| {
            let labels = of_service(service);
            let slots = service.slots.iter();
            slots.map(move |slot| (with(&labels, "slot", slot.number.to_string()), slot))
        });
        Self(slots.collect())
    }

    fn each<T>(&self, value: impl Fn(&'a Slot) -> T) -> impl Iterator<Item = (Labels, T)> {
        self.0.iter().map(move |(labels, slot)| (labels.clone(), value(slot)))
    }

    fn each_known(
        &self,
        value: impl Fn(&'a Slot) -> Option<u64>,
    ) -> impl Iterator<Item = (Labels, f64)> {
        self.each(value).filter_map(|(labels, value)| Some((labels, value? as f64)))
    }

    fn each_by(
        &self,
        label: &'static str,
        reasons: impl Fn(&'a Slot) -> &'a Reasons,
    ) -> impl Iterator<Item = (Labels, f64)> {
        self.0.iter().flat_map(move |(labels, slot)| by(label, labels, reasons(slot)))
    }
}

fn of_service(service: &Service) -> Labels {
    vec![("service", service.name.clone())]
}

/// One series per reason.
fn by(label: &'static str, labels: &Labels, reasons: &[(&str, u64)]) -> Vec<(Labels, f64)> {
    let series =
        |&(reason, count): &(&str, u64)| (with(labels, label, reason.to_owned()), count as f64);
    reasons.iter().map(series).collect()
}

fn with(labels: &Labels, label: &'static str, value: String) -> Labels {
    labels.iter().cloned().chain([(label, value)]).collect()
}
