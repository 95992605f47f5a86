//! What a reload has to change: the difference of two configurations. Pure.

use std::sync::Arc;

use super::{Config, Level, Listen, Service};

/// What leads from an old configuration to a new one, apart from the order of services.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Diff {
    /// The names of services that are gone.
    pub removed: Vec<Arc<str>>,
    /// Services that are new, in the order of the new file.
    pub added: Vec<Service>,
    /// Services in both files that are not the same, in the order of the new file.
    pub changed: Vec<ServiceChange>,
    /// The new `[log] level` where it changed.
    pub log_level: Option<Level>,
    /// The new `[log] access` where it changed.
    pub log_access: Option<bool>,
    /// The file of `[admin] token-file` holds another token.
    pub token_changed: bool,
}

/// What changed in one service. An address that moves from one service to another in one reload is
/// `listen_removed` (or in a service of [`Diff::removed`]) there and `listen_added` here.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceChange {
    /// The service's name.
    pub name: Arc<str>,
    /// The whole service as it is to be.
    pub new: Service,
    /// Addresses to listen on from now on.
    pub listen_added: Vec<Listen>,
    /// Addresses not to listen on any more.
    pub listen_removed: Vec<Listen>,
    /// Who may connect to its unix sockets changed.
    pub access_changed: bool,
    /// Every worker has to be replaced: it would be started differently.
    pub worker_changed: bool,
    /// The number of workers or their ports changed.
    pub slots_changed: bool,
    /// What lbd alone reads changed: routing, health, restart, rollout, stop or limits.
    pub policy_changed: bool,
}

/// A change that a reload can't make.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a change of {} needs a restart", .keys.join(" and "))]
pub struct NeedsRestart {
    /// The keys that changed, such as `log.file`.
    pub keys: Vec<&'static str>,
}

/// What has to change for `new` to be in force instead of `old`.
///
/// # Errors
///
/// When they differ in something else than services, `[log] level` and `[log] access`. That both
/// come from the same file is taken for granted.
pub fn diff(old: &Config, new: &Config) -> Result<Diff, NeedsRestart> {
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
    let mut diff = Diff {
        log_level: (was.level != is.level).then_some(is.level),
        log_access: (was.access != is.access).then_some(is.access),
        token_changed: old.admin.token != new.admin.token,
        ..Diff::default()
    };
    for service in &old.services {
        if find(new, &service.name).is_none() {
            diff.removed.push(Arc::clone(&service.name));
        }
    }
    for service in &new.services {
        match find(old, &service.name) {
            None => diff.added.push(service.clone()),
            Some(before) if before != service => diff.changed.push(change(before, service)),
            Some(_) => {}
        }
    }
    Ok(diff)
}

impl Diff {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn find<'c>(config: &'c Config, name: &str) -> Option<&'c Service> {
    config.services.iter().find(|service| &*service.name == name)
}

fn change(old: &Service, new: &Service) -> ServiceChange {
    // Taken apart in full: a new field of Service has to find its place here.
    let Service {
        name,
        listen,
        unix_access,
        slots,
        worker,
        routing,
        health,
        restart,
        rollout,
        stop,
        limits,
    } = new;
    let without = |all: &[Listen], others: &[Listen]| -> Vec<Listen> {
        all.iter().filter(|address| !others.contains(address)).cloned().collect()
    };
    ServiceChange {
        name: Arc::clone(name),
        listen_added: without(listen, &old.listen),
        listen_removed: without(&old.listen, listen),
        access_changed: *unix_access != old.unix_access,
        worker_changed: *worker != old.worker,
        slots_changed: *slots != old.slots,
        policy_changed: *routing != old.routing
            || *health != old.health
            || *restart != old.restart
            || *rollout != old.rollout
            || *stop != old.stop
            || *limits != old.limits,
        new: new.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, num::NonZeroU32, path::PathBuf, time::Duration};

    use proptest::prelude::*;

    use super::*;
    use crate::config::{LogFormat, Rotate, Slots, UnixAccess, from_command};

    const NAMES: [&str; 4] = ["a", "b", "c", "d"];

    /// Services differ in the size of each part; each of six addresses belongs to one or to none,
    /// so that addresses move.
    fn config() -> impl Strategy<Value = Config> {
        let part = (0..2_u64, 0..2_u32, 0..2_u64, 0..5_usize, any::<bool>());
        let parts = prop::collection::vec(part, NAMES.len());
        let owners = prop::collection::vec(prop::option::of(0..NAMES.len()), 6);
        let order = Just(NAMES).prop_shuffle();
        (parts, owners, order, any::<bool>(), any::<bool>()).prop_map(
            |(parts, owners, order, access, debug)| {
                let mut config = base();
                let template = config.services.remove(0);
                for name in order {
                    let index = NAMES.iter().position(|known| *known == name).unwrap();
                    let (seconds, more, umask, policy, private) = parts[index];
                    let mut service = Service { name: name.into(), ..template.clone() };
                    service.listen = owned(&owners, index);
                    service.slots = Slots::Count(NonZeroU32::new(more + 1).unwrap());
                    if private {
                        let access = UnixAccess { mode: 0o600, ..UnixAccess::default() };
                        service.unix_access.insert(PathBuf::from("/s"), access);
                    }
                    Arc::make_mut(&mut service.worker).umask = u32::try_from(umask).ok();
                    let policies = [
                        &mut service.routing.idle_timeout,
                        &mut service.health.interval,
                        &mut service.restart.max_delay,
                        &mut service.rollout.settle,
                        &mut service.stop.timeout,
                        service.limits.max_age.get_or_insert_default(),
                    ];
                    for (at, policy_value) in policies.into_iter().enumerate() {
                        *policy_value +=
                            Duration::from_secs(if at == policy { seconds } else { 0 });
                    }
                    if !service.listen.is_empty() {
                        config.services.push(service);
                    }
                }
                config.log.access = access;
                config.log.level = if debug { Level::Debug } else { Level::Info };
                config
            },
        )
    }

    fn owned(owners: &[Option<usize>], index: usize) -> Vec<Listen> {
        let ports = (80..).zip(owners).filter(|(_, owner)| **owner == Some(index));
        ports.map(|(port, _)| Listen::Tcp((Ipv4Addr::LOCALHOST, port).into())).collect()
    }

    fn base() -> Config {
        from_command(&["127.0.0.1:80".to_owned()], Some(1), vec!["x".to_owned()]).unwrap()
    }

    /// Does what the parts of `diff` say, and nothing else.
    fn apply(diff: &Diff, mut config: Config) -> Config {
        config.services.retain(|service| !diff.removed.contains(&service.name));
        for change in &diff.changed {
            let service = config.services.iter_mut().find(|s| s.name == change.name).unwrap();
            let new = change.new.clone();
            service.listen.retain(|address| !change.listen_removed.contains(address));
            service.listen.extend(change.listen_added.iter().cloned());
            if change.access_changed {
                service.unix_access = new.unix_access;
            }
            if change.worker_changed {
                service.worker = new.worker;
            }
            if change.slots_changed {
                service.slots = new.slots;
            }
            if change.policy_changed {
                service.routing = new.routing;
                service.health = new.health;
                service.restart = new.restart;
                service.rollout = new.rollout;
                service.stop = new.stop;
                service.limits = new.limits;
            }
        }
        config.services.extend(diff.added.iter().cloned());
        config.log.level = diff.log_level.unwrap_or(config.log.level);
        config.log.access = diff.log_access.unwrap_or(config.log.access);
        config
    }

    /// Without the order of services and of addresses, which no diff holds.
    fn unordered(mut config: Config) -> Config {
        config.services.sort_by(|a, b| a.name.cmp(&b.name));
        config.services.iter_mut().for_each(|service| service.listen.sort());
        config
    }

    proptest! {
        #[test]
        fn a_diff_leads_from_the_old_to_the_new(old in config(), new in config()) {
            let diff = diff(&old, &new).unwrap();
            prop_assert_eq!(diff.is_empty(), unordered(old.clone()) == unordered(new.clone()));
            prop_assert_eq!(unordered(apply(&diff, old)), unordered(new));
        }

        #[test]
        fn nothing_leads_to_itself(config in config()) {
            prop_assert!(diff(&config, &config).unwrap().is_empty());
        }
    }

    #[test]
    fn an_address_moves_between_services() {
        let [one, two, three] = [80, 81, 82].map(|port| Listen::Tcp(([127, 0, 0, 1], port).into()));
        let with = |a: &[&Listen], b: &[&Listen]| {
            let mut config = base();
            let template = config.services.remove(0);
            for (name, listen) in [("a", a), ("b", b)] {
                let listen = listen.iter().map(|address| (*address).clone()).collect();
                config.services.push(Service { name: name.into(), listen, ..template.clone() });
            }
            config
        };
        let diff = diff(&with(&[&one, &two], &[&three]), &with(&[&one], &[&two, &three])).unwrap();
        let moved: Vec<_> =
            diff.changed.iter().map(|c| (&*c.name, &*c.listen_removed, &*c.listen_added)).collect();
        let two = [two];
        assert_eq!(moved, [("a", &two[..], &[][..]), ("b", &[][..], &two[..])]);
        for change in &diff.changed {
            assert!(!change.worker_changed && !change.slots_changed && !change.policy_changed);
            assert!(!change.access_changed);
        }
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
        let level = Diff { log_level: Some(Level::Trace), ..Diff::default() };
        assert_eq!(said(|new| new.log.level = Level::Trace), Ok(level));
        let access = Diff { log_access: Some(false), ..Diff::default() };
        assert_eq!(said(|new| new.log.access = false), Ok(access));
    }
}
