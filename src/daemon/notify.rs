//! What the service manager is told (sd_notify(3)): in which state lbd is, in one sentence how it is,
//! and, where it asks for that, that lbd is alive. Without a `NOTIFY_SOCKET` nothing is done.

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

/// The sentence is sent no sooner after the one before. And so soon it is tried again to say what
/// the manager had no room for.
const PAUSE: Duration = Duration::from_millis(100);

/// How often it is looked whether there is another sentence while connections drain, which end
/// without the main thread's knowing.
const DRAINING_LOOK: Duration = Duration::from_secs(1);

/// How long a timeout is put off at a time, and how often: where lbd hangs, it strikes soon.
const EXTENSION: Duration = Duration::from_secs(15);
const EXTENSION_EVERY: Duration = Duration::from_secs(5);

/// In one timeout of the watchdog, lbd is looked at so many times: more than one look must fail.
const LOOKS: u32 = 4;

/// So many messages wait for a manager that has no room; there are hardly more states.
const WAITING: usize = 16;

/// The way to the service manager.
#[derive(Debug)]
pub(super) struct Manager(Option<Told>);

#[derive(Debug)]
struct Told {
    channel: Channel,
    watchdog: Option<Watchdog>,
    /// The state that is under way and has a timeout: until then the manager is asked for time, next
    /// at that time.
    extending: Option<(Instant, Instant)>,
    shutdown: bool,
    status: String,
    status_at: Option<Instant>,
    /// The sentence may have changed since; it was too early to send it.
    status_due: bool,
}

#[derive(Debug)]
struct Watchdog {
    every: Duration,
    next: Instant,
    /// The turns that each data thread had made at the last look.
    turns: Vec<u64>,
    hangs: bool,
}

impl Manager {
    /// Who the environment names. The manager is asked for time until `until`, or until
    /// [`ready`](Self::ready).
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

    /// Every service has a healthy worker, or a reload is done.
    pub(super) fn ready(&mut self, status: &str, now: Instant) {
        let Some(told) = &mut self.0 else { return };
        told.extending = None;
        told.enter(&[NotifyState::Ready], status, now);
    }

    /// A reload has begun; [`Self::ready`] ends it.
    pub(super) fn reloading(&mut self, now: Instant) {
        let Some(told) = &mut self.0 else { return };
        let mut state = vec![NotifyState::Reloading];
        state.extend(NotifyState::monotonic_usec_now());
        told.enter(&state, "reloading", now);
    }

    /// The daemon stops, which may take until `until`.
    pub(super) fn shutdown(&mut self, status: &str, until: Instant, now: Instant) {
        let Some(told) = &mut self.0 else { return };
        told.shutdown = true;
        told.extending = Some((until, now + EXTENSION_EVERY));
        told.enter(&[NotifyState::Stopping, extension()], status, now);
    }

    /// Whether [`Self::status`] is of use now: somebody listens, and the last sentence is not too
    /// recent.
    pub(super) fn wants_status(&mut self, now: Instant) -> bool {
        let Some(told) = &mut self.0 else { return false };
        told.status_due = told.status_at.is_some_and(|at| now < at + PAUSE);
        !told.status_due
    }

    /// How it is now; sent if it is another sentence than the last one.
    pub(super) fn status(&mut self, status: &str, now: Instant) {
        let Some(told) = &mut self.0 else { return };
        let status = one_line(status);
        told.status_at = Some(now);
        // One that does not get through is found different again.
        if status != told.status && told.channel.tell(&[NotifyState::Status(&status)]) {
            told.status = status;
        }
    }

    /// When [`Self::timeout`] or [`Self::status`] has something to do.
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

    /// Asks for more time, and says that lbd is alive if it is: the main thread is, having come
    /// here, and the data threads if each has made a turn since the last look, as
    /// [`progress`](crate::proxy::DataPlane::progress) tells.
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

/// Says why lbd could not start.
pub(super) fn failed(error: &impl ToString) {
    if let Some(mut channel) = Channel::from_environment() {
        channel.tell(&[NotifyState::Status(&one_line(&error.to_string()))]);
    }
}

impl Told {
    /// Tells of another state, and in the same message how it is now.
    fn enter(&mut self, state: &[NotifyState<'_>], status: &str, now: Instant) {
        self.status = one_line(status);
        self.status_at = Some(now);
        self.status_due = false;
        self.channel.insist(&[state, &[NotifyState::Status(&self.status)]].concat());
    }
}

impl Watchdog {
    /// Whether all have made progress since the last look.
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

/// The socket. Nothing here ever blocks: a manager that is busy must not hold up lbd.
#[derive(Debug)]
struct Channel {
    socket: UnixDatagram,
    manager: SocketAddr,
    /// What must be said and could not be yet.
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

    /// Says what is soon out of date. Whether it got through.
    fn tell(&mut self, state: &[NotifyState<'_>]) -> bool {
        self.flush() && self.send(&message(state))
    }

    /// Says it as soon as the manager has room for it.
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

    /// Whether all that had to be said is.
    fn flush(&mut self) -> bool {
        while let Some(next) = self.waiting.front() {
            if !self.send(next) {
                return false;
            }
            self.waiting.pop_front();
        }
        true
    }

    /// False where there is no room for it. One that nobody can take is as good as sent: that is no
    /// reason to stop serving.
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

/// A line feed would begin another field.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}
