//! The daemon's admin socket in the file system: created at the start, kept in place, removed at
//! the end.
//!
//! The socket also prevents two daemons with the same configuration: a daemon that finds a socket
//! with a listener is the second one, and gives up. Another user's program must neither pass for
//! such a daemon nor delay this one: see [`super::folder`].

use std::{
    fs::{self, File, TryLockError},
    io::{self, ErrorKind},
    os::{
        fd::OwnedFd,
        unix::{fs::symlink, net::UnixListener},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::geteuid,
};

use super::{
    folder::{Folder, Kind, Pinned},
    location::{Instance, SocketLocation, make_spare},
};
use crate::{
    config::{Config, UnixAccess},
    net::pathname::{SocketFile, listen_at},
};

/// The length of the accept queue.
const BACKLOG: i32 = 64;
/// Who may connect: only the daemon's user, and root.
const PRIVATE: UnixAccess = UnixAccess { mode: 0o600, owner: None, group: None };
/// How long to wait for another lbd that works in the same folder. That takes only a moment; any
/// other process that holds the lock may keep it forever.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// The pause between two attempts to lock.
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// The most sockets in a folder to check for being dead.
const MOST_SOCKETS: usize = 1024;

/// A listening unix socket. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct Socket {
    instance: Instance,
    /// The path in `[admin] socket`.
    chosen: Option<PathBuf>,
    held: Held,
    /// Remarks about how it was made, for the log.
    remarks: Vec<String>,
}

/// What exists in the file system.
#[derive(Debug)]
struct Held {
    listener: UnixListener,
    path: PathBuf,
    /// Declared before the folder, so dropped first: its path may lead through the folder's
    /// descriptor.
    file: SocketFile,
    /// The folder where clients look.
    folder: Option<Folder>,
    /// What the socket, or the link to it, is called there.
    name: String,
    /// The link, if the socket is elsewhere. It is held open so that a later link to the same path
    /// can't get the same inode number.
    link: Option<Pinned>,
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// A daemon with the same instance already runs; nothing was changed.
    #[error("another lbd already runs with {instance}{}", named(*.pid))]
    Running {
        /// What both were started with.
        instance: Instance,
        /// Its process id, if it is visible from here.
        pid: Option<i32>,
    },
    /// The path in `[admin] socket` can't be listened on.
    #[error("cannot listen on {}, the admin socket: {source}", path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// None of the folders can be used. lbd can run without: it still obeys signals.
    #[error("no folder for the admin socket: {0}")]
    NoFolder(String),
}

fn named(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

impl Socket {
    /// Listens where clients will look for the daemon that runs `config`. Replaces a socket that
    /// nobody listens on any more. Blocks for at most a second.
    ///
    /// # Errors
    ///
    /// [`ClaimError`]. At most an empty folder, or a socket that nobody listens on, is left behind.
    pub fn claim(config: &Config) -> Result<Self, ClaimError> {
        let (instance, chosen) = (Instance::of(config), config.admin.socket.clone());
        let mut remarks = Vec::new();
        let held = claim(&instance, chosen.as_deref(), &mut remarks)?;
        Ok(Self { instance, chosen, held, remarks })
    }

    /// The path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.held.path
    }

    /// What was skipped or failed while the socket was made.
    #[must_use]
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// The listener, non-blocking.
    pub(super) fn listener(&self) -> io::Result<UnixListener> {
        self.held.listener.set_nonblocking(true)?;
        self.held.listener.try_clone()
    }

    /// Recreates the socket, the link to it, or their folder, if somebody has removed them, for
    /// example by tidying `/tmp`. Returns whether anything was recreated, in which case
    /// [`Self::listener`] is a new one.
    pub(super) fn restore(&mut self) -> Result<bool, ClaimError> {
        if self.held.is_intact() {
            return Ok(false);
        }
        self.remarks.clear();
        if self.held.link.is_some() && self.held.file.is_there() {
            self.link_again()?;
        } else {
            let held = claim(&self.instance, self.chosen.as_deref(), &mut self.remarks)?;
            // Drop what is left of the old one: clients can't find it any more.
            drop(std::mem::replace(&mut self.held, held));
        }
        Ok(true)
    }

    /// Recreates the link to a socket that is still in place.
    fn link_again(&mut self) -> Result<(), ClaimError> {
        let Held { path, name, .. } = &self.held;
        let failed = |source| ClaimError::Bind { path: path.clone(), source };
        let folder =
            folder(&self.instance.locations(), &mut self.remarks).map_err(ClaimError::NoFolder)?;
        let link = locked(&folder, |_| link(path, &folder.at(name))).map_err(failed)?;
        (self.held.folder, self.held.link) = (Some(folder), Some(link));
        Ok(())
    }
}

impl Held {
    /// Whether clients can find the socket.
    fn is_intact(&self) -> bool {
        let Some(folder) = &self.folder else { return self.file.is_there() };
        let is_known = self.link.is_none()
            || fs::read_link(folder.at(&self.name)).is_ok_and(|to| to == self.path);
        is_known && folder.is_there() && self.file.is_there()
    }
}

impl Drop for Held {
    /// Removes the files, unless they have been replaced by others. A failure leaves a socket that
    /// nobody listens on, which the next daemon replaces.
    fn drop(&mut self) {
        let Some(folder) = &self.folder else { return self.file.remove() };
        locked(folder, |_| {
            if let Some(link) = &self.link {
                let _ = link.remove_at(&folder.at(&self.name));
            }
            self.file.remove();
        });
    }
}

/// The first usable folder of `locations`, or a new one that no other user can have prepared.
fn folder(locations: &[SocketLocation], remarks: &mut Vec<String>) -> Result<Folder, String> {
    let mut refused = Vec::new();
    for location in locations {
        match location.folder.make() {
            Ok(folder) => return Ok(folder),
            Err(why) => {
                let told = format!("{}: {why}", location.folder.path.display());
                if !why.is_missing() {
                    remarks.push(format!("passed over {told}"));
                }
                refused.push(told);
            }
        }
    }
    let spare = make_spare().map_err(Into::into).and_then(|spare| spare.make());
    spare.map_err(|why| {
        refused.push(format!("a new one in /tmp: {why}"));
        refused.join("; ")
    })
}

/// Listens in the first usable folder.
fn claim(
    instance: &Instance,
    chosen: Option<&Path>,
    remarks: &mut Vec<String>,
) -> Result<Held, ClaimError> {
    let running = |pid| ClaimError::Running { instance: instance.clone(), pid };
    let (locations, name) = (instance.locations(), instance.socket_name());
    // Another daemon may have chosen another folder.
    for location in &locations {
        let Ok(folder) = location.folder.look() else { continue };
        if let Some(pid) = another(&folder.at(&name)) {
            return Err(running(pid));
        }
    }
    let folder = match (folder(&locations, remarks), chosen) {
        (Ok(folder), _) => Some(folder),
        (Err(_), Some(_)) => None,
        (Err(refused), None) => return Err(ClaimError::NoFolder(refused)),
    };
    let own = folder.as_ref().map(|folder| folder.path().join(&name));
    let path = chosen.map(Path::to_owned).or(own).unwrap_or_default();
    let failed = |source| ClaimError::Bind { path: path.clone(), source };
    let mut act = |is_alone: bool| {
        let known = folder.as_ref().map(|folder| folder.at(&name));
        for path in known.as_deref().into_iter().chain(chosen) {
            if let Some(pid) = another(path) {
                return Err(running(pid));
            }
        }
        match &folder {
            Some(folder) if is_alone => remove_dead(folder),
            Some(folder) => remarks.push(format!(
                "somebody holds a lock on {}; going on without it",
                folder.path().display()
            )),
            None => {}
        }
        let Some(chosen) = chosen else {
            let path = known.as_deref().unwrap_or(&path);
            let bound = listen(path, Links::Own).map_err(failed)?;
            return Ok((bound, None));
        };
        let bound = listen(chosen, Links::Foreign).map_err(failed)?;
        let Some(known) = known else { return Ok((bound, None)) };
        let link = link(chosen, &known).map_err(failed)?;
        Ok((bound, Some(link)))
    };
    // Both under the lock, so that of two daemons that start at once, one finds the other.
    let ((listener, file), link) = match &folder {
        Some(folder) => locked(folder, act)?,
        None => act(true)?,
    };
    Ok(Held { listener, path, file, folder, name, link })
}

/// Creates a link from `known`, a path in the folder where clients look, to the socket at `path`.
fn link(path: &Path, known: &Path) -> io::Result<Pinned> {
    make_room(known, Links::Own)?;
    symlink(path, known)?;
    // Nobody else can have replaced the link: see `Folder`.
    Pinned::at(known)
}

/// Runs `act` while no other lbd works in this folder, and tells it whether the folder is locked.
/// If the lock can't be had (somebody else holds it, or the file system has no locks), `act` runs
/// all the same: the lock matters only to two daemons that start in the same instant.
fn locked<T>(folder: &Folder, act: impl FnOnce(bool) -> T) -> T {
    let held = lock(folder.file());
    let done = act(held);
    if held {
        let _ = folder.file().unlock();
    }
    done
}

fn lock(file: &File) -> bool {
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return true,
            Err(TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(LOCK_PAUSE),
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => return false,
        }
    }
}

/// The process that listens on the socket at `path`, or that a link there leads to, if its user is
/// trusted. `Some(None)` if its pid is unknown.
fn occupant(path: &Path) -> Option<Option<i32>> {
    let mut found = Pinned::at(path).ok()?;
    if found.kind == Kind::Link && is_believed(found.uid) {
        found = Pinned::at(&fs::read_link(path).ok()?).ok()?;
    }
    // Check the owner before connecting: the socket may be anybody's.
    if found.kind != Kind::Socket || !is_believed(found.uid) {
        return None;
    }
    match found.connect() {
        Ok(socket) => {
            let peer = getsockopt(&socket, PeerCredentials).ok()?;
            // The pid is 0 if the process is in another pid namespace.
            is_believed(peer.uid()).then_some(Some(peer.pid()).filter(|pid| *pid > 0))
        }
        // The accept queue is full (unix(7)), so somebody listens.
        Err(error) if error.kind() == ErrorKind::WouldBlock => Some(None),
        Err(_) => None,
    }
}

/// Like [`occupant`], but ignores this process.
fn another(path: &Path) -> Option<Option<i32>> {
    let own = i32::try_from(std::process::id()).ok();
    occupant(path).filter(|pid| pid.is_none() || *pid != own)
}

fn is_believed(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// Who made a link that is where the socket should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Links {
    /// lbd itself, while `[admin] socket` was set: in the folder where clients look.
    Own,
    /// Somebody else, in a folder that the file names.
    Foreign,
}

/// Listens at `path`, in such a way that no other user can ever connect.
fn listen(path: &Path, links: Links) -> io::Result<(UnixListener, SocketFile)> {
    make_room(path, links)?;
    let (socket, file) = listen_at(path, &PRIVATE, BACKLOG)?;
    Ok((OwnedFd::from(socket).into(), file))
}

/// Removes a socket that nobody listens on, or a link. lbd makes nothing else, so anything else
/// stays.
fn make_room(path: &Path, links: Links) -> io::Result<()> {
    let found = match Pinned::at(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    match found.kind {
        Kind::Other => Err(io::Error::other("there is a file that is not a socket")),
        Kind::Socket if !found.is_stale() => Err(io::Error::other(format!(
            "there is a socket of user {} that is in use; choose another path",
            found.uid
        ))),
        Kind::Link if links == Links::Foreign => {
            Err(io::Error::other("there is a link; remove it, or choose another path"))
        }
        // If another file has taken its name meanwhile, that file stays, and the bind fails.
        Kind::Socket | Kind::Link => found.remove_at(path),
    }
}

/// Removes what killed daemons left in this folder: their sockets, and links to such sockets. Must
/// be called while no other lbd works here, because a newly made socket has no listener yet.
fn remove_dead(folder: &Folder) {
    for name in folder.sockets(MOST_SOCKETS) {
        let path = folder.at(&name);
        let Ok(found) = Pinned::at(&path) else { continue };
        if found.uid != geteuid().as_raw() {
            continue;
        }
        let is_dead = match found.kind {
            Kind::Socket => found.is_stale(),
            Kind::Link => match fs::read_link(&path).and_then(|to| Pinned::at(&to)) {
                Ok(behind) => behind.is_stale(),
                Err(error) => error.kind() == ErrorKind::NotFound,
            },
            Kind::Other => false,
        };
        if is_dead {
            let _ = found.remove_at(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::folder::Owner;

    fn folder(base: &Path) -> Folder {
        Folder::make(&base.join("folder"), Owner::Own).unwrap()
    }

    #[test]
    fn a_lock_of_somebody_else_delays_nothing_for_long() {
        let base = tempfile::tempdir().unwrap();
        let folder = folder(base.path());
        assert!(locked(&folder, |is_alone| is_alone));
        let other = File::open(folder.path()).unwrap();
        other.lock().unwrap();
        let began = Instant::now();
        assert!(!locked(&folder, |is_alone| is_alone));
        assert!((LOCK_PATIENCE..2 * LOCK_PATIENCE).contains(&began.elapsed()));
        drop(other);
        assert!(locked(&folder, |is_alone| is_alone));
    }

    #[test]
    fn only_what_is_dead_is_removed() {
        let base = tempfile::tempdir().unwrap();
        let folder = folder(base.path());
        let name = |number: u32| format!("lb-{number:016x}.sock");
        let elsewhere = base.path().join("own.sock");
        let _alive = listen(&folder.at(&name(0)), Links::Own).unwrap();
        drop(UnixListener::bind(folder.at(&name(1))).unwrap());
        let _own = listen(&elsewhere, Links::Foreign).unwrap();
        symlink(&elsewhere, folder.at(&name(2))).unwrap();
        symlink(base.path().join("gone"), folder.at(&name(3))).unwrap();
        fs::write(folder.at(&name(4)), "").unwrap();
        drop(UnixListener::bind(folder.at("other.sock")).unwrap());
        let dead = base.path().join("dead.sock");
        drop(UnixListener::bind(&dead).unwrap());
        symlink(&dead, folder.at(&name(5))).unwrap();
        remove_dead(&folder);
        let left: Vec<_> =
            (0..6).filter(|n| folder.at(&name(*n)).symlink_metadata().is_ok()).collect();
        assert_eq!(left, [0, 2, 4]);
        assert!(folder.at("other.sock").exists() && dead.exists(), "not of lbd, or not here");
    }

    #[test]
    fn a_socket_is_private_from_the_beginning_and_taken_from_nobody() {
        use std::os::unix::fs::MetadataExt;
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("x.sock");
        let first = listen(&path, Links::Foreign).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        let error = listen(&path, Links::Foreign).unwrap_err().to_string();
        assert!(error.contains("is in use; choose another path"), "{error}");
        assert_eq!(occupant(&path), Some(i32::try_from(std::process::id()).ok()));
        drop(first);
        assert!(!path.exists());
        // One that was killed leaves it.
        drop(UnixListener::bind(&path).unwrap());
        assert_eq!(occupant(&path), None);
        listen(&path, Links::Foreign).unwrap();
        // A link is not followed.
        let other = base.path().join("other");
        symlink(&other, base.path().join("link")).unwrap();
        let error = listen(&base.path().join("link"), Links::Foreign).unwrap_err().to_string();
        assert!(error.starts_with("there is a link; "), "{error}");
        let _own = listen(&base.path().join("link"), Links::Own).unwrap();
        assert!(!other.exists() && !base.path().join("link").is_symlink());
    }
}
