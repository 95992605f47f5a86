//! Bytes pass as they are, and ends as what they are.

use std::{
    env, fs,
    io::{ErrorKind, Read, Write},
    mem,
    net::{Shutdown, TcpStream},
    thread,
    time::Duration,
};

use crate::common::{self, Daemon, Ports, client::connect, command, eventually};
use socket2::SockRef;

/// How many bytes go each way; `LBD_TEST_BYTES` says otherwise.
fn volume() -> usize {
    env::var("LBD_TEST_BYTES").map_or(256 << 20, |bytes| bytes.parse().unwrap())
}

/// Noise that is its own neighbour nowhere near: its length is prime, and larger than any buffer.
fn noise() -> Vec<u8> {
    const LENGTH: usize = 4_194_301;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = Vec::with_capacity(LENGTH + 8);
    while noise.len() < LENGTH {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise.truncate(LENGTH);
    noise
}

fn echo() -> (Ports, Daemon) {
    let ports = Ports::take(1);
    let daemon = Daemon::healthy(&ports.service(&command(&["echo"])), 1);
    (ports, daemon)
}

#[test]
fn a_lot_of_them_both_ways_at_once() {
    let (ports, daemon) = echo();
    let (client, noise, volume) = (connect(ports.address()), noise(), volume());
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut sent = 0;
            while sent < volume {
                let block = &noise[..noise.len().min(volume - sent)];
                (&client).write_all(block).unwrap();
                sent += block.len();
            }
            client.shutdown(Shutdown::Write).unwrap();
        });
        let (mut block, mut received) = (vec![0; noise.len()], 0);
        while received < volume {
            let length = block.len().min(volume - received);
            (&client).read_exact(&mut block[..length]).unwrap();
            assert!(block[..length] == noise[..length], "after {received}");
            received += length;
        }
        // The end is passed on as well, in both directions.
        assert_eq!((&client).read(&mut block).unwrap(), 0);
    });
    let line = daemon.wait(common::Mark::START, "connection", &[]);
    assert_eq!((line.number("sent"), line.number("received")), (volume, volume), "{}", line.raw);
}

#[test]
fn one_by_one() {
    let (ports, _daemon) = echo();
    let mut client = connect(ports.address());
    client.set_nodelay(true).unwrap();
    let noise = &noise()[..3000];
    // Each alone in its segment on one half, as many at once as may be on the other.
    for byte in &noise[..1500] {
        client.write_all(&[*byte]).unwrap();
        let mut back = [0];
        client.read_exact(&mut back).unwrap();
        assert_eq!(back, [*byte]);
    }
    for byte in &noise[1500..] {
        client.write_all(&[*byte]).unwrap();
    }
    client.shutdown(Shutdown::Write).unwrap();
    let mut back = Vec::new();
    client.read_to_end(&mut back).unwrap();
    assert_eq!(back, noise[1500..]);
}

/// How the answer ends: after so many bytes.
fn end(mut client: &TcpStream) -> (usize, Result<(), ErrorKind>) {
    let (mut block, mut received) = (vec![0; 1 << 16], 0);
    loop {
        match client.read(&mut block) {
            Ok(0) => return (received, Ok(())),
            Ok(read) => received += read,
            Err(error) => return (received, Err(error.kind())),
        }
    }
}

/// Waits until everything on the way is full of the `most` bytes that come.
fn wait_until_full(client: &TcpStream, most: usize) {
    let (mut block, mut before) = (vec![0; most], 0);
    eventually("nothing more comes", || {
        thread::sleep(Duration::from_millis(50));
        let now = client.peek(&mut block).unwrap();
        now == mem::replace(&mut before, now)
    });
}

#[test]
fn a_worker_that_resets_in_the_middle_is_seen_to() {
    const BYTES: usize = 32 << 20;
    let ports = Ports::take(1);
    let _daemon = Daemon::healthy(&ports.service(&command(&["pour", &BYTES.to_string()])), 1);
    for waits in [false, true] {
        let mut client = connect(ports.address());
        client.write_all(b"go on").unwrap();
        if waits {
            wait_until_full(&client, BYTES);
        }
        // All of it may have come before the reset; what counts is that the end is one.
        let (received, end) = end(&client);
        assert_eq!(end, Err(ErrorKind::ConnectionReset), "after {received}");
    }
}

#[test]
fn a_client_that_resets_in_the_middle_is_seen_to() {
    let ports = Ports::take(1);
    let folder = tempfile::tempdir().unwrap();
    let heard = folder.path().join("heard");
    let config = ports.service(&command(&["hear", heard.to_str().unwrap()]));
    let daemon = Daemon::start_in(folder, &config);
    daemon.wait_healthy(common::Mark::START, 1);
    let mut client = connect(ports.address());
    let noise = noise();
    client.write_all(&noise[..1 << 20]).unwrap();
    // Its end has come; the client goes on, and breaks off.
    let mut bye = Vec::new();
    client.read_to_end(&mut bye).unwrap();
    assert_eq!(bye, b"bye");
    client.write_all(&noise[1 << 20..2 << 20]).unwrap();
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    eventually("the worker's view", || heard.exists());
    assert_eq!(fs::read_to_string(&heard).unwrap_or_default(), "ConnectionReset");
}
