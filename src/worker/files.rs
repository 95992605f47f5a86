//! Builds the answers: [`ServeDir`] over [`Root`], plus what HTTP requires beyond it.
//!
//! Every future here is ready on its first poll, because [`Root`] reads inline. So a thread without
//! a runtime can use them too.

use std::{env, io, path::Path};

use http_body_util::{Either, Full};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::{Body as _, Bytes},
    header::{
        CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderValue, IF_RANGE, LAST_MODIFIED, LOCATION, RANGE,
        SERVER,
    },
};
use tower_http::services::{
    ServeDir,
    fs::{DefaultServeDirFallback, ServeFileSystemResponseBody},
};

use super::root::Root;

/// An answer's body: a file's content, or a short text.
pub(super) type Body = Either<ServeFileSystemResponseBody, Full<Bytes>>;

/// The files of one root, and the name that each answer carries.
#[derive(Debug, Clone)]
pub(super) struct Files {
    serve: ServeDir<DefaultServeDirFallback, Root>,
    server: HeaderValue,
    served_by: HeaderValue,
}

impl Files {
    /// Serves `root`. The header `X-Served-By:` is `served_by` if given; else `SERVICE/PORT`, with
    /// the service from `LBD_SERVICE` in the environment, or `lbd`. Without a port, `LBD_SLOT`
    /// takes its position.
    ///
    /// # Errors
    ///
    /// Where `root` is not a folder that may be read.
    pub(super) fn new(root: &Path, served_by: Option<&str>, port: Option<u16>) -> io::Result<Self> {
        let given = served_by.and_then(|name| HeaderValue::from_str(name).ok());
        let service = env::var("LBD_SERVICE").unwrap_or_default();
        let slot = || env::var("LBD_SLOT").unwrap_or_default();
        let worker = port.map_or_else(slot, |port| port.to_string());
        let served_by = |service: &str| HeaderValue::from_str(&format!("{service}/{worker}")).ok();
        Ok(Self {
            serve: ServeDir::with_backend("", Root::open(root)?).ignore_multi_range_requests(true),
            server: HeaderValue::from_static(concat!("lbd/", env!("CARGO_PKG_VERSION"))),
            served_by: given
                .or_else(|| served_by(&service).filter(|_| !service.is_empty()))
                .or_else(|| served_by("lbd"))
                .unwrap_or(HeaderValue::from_static("lbd")),
        })
    }

    /// The answer to `request`, whose body is ignored. Never an error. For a HEAD request, the
    /// transport must leave out the answer's body.
    pub(super) async fn answer(&self, request: Request<()>) -> Response<Body> {
        let mut response = self.find(request).await;
        self.sign(&mut response);
        response
    }

    /// The answer to something that is no valid request.
    pub(super) fn refusal(&self, status: StatusCode) -> Response<Body> {
        let mut response = Response::new(Body::Right(Full::default()));
        *response.status_mut() = status;
        explain(&mut response);
        self.sign(&mut response);
        response
    }

    async fn find(&self, mut request: Request<()>) -> Response<Body> {
        if request.uri().path().as_bytes().windows(3).any(names_no_file) {
            return self.refusal(StatusCode::NOT_FOUND);
        }
        if !may_be_partial(&request) {
            request.headers_mut().remove(RANGE);
        }
        let condition = match request.headers().get(RANGE) {
            Some(_) => request.headers_mut().remove(IF_RANGE),
            None => None,
        };
        let response = match condition {
            None => self.serve(request).await,
            Some(condition) => {
                let partial = self.serve(request.clone()).await;
                if matches(&condition, partial.headers()) {
                    partial
                } else {
                    request.headers_mut().remove(RANGE);
                    self.serve(request).await
                }
            }
        };
        finish(response)
    }

    async fn serve(&self, request: Request<()>) -> Response<Body> {
        match self.serve.clone().try_call(request).await {
            Ok(response) => response.map(Body::Left),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.refusal(StatusCode::NOT_FOUND)
            }
            Err(error) => {
                tracing::warn!(%error, "a file could not be read");
                self.refusal(StatusCode::SERVICE_UNAVAILABLE)
            }
        }
    }

    fn sign(&self, response: &mut Response<Body>) {
        let headers = response.headers_mut();
        headers.insert(SERVER, self.server.clone());
        headers.insert("x-served-by", self.served_by.clone());
    }
}

/// An encoded slash or NUL. No file name contains either, so decoding it is pointless.
fn names_no_file(encoded: &[u8]) -> bool {
    encoded.eq_ignore_ascii_case(b"%2f") || encoded == b"%00"
}

/// Whether the request's `Range` header counts. RFC 9110, section 14.2, defines it for GET alone,
/// and says to ignore units other than bytes.
fn may_be_partial(request: &Request<()>) -> bool {
    let in_bytes = |range: &HeaderValue| {
        range.as_bytes().get(..6).is_some_and(|unit| unit.eq_ignore_ascii_case(b"bytes="))
    };
    request.method() == Method::GET && request.headers().get(RANGE).is_some_and(in_bytes)
}

/// Whether an `If-Range` condition still holds (RFC 9110, section 13.1.5): it must be exactly the
/// current entity tag or date. A weak tag never matches, because ours are strong.
fn matches(condition: &HeaderValue, current: &HeaderMap) -> bool {
    [ETAG, LAST_MODIFIED].into_iter().any(|validator| current.get(validator) == Some(condition))
}

/// Adds what [`ServeDir`] leaves out: a charset, a text for errors, and a redirect that stays on
/// this host.
fn finish(mut response: Response<Body>) -> Response<Body> {
    let status = response.status();
    if status.is_client_error() || status.is_server_error() {
        explain(&mut response);
    }
    let headers = response.headers_mut();
    if let Some(content) = headers.get_mut(CONTENT_TYPE) {
        add_charset(content);
    }
    if let Some(location) = headers.get_mut(LOCATION)
        && let Ok(path) = location.to_str()
        && path.starts_with("//")
        && let Ok(path) = HeaderValue::try_from(format!("/{}", path.trim_start_matches('/')))
    {
        // A location `//name/` would lead to another host.
        *location = path;
    }
    response
}

/// Fills an empty body with the status in words.
fn explain(response: &mut Response<Body>) {
    if response.body().size_hint().exact().is_some_and(|length| length > 0) {
        return;
    }
    let text = format!("{}\n", response.status());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(text.len()));
    *response.body_mut() = Body::Right(text.into());
}

/// Without a charset, browsers guess. Text on the web is UTF-8.
fn add_charset(content: &mut HeaderValue) {
    match content.as_bytes() {
        b"text/html" => *content = HeaderValue::from_static("text/html; charset=utf-8"),
        other if other.starts_with(b"text/") && !other.contains(&b';') => {
            let value = HeaderValue::from_bytes(&[other, b"; charset=utf-8"].concat());
            if let Ok(value) = value {
                *content = value;
            }
        }
        _ => {}
    }
}
