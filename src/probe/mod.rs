//! One probe of one worker: a bare TCP connect, or a GET and a look at the status.
//!
//! A probe knows nothing of rise, fall or intervals, which are [`control`](crate::control)'s
//! business; it only tells what it saw.

mod http;

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use socket2::Socket;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpSocket, TcpStream, UnixStream},
    time::timeout,
};

use crate::{
    config::{Probe, ProxyProtocol},
    control::ProbeOutcome,
    proxy_protocol::{Ends, Header},
    sockets::{Endpoint, diag::Diag},
};

/// Between two looks whether a connection has been accepted.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// What there is to a probe besides the question.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Manner {
    /// The header that the worker expects on every connection.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// A bare connect passes when the worker has accepted the connection, and not before: where lbd
    /// made the listening socket, the kernel answers whether or not the program ever will. On TCP
    /// alone.
    pub accepted: bool,
}

/// Probes the worker at `endpoint` once, over this socket, which is not connected yet. Takes at most
/// `limit`; dropping the future gives up.
pub async fn run(
    probe: &Probe,
    endpoint: &Endpoint,
    socket: io::Result<Socket>,
    manner: Manner,
    limit: Duration,
) -> ProbeOutcome {
    let began = Instant::now();
    let accepted = manner.accepted;
    let result = match timeout(limit, attempt(probe, endpoint, socket, manner)).await {
        Ok(result) => result,
        Err(_) if accepted && *probe == Probe::Tcp => Err(ProbeError::NotAccepted(limit)),
        Err(_) => Err(ProbeError::Timeout(limit)),
    };
    ProbeOutcome { took: began.elapsed(), error: result.err().map(|error| error.to_string()) }
}

/// Why a probe failed.
#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error("cannot connect to {0}: {1}")]
    Connect(String, io::Error),
    #[error("its accept queue is full")]
    Full,
    /// A connect to a port inside the range of ephemeral ports can be given that very port as its
    /// source; TCP's simultaneous open (RFC 9293, 3.5) then connects the socket to itself.
    #[error("nobody listens on {0}: the connection was one to itself")]
    SelfConnect(SocketAddr),
    #[error("cannot send the PROXY header: {0}")]
    Header(io::Error),
    #[error("no answer within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    #[error("a connection is not accepted within {}", humantime::format_duration(*.0))]
    NotAccepted(Duration),
    #[error("GET {path}: {source}")]
    Http { path: String, source: hyper::Error },
    #[error("GET {path}: {reason}")]
    Request { path: String, reason: String },
    #[error("GET {path}: status {status} is not expected")]
    Status { path: String, status: u16 },
}

async fn attempt(
    probe: &Probe,
    endpoint: &Endpoint,
    socket: io::Result<Socket>,
    Manner { proxy_protocol, accepted }: Manner,
) -> Result<(), ProbeError> {
    let failed = |error| ProbeError::Connect(endpoint.to_string(), error);
    let socket = socket.map_err(failed)?;
    let Some(address) = endpoint.inet() else {
        // It is over when it returns, one way or the other (unix(7)).
        endpoint.connect(&socket).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => ProbeError::Full,
            _ => failed(error),
        })?;
        let stream = UnixStream::from_std(socket.into()).map_err(failed)?;
        return ask(probe, stream, "localhost", proxy_protocol, None).await;
    };
    let mut stream = connect(address, socket).await?;
    // What follows a header must not wait until the worker's kernel has acknowledged it.
    stream.set_nodelay(true).map_err(failed)?;
    let ends = Ends {
        client: stream.local_addr().map_err(failed)?,
        server: stream.peer_addr().map_err(failed)?,
    };
    if accepted && *probe == Probe::Tcp {
        introduce(&mut stream, proxy_protocol, Some(ends)).await?;
        return until_accepted(&stream).await.map_err(failed);
    }
    ask(probe, stream, &address.to_string(), proxy_protocol, Some(ends)).await
}

/// Says who it is, where that is expected.
async fn introduce(
    mut stream: impl AsyncWrite + Unpin,
    proxy_protocol: Option<ProxyProtocol>,
    ends: Option<Ends>,
) -> Result<(), ProbeError> {
    let Some(version) = proxy_protocol else { return Ok(()) };
    let header = Header::of_probe(version, ends);
    stream.write_all(header.as_bytes()).await.map_err(ProbeError::Header)
}

/// What is done over a connection, which has these ends.
async fn ask(
    probe: &Probe,
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    address: &str,
    proxy_protocol: Option<ProxyProtocol>,
    ends: Option<Ends>,
) -> Result<(), ProbeError> {
    introduce(&mut stream, proxy_protocol, ends).await?;
    match probe {
        Probe::Tcp => Ok(()),
        Probe::Http { path, host, expect } => {
            let host = host.as_deref().unwrap_or(address);
            let status = http::get(stream, path, host).await?;
            if expect.contains(status) {
                Ok(())
            } else {
                Err(ProbeError::Status { path: path.clone(), status })
            }
        }
    }
}

async fn connect(address: SocketAddr, socket: Socket) -> Result<TcpStream, ProbeError> {
    let failed = |error| ProbeError::Connect(address.to_string(), error);
    let socket = TcpSocket::from_std_stream(socket.into());
    let stream = socket.connect(address).await.map_err(failed)?;
    not_to_itself(stream, address)
}

fn not_to_itself(stream: TcpStream, address: SocketAddr) -> Result<TcpStream, ProbeError> {
    let failed = |error| ProbeError::Connect(address.to_string(), error);
    if stream.local_addr().map_err(failed)? == stream.peer_addr().map_err(failed)? {
        return Err(ProbeError::SelfConnect(address));
    }
    Ok(stream)
}

/// Returns when somebody has accepted the connection. Where the kernel does not tell, that is at
/// once.
async fn until_accepted(stream: &TcpStream) -> io::Result<()> {
    let mut pause = Duration::from_millis(1);
    let look = |diag: &mut Diag| diag.is_accepted(stream.peer_addr()?, stream.local_addr()?);
    let Ok(mut diag) = Diag::open() else { return Ok(()) };
    while let Ok(false) = look(&mut diag) {
        // Whoever speaks or ends it has accepted it, and may have closed it by the next look.
        match timeout(pause, stream.peek(&mut [0])).await {
            Ok(heard) => return heard.map(drop),
            Err(_) => pause = (pause * 2).min(LONGEST_PAUSE),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{Ipv4Addr, TcpListener},
        thread,
    };

    use super::*;
    use crate::config::StatusSet;

    const SECOND: Duration = Duration::from_secs(1);

    fn probe(probe: &Probe, address: SocketAddr, limit: Duration) -> Option<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let endpoint = Endpoint::from(address);
        let manner = Manner::default();
        runtime.block_on(run(probe, &endpoint, endpoint.way_of_a_probe(), manner, limit)).error
    }

    fn http(path: &str) -> Probe {
        Probe::Http { path: path.to_owned(), host: None, expect: StatusSet(vec![(200, 399)]) }
    }

    /// Answers one connection with `answer`, and gives back what was asked.
    fn server(answer: &'static str) -> (SocketAddr, thread::JoinHandle<String>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let asked = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            let mut buffer = [0; 1024];
            while !asked.ends_with(b"\r\n\r\n") {
                let n = stream.read(&mut buffer).unwrap();
                asked.extend_from_slice(&buffer[..n]);
            }
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8(asked).unwrap()
        });
        (address, asked)
    }

    #[test]
    fn tcp_passes_where_somebody_listens_and_fails_where_nobody_does() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(probe(&Probe::Tcp, address, SECOND), None);
        drop(listener);
        assert_eq!(
            probe(&Probe::Tcp, address, SECOND),
            Some(format!("cannot connect to {address}: Connection refused (os error 111)"))
        );
    }

    #[test]
    fn a_connection_that_is_to_be_accepted_fails_until_it_is() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let probe = |limit| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let endpoint = Endpoint::from(address);
            let socket = endpoint.way_of_a_probe();
            let manner = Manner { accepted: true, ..Manner::default() };
            runtime.unwrap().block_on(run(&Probe::Tcp, &endpoint, socket, manner, limit)).error
        };
        let error = "a connection is not accepted within 50ms".to_owned();
        assert_eq!(probe(Duration::from_millis(50)), Some(error));
        thread::spawn(move || while listener.accept().is_ok() {});
        assert_eq!(probe(20 * SECOND), None);
    }

    #[test]
    fn http_sends_path_and_host_and_judges_the_status() {
        let (address, asked) = server("HTTP/1.1 204 No Content\r\n\r\n");
        assert_eq!(probe(&http("/up?deep=1"), address, SECOND), None);
        let asked = asked.join().unwrap().to_ascii_lowercase();
        assert!(asked.starts_with("get /up?deep=1 http/1.1\r\n"), "{asked}");
        assert!(asked.contains(&format!("\r\nhost: {address}\r\n")), "{asked}");

        let (address, _) = server("HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n");
        assert_eq!(
            probe(&http("/up"), address, SECOND),
            Some("GET /up: status 503 is not expected".to_owned())
        );
    }

    #[test]
    fn a_server_that_accepts_but_never_answers_fails_in_time() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let began = Instant::now();
        assert_eq!(
            probe(&http("/"), address, Duration::from_millis(50)),
            Some("no answer within 50ms".to_owned())
        );
        assert!(began.elapsed() < SECOND);
    }

    #[test]
    fn what_is_not_http_fails() {
        let (address, _) = server("220 mail.example ESMTP\r\n");
        let error = probe(&http("/"), address, SECOND).unwrap();
        assert!(error.starts_with("GET /: "), "{error}");
    }

    #[test]
    fn a_connection_to_itself_is_no_pass() {
        // Binding the source port to the target makes happen at once what chance does rarely.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(async {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
            let address = socket.local_addr().unwrap();
            let stream = socket.connect(address).await.unwrap();
            not_to_itself(stream, address).unwrap_err().to_string()
        });
        assert!(error.starts_with("nobody listens on 127.0.0.1:"), "{error}");
    }
}
