//! The client's side: finds a running daemon, and asks it over HTTP.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt, Empty};
use hyper::{Method, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use nix::unistd::geteuid;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{net::UnixStream, time::timeout};

use super::{Placed, Reloaded, Restarted, Status, place::Instance};

/// How long a daemon may take to accept a connection, and to answer what needs no waiting.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running daemon. Every method needs a tokio runtime, and makes a connection of its own.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
}

/// Why a daemon could not be asked, or did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No socket where this daemon's would be.
    #[error("no lbd runs with {instance}: nothing listens on {}", place.display())]
    NotRunning {
        /// Which daemon.
        instance: Instance,
        /// Where its socket would be.
        place: PathBuf,
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

impl Client {
    /// The daemon that listens on `path`.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// The daemon of `instance`, wherever its socket is.
    ///
    /// # Errors
    ///
    /// [`ClientError::NotRunning`], or why what is there can't be used.
    pub async fn find(instance: &Instance) -> Result<Self, ClientError> {
        let places = instance.places();
        for place in &places {
            let client = Self::at(place.socket.clone());
            match client.connect().await {
                Ok(_) => return Ok(client),
                Err(ClientError::NothingListens(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let place = places.into_iter().next().map(|place| place.socket).unwrap_or_default();
        Err(ClientError::NotRunning { instance: instance.clone(), place })
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
                Ok::<_, hyper::Error>((head.status, body.collect().await?.to_bytes()))
            };
            // The connection has to be driven; that it is done first says nothing.
            let (_, answer) = tokio::join!(connection, answer);
            answer
        };
        let (status, body) = exchange.await.map_err(|_| ClientError::Ended)?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| unexpected(error.to_string()));
        }
        match serde_json::from_slice::<Refusal>(&body) {
            Ok(refusal) => Err(ClientError::Refused(refusal.error)),
            Err(_) => Err(unexpected(format!("status {status}"))),
        }
    }

    async fn connect(&self) -> Result<UnixStream, ClientError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NothingListens(self.path.clone())
            }
            _ => ClientError::Connect { path: self.path.clone(), source },
        };
        let stream =
            self.soon(async { UnixStream::connect(&self.path).await.map_err(failed) }).await?;
        let uid = stream.peer_cred().map_err(failed)?.uid();
        if believed(uid, &self.path) {
            Ok(stream)
        } else {
            Err(ClientError::Stranger { path: self.path.clone(), uid })
        }
    }
}

#[derive(Deserialize)]
struct Refusal {
    error: String,
}

/// Whether a daemon of this user is one to listen to. For root it may also be the owner of the
/// folder: systemd gives a service's RuntimeDirectory= to the user that the service runs as.
fn believed(uid: u32, socket: &Path) -> bool {
    let own = geteuid().as_raw();
    let owner = || fs::metadata(socket.parent()?).ok().map(|folder| folder.uid());
    uid == own || uid == 0 || own == 0 && owner() == Some(uid)
}
