//! `lbd` as the first process of a container: whatever loses its parent is its child.

use std::{fs, process::Command};

use crate::common::{
    Daemon, Mark, Ports,
    client::turns,
    command, eventually, kill_hard,
    proc::{children, parent, threads},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A new process namespace, whose first process is what is run in it; `None`, with the reason on
/// standard error, where this machine does not allow one.
fn namespace() -> Option<Command> {
    let mut unshare = Command::new("unshare");
    unshare.args(["--fork", "--pid", "--mount-proc", "--kill-child"]);
    match unshare.arg("true").output() {
        Ok(output) if output.status.success() => {}
        other => {
            eprintln!("skipped: no process namespace to be had here: {other:?}");
            return None;
        }
    }
    let mut unshare = Command::new("unshare");
    unshare.args(["--fork", "--pid", "--mount-proc", "--kill-child"]);
    Some(unshare)
}

fn is_zombie(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
}

#[test]
fn orphans_are_reaped_and_sigterm_stops() {
    let Some(mut unshare) = namespace() else { return };
    let ports = Ports::take(2);
    let folder = tempfile::tempdir().unwrap();
    let keys = command(&["http", "--fork", "--daemonize"]);
    fs::write(folder.path().join("lb.toml"), ports.service(&keys)).unwrap();
    unshare.args([env!("CARGO_BIN_EXE_lbd"), "--config", "lb.toml"]);
    let mut daemon = Daemon::run(folder, unshare);
    daemon.wait_healthy(Mark::START, 2);
    // The first process does nothing but reap, and pass signals on.
    let [first] = children(daemon.pid()).try_into().unwrap();
    let [lbd] = children(first).try_into().unwrap();
    // Those two, the template; and of each worker its guard, itself, its child and its orphan.
    let all_run = || eventually("all run", || tree(first).len() == 11);
    all_run();
    assert_eq!(turns(ports.address(), 4).len(), 4);

    // Without its guard, a tree has no parent but lbd.
    let is_guard = |pid: &i32| threads(*pid)[0].1 == "lbd-guard";
    let guard = children(lbd).into_iter().find(is_guard).unwrap();
    let old = tree(guard);
    assert_eq!(old.len(), 4);
    let since = daemon.now();
    kill_hard(guard);
    daemon.wait_healthy(since, 1);
    eventually("the old tree is gone", || old.iter().all(|pid| !exists(*pid)));
    all_run();

    // What is nobody's is the first process's, and does not stay a zombie.
    let mut entered = Command::new("nsenter");
    entered.args(["--target", &first.to_string(), "--pid"]);
    entered.args(["sh", "-c", "sh -c 'exit 3' & exec sleep 0"]);
    assert!(entered.status().unwrap().success());
    eventually("nothing more", || tree(first).len() == 11);
    assert!(!tree(first).into_iter().any(is_zombie));

    kill(Pid::from_raw(first), Signal::SIGTERM).unwrap();
    daemon.wait_stopped();
}

#[test]
fn the_end_of_lbd_is_the_end_of_all() {
    let Some(mut unshare) = namespace() else { return };
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let keys = command(&["http", "--fork", "--daemonize"]);
    fs::write(folder.path().join("lb.toml"), ports.service(&keys)).unwrap();
    unshare.args([env!("CARGO_BIN_EXE_lbd"), "--config", "lb.toml"]);
    let mut daemon = Daemon::run(folder, unshare);
    daemon.wait_healthy(Mark::START, 1);
    let [first] = children(daemon.pid()).try_into().unwrap();
    let [lbd] = children(first).try_into().unwrap();
    kill_hard(lbd);
    // As a shell says it: 128 + SIGKILL.
    assert_eq!(daemon.wait_exit().code(), Some(137));
    daemon.assert_nothing_runs();
}

/// A process, not merely what is left of it until somebody asks.
fn exists(pid: i32) -> bool {
    fs::exists(format!("/proc/{pid}")).unwrap()
}

/// A process and everything below it.
fn tree(root: i32) -> Vec<i32> {
    let entries = fs::read_dir("/proc").unwrap();
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let below = |pid: &i32| {
        let mut pid = *pid;
        while pid > 1 && pid != root {
            pid = parent(pid).unwrap_or(0);
        }
        pid == root
    };
    pids.filter(below).collect()
}
