//! Why an address can't be bound, and what would help.

use std::{fs, io, os::unix::fs::FileTypeExt};

use crate::config::Listen;

/// Why an address can't be listened on, in one sentence with what would help.
#[derive(Debug, thiserror::Error)]
#[error("can't listen on {listen}: {cause}{hint}")]
pub struct BindError {
    listen: Listen,
    #[source]
    cause: io::Error,
    hint: String,
}

impl BindError {
    pub(super) fn new(listen: &Listen, cause: io::Error) -> Self {
        Self { hint: hint(listen, &cause), listen: listen.clone(), cause }
    }

    /// Replaces the hint, which is appended to the cause as it is.
    #[must_use]
    pub fn with_hint(self, hint: String) -> Self {
        Self { hint, ..self }
    }

    /// The kind of the system's error.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        self.cause.kind()
    }
}

/// A hint at what would help, to be appended to the cause.
fn hint(listen: &Listen, cause: &io::Error) -> String {
    use io::ErrorKind::{AddrInUse, AddrNotAvailable, PermissionDenied};
    match (listen, cause.kind()) {
        (Listen::Tcp(address), AddrInUse) => {
            let port = address.port();
            let mut hint = format!("; `ss -ltnp 'sport = :{port}'` shows who listens there");
            if is_ephemeral(port) {
                hint += &format!(
                    ", and if nobody does, an outgoing connection has been given this port: \
                     `sysctl net.ipv4.ip_local_reserved_ports={port}` keeps it free"
                );
            }
            hint
        }
        (Listen::Tcp(address), PermissionDenied) => format!(
            "; ports below {} need CAP_NET_BIND_SERVICE (this is {})",
            sysctl("ip_unprivileged_port_start").trim().parse().unwrap_or(1024_u16),
            address.port(),
        ),
        (Listen::Tcp(address), AddrNotAvailable) => {
            format!(
                "; no interface has the address {}: `ip address` shows those there are",
                address.ip()
            )
        }
        (Listen::Unix(path), AddrInUse) => match fs::symlink_metadata(path) {
            Ok(file) if !file.file_type().is_socket() => {
                "; the file there is no socket: remove it or choose another path".into()
            }
            _ => format!("; `ss -lxp src {}` shows who listens there", path.display()),
        },
        (Listen::Unix(path), io::ErrorKind::NotFound) => {
            format!("; its folder {} doesn't exist", path.parent().unwrap_or(path).display())
        }
        _ => String::new(),
    }
}

/// Whether the kernel may assign `port` to an outgoing connection (ip(7), `ip_local_port_range` and
/// the kernel's ip-sysctl on `ip_local_reserved_ports`).
pub(crate) fn is_ephemeral(port: u16) -> bool {
    may_be_given(port, &sysctl("ip_local_port_range"), &sysctl("ip_local_reserved_ports"))
}

fn may_be_given(port: u16, range: &str, reserved: &str) -> bool {
    let mut bounds = range.split_whitespace().map(str::parse::<u16>);
    let (Some(Ok(low)), Some(Ok(high))) = (bounds.next(), bounds.next()) else { return false };
    let is_reserved = reserved.trim().split(',').any(|part| {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        matches!((low.parse(), high.parse()), (Ok(low), Ok(high)) if (low..=high).contains(&port))
    });
    (low..=high).contains(&port) && !is_reserved
}

/// The value of a sysctl; empty if it can't be read.
fn sysctl(name: &str) -> String {
    fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::{config::UnixAccess, net::Listener};

    fn bind(listen: &Listen) -> Result<Listener, BindError> {
        Listener::bind(listen, &UnixAccess::default())
    }

    fn tcp(address: &str) -> Listen {
        Listen::Tcp(address.parse().unwrap())
    }

    #[test]
    fn a_taken_port_names_who_to_look_for() {
        let holder = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = holder.local_addr().unwrap().port();
        let error = bind(&tcp(&format!("127.0.0.1:{port}"))).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("can't listen on 127.0.0.1:{port}: Address already in use"))
        );
        assert!(text.contains(&format!("; `ss -ltnp 'sport = :{port}'` shows who listens there")));
        // Port 0 gave one of the ephemeral range.
        assert!(
            text.ends_with(&format!(
                "`sysctl net.ipv4.ip_local_reserved_ports={port}` keeps it free"
            ))
        );
    }

    #[test]
    fn an_address_of_another_machine_is_explained() {
        let text = bind(&tcp("192.0.2.1:9000")).unwrap_err().to_string();
        assert!(text.contains("no interface has the address 192.0.2.1"), "{text}");
    }

    #[test]
    fn ports_the_system_may_give_away() {
        assert!(may_be_given(44444, "32768\t60999\n", "\n"));
        assert!(!may_be_given(8080, "32768\t60999\n", "\n"));
        assert!(!may_be_given(44444, "32768\t60999\n", "8080,44000-45000\n"));
        assert!(!may_be_given(44444, "32768\t60999\n", "44444\n"));
        assert!(!may_be_given(44444, "", ""));
    }

    #[test]
    fn a_missing_folder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("no/lbd.sock");
        let text = bind(&Listen::Unix(path.clone())).unwrap_err().to_string();
        assert!(
            text.ends_with(&format!(
                "its folder {} doesn't exist",
                path.parent().unwrap().display()
            ))
        );
    }
}
