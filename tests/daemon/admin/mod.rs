//! How a running daemon is watched and operated.

mod dashboard;
mod events;
mod socket;
mod tcp;
mod verbs;
