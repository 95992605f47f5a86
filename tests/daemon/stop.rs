//! How it ends: gracefully, at once, and never with anything left running.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read},
    net::{TcpListener, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    self, Daemon, Mark, Ports,
    client::{KeepAlive, Load, connect},
    command, eventually, stays, www,
};
use nix::sys::signal::Signal::{self, SIGALRM, SIGINT, SIGQUIT, SIGTERM};

/// More than all the buffers on the way hold.
const LARGE: usize = 48 * 1024 * 1024;

/// A signal that comes this long after another one is not the same wish.
const LATER: Duration = Duration::from_millis(300);

/// Nobody holds any of these any more.
fn assert_free(ports: &Ports) {
    TcpListener::bind(ports.address()).unwrap();
    for port in ports.all() {
        TcpListener::bind(("127.0.0.1", port)).unwrap();
    }
}

/// `root` in the folder, with the file `large`.
fn large_root() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("root")).unwrap();
    File::create(folder.path().join("root/large")).unwrap().set_len(LARGE as u64).unwrap();
    folder
}

/// Stops with `signal` while browsers keep idle connections to built-in workers.
fn an_idle_browser_does_not_hold_it_up(signal: Signal) {
    let ports = Ports::take(4);
    let mut daemon = Daemon::healthy(&ports.service(&format!("root = {:?}", www())), 4);
    let mut browsers: Vec<_> = (0..6).map(|_| KeepAlive::new(ports.address())).collect();
    for browser in &mut browsers {
        assert_eq!(browser.get("/page.html").unwrap().0, 200);
    }
    let begun = Instant::now();
    daemon.signal(signal);
    // An orderly end, no reset; and then the browser closes its side as well.
    for mut browser in browsers {
        assert_eq!(browser.rest().unwrap(), b"");
    }
    daemon.wait_stopped();
    // About a second; not the drain-timeout of thirty.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_free(&ports);
}

#[test]
fn an_idle_browser_does_not_hold_up_sigterm() {
    an_idle_browser_does_not_hold_it_up(SIGTERM);
}

#[test]
fn an_idle_browser_does_not_hold_up_ctrl_c() {
    an_idle_browser_does_not_hold_it_up(SIGINT);
}

#[test]
fn an_idle_client_that_notices_nothing_does_not_hold_it_up() {
    let ports = Ports::take(2);
    let mut daemon = Daemon::healthy(&ports.service(&format!("root = {:?}", www())), 2);
    // A client's pool of connections: nobody looks at one until it is to be used again.
    let mut pooled = KeepAlive::new(ports.address());
    assert_eq!(pooled.get("/page.html").unwrap().0, 200);
    let begun = Instant::now();
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(pooled.rest().unwrap(), b"");
}

#[test]
fn a_download_finishes_whole() {
    let ports = Ports::take(2);
    let mut daemon = Daemon::start_in(large_root(), &ports.service("root = \"root\""));
    daemon.wait_healthy(Mark::START, 2);
    let mut download = KeepAlive::new(ports.address());
    download.send("/large").unwrap();
    assert_eq!(download.head().unwrap(), (200, LARGE));
    daemon.signal(SIGTERM);
    let line = daemon.wait(Mark::START, "draining", &[("service", "web")]);
    assert_eq!(line.get("connections"), Some("1"));
    assert!(line.get("hint").unwrap().contains("second"), "{}", line.raw);
    // No new connections while it goes on.
    eventually("nobody listens", || TcpStream::connect(ports.address()).is_err());
    assert_eq!(download.rest().unwrap().len(), LARGE);
    drop(download);
    daemon.wait_stopped();
    assert_free(&ports);
}

#[test]
fn a_request_to_a_command_is_answered_before_its_worker_is_told() {
    let ports = Ports::take(1);
    let mut daemon = Daemon::healthy(&ports.service(&command(&["http"])), 1);
    let mut clients: Vec<_> = (0..3).map(|_| KeepAlive::new(ports.address())).collect();
    for client in &mut clients {
        client.get("/").unwrap();
    }
    let answer = daemon.path("answer");
    clients[0].send(&format!("/when{}", answer.display())).unwrap();
    daemon.signal(SIGTERM);
    let line = daemon.wait(Mark::START, "draining", &[]);
    assert_eq!(line.get("connections"), Some("3"));
    let hint = line.get("hint").unwrap();
    assert!(hint.contains("a second") && hint.contains("Ctrl-C"), "{hint}");
    assert!(daemon.said(Mark::START, "worker exited").is_empty());
    fs::write(answer, "").unwrap();
    for client in &mut clients[1..] {
        assert_eq!(client.get("/").unwrap().0, 200);
    }
    assert_eq!(clients[0].answer().unwrap().0, 200);
    drop(clients);
    daemon.wait_stopped();
    let line = daemon.wait(Mark::START, "worker exited", &[]);
    assert_eq!(line.get("status"), Some("killed by SIGTERM"));
    assert_free(&ports);
}

#[test]
fn what_waits_in_the_accept_queue_is_taken_along() {
    let ports = Ports::take(1);
    let keys = format!("max-connections = 1\n{}", command(&["http"]));
    let mut daemon = Daemon::healthy(&ports.service(&keys), 1);
    let mut first = KeepAlive::new(ports.address());
    first.get("/").unwrap();
    let mut second = KeepAlive::new(ports.address());
    second.send("/").unwrap();
    daemon.signal(SIGTERM);
    daemon.wait(Mark::START, "stopping", &[]);
    drop(first);
    assert_eq!(second.answer().unwrap().0, 200);
    drop(second);
    daemon.wait_stopped();
}

#[test]
fn a_stop_under_load_fails_no_request_that_was_taken() {
    let ports = Ports::take(2);
    let mut daemon = Daemon::healthy(&ports.service(&command(&["http"])), 2);
    let address = ports.address();
    let clients: Vec<_> = (0..Load::CLIENTS)
        .map(|_| {
            thread::spawn(move || {
                // Until nobody listens any more.
                while let Ok(stream) = TcpStream::connect(address) {
                    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
                    let (status, _) = KeepAlive::over(stream).get("/").expect("a taken request");
                    assert_eq!(status, 200);
                }
            })
        })
        .collect();
    daemon.wait_many(Mark::START, "connection", &[], 100);
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    for client in clients {
        client.join().unwrap();
    }
}

#[test]
fn the_drain_timeout_ends_what_does_not_end() {
    let ports = Ports::take(1);
    let keys = format!("{}\nstop.drain-timeout = \"300ms\"", command(&["echo"]));
    let mut daemon = Daemon::healthy(&ports.service(&keys), 1);
    let mut client = connect(ports.address());
    daemon.signal(SIGTERM);
    let line = daemon.wait(Mark::START, "draining", &[]);
    assert_eq!(line.get("up_to"), Some("0.3"));
    daemon.wait_stopped();
    assert!(!matches!(client.read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock));
}

#[test]
fn a_worker_that_ignores_the_signal_is_killed() {
    let ports = Ports::take(2);
    let keys =
        format!("{}\nstop.timeout = \"200ms\"", command(&["http", "--ignore-term", "--fork"]));
    let mut daemon = Daemon::healthy(&ports.service(&keys), 2);
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert_eq!(daemon.said(Mark::START, "worker killed").len(), 2);
    assert_free(&ports);
}

#[test]
fn the_stop_signal_is_the_one_of_the_file() {
    let ports = Ports::take(1);
    let keys = format!("{}\nstop.signal = \"INT\"", command(&["http", "--ignore-term"]));
    let mut daemon = Daemon::healthy(&ports.service(&keys), 1);
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    let line = daemon.wait(Mark::START, "worker exited", &[]);
    assert_eq!(line.get("status"), Some("killed by SIGINT"));
}

/// With a client that never leaves and a worker that ignores SIGTERM, `signals` end it at once.
fn at_once(signals: &[Signal]) {
    let ports = Ports::take(2);
    let mut daemon =
        Daemon::healthy(&ports.service(&command(&["echo", "--ignore-term", "--fork"])), 2);
    let _client = connect(ports.address());
    // lbd, and of each worker its guard, itself and what it has in the background.
    eventually("all run", || daemon.processes().len() == 7);
    let begun = Instant::now();
    for signal in signals {
        daemon.signal(*signal);
        if *signal != SIGQUIT {
            daemon.wait(Mark::START, "stopping", &[]);
            // Or it would be taken for the same wish.
            thread::sleep(LATER);
        }
    }
    daemon.wait_stopped();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_free(&ports);
}

#[test]
fn timeout_which_sends_two_signals_at_once_does_not_cut_the_stop_short() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("lb.toml"), ports.service(&command(&["http"]))).unwrap();
    // To lbd, and then to the group that both are in.
    let mut timeout = Command::new("timeout");
    timeout.args(["1000", env!("CARGO_BIN_EXE_lbd"), "--config", "lb.toml"]);
    let mut daemon = Daemon::run(folder, timeout);
    daemon.wait_healthy(Mark::START, 1);
    let mut client = KeepAlive::new(ports.address());
    client.get("/").unwrap();
    client.send(&format!("/when{}", daemon.path("answer").display())).unwrap();
    // To timeout(1), whose alarm it is: as if the time were over.
    daemon.signal(SIGALRM);
    daemon.wait(Mark::START, "draining", &[]);
    // The second one comes at once.
    stays("it is one", LATER, || daemon.said(Mark::START, "stopping at once").is_empty());
    fs::write(daemon.path("answer"), "").unwrap();
    assert_eq!(client.answer().unwrap().0, 200);
    drop(client);
    assert_eq!(daemon.wait_exit().code(), Some(124), "timed out, says timeout(1)");
    assert!(daemon.said(Mark::START, "stopping at once").is_empty());
    assert_eq!(daemon.said(Mark::START, "stopped").len(), 1);
}

#[test]
fn two_signals_at_once_are_one_and_a_later_one_cuts_short() {
    let ports = Ports::take(1);
    let mut daemon = Daemon::healthy(&ports.service(&command(&["echo"])), 1);
    let _client = connect(ports.address());
    daemon.signal(SIGTERM);
    daemon.signal(SIGINT);
    daemon.wait(Mark::START, "stopping", &[]);
    stays("it is one", LATER, || daemon.said(Mark::START, "stopping at once").is_empty());
    daemon.signal(SIGTERM);
    daemon.wait(Mark::START, "stopping at once", &[]);
    daemon.wait_stopped();
}

#[test]
fn sigquit_stops_at_once() {
    at_once(&[SIGQUIT]);
}

#[test]
fn a_second_sigterm_stops_at_once() {
    at_once(&[SIGTERM, SIGTERM]);
}

#[test]
fn a_second_ctrl_c_stops_at_once() {
    at_once(&[SIGINT, SIGINT]);
}

#[test]
fn sigquit_stops_at_once_while_it_drains() {
    at_once(&[SIGTERM, SIGQUIT]);
}

#[test]
fn it_stops_while_workers_are_still_starting() {
    let ports = Ports::take(3);
    let keys = format!(
        "command = [\"sh\", \"-c\", \"[ {{slot}} = 0 ] && exit 1 || exec {} silent\"]\n",
        common::fixture()
    );
    let mut daemon = Daemon::start(&ports.service(&keys));
    // One in backoff, two that start.
    daemon.wait(Mark::START, "worker exited", &[]);
    daemon.wait_many(Mark::START, "worker started", &[], 2);
    let begun = Instant::now();
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_free(&ports);
}

#[test]
fn it_stops_as_soon_as_it_has_begun() {
    let ports = Ports::take(4);
    let mut daemon = Daemon::start(&ports.service(&command(&["http"])));
    daemon.log.wait_for(Mark::START, "anything", 1, |_| true);
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert_free(&ports);
}

#[test]
fn a_held_client_does_not_hold_up_the_stop() {
    let ports = Ports::take(1);
    let mut daemon = Daemon::start(&ports.service(&command(&["silent"])));
    daemon.wait(Mark::START, "worker started", &[]);
    let mut client = connect(ports.address());
    let begun = Instant::now();
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    let end = client.read(&mut [0]);
    assert!(!matches!(end, Err(error) if error.kind() == ErrorKind::WouldBlock));
}

#[test]
fn no_worker_is_restarted_while_it_stops() {
    let ports = Ports::take(2);
    let keys = format!("{}\nrestart.min-delay = \"1ms\"", command(&["http"]));
    let mut daemon = Daemon::healthy(&ports.service(&keys), 2);
    let mut held: Vec<_> = (0..2).map(|_| KeepAlive::new(ports.address())).collect();
    let pids: Vec<i32> = held
        .iter_mut()
        .map(|client| {
            let body = String::from_utf8(client.get("/").unwrap().1).unwrap();
            body.split(' ').next_back().unwrap().parse().unwrap()
        })
        .collect();
    daemon.signal(SIGTERM);
    daemon.wait(Mark::START, "draining", &[]);
    common::kill_hard(pids[0]);
    daemon.wait(Mark::START, "worker exited", &[("pid", &pids[0].to_string())]);
    // The other goes on with what it has.
    assert_eq!(held[1].get("/").unwrap().0, 200);
    drop(held);
    daemon.wait_stopped();
    assert_eq!(daemon.said(Mark::START, "worker started").len(), 2);
}

#[test]
fn a_reload_while_it_stops_is_refused() {
    let ports = Ports::take(1);
    let config = ports.service(&command(&["http"]));
    let mut daemon = Daemon::healthy(&config, 1);
    let mut held = KeepAlive::new(ports.address());
    held.get("/").unwrap();
    daemon.signal(SIGTERM);
    daemon.wait(Mark::START, "draining", &[]);
    let line = daemon.reload(&config);
    assert_eq!((&*line.message, line.get("error")), ("reload refused", Some("lbd is stopping")));
    assert_eq!(held.get("/").unwrap().0, 200);
    drop(held);
    daemon.wait_stopped();
}

#[test]
fn a_unix_socket_is_removed() {
    let ports = Ports::take(1);
    let keys = command(&["http"]);
    let config =
        ports.service(&keys).replace(&format!("\"{}\"", ports.address()), "\"unix:run.sock\"");
    let mut daemon = Daemon::healthy(&config, 1);
    assert!(daemon.path("run.sock").exists());
    daemon.signal(SIGTERM);
    daemon.wait_stopped();
    assert!(!daemon.path("run.sock").exists());
}
