//! `[service.NAME.limits]`, from outside: a real daemon with real workers.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{net::UnixStream, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    thread,
    time::Duration,
};

use crate::common::{Daemon, Mark, PATIENCE, eventually, needs};
use nix::{sys::signal::Signal, unistd::Uid};
use tempfile::TempDir;

const LBD: &str = env!("CARGO_BIN_EXE_lbd");

/// A daemon in this folder, with one service that listens on a unix socket there. `command` runs lbd's
/// arguments.
fn start(folder: TempDir, keys: &str, mut command: Command) -> Daemon {
    write_config(folder.path(), keys);
    command.args(["--config", "lb.toml"]);
    Daemon::run(folder, command)
}

/// With `workers` that are healthy.
fn healthy(keys: &str, workers: usize) -> Daemon {
    let daemon = start(tempfile::tempdir().unwrap(), keys, Command::new(LBD));
    daemon.wait_healthy(Mark::START, workers);
    daemon
}

/// Has another file read, without waiting for it.
fn reload(daemon: &Daemon, keys: &str) {
    write_config(daemon.folder.path(), keys);
    daemon.signal(Signal::SIGHUP);
}

fn write_config(folder: &Path, keys: &str) {
    fs::create_dir_all(folder.join("www")).unwrap();
    fs::write(folder.join("www/index.html"), "hello").unwrap();
    let listen = "[log]\naccess = false\n[service.web]\nlisten = \"unix:front\"\n";
    fs::write(folder.join("lb.toml"), format!("{listen}{keys}")).unwrap();
}

/// A service whose command is this script, with the built-in worker as `"$LBD" worker …` in it.
fn script(script: &str, keys: &str) -> String {
    format!("command = [\"sh\", \"-c\", '''{script}''']\nenv.LBD = \"{LBD}\"\n{keys}")
}

const SERVE: &str = "exec \"$LBD\" worker --root www";

fn get(folder: &Path) -> std::io::Result<()> {
    let mut stream = UnixStream::connect(folder.join("front"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("hello"), "{answer:?}");
    Ok(())
}

/// Requests, one after the other, from two clients, while `during` runs; none may fail.
fn under_load(folder: &Path, during: impl FnOnce()) {
    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let client = || {
            while !stop.load(SeqCst) {
                get(folder).unwrap();
                done.fetch_add(1, SeqCst);
            }
        };
        let clients = [scope.spawn(client), scope.spawn(client)];
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(during));
        let before = done.load(SeqCst);
        eventually("more requests", || {
            done.load(SeqCst) > before + 20 || clients.iter().any(|client| client.is_finished())
        });
        stop.store(true, SeqCst);
        result.unwrap();
    });
}

#[test]
fn a_worker_past_its_memory_is_replaced_without_a_failed_request() {
    // It grows when it is told to; what it has started counts.
    let grow = "(while ! rm grow-$LBD_SLOT 2>/dev/null; do sleep 0.05; done; \
                (head -c 64M /dev/zero; exec sleep 1000) | tail >/dev/null) & ";
    let keys = "workers = 2\n[service.web.limits]\nmemory = \"48MiB\"\n";
    let daemon = healthy(&script(&format!("{grow}{SERVE}"), keys), 2);
    let folder = daemon.folder.path();
    under_load(folder, || {
        fs::write(folder.join("grow-1"), "").unwrap();
        daemon.wait(Mark::START, "draining", &[]);
        daemon.wait(Mark::START, "worker exited", &[]);
    });
    let recycling = daemon.said(Mark::START, "recycling").remove(0);
    assert_eq!((recycling.get("slot"), recycling.get("why")), (Some("1"), Some("memory")));
    let exited = daemon.said(Mark::START, "worker exited").remove(0);
    assert_eq!(exited.pid(), recycling.pid());
    let log = daemon.log.lines(Mark::START);
    let at = |message: &str| log.iter().rposition(|line| line.message == message);
    assert!(at("worker healthy") < at("draining"), "{log:#?}");
    assert_eq!(log.iter().filter(|line| line.message == "recycling").count(), 1, "{log:#?}");
}

#[test]
fn workers_past_their_age_are_replaced_without_a_failed_request() {
    let keys = "root = \"www\"\nworkers = 2\n[service.web.limits]\nmax-age = \"700ms\"\n";
    let daemon = healthy(keys, 2);
    under_load(daemon.folder.path(), || {
        for line in daemon.wait_many(Mark::START, "recycling", &[], 6) {
            assert_eq!(line.get("why"), Some("max-age"));
            assert!(line.number::<f64>("age") >= 0.63, "{}", line.raw);
        }
    });
    let started = daemon.said(Mark::START, "worker started").len();
    reload(&daemon, "root = \"www\"\nworkers = 2\n");
    daemon.wait(Mark::START, "reloaded", &[]);
    assert!(started >= 7);
}

#[test]
fn a_worker_has_as_many_descriptors_as_it_may() {
    let limits = |most: u32| format!("[service.web.limits]\nopen-files = {most}\n");
    let config = |most| format!("root = \"www\"\nworkers = 1\n{}", limits(most));
    let daemon = healthy(&config(99), 1);
    let has = |healthy: usize| {
        let lines = daemon.wait_many(Mark::START, "worker healthy", &[], healthy);
        let pid = lines[healthy - 1].pid();
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        line.split_ascii_whitespace().skip(3).take(2).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(has(1), "99 99");
    reload(&daemon, &config(88));
    assert_eq!(has(2), "88 88");
}

#[test]
fn a_worker_has_as_many_connections_as_it_may() {
    let keys = "root = \"www\"\nworkers = 2\n[service.web.limits]\nmax-connections = 1\n";
    let daemon = healthy(keys, 2);
    let folder = daemon.folder.path();
    let open = || {
        let mut stream = UnixStream::connect(folder.join("front")).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        stream
    };
    let (mut one, mut two) = (open(), open());
    assert!(one.read(&mut [0; 512]).unwrap() > 0);
    assert!(two.read(&mut [0; 512]).unwrap() > 0);
    let mut three = open();
    assert!(three.read(&mut [0; 512]).is_err(), "a third one is served");
    drop(one);
    three.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(three.read(&mut [0; 512]).unwrap() > 0);
}

#[test]
fn processes_are_not_limited_where_they_can_not_be() {
    let keys = "root = \"www\"\nworkers = 1\n";
    let limited = format!("{keys}[service.web.limits]\nprocesses = 5\n");
    let place = "lb.toml:8: service.web.limits.processes: ";
    let folder = tempfile::tempdir().unwrap();
    write_config(folder.path(), &limited);
    let run = |arguments: &[&str]| {
        let mut command = Command::new(LBD);
        command.args(arguments).current_dir(folder.path()).output().unwrap()
    };
    let refused = run(&["--config", "lb.toml"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(78), "{said}");
    assert!(said.contains(&format!("{place}no cgroup is delegated to lbd; ")), "{said}");
    let checked = run(&["check"]);
    let said = String::from_utf8(checked.stderr).unwrap();
    assert_eq!(checked.status.code(), Some(0), "{said}");
    assert!(said.contains(&format!("{place}note: refused where ")), "{said}");

    let daemon = healthy(keys, 1);
    reload(&daemon, &limited);
    let line = daemon.wait(Mark::START, "reload refused", &[]).raw;
    assert!(line.contains(place) && line.contains("no cgroup is delegated"), "{line}");
    get(daemon.folder.path()).unwrap();
}

/// A cgroup that is marked as systemd would mark one that it delegates.
struct Delegated(PathBuf);

impl Delegated {
    /// `None` where this is not allowed.
    fn make(name: &str) -> Option<Self> {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mount = mountinfo.lines().find(|line| line.contains(" - cgroup2 "))?;
        let path = Path::new(mount.split(' ').nth(4)?).join(name);
        if !Uid::effective().is_root() {
            return None;
        }
        fs::create_dir(&path).ok()?;
        let delegated = Self(path);
        let c_path = std::ffi::CString::new(delegated.0.to_str()?).unwrap();
        // SAFETY: three valid pointers, and the length of the value.
        let set = unsafe {
            nix::libc::setxattr(
                c_path.as_ptr(),
                c"user.delegate".as_ptr(),
                b"1".as_ptr().cast(),
                1,
                0,
            )
        };
        (set == 0 && delegated.0.join("cgroup.kill").exists()).then_some(delegated)
    }

    /// A command that becomes lbd in there.
    fn command(&self) -> Command {
        let mut command = Command::new("sh");
        let procs = self.0.join("cgroup.procs");
        command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(procs).arg(LBD);
        command
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap().map(Result::unwrap);
        let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        let mut names: Vec<_> =
            folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }

    fn members(&self, name: &str) -> usize {
        let procs = self.0.join(name).join("cgroup.procs");
        fs::read_to_string(procs).map_or(0, |procs| procs.lines().count())
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        eventually("all gone", || {
            self.names().iter().for_each(|name| drop(fs::remove_dir(self.0.join(name))));
            fs::remove_dir(&self.0).is_ok() || !self.0.exists()
        });
    }
}

#[test]
fn a_tree_that_forks_without_end_is_killed_as_a_whole() {
    let name = format!("lbd-test-{}", std::process::id());
    let Some(delegated) = Delegated::make(&name) else {
        let why = "only root can show it, with cgroups of version 2 that can be written to";
        needs::missing(needs::SYSTEMD, why);
        return;
    };
    // Six chains of processes, each in a session of its own, that start the next one and end, as fast
    // as they can. At its longest, a chain has two thousand links: it ends by itself.
    let link = "[ $1 -gt 0 ] && { trap '' TERM; setsid sh link $(($1 - 1)) & }";
    let storm = format!("for i in 1 2 3 4 5 6; do sh link 2000 & done; {SERVE}");
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("link"), link).unwrap();
    let keys = "workers = 1\n[service.web.stop]\ntimeout = \"100ms\"\n";
    let daemon = start(folder, &script(&storm, keys), delegated.command());
    daemon.wait_healthy(Mark::START, 1);
    let leaf = format!("lbd-{}", daemon.pid());
    let worker = format!("{leaf}-1");
    assert_eq!(delegated.names(), [leaf.clone(), worker.clone()]);
    assert_eq!(delegated.members(&leaf), 3, "lbd, what guards are forked from, and the guard");
    eventually("a storm", || delegated.members(&worker) > 3);
    // In the cgroup, but not below the guard: only who kills the cgroup gets this one too.
    let mut stowaway = Command::new("sleep").arg("1000").spawn().unwrap();
    fs::write(delegated.0.join(&worker).join("cgroup.procs"), stowaway.id().to_string()).unwrap();

    // Stopped: nothing of it is left, and its cgroup is gone.
    reload(
        &daemon,
        &script(
            &storm,
            &format!("{keys}drain = \"signal\"\n[service.web.limits]\nopen-files = 999\n"),
        ),
    );
    daemon.wait_healthy(Mark::START, 2);
    eventually("the cgroup of the old one is gone", || !delegated.names().contains(&worker));
    let second = format!("{leaf}-2");
    assert_eq!(stowaway.wait().unwrap().signal(), Some(9));
    eventually("a second storm", || delegated.members(&second) > 3);

    // lbd killed: the guard sees to it.
    daemon.signal(Signal::SIGKILL);
    eventually("nothing is left of either", || {
        delegated.members(&second) + delegated.members(&leaf) == 0
    });
    drop(daemon);

    // The next lbd tidies up.
    let keys = "root = \"www\"\nworkers = 1\n";
    let daemon = start(tempfile::tempdir().unwrap(), keys, delegated.command());
    daemon.wait_healthy(Mark::START, 1);
    let leaf = format!("lbd-{}", daemon.pid());
    assert_eq!(delegated.names(), [leaf.clone(), format!("{leaf}-1")]);
    drop(daemon);
}
