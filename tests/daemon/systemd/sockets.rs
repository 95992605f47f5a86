//! Listening sockets that the service manager made: taken over by address or name, left as they
//! were, and so a restart that refuses nobody.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    process::Command,
    time::Duration,
};

use crate::common::{
    self, Daemon, Mark, Ports,
    client::{KeepAlive, Load, connect, get},
    command, eventually,
    manager::{folder_with, pass},
    named, needs,
};
use nix::sys::signal::Signal::{SIGHUP, SIGKILL, SIGTERM};
use socket2::{Domain, SockRef, Socket, Type};

fn copy(socket: &TcpListener) -> OwnedFd {
    socket.try_clone().unwrap().into()
}

fn start(config: &str, sockets: Vec<(OwnedFd, &str)>) -> Daemon {
    pass(folder_with(config), sockets)
}

/// That a client which connects now is served.
fn is_served(address: SocketAddr) {
    let mut client = KeepAlive::over(connect(address));
    assert_eq!(client.get("/").unwrap().0, 200);
}

#[test]
fn a_restart_refuses_nobody() {
    let ports = Ports::take(2);
    let listener = TcpListener::bind(ports.address()).unwrap();
    let config = ports.service(&command(&["http"]));
    let mut daemon = start(&config, vec![(copy(&listener), "lbd.socket")]);
    daemon.wait_healthy(Mark::START, 2);
    let line = daemon.wait(Mark::START, "listening", &[("socket", "lbd.socket")]);
    assert_eq!(line.get("address"), Some(&*ports.address().to_string()));
    let load = Load::start(ports.address(), "/");
    for _ in 0..5 {
        load.more(20);
        daemon.signal(SIGTERM);
        daemon.wait_stopped();
        daemon = start(&config, vec![(copy(&listener), "lbd.socket")]);
        daemon.wait(Mark::START, "listening", &[("socket", "lbd.socket")]);
    }
    load.more(20);
    // And killed: what was in its hands is lost, and nobody is refused, which would end the load.
    daemon.signal(SIGKILL);
    daemon.wait_exit();
    let waits = TcpStream::connect(ports.address()).unwrap();
    let daemon = start(&config, vec![(copy(&listener), "lbd.socket")]);
    assert_eq!(KeepAlive::over(waits).get("/").unwrap().0, 200);
    let failures = load.end();
    assert!(failures.len() <= Load::CLIENTS, "{failures:#?}");
    drop(daemon);
}

#[test]
fn who_waits_at_the_end_is_left_to_the_next_one() {
    let ports = Ports::take(1);
    let listener = TcpListener::bind(ports.address()).unwrap();
    let config = ports.service(&command(&["http"]));
    let mut daemon = start(&config, vec![(copy(&listener), "web")]);
    daemon.wait_healthy(Mark::START, 1);
    // Its end takes until this one has been answered.
    let mut held = KeepAlive::new(ports.address());
    held.get("/").unwrap();
    let since = daemon.now();
    daemon.signal(SIGTERM);
    daemon.wait(since, "draining", &[]);
    let mut late: Vec<_> = (0..20).map(|_| KeepAlive::new(ports.address())).collect();
    for client in &mut late {
        client.send("/").unwrap();
    }
    drop(held);
    daemon.wait_stopped();
    assert!(!SockRef::from(&listener).nonblocking().unwrap(), "it is left as it came");
    let daemon = start(&config, vec![(copy(&listener), "web")]);
    for mut client in late {
        assert_eq!(client.answer().unwrap().0, 200);
    }
    drop(daemon);
}

#[test]
fn the_kernel_steers_on_a_passed_socket_which_is_then_left_as_it_was() {
    let ports = Ports::take(2);
    let listener = TcpListener::bind(ports.address()).unwrap();
    let config = ports.service(&format!("{}\nroute = \"direct\"", command(&["http"])));
    let next = || {
        let daemon = start(&config, vec![(copy(&listener), "lbd.socket")]);
        daemon.wait_healthy(Mark::START, 2);
        daemon.wait(Mark::START, "steering", &[]);
        daemon
    };
    let mut daemon = next();
    let load = Load::start(ports.address(), "/");
    for _ in 0..5 {
        load.more(20);
        daemon.signal(SIGTERM);
        daemon.wait_stopped();
        assert!(!SockRef::from(&listener).reuse_port().unwrap(), "others could join it");
        daemon = next();
    }
    load.more(20);
    load.end_without_failure();

    // Killed, it puts nothing back, and takes its workers with it: who comes now waits for the next.
    let load = Load::start(ports.address(), "/");
    daemon.signal(SIGKILL);
    daemon.wait_exit();
    eventually("its workers are gone", || daemon.processes().is_empty());
    let mut waits = KeepAlive::new(ports.address());
    waits.send("/").unwrap();
    let mut daemon = next();
    assert_eq!(waits.answer().unwrap().0, 200);
    drop(waits);
    let failures = load.end();
    assert!(failures.len() <= Load::CLIENTS, "{failures:#?}");

    // Its end takes until this one has been answered. Whoever comes meanwhile is not put off to the
    // second of a new SYN.
    let mut held = KeepAlive::new(ports.address());
    held.get("/").unwrap();
    eventually("it is counted", || {
        daemon.workers("web").iter().any(|worker| worker["connections"]["active"] == 1)
    });
    let since = daemon.now();
    daemon.signal(SIGTERM);
    daemon.wait(since, "draining", &[]);
    TcpStream::connect_timeout(&ports.address(), Duration::from_millis(900)).unwrap();
    drop(held);
    daemon.wait_stopped();
    assert!(!SockRef::from(&listener).reuse_port().unwrap());
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_ok(), "it waits in the socket that was passed");
}

#[test]
fn a_reload_that_brings_an_address_back_finds_its_socket() {
    let (web, api) = (Ports::take(1), Ports::take(1));
    let listener = TcpListener::bind(api.address()).unwrap();
    let without = web.service(&command(&["http"]));
    let with = without.clone() + &named("api", &api.service(&command(&["http"])));
    let daemon = start(&with, vec![(copy(&listener), "lbd.socket")]);
    daemon.wait_healthy(Mark::START, 2);
    for _ in 0..3 {
        let since = daemon.now();
        daemon.must_reload(&without);
        let line = daemon.wait(since, "a passed socket is not used any more", &[]);
        assert_eq!(line.get("address"), Some(&*api.address().to_string()));
        // The workers went when its listener was let go.
        daemon.wait(since, "worker exited", &[("service", "api")]);
        // Nobody is refused: they wait.
        let mut waits = KeepAlive::new(api.address());
        waits.send("/").unwrap();
        waits.stream().set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert!(waits.stream().read(&mut [0]).is_err());
        daemon.must_reload(&with);
        waits.stream().set_read_timeout(Some(common::PATIENCE)).unwrap();
        assert_eq!(waits.answer().unwrap().0, 200);
    }
    // Its filter would show here, if it had got one.
    is_served(api.address());
}

#[test]
fn an_address_moves_to_another_service_with_its_socket() {
    let ports = Ports::take(1);
    let listener = TcpListener::bind(ports.address()).unwrap();
    let config = ports.service(&command(&["http"]));
    let daemon = start(&config, vec![(copy(&listener), "lbd.socket")]);
    daemon.wait_healthy(Mark::START, 1);
    is_served(ports.address());
    let since = daemon.now();
    daemon.must_reload(&named("other", &config));
    is_served(ports.address());
    let moved = [("service", "other"), ("socket", "lbd.socket")];
    daemon.wait(since, "listening", &moved);
}

#[test]
fn what_was_not_passed_is_bound_and_what_is_not_wanted_is_named_and_closed() {
    let (web, api, other) = (Ports::take(1), Ports::take(1), Ports::take(1));
    let wanted = TcpListener::bind(web.address()).unwrap();
    let unwanted = TcpListener::bind(other.address()).unwrap();
    let config =
        web.service(&command(&["http"])) + &named("api", &api.service(&command(&["http"])));
    let sockets = vec![(unwanted.into(), "stray"), (copy(&wanted), "lbd.socket")];
    let daemon = start(&config, sockets);
    let line = daemon.wait(Mark::START, "a passed socket is of no use, closed", &[]);
    assert_eq!(line.level, "WARN");
    assert_eq!(line.get("name"), Some("stray"));
    assert_eq!(line.get("address"), Some(&*other.address().to_string()));
    daemon.wait_healthy(Mark::START, 2);
    is_served(web.address());
    is_served(api.address());
    // Ours was moved to it, and it has closed it.
    eventually("it is closed", || TcpStream::connect(other.address()).is_err());
}

#[test]
fn what_is_no_listening_stream_socket_is_named_and_the_address_bound() {
    let ports = Ports::take(1);
    let datagrams = UdpSocket::bind(ports.address()).unwrap();
    let elsewhere = TcpListener::bind("127.0.0.1:0").unwrap();
    let connection = TcpStream::connect(elsewhere.local_addr().unwrap()).unwrap();
    let config = ports.service(&command(&["http"]));
    let daemon = start(&config, vec![(datagrams.into(), "udp"), (connection.into(), "connection")]);
    let why = |name| {
        let line =
            daemon.wait(Mark::START, "a passed socket is of no use, closed", &[("name", name)]);
        line.get("why").unwrap().to_owned()
    };
    assert_eq!(why("udp"), "it is no stream socket: write ListenStream=");
    assert_eq!(why("connection"), "it does not listen: write Accept=no");
    daemon.wait_healthy(Mark::START, 1);
    is_served(ports.address());
}

#[test]
fn a_socket_of_the_services_name_stands_for_an_address_that_it_is_not_bound_to() {
    let ports = Ports::take(1);
    let port = ports.address().port();
    // What ListenStream=PORT makes: IPv6 and IPv4 in one.
    let both = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
    both.set_only_v6(false).unwrap();
    both.set_reuse_address(true).unwrap();
    both.bind(&format!("[::]:{port}").parse::<SocketAddr>().unwrap().into()).unwrap();
    both.listen(100).unwrap();
    let config = format!(
        "[service.web]\nlisten = \"0.0.0.0:{port}\"\nports = [{}]\n{}",
        ports.worker(0),
        command(&["http"])
    );
    let fd = || OwnedFd::from(both.try_clone().unwrap());
    let daemon = start(&config, vec![(fd(), "web")]);
    daemon.wait(Mark::START, "a passed socket is used for its name", &[("service", "web")]);
    daemon.wait_healthy(Mark::START, 1);
    is_served(ports.address());
    drop(daemon);

    // Without it, the address can't be had, and the reason is not far to seek.
    let mut daemon = start(&config, vec![(fd(), "lbd.socket")]);
    assert_eq!(daemon.wait_exit().code(), Some(1));
    let text = daemon.log.text();
    assert!(
        text.contains(&format!("can't listen on 0.0.0.0:{port}: Address already in use")),
        "{text}"
    );
}

#[test]
fn an_address_that_a_passed_socket_overlaps_is_refused_with_the_way_out() {
    let ports = Ports::take(1);
    let listener = TcpListener::bind(ports.address()).unwrap();
    let config = ports.service(&command(&["http"]));
    let daemon = start(&config, vec![(copy(&listener), "lbd.socket")]);
    daemon.wait_healthy(Mark::START, 1);
    let wider = config.replace("127.0.0.1:", "0.0.0.0:");
    let line = daemon.reload(&wider);
    assert_eq!(line.message, "reload refused");
    let error = line.get("error").unwrap();
    let hint =
        format!("passed as \"lbd.socket\" is bound to {}: change the socket unit", ports.address());
    assert!(error.contains(&hint), "{error}");
    is_served(ports.address());
}

#[test]
fn a_unix_socket_is_served_and_neither_shut_down_nor_unlinked() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let config = format!(
        "[service.web]\nlisten = \"unix:{}\"\nports = [{}]\n{}",
        path.display(),
        ports.worker(0),
        command(&["http"])
    );
    let ask = || {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
        client
    };
    for _ in 0..2 {
        let mut daemon = start(&config, vec![(listener.try_clone().unwrap().into(), "x")]);
        daemon.wait_healthy(Mark::START, 1);
        let mut first = [0; 12];
        ask().read_exact(&mut first).unwrap();
        assert_eq!(&first, b"HTTP/1.1 200");
        daemon.signal(SIGTERM);
        daemon.wait_stopped();
        assert!(path.exists());
        // Who comes now waits for the next one.
        ask().shutdown(Shutdown::Write).unwrap();
    }
}

#[test]
fn the_workers_get_none_of_it() {
    let ports = Ports::take(1);
    let listener = TcpListener::bind(ports.address()).unwrap();
    let config = ports.service(&command(&["http"]));
    let daemon = start(&config, vec![(copy(&listener), "lbd.socket")]);
    daemon.wait_healthy(Mark::START, 1);
    let environment = get(ports.address(), "/env");
    assert!(!environment.contains("LISTEN_"), "{environment}");
    let descriptors = get(ports.address(), "/descriptors");
    let inode = fs::read_link(format!("/proc/self/fd/{}", {
        use std::os::fd::AsRawFd;
        listener.as_raw_fd()
    }))
    .unwrap();
    assert!(!descriptors.contains(inode.to_str().unwrap()), "{descriptors}");
    // Its guard neither.
    for pid in daemon.processes() {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let has = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()).any(|at| at == inode);
        assert_eq!(has, pid == daemon.pid(), "process {pid}");
    }
}

#[test]
fn sockets_for_another_process_are_not_touched() {
    let ports = Ports::take(1);
    let mut command_line = Command::new(env!("CARGO_BIN_EXE_lbd"));
    command_line.args(["--config", "lb.toml"]).env("LISTEN_FDS", "5").env("LISTEN_PID", "1");
    let folder = folder_with(&ports.service(&command(&["http"])));
    let daemon = Daemon::run(folder, command_line);
    daemon.wait_healthy(Mark::START, 1);
    is_served(ports.address());
    assert!(daemon.said(Mark::START, "a passed socket is of no use, closed").is_empty());
}

#[test]
fn a_wrong_number_of_sockets_is_told_and_the_addresses_are_bound() {
    let ports = Ports::take(1);
    let config = ports.service(&command(&["http"]));
    let script = r#"LISTEN_FDS=3 LISTEN_PID=$$ exec "$0" "$@" 3</dev/null"#;
    let mut command_line = Command::new("sh");
    command_line.args(["-c", script, env!("CARGO_BIN_EXE_lbd"), "--config", "lb.toml"]);
    let daemon = Daemon::run(folder_with(&config), command_line);
    let line =
        daemon.wait(Mark::START, "cannot take over the sockets that LISTEN_FDS tells of", &[]);
    assert!(line.get("error").is_some(), "{}", line.raw);
    daemon.wait_healthy(Mark::START, 1);
    is_served(ports.address());
}

/// As systemd itself does it, descriptors, names and all.
#[test]
fn systemd_socket_activate_starts_it_with_the_first_client() {
    let found = Command::new("systemd-socket-activate").arg("--version").output();
    if !found.is_ok_and(|output| output.status.success()) {
        needs::missing(needs::SYSTEMD, "systemd-socket-activate (Debian: systemd) does not run");
        return;
    }
    let ports = Ports::take(2);
    let address = ports.address().to_string();
    let mut command_line = Command::new("systemd-socket-activate");
    command_line.args(["--listen", &address, "--fdname=web"]);
    command_line.args([env!("CARGO_BIN_EXE_lbd"), "--config", "lb.toml"]);
    let daemon = Daemon::run(folder_with(&ports.service(&command(&["http"]))), command_line);
    let mut first = None;
    eventually("it listens", || {
        first = TcpStream::connect(ports.address()).ok();
        first.is_some()
    });
    assert_eq!(KeepAlive::over(first.unwrap()).get("/").unwrap().0, 200);
    daemon.wait(Mark::START, "listening", &[("address", &address), ("socket", "web")]);
    is_served(ports.address());
    daemon.signal(SIGHUP);
    daemon.wait(Mark::START, "reloaded", &[]);
    is_served(ports.address());
}
