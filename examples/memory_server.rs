//! A worker that answers from memory, in one thread: what a balancer is measured with.
//!
//! `memory_server [PORT] [--reuseport]` listens on that port of 127.0.0.1, or without a port on the
//! socket that was passed to it as descriptor 3, TCP or unix, or else on `$PORT`. It answers every
//! request: 106 bytes in all, or 64 MiB where the path begins with `/big`. A request is what ends in an
//! empty line; bodies are not understood. With `--reuseport` others may listen on the port too.

use std::{
    env,
    net::SocketAddr,
    os::fd::{FromRawFd, OwnedFd},
    sync::Arc,
};

use socket2::Socket;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpSocket, UnixListener},
};

const BIG: usize = 64 << 20;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let big: Arc<[u8]> = vec![b'x'; BIG].into();
    let port = env::args().nth(1);
    if port.is_none() && env::var_os("LISTEN_FDS").is_some() {
        // SAFETY: whoever sets LISTEN_FDS passes a listening socket as descriptor 3
        // (sd_listen_fds(3)), and this is the one place that takes it.
        let socket = Socket::from(unsafe { OwnedFd::from_raw_fd(3) });
        socket.set_nonblocking(true)?;
        if socket.local_addr()?.is_unix() {
            let listener = UnixListener::from_std(socket.into())?;
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(serve(stream, Arc::clone(&big)));
            }
        }
        return accept(TcpListener::from_std(socket.into())?, big).await;
    }
    let port = port.or_else(|| env::var("PORT").ok()).ok_or("which port?")?;
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(env::args().any(|argument| argument == "--reuseport"))?;
    socket.bind(SocketAddr::from(([127, 0, 0, 1], port.parse()?)))?;
    accept(socket.listen(4096)?, big).await
}

async fn accept(listener: TcpListener, big: Arc<[u8]>) -> Result<(), Box<dyn std::error::Error>> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        // A client that leaves early is nobody's fault.
        tokio::spawn(serve(stream, Arc::clone(&big)));
    }
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    big: Arc<[u8]>,
) -> std::io::Result<()> {
    let mut buffer = [0; 4096];
    let mut filled = 0;
    loop {
        let count = stream.read(&mut buffer[filled..]).await?;
        if count == 0 {
            return Ok(());
        }
        filled += count;
        if !buffer[..filled].ends_with(b"\r\n\r\n") {
            continue;
        }
        let request = &buffer[..filled];
        let is_big = request.starts_with(b"GET /big");
        let keeps = !request.windows(8).any(|w| w == b"HTTP/1.0")
            && !request.windows(17).any(|w| w.eq_ignore_ascii_case(b"Connection: close"));
        let (length, connection) =
            (if is_big { BIG } else { 13 }, if keeps { "keep-alive" } else { "close" });
        let mut head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: {connection}\r\nContent-Length: {length}\r\n\r\n"
        )
        .into_bytes();
        if is_big {
            stream.write_all(&head).await?;
            stream.write_all(&big).await?;
        } else {
            head.extend_from_slice(b"Hello, world\n");
            stream.write_all(&head).await?;
        }
        if !keeps {
            return Ok(());
        }
        filled = 0;
    }
}
