//! The command line: turns argv into a command, runs it, and returns its exit status.

mod bench;
mod manual;
mod operate;
mod overview;
mod progress;
mod table;
mod watch;

use std::{
    ffi::OsString,
    io::{self, Write},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, CommandFactory, Parser, Subcommand, ValueHint};
use clap_complete::Shell;

use crate::{
    admin,
    bench::BenchError,
    config, daemon,
    logging::{self, Logging},
    printable, process, worker,
};
use operate::Target;

/// The configuration is invalid: `EX_CONFIG` of sysexits.h(3head).
const EXIT_CONFIG: u8 = 78;
/// The command line is invalid; clap uses the same status.
const EXIT_USAGE: u8 = 2;
/// The command failed at run time.
const EXIT_FAILURE: u8 = 1;

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("LBD_COMMIT"), ")");

/// Supervises an app's worker processes and balances connections between them.
///
/// Without a command it runs the daemon in the foreground, as the configuration says, until it is
/// stopped: SIGTERM or Ctrl-C stops it gracefully, a second one at once; SIGHUP reloads the
/// configuration.
#[derive(Debug, Parser)]
#[command(
    name = "lbd",
    version = VERSION,
    args_conflicts_with_subcommands = true,
    after_help = "Example: lbd --config lb.toml"
)]
struct Cli {
    #[command(flatten)]
    config: ConfigFile,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
struct ConfigFile {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "lb.toml")]
    config: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon with no file: one service, this command
    #[command(
        after_help = "Example: lbd run --listen 127.0.0.1:8080 --workers 4 -- node server.js\n\n\
        Each worker finds the port it has to listen on in $PORT; {port} and {slot} are replaced in \
        its arguments."
    )]
    Run {
        /// Where clients connect: IP:PORT or unix:PATH; may be given more than once
        #[arg(long, value_name = "ADDRESS", required = true)]
        listen: Vec<String>,
        /// How many workers [default: one a core]
        #[arg(long, value_name = "N")]
        workers: Option<u32>,
        /// The program and its arguments, after `--`
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// Read and validate the configuration and print what it would run; changes nothing
    #[command(after_help = "Example: lbd check --config lb.toml")]
    Check {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Show the services and workers of the running daemon
    #[command(after_help = "Example: lbd status --config /etc/lbd/lb.toml --watch\n\n\
        FOR is how long a worker has been in its state. CPU is what it used since its start, with \
        --watch how much of a core it uses. In a narrow terminal the least important columns are \
        left out.")]
    Status {
        #[command(flatten)]
        target: Target,
        /// Print what GET /status answers
        #[arg(long)]
        json: bool,
        /// Show it anew each second, until Ctrl-C
        #[arg(long)]
        watch: bool,
    },
    /// Have the running daemon read its configuration again
    ///
    /// As SIGHUP, but it waits until what changed is in force, and says why where it is refused.
    #[command(after_help = "Example: lbd reload --config /etc/lbd/lb.toml")]
    Reload {
        #[command(flatten)]
        target: Target,
    },
    /// Replace the workers of the running daemon one at a time
    ///
    /// With the settings that it has loaded: where the file has changed since, it says so.
    #[command(after_help = "Examples: lbd restart web\n          lbd restart web 2\n          \
        lbd restart --reload")]
    Restart {
        #[command(flatten)]
        target: Target,
        /// Have the file read again before, as `lbd reload` does; each worker is replaced once
        #[arg(long)]
        reload: bool,
        /// The service [default: all, one after the other]
        service: Option<String>,
        /// The slot of a single worker [default: all of the service]
        #[arg(value_parser = slot_number)]
        slot: Option<u32>,
    },
    /// Take a worker of the running daemon out of rotation
    ///
    /// It runs on, keeps the connections that it has and is given no new one, until `lbd resume`;
    /// so does whoever takes its place, after a restart or a reload. Meanwhile it is not replaced
    /// for being unhealthy or past a limit.
    #[command(after_help = "Example: lbd drain web 2 --wait")]
    Drain {
        #[command(flatten)]
        target: Target,
        /// The service
        service: String,
        /// The slot of the worker
        #[arg(value_parser = slot_number)]
        slot: u32,
        /// Wait until it holds no connection any more
        #[arg(long)]
        wait: bool,
    },
    /// Put a worker of the running daemon back into rotation
    #[command(after_help = "Example: lbd resume web 2")]
    Resume {
        #[command(flatten)]
        target: Target,
        /// The service
        service: String,
        /// The slot of the worker
        #[arg(value_parser = slot_number)]
        slot: u32,
    },
    /// Stop the running daemon gracefully, and wait until it is gone
    ///
    /// As SIGTERM. Ctrl-C ends the waiting, not the stop.
    #[command(after_help = "Example: lbd stop --config /etc/lbd/lb.toml")]
    Stop {
        #[command(flatten)]
        target: Target,
    },
    /// Serve a folder over HTTP: the built-in worker
    ///
    /// It listens on --listen, or on the socket passed as LISTEN_FDS, or on $PORT of 127.0.0.1.
    #[command(after_help = "Example: lbd worker --root www --listen 127.0.0.1:8080")]
    Worker {
        /// The folder that is served
        #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
        root: PathBuf,
        /// Where to listen
        #[arg(long, value_name = "ADDRESS")]
        listen: Option<SocketAddr>,
        /// A thread for each connection and blocking I/O: the baseline of the comparison
        #[arg(long)]
        threaded: bool,
        /// What the header X-Served-By says
        #[arg(long, hide = true, value_name = "NAME")]
        served_by: Option<String>,
    },
    /// Compare load-balanced async workers with a server that has a thread for each connection
    ///
    /// Starts both, on free ports, drives the one and the other at each concurrency, and prints a
    /// table for each and their ratio. A request is complete with status 200 and the right length.
    #[command(after_help = "Example: lbd bench --concurrency 1,10,100 --plot comparison.svg\n\n\
        Times are from connecting to the last byte; KB are of 1024 bytes; ratios are the balancer's \
        value through the threaded server's.")]
    Bench(Box<bench::Bench>),
    /// Print the completions of a shell
    #[command(after_help = "Example: lbd completions bash \
        >~/.local/share/bash-completion/completions/lbd\n\n\
        zsh looks for _lbd in the folders of $fpath, fish for lbd.fish in \
        ~/.config/fish/completions.")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page, or write all of them to a folder
    #[command(
        after_help = "Examples: lbd man | man -l -\n          lbd man ~/.local/share/man\n\n\
        The pages go where man looks for them in such a folder: man1/lbd.1, man5/lb.toml.5 and \
        those of the commands."
    )]
    Man {
        /// The folder, made where it is missing
        #[arg(value_hint = ValueHint::DirPath)]
        folder: Option<PathBuf>,
    },
}

/// Parses the arguments of this process, runs the command to its end, and gives its exit status:
/// 0 stopped as asked, 1 failed at run time, 2 wrong usage, 78 wrong configuration.
///
/// Errors go to standard error. Blocks until the command is done.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => {
            // --help and --version are reported this way too, with status 0. A closed pipe is no
            // reason to complain.
            let is_foreign = |argument: OsString| {
                argument.to_string_lossy().contains(|c| printable::is_control(c) && c != '\n')
            };
            if answer.use_stderr() && std::env::args_os().any(is_foreign) {
                logging::complain(&answer.render().to_string().trim_end());
            } else {
                let _ = answer.print();
            }
            return ExitCode::from(u8::try_from(answer.exit_code()).unwrap_or(EXIT_FAILURE));
        }
    };
    let mut passed = daemon::Passed::none();
    if matches!(cli.command, None | Some(Command::Run { .. })) {
        // SAFETY: before this, nothing has been opened, and no thread or process started.
        passed = unsafe { daemon::Passed::from_environment() };
        // In a container, the first process must reap orphans.
        match process::stay_as_init() {
            Ok(None) => {}
            Ok(Some(status)) => return status,
            Err(error) => {
                logging::complain(&format_args!("lbd: cannot be init of its container: {error}"));
                return ExitCode::from(EXIT_FAILURE);
            }
        }
    }
    let result = match cli.command {
        None => run_file(&cli.config.config, passed),
        Some(Command::Run { listen, workers, command }) => {
            run_command(&listen, workers, command, passed)
        }
        Some(Command::Check { config }) => check(&config.config),
        Some(Command::Status { target, json, watch }) => operate::status(&target, json, watch),
        Some(Command::Reload { target }) => operate::reload(&target),
        Some(Command::Restart { target, reload: true, service, slot }) => {
            operate::reload_and_restart(&target, service.as_deref(), slot)
        }
        Some(Command::Restart { target, reload: false, service, slot }) => {
            operate::restart(&target, service, slot)
        }
        Some(Command::Drain { target, service, slot, wait }) => {
            operate::drain(&target, &service, slot, wait)
        }
        Some(Command::Resume { target, service, slot }) => operate::resume(&target, &service, slot),
        Some(Command::Stop { target }) => operate::stop(&target),
        Some(Command::Worker { root, listen, threaded, served_by }) => {
            serve(&worker::Options { root, threaded, listen, served_by })
        }
        Some(Command::Bench(options)) => bench::run(*options),
        Some(Command::Completions { shell }) => completions(shell),
        Some(Command::Man { folder }) => man(folder.as_deref()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::complain(&error);
            ExitCode::from(error.status())
        }
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// The arguments that take the place of a configuration are invalid.
    #[error("{0}")]
    Usage(config::ConfigError),
    #[error("lbd: {0}")]
    Daemon(daemon::DaemonError),
    #[error("lbd: {0}")]
    Client(#[from] admin::ClientError),
    /// The daemon does not run, but others may.
    #[error("lbd: {error}{others}")]
    NotRunning { error: admin::ClientError, others: String },
    #[error("lbd: {0}")]
    Io(#[from] io::Error),
    #[error("lbd worker: {0}")]
    Worker(#[from] worker::WorkerError),
    #[error("lbd bench: {0}")]
    Bench(BenchError),
}

impl From<BenchError> for Error {
    fn from(error: BenchError) -> Self {
        match error {
            // The message already names the file.
            BenchError::Config(error) => Self::Config(error),
            error => Self::Bench(error),
        }
    }
}

impl From<daemon::DaemonError> for Error {
    fn from(error: daemon::DaemonError) -> Self {
        match error {
            daemon::DaemonError::Config(error) => Self::Config(error),
            error => Self::Daemon(error),
        }
    }
}

impl Error {
    fn status(&self) -> u8 {
        match self {
            Self::Config(_) => EXIT_CONFIG,
            Self::Usage(_) | Self::Bench(BenchError::TooFew { .. } | BenchError::Url(_)) => {
                EXIT_USAGE
            }
            Self::Bench(BenchError::Unfit { .. }) => EXIT_CONFIG,
            Self::Daemon(_)
            | Self::Client(_)
            | Self::NotRunning { .. }
            | Self::Io(_)
            | Self::Worker(_)
            | Self::Bench(_) => EXIT_FAILURE,
        }
    }
}

fn run_file(file: &std::path::Path, passed: daemon::Passed) -> Result<(), Error> {
    Ok(daemon::run(config::read(file)?, passed)?)
}

fn run_command(
    listen: &[String],
    workers: Option<u32>,
    command: Vec<String>,
    passed: daemon::Passed,
) -> Result<(), Error> {
    let config = config::from_command(listen, workers, command).map_err(Error::Usage)?;
    Ok(daemon::run(config, passed)?)
}

fn serve(options: &worker::Options) -> Result<(), Error> {
    let _logging = Logging::start(&config::Log::default()).map_err(daemon::DaemonError::from)?;
    Ok(worker::run(options)?)
}

fn completions(shell: Shell) -> Result<(), Error> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "lbd", &mut script);
    operate::print_as_is(&String::from_utf8_lossy(&script))
}

fn man(folder: Option<&std::path::Path>) -> Result<(), Error> {
    match folder {
        Some(folder) => Ok(manual::write(Cli::command(), folder)?),
        None => operate::print_as_is(&manual::main_page(Cli::command())?),
    }
}

fn check(file: &std::path::Path) -> Result<(), Error> {
    let config = config::read(file)?;
    let note = |line: Option<usize>, key: &str, kind: &str, message: &str| {
        let line = line.map(|line| format!("{line}:")).unwrap_or_default();
        let note = format!("{}:{line} {key}: {kind}: {message}", file.display());
        let _ = writeln!(io::stderr(), "{}", printable::line(&note));
    };
    for config::Problem { line, key, message } in config::warnings(&config) {
        note(line, key.as_deref().unwrap_or_default(), "warning", &message);
    }
    for config::Place { line, key } in &config.process_limits {
        note(
            Some(*line),
            key,
            "note",
            "refused where lbd is started without a cgroup of its own that has the pids controller; \
             whether it will have one can't be known here",
        );
    }
    for service in &config.services {
        operate::print(&format!("{}\n", config::describe(service)))?;
    }
    Ok(())
}

/// What clap says where it is none begins with what was given.
fn slot_number(text: &str) -> Result<u32, &'static str> {
    text.parse().map_err(
        |_| "expected the number of a slot, such as 0; `lbd status` shows them in the column SLOT",
    )
}
