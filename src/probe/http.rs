//! The GET of an HTTP probe.

use http_body_util::Empty;
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::ProbeError;

/// Sends one GET for `path` and gives back the status of the answer; the body is not read.
pub(super) async fn get(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    path: &str,
    host: &str,
) -> Result<u16, ProbeError> {
    let failed = |source| ProbeError::Http { path: path.to_owned(), source };
    let request = Request::get(path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, concat!("lbd/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| ProbeError::Request {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    let mut answer = std::pin::pin!(sender.send_request(request));
    let mut connection = std::pin::pin!(connection);
    // The connection only moves while it is polled; it must not end the wait by finishing first.
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        result = &mut connection => match result {
            Ok(()) => answer.await,
            Err(error) => Err(error),
        },
    };
    answer.map(|answer| answer.status().as_u16()).map_err(failed)
}
