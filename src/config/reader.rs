//! A typed reader over toml's spanned tree. It records a problem and continues, so that one pass
//! over a file finds all of them; serde's derive would stop at the first.
//!
//! Readers return `None` both for what is absent and for what was refused. The caller continues
//! with the default, which is never used: a file with a problem yields no configuration.

use std::{cell::RefCell, collections::BTreeMap, ops::RangeInclusive, time::Duration};

use toml::{
    Spanned,
    de::{DeTable, DeValue, Error},
};

use super::{
    Place, Problem,
    values::{self, one_of, quoted, suggestion},
};

/// How many lines with a syntax error are reported one by one.
const SYNTAX_ERRORS: usize = 5;

/// The text being read and the problems found in it so far.
pub(super) struct Source {
    newlines: Vec<usize>,
    problems: RefCell<Vec<Problem>>,
    process_limits: RefCell<Vec<Place>>,
    /// Where the text stops being TOML. What follows may have been misread.
    damage: Option<usize>,
    /// Lines that toml itself refused. The rest of such a line is not checked again.
    refused: Vec<usize>,
}

impl Source {
    /// Starts with the errors of toml's parser about `text`.
    pub(super) fn new(text: &str, mut errors: Vec<Error>) -> Self {
        let newlines = text.bytes().enumerate().filter(|&(_, b)| b == b'\n').map(|(at, _)| at);
        let mut source = Self {
            newlines: newlines.collect(),
            problems: RefCell::default(),
            process_limits: RefCell::default(),
            damage: None,
            refused: Vec::new(),
        };
        errors.sort_by_key(start);
        for error in &errors {
            let at = start(error);
            let line = source.line(at);
            let message = if error.message() == DUPLICATE {
                let key = error.span().and_then(|span| text.get(span)).unwrap_or_default();
                format!("{} is defined twice; keep one of them", quoted(key))
            } else {
                source.damage.get_or_insert(at);
                syntax_message(error)
            };
            // One typo often causes several parser errors on the same line.
            if source.refused.last() != Some(&line) {
                source.refused.push(line);
                source.problems.get_mut().push(Problem { line: Some(line), key: None, message });
            }
        }
        source.fold_syntax_errors();
        source
    }

    /// A file that is no TOML at all has an error on each line: report only the first few.
    fn fold_syntax_errors(&mut self) {
        let problems = self.problems.get_mut();
        if problems.len() > SYNTAX_ERRORS {
            let more = problems.len() - SYNTAX_ERRORS;
            problems.truncate(SYNTAX_ERRORS);
            if let Some(last) = problems.last_mut() {
                last.message.push_str(&format!("; and {more} more lines are not valid TOML"));
            }
        }
    }

    /// Whether a missing key is really missing, and not just hidden by a syntax error.
    fn intact(&self) -> bool {
        self.damage.is_none()
    }

    /// Reports what the file as a whole is missing.
    pub(super) fn lacks<T>(&self, message: &str) -> Option<T> {
        if self.intact() {
            self.add(Problem { line: None, key: None, message: message.to_owned() });
        }
        None
    }

    pub(super) fn line(&self, at: usize) -> usize {
        self.newlines.partition_point(|&newline| newline < at) + 1
    }

    pub(super) fn report(&self, at: usize, key: &str, message: impl Into<String>) {
        let line = self.line(at);
        if self.refused.binary_search(&line).is_err() {
            self.add(Problem {
                line: Some(line),
                key: Some(key.to_owned()),
                message: message.into(),
            });
        }
    }

    pub(super) fn add(&self, problem: Problem) {
        self.problems.borrow_mut().push(problem);
    }

    /// Where the file limits the processes of a worker.
    pub(super) fn process_limits(&self) -> Vec<Place> {
        self.process_limits.borrow().clone()
    }

    /// The problems by line, and within a line in the order in which they were found.
    pub(super) fn into_problems(self) -> Vec<Problem> {
        let mut problems = self.problems.into_inner();
        problems.sort_by_key(|problem| problem.line);
        problems
    }
}

/// A table, and which of its keys have been read.
pub(super) struct Table<'a> {
    source: &'a Source,
    path: String,
    at: usize,
    /// `None` if the file has no such table: then every key is absent.
    entries: Option<&'a DeTable<'a>>,
    known: Vec<&'static str>,
}

impl<'a> Table<'a> {
    pub(super) fn root(source: &'a Source, entries: &'a DeTable<'a>) -> Self {
        Self { source, path: String::new(), at: 0, entries: Some(entries), known: Vec::new() }
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.entries.is_some_and(|entries| entries.contains_key(key))
    }

    /// The value of `key`, which now counts as a known key.
    pub(super) fn take(&mut self, key: &'static str) -> Option<Value<'a>> {
        self.known.push(key);
        self.entries?.get(key).map(|value| self.value(key, value))
    }

    pub(super) fn read<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(Value<'a>) -> Option<T>,
    ) -> Option<T> {
        self.take(key).and_then(read)
    }

    pub(super) fn duration(&mut self, key: &'static str, default: Duration) -> Duration {
        self.read(key, |value| value.with_unit(values::duration)).unwrap_or(default)
    }

    /// Like [`Self::duration`], but refuses zero.
    pub(super) fn positive_duration(&mut self, key: &'static str, default: Duration) -> Duration {
        self.read(key, |value| value.with_unit(values::positive_duration)).unwrap_or(default)
    }

    /// The table `key`, or an empty one if it is absent.
    pub(super) fn table(&mut self, key: &'static str) -> Self {
        self.take(key).and_then(|value| value.table()).unwrap_or_else(|| Self {
            source: self.source,
            path: self.key(key),
            at: self.at,
            entries: None,
            known: Vec::new(),
        })
    }

    /// All entries, in the order of the file, for tables whose keys the user chooses.
    pub(super) fn entries(&self) -> Vec<(&'a str, Value<'a>)> {
        let mut entries: Vec<_> = self.entries.iter().flat_map(|entries| entries.iter()).collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        let named = entries.into_iter().map(|(key, value)| {
            let name = key.get_ref().as_ref();
            (name, Value { at: key.span().start, ..self.value(name, value) })
        });
        named.collect()
    }

    /// The line of each key in this table and its subtables, by full key.
    pub(super) fn lines(&self) -> BTreeMap<String, usize> {
        let mut lines = BTreeMap::new();
        for (_, value) in self.entries() {
            if let DeValue::Table(entries) = value.value {
                let (source, path, at) = (value.source, value.key.clone(), value.at);
                let entries = Some(entries);
                lines.extend(Self { source, path, at, entries, known: Vec::new() }.lines());
            }
            lines.insert(value.key.clone(), value.line());
        }
        lines
    }

    /// Reports that `key` is missing.
    pub(super) fn missing(&self, key: &str, message: &str) {
        if self.source.intact() {
            self.source.report(self.at, &self.key(key), message);
        }
    }

    /// Reports that something in the table itself is missing.
    pub(super) fn lacks(&self, message: &str) {
        if self.source.intact() {
            self.source.report(self.at, &self.path, message);
        }
    }

    /// Refuses `keys` if `other`, without which they have no meaning, is not set.
    pub(super) fn only_with(&self, other: &str, keys: &[&str]) {
        if self.has(other) || !self.source.intact() {
            return;
        }
        for key in keys {
            if let Some(value) = self.entries.and_then(|entries| entries.get(*key)) {
                let message = format!("no effect without `{other}`; set that too, or remove it");
                self.source.report(value.span().start, &self.key(key), message);
            }
        }
    }

    /// Refuses all keys that have not been read.
    pub(super) fn finish(self) {
        for (key, value) in self.entries() {
            // After a syntax error, a key may appear to be in a table that it does not belong to.
            let stray = self.source.damage.is_some_and(|damage| damage < value.at);
            if self.known.contains(&key) || stray {
                continue;
            }
            value.refuse::<()>(match suggestion(key, &self.known) {
                Some(known) => format!("unknown key; did you mean `{known}`?"),
                None => {
                    let mut known = self.known.clone();
                    known.sort_unstable();
                    format!("unknown key; known here: {}", known.join(", "))
                }
            });
        }
    }

    fn value(&self, key: &str, value: &'a Spanned<DeValue<'a>>) -> Value<'a> {
        Value {
            source: self.source,
            key: self.key(key),
            at: value.span().start,
            value: value.get_ref(),
        }
    }

    fn key(&self, key: &str) -> String {
        let key = shown_key(key);
        if self.path.is_empty() { key } else { format!("{}.{key}", self.path) }
    }
}

/// A key as TOML writes it: quoted if it would otherwise be several keys, or none.
#[must_use]
pub fn shown_key(key: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !key.is_empty() && key.chars().all(bare) { key.to_owned() } else { quoted(key) }
}

/// A value, and its location.
pub(super) struct Value<'a> {
    source: &'a Source,
    key: String,
    at: usize,
    value: &'a DeValue<'a>,
}

impl<'a> Value<'a> {
    pub(super) fn key(&self) -> &str {
        &self.key
    }

    pub(super) fn line(&self) -> usize {
        self.source.line(self.at)
    }

    /// Reports what is wrong with the value.
    pub(super) fn refuse<T>(&self, message: impl Into<String>) -> Option<T> {
        self.source.report(self.at, &self.key, message);
        None
    }

    pub(super) fn string(&self) -> Option<&'a str> {
        match self.value {
            DeValue::String(text) => Some(text),
            _ => self.wrong_type("a string"),
        }
    }

    pub(super) fn boolean(&self) -> Option<bool> {
        match self.value {
            DeValue::Boolean(value) => Some(*value),
            _ => self.wrong_type("true or false"),
        }
    }

    pub(super) fn integer(&self, range: RangeInclusive<u32>) -> Option<u32> {
        let DeValue::Integer(digits) = self.value else {
            return self.wrong_type("an integer");
        };
        match u32::from_str_radix(digits.as_str(), digits.radix()) {
            Ok(number) if range.contains(&number) => Some(number),
            _ => {
                let (low, high) = range.into_inner();
                self.refuse(format!("expected a number from {low} to {high}, found {digits}"))
            }
        }
    }

    pub(super) fn is_integer(&self) -> bool {
        matches!(self.value, DeValue::Integer(_))
    }

    pub(super) fn is_table(&self) -> bool {
        matches!(self.value, DeValue::Table(_))
    }

    /// Parses a string with `parse`, whose error says what would be right.
    pub(super) fn parsed<T>(&self, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        parse(self.string()?).map_or_else(|message| self.refuse(message), Some)
    }

    /// The same for a duration or size, where a number without a unit is the likely mistake.
    pub(super) fn with_unit<T>(&self, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        match self.value {
            DeValue::Integer(digits) => {
                parse(&digits.to_string()).map_or_else(|m| self.refuse(m), Some)
            }
            _ => self.parsed(parse),
        }
    }

    /// Records that this value limits the processes of a worker.
    pub(super) fn limits_processes(&self) {
        let place = Place { line: self.line(), key: self.key.clone() };
        self.source.process_limits.borrow_mut().push(place);
    }

    /// One of these words.
    pub(super) fn word<T: Copy>(&self, words: &[(&str, T)]) -> Option<T> {
        self.parsed(|text| one_of(text, words))
    }

    /// The items of a non-empty array.
    pub(super) fn list(&self, wanted: &str) -> Option<Vec<Self>> {
        let DeValue::Array(items) = self.value else {
            return self.wrong_type(wanted);
        };
        if items.is_empty() {
            return self.refuse(format!("empty; expected {wanted}"));
        }
        let item = |item: &'a Spanned<DeValue<'a>>| Self {
            source: self.source,
            key: self.key.clone(),
            at: item.span().start,
            value: item.get_ref(),
        };
        Some(items.iter().map(item).collect())
    }

    /// The same, but a single value stands for a list of one.
    pub(super) fn one_or_list(self, wanted: &str) -> Option<Vec<Self>> {
        match self.value {
            DeValue::Array(_) => self.list(wanted),
            _ => Some(vec![self]),
        }
    }

    pub(super) fn table(&self) -> Option<Table<'a>> {
        match self.value {
            DeValue::Table(entries) => Some(Table {
                source: self.source,
                path: self.key.clone(),
                at: self.at,
                entries: Some(entries),
                known: Vec::new(),
            }),
            _ => self.wrong_type(&format!("a table, written [{}]", self.key)),
        }
    }

    pub(super) fn wrong_type<T>(&self, wanted: &str) -> Option<T> {
        let found = match self.value {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "an integer",
            DeValue::Float(_) => "a float",
            DeValue::Boolean(_) => "a boolean",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "an array",
            DeValue::Table(_) => "a table",
        };
        self.refuse(format!("expected {wanted}, found {found}"))
    }
}

/// toml's message for a key or table that occurs twice. Unlike its other errors, this one loses no
/// content.
const DUPLICATE: &str = "duplicate key";

fn start(error: &Error) -> usize {
    error.span().map_or(0, |span| span.start)
}

fn syntax_message(error: &Error) -> String {
    let message = error.message();
    // The parser takes a bare word or address for a number, and then expects "nothing" after it.
    for bare in [", expected nothing", ", expected literal string"] {
        if let Some(what) = message.strip_suffix(bare) {
            return format!("not valid TOML: {what}; put text in quotes, such as \"text\"");
        }
    }
    format!("not valid TOML: {message}")
}
