//! Steering within the `SO_REUSEPORT` group of a [`Port`](super::Port): an unprivileged classic BPF
//! program (socket(7), `SO_ATTACH_REUSEPORT_CBPF`), which is attached again as a whole whenever its
//! answer changes.
//!
//! The program runs for the SYN of each new connection and returns the index of a socket, in the
//! order in which they joined the group. When a socket leaves, the kernel moves the last one to its
//! index (`reuseport_detach_sock`, net/core/sock_reuseport.c). If an index is out of range, the
//! kernel chooses by a hash of the addresses instead.

use std::{io, net::IpAddr};

use nix::{
    libc::{self, sock_filter, sock_fprog},
    sys::socket::{setsockopt, sockopt::AttachReusePortCbpf},
};
use socket2::Socket;

/// Offsets from here on count from the network header (`SKF_NET_OFF`, linux/filter.h).
pub(super) const NETWORK_HEADER: u32 = libc::SKF_NET_OFF as u32;
/// The length of an IPv6 header (RFC 8200, section 3). Extension headers are not parsed:
/// connections of lbd to itself have none.
const IPV6_HEADER: u32 = 40;

/// Which socket gets a new connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Steering {
    /// The index of the socket that gets it …
    pub(super) default: u32,
    /// … unless it comes from this source port: then this one.
    pub(super) exception: Option<(u16, u32)>,
}

impl Steering {
    /// Puts this in force for the whole group that `member` is in.
    pub(super) fn attach(self, member: &Socket, address: IpAddr) -> io::Result<()> {
        attach(member, &mut self.program(address))
    }

    fn program(self, address: IpAddr) -> Vec<sock_filter> {
        let mut program = Vec::with_capacity(6);
        if let Some((port, index)) = self.exception {
            program.extend(load_source_port(address));
            program.extend([
                // a == port, or skip one
                instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, port.into()),
                instruction(libc::BPF_RET | libc::BPF_K, 0, 0, index),
            ]);
        }
        program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, 0, self.default));
        program
    }
}

/// Attaches `program` to the whole group that `member` is in, replacing the one before.
pub(super) fn attach(member: &Socket, program: &mut [sock_filter]) -> io::Result<()> {
    let length = program.len() as libc::c_ushort;
    let program = sock_fprog { len: length, filter: program.as_mut_ptr() };
    // The kernel copies the program before this returns.
    setsockopt(member, AttachReusePortCbpf, &program)?;
    Ok(())
}

/// a = the source port: the first field of the TCP header (RFC 9293, section 3.1), in a packet of
/// this family.
pub(super) fn load_source_port(family: IpAddr) -> Vec<sock_filter> {
    let load = |code, offset| instruction(code, 0, 0, offset);
    match family {
        IpAddr::V4(_) => vec![
            // x = 4 * the header length in words
            load(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, NETWORK_HEADER),
            // a = the half-word behind it
            load(libc::BPF_LD | libc::BPF_H | libc::BPF_IND, NETWORK_HEADER),
        ],
        IpAddr::V6(_) => vec![load(
            libc::BPF_LD | libc::BPF_H | libc::BPF_ABS,
            NETWORK_HEADER.wrapping_add(IPV6_HEADER),
        )],
    }
}

/// One instruction (linux/filter.h).
pub(super) fn instruction(code: u32, jump_true: u8, jump_false: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: jump_true, jf: jump_false, k }
}
