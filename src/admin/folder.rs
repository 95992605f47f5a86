//! The folders of admin sockets, and the sockets in them. Each is opened first, then checked, and
//! from then on used by descriptor, so that what was checked is what is used.
//!
//! Another user can create a folder in `/tmp` under the name that lbd would use, and put anything
//! there: a socket that never answers, a link to another daemon's socket, a fake lbd. So lbd trusts
//! nothing in a folder that another user could have put there, and connects to nothing before it
//! has checked that.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind},
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{libc, unistd::geteuid};
use socket2::Socket;

use crate::net::pathname;

/// Who may own a folder, besides the calling user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// Nobody else.
    Own,
    /// Root, who made the folder for this process.
    OwnOrRoot,
    /// This user. The folder is only read; nothing is created in it.
    User(u32),
    /// Any user that root gave the folder to: only root can create it at this path.
    GivenByRoot,
}

/// A folder that only its owner and root can change.
#[derive(Debug)]
pub(super) struct Folder {
    file: File,
    path: PathBuf,
    owner: u32,
}

/// Why a folder is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfit {
    #[error("it belongs to user {0}")]
    Owner(u32),
    #[error("others may write to it")]
    Writable,
    #[error("it is a link")]
    Link,
    #[error("others may replace it: {} belongs to user {uid}", parent.display())]
    Parent { parent: PathBuf, uid: u32 },
    #[error("others may replace it: they may write to {}", .0.display())]
    OpenParent(PathBuf),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Unfit {
    /// Whether the folder simply does not exist.
    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == ErrorKind::NotFound)
    }
}

impl Folder {
    /// Opens the folder at `path`. A link to it is followed only if root made the link, as systemd
    /// does for RuntimeDirectory= with DynamicUser=.
    pub(super) fn open(path: &Path, owner: Owner) -> Result<Self, Unfit> {
        let own = geteuid().as_raw();
        check_parent(path, owner)?;
        let found = fs::symlink_metadata(path)?;
        let follow = found.is_symlink();
        if follow && (found.uid() != 0 || owner == Owner::Own) {
            return Err(Unfit::Link);
        }
        let no_link = if follow { 0 } else { libc::O_NOFOLLOW };
        let flags = libc::O_DIRECTORY | libc::O_NONBLOCK | no_link;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let found = file.metadata()?;
        let uid = found.uid();
        let fine = match owner {
            Owner::Own => uid == own,
            Owner::OwnOrRoot => uid == own || uid == 0,
            Owner::User(user) => uid == user,
            Owner::GivenByRoot => true,
        };
        if !fine {
            return Err(Unfit::Owner(uid));
        }
        if found.mode() & 0o022 != 0 {
            return Err(Unfit::Writable);
        }
        Ok(Self { file, path: path.to_owned(), owner: uid })
    }

    /// Like [`Self::open`], but creates the folder if it is missing. No other user can even list
    /// it.
    pub(super) fn make(path: &Path, owner: Owner) -> Result<Self, Unfit> {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error.into()),
            _ => Self::open(path, owner),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn owner(&self) -> u32 {
        self.owner
    }

    /// The open folder, for locking.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// A path to the entry `name` of this folder, whatever the folder's own path leads to by now.
    /// Valid as long as this `Folder` exists.
    pub(super) fn at(&self, name: &str) -> PathBuf {
        descriptor(&self.file).join(name)
    }

    /// Whether the folder's path still leads to this folder.
    pub(super) fn is_there(&self) -> bool {
        let inode = |found: fs::Metadata| (found.dev(), found.ino());
        let (open, there) = (self.file.metadata().map(inode), fs::metadata(&self.path).map(inode));
        matches!((open, there), (Ok(open), Ok(there)) if open == there)
    }

    /// The names in it that look like lbd's sockets, at most `most` of them.
    pub(super) fn sockets(&self, most: usize) -> Vec<String> {
        let Ok(entries) = fs::read_dir(descriptor(&self.file)) else { return Vec::new() };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter(|name| is_socket_name(name)).take(most).collect()
    }
}

/// Checks the parent folder. Anybody who may write to the parent can replace the folder, unless the
/// parent has the sticky bit (inode(7)), which allows that only to the entry's owner.
fn check_parent(path: &Path, owner: Owner) -> Result<(), Unfit> {
    let Some(parent) = path.parent() else { return Ok(()) };
    let found = fs::metadata(parent)?;
    let own = geteuid().as_raw();
    let fine = match owner {
        _ if found.uid() == 0 => true,
        Owner::Own | Owner::OwnOrRoot => found.uid() == own,
        Owner::User(user) => found.uid() == user,
        // If the parent belongs to another user, the folder was not given by root.
        Owner::GivenByRoot => found.uid() == own,
    };
    if !fine {
        return Err(Unfit::Parent { parent: parent.to_owned(), uid: found.uid() });
    }
    let sticky = found.mode() & libc::S_ISVTX != 0;
    // In a sticky parent, anybody may create the folder that root would create.
    if found.mode() & 0o022 != 0 && (!sticky || owner == Owner::GivenByRoot) {
        return Err(Unfit::OpenParent(parent.to_owned()));
    }
    Ok(())
}

/// `NAME-0123456789abcdef.sock`, as made by [`super::location::Instance::socket_name`].
fn is_socket_name(name: &str) -> bool {
    let hash = name.strip_suffix(".sock").and_then(|name| name.rsplit_once('-'));
    hash.is_some_and(|(_, hash)| {
        hash.len() == 16 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// One particular file, whatever happens to its name. Opened with `O_PATH` (open(2)), which does
/// nothing to the file.
#[derive(Debug)]
pub(super) struct Pinned {
    file: File,
    /// Its owner.
    pub(super) uid: u32,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Socket,
    Link,
    Other,
}

impl Pinned {
    /// The file at `path` itself, even if it is a link.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        Self::open(path, libc::O_NOFOLLOW)
    }

    /// The file that `path` leads to, through links.
    pub(super) fn behind(path: &Path) -> io::Result<Self> {
        Self::open(path, 0)
    }

    fn open(path: &Path, flags: i32) -> io::Result<Self> {
        let flags = libc::O_PATH | flags;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let found = file.metadata()?;
        let kind = match found.file_type() {
            kind if kind.is_socket() => Kind::Socket,
            kind if kind.is_symlink() => Kind::Link,
            _ => Kind::Other,
        };
        Ok(Self { file, uid: found.uid(), kind })
    }

    /// Removes the entry at `path` if it is this file.
    pub(super) fn remove_at(&self, path: &Path) -> io::Result<()> {
        pathname::remove_if(path, &self.file).map(drop)
    }

    /// Connects to this socket and no other. Does not wait.
    pub(super) fn connect(&self) -> io::Result<Socket> {
        pathname::connect(&self.file)
    }

    /// Whether this is a socket that nobody listens on.
    pub(super) fn is_stale(&self) -> bool {
        self.kind == Kind::Socket && pathname::is_stale(&self.file)
    }
}

/// The path of an open file (proc_pid_fd(5)).
fn descriptor(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::Permissions,
        os::unix::{
            fs::{PermissionsExt, chown, symlink},
            net::UnixListener,
        },
    };

    use super::*;

    fn open(path: &Path, owner: Owner) -> Result<(), String> {
        Folder::open(path, owner).map(drop).map_err(|error| error.to_string())
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn only_a_folder_of_ones_own_will_do() {
        let base = tempfile::tempdir().unwrap();
        let path = |name: &str| base.path().join(name);
        Folder::make(&path("new"), Owner::Own).unwrap();
        assert_eq!(fs::metadata(path("new")).unwrap().mode() & 0o7777, 0o700);
        Folder::make(&path("new"), Owner::Own).unwrap();
        symlink("new", path("link")).unwrap();
        assert_eq!(open(&path("link"), Owner::Own), Err("it is a link".to_owned()));
        let by_root = open(&path("link"), Owner::OwnOrRoot);
        assert_eq!(by_root.is_ok(), geteuid().is_root(), "systemd makes such links");
        for mode in [0o770, 0o702] {
            set_mode(&path("new"), mode);
            for owner in [Owner::Own, Owner::OwnOrRoot, Owner::GivenByRoot] {
                assert_eq!(open(&path("new"), owner), Err("others may write to it".to_owned()));
            }
        }
        fs::write(path("file"), "").unwrap();
        assert!(open(&path("file"), Owner::Own).is_err());
        let missing = Folder::make(&path("missing/new"), Owner::Own).unwrap_err();
        assert!(missing.is_missing());
    }

    #[test]
    fn nor_one_that_others_could_put_another_one_in_place_of() {
        let base = tempfile::tempdir().unwrap();
        let folder = base.path().join("folder");
        fs::create_dir(&folder).unwrap();
        set_mode(base.path(), 0o777);
        assert!(open(&folder, Owner::Own).unwrap_err().starts_with("others may replace it: they"));
        set_mode(base.path(), 0o1777);
        assert_eq!(open(&folder, Owner::Own), Ok(()), "as in /tmp");
        assert!(open(&folder, Owner::GivenByRoot).is_err(), "anybody may make one there");
    }

    #[test]
    fn a_folder_of_somebody_else_will_not_do() {
        if !geteuid().is_root() {
            return; // there is no way to be two users
        }
        let base = tempfile::tempdir().unwrap();
        let folder = base.path().join("folder");
        fs::create_dir(&folder).unwrap();
        chown(&folder, Some(65534), None).unwrap();
        for owner in [Owner::Own, Owner::OwnOrRoot, Owner::User(1)] {
            assert_eq!(open(&folder, owner), Err("it belongs to user 65534".to_owned()));
        }
        assert_eq!(open(&folder, Owner::User(65534)), Ok(()));
        assert_eq!(open(&folder, Owner::GivenByRoot), Ok(()));
        std::os::unix::fs::lchown(&folder, Some(0), None).unwrap();
        chown(base.path(), Some(65534), None).unwrap();
        for owner in [Owner::Own, Owner::OwnOrRoot, Owner::GivenByRoot] {
            assert!(open(&folder, owner).unwrap_err().ends_with("belongs to user 65534"));
        }
    }

    #[test]
    fn a_pinned_socket_is_reached_whatever_its_name_leads_to_now() {
        let base = tempfile::tempdir().unwrap();
        let folder = Folder::make(&base.path().join("folder"), Owner::Own).unwrap();
        let path = folder.path().join("a.sock");
        let wanted = UnixListener::bind(&path).unwrap();
        let pinned = Pinned::at(&folder.at("a.sock")).unwrap();
        assert_eq!((pinned.kind, pinned.uid), (Kind::Socket, geteuid().as_raw()));
        fs::rename(&path, folder.path().join("b.sock")).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        let stream = pinned.connect().unwrap();
        wanted.set_nonblocking(true).unwrap();
        assert!(wanted.accept().is_ok());
        drop(stream);
        symlink("b.sock", folder.path().join("link")).unwrap();
        assert_eq!(Pinned::at(&folder.at("link")).unwrap().kind, Kind::Link);
        assert_eq!(Pinned::behind(&folder.at("link")).unwrap().kind, Kind::Socket);
        assert_eq!(Pinned::at(folder.path()).unwrap().kind, Kind::Other);
        assert!(folder.is_there());
        fs::rename(folder.path(), base.path().join("moved")).unwrap();
        assert!(!folder.is_there());
        assert!(folder.at("b.sock").exists(), "it is known by more than its path");
    }

    #[test]
    fn what_has_come_into_the_place_of_a_pinned_file_is_not_removed() {
        let base = tempfile::tempdir().unwrap();
        let (path, own) = (base.path().join("link"), base.path().join("own"));
        symlink("x.sock", &path).unwrap();
        let pinned = Pinned::at(&path).unwrap();
        // A file system may give a number that is free to the next file.
        fs::remove_file(&path).unwrap();
        pinned.remove_at(&path).unwrap();
        symlink("x.sock", &path).unwrap();
        pinned.remove_at(&path).unwrap();
        assert!(path.is_symlink());
        let pinned = Pinned::at(&path).unwrap();
        fs::rename(&path, &own).unwrap();
        fs::write(&path, "").unwrap();
        pinned.remove_at(&path).unwrap();
        assert!(path.exists());
        pinned.remove_at(&own).unwrap();
        assert!(!own.is_symlink());
    }

    #[test]
    fn sockets_of_lbd_are_known_by_their_names() {
        assert!(is_socket_name("lb-5dd4a5eb9733e12e.sock"));
        assert!(is_socket_name("a-b--5dd4a5eb9733e12e.sock"));
        for other in ["lb.sock", "lb-5dd4a5eb9733e12.sock", "lb-5DD4A5EB9733E12E.sock", "x"] {
            assert!(!is_socket_name(other), "{other}");
        }
    }
}
