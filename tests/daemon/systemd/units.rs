//! What systemd makes of the units in `systemd/`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::common::needs::{SYSTEMD, missing};
use tempfile::TempDir;

/// The units, in a folder of their own, with the binary under test for `lbd`.
fn units(drop_ins: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["lbd.service", "lbd.socket"] {
        let unit = fs::read_to_string(source().join(name)).unwrap();
        let start = format!("ExecStart={} ", env!("CARGO_BIN_EXE_lbd"));
        let changed = unit.replace("ExecStart=lbd ", &start);
        assert_eq!(changed != unit, name == "lbd.service");
        fs::write(folder.path().join(name), changed).unwrap();
    }
    let folder_of_drop_ins = folder.path().join("lbd.service.d");
    fs::create_dir(&folder_of_drop_ins).unwrap();
    for name in drop_ins {
        let file = source().join("lbd.service.d").join(name);
        fs::copy(file, folder_of_drop_ins.join(name)).unwrap();
    }
    folder
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd")
}

/// `None` where there is no systemd-analyze.
fn analyze(folder: &Path, arguments: &[&str]) -> Option<Output> {
    let output = Command::new("systemd-analyze").args(arguments).current_dir(folder).output();
    match output {
        Ok(output) => Some(output),
        Err(error) => {
            missing(
                SYSTEMD,
                format_args!("systemd-analyze (Debian: systemd) does not run: {error}"),
            );
            None
        }
    }
}

#[test]
fn the_units_are_without_fault() {
    for drop_ins in [&[][..], &["hardening.conf"], &["per-worker-user.conf"]] {
        let folder = units(drop_ins);
        // The pages that they name are not installed here.
        let arguments = ["verify", "--man=no", "./lbd.service", "./lbd.socket"];
        let Some(output) = analyze(folder.path(), &arguments) else { return };
        let said = String::from_utf8(output.stderr).unwrap();
        // What systemd before 253 has to say about the second Type=.
        let fine =
            |line: &str| line.ends_with("Failed to parse service type, ignoring: notify-reload");
        let faults: Vec<_> = said.lines().filter(|line| !fine(line)).collect();
        assert!(faults.is_empty() && output.status.success(), "{drop_ins:?}: {faults:#?}");
    }
}

#[test]
fn the_service_is_exposed_to_little() {
    let mut levels = Vec::new();
    // Root is what per-worker users cost.
    for drop_ins in [&[][..], &["hardening.conf"], &["per-worker-user.conf"]] {
        let folder = units(drop_ins);
        // In tenths.
        let arguments =
            ["security", "--offline=true", "--no-pager", "--threshold=30", "./lbd.service"];
        let Some(output) = analyze(folder.path(), &arguments) else { return };
        let said = String::from_utf8(output.stdout).unwrap();
        let level = said.lines().find(|line| line.contains("Overall exposure level")).unwrap();
        assert!(output.status.success(), "{drop_ins:?}: {level}");
        eprintln!("{drop_ins:?}: {level}");
        let (_, level) = level.split_once("lbd.service: ").unwrap();
        levels.push(level.split(' ').next().unwrap().parse::<f64>().unwrap());
    }
    assert!(levels[1] < levels[0], "hardening.conf hardens nothing: {levels:?}");
}

#[test]
fn the_runtime_folder_is_lbds_alone_and_it_has_no_more_rights_than_it_needs() {
    let unit = fs::read_to_string(source().join("lbd.service")).unwrap();
    let lines = |key: &str| -> Vec<&str> {
        unit.lines().filter_map(|line| line.strip_prefix(key)).collect()
    };
    assert_eq!(lines("RuntimeDirectoryMode="), ["0700"]);
    let families = "AF_UNIX AF_INET AF_INET6 AF_NETLINK";
    assert_eq!(lines("RestrictAddressFamilies="), [families]);
    assert_eq!(lines("CapabilityBoundingSet="), ["CAP_NET_BIND_SERVICE CAP_BPF"]);
    let root = fs::read_to_string(source().join("lbd.service.d/per-worker-user.conf")).unwrap();
    let capabilities = "CapabilityBoundingSet=CAP_SETUID CAP_SETGID CAP_KILL";
    assert!(root.lines().any(|line| line == capabilities), "{root}");
}
