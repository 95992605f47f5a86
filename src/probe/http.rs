//! The GET of an HTTP probe, and the part of the response that tells the status.

use std::io;

/// The size of one read.
pub(super) const BUFFER: usize = 16 * 1024;

/// The most bytes of a response's head together with all interim responses (RFC 9110, 15.2) before
/// it.
const MOST: usize = 256 * 1024;

/// The most fields in a head.
const FIELDS: usize = 128;

/// How many bytes of a response that is not HTTP are shown.
const SHOWN: usize = 40;

/// The text of a GET for `path`.
pub(super) fn request(path: &str, host: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "GET {path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: lbd/{version}\r\n\
         accept: */*\r\nconnection: close\r\n\r\n"
    )
}

/// Why a probe got no status.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoAnswer {
    #[error("{0}")]
    Broken(io::Error),
    #[error(
        "it closed the connection without an answer; if it speaks TLS or another protocol, remove \
         health.http: a bare connection does not care"
    )]
    Nothing,
    #[error("it closed the connection before the head of its answer was complete")]
    Cut,
    #[error("its answer has no end: interim answers, or a head, of more than {MOST} bytes")]
    Endless,
    #[error(
        "it answers in TLS: remove health.http, since a bare connection does not care, or have it \
         speak plain HTTP to lbd"
    )]
    Tls,
    #[error(
        "it answers in HTTP/2 without being asked to (gRPC?): remove health.http, since a bare \
         connection does not care"
    )]
    Http2,
    #[error("it answered what is not HTTP: {0:?}; is that the right port, and protocol?")]
    Foreign(String),
}

/// What has arrived of a response.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// The bytes that have not been parsed yet.
    bytes: Vec<u8>,
    /// How many bytes have arrived in all.
    total: usize,
    /// How many bytes of the body are still to come, once the head is complete and if it says so.
    left: Option<usize>,
}

impl Reading {
    /// Adds the next bytes.
    pub(super) fn add(&mut self, piece: &[u8]) -> Result<(), NoAnswer> {
        self.total += piece.len();
        self.bytes.extend_from_slice(piece);
        if self.total > MOST { Err(NoAnswer::Endless) } else { Ok(()) }
    }

    /// The status of the final response, once its head is complete.
    pub(super) fn status(&mut self) -> Result<Option<u16>, NoAnswer> {
        loop {
            let mut fields = [httparse::EMPTY_HEADER; FIELDS];
            let mut response = httparse::Response::new(&mut fields);
            match response.parse(&self.bytes) {
                Ok(httparse::Status::Partial) => return Ok(None),
                Ok(httparse::Status::Complete(head)) => {
                    let status = response.code.unwrap_or_default();
                    // 101 is a final response: no other follows it on the connection.
                    if (100..200).contains(&status) && status != 101 {
                        self.bytes.drain(..head);
                        continue;
                    }
                    let length = response
                        .headers
                        .iter()
                        .find(|field| field.name.eq_ignore_ascii_case("content-length"))
                        .and_then(|field| str::from_utf8(field.value).ok()?.trim().parse().ok());
                    let here = self.bytes.len() - head;
                    self.left = length.map(|length: usize| length.saturating_sub(here));
                    return Ok(Some(status));
                }
                Err(_) => return Err(foreign(&self.bytes)),
            }
        }
    }

    /// The error for a connection that has ended now.
    pub(super) fn ended(&self) -> NoAnswer {
        if self.total == 0 { NoAnswer::Nothing } else { NoAnswer::Cut }
    }

    /// How many bytes of the response are still to be read, if that is known.
    pub(super) fn left(&self) -> Option<usize> {
        self.left
    }
}

/// The error for a response that is not HTTP/1.
fn foreign(bytes: &[u8]) -> NoAnswer {
    match bytes {
        // A record of TLS: an alert or a handshake message, of version 3.x (RFC 8446, 5.1).
        [0x15 | 0x16, 0x03, ..] => NoAnswer::Tls,
        // A SETTINGS or GOAWAY frame of the stream 0, with which a server begins (RFC 9113, 3.4, 4.1).
        [_, _, _, 0x04 | 0x07, _, 0, 0, 0, 0, ..] => NoAnswer::Http2,
        _ => {
            let shown = &bytes[..bytes.len().min(SHOWN)];
            NoAnswer::Foreign(String::from_utf8_lossy(shown).trim_end().to_owned())
        }
    }
}
