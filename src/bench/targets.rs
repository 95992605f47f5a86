//! The two contenders, started for the comparison and ended with it, however it ends.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    net::SocketAddr,
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use futures_util::{StreamExt, future::pending, stream::FuturesUnordered};
use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    unistd::{Pid, getpid, getppid},
};
use tempfile::TempDir;
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    time::{sleep, timeout},
};

use super::{
    BenchError,
    plan::{Plan, Reserved},
};
use crate::admin::{Client, Instance, status::State};

/// How long a contender may take until it answers.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long a contender may take to end after SIGTERM, before it is killed.
const END_PATIENCE: Duration = Duration::from_secs(15);
/// How often to check whether a starting contender is ready.
const INTERVAL: Duration = Duration::from_millis(20);
/// How much of the end of a contender's log is searched for its last line.
const LOG_TAIL: u64 = 4096;

/// The contenders' processes. They are killed if this is dropped without [`Self::end`].
#[derive(Debug)]
pub(super) struct Contenders {
    folder: TempDir,
    running: Vec<Contender>,
}

#[derive(Debug)]
struct Contender {
    name: &'static str,
    process: Child,
    log: PathBuf,
}

impl Contenders {
    /// Without any contenders yet.
    pub(super) fn new() -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("lbd-bench-").tempdir()?;
        Ok(Self { folder, running: Vec::new() })
    }

    /// Starts the balancer. Returns its address once each of its workers is healthy.
    pub(super) async fn start_balancer(&mut self, plan: &Plan) -> Result<SocketAddr, BenchError> {
        let file = self.folder.path().join("lb.toml");
        fs::write(&file, &plan.text)?;
        let instance = Instance::of_file(&file)?;
        let mut command = lbd()?;
        command.arg("--config").arg(&file);
        self.spawn("the balancer", "balancer.log", command)?;
        let healthy = async || {
            let Ok(client) = Client::find(std::slice::from_ref(&instance)).await else {
                return false;
            };
            let Ok(status) = client.status().await else { return false };
            let healthy = status.workers().filter(|worker| worker.state == State::Healthy);
            healthy.count() == plan.workers()
        };
        self.ready(healthy).await?;
        Ok(plan.address)
    }

    /// Starts the thread-per-connection server with the same files. Returns its address once it
    /// listens.
    pub(super) async fn start_threaded(&mut self, plan: &Plan) -> Result<SocketAddr, BenchError> {
        let reserved = Reserved::take()?;
        let mut command = lbd()?;
        command.args(["worker", "--threaded", "--root"]).arg(&plan.root);
        command.arg("--listen").arg(reserved.address.to_string());
        self.spawn("the threaded server", "threaded.log", command)?;
        self.ready(async || TcpStream::connect(reserved.address).await.is_ok()).await?;
        Ok(reserved.address)
    }

    /// Returns when a contender has exited by itself.
    pub(super) async fn ended(&mut self) -> BenchError {
        let mut ends: FuturesUnordered<_> = self.running.iter_mut().map(Contender::ended).collect();
        match ends.next().await {
            Some(error) => error,
            None => pending().await,
        }
    }

    /// Asks the contenders to stop, and returns when they have. One that does not stop is killed.
    pub(super) async fn end(mut self) {
        for contender in &self.running {
            contender.signal(Signal::SIGTERM);
        }
        for contender in &mut self.running {
            if timeout(END_PATIENCE, contender.process.wait()).await.is_err() {
                // The balancer's guards then kill the workers.
                let _ = contender.process.kill().await;
            }
        }
    }

    fn spawn(
        &mut self,
        name: &'static str,
        log: &str,
        mut command: Command,
    ) -> Result<(), BenchError> {
        let log = self.folder.path().join(log);
        let output = File::create(&log)?;
        let process = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .map_err(|source| BenchError::Spawn { name, source })?;
        self.running.push(Contender { name, process, log });
        Ok(())
    }

    /// Waits until the contender that was started last is ready.
    async fn ready(&mut self, ready: impl AsyncFn() -> bool) -> Result<(), BenchError> {
        let Some(contender) = self.running.last_mut() else { return Ok(()) };
        let waiting = async {
            while !ready().await {
                sleep(INTERVAL).await;
            }
        };
        let waited = tokio::select! {
            // In this order: if the contender has exited, whatever answers at its address is
            // another process.
            biased;
            error = contender.ended() => return Err(error),
            waited = timeout(START_PATIENCE, waiting) => waited,
        };
        waited.map_err(|_| BenchError::NotReady {
            name: contender.name,
            patience: START_PATIENCE,
            said: contender.last_words(),
        })
    }
}

impl Contender {
    /// Returns when the process has exited.
    async fn ended(&mut self) -> BenchError {
        match self.process.wait().await {
            Ok(status) => BenchError::Ended { name: self.name, status, said: self.last_words() },
            Err(error) => error.into(),
        }
    }

    fn signal(&self, signal: Signal) {
        // None: the process has exited, and its pid may belong to another process.
        if let Some(pid) = self.process.id().and_then(|pid| i32::try_from(pid).ok()) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// The last line of its log.
    fn last_words(&self) -> String {
        let read = || {
            let mut file = File::open(&self.log)?;
            let end = file.seek(SeekFrom::End(0))?;
            file.seek(SeekFrom::Start(end.saturating_sub(LOG_TAIL)))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map(|_| String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = read().unwrap_or_else(|error: io::Error| error.to_string());
        let line = text.lines().rev().find(|line| !line.trim().is_empty());
        line.unwrap_or("nothing in its log").to_owned()
    }
}

/// A command for this program itself, as a process that does not outlive this one.
fn lbd() -> Result<Command, BenchError> {
    let mut command = Command::new(std::env::current_exe()?);
    // Sockets and variables that were passed to this process are not for the contenders.
    for variable in ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "PORT"] {
        command.env_remove(variable);
    }
    // Ctrl-C on the terminal is for the bench, which then ends the contenders in order.
    command.process_group(0).kill_on_drop(true);
    let parent = getpid();
    // SAFETY: prctl(2) and getppid(2) are bare system calls: nothing allocates or takes a lock.
    unsafe {
        // The contender dies whenever this process ends, also if it has already ended. The kernel
        // watches the thread that forks: the main thread.
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGTERM)?;
            if getppid() == parent { Ok(()) } else { Err(Errno::ESRCH.into()) }
        });
    }
    Ok(command)
}
