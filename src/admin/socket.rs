//! The daemon's socket in the file system: claimed at the start, removed at the end.
//!
//! It is also what keeps two daemons with one configuration apart: whoever finds a socket that
//! somebody listens on is the second, and goes.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use nix::{
    libc,
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::geteuid,
};
use socket2::{Domain, SockAddr, Type};

use super::place::{Instance, Place};
use crate::{
    config::{Config, UnixAccess},
    sockets::pathname::{SocketFile, listen_at},
};

/// Clients that may wait to be taken.
const BACKLOG: i32 = 64;

/// A unix socket that is listened on. Dropped, its file is removed.
#[derive(Debug)]
pub struct Socket {
    /// Of the socket; removed before it is closed.
    file: SocketFile,
    listener: UnixListener,
    path: PathBuf,
    /// The folder where clients look, and the link there where the socket is elsewhere.
    folder: Option<File>,
    link: Option<PathBuf>,
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// A daemon runs already; this one has touched nothing.
    #[error("another lbd already runs with {instance}{}", named(*.pid))]
    Running {
        /// What both were started with.
        instance: Instance,
        /// Its process id, where that can be seen from here.
        pid: Option<i32>,
    },
    /// `[admin] socket` can't be listened on.
    #[error("cannot listen on {}, the admin socket: {source}", path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// None of the folders can be used. lbd can do without: it can be signalled.
    #[error("no folder for the admin socket: {0}")]
    NoFolder(String),
}

fn named(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

impl Socket {
    /// Listens where clients will look for the daemon that runs `config`. A socket that nobody
    /// listens on any more is replaced. Blocks for a moment at most.
    ///
    /// # Errors
    ///
    /// [`ClaimError`], each with nothing left behind but perhaps an empty folder.
    pub fn claim(config: &Config) -> Result<Self, ClaimError> {
        let instance = Instance::of(config);
        let places = instance.places();
        let running = |path: &Path| match occupant(path) {
            Some(pid) => Err(ClaimError::Running { instance: instance.clone(), pid }),
            None => Ok(()),
        };
        for place in &places {
            running(&place.socket)?;
        }
        let mut refused = Vec::new();
        let folder = places.into_iter().find_map(|place| match prepare(&place) {
            Ok(folder) => Some((folder, place.socket)),
            Err(error) => {
                refused.push(format!("{}: {error}", place.folder.display()));
                None
            }
        });
        let (folder, known) = folder.unzip();
        let Some(path) = config.admin.socket.clone().or_else(|| known.clone()) else {
            return Err(ClaimError::NoFolder(refused.join("; ")));
        };
        let failed = |source| ClaimError::Bind { path: path.clone(), source };
        // So that of two that start at once the one finds the other.
        let (listener, file, link) = locked(folder.as_ref(), || {
            for path in known.iter().chain([&path]) {
                running(path)?;
            }
            let (listener, file) = listen(&path).map_err(failed)?;
            let link = known.as_ref().filter(|known| **known != path);
            if let Some(link) = link {
                remove_stale(link).and_then(|()| symlink(&path, link)).map_err(failed)?;
            }
            Ok((listener, file, link.cloned()))
        })?;
        Ok(Self { file, listener, path, folder, link })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The listening end, non-blocking.
    pub(super) fn listener(&self) -> io::Result<UnixListener> {
        self.listener.set_nonblocking(true)?;
        self.listener.try_clone()
    }
}

impl Drop for Socket {
    /// Removes the files, unless they are somebody else's by now. A failure leaves a socket that
    /// nobody listens on, which the next daemon replaces.
    fn drop(&mut self) {
        locked(self.folder.as_ref(), || {
            let ours = |link: &&PathBuf| fs::read_link(link).is_ok_and(|to| to == self.path);
            if let Some(link) = self.link.as_ref().filter(ours) {
                let _ = fs::remove_file(link);
            }
            self.file.remove();
        });
    }
}

/// Acts while no other lbd acts in this folder. Where the file system has no locks it acts all the
/// same: that matters only to two that start in the same instant.
fn locked<T>(folder: Option<&File>, act: impl FnOnce() -> T) -> T {
    let held = folder.filter(|folder| folder.lock().is_ok());
    let done = act();
    if let Some(folder) = held {
        let _ = folder.unlock();
    }
    done
}

/// Makes the folder if it has to, and makes sure that it is nobody else's.
fn prepare(place: &Place) -> io::Result<File> {
    if !place.given {
        match DirBuilder::new().mode(0o700).create(&place.folder) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    // systemd's RuntimeDirectory= is a link where DynamicUser= is set; elsewhere a link is a trap.
    let no_link = if place.given { 0 } else { libc::O_NOFOLLOW };
    let flags = libc::O_DIRECTORY | no_link;
    let folder = OpenOptions::new().read(true).custom_flags(flags).open(&place.folder)?;
    let found = folder.metadata()?;
    let own = geteuid().as_raw();
    if found.uid() != own && !(place.given && found.uid() == 0) {
        return Err(io::Error::other(format!("it belongs to user {}", found.uid())));
    }
    if found.mode() & 0o022 != 0 {
        return Err(io::Error::other("others may write to it"));
    }
    Ok(folder)
}

/// Who listens on `path`, if somebody does whom we have to believe: `Some(None)` where they can't
/// be named.
fn occupant(path: &Path) -> Option<Option<i32>> {
    let address = SockAddr::unix(path).ok()?;
    let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None).ok()?;
    socket.set_nonblocking(true).ok()?;
    match socket.connect(&address) {
        Ok(()) => {
            let peer = getsockopt(&socket, PeerCredentials).ok()?;
            let own = geteuid().as_raw();
            // From another pid namespace it is 0.
            [own, 0].contains(&peer.uid()).then_some(Some(peer.pid()).filter(|pid| *pid > 0))
        }
        // unix(7): its queue is full, so there is one.
        Err(error) if error.kind() == ErrorKind::WouldBlock => Some(None),
        Err(_) => None,
    }
}

fn listen(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    remove_stale(path)?;
    let access = UnixAccess { mode: 0o600, ..UnixAccess::default() };
    let (socket, file) = listen_at(path, &access, BACKLOG)?;
    Ok((std::os::fd::OwnedFd::from(socket).into(), file))
}

/// Removes a socket, or a link to one, that nobody listens on. Anything else was not made by lbd.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() || found.is_symlink() => fs::remove_file(path),
        Ok(_) => Err(io::Error::other("there is a file that is not a socket")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::Permissions, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn only_a_folder_of_ones_own_will_do() {
        let base = tempfile::tempdir().unwrap();
        let usable = |name: &str, given| {
            let folder = base.path().join(name);
            prepare(&Place { socket: folder.join("x.sock"), folder, given }).is_ok()
        };
        assert!(usable("new", false));
        let made = fs::metadata(base.path().join("new")).unwrap();
        assert_eq!(made.mode() & 0o7777, 0o700);
        assert!(usable("new", false), "it is there now");
        symlink("new", base.path().join("link")).unwrap();
        assert!(!usable("link", false));
        assert!(usable("link", true), "systemd makes such links");
        fs::set_permissions(base.path().join("new"), Permissions::from_mode(0o770)).unwrap();
        assert!(!usable("new", false) && !usable("new", true));
        fs::write(base.path().join("file"), "").unwrap();
        assert!(!usable("file", false) && !usable("missing/new", false));
        assert!(!usable("missing", true), "what is given is there");
    }

    #[test]
    fn a_folder_of_somebody_else_will_not_do() {
        let base = tempfile::tempdir().unwrap();
        if !geteuid().is_root() {
            return; // there is no way to be two users
        }
        std::os::unix::fs::chown(base.path(), Some(65534), None).unwrap();
        let folder = base.path().to_owned();
        for given in [false, true] {
            let place = Place { socket: folder.join("x"), folder: folder.clone(), given };
            assert_eq!(prepare(&place).unwrap_err().to_string(), "it belongs to user 65534");
        }
    }
}
