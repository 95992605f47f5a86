//! Reads `[service.NAME.limits]`. Its keys end up in three parts of the model.

use std::num::NonZeroU32;

use super::{
    Limits, Route,
    reader::{Table, Value},
    route, values,
};

/// Everything that the table says.
pub(super) struct Read {
    pub(super) open_files: Option<NonZeroU32>,
    pub(super) processes: Option<NonZeroU32>,
    pub(super) max_connections: Option<NonZeroU32>,
    pub(super) limits: Limits,
}

pub(super) fn read(mut table: Table<'_>, route: Route) -> Read {
    if route == Route::Direct {
        route::refuse_limits(&mut table);
    }
    let read = Read {
        open_files: table.read("open-files", number),
        processes: table.read("processes", |value| {
            value.limits_processes();
            number(value)
        }),
        max_connections: table.read("max-connections", number),
        limits: Limits {
            memory: table.read("memory", |value| value.with_unit(values::size)),
            max_age: table.read("max-age", |value| value.with_unit(values::positive_duration)),
        },
    };
    table.finish();
    read
}

fn number(value: Value<'_>) -> Option<NonZeroU32> {
    value.integer(1..=u32::MAX).and_then(NonZeroU32::new)
}
