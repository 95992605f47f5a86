//! `lbd bench`: compares async workers behind the balancer with a server that has a thread for each
//! connection.
//!
//! Both serve the same files. They are processes of their own, started for the comparison and ended
//! with it ([`targets`]). The load comes from this process, which does nothing else ([`load`]). At
//! each concurrency, one is measured right after the other: a machine's speed drifts, so a ratio
//! should compare measurements that are close in time.
//!
//! A request is complete if its answer has status 200 and a complete body of the same length as a
//! first request's, the reference. If the reference request fails, the comparison ends, because a
//! table about a missing page is useless. Only 127.0.0.1 or a target that the user names is
//! measured, over plain HTTP.

mod client;
mod load;
mod plan;
mod plot;
mod table;
mod targets;

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use futures_util::StreamExt;
use hyper::{
    Uri,
    http::uri::{PathAndQuery, Scheme},
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::{
    libc::{SIGHUP, SIGINT, SIGTERM},
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{AccessFlags, access},
};
use signal_hook_tokio::Signals;
use tokio::net::lookup_host;

use crate::config::ConfigError;
use client::{Failure, Target};
pub use load::Load;
use load::Measured;
use plan::Plan;
use targets::Contenders;

/// The options of `lbd bench`.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// What to measure.
    pub subject: Subject,
    /// How many requests to make at a time: one row for each. Not empty, none zero.
    pub concurrency: Vec<usize>,
    /// The settings that all rows share.
    pub load: Load,
    /// A file for the tables as Markdown.
    pub markdown: Option<PathBuf>,
    /// A file for the rows as CSV.
    pub csv: Option<PathBuf>,
    /// A file for a plot as SVG.
    pub plot: Option<PathBuf>,
}

/// What to measure.
#[derive(Debug, Clone, PartialEq)]
pub enum Subject {
    /// Both contenders, started for the comparison.
    Contenders {
        /// The configuration file. Its first service with `root` is used.
        config: PathBuf,
        /// The path to request.
        path: PathAndQuery,
        /// Whether the balancer and its workers use the ports of the file, instead of free ones.
        configured_ports: bool,
    },
    /// A server that is already running: `http://HOST[:PORT]/PATH`.
    Url(Uri),
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// More clients than requests.
    #[error(
        "--requests {requests} is less than --concurrency {concurrency}: no such number of \
         requests would ever be made at a time"
    )]
    TooFew {
        /// How many requests a row makes.
        requests: usize,
        /// How many of them at a time.
        concurrency: usize,
    },
    /// The URL is not of the form `http://HOST[:PORT]/PATH`.
    #[error("--url {0}: expected http://HOST:PORT/PATH, over plain http")]
    Url(Uri),
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The configuration is valid, but contains nothing to compare.
    #[error("{}: {why}", file.display())]
    Unfit {
        /// The file.
        file: PathBuf,
        /// What is missing in it.
        why: &'static str,
    },
    /// A contender's process can't be started.
    #[error("cannot start {name}: {source}")]
    Spawn {
        /// Which.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A contender exited by itself.
    #[error("{name} ended by itself, {status}: {said}")]
    Ended {
        /// Which.
        name: &'static str,
        /// Its exit status.
        status: ExitStatus,
        /// The last line of its log.
        said: String,
    },
    /// A contender did not become ready in time.
    #[error("{name} is not ready within {patience:?}: {said}")]
    NotReady {
        /// Which.
        name: &'static str,
        /// How long it had.
        patience: Duration,
        /// The last line of its log.
        said: String,
    },
    /// The host name in the URL can't be resolved.
    #[error("cannot look up {host}: {source}")]
    Lookup {
        /// The name and port.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// The reference request failed.
    #[error("{url}: {failure}; expected a whole answer with status 200")]
    Reference {
        /// The requested URL.
        url: String,
        /// What went wrong.
        failure: String,
    },
    /// No request of a row was complete.
    #[error("{url}: no request was complete at concurrency {concurrency}: {failures}")]
    NoneComplete {
        /// The requested URL.
        url: String,
        /// The row's concurrency.
        concurrency: usize,
        /// What went wrong.
        failures: String,
    },
    /// A report can't be written.
    #[error("cannot write {}: {source}", file.display())]
    Report {
        /// The file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The plotting library failed.
    #[error("cannot draw the plot: {0}")]
    Plot(String),
    /// SIGINT, SIGTERM or SIGHUP.
    #[error("interrupted")]
    Interrupted,
    /// Any other system error.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// All measurements of one contender.
#[derive(Debug, Clone, PartialEq)]
struct Series {
    name: String,
    rows: Vec<Measured>,
}

/// Runs the comparison, writes its tables to `out` and to the files that `options` names, and shows
/// the progress if standard error is a terminal.
///
/// Blocks until it is done, or until SIGINT, SIGTERM or SIGHUP ends it. In either case no process
/// that it started is left. Must be called on the main thread: the contenders die with the thread
/// that starts them.
///
/// # Errors
///
/// Everything that leaves no useful table: see [`BenchError`]. If some requests fail and others are
/// complete, the failures are part of the table.
pub fn run(options: &Options, out: &mut impl Write) -> Result<(), BenchError> {
    let load = &options.load;
    if let Some(&concurrency) = options.concurrency.iter().find(|&&c| c > load.requests) {
        return Err(BenchError::TooFew { requests: load.requests, concurrency });
    }
    // Better to fail now than after minutes.
    let files = [&options.markdown, &options.csv, &options.plot];
    files.into_iter().flatten().try_for_each(|file| may_write(file))?;
    // Each client needs a descriptor. If raising the limit fails, the failures will show it.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let all = runtime.block_on(measure(options))?;
    report(&all, options, out)
}

async fn measure(options: &Options) -> Result<Vec<Series>, BenchError> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let mut contenders = Contenders::new()?;
    let result = tokio::select! {
        result = compare(options, &mut contenders) => result,
        _ = signals.next() => Err(BenchError::Interrupted),
    };
    contenders.end().await;
    result
}

async fn compare(
    options: &Options,
    contenders: &mut Contenders,
) -> Result<Vec<Series>, BenchError> {
    let load = &options.load;
    let mut targets = Vec::new();
    match &options.subject {
        Subject::Url(url) => {
            let (target, length) = running(url, load.timeout).await?;
            targets.push((target.to_string(), target, length));
        }
        Subject::Contenders { config, path, configured_ports } => {
            let plan = Plan::read(config, *configured_ports)?;
            let balancer = contenders.start_balancer(&plan).await?;
            let threaded = contenders.start_threaded(&plan).await?;
            let names = [plan.balanced_name(), "thread-per-connection server".to_owned()];
            for (name, address) in names.into_iter().zip([balancer, threaded]) {
                let target = Target { address, host: address.to_string(), path: path.clone() };
                let length = load::reference(&target, load.timeout).await;
                let length = length.map_err(|failure| unusable(&target, &failure))?;
                targets.push((name, target, length));
            }
        }
    }
    let bar = bar(targets.len() * options.concurrency.len() * load.requests);
    let mut all: Vec<_> =
        targets.iter().map(|(name, ..)| Series { name: name.clone(), rows: Vec::new() }).collect();
    for &concurrency in &options.concurrency {
        for ((name, target, length), series) in targets.iter().zip(&mut all) {
            bar.set_message(format!("{name}, {concurrency} at a time"));
            let row = tokio::select! {
                row = load::drive(target, *length, load, concurrency, || bar.inc(1)) => row,
                error = contenders.ended() => return Err(error),
            };
            if row.complete() == 0 {
                return Err(BenchError::NoneComplete {
                    url: target.to_string(),
                    concurrency,
                    failures: table::failures(&row).unwrap_or_default(),
                });
            }
            series.rows.push(row);
        }
    }
    bar.finish_and_clear();
    Ok(all)
}

/// A server that is already running, at the first of its addresses that answers, and the length of
/// its answer.
async fn running(url: &Uri, at_most: Duration) -> Result<(Target, u64), BenchError> {
    let (Some(scheme), Some(authority)) = (url.scheme(), url.authority()) else {
        return Err(BenchError::Url(url.clone()));
    };
    if *scheme != Scheme::HTTP || authority.as_str().contains('@') {
        return Err(BenchError::Url(url.clone()));
    }
    let host = authority.to_string();
    // An IPv6 address keeps its brackets here.
    let named = format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(80));
    let addresses = match lookup_host(named.clone()).await {
        Ok(addresses) => addresses,
        Err(source) => return Err(BenchError::Lookup { host: named, source }),
    };
    let path = url.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    let mut last = BenchError::Url(url.clone());
    for address in addresses {
        let target = Target { address, host: host.clone(), path: path.clone() };
        match load::reference(&target, at_most).await {
            Ok(length) => return Ok((target, length)),
            Err(failure) => last = unusable(&target, &failure),
        }
    }
    Err(last)
}

fn unusable(target: &Target, failure: &Failure) -> BenchError {
    BenchError::Reference { url: target.to_string(), failure: failure.to_string() }
}

fn report(all: &[Series], options: &Options, out: &mut impl Write) -> Result<(), BenchError> {
    match out.write_all(table::text(all).as_bytes()).and_then(|()| out.flush()) {
        // The reader of the pipe has seen enough, but the user may still want the files.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        result => result?,
    }
    let write = |file: &Option<PathBuf>, text: &dyn Fn() -> Result<String, BenchError>| {
        let Some(file) = file else { return Ok(()) };
        let failed = |source| BenchError::Report { file: file.clone(), source };
        fs::write(file, text()?).map_err(failed)
    };
    write(&options.markdown, &|| Ok(table::markdown(all)))?;
    write(&options.csv, &|| Ok(table::csv(all)))?;
    write(&options.plot, &|| plot::svg(all).map_err(BenchError::Plot))
}

/// Whether `file` can be written or created, according to access(2). Changes nothing.
fn may_write(file: &Path) -> Result<(), BenchError> {
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let result = match file.try_exists() {
        Ok(true) if file.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        Ok(true) => access(file, AccessFlags::W_OK).map_err(io::Error::from),
        Ok(false) => access(folder, AccessFlags::W_OK | AccessFlags::X_OK).map_err(io::Error::from),
        Err(error) => Err(error),
    };
    result.map_err(|source| BenchError::Report { file: file.to_owned(), source })
}

/// A progress bar; none if standard error is no terminal.
fn bar(requests: usize) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    // The template is known to be well-formed.
    if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {pos}/{len} {wide_msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_length(requests as u64);
    bar
}
