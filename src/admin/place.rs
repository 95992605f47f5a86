//! Where a daemon's socket is: decided alike by the daemon and by whoever looks for it.

use std::{
    env,
    ffi::OsString,
    fmt, fs, io,
    net::SocketAddr,
    os::unix::ffi::OsStrExt,
    path::{self, Component, Path, PathBuf},
};

use nix::unistd::geteuid;

use crate::config::Config;

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
        path::absolute(path).map(|path| Self::File(plain(&path)))
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

    /// Every place where its socket may be, the first that can be used is the daemon's.
    pub(super) fn places(&self) -> Vec<Place> {
        let name = self.socket_name();
        let folders = folders(
            env::var_os("RUNTIME_DIRECTORY"),
            env::var_os("XDG_RUNTIME_DIR"),
            geteuid().as_raw(),
        );
        let place =
            |(folder, given): (PathBuf, bool)| Place { socket: folder.join(&name), folder, given };
        folders.into_iter().map(place).collect()
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Listen(address) => f.write_str(address),
        }
    }
}

/// One place where a socket may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) folder: PathBuf,
    pub(super) socket: PathBuf,
    /// The service manager made the folder for this daemon.
    pub(super) given: bool,
}

/// The folders, best first, and whether the service manager gave them.
fn folders(runtime: Option<OsString>, session: Option<OsString>, uid: u32) -> Vec<(PathBuf, bool)> {
    // systemd.exec(5): several folders are separated by colons.
    let runtime = runtime.iter().flat_map(env::split_paths).next();
    let given = runtime.into_iter().map(|folder| (folder, true));
    let system = (uid == 0).then(|| PathBuf::from("/run/lbd"));
    let session = session.map(|folder| PathBuf::from(folder).join("lbd"));
    let last = PathBuf::from(format!("/tmp/lbd-{uid}"));
    let own = system.into_iter().chain(session).chain([last]).map(|folder| (folder, false));
    // A relative one would be another place for everybody (XDG Base Directory Specification).
    given.chain(own).filter(|(folder, _)| folder.is_absolute()).collect()
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
        let config = crate::config::from_command(
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
            folders.into_iter().map(|(folder, _)| folder.display().to_string()).collect()
        };
        assert_eq!(paths(None, None, 7), ["/tmp/lbd-7"]);
        assert_eq!(paths(None, Some("/run/user/7"), 7), ["/run/user/7/lbd", "/tmp/lbd-7"]);
        assert_eq!(
            paths(Some("/run/a:/run/b"), Some("/x"), 0),
            ["/run/a", "/run/lbd", "/x/lbd", "/tmp/lbd-0"]
        );
        assert_eq!(paths(Some(""), Some("relative"), 7), ["/tmp/lbd-7"]);
    }
}
