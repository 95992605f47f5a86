//! What a worker is told about itself: its environment, and the placeholders in its argv.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

/// Which worker it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity<'a> {
    /// `{service}`, `LBD_SERVICE`.
    pub service: &'a str,
    /// `{slot}`, `LBD_SLOT`.
    pub slot: u32,
    /// `{port}`, `PORT`; `None` where the worker listens on a unix socket.
    pub port: Option<u16>,
}

/// Variables that lbd's own service manager sets for lbd. A worker that inherited them could speak
/// in lbd's name (sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)).
const FOR_LBD_ALONE: [&str; 9] = [
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "MAINPID",
    "NOTIFY_SOCKET",
    "SYSTEMD_EXEC_PID",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];

/// Variables about the user that lbd runs as.
pub(super) const ABOUT_THE_USER: [&str; 4] = ["HOME", "LOGNAME", "SHELL", "USER"];

/// The worker's complete environment, each name once.
///
/// It starts with `own` (lbd's environment), without the variables that are for lbd alone and, if
/// the worker runs as another `user`, without those about lbd's user. Then come `extra`, and
/// `PORT`, `LBD_SERVICE` and `LBD_SLOT`. A worker without a port gets no `PORT`, not even lbd's
/// own. Starting the worker adds `LISTEN_*` if a socket is passed, and `HOME`, `LOGNAME`, `SHELL`
/// and `USER` if they are missing and a `user` is set.
pub fn environment(
    own: impl IntoIterator<Item = (OsString, OsString)>,
    extra: &BTreeMap<String, String>,
    user: Option<&str>,
    worker: Identity<'_>,
) -> Vec<(OsString, OsString)> {
    let is_one_of = |name: &OsStr, names: &[&str]| names.iter().any(|other| name == *other);
    let mut all: BTreeMap<OsString, OsString> = own
        .into_iter()
        .filter(|(name, _)| !is_one_of(name, &FOR_LBD_ALONE))
        .filter(|(name, _)| user.is_none() || !is_one_of(name, &ABOUT_THE_USER))
        .collect();
    all.extend(extra.iter().map(|(name, value)| (name.into(), value.into())));
    all.extend([
        ("LBD_SERVICE".into(), worker.service.into()),
        ("LBD_SLOT".into(), worker.slot.to_string().into()),
    ]);
    match worker.port {
        Some(port) => all.insert("PORT".into(), port.to_string().into()),
        None => all.remove(OsStr::new("PORT")),
    };
    all.into_iter().collect()
}

/// `argv` with `{port}`, `{slot}` and `{service}` replaced. Other braces stay as they are.
pub fn expand(argv: &[String], worker: Identity<'_>) -> Vec<String> {
    let port = worker.port.map(|port| port.to_string()).unwrap_or_default();
    let slot = worker.slot.to_string();
    let values = [("{port}", port.as_str()), ("{slot}", &slot), ("{service}", worker.service)];
    argv.iter().map(|argument| expand_one(argument, &values)).collect()
}

/// `path` with `{slot}` and `{service}` replaced.
pub(super) fn expand_path(path: &Path, worker: Identity<'_>) -> PathBuf {
    let slot = worker.slot.to_string();
    let values = [("{slot}", slot.as_str()), ("{service}", worker.service)];
    // A part that is not UTF-8 comes from the path of the configuration file, and is kept as it is.
    path.iter()
        .map(|part| match part.to_str() {
            Some(part) => expand_one(part, &values).into(),
            None => part.to_owned(),
        })
        .collect()
}

fn expand_one(mut rest: &str, values: &[(&str, &str)]) -> String {
    let mut expanded = String::with_capacity(rest.len());
    while let Some(brace) = rest.find('{') {
        expanded.push_str(&rest[..brace]);
        rest = &rest[brace..];
        let (taken, value) = values
            .iter()
            .find(|(name, _)| rest.starts_with(name))
            .map_or((1, "{"), |(name, value)| (name.len(), *value));
        expanded.push_str(value);
        rest = &rest[taken..];
    }
    expanded + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKER: Identity<'_> = Identity { service: "web", slot: 2, port: Some(9004) };

    fn pairs(list: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
        list.iter().map(|(name, value)| (name.into(), value.into())).collect()
    }

    #[test]
    fn a_worker_gets_lbds_environment_but_what_is_for_lbd_alone() {
        let own = pairs(&[
            ("PATH", "/bin"),
            ("HOME", "/root"),
            ("NOTIFY_SOCKET", "/run/n"),
            ("LISTEN_FDS", "1"),
            ("WATCHDOG_USEC", "5"),
            ("LBD_SERVICE", "of an lbd above"),
        ]);
        let extra = BTreeMap::from([
            ("NODE_ENV".to_owned(), "production".to_owned()),
            ("PORT".to_owned(), "1".to_owned()),
        ]);
        let expected = [
            ("HOME", "/root"),
            ("LBD_SERVICE", "web"),
            ("LBD_SLOT", "2"),
            ("NODE_ENV", "production"),
            ("PATH", "/bin"),
            ("PORT", "9004"),
        ];
        assert_eq!(environment(own.clone(), &extra, None, WORKER), pairs(&expected));
        assert_eq!(environment(own.clone(), &extra, Some("www"), WORKER), pairs(&expected[1..]));
        let on_unix = Identity { port: None, ..WORKER };
        assert_eq!(environment(own, &extra, Some("www"), on_unix), pairs(&expected[1..5]));
    }

    #[test]
    fn placeholders_are_replaced_once_and_other_braces_stay() {
        let argv = ["srv-{service}", "--port={port}", "{slot}{slot}", "{x}{", "{{port}}", "{por"];
        let argv = argv.map(str::to_owned);
        assert_eq!(
            expand(&argv, WORKER),
            ["srv-web", "--port=9004", "22", "{x}{", "{9004}", "{por"]
        );
        let tricky = Identity { service: "{port}", ..WORKER };
        assert_eq!(expand(&["{service}".to_owned()], tricky), ["{port}"]);
    }
}
