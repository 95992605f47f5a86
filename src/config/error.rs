//! What is wrong with a configuration: all problems, each with its location.

use std::{fmt, path::PathBuf};

/// An invalid configuration. Has at least one problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file, as the user named it; `None` for `lbd run`.
    pub file: Option<PathBuf>,
    /// The problems, by line.
    pub problems: Vec<Problem>,
}

/// One problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Counted from 1; `None` if the problem concerns the whole file.
    pub line: Option<usize>,
    /// The key in full, such as `service.web.ports`, or the option of the command line.
    pub key: Option<String>,
    /// What is wrong and what would be right, on one line.
    pub message: String,
}

impl ConfigError {
    /// All problems on one line, for a log.
    #[must_use]
    pub fn one_line(&self) -> String {
        self.joined("; ")
    }

    fn joined(&self, separator: &str) -> String {
        let lines: Vec<String> = self.problems.iter().map(|problem| self.line(problem)).collect();
        lines.join(separator)
    }

    fn line(&self, problem: &Problem) -> String {
        let place = match (&self.file, problem.line) {
            (Some(file), Some(line)) => format!("{}:{line}: ", file.display()),
            (Some(file), None) => format!("{}: ", file.display()),
            (None, _) => String::new(),
        };
        match &problem.key {
            Some(key) => format!("{place}{key}: {}", problem.message),
            None => format!("{place}{}", problem.message),
        }
    }
}

/// One line per problem: `lb.toml:7: service.web.ports: port 9002 is listed twice; …`.
impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.joined("\n"))
    }
}

impl std::error::Error for ConfigError {}
