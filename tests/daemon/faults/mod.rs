//! What happens when…: faults, made on purpose.

mod bytes;
mod crash;
mod impostor;
mod init;
mod limits;
mod output;
mod queue;
mod rollout;
mod sockets;
mod storm;
mod trees;
mod trust;
mod wrappers;
