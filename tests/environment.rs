//! What a worker is given: its name, its port, its socket, and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod common;

use std::{fs, path::Path};

use common::{Daemon, Mark, Ports, client::get, command};

#[test]
fn a_worker_gets_its_name_its_port_and_nothing_it_should_not() {
    let ports = Ports::take(2);
    let folder = tempfile::tempdir().unwrap();
    let there = folder.path().join("there");
    fs::create_dir(&there).unwrap();
    let keys = format!(
        "{}\nenv = {{ GREETING = \"hello world\" }}\numask = \"027\"\ndirectory = \"there\"",
        command(&["http", "{service}-{slot}-{port}", "{other}"])
    );
    let daemon = Daemon::start_in(folder, &ports.service(&keys));
    daemon.wait_healthy(Mark::START, 2);
    for slot in 0..2 {
        let worker = ([127, 0, 0, 1], ports.worker(slot)).into();
        let port = ports.worker(slot);
        assert_eq!(get(worker, "/argv"), format!("http\nweb-{slot}-{port}\n{{other}}"));
        let environment = get(worker, "/env");
        for line in [
            format!("PORT={port}"),
            "LBD_SERVICE=web".to_owned(),
            format!("LBD_SLOT={slot}"),
            "GREETING=hello world".to_owned(),
        ] {
            assert!(environment.lines().any(|found| found == line), "{line} in {environment}");
        }
        assert!(!environment.contains("LISTEN_"), "{environment}");
        assert_eq!(Path::new(&get(worker, "/directory")), there);
        assert_eq!(get(worker, "/umask"), "027");
        // Its own session.
        assert_eq!(get(worker, "/session"), daemon.worker_pid(port).to_string());
        let descriptors = get(worker, "/descriptors");
        let descriptors: Vec<_> = descriptors.lines().collect();
        assert_eq!(descriptors.len(), 3, "{descriptors:?}");
        assert_eq!(descriptors[0], "0 /dev/null");
        assert!(descriptors[1].starts_with("1 pipe:") && descriptors[2].starts_with("2 pipe:"));
    }
}

#[test]
fn the_working_folder_is_the_config_files() {
    let ports = Ports::take(1);
    let daemon = Daemon::healthy(&ports.service(&command(&["http"])), 1);
    assert_eq!(Path::new(&get(ports.address(), "/directory")), daemon.folder.path());
}

#[test]
fn an_inherited_socket_comes_as_systemd_passes_it() {
    let ports = Ports::take(1);
    let keys = format!("{}\nsocket = \"inherit\"", command(&["http"]));
    let daemon = Daemon::healthy(&ports.service(&keys), 1);
    let pid = daemon.worker_pid(ports.worker(0));
    let environment = get(ports.address(), "/env");
    for line in [
        "LISTEN_FDS=1".to_owned(),
        format!("LISTEN_PID={pid}"),
        "LISTEN_FDNAMES=web".to_owned(),
        format!("PORT={}", ports.worker(0)),
    ] {
        assert!(environment.lines().any(|found| found == line), "{line} in {environment}");
    }
    let descriptors = get(ports.address(), "/descriptors");
    let descriptors: Vec<_> = descriptors.lines().collect();
    assert_eq!(descriptors.len(), 4, "{descriptors:?}");
    assert!(descriptors[3].starts_with("3 socket:"), "{descriptors:?}");
    // Blocking, as systemd passes it: the fixture's accept would fail otherwise.
    let flags = fs::read_to_string(format!("/proc/{pid}/fdinfo/3")).unwrap();
    let flags = flags.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
    let flags = i32::from_str_radix(flags, 8).unwrap();
    assert_eq!(flags & nix::libc::O_NONBLOCK, 0);
}
