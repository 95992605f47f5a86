//! The TCP engine (`route = "proxy"`): it relays connections without looking at their contents.

mod connect;
mod connection;
mod engine;
mod relay;

pub(in crate::proxy) use engine::Engine;
