//! Reads `[admin]`.

use std::path::Path;

use super::{
    Admin, Listen,
    addresses::{Claim, Claimant, Claims},
    reader::Table,
    unsupported, values,
};

/// Relative paths are relative to `base`. The socket is added to `claims`: no service can have it.
pub(super) fn read(mut table: Table<'_>, base: &Path, claims: &mut Claims) -> Admin {
    let socket = table.read("socket", |value| {
        let path = value.parsed(|text| values::socket_path(text, base))?;
        claims.push(Claim {
            address: Listen::Unix(path.clone()),
            by: Claimant::Listener,
            key: value.key().to_owned(),
            line: Some(value.line()),
        });
        Some(path)
    });
    unsupported::refuse(&mut table, unsupported::ADMIN);
    table.finish();
    Admin { socket }
}
