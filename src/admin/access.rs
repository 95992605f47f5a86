//! Access control: which requests are allowed.
//!
//! | | over the unix socket | over TCP |
//! | --- | --- | --- |
//! | GET | whoever can open it | from this machine itself, or with the token |
//! | POST | the same, and no web page | with the token, and no web page |
//!
//! A web page in a browser must not be able to operate a daemon that the browser's user can reach:
//! neither by posting a form (CSRF, recognised by `Origin`), nor under a host name of its own that
//! resolves to this machine (DNS rebinding, recognised by `Host`). Nor may a page use up the event
//! streams by fetching what it can't read (recognised by `Sec-Fetch-Site`).
//!
//! The dashboard page itself contains no data of the daemon. So a client that is only lacking the
//! token gets the page, with status 401, and the page asks for the token.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    body::{Body, to_bytes},
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::{
    answer::Error,
    caller::{Changes, Via},
    connections::Presence,
    dashboard,
};
use crate::config::Token;

/// The largest request body, in bytes. No request needs one.
const MAX_BODY: usize = 4 * 1024;
/// How long a body may take to come.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the answer to a wrong token is delayed, which makes guessing hopeless.
const WRONG_TOKEN_DELAY: Duration = Duration::from_millis(250);

/// This many wrong tokens get a log line each …
const UNFOLDED: u32 = 10;
/// … within this time; further ones are only counted.
const WINDOW: Duration = Duration::from_secs(60);

/// The token in force, if there is one. A reload may change it.
pub type CurrentToken = watch::Receiver<Option<Token>>;

/// What [`admit`] decides from. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Gate {
    token: CurrentToken,
    wrong: Arc<Mutex<WrongTokens>>,
}

/// How many wrong tokens came recently.
#[derive(Debug, Default)]
struct WrongTokens {
    /// When the window began.
    began: Option<Instant>,
    /// Lines that were logged in the window.
    written: u32,
    /// Wrong tokens that were not logged since the last line.
    folded: u32,
}

impl Gate {
    pub(super) fn new(token: CurrentToken) -> Self {
        Self { token, wrong: Arc::default() }
    }

    /// Logs that a client has tried a wrong token.
    fn tell_wrong(&self, via: Via) {
        let Via::Tcp { peer: client, .. } = via else { return };
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(folded) = wrong.count(Instant::now()) {
            let folded = (folded > 0).then_some(folded);
            tracing::warn!(%client, folded, "a wrong admin token");
        }
    }
}

impl WrongTokens {
    /// Counts one more wrong token. Returns how many unlogged ones its log line stands for besides
    /// itself, or `None` if it is not logged.
    fn count(&mut self, now: Instant) -> Option<u32> {
        if self.began.is_none_or(|began| now >= began + WINDOW) {
            (self.began, self.written) = (Some(now), 0);
        }
        if self.written == UNFOLDED {
            self.folded = self.folded.saturating_add(1);
            return None;
        }
        self.written += 1;
        Some(std::mem::take(&mut self.folded))
    }
}

/// Middleware that refuses what the client may not do, and limits the size of the body.
pub(super) async fn admit(State(gate): State<Gate>, request: Request, next: Next) -> Response {
    // The code that accepted the connection sets `Via`. Without it nothing is allowed.
    let Some(&via) = request.extensions().get::<Via>() else {
        return Error::new(StatusCode::FORBIDDEN, "nobody knows who asks").into_response();
    };
    let changes = !request.method().is_safe();
    let (verdict, may) = {
        let token = gate.token.borrow();
        let verdict = judge(via, changes, request.headers(), token.as_ref());
        (verdict, Changes::of(via, token.as_ref()))
    };
    if let Err(denied) = verdict {
        if denied == Denied::WrongToken {
            gate.tell_wrong(via);
            sleep(WRONG_TOKEN_DELAY).await;
        }
        let is_page = request.method() == Method::GET && request.uri().path() == dashboard::PATH;
        if denied == Denied::MissingToken && is_page {
            return denied.with_body(dashboard::page().await);
        }
        return denied.into_response();
    }
    let (mut head, body) = request.into_parts();
    head.extensions.insert(may);
    match timeout(BODY_TIMEOUT, to_bytes(body, MAX_BODY)).await {
        Ok(Ok(bytes)) => {
            if let Some(presence) = head.extensions.get::<Presence>() {
                presence.acts();
            }
            next.run(Request::from_parts(head, Body::from(bytes))).await
        }
        Ok(Err(_)) => {
            let message = format!("the body has more than {MAX_BODY} bytes");
            Error::new(StatusCode::PAYLOAD_TOO_LARGE, message).into_response()
        }
        Err(_) => {
            Error::new(StatusCode::REQUEST_TIMEOUT, "the body takes too long").into_response()
        }
    }
}

/// Adds headers that stop browsers from guessing the content type, and from giving the answer to
/// other sites' pages.
pub(super) async fn seal(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Denied {
    /// The request seems to come from another site's web page.
    Foreign,
    /// A token is required, but none is configured.
    NoToken {
        /// The request would change something, not only read.
        change: bool,
    },
    /// A token is required, and the request has none.
    MissingToken,
    /// The request has a wrong token.
    WrongToken,
}

/// Decides whether a request with these `headers` is allowed. `changes` is true if it would change
/// something.
fn judge(
    via: Via,
    changes: bool,
    headers: &HeaderMap,
    token: Option<&Token>,
) -> Result<(), Denied> {
    if changes && !is_local(headers, via) || is_another_pages(headers, changes) {
        return Err(Denied::Foreign);
    }
    // Clients need not send a Host, but browsers always do.
    let misled = |named: bool| match named && !is_local(headers, via) {
        true => Err(Denied::Foreign),
        false => Ok(()),
    };
    let Via::Tcp { peer, .. } = via else {
        // A unix socket has no port. A Host with a port comes from a browser over a forwarded port.
        let host = text(headers, "host").and_then(|host| host.parse::<Authority>().ok());
        return misled(host.is_some_and(|host| host.port().is_some()));
    };
    match (bearer(headers), token) {
        (Some(given), Some(token)) if token.is(given) => Ok(()),
        (Some(_), Some(_)) => Err(Denied::WrongToken),
        (None, Some(_)) if changes => Err(Denied::MissingToken),
        (_, None) if changes => Err(Denied::NoToken { change: true }),
        // A browser on this machine may show anybody's page.
        _ if peer.ip().to_canonical().is_loopback() => misled(headers.contains_key(header::HOST)),
        (_, Some(_)) => Err(Denied::MissingToken),
        (_, None) => Err(Denied::NoToken { change: false }),
    }
}

/// Whether the request was made to this machine, and not by a page of another host: a page whose
/// name resolves to this machine, or a page that makes its visitors post here.
fn is_local(headers: &HeaderMap, via: Via) -> bool {
    let Some(host) = text(headers, "host") else { return false };
    let by_name = || {
        host.parse::<Authority>()
            .is_ok_and(|host| ["localhost", "lbd", "127.0.0.1", "[::1]"].contains(&host.host()))
    };
    // A client omits the port if it is HTTP's default.
    let by_address = || match via {
        Via::Unix => false,
        Via::Tcp { local, .. } => {
            let host = host.parse().or_else(|_| format!("{host}:80").parse());
            host.is_ok_and(|host: SocketAddr| host == local)
        }
    };
    let same = text(headers, "origin")
        .is_none_or(|origin| origin.split_once("://").is_some_and(|(_, origin)| origin == host));
    same && (by_name() || by_address())
}

/// Whether the browser says that another site's page caused the request (W3C, Fetch Metadata), and
/// not the user by following a link.
fn is_another_pages(headers: &HeaderMap, changes: bool) -> bool {
    let site = text(headers, "sec-fetch-site");
    let follows = !changes && text(headers, "sec-fetch-dest") == Some("document");
    site.is_some_and(|site| !["same-origin", "none"].contains(&site)) && !follows
}

/// A header's value; empty if it is not valid text.
fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).map(|value| value.to_str().unwrap_or_default())
}

/// The token in the request (RFC 6750, 2.1).
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    // With two headers it is unclear which one counts, so neither does.
    let (first, None) = (values.next()?, values.next()) else { return Some("") };
    let (scheme, token) = first.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim_ascii())
}

impl Denied {
    /// The refusal with this `body` instead of the reason in JSON.
    fn with_body(self, body: Response) -> Response {
        let mut response = self.into_response();
        let (head, body) = body.into_parts();
        response.headers_mut().remove(header::CONTENT_LENGTH);
        response.headers_mut().extend(head.headers);
        *response.body_mut() = body;
        response
    }
}

impl IntoResponse for Denied {
    fn into_response(self) -> Response {
        let (status, message, challenge) = match self {
            Self::Foreign => (
                StatusCode::FORBIDDEN,
                "asked on behalf of another host; expected Host: localhost or the address itself",
                None,
            ),
            Self::NoToken { change: true } => (
                StatusCode::FORBIDDEN,
                "nothing can be changed over TCP without a token, and [admin] token-file is not set",
                None,
            ),
            Self::NoToken { change: false } => (
                StatusCode::FORBIDDEN,
                "other machines need a token to look, and [admin] token-file is not set",
                None,
            ),
            Self::MissingToken => (
                StatusCode::UNAUTHORIZED,
                "expected the header Authorization: Bearer TOKEN, with the token of [admin] token-file",
                Some("Bearer realm=\"lbd\""),
            ),
            Self::WrongToken => (
                StatusCode::UNAUTHORIZED,
                "this is not the token of [admin] token-file",
                Some("Bearer realm=\"lbd\", error=\"invalid_token\""),
            ),
        };
        let mut response = Error::new(status, message).into_response();
        let headers = response.headers_mut();
        // Don't let a refused client keep its connection either.
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        if let Some(challenge) = challenge {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderName;

    use std::slice::from_ref;

    use super::*;

    const UNIX: Via = Via::Unix;

    fn tcp(local: &str, peer: &str) -> Via {
        Via::Tcp { local: local.parse().unwrap(), peer: peer.parse().unwrap() }
    }

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn wrong_tokens_are_told_ten_times_a_minute_and_counted_then() {
        let (mut wrong, began) = (WrongTokens::default(), Instant::now());
        for _ in 0..10 {
            assert_eq!(wrong.count(began), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(wrong.count(began + WINDOW / 2), None);
        }
        assert_eq!(wrong.count(began + WINDOW), Some(1000));
        assert_eq!(wrong.count(began + WINDOW), Some(0));
    }

    #[test]
    fn only_this_machine_may_ask_for_a_change() {
        let local = |host: Option<&str>, origin: Option<&str>| {
            let host = host.map(|host| (header::HOST, host));
            let origin = origin.map(|origin| (header::ORIGIN, origin));
            let pairs: Vec<_> = host.into_iter().chain(origin).collect();
            judge(UNIX, true, &headers(&pairs), None) == Ok(())
        };
        for host in ["localhost", "lbd", "127.0.0.1:9000", "[::1]:9000", "localhost:80"] {
            assert!(local(Some(host), None), "{host}");
            assert!(local(Some(host), Some(&format!("http://{host}"))), "{host}");
            assert!(!local(Some(host), Some("http://example.org")), "{host}");
            assert!(!local(Some(host), Some("null")), "{host}");
        }
        for host in [
            "example.org",
            "localhost.example.org",
            "127.0.0.1.nip.io",
            "",
            "a@b@c",
            "::1",
            "10.0.0.1",
        ] {
            assert!(!local(Some(host), None), "{host}");
        }
        assert!(!local(Some("localhost:80"), Some("http://localhost:81")), "another port");
        assert!(!local(None, None));
        assert_eq!(judge(UNIX, false, &HeaderMap::new(), None), Ok(()), "to look is no change");
    }

    #[test]
    fn over_a_forwarded_port_no_other_name_leads_to_the_socket() {
        let look = |host: &str| judge(UNIX, false, &headers(&[(header::HOST, host)]), None);
        for host in ["localhost:9000", "127.0.0.1:9000", "[::1]:9000", "localhost", "anything"] {
            assert_eq!(look(host), Ok(()), "{host}");
        }
        assert_eq!(look("example.org:9000"), Err(Denied::Foreign));
    }

    #[test]
    fn what_another_page_embeds_is_not_answered() {
        let near = tcp("127.0.0.1:9000", "127.0.0.1:5");
        let fetched = |via, changes, site: &str, dest: &str| {
            let pairs = [
                (header::HOST, "127.0.0.1:9000"),
                (HeaderName::from_static("sec-fetch-site"), site),
                (HeaderName::from_static("sec-fetch-dest"), dest),
            ];
            judge(via, changes, &headers(&pairs), None)
        };
        for via in [UNIX, near] {
            for site in ["cross-site", "same-site"] {
                for dest in ["empty", "image", "iframe"] {
                    assert_eq!(fetched(via, false, site, dest), Err(Denied::Foreign), "{dest}");
                }
                assert_eq!(fetched(via, false, site, "document"), Ok(()), "a link to it");
                assert_eq!(fetched(via, true, site, "document"), Err(Denied::Foreign), "a form");
            }
            for site in ["same-origin", "none"] {
                assert_eq!(fetched(via, false, site, "empty"), Ok(()));
            }
        }
        assert_eq!(fetched(UNIX, true, "same-origin", "empty"), Ok(()));
    }

    #[test]
    fn the_address_that_was_connected_to_is_a_good_host() {
        let host = |local: &str, host: &str| {
            is_local(&headers(&[(header::HOST, host)]), tcp(local, "10.0.0.9:1"))
        };
        assert!(host("10.0.0.1:9000", "10.0.0.1:9000") && host("[fd00::1]:9000", "[fd00::1]:9000"));
        assert!(host("10.0.0.1:80", "10.0.0.1") && host("[fd00::1]:80", "[fd00::1]"));
        assert!(!host("10.0.0.1:9000", "10.0.0.1:9001") && !host("10.0.0.1:9000", "10.0.0.1"));
        assert!(!host("10.0.0.1:9000", "10.0.0.2:9000"));
    }

    #[test]
    fn the_token_decides_over_tcp() {
        use Denied::{Foreign, MissingToken, NoToken, WrongToken};
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, "s3cret").unwrap();
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&file, private).unwrap();
        let token = Token::read(&file).unwrap();
        let near = tcp("127.0.0.1:9000", "127.0.0.1:5");
        let near6 = tcp("[::1]:9000", "[::1]:5");
        let far = tcp("10.0.0.1:9000", "10.0.0.9:5");
        let good = (header::AUTHORIZATION, "Bearer s3cret");
        let lower = (header::AUTHORIZATION, "bearer  s3cret ");
        let wrong = (header::AUTHORIZATION, "Bearer s3cre");
        let basic = (header::AUTHORIZATION, "Basic s3cret");
        let own = (header::HOST, "127.0.0.1:9000");
        let far_host = (header::HOST, "10.0.0.1:9000");
        let evil = (header::HOST, "example.org");
        let page = (header::ORIGIN, "http://example.org");
        type Pairs<'a> = &'a [(HeaderName, &'static str)];
        let to_look: [(Via, Pairs<'_>, bool, Result<(), Denied>); 17] = [
            (near, from_ref(&own), false, Ok(())),
            (near, from_ref(&own), true, Ok(())),
            (near6, from_ref(&own), true, Ok(())),
            (near, &[], true, Ok(())),
            (near, from_ref(&evil), true, Err(Foreign)),
            (near, &[own.clone(), page.clone()], true, Err(Foreign)),
            (near, &[evil.clone(), good.clone()], true, Ok(())),
            (near, &[own.clone(), wrong.clone()], true, Err(WrongToken)),
            (near, &[own.clone(), wrong.clone()], false, Ok(())),
            (near, &[own.clone(), basic.clone()], true, Ok(())),
            (far, from_ref(&far_host), false, Err(NoToken { change: false })),
            (far, from_ref(&far_host), true, Err(MissingToken)),
            (far, &[far_host.clone(), basic.clone()], true, Err(MissingToken)),
            (far, &[far_host.clone(), wrong.clone()], true, Err(WrongToken)),
            (far, &[far_host.clone(), lower.clone()], true, Ok(())),
            (far, &[far_host.clone(), good.clone(), good.clone()], true, Err(WrongToken)),
            (far, from_ref(&good), false, Err(NoToken { change: false })),
        ];
        for (via, pairs, set, expected) in to_look {
            let found = judge(via, false, &headers(pairs), set.then_some(&token));
            assert_eq!(found, expected, "GET {via:?} {pairs:?} {set}");
        }
        let to_change: [(Via, Pairs<'_>, bool, Result<(), Denied>); 11] = [
            (near, from_ref(&own), false, Err(NoToken { change: true })),
            (near, &[own.clone(), good.clone()], false, Err(NoToken { change: true })),
            (near, from_ref(&own), true, Err(MissingToken)),
            (near, &[own.clone(), wrong.clone()], true, Err(WrongToken)),
            (near, &[own.clone(), good.clone()], true, Ok(())),
            (near6, &[own.clone(), good.clone()], true, Ok(())),
            (near, from_ref(&good), true, Err(Foreign)),
            (near, &[evil.clone(), good.clone()], true, Err(Foreign)),
            (near, &[own.clone(), page.clone(), good.clone()], true, Err(Foreign)),
            (far, &[far_host.clone(), good.clone()], true, Ok(())),
            (far, &[own.clone(), basic.clone()], true, Err(MissingToken)),
        ];
        for (via, pairs, set, expected) in to_change {
            let found = judge(via, true, &headers(pairs), set.then_some(&token));
            assert_eq!(found, expected, "POST {via:?} {pairs:?} {set}");
        }
    }
}
