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
        Client, ClientError, Instance, Placed, Process, Reloaded, Restarted, Running, Status,
        Survey,
        status::{Service, State, Worker},
    },
    printable,
};

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
    /// The daemon that runs there now.
    pub(super) async fn find(&self) -> Result<Client, Error> {
        match &self.socket {
            Some(path) => Ok(Client::at(path.clone())),
            None => Ok(Client::find(&self.instances()?).await?),
        }
    }

    /// The same, and says who runs it if that is not who asks; or which ones do run, if it does not.
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

    /// The same, to have something changed by it.
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

/// The daemons that could be meant instead.
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

/// Says something on standard error that is no failure.
fn warn(bar: Option<&Bar>, text: &str) {
    let text = format!("lbd: warning: {}\n", printable::lines(text));
    match bar {
        Some(bar) => bar.note(&text),
        None => _ = io::stderr().write_all(text.as_bytes()),
    }
}

/// Prints how everything is, once or until somebody has seen enough.
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

/// Has the file read again, and waits until it is in force.
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

/// What a reload has changed; what an operator should know of it is said beside it.
fn told(reloaded: &Reloaded) -> String {
    warn_all(&reloaded.warnings);
    let Reloaded { added, removed, changed, .. } = reloaded;
    format!("reloaded: services added {added}, removed {removed}, changed {changed}\n")
}

/// Has the file read again and every worker replaced, of one service or of all, or that of one slot;
/// each once, and waits for the end of it all.
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

/// Replaces the workers of one service, or of one after the other; or that of one slot.
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
            // Once is enough, however many services there are.
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

/// Takes a worker out of rotation, and perhaps waits until it holds no connection any more.
pub(super) fn drain(target: &Target, service: &str, slot: u32, wait: bool) -> Result<(), Error> {
    run(async {
        let client = target.operate().await?;
        let placed = client.drain(service, slot).await?;
        let Placed { mut active, warning, .. } = placed;
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
            // Resumed by somebody else, or gone: there is nothing left to wait for.
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

/// Stops the daemon, and waits until its process is gone.
pub(super) fn stop(target: &Target) -> Result<(), Error> {
    run(async {
        let client = target.operate().await?;
        let pid = i32::try_from(client.status().await?.pid).unwrap_or_default();
        let process = Process::look(pid);
        client.stop().await?;
        let bar = Bar::new("stopping");
        // Its socket goes last. That it does not answer for once is no sign of its end.
        loop {
            match client.status().await {
                // A service manager may have started the next one.
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

/// Writes to standard output what may hold anything, so that nothing in it is obeyed.
pub(super) fn print(text: &str) -> Result<(), Error> {
    print_as_is(&printable::lines(text))
}

/// Writes to standard output. Whoever closed it has read enough: that ends the command well.
pub(super) fn print_as_is(text: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => Ok(result?),
    }
}

/// How many of the workers that a service had are replaced by healthy ones, and of how many.
fn replaced(old: &Service, now: &Status) -> Option<Progress> {
    let now = now.services.iter().find(|service| service.name == old.name)?;
    let is_new = |worker: &&Worker| {
        let before = old.workers.iter().find(|before| before.slot == worker.slot);
        // One that is out of rotation is replaced too, and stays there.
        let proven = matches!(worker.state, State::Healthy | State::Draining);
        proven && before.is_none_or(|before| worker.generation > before.generation)
    };
    let done = u64::try_from(now.workers.iter().filter(is_new).count()).ok()?;
    let all = u64::try_from(now.workers.len()).ok()?;
    Some(Progress { done: Some((done, all)), now: under_way([now]) })
}

/// The first worker on its way in or out: what a replacement waits for.
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

/// What a daemon that stops has to wait for.
fn waiting_for(status: &Status) -> String {
    let active: u64 = status.workers().map(held).sum();
    let workers = status.workers().filter(|worker| worker.pid.is_some()).count();
    match (workers, active) {
        (0, _) => "waiting for slow clients".to_owned(),
        (_, 0) => format!("waiting for workers to end: {workers}"),
        _ => format!("waiting for connections to end: {active}, on workers: {workers}"),
    }
}

/// The connections of a worker, as far as they are known, those that wait for it included.
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
