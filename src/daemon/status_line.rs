//! The status as one sentence, which `systemctl status` shows.

use std::fmt::Write as _;

use super::{Daemon, Stage};
use crate::{
    printable,
    supervisor::{Service, Slot},
};

/// How many services in trouble are named.
const NAMED: usize = 3;

/// How many characters of a reason are shown.
const REASON: usize = 120;

impl Daemon<'_> {
    /// The sentence: one line, a few hundred characters at most.
    pub(super) fn status_line(&self) -> String {
        let services: Vec<_> = self.supervisor.services().collect();
        match self.stage {
            Stage::Running => {
                let mut status_line = running(&services, self.ready);
                if let Some(error) = &self.reload_history.last.error {
                    let _ = write!(status_line, "; the last reload failed: {}", short(error));
                }
                status_line
            }
            Stage::Stopping(_) | Stage::Finished(Some(_)) => {
                self.leaving("stopping", "waiting for")
            }
            Stage::Aborting(_) | Stage::Finished(None) => {
                self.leaving("stopping at once", "cutting")
            }
        }
    }

    fn leaving(&self, how: &str, waits: &str) -> String {
        let workers = self.supervisor.services().flat_map(Service::workers).count();
        let connections = counted(self.frontends.active(), "connection");
        format!("{how}, {waits} {connections} and {}", counted(workers, "worker"))
    }
}

fn running(services: &[&Service], ready: bool) -> String {
    let healthy = |service: &Service| service.rotation().workers.len();
    let all: usize = services.iter().map(|service| service.slots.len()).sum();
    let serving: usize = services.iter().map(|service| healthy(service)).sum();
    let doing = if ready { "serving" } else { "starting" };
    let mut status_line = format!("{doing}, {serving} of {} healthy", counted(all, "worker"));

    let in_trouble: Vec<_> = services.iter().filter(|s| healthy(s) < s.slots.len()).collect();
    for service in in_trouble.iter().take(NAMED) {
        let (name, has, wants) = (&service.config.name, healthy(service), service.slots.len());
        let has = if has == 0 { "none".to_owned() } else { has.to_string() };
        let _ = write!(status_line, "; {name} has {has} of {wants}");
        if let Some(reason) = service.slots.iter().find_map(|slot| reason(service, slot)) {
            let _ = write!(status_line, " ({})", short(&reason));
        }
    }
    if let more @ 1.. = in_trouble.len().saturating_sub(NAMED) {
        let _ = write!(status_line, "; {more} more of {} services lack workers", services.len());
    }
    status_line
}

/// Why the slot has no worker in rotation; `None` if it has one, or if the reason is not known.
fn reason(service: &Service, slot: &Slot) -> Option<String> {
    let current = slot.current.as_ref();
    if current.is_some_and(|worker| service.rotation().workers.contains(&worker.id)) {
        return None;
    }
    if slot.drained {
        return Some("drained by an operator".to_owned());
    }
    let probe = current.and_then(|worker| worker.last_probe.as_ref()?.error());
    let unasked = slot.last_exit.as_ref().filter(|exit| !exit.asked);
    probe.map(str::to_owned).or_else(|| Some(unasked?.how.to_string()))
}

fn short(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default();
    // The worker's output is on the following lines, and is left out.
    let line = printable::line(first.strip_suffix("; it said last:").unwrap_or(first));
    match line.char_indices().nth(REASON) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.into_owned(),
    }
}

fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_one_short_line() {
        assert_eq!(short("\n  lb.toml:3: wrong\nmore"), "lb.toml:3: wrong");
        let long = "ä".repeat(REASON + 1);
        assert_eq!(short(&long), format!("{}…", "ä".repeat(REASON)));
        assert_eq!(short(&"x".repeat(REASON)), "x".repeat(REASON));
        assert_eq!(short("web: exit status 1; it said last:\n    x"), "web: exit status 1");
        assert_eq!(short("a\u{1b}[2J"), "a␛[2J");
        assert_eq!(counted(1, "worker"), "1 worker");
    }
}
