//! A reload: reads the file, compares it, binds what is new, and only then applies it. A file that
//! is refused changes nothing.

use std::{sync::Arc, time::Instant};

use tracing::{info, warn};

use super::{
    Daemon, Stage,
    direct_listeners::{SteerError, Steerable},
    frontends::Bound,
    requests::{Asker, Generations, Waiting},
    warnings,
};
use crate::{
    admin::{Failure, Reloaded},
    config::{
        self, Config, ConfigError,
        diff::{Diff, NeedsRestart, diff},
    },
    net::BindError,
    supervisor::Event,
};

/// Why a reload was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("{}", .0.one_line())]
    Config(#[from] ConfigError),
    #[error(transparent)]
    NeedsRestart(#[from] NeedsRestart),
    #[error("service {0}: {1}")]
    Bind(Arc<str>, BindError),
    #[error("service {0}: {1}")]
    Steer(Arc<str>, SteerError),
    #[error("lbd was started without a configuration file")]
    NoFile,
    #[error("there is no service {0:?} in the file")]
    NoService(String),
    #[error("lbd is stopping")]
    Stopping,
}

/// A reload of which no step can fail any more.
struct Prepared {
    new: Config,
    diff: Diff,
    bound: Bound,
    steerable: Steerable,
}

impl Daemon<'_> {
    /// Reads the file again, applies the difference, and logs the result. The askers get their
    /// answer when the reload is refused, or when the rollouts that follow have ended.
    pub(super) fn reload(&mut self, askers: Vec<Asker>) {
        if self.stage != Stage::Running {
            warn!(error = %Refused::Stopping, "reload refused");
            let failure = Failure::from(Refused::Stopping);
            return askers.into_iter().for_each(|asker| asker.refuse(failure.clone()));
        }
        // An address can be bound again only after its old listener is closed.
        if !self.closing.is_empty() {
            self.reload_wanted.get_or_insert_default().extend(askers);
            return;
        }
        // Before the first READY=1 the service manager still waits for the start.
        if self.ready {
            self.manager.reloading(Instant::now());
        }
        match self.prepare(&askers) {
            Ok(prepared) => self.commit(prepared, askers),
            Err(error) => {
                warn!(%error, "reload refused");
                self.reload_history.refused(error.to_string());
                let failure = Failure::from(error);
                askers.into_iter().for_each(|asker| asker.refuse(failure.clone()));
            }
        }
        if self.ready {
            self.tell_ready();
        }
    }

    /// Does everything that can fail: reads the file, compares it, and binds new listeners. If the
    /// result is dropped, nothing has changed.
    fn prepare(&self, askers: &[Asker]) -> Result<Prepared, Refused> {
        let path = self.config.path.as_deref().ok_or(Refused::NoFile)?;
        let new = config::read(path)?;
        let is_missing =
            |name: &&String| new.services.iter().all(|service| *service.name != ***name);
        let restarts = askers.iter().filter_map(|asker| match asker {
            Asker::Restart { service, .. } => service.as_ref(),
            Asker::Reload(_) => None,
        });
        // If all that was asked for is restarts, one for a missing service is refused before the
        // reload changes anything.
        if let Some(name) = restarts.clone().find(is_missing)
            && restarts.count() == askers.len()
        {
            return Err(Refused::NoService(name.clone()));
        }
        if let Some(why) = &self.no_process_limits {
            new.refuse_process_limits(why)?;
        }
        let diff = diff(&self.config, &new)?;
        let bound = self
            .frontends
            .bind(&new.services, &self.workers.bindings.direct_listeners)
            .map_err(|(service, error)| Refused::Bind(service, error))?;
        let steerable = self
            .workers
            .bindings
            .direct_listeners
            .prepare(&new.services, |address| self.frontends.socket(address, &bound))
            .map_err(|(service, error)| Refused::Steer(service, error))?;
        Ok(Prepared { new, diff, bound, steerable })
    }

    /// Applies the reload. The askers get their answer when the rollouts that follow have ended.
    fn commit(&mut self, prepared: Prepared, askers: Vec<Asker>) {
        let Prepared { new, diff, bound, steerable } = prepared;
        let (added, removed) = (diff.added.len(), diff.removed.len());
        let (changed, warnings) = (diff.changed.len(), Vec::new());
        let reloaded = Reloaded { added, removed, changed, warnings };
        let restarts = askers.iter().any(|asker| matches!(asker, Asker::Restart { .. }));
        let before = if restarts { self.generations() } else { Generations::new() };
        let ticket = self.requests.wait(Waiting::Reload { askers, reloaded, before });
        self.reload_history.accepted(ticket);
        self.frontends.detach(&bound);
        self.workers.bindings.direct_listeners.adopt(steerable, &new.services);
        if new.log.level != self.config.log.level {
            self.logging.set_level(new.log.level);
        }
        self.set_access(new.log.access);
        for service in new.services.iter().filter(|s| diff.changed.contains(&s.name)) {
            self.close_publics(&service.name, &service.listen);
            let listeners = self.frontends.take_closing(&service.name, &service.listen);
            if !listeners.is_empty() {
                self.close(listeners, None);
            }
        }
        if new.admin.token != self.config.admin.token {
            self.token.send_replace(new.admin.token.clone());
        }
        self.config = new;
        self.frontends.tell_unused(&self.config.services);
        let services = self.config.services.clone();
        self.handle(Event::Apply { services, ticket });
        self.forget_slots();
        for service in
            self.workers.bindings.direct_listeners.opened(bound.addresses(), bound.moved())
        {
            if let Some(service) = self.supervisor.service(&service) {
                self.publish(service.publication());
            }
        }
        self.frontends.open(bound);
        info!(added, removed, changed, "reloaded");
        warnings::tell(&self.config);
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        match refused {
            // The answer is read in a terminal, so each problem has a line of its own.
            Refused::Config(error) => Self::Refused(error.to_string()),
            Refused::NeedsRestart(_) | Refused::Bind(..) | Refused::Steer(..) => {
                Self::Refused(refused.to_string())
            }
            Refused::NoService(_) => Self::NotFound(refused.to_string()),
            Refused::NoFile | Refused::Stopping => Self::Failed(refused.to_string()),
        }
    }
}
