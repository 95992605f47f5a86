//! The workers' cgroups, where one is delegated to lbd (cgroups(7); the kernel's cgroup-v2.rst).
//!
//! ```text
//! the delegated cgroup ──┬── lbd-PID      lbd and the guards: a cgroup that has controllers for
//!                        │                others can't have processes itself
//!                        ├── lbd-PID-1    a worker, with all that it ever starts
//!                        └── lbd-PID-2
//! ```
//!
//! A cgroup is killed as one (`cgroup.kill`), however fast its processes fork, and counts them
//! (`pids.max`). Whether one is delegated is not guessed from what can be written, which for root is
//! everything: systemd marks it (systemd's CGROUP_DELEGATION.md, for `Delegate=`).

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

/// What systemd marks a delegated cgroup with; the second is for root's eyes, and all that versions
/// before 251 know.
const MARKS: [&CStr; 2] = [c"user.delegate", c"trusted.delegate"];

/// How long the processes that a killed lbd left may take to die.
const PATIENCE: Duration = Duration::from_secs(1);

/// The same of those that a worker left, where nobody waits for it.
const LONG_PATIENCE: Duration = Duration::from_secs(30);

/// Why workers get no cgroups.
#[derive(Debug, thiserror::Error)]
pub enum NoCgroups {
    /// lbd has no cgroup that it may divide.
    #[error("no cgroup is delegated to lbd")]
    NotDelegated,
    /// It has one, and can't.
    #[error("the cgroup that is delegated to lbd can't be used: {0}: {1}")]
    Denied(PathBuf, io::Error),
}

/// The cgroup that is delegated to lbd, and divided between the workers.
#[derive(Debug)]
pub struct Cgroups {
    base: PathBuf,
    /// What the names of all that this lbd makes begin with.
    prefix: String,
    last: Cell<u64>,
    pids: Result<(), String>,
}

impl Cgroups {
    /// Moves this process into a leaf of the cgroup that is delegated to it, so that there can be
    /// others beside it, and removes what a killed lbd has left there, which may take a second.
    ///
    /// # Errors
    ///
    /// Where none is delegated, or it can't be divided. Nothing is changed then.
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
    /// Why not, as a sentence.
    pub fn can_limit_processes(&self) -> Result<(), &str> {
        self.pids.as_ref().copied().map_err(String::as_str)
    }

    /// A cgroup for one worker, which may be as many `processes` and threads.
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
            // What is in it has been killed, but whoever is nobody's child here was not waited for.
            let path = std::mem::take(&mut self.path);
            // Without a thread, or where it is in vain, the next lbd finds it.
            let remover = move || remove(&path, LONG_PATIENCE);
            let _ = thread::Builder::new().name("lbd-cgroup".into()).spawn(remover);
        }
    }
}

/// Moves this process into the cgroup that `directory` is.
pub(super) fn enter(directory: impl AsFd) -> io::Result<()> {
    write(directory, c"cgroup.procs", b"0")
}

/// Kills all that is in the cgroup that `directory` is, in one step. Needs Linux 5.14.
pub(super) fn kill(directory: impl AsFd) -> io::Result<()> {
    write(directory, c"cgroup.kill", b"1")
}

fn write(directory: impl AsFd, file: &CStr, text: &[u8]) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    File::from(openat(directory, file, flags, Mode::empty())?).write_all(text)
}

/// The folder of the cgroup that this process is in.
fn own() -> Option<PathBuf> {
    let (root, mount) = mount(&fs::read_to_string("/proc/self/mountinfo").ok()?)?;
    let path = member(&fs::read_to_string("/proc/self/cgroup").ok()?)?;
    // Outside of what is mounted, the path begins with `/..`, and matches nothing.
    Some(mount.join(path.strip_prefix(root).ok()?))
}

/// Which cgroup is mounted where (proc_pid_mountinfo(5)). Fields 4 and 5 of a line; the type is the
/// first after the `-`.
fn mount(mountinfo: &str) -> Option<(PathBuf, PathBuf)> {
    let line = mountinfo.lines().find(|line| {
        line.split_once(" - ").is_some_and(|(_, after)| after.starts_with("cgroup2 "))
    })?;
    let mut fields = line.split(' ').skip(3).map(PathBuf::from);
    Some((fields.next()?, fields.next()?))
}

/// The path in the one hierarchy of version 2 (cgroups(7)).
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

/// Kills and removes what lbds made that are no more. That of one which is alive holds it.
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

/// Kills all in the cgroup, and removes it as soon as it is empty, or gives up. It blocks for as long.
fn remove(path: &Path, patience: Duration) {
    let until = Instant::now() + patience;
    // An error says that there is nothing to kill, or that it is not for lbd to do.
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
