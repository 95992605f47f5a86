//! The header by which a proxy tells a server the client's address: the PROXY protocol, versions 1
//! and 2, as HAProxy's `doc/proxy-protocol.txt` specifies it ("the specification" below).
//!
//! A worker reads it first on each connection. If the client has no IP address (it uses a unix
//! socket), or lbd does not know it, the header says so: `UNKNOWN` in version 1, `LOCAL` in version
//! 2, which every receiver has to accept.
//!
//! lbd also reads such headers: that of a proxy in front of it ([`received`]), and its own, on
//! connections drained from the queue of a worker that has exited ([`take_off`]).

use std::{
    io::{self, ErrorKind, Read},
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
    time::Instant,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, recv},
};
use proxy_header::{Error, ParseConfig, Protocol, ProxiedAddress, ProxyHeader};
use socket2::Socket;

use crate::config::ProxyProtocol;

/// The longest header that lbd sends, in bytes (the specification, section 2.1).
pub const LONGEST: usize = 107;

/// The two ends of a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The client's address.
    pub client: SocketAddr,
    /// The address that it connected to.
    pub server: SocketAddr,
}

impl Ends {
    /// The ends of an accepted connection; `None` if it has no IP addresses.
    #[must_use]
    pub fn of(accepted: &Socket) -> Option<Self> {
        let client = accepted.peer_addr().ok()?.as_socket()?;
        let server = accepted.local_addr().ok()?.as_socket()?;
        Some(Self { client, server })
    }
}

/// A header, ready to be sent.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    bytes: [u8; LONGEST],
    length: usize,
}

impl Header {
    /// The header for a client's connection with these ends; `None` if they are not known.
    ///
    /// An IPv4 client is an IPv4 client even on an IPv6 socket: `::ffff:192.0.2.1` is sent as
    /// `192.0.2.1`.
    #[must_use]
    pub fn new(version: ProxyProtocol, ends: Option<Ends>) -> Self {
        let canonical = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
        let known = ends
            .map(|ends| (canonical(ends.client), canonical(ends.server)))
            // Both ends of one socket are always of the same family.
            .filter(|(client, server)| client.is_ipv4() == server.is_ipv4())
            .map(|(client, server)| ProxiedAddress::stream(client, server));
        let header = known.map_or_else(ProxyHeader::with_local, ProxyHeader::with_address);
        let mut bytes = [0; LONGEST];
        let length = match version {
            ProxyProtocol::V1 => header.encode_to_slice_v1(&mut bytes),
            ProxyProtocol::V2 => header.encode_to_slice_v2(&mut bytes),
        };
        // It fails only if the buffer is too short, the families differ, or there is a TLV.
        Self { bytes, length: length.unwrap_or(0) }
    }

    /// The header of a connection that lbd makes for itself, over a socket with these ends; `None`
    /// if it has none.
    ///
    /// Version 2 has a command for that (`LOCAL`). In version 1 the ends are the connection's own:
    /// some servers are known to refuse `UNKNOWN`, so the specification advises against it for
    /// health checks.
    #[must_use]
    pub fn of_probe(version: ProxyProtocol, ends: Option<Ends>) -> Self {
        match version {
            ProxyProtocol::V1 => Self::new(version, ends),
            ProxyProtocol::V2 => Self::new(version, None),
        }
    }

    /// The bytes to be sent, before anything else and in one piece.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The longest header that lbd accepts, in bytes, including whatever version 2 may add to the
/// addresses.
pub const LONGEST_RECEIVED: usize = 4096;

/// The error that a connection does not begin with a PROXY header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no PROXY header")]
pub struct NoHeader;

/// A header that was received completely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// The ends of the client's connection; `None` if the header does not say (`UNKNOWN`, `LOCAL`,
    /// or a client without an IP address).
    pub ends: Option<Ends>,
    /// The length of the header in bytes. The client's data follows it.
    pub length: usize,
}

/// Parses the header, of either version, at the beginning of `bytes`; `None` if it is incomplete.
///
/// # Errors
/// If `bytes` is not the beginning of a header, or the header is longer than [`LONGEST_RECEIVED`].
pub fn received(bytes: &[u8]) -> Result<Option<Received>, NoHeader> {
    const V1: &[u8] = b"PROXY ";
    const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
    let begins = |with: &[u8]| {
        let both = bytes.len().min(with.len());
        bytes[..both] == with[..both]
    };
    let (allow_v1, allow_v2) = (begins(V1), begins(V2));
    if !allow_v1 && !allow_v2 {
        return Err(NoHeader);
    }
    if let (true, Some(&[high, low])) = (allow_v2, bytes.get(14..16)) {
        let length = 16 + usize::from(u16::from_be_bytes([high, low]));
        if length > LONGEST_RECEIVED {
            return Err(NoHeader);
        }
    }
    let config = ParseConfig { allow_v1, allow_v2, include_tlvs: false };
    match ProxyHeader::parse(bytes, config) {
        Ok((header, length)) => {
            let stream = header.proxied_address().filter(|to| to.protocol == Protocol::Stream);
            let ends = stream.map(|to| Ends { client: to.source, server: to.destination });
            Ok(Some(Received { ends, length }))
        }
        Err(Error::BufferTooShort) => Ok(None),
        Err(_) => Err(NoHeader),
    }
}

/// Removes the header from a connection to a worker. A thread of lbd has made that connection and
/// sent the header, or is about to send it. Returns what the header says about the client. The
/// bytes behind it stay to be read.
///
/// Waits for the header until `deadline` at most. It arrives whole, since it was sent in one piece.
///
/// # Errors
/// `TimedOut` if nothing arrived, `InvalidData` if what arrived is not such a header, and the
/// system's error if the connection is broken.
pub fn take_off(
    socket: &Socket,
    version: ProxyProtocol,
    deadline: Instant,
) -> io::Result<Option<Ends>> {
    wait_readable(socket, deadline)?;
    let mut begin = [0; LONGEST];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let count = recv(socket.as_raw_fd(), &mut begin, flags)?;
    let config = ParseConfig {
        allow_v1: version == ProxyProtocol::V1,
        allow_v2: version == ProxyProtocol::V2,
        include_tlvs: false,
    };
    let parsed = ProxyHeader::parse(&begin[..count], config);
    let (header, length) = parsed.map_err(|_| ErrorKind::InvalidData)?;
    let ends = header
        .proxied_address()
        .map(|proxied| Ends { client: proxied.source, server: proxied.destination });
    let mut socket = socket;
    socket.read_exact(&mut [0; LONGEST][..length])?;
    Ok(ends)
}

fn wait_readable(socket: &Socket, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => return Err(ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{TcpListener, TcpStream},
        os::fd::OwnedFd,
        thread,
        time::Duration,
    };

    use super::*;
    use crate::config::ProxyProtocol::{V1, V2};

    fn ends(client: &str, server: &str) -> Ends {
        Ends { client: client.parse().unwrap(), server: server.parse().unwrap() }
    }

    fn header(version: ProxyProtocol, client: &str, server: &str) -> Vec<u8> {
        Header::new(version, Some(ends(client, server))).as_bytes().to_vec()
    }

    #[test]
    fn a_line_as_the_specification_has_it() {
        assert_eq!(
            header(V1, "192.168.0.1:56324", "192.168.0.11:443"),
            b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"
        );
        assert_eq!(
            header(V1, "[2001:db8::1]:56324", "[::1]:443"),
            b"PROXY TCP6 2001:db8::1 ::1 56324 443\r\n"
        );
        let longest = "[1111:2222:3333:4444:5555:6666:7777:8888]:65535";
        assert_eq!(header(V1, longest, longest).len(), 104);
        assert_eq!(Header::new(V1, None).as_bytes(), b"PROXY UNKNOWN\r\n");
    }

    #[test]
    fn a_binary_header_as_the_specification_has_it() {
        const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
        assert_eq!(
            header(V2, "192.168.0.1:56324", "192.168.0.11:443"),
            [SIGNATURE, b"\x21\x11\0\x0c\xc0\xa8\0\x01\xc0\xa8\0\x0b\xdc\x04\x01\xbb"].concat()
        );
        let v6 = header(V2, "[2001:db8::1]:56324", "[::1]:443");
        assert_eq!(v6[..20], [SIGNATURE, b"\x21\x21\0\x24\x20\x01\x0d\xb8"].concat());
        assert_eq!(v6.len(), 52);
        assert_eq!(Header::new(V2, None).as_bytes(), [SIGNATURE, b"\x20\0\0\0"].concat());
    }

    #[test]
    fn a_mapped_address_is_an_ipv4_one() {
        for version in [V1, V2] {
            assert_eq!(
                header(version, "[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2"),
                header(version, "192.0.2.1:1", "192.0.2.2:2")
            );
            // Two families can't be told, and are not made up.
            assert_eq!(
                header(version, "[::ffff:192.0.2.1]:1", "[2001:db8::1]:2"),
                Header::new(version, None).as_bytes()
            );
        }
    }

    #[test]
    fn a_probe_is_nobodys_or_where_that_is_refused_its_own() {
        let own = Some(ends("127.0.0.1:40000", "127.0.0.1:9002"));
        assert_eq!(Header::of_probe(V2, own).as_bytes(), Header::new(V2, None).as_bytes());
        assert_eq!(Header::of_probe(V1, own).as_bytes(), Header::new(V1, own).as_bytes());
    }

    #[test]
    fn a_header_is_received_in_whatever_pieces_it_comes() {
        for (version, said) in [
            (V1, Some(ends("192.0.2.1:1", "192.0.2.2:2"))),
            (V1, Some(ends("[2001:db8::1]:65535", "[2001:db8::2]:65535"))),
            (V2, Some(ends("192.0.2.1:1", "192.0.2.2:2"))),
            (V2, Some(ends("[2001:db8::1]:1", "[2001:db8::2]:2"))),
            (V1, None),
            (V2, None),
        ] {
            let header = Header::new(version, said);
            let whole = [header.as_bytes(), b"GET / HTTP/1.1\r\n"].concat();
            let length = header.as_bytes().len();
            for count in 0..length {
                assert_eq!(received(&whole[..count]), Ok(None), "{version} {count}");
            }
            for count in length..=whole.len() {
                let expected = Ok(Some(Received { ends: said, length }));
                assert_eq!(received(&whole[..count]), expected, "{version} {count}");
            }
        }
    }

    #[test]
    fn what_can_be_no_header_is_known_by_its_first_bytes() {
        for bytes in [&b"G"[..], b"PROXY_", b"PROXZ", b"\r\nGET", b"\x16\x03\x01"] {
            assert_eq!(received(bytes), Err(NoHeader));
        }
        assert_eq!(received(b"PROXY TCP4 1.2.3.4 1.2.3.4 1 x\r\n"), Err(NoHeader));
        assert_eq!(received(&[b"PROXY TCP4 ", &[b'1'; 200][..]].concat()), Err(NoHeader));
        // Version 2 says how long it is.
        let long = |length: u16| {
            let head = b"\r\n\r\n\0\r\nQUIT\n\x20\x00";
            [&head[..], &length.to_be_bytes(), &vec![0; length.into()]].concat()
        };
        assert_eq!(received(&long(4080)), Ok(Some(Received { ends: None, length: 4096 })));
        assert_eq!(received(&long(4081)[..16]), Err(NoHeader));
        // Datagrams are nobody's connection.
        let mut datagram = long(12);
        datagram[12..14].copy_from_slice(b"\x21\x12");
        assert_eq!(received(&datagram), Ok(Some(Received { ends: None, length: 28 })));
    }

    fn pair() -> (TcpStream, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (sender, Socket::from(OwnedFd::from(listener.accept().unwrap().0)))
    }

    #[test]
    fn what_is_taken_off_is_what_was_sent_and_no_byte_more() {
        for (version, said) in [
            (V1, Some(ends("192.0.2.1:1", "192.0.2.2:2"))),
            (V2, Some(ends("[2001:db8::1]:1", "[2001:db8::2]:65535"))),
            (V1, None),
            (V2, None),
        ] {
            let (mut sender, mut socket) = pair();
            // It need not be there yet.
            let sending = thread::spawn(move || {
                let header = Header::new(version, said);
                sender.write_all(&[header.as_bytes(), b"hello"].concat()).unwrap();
            });
            let deadline = Instant::now() + Duration::from_secs(10);
            assert_eq!(take_off(&socket, version, deadline).unwrap(), said);
            sending.join().unwrap();
            let mut rest = String::new();
            socket.read_to_string(&mut rest).unwrap();
            assert_eq!(rest, "hello");
        }
    }

    #[test]
    fn what_is_no_header_of_this_version_is_an_error() {
        let take = |version, bytes: &[u8]| {
            let (mut sender, socket) = pair();
            sender.write_all(bytes).unwrap();
            take_off(&socket, version, Instant::now() + Duration::from_millis(50))
                .unwrap_err()
                .kind()
        };
        assert_eq!(take(V1, Header::new(V2, None).as_bytes()), ErrorKind::InvalidData);
        assert_eq!(take(V2, Header::new(V1, None).as_bytes()), ErrorKind::InvalidData);
        assert_eq!(take(V1, b"GET / HTTP/1.1\r\n\r\n"), ErrorKind::InvalidData);
        assert_eq!(take(V1, b"PROXY TCP4 192.0.2.1"), ErrorKind::InvalidData);
        assert_eq!(take(V2, &[b'\r'; 16]), ErrorKind::InvalidData);
        assert_eq!(take(V2, b""), ErrorKind::TimedOut);
        let (sender, socket) = pair();
        drop(sender);
        let deadline = Instant::now() + Duration::from_secs(10);
        assert_eq!(take_off(&socket, V1, deadline).unwrap_err().kind(), ErrorKind::InvalidData);
    }
}
