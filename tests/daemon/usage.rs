//! What a worker uses is what it uses with all that it started.

use crate::common::{
    Daemon, Ports, eventually, fixture, kill_hard,
    metrics::{Metrics, with_admin},
    proc::{self, children},
};

/// More than a shell and a fixture have.
const MEMORY: u64 = 60_000_000;

/// The memory and the CPU time of the worker, as status and metrics show them.
fn usage(daemon: &Daemon) -> [(f64, f64); 2] {
    let worker = &daemon.workers("web")[0];
    let metrics = Metrics::of(daemon);
    let value = |name: &str| metrics.value(&format!("{name}{{service=\"web\",slot=\"0\"}}"));
    [
        (worker["resident_bytes"].as_f64().unwrap(), worker["cpu_seconds"].as_f64().unwrap()),
        (value("lbd_worker_resident_memory_bytes"), value("lbd_worker_cpu_seconds_total")),
    ]
}

#[test]
fn memory_and_cpu_time_are_those_of_the_tree_and_of_what_has_ended() {
    let ports = Ports::take(1);
    // A child that has ended, one in the same session that holds memory, one in a session of its own
    // that lives for ever, and the server behind a shell.
    let busy = "i=0; while [ $i -lt 400000 ]; do i=$((i+1)); done";
    let hold = format!("(head -c {MEMORY} /dev/zero; sleep 1000) | tail -c {MEMORY}");
    let script = format!("sh -c '{busy}'; {hold} & setsid sleep 1000 & {} http; true", fixture());
    let keys = format!("command = [\"sh\", \"-c\", {script:?}]");
    let daemon = Daemon::healthy(&with_admin(&ports.service(&keys)), 1);
    let pid = daemon.slot_pids()[0];
    let alone = proc::resident(pid) as f64;
    assert!(alone < MEMORY as f64 / 4.0, "{alone}");
    eventually("all memory counts", || {
        usage(&daemon).iter().all(|(memory, _)| *memory > MEMORY as f64)
    });
    // The loop takes longer than that on any machine, and none of it is the shell's own.
    let before = usage(&daemon);
    assert!(before.iter().all(|(_, cpu)| *cpu >= 0.1), "{before:?}");
    assert!(proc::cpu(pid).as_secs_f64() < 0.05);
    // What ends, whoever takes note of it, takes nothing away.
    for child in children(pid) {
        if proc::threads(child)[0].1 != "fixture" {
            kill_hard(child);
            let after = usage(&daemon);
            assert!(
                after.iter().zip(before).all(|((_, now), (_, then))| *now >= then),
                "{after:?}"
            );
        }
    }
    assert!(usage(&daemon).iter().all(|(memory, _)| *memory < MEMORY as f64));
}
