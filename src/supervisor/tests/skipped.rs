//! Slots that were down before a rollout: they don't hold it up.

use super::*;

/// Three workers on ports, of which the second can't be started.
fn one_is_down() -> World {
    let mut world = World::begin(ports("a", &[9002, 9003, 9004]));
    world.up(1);
    world.up(3);
    world.fail_to_start(2);
    world
}

#[test]
fn one_that_is_down_is_started_anew_and_named_while_the_others_are_replaced() {
    for running in [false, true] {
        let mut world = one_is_down();
        if running {
            world.wait(MS(100));
            world.started(4);
        }
        let mut b = stop_first(ports("b", &[9002, 9003, 9004]));
        b.restart.max_delay = SEC(1);
        world.apply(1, [b.clone()]);
        world.idle(1);
        world.end(1);
        let first = world.spawns.last().unwrap().id.0;
        let shown = world.up(first);
        assert!(shown.contains(&"retire 3".to_owned()), "the third is next: {shown:?}");
        if running {
            assert!(shown.contains(&"SIGTERM 4".to_owned()), "{shown:?}");
            world.end(4);
        }
        let second = world.spawns.last().unwrap();
        assert_eq!((second.port, &second.spec), (Some(9003), &spec("b")));
        let second = second.id.0;
        world.fail_to_start(second);
        world.idle(3);
        world.end(3);
        let third = world.spawns.last().unwrap().id.0;
        let named = "slot 1 was down before: it is started anew, and was not waited for";
        assert_eq!(world.up(third).last(), Some(&format!("answer 1 (web: {named})")));
        let skipped = vec![named.to_owned()];
        assert_eq!(world.facts.last(), Some(&Fact::RolloutDone { skipped }));
        assert_eq!(world.web().config, b, "the new settings are in force");
        world.wait(SEC(1));
        let last = world.spawns.last().unwrap();
        assert_eq!((last.port, &last.spec), (Some(9003), &spec("b")), "for it as well");
    }
}

#[test]
fn where_none_serves_one_has_to_be_proven() {
    let mut world = World::begin(count("a", 2));
    world.fail_to_start(1);
    world.fail_to_start(2);
    world.apply(1, [count("b", 2)]);
    // The first may fail: another one is still to come.
    assert_eq!(world.fail_to_start(3), ["spawn 4 b on any"]);
    let named = "web: slot 0 did not serve before either: no such file";
    assert_eq!(world.up(4), ["publish web".to_owned(), format!("answer 1 ({named})")]);
    assert_eq!(world.web().config, count("b", 2));
}

#[test]
fn where_none_comes_up_the_rollout_has_failed() {
    let mut world = World::begin(count("a", 2));
    world.fail_to_start(1);
    world.fail_to_start(2);
    world.apply(1, [count("b", 2)]);
    world.fail_to_start(3);
    let shown = world.fail_to_start(4);
    let answer = "answer 1: web: slot 1: no such file; no worker serves".to_owned();
    assert!(shown.contains(&answer), "{shown:?}");
    assert!(shown.contains(&"restored web".to_owned()), "{shown:?}");
}

#[test]
fn one_that_is_restarted_by_itself_is_waited_for() {
    let mut world = one_is_down();
    assert_eq!(world.restart_slot(1, 1), ["publish web", "spawn 4 a on 9003"]);
    assert_eq!(world.up(4), ["publish web", "answer 1"]);
    let mut world = one_is_down();
    world.restart_slot(1, 1);
    let answer = "answer 1: web: slot 1: no such file; 2 workers serve";
    assert_eq!(world.fail_to_start(4)[1], answer);
}

#[test]
fn one_that_only_starts_is_waited_for() {
    let mut world = World::begin(count("a", 2));
    world.up(1);
    world.started(2);
    let shown = world.restart(1, None);
    assert_eq!(shown, ["spawn 3 a on any"]);
    let shown = world.up(3);
    assert_eq!(shown, ["publish web", "retire 1", "retire 2", "SIGTERM 2", "spawn 4 a on any"]);
    let named = "web: slot 1 did not serve before either: no such file";
    assert_eq!(world.fail_to_start(4)[1], format!("answer 1 ({named})"), "but it holds up nothing");
}
