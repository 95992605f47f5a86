//! Where a daemon's socket is: decided alike by the daemon and by whoever looks for it.

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

/// Folders in `/tmp` of one user that are looked at.
const MOST_SPARE: usize = 16;

/// Which daemon it is: of each instance one may run at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Instance {
    /// The one with this configuration file, an absolute path.
    File(PathBuf),
    /// The one that `lbd run` started, by the first address it listens on.
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

    /// The daemon with the configuration file `path`, which need not be valid, nor there.
    ///
    /// # Errors
    ///
    /// Where the current folder is gone, or the path is empty.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        config::logical(path).map(|path| Self::File(plain(&path)))
    }

    /// Every daemon that may be meant by the configuration file `path`, the likeliest first. A relative
    /// one is seen from the current folder as its user calls it, as the kernel knows it, and as the
    /// shell believes: a folder that a link leads to may have been started in under either name, and
    /// may be another one by now.
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

    /// The daemon that `lbd run --listen` began on this address.
    #[must_use]
    pub fn of_listen(address: &str) -> Self {
        // As the daemon writes it: [::0] is [::].
        let plain = address.parse::<SocketAddr>().map(|address| address.to_string());
        Self::Listen(plain.unwrap_or_else(|_| address.to_owned()))
    }

    /// What its socket is called: recognisable, and different for every instance.
    pub(super) fn socket_name(&self) -> String {
        let (shown, whole) = match self {
            Self::File(path) => (path.file_stem().unwrap_or_default(), path.as_os_str()),
            Self::Listen(address) => (address.as_ref(), address.as_ref()),
        };
        let legible = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let shown: String = shown.to_string_lossy().chars().take(24).map(legible).collect();
        format!("{shown}-{:016x}.sock", fnv1a(whole.as_bytes()))
    }

    /// Every place where its socket may be, best first.
    pub(super) fn places(&self) -> Vec<Place> {
        let name = self.socket_name();
        let place = |folder: SocketFolder| Place { folder, name: name.clone() };
        own_folders().into_iter().map(place).collect()
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

/// One place where a socket may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) folder: SocketFolder,
    /// What the socket is called there.
    pub(super) name: String,
}

impl Place {
    pub(super) fn socket(&self) -> PathBuf {
        self.folder.path.join(&self.name)
    }
}

/// A folder that sockets may be in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SocketFolder {
    pub(super) path: PathBuf,
    pub(super) origin: Origin,
}

/// How a folder comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The service manager made it for this daemon.
    Given,
    /// Under `/run`: root makes it, or has its service manager make it for the user of a service.
    System,
    /// This user makes it.
    Own,
    /// Another user makes it.
    Other(u32),
}

impl SocketFolder {
    /// Opens it for a daemon's own socket, and makes it where it has to.
    pub(super) fn make(&self) -> Result<Folder, Unfit> {
        match self.origin {
            // Made again where somebody has removed it.
            Origin::Given => Folder::make(&self.path, Owner::OwnOrRoot),
            Origin::System | Origin::Own => Folder::make(&self.path, Owner::Own),
            Origin::Other(user) => Err(Unfit::Owner(user)),
        }
    }

    /// Opens it to look whose sockets are in it.
    pub(super) fn look(&self) -> Result<Folder, Unfit> {
        let open = |owner| Folder::open(&self.path, owner);
        match self.origin {
            // Where others could make it too, as in a container whose /run is like /tmp, it has to be
            // root's own.
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

/// The folders of the contract.
fn folders(runtime: Option<OsString>, session: Option<OsString>, uid: u32) -> Vec<SocketFolder> {
    // systemd.exec(5): several folders are separated by colons.
    let runtime = runtime.iter().flat_map(env::split_paths).next();
    let given = runtime.into_iter().map(|folder| (folder, Origin::Given));
    let system = (uid == 0).then(|| (PathBuf::from("/run/lbd"), Origin::System));
    let session = session.map(|folder| (PathBuf::from(folder).join("lbd"), Origin::Own));
    let last = (PathBuf::from(format!("/tmp/lbd-{uid}")), Origin::Own);
    let all = given.chain(system).chain(session).chain([last]);
    // A relative one would be another place for everybody (XDG Base Directory Specification).
    let all = all.filter(|(path, _)| path.is_absolute());
    all.map(|(path, origin)| SocketFolder { path, origin }).collect()
}

/// Folders of this user's that were made where another one had taken the name of the last.
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

/// Makes a folder under a name that nobody can have taken before.
pub(super) fn make_spare() -> io::Result<SocketFolder> {
    let prefix = spare_prefix(geteuid().as_raw());
    let path = tempfile::Builder::new().prefix(&prefix).tempdir_in("/tmp")?.keep();
    Ok(SocketFolder { path, origin: Origin::Own })
}

fn spare_prefix(uid: u32) -> String {
    format!("lbd-{uid}.")
}

/// The folders of other users' daemons, and of services whose unit has chosen another one.
pub(super) fn other_folders() -> Vec<SocketFolder> {
    let own = own_folders();
    all_folders().into_iter().filter(|folder| !own.contains(folder)).collect()
}

/// The folders that daemons of all users have their sockets in, as far as this user may look.
pub(super) fn all_folders() -> Vec<SocketFolder> {
    let mut all = own_folders();
    let uid = geteuid().as_raw();
    let mut add = |path: PathBuf, origin| {
        if all.iter().all(|folder| folder.path != path) {
            all.push(SocketFolder { path, origin });
        }
    };
    let of = |user: u32| if user == uid { Origin::Own } else { Origin::Other(user) };
    // RuntimeDirectory= of a unit may be any name, the one of lbd's own begins like that.
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

/// Entries of a folder whose names begin with `prefix`: a bounded number of them.
fn entries_named(folder: &str, prefix: &str) -> Vec<PathBuf> {
    const MOST: usize = 256;
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        entry.file_name().to_str()?.starts_with(prefix).then(|| entry.path())
    });
    paths.take(MOST).collect()
}

/// The user after whom a folder is named: `PREFIX1000`, or `PREFIX1000.abcdef`.
fn trailing_uid(path: &Path, prefix: &str) -> Option<u32> {
    let name = path.file_name()?.to_str()?.strip_prefix(prefix)?;
    name.split('.').next()?.parse().ok()
}

/// The absolute `path` without `..`. Links are followed only where that is needed to take one away:
/// a file is known by the path that people use, wherever a link in it leads to today.
fn plain(path: &Path) -> PathBuf {
    if !path.components().any(|part| part == Component::ParentDir) {
        return path.to_owned();
    }
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return path.to_owned();
    };
    fs::canonicalize(folder).map_or_else(|_| path.to_owned(), |folder| folder.join(name))
}

/// FNV-1a, 64 bits (RFC 9923): lbd and its client may be of different builds, between which the hashes
/// of std may change.
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
