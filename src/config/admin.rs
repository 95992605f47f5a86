//! Reads `[admin]`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use super::{
    Admin, Listen,
    addresses::{Claim, Claimant, Claims},
    reader::{Table, Value},
    token::Token,
    values,
};

/// Resolves relative paths against `base`. Adds the addresses to bind to `claims`, so that no
/// service can use them.
pub(super) fn read(mut table: Table<'_>, base: &Path, claims: &mut Claims) -> Admin {
    let socket = table.read("socket", |value| {
        let path = value.parsed(|text| values::socket_path(text, base))?;
        claims.push(claim(&value, Listen::Unix(path.clone())));
        Some(path)
    });
    let listen = listen(&mut table, claims);
    let token = table.read("token-file", |value| value.parsed(|text| token(text, base)));
    table.only_with("listen", &["token-file"]);
    table.finish();
    let (token_file, token) = token.unzip();
    Admin { socket, listen, token_file, token }
}

fn listen(table: &mut Table<'_>, claims: &mut Claims) -> Vec<SocketAddr> {
    let items = table.read("listen", |value| value.one_or_list("an address or a list of them"));
    let mut addresses = Vec::new();
    for item in items.into_iter().flatten() {
        let Some(address) = item.parsed(values::tcp_listen) else { continue };
        claims.push(claim(&item, Listen::Tcp(address)));
        addresses.push(address);
    }
    addresses
}

fn token(text: &str, base: &Path) -> Result<(PathBuf, Token), String> {
    let path = values::path_in(base, text)?;
    let token = Token::read(&path)?;
    Ok((path, token))
}

fn claim(value: &Value<'_>, address: Listen) -> Claim {
    let (key, line) = (value.key().to_owned(), Some(value.line()));
    Claim { address, by: Claimant::Listener, key, line }
}
