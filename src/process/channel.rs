//! The protocol between lbd and a guard.
//!
//! The channel is a `SOCK_SEQPACKET` pair (unix(7)): a message arrives whole or not at all, and the
//! end of the other side reads as end of file, however that side ended. Each message is a few bytes
//! of JSON. The first one, [`start`], carries descriptors.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, IoSlice, IoSliceMut, Write as _},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    time::Duration,
};

use nix::{
    poll::PollTimeout,
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv,
            recvmsg, send, sendmsg, socketpair,
        },
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::Exit;
use crate::config::{MAX_LISTENERS, StopTo};

/// The program to start: everything except its descriptors.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Description {
    /// The file to run, if it is not the one that `argv[0]` names.
    pub(super) program: Option<OsString>,
    pub(super) argv: Vec<OsString>,
    pub(super) env: Vec<(OsString, OsString)>,
    pub(super) directory: OsString,
    pub(super) umask: Option<u32>,
    pub(super) user: Option<String>,
    pub(super) group: Option<String>,
    /// The file for the program's output, where a [`Writer`](super::writer::Writer) writes it.
    pub(super) output: Option<OsString>,
    /// Soft and hard `RLIMIT_NOFILE`.
    pub(super) open_files: Option<(u64, u64)>,
    /// The name (`LISTEN_FDNAMES`) of each listening socket that is passed.
    pub(super) listeners: Vec<String>,
}

/// What [`start`] hands to the guard. The guard itself never reads the description, so that it
/// stays small: the forked child does.
#[derive(Debug)]
pub(super) struct Package {
    pub(super) description: File,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
    /// The read end of the output pipe, for the process that writes the output to a file.
    pub(super) reader: Option<OwnedFd>,
    /// One for each name in the description.
    pub(super) listeners: Vec<OwnedFd>,
    /// The directory of the worker's cgroup.
    pub(super) cgroup: Option<OwnedFd>,
}

impl Package {
    /// Drops everything but the description, for a process that must not hold any of the program's
    /// descriptors.
    pub(super) fn into_description(self) -> File {
        self.description
    }

    /// Closes everything except the cgroup's directory. Only the program may hold its output and
    /// its sockets; otherwise they would stay open for as long as the guard lives.
    pub(super) fn into_cgroup(self) -> Option<OwnedFd> {
        // If the caller moved one field out, the others would stay open until the end of the
        // caller's scope.
        self.cgroup
    }
}

/// Sent by lbd to the guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Order {
    /// Send this signal to the program's process group.
    Signal(i32),
    /// Ask the program to stop with this signal, and report its exit when its whole process tree
    /// has ended. lbd orders the kill after this time.
    Stop(i32, StopTo, Duration),
    /// Kill everything below the guard.
    Kill,
    /// Reopen the file that the output is written to.
    Reopen,
}

/// Sent by the guard to lbd: `Failed`, or `Started` and then `Exited`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Report {
    Started(i32),
    Failed(String),
    Exited(Exit),
    /// What is wrong with the output file. May come at any time in between.
    Output(String),
}

/// Larger than any message. The longest is a [`Report::Failed`], which is cut to half of this.
pub(super) const MESSAGE: usize = 8 * 1024;

/// The most descriptors in one message: the listeners, and the others of a [`Package`]. This is far
/// below the kernel's limit (`SCM_MAX_FD`, 253).
const MAX_PASSED: usize = MAX_LISTENERS + 5;

/// Creates a channel. Both ends are close-on-exec and blocking.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Sends `message`. Never blocks: either side sends too little to fill the channel.
///
/// Fails with `EPIPE` (and no `SIGPIPE`) where the other side has ended.
pub(super) fn tell(channel: impl AsFd, message: &impl Serialize) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    send(channel.as_fd().as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)?;
    Ok(())
}

/// Receives one message; `None` where the other side has ended.
///
/// Never blocks: fails with [`WouldBlock`](io::ErrorKind::WouldBlock) where there is none yet.
pub(super) fn hear<T: DeserializeOwned>(channel: impl AsFd) -> io::Result<Option<T>> {
    let mut buffer = [0; MESSAGE];
    match recv(channel.as_fd().as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)? {
        0 => Ok(None),
        length => Ok(Some(serde_json::from_slice(&buffer[..length])?)),
    }
}

/// Converts a timeout for poll(2), which counts milliseconds. Rounds up, so that a caller does not
/// spin during the last millisecond.
pub(super) fn poll_timeout(timeout: Option<Duration>) -> PollTimeout {
    timeout.map_or(PollTimeout::NONE, |timeout| {
        PollTimeout::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
    })
}

/// Sends what the guard needs to start the program.
///
/// The description travels in a memory file, because an environment may be larger than a socket's
/// buffer.
pub(super) fn start(
    channel: impl AsFd,
    description: &Description,
    stdout: BorrowedFd<'_>,
    stderr: BorrowedFd<'_>,
    reader: Option<BorrowedFd<'_>>,
    listeners: &[BorrowedFd<'_>],
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut file = File::from(memfd_create(c"lbd-description", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&serde_json::to_vec(description)?)?;
    let mut fds = vec![file.as_fd(), stdout, stderr];
    fds.extend(reader.iter().chain(listeners).chain(&cgroup));
    let count = u8::try_from(listeners.len()).ok().filter(|_| listeners.len() <= MAX_LISTENERS);
    let count = count.ok_or_else(|| io::Error::other("too many listening sockets"))?;
    send_with(channel, &[count, reader.is_some().into()], &fds)
}

/// Sends `bytes` with copies of descriptors. `bytes` must not be empty: an empty message reads as
/// end of file. Never blocks, like [`tell`].
pub(super) fn send_with(
    channel: impl AsFd,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let fds: Vec<i32> = fds.iter().map(BorrowedFd::as_raw_fd).collect();
    sendmsg::<()>(
        channel.as_fd().as_raw_fd(),
        &[IoSlice::new(bytes)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
        None,
    )?;
    Ok(())
}

/// Waits for what [`send_with`] sent. Returns the number of bytes received, zero if the other side
/// has ended, and the descriptors, which are close-on-exec.
pub(super) fn receive_with(
    channel: impl AsFd,
    bytes: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut iov = [IoSliceMut::new(bytes)];
    let mut space = nix::cmsg_space!([i32; MAX_PASSED]);
    let message = recvmsg::<()>(
        channel.as_fd().as_raw_fd(),
        &mut iov,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = part {
            // SAFETY: the kernel has just made these descriptors for this process, and nothing
            // else knows their numbers.
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, fds))
}

/// Waits for what [`start`] sent. Returns `None` if lbd ended before.
pub(super) fn started(channel: impl AsFd) -> io::Result<Option<Package>> {
    let mut bytes = [0; 2];
    let (length, fds) = receive_with(channel, &mut bytes)?;
    if length == 0 {
        return Ok(None);
    }
    let [count, has_reader] = bytes;
    let mut fds = fds.into_iter();
    match (fds.next(), fds.next(), fds.next()) {
        (Some(description), Some(stdout), Some(stderr)) => Ok(Some(Package {
            description: File::from(description),
            stdout,
            stderr,
            reader: fds.by_ref().take(has_reader.into()).next(),
            listeners: fds.by_ref().take(count.into()).collect(),
            cgroup: fds.next(),
        })),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "descriptors are missing")),
    }
}

impl Description {
    /// Reads a description that [`start`] wrote. It can be read more than once.
    pub(super) fn read(file: &File) -> io::Result<Self> {
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        // Reads at an absolute offset, because forked processes share the file's position
        // (fork(2)).
        file.read_exact_at(&mut bytes, 0)?;
        Ok(serde_json::from_slice(&bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::unix::ffi::OsStringExt as _};

    use super::*;

    #[test]
    fn a_description_of_any_size_and_any_bytes_arrives_with_its_descriptors() {
        let (lbd, guard) = pair().unwrap();
        let description = Description {
            program: None,
            argv: vec!["node".into(), "server.js".into()],
            env: vec![("BIG".into(), OsString::from_vec(vec![0xff; 1 << 20]))],
            directory: "/".into(),
            umask: Some(0o27),
            user: None,
            group: None,
            output: None,
            open_files: Some((1, 2)),
            listeners: vec!["web".into()],
        };
        let (mut read, write) = io::pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        let cgroup = Some(null.as_fd());
        start(&lbd, &description, write.as_fd(), null.as_fd(), None, &[], cgroup).unwrap();
        drop(write);

        let package = started(&guard).unwrap().unwrap();
        assert_eq!(Description::read(&package.description).unwrap(), description);
        assert_eq!(Description::read(&package.description).unwrap(), description);
        assert!(package.reader.is_none());
        assert!(package.listeners.is_empty() && package.cgroup.is_some());
        File::from(package.stdout).write_all(b"hello").unwrap();
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn the_end_of_the_other_side_is_told_from_a_message() {
        let (lbd, guard) = pair().unwrap();
        tell(&lbd, &Order::Signal(15)).unwrap();
        tell(&lbd, &Order::Kill).unwrap();
        drop(lbd);
        assert_eq!(hear(&guard).unwrap(), Some(Order::Signal(15)));
        assert_eq!(hear(&guard).unwrap(), Some(Order::Kill));
        assert_eq!(hear::<Order>(&guard).unwrap(), None);
        assert!(started(&guard).unwrap().is_none());
        assert_eq!(
            tell(&guard, &Report::Started(1)).unwrap_err().raw_os_error(),
            Some(nix::libc::EPIPE)
        );
    }
}
