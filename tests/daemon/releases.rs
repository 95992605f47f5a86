//! Releases that are switched by a link: `current` leads to the one that runs, and is moved to the next.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Output},
};

use crate::common::{
    Daemon, Mark, Ports,
    client::{get, turns},
    fixture, kill_hard,
};
use tempfile::TempDir;

const LBD: &str = env!("CARGO_BIN_EXE_lbd");

/// A release whose workers answer `/argv` with its number.
fn release(folder: &Path, number: u32, ports: &Ports) {
    let release = folder.join(format!("releases/{number}"));
    fs::create_dir_all(&release).unwrap();
    fs::write(release.join("number"), number.to_string()).unwrap();
    let script = format!("exec {} http $(cat number)", fixture());
    let keys = format!("command = [\"sh\", \"-c\", {script:?}]");
    fs::write(release.join("lb.toml"), ports.service(&keys)).unwrap();
}

/// Has `current` lead to this one, at once.
fn switch(folder: &Path, number: u32) {
    let new = folder.join("new");
    symlink(format!("releases/{number}"), &new).unwrap();
    fs::rename(&new, folder.join("current")).unwrap();
}

/// `lbd`, from a folder that a shell calls `pwd`.
fn from(folder: &Path, pwd: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(LBD);
    command.args(arguments).current_dir(folder).env("PWD", pwd);
    command
}

fn done(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    output
}

#[test]
fn a_moved_link_takes_everything_along() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().to_owned();
    release(&base, 1, &ports);
    release(&base, 2, &ports);
    switch(&base, 1);
    let current = base.join("current");
    let home = tempfile::tempdir().unwrap();
    let daemon = run_in(home, &current, LBD);
    let number = || get(ports.address(), "/argv");
    assert_eq!(number(), "http\n1");
    let here = |arguments: &[&str]| from(&current, &current, arguments);
    let status: serde_json::Value =
        serde_json::from_slice(&done(here(&["status", "--json"])).stdout).unwrap();
    assert_eq!(status["config"]["path"], current.join("lb.toml").to_str().unwrap());
    // To the next one: its workers run in it, and its file is the one that is read.
    switch(&base, 2);
    done(here(&["status"]));
    done(here(&["restart"]));
    assert_eq!(number(), "http\n2");
    // A shell that has been there since before means the link, too.
    done(from(&base.join("releases/1"), &current, &["status"]));
    fs::remove_dir_all(base.join("releases/1")).unwrap();
    done(here(&["restart"]));
    done(here(&["reload"]));
    let since = daemon.now();
    kill_hard(daemon.worker_pid(ports.worker(0)));
    daemon.wait_healthy(since, 1);
    assert_eq!(number(), "http\n2");
    // Three workers of one file: what is new in it comes by a reload.
    let more = Ports::take(2);
    release(&base, 3, &more);
    switch(&base, 3);
    done(here(&["reload"]));
    assert_eq!(get(more.address(), "/argv"), "http\n3");
    done(here(&["stop"]));
    drop(daemon);
}

/// A daemon that was started in `folder` by a shell that calls it so, with this command.
fn run_in(home: TempDir, folder: &Path, command: &str) -> Daemon {
    let script = format!("cd {} && exec {command}", folder.display());
    let mut command = Command::new("sh");
    command.args(["-c", &script]);
    let daemon = Daemon::run(home, command);
    daemon.wait_healthy(Mark::START, 1);
    daemon
}

#[test]
fn a_shell_that_is_wrong_about_where_it_is_is_not_believed() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().canonicalize().unwrap();
    release(&base, 1, &ports);
    release(&base, 2, &ports);
    let (one, two) = (base.join("releases/1"), base.join("releases/2"));
    let check = done(from(&one, &two, &["check"]));
    assert!(check.stdout.starts_with(b"web: "));
    let home = tempfile::tempdir().unwrap();
    let lbd = format!("env PWD={} {LBD} --config lb.toml", two.display());
    let mut daemon = run_in(home, &one, &lbd);
    assert_eq!(get(ports.address(), "/argv"), "http\n1");
    // By either name of the folder, and from elsewhere.
    done(from(&one, &one, &["status"]));
    symlink(&one, base.join("link")).unwrap();
    done(from(&base.join("link"), &base.join("link"), &["status"]));
    let file = one.join("lb.toml");
    done(from(Path::new("/"), Path::new("/"), &["status", "--config", file.to_str().unwrap()]));
    assert_eq!(turns(ports.address(), 1), ports.all());
    done(from(&one, &two, &["stop"]));
    daemon.wait_stopped();
}

#[test]
fn a_folder_that_is_gone_is_no_riddle() {
    let base = tempfile::tempdir().unwrap();
    let gone = base.path().join("gone");
    fs::create_dir(&gone).unwrap();
    let script = "rmdir \"$PWD\"; unset PWD; \"$0\" check; \"$0\" status";
    let output = Command::new("sh").args(["-c", script, LBD]).current_dir(&gone).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let expected = "the current folder is gone; go to one that is there, or write the whole path";
    assert_eq!(said.matches(expected).count(), 2, "{said}");
}
