//! The client's side: finds a running daemon, and asks it over HTTP.

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
    Placed, Reloaded, Restarted, Status,
    folder::{Kind, Pinned, Unfit},
    place::{Instance, Origin, Place, SocketFolder, other_folders},
};

/// How long a daemon may take to accept a connection, and to answer what needs no waiting.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries at a socket whose queue is full.
const PAUSE: Duration = Duration::from_millis(20);
/// More than this is no answer of a daemon: that of one with 50,000 workers is shorter.
const MAX_ANSWER: usize = 64 * 1024 * 1024;
/// The same of what it has to say in words.
const MAX_REFUSAL: usize = 64 * 1024;

/// A running daemon. Every method needs a tokio runtime, and makes a connection of its own.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
    found: Found,
}

/// How a socket was found, and so who may listen there.
#[derive(Debug, Clone)]
enum Found {
    /// Somebody named it.
    Named,
    /// It is where daemons have theirs.
    In(Place),
}

/// Why a daemon could not be asked, or did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No socket where this daemon's would be.
    #[error("no lbd runs with {instance}: nothing listens on {}{}", place.display(), passed(passed_over))]
    NotRunning {
        /// Which daemon.
        instance: Instance,
        /// Where its socket would be.
        place: PathBuf,
        /// Folders that were not looked into, and why.
        passed_over: Vec<String>,
    },
    /// The folder where it would be is not to be trusted.
    #[error("{} is passed over: {why}", folder.display())]
    PassedOver {
        /// The folder.
        folder: PathBuf,
        /// Why.
        why: String,
    },
    /// Somebody runs it whose word is not enough for what is asked.
    #[error(
        "no lbd of yours runs with {instance}, but one of user {uid}, whose file that is not; name \
         it by --socket {}", socket.display()
    )]
    OfAnother {
        /// Which daemon.
        instance: Instance,
        /// Who runs it.
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
    /// Somebody else listens there.
    #[error("{} belongs to user {uid}, and neither to you nor to root", path.display())]
    Stranger {
        /// The socket.
        path: PathBuf,
        /// Whose it is.
        uid: u32,
    },
    /// The daemon's own words.
    #[error("{0}")]
    Refused(String),
    /// The answer is not one of lbd's.
    #[error("unexpected answer from {}: {reason}", path.display())]
    Answer {
        /// The socket.
        path: PathBuf,
        /// What is unexpected.
        reason: String,
    },
    /// It ended in between.
    #[error("lbd ended before it answered")]
    Ended,
    /// It is there, and says nothing.
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

    /// The daemon that may have its socket there.
    pub(super) fn at_place(place: Place) -> Self {
        Self { path: place.socket(), found: Found::In(place) }
    }

    /// Where its socket is.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.path
    }

    /// The user whose daemon it is, where that is another one than whoever asks.
    #[must_use]
    pub fn other_user(&self) -> Option<u32> {
        match &self.found {
            Found::In(Place {
                folder: SocketFolder { origin: Origin::Other(user), .. }, ..
            }) => Some(*user),
            Found::In(_) | Found::Named => None,
        }
    }

    /// The daemon of the first of these instances that runs, wherever its socket is. For root that may
    /// be another user's.
    ///
    /// # Errors
    ///
    /// [`ClientError::NotRunning`], or why what is there can't be used.
    pub async fn find(instances: &[Instance]) -> Result<Self, ClientError> {
        let mut passed_over = Vec::new();
        let mut trouble = None;
        for instance in instances {
            for place in instance.places() {
                let client = Self::at_place(place);
                match client.connect().await {
                    Ok(_) => return Ok(client),
                    Err(ClientError::NothingListens(_)) => {}
                    Err(error @ ClientError::PassedOver { .. }) => {
                        let told = error.to_string();
                        if !passed_over.contains(&told) {
                            passed_over.push(told);
                        }
                    }
                    // Another place may be better.
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
        let place = instance.places().first().map(Place::socket).unwrap_or_default();
        Err(ClientError::NotRunning { instance, place, passed_over })
    }

    /// The daemon of another user, where there is just one that can be it.
    async fn find_of_others(instances: &[Instance]) -> Option<Self> {
        let others = other_folders();
        for instance in instances {
            let mut found = None;
            for folder in &others {
                let name = instance.socket_name();
                let client = Self::at_place(Place { folder: folder.clone(), name });
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

    /// Refuses to have something changed by a daemon that another user runs with a file that is not
    /// his: he may have started it so that this one is taken for another.
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

    /// How everything is.
    ///
    /// # Errors
    ///
    /// Any [`ClientError`].
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.soon(self.ask(Method::GET, "/status")).await
    }

    /// Has it read its file again; returns when what changed is in force.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] where the file is, or where new workers fail.
    pub async fn reload(&self) -> Result<Reloaded, ClientError> {
        self.ask(Method::POST, "/reload").await
    }

    /// Has it replace the workers of `service` one at a time; returns when that is done.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] where there is no such service, or where a new worker fails.
    pub async fn restart(&self, service: &str) -> Result<Restarted, ClientError> {
        self.ask(Method::POST, &format!("/services/{service}/restart")).await
    }

    /// Has it read its file again and replace every worker of `service`, or of all services, or that of
    /// one slot; returns when both are done.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] where the file is, and then nothing is replaced; or where there is no
    /// such service, or a new worker fails.
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

    /// Has it replace the worker of one slot; returns when that is done.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] where there is no such slot, or where the new worker fails.
    pub async fn restart_worker(&self, service: &str, slot: u32) -> Result<Restarted, ClientError> {
        self.ask(Method::POST, &format!("/services/{service}/workers/{slot}/restart")).await
    }

    /// Has it take the worker of a slot out of rotation, and returns when that is so; the
    /// connections that it has stay.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] where there is no such slot.
    pub async fn drain(&self, service: &str, slot: u32) -> Result<Placed, ClientError> {
        let path = format!("/services/{service}/workers/{slot}/drain");
        self.soon(self.ask(Method::POST, &path)).await
    }

    /// Has it put the worker of a slot back into rotation, as soon as it is healthy.
    ///
    /// # Errors
    ///
    /// [`ClientError::Refused`] where there is no such slot.
    pub async fn resume(&self, service: &str, slot: u32) -> Result<Placed, ClientError> {
        let path = format!("/services/{service}/workers/{slot}/resume");
        self.soon(self.ask(Method::POST, &path)).await
    }

    /// Has it stop; returns at once.
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
            // The connection has to be driven until there is an answer; that it is done first says
            // nothing.
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

    /// A connection to the daemon, once it is known whose it is.
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
                    // unix(7): its queue is full, which does not last.
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
        // Whoever made the socket may have handed it to somebody else.
        let uid = stream.peer_cred().map_err(|error| self.failed(error))?.uid();
        if believed(uid) { Ok(stream) } else { stranger(uid) }
    }

    /// The socket, and who may have it besides the user who asks, and root.
    fn pin(&self) -> Result<(Pinned, Option<u32>), ClientError> {
        let failed = |error| self.failed(error);
        let not_a_socket = || failed(io::Error::other("it is not a socket"));
        let Found::In(Place { folder, name }) = &self.found else {
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

/// Whether a daemon of this user is one to listen to. For root it may also be the owner of the
/// folder that it is in.
fn believed(uid: u32, owner: Option<u32>) -> bool {
    let own = geteuid().as_raw();
    uid == own || uid == 0 || own == 0 && owner == Some(uid)
}
