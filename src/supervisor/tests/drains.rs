//! A slot that an operator took out of rotation: its worker lives on, and no event but the
//! operator's own brings it back.

use super::*;

/// Two workers, the first of which is drained.
fn drained() -> World {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    assert_eq!(world.drain(0), ["publish web", "retire 1"]);
    assert_eq!(world.rotation(), [2]);
    world
}

fn is_drained(world: &World, id: u64) -> bool {
    world.web().workers().any(|worker| worker.id.0 == id && worker.drained.is_some())
}

#[test]
fn a_healthy_worker_leaves_the_rotation_and_runs_on() {
    let mut world = drained();
    assert_eq!(world.facts.last(), Some(&Fact::Drained));
    assert_eq!(world.phase(1), Some(Phase::Healthy));
    // Neither its last connection nor a probe that passes, nor the operator once more.
    assert_eq!(world.idle(1), [""; 0]);
    assert_eq!(world.pass(1), [""; 0]);
    assert_eq!(world.drain(0), [""; 0]);
    assert!(!world.wait(SEC(3600)).iter().any(|effect| effect != "probe 1" && effect != "probe 2"));
    assert_eq!(world.rotation(), [2]);
    assert_eq!(world.resume(0), ["reinstate 1", "publish web"]);
    assert_eq!((world.facts.last(), world.rotation()), (Some(&Fact::Resumed), vec![1, 2]));
    assert_eq!(world.resume(0), [""; 0], "there is nothing to take back");
}

#[test]
fn a_worker_that_starts_gets_healthy_and_stays_out() {
    for launched in [false, true] {
        let mut world = World::begin(ports("a", &[9002]));
        if launched {
            world.started(1);
        }
        assert_eq!(world.coming(), Coming::Now);
        assert_eq!(world.drain(0), ["publish web", "retire 1"]);
        assert_eq!(world.coming(), Coming::Never, "nobody waits for it");
        if !launched {
            world.started(1);
        }
        assert_eq!(world.pass(1), [""; 0]);
        assert_eq!((world.phase(1), world.rotation()), (Some(Phase::Healthy), vec![]));
        assert_eq!(world.resume(0), ["reinstate 1", "publish web"]);
        assert_eq!(world.rotation(), [1]);
    }
}

#[test]
fn one_that_is_not_healthy_in_time_is_killed_as_ever() {
    let mut world = World::begin(ports("a", &[9002]));
    world.drain(0);
    world.started(1);
    world.fail(1);
    assert_eq!(world.wait(SEC(60)), ["probe 1", "kill 1"]);
    world.gone(1);
    assert_eq!(world.wait(MS(100)), ["spawn 2 a on 9002", "retire 2"]);
}

#[test]
fn an_unhealthy_worker_is_left_alone_and_has_its_time_again() {
    let mut world = drained();
    world.fall(1);
    assert_eq!(world.phase(1), Some(Phase::Unhealthy));
    let shown = world.wait(SEC(3600));
    assert!(shown.iter().all(|effect| effect.starts_with("probe")), "{shown:?}");
    assert_eq!(world.resume(0), ["reinstate 1"]);
    assert_eq!(world.rotation(), [2], "it has still to prove itself");
    world.probing.clear();
    let all = world.supervisor.deadline().unwrap() - world.now;
    assert!(all <= SEC(30));
    let stand_in = "spawn 3 a on any".to_owned();
    assert!(!world.wait(MS(29_000)).contains(&stand_in));
    assert!(world.wait(MS(1_000)).contains(&stand_in));
    // Or it recovers.
    let mut world = drained();
    world.fall(1);
    world.resume(0);
    assert_eq!(world.pass(1), ["publish web"]);
    assert_eq!(world.rotation(), [1, 2]);
}

#[test]
fn one_that_was_unhealthy_before_is_left_alone_too() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.fall(1);
    assert_eq!(world.drain(0), ["retire 1"]);
    let shown = world.wait(SEC(3600));
    assert!(shown.iter().all(|effect| effect.starts_with("probe")), "{shown:?}");
    world.pass(1);
    assert_eq!((world.phase(1), world.rotation()), (Some(Phase::Healthy), vec![2]));
}

#[test]
fn the_successor_of_one_that_died_stays_out() {
    let mut world = drained();
    assert_eq!(world.exit(1), [""; 0]);
    world.gone(1);
    assert_eq!(world.wait(MS(100)), ["spawn 3 a on 9002", "retire 3"]);
    world.up(3);
    assert_eq!((world.phase(3), world.rotation()), (Some(Phase::Healthy), vec![2]));
    assert_eq!(world.resume(0), ["reinstate 3", "publish web"]);
    assert_eq!(world.rotation(), [3, 2]);
}

#[test]
fn a_vacant_slot_can_be_drained() {
    let mut world = World::healthy(ports("a", &[9002]));
    world.end(1);
    assert!(matches!(world.coming(), Coming::At(_)));
    assert_eq!(world.drain(0), ["publish web"]);
    assert_eq!(world.coming(), Coming::Never);
    assert_eq!(world.wait(MS(100)), ["spawn 2 a on 9002", "retire 2"]);
    world.up(2);
    assert_eq!(world.rotation(), [0; 0]);
    // And resumed.
    world.end(2);
    assert_eq!(world.resume(0), ["publish web"]);
    assert!(matches!(world.coming(), Coming::At(_)));
}

#[test]
fn a_restart_replaces_it_and_it_stays_out() {
    let mut world = World::healthy(count("a", 2));
    world.drain(0);
    assert_eq!(world.restart(1, Some("web")), ["spawn 3 a on any", "retire 3"]);
    assert_eq!(world.up(3), ["publish web", "retire 1", "spawn 4 a on any"]);
    assert_eq!(world.idle(1), ["SIGTERM 1"], "whatever it held before");
    world.end(1);
    world.up(4);
    world.idle(2);
    world.end(2);
    assert_eq!(world.rotation(), [4]);
    assert_eq!(world.resume(0), ["reinstate 3", "publish web"]);
    assert_eq!(world.rotation(), [3, 4]);
}

#[test]
fn one_slot_is_restarted_like_all_but_alone() {
    let mut world = World::healthy(count("a", 3));
    assert_eq!(world.restart_slot(1, 1), ["publish web", "spawn 4 a on any"]);
    assert_eq!(
        world.restart_slot(2, 2),
        ["answer 2: a rolling replacement of web is already under way, for 0s: 0 of 1 replaced, \
          waiting for the new worker of slot 1 to be healthy"]
    );
    assert_eq!(world.up(4), ["publish web", "retire 2", "answer 1"]);
    assert_eq!(world.rotation(), [1, 4, 3]);
    assert_eq!(world.restart_slot(3, 7), ["answer 3: there is no slot 7 in \"web\""]);
    // One that is to be stopped first makes way.
    let mut world = World::healthy(stop_first(ports("a", &[9002, 9003])));
    assert_eq!(world.restart_slot(1, 1), ["publish web", "retire 2"]);
    assert_eq!(world.idle(2), ["SIGTERM 2"]);
    world.exit(2);
    assert_eq!(world.gone(2), ["publish web", "spawn 3 a on 9003"]);
    assert_eq!(world.up(3), ["publish web", "answer 1"]);
    // A vacant one is filled without further delay.
    world.end(1);
    assert_eq!(world.restart_slot(2, 0), ["publish web", "spawn 4 a on 9002"]);
}

#[test]
fn a_failed_restart_of_one_slot_changes_nothing() {
    let mut world = World::healthy(count("a", 2));
    world.restart_slot(1, 0);
    world.spawned(3);
    let error = "web: slot 0: exit status 1; the 2 old workers still serve, nothing changed";
    assert_eq!(world.exit(3), ["publish web".to_owned(), format!("answer 1: {error}")]);
    assert_eq!(world.rotation(), [1, 2]);
}

#[test]
fn a_limit_does_not_replace_it() {
    let mut config = count("a", 2);
    config.limits.max_age = Some(SEC(100));
    let mut world = World::healthy(config);
    world.drain(0);
    world.drain(1);
    let shown = world.wait(SEC(1000));
    assert!(shown.iter().all(|effect| effect.starts_with("probe")), "{shown:?}");
    // Back in service it is due at once.
    let shown = world.resume(0);
    assert_eq!(shown, ["reinstate 1", "publish web", "spawn 3 a on any"]);
    // While that is under way it can be kept.
    assert_eq!(world.drain(0), ["publish web", "retire 3", "retire 1"]);
    assert_eq!((is_drained(&world, 1), world.rotation()), (true, vec![]));
}

#[test]
fn a_reload_keeps_the_wish() {
    let mut world = drained();
    // Other policies.
    world.apply(1, [stop_first(ports("a", &[9002, 9003]))]);
    assert_eq!(world.rotation(), [2]);
    // Another program: the slot is filled by another worker.
    world.apply(2, [stop_first(ports("b", &[9002, 9003]))]);
    world.idle(1);
    world.end(1);
    world.up(3);
    assert_eq!(world.phase(3), Some(Phase::Healthy));
    assert_eq!(world.rotation(), [0; 0], "the other one is being replaced");
    world.idle(2);
    world.end(2);
    world.up(4);
    assert_eq!(world.rotation(), [4]);
    // Other ports: the numbers stay.
    world.apply(3, [count("b", 2)]);
    assert_eq!(
        world.web().slots.iter().map(|slot| slot.drained).collect::<Vec<_>>(),
        [true, false]
    );
}

#[test]
fn the_wish_goes_with_its_slot_and_comes_back_with_its_worker() {
    let mut world = drained();
    assert_eq!(world.apply(1, [ports("a", &[9003])]), ["retire 1", "answer 1"]);
    assert!(matches!(world.phase(1), Some(Phase::Draining { .. })));
    assert_eq!(world.resume(0), [""; 0], "there is no such slot");
    // The same worker, as it was.
    assert_eq!(world.apply(2, [ports("a", &[9002, 9003])]), ["answer 2"]);
    assert_eq!((world.phase(1), world.rotation()), (Some(Phase::Healthy), vec![2]));
    assert_eq!(world.resume(0), ["reinstate 1", "publish web"]);
    // Another worker knows nothing of it.
    world.drain(0);
    world.apply(3, [ports("a", &[9003])]);
    world.idle(1);
    world.end(1);
    world.apply(4, [ports("a", &[9002, 9003])]);
    world.up(3);
    assert_eq!(world.rotation(), [3, 2]);
}

#[test]
fn a_stop_ends_it_as_all_others() {
    let mut world = drained();
    assert_eq!(world.event(Event::Stop), ["close web"]);
    assert_eq!(world.resume(0), [""; 0], "it is too late");
    assert_eq!(world.closed(), ["publish web", "retire 1", "retire 2"]);
    assert_eq!(world.idle(1), ["SIGTERM 1"]);
    assert_eq!(world.idle(2), ["SIGTERM 2"]);
    world.end(1);
    assert!(world.end(2).ends_with(&["forget web".to_owned(), "finished".to_owned()]));
    // And at once.
    let mut world = drained();
    assert_eq!(world.event(Event::Abort), ["publish web", "kill 1", "kill 2"]);
}

#[test]
fn with_every_slot_drained_nobody_waits() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.drain(0);
    world.drain(1);
    assert_eq!((world.rotation(), world.coming()), (vec![], Coming::Never));
    world.end(2);
    assert_eq!(world.coming(), Coming::Never);
}

#[test]
fn what_is_not_there_cannot_be_drained() {
    let mut world = World::healthy(ports("a", &[9002]));
    assert_eq!(world.drain(1), [""; 0]);
    let elsewhere = Event::Drain { service: "db".into(), slot: 0 };
    assert_eq!(world.event(elsewhere), [""; 0]);
    assert_eq!(world.rotation(), [1]);
}

#[test]
fn a_restart_of_the_slot_puts_it_back_with_its_new_worker() {
    let mut world = World::healthy(count("a", 2));
    world.drain(0);
    assert_eq!(world.coming(), Coming::Never);
    assert_eq!(world.restart_slot(1, 0), ["publish web", "spawn 3 a on any"]);
    assert_eq!((world.rotation(), world.coming()), (vec![2], Coming::Now));
    assert_eq!(world.up(3), ["publish web", "retire 1", "answer 1"]);
    assert_eq!(world.rotation(), [3, 2]);
    assert!(!world.web().slots[0].drained);
    // Where the old one is stopped first.
    let mut world = World::healthy(stop_first(ports("a", &[9002, 9003])));
    world.drain(0);
    assert_eq!(world.restart_slot(1, 0), ["retire 1"]);
    world.idle(1);
    assert_eq!(world.end(1), ["publish web", "spawn 3 a on 9002"]);
    assert_eq!(world.up(3), ["publish web", "answer 1"]);
    assert_eq!(world.rotation(), [3, 2]);
    // Also when it takes a second one.
    let mut world = World::healthy(stop_first(ports("a", &[9002, 9003])));
    world.drain(0);
    world.restart_slot(1, 0);
    world.idle(1);
    world.end(1);
    world.fail_to_start(3);
    assert_eq!(world.wait(MS(100)), ["publish web", "spawn 4 a on 9002"]);
    assert_eq!(world.up(4), ["publish web"]);
    assert_eq!(world.rotation(), [4, 2]);
    // And by way of a stand-in.
    let mut world = drained();
    world.restart_slot(1, 0);
    assert_eq!(world.up(3), ["publish web", "retire 1"]);
    assert_eq!(world.rotation(), [3, 2]);
    world.idle(1);
    world.end(1);
    assert_eq!(world.up(4), ["publish web", "retire 3", "answer 1"]);
    assert_eq!(world.rotation(), [4, 2]);
}

#[test]
fn a_restart_that_fails_leaves_it_drained() {
    let mut world = World::healthy(count("a", 2));
    world.drain(0);
    world.restart_slot(1, 0);
    world.fail_to_start(3);
    assert!(world.web().slots[0].drained && is_drained(&world, 1));
    assert_eq!(world.rotation(), [2]);
}

#[test]
fn a_drain_meanwhile_wins_over_a_restart() {
    let mut world = World::healthy(count("a", 2));
    world.drain(0);
    world.restart_slot(1, 0);
    world.started(3);
    assert_eq!(world.drain(0), ["publish web", "retire 3"]);
    assert_eq!(world.pass(3), ["retire 1", "answer 1"]);
    assert_eq!((world.rotation(), is_drained(&world, 3)), (vec![2], true));
    assert_eq!(world.resume(0), ["reinstate 3", "publish web"]);
    // Also before the new one is there.
    let mut world = World::healthy(stop_first(ports("a", &[9002, 9003])));
    world.drain(0);
    world.restart_slot(1, 0);
    assert_eq!(world.drain(0), [""; 0]);
    world.idle(1);
    assert_eq!(world.end(1), ["spawn 3 a on 9002", "retire 3"]);
}

#[test]
fn a_restart_of_all_leaves_it_drained() {
    let mut world = World::healthy(count("a", 2));
    world.drain(0);
    assert_eq!(world.restart(1, Some("web")), ["spawn 3 a on any", "retire 3"]);
    assert!(world.up(3).contains(&"retire 1".to_owned()));
    world.up(4);
    assert_eq!((world.rotation(), is_drained(&world, 3)), (vec![4], true));
}

#[test]
fn a_reload_that_takes_the_restarted_worker_over_puts_it_back_too() {
    let mut world = World::healthy(count("a", 2));
    world.drain(0);
    world.restart_slot(1, 0);
    assert_eq!(world.apply(2, [count("a", 3)])[0], "answer 1: another change was applied");
    world.up(3);
    assert_eq!(world.rotation(), [3, 2]);
    assert!(!world.web().slots[0].drained);
}
