//! Socket options that neither nix nor socket2 has, defined with nix's macros.

use nix::{getsockopt_impl, libc, setsockopt_impl, sockopt_impl};

sockopt_impl!(
    /// `SO_ATTACH_REUSEPORT_EBPF` (socket(7)): the descriptor of a program that steers the group.
    AttachReusePortEbpf,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_ATTACH_REUSEPORT_EBPF,
    i32
);

sockopt_impl!(
    /// `SO_DETACH_REUSEPORT_BPF` (socket(7)), whatever the value is.
    DetachReusePortBpf,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_DETACH_REUSEPORT_BPF,
    i32
);

sockopt_impl!(
    /// `TCP_INFO` (tcp(7)).
    TcpInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    libc::tcp_info
);

#[cfg(test)]
sockopt_impl!(
    /// `SO_LOCK_FILTER` (socket(7)).
    LockFilter,
    Both,
    libc::SOL_SOCKET,
    libc::SO_LOCK_FILTER,
    bool
);

#[cfg(test)]
sockopt_impl!(
    /// `TCP_DEFER_ACCEPT` (tcp(7)), in seconds.
    TcpDeferAccept,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_DEFER_ACCEPT,
    i32
);
