//! The commands that talk to a running daemon.

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use terminal_size::terminal_size_of;
use tokio::time::{interval, sleep};

use super::{Error, table};
use crate::admin::{
    Client, ClientError, Instance, Process, Restarted, Status,
    status::{Service, State},
};

/// How often `status --watch` looks.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How often a command that waits looks how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// How long the process may take to be gone after its socket is.
const EXIT_PATIENCE: Duration = Duration::from_secs(10);

/// Which daemon.
#[derive(Debug, Args)]
pub(super) struct Target {
    /// The configuration file that the daemon was started with
    #[arg(long, value_name = "FILE", default_value = "lb.toml")]
    config: PathBuf,
    /// The first --listen of a daemon that was started with `lbd run`
    #[arg(long, value_name = "ADDRESS", conflicts_with = "config")]
    listen: Option<String>,
    /// The daemon's admin socket
    #[arg(long, value_name = "PATH", conflicts_with_all = ["config", "listen"])]
    socket: Option<PathBuf>,
}

impl Target {
    async fn find(&self) -> Result<Client, Error> {
        if let Some(path) = &self.socket {
            return Ok(Client::at(path.clone()));
        }
        let instance = match &self.listen {
            Some(address) => Instance::of_listen(address),
            None => Instance::of_file(&self.config)?,
        };
        Ok(Client::find(&instance).await?)
    }
}

/// Prints how everything is, once or until somebody has seen enough.
pub(super) fn status(target: &Target, json: bool, watch: bool) -> Result<(), Error> {
    run(async {
        let client = target.find().await?;
        if !watch {
            let status = client.status().await?;
            let text = if json { pretty(&status)? } else { shown(&status) };
            return printed(&text);
        }
        let in_place = io::stdout().is_terminal() && !json;
        let mut clock = interval(WATCH_INTERVAL);
        loop {
            clock.tick().await;
            let status = client.status().await?;
            printed(&match (json, in_place) {
                (true, _) => {
                    format!("{}\n", serde_json::to_string(&status).map_err(io::Error::from)?)
                }
                (false, true) => over_the_last(&shown(&status)),
                (false, false) => format!("{}\n", shown(&status)),
            })?;
        }
    })
}

/// Has the file read again, and waits until it is in force.
pub(super) fn reload(target: &Target) -> Result<(), Error> {
    run(async {
        let client = target.find().await?;
        let bar = Bar::new("reloading");
        let reloaded = bar.during(client.reload(), async || None).await?;
        let (added, removed, changed) = (reloaded.added, reloaded.removed, reloaded.changed);
        printed(&format!(
            "reloaded: services added {added}, removed {removed}, changed {changed}\n"
        ))
    })
}

/// Replaces the workers of one service, or of one after the other.
pub(super) fn restart(target: &Target, service: Option<String>) -> Result<(), Error> {
    run(async {
        let client = target.find().await?;
        let before = client.status().await?;
        let all = || before.services.iter().map(|service| service.name.clone()).collect();
        for name in service.map_or_else(all, |name| vec![name]) {
            let bar = Bar::new(&format!("restarting {name}"));
            let old = before.services.iter().find(|service| service.name == name);
            let progress = async || replaced(old?, &client.status().await.ok()?);
            let Restarted { workers } = bar.during(client.restart(&name), progress).await?;
            printed(&format!("{name}: workers replaced {workers}\n"))?;
        }
        Ok(())
    })
}

/// Stops the daemon, and waits until its process is gone.
pub(super) fn stop(target: &Target) -> Result<(), Error> {
    run(async {
        let client = target.find().await?;
        let pid = i32::try_from(client.status().await?.pid).unwrap_or_default();
        let process = Process::look(pid);
        client.stop().await?;
        let bar = Bar::new("stopping");
        // Its socket goes last. That it does not answer for once is no sign of its end.
        loop {
            match client.status().await {
                // A service manager may have started the next one.
                Ok(status) if i32::try_from(status.pid) != Ok(pid) => break,
                Ok(status) => bar.say(waiting_for(&status)),
                Err(ClientError::NothingListens(_)) => break,
                Err(_) => {}
            }
            sleep(PROGRESS_INTERVAL).await;
        }
        let is_there = || {
            Process::look(pid).is_some_and(|now| {
                !now.ended && process.is_some_and(|process| process.began == now.began)
            })
        };
        let gone = async {
            while is_there() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(EXIT_PATIENCE, gone).await.is_err() {
            let still = format!("process {pid} does not end, though it serves nobody any more");
            return Err(io::Error::other(still).into());
        }
        drop(bar);
        printed("stopped\n")
    })
}

fn run(command: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}

/// Writes to standard output. Whoever closed it has read enough: that ends the command well.
fn printed(text: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => Ok(result?),
    }
}

fn shown(status: &Status) -> String {
    let out = io::stdout();
    let colour = out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let width = terminal_size_of(&out).map(|(width, _)| usize::from(width.0));
    table::render(status, width, colour)
}

/// Written over what is there, and then what is left of that erased (ECMA-48): nothing flickers. A
/// screen that is too low shows the upper part.
fn over_the_last(text: &str) -> String {
    let height = terminal_size_of(io::stdout()).map(|(_, height)| usize::from(height.0));
    let rows = height.map_or(usize::MAX, |height| height.saturating_sub(1));
    let lines: String = text.lines().take(rows).map(|line| format!("{line}\x1b[K\n")).collect();
    format!("\x1b[H{lines}\x1b[J")
}

fn pretty(status: &Status) -> Result<String, Error> {
    Ok(serde_json::to_string_pretty(status).map_err(io::Error::from)? + "\n")
}

/// How many of the workers that a service had are replaced by healthy ones, and of how many.
fn replaced(old: &Service, now: &Status) -> Option<(u64, u64)> {
    let now = now.services.iter().find(|service| service.name == old.name)?;
    let is_new = |slot, generation, state| {
        let before = old.workers.iter().find(|worker| worker.slot == slot);
        state == State::Healthy && before.is_none_or(|before| generation > before.generation)
    };
    let done = now.workers.iter().filter(|w| is_new(w.slot, w.generation, w.state)).count();
    Some((u64::try_from(done).ok()?, u64::try_from(now.workers.len()).ok()?))
}

/// What a daemon that stops has to wait for.
fn waiting_for(status: &Status) -> String {
    let connections: u64 = status.workers().map(|worker| worker.connections.active).sum();
    let workers = status.workers().filter(|worker| worker.pid.is_some()).count();
    match (workers, connections) {
        (0, _) => "waiting for slow clients".to_owned(),
        (_, 0) => format!("waiting for workers to end: {workers}"),
        _ => format!("waiting for connections to end: {connections}, on workers: {workers}"),
    }
}

/// What is shown while a command waits; nothing where standard error is no terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new(what: &str) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        // The template is known to be well-formed.
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(what.to_owned());
        bar.enable_steady_tick(PROGRESS_INTERVAL);
        Self(bar)
    }

    fn say(&self, message: String) {
        self.0.set_message(message);
    }

    /// Waits for `done`, and shows how far it is, as far as `progress` knows.
    async fn during<T>(
        self,
        done: impl Future<Output = T>,
        progress: impl AsyncFn() -> Option<(u64, u64)>,
    ) -> T {
        let mut done = std::pin::pin!(done);
        if self.0.is_hidden() {
            return done.await;
        }
        let mut clock = interval(PROGRESS_INTERVAL);
        loop {
            tokio::select! {
                done = &mut done => return done,
                _ = clock.tick() => {
                    if let Some((position, length)) = progress().await {
                        self.show(position, length);
                    }
                }
            }
        }
    }

    fn show(&self, position: u64, length: u64) {
        if self.0.length().is_none()
            && let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len}")
        {
            self.0.set_style(style.progress_chars("=> "));
        }
        self.0.set_length(length);
        self.0.set_position(position);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
