//! `accept-proxy-protocol`: whose connection it is, a proxy in front says.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    Daemon, Mark, PATIENCE, Ports,
    client::{KeepAlive, connect},
    command, eventually, freeze, thaw,
};

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Version 2 of `PROXY TCP4 192.0.2.7 192.0.2.1 4711 80`, with something behind the addresses.
fn binary() -> Vec<u8> {
    let ends = [192, 0, 2, 7, 192, 0, 2, 1, 0x12, 0x67, 0, 80];
    let extra = [4, 0, 1, 0];
    [SIGNATURE, &[0x21, 0x11, 0, 16], &ends, &extra].concat()
}

const TEXT: &[u8] = b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\r\n";
const SAID: &str = "PROXY TCP4 192.0.2.7 192.0.2.1 4711 80";

fn accepting(ports: &Ports, networks: &str, words: &[&str], keys: &str) -> String {
    let command = command(words);
    ports.service(&format!("{command}\naccept-proxy-protocol = {networks}\n{keys}"))
}

#[test]
fn the_client_is_who_the_header_says_in_the_log_and_to_the_worker() {
    for told in ["v1", "v2"] {
        let ports = Ports::take(1);
        let keys = format!("proxy-protocol = {told:?}");
        let config = accepting(&ports, "[\"127.0.0.0/8\", \"::1\"]", &["tell", told], &keys);
        let daemon = Daemon::healthy(&config, 1);
        for header in [TEXT.to_vec(), binary()] {
            // With the first bytes, before them, and in pieces.
            for pieces in [
                vec![[&*header, b"hello"].concat()],
                vec![header.clone(), b"hello".to_vec()],
                header.chunks(7).map(<[u8]>::to_vec).chain([b"hello".to_vec()]).collect(),
            ] {
                let since = daemon.now();
                let mut client = connect(ports.address());
                for piece in pieces {
                    client.write_all(&piece).unwrap();
                    thread::sleep(Duration::from_millis(3));
                }
                client.shutdown(Shutdown::Write).unwrap();
                let mut heard = String::new();
                client.read_to_string(&mut heard).unwrap();
                assert_eq!(heard, format!("{SAID}\nhello"));
                let line = daemon.wait(since, "connection", &[("end", "closed")]);
                assert_eq!(line.get("client"), Some("192.0.2.7:4711"), "{}", line.raw);
                assert_eq!(line.get("received"), Some("5"), "{}", line.raw);
            }
        }
        // A worker that speaks first needs no byte of the client's.
        let mut client = connect(ports.address());
        client.write_all(TEXT).unwrap();
        let mut line = String::new();
        BufReader::new(&client).read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), SAID);
        // A header that says nothing leaves it who it is.
        for header in [b"PROXY UNKNOWN\r\n".to_vec(), [SIGNATURE, &[0x20, 0, 0, 0]].concat()] {
            let mut client = connect(ports.address());
            client.write_all(&header).unwrap();
            let (own, server) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            let mut line = String::new();
            BufReader::new(&client).read_line(&mut line).unwrap();
            let expected =
                format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {}", own.port(), server.port());
            assert_eq!(line.trim_end(), expected);
        }
    }
}

#[test]
fn the_bytes_of_others_are_their_own() {
    let ports = Ports::take(1);
    let config = accepting(&ports, "\"10.0.0.0/8\"", &["echo"], "");
    let daemon = Daemon::healthy(&config, 1);
    let mut client = connect(ports.address());
    client.write_all(TEXT).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, TEXT);
    let line = daemon.wait(Mark::START, "connection", &[("end", "closed")]);
    let own = client.local_addr().unwrap().to_string();
    assert_eq!(line.get("client"), Some(&*own), "{}", line.raw);
    // A reload makes it one of those that are believed.
    daemon.must_reload(&accepting(&ports, "\"127.0.0.1\"", &["echo"], ""));
    let mut client = connect(ports.address());
    client.write_all(&[TEXT, b"hello"].concat()).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"hello");
    assert_eq!(daemon.said(Mark::START, "worker exited").len(), 0);
}

#[test]
fn what_does_not_begin_with_a_header_is_reset_and_said() {
    let ports = Ports::take(1);
    let config = accepting(&ports, "\"127.0.0.1\"", &["echo"], "");
    let daemon = Daemon::healthy(&config, 1);
    let mut late = connect(ports.address());
    late.write_all(b"PROXY TCP4 192.0.2.7").unwrap();
    let begun = Instant::now();
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[TEXT, TEXT].concat()[1..], &[b'\r'; 200]] {
        let since = daemon.now();
        let mut client = connect(ports.address());
        client.write_all(bytes).unwrap();
        let error = client.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        daemon.wait(since, "connection", &[("end", "no-header"), ("worker", "-")]);
    }
    // Half of one, and then nothing.
    let error = late.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!((9..15).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    assert_eq!(daemon.workers("web")[0]["connections"]["total"], 0);
}

#[test]
fn a_client_on_a_unix_socket_is_believed_where_that_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web.sock");
    let config = format!(
        "[service.web]\nlisten = \"unix:{}\"\nworkers = 1\n{}\naccept-proxy-protocol = \"unix\"\n\
         proxy-protocol = \"v1\"",
        path.display(),
        command(&["tell", "v1"])
    );
    let _daemon = {
        let daemon = Daemon::start_in(folder, &config);
        daemon.wait_healthy(Mark::START, 1);
        daemon
    };
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(&binary()).unwrap();
    let mut line = String::new();
    BufReader::new(&client).read_line(&mut line).unwrap();
    assert_eq!(line.trim_end(), SAID);
}

#[test]
fn source_hash_goes_by_the_address_in_the_header() {
    let ports = Ports::take(4);
    let config = accepting(&ports, "\"127.0.0.1\"", &["http"], "balance = \"source-hash\"");
    let _daemon = Daemon::healthy(&config, 4);
    let worker = |client: u8| {
        let mut stream = connect(ports.address());
        let header = format!("PROXY TCP4 192.0.2.{client} 192.0.2.1 4711 80\r\n");
        stream.write_all(header.as_bytes()).unwrap();
        let (_, body) = KeepAlive::over(stream).get("/").unwrap();
        String::from_utf8(body).unwrap()
    };
    let all: BTreeSet<_> = (0..64).map(worker).collect();
    assert_eq!(all.len(), 4, "{all:?}");
    let first = worker(7);
    assert!((0..8).all(|_| worker(7) == first));
}

#[test]
fn a_check_from_outside_reaches_no_worker_and_is_no_line() {
    let ports = Ports::take(1);
    for accept in [false, true] {
        let networks = if accept { "\"127.0.0.1\"" } else { "\"10.0.0.0/8\"" };
        let config = accepting(&ports, networks, &["http"], "health.interval = \"1h\"");
        let daemon = Daemon::healthy(&format!("log.level = \"debug\"\n{config}"), 1);
        // They are gone when lbd comes to them, however slow this is.
        freeze(daemon.pid());
        for _ in 0..10 {
            let mut client = TcpStream::connect(ports.address()).unwrap();
            if accept {
                client.write_all(TEXT).unwrap();
            }
            drop(client);
        }
        thaw(daemon.pid());
        let lines = daemon.wait_many(Mark::START, "connection", &[("end", "client-gone")], 10);
        assert!(lines.iter().all(|line| line.raw.contains("DEBUG")), "{}", lines[0].raw);
        assert_eq!(daemon.workers("web")[0]["connections"]["total"], 0);
        // Whoever stays without a word reaches one.
        if !accept {
            let client = connect(ports.address());
            eventually("it has a worker", || {
                daemon.workers("web")[0]["connections"]["active"] == 1
            });
            drop(client);
        }
    }
}
