//! Unix sockets, to clients and to workers.

mod unix_listen;
mod unix_workers;
