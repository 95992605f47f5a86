//! The parts of a data thread that do not depend on the engine.

pub(in crate::proxy) mod context;
pub(in crate::proxy) mod deadlines;
pub(in crate::proxy) mod frontend;
pub(in crate::proxy) mod threads;
pub(in crate::proxy) mod token;
