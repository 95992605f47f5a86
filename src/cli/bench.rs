//! The options of `lbd bench`.

use std::{io, path::PathBuf, time::Duration};

use clap::{Args, builder::RangedU64ValueParser};
use hyper::{Uri, http::uri::PathAndQuery};

use super::Error;
use crate::bench::{self, Load, Options, Subject};

/// The longest time that an option takes.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// What drives two servers, or one that runs already.
#[derive(Debug, Args)]
pub(super) struct Bench {
    /// The configuration file: the first service in it with `root`
    #[arg(long, value_name = "FILE", default_value = "lb.toml")]
    config: PathBuf,
    /// Start the balancer and its workers on the ports of the file, not on free ones
    #[arg(long)]
    configured_ports: bool,
    /// What to ask for
    #[arg(long, value_name = "PATH", default_value = "/page.html", value_parser = path)]
    path: PathAndQuery,
    /// Drive this instead, which runs already: http://HOST:PORT/PATH
    #[arg(long, value_name = "URL", conflicts_with_all = ["config", "configured_ports", "path"])]
    url: Option<Uri>,
    /// How many requests to make for each row
    #[arg(long, value_name = "N", default_value = "1000", value_parser = count(10_000_000))]
    requests: usize,
    /// How many of them at a time: a row for each
    #[arg(
        long,
        value_name = "N,…",
        default_value = "1,5,10,20,50,100",
        value_delimiter = ',',
        value_parser = count(10_000)
    )]
    concurrency: Vec<usize>,
    /// Keep connections from one request to the next, instead of a new one for each
    #[arg(long)]
    keep_alive: bool,
    /// Make so many requests a second, whatever the target does, and count from when each was due
    #[arg(long, value_name = "N", value_parser = rate)]
    rate: Option<f64>,
    /// How long one request may take
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
    timeout: Duration,
    /// How long a row may take: what is not answered by then has failed
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = time)]
    time_limit: Duration,
    /// Write the tables to this file too, as Markdown
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Write the rows to this file, as CSV
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Draw requests a second and p99 over concurrency to this file, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// Measures, and prints the tables.
pub(super) fn run(args: Bench) -> Result<(), Error> {
    let subject = match args.url {
        Some(url) => Subject::Url(url),
        None => Subject::Contenders {
            config: args.config,
            path: args.path,
            configured_ports: args.configured_ports,
        },
    };
    let load = Load {
        requests: args.requests,
        keep_alive: args.keep_alive,
        rate: args.rate,
        timeout: args.timeout,
        time_limit: args.time_limit,
    };
    let Bench { concurrency, markdown, csv, plot, .. } = args;
    let options = Options { subject, concurrency, load, markdown, csv, plot };
    Ok(bench::run(&options, &mut io::stdout().lock())?)
}

fn count(most: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=most)
}

fn path(text: &str) -> Result<PathAndQuery, String> {
    if !text.starts_with('/') {
        return Err("expected a path that begins with /".to_owned());
    }
    text.parse().map_err(|error: hyper::http::uri::InvalidUri| error.to_string())
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.001..=1e6).contains(&rate) => Ok(rate),
        _ => Err("expected a number of requests a second from 0.001 to 1000000".to_owned()),
    }
}

fn time(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if !time.is_zero() && time <= DAY => Ok(time),
        _ => Err("expected a time such as 500ms or 10s, of a day at most".to_owned()),
    }
}
