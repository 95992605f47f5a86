//! The commands that talk to a running daemon.

use std::{
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use nix::unistd::{Uid, User};
use tokio::time::sleep;

use super::{
    Error,
    overview::{render, span},
    progress::{self, Bar, Progress},
    watch::{view, watch},
};
use crate::{
    admin::{
        Client, ClientError, Instance, Process, Reloaded, Restarted, Running, SlotDrain, Status,
        Survey,
        status::{Service, State, Worker},
    },
    printable,
};

/// How long the process may take to exit after its socket is gone.
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
    /// Finds the daemon that runs with this target now.
    pub(super) async fn find(&self) -> Result<Client, Error> {
        match &self.socket {
            Some(path) => Ok(Client::at(path.clone())),
            None => Ok(Client::find(&self.instances()?).await?),
        }
    }

    /// Like [`Self::find`], but also says if another user runs the daemon. If it is not running,
    /// lists the daemons that are.
    pub(super) async fn look(&self) -> Result<Client, Error> {
        match self.find().await {
            Ok(client) => {
                if let Some(uid) = client.other_user() {
                    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
                    let user = user.map_or_else(|| uid.to_string(), |user| user.name);
                    warn(None, &format!("this one is run by user {user}, and not by you"));
                }
                Ok(client)
            }
            Err(Error::Client(error @ ClientError::NotRunning { .. })) => {
                let others = others(&Survey::take().await);
                Err(Error::NotRunning { error, others })
            }
            Err(error) => Err(error),
        }
    }

    /// Like [`Self::look`], for a request that changes something.
    async fn operate(&self) -> Result<Client, Error> {
        let client = self.look().await?;
        if self.socket.is_none() {
            client.may_change(&self.instances()?)?;
        }
        Ok(client)
    }

    fn instances(&self) -> Result<Vec<Instance>, Error> {
        match &self.listen {
            Some(address) => Ok(vec![Instance::of_listen(address)]),
            None => Ok(Instance::candidates(&self.config)?),
        }
    }
}

/// Lists the daemons that the user could have meant instead.
fn others(survey: &Survey) -> String {
    let mut text = match survey.running.is_empty() {
        true => "; name the file that it was started with by --config".to_owned(),
        false => "; name another by --config, or as below. There are:".to_owned(),
    };
    for running in &survey.running {
        let Running { socket, pid, user, instance, services, is_found, .. } = running;
        let of = match instance {
            Some(Instance::File(path)) => format!("--config {}", path.display()),
            Some(Instance::Listen(address)) => format!("--listen {address}"),
            None => "it does not answer".to_owned(),
        };
        let pid = pid.map_or_else(|| "pid unknown".to_owned(), |pid| format!("pid {pid}"));
        let mut line = format!("{of} ({pid}, user {user}");
        if !services.is_empty() {
            line += &format!(", services {}", services.join(", "));
        }
        line += ")";
        if !is_found {
            line += &format!(": --socket {}", socket.display());
        }
        text += &format!("\n  {}", printable::line(&line));
    }
    for told in &survey.passed_over {
        text += &format!("\n  passed over {}", printable::line(told));
    }
    text
}

/// Prints a remark on standard error that is not a failure.
fn warn(bar: Option<&Bar>, text: &str) {
    let text = format!("lbd: warning: {}\n", printable::lines(text));
    match bar {
        Some(bar) => bar.note(&text),
        None => _ = io::stderr().write_all(text.as_bytes()),
    }
}

/// Prints the status, once or repeatedly until the user ends it.
pub(super) fn status(target: &Target, json: bool, again: bool) -> Result<(), Error> {
    run(async {
        if again {
            return watch(target, json).await;
        }
        let status = target.look().await?.status().await?;
        match json {
            true => {
                let text = serde_json::to_string_pretty(&status).map_err(io::Error::from)?;
                print_as_is(&(printable::json(&text).into_owned() + "\n"))
            }
            false => print_as_is(&render(&status, None, view())),
        }
    })
}

/// Makes the daemon reload its file, and waits until the changes are in force.
pub(super) fn reload(target: &Target) -> Result<(), Error> {
    run(async {
        let client = target.operate().await?;
        let bar = Bar::new("reloading");
        let progress = async || {
            let now = under_way(client.status().await.ok()?.services.iter());
            Some(Progress { done: None, now })
        };
        let reloaded = bar.during(client.reload(), progress).await?;
        drop(bar);
        print(&told(&reloaded))
    })
}

/// What a reload has changed. Its warnings are printed separately.
fn told(reloaded: &Reloaded) -> String {
    warn_all(&reloaded.warnings);
    let Reloaded { added, removed, changed, .. } = reloaded;
    format!("reloaded: services added {added}, removed {removed}, changed {changed}\n")
}

/// Makes the daemon reload its file and replace every worker of one service or of all, or the
/// worker of one slot. Each worker is replaced once. Waits until everything is done.
pub(super) fn reload_and_restart(
    target: &Target,
    service: Option<&str>,
    slot: Option<u32>,
) -> Result<(), Error> {
    run(async {
        let client = target.operate().await?;
        let bar = Bar::new("reloading and restarting");
        let progress = async || {
            let now = under_way(client.status().await.ok()?.services.iter());
            Some(Progress { done: None, now })
        };
        let done = client.reload_and_restart(service, slot);
        let Restarted { workers, reloaded, warnings } = bar.during(done, progress).await?;
        drop(bar);
        let what = match (service, slot) {
            (None, _) => "all services".to_owned(),
            (Some(service), None) => service.to_owned(),
            (Some(service), Some(slot)) => format!("{service}/{slot}"),
        };
        let reloaded = reloaded.as_ref().map(told).unwrap_or_default();
        warn_all(&warnings);
        print(&format!("{reloaded}{what}: workers replaced {workers}\n"))
    })
}

/// Replaces the workers of one service, or of all services one after another, or the worker of one
/// slot.
pub(super) fn restart(
    target: &Target,
    service: Option<String>,
    slot: Option<u32>,
) -> Result<(), Error> {
    run(async {
        let client = target.operate().await?;
        if let (Some(service), Some(slot)) = (&service, slot) {
            return restart_worker(&client, service, slot).await;
        }
        let before = client.status().await?;
        let all = || before.services.iter().map(|service| service.name.clone()).collect();
        let mut warned = Vec::new();
        for name in service.map_or_else(all, |name| vec![name]) {
            let bar = Bar::new(&format!("restarting {name}"));
            let old = before.services.iter().find(|service| service.name == name);
            let progress = async || replaced(old?, &client.status().await.ok()?);
            let done = bar.during(client.restart(&name), progress).await?;
            let Restarted { workers, mut warnings, .. } = done;
            drop(bar);
            // Print a warning only once, however many services cause it.
            warnings.retain(|warning| !warned.contains(warning));
            warn_all(&warnings);
            warned.extend(warnings);
            print(&format!("{name}: workers replaced {workers}\n"))?;
        }
        Ok(())
    })
}

async fn restart_worker(client: &Client, service: &str, slot: u32) -> Result<(), Error> {
    let bar = Bar::new(&format!("restarting {service}/{slot}"));
    let progress = async || {
        let status = client.status().await.ok()?;
        let now = under_way(status.services.iter().filter(|found| found.name == service));
        Some(Progress { done: None, now })
    };
    let done = bar.during(client.restart_worker(service, slot), progress).await?;
    drop(bar);
    warn_all(&done.warnings);
    print(&format!("{service}/{slot}: worker replaced\n"))
}

fn warn_all(warnings: &[String]) {
    warnings.iter().for_each(|warning| warn(None, warning));
}

/// Takes a worker out of rotation, and waits, if requested, until it holds no more connections.
pub(super) fn drain(target: &Target, service: &str, slot: u32, wait: bool) -> Result<(), Error> {
    run(async {
        let client = target.operate().await?;
        let placed = client.drain(service, slot).await?;
        let SlotDrain { mut active, warning, .. } = placed;
        let bar = wait.then(|| Bar::new(&format!("draining {service}/{slot}")));
        if let Some(warning) = warning {
            warn(bar.as_ref(), &warning);
        }
        while let Some(bar) = bar.as_ref().filter(|_| active > 0) {
            bar.show(Progress { done: None, now: connections(active) });
            sleep(progress::INTERVAL).await;
            let status = client.status().await?;
            let found = status.services.iter().find(|found| found.name == service);
            let worker = found.and_then(|found| found.workers.iter().find(|w| w.slot == slot));
            // Somebody has resumed it, or it is gone: there is nothing left to wait for.
            let worker = worker.filter(|worker| worker.drained).ok_or_else(|| {
                io::Error::other(format!("{service}/{slot} is not drained any more"))
            })?;
            active = held(worker);
        }
        drop(bar);
        print(&format!("{service}/{slot}: out of rotation, {} left\n", connections(active)))
    })
}

/// Puts a worker back into rotation.
pub(super) fn resume(target: &Target, service: &str, slot: u32) -> Result<(), Error> {
    run(async {
        let placed = target.operate().await?.resume(service, slot).await?;
        print(&match placed.state {
            State::Healthy => format!("{service}/{slot}: in rotation\n"),
            state => format!("{service}/{slot}: {state}; in rotation as soon as it is healthy\n"),
        })
    })
}

/// Stops the daemon, and waits until its process has exited.
pub(super) fn stop(target: &Target) -> Result<(), Error> {
    run(async {
        let client = target.operate().await?;
        let pid = i32::try_from(client.status().await?.pid).unwrap_or_default();
        let process = Process::look(pid);
        client.stop().await?;
        let bar = Bar::new("stopping");
        // The daemon removes its socket last. A single missing answer does not mean that it has
        // ended.
        loop {
            match client.status().await {
                // A service manager may have started a new daemon.
                Ok(status) if i32::try_from(status.pid) != Ok(pid) => break,
                Ok(status) => bar.show(Progress { done: None, now: waiting_for(&status) }),
                Err(ClientError::NothingListens(_) | ClientError::PassedOver { .. }) => break,
                Err(_) => {}
            }
            sleep(progress::INTERVAL).await;
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
        print("stopped\n")
    })
}

fn run(command: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}

/// Prints text from outside, with characters that a terminal obeys replaced.
pub(super) fn print(text: &str) -> Result<(), Error> {
    print_as_is(&printable::lines(text))
}

/// Prints to standard output. If the reader has closed the pipe it has seen enough: the command
/// ends successfully.
pub(super) fn print_as_is(text: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => Ok(result?),
    }
}

/// How many of a service's previous workers have been replaced by healthy ones, and of how many.
fn replaced(old: &Service, now: &Status) -> Option<Progress> {
    let now = now.services.iter().find(|service| service.name == old.name)?;
    let is_new = |worker: &&Worker| {
        let before = old.workers.iter().find(|before| before.slot == worker.slot);
        // A worker that an operator drained is replaced too, and the new one stays drained.
        let proven = matches!(worker.state, State::Healthy | State::Draining);
        proven && before.is_none_or(|before| worker.generation > before.generation)
    };
    let done = u64::try_from(now.workers.iter().filter(is_new).count()).ok()?;
    let all = u64::try_from(now.workers.len()).ok()?;
    Some(Progress { done: Some((done, all)), now: under_way([now]) })
}

/// The first worker that is being started or stopped: what a replacement is waiting for.
fn under_way<'s>(services: impl IntoIterator<Item = &'s Service>) -> String {
    let told = |service: &Service, worker: &Worker| {
        let (name, slot, state) = (&service.name, worker.slot, worker.state);
        let active = held(worker);
        match state {
            State::Draining => format!("{name}/{slot}: {state}, {}", connections(active)),
            _ => format!("{name}/{slot}: {state} for {}", span(worker.since_seconds)),
        }
    };
    let first = |service: &Service| {
        let starting = service.workers.iter().find(|worker| worker.state == State::Starting);
        let ahead = service.replacements.first().or(starting).or(service.retiring.first());
        ahead.map(|worker| told(service, worker))
    };
    services.into_iter().find_map(first).unwrap_or_default()
}

/// What a stopping daemon is waiting for.
fn waiting_for(status: &Status) -> String {
    let active: u64 = status.workers().map(held).sum();
    let workers = status.workers().filter(|worker| worker.pid.is_some()).count();
    match (workers, active) {
        (0, _) => "waiting for slow clients".to_owned(),
        (_, 0) => format!("waiting for workers to end: {workers}"),
        _ => format!("waiting for connections to end: {active}, on workers: {workers}"),
    }
}

/// A worker's connections as far as they are known, including those in its accept queue.
fn held(worker: &Worker) -> u64 {
    worker.connections.active.unwrap_or(0) + worker.connections.queued.unwrap_or(0)
}

fn connections(count: u64) -> String {
    match count {
        0 => "no connection".to_owned(),
        1 => "1 connection".to_owned(),
        _ => format!("{count} connections"),
    }
}
