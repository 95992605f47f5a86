//! Random whole histories: a simulated machine carries out the core's effects, slowly and with
//! failures, and the invariants are checked after every step.
//!
//! `LBD_SIM_STEPS` is the number of steps in all, `LBD_SIM_SEED` the first seed. A failure names
//! its seed: run with that as `LBD_SIM_SEED`, the same history comes first.

mod machine;
mod process;

use std::{
    env,
    num::{NonZeroU32, NonZeroU64},
    sync::Arc,
    time::Duration,
};

use machine::Machine;

use super::{Chosen, Event, Phase, Ticket, tests};
use crate::config::{Drain, Health, Limits, Order, Restart, Service, Slots, SocketMode, Stop};

const MS: fn(u64) -> Duration = Duration::from_millis;

/// Longer than any rollout, backoff or timeout that [`settings`] can make takes altogether.
const CALM: Duration = Duration::from_secs(600);

#[test]
fn random_walks_keep_what_must_hold() {
    let number = |name| env::var(name).ok().map(|value| value.parse().expect("a number"));
    let mut left = number("LBD_SIM_STEPS").unwrap_or(100_000_u64);
    let mut seed = number("LBD_SIM_SEED").unwrap_or(0);
    while left > 0 {
        left = left.saturating_sub(walk(seed));
        seed += 1;
    }
}

/// Simulates one daemon's life; returns how many steps it took.
fn walk(seed: u64) -> u64 {
    let mut machine = Machine::new(seed);
    apply(&mut machine);
    for _ in 0..machine.random.u32(0..800) {
        disturb(&mut machine);
    }
    if machine.random.u8(..) < 200 {
        calm_down(&mut machine);
    }
    for _ in 0..machine.random.u32(0..30) {
        disturb(&mut machine);
    }
    end(&mut machine);
    machine.steps
}

/// Does one thing that may happen at any time.
fn disturb(machine: &mut Machine) {
    match machine.random.u32(0..100) {
        0..60 => machine.proceed(),
        60..70 => machine.connect(),
        70..80 => machine.disconnect(),
        80..84 => machine.crash(),
        84..86 => machine.hang(),
        86..90 => machine.sleep(),
        90..94 => apply(machine),
        94..95 => restart(machine),
        95..96 => position(machine),
        96..98 => machine.grow(),
        _ => machine.sweep(),
    }
}

fn apply(machine: &mut Machine) {
    let services = settings(machine);
    let ticket = machine.ticket();
    machine.applied(&services);
    machine.handle(Event::Apply { services, ticket });
}

fn restart(machine: &mut Machine) {
    let names = [None, Some("a"), Some("b"), Some("none")];
    let service = machine.random.choice(names).flatten().map(Into::into);
    let slot = machine.random.bool().then(|| machine.random.u32(0..4));
    machine.restart(service, slot);
}

/// An operator drains a slot, or resumes it.
fn position(machine: &mut Machine) {
    let names = ["a", "b", "c", "none"];
    let service = machine.random.choice(names).unwrap_or("a").into();
    let (slot, drain) = (machine.random.u32(0..4), machine.random.u8(..) < 160);
    machine.position(service, slot, drain);
}

/// A valid configuration, in which no port occurs twice.
fn settings(machine: &mut Machine) -> Vec<Service> {
    let previous = machine.wanted.clone();
    if !previous.is_empty() && machine.random.u8(..) < 40 {
        return previous;
    }
    let random = &mut machine.random;
    let mut ports: Vec<u16> = (9000..9008).collect();
    random.shuffle(&mut ports);
    let mut services = Vec::new();
    for name in ["a", "b", "c"] {
        let old = previous.iter().find(|service| &*service.name == name);
        if random.u8(..) < 60 && (name != "c" || !services.is_empty()) {
            continue;
        }
        let slots = if random.u8(..) < 80 {
            Slots::Count(NonZeroU32::MIN.saturating_add(random.u32(0..3)))
        } else {
            Slots::Ports(ports.drain(..random.usize(1..=ports.len().min(3))).collect())
        };
        let mut service = tests::service(name, "good", slots);
        if let Some(old) = old.filter(|_| random.u8(..) < 150) {
            service = Service { slots: service.slots, ..old.clone() };
        } else {
            vary(&mut service, random);
        }
        services.push(service);
        if ports.is_empty() {
            break;
        }
    }
    services
}

fn vary(service: &mut Service, random: &mut fastrand::Rng) {
    let mut pick = |choices: &[u64]| MS(*random.choice(choices).unwrap_or(&0));
    service.health = Health {
        interval: pick(&[50, 1000]),
        timeout: pick(&[100, 1000]),
        start_timeout: pick(&[1000, 6000]),
        ..Health::default()
    };
    service.restart = Restart {
        min_delay: pick(&[0, 100]),
        max_delay: pick(&[100, 4000]),
        reset_after: pick(&[0, 10, 5000]),
        unhealthy_after: pick(&[0, 2000]),
    };
    service.rollout.settle = pick(&[0, 100, 1000]);
    service.stop = Stop {
        drain_timeout: pick(&[0, 500, 5000]),
        timeout: pick(&[0, 100, 3000]),
        drain: if random.bool() { Drain::Wait } else { Drain::Signal },
        ..Stop::default()
    };
    service.rollout.order = if random.u8(..) < 170 { Order::StartFirst } else { Order::StopFirst };
    service.limits = Limits {
        memory: NonZeroU64::new(random.u64(0..2) * 100),
        max_age: random.bool().then(|| MS(random.u64(20_000..100_000))),
    };
    service.health.rise = NonZeroU32::MIN.saturating_add(random.u32(0..2));
    service.health.fall = NonZeroU32::MIN.saturating_add(random.u32(0..3));
    service.worker = tests::spec(if random.u8(..) < 160 { "good" } else { "bad" });
    if random.bool() {
        Arc::make_mut(&mut service.worker).socket = SocketMode::Inherit;
    }
}

/// Checks that everything that is wanted comes about once nothing fails any more.
fn calm_down(machine: &mut Machine) {
    machine.calm = true;
    if machine.random.bool() {
        machine.resume_all();
    }
    let end = machine.now + CALM;
    while !is_as_wanted(machine) {
        assert!(machine.now < end, "not as wanted: {:#?}", machine.supervisor);
        machine.proceed();
    }
    machine.calm = false;
}

fn is_as_wanted(machine: &Machine) -> bool {
    let running = machine.supervisor.services();
    let complete = |wanted: &Service| {
        let Some(service) = machine.supervisor.service(&wanted.name) else { return false };
        let slots = match &wanted.slots {
            Slots::Count(count) => vec![None; count.get() as usize],
            Slots::Ports(ports) => ports.iter().copied().map(Some).collect(),
        };
        service.config == *wanted
            && service.retiring.is_empty()
            && service.slots.iter().map(|slot| slot.fixed_port).eq(slots)
            && service.slots.iter().all(|slot| {
                let healthy = |w: &super::Worker| {
                    let at_home = !w.stands_in && slot.fixed_port.is_none_or(|p| w.port == Some(p));
                    w.phase == Phase::Healthy
                        && w.spec == wanted.worker
                        && w.slot == slot.number
                        // A slot that an operator drained is left as it is.
                        && (at_home || slot.drained)
                };
                slot.next.is_none() && slot.current.as_ref().is_some_and(healthy)
            })
            && service.rotation().workers.len()
                == service.slots.iter().filter(|slot| !slot.drained).count()
    };
    machine.tickets.is_empty()
        && running.count() == machine.wanted.len()
        && machine.wanted.iter().all(complete)
}

/// Checks that every worker ends, and in time.
fn end(machine: &mut Machine) {
    let start = machine.now;
    let abort = machine.random.u8(..) < 60;
    machine.handle(if abort { Event::Abort } else { Event::Stop });
    let mut bound = if abort { machine::DYING } else { machine::STOPPING };
    while !machine.finished {
        if !abort && machine.random.u32(0..500) == 0 {
            machine.handle(Event::Abort);
            bound = bound.min(machine.now - start + machine::DYING);
        }
        match machine.random.u32(0..100) {
            0..4 => machine.crash(),
            4 => {
                // A request during the stop is refused.
                let ticket = machine.ticket();
                machine.handle(Event::Restart { service: None, slots: Chosen::All, ticket });
                assert!(!machine.tickets.contains(&ticket));
            }
            5..15 => machine.connect(),
            _ => machine.proceed(),
        }
        assert!(machine.now - start <= bound, "not stopped in time: {:#?}", machine.supervisor);
    }
    assert_eq!(machine.tickets, [] as [Ticket; 0], "somebody still waits");
    machine.sweep();
}
