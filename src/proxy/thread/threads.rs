//! The state that the data threads share with each other and with the main thread.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::{Duration, Instant},
};

use nix::sys::eventfd::EventFd;
use socket2::Socket;
use tokio::sync::mpsc;

use super::frontend::{Frontend, FrontendId, Target};
use crate::{
    net::{Peer, proxy_protocol::Ends},
    proxy::balance::{Budget, Permit, ReservedPermit, Waker},
};

/// The connection count of a thread that has ended. It is more than any thread has, so no other
/// thread hands it a connection.
const ENDED: usize = usize::MAX / 2;

/// A command to a thread. The number of queued commands is bounded: the supervisor sends four for
/// each listener, and one for each connection drained from the queue of a worker that has exited;
/// the rest need a permit.
#[derive(Debug)]
pub(in crate::proxy) enum Command {
    Open {
        id: FrontendId,
        frontend: Frontend,
    },
    /// Use this target for the frontend's clients from now on.
    Retarget {
        id: FrontendId,
        target: Target,
    },
    /// Accept what is queued, then release the listener and drop `done`.
    Close {
        id: FrontendId,
        done: mpsc::Sender<()>,
    },
    /// Take over a connection that was accepted elsewhere.
    Adopt {
        connection: Socket,
        client: Option<Ends>,
        permit: ReservedPermit,
    },
    /// Take over a connection from the thread that accepted it, which has more connections.
    Take {
        connection: Socket,
        peer: Peer,
        permit: Permit,
        /// When it was accepted.
        begun: Instant,
    },
    /// Look for a worker for every connection accepted so far, then drop `done`.
    AssignAll {
        done: mpsc::Sender<()>,
    },
    /// Reset every connection and end.
    Stop,
}

/// The mailbox of one thread, in cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Mailbox {
    /// `None` once the thread has ended.
    commands: Mutex<Option<Vec<Command>>>,
    /// Turns of the thread's loop.
    turns: AtomicU64,
    /// The connections that it holds, including those in transit to it.
    held: AtomicUsize,
    /// Which other thread it compares itself with next.
    other: AtomicUsize,
}

/// All data threads, and their shared state.
#[derive(Debug)]
pub(in crate::proxy) struct Threads {
    mailboxes: Box<[Mailbox]>,
    waker: Arc<Waker>,
    budget: Arc<Budget>,
    /// How many exits of workers' processes were reported.
    exits: AtomicU64,
    /// The next thread to get a command that only one thread gets.
    turn: AtomicUsize,
}

impl Threads {
    /// Creates `threads` mailboxes, for threads that hold at most `max_held` connections together.
    pub(in crate::proxy) fn new(threads: usize, max_held: usize) -> io::Result<Arc<Self>> {
        let mailboxes = (0..threads).map(|_| Mailbox {
            commands: Mutex::new(Some(Vec::new())),
            turns: AtomicU64::new(0),
            held: AtomicUsize::new(0),
            other: AtomicUsize::new(0),
        });
        let waker = Arc::new(Waker::new(threads)?);
        Ok(Arc::new(Self {
            mailboxes: mailboxes.collect(),
            budget: Arc::new(Budget::new(max_held, Arc::clone(&waker))),
            waker,
            exits: AtomicU64::new(0),
            turn: AtomicUsize::new(0),
        }))
    }

    pub(in crate::proxy) fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    pub(in crate::proxy) fn wake_all(&self) {
        self.waker.wake_all();
    }

    /// The descriptor that wakes one thread.
    pub(in crate::proxy) fn event(&self, thread: usize) -> &EventFd {
        self.waker.event(thread)
    }

    /// Counts one turn of a thread's loop.
    pub(in crate::proxy) fn count_turn(&self, thread: usize) {
        self.mailboxes[thread].turns.fetch_add(1, Relaxed);
    }

    /// Takes the queued commands of one thread.
    pub(in crate::proxy) fn commands(&self, thread: usize) -> Vec<Command> {
        self.waker.woken(thread);
        self.mailboxes[thread].commands().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Finds a thread for one more connection, which counts as that thread's until it has
    /// [`left`](Self::left). That is `thread`, unless another thread has fewer connections and the
    /// connection need not stay. Only one other thread is compared, in rotation, so that this costs
    /// as little where there are many threads.
    ///
    /// The kernel does not balance this. It wakes a thread by the order in which the threads wait
    /// at a listener, however many connections the thread has, and when many clients connect at
    /// once, the first thread to wake up takes most of them. Then one core is busy while another
    /// idles.
    pub(in crate::proxy) fn seat(&self, thread: usize, stays: bool) -> usize {
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
    pub(in crate::proxy) fn left(&self, thread: usize) {
        self.mailboxes[thread].held.fetch_sub(1, Relaxed);
    }

    /// Finds a thread for a connection that no thread has accepted; see [`Self::seat`].
    pub(in crate::proxy) fn seat_anywhere(&self) -> usize {
        self.seat(self.turn.fetch_add(1, Relaxed) % self.mailboxes.len(), false)
    }

    /// Gives one thread a command.
    pub(in crate::proxy) fn tell_one(&self, thread: usize, command: Command) {
        self.mailboxes[thread].put(command);
        self.waker.wake(thread);
    }

    /// Marks a thread that has ended, or is about to. It gets no further connection, those in
    /// transit to it are reset, and commands to it are dropped.
    pub(in crate::proxy) fn ended(&self, thread: usize) {
        let mailbox = &self.mailboxes[thread];
        mailbox.held.store(ENDED, Relaxed);
        let left = mailbox.commands().take();
        left.into_iter().flatten().for_each(refuse);
    }

    /// Gives each thread a command.
    pub(in crate::proxy) fn tell(&self, command: impl Fn() -> Command) {
        for mailbox in &self.mailboxes {
            mailbox.put(command());
        }
        self.wake_all();
    }

    /// Reports that a worker's process has exited: every thread checks the connections of exited
    /// workers.
    pub(in crate::proxy) fn exited(&self) {
        self.exits.fetch_add(1, Release);
        self.wake_all();
    }

    /// How many worker exits were reported so far.
    pub(in crate::proxy) fn exits(&self) -> u64 {
        self.exits.load(Acquire)
    }

    /// How many turns each thread has made.
    pub(in crate::proxy) fn turns(&self) -> Vec<u64> {
        self.mailboxes.iter().map(|mailbox| mailbox.turns.load(Relaxed)).collect()
    }
}

/// Drops a command to a thread that has ended. A connection in it is reset; a `done` sender in it
/// is dropped, so its receiver stops waiting.
fn refuse(command: Command) {
    if let Command::Take { connection, .. } | Command::Adopt { connection, .. } = command {
        // Fails only if the peer has reset the connection already.
        _ = connection.set_linger(Some(Duration::ZERO));
    }
}

impl Mailbox {
    fn put(&self, command: Command) {
        match &mut *self.commands() {
            Some(commands) => commands.push(command),
            None => refuse(command),
        }
    }

    fn commands(&self) -> MutexGuard<'_, Option<Vec<Command>>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::proxy::balance::{Pool, ServiceHandle};

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
        let service =
            ServiceHandle::new("web".into(), pool, Arc::default(), Arc::clone(threads.budget()));
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
