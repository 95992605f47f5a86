//! A worker that stays unhealthy is replaced, by way of draining: it may be busy, not dead.

use super::*;

/// One worker on a free port, unhealthy for as long as it may be, and the start of its replacement.
fn replaced(config: config::Service) -> World {
    let mut world = World::healthy(config);
    world.fall(1);
    assert_eq!(world.coming(), Coming::Never, "nothing is on its way");
    assert!(!world.wait(MS(29_999)).iter().any(|effect| effect.starts_with("spawn")));
    assert_eq!(world.wait(MS(1)), ["publish web", "spawn 2 a on any"]);
    assert_eq!((world.phase(1), world.coming()), (Some(Phase::Unhealthy), Coming::Now));
    world
}

#[test]
fn its_replacement_is_proven_before_it_is_retired() {
    for config in [count("a", 1), ports("a", &[9002])] {
        let mut world = replaced(config);
        let Some(Fact::Down { how, restart_in: None, .. }) = world.facts.last() else {
            panic!("{:?}", world.facts)
        };
        assert_eq!(*how, Down::NotHealthy("unhealthy for 30s: connection refused".to_owned()));
        assert_eq!(world.up(2), ["publish web", "retire 1"]);
        assert_eq!(world.rotation(), [2]);
        let why = crate::supervisor::RetireReason::Unhealthy;
        assert!(world.facts.contains(&Fact::Draining { why }));
    }
}

#[test]
fn it_is_drained_whatever_the_rules_of_a_stop() {
    let mut config = count("a", 1);
    config.stop.drain = Drain::Signal;
    let mut world = replaced(config.clone());
    world.up(2);
    assert!(matches!(world.phase(1), Some(Phase::Draining { .. })));
    let shown = world.wait(MS(29_999));
    assert!(!shown.iter().any(|effect| effect.contains("TERM")), "{shown:?}");
    assert!(world.wait(MS(1)).contains(&"SIGTERM 1".to_owned()));
    assert!(world.wait(SEC(10)).contains(&"kill 1".to_owned()));
    // Or as soon as it holds nothing more.
    let mut world = replaced(config);
    world.up(2);
    assert_eq!(world.idle(1), ["SIGTERM 1"]);
}

#[test]
fn one_that_is_to_be_stopped_first_is_drained_first() {
    let mut config = stop_first(ports("a", &[9002]));
    config.stop.drain = Drain::Signal;
    let mut world = World::healthy(config);
    world.fall(1);
    world.wait(MS(29_999));
    assert_eq!(world.wait(MS(1)), ["publish web", "retire 1"]);
    assert!(matches!(world.coming(), Coming::At(_)));
    assert_eq!(world.wait(SEC(30)), ["SIGTERM 1"]);
    assert_eq!(world.wait(SEC(10)), ["kill 1"]);
    assert_eq!(world.gone(1), ["publish web", "spawn 2 a on 9002"]);
}

#[test]
fn one_that_recovers_meanwhile_stays() {
    let mut world = replaced(count("a", 1));
    world.started(2);
    assert_eq!(world.pass(1), ["publish web", "retire 2", "SIGTERM 2"]);
    assert_eq!(world.rotation(), [1]);
    world.end(2);
    assert!(!world.wait(SEC(60)).iter().any(|effect| effect.starts_with("spawn")));
    // Also where the replacement is healthy already, and serves for it while it settles.
    let mut config = count("a", 1);
    config.rollout.settle = SEC(5);
    let mut world = replaced(config);
    world.up(2);
    assert_eq!(world.rotation(), [2]);
    assert_eq!(world.pass(1), ["publish web", "retire 2"]);
    assert_eq!(world.rotation(), [1]);
    assert_eq!(world.idle(2), ["SIGTERM 2"]);
}

#[test]
fn all_that_hang_are_replaced_one_after_the_other_without_waiting_for_a_drain() {
    let mut world = World::healthy(ports("a", &[9002, 9003, 9004]));
    for id in 1..4 {
        world.fall(id);
    }
    world.wait(SEC(30));
    assert_eq!(world.up(4)[..2], ["publish web", "retire 1"]);
    assert_eq!(world.up(5)[..2], ["publish web", "retire 2"]);
    assert_eq!(world.up(6)[..2], ["publish web", "retire 3"]);
    assert_eq!(world.rotation(), [4, 5, 6], "though the ports are still taken");
    world.idle(2);
    world.end(2);
    let shown = world.wait(MS(100));
    assert!(shown.contains(&"spawn 7 a on 9003".to_owned()), "whichever is free first: {shown:?}");
    assert_eq!(world.up(7), ["publish web", "retire 5"]);
}

#[test]
fn where_a_replacement_beside_it_fails_it_makes_way_first() {
    for config in [count("a", 1), ports("a", &[9002])] {
        let fixed = config.slots == Slots::Ports(vec![9002]);
        let mut world = replaced(config);
        let shown = world.fail_to_start(2);
        assert_eq!(shown, ["publish web", "retire 1"], "it may ignore $PORT, or not run twice");
        world.idle(1);
        let port = if fixed { "9002" } else { "any" };
        assert_eq!(world.end(1), ["publish web", &format!("spawn 3 a on {port}")]);
        assert_eq!(world.up(3), ["publish web"]);
        assert_eq!(world.rotation(), [3]);
    }
}

#[test]
fn one_after_long_health_is_replaced_with_no_delay_and_the_next_ones_later_and_later() {
    let mut config = count("a", 1);
    config.restart = Restart { unhealthy_after: MS(0), ..Restart::default() };
    config.health.interval = MS(10);
    config.health.fall = NonZeroU32::MIN;
    let mut world = World::healthy(config);
    world.wait(SEC(10));
    world.fail(1);
    let mut pauses = Vec::new();
    for id in 2..9 {
        let fell = world.now;
        while world.spawns.len() < id {
            let deadline = world.supervisor.deadline().unwrap();
            world.wait(deadline.saturating_duration_since(world.now));
        }
        pauses.push((world.now - fell).as_millis());
        world.probing.clear();
        world.up(id as u64);
        world.fail(id as u64);
    }
    assert_eq!(pauses[..2], [0, 0], "as a crash after so long a time");
    assert!(pauses[1..].is_sorted() && pauses[6] >= 1500, "{pauses:?}");
}

#[test]
fn one_that_a_restart_replaces_serves_no_more_but_ends_what_it_has() {
    let mut world = World::healthy(count("a", 1));
    world.fall(1);
    assert_eq!(world.restart(1, None), ["publish web", "spawn 2 a on any"]);
    assert_eq!(world.up(2), ["publish web", "retire 1", "answer 1"]);
    assert!(matches!(world.phase(1), Some(Phase::Draining { .. })));
}

#[test]
fn a_stand_in_that_is_unhealthy_makes_way_for_one_on_the_port() {
    let mut world = World::healthy(ports("a", &[9002]));
    world.restart(1, None);
    world.up(2);
    world.idle(1);
    world.end(1);
    world.fail_to_start(3);
    world.wait(MS(200));
    world.fail_to_start(4);
    world.fall(2);
    // The attempt that was under way by then.
    world.fail_to_start(5);
    world.wait(SEC(30));
    let is_down = |fact: &Fact| matches!(fact, Fact::Down { how: Down::NotHealthy(why), .. } if why.starts_with("unhealthy for 30s"));
    assert!(world.facts.iter().any(is_down), "{:?}", world.facts);
    let last = world.spawns.last().map(|spawn| (spawn.id.0, spawn.port));
    assert_eq!(last, Some((6, Some(9002))));
    assert_eq!(world.up(6), ["publish web", "retire 2"]);
    assert_eq!(world.rotation(), [6]);
}
