//! What the data threads share with each other and with the main thread.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::{Duration, Instant},
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use socket2::Socket;
use tokio::sync::mpsc;

use super::{
    limit::ConnectionLimit,
    listener::{Listener, Peer},
    service::{Permit, ReservedPermit, ServiceHandle},
};
use crate::net::proxy_protocol::Ends;

/// Names a listener for the life of a [`DataPlane`](super::DataPlane).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerId(pub(super) u32);

/// More connections than any thread has: nobody hands one to a thread that has ended.
const ENDED: usize = usize::MAX / 2;

/// What a thread is told. Their number is bounded by what the supervisor does: four for each listener, and
/// one for each connection that waited for a worker which is gone; and by the places for connections.
#[derive(Debug)]
pub(super) enum Command {
    Open {
        id: ListenerId,
        listener: Arc<Listener>,
        service: Arc<ServiceHandle>,
    },
    /// Its clients are another service's from now on.
    Reassign {
        id: ListenerId,
        service: Arc<ServiceHandle>,
    },
    /// Accept what is queued, then let go of the listener and drop `done`.
    Close {
        id: ListenerId,
        done: mpsc::Sender<()>,
    },
    /// Take over a connection that was accepted elsewhere.
    Adopt {
        connection: Socket,
        client: Option<Ends>,
        permit: ReservedPermit,
    },
    /// Go on with a connection that another thread has accepted, since it has more of them.
    Take {
        connection: Socket,
        peer: Peer,
        permit: Permit,
        /// When it was accepted.
        begun: Instant,
    },
    /// Look for a worker for everybody who has come so far, then drop `done`.
    AssignAll {
        done: mpsc::Sender<()>,
    },
    /// Reset every connection and end.
    Stop,
}

/// The way to one thread, in cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Mailbox {
    /// `None` once the thread has ended.
    commands: Mutex<Option<Vec<Command>>>,
    pub(super) wakeup: EventFd,
    /// Turns of the thread's loop.
    pub(super) turns: AtomicU64,
    /// Connections that it holds, those included that are on their way to it.
    held: AtomicUsize,
    /// Which of the others it compares itself with next.
    other: AtomicUsize,
}

/// All threads, and the number of connections they may hold together.
#[derive(Debug)]
pub(super) struct Threads {
    mailboxes: Box<[Mailbox]>,
    /// All places for connections.
    budget: ConnectionLimit,
    /// Those of them that no service has for itself.
    common: ConnectionLimit,
    /// A few more, for connections that waited for a worker which is gone.
    spare: ConnectionLimit,
    /// The services that share the places.
    services: Mutex<Vec<Weak<ServiceHandle>>>,
    began: Instant,
    /// How often a worker's process was found to be gone.
    exits: AtomicU64,
    /// Which thread is the next to be told what only one is told.
    turn: AtomicUsize,
}

impl Threads {
    pub(super) fn new(threads: usize, max_held: usize) -> io::Result<Arc<Self>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let mailboxes = (0..threads).map(|_| {
            let wakeup = EventFd::from_flags(flags)?;
            Ok(Mailbox {
                commands: Mutex::new(Some(Vec::new())),
                wakeup,
                turns: AtomicU64::new(0),
                held: AtomicUsize::new(0),
                other: AtomicUsize::new(0),
            })
        });
        let mailboxes = mailboxes.collect::<io::Result<_>>()?;
        let spare = spare(max_held);
        Ok(Arc::new(Self {
            mailboxes,
            budget: ConnectionLimit::new(max_held - spare),
            common: ConnectionLimit::new(usize::MAX),
            spare: ConnectionLimit::new(spare),
            services: Mutex::default(),
            began: Instant::now(),
            exits: AtomicU64::new(0),
            turn: AtomicUsize::new(0),
        }))
    }

    pub(super) fn mailbox(&self, thread: usize) -> &Mailbox {
        &self.mailboxes[thread]
    }

    pub(super) fn budget(&self) -> &ConnectionLimit {
        &self.budget
    }

    pub(super) fn common(&self) -> &ConnectionLimit {
        &self.common
    }

    pub(super) fn spare(&self) -> &ConnectionLimit {
        &self.spare
    }

    pub(super) fn threads(&self) -> usize {
        self.mailboxes.len()
    }

    /// When `at` was, as one number.
    pub(super) fn nanoseconds(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.began).as_nanos();
        u64::try_from(since).unwrap_or(u64::MAX - 1)
    }

    /// Counts a service among those that share the places.
    pub(super) fn enrol(&self, service: &Arc<ServiceHandle>) {
        lock(&self.services).push(Arc::downgrade(service));
        self.share_out();
    }

    /// Half of the places are divided among the services, so that none can take all of them from
    /// another; the other half is for whoever comes first. What a service holds beyond its share when
    /// that becomes smaller, it keeps.
    pub(super) fn share_out(&self) {
        // Until all shares are set: another that shares out meanwhile knows of other services.
        let mut known = lock(&self.services);
        known.retain(|service| service.strong_count() > 0);
        let services: Vec<_> = known.iter().filter_map(Weak::upgrade).collect();
        let all = self.budget.limit();
        let share = match services.len() {
            0 | 1 => usize::MAX,
            // All of them, where there is not even one for each.
            count => (all / 2 / count).max(1).min(all),
        };
        let shares = if share == usize::MAX { 0 } else { share.saturating_mul(services.len()) };
        let mut wake = self.common.set_limit(all.saturating_sub(shares));
        for service in &services {
            wake |= service.set_share(share);
        }
        drop(known);
        // The last of one may be among these, and shares out itself.
        drop(services);
        if wake {
            self.wake_all();
        }
    }

    /// Makes one thread look at its mailbox and at new pools.
    pub(super) fn wake(&self, thread: usize) {
        self.mailboxes[thread].wake();
    }

    /// Makes every thread look at its mailbox, at new pools and at the gates.
    pub(super) fn wake_all(&self) {
        self.mailboxes.iter().for_each(Mailbox::wake);
    }

    /// Finds a thread for one more connection, which counts as that one's until it has
    /// [`left`](Self::left): `thread`, unless another has fewer and the connection needn't stay. Only
    /// one other is looked at, each in turn, so that this costs as little where there are many.
    ///
    /// The kernel does not see to that: it wakes who waits longest or least at a listener, however many
    /// connections that one has, and of many that come at once the first to wake up takes the most.
    /// Then one core is busy with them while another waits.
    pub(super) fn seat(&self, thread: usize, stays: bool) -> usize {
        let count = self.mailboxes.len();
        let own = &self.mailboxes[thread];
        let mut chosen = thread;
        if count > 1 && !stays {
            let step = 1 + own.other.fetch_add(1, Relaxed) % (count - 1);
            let other = (thread + step) % count;
            if own.held.load(Relaxed) > self.mailboxes[other].held.load(Relaxed) {
                chosen = other;
            }
        }
        self.mailboxes[chosen].held.fetch_add(1, Relaxed);
        chosen
    }

    /// A connection that was [seated](Self::seat) at `thread` has ended.
    pub(super) fn left(&self, thread: usize) {
        self.mailboxes[thread].held.fetch_sub(1, Relaxed);
    }

    /// A thread for a connection that none has accepted; see [`Self::seat`].
    pub(super) fn seat_anywhere(&self) -> usize {
        self.seat(self.turn.fetch_add(1, Relaxed) % self.mailboxes.len(), false)
    }

    /// Gives one thread a command.
    pub(super) fn tell_one(&self, thread: usize, command: Command) {
        let mailbox = &self.mailboxes[thread];
        mailbox.put(command);
        mailbox.wake();
    }

    /// The thread has ended, or is about to: it is handed no further connection, those that are on
    /// their way to it are reset, and nobody waits for what it is told.
    pub(super) fn ended(&self, thread: usize) {
        let mailbox = &self.mailboxes[thread];
        mailbox.held.store(ENDED, Relaxed);
        let left = lock(&mailbox.commands).take();
        left.into_iter().flatten().for_each(refuse);
    }

    /// Gives each thread a command.
    pub(super) fn tell(&self, command: impl Fn() -> Command) {
        for mailbox in &self.mailboxes {
            mailbox.put(command());
        }
        self.wake_all();
    }

    /// A worker's process is gone: its connections are to be looked at.
    pub(super) fn exited(&self) {
        self.exits.fetch_add(1, Release);
        self.wake_all();
    }

    pub(super) fn exits(&self) -> u64 {
        self.exits.load(Acquire)
    }

    pub(super) fn turns(&self) -> Vec<u64> {
        self.mailboxes.iter().map(|mailbox| mailbox.turns.load(Relaxed)).collect()
    }
}

/// How many of so many places are kept for connections that waited for a worker which is gone.
///
/// Their clients hold places already where they came through lbd, perhaps all there are.
fn spare(places: usize) -> usize {
    if places <= 8 { 0 } else { (places / 16).clamp(1, 64) }
}

/// What nobody is there to do: a connection is reset, and whoever waits waits no longer.
fn refuse(command: Command) {
    if let Command::Take { connection, .. } | Command::Adopt { connection, .. } = command {
        // Fails only where the peer has reset it already.
        _ = connection.set_linger(Some(Duration::ZERO));
    }
}

impl Mailbox {
    fn put(&self, command: Command) {
        match &mut *lock(&self.commands) {
            Some(commands) => commands.push(command),
            None => refuse(command),
        }
    }

    fn wake(&self) {
        // EAGAIN says that it has been rung more often than can be counted: rung it is.
        _ = self.wakeup.write(1);
    }

    /// Stops the ringing and takes what was put in before it.
    pub(super) fn empty(&self) -> Vec<Command> {
        _ = self.wakeup.read();
        lock(&self.commands).as_mut().map(std::mem::take).unwrap_or_default()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::proxy::Pool;

    fn held(threads: &Threads) -> Vec<usize> {
        threads.mailboxes.iter().map(|mailbox| mailbox.held.load(Relaxed)).collect()
    }

    #[test]
    fn connections_that_one_thread_accepts_are_spread() {
        for threads in [1, 2, 4] {
            let threads = Threads::new(threads, 1000).unwrap();
            (0..100).for_each(|_| _ = threads.seat(0, false));
            assert_eq!(held(&threads).iter().sum::<usize>(), 100);
            let (least, most) =
                (held(&threads).into_iter().min(), held(&threads).into_iter().max());
            assert!(most.unwrap() - least.unwrap() <= 2, "{:?}", held(&threads));
        }
    }

    #[test]
    fn a_thread_that_has_ended_gets_nothing_and_what_was_on_its_way_is_reset() {
        let threads = Threads::new(2, 1000).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let connection = Socket::from(listener.accept().unwrap().0);
        let pool = Pool::new(Vec::new(), None, Arc::default());
        let service = ServiceHandle::new("web".into(), pool, Arc::default(), Arc::clone(&threads));
        let permit = Permit::take(&service).unwrap();
        assert_eq!(threads.seat(1, false), 1);
        threads.tell_one(
            1,
            Command::Take { connection, peer: Peer::Unix, permit, begun: Instant::now() },
        );
        threads.ended(1);
        let error = client.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(service.active(), 0);
        for _ in 0..100 {
            assert_eq!(threads.seat_anywhere(), 0);
        }
        // Nobody waits for it.
        let (done, mut waits) = mpsc::channel(1);
        threads.tell_one(1, Command::AssignAll { done });
        assert_eq!(waits.try_recv(), Err::<(), _>(mpsc::error::TryRecvError::Disconnected));
    }

    #[test]
    fn a_thread_keeps_what_it_accepts_while_it_has_no_more_than_others() {
        let threads = Threads::new(2, 1000).unwrap();
        for _ in 0..100 {
            assert_eq!(threads.seat(1, false), 1);
            threads.left(1);
        }
        let seats = [(0, false), (1, false), (1, false), (1, true), (1, false)];
        assert_eq!(seats.map(|(thread, stays)| threads.seat(thread, stays)), [0, 1, 1, 1, 0]);
        assert_eq!(held(&threads), [2, 3]);
    }
}
