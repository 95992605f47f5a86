//! What systemd is told (sd_notify(3)). Without a `NOTIFY_SOCKET` nothing is sent.

use sd_notify::NotifyState;

/// Every service has a healthy worker, or a reload is done.
pub(super) fn ready() {
    send(&[NotifyState::Ready]);
}

/// A reload has begun; [`ready`] ends it.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(_) => send(&[NotifyState::Reloading]),
    }
}

/// The daemon stops.
pub(super) fn stopping() {
    send(&[NotifyState::Stopping]);
}

/// A message that can't be sent is no reason to stop serving.
fn send(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd was not told");
    }
}
