//! What requests are answered with: JSON, and errors in it.

use axum::{
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::json;

use super::Failure;
use crate::printable;

/// An answer in JSON, in which nothing is obeyed by a terminal that it is printed on.
#[derive(Debug)]
pub(super) struct Json<T>(pub(super) T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        // Maps with keys that are no strings are all that it refuses.
        let text = serde_json::to_string(&self.0).unwrap_or_default();
        let content_type = [(header::CONTENT_TYPE, "application/json")];
        (content_type, printable::json(&text).into_owned()).into_response()
    }
}

/// What went wrong, as `{ "error": "…" }`.
#[derive(Debug)]
pub(super) struct Error(StatusCode, String);

impl Error {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self(status, message.into())
    }

    /// The main thread does not answer any more.
    pub(super) fn gone() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "lbd is stopping")
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let status = match failure {
            Failure::NotFound(_) => StatusCode::NOT_FOUND,
            Failure::Refused(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Failure::Failed(_) => StatusCode::CONFLICT,
        };
        Self(status, failure.to_string())
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}
