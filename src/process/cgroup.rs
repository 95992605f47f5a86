//! The workers' cgroups, where one is delegated to lbd (cgroups(7); the kernel's cgroup-v2.rst).
//!
//! ```text
//! the delegated cgroup ──┬── lbd-PID      lbd and the guards: a cgroup that has controllers for
//!                        │                others can't have processes itself
//!                        ├── lbd-PID-1    a worker, with all that it ever starts
//!                        └── lbd-PID-2
//! ```
//!
//! A cgroup can be killed as one (`cgroup.kill`), however fast its processes fork, and limits their
//! number (`pids.max`). lbd does not guess from write access whether a cgroup is delegated, because
//! root can write everywhere. It looks for systemd's mark (systemd's CGROUP_DELEGATION.md, for
//! `Delegate=`).

use std::{
    cell::Cell,
    ffi::CStr,
    fs::{self, File},
    io::{self, Write as _},
    num::NonZeroU32,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process, thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};

/// The extended attributes that mark a delegated cgroup. The second can be read by root only, and
/// is the only one that systemd before 251 sets.
const MARKS: [&CStr; 2] = [c"user.delegate", c"trusted.delegate"];

/// How long to wait for the processes that a killed lbd left behind to die.
const PATIENCE: Duration = Duration::from_secs(1);

/// The same for the processes that a worker left behind; here nothing waits for the removal.
const LONG_PATIENCE: Duration = Duration::from_secs(30);

/// Why workers get no cgroups.
#[derive(Debug, thiserror::Error)]
pub enum NoCgroups {
    /// No cgroup is delegated to lbd.
    #[error("no cgroup is delegated to lbd")]
    NotDelegated,
    /// A cgroup is delegated, but lbd can't use it.
    #[error("the cgroup that is delegated to lbd can't be used: {0}: {1}")]
    Denied(PathBuf, io::Error),
}

/// The cgroup that is delegated to lbd, and that lbd divides among the workers.
#[derive(Debug)]
pub struct Cgroups {
    base: PathBuf,
    /// The prefix of the names of all cgroups that this lbd creates.
    prefix: String,
    last: Cell<u64>,
    pids: Result<(), String>,
}

impl Cgroups {
    /// Moves this process into a leaf of the delegated cgroup, so that other cgroups can be created
    /// beside it. Also removes what a killed lbd left there, which may take a second.
    ///
    /// # Errors
    ///
    /// Where no cgroup is delegated, or the delegated one can't be divided. Nothing is changed
    /// then.
    pub fn claim() -> Result<Self, NoCgroups> {
        let base = own().filter(|path| is_delegated(path)).ok_or(NoCgroups::NotDelegated)?;
        Self::divide(base, process::id())
    }

    fn divide(base: PathBuf, pid: u32) -> Result<Self, NoCgroups> {
        let prefix = format!("lbd-{pid}");
        let leaf = base.join(&prefix);
        let denied = |path: &Path| {
            let path = path.to_owned();
            |error| NoCgroups::Denied(path, error)
        };
        fs::create_dir(&leaf).or_else(exists).map_err(denied(&leaf))?;
        let procs = leaf.join("cgroup.procs");
        fs::write(&procs, pid.to_string())
            .inspect_err(|_| drop(fs::remove_dir(&leaf)))
            .map_err(denied(&procs))?;
        remove_leftovers(&base, &prefix);
        let pids = enable_pids(&base);
        Ok(Self { base, prefix, last: Cell::new(0), pids })
    }

    /// The delegated cgroup.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.base
    }

    /// Whether a worker's processes can be limited.
    ///
    /// # Errors
    ///
    /// The reason why not, as a sentence.
    pub fn can_limit_processes(&self) -> Result<(), &str> {
        self.pids.as_ref().copied().map_err(String::as_str)
    }

    /// Creates a cgroup for one worker, limited to `processes` processes and threads.
    ///
    /// # Errors
    ///
    /// Where the kernel refuses it, or the limit can't be set.
    pub fn make(&self, processes: Option<NonZeroU32>) -> io::Result<Cgroup> {
        self.last.set(self.last.get() + 1);
        let path = self.base.join(format!("{}-{}", self.prefix, self.last.get()));
        fs::create_dir(&path)?;
        let directory = File::open(&path)?;
        let cgroup = Cgroup { path, directory: directory.into() };
        if let Some(processes) = processes {
            fs::write(cgroup.path.join("pids.max"), processes.to_string())?;
        }
        Ok(cgroup)
    }
}

/// One worker's cgroup. Removed when dropped, if nothing is left in it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    pub(super) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let removed = fs::remove_dir(&self.path);
        if removed.is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy) {
            // All processes in the cgroup have been killed, but those that are not lbd's children
            // were not waited for.
            let path = std::mem::take(&mut self.path);
            // If there can be no thread, or the removal fails, the next lbd removes the cgroup.
            let remover = move || remove(&path, LONG_PATIENCE);
            let _ = thread::Builder::new().name("lbd-cgroup".into()).spawn(remover);
        }
    }
}

/// Moves this process into the cgroup with this directory.
pub(super) fn enter(directory: impl AsFd) -> io::Result<()> {
    write(directory, c"cgroup.procs", b"0")
}

/// Kills everything in the cgroup with this directory, in one step. Needs Linux 5.14.
pub(super) fn kill(directory: impl AsFd) -> io::Result<()> {
    write(directory, c"cgroup.kill", b"1")
}

fn write(directory: impl AsFd, file: &CStr, text: &[u8]) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    File::from(openat(directory, file, flags, Mode::empty())?).write_all(text)
}

/// The directory of the cgroup that this process is in.
fn own() -> Option<PathBuf> {
    let (root, mount) = mount(&fs::read_to_string("/proc/self/mountinfo").ok()?)?;
    let path = member(&fs::read_to_string("/proc/self/cgroup").ok()?)?;
    // Where the cgroup is outside of the mounted hierarchy, the path begins with `/..` and has no
    // such prefix.
    Some(mount.join(path.strip_prefix(root).ok()?))
}

/// The root and the mount point of the cgroup2 mount (proc_pid_mountinfo(5)): fields 4 and 5 of a
/// line. The file system type is the first field after the `-`.
fn mount(mountinfo: &str) -> Option<(PathBuf, PathBuf)> {
    let line = mountinfo.lines().find(|line| {
        line.split_once(" - ").is_some_and(|(_, after)| after.starts_with("cgroup2 "))
    })?;
    let mut fields = line.split(' ').skip(3).map(PathBuf::from);
    Some((fields.next()?, fields.next()?))
}

/// The path in the single version 2 hierarchy (cgroups(7)).
fn member(cgroup: &str) -> Option<PathBuf> {
    cgroup.lines().find_map(|line| line.strip_prefix("0::")).map(PathBuf::from)
}

fn is_delegated(path: &Path) -> bool {
    MARKS.iter().any(|mark| {
        let mut value = [0_u8; 1];
        rustix::fs::getxattr(path, *mark, &mut value) == Ok(1) && value == *b"1"
    })
}

fn enable_pids(base: &Path) -> Result<(), String> {
    let controllers = fs::read_to_string(base.join("cgroup.controllers")).unwrap_or_default();
    if !controllers.split_ascii_whitespace().any(|name| name == "pids") {
        return Err("the cgroup that is delegated to lbd has no pids controller".to_owned());
    }
    fs::write(base.join("cgroup.subtree_control"), "+pids")
        .map_err(|error| format!("cannot limit processes in {}: {error}", base.display()))
}

/// Kills and removes the cgroups of lbd processes that no longer exist. A living lbd is recognised
/// by being in its own leaf.
fn remove_leftovers(base: &Path, own: &str) {
    let Ok(entries) = fs::read_dir(base) else { return };
    let names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    for name in &names {
        let Some(pid) =
            name.strip_prefix("lbd-").map(|rest| rest.split('-').next().unwrap_or(rest))
        else {
            continue;
        };
        let leaf = format!("lbd-{pid}");
        let members = fs::read_to_string(base.join(&leaf).join("cgroup.procs"));
        let lives = members.is_ok_and(|members| members.lines().any(|member| member == pid));
        if leaf != own && !lives && pid.bytes().all(|byte| byte.is_ascii_digit()) {
            remove(&base.join(name), PATIENCE);
        }
    }
}

/// Kills everything in the cgroup and removes it once it is empty, or gives up after `patience`.
/// Blocks until then.
fn remove(path: &Path, patience: Duration) {
    let until = Instant::now() + patience;
    // An error means that there is nothing to kill, or that lbd may not kill it.
    let _ = File::open(path).map(kill);
    while fs::remove_dir(path).is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
        && Instant::now() < until
    {
        thread::sleep(Duration::from_millis(5));
    }
}

fn exists(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_of_version_2_is_found_among_others() {
        let hybrid = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                      39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids\n\
                      41 31 0:38 /a /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        let found = mount(hybrid).unwrap();
        assert_eq!(found, ("/a".into(), "/sys/fs/cgroup/unified".into()));
        assert_eq!(mount("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"), None);
        let cgroup = "9:name=systemd:/\n8:pids:/x\n0::/system.slice/lbd.service\n";
        assert_eq!(member(cgroup), Some("/system.slice/lbd.service".into()));
        assert_eq!(member("8:pids:/x\n"), None);
    }

    #[test]
    fn a_folder_without_the_mark_is_not_delegated() {
        assert!(!is_delegated(tempfile::tempdir().unwrap().path()));
        assert!(!is_delegated(Path::new("/nowhere")));
    }

    #[test]
    fn what_is_written_where() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path();
        let read = |path: &str| fs::read_to_string(base.join(path)).unwrap();
        fs::write(base.join("cgroup.controllers"), "cpu memory pids\n").unwrap();
        let cgroups = Cgroups::divide(base.to_owned(), 42).unwrap();
        assert_eq!(read("lbd-42/cgroup.procs"), "42");
        assert_eq!(read("cgroup.subtree_control"), "+pids");
        assert_eq!(cgroups.can_limit_processes(), Ok(()));

        let limited = cgroups.make(NonZeroU32::new(7)).unwrap();
        assert_eq!(read("lbd-42-1/pids.max"), "7");
        let free = cgroups.make(None).unwrap();
        assert!(!base.join("lbd-42-2/pids.max").exists());
        for name in ["cgroup.procs", "cgroup.kill"] {
            fs::write(base.join("lbd-42-2").join(name), "").unwrap();
        }
        enter(free.directory()).unwrap();
        kill(free.directory()).unwrap();
        assert_eq!(
            (read("lbd-42-2/cgroup.procs"), read("lbd-42-2/cgroup.kill")),
            ("0".into(), "1".into())
        );
        drop((limited, free));

        fs::write(base.join("cgroup.controllers"), "cpu memory\n").unwrap();
        let cgroups = Cgroups::divide(base.to_owned(), 43).unwrap();
        let why = "the cgroup that is delegated to lbd has no pids controller";
        assert_eq!(cgroups.can_limit_processes(), Err(why));
    }

    #[test]
    fn only_what_a_dead_lbd_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path();
        for name in ["lbd-1", "lbd-1-1", "lbd-2", "lbd-2-1", "lbd-3-7", "lbd-x", "other", "lbd-4"] {
            fs::create_dir(base.join(name)).unwrap();
        }
        fs::write(base.join("lbd-1/cgroup.procs"), "1\n100\n").unwrap();
        remove_leftovers(base, "lbd-4");
        let mut left: Vec<_> = fs::read_dir(base)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort_unstable();
        assert_eq!(left, ["lbd-1", "lbd-1-1", "lbd-4", "lbd-x", "other"]);
    }
}
