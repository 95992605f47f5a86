//! The lines of lbd's log, as they come.

use std::{
    io::{BufRead, BufReader, Read},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// How long any single thing may take before a test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// One line of text: `TIME LEVEL MESSAGE key=value …`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Line {
    pub(crate) level: String,
    pub(crate) message: String,
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) raw: String,
    /// When it was read.
    pub(crate) read: Option<Instant>,
}

impl Line {
    pub(crate) fn parse(raw: &str) -> Self {
        let mut line = Self { raw: raw.to_owned(), read: Some(Instant::now()), ..Self::default() };
        let mut rest = raw.trim_start();
        let Some((_time, after)) = rest.split_once(' ') else { return line };
        rest = after.trim_start();
        if let Some((level, after)) = rest.split_once(' ') {
            level.clone_into(&mut line.level);
            rest = after;
        }
        let mut words = Vec::new();
        while !rest.is_empty() {
            let word_end = rest.find(' ').unwrap_or(rest.len());
            match rest[..word_end].split_once('=') {
                Some((key, _)) => {
                    let (value, after) = value(&rest[key.len() + 1..]);
                    line.fields.push((key.to_owned(), value));
                    rest = after;
                }
                None => {
                    words.push(&rest[..word_end]);
                    rest = &rest[word_end..];
                }
            }
            rest = rest.trim_start();
        }
        line.message = words.join(" ");
        line
    }

    /// The value of `key`; none where the line has no such field.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.fields.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The value of `key`, as what it has to be.
    pub(crate) fn number<T: std::str::FromStr>(&self, key: &str) -> T {
        let value = self.get(key).and_then(|value| value.parse().ok());
        value.unwrap_or_else(|| panic!("no number {key} in {}", self.raw))
    }

    pub(crate) fn pid(&self) -> i32 {
        self.number("pid")
    }

    pub(crate) fn is(&self, message: &str, fields: &[(&str, &str)]) -> bool {
        self.message == message && fields.iter().all(|&(key, value)| self.get(key) == Some(value))
    }
}

/// A value at the beginning of `text`, a word or a quoted one, and what is after it.
fn value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (word, rest) = text.split_at(text.find(' ').unwrap_or(text.len()));
        return (word.to_owned(), rest);
    };
    let (mut value, mut characters) = (String::new(), quoted.char_indices());
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            _ => value.push(character),
        }
    }
    panic!("a quote is not closed in {text:?}");
}

/// A place in the log, to look at what came later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mark(usize);

impl Mark {
    pub(crate) const START: Self = Self(0);
}

/// All lines so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Log(Arc<(Mutex<Lines>, Condvar)>);

#[derive(Debug, Default)]
struct Lines {
    all: Vec<Line>,
    ended: bool,
}

impl Log {
    /// Collects what comes from `stream` on a thread of its own, to its end.
    pub(crate) fn of(stream: impl Read + Send + 'static) -> Self {
        let log = Self::default();
        let writer = log.clone();
        thread::spawn(move || {
            for line in BufReader::new(stream).lines() {
                let Ok(line) = line else { break };
                writer.lock().all.push(Line::parse(&line));
                writer.0.1.notify_all();
            }
            writer.lock().ended = true;
            writer.0.1.notify_all();
        });
        log
    }

    pub(crate) fn now(&self) -> Mark {
        Mark(self.lock().all.len())
    }

    pub(crate) fn lines(&self, since: Mark) -> Vec<Line> {
        self.lock().all[since.0..].to_vec()
    }

    /// Waits for `count` lines like that.
    pub(crate) fn wait_for(
        &self,
        since: Mark,
        what: &str,
        count: usize,
        wanted: impl Fn(&Line) -> bool,
    ) -> Vec<Line> {
        let until = Instant::now() + PATIENCE;
        let mut lines = self.lock();
        loop {
            let found: Vec<_> = lines.all[since.0..].iter().filter(|l| wanted(l)).collect();
            if found.len() >= count {
                return found.into_iter().take(count).cloned().collect();
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!lines.ended && !left.is_zero(), "{} of {count}: {what}", found.len());
            lines = self.0.1.wait_timeout(lines, left).unwrap().0;
        }
    }

    /// Waits until the daemon has closed it.
    pub(crate) fn wait_for_end(&self) {
        let lines = self.lock();
        let open = |lines: &mut Lines| !lines.ended;
        let (_lines, waited) = self.0.1.wait_timeout_while(lines, PATIENCE, open).unwrap();
        assert!(!waited.timed_out(), "the log is still open");
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        // A wait that failed still has a log to show.
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn text(&self) -> String {
        let lines = self.lines(Mark::START);
        lines.iter().flat_map(|line| [line.raw.as_str(), "\n"]).collect()
    }
}
