//! What requests are answered with: JSON, and errors in it.

use axum::{
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use serde_json::json;

use super::Failure;
use crate::printable;

/// A JSON answer without characters that a terminal would obey.
#[derive(Debug)]
pub(super) struct Json<T>(pub(super) T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        // Fails only for maps whose keys are not strings, which there are none of.
        let text = serde_json::to_string(&self.0).unwrap_or_default();
        let content_type = [(header::CONTENT_TYPE, "application/json")];
        (content_type, printable::json(&text).into_owned()).into_response()
    }
}

/// An error, as `{ "error": "…" }`.
#[derive(Debug)]
pub(super) struct Error(StatusCode, String);

impl Error {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self(status, message.into())
    }

    /// The main thread no longer answers.
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
