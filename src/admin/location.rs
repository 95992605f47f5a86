//! Where a daemon's socket is. The daemon and its clients use the same rules.

use std::{
    env,
    ffi::OsString,
    fmt, fs, io,
    net::SocketAddr,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Component, Path, PathBuf},
};

use nix::unistd::geteuid;

use super::folder::{Folder, Owner, Unfit};
use crate::{
    config::{self, Config},
    printable,
};

/// The most folders in `/tmp` of one user to look at.
const MOST_SPARE: usize = 16;

/// Identifies a daemon. Only one daemon may run for each instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Instance {
    /// The daemon with this configuration file, an absolute path.
    File(PathBuf),
    /// The daemon that `lbd run` started, identified by its first listen address.
    Listen(String),
}

impl Instance {
    /// The daemon that runs, or would run, `config`.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        match &config.path {
            Some(path) => Self::File(plain(path)),
            None => {
                let first = config.services.iter().flat_map(|service| &service.listen).next();
                Self::Listen(first.map(ToString::to_string).unwrap_or_default())
            }
        }
    }

    /// The daemon with the configuration file `path`, which may be invalid or missing.
    ///
    /// # Errors
    ///
    /// Where the current folder is gone, or the path is empty.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        config::logical(path).map(|path| Self::File(plain(&path)))
    }

    /// All daemons that `path` may mean, the likeliest first. A relative path is resolved against
    /// the current folder as the user names it, as the kernel knows it, and as the shell believes:
    /// if the folder was reached through a link, the daemon may have been started under either
    /// name, and the link may lead elsewhere by now.
    ///
    /// # Errors
    ///
    /// As [`Self::of_file`].
    pub fn candidates(path: &Path) -> io::Result<Vec<Self>> {
        let mut all: Vec<Self> = Vec::new();
        let logical = Self::of_file(path);
        if !path.as_os_str().is_empty() && path.is_relative() {
            let folders = [env::current_dir().ok(), config::shells_folder()];
            all.extend(folders.into_iter().flatten().map(|f| Self::File(plain(&f.join(path)))));
        }
        match logical {
            Ok(logical) => all.insert(0, logical),
            Err(error) if all.is_empty() => return Err(error),
            Err(_) => {}
        }
        let mut different: Vec<Self> = Vec::new();
        for instance in all {
            if !different.contains(&instance) {
                different.push(instance);
            }
        }
        Ok(different)
    }

    /// The daemon that was started with `lbd run --listen` and this address.
    #[must_use]
    pub fn of_listen(address: &str) -> Self {
        // Written as the daemon writes it: [::0] is [::].
        let plain = address.parse::<SocketAddr>().map(|address| address.to_string());
        Self::Listen(plain.unwrap_or_else(|_| address.to_owned()))
    }

    /// The socket's file name: recognisable, and unique to the instance.
    pub(super) fn socket_name(&self) -> String {
        let (shown, whole) = match self {
            Self::File(path) => (path.file_stem().unwrap_or_default(), path.as_os_str()),
            Self::Listen(address) => (address.as_ref(), address.as_ref()),
        };
        let legible = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let shown: String = shown.to_string_lossy().chars().take(24).map(legible).collect();
        format!("{shown}-{:016x}.sock", fnv1a(whole.as_bytes()))
    }

    /// All positions that the socket may be at, best first.
    pub(super) fn locations(&self) -> Vec<SocketLocation> {
        let name = self.socket_name();
        let location = |folder: SocketFolder| SocketLocation { folder, name: name.clone() };
        own_folders().into_iter().map(location).collect()
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.write_str(&printable::line(&path.to_string_lossy())),
            Self::Listen(address) => f.write_str(&printable::line(address)),
        }
    }
}

/// A possible position of a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SocketLocation {
    pub(super) folder: SocketFolder,
    /// The socket's file name in the folder.
    pub(super) name: String,
}

impl SocketLocation {
    pub(super) fn socket(&self) -> PathBuf {
        self.folder.path.join(&self.name)
    }
}

/// A folder that may contain sockets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SocketFolder {
    pub(super) path: PathBuf,
    pub(super) origin: Origin,
}

/// Who creates a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The service manager creates it for this daemon.
    Given,
    /// Under `/run`: root creates it, or root's service manager does for a service's user.
    System,
    /// The calling user creates it.
    Own,
    /// Another user creates it.
    Other(u32),
}

impl SocketFolder {
    /// Opens the folder for a daemon's own socket, and creates it if needed.
    pub(super) fn make(&self) -> Result<Folder, Unfit> {
        match self.origin {
            // Created again if somebody has removed it.
            Origin::Given => Folder::make(&self.path, Owner::OwnOrRoot),
            Origin::System | Origin::Own => Folder::make(&self.path, Owner::Own),
            Origin::Other(user) => Err(Unfit::Owner(user)),
        }
    }

    /// Opens the folder to look for sockets.
    pub(super) fn look(&self) -> Result<Folder, Unfit> {
        let open = |owner| Folder::open(&self.path, owner);
        match self.origin {
            // Where others could create it too, as in a container whose /run is like /tmp, it must
            // belong to root.
            Origin::Given | Origin::System if geteuid().is_root() => {
                open(Owner::GivenByRoot).or_else(|why| open(Owner::Own).map_err(|_| why))
            }
            Origin::Given | Origin::System => open(Owner::OwnOrRoot),
            Origin::Own => open(Owner::Own),
            Origin::Other(user) => open(Owner::User(user)),
        }
    }
}

/// The folders of this user's daemons, best first.
pub(super) fn own_folders() -> Vec<SocketFolder> {
    let uid = geteuid().as_raw();
    let (runtime, session) = (env::var_os("RUNTIME_DIRECTORY"), env::var_os("XDG_RUNTIME_DIR"));
    let mut folders = folders(runtime, session, uid);
    folders.extend(spare_folders(uid));
    folders
}

/// The documented folders.
fn folders(runtime: Option<OsString>, session: Option<OsString>, uid: u32) -> Vec<SocketFolder> {
    // systemd.exec(5): several folders are separated by colons.
    let runtime = runtime.iter().flat_map(env::split_paths).next();
    let given = runtime.into_iter().map(|folder| (folder, Origin::Given));
    let system = (uid == 0).then(|| (PathBuf::from("/run/lbd"), Origin::System));
    let session = session.map(|folder| (PathBuf::from(folder).join("lbd"), Origin::Own));
    let last = (PathBuf::from(format!("/tmp/lbd-{uid}")), Origin::Own);
    let all = given.chain(system).chain(session).chain([last]);
    // A relative path would mean a different folder for each process (XDG Base Directory
    // Specification).
    let all = all.filter(|(path, _)| path.is_absolute());
    all.map(|(path, origin)| SocketFolder { path, origin }).collect()
}

/// Folders that this user created because another user had taken the name of the last one.
fn spare_folders(uid: u32) -> Vec<SocketFolder> {
    let prefix = spare_prefix(uid);
    let Ok(entries) = fs::read_dir("/tmp") else { return Vec::new() };
    let is_own = |path: &PathBuf| {
        fs::symlink_metadata(path).is_ok_and(|found| found.is_dir() && found.uid() == uid)
    };
    let paths = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        entry.file_name().to_str()?.starts_with(&prefix).then(|| entry.path())
    });
    let mut own: Vec<_> = paths.filter(is_own).take(MOST_SPARE).collect();
    own.sort_unstable();
    own.into_iter().map(|path| SocketFolder { path, origin: Origin::Own }).collect()
}

/// Creates a folder under a name that nobody can have taken before.
pub(super) fn make_spare() -> io::Result<SocketFolder> {
    let prefix = spare_prefix(geteuid().as_raw());
    let path = tempfile::Builder::new().prefix(&prefix).tempdir_in("/tmp")?.keep();
    Ok(SocketFolder { path, origin: Origin::Own })
}

fn spare_prefix(uid: u32) -> String {
    format!("lbd-{uid}.")
}

/// The folders of other users' daemons, and of services whose unit sets another RuntimeDirectory=.
pub(super) fn other_folders() -> Vec<SocketFolder> {
    let own = own_folders();
    all_folders().into_iter().filter(|folder| !own.contains(folder)).collect()
}

/// The folders of all users' daemons, as far as this user may look.
pub(super) fn all_folders() -> Vec<SocketFolder> {
    let mut all = own_folders();
    let uid = geteuid().as_raw();
    let mut add = |path: PathBuf, origin| {
        if all.iter().all(|folder| folder.path != path) {
            all.push(SocketFolder { path, origin });
        }
    };
    let of = |user: u32| if user == uid { Origin::Own } else { Origin::Other(user) };
    // A unit may set any RuntimeDirectory=. That of lbd's own units begins with `lbd`.
    for path in entries_named("/run", "lbd") {
        add(path, Origin::System);
    }
    for session in entries_named("/run/user", "") {
        if let Some(user) = trailing_uid(&session, "") {
            add(session.join("lbd"), of(user));
        }
    }
    for path in entries_named("/tmp", "lbd-") {
        if let Some(user) = trailing_uid(&path, "lbd-") {
            add(path, of(user));
        }
    }
    all
}

/// The entries of a folder whose names begin with `prefix`, up to a fixed number.
fn entries_named(folder: &str, prefix: &str) -> Vec<PathBuf> {
    const MOST: usize = 256;
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        entry.file_name().to_str()?.starts_with(prefix).then(|| entry.path())
    });
    paths.take(MOST).collect()
}

/// The user that a folder is named after: `PREFIX1000`, or `PREFIX1000.abcdef`.
fn trailing_uid(path: &Path, prefix: &str) -> Option<u32> {
    let name = path.file_name()?.to_str()?.strip_prefix(prefix)?;
    name.split('.').next()?.parse().ok()
}

/// The absolute `path` without `..`. A link is followed only if that is needed to remove a `..`: a
/// file is known by the path that people use, wherever a link in it leads today.
fn plain(path: &Path) -> PathBuf {
    if !path.components().any(|part| part == Component::ParentDir) {
        return path.to_owned();
    }
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return path.to_owned();
    };
    fs::canonicalize(folder).map_or_else(|_| path.to_owned(), |folder| folder.join(name))
}

/// FNV-1a, 64 bits (RFC 9923). lbd and its client may be different builds, and std's hashes may
/// change between builds.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_named_after_the_file() {
        let name = |path: &str| Instance::of_file(Path::new(path)).unwrap().socket_name();
        assert_eq!(name("/etc/lbd/lb.toml"), "lb-5dd4a5eb9733e12e.sock");
        assert_ne!(name("/etc/lb.toml"), name("/etc/lbd/lb.toml"));
        assert_eq!(name("/etc/./lb.toml"), name("/etc/lb.toml"));
        assert_eq!(name("/etc/../etc/lb.toml"), name("/etc/lb.toml"));
        let long = name(&format!("/{}é.toml", "a b".repeat(50)));
        assert!(long.starts_with("a-ba-ba-ba-ba-ba-ba-ba-b-"), "{long}");
        assert_eq!(long.len(), 24 + 1 + 16 + 5);
    }

    #[test]
    fn a_daemon_without_a_file_is_named_after_its_address() {
        let daemon = Instance::of_listen("127.0.0.1:8080");
        assert!(daemon.socket_name().starts_with("127-0-0-1-8080-"));
        assert_eq!(Instance::of_listen("[0::1]:80"), Instance::of_listen("[::1]:80"));
        let words = ["x".to_owned()];
        let config = config::from_command(
            &["[0::1]:80".to_owned(), "127.0.0.1:1".to_owned()],
            Some(1),
            words.to_vec(),
        );
        assert_eq!(Instance::of(&config.unwrap()), Instance::of_listen("[::1]:80"));
    }

    #[test]
    fn folders_are_looked_at_in_the_order_of_the_contract() {
        let paths = |runtime: Option<&str>, session: Option<&str>, uid| -> Vec<String> {
            let folders = folders(runtime.map(Into::into), session.map(Into::into), uid);
            folders.into_iter().map(|folder| folder.path.display().to_string()).collect()
        };
        assert_eq!(paths(None, None, 7), ["/tmp/lbd-7"]);
        assert_eq!(paths(None, Some("/run/user/7"), 7), ["/run/user/7/lbd", "/tmp/lbd-7"]);
        assert_eq!(
            paths(Some("/run/a:/run/b"), Some("/x"), 0),
            ["/run/a", "/run/lbd", "/x/lbd", "/tmp/lbd-0"]
        );
        assert_eq!(paths(Some(""), Some("relative"), 7), ["/tmp/lbd-7"]);
    }

    #[test]
    fn a_folder_is_of_the_user_that_it_is_named_for() {
        let uid = |path: &str| trailing_uid(Path::new(path), "lbd-");
        assert_eq!(uid("/tmp/lbd-1000"), Some(1000));
        assert_eq!(uid("/tmp/lbd-1000.x1y2z3"), Some(1000));
        assert_eq!(uid("/tmp/lbd-x"), None);
        assert_eq!(trailing_uid(Path::new("/run/user/7"), ""), Some(7));
    }

    #[test]
    fn a_file_may_be_meant_by_the_one_or_the_other_name_of_the_folder() {
        let whole = Instance::candidates(Path::new("/etc/lb.toml")).unwrap();
        assert_eq!(whole, [Instance::File("/etc/lb.toml".into())]);
        let seen = Instance::candidates(Path::new("lb.toml")).unwrap();
        let here = config::current_folder().unwrap().join("lb.toml");
        assert_eq!(seen[0], Instance::File(here));
        assert!(seen.contains(&Instance::File(env::current_dir().unwrap().join("lb.toml"))));
        assert!(Instance::candidates(Path::new("")).is_err());
    }
}
