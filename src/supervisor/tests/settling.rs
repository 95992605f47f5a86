//! `rollout.settle`: how long a new worker has to be healthy before the old one goes.

use super::*;

/// `service`, whose new workers are proven after a second of health.
fn settling(mut service: config::Service) -> config::Service {
    service.rollout.settle = SEC(1);
    service
}

/// What a rollout that failed at slot 0 tells, with two old workers that serve.
fn refused(reason: &str) -> String {
    format!("answer 1: web: slot 0: {reason}; the 2 old workers still serve, nothing changed")
}

#[test]
fn the_first_start_needs_no_settling() {
    let mut world = World::begin(settling(count("a", 2)));
    assert_eq!(world.up(1), ["publish web"]);
    assert_eq!(world.rotation(), [1]);
}

#[test]
fn the_old_one_serves_until_the_new_one_has_settled() {
    let mut world = World::healthy(settling(count("a", 2)));
    world.restart(1, None);
    assert_eq!(world.up(3), ["publish web"], "clients need not wait for it");
    assert_eq!((world.rotation(), world.coming()), (vec![1, 2], Coming::Never));
    assert!(!world.wait(MS(999)).contains(&"retire 1".to_owned()));
    assert_eq!(world.rotation(), [1, 2]);
    let shown = world.wait(MS(1));
    assert!(shown.ends_with(&["retire 1".to_owned(), "spawn 4 a on any".to_owned()]), "{shown:?}");
    assert_eq!(world.rotation(), [3, 2]);
    world.up(4);
    let shown = world.wait(SEC(1));
    assert!(shown.contains(&"answer 1".to_owned()), "each takes its time: {shown:?}");
}

#[test]
fn one_that_ends_before_it_has_settled_ends_the_rollout() {
    let mut world = World::healthy(settling(count("a", 2)));
    world.restart(1, None);
    world.up(3);
    world.wait(MS(999));
    assert_eq!(world.exit(3), [refused("exit status 1")]);
    assert_eq!(world.rotation(), [1, 2]);
    assert!(!world.wait(SEC(60)).iter().any(|effect| effect.starts_with("spawn")));
}

#[test]
fn one_that_is_unhealthy_before_it_has_settled_ends_the_rollout_and_goes() {
    let mut config = settling(count("a", 2));
    config.rollout.settle = SEC(10);
    let mut world = World::healthy(config);
    world.restart(1, None);
    world.up(3);
    world.fail(3);
    world.fail(3);
    let shown = world.fail(3);
    assert_eq!(shown, ["retire 3".to_owned(), refused("unhealthy again: connection refused")]);
    assert_eq!(world.rotation(), [1, 2]);
    assert_eq!(world.idle(3), ["SIGTERM 3"]);
}

#[test]
fn health_counts_without_a_break_only() {
    let mut config = settling(stop_first(count("a", 1)));
    config.health.fall = NonZeroU32::MIN;
    config.rollout.settle = SEC(5);
    let mut world = World::healthy(config.clone());
    // With no old one to go back to, it may yet recover, but nobody calls that proven.
    config.worker = spec("b");
    world.apply(1, [config]);
    world.idle(1);
    world.end(1);
    world.up(2);
    world.wait(SEC(4));
    let shown = world.answer_probe(2, Some("connection refused"));
    assert!(
        shown.iter().any(|effect| effect.starts_with("answer 1: web: slot 0: unhealthy again"))
    );
    assert!(shown.contains(&"restored web".to_owned()), "{shown:?}");
}

#[test]
fn a_successor_that_settles_serves_where_the_old_one_does_not() {
    for ends in [false, true] {
        let mut world = World::healthy(settling(count("a", 1)));
        if !ends {
            world.fall(1);
        }
        world.restart(1, None);
        if ends {
            world.end(1);
        }
        assert_eq!((world.rotation(), world.coming()), (vec![], Coming::Now));
        assert_eq!(world.up(2), ["publish web"], "rather than that clients wait");
        assert_eq!(world.rotation(), [2]);
        assert!(world.wait(SEC(1)).contains(&"answer 1".to_owned()));
        assert_eq!(world.rotation(), [2]);
    }
}

#[test]
fn a_reload_keeps_a_successor_that_serves() {
    let mut world = World::healthy(settling(count("a", 1)));
    world.fall(1);
    world.restart(1, None);
    world.up(2);
    let shown = world.apply(2, [settling(count("b", 1))]);
    assert_eq!(shown[1..3], ["answer 1: another change was applied", "retire 1"]);
    assert_eq!(world.rotation(), [2], "though it has not settled");
    assert_eq!(world.spawns.last().map(|spawn| spawn.id.0), Some(3));
}

#[test]
fn stopped_first_it_settles_before_the_next_one_goes() {
    let mut world = World::healthy(settling(stop_first(count("a", 2))));
    assert_eq!(world.restart(1, None)[..2], ["publish web", "retire 1"]);
    world.idle(1);
    world.end(1);
    world.up(3);
    assert_eq!(world.rotation(), [3, 2]);
    assert!(!world.wait(MS(999)).contains(&"retire 2".to_owned()));
    assert!(world.wait(MS(1)).contains(&"retire 2".to_owned()));
}

#[test]
fn one_that_is_unhealthy_stays_where_there_is_no_other() {
    let mut config = settling(count("a", 1));
    config.health.fall = NonZeroU32::MIN;
    config.rollout.settle = SEC(10);
    let mut world = World::healthy(config);
    world.restart(1, None);
    world.end(1);
    world.up(2);
    let shown = world.fail(2);
    let answer = "answer 1: web: slot 0: unhealthy again: connection refused; no worker serves";
    assert_eq!(shown, ["publish web", answer]);
    assert_eq!(world.slots(), [(0, None, Some(2))]);
    assert_eq!(world.pass(2), ["publish web"]);
    assert_eq!(world.rotation(), [2]);
}
