//! Reads `[log]`.

use std::{num::NonZeroU32, path::Path};

use super::{Level, Log, LogFormat, Rotate, reader::Table, values};

/// Relative paths are relative to `base`.
pub(super) fn read(mut table: Table<'_>, base: &Path) -> Log {
    let default = Log::default();
    let log = Log {
        level: table.read("level", |v| v.word(&LEVELS)).unwrap_or(default.level),
        format: table.read("format", |v| v.word(&FORMATS)).unwrap_or(default.format),
        access: table.read("access", |v| v.boolean()).unwrap_or(default.access),
        file: table.read("file", |v| v.parsed(|text| values::path_in(base, text))),
        rotate: table.read("rotate", |v| v.word(&ROTATIONS)).unwrap_or(default.rotate),
        output_rate: table
            .read("output-rate", |v| v.parsed(values::rate))
            .unwrap_or(default.output_rate),
        keep: table.read("keep", |v| v.integer(1..=u32::MAX)).and_then(NonZeroU32::new),
    };
    table.only_with("file", &["rotate", "keep"]);
    table.finish();
    log
}

const LEVELS: [(&str, Level); 5] = [
    ("error", Level::Error),
    ("warn", Level::Warn),
    ("info", Level::Info),
    ("debug", Level::Debug),
    ("trace", Level::Trace),
];

const FORMATS: [(&str, LogFormat); 2] = [("text", LogFormat::Text), ("json", LogFormat::Json)];

const ROTATIONS: [(&str, Rotate); 3] =
    [("never", Rotate::Never), ("hourly", Rotate::Hourly), ("daily", Rotate::Daily)];
