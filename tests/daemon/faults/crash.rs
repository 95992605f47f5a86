//! Workers that can't be started or don't stay: told, retried ever more slowly, and nobody else's
//! business.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    Daemon, Line, Mark, Ports,
    client::{Load, turns},
    command, eventually, kill_hard, named,
    proc::cpu,
};

/// `web`, which is well, and `bad` with these keys.
fn beside(web: &Ports, bad: &Ports, keys: &str) -> String {
    format!("{}{}", web.service(&command(&["http"])), named("bad", &bad.service(keys)))
}

#[test]
fn a_crash_loop_slows_down_and_costs_nobody_anything() {
    let (web, bad) = (Ports::take(2), Ports::take(3));
    let keys = "command = [\"sh\", \"-c\", \"exit 7\"]\n\
                restart = { min-delay = \"50ms\", max-delay = \"400ms\" }";
    let daemon = Daemon::start(&beside(&web, &bad, keys));
    daemon.wait_healthy(Mark::START, 2);
    let pids = daemon.slot_pids();
    let exits = daemon.wait_many(Mark::START, "worker exited", &[("slot", "0")], 3);
    for (line, least) in exits.iter().zip([0.05, 0.1, 0.2]) {
        let delay: f64 = line.number("restart_in");
        assert!((least..=0.4).contains(&delay), "{}", line.raw);
    }
    // At the longest delay by now: three workers, two and a half starts a second each at most.
    let (before, begun) = (cpu(daemon.pid()), Instant::now());
    thread::sleep(Duration::from_secs(3));
    let (used, window) = (cpu(daemon.pid()) - before, begun.elapsed());
    assert!(used < window / 20, "{used:?} of {window:?}");
    for worker in daemon.workers("bad") {
        let restarts = worker["restarts"].as_u64().unwrap();
        // 50 + 100 + 200 ms, then 320 to 400 ms; and never giving up.
        assert!((4..=16).contains(&restarts), "{worker}");
        assert_eq!(worker["last_exit"], "exit status 7");
    }
    assert_eq!(daemon.slot_pids(), pids);
    assert_eq!(turns(web.address(), 4), [web.all(), web.all()].concat());
}

#[test]
fn a_crash_loop_does_not_flood_the_log() {
    let (web, bad) = (Ports::take(2), Ports::take(1));
    let folder = tempfile::tempdir().unwrap();
    let status = folder.path().join("status");
    fs::write(&status, "7").unwrap();
    let keys = "command = [\"sh\", \"-c\", \"exit $(cat status)\"]\n\
                restart = { min-delay = \"1ms\", max-delay = \"5ms\" }";
    let daemon = Daemon::start_in(folder, &beside(&web, &bad, keys));
    daemon.wait_healthy(Mark::START, 2);
    let pids = daemon.slot_pids();
    let load = Load::start(web.address(), "/");
    eventually("many crashes", || daemon.workers("bad")[0]["restarts"].as_u64() > Some(40));
    // Another reason is told at once, with what was folded.
    fs::write(&status, "8").unwrap();
    let other = [("service", "bad"), ("status", "exit status 8")];
    let line = daemon.wait(Mark::START, "worker exited", &other);
    load.end_without_failure();
    let crashes: usize = line.number("failures");
    let lines = daemon.said(Mark::START, "worker exited");
    let lines: Vec<_> = lines.iter().take_while(|l| l.raw != line.raw).collect();
    assert!(lines.iter().all(|line| line.get("status") == Some("exit status 7")), "{lines:?}");
    assert!(lines.len() <= 12, "{} lines for {crashes} crashes", lines.len());
    let folded = |line: &Line| line.get("folded").map_or(0, |folded| folded.parse().unwrap());
    let told: usize = lines.iter().map(|line| 1 + folded(line)).sum();
    assert_eq!(told + folded(&line) + 1, crashes, "each crash is a line or in one");
    let started = daemon.said(Mark::START, "worker started");
    let started = started.iter().filter(|line| line.get("service") == Some("bad")).count();
    assert!(started < 20, "{started} starts told");
    assert_eq!(daemon.slot_pids(), pids);
}

#[test]
fn what_cannot_be_started_is_named_once_in_log_and_status() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str, mode: u32| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    file("denied", "#!/bin/sh\n", 0o644);
    file("interpreter", "#!/no/such/interpreter\n", 0o755);
    fs::create_dir(folder.path().join("gone")).unwrap();
    let good = format!("{}\nsocket = \"inherit\"", command(&["http"]));
    let cases = [
        ("missing", "command = [\"no-such-program-anywhere\"]", "no-such-program-anywhere"),
        ("denied", "command = [\"./denied\"]", "permission denied"),
        ("interpreter", "command = [\"./interpreter\"]", "./interpreter"),
        ("folder", &format!("{good}\ndirectory = \"gone\""), "/gone"),
        ("user", &format!("{good}\nuser = \"no-such-user\""), "unknown user \"no-such-user\""),
    ];
    let web = Ports::take(2);
    let others: Vec<_> = cases.iter().map(|_| Ports::take(1)).collect();
    let services: String = cases
        .iter()
        .zip(&others)
        .map(|((name, keys, _), ports)| {
            let restart = "restart = { min-delay = \"20s\", reset-after = \"1ms\" }";
            named(name, &ports.service(&format!("{keys}\n{restart}")))
        })
        .collect();
    let config = format!("{}{services}", web.service(&command(&["http"])));
    let daemon = Daemon::start_in(folder, &config);
    daemon.wait_healthy(Mark::START, 3);
    // Some go missing only later.
    fs::remove_dir(daemon.path("gone")).unwrap();
    let healthy = daemon.wait(Mark::START, "worker healthy", &[("service", "folder")]);
    let for_long = Duration::from_millis(5);
    eventually("healthy for a while", || healthy.read.unwrap().elapsed() > for_long);
    kill_hard(healthy.pid());

    for (name, _, reason) in cases {
        let here = [("service", name)];
        let line = daemon.wait(Mark::START, "worker not started", &here);
        assert_eq!(line.level, "ERROR");
        assert!(line.get("error").unwrap().contains(reason), "{}", line.raw);
        assert!(line.number::<f64>("restart_in") > 10.0, "{}", line.raw);
        let worker = &daemon.workers(name)[0];
        assert_eq!(worker["state"], "backoff", "{worker}");
        assert!(worker["last_exit"].as_str().unwrap().contains(reason), "{worker}");
        let lines = daemon.log.lines(Mark::START).into_iter();
        let errors = lines.filter(|l| l.level == "ERROR" && l.get("service") == Some(name));
        assert_eq!(errors.count(), 1);
    }
    assert_eq!(turns(web.address(), 4), [web.all(), web.all()].concat());
}
