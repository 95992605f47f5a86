//! What a worker does to its listening socket harms neither its successors nor the others, and no
//! descriptor is left behind.

use std::{
    fs,
    io::Read,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    Daemon, Mark, Ports,
    client::{get, try_get},
    command, eventually, kill_hard, needs,
    proc::descriptors,
};
use socket2::{Domain, Socket, Type};

#[test]
fn restarts_leave_no_descriptor_behind() {
    for keys in
        ["socket = \"bind\"", "socket = \"inherit\"", "socket = \"unix\"", "route = \"direct\""]
    {
        let ports = Ports::take(0);
        let config = format!(
            "[service.web]\nlisten = \"{}\"\nworkers = 2\n{keys}\n{}\n",
            ports.address(),
            command(&["http"])
        );
        let daemon = Daemon::healthy(&config, 2);
        get(ports.address(), "/");
        eventually("its start is over", || {
            let before = descriptors(daemon.pid());
            thread::sleep(Duration::from_millis(50));
            before == descriptors(daemon.pid())
        });
        let before = descriptors(daemon.pid());
        for pid in daemon.slot_pids() {
            let since = daemon.now();
            kill_hard(pid);
            daemon.wait_healthy(since, 1);
        }
        // Last, and nothing is asked afterwards: to look at the counters would tidy them up.
        for _ in 0..4 {
            let output = daemon.lbd(&["restart"]);
            assert!(output.status.success(), "{output:?}");
        }
        get(ports.address(), "/");
        eventually(&format!("{keys}: as many as before ({before})"), || {
            descriptors(daemon.pid()) <= before
        });
    }
}

#[test]
fn a_worker_that_spoils_its_socket_spoils_no_successor() {
    for how in ["shutdown", "dissolve", "lock"] {
        if how == "lock" && !needs::is_root() {
            continue; // Linux 6.18 lets nobody else attach a filter
        }
        let ports = Ports::take(1);
        let folder = tempfile::tempdir().unwrap();
        let order = folder.path().join("order").display().to_string();
        let worker = command(&["http", "--spoil", &order]);
        let keys = format!("socket = \"inherit\"\n{worker}");
        let daemon = Daemon::healthy(&ports.service(&keys), 1);
        let since = daemon.now();
        fs::write(folder.path().join("new"), how).unwrap();
        fs::rename(folder.path().join("new"), &order).unwrap();
        daemon.wait(since, "worker exited", &[]);
        daemon.wait_healthy(since, 1);
        assert_eq!(daemon.said(since, "worker started").len(), 1, "{how}: the first one works");
        for _ in 0..5 {
            get(ports.address(), "/");
        }
        drop(daemon);
    }
}

/// Which worker of `route = "direct"` answers, as `slot/pid`.
fn who(ports: &Ports) -> Option<String> {
    let body = try_get(ports.address(), "/").ok()?;
    Some(String::from_utf8(body).unwrap())
}

#[test]
fn a_direct_worker_that_steers_itself_is_told_of_and_overruled() {
    for how in ["steal", "detach"] {
        let ports = Ports::take(0);
        let folder = tempfile::tempdir().unwrap();
        let order = folder.path().join("order").display().to_string();
        let config = format!(
            "[service.web]\nlisten = \"{}\"\nworkers = 2\nroute = \"direct\"\n{}\n",
            ports.address(),
            command(&["http", "--spoil", &order])
        );
        let daemon = Daemon::healthy(&config, 2);
        let slots =
            || (0..40).filter_map(|_| who(&ports)).collect::<std::collections::BTreeSet<_>>();
        eventually("both have turns", || slots().len() == 2);
        // Whichever it is that does it, and whichever it gives connections to: the drained one is to
        // get none.
        let output = daemon.lbd(&["drain", "web", "0"]);
        assert!(output.status.success(), "{output:?}");
        let of_the_other = slots();
        assert_eq!(of_the_other.len(), 1);
        let until = Instant::now() + Duration::from_secs(30);
        while daemon.said(Mark::START, "somebody else steered connections").is_empty() {
            assert!(Instant::now() < until, "{how}: nothing is said");
            // By a hash some of it goes right: it is not seen each time.
            fs::write(folder.path().join("new"), how).unwrap();
            fs::rename(folder.path().join("new"), &order).unwrap();
            thread::sleep(Duration::from_millis(300));
        }
        _ = fs::remove_file(&order);
        eventually("the drained one gets nothing again", || slots() == of_the_other);
        assert_eq!(daemon.said(Mark::START, "somebody else steered connections").len(), 1);
    }
}

/// `python3 -m http.server` and others set SO_REUSEADDR; those that don't leave the port in TIME_WAIT.
#[test]
fn a_port_in_time_wait_is_called_that() {
    let ports = Ports::take(1);
    let address: SocketAddr = (Ipv4Addr::LOCALHOST, ports.worker(0)).into();
    // The kernel remembers none while its table of them is full
    // (`tcp_max_tw_buckets`), as after a test of load: then once more.
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        {
            let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            listener.bind(&address.into()).unwrap();
            listener.listen(1).unwrap();
            let mut client = TcpStream::connect(address).unwrap();
            // This end is closed first, and remembered.
            drop(listener.accept().unwrap());
            _ = client.read(&mut [0]);
        }
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        if socket.bind(&address.into()).is_err() {
            break;
        }
        assert!(Instant::now() < deadline, "no TIME_WAIT is kept");
        thread::sleep(Duration::from_millis(100));
    }
    let daemon = Daemon::start(&ports.service(&command(&["http"])));
    let line = daemon.wait(Mark::START, "worker not started", &[]);
    let error = line.get("error").unwrap();
    let begins = format!("port {} of 127.0.0.1 is in TIME_WAIT for another ", ports.worker(0));
    assert!(error.starts_with(&begins), "{}", line.raw);
    assert!(error.contains("socket = \"inherit\""), "{}", line.raw);
}
