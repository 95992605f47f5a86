//! Tells the service manager (sd_notify(3)) lbd's state, its status as one sentence, and, if the
//! manager asks for it, that lbd is alive (watchdog). Without `NOTIFY_SOCKET` nothing is sent.

use std::{
    collections::VecDeque,
    env, io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::{Duration, Instant},
};

use sd_notify::NotifyState;
use tracing::{debug, warn};

use super::event_log::seconds;

/// The shortest time between two status sentences. Also the pause before a message is sent again
/// for which the manager's socket had no room.
const PAUSE: Duration = Duration::from_millis(100);

/// How often the status is checked for changes while connections drain: their ends don't wake the
/// main thread.
const DRAINING_LOOK: Duration = Duration::from_secs(1);

/// By how much the manager's timeout is extended at a time, and how often: if lbd hangs, the
/// timeout soon expires.
const EXTENSION: Duration = Duration::from_secs(15);
const EXTENSION_EVERY: Duration = Duration::from_secs(5);

/// How many times lbd checks itself within one watchdog timeout: a single failed check must not be
/// fatal.
const LOOKS: u32 = 4;

/// How many messages wait for a manager whose socket is full; lbd has hardly more states.
const WAITING: usize = 16;

/// The connection to the service manager; `None` if there is none.
#[derive(Debug)]
pub(super) struct Manager(Option<Told>);

#[derive(Debug)]
struct Told {
    channel: Channel,
    watchdog: Option<Watchdog>,
    /// For a start or a stop that is under way: until when the manager is asked for more time, and
    /// when it is asked next.
    extending: Option<(Instant, Instant)>,
    shutdown: bool,
    status: String,
    status_at: Option<Instant>,
    /// The sentence may have changed, but it was too early to send it.
    status_due: bool,
}

#[derive(Debug)]
struct Watchdog {
    every: Duration,
    next: Instant,
    /// The event loop turns of each data thread at the last check.
    turns: Vec<u64>,
    hangs: bool,
}

impl Manager {
    /// Connects to the manager that the environment names. The manager is asked for time until
    /// `until`, or until [`ready`](Self::ready).
    pub(super) fn from_environment(now: Instant, until: Instant) -> Self {
        let Some(channel) = Channel::from_environment() else { return Self(None) };
        let watchdog = |timeout: Duration| {
            let every = (timeout / LOOKS).max(Duration::from_millis(1));
            Watchdog { every, next: now, turns: Vec::new(), hangs: false }
        };
        Self(Some(Told {
            channel,
            watchdog: sd_notify::watchdog_enabled().map(watchdog),
            extending: Some((until, now)),
            shutdown: false,
            status: String::new(),
            status_at: None,
            status_due: false,
        }))
    }

    /// Reports that every service has a healthy worker, or that a reload is done.
    pub(super) fn ready(&mut self, status: &str, now: Instant) {
        let Some(told) = &mut self.0 else { return };
        told.extending = None;
        told.enter(&[NotifyState::Ready], status, now);
    }

    /// Reports that a reload has begun; [`Self::ready`] ends it.
    pub(super) fn reloading(&mut self, now: Instant) {
        let Some(told) = &mut self.0 else { return };
        let mut state = vec![NotifyState::Reloading];
        state.extend(NotifyState::monotonic_usec_now());
        told.enter(&state, "reloading", now);
    }

    /// Reports that the daemon stops, which may take until `until`.
    pub(super) fn shutdown(&mut self, status: &str, until: Instant, now: Instant) {
        let Some(told) = &mut self.0 else { return };
        told.shutdown = true;
        told.extending = Some((until, now + EXTENSION_EVERY));
        told.enter(&[NotifyState::Stopping, extension()], status, now);
    }

    /// Whether to call [`Self::status`] now: there is a manager, and the last sentence is not too
    /// recent.
    pub(super) fn wants_status(&mut self, now: Instant) -> bool {
        let Some(told) = &mut self.0 else { return false };
        told.status_due = told.status_at.is_some_and(|at| now < at + PAUSE);
        !told.status_due
    }

    /// Sends the current status sentence, if it differs from the last one.
    pub(super) fn status(&mut self, status: &str, now: Instant) {
        let Some(told) = &mut self.0 else { return };
        let status = one_line(status);
        told.status_at = Some(now);
        // If sending fails, the next call finds the sentence changed again.
        if status != told.status && told.channel.tell(&[NotifyState::Status(&status)]) {
            told.status = status;
        }
    }

    /// When to call [`Self::timeout`] or [`Self::status`] next.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let told = self.0.as_ref()?;
        let watchdog = told.watchdog.as_ref().map(|watchdog| watchdog.next);
        let extension = told.extending.map(|(_, next)| next);
        let pause = match (told.status_due || told.channel.is_full(), told.shutdown) {
            (true, _) => Some(PAUSE),
            (false, true) => Some(DRAINING_LOOK),
            (false, false) => None,
        };
        let status = pause.and_then(|pause| Some(told.status_at? + pause));
        watchdog.into_iter().chain(extension).chain(status).min()
    }

    /// Asks for more time if that is due, and feeds the watchdog if lbd is alive. The main thread
    /// is alive if it gets here; the data threads are if each has made a turn of its event loop
    /// since the last check, as [`progress`](crate::proxy::DataPlane::progress) tells.
    pub(super) fn timeout(&mut self, now: Instant, progress: impl FnOnce() -> Vec<u64>) {
        let Some(told) = &mut self.0 else { return };
        if let Some((until, next)) = told.extending
            && next <= now
        {
            told.extending = (now < until).then_some((until, now + EXTENSION_EVERY));
            if now < until {
                told.channel.tell(&[extension()]);
            }
        }
        if let Some(watchdog) = told.watchdog.as_mut().filter(|watchdog| watchdog.next <= now)
            && watchdog.look(now, progress())
        {
            told.channel.tell(&[NotifyState::Watchdog]);
        }
    }
}

/// Reports why lbd could not start.
pub(super) fn failed(error: &impl ToString) {
    if let Some(mut channel) = Channel::from_environment() {
        channel.tell(&[NotifyState::Status(&one_line(&error.to_string()))]);
    }
}

impl Told {
    /// Reports a new state, together with the current status sentence.
    fn enter(&mut self, state: &[NotifyState<'_>], status: &str, now: Instant) {
        self.status = one_line(status);
        self.status_at = Some(now);
        self.status_due = false;
        self.channel.insist(&[state, &[NotifyState::Status(&self.status)]].concat());
    }
}

impl Watchdog {
    /// Whether all data threads have made progress since the last check.
    fn look(&mut self, now: Instant, turns: Vec<u64>) -> bool {
        self.next = now + self.every;
        let hang = self.turns.iter().zip(&turns).any(|(before, after)| before == after);
        self.turns = turns;
        if hang && !self.hangs {
            let every = seconds(self.every);
            warn!(every, "a data thread makes no progress, the watchdog is not fed");
        }
        self.hangs = hang;
        !hang
    }
}

/// The socket to the manager. No call here blocks: a busy manager must not hold up lbd.
#[derive(Debug)]
struct Channel {
    socket: UnixDatagram,
    manager: SocketAddr,
    /// Messages that must get through but could not be sent yet.
    waiting: VecDeque<String>,
}

impl Channel {
    fn from_environment() -> Option<Self> {
        let name = env::var_os("NOTIFY_SOCKET")?;
        let open = || {
            let manager = match name.as_bytes() {
                [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
                _ => SocketAddr::from_pathname(&name)?,
            };
            let socket = UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            Ok(Self { socket, manager, waiting: VecDeque::new() })
        };
        open()
            .inspect_err(|error: &io::Error| warn!(%error, "the service manager can't be told"))
            .ok()
    }

    /// Sends a message that is soon out of date, once. Returns whether it was sent.
    fn tell(&mut self, state: &[NotifyState<'_>]) -> bool {
        self.flush() && self.send(&message(state))
    }

    /// Sends a message that must get through: as soon as the manager's socket has room. If too many
    /// messages wait, the oldest one is dropped.
    fn insist(&mut self, state: &[NotifyState<'_>]) {
        if self.waiting.len() == WAITING {
            self.waiting.pop_front();
        }
        self.waiting.push_back(message(state));
        self.flush();
    }

    fn is_full(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Sends the waiting messages. Returns whether all of them were sent.
    fn flush(&mut self) -> bool {
        while let Some(next) = self.waiting.front() {
            if !self.send(next) {
                return false;
            }
            self.waiting.pop_front();
        }
        true
    }

    /// Sends a message; returns false if the socket has no room. If the message can't be sent for
    /// another reason, it counts as sent: that is no reason to stop serving.
    fn send(&self, message: &str) -> bool {
        match self.socket.send_to_addr(message.as_bytes(), &self.manager) {
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => {
                debug!(%error, "the service manager was not told");
                true
            }
        }
    }
}

fn message(state: &[NotifyState<'_>]) -> String {
    state.iter().map(|field| format!("{field}\n")).collect()
}

fn extension() -> NotifyState<'static> {
    NotifyState::ExtendTimeoutUsec(u32::try_from(EXTENSION.as_micros()).unwrap_or(u32::MAX))
}

/// Makes a text one line, since a line feed would begin another field.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}
