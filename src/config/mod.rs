//! The configuration: `lb.toml`, parsed once into types that can't hold an invalid value.
//!
//! All problems of a file are found in one pass, each with its line and key; a file with a problem
//! yields no configuration at all. Nothing here has side effects, but the file system is read (the
//! file itself, and the folders that it names), which blocks.

mod addresses;
mod admin;
mod describe;
pub(crate) mod diff;
mod error;
mod file;
mod limits;
mod log;
mod model;
mod paths;
mod reader;
mod route;
mod search_path;
mod service;
#[cfg(test)]
mod tests;
mod token;
mod values;
mod warnings;

use std::{
    collections::BTreeMap,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use toml::de::DeTable;

pub use describe::describe;
pub use error::{ConfigError, Problem};
pub use model::*;
pub use paths::{current_folder, logical, shells_folder};
pub use reader::shown_key;
pub use search_path::{DEFAULT_PATH, shown_path};
pub use token::Token;
pub use warnings::warnings;

use file::FileError;

use addresses::{Claim, Claimant, Claims};
use reader::{Source, Table};

/// A larger file is not a configuration.
const MAX_LENGTH: u64 = 1024 * 1024;

/// Reads and validates the file at `path`.
///
/// # Errors
///
/// Everything that is wrong with the file, or why it can't be read.
pub fn read(path: &Path) -> Result<Config, ConfigError> {
    let refuse = |line, message| ConfigError {
        file: Some(path.to_owned()),
        problems: vec![Problem { line, key: None, message }],
    };
    let absolute = logical(path).map_err(|error| refuse(None, error.to_string()))?;
    let bytes = load(path).map_err(|error| refuse(None, cannot_read(path, error)))?;
    let text = str::from_utf8(&bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
        refuse(Some(line), "not UTF-8 text; save the file as UTF-8".to_owned())
    })?;
    parse(text, &absolute)
        .map(|config| Config { digest: Some(digest_of(&bytes)), ..config })
        .map_err(|error| ConfigError { file: Some(path.to_owned()), ..error })
}

/// A hash of the content that the file at `path` has now, for comparison with [`Config::digest`].
/// `None` if the file can't be read.
#[must_use]
pub fn digest(path: &Path) -> Option<u64> {
    load(path).ok().map(|bytes| digest_of(&bytes))
}

fn load(path: &Path) -> Result<Vec<u8>, FileError> {
    file::read(path, MAX_LENGTH, |_| Ok(()))
}

fn digest_of(bytes: &[u8]) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(bytes)
}

/// Validates `text` as the content of the file at the absolute `path`. Relative paths are relative
/// to that file's folder.
///
/// # Errors
///
/// Everything that is wrong with it.
pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
    let (entries, errors) = DeTable::parse_recoverable(text);
    let source = Source::new(text, errors);
    let config = document(&source, entries.get_ref(), path);
    match source.into_problems() {
        problems if problems.is_empty() => Ok(config),
        problems => Err(ConfigError { file: Some(path.to_owned()), problems }),
    }
}

/// The configuration of `lbd run`: one service, `app`, that runs `argv` in the current folder.
/// `workers` defaults to the number of cores.
///
/// # Errors
///
/// Everything that is wrong with the arguments; the keys are the options' names.
pub fn from_command(
    listen: &[String],
    workers: Option<u32>,
    argv: Vec<String>,
) -> Result<Config, ConfigError> {
    let mut problems = Vec::new();
    let mut refuse = |key: &str, message: String| {
        problems.push(Problem { line: None, key: Some(key.to_owned()), message });
    };
    let directory = current_folder().unwrap_or_else(|error| {
        refuse("the current folder", error.to_string());
        PathBuf::new()
    });
    let mut claims = Claims::default();
    let mut addresses = Vec::new();
    for text in listen {
        match values::listen(text, &directory) {
            Ok(address) => {
                let key = "--listen".to_owned();
                addresses.push(address.clone());
                claims.push(Claim { address, by: Claimant::Listener, key, line: None });
            }
            Err(message) => refuse("--listen", message),
        }
    }
    if listen.is_empty() {
        refuse("--listen", "missing; write one such as --listen 127.0.0.1:8080".to_owned());
    }
    let workers = workers.map(values::workers).transpose().unwrap_or_else(|message| {
        refuse("--workers", message);
        None
    });
    if argv.is_empty() {
        refuse("the command", "missing; write one such as -- node server.js".to_owned());
    }
    for (number, word) in argv.iter().enumerate() {
        let read = if number == 0 { values::program } else { values::argument };
        if let Err(error) = read(word) {
            refuse("the command", error);
        }
    }
    problems.extend(claims.conflicts());
    if !problems.is_empty() {
        return Err(ConfigError { file: None, problems });
    }
    let service = service::of_command("app", addresses, workers, argv, &directory);
    Ok(Config {
        path: None,
        log: Log::default(),
        admin: Admin::default(),
        services: vec![service],
        process_limits: Vec::new(),
        digest: None,
        lines: BTreeMap::new(),
    })
}

impl Config {
    /// Refuses a configuration that limits processes; `why` says why this lbd can't do that.
    ///
    /// # Errors
    ///
    /// One problem for each such setting.
    pub fn refuse_process_limits(&self, why: &str) -> Result<(), ConfigError> {
        if self.process_limits.is_empty() {
            return Ok(());
        }
        let problem = |place: &Place| Problem {
            line: Some(place.line),
            key: Some(place.key.clone()),
            message: format!(
                "{why}; remove it, or run lbd where it has a cgroup with the pids controller, such as systemd's Delegate=yes gives it"
            ),
        };
        let problems = self.process_limits.iter().map(problem).collect();
        Err(ConfigError { file: self.path.clone(), problems })
    }
}

fn document<'a>(source: &'a Source, entries: &'a DeTable<'a>, path: &Path) -> Config {
    let base = path.parent().unwrap_or(path);
    let mut root = Table::root(source, entries);
    let log = log::read(root.table("log"), base);
    let mut claims = Claims::default();
    let admin = admin::read(root.table("admin"), base, &mut claims);
    let services = match root.take("service") {
        Some(value) => value.table().map(|table| services(&table, source, base, &mut claims)),
        None => source.lacks(NO_SERVICE),
    };
    for problem in claims.conflicts() {
        source.add(problem);
    }
    let lines = root.lines();
    root.finish();
    Config {
        path: Some(path.to_owned()),
        log,
        admin,
        services: services.unwrap_or_default(),
        process_limits: source.process_limits(),
        digest: None,
        lines,
    }
}

fn services(table: &Table<'_>, source: &Source, base: &Path, claims: &mut Claims) -> Vec<Service> {
    let mut services = Vec::new();
    for (name, value) in table.entries() {
        if !is_name(name) {
            value.refuse::<()>(
                "not a service's name; expected 1 to 64 letters, digits, `-`, `_` or `.`",
            );
        }
        if let Some(table) = value.table() {
            services.extend(service::read(name, table, base, claims));
        }
    }
    if table.entries().is_empty() {
        source.lacks::<()>(NO_SERVICE);
    }
    services
}

const NO_SERVICE: &str =
    "no service; add one such as [service.web], with `listen` and `command` or `root`";

fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=64).contains(&name.len()) && name.chars().all(allowed)
}

fn cannot_read(path: &Path, error: FileError) -> String {
    let error = match error {
        FileError::Io(error) => error,
        FileError::NotAFile if path.is_dir() => ErrorKind::IsADirectory.into(),
        FileError::NotAFile => {
            return "not a regular file; expected a text file such as lb.toml".to_owned();
        }
        FileError::TooLong => {
            let most = bytesize::ByteSize::b(MAX_LENGTH);
            return format!("more than {most}; expected a text file such as lb.toml");
        }
    };
    match error.kind() {
        ErrorKind::NotFound => "no such file; write it, or name another with --config".to_owned(),
        ErrorKind::PermissionDenied => {
            "permission denied; let the user that lbd runs as read it".to_owned()
        }
        ErrorKind::IsADirectory => "a directory; expected a file such as lb.toml".to_owned(),
        _ => format!("cannot be read: {error}"),
    }
}
