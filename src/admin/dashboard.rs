//! `GET /`: the dashboard, a single page that uses nothing but `/events`.
//!
//! The page shows data as text and never as markup. Its Content-Security-Policy is as strict as
//! possible: only the style and script in this file, identified by a nonce; connections only to its
//! own origin; no frames; and no conversion of strings to markup (Trusted Types).

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{Html, IntoResponse, Response},
};

use super::answer::Error;

/// The path of the page.
pub(super) const PATH: &str = "/";
/// The page. `{nonce}` marks where the nonce goes.
const PAGE: &str = include_str!("dashboard.html");

/// The page, with a fresh nonce.
pub(super) async fn page() -> Response {
    let Some(nonce) = nonce() else {
        let message = "the system has no random numbers";
        return Error::new(StatusCode::SERVICE_UNAVAILABLE, message).into_response();
    };
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
         connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    );
    let mut response = Html(PAGE.replace("{nonce}", &nonce)).into_response();
    let headers = response.headers_mut();
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    // For browsers that don't know frame-ancestors.
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// 128 random bits in hexadecimal, as CSP (level 3, 7.1) wants them.
fn nonce() -> Option<String> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).ok()?;
    Some(format!("{:032x}", u128::from_ne_bytes(random)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_page_has_a_nonce_of_its_own_in_all_places() {
        let mut seen = Vec::new();
        for _ in 0..2 {
            let response = page().await;
            let policy = response.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
            let (_, nonce) = policy.split_once("script-src 'nonce-").unwrap();
            let nonce = nonce[..32].to_owned();
            assert!(policy.contains(&format!("style-src 'nonce-{nonce}'")));
            let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
            let body = String::from_utf8(body.to_vec()).unwrap();
            assert_eq!(body.matches(&format!(" nonce=\"{nonce}\"")).count(), 2);
            assert!(!seen.contains(&nonce));
            seen.push(nonce);
        }
    }

    #[test]
    fn nothing_is_fetched_from_elsewhere() {
        let markup = PAGE.replace("http://www.w3.org/2000/svg", "");
        assert!(!markup.contains("://") && !markup.contains("src=") && !markup.contains("url("));
    }
}
