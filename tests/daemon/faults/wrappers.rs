//! A worker that is asked to stop ends when its tree has ended, not when the first process of it
//! has: behind `npm start` or a shell, that is not the one that answers.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{Duration, Instant},
};

use crate::common::{
    self, Daemon, Mark, Ports,
    client::{KeepAlive, turns},
    eventually, fixture, kill_hard,
    needs::{APPS, has},
    proc::{children, is_alive},
    stays,
};
use nix::sys::signal::Signal::SIGTERM;
use tempfile::TempDir;

/// The worker ends its own connections, and has all the time for it.
const SIGNAL: &str = "stop.drain = \"signal\"\nstop.timeout = \"50s\"";

/// More than any of these stops takes, and less than the `stop.timeout` above.
const PROMPTLY: Duration = Duration::from_secs(20);

/// As long as nothing may be heard of an end that is none yet.
const QUIET: Duration = Duration::from_millis(300);

/// A worker that finishes its requests, as a shell would be told to run it.
fn server(folder: &TempDir) -> String {
    format!("{} http --finish {}", fixture(), folder.path().join("finished").display())
}

fn shell(script: &str) -> String {
    format!("command = [\"sh\", \"-c\", {script:?}]")
}

/// A request that is answered when the file `answer` is there.
fn slow_request(daemon: &Daemon, ports: &Ports) -> KeepAlive {
    let mut client = KeepAlive::new(ports.address());
    client.get("/").unwrap();
    client.send(&format!("/when{}", daemon.path("answer").display())).unwrap();
    eventually("the worker is at it", || daemon.path("answer.asked").exists());
    client
}

fn exit_of(daemon: &Daemon, since: Mark) -> String {
    daemon.wait(since, "worker exited", &[]).get("status").unwrap().to_owned()
}

/// The processes of the worker in the first slot, its guard left out: known while the first of them
/// runs.
fn tree(daemon: &Daemon) -> Vec<i32> {
    let mut all = vec![daemon.slot_pids()[0]];
    let mut at = 0;
    while at < all.len() {
        all.extend(children(all[at]));
        at += 1;
    }
    all
}

/// Stops a daemon whose worker is `keys` while a request is on its way, and makes sure that it is
/// answered, and that the worker has done what it does at its end.
fn a_stop_loses_nothing(folder: TempDir, ports: &Ports, keys: &str) -> Daemon {
    let mut daemon = Daemon::start_in(folder, &ports.service(&format!("{keys}\n{SIGNAL}")));
    daemon.wait_healthy(Mark::START, 1);
    let tree = tree(&daemon);
    assert!(tree.len() > 1, "the server is the first process: {tree:?}");
    let mut client = slow_request(&daemon, ports);
    let begun = Instant::now();
    daemon.signal(SIGTERM);
    eventually("the first process has ended", || !is_alive(tree[0]));
    // The guard looks several times, and lbd would have been told long ago.
    stays("nothing is told", QUIET, || daemon.said(Mark::START, "worker exited").is_empty());
    assert!(!daemon.path("finished").exists());
    fs::write(daemon.path("answer"), "").unwrap();
    assert_eq!(client.answer().unwrap().0, 200);
    daemon.wait_stopped();
    assert!(begun.elapsed() < PROMPTLY, "{:?}", begun.elapsed());
    assert!(daemon.path("finished").exists(), "its last work is done");
    assert!(daemon.said(Mark::START, "worker killed").is_empty());
    let lines = daemon.said(Mark::START, "connection");
    let ends: Vec<_> = lines.iter().map(|line| line.get("end")).collect();
    assert!(ends.iter().all(|end| *end == Some("closed")), "{ends:?}");
    daemon
}

#[test]
fn behind_a_shell_the_request_is_answered() {
    let (folder, ports) = (tempfile::tempdir().unwrap(), Ports::take(1));
    let keys = shell(&format!("{}; true", server(&folder)));
    let daemon = a_stop_loses_nothing(folder, &ports, &keys);
    assert_eq!(exit_of(&daemon, Mark::START), "killed by SIGTERM", "as the first process ended");
}

#[test]
fn behind_a_script_without_exec_the_request_is_answered() {
    let (folder, ports) = (tempfile::tempdir().unwrap(), Ports::take(1));
    let script = folder.path().join("start");
    fs::write(&script, format!("#!/bin/sh\n{}\n", server(&folder))).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    a_stop_loses_nothing(folder, &ports, "command = [\"./start\"]");
}

/// A server in node that ends when its connections have, and says so in a file.
const SERVER_JS: &str = r"
const fs = require('fs');
const server = require('http').createServer(async (request, response) => {
  const file = request.url.startsWith('/when') && request.url.slice(5);
  if (file) fs.writeFileSync(file + '.asked', '');
  while (file && !fs.existsSync(file)) await new Promise((done) => setTimeout(done, 5));
  response.setHeader('Connection', 'close');
  response.end();
});
server.listen(process.env.PORT, '127.0.0.1');
process.on('SIGTERM', () => server.close(() => {
  fs.writeFileSync('finished', '');
  process.exit(0);
}));
";

fn with_server_js() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("server.js"), SERVER_JS).unwrap();
    let package =
        "{\"name\":\"app\",\"version\":\"1.0.0\",\"scripts\":{\"start\":\"node server.js\"}}";
    fs::write(folder.path().join("package.json"), package).unwrap();
    folder
}

/// As `slow_request`, of a server that closes each connection.
fn slow_request_of_node(daemon: &Daemon, ports: &Ports) -> KeepAlive {
    let mut client = KeepAlive::new(ports.address());
    client.send(&format!("/when{}", daemon.path("answer").display())).unwrap();
    eventually("the worker is at it", || daemon.path("answer.asked").exists());
    client
}

#[test]
fn behind_npm_start_the_request_is_answered() {
    if !has(APPS, "npm", "npm") {
        return;
    }
    let ports = Ports::take(1);
    // What npm keeps, it keeps in this folder.
    let keys = format!("command = [\"npm\", \"start\"]\nenv.HOME = \".\"\n{SIGNAL}");
    let mut daemon = Daemon::start_in(with_server_js(), &ports.service(&keys));
    daemon.wait_healthy(Mark::START, 1);
    let mut client = slow_request_of_node(&daemon, &ports);
    eventually("npm, its shell or node", || tree(&daemon).len() > 1);
    let tree = tree(&daemon);
    let begun = Instant::now();
    daemon.signal(SIGTERM);
    eventually("npm has ended", || !is_alive(tree[0]));
    stays("nothing is told", QUIET, || daemon.said(Mark::START, "worker exited").is_empty());
    fs::write(daemon.path("answer"), "").unwrap();
    assert_eq!(client.answer().unwrap().0, 200);
    daemon.wait_stopped();
    assert!(begun.elapsed() < PROMPTLY, "{:?}", begun.elapsed());
    assert!(daemon.path("finished").exists());
    assert!(daemon.said(Mark::START, "worker killed").is_empty());
}

#[test]
fn a_rolling_restart_of_node_behind_a_shell_answers_everybody() {
    if !has(APPS, "node", "nodejs") {
        return;
    }
    let ports = Ports::take(1);
    let keys = format!("command = [\"sh\", \"-c\", \"node server.js; true\"]\n{SIGNAL}");
    let config = ports.service(&keys).replace(&format!("ports = {:?}", ports.all()), "workers = 1");
    let mut daemon = Daemon::start_in(with_server_js(), &config);
    daemon.wait_healthy(Mark::START, 1);
    let (old, since) = (tree(&daemon), daemon.now());
    let mut client = slow_request_of_node(&daemon, &ports);
    // Waits for the new one only.
    assert_eq!(daemon.lbd(&["restart"]).status.code(), Some(0));
    eventually("the old shell has ended", || !is_alive(old[0]));
    assert!(daemon.said(since, "worker exited").is_empty());
    // Somebody else is served meanwhile.
    let mut other = KeepAlive::new(ports.address());
    assert_eq!(other.get("/").unwrap().0, 200);
    fs::write(daemon.path("answer"), "").unwrap();
    assert_eq!(client.answer().unwrap().0, 200);
    daemon.wait(since, "worker exited", &[]);
    assert!(!old.iter().any(|pid| is_alive(*pid)), "{old:?}");
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
}

#[test]
fn a_cluster_primary_that_ends_its_own_children_is_told_alone() {
    if !has(APPS, "node", "nodejs") {
        return;
    }
    let folder = with_server_js();
    let primary = "
        const cluster = require('cluster');
        if (cluster.isPrimary) {
          cluster.fork();
          cluster.fork();
          // Called when they listen no more, while one still answers.
          process.on('SIGTERM', () => cluster.disconnect(() => process.exit(7)));
        } else {
          require('./server.js');
          process.removeAllListeners('SIGTERM');
        }";
    fs::write(folder.path().join("cluster.js"), primary).unwrap();
    let ports = Ports::take(1);
    let keys = format!("command = [\"node\", \"cluster.js\"]\n{SIGNAL}\nstop.to = \"main\"");
    let mut daemon = Daemon::start_in(folder, &ports.service(&keys));
    daemon.wait_healthy(Mark::START, 1);
    let mut client = slow_request_of_node(&daemon, &ports);
    let primary = daemon.slot_pids()[0];
    daemon.signal(SIGTERM);
    eventually("the primary has ended", || !is_alive(primary));
    stays("nothing is told", QUIET, || daemon.said(Mark::START, "worker exited").is_empty());
    fs::write(daemon.path("answer"), "").unwrap();
    assert_eq!(client.answer().unwrap().0, 200);
    daemon.wait_stopped();
    assert_eq!(exit_of(&daemon, Mark::START), "exit status 7");
}

#[test]
fn what_a_program_that_was_told_alone_has_not_told_is_told_before_it_is_killed() {
    let (folder, ports) = (tempfile::tempdir().unwrap(), Ports::take(1));
    // The server is in the shell's group, and knows of nothing before the shell ends.
    let script = format!("{} & trap 'touch told; exit 3' TERM; wait", server(&folder));
    let stop = "stop.drain = \"signal\"\nstop.timeout = \"4s\"\nstop.to = \"main\"";
    let keys = format!("{}\n{stop}", shell(&script));
    let mut daemon = Daemon::start_in(folder, &ports.service(&keys));
    daemon.wait_healthy(Mark::START, 1);
    let begun = Instant::now();
    daemon.signal(SIGTERM);
    eventually("the shell was told", || daemon.path("told").exists());
    daemon.wait_stopped();
    assert!(daemon.path("finished").exists());
    assert_eq!(exit_of(&daemon, Mark::START), "exit status 3");
    assert!(begun.elapsed() > Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(daemon.said(Mark::START, "worker killed").is_empty());
}

/// Stops a worker that is a shell around a server and `helper`; how long that took.
fn stop_with_helper(helper: &str, keys: &str) -> (Daemon, Duration) {
    let (folder, ports) = (tempfile::tempdir().unwrap(), Ports::take(1));
    let script = format!("{helper} & {}; true", server(&folder));
    let keys = format!("{}\nstop.drain = \"signal\"\n{keys}", shell(&script));
    let mut daemon = Daemon::start_in(folder, &ports.service(&keys));
    daemon.wait_healthy(Mark::START, 1);
    // lbd, guard, shell, server and helper.
    eventually("all run", || daemon.processes().len() == 5);
    let begun = Instant::now();
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    let took = begun.elapsed();
    assert!(daemon.path("finished").exists());
    assert!(took < PROMPTLY, "{took:?}");
    (daemon, took)
}

#[test]
fn a_helper_in_a_session_of_its_own_costs_no_timeout() {
    let helper = format!("setsid {} silent --finish helped", fixture());
    let (daemon, _) = stop_with_helper(&helper, "stop.timeout = \"50s\"");
    assert!(daemon.path("helped").exists(), "it was asked");
    assert!(daemon.said(Mark::START, "worker killed").is_empty());
}

#[test]
fn a_helper_that_ignores_the_signal_costs_two_seconds_or_the_timeout() {
    let deaf = format!("setsid {} silent --ignore-term", fixture());
    let (daemon, took) = stop_with_helper(&deaf, "stop.timeout = \"50s\"");
    assert!(took > Duration::from_millis(1900), "{took:?}");
    assert!(daemon.said(Mark::START, "worker killed").is_empty());
    let (daemon, _) = stop_with_helper(&deaf, "stop.timeout = \"200ms\"");
    assert_eq!(daemon.said(Mark::START, "worker killed").len(), 1, "before two seconds");
}

#[test]
fn a_tree_that_needs_longer_than_its_timeout_is_killed_then() {
    let (folder, ports) = (tempfile::tempdir().unwrap(), Ports::take(1));
    let keys = shell(&format!("{}; true", server(&folder)));
    let keys = format!("{keys}\nstop.drain = \"signal\"\nstop.timeout = \"700ms\"");
    let mut daemon = Daemon::start_in(folder, &ports.service(&keys));
    daemon.wait_healthy(Mark::START, 1);
    let mut client = slow_request(&daemon, &ports);
    let begun = Instant::now();
    daemon.signal(SIGTERM);
    assert!(client.answer().is_err());
    daemon.wait_stopped();
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(700) && took < PROMPTLY, "{took:?}");
    assert_eq!(daemon.said(Mark::START, "worker killed").len(), 1);
    assert!(!daemon.path("finished").exists());
}

#[test]
fn a_wrapper_that_ends_unasked_takes_the_rest_along_at_once() {
    let (folder, ports) = (tempfile::tempdir().unwrap(), Ports::take(1));
    let keys = shell(&format!("{}; true", server(&folder)));
    let daemon = Daemon::start_in(folder, &ports.service(&format!("{keys}\n{SIGNAL}")));
    daemon.wait_healthy(Mark::START, 1);
    let (old, since) = (tree(&daemon), daemon.now());
    kill_hard(old[0]);
    let line = daemon.wait(since, "worker exited", &[]);
    assert_eq!(line.get("status"), Some("killed by SIGKILL"));
    daemon.wait_healthy(since, 1);
    assert!(!old.iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists()), "{old:?}");
    assert_eq!(turns(ports.address(), 2), [ports.worker(0); 2]);
    assert!(!daemon.path("finished").exists());
}

#[test]
fn what_is_stopped_is_continued_to_be_asked() {
    let (folder, ports) = (tempfile::tempdir().unwrap(), Ports::take(1));
    let keys = shell(&format!("{}; true", server(&folder)));
    let mut daemon = Daemon::start_in(folder, &ports.service(&format!("{keys}\n{SIGNAL}")));
    daemon.wait_healthy(Mark::START, 1);
    tree(&daemon).iter().rev().for_each(|pid| common::freeze(*pid));
    let begun = Instant::now();
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert!(begun.elapsed() < PROMPTLY, "{:?}", begun.elapsed());
    assert!(daemon.path("finished").exists());
}
