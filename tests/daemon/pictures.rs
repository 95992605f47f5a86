//! The sample's own pictures, whole, through the balancer: many at once, again and again.

use std::{fs, io::Read, sync::Arc, thread, time::Duration};

use crate::common::{
    Daemon, Line, Mark, Ports,
    client::{KeepAlive, connect},
    www,
};

const NAMES: [&str; 2] = ["pokijan.jpg", "research_center.jpg"];
const CLIENTS: usize = 16;
const TIMES: usize = 10;

/// The path and the bytes of each.
fn pictures() -> Vec<(String, Vec<u8>)> {
    let picture = |name: &&str| {
        let bytes = fs::read(www().join(name)).unwrap();
        // From the first marker to the last one of a JPEG.
        assert!(bytes.starts_with(b"\xff\xd8\xff") && bytes.ends_with(b"\xff\xd9"), "{name}");
        (format!("/{name}"), bytes)
    };
    NAMES.iter().map(picture).collect()
}

/// Both pictures, by many clients at once, each over connections of its own: one, if it may `keep` it.
fn fetch(keys: &str, keep: bool) {
    let pictures = Arc::new(pictures());
    assert!(pictures[1].1.len() > 500 * 1024);
    let ports = Ports::take(4);
    let daemon = Daemon::healthy(&ports.service(&format!("root = {:?}\n{keys}", www())), 4);
    let address = ports.address();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let pictures = Arc::clone(&pictures);
            thread::spawn(move || {
                let mut client = KeepAlive::new(address);
                for _ in 0..TIMES {
                    for (path, file) in pictures.iter() {
                        if !keep {
                            client = KeepAlive::new(address);
                        }
                        let (status, body) = client.get(path).unwrap();
                        assert_eq!(status, 200);
                        assert!(body == *file, "{path}: {} bytes", body.len());
                    }
                }
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    let requests = CLIENTS * TIMES * NAMES.len();
    let connections = if keep { CLIENTS } else { requests };
    // Of the first of each client, over which it asks for nothing, the worker may never hear.
    let is_one = |line: &Line| {
        line.is("connection", &[("end", "closed")]) && line.number::<usize>("sent") > 0
    };
    let lines = daemon.log.wait_for(Mark::START, "connections", connections, is_one);
    let sent: usize = lines.iter().map(|line| line.number::<usize>("sent")).sum();
    let bodies: usize = pictures.iter().map(|(_, file)| file.len() * CLIENTS * TIMES).sum();
    assert!(sent > bodies, "{sent} of {bodies}");
}

#[test]
fn whole_over_a_connection_each() {
    fetch("", false);
}

#[test]
fn whole_over_connections_that_are_kept() {
    fetch("", true);
}

#[test]
fn whole_from_workers_that_bind_themselves() {
    fetch("socket = \"bind\"", false);
}

#[test]
fn whole_for_a_slow_reader_that_asks_for_the_end() {
    let ports = Ports::take(1);
    let _daemon = Daemon::healthy(&ports.service(&format!("root = {:?}", www())), 1);
    let file = fs::read(www().join(NAMES[1])).unwrap();
    // Little fits on the way, so that the balancer has to wait for its client again and again.
    let mut client = connect(ports.address());
    socket2::SockRef::from(&client).set_recv_buffer_size(32 * 1024).unwrap();
    let request = format!("GET /{} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", NAMES[1]);
    std::io::Write::write_all(&mut client, request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut piece = [0; 8192];
    loop {
        match client.read(&mut piece).unwrap() {
            0 => break,
            count => answer.extend_from_slice(&piece[..count]),
        }
        thread::sleep(Duration::from_micros(200));
    }
    assert!(answer.ends_with(&file), "{} bytes", answer.len());
}

#[test]
fn every_worker_signs_its_answers_in_turn() {
    let ports = Ports::take(4);
    let _daemon = Daemon::healthy(&ports.service(&format!("root = {:?}", www())), 4);
    let signed = || {
        let mut client = connect(ports.address());
        let request = b"HEAD /page.html HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        std::io::Write::write_all(&mut client, request).unwrap();
        let mut head = String::new();
        client.read_to_string(&mut head).unwrap();
        let head = head.to_ascii_lowercase();
        head.lines().find_map(|line| line.strip_prefix("x-served-by: ").map(str::to_owned)).unwrap()
    };
    let expected: Vec<_> =
        ports.all().into_iter().cycle().take(8).map(|port| format!("web/{port}")).collect();
    assert_eq!((0..8).map(|_| signed()).collect::<Vec<_>>(), expected);
}
