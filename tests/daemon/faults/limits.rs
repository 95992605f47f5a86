//! Descriptors that run out, clients that do not read, forks that fail: what there is, is served.

use std::{
    fs::{self, File, Permissions},
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    self, Daemon, Mark, Ports,
    client::{KeepAlive, connect, get, try_get, turns},
    command, eventually, kill_hard,
    proc::{cpu, descriptors, resident},
    www,
};
use nix::{
    libc::RLIM_INFINITY,
    sys::resource::{Resource, getrlimit},
    unistd::geteuid,
};
use socket2::SockRef;

#[test]
fn without_descriptors_it_neither_spins_nor_dies_and_restarts_workers() {
    let ports = Ports::take(2);
    let daemon = Daemon::with_descriptors(128, &ports.service(&command(&["http"])));
    daemon.wait_healthy(Mark::START, 2);
    let line = daemon.wait(Mark::START, "descriptors", &[("limit", "128")]);
    let held: usize = line.number("connections");
    assert!((1..64).contains(&held), "{held}");
    let baseline = descriptors(daemon.pid());

    let idle: Vec<_> = (0..300).map(|_| connect(ports.address())).collect();
    eventually("as many as there may be", || descriptors(daemon.pid()) >= baseline + 2 * held);
    let (before, begun) = (cpu(daemon.pid()), Instant::now());
    thread::sleep(Duration::from_secs(1));
    let (used, window) = (cpu(daemon.pid()) - before, begun.elapsed());
    assert!(used < window / 10, "{used:?} of {window:?}");
    assert!(descriptors(daemon.pid()) < 128);

    // A worker is still replaced, and is seen to be well.
    let since = daemon.now();
    kill_hard(daemon.worker_pid(ports.worker(0)));
    daemon.wait(since, "worker exited", &[]);
    daemon.wait(since, "worker healthy", &[("port", &ports.worker(0).to_string())]);
    // And lbd still hears its operator.
    assert_eq!(daemon.workers("web").len(), 2);

    drop(idle);
    let begun = Instant::now();
    get(ports.address(), "/");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(turns(ports.address(), 4).len(), 4);
    eventually("the baseline", || descriptors(daemon.pid()) <= baseline);
}

#[test]
fn clients_that_read_nothing_of_a_large_answer_cost_next_to_nothing() {
    const LARGE: u64 = 100 << 20;
    let ports = Ports::take(2);
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("root")).unwrap();
    File::create(folder.path().join("root/large")).unwrap().set_len(LARGE).unwrap();
    fs::copy(www().join("page.html"), folder.path().join("root/page.html")).unwrap();
    let daemon = Daemon::start_in(folder, &ports.service("root = \"root\""));
    daemon.wait_healthy(Mark::START, 2);
    get(ports.address(), "/page.html");
    let before = (descriptors(daemon.pid()), resident(daemon.pid()));

    let mut slow: Vec<_> = (0..200).map(|_| KeepAlive::new(ports.address())).collect();
    for client in &mut slow {
        client.send("/large").unwrap();
    }
    for client in &mut slow {
        // It has begun.
        assert_eq!(client.head().unwrap().0, 200);
    }
    let mut most = 0;
    let until = Instant::now() + Duration::from_secs(2);
    let mut others = 0;
    while Instant::now() < until {
        let begun = Instant::now();
        try_get(ports.address(), "/page.html").unwrap();
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        most = most.max(resident(daemon.pid()));
        others += 1;
    }
    assert!(others > 20, "{others}");
    assert!(most < before.1 + (64 << 20), "{} to {most}", before.1);

    // One that begins to read has everything; the others leave.
    let mut one = slow.pop().unwrap();
    drop(slow);
    assert_eq!(one.skip(LARGE).unwrap(), LARGE);
    drop(one);
    eventually("the baseline", || descriptors(daemon.pid()) <= before.0);
}

#[test]
fn clients_that_write_to_one_who_reads_nothing_cost_next_to_nothing() {
    let ports = Ports::take(2);
    let daemon = Daemon::healthy(&ports.service(&command(&["deaf"])), 2);
    let before = (descriptors(daemon.pid()), resident(daemon.pid()));
    let slow: Vec<_> = (0..100)
        .map(|_| {
            let client = connect(ports.address());
            client.set_nonblocking(true).unwrap();
            // It will break off: an orderly end would wait behind what nobody reads.
            SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
            client
        })
        .collect();
    // Until nothing more goes into any of them.
    let block = vec![b'x'; 1 << 20];
    let mut silent = Instant::now();
    while silent.elapsed() < Duration::from_millis(500) {
        for mut client in &slow {
            if std::io::Write::write(&mut client, &block).is_ok() {
                silent = Instant::now();
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    let after = resident(daemon.pid());
    assert!(after < before.1 + (64 << 20), "{} to {after}", before.1);
    drop(slow);
    eventually("the baseline", || descriptors(daemon.pid()) <= before.0);
}

/// Where there may be no more processes, a worker waits; and the one that runs, serves.
///
/// The limit counts a user's processes, and root's are not limited: root alone can show this.
#[test]
fn a_fork_that_fails_is_tried_again() {
    if !geteuid().is_root() {
        eprintln!("skipped: only root can run lbd as a user of its own");
        return;
    }
    // Nobody's, so that nobody else's processes count.
    let user = 1_000_000 + std::process::id();
    let ports = Ports::take(2);
    let folder = tempfile::tempdir().unwrap();
    let fixture = folder.path().join("fixture");
    let lbd = folder.path().join("lbd");
    fs::copy(common::fixture(), &fixture).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_lbd"), &lbd).unwrap();
    chown(folder.path(), Some(user), Some(user)).unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let keys = "command = [\"./fixture\", \"http\"]\nrestart = { min-delay = \"50ms\", \
                max-delay = \"200ms\" }";
    fs::write(folder.path().join("lb.toml"), ports.service(keys)).unwrap();
    let mut command = Command::new(lbd);
    command.args(["--config", "lb.toml"]).uid(user).gid(user);
    command.env_remove("RUNTIME_DIRECTORY").env_remove("XDG_RUNTIME_DIR");
    let daemon = Daemon::run(folder, command);
    daemon.wait_healthy(Mark::START, 2);
    // The soft limit, up to the hard one, which it has from this test.
    let (_, most) = getrlimit(Resource::RLIMIT_NPROC).unwrap();
    let allow = |processes: u64| {
        let limit = match processes {
            RLIM_INFINITY => "--nproc=unlimited:".to_owned(),
            processes => format!("--nproc={processes}:"),
        };
        // Of whoever forks: as a unit's `LimitNPROC=` would.
        for pid in [daemon.pid(), daemon.template()] {
            let mut prlimit = Command::new("prlimit");
            prlimit.args(["--pid", &pid.to_string(), &limit]).uid(user).gid(user);
            let output = prlimit.output().unwrap();
            assert!(output.status.success(), "{output:?}");
        }
    };
    allow(1);
    let since = daemon.now();
    kill_hard(daemon.worker_pid(ports.worker(0)));
    let lines = daemon.wait_many(since, "worker not started", &[("slot", "0")], 2);
    for line in &lines {
        let error = line.get("error").unwrap();
        assert!(error.contains("Resource temporarily unavailable"), "{error}");
        assert!(line.number::<f64>("restart_in") > 0.0, "{}", line.raw);
    }
    assert_eq!(turns(ports.address(), 4), [ports.worker(1); 4]);
    allow(most);
    daemon.wait(since, "worker healthy", &[("port", &ports.worker(0).to_string())]);
    assert_eq!(turns(ports.address(), 2).len(), 2);
}
