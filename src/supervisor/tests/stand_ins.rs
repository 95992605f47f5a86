//! Replacing a worker that binds the slot's own port, with one on a free port that serves meanwhile.

use super::*;
use crate::supervisor::LimitExceeded;

const SEE: &str = " (started on a free port, to stand in while the port is handed over: for a \
    program that ignores $PORT or can't run twice set rollout.order = \"stop-first\")";

/// One worker on port 9002.
fn one(command: &str) -> config::Service {
    ports(command, &[9002])
}

/// The stand-in 2 serves in slot 0 instead of 1, which is gone.
fn stood_in() -> World {
    let mut world = World::healthy(one("a"));
    world.apply(1, [one("b")]);
    world.up(2);
    world.idle(1);
    assert_eq!(world.end(1), ["publish web", "spawn 3 b on 9002"]);
    world
}

#[test]
fn the_slot_is_served_all_the_time() {
    let mut world = World::healthy(one("a"));
    assert_eq!(world.apply(1, [one("b")]), ["publish web", "spawn 2 b on any"]);
    assert_eq!(world.rotation(), [1]);
    assert_eq!(world.up(2), ["publish web", "retire 1"]);
    assert_eq!(world.rotation(), [2]);
    let worker = world.web().slots[0].current.as_ref().unwrap();
    assert_eq!((worker.stands_in, worker.port), (true, Some(40_002)));
    assert_eq!(world.idle(1), ["SIGTERM 1"]);
    assert_eq!(world.exit(1), [""; 0], "something of it may still have the port");
    assert_eq!(world.gone(1), ["publish web", "spawn 3 b on 9002"]);
    assert_eq!(world.rotation(), [2]);
    assert_eq!(world.up(3), ["publish web", "retire 2", "answer 1"]);
    assert_eq!(world.rotation(), [3]);
    assert_eq!(world.facts.last(), Some(&Fact::RolloutDone { skipped: Vec::new() }));
    assert_eq!(world.idle(2), ["SIGTERM 2"]);
    assert_eq!(world.end(2), [""; 0]);
    assert_eq!(world.wait(SEC(60)), ["probe 3"], "nothing is left to be done");
}

#[test]
fn one_slot_after_the_other() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.restart(1, None);
    assert_eq!(world.up(3), ["publish web", "retire 1"]);
    world.idle(1);
    assert_eq!(world.end(1), ["publish web", "spawn 4 a on 9002"]);
    assert_eq!(world.up(4), ["publish web", "retire 3", "spawn 5 a on any"]);
    assert_eq!(world.rotation(), [4, 2]);
    world.up(5);
    world.idle(2);
    world.end(2);
    assert_eq!(world.up(6), ["publish web", "retire 5", "answer 1"]);
    assert_eq!(world.rotation(), [4, 6]);
}

#[test]
fn it_settles_and_the_one_on_the_port_need_not() {
    let settling = |command| {
        let mut config = one(command);
        config.rollout.settle = SEC(1);
        config
    };
    let mut world = World::healthy(settling("a"));
    world.apply(1, [settling("b")]);
    assert_eq!(world.up(2), ["publish web"], "clients need not wait for it");
    assert_eq!(world.rotation(), [1]);
    assert!(world.wait(SEC(1)).contains(&"retire 1".to_owned()));
    world.idle(1);
    world.end(1);
    assert_eq!(world.up(3), ["publish web", "retire 2", "answer 1"]);
}

#[test]
fn one_that_fails_refuses_the_rollout_and_names_the_key() {
    let mut world = World::healthy(one("a"));
    world.apply(1, [one("b")]);
    world.started(2);
    let unchanged = "the old worker still serves, nothing changed";
    let answer = format!("answer 1: web: slot 0: exit status 1{SEE}; {unchanged}");
    assert_eq!(world.exit(2), ["publish web", &answer, "restored web"]);
    assert_eq!((world.rotation(), world.web().config.clone()), (vec![1], one("a")));
    world.gone(2);
    assert!(!world.wait(SEC(60)).iter().any(|effect| effect.starts_with("spawn")));
    // The same of a restart.
    world.restart(2, None);
    let shown = world.fail_to_start(3);
    assert_eq!(shown[1], format!("answer 2: web: slot 0: no such file{SEE}; {unchanged}"));
}

#[test]
fn it_serves_on_where_the_one_on_the_port_fails() {
    let mut world = stood_in();
    world.started(3);
    let named = "web: slot 0 serves on port 40002 until 9002 is to be had: exit status 1";
    assert_eq!(world.exit(3), ["publish web".to_owned(), format!("answer 1 ({named})")]);
    assert_eq!(world.rotation(), [2]);
    let done = Fact::RolloutDone { skipped: vec![named["web: ".len()..].to_owned()] };
    assert!(world.facts.contains(&done), "{:?}", world.facts);
    assert!(matches!(world.facts[world.facts.len() - 2], Fact::NotRecycled { .. }));
    // And tries again when nothing of that is left.
    assert_eq!(world.wait(SEC(1)), ["probe 2"]);
    assert_eq!(world.gone(3), ["publish web", "spawn 4 b on 9002"]);
    assert_eq!(world.facts.last(), Some(&Fact::Recycling { worn: LimitExceeded::StandIn }));
    world.end(4);
    assert_eq!(world.wait(MS(100)).last().map(String::as_str), Some("spawn 5 b on 9002"));
    assert_eq!(world.rotation(), [2]);
    assert_eq!(world.up(5), ["publish web", "retire 2"]);
    assert_eq!(world.rotation(), [5]);
}

#[test]
fn others_go_on_where_the_one_on_the_port_fails() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [ports("b", &[9002, 9003])]);
    world.up(3);
    world.idle(1);
    world.end(1);
    assert_eq!(world.fail_to_start(4), ["spawn 5 b on any"], "the next slot's");
    assert_eq!(world.rotation(), [3, 2]);
}

#[test]
fn where_it_has_ended_too_the_settings_are_refused() {
    let mut world = stood_in();
    world.end(2);
    world.started(3);
    let shown = world.exit(3);
    assert_eq!(
        shown[1..],
        ["answer 1: web: slot 0: exit status 1; no worker serves", "restored web"]
    );
    assert_eq!(world.gone(3), ["publish web", "spawn 4 a on 9002"]);
}

#[test]
fn one_that_ends_while_it_waits_for_the_port_is_made_good_for_and_waited_for() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [ports("b", &[9002, 9003])]);
    world.up(3);
    assert_eq!(world.end(3), ["publish web"], "the first still drains");
    world.idle(1);
    assert_eq!(world.end(1), ["publish web", "spawn 4 b on 9002"]);
    assert_eq!(world.fail_to_start(4)[1], "answer 1: web: slot 0: no such file; 1 worker serves");
}

#[test]
fn a_rollback_does_not_start_one_again_and_again() {
    let mut world = World::healthy(ports("a", &[9002, 9003]));
    world.apply(1, [ports("b", &[9002, 9003])]);
    world.up(3);
    world.idle(1);
    world.end(1);
    world.up(4);
    world.idle(3);
    world.end(3);
    assert_eq!(world.fail_to_start(5).last().map(String::as_str), Some("spawn 6 a on any"));
    assert_eq!(world.fail_to_start(6), ["publish web"], "it stays as it is");
    assert_eq!(world.rotation(), [4, 2]);
}

#[test]
fn a_reload_to_what_it_runs_lets_it_go_on() {
    let mut world = World::healthy(one("a"));
    world.apply(1, [one("b")]);
    let mut other = one("b");
    other.stop.timeout = SEC(3);
    let shown = world.apply(2, [other]);
    assert_eq!(shown, ["answer 1: another change was applied"]);
    assert_eq!(world.up(2), ["publish web", "retire 1"]);
    world.idle(1);
    assert_eq!(world.end(1), ["publish web", "spawn 3 b on 9002"]);
    assert_eq!(world.up(3), ["publish web", "retire 2", "answer 2"]);
}

#[test]
fn one_that_a_reload_left_in_its_slot_makes_way_when_the_port_is_free() {
    let mut world = World::healthy(one("a"));
    world.apply(1, [one("b")]);
    world.up(2);
    let mut other = one("b");
    other.stop.timeout = SEC(3);
    let shown = world.apply(2, [other]);
    assert_eq!(shown, ["answer 1: another change was applied", "answer 2"]);
    assert_eq!(world.wait(MS(500)), [""; 0], "the first still drains");
    world.idle(1);
    assert_eq!(world.end(1), ["publish web", "spawn 3 b on 9002"]);
    assert_eq!(world.up(3), ["publish web", "retire 2"]);
}

#[test]
fn a_taken_port_is_looked_at_every_other_second() {
    let mut config = one("a");
    config.restart = Restart::default();
    let mut world = World::healthy(config);
    world.restart(1, None);
    world.up(2);
    world.idle(1);
    world.end(1);
    for id in 3..40 {
        world.port_taken(id);
        let started = |world: &World| world.spawns.iter().any(|spawn| spawn.id.0 > id);
        for _ in 0..2 {
            if !started(&world) {
                world.wait(SEC(1));
            }
        }
        assert!(started(&world), "after {id}");
    }
}
