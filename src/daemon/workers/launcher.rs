//! Starts a worker's process, and reports what happens to it as events.

use std::{
    cell::Cell, io, num::NonZeroU32, os::fd::AsFd, path::PathBuf, rc::Rc, sync::Arc, time::Duration,
};

use socket2::Socket;
use tokio::sync::mpsc;

use crate::{
    config::Program,
    daemon::descriptors::Descriptors,
    process::{
        self, Cgroup, Cgroups, Child, ChildEvent, Exit, Identity, LastWords, Launch, Outputs,
        Spawner,
    },
    supervisor::{self, Event, Spawn, WorkerId},
};

/// How long the report that a never healthy worker has ended waits for the rest of its output: the
/// last lines say why it ended.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// Starts workers' processes.
#[derive(Debug)]
pub(super) struct Launcher {
    spawner: Spawner,
    outputs: Outputs,
    descriptors: Descriptors,
    cgroups: Option<Cgroups>,
}

/// A process that was started.
#[derive(Debug)]
pub(super) struct Launched {
    pub child: Child,
    /// The last lines of its output.
    pub last_words: LastWords,
}

/// A worker's names.
#[derive(Debug, Clone, Copy)]
pub(super) struct Named<'a> {
    /// What the worker itself is told, in its environment.
    pub identity: Identity<'a>,
    /// Its name in the access log and in lbd's own messages.
    pub label: &'a str,
    /// The worker shares its port with others, so its answers are to carry the label instead of the
    /// port.
    pub by_label: bool,
}

/// A process could not be started.
#[derive(Debug, thiserror::Error)]
pub(super) enum LaunchError {
    #[error("cannot open its output: {0}")]
    Output(io::Error),
    #[error("cannot limit its processes: {0}")]
    Cgroup(io::Error),
    #[error("cannot start a process: {0}")]
    Spawn(io::Error),
}

impl Launcher {
    /// Without `cgroups` no worker gets a cgroup of its own. `output_rate` is how many bytes a
    /// second are taken of each worker's output.
    ///
    /// # Errors
    /// If the system denies a resource.
    pub(super) fn new(
        descriptors: Descriptors,
        cgroups: Option<Cgroups>,
        output_rate: NonZeroU32,
    ) -> io::Result<Self> {
        let (spawner, outputs) = (Spawner::new()?, Outputs::start(output_rate)?);
        Ok(Self { spawner, outputs, descriptors, cgroups })
    }

    /// Starts the program of a worker, and passes it these sockets.
    ///
    /// # Errors
    /// If the program can't be started. Nothing runs then.
    pub(super) fn launch(
        &mut self,
        order: &Spawn,
        named: Named<'_>,
        sockets: Vec<&Socket>,
    ) -> Result<Launched, LaunchError> {
        let spec = &*order.spec;
        let Named { identity, label, by_label } = named;
        let streams = self.outputs.open(&spec.output, identity).map_err(LaunchError::Output)?;
        let last_words = streams.last_words();
        let (program, argv) = match &spec.program {
            Program::Command(argv) => (None, process::expand(argv, identity)),
            Program::Root(root) => {
                let root = root.to_string_lossy().into_owned();
                let mut argv = vec!["lbd", "worker", "--root", &root];
                if by_label {
                    argv.extend(["--served-by", label]);
                }
                let argv = argv.into_iter().map(str::to_owned).collect();
                (Some(PathBuf::from("/proc/self/exe")), argv)
            }
        };
        let cgroup = self.cgroup(spec.processes)?;
        let launch = Launch {
            label: label.to_owned(),
            program,
            argv,
            env: process::environment(
                std::env::vars_os(),
                &spec.env,
                spec.user.as_deref(),
                identity,
            ),
            directory: spec.directory.clone(),
            listeners: sockets
                .into_iter()
                .map(|socket| (socket.as_fd(), order.service.to_string()))
                .collect(),
            streams,
            umask: spec.umask,
            user: spec.user.clone(),
            group: spec.group.clone(),
            open_files: Some(self.descriptors.of_worker(spec.open_files)),
            cgroup,
        };
        let child = self.spawner.spawn(launch).map_err(LaunchError::Spawn)?;
        Ok(Launched { child, last_words })
    }

    /// Reaps the orphans of guards that were killed. To be called on SIGCHLD.
    pub(super) fn reap(&self) {
        self.spawner.reap();
    }

    /// Makes a cgroup for a worker, if possible. Without one, a worker whose `processes` are
    /// limited can't be started.
    fn cgroup(&self, processes: Option<NonZeroU32>) -> Result<Option<Cgroup>, LaunchError> {
        let made = self.cgroups.as_ref().map(|cgroups| cgroups.make(processes)).transpose();
        match (made, processes) {
            (Ok(None), Some(_)) => Err(LaunchError::Cgroup(io::ErrorKind::Unsupported.into())),
            (Ok(cgroup), _) => Ok(cgroup),
            (Err(error), Some(_)) => Err(LaunchError::Cgroup(error)),
            (Err(error), None) => {
                tracing::warn!(%error, "a worker has no cgroup of its own");
                Ok(None)
            }
        }
    }
}

/// A child process, and what is needed to report its events.
pub(super) struct Reported {
    pub child: Child,
    pub id: WorkerId,
    pub service: Arc<str>,
    pub slot: u32,
    pub last_words: LastWords,
    /// Whether a probe has passed.
    pub was_healthy: Rc<Cell<bool>>,
    pub events: mpsc::Sender<Event>,
}

/// Turns the child's events into the supervisor's, until no process of it is left.
pub(super) async fn report(reported: Reported) {
    let Reported { mut child, id, service, slot, last_words, was_healthy, events } = reported;
    loop {
        let event = match child.next().await {
            Some(ChildEvent::Started { pid }) => Event::Started { id, pid },
            Some(ChildEvent::Failed(reason)) => Event::Failed { id, reason, cheap: false },
            Some(ChildEvent::Exited(exit)) => {
                if !was_healthy.get() {
                    last_words.complete(LAST_WORDS).await;
                }
                let said = last_words.lines();
                Event::Exited { id, exit: told(exit), said }
            }
            Some(ChildEvent::Output(error)) => {
                tracing::warn!(service = &*service, slot, error, "output not written");
                continue;
            }
            Some(ChildEvent::Gone) => Event::Gone { id },
            None => return,
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// How a program ended, as the supervisor's type.
fn told(exit: Exit) -> supervisor::Exit {
    match exit {
        Exit::Code(code) => supervisor::Exit::Code(code),
        Exit::Signal(number) => supervisor::Exit::Signal(number),
        Exit::Lost => supervisor::Exit::GuardKilled,
    }
}
