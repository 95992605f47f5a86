//! Prepares the balancer of the comparison: its configuration and address.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use socket2::{Domain, Socket, Type};

use super::BenchError;
use crate::config::{self, Listen, Output, Program, Service, Slots};

/// How to start the balancer.
#[derive(Debug)]
pub(super) struct Plan {
    service: Service,
    /// The folder that both contenders serve, absolute.
    pub(super) root: PathBuf,
    /// The configuration: the user's file with changes for the comparison.
    pub(super) text: String,
    /// The balancer's address.
    pub(super) address: SocketAddr,
    /// Reserves a free port until the balancer listens on it.
    _reserved: Option<Reserved>,
}

impl Plan {
    /// Uses the first service with a `root` in the configuration `file`, unchanged except for its
    /// log and, without `configured_ports`, its addresses. Blocks on the file system.
    ///
    /// # Errors
    ///
    /// If the file is invalid or has no such service.
    pub(super) fn read(file: &Path, configured_ports: bool) -> Result<Self, BenchError> {
        let config = config::read(file)?;
        let unfit = |why| BenchError::Unfit { file: file.to_owned(), why };
        let found = config.services.into_iter().find_map(|service| match &service.worker.program {
            Program::Root(root) => Some((root.clone(), service)),
            Program::Command(_) => None,
        });
        let (root, mut service) = found.ok_or_else(|| {
            unfit("no service with `root`, whose files the threaded server could serve too")
        })?;
        let (address, reserved) = if configured_ports {
            let address = service.listen.iter().find_map(|listen| match listen {
                Listen::Tcp(address) => Some(reachable(*address)),
                Listen::Unix(_) => None,
            });
            let none = "the first service with `root` listens on no IP address";
            (address.ok_or_else(|| unfit(none))?, None)
        } else {
            let reserved = Reserved::take()?;
            service.listen = vec![Listen::Tcp(reserved.address)];
            service.slots = Slots::Count(count(&service.slots));
            (reserved.address, Some(reserved))
        };
        let text = fs::read_to_string(file)?;
        let text = configuration(&text, &service, &root).map_err(unfit)?;
        Ok(Self { service, root, text, address, _reserved: reserved })
    }

    /// The number of the balancer's workers.
    pub(super) fn workers(&self) -> usize {
        self.service.slots.count()
    }

    /// `4 async workers behind the balancer`
    pub(super) fn balanced_name(&self) -> String {
        match self.workers() {
            1 => "1 async worker behind the balancer".to_owned(),
            count => format!("{count} async workers behind the balancer"),
        }
    }
}

/// The user's file, reduced to `service`, with the new addresses and with absolute paths.
fn configuration(text: &str, service: &Service, root: &Path) -> Result<String, &'static str> {
    const READ: &str = "it changed while it was read";
    let text_of = |path: &Path| match path.to_str() {
        Some(path) => Ok(path.to_owned()),
        None => Err("its folder's name is not UTF-8"),
    };
    let mut document: toml::Table = text.parse().map_err(|_| READ)?;
    let services = document.remove("service").and_then(|services| match services {
        toml::Value::Table(mut services) => services.remove(&*service.name),
        _ => None,
    });
    let Some(toml::Value::Table(mut keys)) = services else { return Err(READ) };
    keys.insert("root".to_owned(), text_of(root)?.into());
    keys.insert("directory".to_owned(), text_of(&service.worker.directory)?.into());
    if let Output::File(path) = &service.worker.output {
        keys.insert("output".to_owned(), text_of(path)?.into());
    }
    let listen: Vec<_> = service.listen.iter().map(ToString::to_string).collect();
    keys.insert("listen".to_owned(), listen.into());
    if let Slots::Count(count) = service.slots {
        keys.remove("ports");
        keys.insert("workers".to_owned(), i64::from(count.get()).into());
    }
    // The threaded server does not log connections either.
    let log = toml::Table::from_iter([("access".to_owned(), false.into())]);
    let services = toml::Table::from_iter([(service.name.to_string(), keys.into())]);
    let document = [("log".to_owned(), log.into()), ("service".to_owned(), services.into())];
    Ok(toml::Table::from_iter(document).to_string())
}

/// The configured number of workers.
fn count(slots: &Slots) -> NonZeroU32 {
    match slots {
        Slots::Ports(ports) => {
            let count = u32::try_from(ports.len()).ok().and_then(NonZeroU32::new);
            count.unwrap_or(NonZeroU32::MIN)
        }
        Slots::Count(count) => *count,
    }
}

/// The address at which to reach, from here, a listener that may be on all addresses.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => return other,
    };
    SocketAddr::new(ip, address.port())
}

/// Reserves a free port of 127.0.0.1. While it is bound, the kernel gives it to nobody who asks for
/// any port. But a process that names the port and sets `SO_REUSEADDR`, as this one does, may bind
/// it and listen, because this socket never listens (socket(7)).
#[derive(Debug)]
pub(super) struct Reserved {
    pub(super) address: SocketAddr,
    _socket: Socket,
}

impl Reserved {
    pub(super) fn take() -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.cloexec(), None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        let address = socket.local_addr()?.as_socket();
        let address = address.ok_or_else(|| io::Error::other("a bound socket has no address"))?;
        Ok(Self { address, _socket: socket })
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// What `file` runs, and what the balancer would run of it.
    fn of(file: &str, configured_ports: bool) -> (config::Config, config::Config) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("files")).unwrap();
        let path = folder.path().join("lb.toml");
        fs::write(&path, file).unwrap();
        let plan = Plan::read(&path, configured_ports).unwrap();
        assert_eq!(plan.root, folder.path().join("files"));
        let ours = config::parse(&plan.text, Path::new("/elsewhere/lb.toml")).unwrap();
        assert!(ours.services[0].listen.contains(&Listen::Tcp(plan.address)));
        (config::read(&path).unwrap(), ours)
    }

    const FILE: &str = "
        [log]
        level = \"error\"
        [service.web]
        listen = [\"unix:web.sock\", \"127.0.0.1:1\", \"[::1]:1\"]
        root = \"files\"
        ports = [9002, 9003, 9004]
        balance = \"least-connections\"
        output = \"worker.log\"
        env = { QUOTED = \"a \\\" \\\\ \\n b\" }
        [service.web.stop]
        timeout = \"3s\"
        [service.other]
        listen = \"127.0.0.1:2\"
        command = [\"true\"]
    ";

    #[test]
    fn the_service_is_as_configured_but_on_free_ports() {
        let (mut theirs, ours) = of(FILE, false);
        let service = &mut theirs.services[0];
        assert_ne!(service.listen, ours.services[0].listen);
        service.listen.clone_from(&ours.services[0].listen);
        service.slots = Slots::Count(3.try_into().unwrap());
        assert_eq!(ours.services, theirs.services[..1]);
        assert_eq!(ours.log, config::Log { access: false, ..config::Log::default() });
    }

    #[test]
    fn or_on_those_of_the_file() {
        let (theirs, ours) = of(FILE, true);
        assert_eq!(ours.services, theirs.services[..1]);
    }

    #[test]
    fn a_listener_on_every_address_is_reached_at_home() {
        let reached = |address: &str| reachable(address.parse().unwrap()).to_string();
        assert_eq!(reached("0.0.0.0:80"), "127.0.0.1:80");
        assert_eq!(reached("[::]:80"), "[::1]:80");
        assert_eq!(reached("10.1.2.3:80"), "10.1.2.3:80");
    }

    #[test]
    fn a_reserved_port_is_for_whoever_names_it() {
        let reserved = Reserved::take().unwrap();
        for _ in 0..100 {
            assert_ne!(Reserved::take().unwrap().address, reserved.address);
        }
        // std sets SO_REUSEADDR.
        let listener = TcpListener::bind(reserved.address).unwrap();
        assert!(std::net::TcpStream::connect(reserved.address).is_ok());
        drop(listener);
    }
}
