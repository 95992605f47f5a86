//! A worker that answers from memory, in one thread: what a balancer is measured with.
//!
//! `memory_server [PORT]` (else `$PORT`) on 127.0.0.1 answers every request: 106 bytes in all, or
//! 64 MiB where the path begins with `/big`. A request is what ends in an empty line; bodies are not
//! understood.

use std::{env, net::SocketAddr, sync::Arc};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

const BIG: usize = 64 << 20;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let port = env::args().nth(1).or_else(|| env::var("PORT").ok()).ok_or("which port?")?;
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::from(([127, 0, 0, 1], port.parse()?)))?;
    let listener = socket.listen(4096)?;
    let big: Arc<[u8]> = vec![b'x'; BIG].into();
    loop {
        let (stream, _) = listener.accept().await?;
        // A client that leaves early is nobody's fault.
        tokio::spawn(serve(stream, Arc::clone(&big)));
    }
}

async fn serve(mut stream: TcpStream, big: Arc<[u8]>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
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
