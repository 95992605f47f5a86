//! From the guard's fork to the program: sets up everything about a worker's process.
//!
//! The guard is single-threaded, so the child may run ordinary code between fork and `execve`. What
//! the child allocates is gone with the `execve`, and the guard stays small.

use std::{
    convert::Infallible,
    ffi::{CString, NulError, OsStr, OsString},
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::{OsStrExt as _, OsStringExt as _},
            fs::PermissionsExt as _,
        },
    },
    path::{Path, PathBuf},
    ptr,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
    sys::{
        prctl,
        resource::{Resource, setrlimit},
        signal::{SigSet, Signal},
        stat::{Mode, umask},
    },
    unistd::{
        Gid, Group, Pid, Uid, User, chdir, dup2_raw, dup2_stderr, dup2_stdin, dup2_stdout, execve,
        getgroups, getpid, getppid, setgroups, setresgid, setresuid, setsid,
    },
};
use thiserror::Error;

use super::{
    cgroup,
    channel::{Description, MESSAGE, Package},
    environment::ABOUT_THE_USER,
    writer::Opened,
};
use crate::config::{DEFAULT_PATH, MAX_LISTENERS, shown_path};

/// The descriptor of the first passed listening socket (`SD_LISTEN_FDS_START`, sd_listen_fds(3)).
const FIRST_LISTENER: i32 = 3;

/// Descriptors from here on can't collide with those that the program gets.
const ASIDE: i32 = FIRST_LISTENER + MAX_LISTENERS as i32;

/// Why the program does not run. One sentence that includes the cause, because it crosses a pipe as
/// text.
#[derive(Debug, Error)]
pub(super) enum ExecError {
    #[error("cannot read what to run: {0}")]
    Description(io::Error),
    #[error("cannot run {0:?}: no such program in PATH ({path})", path = shown_path(.1))]
    NotInPath(OsString, OsString),
    #[error("cannot run {0:?}: no such file, seen from the folder {1:?}")]
    NoSuchFile(PathBuf, OsString),
    #[error("cannot run {0:?}: its interpreter {1:?} does not exist")]
    NoInterpreter(PathBuf, OsString),
    #[error("cannot run {0:?}: the dynamic loader that it was linked for does not exist here")]
    NoLoader(PathBuf),
    #[error("cannot run {0:?}: it is a folder")]
    Folder(PathBuf),
    #[error("cannot run {0:?}: it is not executable: permission denied")]
    NotExecutable(PathBuf),
    #[error(
        "cannot run {0:?}: neither a program for this machine nor a script that begins with #!"
    )]
    NoProgram(PathBuf),
    #[error("cannot run {0:?}: {cause}", cause = words(*.1))]
    Run(PathBuf, Errno),
    #[error("cannot change to the folder {0:?}: {cause}", cause = words(*.1))]
    Directory(OsString, Errno),
    #[error("unknown user {0:?}")]
    UnknownUser(String),
    #[error("unknown group {0:?}")]
    UnknownGroup(String),
    #[error("user {0:?} has the number -1 in the user database, or its group has, which is none")]
    UserOfAll(String),
    #[error("group {0:?} has the number -1 in the group database, which is none")]
    GroupOfAll(String),
    #[error("user {0:?} is in no user database: its group must be given too")]
    GroupOfUser(String),
    #[error("{0}")]
    Output(String),
    #[error("cannot enter its cgroup: {0}")]
    Cgroup(io::Error),
    #[error("cannot {0}: {cause}", cause = words(*.1))]
    Step(&'static str, Errno),
    #[error("cannot pass a NUL byte in an argument or a variable: {0}")]
    Nul(#[from] NulError),
}

/// Becomes the program that `package` describes. Must be called in the forked child of `guard`
/// only.
///
/// On failure the reason is written to `errors`. That pipe is close-on-exec: if it ends without any
/// content, the program runs.
pub(super) fn become_program(
    package: Package,
    output: Option<Opened>,
    errors: OwnedFd,
    guard: Pid,
) -> ! {
    let mut errors = File::from(aside(&errors).unwrap_or(errors));
    let Err(error) = run(package, output, guard);
    let mut sentence = error.to_string();
    sentence.truncate(sentence.floor_char_boundary(MESSAGE / 2));
    let _ = errors.write_all(sentence.as_bytes());
    // SAFETY: ends this process at once, without what the guard has set up to run at its own exit.
    unsafe { libc::_exit(127) }
}

fn run(package: Package, output: Option<Opened>, guard: Pid) -> Result<Infallible, ExecError> {
    let Package { description, stdout, stderr, reader: _, listeners, cgroup: folder } = package;
    let output = output.map(Opened::aside).transpose().map_err(step("set up descriptors"))?;
    let mut what = Description::read(&description).map_err(ExecError::Description)?;

    setsid().map_err(step("begin a session"))?;
    if let Some(folder) = folder {
        cgroup::enter(folder).map_err(ExecError::Cgroup)?;
    }
    descriptors(&stdout, &stderr, &listeners).map_err(step("set up descriptors"))?;
    if let Some((soft, hard)) = what.open_files {
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).map_err(step("set the open-files limit"))?;
    }
    if let Some(mask) = what.umask {
        umask(Mode::from_bits_truncate(mask));
    }
    default_signals().map_err(step("reset the signals"))?;

    // Change folder as lbd, which may enter more folders, and again as the user, who may enter
    // folders that lbd can't (NFS).
    let directory = what.directory.as_os_str();
    let entered = chdir(directory);
    identity(what.user.as_deref(), what.group.as_deref(), &mut what.env)?;
    entered
        .or_else(|_| chdir(directory))
        .map_err(|errno| ExecError::Directory(directory.to_owned(), errno))?;

    // Set after the change of user, which clears it (PR_SET_PDEATHSIG(2const)). The guard may
    // already have ended by now, so check.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(step("set the parent-death signal"))?;
    if getppid() != guard {
        return Err(ExecError::Step("outlive the guard", Errno::ESRCH));
    }
    if let Some(opened) = output {
        opened.wait().map_err(ExecError::Output)?;
    }

    if !what.listeners.is_empty() {
        let (count, names) = (what.listeners.len().to_string(), what.listeners.join(":"));
        what.env.retain(|(name, _)| !name.as_bytes().starts_with(b"LISTEN_"));
        what.env.extend([
            ("LISTEN_FDS".into(), count.into()),
            ("LISTEN_FDNAMES".into(), names.into()),
            ("LISTEN_PID".into(), getpid().to_string().into()),
        ]);
    }
    execute(&what)
}

/// Gives the program descriptors 0 (`/dev/null`), 1 and 2, and the listening sockets, if any, from
/// 3 on.
///
/// All others are close-on-exec: the guard closed those it inherited, and opens none without that
/// flag.
fn descriptors(stdout: &OwnedFd, stderr: &OwnedFd, listeners: &[OwnedFd]) -> nix::Result<()> {
    let null = File::open("/dev/null")
        .map_err(|error| error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw))?;
    dup2_stdin(null)?;
    dup2_stdout(stdout)?;
    dup2_stderr(stderr)?;
    // Move all listeners out of the way first. A dup2 onto the same number would leave the
    // descriptor close-on-exec, and a dup2 onto another listener's number would close that
    // listener.
    let listeners = listeners.iter().map(aside).collect::<nix::Result<Vec<_>>>()?;
    for (number, listener) in (FIRST_LISTENER..).zip(listeners) {
        // SAFETY: whatever is at that number is not used again in this process.
        let passed = unsafe { dup2_raw(listener, number) }?;
        std::mem::forget(passed);
    }
    Ok(())
}

/// Duplicates `fd` as a close-on-exec descriptor whose number can't collide with the program's.
pub(super) fn aside(fd: impl AsFd) -> nix::Result<OwnedFd> {
    use std::os::fd::FromRawFd as _;
    let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(ASIDE))?;
    // SAFETY: the kernel has just made it, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Resets all signals to their default dispositions, including ignored ones (`nohup` leaves one),
/// and then clears the signal mask.
fn default_signals() -> nix::Result<()> {
    // Larger than the kernel's `struct sigaction`, all zeros: SIG_DFL, no flags.
    let default = [0_u64; 8];
    for signal in 1..=libc::SIGRTMAX() {
        // The C library refuses the two that it keeps for itself, which its posix_spawn ignores.
        // SAFETY: the kernel reads `default` and writes nothing; no handler is set. It refuses
        // SIGKILL and SIGSTOP, which are as they should be.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), ptr::null::<u8>(), 8)
        };
    }
    SigSet::empty().thread_set_mask()
}

/// Changes user and group for good, and drops privileges that lbd has beyond its user's.
pub(super) fn identity(
    user: Option<&str>,
    group: Option<&str>,
    env: &mut Vec<(OsString, OsString)>,
) -> Result<(), ExecError> {
    let account = user.map(find_user).transpose()?;
    let gid = match (group, &account) {
        (Some(group), _) => Some(find_group(group)?),
        (None, Some((_, Some(entry)))) => Some(entry.gid),
        (None, Some((uid, None))) => return Err(ExecError::GroupOfUser(uid.to_string())),
        (None, None) => None,
    };

    // A capability that lbd was given (to bind port 80, say) is not for its workers. Root's own
    // capabilities are not affected: they depend on the user.
    rustix::thread::clear_ambient_capability_set()
        .map_err(|error| Errno::from_raw(error.raw_os_error()))
        .map_err(step("drop the ambient capabilities"))?;

    if account.is_some() {
        // Dropping no groups needs no privilege.
        let groups = getgroups().map_err(step("read the groups"))?;
        if groups.iter().any(|other| Some(*other) != gid) {
            setgroups(&[]).map_err(step("drop the other groups"))?;
        }
    }
    if let Some(gid) = gid {
        setresgid(gid, gid, gid).map_err(step("change the group"))?;
    }
    let Some((uid, entry)) = account else { return Ok(()) };
    setresuid(uid, uid, uid).map_err(step("change the user"))?;
    prctl::set_no_new_privs().map_err(step("set no_new_privs"))?;

    if let Some(User { name, dir, shell, .. }) = entry {
        let about = [dir.into(), OsString::from(name.clone()), shell.into(), name.into()];
        for (variable, value) in ABOUT_THE_USER.into_iter().zip(about) {
            if !env.iter().any(|(name, _)| name == variable) {
                env.push((variable.into(), value));
            }
        }
    }
    Ok(())
}

/// Looks up a user by name or number, with its entry in the user database. A number needs no entry.
fn find_user(user: &str) -> Result<(Uid, Option<User>), ExecError> {
    let look_up = step("look up the user");
    if let Some(entry) = User::from_name(user).map_err(look_up)? {
        // The database may be a file with mistakes in it, or a server on the network: refuse -1.
        id(entry.uid.as_raw()).ok_or_else(|| ExecError::UserOfAll(user.to_owned()))?;
        id(entry.gid.as_raw()).ok_or_else(|| ExecError::UserOfAll(user.to_owned()))?;
        return Ok((entry.uid, Some(entry)));
    }
    let uid = number(user).ok_or_else(|| ExecError::UnknownUser(user.to_owned()))?;
    let uid = Uid::from_raw(uid);
    Ok((uid, User::from_uid(uid).map_err(step("look up the user"))?))
}

fn find_group(group: &str) -> Result<Gid, ExecError> {
    if let Some(entry) = Group::from_name(group).map_err(step("look up the group"))? {
        id(entry.gid.as_raw()).ok_or_else(|| ExecError::GroupOfAll(group.to_owned()))?;
        return Ok(entry.gid);
    }
    let gid = number(group).ok_or_else(|| ExecError::UnknownGroup(group.to_owned()))?;
    Ok(Gid::from_raw(gid))
}

/// Parses a numeric user or group id: digits only, though Rust would accept more.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit())).and_then(id)
}

/// Refuses -1, which setresuid(2) takes as "leave unchanged": root would stay root.
fn id(number: u32) -> Option<u32> {
    Some(number).filter(|number| *number != u32::MAX)
}

/// Runs the program. It is searched as execvp(3) does, but in the worker's own `PATH` and folder,
/// and a file that is not executable code is not passed to a shell.
fn execute(what: &Description) -> Result<Infallible, ExecError> {
    let argv =
        what.argv.iter().map(|argument| c_string(argument)).collect::<Result<Vec<_>, _>>()?;
    let env = what
        .env
        .iter()
        .map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()))
        .collect::<Result<Vec<_>, _>>()?;
    let attempt = |file: &Path| -> Result<Errno, NulError> {
        let Err(errno) = execve(&c_string(file.as_os_str())?, &argv, &env);
        Ok(errno)
    };

    let name = what.program.as_ref().or(what.argv.first()).cloned().unwrap_or_default();
    if name.as_bytes().contains(&b'/') || name.is_empty() {
        let file = PathBuf::from(name);
        let errno = attempt(&file)?;
        return Err(diagnose(file, errno, &what.directory));
    }
    let path = what.env.iter().find(|(name, _)| name == "PATH");
    let path = path.map_or(OsStr::new(DEFAULT_PATH), |(_, path)| path);
    let mut denied = None;
    for folder in path.as_bytes().split(|&byte| byte == b':') {
        let file = Path::new(OsStr::from_bytes(folder)).join(&name);
        match attempt(&file)? {
            // The script exists, but its interpreter is missing.
            Errno::ENOENT if file.exists() => {
                return Err(diagnose(file, Errno::ENOENT, &what.directory));
            }
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => denied = denied.or(Some(file)),
            errno => return Err(diagnose(file, errno, &what.directory)),
        }
    }
    Err(match denied {
        Some(file) => diagnose(file, Errno::EACCES, &what.directory),
        None => ExecError::NotInPath(name, path.to_owned()),
    })
}

/// Explains why the kernel refused `file`, by looking at the file.
fn diagnose(file: PathBuf, errno: Errno, directory: &OsStr) -> ExecError {
    let Ok(metadata) = fs::metadata(&file) else {
        return match errno {
            Errno::ENOENT => ExecError::NoSuchFile(file, directory.to_owned()),
            _ => ExecError::Run(file, errno),
        };
    };
    match errno {
        Errno::EACCES if metadata.is_dir() => ExecError::Folder(file),
        Errno::EACCES if metadata.permissions().mode() & 0o111 == 0 => {
            ExecError::NotExecutable(file)
        }
        Errno::ENOENT => match interpreter(&file) {
            Some(interpreter) => ExecError::NoInterpreter(file, interpreter),
            None => ExecError::NoLoader(file),
        },
        Errno::ENOEXEC => ExecError::NoProgram(file),
        _ => ExecError::Run(file, errno),
    }
}

/// The interpreter that a script names after `#!`. A carriage return, which an editor on another
/// system leaves, is part of the name.
fn interpreter(file: &Path) -> Option<OsString> {
    // The kernel reads no further either (BINPRM_BUF_SIZE).
    let mut head = Vec::new();
    File::open(file).ok()?.take(256).read_to_end(&mut head).ok()?;
    let line = head.strip_prefix(b"#!")?.split(|&byte| byte == b'\n').next()?;
    let mut words = line.split(|byte| b" \t".contains(byte)).filter(|word| !word.is_empty());
    Some(OsString::from_vec(words.next()?.to_vec()))
}

fn c_string(text: &OsStr) -> Result<CString, NulError> {
    CString::new(text.as_bytes())
}

fn step(what: &'static str) -> impl FnOnce(Errno) -> ExecError {
    move |errno| ExecError::Step(what, errno)
}

/// The kernel's reason, as part of a sentence.
pub(super) fn words(errno: Errno) -> String {
    errno.desc().to_lowercase()
}
