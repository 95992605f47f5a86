//! The client side of the admin API: finds a running daemon and talks to it over HTTP.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Method, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use nix::unistd::geteuid;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};

use super::{
    Reloaded, Restarted, SlotDrain, Status,
    folder::{Kind, Pinned, Unfit},
    location::{Instance, Origin, SocketFolder, SocketLocation, other_folders},
};

/// How long a daemon may take to accept a connection, and to answer requests that need no waiting.
const PATIENCE: Duration = Duration::from_secs(10);
/// The pause between two attempts to connect to a socket whose accept queue is full.
const PAUSE: Duration = Duration::from_millis(20);
/// The largest answer. That of a daemon with 50,000 workers is smaller.
const MAX_ANSWER: usize = 64 * 1024 * 1024;
/// The largest error message.
const MAX_REFUSAL: usize = 64 * 1024;

/// A running daemon. Every method needs a tokio runtime, and opens its own connection.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
    found: Found,
}

/// How the socket was found, and so which owners are acceptable.
#[derive(Debug, Clone)]
enum Found {
    /// The user named the socket.
    Named,
    /// The socket is where daemons usually have theirs.
    In(SocketLocation),
}

/// Why a daemon could not be reached, or did not do what was requested.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no socket where this daemon's would be.
    #[error("no lbd runs with {instance}: nothing listens on {}{}", location.display(), passed(passed_over))]
    NotRunning {
        /// Which daemon.
        instance: Instance,
        /// Where its socket would be.
        location: PathBuf,
        /// Folders that were skipped, and why.
        passed_over: Vec<String>,
    },
    /// The folder of the socket can't be trusted.
    #[error("{} is passed over: {why}", folder.display())]
    PassedOver {
        /// The folder.
        folder: PathBuf,
        /// Why.
        why: String,
    },
    /// The daemon runs as another user, which is not trusted enough for this request.
    #[error(
        "no lbd of yours runs with {instance}, but one of user {uid}, whose file that is not; name \
         it by --socket {}", socket.display()
    )]
    OfAnother {
        /// Which daemon.
        instance: Instance,
        /// The user that runs it.
        uid: u32,
        /// Its socket.
        socket: PathBuf,
    },
    /// Nobody listens on the socket that was named.
    #[error("no lbd runs here: nothing listens on {}", .0.display())]
    NothingListens(PathBuf),
    /// The socket can't be connected to.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket belongs to another user.
    #[error("{} belongs to user {uid}, and neither to you nor to root", path.display())]
    Stranger {
        /// The socket.
        path: PathBuf,
        /// The owner.
        uid: u32,
    },
    /// The daemon refused, with this message.
    #[error("{0}")]
    Refused(String),
    /// The answer does not come from lbd.
    #[error("unexpected answer from {}: {reason}", path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is unexpected.
        reason: String,
    },
    /// The daemon ended before it answered.
    #[error("lbd ended before it answered")]
    Ended,
    /// The daemon accepts connections but does not answer.
    #[error("lbd does not answer on {}", .0.display())]
    Silent(PathBuf),
}

fn passed(over: &[String]) -> String {
    over.iter().map(|told| format!("; {told}")).collect()
}

impl Client {
    /// The daemon that listens on `path`.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path, found: Found::Named }
    }

    /// The daemon whose socket may be at this position.
    pub(super) fn at_location(location: SocketLocation) -> Self {
        Self { path: location.socket(), found: Found::In(location) }
    }

    /// The path of its socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.path
    }

    /// The daemon's user, if it is not the calling user.
    #[must_use]
    pub fn other_user(&self) -> Option<u32> {
        match &self.found {
            Found::In(SocketLocation {
                folder: SocketFolder { origin: Origin::Other(user), .. },
                ..
            }) => Some(*user),
            Found::In(_) | Found::Named => None,
        }
    }

    /// Finds the first of these instances that runs, wherever its socket is. For root, that may be
    /// another user's daemon.
    ///
    /// # Errors
    ///
    /// [`ClientError::NotRunning`], or why the daemon that was found can't be used.
    pub async fn find(instances: &[Instance]) -> Result<Self, ClientError> {
        let mut passed_over = Vec::new();
        let mut trouble = None;
        for instance in instances {
            for location in instance.locations() {
                let client = Self::at_location(location);
                match client.connect().await {
                    Ok(_) => return Ok(client),
                    Err(ClientError::NothingListens(_)) => {}
                    Err(error @ ClientError::PassedOver { .. }) => {
                        let told = error.to_string();
                        if !passed_over.contains(&told) {
                            passed_over.push(told);
                        }
                    }
                    // A later candidate may work.
                    Err(error) => _ = trouble.get_or_insert(error),
                }
            }
        }
        if geteuid().is_root()
            && let Some(client) = Self::find_of_others(instances).await
        {
            return Ok(client);
        }
        if let Some(trouble) = trouble {
            return Err(trouble);
        }
        let Some(instance) = instances.first().cloned() else {
            return Err(ClientError::NothingListens(PathBuf::new()));
        };
        let location = instance.locations().first().map(SocketLocation::socket).unwrap_or_default();
        Err(ClientError::NotRunning { instance, location, passed_over })
    }

    /// Another user's daemon, if exactly one matches.
    async fn find_of_others(instances: &[Instance]) -> Option<Self> {
        let others = other_folders();
        for instance in instances {
            let mut found = None;
            for folder in &others {
                let name = instance.socket_name();
                let client = Self::at_location(SocketLocation { folder: folder.clone(), name });
                let is_there = timeout(PATIENCE / 10, client.connect()).await;
                if matches!(is_there, Ok(Ok(_))) && found.replace(client).is_some() {
                    return None;
                }
            }
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// Refuses to change a daemon that another user runs with a configuration file that is not that
    /// user's: the other user may have started it to be mistaken for the wanted one.
    ///
    /// # Errors
    ///
    /// [`ClientError::OfAnother`].
    pub fn may_change(&self, instances: &[Instance]) -> Result<(), ClientError> {
        let Some(uid) = self.other_user() else { return Ok(()) };
        let is_his = |instance: &Instance| match instance {
            Instance::File(path) => fs::metadata(path).is_ok_and(|found| found.uid() == uid),
            Instance::Listen(_) => false,
        };
        match instances.first() {
            Some(instance) if !instances.iter().any(is_his) => Err(ClientError::OfAnother {
                instance: instance.clone(),
                uid,
                socket: self.path.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// The status of everything.
    ///
    /// # Errors
    ///
    /// Any [`ClientError`].
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.soon(self.ask(Method::GET, "/status")).await
    }

    /// Makes the daemon reload its file. Returns when the changes are in force.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] if the daemon refuses the file, or if new workers fail.
    pub async fn reload(&self) -> Result<Reloaded, ClientError> {
        self.ask(Method::POST, "/reload").await
    }

    /// Makes the daemon replace the workers of `service` one at a time. Returns when that is done.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] if there is no such service, or if a new worker fails.
    pub async fn restart(&self, service: &str) -> Result<Restarted, ClientError> {
        self.ask(Method::POST, &format!("/services/{service}/restart")).await
    }

    /// Makes the daemon reload its file and replace every worker of `service`, or of all services,
    /// or the worker of one slot. Returns when both are done.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] if the file is refused, in which case nothing is replaced; if there
    /// is no such service; or if a new worker fails.
    pub async fn reload_and_restart(
        &self,
        service: Option<&str>,
        slot: Option<u32>,
    ) -> Result<Restarted, ClientError> {
        let path = match (service, slot) {
            (None, _) => "/reload?restart=true".to_owned(),
            (Some(service), None) => format!("/services/{service}/restart?reload=true"),
            (Some(service), Some(slot)) => {
                format!("/services/{service}/workers/{slot}/restart?reload=true")
            }
        };
        self.ask(Method::POST, &path).await
    }

    /// Makes the daemon replace the worker of one slot. Returns when that is done.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] if there is no such slot, or if the new worker fails.
    pub async fn restart_worker(&self, service: &str, slot: u32) -> Result<Restarted, ClientError> {
        self.ask(Method::POST, &format!("/services/{service}/workers/{slot}/restart")).await
    }

    /// Takes the worker of a slot out of rotation, and returns when that is done. The worker keeps
    /// its connections.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] if there is no such slot.
    pub async fn drain(&self, service: &str, slot: u32) -> Result<SlotDrain, ClientError> {
        let path = format!("/services/{service}/workers/{slot}/drain");
        self.soon(self.ask(Method::POST, &path)).await
    }

    /// Puts the worker of a slot back into rotation, as soon as it is healthy.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] if there is no such slot.
    pub async fn resume(&self, service: &str, slot: u32) -> Result<SlotDrain, ClientError> {
        let path = format!("/services/{service}/workers/{slot}/resume");
        self.soon(self.ask(Method::POST, &path)).await
    }

    /// Makes the daemon stop. Returns at once.
    ///
    /// # Errors
    ///
    /// Any [`ClientError`].
    pub async fn stop(&self) -> Result<(), ClientError> {
        let _: serde_json::Value = self.soon(self.ask(Method::POST, "/stop")).await?;
        Ok(())
    }

    async fn soon<T>(
        &self,
        answer: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        let silent = |_| ClientError::Silent(self.path.clone());
        timeout(PATIENCE, answer).await.map_err(silent)?
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T, ClientError> {
        let stream = self.connect().await?;
        let unexpected = |reason: String| ClientError::Answer { path: self.path.clone(), reason };
        let request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .map_err(|error| unexpected(error.to_string()))?;
        let exchange = async {
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            let answer = async move {
                let response = sender.send_request(request).await?;
                let (head, body) = response.into_parts();
                let most = if head.status.is_success() { MAX_ANSWER } else { MAX_REFUSAL };
                let body = Limited::new(body, most).collect().await;
                Ok::<_, hyper::Error>((head.status, body.map(|body| body.to_bytes())))
            };
            // The connection must be polled until the answer is there. If it ends first, that alone
            // means nothing.
            let connection = async {
                let _ = connection.await;
                std::future::pending::<()>().await;
            };
            tokio::select! {
                answer = answer => answer,
                () = connection => std::future::pending().await,
            }
        };
        let (status, body) = exchange.await.map_err(|_| ClientError::Ended)?;
        let body = body.map_err(|error| match error.is::<http_body_util::LengthLimitError>() {
            true => unexpected("it has no end".to_owned()),
            false => ClientError::Ended,
        })?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| unexpected(error.to_string()));
        }
        match serde_json::from_slice::<Refusal>(&body) {
            Ok(refusal) => Err(ClientError::Refused(refusal.error)),
            Err(_) => Err(unexpected(format!("status {status}"))),
        }
    }

    /// Connects to the daemon, after checking who owns the socket.
    pub(super) async fn connect(&self) -> Result<UnixStream, ClientError> {
        let (socket, owner) = self.pin()?;
        let believed = |uid: u32| believed(uid, owner);
        let stranger = |uid| Err(ClientError::Stranger { path: self.path.clone(), uid });
        if !believed(socket.uid) {
            return stranger(socket.uid);
        }
        let connected = async {
            loop {
                match socket.connect() {
                    // The socket's accept queue is full (unix(7)), which does not last.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(PAUSE).await,
                    connected => {
                        let stream = connected.map(|socket| OwnedFd::from(socket).into());
                        let stream = stream.and_then(UnixStream::from_std);
                        return stream.map_err(|error| self.failed(error));
                    }
                }
            }
        };
        let stream = self.soon(connected).await?;
        // The socket's creator may have handed it to another user.
        let uid = stream.peer_cred().map_err(|error| self.failed(error))?.uid();
        if believed(uid) { Ok(stream) } else { stranger(uid) }
    }

    /// Opens the socket. Also returns the user, besides the calling user and root, that may own it.
    fn pin(&self) -> Result<(Pinned, Option<u32>), ClientError> {
        let failed = |error| self.failed(error);
        let not_a_socket = || failed(io::Error::other("it is not a socket"));
        let Found::In(SocketLocation { folder, name }) = &self.found else {
            let socket = Pinned::behind(&self.path).map_err(failed)?;
            if socket.kind != Kind::Socket {
                return Err(not_a_socket());
            }
            // systemd gives a service's RuntimeDirectory= to the user that the service runs as.
            let owner = self.path.parent().and_then(|folder| fs::metadata(folder).ok());
            return Ok((socket, owner.map(|found| found.uid())));
        };
        let folder = folder.look().map_err(|why| match why {
            Unfit::Io(error) => self.failed(error),
            why => ClientError::PassedOver { folder: folder.path.clone(), why: why.to_string() },
        })?;
        let owner = Some(folder.owner());
        let at = folder.at(name);
        let mut found = Pinned::at(&at).map_err(failed)?;
        if found.kind == Kind::Link && believed(found.uid, owner) {
            // `[admin] socket`.
            let to = fs::read_link(&at).map_err(failed)?;
            found = Pinned::at(&to).map_err(failed)?;
        }
        if found.kind == Kind::Socket { Ok((found, owner)) } else { Err(not_a_socket()) }
    }

    fn failed(&self, source: io::Error) -> ClientError {
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NothingListens(self.path.clone())
            }
            _ => ClientError::Connect { path: self.path.clone(), source },
        }
    }
}

#[derive(Deserialize)]
struct Refusal {
    error: String,
}

/// Whether to trust a daemon of this user. For root, that includes the owner of the socket's
/// folder.
fn believed(uid: u32, owner: Option<u32>) -> bool {
    let own = geteuid().as_raw();
    uid == own || uid == 0 || own == 0 && owner == Some(uid)
}
