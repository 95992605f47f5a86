//! A real `lbd` in a folder of its own, what it says, and clients for it.

pub(crate) mod browser;
pub(crate) mod client;
pub(crate) mod frozen;
pub(crate) mod http;
pub(crate) mod log;
pub(crate) mod machine;
pub(crate) mod manager;
pub(crate) mod metrics;
pub(crate) mod needs;
pub(crate) mod ports;
pub(crate) mod proc;
pub(crate) mod promtool;

use std::{
    collections::BTreeSet,
    fs,
    io::Read,
    net::{IpAddr, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

pub(crate) use log::{Line, Log, Mark, PATIENCE};
pub(crate) use ports::Port;

/// Every process of a test has it in its environment, so that none can hide.
const MARK: &str = "LBD_TEST";

/// The worker of `examples/fixture.rs`.
pub(crate) fn fixture() -> String {
    let path = Path::new(env!("CARGO_BIN_EXE_lbd")).with_file_name("examples/fixture");
    assert!(path.exists(), "no {}; run `cargo build --examples`", path.display());
    path.into_os_string().into_string().unwrap()
}

/// `command = […]` with the fixture and these words.
pub(crate) fn command(words: &[&str]) -> String {
    let words: Vec<_> = words.iter().map(|word| format!(", {word:?}")).collect();
    format!("command = [{:?}{}]", fixture(), words.concat())
}

/// The folder of the sample, with its pictures.
pub(crate) fn www() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("www")
}

/// Runs `lbd` with `arguments` in `folder` to its end.
pub(crate) fn lbd(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lbd"))
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// `kill -9`.
pub(crate) fn kill_hard(pid: i32) {
    assert!(pid > 0, "there is no such worker");
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// What a frozen program looks like from outside: it has everything, and does nothing.
pub(crate) fn freeze(pid: i32) {
    assert!(pid > 0, "there is no such worker");
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    // Until then it may still take up what is just coming in.
    eventually("it is stopped", || proc::is_stopped(pid));
}

pub(crate) fn thaw(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGCONT).unwrap();
}

/// Waits until `done`, looking often.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "not in time: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Watches that it stays so for this long: what must not happen gives no sign to wait for.
pub(crate) fn stays(what: &str, long: Duration, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + long;
    while Instant::now() < until {
        assert!(is_so(), "no more: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Has `flag` be set at its end, whatever end that is: a failed assertion must not leave a thread
/// running that a scope would wait for.
#[derive(Debug)]
pub(crate) struct SetAtEnd<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// An address of this machine that is not a loopback one.
pub(crate) fn other_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    // Of a datagram socket this sends nothing, it only finds the way (RFC 5737: to nowhere).
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback())
}

/// A port for a service and some for its workers.
#[derive(Debug)]
pub(crate) struct Ports {
    public: Port,
    workers: Vec<Port>,
}

impl Ports {
    pub(crate) fn take(workers: usize) -> Self {
        Self { public: Port::take(), workers: (0..workers).map(|_| Port::take()).collect() }
    }

    /// Where clients connect.
    pub(crate) fn address(&self) -> std::net::SocketAddr {
        self.public.address()
    }

    pub(crate) fn worker(&self, slot: usize) -> u16 {
        self.workers[slot].number
    }

    /// The workers' ports, in order.
    pub(crate) fn all(&self) -> Vec<u16> {
        self.workers.iter().map(|port| port.number).collect()
    }

    /// `[service.web]` with `listen`, `ports`, and what is given. Keys of its tables are written
    /// with a dot.
    pub(crate) fn service(&self, keys: &str) -> String {
        self.service_of(&self.all(), keys)
    }

    /// The same with these ports only.
    pub(crate) fn service_of(&self, ports: &[u16], keys: &str) -> String {
        let address = self.address();
        format!("[service.web]\nlisten = \"{address}\"\nports = {ports:?}\n{keys}\n")
    }
}

/// `[service.NAME]` instead of `[service.web]`.
pub(crate) fn named(name: &str, service: &str) -> String {
    service.replace("[service.web]", &format!("[service.{name}]"))
}

/// A running daemon. Dropped, it is killed, and must not have left a process behind.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    mark: String,
    pub(crate) folder: TempDir,
    pub(crate) log: Log,
}

impl Daemon {
    /// Starts it with this as lb.toml in a folder of its own.
    pub(crate) fn start(config: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), config)
    }

    pub(crate) fn start_in(folder: TempDir, config: &str) -> Self {
        fs::write(folder.path().join("lb.toml"), config).unwrap();
        Self::spawn(folder, &["--config", "lb.toml"])
    }

    /// The same, with so few descriptors.
    pub(crate) fn with_descriptors(count: usize, config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("lb.toml"), config).unwrap();
        let mut command = Command::new("sh");
        let script = format!("ulimit -n {count} && exec \"$0\" --config lb.toml");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_lbd")]);
        Self::run(folder, command)
    }

    /// Starts `lbd` with these arguments in `folder`.
    pub(crate) fn spawn(folder: TempDir, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lbd"));
        command.args(arguments);
        Self::run(folder, command)
    }

    /// Runs `command`, which must become `lbd`, in `folder`.
    pub(crate) fn run(folder: TempDir, mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Self::launch(folder, command)
    }

    /// The same, with the streams that `command` has.
    pub(crate) fn launch(folder: TempDir, mut command: Command) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mark = format!("{}-{number}", std::process::id());
        let mut child = command
            .env(MARK, &mark)
            .current_dir(folder.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Log::of(child.stderr.take().unwrap());
        Self { child, mark, folder, log }
    }

    /// Starts it and waits until `workers` are healthy.
    pub(crate) fn healthy(config: &str, workers: usize) -> Self {
        let daemon = Self::start(config);
        daemon.wait_healthy(Mark::START, workers);
        daemon
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// A path in its folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a file that a worker of the fixture waits for, and waits until it has done what that says.
    pub(crate) fn tell_worker(&self, file: &str) {
        fs::write(self.path(file), "").unwrap();
        eventually("the worker has done it", || self.path(&format!("{file}.done")).exists());
    }

    pub(crate) fn now(&self) -> Mark {
        self.log.now()
    }

    /// Waits for one such line after `since`.
    pub(crate) fn wait(&self, since: Mark, message: &str, fields: &[(&str, &str)]) -> Line {
        self.wait_many(since, message, fields, 1).remove(0)
    }

    pub(crate) fn wait_many(
        &self,
        since: Mark,
        message: &str,
        fields: &[(&str, &str)],
        count: usize,
    ) -> Vec<Line> {
        let what = format!("{message} {fields:?}");
        self.log.wait_for(since, &what, count, |line| line.is(message, fields))
    }

    pub(crate) fn wait_healthy(&self, since: Mark, workers: usize) {
        self.wait_many(since, "worker healthy", &[], workers);
    }

    /// The lines with this message so far.
    pub(crate) fn said(&self, since: Mark, message: &str) -> Vec<Line> {
        self.log.lines(since).into_iter().filter(|line| line.message == message).collect()
    }

    /// The pid of the worker that was started last on this port.
    pub(crate) fn worker_pid(&self, port: u16) -> i32 {
        let port = port.to_string();
        let fields = [("port", &*port)];
        // Whoever knows it from elsewhere may be here before the line.
        self.wait(Mark::START, "worker started", &fields);
        let lines = self.log.lines(Mark::START);
        lines.iter().rfind(|line| line.is("worker started", &fields)).unwrap().pid()
    }

    /// The same for all of `ports`, in order.
    pub(crate) fn pids(&self, ports: &Ports) -> Vec<i32> {
        ports.all().into_iter().map(|port| self.worker_pid(port)).collect()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Runs `lbd` with these arguments, for this daemon, to its end.
    pub(crate) fn lbd(&self, arguments: &[&str]) -> Output {
        lbd(self.folder.path(), &[arguments, &["--config", "lb.toml"]].concat())
    }

    /// The workers of the service, one a slot, as `lbd status --json` shows them.
    pub(crate) fn workers(&self, service: &str) -> Vec<serde_json::Value> {
        let output = self.lbd(&["status", "--json"]);
        assert!(output.status.success(), "{output:?}");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let services = status["services"].as_array().unwrap();
        let found = services.iter().find(|found| found["name"] == service).unwrap();
        found["workers"].as_array().unwrap().clone()
    }

    /// The pids of the workers of `web`, one a slot; 0 for one that has none.
    pub(crate) fn slot_pids(&self) -> Vec<i32> {
        let pid = |worker: &serde_json::Value| worker["pid"].as_i64().unwrap_or(0);
        self.workers("web").iter().map(|worker| pid(worker).try_into().unwrap()).collect()
    }

    /// The fewest workers that were in rotation at any moment since `since`, when these were.
    pub(crate) fn fewest_in_rotation(&self, since: Mark, pids: &[i32]) -> usize {
        let mut now: BTreeSet<i32> = pids.iter().copied().collect();
        let mut fewest = now.len();
        for line in self.log.lines(since) {
            match &*line.message {
                "worker healthy" | "worker resumed" => _ = now.insert(line.pid()),
                "draining" | "worker unhealthy" | "worker exited" => _ = now.remove(&line.pid()),
                _ => {}
            }
            fewest = fewest.min(now.len());
        }
        fewest
    }

    /// Replaces its file, at once: a reload that is still under way reads the old or the new one.
    pub(crate) fn write_config(&self, config: &str) {
        let new = self.path("lb.toml.new");
        fs::write(&new, config).unwrap();
        fs::rename(new, self.path("lb.toml")).unwrap();
    }

    /// Has this file read, and waits for `reloaded` or `reload refused`.
    pub(crate) fn reload(&self, config: &str) -> Line {
        self.write_config(config);
        let since = self.now();
        self.signal(Signal::SIGHUP);
        let outcome = |line: &Line| matches!(&*line.message, "reloaded" | "reload refused");
        self.log.wait_for(since, "the outcome of a reload", 1, outcome).remove(0)
    }

    pub(crate) fn must_reload(&self, config: &str) -> Line {
        let line = self.reload(config);
        assert_eq!(line.message, "reloaded", "{}", line.raw);
        line
    }

    /// Waits for its end, and for all that it said.
    pub(crate) fn wait_exit(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.log.wait_for_end();
                return status;
            }
            assert!(Instant::now() < until, "it does not end");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for its end, which has to be as it was asked to, with nothing left running.
    pub(crate) fn wait_stopped(&mut self) {
        assert_eq!(self.wait_exit().code(), Some(0));
        self.assert_nothing_runs();
        assert_eq!(self.said(Mark::START, "stopped").len(), 1);
    }

    pub(crate) fn assert_nothing_runs(&self) {
        let left = self.processes();
        assert!(left.is_empty(), "left running: {left:?}");
    }

    /// Every process that it or anything below it started, itself included: known by the variable
    /// they inherit, or, those that give their environment away, by the folder they are in. Of itself
    /// and its guards, root alone may see either. What its guards are forked from counts only when it
    /// is left behind.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let folder = self.folder.path().canonicalize().unwrap();
        let wanted = format!("{MARK}={}", self.mark);
        let ours = |pid: &i32| {
            let mut environment = Vec::new();
            // One that ends meanwhile has neither.
            let file = fs::File::open(format!("/proc/{pid}/environ"));
            let _ = file.and_then(|mut file| file.read_to_end(&mut environment));
            environment.split(|byte| *byte == 0).any(|v| v == wanted.as_bytes())
                || proc::is_alive(*pid)
                    && (*pid == self.pid() || proc::parent(*pid) == Some(self.pid()))
                || fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|at| at.starts_with(&folder))
        };
        all_processes().filter(ours).filter(|pid| !self.is_template(*pid)).collect()
    }

    /// What its guards are forked from.
    pub(crate) fn template(&self) -> i32 {
        all_processes().find(|pid| self.is_template(*pid)).expect("it has started workers")
    }

    fn is_template(&self, pid: i32) -> bool {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name == "lbd-template\n" && proc::parent(pid) == Some(self.pid())
    }
}

fn all_processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").unwrap();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let until = Instant::now() + PATIENCE;
        while !self.processes().is_empty() && Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
        }
        let left = self.processes();
        for pid in &left {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        if thread::panicking() {
            eprintln!("--- the log\n{}---", self.log.text());
        } else {
            assert!(left.is_empty(), "left behind: {left:?}");
        }
    }
}
