//! Reads small files safely: whatever somebody has put at the path, the read neither blocks nor
//! goes on forever.

use std::{
    fs::{Metadata, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use nix::libc;

/// Why a file was not read.
#[derive(Debug)]
pub(super) enum FileError {
    /// The system call failed.
    Io(io::Error),
    /// It is a folder, a pipe, a device or a socket.
    NotAFile,
    /// It is too long for what is expected.
    TooLong,
}

/// The content of the regular file at `path`, at most `most` bytes. `fit` may refuse the file
/// before it is read. Links are followed.
pub(super) fn read(
    path: &Path,
    most: u64,
    fit: impl FnOnce(&Metadata) -> io::Result<()>,
) -> Result<Vec<u8>, FileError> {
    // Without O_NONBLOCK, opening a pipe would block until somebody opens it for writing (fifo(7)).
    // Without O_NOCTTY, a terminal could become lbd's controlling terminal.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(FileError::NotAFile);
    }
    fit(&found)?;
    let mut content = Vec::new();
    file.take(most + 1).read_to_end(&mut content)?;
    if content.len() as u64 > most {
        return Err(FileError::TooLong);
    }
    Ok(content)
}

impl From<io::Error> for FileError {
    fn from(error: io::Error) -> Self {
        // A socket can't be opened at all (open(2)).
        if error.raw_os_error() == Some(libc::ENXIO) { Self::NotAFile } else { Self::Io(error) }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn nothing_but_a_small_file_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let load = |path: &Path| read(path, 4, |_| Ok(()));
        fs::write(path("file"), "four").unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        assert_eq!(load(&path("file")).unwrap(), b"four");
        assert_eq!(load(&path("link")).unwrap(), b"four");
        fs::write(path("file"), "fives").unwrap();
        assert!(matches!(load(&path("file")), Err(FileError::TooLong)));
        mkfifo(&path("pipe"), Mode::from_bits_truncate(0o600)).unwrap();
        drop(std::os::unix::net::UnixListener::bind(path("socket")).unwrap());
        let others = ["pipe", "socket", "."].map(path);
        for other in
            others.iter().map(|path| &**path).chain(["/dev/zero", "/dev/null"].map(Path::new))
        {
            assert!(matches!(load(other), Err(FileError::NotAFile)), "{}", other.display());
        }
        assert!(matches!(load(&path("none")), Err(FileError::Io(_))));
        let refused = read(&path("file"), 9, |_| Err(io::Error::other("no")));
        assert!(matches!(refused, Err(FileError::Io(_))));
    }
}
