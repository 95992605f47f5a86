//! What lbd tells the service manager, message by message.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use crate::common::{
    Daemon, Mark, Ports,
    client::{KeepAlive, get},
    command, eventually,
    frozen::Frozen,
    kill_hard,
    manager::{Manager, Message},
    named, proc, stays,
};
use nix::{
    sys::signal::{
        Signal::{SIGHUP, SIGKILL, SIGTERM},
        kill,
    },
    unistd::Pid,
};

const BUDGET: Duration = Duration::from_secs(15);

fn is(name: &'static str) -> impl Fn(&Message) -> bool {
    move |message| message.get(name) == Some("1")
}

#[test]
fn ready_is_said_once_every_service_has_a_healthy_worker_and_what_is_missing_before() {
    let (web, api) = (Ports::take(2), Ports::take(1));
    let manager = Manager::new();
    let gate = manager.folder.path().join("gate");
    let gated = command(&["http", "--gate", gate.to_str().unwrap()]);
    // Long enough for the sentence in between to be sent.
    let web_keys = format!("{}\nrestart.min-delay = \"1s\"", command(&["http"]));
    let config = web.service(&web_keys) + &named("api", &api.service(&gated));
    let daemon = manager.start(&config);
    let waits = "starting, 2 of 3 workers healthy; api has none of 1";
    let (before, _) = manager.wait(0, waits, |message| message.says(waits));
    assert!(manager.messages(0).iter().all(|message| message.get("READY").is_none()));
    // It may take a while: the manager is asked for that time.
    let extension =
        manager.messages(0).iter().find_map(|m| m.get("EXTEND_TIMEOUT_USEC").map(str::to_owned));
    assert_eq!(extension.unwrap(), BUDGET.as_micros().to_string());

    fs::write(gate, "").unwrap();
    let (at, ready) = manager.wait_ready(before);
    assert_eq!(ready.names(), ["READY", "STATUS"], "in one message");
    assert_eq!(ready.get("STATUS"), Some("serving, 3 of 3 workers healthy"));
    daemon.wait(Mark::START, "ready", &[]);
    // And never again by itself.
    kill_hard(daemon.worker_pid(web.worker(0)));
    let (down, _) = manager.wait(at, "2 of 3", |message| message.says("2 of 3 workers healthy"));
    manager.wait(down, "3 of 3", |message| message.says("serving, 3 of 3 workers healthy"));
    assert!(manager.messages(at).iter().all(|message| message.get("READY").is_none()));
}

#[test]
fn a_service_without_a_worker_is_named_with_the_reason_and_ready_is_not_said() {
    let ports = Ports::take(1);
    let manager = Manager::new();
    let daemon = manager.start(&ports.service("command = [\"/no/such/program\"]"));
    let (_, message) = manager.wait(0, "the reason", |message| message.says("no such"));
    let status = message.get("STATUS").unwrap();
    assert!(status.starts_with("starting, 0 of 1 worker healthy; web has none of 1 ("), "{status}");
    // A reload in that state does not make it ready either, nor take the start for done.
    let since = daemon.now();
    daemon.signal(SIGHUP);
    daemon.wait(since, "reloaded", &[]);
    daemon.signal(SIGTERM);
    manager.wait(0, "STOPPING=1", is("STOPPING"));
    let all = manager.messages(0);
    let never = |name: &str| all.iter().all(|message| message.get(name).is_none());
    assert!(never("READY") && never("RELOADING"), "{all:#?}");
}

#[test]
fn a_reload_is_told_with_its_time_and_ended_by_ready_also_where_it_is_refused() {
    let ports = Ports::take(1);
    let manager = Manager::new();
    let config = ports.service(&command(&["http"]));
    let daemon = manager.start(&config);
    let (mut at, _) = manager.wait_ready(0);
    for (config, outcome) in [
        (config.clone(), "reloaded"),
        ("x = 1\n".to_owned(), "reload refused"),
        (config, "reloaded"),
    ] {
        let monotonic = || {
            let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
            Duration::from(now)
        };
        let before = monotonic();
        assert_eq!(daemon.reload(&config).message, outcome);
        let (reloading, message) = manager.wait(at, "RELOADING=1", is("RELOADING"));
        assert_eq!(message.names(), ["RELOADING", "MONOTONIC_USEC", "STATUS"], "in one message");
        let time = message.get("MONOTONIC_USEC").unwrap().parse().unwrap();
        let time = Duration::from_micros(time);
        assert!(before <= time + Duration::from_micros(1) && time <= monotonic(), "{time:?}");
        let (ready, message) = manager.wait_ready(reloading);
        let refused =
            message.says("healthy; the last reload failed: ") && message.says("no service; add");
        assert_eq!(refused, outcome == "reload refused", "{message:?}");
        at = ready;
    }
}

#[test]
fn a_stop_is_told_and_asks_for_time_while_connections_drain() {
    let ports = Ports::take(1);
    let manager = Manager::new();
    let mut daemon = manager.start(&ports.service(&command(&["http"])));
    let (ready, _) = manager.wait_ready(0);
    let mut held = KeepAlive::new(ports.address());
    held.get("/").unwrap();
    let begun = Instant::now();
    daemon.signal(SIGTERM);
    let (stopping, message) = manager.wait(ready, "STOPPING=1", is("STOPPING"));
    assert_eq!(message.names(), ["STOPPING", "EXTEND_TIMEOUT_USEC", "STATUS"], "in one message");
    assert_eq!(message.get("STATUS"), Some("stopping, waiting for 1 connection and 1 worker"));
    // And again before that time is over, for as long as it takes.
    let mut asked = begun;
    let mut at = stopping;
    for _ in 0..2 {
        let (next, more) =
            manager.wait(at, "more time", |m| m.get("EXTEND_TIMEOUT_USEC").is_some());
        assert!(more.read - asked < BUDGET / 2, "{:?}", more.read - asked);
        (at, asked) = (next, more.read);
    }
    drop(held);
    daemon.wait_stopped();
    let last = manager.messages(stopping);
    let stopped: Vec<_> = last.iter().filter(|m| m.get("STOPPING").is_some()).collect();
    assert!(stopped.is_empty(), "said twice: {stopped:?}");
}

#[test]
fn a_failed_start_says_why() {
    let ports = Ports::take(1);
    let manager = Manager::new();
    let _taken = std::net::TcpListener::bind(ports.address()).unwrap();
    let mut daemon = manager.start(&ports.service(&command(&["http"])));
    assert_eq!(daemon.wait_exit().code(), Some(1));
    let (_, message) = manager.wait(0, "why", |message| message.says("Address already in use"));
    assert_eq!(message.names(), ["STATUS"]);
}

#[test]
fn only_another_sentence_is_sent_and_not_ten_in_a_second() {
    let ports = Ports::take(4);
    let manager = Manager::new();
    let daemon = manager.start(&ports.service(&format!(
        "{}\nrestart.min-delay = \"1ms\"\nrestart.reset-after = \"1ms\"",
        command(&["http"])
    )));
    let (ready, _) = manager.wait_ready(0);
    let until = Instant::now() + Duration::from_secs(2);
    let mut slot = 0;
    while Instant::now() < until {
        let pid = daemon.worker_pid(ports.worker(slot % 4));
        // It may have gone by itself since.
        let _ = kill(Pid::from_raw(pid), SIGKILL);
        slot += 1;
        thread::sleep(Duration::from_millis(10));
    }
    let told = manager.messages(ready);
    let sentences: Vec<_> = told.iter().filter_map(|message| message.get("STATUS")).collect();
    assert!((2..=21).contains(&sentences.len()), "{}: {sentences:#?}", sentences.len());
    assert!(sentences.windows(2).all(|pair| pair[0] != pair[1]), "{sentences:#?}");
}

#[test]
fn a_manager_that_takes_nothing_in_holds_up_nobody_and_misses_no_state() {
    let ports = Ports::take(1);
    let (manager, socket) = Manager::deaf();
    let mut command_line = manager.command();
    // Enough to fill what a socket holds (`net.unix.max_dgram_qlen`) many times over.
    command_line.env("WATCHDOG_USEC", "4000");
    let config = ports.service(&command(&["http"]));
    let daemon = Manager::run(command_line, &config);
    daemon.wait(Mark::START, "ready", &[]);
    for _ in 0..3 {
        daemon.must_reload(&config);
    }
    for _ in 0..100 {
        get(ports.address(), "/");
        thread::sleep(Duration::from_millis(1));
    }
    manager.listen(socket);
    let mut at = manager.wait_ready(0).0;
    for _ in 0..3 {
        at = manager.wait(at, "RELOADING=1", is("RELOADING")).0;
        at = manager.wait_ready(at).0;
    }
}

/// With the watchdog fed, until the thread that `choose` picks is frozen; and again once it isn't.
fn is_fed_only_while_it_runs(choose: impl Fn(&Daemon) -> i32) {
    const TIMEOUT: Duration = Duration::from_millis(1200);
    let ports = Ports::take(1);
    let manager = Manager::new();
    let mut command_line = manager.command();
    command_line.env("WATCHDOG_USEC", TIMEOUT.as_micros().to_string());
    let daemon = Manager::run(command_line, &ports.service(&command(&["http"])));
    let (ready, _) = manager.wait_ready(0);
    // Idle, and well within the time.
    let fed = is("WATCHDOG");
    let (mut at, mut last) = manager.wait(ready, "WATCHDOG=1", &fed);
    for _ in 0..5 {
        let (next, message) = manager.wait(at, "WATCHDOG=1", &fed);
        assert!(message.read - last.read < TIMEOUT, "{:?}", message.read - last.read);
        (at, last) = (next, message);
    }
    let frozen = Frozen::thread(choose(&daemon));
    let at = manager.now();
    // One look may have been on its way, and one counts what was done before.
    stays("it is not fed", TIMEOUT * 2, || {
        manager.messages(at).iter().filter(|message| fed(message)).count() <= 1
    });
    let at = manager.now();
    frozen.thaw();
    manager.wait(at, "WATCHDOG=1", &fed);
    get(ports.address(), "/");
}

#[test]
fn the_watchdog_is_not_fed_while_a_data_thread_hangs() {
    is_fed_only_while_it_runs(|daemon| {
        let threads = proc::threads(daemon.pid());
        let data: Vec<_> =
            threads.iter().filter(|(_, name)| name.starts_with("lbd-data-")).collect();
        // The last of them: that each counts shows in that this one does.
        data.last().unwrap().0
    });
}

#[test]
fn the_watchdog_is_not_fed_while_the_main_thread_hangs() {
    is_fed_only_while_it_runs(Daemon::pid);
}

#[test]
fn a_hanging_data_thread_is_told_in_the_log_once() {
    let ports = Ports::take(1);
    let manager = Manager::new();
    let mut command_line = manager.command();
    command_line.env("WATCHDOG_USEC", "100000");
    let daemon = Manager::run(command_line, &ports.service(&command(&["http"])));
    manager.wait_ready(0);
    let threads = proc::threads(daemon.pid());
    let (tid, _) = threads.iter().find(|(_, name)| name == "lbd-data-0").unwrap();
    let frozen = Frozen::thread(*tid);
    let hangs = "a data thread makes no progress, the watchdog is not fed";
    daemon.wait(Mark::START, hangs, &[]);
    let once = || daemon.said(Mark::START, hangs).len() == 1;
    stays("it is told once", Duration::from_millis(200), once);
    frozen.thaw();
    let at = manager.now();
    manager.wait(at, "WATCHDOG=1", is("WATCHDOG"));
}

#[test]
fn a_watchdog_for_another_process_is_none() {
    let ports = Ports::take(1);
    let manager = Manager::new();
    let mut command_line = manager.command();
    command_line.env("WATCHDOG_USEC", "1000").env("WATCHDOG_PID", "1");
    let daemon = Manager::run(command_line, &ports.service(&command(&["http"])));
    let (ready, _) = manager.wait_ready(0);
    kill_hard(daemon.worker_pid(ports.worker(0)));
    manager.wait(ready, "another sentence", |message| message.get("STATUS").is_some());
    eventually("the worker is back", || manager.messages(ready).iter().any(|m| m.says("1 of 1")));
    assert!(manager.messages(0).iter().all(|message| message.get("WATCHDOG").is_none()));
}
