//! Where to look for a program that is named without a folder.

use std::ffi::OsStr;

/// The `PATH` for a worker that has none (the default of execvp(3)).
pub const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// How many characters of a `PATH` to show. Most systems' `PATH` is shown in full; a shell's, to
/// which tools have added, would fill the line.
const SHOWN: usize = 64;

/// `path` as a message shows it: its first folders, and how many more there are.
#[must_use]
pub fn shown_path(path: &OsStr) -> String {
    let path = path.to_string_lossy();
    let folders: Vec<&str> = path.split(':').collect();
    // The first folder is always shown, however long it is.
    let mut shown = folders[..1].join(":");
    let mut count = 1;
    for folder in &folders[1..] {
        let longer = format!("{shown}:{folder}");
        if longer.chars().count() > SHOWN {
            break;
        }
        (shown, count) = (longer, count + 1);
    }
    match folders.len() - count {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_path_is_shown_by_its_first_folders() {
        let shown = |path: &str| shown_path(OsStr::new(path));
        let usual = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        assert_eq!(shown(usual), usual);
        assert_eq!(shown(&format!("{usual}:/snap/bin:/opt/x")), format!("{usual} and 2 more"));
        let long = "/x".repeat(60);
        assert_eq!(shown(&format!("{long}:/bin")), format!("{long} and 1 more"));
        assert_eq!((shown(""), shown(":/bin")), (String::new(), ":/bin".to_owned()));
    }
}
