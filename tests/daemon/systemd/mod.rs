//! `lbd` as a service of systemd.

mod boot;
mod notify;
mod sockets;
mod units;
