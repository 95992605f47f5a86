//! A service manager, as far as lbd can tell: it passes sockets (sd_listen_fds(3)) and is told how
//! lbd is (sd_notify(3)).

use std::{
    os::{fd::OwnedFd, unix::net::UnixDatagram},
    path::Path,
    process::{Command, Stdio},
    sync::{Condvar, Mutex, PoisonError},
    thread,
    time::Instant,
};

use tempfile::TempDir;

use super::{Daemon, PATIENCE};

/// One message: its fields, in order.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) read: Instant,
}

impl Message {
    fn parse(text: &str) -> Self {
        let field = |line: &str| {
            let (name, value) = line.split_once('=').unwrap_or_else(|| panic!("{text:?}"));
            (name.to_owned(), value.to_owned())
        };
        Self { fields: text.lines().map(field).collect(), read: Instant::now() }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(found, _)| found == name).map(|(_, value)| &**value)
    }

    /// The names of its fields.
    pub(crate) fn names(&self) -> Vec<&str> {
        self.fields.iter().map(|(name, _)| &**name).collect()
    }

    /// Whether its sentence has `part` in it.
    pub(crate) fn says(&self, part: &str) -> bool {
        self.get("STATUS").is_some_and(|status| status.contains(part))
    }
}

/// What it has been told, from the beginning.
#[derive(Debug)]
pub(crate) struct Manager {
    pub(crate) folder: TempDir,
    told: &'static (Mutex<Vec<Message>>, Condvar),
}

impl Manager {
    pub(crate) fn new() -> Self {
        let (manager, socket) = Self::deaf();
        manager.listen(socket);
        manager
    }

    /// One that does not take in what it is told, until it [listens](Self::listen).
    pub(crate) fn deaf() -> (Self, UnixDatagram) {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        (Self { folder, told: Box::leak(Box::default()) }, socket)
    }

    pub(crate) fn listen(&self, socket: UnixDatagram) {
        let told = self.told;
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length) = socket.recv(&mut buffer) {
                let text = std::str::from_utf8(&buffer[..length]).unwrap();
                told.0.lock().unwrap().push(Message::parse(text));
                told.1.notify_all();
            }
        });
    }

    /// `lbd --config lb.toml` as a service of this manager's.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lbd"));
        command.args(["--config", "lb.toml"]).env("NOTIFY_SOCKET", self.path());
        command
    }

    pub(crate) fn start(&self, config: &str) -> Daemon {
        Self::run(self.command(), config)
    }

    pub(crate) fn run(command: Command, config: &str) -> Daemon {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("lb.toml"), config).unwrap();
        Daemon::run(folder, command)
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("notify")
    }

    /// How many messages there were so far.
    pub(crate) fn now(&self) -> usize {
        self.told().len()
    }

    /// The messages after the first `since`.
    pub(crate) fn messages(&self, since: usize) -> Vec<Message> {
        self.told()[since..].to_vec()
    }

    /// Waits for a message like that, after the first `since`; its number, counted from 1.
    pub(crate) fn wait(
        &self,
        since: usize,
        what: &str,
        wanted: impl Fn(&Message) -> bool,
    ) -> (usize, Message) {
        let until = Instant::now() + PATIENCE;
        let mut told = self.told();
        loop {
            if let Some(at) = told[since..].iter().position(&wanted) {
                return (since + at + 1, told[since + at].clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "not told: {what}; but {:#?}", &told[since..]);
            told = self.told.1.wait_timeout(told, left).unwrap().0;
        }
    }

    pub(crate) fn wait_ready(&self, since: usize) -> (usize, Message) {
        self.wait(since, "READY=1", |message| message.get("READY") == Some("1"))
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Vec<Message>> {
        self.told.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts `lbd` in `folder`, where there is an lb.toml, with one or two sockets passed to it under
/// these names.
pub(crate) fn pass(folder: TempDir, sockets: Vec<(OwnedFd, &str)>) -> Daemon {
    let names: Vec<_> = sockets.iter().map(|(_, name)| *name).collect();
    // The shell has the pid that lbd will have, and moves the sockets to where they belong.
    let script = format!(
        r#"export LISTEN_FDS={} LISTEN_FDNAMES={} LISTEN_PID=$$
        exec "$0" "$@" 3<&0 {} 0</dev/null 1>/dev/null"#,
        sockets.len(),
        names.join(":"),
        if sockets.len() == 2 { "4<&1" } else { "" },
    );
    let mut command = Command::new("sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_lbd"), "--config", "lb.toml"]);
    let mut fds = sockets.into_iter().map(|(fd, _)| Stdio::from(fd));
    command.stdin(fds.next().unwrap());
    command.stdout(fds.next().unwrap_or_else(Stdio::null));
    assert!(fds.next().is_none(), "two at most");
    Daemon::launch(folder, command)
}

/// A folder with this as lb.toml.
pub(crate) fn folder_with(config: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), config);
    folder
}

fn write(folder: &Path, config: &str) {
    std::fs::write(folder.join("lb.toml"), config).unwrap();
}
