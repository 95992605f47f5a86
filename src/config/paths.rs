//! Absolute paths as users write them: symbolic links stay unresolved, because a link such as
//! `current` leads somewhere else after the next release.

use std::{
    env, fs, io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

const NO_FOLDER: &str =
    "the current folder is gone; go to one that is there, or write the whole path of the file";

/// The current folder under the name that the user calls it: `$PWD` if that is correct (POSIX, `pwd
/// -L`), else the kernel's name for it, which has no links.
///
/// # Errors
///
/// If neither is known because the folder has been deleted.
pub fn current_folder() -> io::Result<PathBuf> {
    match shells_folder() {
        Some(pwd) if is_here(&pwd) => Ok(pwd),
        _ => env::current_dir(),
    }
}

/// The shell's idea of the current folder, even if it is no longer correct: the folder may have
/// been replaced since, and the user means the new one.
#[must_use]
pub fn shells_folder() -> Option<PathBuf> {
    let pwd = PathBuf::from(env::var_os("PWD")?);
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    let is_plain = pwd.is_absolute() && pwd.components().all(plain);
    // Components don't show a dot between two slashes.
    let has_dots = pwd.to_string_lossy().split('/').any(|part| part == ".");
    (is_plain && !has_dots).then_some(pwd)
}

fn is_here(folder: &Path) -> bool {
    let inode = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    matches!((inode(folder), inode(Path::new("."))), (Ok(there), Ok(here)) if there == here)
}

/// Makes `path` absolute, relative to [`current_folder`]. Does not follow links.
///
/// # Errors
///
/// If the path is empty, or relative and the current folder is gone.
pub fn logical(path: &Path) -> io::Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is empty; write one"));
    }
    match path.is_absolute() {
        true => Ok(tidy(path)),
        false => {
            let gone = |error: io::Error| io::Error::new(error.kind(), NO_FOLDER);
            Ok(tidy(&current_folder().map_err(gone)?.join(path)))
        }
    }
}

/// Removes `.`, doubled slashes and a trailing slash, so that equal paths look equal.
pub(super) fn tidy(path: &Path) -> PathBuf {
    path.components().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_made_absolute_and_no_link_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/nowhere", folder.path().join("link")).unwrap();
        let link = folder.path().join("link/./a//lb.toml");
        assert_eq!(logical(&link).unwrap(), folder.path().join("link/a/lb.toml"));
        assert_eq!(logical(Path::new("/a/../b/")).unwrap(), Path::new("/a/../b"));
        assert!(logical(Path::new("")).is_err());
        assert_eq!(logical(Path::new("./x")).unwrap(), current_folder().unwrap().join("x"));
        assert!(is_here(Path::new(".")) && !is_here(folder.path()));
    }
}
