//! Compares two configurations: which services differ, and whether a reload can lead from one to
//! the other at all. Pure.

use std::sync::Arc;

use super::{Config, Service};

/// The names of the services that differ between two configurations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Diff {
    /// Services that are only in the old configuration.
    pub(crate) removed: Vec<Arc<str>>,
    /// Services that are only in the new configuration, in the order of its file.
    pub(crate) added: Vec<Arc<str>>,
    /// Services in both whose settings differ, in the order of the new file.
    pub(crate) changed: Vec<Arc<str>>,
}

/// A change that a reload can't make.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a change of {} needs a restart", .keys.join(" and "))]
pub(crate) struct NeedsRestart {
    /// The keys that changed, such as `log.file`.
    pub(crate) keys: Vec<&'static str>,
}

/// The differences between `old` and `new`.
///
/// # Errors
///
/// If they differ in a setting that only a restart can change. Both are assumed to come from the
/// same file.
pub(crate) fn diff(old: &Config, new: &Config) -> Result<Diff, NeedsRestart> {
    let (was, is) = (&old.log, &new.log);
    let fixed = [
        ("log.format", was.format != is.format),
        ("log.file", was.file != is.file),
        ("log.rotate", was.rotate != is.rotate),
        ("log.keep", was.keep != is.keep),
        ("log.output-rate", was.output_rate != is.output_rate),
        ("admin.socket", old.admin.socket != new.admin.socket),
        ("admin.listen", old.admin.listen != new.admin.listen),
        ("admin.token-file", old.admin.token_file != new.admin.token_file),
    ];
    let keys: Vec<_> =
        fixed.into_iter().filter_map(|(key, differs)| differs.then_some(key)).collect();
    if !keys.is_empty() {
        return Err(NeedsRestart { keys });
    }
    let mut diff = Diff::default();
    for service in &old.services {
        if find(new, &service.name).is_none() {
            diff.removed.push(Arc::clone(&service.name));
        }
    }
    for service in &new.services {
        match find(old, &service.name) {
            None => diff.added.push(Arc::clone(&service.name)),
            Some(before) if before != service => diff.changed.push(Arc::clone(&service.name)),
            Some(_) => {}
        }
    }
    Ok(diff)
}

fn find<'c>(config: &'c Config, name: &str) -> Option<&'c Service> {
    config.services.iter().find(|service| &*service.name == name)
}

#[cfg(test)]
mod tests {
    use std::{num::NonZeroU32, path::PathBuf};

    use super::*;
    use crate::config::{Level, Listen, LogFormat, Rotate, Slots, from_command};

    fn base() -> Config {
        from_command(&["127.0.0.1:80".to_owned()], Some(1), vec!["x".to_owned()]).unwrap()
    }

    /// A service of each of these names, with so many workers.
    fn services(named: &[(&str, u32)]) -> Config {
        let mut config = base();
        let template = config.services.remove(0);
        config.services.extend(named.iter().map(|&(name, workers)| Service {
            name: name.into(),
            slots: Slots::Count(NonZeroU32::new(workers).unwrap()),
            ..template.clone()
        }));
        config
    }

    #[test]
    fn services_come_go_and_change() {
        let old = services(&[("a", 1), ("b", 1), ("c", 1)]);
        let new = services(&[("d", 1), ("c", 2), ("b", 1), ("e", 1)]);
        let names =
            |names: &[&str]| names.iter().map(|&name| name.into()).collect::<Vec<Arc<str>>>();
        let (removed, added, changed) = (names(&["a"]), names(&["d", "e"]), names(&["c"]));
        assert_eq!(diff(&old, &new), Ok(Diff { removed, added, changed }));
        assert_eq!(diff(&old, &old), Ok(Diff::default()));
    }

    #[test]
    fn an_address_that_moves_changes_both_services() {
        let with = |index: usize| {
            let mut config = services(&[("a", 1), ("b", 1), ("c", 1)]);
            config.services[index].listen.push(Listen::Tcp(([127, 0, 0, 1], 81).into()));
            config
        };
        let diff = diff(&with(0), &with(1)).unwrap();
        assert_eq!(diff.changed, ["a".into(), "b".into()]);
    }

    type Edit = fn(&mut Config);

    #[test]
    fn what_a_reload_cannot_change_needs_a_restart() {
        let said = |edit: Edit| {
            let mut new = base();
            edit(&mut new);
            diff(&base(), &new).map_err(|error| error.to_string())
        };
        let refused: [(Edit, &str); 8] = [
            (|new| new.log.format = LogFormat::Json, "a change of log.format needs a restart"),
            (
                |new| new.log.file = Some(PathBuf::from("/x")),
                "a change of log.file needs a restart",
            ),
            (|new| new.log.rotate = Rotate::Daily, "a change of log.rotate needs a restart"),
            (|new| new.log.keep = NonZeroU32::new(1), "a change of log.keep needs a restart"),
            (
                |new| new.admin.socket = Some(PathBuf::from("/x")),
                "a change of admin.socket needs a restart",
            ),
            (
                |new| new.admin.listen.push(([127, 0, 0, 1], 9).into()),
                "a change of admin.listen needs a restart",
            ),
            (
                |new| new.admin.token_file = Some(PathBuf::from("/x")),
                "a change of admin.token-file needs a restart",
            ),
            (
                |new| {
                    new.log.file = Some(PathBuf::from("/x"));
                    new.log.rotate = Rotate::Hourly;
                    new.log.level = Level::Trace;
                },
                "a change of log.file and log.rotate needs a restart",
            ),
        ];
        for (edit, message) in refused {
            assert_eq!(said(edit), Err(message.to_owned()));
        }
        assert_eq!(said(|new| new.log.level = Level::Trace), Ok(Diff::default()));
        assert_eq!(said(|new| new.log.access = false), Ok(Diff::default()));
    }
}
