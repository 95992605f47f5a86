//! Workers past their memory or age.

use std::num::NonZeroU64;

use super::*;
use crate::supervisor::LimitExceeded;

/// `service`, whose workers may have 100 bytes.
fn small(mut service: config::Service) -> config::Service {
    service.limits.memory = NonZeroU64::new(100);
    service
}

/// `service`, whose workers may run for 1000 s.
fn mortal(mut service: config::Service) -> config::Service {
    service.limits.max_age = Some(SEC(1000));
    service
}

impl World {
    fn memory(&mut self, id: u64, bytes: u64) -> Vec<String> {
        self.event(Event::Memory { id: WorkerId(id), bytes })
    }

    /// Lets time pass until the worker `id` is started; for how long.
    fn next_spawn(&mut self, id: u64) -> Duration {
        let before = self.now;
        while self.spawns.iter().all(|spawn| spawn.id.0 != id) {
            let deadline = self.supervisor.deadline().unwrap();
            self.live(deadline.saturating_duration_since(self.now));
        }
        self.now - before
    }

    /// Lets time pass while every probe passes.
    fn live(&mut self, time: Duration) -> Vec<String> {
        let (end, mut shown) = (self.now + time, Vec::new());
        while let Some(deadline) = self.supervisor.deadline().filter(|&at| at <= end) {
            shown.extend(self.wait(deadline.saturating_duration_since(self.now)));
            for id in self.probing.clone() {
                shown.extend(self.answer_probe(id, None));
            }
        }
        self.now = end;
        shown.retain(|effect| !effect.starts_with("probe "));
        shown
    }
}

#[test]
fn a_worker_past_its_memory_serves_until_its_successor_does() {
    let mut world = World::healthy(small(count("a", 2)));
    assert_eq!(world.memory(1, 100), [""; 0], "just as much as it may have");
    assert_eq!(world.memory(1, 101), ["publish web", "spawn 3 a on any"]);
    let worn = LimitExceeded::Memory { bytes: 101, limit: 100 };
    assert_eq!(world.facts.last(), Some(&Fact::Recycling { worn }));
    assert_eq!(world.rotation(), [1, 2]);
    assert_eq!(world.memory(1, 200), [""; 0], "already on its way");
    assert_eq!(world.up(3), ["publish web", "retire 1"]);
    assert_eq!(world.rotation(), [3, 2]);
    assert_eq!(world.memory(1, 200), [""; 0], "no concern any more");
}

#[test]
fn one_at_a_time_whatever_they_have() {
    let mut world = World::healthy(small(count("a", 3)));
    world.memory(1, 200);
    assert_eq!(world.memory(2, 200), [""; 0]);
    assert_eq!(world.memory(3, 200), [""; 0]);
    assert_eq!(world.memory(3, 50), [""; 0]);
    assert_eq!(world.up(4), ["publish web", "retire 1", "spawn 5 a on any"]);
    assert_eq!(world.up(5), ["publish web", "retire 2"], "the third has freed it again");
}

#[test]
fn stopped_first_it_is_drained_first() {
    let mut world = World::healthy(stop_first(small(ports("a", &[9002, 9003]))));
    assert_eq!(world.memory(1, 200), ["publish web", "retire 1"]);
    assert_eq!(world.memory(2, 200), [""; 0]);
    assert_eq!(world.idle(1), ["SIGTERM 1"]);
    assert_eq!(world.end(1), ["publish web", "spawn 3 a on 9002"]);
    assert_eq!(world.up(3), ["publish web", "retire 2"]);
}

#[test]
fn on_a_shared_port_a_third_waits_for_the_first_to_go() {
    let mut service = small(ports("a", &[9002]));
    Arc::make_mut(&mut service.worker).socket = SocketMode::Inherit;
    let mut world = World::healthy(service);
    world.live(SEC(20));
    assert_eq!(world.memory(1, 200), ["publish web", "spawn 2 a on 9002"]);
    assert_eq!(world.up(2), ["publish web", "retire 1"]);
    assert_eq!(world.memory(2, 200), [""; 0], "the first still drains");
    world.idle(1);
    world.exit(1);
    assert_eq!(world.gone(1), ["publish web", "spawn 3 a on 9002"]);
}

#[test]
fn one_that_outgrows_its_memory_again_and_again_is_recycled_less_and_less_often() {
    let mut service = small(count("a", 1));
    service.restart = Restart::default();
    let mut world = World::healthy(service);
    let mut pauses = Vec::new();
    for id in 1..12 {
        world.memory(id, 200);
        pauses.push(world.next_spawn(id + 1).as_millis());
        world.up(id + 1);
        world.idle(id);
        world.end(id);
    }
    let delays: Vec<u128> = (0..9).map(|doublings| 100 << doublings).collect();
    assert_eq!(pauses[0], 0);
    assert!(pauses[1..9].iter().zip(delays).all(|(pause, delay)| *pause >= delay), "{pauses:?}");
    assert!((24_000..=30_000).contains(&pauses[10]), "{pauses:?}");
    let last = world.spawns.len() as u64;
    world.live(SEC(60));
    assert_eq!(world.memory(last, 200).len(), 2, "at once, after a long time in health");
}

#[test]
fn a_successor_that_fails_leaves_the_old_one_and_is_tried_again_later_and_later() {
    let mut service = small(count("a", 1));
    service.restart = Restart::default();
    let mut world = World::healthy(service);
    world.live(SEC(20));
    world.memory(1, 200);
    let mut delays = Vec::new();
    for id in 2..6 {
        world.fail_to_start(id);
        assert_eq!(world.rotation(), [1]);
        let reason = "no such file".to_owned();
        let retry_in = world.facts.iter().rev().find_map(|fact| match fact {
            Fact::NotRecycled { reason: why, retry_in } => {
                assert_eq!(*why, reason);
                Some(*retry_in)
            }
            _ => None,
        });
        let retry_in = retry_in.unwrap();
        assert_eq!(world.live(retry_in - MS(1)), [""; 0]);
        assert_eq!(
            world.live(MS(1)),
            ["publish web", format!("spawn {} a on any", id + 1).as_str()]
        );
        delays.push(retry_in);
    }
    assert!(delays.windows(2).all(|pair| pair[1] > pair[0]), "{delays:?}");
    assert_eq!(world.web().slots[0].backoff.failures(), 0, "the slot itself never failed");
    assert_eq!(world.up(6), ["publish web", "retire 1"]);
}

#[test]
fn max_age_comes_a_little_earlier_for_some_and_never_for_all_at_once() {
    let mut world = World::healthy(mortal(count("a", 4)));
    assert_eq!(world.live(SEC(899)), [""; 0]);
    let mut due = Vec::new();
    for id in 5..9 {
        due.push(world.next_spawn(id));
        world.up(id);
    }
    assert!(due.iter().skip(1).all(|pause| *pause > MS(100)), "{due:?}");
    let total: Duration = due.iter().sum();
    assert!(total <= SEC(101), "{due:?}");
    let limit = SEC(1000);
    for fact in &world.facts {
        if let Fact::Recycling { worn: LimitExceeded::Age { age, limit: of } } = fact {
            assert!(*of == limit && *age <= limit && *age >= SEC(900), "{fact:?}");
        }
    }
}

#[test]
fn an_unhealthy_worker_is_left_to_its_own_rules() {
    let mut world = World::healthy(mortal(small(count("a", 1))));
    world.fall(1);
    assert_eq!(world.memory(1, 200), [""; 0]);
    assert_eq!(world.pass(1), ["publish web", "spawn 2 a on any"], "when it is back");
}

#[test]
fn a_limit_that_a_reload_sets_holds_at_once_and_one_that_it_removes_does_not() {
    let mut world = World::healthy(count("a", 1));
    assert_eq!(world.memory(1, 200), [""; 0]);
    let shown = world.apply(1, [small(count("a", 1))]);
    assert_eq!(shown, ["publish web", "answer 1", "spawn 2 a on any"]);
    let mut world = World::healthy(mortal(count("a", 1)));
    world.apply(1, [count("a", 1)]);
    assert_eq!(world.live(SEC(2000)), [""; 0]);
}

#[test]
fn a_restart_takes_a_successor_over() {
    let mut world = World::healthy(small(count("a", 2)));
    world.memory(1, 200);
    assert_eq!(world.restart(1, None), [""; 0], "it goes on with the one that is starting");
    assert_eq!(world.up(3), ["publish web", "retire 1", "spawn 4 a on any"]);
    assert_eq!(world.up(4), ["publish web", "retire 2", "answer 1"]);
}

#[test]
fn a_reload_goes_first() {
    let mut world = World::healthy(small(count("a", 2)));
    world.memory(1, 200);
    let shown = world.apply(1, [small(count("b", 2))]);
    assert_eq!(shown, ["retire 3", "spawn 4 b on any"]);
    assert_eq!(world.up(4), ["publish web", "retire 1", "spawn 5 b on any"]);
    assert_eq!(world.up(5), ["publish web", "retire 2", "answer 1"]);
    assert_eq!(world.memory(4, 10), [""; 0]);
}

#[test]
fn a_reload_that_changes_nothing_else_does_not_wait_for_it() {
    let mut world = World::healthy(small(count("a", 1)));
    world.memory(1, 200);
    assert_eq!(world.apply(1, [small(count("a", 1))]), ["answer 1"]);
    assert_eq!(world.up(2), ["publish web", "retire 1"]);
}

#[test]
fn a_stop_ends_it() {
    let mut world = World::healthy(mortal(small(count("a", 1))));
    world.memory(1, 200);
    assert_eq!(world.event(Event::Stop), ["publish web", "retire 2", "close web"]);
    world.end(2);
    assert_eq!(world.memory(1, 300), [""; 0]);
    assert_eq!(world.live(SEC(2000)), [""; 0]);
}
