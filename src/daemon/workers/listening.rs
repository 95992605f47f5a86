//! Checks that the socket that answers on a worker's port is the worker's own, and finds out where
//! the worker listens if not there.
//!
//! Another program may bind a worker's port before the worker does; it would then answer the probes
//! and get the clients. So a passed probe counts only if the listening socket is the worker's own,
//! as far as `health.owner` requires it and lbd has the permission to find out.

use std::{
    cell::{Cell, RefCell},
    io,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    time::{Duration, Instant},
};

use nix::unistd::{Uid, User};
use tokio::task::spawn_blocking;

use crate::{
    config::Owner,
    net::diag::{Diag, ListeningSocket, SharedDiag, never_tells},
    process::Holdings,
    supervisor::{ProbeOutcome, Verdict},
};

/// After this time most programs listen. If a worker does not listen on its port by then, lbd looks
/// where it does.
const EARLY: Duration = Duration::from_millis(1500);
/// The pause between two such lookups.
const PAUSE: Duration = Duration::from_secs(2);
/// How many addresses a message names at most.
const NAMED: usize = 4;

/// Where a worker should listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Listens {
    /// On this address, with a socket that it makes itself.
    Itself(SocketAddr),
    /// On the socket that it is given as descriptor 3, which has this address; `None` for a unix
    /// socket.
    Passed(Option<SocketAddr>),
    /// On the public addresses of its service, with sockets that it is given.
    Publicly,
}

/// Checks where one worker listens.
#[derive(Debug, Clone)]
pub(super) struct Listening(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    diag: SharedDiag,
    /// Where the worker should listen.
    listens: Listens,
    guard: i32,
    /// The slot's own port, if the worker is a stand-in.
    stands_in_for: Option<u16>,
    started: Instant,
    /// The inodes of the listening sockets that were found to be the worker's own.
    believed: RefCell<Vec<u32>>,
    /// When lbd last looked where the worker listens instead. `hint` is the advice that followed.
    looked: Cell<Option<Instant>>,
    hint: RefCell<Option<String>>,
}

/// Why the listening socket is not believed to be the worker's.
#[derive(Debug, thiserror::Error)]
enum NotOwn {
    #[error(
        "the kernel does not tell who listens on port {0}: {1}; health.owner = \"any\" does without"
    )]
    Unknown(u16, io::Error),
    #[error("lbd has nothing left to look who listens with: {0}")]
    Lacking(io::Error),
    #[error(
        "nobody listens on {0} as far as lbd can see, though it answers (from another network namespace?): \
         health.owner = \"any\" believes it"
    )]
    Invisible(SocketAddr),
    #[error(
        "port {port} is another program's, of user {user}, which answers in the worker's stead: it gets no \
         client; if it listens for the worker, as a container engine does, set health.owner = \"any\""
    )]
    Strangers { port: u16, user: String },
    #[error(
        "port {port} is another program's, of the worker's own user: it gets no client; if it is to be \
         believed, set health.owner = \"user\""
    )]
    Outside { port: u16 },
    #[error(
        "user {user} listens on port {port}, which is not the worker's user, and lbd may not look whose \
         socket it is: if it is the worker's, set health.owner = \"any\""
    )]
    Unreadable { port: u16, user: String },
}

impl Listening {
    pub(super) fn new(
        diag: SharedDiag,
        listens: Listens,
        guard: i32,
        stands_in_for: Option<u16>,
    ) -> Self {
        Self(Rc::new(Inner {
            diag,
            listens,
            guard,
            stands_in_for,
            started: Instant::now(),
            believed: RefCell::default(),
            looked: Cell::new(None),
            hint: RefCell::new(None),
        }))
    }

    /// Whether the worker makes its listening socket itself.
    pub(super) fn makes_its_own(&self) -> bool {
        matches!(self.0.listens, Listens::Itself(_))
    }

    /// Corrects a probe's result by who listens on the port. If a listening socket is new, looks
    /// into `/proc` on a thread of its own.
    pub(super) async fn judge(&self, outcome: &mut ProbeOutcome, owner: Owner, is_new: bool) {
        match &outcome.verdict {
            Verdict::Passed => {
                if let Listens::Itself(address) = self.0.listens
                    && owner != Owner::Any
                    && let Err(error) = self.check(address, owner).await
                {
                    outcome.verdict = match error {
                        NotOwn::Lacking(_) => Verdict::Unknown(error.to_string()),
                        error => Verdict::Failed(error.to_string()),
                    };
                }
            }
            Verdict::Failed(error) if is_new => {
                if self.is_due()
                    && let Some(error) = self.look_elsewhere().await
                {
                    outcome.verdict = Verdict::Hopeless(error);
                } else if let Some(hint) = &*self.0.hint.borrow() {
                    outcome.verdict = Verdict::Failed(format!("{error}; {hint}"));
                }
            }
            Verdict::Failed(_) | Verdict::Hopeless(_) | Verdict::Unknown(_) => {}
        }
    }

    /// Whether the listening socket is the worker's own.
    async fn check(&self, address: SocketAddr, owner: Owner) -> Result<(), NotOwn> {
        let guard = self.0.guard;
        let port = address.port();
        // Whoever listened a moment ago is as good as who does, where that is nobody new.
        if !self.0.believed.borrow().is_empty()
            && let Ok(lately) = self.0.diag.lately_listening(port)
        {
            let lately = reached_at(address, lately);
            if !lately.is_empty() && lately.iter().all(|listener| self.believes(listener)) {
                return Ok(());
            }
        }
        let listeners = self.0.diag.ask(|diag| diag.listeners(port));
        let listeners = listeners.map_err(|error| match never_tells(&error) {
            true => NotOwn::Unknown(port, error),
            false => NotOwn::Lacking(error),
        })?;
        let listeners = reached_at(address, listeners);
        if listeners.is_empty() {
            return Err(NotOwn::Invisible(address));
        }
        if listeners.iter().all(|listener| self.believes(listener)) {
            return Ok(());
        }
        let inodes: Vec<u32> = listeners.iter().map(|listener| listener.inode).collect();
        let judged = spawn_blocking(move || {
            let holdings = Holdings::of_worker(guard);
            listeners.iter().try_for_each(|listener| is_own(listener, port, owner, &holdings))
        });
        // The blocking task is never cancelled, and does not panic.
        judged.await.unwrap_or(Ok(()))?;
        *self.0.believed.borrow_mut() = inodes;
        Ok(())
    }

    fn believes(&self, listener: &ListeningSocket) -> bool {
        self.0.believed.borrow().contains(&listener.inode)
    }

    fn is_due(&self) -> bool {
        let Inner { stands_in_for, started, looked, .. } = &*self.0;
        let is_due = stands_in_for.is_some()
            || started.elapsed() >= EARLY && looked.get().is_none_or(|at| at.elapsed() >= PAUSE);
        if is_due {
            looked.set(Some(Instant::now()));
        }
        is_due
    }

    /// Looks where the worker listens, and stores a hint about what to change. Returns a reason if
    /// the worker will never listen where it should.
    async fn look_elsewhere(&self) -> Option<String> {
        let Inner { listens, guard, stands_in_for, .. } = *self.0;
        let looked = spawn_blocking(move || elsewhere(guard));
        let found = looked.await.ok()?.ok()?;
        let hint = match listens {
            Listens::Itself(address) | Listens::Passed(Some(address))
                if found.contains(&address) =>
            {
                None
            }
            Listens::Itself(address) => {
                if let Some(own) = stands_in_for
                    && found.iter().any(|listener| listener.port() == own)
                {
                    return Some(format!(
                        "it listens on port {own}, and not on {}, which it was given as $PORT",
                        address.port()
                    ));
                }
                hint(address, &found)
            }
            Listens::Passed(_) if !found.is_empty() => Some(format!(
                "it listens on {}, and not on the socket that it was given as descriptor 3: have it \
                 accept from that one, or set socket = \"bind\" and have it listen on $PORT",
                list(&found)
            )),
            Listens::Passed(_) | Listens::Publicly => None,
        };
        *self.0.hint.borrow_mut() = hint;
        None
    }
}

/// Selects the sockets that a connection to `address` reaches: those bound to it; else those bound
/// to every address of its family; else those bound to every address of both families (ipv6(7),
/// `IPV6_V6ONLY`).
fn reached_at(address: SocketAddr, listeners: Vec<ListeningSocket>) -> Vec<ListeningSocket> {
    let rank = |listener: &ListeningSocket| match (listener.address.ip(), address.ip()) {
        (bound, wanted) if bound.to_canonical() == wanted.to_canonical() => Some(0),
        (IpAddr::V4(bound), IpAddr::V4(_)) if bound.is_unspecified() => Some(1),
        (IpAddr::V6(bound), IpAddr::V6(_)) if bound.is_unspecified() => Some(1),
        (IpAddr::V6(bound), IpAddr::V4(_)) if bound.is_unspecified() => Some(2),
        _ => None,
    };
    let best = listeners.iter().filter_map(rank).min();
    listeners.into_iter().filter(|listener| best.is_some() && rank(listener) == best).collect()
}

fn is_own(
    listener: &ListeningSocket,
    port: u16,
    owner: Owner,
    holdings: &Holdings,
) -> Result<(), NotOwn> {
    let is_users = holdings.users.contains(&listener.uid);
    let is_held = holdings.sockets.contains(&listener.inode);
    match owner {
        Owner::Any => Ok(()),
        Owner::Tree | Owner::User if is_held => Ok(()),
        Owner::User if is_users => Ok(()),
        // The socket may belong to one of the worker's processes that lbd may not look into: then
        // the same user is enough.
        Owner::Tree if holdings.is_partial && is_users => Ok(()),
        Owner::Tree if is_users => Err(NotOwn::Outside { port }),
        Owner::Tree | Owner::User if holdings.is_partial => {
            Err(NotOwn::Unreadable { port, user: name(listener.uid) })
        }
        Owner::Tree | Owner::User => Err(NotOwn::Strangers { port, user: name(listener.uid) }),
    }
}

fn name(uid: u32) -> String {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| uid.to_string(), |user| user.name)
}

/// The addresses on which the worker with this guard listens.
fn elsewhere(guard: i32) -> io::Result<Vec<SocketAddr>> {
    let listeners = Diag::open()?.all_listeners()?;
    let holdings = Holdings::of_worker(guard);
    let own = listeners.into_iter().filter(|listener| holdings.sockets.contains(&listener.inode));
    let mut addresses: Vec<_> = own.map(|listener| listener.address).collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

/// Says what to change if a worker that should listen on `address` listens on the addresses
/// `found`.
fn hint(address: SocketAddr, found: &[SocketAddr]) -> Option<String> {
    let port = address.port();
    if let Some(other) = found.iter().find(|listener| listener.port() == port) {
        let ip = other.ip();
        return Some(format!(
            "it listens on {other}: set host = \"{ip}\", or have it listen on {}",
            address.ip()
        ));
    }
    let list = (!found.is_empty()).then(|| list(found))?;
    Some(format!(
        "it listens on {list}, and not on port {port}, which it was given as $PORT: have it listen \
         there, or write {{port}} where its command has the port"
    ))
}

/// The first addresses, for a message.
fn list(addresses: &[SocketAddr]) -> String {
    let shown: Vec<_> = addresses.iter().take(NAMED).map(ToString::to_string).collect();
    shown.join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_lbd_lacks_to_look_with_is_no_fault_of_the_worker() {
        let diag = SharedDiag::default();
        let address = "127.0.0.1:9".parse().unwrap();
        let listening = Listening::new(diag.clone(), Listens::Itself(address), 0, None);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let judge = || {
            let mut outcome = ProbeOutcome { took: Duration::ZERO, verdict: Verdict::Passed };
            runtime.block_on(listening.judge(&mut outcome, Owner::Tree, true));
            outcome.verdict
        };
        diag.fail_once();
        let verdict = judge();
        assert!(matches!(verdict, Verdict::Unknown(_)), "{verdict:?}");
        // The kernel answers again, and nobody listens there.
        let verdict = judge();
        assert!(matches!(verdict, Verdict::Failed(_)), "{verdict:?}");
    }

    fn socket(address: &str, inode: u32, uid: u32) -> ListeningSocket {
        ListeningSocket { address: address.parse().unwrap(), inode, uid }
    }

    #[test]
    fn the_nearest_listener_is_the_one_that_is_reached() {
        let all = ["127.0.0.1:80", "0.0.0.0:80", "[::]:80", "[::1]:80", "127.0.0.2:80"];
        let reached = |address: &str, of: &[&str]| {
            let listeners = of.iter().map(|address| socket(address, 1, 0)).collect();
            let reached = reached_at(address.parse().unwrap(), listeners);
            reached.iter().map(|listener| listener.address.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(reached("127.0.0.1:80", &all), ["127.0.0.1:80"]);
        assert_eq!(reached("127.0.0.3:80", &all), ["0.0.0.0:80"]);
        assert_eq!(reached("127.0.0.1:80", &all[2..]), ["[::]:80"]);
        assert_eq!(reached("[::1]:80", &all), ["[::1]:80"]);
        assert_eq!(reached("[::2]:80", &all), ["[::]:80"]);
        assert_eq!(reached("127.0.0.1:80", &["[::1]:80"]), Vec::<String>::new());
        assert_eq!(reached("127.0.0.1:80", &["[::ffff:127.0.0.1]:80", "0.0.0.0:80"]).len(), 1);
    }

    #[test]
    fn whose_it_is_decides_as_far_as_lbd_may_look() {
        let holdings = |is_partial| Holdings {
            sockets: BTreeSet::from([7]),
            users: BTreeSet::from([1000]),
            is_partial,
        };
        let (own, users, strangers) = ((7, 0), (8, 1000), (8, 1001));
        for (owner, is_partial, (inode, uid), expected) in [
            (Owner::Tree, false, own, Ok(())),
            (Owner::Tree, false, users, Err("health.owner = \"user\"")),
            (Owner::Tree, false, strangers, Err("health.owner = \"any\"")),
            (Owner::Tree, true, users, Ok(())),
            (Owner::Tree, true, strangers, Err("may not look")),
            (Owner::User, false, users, Ok(())),
            (Owner::User, false, strangers, Err("health.owner = \"any\"")),
            (Owner::Any, false, strangers, Ok(())),
        ] {
            let listener = socket("127.0.0.1:80", inode, uid);
            let judged = is_own(&listener, 80, owner, &holdings(is_partial));
            match (judged, expected) {
                (Ok(()), Ok(())) => {}
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (judged, expected) => panic!("{judged:?}, and not {expected:?}"),
            }
        }
    }

    #[test]
    fn a_hint_names_what_to_change() {
        let address: SocketAddr = "127.0.0.1:9002".parse().unwrap();
        let hint = |found: &[&str]| {
            let found: Vec<_> = found.iter().map(|address| address.parse().unwrap()).collect();
            hint(address, &found)
        };
        assert_eq!(hint(&[]), None);
        assert_eq!(
            hint(&["[::1]:9002"]).unwrap(),
            "it listens on [::1]:9002: set host = \"::1\", or have it listen on 127.0.0.1"
        );
        let other = hint(&["0.0.0.0:3000", "[::]:3001"]).unwrap();
        assert!(other.starts_with("it listens on 0.0.0.0:3000, [::]:3001, and not"), "{other}");
    }
}
