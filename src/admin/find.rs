//! Finds the daemons that run on this machine, as far as the calling user may talk to them.

use std::{path::PathBuf, time::Duration};

use futures_util::future::join_all;
use nix::unistd::{Uid, User};
use tokio::time::timeout;

use super::{
    Client, Status,
    folder::Unfit,
    location::{Instance, SocketLocation, all_folders, own_folders},
};

/// The most sockets to ask in one folder.
const MOST: usize = 64;
/// How long each daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// A running daemon.
#[derive(Debug, Clone)]
pub struct Running {
    /// The path of its admin socket.
    pub socket: PathBuf,
    /// Its process id, if it is visible from here.
    pub pid: Option<i32>,
    /// The user that runs it, as the kernel says.
    pub uid: u32,
    /// The user's name, or number.
    pub user: String,
    /// What it was started with, as the daemon says.
    pub instance: Option<Instance>,
    /// The names of its services, as the daemon says.
    pub services: Vec<String>,
    /// Whether commands find it by what it was started with, without naming its socket.
    pub is_found: bool,
}

/// The result of a search.
#[derive(Debug, Default)]
pub struct Survey {
    /// The daemons, in the order of their sockets' folders.
    pub running: Vec<Running>,
    /// Folders that were skipped because they can't be trusted, and why.
    pub passed_over: Vec<String>,
}

impl Survey {
    /// Asks all daemons at once. Only root learns about daemons of other users. Takes a few seconds
    /// at most, and needs a tokio runtime.
    pub async fn take() -> Self {
        let mut survey = Self::default();
        let (own, mut asked) = (own_folders(), Vec::new());
        for folder in all_folders() {
            match folder.look() {
                Ok(found) => {
                    let is_own = own.contains(&folder);
                    let location = |name| SocketLocation { folder: folder.clone(), name };
                    let names = found.sockets(MOST).into_iter();
                    asked.extend(names.map(|name| ask(location(name), is_own)));
                }
                // Missing, or not accessible to the calling user.
                Err(Unfit::Io(_)) => {}
                Err(why) => {
                    survey.passed_over.push(format!("{}: {why}", folder.path.display()));
                }
            }
        }
        for running in join_all(asked).await.into_iter().flatten() {
            let is_known = |known: &Running| running.pid.is_some() && known.pid == running.pid;
            if !survey.running.iter().any(is_known) {
                survey.running.push(running);
            }
        }
        survey
    }
}

/// `is_own` is true if the commands look for the calling user's own daemons there.
async fn ask(location: SocketLocation, is_own: bool) -> Option<Running> {
    let name = location.name.clone();
    let client = Client::at_location(location);
    let stream = timeout(PATIENCE, client.connect()).await.ok()?.ok()?;
    let peer = stream.peer_cred().ok()?;
    drop(stream);
    let status = timeout(PATIENCE, client.status()).await;
    let status = status.ok().and_then(Result::ok);
    let instance = status.as_ref().and_then(instance);
    Some(Running {
        socket: client.socket().to_owned(),
        pid: peer.pid().filter(|pid| *pid > 0),
        uid: peer.uid(),
        user: user_name(peer.uid()),
        // The daemon may claim anything. Only its socket's name decides whether commands find it.
        is_found: is_own
            && instance.as_ref().is_some_and(|instance| instance.socket_name() == name),
        instance,
        services: status.into_iter().flat_map(|s| s.services).map(|s| s.name).collect(),
    })
}

/// What a daemon was started with.
fn instance(status: &Status) -> Option<Instance> {
    match &status.config.path {
        Some(path) => Some(Instance::File(path.into())),
        None => Some(Instance::of_listen(status.services.first()?.listen.first()?)),
    }
}

fn user_name(uid: u32) -> String {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| uid.to_string(), |user| user.name)
}
