//! Whatever ends, and however: nothing that a worker ever started is left.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    process::Command,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    self, Daemon, Mark, Ports, SetAtEnd,
    client::{KeepAlive, turns},
    command, eventually, freeze, kill_hard, named, needs,
    proc::{children, parent},
};
use nix::{
    sys::signal::Signal,
    unistd::{User, geteuid},
};

/// Deaf to SIGTERM, with children that have left its session, its group and its parentage.
fn stubborn() -> String {
    format!(
        "{}\nstop.timeout = \"200ms\"",
        command(&["http", "--ignore-term", "--fork", "--daemonize"])
    )
}

/// Of each such worker: its guard, itself, one in another session, one that is nobody's child.
const EACH: usize = 4;

#[test]
fn a_stubborn_tree_is_gone_after_a_restart_and_after_a_stop() {
    let ports = Ports::take(2);
    let keys = format!("{}\nrollout.order = \"stop-first\"", stubborn());
    let mut daemon = Daemon::healthy(&ports.service(&keys), 2);
    eventually("all run", || daemon.processes().len() == 1 + 2 * EACH);
    let before = daemon.processes();
    assert_eq!(daemon.lbd(&["restart"]).status.code(), Some(0));
    // No waiting: the successor on a port is not started before the last of them is gone.
    let after = daemon.processes();
    let left: Vec<_> = after.iter().filter(|pid| before.contains(pid)).collect();
    assert_eq!(left, [&daemon.pid()], "of {before:?}");
    assert_eq!(turns(ports.address(), 2).len(), 2);
    assert_eq!(daemon.said(Mark::START, "worker killed").len(), 2);
    daemon.signal(Signal::SIGTERM);
    daemon.wait_stopped();
}

#[test]
fn a_tree_is_gone_and_replaced_when_its_guard_is_killed() {
    let ports = Ports::take(2);
    let daemon = Daemon::healthy(&ports.service(&stubborn()), 2);
    eventually("all run", || daemon.processes().len() == 1 + 2 * EACH);
    let (before, pids) = (daemon.processes(), daemon.slot_pids());
    let since = daemon.now();
    let guard = parent(pids[0]).unwrap();
    assert_eq!(parent(guard), Some(daemon.pid()));
    kill_hard(guard);
    daemon.wait(since, "worker exited", &[("pid", &pids[0].to_string())]);
    daemon.wait_healthy(since, 1);
    eventually("only the other is left of them", || {
        let now = daemon.processes();
        now.len() == 1 + 2 * EACH && now.iter().filter(|p| before.contains(p)).count() == 1 + EACH
    });
    assert_eq!(daemon.slot_pids()[1], pids[1]);
    assert_eq!(turns(ports.address(), 4).len(), 4);
}

#[test]
fn lbd_killed_ten_times_under_load_leaves_nothing_and_starts_again() {
    let (web, job) = (Ports::take(2), Ports::take(1));
    // Where it may, one runs as somebody else: a change of user resets what a parent's death does.
    let user = if geteuid().is_root() { "user = \"nobody\"\n" } else { "" };
    let job_keys = format!(
        "command = [\"sh\", \"-c\", \"setsid sleep 1000 & exec sleep 1000\"]\n\
         socket = \"inherit\"\n{user}"
    );
    let config = format!("{}{}", web.service(&stubborn()), named("job", &job.service(&job_keys)));
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let _stop = SetAtEnd(&stop);
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // While there is no daemon, nobody answers.
                    let Ok(stream) = TcpStream::connect(web.address()) else { continue };
                    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
                    if KeepAlive::over(stream).get("/").is_ok() {
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        for round in 0..10 {
            // The job accepts nothing, and is not healthy ever.
            let daemon = Daemon::healthy(&config, 2);
            let before = answered.load(Ordering::Relaxed);
            eventually("answers", || answered.load(Ordering::Relaxed) > before + 20);
            eventually("all run", || daemon.processes().len() == 1 + 2 * EACH + 3);
            let begun = Instant::now();
            kill_hard(daemon.pid());
            eventually("nothing is left", || daemon.processes().is_empty());
            let took = begun.elapsed();
            assert!(took < Duration::from_secs(1), "{took:?} in round {round}");
            // A process gives back its memory, which tells whose it is, before its sockets.
            let workers = [web.all(), job.all()].concat().into_iter();
            let workers = workers.map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
            for address in workers.chain([web.address(), job.address()]) {
                eventually("it is free", || TcpListener::bind(address).is_ok());
            }
        }
    });
}

#[test]
fn a_guard_that_was_stopped_before_lbd_was_killed_still_ends_its_worker() {
    let ports = Ports::take(2);
    let daemon = Daemon::healthy(&ports.service(&stubborn()), 2);
    eventually("all run", || daemon.processes().len() == 1 + 2 * EACH);
    for pid in daemon.slot_pids() {
        freeze(parent(pid).unwrap());
        freeze(pid);
    }
    kill_hard(daemon.pid());
    let begun = Instant::now();
    eventually("nothing is left", || daemon.processes().is_empty());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

/// Whether a process can be traced by others of its user: `/proc/PID` belongs to that (proc(5)).
fn owner(pid: i32) -> u32 {
    fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid()
}

#[test]
fn lbd_and_its_guards_cannot_be_traced_by_their_own_user_and_workers_can() {
    if !needs::is_root() {
        return;
    }
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let nobody = User::from_name("nobody").unwrap().expect("there is a user nobody");
    std::os::unix::fs::chown(folder.path(), Some(nobody.uid.as_raw()), None).unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let script = "command = [\"./lbd\", \"worker\", \"--root\", \".\"]\nsocket = \"inherit\"\noutput = \"./out\"";
    fs::write(folder.path().join("lb.toml"), ports.service(script)).unwrap();
    // Readable for that user, wherever the tests were built.
    let lbd = folder.path().join("lbd");
    fs::copy(env!("CARGO_BIN_EXE_lbd"), &lbd).unwrap();
    let mut command = Command::new(lbd);
    command.args(["--config", "lb.toml"]).uid(nobody.uid.as_raw()).gid(nobody.gid.as_raw());
    command.env("XDG_RUNTIME_DIR", folder.path());
    let mut daemon = Daemon::run(folder, command);
    daemon.wait_healthy(Mark::START, 1);
    let worker = daemon.wait(Mark::START, "worker started", &[]).pid();
    let guard = parent(worker).unwrap();
    let all = children(guard);
    assert_eq!(all.len(), 2, "the program and the writer of its output");
    assert_eq!(owner(worker), nobody.uid.as_raw());
    for pid in all.into_iter().filter(|pid| *pid != worker).chain([daemon.pid(), guard]) {
        assert_eq!(owner(pid), 0, "{pid}");
    }
    daemon.signal(Signal::SIGTERM);
    daemon.wait_stopped();
}
