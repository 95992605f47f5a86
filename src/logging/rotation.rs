//! Time-based rotation: each hour or day has its own file, named after it: `lbd.log.2026-11-25`, in
//! UTC.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// How often a new file is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Period {
    Hour,
    Day,
}

impl Period {
    /// The number of the period that contains `now`. All times before 1970 are in the first one.
    pub(super) fn of(self, now: SystemTime) -> u64 {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        since.as_secs() / self.seconds()
    }

    /// The file of the period with this number.
    pub(super) fn file(self, path: &Path, period: u64) -> PathBuf {
        let begin = UNIX_EPOCH + Duration::from_secs(period * self.seconds());
        // 2026-11-25T13:00:00Z
        let time = humantime::format_rfc3339_seconds(begin).to_string();
        let mut name = path.as_os_str().to_owned();
        name.push(".");
        name.push(&time[..10]);
        if self == Self::Hour {
            name.push("-");
            name.push(&time[11..13]);
        }
        name.into()
    }

    fn seconds(self) -> u64 {
        match self {
            Self::Hour => 3600,
            Self::Day => 24 * 3600,
        }
    }
}

/// Removes the oldest rotated files of `path`, until `keep` are left. Never removes `current`, nor
/// any other file in the folder.
pub(super) fn prune(path: &Path, keep: usize, current: &Path) -> io::Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let mut old = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // A link is not followed.
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        let is_current = current.file_name() == Some(&entry.file_name());
        if is_file && !is_current && is_rotated(name, &entry.file_name()) {
            old.push(entry.file_name());
        }
    }
    // Sorts by date.
    old.sort_unstable();
    let surplus = (old.len() + 1).saturating_sub(keep.max(1));
    for name in &old[..surplus.min(old.len())] {
        match fs::remove_file(folder.join(name)) {
            // Another program removed it first.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed?,
        }
    }
    Ok(())
}

/// Whether rotation would give a file of `base` this name: `BASE.YYYY-MM-DD` or
/// `BASE.YYYY-MM-DD-HH`.
fn is_rotated(base: &OsStr, name: &OsStr) -> bool {
    let date = name.as_bytes().strip_prefix(base.as_bytes());
    let Some(date) = date.and_then(|rest| rest.strip_prefix(b".")) else { return false };
    let shape = b"dddd-dd-dd-dd";
    let fits = |(byte, wanted): (&u8, &u8)| match wanted {
        b'd' => byte.is_ascii_digit(),
        _ => byte == wanted,
    };
    if !matches!(date.len(), 10 | 13) || !date.iter().zip(shape).all(fits) {
        return false;
    }
    let number = |at: usize| (date[at] - b'0') * 10 + (date[at + 1] - b'0');
    (1..=12).contains(&number(5))
        && (1..=31).contains(&number(8))
        && (date.len() == 10 || number(11) < 24)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_is_named_after_its_hour_or_day() {
        let now = humantime::parse_rfc3339("2026-11-25T13:59:59Z").unwrap();
        let path = Path::new("/var/log/lbd.log");
        let name = |period: Period, now| period.file(path, period.of(now));
        assert_eq!(name(Period::Day, now), Path::new("/var/log/lbd.log.2026-11-25"));
        assert_eq!(name(Period::Hour, now), Path::new("/var/log/lbd.log.2026-11-25-13"));
        let next = now + Duration::from_secs(1);
        assert_eq!(name(Period::Hour, next), Path::new("/var/log/lbd.log.2026-11-25-14"));
        assert_eq!(Period::Day.of(now), Period::Day.of(next));
        assert_ne!(Period::Hour.of(now), Period::Hour.of(next));
        assert_eq!(Period::Day.of(UNIX_EPOCH - Duration::from_secs(1)), 0);
    }

    #[test]
    fn only_what_rotation_has_made_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lbd.log");
        let others = [
            "lbd.log",
            "lbd.log.important",
            "lbd.logbook.txt",
            "lbd.log.2026-01-01.gz",
            "lbd.log.2026-01-01-",
            "lbd.log.2026-01-01-24",
            "lbd.log.2026-13-01",
            "lbd.log.2026-00-10",
            "lbd.log.2026-01-32",
            "lbd.log.20260101",
            "lbd.log.2026-1-1",
            "lbd.log.2026-01-0x",
            "lbd.log-2026-01-01",
            "xlbd.log.2026-01-01",
            "lbd.log.2026-01-011",
        ];
        let rotated = [
            "lbd.log.2025-12-31",
            "lbd.log.2026-01-01",
            "lbd.log.2026-01-01-23",
            "lbd.log.2026-01-02",
        ];
        for name in others.iter().chain(&rotated) {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        fs::create_dir(folder.path().join("lbd.log.2024-01-01")).unwrap();
        symlink("lbd.log", folder.path().join("lbd.log.2024-01-02")).unwrap();
        let left = || -> Vec<_> {
            rotated.iter().filter(|name| folder.path().join(name).exists()).copied().collect()
        };
        let current = folder.path().join("lbd.log.2026-01-02");
        prune(&path, 9, &current).unwrap();
        assert_eq!(left(), rotated);
        prune(&path, 3, &current).unwrap();
        assert_eq!(left(), rotated[1..]);
        // A clock that went back leaves the current one with an old name.
        prune(&path, 1, &folder.path().join("lbd.log.2026-01-01")).unwrap();
        assert_eq!(left(), ["lbd.log.2026-01-01"]);
        assert!(others.iter().all(|name| folder.path().join(name).exists()));
        assert!(folder.path().join("lbd.log.2024-01-01").exists());
        assert!(folder.path().join("lbd.log.2024-01-02").is_symlink());
    }
}
