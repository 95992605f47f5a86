//! The template: the process that guards are forked from.
//!
//! If lbd started a guard by execve(2), the guard would have private copies of all pages that the
//! loader relocates in the binary, which is most of what a guard would cost. Guards that are forked
//! from a process in which the relocation is done share these pages: the kernel copies a page only
//! when it is written to.
//!
//! ```text
//! lbd ──┬── template      waits for lbd, forks, and has nothing of any worker
//!       ├── guard         forked by the template, and yet lbd's child (CLONE_PARENT)
//!       └── guard
//! ```
//!
//! lbd starts the template with the first worker, and a new one if somebody kills it. The template
//! ends when lbd does. Running guards don't depend on it.

use std::{
    fs,
    io::{self, ErrorKind},
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::process::CommandExt as _,
    },
    panic,
    path::Path,
    process::{Command, ExitCode, Stdio, abort},
    ptr,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, poll},
    sys::{
        prctl,
        signal::{SigSet, Signal, kill},
        socket::{SockType, getsockopt, sockopt},
    },
    unistd::{Pid, dup2_stdin, setsid},
};
use serde::{Deserialize, Serialize};

use super::{
    channel::{MESSAGE, hear, pair, poll_timeout, receive_with, send_with, tell},
    guard::{close_inherited, guard},
    tree::{Reaped, reap},
};

/// How long a template may take to start and fork. It takes that long only on an overloaded
/// machine, or if somebody keeps stopping the template.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long lbd, at its own end, waits for the template to end.
const END: Duration = Duration::from_secs(1);

/// The space for the text that `ps` shows for a guard, in bytes; see [`Title`].
const TITLE: usize = 256;

/// The template's answer to a request for a guard.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// A guard was forked, with this pid.
    Forked(i32),
    /// The fork failed with this errno.
    Failed(i32),
}

/// lbd's side of a running template.
#[derive(Debug)]
pub(super) struct Template {
    pid: i32,
    channel: OwnedFd,
}

impl Template {
    /// Starts a template from `binary`, whose `exec` command must be [`exec_main`].
    pub(super) fn start(binary: &Path) -> io::Result<Self> {
        let (channel, theirs) = pair()?;
        // Nothing here forces std to fork: std uses posix_spawn(3), which does not copy the page
        // tables of a daemon that may be large.
        let child = Command::new(binary)
            .arg0("lbd")
            .args(["exec", &" ".repeat(TITLE)])
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        Ok(Self { pid, channel })
    }

    /// The template's pid. The template is lbd's child until [`has_ended`](Self::has_ended) returns
    /// true.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Makes the template fork a guard that listens at the other end of `channel`, and returns the
    /// guard's pid. `ps` shows `label` for the guard.
    ///
    /// Fails with [`BrokenPipe`](ErrorKind::BrokenPipe) if the template has ended.
    pub(super) fn fork_guard(&self, channel: BorrowedFd<'_>, label: &str) -> io::Result<i32> {
        // An empty message would read as end of file.
        let label = if label.is_empty() { "-" } else { label };
        send_with(&self.channel, label.as_bytes(), &[channel])?;
        // If somebody stopped the template (SIGSTOP), continue it: workers must start.
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGCONT);
        match self.answer(Instant::now() + PATIENCE)? {
            Answer::Forked(pid) => Ok(pid),
            Answer::Failed(errno) => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    fn answer(&self, deadline: Instant) -> io::Result<Answer> {
        loop {
            match hear(&self.channel) {
                Ok(answer) => return answer.ok_or(ErrorKind::BrokenPipe.into()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Err(ErrorKind::BrokenPipe.into());
                }
                Err(error) => return Err(error),
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                let message = "the process that guards are forked from does not answer";
                return Err(io::Error::new(ErrorKind::TimedOut, message));
            }
            let ready = PollFd::new(self.channel.as_fd(), PollFlags::POLLIN);
            let _ = poll(&mut [ready], poll_timeout(Some(rest)));
        }
    }

    /// Reaps the template if it has ended. Returns whether it has.
    pub(super) fn has_ended(&self) -> bool {
        reap(Some(self.pid)) != Reaped::Alive
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        if self.has_ended() {
            return;
        }
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        // When the template ends, its end of the channel closes, and this poll returns.
        let end = Instant::now() + END;
        while !self.has_ended() && Instant::now() < end {
            let closed = PollFd::new(self.channel.as_fd(), PollFlags::empty());
            let _ = poll(&mut [closed], poll_timeout(Some(Duration::from_millis(1))));
        }
    }
}

/// Runs the hidden `lbd exec`: the template, and each guard that it forks. A guard returns when no
/// process of its worker is left, with the program's own status (128 + n for signal n). The
/// template returns when lbd has ended, or at once with a message and status 2 if it was not lbd
/// that started it.
///
/// Must be called first of all in `main`: it forks, so there must be only one thread.
pub fn exec_main() -> ExitCode {
    let stdin = io::stdin();
    if getsockopt(&stdin, sockopt::SockType) != Ok(SockType::SeqPacket) {
        eprintln!("lbd exec is how lbd starts a worker, and of no use by hand");
        return ExitCode::from(2);
    }
    // A panic would exit, which lbd would take for an orderly end. A signal shows that it was none.
    panic::set_hook(Box::new(|_| abort()));
    // An error means that there is nobody to report to, or no memory: lbd notices that the template
    // has ended.
    template(stdin.as_fd()).unwrap_or(ExitCode::FAILURE)
}

/// Forks guards for lbd until lbd ends. In each forked child, runs the guard.
fn template(lbd: BorrowedFd<'_>) -> io::Result<ExitCode> {
    // A terminal's ^C and `pkill lbd` are for lbd, which then tells the guards what to do.
    SigSet::all().thread_block()?;
    setsid()?;
    prctl::set_name(c"lbd-template")?;
    // Without this, any process of lbd's user, such as a worker without its own `user`, could trace
    // the template and the guards, and read or change their memory (ptrace(2)). The programs are
    // not affected: execve(2) resets the flag.
    prctl::set_dumpable(false)?;
    close_inherited()?;
    // If somebody stops the template (SIGSTOP) and then kills lbd, the end of lbd continues the
    // template.
    prctl::set_pdeathsig(Signal::SIGCONT)?;
    let title = Title::find();
    title.set("template");
    while let Some((channel, label)) = requested(lbd)? {
        match fork_beside() {
            Ok(None) => {
                dup2_stdin(channel)?;
                title.set(&label);
                return Ok(guard(lbd));
            }
            Ok(Some(pid)) => tell(lbd, &Answer::Forked(pid))?,
            Err(errno) => tell(lbd, &Answer::Failed(errno as i32))?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The next request from lbd: the guard's channel and label. `None` if lbd has ended.
fn requested(lbd: BorrowedFd<'_>) -> io::Result<Option<(OwnedFd, String)>> {
    let mut label = [0; MESSAGE];
    let (length, fds) = receive_with(lbd, &mut label)?;
    let label = String::from_utf8_lossy(&label[..length]).into_owned();
    Ok(fds.into_iter().next().map(|channel| (channel, label)))
}

/// Forks a child of this process's parent (CLONE_PARENT, clone(2)). Returns its pid, or `None` in
/// the child.
fn fork_beside() -> Result<Option<i32>, Errno> {
    let flags = libc::c_long::from(libc::CLONE_PARENT);
    // SAFETY: this process has one thread, and the child has its own copy of everything, including
    // the stack, so the child may do whatever this process could. fork(3) does more than the system
    // call, but none of that is needed here: no handlers are registered, and no lock can be held.
    // All arguments but the flags are zero, so their order, which differs between machines, does
    // not matter. The flags include no exit signal: with CLONE_PARENT the child sends its parent
    // the signal that this process sends, SIGCHLD.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    let pid = i32::try_from(Errno::result(pid)?).map_err(|_| Errno::EOVERFLOW)?;
    Ok(Some(pid).filter(|pid| *pid > 0))
}

/// The memory that the kernel reads to show this process in `ps`: its arguments.
///
/// As setproctitle(3) relies on: if the last byte of that memory is not NUL, the kernel takes the
/// memory up to the first NUL as one text.
#[derive(Debug)]
struct Title(Option<(*mut u8, usize)>);

impl Title {
    /// Finds the memory. The process was started with an argument of [`TITLE`] bytes.
    fn find() -> Self {
        let find = || {
            let stat = fs::read("/proc/self/stat").ok()?;
            let end = stat.iter().rposition(|byte| *byte == b')')?;
            let fields = str::from_utf8(&stat[end + 1..]).ok()?;
            // `arg_start` and `arg_end`, 48 and 49, counted from 3 (proc_pid_stat(5)).
            let mut fields = fields.split_ascii_whitespace().skip(48 - 3);
            let mut next = || fields.next()?.parse::<usize>().ok();
            let (start, end) = (next()?, next()?);
            let length = end.checked_sub(start).filter(|length| *length > TITLE)?;
            Some((ptr::with_exposed_provenance_mut(start), length))
        };
        Self(find())
    }

    fn set(&self, label: &str) {
        let Some((start, length)) = self.0 else { return };
        let text = format!("lbd exec {label}");
        let text = &text.as_bytes()[..text.floor_char_boundary(TITLE)];
        // SAFETY: these are the bytes of this process's arguments. The kernel put them there for
        // the process to write to, nothing in the process reads them again, and `text` is shorter.
        unsafe {
            ptr::write_bytes(start, 0, length);
            ptr::copy_nonoverlapping(text.as_ptr(), start, text.len());
            start.add(length - 1).write(b'.');
        }
    }
}
