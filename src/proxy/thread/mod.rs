//! What a data thread is made of, whatever engine drives its connections.

pub(in crate::proxy) mod context;
pub(in crate::proxy) mod deadlines;
pub(in crate::proxy) mod frontend;
pub(in crate::proxy) mod threads;
pub(in crate::proxy) mod token;
