//! A listening unix socket with a path, for clients to connect to.
//!
//! Any user who may write to the folder can replace the file that was just bound by another file or
//! a link. So nothing is done to the file by its path. It is opened without following links, and it
//! has to prove to be the socket before its mode and owner are set, through the descriptor. Until
//! then only the owner may connect: bind(2) creates the file with the mode of the socket itself,
//! less the umask (`unix_bind_bsd` in net/unix/af_unix.c).

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::AtFlags,
    libc,
    sys::{
        socket::{getsockopt, sockopt::PeerCredentials},
        stat::{Mode, fchmod, fstat},
    },
    unistd::{Gid, Group, Uid, User, fchownat, getpid},
};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::UnixAccess;

/// The mode of a file that only its owner may use.
const PRIVATE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// Binds a non-blocking socket to `path` and listens, with an accept queue of `backlog`. An
/// existing socket file on which no process listens is replaced; any other file is left alone.
///
/// # Errors
/// `AddrInUse` if a process listens on the existing socket, or the file is no socket; otherwise if
/// the folder, the owner or the group is not usable. Nothing is left behind at `path`, with one
/// exception: if lbd has no descriptor to examine the file with, a stale socket stays, which the
/// next bind replaces.
pub fn listen_at(
    path: &Path,
    access: &UnixAccess,
    backlog: i32,
) -> io::Result<(Socket, SocketFile)> {
    let address = SockAddr::unix(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    fchmod(&socket, PRIVATE)?;
    match socket.bind(&address) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if !remove_stale(path)? {
                return Err(error);
            }
            socket.bind(&address)?;
        }
        bound => bound?,
    }
    let proven = prove(path, &socket, &address, backlog).and_then(|file| {
        let made = Rights::of(&file)?;
        Ok((file, made))
    });
    let (file, made) = match proven {
        Ok(proven) => proven,
        Err(error) => {
            // Once closed, it is a stale socket, and is removed as such. Removing it by its name
            // alone might remove another file that was put in its place.
            drop(socket);
            _ = remove_stale(path);
            return Err(error);
        }
    };
    // From here on the file is removed if anything fails.
    let file = SocketFile { file, path: path.to_owned(), made };
    file.set(file.wanted(access)?)?;
    Ok((socket, file))
}

/// Makes `socket`, which is bound to `address` (the same as `path`), listen, and opens its file.
fn prove(path: &Path, socket: &Socket, address: &SockAddr, backlog: i32) -> io::Result<OwnedFd> {
    let file = open(path)?;
    socket.listen(backlog)?;
    if !is_same(&file, socket, address)? {
        return Err(io::Error::other(
            "another file was put in its place; choose a folder that nobody else may write to",
        ));
    }
    Ok(file)
}

/// The file of a listening socket. Dropping this removes the file, unless another one is in its
/// place.
#[derive(Debug)]
pub struct SocketFile {
    /// The file itself (`O_PATH`). As long as it is open, no other file can get its inode number.
    file: OwnedFd,
    path: PathBuf,
    /// The rights with which bind(2) created it.
    made: Rights,
}

/// The mode, owner and group of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rights {
    mode: u32,
    owner: Uid,
    group: Gid,
}

impl SocketFile {
    /// Applies `access`, and returns the previous rights.
    ///
    /// # Errors
    /// If there is no such user or group, or lbd may not give the file to them. Nothing has changed
    /// then.
    pub fn set_access(&self, access: &UnixAccess) -> io::Result<Rights> {
        let before = Rights::of(&self.file)?;
        let wanted = self.wanted(access)?;
        // On an error, the changes made so far are undone.
        self.set(wanted).inspect_err(|_| _ = self.set(before))?;
        Ok(before)
    }

    /// Sets mode, owner and group where they differ. In between, only users that may connect both
    /// before and after may connect.
    ///
    /// # Errors
    /// If lbd may not give the file to that owner or group.
    pub fn set(&self, rights: Rights) -> io::Result<()> {
        let is = Rights::of(&self.file)?;
        let owner = Some(rights.owner).filter(|owner| *owner != is.owner);
        let group = Some(rights.group).filter(|group| *group != is.group);
        if owner.is_some() || group.is_some() {
            self.set_mode(is.mode & rights.mode)?;
            fchownat(&self.file, "", owner, group, AtFlags::AT_EMPTY_PATH).map_err(may_not_give)?;
        }
        self.set_mode(rights.mode)
    }

    /// Whether the file is still at its path.
    #[must_use]
    pub fn is_there(&self) -> bool {
        is_at(&self.path, &self.file).unwrap_or(false)
    }

    /// Removes the file, unless another one is at its path.
    pub fn remove(&self) {
        // A failure is not reported: a stale file stays, which the next bind replaces.
        _ = remove_if(&self.path, &self.file);
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        if Rights::of(&self.file)?.mode == mode {
            return Ok(());
        }
        // fchmod(2) does not take an O_PATH descriptor. The path in /proc/self/fd reaches the same
        // file, and no other user can change where it leads (proc_pid_fd(5)).
        fs::set_permissions(through(&self.file), fs::Permissions::from_mode(mode))
    }

    /// The rights that `access` asks for.
    fn wanted(&self, access: &UnixAccess) -> io::Result<Rights> {
        let unknown = |key: &str, what: &str, name: &str| {
            io::Error::other(format!(
                "{key}: there is no {what} {name:?}; create it or write another"
            ))
        };
        let owner = access.owner.as_deref().map(|name| {
            let found = User::from_name(name)?.map(|user| user.uid);
            let number = || name.parse().ok().map(Uid::from_raw);
            found.or_else(number).ok_or_else(|| unknown("owner", "user", name))
        });
        let group = access.group.as_deref().map(|name| {
            let found = Group::from_name(name)?.map(|group| group.gid);
            let number = || name.parse().ok().map(Gid::from_raw);
            found.or_else(number).ok_or_else(|| unknown("group", "group", name))
        });
        Ok(Rights {
            mode: access.mode,
            owner: owner.transpose()?.unwrap_or(self.made.owner),
            group: group.transpose()?.unwrap_or(self.made.group),
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Rights {
    fn of(file: &OwnedFd) -> io::Result<Self> {
        let file = fstat(file)?;
        let (owner, group) = (Uid::from_raw(file.st_uid), Gid::from_raw(file.st_gid));
        Ok(Self { mode: file.st_mode & 0o777, owner, group })
    }
}

fn may_not_give(error: Errno) -> io::Error {
    let error = io::Error::from(error);
    let text = format!(
        "cannot give it to another owner or group: {error}; it takes CAP_CHOWN, or, for a group, to be in it"
    );
    io::Error::new(error.kind(), text)
}

/// Opens the file at `path` (`O_PATH`): without following a link, and without opening what the file
/// stands for.
fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    Ok(fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?.into())
}

/// A path that leads to the open `file`, whatever its name is by now.
fn through(file: impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()).into()
}

/// Whether `file` belongs to `socket`, which listens at `address`: a connection made through the
/// file has to arrive at the socket.
fn is_same(file: &OwnedFd, socket: &Socket, address: &SockAddr) -> io::Result<bool> {
    if !is_socket(file)? {
        return Ok(false);
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    // An abstract name of its own (unix(7), autobind) distinguishes it from a client.
    probe.bind(&SockAddr::unix("")?)?;
    if probe.connect(&SockAddr::unix(through(file))?).is_err() {
        return Ok(false);
    }
    // The process that called listen(2), and the address that it was bound to (unix(7)).
    let pid = getsockopt(&probe, PeerCredentials)?.pid();
    if pid != getpid().as_raw() || probe.peer_addr()?.as_pathname() != address.as_pathname() {
        return Ok(false);
    }
    // The probe is the first in the queue, since no other user has the right to connect yet; but
    // other processes of this user have.
    let name = probe.local_addr()?;
    while socket.accept().is_ok_and(|(_, peer)| peer != name) {}
    Ok(true)
}

/// Removes the socket at `path` if no process listens on it. Returns whether it did.
fn remove_stale(path: &Path) -> io::Result<bool> {
    let file = open(path)?;
    if !is_socket(&file)? {
        return Ok(false);
    }
    Ok(is_stale(&file) && remove_if(path, &file)?)
}

/// Whether no process listens on the socket that this file is.
pub fn is_stale(socket: impl AsFd) -> bool {
    connect(socket).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Connects to the socket that this file is, whatever its name leads to by now. The connect
/// succeeds at once or fails.
///
/// # Errors
/// `ConnectionRefused` if no process listens, `WouldBlock` if the accept queue is full (unix(7)).
pub fn connect(to: impl AsFd) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    socket.connect(&SockAddr::unix(through(to))?)?;
    Ok(socket)
}

/// Removes the file at `path` if it is `file`, even if that is a link. Returns whether it did.
///
/// # Errors
/// If it can't be examined or removed.
pub fn remove_if(path: &Path, file: impl AsFd) -> io::Result<bool> {
    let is_it = is_at(path, file)?;
    if is_it {
        fs::remove_file(path)?;
    }
    Ok(is_it)
}

/// Whether the file at `path` is `file`. Since `file` is open, no other file can have its inode
/// number.
fn is_at(path: &Path, file: impl AsFd) -> io::Result<bool> {
    let is = fstat(file)?;
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        there => there.map(|there| (there.dev(), there.ino()) == (is.st_dev, is.st_ino)),
    }
}

fn is_socket(file: &OwnedFd) -> io::Result<bool> {
    Ok(fs::metadata(through(file))?.file_type().is_socket())
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::net::{UnixListener, UnixStream},
        sync::atomic::{AtomicBool, Ordering::Relaxed},
        thread,
        time::{Duration, Instant},
    };

    use nix::unistd::geteuid;

    use super::*;

    const BACKLOG: i32 = 16;

    fn access(mode: u32) -> UnixAccess {
        UnixAccess { mode, owner: None, group: None }
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn the_mode_is_the_one_asked_for_whatever_the_umask_is() {
        let folder = tempfile::tempdir().unwrap();
        for wanted in [0o666, 0o600, 0o660, 0o222, 0o777] {
            let path = folder.path().join(format!("{wanted:o}"));
            let (socket, file) = listen_at(&path, &access(wanted), BACKLOG).unwrap();
            assert_eq!(mode(&path), wanted);
            // Nobody waits in it: the proof has been taken out again.
            assert_eq!(socket.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
            let client = UnixStream::connect(&path).unwrap();
            assert_eq!(client.peer_addr().unwrap().as_pathname(), Some(&*path));
            socket.accept().unwrap();
            file.set_access(&access(0o606)).unwrap();
            assert_eq!(mode(&path), 0o606);
            drop(file);
            assert!(!path.exists());
        }
    }

    #[test]
    fn owner_and_group_are_set_and_given_back() {
        if !geteuid().is_root() {
            return; // only root may give a file away
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let owner = |path| fs::symlink_metadata(path).map(|f| (f.uid(), f.gid())).unwrap();
        let theirs =
            UnixAccess { mode: 0o660, owner: Some("65534".into()), group: Some("0".into()) };
        let (_socket, file) = listen_at(&path, &theirs, BACKLOG).unwrap();
        assert_eq!((mode(&path), owner(&path)), (0o660, (65534, 0)));
        let before = file.set_access(&access(0o600)).unwrap();
        assert_eq!((mode(&path), owner(&path)), (0o600, (0, 0)), "as it was made");
        file.set(before).unwrap();
        assert_eq!((mode(&path), owner(&path)), (0o660, (65534, 0)));
        let nobody = UnixAccess { owner: Some("no-such-user".into()), ..theirs };
        let error = file.set_access(&nobody).unwrap_err().to_string();
        assert_eq!(error, r#"owner: there is no user "no-such-user"; create it or write another"#);
        assert_eq!((mode(&path), owner(&path)), (0o660, (65534, 0)));
        drop(file);
        assert!(listen_at(&path, &nobody, BACKLOG).is_err());
        assert!(!path.exists(), "nothing is left behind");
    }

    #[test]
    fn what_is_in_its_place_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let (_socket, file) = listen_at(&path, &access(0o666), BACKLOG).unwrap();
        let secret = folder.path().join("secret");
        fs::write(&secret, "").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(&path, folder.path().join("moved")).unwrap();
        std::os::unix::fs::symlink(&secret, &path).unwrap();
        file.set_access(&access(0o606)).unwrap();
        assert_eq!((mode(&secret), mode(&folder.path().join("moved"))), (0o600, 0o606));
        drop(file);
        assert!(path.is_symlink() && secret.exists());

        // Nor are links followed to find out whether somebody listens.
        let stale = folder.path().join("stale");
        drop(UnixListener::bind(&stale).unwrap());
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&stale, &path).unwrap();
        let error = listen_at(&path, &access(0o666), BACKLOG).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(path.is_symlink() && stale.exists());
    }

    struct SetAtEnd<'a>(&'a AtomicBool);

    impl Drop for SetAtEnd<'_> {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }

    /// Somebody who may write to the folder puts other files in its place all the time.
    #[test]
    fn a_file_that_is_swapped_in_keeps_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret");
        fs::write(&secret, "").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        // A socket of another listener of the same process is the best that can be swapped in.
        let decoy = folder.path().join("decoy");
        let (_decoy, _file) = listen_at(&decoy, &access(0o600), BACKLOG).unwrap();
        let path = folder.path().join("s");
        let (link, hard) = (folder.path().join("link"), folder.path().join("hard"));
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    _ = std::os::unix::fs::symlink(&secret, &link);
                    _ = fs::rename(&link, &path);
                    _ = fs::hard_link(&decoy, &hard);
                    _ = fs::rename(&hard, &path);
                    _ = fs::remove_file(&path);
                }
            });
            let end = SetAtEnd(&done);
            let until = Instant::now() + Duration::from_secs(20);
            let mut bound = 0;
            while bound < 200 && Instant::now() < until {
                bound += i32::from(listen_at(&path, &access(0o666), BACKLOG).is_ok());
                assert_eq!((mode(&secret), mode(&decoy)), (0o600, 0o600));
            }
            drop(end);
            assert!(bound > 0, "it never came to the point");
        });
    }
}
