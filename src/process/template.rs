//! The template: the process that guards are forked from.
//!
//! A guard that lbd started by execve(2) would have pages of its own for all that the loader relocates
//! in the binary, which is most of what a guard would cost. Forked from a process in which that has
//! been done, they share these pages: the kernel copies one only when it is written to.
//!
//! ```text
//! lbd ──┬── template      waits for lbd, forks, and has nothing of any worker
//!       ├── guard         forked by the template, and yet lbd's child (CLONE_PARENT)
//!       └── guard
//! ```
//!
//! It is started with the first worker, ends when lbd does, and is replaced where somebody kills it:
//! the guards that there are don't depend on it.

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

/// How long a template may take to start and to fork. Only a machine that is out of breath, or
/// somebody who keeps stopping the template, makes lbd wait so long.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long lbd waits at its end for the template's.
const END: Duration = Duration::from_secs(1);

/// How many bytes there are for what `ps` shows of a guard; see [`Title`].
const TITLE: usize = 256;

/// What the template did when it was asked for a guard.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// It has this pid.
    Forked(i32),
    /// There is none, for this reason (an errno).
    Failed(i32),
}

/// lbd's side of a running template.
#[derive(Debug)]
pub(super) struct Template {
    pid: i32,
    channel: OwnedFd,
}

impl Template {
    /// Starts one: `binary`, which has [`exec_main`] as its `exec` command.
    pub(super) fn start(binary: &Path) -> io::Result<Self> {
        let (channel, theirs) = pair()?;
        // Nothing here makes std fork by itself: it uses posix_spawn(3), which does not copy the
        // page tables of a daemon that may be large.
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

    /// Its process id. It is lbd's child until [`has_ended`](Self::has_ended) says otherwise.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Has a guard forked that listens to the other end of `channel`, and returns its pid. `label` is
    /// what `ps` shows beside it.
    ///
    /// Fails with [`BrokenPipe`](ErrorKind::BrokenPipe) where the template has ended.
    pub(super) fn fork_guard(&self, channel: BorrowedFd<'_>, label: &str) -> io::Result<i32> {
        // Never zero bytes, which would read as end of file.
        let label = if label.is_empty() { "-" } else { label };
        send_with(&self.channel, label.as_bytes(), &[channel])?;
        // Whoever has stopped it stops no worker from being started.
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

    /// Reaps it where it has ended; whether it has.
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
        // Its end closes its end of the channel, at which it says nothing more.
        let end = Instant::now() + END;
        while !self.has_ended() && Instant::now() < end {
            let closed = PollFd::new(self.channel.as_fd(), PollFlags::empty());
            let _ = poll(&mut [closed], poll_timeout(Some(Duration::from_millis(1))));
        }
    }
}

/// Runs the hidden `lbd exec`, the template, and each guard that it forks. A guard returns when nothing
/// of its worker is left, with the program's own status (128 + n for signal n); the template when lbd
/// has ended; or at once, with a message and status 2, where it was not lbd that started it.
///
/// To be called first of all in `main`: it forks, so there must be one thread only.
pub fn exec_main() -> ExitCode {
    let stdin = io::stdin();
    if getsockopt(&stdin, sockopt::SockType) != Ok(SockType::SeqPacket) {
        eprintln!("lbd exec is how lbd starts a worker, and of no use by hand");
        return ExitCode::from(2);
    }
    // A panic would exit, and lbd would take that for an orderly end; a signal says it was none.
    panic::set_hook(Box::new(|_| abort()));
    // An error says that there is nobody to tell it to, or no room: lbd sees the end of the template.
    template(stdin.as_fd()).unwrap_or(ExitCode::FAILURE)
}

/// Forks guards for lbd until it ends; in each of them, is the guard.
fn template(lbd: BorrowedFd<'_>) -> io::Result<ExitCode> {
    // A terminal's ^C and `pkill lbd` are for lbd, which then tells the guards what to do.
    SigSet::all().thread_block()?;
    setsid()?;
    prctl::set_name(c"lbd-template")?;
    // What has lbd's user, as a worker without a user of its own, can trace neither the template nor
    // the guards, nor read or change their memory (ptrace(2)). The programs are not affected: execve(2)
    // takes it back.
    prctl::set_dumpable(false)?;
    close_inherited()?;
    // Whoever has stopped the template, and then killed lbd: the end of lbd continues it.
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

/// The next guard that lbd wants: its channel and label. `None` where lbd has ended.
fn requested(lbd: BorrowedFd<'_>) -> io::Result<Option<(OwnedFd, String)>> {
    let mut label = [0; MESSAGE];
    let (length, fds) = receive_with(lbd, &mut label)?;
    let label = String::from_utf8_lossy(&label[..length]).into_owned();
    Ok(fds.into_iter().next().map(|channel| (channel, label)))
}

/// Forks a child of this process's parent (CLONE_PARENT, clone(2)): its pid, or `None` in the child.
fn fork_beside() -> Result<Option<i32>, Errno> {
    let flags = libc::c_long::from(libc::CLONE_PARENT);
    // SAFETY: this process has one thread, and the child its own copy of everything, the stack
    // included, so it may do whatever this one could. Of what fork(3) does beside the system call there
    // is nothing to do: no handlers are registered, and no lock can be held. All arguments but the
    // flags are zero, so their order, which differs between machines, does not matter; the signal that
    // tells the parent of the child's end is this process's own, SIGCHLD.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    let pid = i32::try_from(Errno::result(pid)?).map_err(|_| Errno::EOVERFLOW)?;
    Ok(Some(pid).filter(|pid| *pid > 0))
}

/// Where the kernel finds what `ps` shows of this process: the memory of its arguments.
///
/// As for setproctitle(3), the kernel takes for one text what is there up to a NUL, where the last byte
/// is none.
#[derive(Debug)]
struct Title(Option<(*mut u8, usize)>);

impl Title {
    /// Of the process as it was started, with an argument of [`TITLE`] bytes.
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
        // SAFETY: these are the bytes of this process's arguments, which the kernel has put there for
        // it to write to; nothing in it reads them again, and `text` is shorter.
        unsafe {
            ptr::write_bytes(start, 0, length);
            ptr::copy_nonoverlapping(text.as_ptr(), start, text.len());
            start.add(length - 1).write(b'.');
        }
    }
}
