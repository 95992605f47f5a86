//! Opening files beneath the root, and never anywhere else.
//!
//! The kernel enforces this: `openat2(2)` with `RESOLVE_BENEATH` refuses a path that leaves the
//! folder at any step, by `..` or by a symbolic link, whatever is renamed meanwhile. But it also
//! refuses absolute links to files inside the folder, and it does not exist before Linux 5.6 or
//! under some seccomp filters. In these cases the path is first resolved and checked to be inside,
//! and then walked from the root with `O_NOFOLLOW` at each step. If somebody puts a link there
//! meanwhile, the walk fails.
//!
//! Only regular files are opened, with `O_NONBLOCK`, so that a FIFO can't hang the server. Every
//! failure that depends on the name is "not found", so that an answer never reveals what exists
//! outside.

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata},
    future::{Ready, ready},
    io::{self, SeekFrom},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2},
    sys::stat::Mode,
};
use tokio::io::{AsyncRead, AsyncSeek, ReadBuf};
use tower_http::services::fs::{Backend, File as ServedFile};

/// How long the root's descriptor is used before its path is looked up again. When a deployment
/// replaces the folder, or the link to it, the worker serves the new one after this time.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(1);

/// The folder whose files are served; clones share it.
#[derive(Debug, Clone)]
pub(super) struct Root(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    folder: Mutex<(Arc<OwnedFd>, Instant)>,
}

impl Root {
    /// Opens the folder.
    ///
    /// # Errors
    ///
    /// Those of open(2); `ENOTDIR` where it is no folder.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        // Detects an unreadable root now, instead of in each request.
        fs::read_dir(path)?;
        let folder = Mutex::new((Arc::new(open_folder(path)?), Instant::now()));
        Ok(Self(Arc::new(Inner { path: path.to_owned(), folder })))
    }

    /// The regular file at `path`, for reading.
    fn file(&self, path: &Path) -> io::Result<OpenFile> {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = self.open_beneath(path, flags)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(OpenFile { file, metadata, position: 0 })
    }

    /// What `path` is: a regular file or a folder.
    fn look(&self, path: &Path) -> io::Result<Metadata> {
        let metadata = self.open_beneath(path, OFlag::O_PATH)?.metadata()?;
        if !metadata.is_file() && !metadata.is_dir() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(metadata)
    }

    fn open_beneath(&self, path: &Path, flags: OFlag) -> io::Result<File> {
        let folder = self.folder();
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        match openat2(&*folder, path, how) {
            Ok(file) => Ok(file.into()),
            // EXDEV: the path leaves the folder, even if an absolute link leads back in. EAGAIN: a
            // concurrent rename. ENOSYS, EPERM: openat2 is not available.
            Err(Errno::EXDEV | Errno::EAGAIN | Errno::ENOSYS | Errno::EPERM) => {
                self.open_resolved(&folder, path, flags)
            }
            Err(error) => Err(error.into()),
        }
        .map_err(in_the_name_or_not)
    }

    /// Opens without `openat2`: resolves the path, checks it, and walks the result without
    /// following links.
    fn open_resolved(&self, folder: &OwnedFd, path: &Path, flags: OFlag) -> io::Result<File> {
        let root = fs::canonicalize(&self.0.path)?;
        let resolved = fs::canonicalize(root.join(path))?;
        let inside = resolved.strip_prefix(&root).map_err(|_| io::ErrorKind::NotFound)?;

        let open_one = |folder: &OwnedFd, name: &OsStr, flags| {
            openat(folder, name, flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
        };
        let mut parent = folder.as_fd().try_clone_to_owned()?;
        for name in inside.parent().into_iter().flat_map(Path::iter) {
            parent = open_one(&parent, name, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        }
        let name = inside.file_name().unwrap_or(OsStr::new("."));
        Ok(open_one(&parent, name, flags)?.into())
    }

    fn folder(&self) -> Arc<OwnedFd> {
        let mut held = self.0.folder.lock().unwrap_or_else(PoisonError::into_inner);
        let (folder, looked_up) = &mut *held;
        if looked_up.elapsed() >= LOOKUP_INTERVAL {
            // During a swap the path may not exist for a moment: keep the old folder until it does.
            if let Ok(current) = open_folder(&self.0.path) {
                *folder = Arc::new(current);
            }
            *looked_up = Instant::now();
        }
        Arc::clone(folder)
    }
}

impl Backend for Root {
    type File = OpenFile;
    type Metadata = Metadata;
    type OpenFuture = Ready<io::Result<OpenFile>>;
    type MetadataFuture = Ready<io::Result<Metadata>>;

    fn open(&self, path: PathBuf) -> Self::OpenFuture {
        ready(self.file(&path))
    }

    fn metadata(&self, path: PathBuf) -> Self::MetadataFuture {
        ready(self.look(&path))
    }
}

/// A regular file, read inline, up to the length that it had when it was opened.
#[derive(Debug)]
pub(super) struct OpenFile {
    file: File,
    metadata: Metadata,
    position: u64,
}

impl AsyncRead for OpenFile {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let left = self.metadata.len().saturating_sub(self.position);
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.remaining());
        let space = buffer.initialize_unfilled_to(wanted);
        let read = self.file.read_at(space, self.position)?;
        self.position += read as u64;
        buffer.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncSeek for OpenFile {
    fn start_seek(mut self: Pin<&mut Self>, to: SeekFrom) -> io::Result<()> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
            SeekFrom::End(offset) => self.metadata.len().checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(())
    }

    fn poll_complete(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<u64>> {
        Poll::Ready(Ok(self.position))
    }
}

impl ServedFile for OpenFile {
    type Metadata = Metadata;
    type MetadataFuture<'a> = Ready<io::Result<Metadata>>;

    fn metadata(&self) -> Self::MetadataFuture<'_> {
        ready(Ok(self.metadata.clone()))
    }
}

fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

/// Turns every error that the name alone can cause into "not found". Other errors are the
/// machine's.
fn in_the_name_or_not(error: io::Error) -> io::Error {
    let by_name = match error.raw_os_error().map(Errno::from_raw) {
        Some(errno) => matches!(
            errno,
            Errno::ENOENT
                | Errno::EACCES
                | Errno::ENOTDIR
                | Errno::ELOOP
                | Errno::ENAMETOOLONG
                | Errno::EINVAL
                | Errno::ENXIO
                | Errno::ENODEV
                | Errno::EXDEV
                | Errno::EPERM
        ),
        None => true,
    };
    if by_name { io::ErrorKind::NotFound.into() } else { error }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::fs::symlink};

    use super::*;

    /// Opens by either way, which must agree.
    fn read(root: &Root, path: &str) -> Option<String> {
        let text = |file: io::Result<File>| {
            let mut text = String::new();
            file.ok()?.read_to_string(&mut text).ok()?;
            Some(text)
        };
        let path = Path::new(path);
        let by_kernel = text(root.open_beneath(path, OFlag::O_RDONLY));
        let by_walk = text(root.open_resolved(&root.folder(), path, OFlag::O_RDONLY));
        assert_eq!(by_kernel, by_walk, "{path:?}");
        by_kernel
    }

    #[test]
    fn links_are_followed_inside_and_refused_outside_by_both_ways() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root");
        fs::create_dir_all(path.join("sub")).unwrap();
        fs::write(path.join("sub/file"), "inside").unwrap();
        fs::write(folder.path().join("secret"), "outside").unwrap();
        symlink("sub/file", path.join("relative")).unwrap();
        symlink(path.join("sub/file"), path.join("absolute")).unwrap();
        symlink(path.join("sub"), path.join("folder")).unwrap();
        symlink("../secret", path.join("out")).unwrap();
        symlink(folder.path(), path.join("up")).unwrap();
        symlink("loop", path.join("loop")).unwrap();
        let root = Root::open(&path).unwrap();

        for inside in ["sub/file", "./sub/file", "relative", "absolute", "folder/file"] {
            assert_eq!(read(&root, inside).as_deref(), Some("inside"), "{inside}");
        }
        for outside in ["../secret", "out", "up/secret", "loop", "/etc/passwd", "sub/../../secret"]
        {
            assert_eq!(read(&root, outside), None, "{outside}");
        }
    }

    #[test]
    fn names_that_cannot_be_are_not_found() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "").unwrap();
        let root = Root::open(folder.path()).unwrap();
        let long = "x".repeat(300);
        for name in ["none", "file/below", "nul\0", &long] {
            let error = root.file(Path::new(name)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound, "{name:?}");
        }
    }
}
