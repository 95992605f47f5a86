//! What is written, however much and wherever to: it blocks nobody, fills no memory, and what is
//! lost is counted.

use std::{
    env,
    fs::{self, File},
    net::{SocketAddr, TcpStream},
    os::unix::fs::symlink,
    process::Command,
    time::{Duration, Instant},
};

use crate::common::{
    self, Daemon, Line, Log, Mark, Ports,
    client::{KeepAlive, get, turns},
    command, eventually, fixture,
    proc::resident,
};
use nix::sys::signal::Signal::{SIGTERM, SIGUSR1};

const MIB: usize = 1 << 20;

/// Makes requests until `done`, none of which may take long, and says how much memory the daemon
/// had at most.
fn watch(daemon: &Daemon, address: SocketAddr, mut done: impl FnMut() -> bool) -> usize {
    let (mut most, until) = (0, Instant::now() + common::PATIENCE);
    while !done() {
        assert!(Instant::now() < until, "not in time");
        let begun = Instant::now();
        assert_eq!(KeepAlive::new(address).get("/").unwrap().0, 200);
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(1), "{took:?}");
        most = most.max(resident(daemon.pid()));
    }
    most
}

#[test]
fn a_worker_that_pours_out_no_newline() {
    let bytes = env::var("LBD_TEST_BYTES").map_or(20_000_000, |bytes| bytes.parse().unwrap());
    let ports = Ports::take(2);
    let keys = command(&["http", "--pour", &bytes.to_string()]);
    let config = format!("[log]\noutput-rate = \"50/s\"\n{}", ports.service(&keys));
    let daemon = Daemon::healthy(&config, 2);
    // Written means read by lbd: a pipe holds next to nothing.
    let pids = daemon.slot_pids();
    let written = |pid: &i32| {
        let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap();
        let line = io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap();
        line.parse::<usize>().unwrap()
    };
    let most = watch(&daemon, ports.address(), || pids.iter().all(|pid| written(pid) >= bytes));
    assert!(most < 64 * MIB, "{most}");
    let dropped = |line: &Line| {
        line.message == "output dropped" && line.get("lines").is_some_and(|lines| lines != "0")
    };
    daemon.log.wait_for(Mark::START, "a line about dropped output", 1, dropped);
}

#[test]
fn a_worker_without_standard_output() {
    let ports = Ports::take(1);
    let script = format!("command = [\"sh\", \"-c\", \"exec {} http 1>&- 2>&-\"]", fixture());
    let daemon = Daemon::healthy(&ports.service(&script), 1);
    assert_eq!(turns(ports.address(), 3).len(), 3);
    let descriptors = get(ports.address(), "/descriptors");
    assert!(descriptors.starts_with("0 /dev/null\n"), "{descriptors}");
    assert!(daemon.said(Mark::START, "worker exited").is_empty());
}

#[test]
fn a_log_on_a_full_disk() {
    let ports = Ports::take(2);
    let folder = tempfile::tempdir().unwrap();
    symlink("/dev/full", folder.path().join("lbd.log")).unwrap();
    let service = ports.service(&command(&["http", "--pour", "20000000"]));
    let config = format!("[log]\nfile = \"lbd.log\"\n{service}");
    let mut daemon = Daemon::start_in(folder, &config);
    eventually("it listens", || TcpStream::connect(ports.address()).is_ok());
    let mut requests = 0;
    let most = watch(&daemon, ports.address(), || {
        requests += 1;
        requests > 1000
    });
    assert!(most < 64 * MIB, "{most}");
    // Somebody makes room, and reads what there is.
    fs::remove_file(daemon.path("lbd.log")).unwrap();
    daemon.signal(SIGUSR1);
    let lost = || {
        get(ports.address(), "/");
        let text = fs::read_to_string(daemon.path("lbd.log")).unwrap_or_default();
        // The last line may be half written at this moment.
        let whole = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let mut told = whole.filter(|line| line.contains(" log lines dropped")).map(Line::parse);
        told.next_back()
    };
    eventually("the loss is told", || lost().is_some());
    // A line for each connection at least.
    assert!(lost().unwrap().number::<usize>("total") >= 1000, "{:?}", lost());
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait_exit().code(), Some(0));
}

#[test]
fn a_log_that_nobody_reads_for_a_while() {
    let ports = Ports::take(2);
    let folder = tempfile::tempdir().unwrap();
    let service = ports.service(&command(&["http", "--pour", "20000000"]));
    fs::write(folder.path().join("lb.toml"), service).unwrap();
    let pipe = folder.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let reader = File::options().read(true).write(true).open(&pipe).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" --config lb.toml 2>pipe", env!("CARGO_BIN_EXE_lbd")]);
    let daemon = Daemon::run(folder, command);
    eventually("it listens", || TcpStream::connect(ports.address()).is_ok());
    let mut requests = 0;
    let most = watch(&daemon, ports.address(), || {
        requests += 1;
        requests > 2000
    });
    assert!(most < 64 * MIB, "{most}");
    // Now somebody reads. The daemon looks at what was lost when there is something to do.
    let log = Log::of(reader);
    let told = |line: &Line| line.message.starts_with("log lines dropped");
    let line = log.wait_for(Mark::START, "the loss is told", 1, told).remove(0);
    assert!(line.number::<usize>("total") > 0, "{}", line.raw);
}
