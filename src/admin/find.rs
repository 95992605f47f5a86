//! The daemons that run on this machine, as far as whoever asks may talk to them.

use std::{path::PathBuf, time::Duration};

use futures_util::future::join_all;
use nix::unistd::{Uid, User};
use tokio::time::timeout;

use super::{
    Client, Status,
    folder::Unfit,
    place::{Instance, Place, all_folders, own_folders},
};

/// So many sockets in one folder are asked.
const MOST: usize = 64;
/// How long each may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// A daemon that runs.
#[derive(Debug, Clone)]
pub struct Running {
    /// Its admin socket, as it was found.
    pub socket: PathBuf,
    /// Its process id, where that can be seen from here.
    pub pid: Option<i32>,
    /// Who runs it, as the kernel says.
    pub uid: u32,
    /// That user's name, or the number.
    pub user: String,
    /// What it was started with, as it says itself.
    pub instance: Option<Instance>,
    /// The names of its services, as it says itself.
    pub services: Vec<String>,
    /// Whether the commands find it by what it was started with, without its socket.
    pub is_found: bool,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Survey {
    /// The daemons, in the order of the folders that their sockets are in.
    pub running: Vec<Running>,
    /// Folders that were not looked into since they can't be trusted, and why.
    pub passed_over: Vec<String>,
}

impl Survey {
    /// Asks all there are, at once. Of another user only root learns anything. It takes a few seconds
    /// at most, and needs a tokio runtime.
    pub async fn take() -> Self {
        let mut survey = Self::default();
        let (own, mut asked) = (own_folders(), Vec::new());
        for folder in all_folders() {
            match folder.look() {
                Ok(found) => {
                    let is_own = own.contains(&folder);
                    let place = |name| Place { folder: folder.clone(), name };
                    let names = found.sockets(MOST).into_iter();
                    asked.extend(names.map(|name| ask(place(name), is_own)));
                }
                // Missing, or closed to whoever asks.
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

/// `is_own` where the commands look for their own daemons there.
async fn ask(place: Place, is_own: bool) -> Option<Running> {
    let name = place.name.clone();
    let client = Client::at_place(place);
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
        // It may say anything; this is what its socket is called for.
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
