//! Counts the workers' connections that don't pass through lbd (`route = "direct"`).
//!
//! The kernel lists the connections on a port, and `/proc` lists the sockets of a process. Neither
//! list has the other's information, so both are read and joined by the sockets' inodes.

use std::{
    collections::{BTreeSet, HashSet},
    io,
    net::SocketAddr,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use nix::time::ClockId;

use super::{
    holdings,
    tree::{processes, worker_of},
};
use crate::net::diag::Diag;

/// The pause between two counts while nobody waits for a result.
const PAUSE: Duration = Duration::from_secs(1);
/// The first pause while somebody waits for a result. It grows with the time waited.
const URGENT_PAUSE: Duration = Duration::from_millis(20);
/// The pause is at least this many times as long as a count takes, so that counting costs less than
/// half a percent of one core, …
const REST: u32 = 250;
/// … or five percent while somebody waits.
const URGENT_REST: u32 = 20;

/// The longest pause, however long a count takes.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A worker whose connections are counted.
#[derive(Debug)]
pub struct Counted<T> {
    /// The pid of the worker's guard. The worker is every process below the guard.
    pub guard: i32,
    /// Somebody waits for this worker's connections to end.
    pub urgent: bool,
    /// Passed along with each reported count.
    pub subject: T,
}

/// Counts repeatedly on a thread of its own, which ends when this is dropped.
#[derive(Debug)]
pub struct ConnectionGauge<T>(mpsc::Sender<Watch<T>>);

#[derive(Debug)]
struct Watch<T> {
    addresses: BTreeSet<SocketAddr>,
    workers: Vec<Counted<T>>,
}

impl<T: Send + 'static> ConnectionGauge<T> {
    /// Starts the thread, which passes each count to `report`: `None` where lbd may not look into a
    /// process.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub fn start(report: impl FnMut(&T, Option<u32>) + Send + 'static) -> io::Result<Self> {
        let (sender, watches) = mpsc::channel();
        thread::Builder::new()
            .name("connections".to_owned())
            .spawn(move || count(&watches, report))?;
        Ok(Self(sender))
    }

    /// From now on counts the connections of these workers at these addresses, and no others. A
    /// count that begins after this call uses them.
    pub fn watch(&self, addresses: BTreeSet<SocketAddr>, workers: Vec<Counted<T>>) {
        // Fails only where the thread has panicked, which has been reported.
        let _ = self.0.send(Watch { addresses, workers });
    }
}

fn count<T>(watches: &mpsc::Receiver<Watch<T>>, mut report: impl FnMut(&T, Option<u32>)) {
    let mut watch = Watch { addresses: BTreeSet::new(), workers: Vec::new() };
    let mut diag = None;
    let mut next = Instant::now();
    let mut since = next;
    loop {
        let news = if watch.workers.is_empty() {
            watches.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            watches.recv_timeout(next.saturating_duration_since(Instant::now()))
        };
        match news {
            Ok(new) => {
                watch = new;
                since = Instant::now();
                if watch.workers.iter().any(|worker| worker.urgent) {
                    next = next.min(Instant::now() + URGENT_PAUSE);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                let begun = cpu_time();
                look(&watch, &mut diag, &mut report);
                let took = cpu_time().saturating_sub(begun);
                let urgent = watch.workers.iter().any(|worker| worker.urgent);
                let pause = if urgent {
                    (since.elapsed() / 20).clamp(URGENT_PAUSE, PAUSE).max(took * URGENT_REST)
                } else {
                    PAUSE.max(took * REST)
                };
                let pause = pause.min(LONGEST_PAUSE);
                next = Instant::now() + pause;
            }
        }
    }
}

/// The CPU time that this thread has used so far. Wall time would include the time in which other
/// threads ran.
fn cpu_time() -> Duration {
    let now = ClockId::CLOCK_THREAD_CPUTIME_ID.now();
    now.map_or(Duration::ZERO, Duration::from)
}

fn look<T>(watch: &Watch<T>, diag: &mut Option<Diag>, report: &mut impl FnMut(&T, Option<u32>)) {
    let connections = connections(&watch.addresses, diag);
    let Ok(connections) = connections.inspect_err(|_| *diag = None) else {
        watch.workers.iter().for_each(|worker| report(&worker.subject, None));
        return;
    };
    let all = if connections.is_empty() { Vec::new() } else { processes() };
    for worker in &watch.workers {
        let mut own: HashSet<u32> = HashSet::new();
        let looked = worker_of(&all, worker.guard).iter().try_for_each(|process| {
            holdings::sockets(process.pid, |inode| {
                own.extend(connections.get(&inode));
            })
        });
        report(&worker.subject, looked.ok().map(|()| own.len() as u32));
    }
}

/// The inodes of all connections on these addresses.
fn connections(
    addresses: &BTreeSet<SocketAddr>,
    diag: &mut Option<Diag>,
) -> io::Result<HashSet<u32>> {
    let diag = match diag {
        Some(diag) => diag,
        None => diag.insert(Diag::open()?),
    };
    let mut all = HashSet::new();
    for address in addresses {
        all.extend(diag.accepted(*address)?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        process::{Command, Stdio},
    };

    use nix::unistd::getpid;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    #[test]
    fn only_what_a_process_below_has_accepted_is_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let _clients = [(); 3].map(|()| TcpStream::connect(address).unwrap());
        // A child that has one of them as its standard input, and a copy of the same.
        let (accepted, _) = listener.accept().unwrap();
        let (kept, _) = listener.accept().unwrap();
        let mut child = Command::new("sh")
            .args(["-c", "exec 5<&0; exec sleep 1000 5<&0"])
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(accepted)))
            .spawn()
            .unwrap();
        let (sender, counts) = mpsc::channel();
        let gauge = ConnectionGauge::start(move |id, count| _ = sender.send((*id, count))).unwrap();
        let guard = getpid().as_raw();
        gauge.watch(BTreeSet::from([address]), vec![Counted { guard, urgent: true, subject: 7 }]);
        assert_eq!(counts.recv_timeout(DEADLINE).unwrap(), (7, Some(1)));
        child.kill().unwrap();
        child.wait().unwrap();
        while counts.recv_timeout(DEADLINE).unwrap() != (7, Some(0)) {}
        drop((gauge, kept));
        while counts.recv_timeout(DEADLINE) != Err(RecvTimeoutError::Disconnected) {}
    }
}
