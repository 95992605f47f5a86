//! What a worker is given: its name, its port, its socket, and nothing else.

use std::{fs, os::unix::fs::symlink, path::Path};

use crate::common::{Daemon, Mark, Ports, client::get, command, named};

#[test]
fn an_argument_may_be_empty() {
    let ports = Ports::take(1);
    let config = ports.service(&command(&["http", "--save", "", "end"]));
    let _daemon = Daemon::healthy(&config, 1);
    assert_eq!(get(ports.address(), "/argv"), "http\n--save\n\nend");
}

#[test]
fn a_folder_that_is_not_there_is_that_services_backoff_and_looked_for_again() {
    let (web, other) = (Ports::take(1), Ports::take(1));
    let keys = "directory = \"current/app\"\nrestart.max-delay = \"200ms\"";
    let keys = format!("{}\n{keys}", command(&["http"]));
    let config =
        format!("{}{}", web.service(&keys), named("other", &other.service(&command(&["http"]))));
    let daemon = Daemon::start(&config);
    daemon.wait(Mark::START, "worker healthy", &[("service", "other")]);
    let line = daemon.wait(Mark::START, "worker not started", &[("service", "web")]);
    assert!(line.get("error").unwrap().contains("current/app"), "{}", line.raw);
    // Released: a folder, and a link that is moved later.
    for release in ["one", "two"] {
        fs::create_dir_all(daemon.path(&format!("{release}/app"))).unwrap();
    }
    symlink("one", daemon.path("current")).unwrap();
    daemon.wait(Mark::START, "worker healthy", &[("service", "web")]);
    let folder = daemon.folder.path().canonicalize().unwrap();
    assert_eq!(Path::new(&get(web.address(), "/directory")), folder.join("one/app"));
    symlink("two", daemon.path("next")).unwrap();
    fs::rename(daemon.path("next"), daemon.path("current")).unwrap();
    fs::remove_dir_all(daemon.path("one")).unwrap();
    assert_eq!(daemon.lbd(&["restart", "web"]).status.code(), Some(0));
    assert_eq!(Path::new(&get(web.address(), "/directory")), folder.join("two/app"));
}

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
