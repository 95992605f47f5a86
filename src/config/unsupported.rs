//! What the documentation names and the code does not do yet: refused, never silently accepted.
//! Whoever writes the code removes the entry here.

use super::reader::Table;

/// Values of `route`.
const ROUTES: &[&str] = &["direct", "http"];

/// Reads `route`, of which there is nothing to keep while there is one way only.
pub(super) fn refuse_route(table: &mut Table<'_>) {
    table.read("route", |value| match value.string()? {
        route if ROUTES.contains(&route) => {
            value.refuse(format!("\"{route}\" is not supported yet; write \"proxy\" or remove it"))
        }
        _ => value.word(&[("proxy", ())]),
    });
}
