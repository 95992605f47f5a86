//! Connections that are passed on as they are: the engine of `route = "proxy"`.

mod connection;
mod engine;
mod relay;

pub(in crate::proxy) use engine::Engine;
